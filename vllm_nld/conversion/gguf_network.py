"""The network of a GGUF file as llama.cpp computes it: what a conversion of one is compared with.

It works on the file's own tensors, whose rotary pairs are neighbors, so it shares neither code nor layout with the
reference model. Plain and slow: one prompt at a time, no cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_nld.config import NemotronLabsDiffusionConfig


class GGUFNetwork(nn.Module):
    """Maps int64 ``[tokens]`` to float32 logits ``[tokens, vocab]``.

    Args:
        shape: sizes of the model; its rotary parameters are not looked at, only ``rope_theta``.
        tensors: float32, by their names in the file.
        divisors: ``rope_freqs``, float32 ``[head_dim // 2]``, what the rotary frequencies are divided by.
        linear_factor: what positions are divided by.
    """

    def __init__(
        self,
        shape: NemotronLabsDiffusionConfig,
        tensors: dict[str, Tensor],
        divisors: Tensor | None,
        linear_factor: float,
    ) -> None:
        super().__init__()
        self.shape = shape
        # Names of parameters may have no dots.
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        )
        steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        frequencies = float(shape.rope_parameters["rope_theta"]) ** -steps / linear_factor
        self.frequencies = frequencies if divisors is None else frequencies / divisors.double()

    def weight(self, name: str) -> Tensor:
        """Return a weight by its name in the file, without the end ``.weight``."""
        weight: Tensor = self.weights[f"{name}.weight".replace(".", "/")]
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.weight("token_embd"))
        for layer in range(self.shape.num_hidden_layers):
            x = x + self._attention(self._normed(x, f"blk.{layer}.attn_norm"), f"blk.{layer}")
            x = x + self._mlp(self._normed(x, f"blk.{layer}.ffn_norm"), f"blk.{layer}")
        head = "token_embd" if self.shape.tie_word_embeddings else "output"
        return F.linear(self._normed(x, "output_norm"), self.weight(head))

    def _normed(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight(name), self.shape.rms_norm_eps)

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        tokens, size = len(x), self.shape.head_dim
        query, key, value = (F.linear(x, self.weight(f"{prefix}.attn_{part}")).view(tokens, -1, size) for part in "qkv")
        query, key = self._rotated(query), self._rotated(key)
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * size**-0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        chances = scores.masked_fill(future, -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", chances, value).reshape(tokens, -1)
        return F.linear(out, self.weight(f"{prefix}.attn_output"))

    def _rotated(self, x: Tensor) -> Tensor:
        """Turn the pairs (2i, 2i + 1) of ``[tokens, heads, head_dim]``, as complex numbers."""
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * self.frequencies
        turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[:, None]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        gate, up = F.linear(x, self.weight(f"{prefix}.ffn_gate")), F.linear(x, self.weight(f"{prefix}.ffn_up"))
        return F.linear(F.silu(gate) * up, self.weight(f"{prefix}.ffn_down"))

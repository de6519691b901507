"""The NLD network on one page: dense PyTorch, no paging, no kernels. The tests compare against it.

One set of weights, two attention patterns. ``causal`` rows predict the *next* position; ``bidirectional`` rows
predict their *own* position. Only causal calls may write the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.reference.adapter import DraftAdapter
from vllm_nld.reference.rope import inverse_frequencies


def query_scale(positions: Tensor, scaling: dict[str, float] | None) -> Tensor:
    """Return the llama-4 query multiplier for ``positions`` (int64, any shape), float32, same shape.

    ``1 + beta * ln(1 + floor(position / original_context))``: exactly 1 inside the original context.
    """
    if scaling is None:
        return torch.ones(positions.shape, dtype=torch.float32, device=positions.device)
    turns = torch.div(positions, int(scaling["original_max_position_embeddings"]), rounding_mode="floor")
    return 1 + scaling["beta"] * torch.log1p(turns.to(torch.float32))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding, pairing component i with i + head_dim/2.

    Args:
        x: ``[batch, heads, tokens, head_dim]``.
        cos, sin: of the angles, ``[tokens, head_dim // 2]`` or ``[batch, 1, tokens, head_dim // 2]``.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return grouped-query attention ``[batch, heads, tokens, head_dim]``; on CUDA, ``mask`` is :func:`folded_mask`."""
    if query.is_cuda:
        return attend_folded(query, key, value, mask)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def attend_folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As :func:`attend`, but a group's heads become queries of one head.

    For PyTorch's fused CUDA kernels: those that take a mask know no groups.
    """
    batch, _, _, size = query.shape
    folded = query.reshape(batch, key.shape[1], -1, size)
    return F.scaled_dot_product_attention(folded, key, value, attn_mask=mask).reshape(query.shape)


def folded_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return what :func:`attend_folded` adds to scores: a bool ``mask``, once for each head of a group."""
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    four = added.view((1,) * (4 - added.ndim) + added.shape)
    return four.repeat(1, 1, groups if four.shape[2] > 1 else 1, 1)


@dataclass(frozen=True)
class Rotation:
    """What positions do to queries and keys, in the model's dtype, the same in every layer.

    Attributes:
        cos, sin: of the rotary angles, ``[tokens, head_dim // 2]`` or ``[batch, 1, tokens, head_dim // 2]``.
        scale: of queries, ``[..., tokens, 1]``; None: 1.
    """

    cos: Tensor
    sin: Tensor
    scale: Tensor | None


@dataclass
class KVCache:
    """Keys and values of decided tokens, one ``[batch, kv_heads, length, head_dim]`` pair per layer."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Number of cached tokens."""
        return self.keys[0].shape[2] if self.keys else 0

    def extended(self, layer: int, key: Tensor, value: Tensor, write: bool) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values with new ones after them, which are kept if ``write``."""
        if len(self.keys) > layer:
            key = torch.cat((self.keys[layer], key), dim=2)
            value = torch.cat((self.values[layer], value), dim=2)
        if write:
            self.keys[layer : layer + 1] = [key]
            self.values[layer : layer + 1] = [value]
        return key, value

    def crop(self, length: int) -> None:
        """Drop all tokens from position ``length`` on: those that a verify rejected."""
        self.keys = [k[:, :, :length] for k in self.keys]
        self.values = [v[:, :, :length] for v in self.values]


class RoomyKVCache(KVCache):
    """A cache with room for ``capacity`` tokens from the start, so that a long text is not copied at every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._room: list[tuple[Tensor, Tensor]] = []

    def extended(self, layer: int, key: Tensor, value: Tensor, write: bool) -> tuple[Tensor, Tensor]:
        if not write:
            return super().extended(layer, key, value, write)
        past = self.keys[layer].shape[2] if len(self.keys) > layer else 0
        if len(self._room) == layer:
            batch, heads, _, size = key.shape
            shape = batch, heads, self.capacity, size
            self._room.append((key.new_empty(shape), value.new_empty(shape)))
        end = past + key.shape[2]
        for room, new in zip(self._room[layer], (key, value), strict=True):
            room[:, :, past:end] = new
        keys, values = (room[:, :, :end] for room in self._room[layer])
        self.keys[layer : layer + 1] = [keys]
        self.values[layer : layer + 1] = [values]
        return keys, values


class RMSNorm(nn.Module):
    """Root-mean-square normalization, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one kernel, which keeps nothing wide for the backward pass
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


@dataclass(frozen=True)
class Projections:
    """The linear layers of a part of a decoder layer, by name, with what a draft adapter adds to them."""

    part: nn.Module
    layer: int
    adapter: DraftAdapter | None

    def __call__(self, target: str, x: Tensor) -> Tensor:
        output: Tensor = getattr(self.part, target)(x)
        return output if self.adapter is None else self.adapter.add(self.layer, target, x, output)


class Attention(nn.Module):
    """Grouped-query attention with an explicit head size; no biases, no q/k norms."""

    def __init__(self, config: NemotronLabsDiffusionConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:-1], heads, self.head_dim).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        mask: Tensor | None,
        cache: KVCache | None,
        write: bool,
        adapter: DraftAdapter | None = None,
    ) -> Tensor:
        project = Projections(self, self.layer, adapter)
        query = rotate(self._split(project("q_proj", x), self.heads), rotation.cos, rotation.sin)
        if rotation.scale is not None:
            query = query * rotation.scale
        key = rotate(self._split(project("k_proj", x), self.kv_heads), rotation.cos, rotation.sin)
        value = self._split(project("v_proj", x), self.kv_heads)
        if cache is not None:
            key, value = cache.extended(self.layer, key, value, write)
        return project("o_proj", attend(query, key, value, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: NemotronLabsDiffusionConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, adapter: DraftAdapter | None = None) -> Tensor:
        project = Projections(self, self.layer, adapter)
        return project("down_proj", F.silu(project("gate_proj", x)) * project("up_proj", x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: NemotronLabsDiffusionConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, layer)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        mask: Tensor | None,
        cache: KVCache | None,
        write: bool,
        adapter: DraftAdapter | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache, write, adapter)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x), adapter)
        return out


class Encoder(nn.Module):
    """Embedding, decoder layers and final norm (the released files call this part ``encoder``)."""

    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class ReferenceModel(nn.Module):
    """Dense NLD model whose parameter names are the released tensor names.

    With tied embeddings ``diffusion_head.weight`` is ``encoder.embed_tokens.weight``: one parameter, by that name.

    Args:
        config: of the checkpoint.
        encoder: one with more parts; None: the text model's.

    Attributes:
        draft_adapter: changes only what :meth:`draft` predicts. Not one of the model's parameters.
    """

    def __init__(self, config: NemotronLabsDiffusionConfig, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder or Encoder(config)
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.diffusion_head.weight = self.encoder.embed_tokens.weight
        self.draft_adapter: DraftAdapter | None = None
        # Read once, because attributes of a transformers config are slow.
        self._scaling, self._never_emitted = config.llama_4_scaling, list(config.never_emitted)
        self.inverse_frequencies: Tensor
        frequencies = inverse_frequencies(config.head_dim, config.rope_parameters)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: KVCache | None = None,
        write: bool = False,
        adapter: DraftAdapter | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Return the normed hidden states ``[batch, tokens, hidden]`` under an explicit attention mask.

        Args:
            ids: int64 ``[batch, tokens]``.
            positions: int64 ``[tokens]`` or ``[batch, tokens]``, absolute.
            mask: bool, broadcastable to ``[batch, heads, tokens, cached + tokens]``; True means "may attend". It is
                the same for all heads. None: all attend to everything.
            cache: prefix whose keys and values are read.
            write: append this call's keys and values to ``cache``. Only causal calls may set it.
            adapter: changes projections and the mask token's input row; for draft passes.
            embedded: ``[batch, tokens, hidden]``, what counts instead of the ids' own embeddings; for images.
        """
        if positions.ndim == 2:
            positions = positions[:, None]
        # Angles in float64, then rounded once, because float32 products of large positions lose the low frequencies.
        angles = (positions.double()[..., None] * self.inverse_frequencies).float()
        x = self.encoder.embed_tokens(ids) if embedded is None else embedded
        if adapter is not None:
            x = adapter.embed(ids, x)
        rotation = Rotation(
            angles.cos().to(x.dtype),
            angles.sin().to(x.dtype),
            None if self._scaling is None else query_scale(positions, self._scaling).unsqueeze(-1).to(x.dtype),
        )
        if mask is not None and mask.is_cuda:
            mask = folded_mask(mask, self.config.num_attention_heads // self.config.num_key_value_heads, x.dtype)
        for layer in self.encoder.layers:
            x = layer(x, rotation, mask, cache, write, adapter)
        out: Tensor = self.encoder.norm(x)
        return out

    def embed(self, ids: Tensor, images: Sequence[Tensor] = ()) -> Tensor:
        """Return the embeddings ``[batch, tokens, hidden]`` of a prompt's ``ids`` and images.

        Args:
            ids: int64 ``[batch, tokens]``.
            images: normalized pixels, each ``[3, height, width]``, in the order of their placeholders.

        Raises:
            ValueError: there are images, and this is a text model; or they do not fit the placeholders.
        """
        if images:
            raise ValueError(f"{len(images)} images, but {self.config.model_type} is a text model")
        embedded: Tensor = self.encoder.embed_tokens(ids)
        return embedded

    def causal(self, ids: Tensor, cache: KVCache | None = None, embedded: Tensor | None = None) -> Tensor:
        """Return logits ``[batch, tokens, vocab]`` with row i predicting position i + 1; appends to ``cache``."""
        return self.logits(self.causal_hidden(ids, cache, embedded))

    def causal_hidden(self, ids: Tensor, cache: KVCache | None = None, embedded: Tensor | None = None) -> Tensor:
        """As :meth:`causal`, but the hidden states ``[batch, tokens, hidden]`` that logits are made of."""
        past, tokens = (cache.length if cache is not None else 0), ids.shape[1]
        mask = None
        if tokens > 1:
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=ids.device).tril(past)
        positions = self._positions(past, ids)
        return self.hidden(ids, positions, mask, cache, write=cache is not None, embedded=embedded)

    def bidirectional(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return logits ``[batch, tokens, vocab]`` with row i predicting position i; does not change ``cache``."""
        return self._over_all(ids, cache, None)

    def draft(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """As :meth:`bidirectional`, with the draft adapter if there is one."""
        return self._over_all(ids, cache, self.draft_adapter)

    def _over_all(self, ids: Tensor, cache: KVCache | None, adapter: DraftAdapter | None) -> Tensor:
        past = cache.length if cache is not None else 0
        return self.logits(self.hidden(ids, self._positions(past, ids), None, cache, write=False, adapter=adapter))

    @staticmethod
    def _positions(past: int, ids: Tensor) -> Tensor:
        return torch.arange(past, past + ids.shape[1], device=ids.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project ``[..., hidden]`` to float32 ``[..., vocab]``.

        The mask token is excluded (it stands for "undecided" and is never an answer), and what else the config names.
        """
        logits: Tensor = self.diffusion_head(hidden).float()
        logits[..., self._never_emitted] = -torch.inf
        return logits

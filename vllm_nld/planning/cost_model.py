"""A small cost model of the three modes: what a GPU can hold and how fast it decodes.

A forward is a sum of parts: the matrix products of the layers and of the output layer, attention, the small operators
between them, passes over the logits, all-reduces, and the start and end of kernels. Forwards make up an AR step, a
cycle of self-speculation (draft and verify) and a diffusion block. docs/research/scaling.md lists the assumptions and
compares them with measurements. Only decoding is modeled: no prefill, no waiting, and all requests alike.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

from vllm_nld.errors import NLDError
from vllm_nld.planning.gpus import FLOAT_BYTES, Gpu
from vllm_nld.planning.weight_formats import FORMATS, WeightFormat

MEMORY_SHARE = 0.9
"""Share of a GPU's memory that vLLM takes by default."""
PAGE = 16
"""Tokens of a KV page."""
KERNELS = 10
"""Kernels of a layer: two norms, qkv, rotary, KV write, attention, output, gate and up, activation, down."""
PREFILL_CHUNK = 8192
"""Tokens of the largest step, which sizes the activations."""
MAX_RUNNING = 1024
"""Most requests in a step. The search for the crossover ends here."""

AR_LOGIT_BYTES, DRAFT_LOGIT_BYTES, VERIFY_LOGIT_BYTES = 12, 28, 16
"""Bytes moved per logit, written by the output layer in 16 bits. AR: that, a float32 copy, argmax. Verify: also a
gather. Draft: a float32 copy, argmax, and the confidence's sum of exponentials."""
AR_LOGIT_SPACE, BLOCK_LOGIT_SPACE = 6, 10
"""Bytes held per logit: 16 bits and the float32 copy; for drafts also the exponentials."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a checkpoint, named as in its config.

    Attributes:
        image_weights: of what reads images. They take memory; a forward over text does not use them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    max_positions: int
    tied: bool = False
    image_weights: int = 0

    @cached_property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer."""
        attention = 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @cached_property
    def norm_weights(self) -> int:
        """Weights of all norms. Every GPU has all of them."""
        return (2 * self.layers + 1) * self.hidden_size

    @cached_property
    def head_weights(self) -> int:
        """Weights of the output layer. The embedding has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights; a tied head counts once."""
        matrices = self.layers * self.layer_weights + self.head_weights * (1 if self.tied else 2)
        return matrices + self.norm_weights + self.image_weights

    def kv_bytes_per_token(self, bytes_per_value: int, tp: int = 1) -> int:
        """Bytes of keys and values of one token on one of ``tp`` GPUs. Fewer heads than GPUs are repeated."""
        return 2 * self.layers * max(1, self.kv_heads // tp) * self.head_dim * bytes_per_value


@dataclass(frozen=True)
class Setup:
    """A model on a number of GPUs, as vLLM would run it.

    Attributes:
        tp: GPUs that share each layer.
        dtype: of the layers' weights, a name in :data:`vllm_nld.planning.weight_formats.FORMATS`.
        kv_dtype: type of keys and values.
        context: cached tokens per request.

    Raises:
        NLDError: the combination is impossible; the message names the option.
    """

    model: ModelShape
    gpu: Gpu
    tp: int = 1
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    context: int = 2048

    def __post_init__(self) -> None:
        for option, name, known in (("--dtype", self.dtype, FORMATS), ("--kv-dtype", self.kv_dtype, FLOAT_BYTES)):
            if name not in known:
                raise NLDError(f"{option} {name}: allowed are {', '.join(known)}")
        if self.weights.units not in self.gpu.flops:
            allowed = ", ".join(name for name, weights in FORMATS.items() if weights.units in self.gpu.flops)
            raise NLDError(f"--dtype {self.dtype}: {self.gpu.name} has no units for it; allowed there: {allowed}")
        heads, kv_heads = self.model.heads, self.model.kv_heads
        if heads % self.tp or (kv_heads % self.tp and self.tp % kv_heads):
            raise NLDError(f"--tp {self.tp}: {heads} heads and {kv_heads} KV heads cannot be shared out; allowed: "
                           + ", ".join(str(tp) for tp in (1, 2, 4, 8, 16, 32) if not heads % tp
                                       and (not kv_heads % tp or not tp % kv_heads)))  # fmt: skip
        if self.tp > 1 and not self.gpu.link_bandwidth:
            raise NLDError(f"--tp {self.tp}: no link between GPUs is known for --gpu {self.gpu.name}; allowed there: 1")
        if self.context > self.model.max_positions:
            raise NLDError(f"--context {self.context}: the model has {self.model.max_positions} positions")

    @property
    def weights(self) -> WeightFormat:
        """Format of the layers' weights."""
        return FORMATS[self.dtype]

    @property
    def wide_dtype(self) -> str:
        """Type of activations, embedding and output layer."""
        return self.weights.wide

    @property
    def wide_bytes(self) -> int:
        """Bytes of a value of the wide type."""
        return FLOAT_BYTES[self.wide_dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV per token on one GPU."""
        return self.model.kv_bytes_per_token(FLOAT_BYTES[self.kv_dtype], self.tp)

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights on one GPU."""
        model = self.model
        shared = model.layers * model.layer_weights * self.weights.bytes
        shared += model.head_weights * (1 if model.tied else 2) * self.wide_bytes
        shared += model.image_weights * self.wide_bytes
        return shared / self.tp + model.norm_weights * self.wide_bytes

    def on(self, tp: int) -> Setup:
        """Return a copy with another number of GPUs."""
        return Setup(self.model, self.gpu, tp, self.dtype, self.kv_dtype, self.context)


@dataclass(frozen=True)
class Forward:
    """Seconds of one forward and of the passes over its logits, by part."""

    layers: float
    attention: float
    head: float
    small_operators: float
    logits: float
    all_reduce: float
    kernels: float

    @property
    def seconds(self) -> float:
        """All parts, one after the other."""
        return sum(float(getattr(self, part.name)) for part in fields(self))

    @property
    def longest(self) -> str:
        """The part that takes longest, in words."""
        return max((part.name for part in fields(self)), key=lambda name: float(getattr(self, name))).replace("_", " ")


def forward(setup: Setup, requests: int, rows: int, logit_rows: float, logit_bytes: int) -> Forward:
    """Return the cost of a forward.

    Args:
        setup: model and GPUs.
        requests: requests in the batch.
        rows: tokens of each request.
        logit_rows: how many of these reach the output layer.
        logit_bytes: bytes moved per logit afterwards.
    """
    model, gpu, tp = setup.model, setup.gpu, setup.tp
    tokens, logits = requests * rows, requests * logit_rows * model.vocab_size
    layer_weights = model.layers * model.layer_weights / tp
    head_weights = model.head_weights / tp
    keys = setup.context + rows
    queries = model.head_dim * model.heads / tp
    # Norms and residuals read and write 8 rows of the hidden size, rotary its input twice, the activation 3.
    between = 8 * model.hidden_size + (2 * model.head_dim * (model.heads + 2 * model.kv_heads)
                                       + 3 * model.intermediate_size) / tp  # fmt: skip
    return Forward(
        layers=gpu.seconds(2 * tokens * layer_weights, layer_weights * setup.weights.bytes, setup.weights.units),
        attention=gpu.seconds(
            4 * model.layers * tokens * keys * queries, requests * keys * setup.kv_bytes_per_token, setup.wide_dtype
        ),
        head=gpu.seconds(
            2 * requests * logit_rows * head_weights, head_weights * setup.wide_bytes, setup.wide_dtype
        ),
        small_operators=gpu.read_seconds(model.layers * tokens * between * setup.wide_bytes),
        logits=gpu.read_seconds(logits * logit_bytes),
        all_reduce=_collectives(setup, tokens, logits),
        kernels=gpu.kernel_seconds * (KERNELS * model.layers + 4),
    )  # fmt: skip


def _collectives(setup: Setup, tokens: float, logits: float) -> float:
    """Return seconds of the all-reduces (two per layer, one for the embedding), and of gathering the logits."""
    if setup.tp == 1:
        return 0.0
    others = (setup.tp - 1) / setup.tp
    count = 2 * setup.model.layers + 1
    reduced = 2 * others * tokens * setup.model.hidden_size * setup.wide_bytes * count
    gathered = others * logits * setup.wide_bytes
    return setup.gpu.link_latency * (count + 1) + (reduced + gathered) / setup.gpu.link_bandwidth


@dataclass(frozen=True)
class PlannedMode:
    """A way of decoding.

    Attributes:
        name: ``ar``, ``self_speculation`` or ``diffusion``.
        block: block length in tokens, seed included; 1 for AR.
        yields: tokens per AR step (1), per cycle (the acceptance length), or per forward of a diffusion block, with its
            commit (TPF).
    """

    name: str
    block: int = 1
    yields: float = 1.0

    @property
    def label(self) -> str:
        """Name and block length."""
        return self.name if self.block == 1 else f"{self.name} {self.block}"


AR = PlannedMode("ar")


def acceptance_at(length: float, trained_block: int, block: int) -> float:
    """Return the acceptance length at another block length, if each draft is accepted with the same probability ``a``.

    The acceptance length is then ``1 + a + a^2 + ...`` over the block's positions. Published lengths of the 8B model at
    8, 16 and 32 agree with this to within 5 %.

    Raises:
        NLDError: blocks of ``trained_block`` tokens cannot have this ``length``.
    """
    if not 1 <= length <= trained_block:
        raise NLDError(f"--acceptance {length}: allowed are 1 to {trained_block}, the checkpoint's block length")

    def expected(rate: float, positions: int) -> float:
        return float(sum(rate**place for place in range(positions)))

    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        low, high = (rate, high) if expected(rate, trained_block) < length else (low, rate)
    return expected(high, block)


def passes(setup: Setup, mode: PlannedMode, requests: int) -> list[tuple[str, float, Forward]]:
    """Return what one step of a mode runs: (name, how often, cost).

    A step is an AR step, a cycle of self-speculation, or all forwards that fill and commit a diffusion block.
    """
    if mode.name == "ar":
        return [("step", 1, forward(setup, requests, 1, 1, AR_LOGIT_BYTES))]
    causal = forward(setup, requests, mode.block, mode.block, VERIFY_LOGIT_BYTES)
    if mode.name == "self_speculation":
        draft = forward(setup, requests, mode.block, mode.block - 1, DRAFT_LOGIT_BYTES)
        return [("draft", 1, draft), ("verify", 1, causal)]
    # Only masked positions need logits, and each forward leaves fewer of them: half of the block on average.
    denoise = forward(setup, requests, mode.block, mode.block / 2, DRAFT_LOGIT_BYTES)
    return [("denoise", mode.block / mode.yields - 1, denoise), ("commit", 1, causal)]


@dataclass(frozen=True)
class Estimate:
    """Speed of one mode at one concurrency.

    Attributes:
        concurrency: requests at once; ``running``: how many of them fit.
        step_seconds: an AR step, a cycle, or a whole diffusion block.
        tokens_per_step: tokens that a request gets from it.
        longest: the part of a forward that takes longest.
    """

    mode: PlannedMode
    tp: int
    concurrency: int
    running: int
    step_seconds: float
    tokens_per_step: float
    longest: str

    @property
    def tokens_per_second(self) -> float:
        """Of all running requests."""
        return self.running * self.tokens_per_request if self.running else 0.0

    @property
    def tokens_per_request(self) -> float:
        """Tokens/s of one running request."""
        return self.tokens_per_step / self.step_seconds

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens/s of all running requests, per GPU."""
        return self.tokens_per_second / self.tp


def estimate(setup: Setup, mode: PlannedMode, concurrency: int) -> Estimate:
    """Return the speed of a mode. Requests that do not fit wait; the others share the GPU."""
    running = min(concurrency, memory(setup, mode, concurrency).requests)
    parts = passes(setup, mode, max(1, running))
    seconds = sum(times * (cost.seconds + setup.gpu.host_seconds) for _, times, cost in parts)
    tokens = mode.block if mode.name == "diffusion" else mode.yields
    return Estimate(mode, setup.tp, concurrency, running, seconds, tokens, parts[0][2].longest)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights, activations, reserved: taken before the first request; activations are those of a prefill chunk.
        blocks: logits and activations of decoded rows, for ``concurrency`` requests or as many as fit.
        kv_tokens: tokens whose keys and values fit next to them.
        requests: requests of ``context`` tokens, with an open block each, that fit at once. 0: the model does not fit.
    """

    weights: float
    activations: float
    reserved: float
    blocks: float
    kv_bytes_per_token: int
    kv_tokens: int
    requests: int

    @property
    def fits(self) -> bool:
        """Whether at least one request can run."""
        return self.requests > 0


def memory(setup: Setup, mode: PlannedMode, concurrency: int) -> Memory:
    """Return what one GPU holds. Logits are gathered, so tensor parallelism does not split them."""
    model = setup.model
    shared = 2 * model.intermediate_size + model.head_dim * (model.heads + 2 * model.kv_heads)
    row = (4 * model.hidden_size + shared / setup.tp) * setup.wide_bytes
    activations = PREFILL_CHUNK * row
    left = setup.gpu.memory * MEMORY_SHARE - setup.weight_bytes - activations - setup.gpu.reserved
    logit_space = AR_LOGIT_SPACE if mode.name == "ar" else BLOCK_LOGIT_SPACE
    block = mode.block * (model.vocab_size * logit_space + row)
    pages = -(-(setup.context + mode.block) // PAGE)
    requests = max(0, int(left // (pages * PAGE * setup.kv_bytes_per_token + block)))
    blocks = min(concurrency, requests) * block
    kv_tokens = max(0, int((left - blocks) // (PAGE * setup.kv_bytes_per_token))) * PAGE
    return Memory(
        weights=setup.weight_bytes,
        activations=activations,
        reserved=setup.gpu.reserved,
        blocks=blocks,
        kv_bytes_per_token=setup.kv_bytes_per_token,
        kv_tokens=kv_tokens,
        requests=requests,
    )


def crossover(setup: Setup, mode: PlannedMode) -> tuple[int | None, int]:
    """Return the lowest concurrency at which AR yields at least as many tokens/s as ``mode``, and the highest searched.

    The first is None if there is none among the concurrencies that fit in both modes. AR may be slower again at higher
    concurrency: with long contexts both modes mostly read KV, and a cycle reads it for several tokens at once.
    """
    limit = min(MAX_RUNNING, *(memory(setup, each, MAX_RUNNING).requests for each in (AR, mode)))
    for requests in range(1, limit + 1):
        if estimate(setup, AR, requests).tokens_per_second >= estimate(setup, mode, requests).tokens_per_second:
            return requests, limit
    return None, limit

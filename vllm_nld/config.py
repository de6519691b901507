"""Hugging Face configuration of Nemotron-Labs-Diffusion checkpoints (``config.json``)."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PretrainedConfig

from vllm_nld.names import MODEL_TYPE, OWN_ARCHITECTURE, VLM_MODEL_TYPE

_ROPE_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Allowed ``rope_type`` -> the positive numbers it needs in addition to ``rope_theta``."""
_POSITIVE_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "block_size",
)


class NemotronLabsDiffusionConfig(PretrainedConfig):  # type: ignore[misc]
    """Configuration of one NLD text model; the defaults are those of the released 8B instruct model.

    Two things are rearranged on input, and restored by :meth:`to_dict`:

    - ``rope_parameters.llama_4_scaling_beta`` is not a rotary parameter (it scales queries), so it moves to
      ``llama_4_scaling = {"original_max_position_embeddings", "beta"}``, where vLLM's Mistral attention reads it.
    - the YaRN attention factor is pinned to 1.0. The checkpoints were trained with it (``mscale`` equals
      ``mscale_all_dim``), but libraries fall back to ``0.1 ln(factor) + 1`` when a config omits the two keys.

    Args:
        block_size: the diffusion block length the checkpoint was trained for, in tokens.
        mask_token_id: id of the token that stands for "not decided yet"; it is never emitted.
        added_mask_token_id: another token that is never emitted; None, or an id past the vocabulary: there is none.
        rope_parameters: YaRN parameters as released, or those of ``rope_type`` ``default``, ``linear`` or ``llama3``.

    Raises:
        ValueError: a size is not positive, heads do not divide, or rotary parameters are missing.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 131072,
        hidden_size: int = 4096,
        intermediate_size: int = 14336,
        num_hidden_layers: int = 34,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 8,
        head_dim: int | None = 128,
        hidden_act: str = "silu",
        max_position_embeddings: int = 262144,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        rope_parameters: dict[str, Any] | None = None,
        block_size: int = 32,
        mask_token_id: int = 100,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        attention_dropout: float = 0.0,
        sliding_window: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 11,
        tie_word_embeddings: bool = False,
        added_mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        in_vocabulary = added_mask_token_id is not None and added_mask_token_id < vocab_size
        self.added_mask_token_id = added_mask_token_id if in_vocabulary else None
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        # The 3B and 14B models have head_dim != hidden_size / num_attention_heads; derive it only when absent.
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.attention_dropout = attention_dropout
        self.sliding_window = sliding_window
        self.rope_parameters, self.llama_4_scaling = _split_rope_parameters(
            rope_parameters or kwargs.pop("rope_scaling", None) or released_rope_parameters(),
            # Older exports keep theta next to the dictionary; transformers' fallback of 1e4 would be silently wrong.
            kwargs.pop("rope_theta", 1e6),
        )
        self._check()
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check(self) -> None:
        for key in _POSITIVE_SIZES:
            value = getattr(self, key)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"config.json: {key}={value!r}, but a positive integer is needed")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"config.json: mask_token_id={self.mask_token_id}, but it must lie in [0, {self.vocab_size})"
            )

    @property
    def position_limit(self) -> int:
        """Number of positions the rotary table covers, in tokens.

        YaRN with ``factor`` < 1 (the released 3B-Base) covers fewer than ``original_max_position_embeddings``; with
        linear scaling ``max_position_embeddings`` is the number before scaling, in transformers and in vLLM.
        """
        rope = self.rope_parameters
        if rope["rope_type"] == "linear":
            return int(self.max_position_embeddings * rope["factor"])
        if rope["rope_type"] != "yarn":
            return self.max_position_embeddings
        return min(self.max_position_embeddings, int(rope["original_max_position_embeddings"] * rope["factor"]))

    @property
    def never_emitted(self) -> tuple[int, ...]:
        """Ids of the tokens that no text contains."""
        added = self.added_mask_token_id
        return (self.mask_token_id,) if added is None else (self.mask_token_id, added)

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for images in a prompt."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """Return the released layout, so that a saved config can be read here and by other programs."""
        output: dict[str, Any] = super().to_dict()
        scaling = output.pop("llama_4_scaling", None)
        if output["added_mask_token_id"] is None:
            del output["added_mask_token_id"]
        rope = dict(output["rope_parameters"])
        rope.pop("attention_factor", None)
        if scaling:
            rope["llama_4_scaling_beta"] = scaling["beta"]
        output["rope_parameters"] = rope
        return output


class NemotronLabsDiffusionVLMConfig(NemotronLabsDiffusionConfig):
    """Configuration of the NLD model that also reads images; the defaults are those of the released VLM-8B.

    It is flat: the text model's fields are those of :class:`NemotronLabsDiffusionConfig`, and the image part's are next
    to them.

    Args:
        vision_config: of the Pixtral tower, transformers' ``PixtralVisionConfig`` or its dictionary.
        spatial_merge_size: the projector makes one embedding of so many by so many patches.
        projector_hidden_act: activation between the projector's two matrices.
        multimodal_projector_bias: whether those two matrices have biases.
        vision_feature_layer: the tower's layer whose output is projected; -1 is the last.
        image_start_token_id: first token of an image; the chat template writes it, and it alone.
        image_pad_token_id: stands for one embedding of the projector.
        image_break_token_id: ends a row of pads.
        image_end_token_id: ends the last row instead.
        added_mask_token_id: a token of the released vocabulary, ``|<MASK>|``, that the model does not use. It is never
            emitted. A vocabulary that ends before it lacks it.

    Raises:
        ValueError: as for the text model, or the image part has a value that is not supported.
    """

    model_type = VLM_MODEL_TYPE

    def __init__(
        self,
        vision_config: Any = None,
        spatial_merge_size: int = 2,
        projector_hidden_act: str = "gelu",
        multimodal_projector_bias: bool = False,
        vision_feature_layer: int = -1,
        image_start_token_id: int = 18,
        image_pad_token_id: int = 19,
        image_break_token_id: int = 20,
        image_end_token_id: int = 21,
        added_mask_token_id: int = 131072,
        vocab_size: int = 131073,
        **kwargs: Any,
    ) -> None:
        if vision_config is None or isinstance(vision_config, dict):
            from transformers import PixtralVisionConfig  # it imports every model's name: seconds

            given = released_vision_config() | (vision_config or {})
            heads = given["num_attention_heads"]
            if not isinstance(heads, int) or heads <= 0:
                raise ValueError(
                    f"config.json: vision_config.num_attention_heads={heads!r}, but a positive integer is needed"
                )
            vision_config = PixtralVisionConfig(**given)
        self.vision_config = vision_config
        self.spatial_merge_size = spatial_merge_size
        self.projector_hidden_act = projector_hidden_act
        self.multimodal_projector_bias = multimodal_projector_bias
        self.vision_feature_layer = vision_feature_layer
        self.image_start_token_id = image_start_token_id
        self.image_pad_token_id = image_pad_token_id
        self.image_break_token_id = image_break_token_id
        self.image_end_token_id = image_end_token_id
        if kwargs.pop("text_config", None):  # a property here
            raise ValueError("config.json: text_config, but the text model's fields are needed next to vision_config")
        super().__init__(vocab_size=vocab_size, added_mask_token_id=added_mask_token_id, **kwargs)

    def _check(self) -> None:
        super()._check()
        vision = self.vision_config
        for name, value, allowed in (
            ("projector_hidden_act", self.projector_hidden_act, "gelu"),
            ("multimodal_projector_bias", self.multimodal_projector_bias, False),
            ("vision_feature_layer", self.vision_feature_layer, -1),
            ("vision_config.hidden_act", vision.hidden_act, "silu"),
            ("vision_config.num_channels", vision.num_channels, 3),
            ("vision_config.head_dim", vision.head_dim, vision.hidden_size // vision.num_attention_heads),
        ):
            if value != allowed:
                raise ValueError(f"config.json: {name}={value!r}; allowed: {allowed!r}")
        for name, value in (
            ("spatial_merge_size", self.spatial_merge_size),
            ("vision_config.patch_size", vision.patch_size),
            ("vision_config.image_size", vision.image_size),
        ):
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"config.json: {name}={value!r}, but a positive integer is needed")
        if vision.image_size < self.image_cell:
            raise ValueError(
                f"config.json: vision_config.image_size={vision.image_size} is less than patch_size * "
                f"spatial_merge_size = {self.image_cell}"
            )
        tokens = self.image_token_ids
        if len({*tokens, self.mask_token_id}) != 5 or not all(0 <= token < self.vocab_size for token in tokens):
            raise ValueError(
                f"config.json: the image tokens are {list(tokens)}, but they must differ from each other and from "
                f"mask_token_id={self.mask_token_id}, and lie in [0, {self.vocab_size})"
            )

    @property
    def image_cell(self) -> int:
        """Side of the square that becomes one embedding, in pixels."""
        return int(self.vision_config.patch_size * self.spatial_merge_size)

    @property
    def image_token_ids(self) -> tuple[int, int, int, int]:
        """The tokens of an image: start, pad, break and end."""
        return (
            self.image_start_token_id,
            self.image_pad_token_id,
            self.image_break_token_id,
            self.image_end_token_id,
        )

    @property
    def text_config(self) -> NemotronLabsDiffusionConfig:
        """The text model's part, a new object each time."""
        own = {*inspect.signature(type(self).__init__).parameters, "model_type", "architectures"}
        own -= {"vocab_size", "added_mask_token_id"}
        flat = {key: value for key, value in self.to_dict().items() if key not in own}
        return NemotronLabsDiffusionConfig(**flat, architectures=[OWN_ARCHITECTURE])

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        rope = output["vision_config"].get("rope_parameters")
        if rope and rope.get("rope_type") == "axial":  # what newer versions of transformers call the same
            rope["rope_type"] = "default"
        return output


def released_vision_config() -> dict[str, Any]:
    """Return the ``vision_config`` of the released VLM-8B (a fresh dictionary)."""
    return {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 1540,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def released_rope_parameters() -> dict[str, Any]:
    """Return the ``rope_parameters`` of the released 3B and 8B instruct models (a fresh dictionary)."""
    return {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }


def _split_rope_parameters(raw: dict[str, Any], default_theta: float) -> tuple[dict[str, Any], dict[str, float] | None]:
    """Separate rotary parameters from the query scale; see the class docstring."""
    rope = dict(raw)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope.pop("max_position_embeddings", None)
    rope.setdefault("rope_theta", default_theta)
    beta = rope.pop("llama_4_scaling_beta", None)
    kind = rope["rope_type"]
    if kind not in _ROPE_FACTORS:
        raise ValueError(
            f"config.json: rope_parameters.rope_type={kind!r}, but only {str([*_ROPE_FACTORS])[1:-1]} are supported"
        )
    for key in _ROPE_FACTORS[kind]:
        if not isinstance(rope.get(key), (int, float)) or rope[key] <= 0:
            raise ValueError(
                f"config.json: rope_parameters.{key}={rope.get(key)!r}, but {kind} needs a positive number"
            )
    if kind != "yarn":
        if beta:
            raise ValueError(
                f"config.json: rope_parameters.llama_4_scaling_beta needs rope_type 'yarn', found {kind!r}"
            )
        rope = {key: rope[key] for key in ("rope_type", "rope_theta", *_ROPE_FACTORS[kind])}
        return rope | ({"factor": float(rope["factor"])} if "factor" in rope else {}), None
    rope["attention_factor"] = 1.0
    scaling = None
    if beta:
        original = rope["original_max_position_embeddings"]
        scaling = {"original_max_position_embeddings": original, "beta": beta}
    return rope, scaling

"""Compare a checkpoint folder's tensor names and shapes with its config. Reads only the file headers."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from vllm_nld.config import NemotronLabsDiffusionConfig, NemotronLabsDiffusionVLMConfig
from vllm_nld.errors import NLDError

_SHOWN = 5

HEAD = "diffusion_head.weight"
"""There unless embeddings are tied: then ``encoder.embed_tokens.weight`` is both."""

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""


def expected_tensors(config: NemotronLabsDiffusionConfig) -> Shapes:
    """Return released tensor name -> shape: 9 tensors per layer and 3 more, and those of the image part, if any."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    tensors: Shapes = {
        "encoder.embed_tokens.weight": (config.vocab_size, hidden),
        "encoder.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        tensors[HEAD] = (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        tensors |= {f"encoder.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    if isinstance(config, NemotronLabsDiffusionVLMConfig):
        tensors |= expected_image_tensors(config)
    return tensors


def expected_image_tensors(config: NemotronLabsDiffusionVLMConfig) -> Shapes:
    """Return released tensor name -> shape of tower and projector: 9 tensors per layer and 6 more."""
    vision = config.vision_config
    hidden, mlp, patch, text = vision.hidden_size, vision.intermediate_size, vision.patch_size, config.hidden_size
    layer = {
        "attention_norm": (hidden,),
        "ffn_norm": (hidden,),
        **{f"attention.{name}_proj": (hidden, hidden) for name in "qkvo"},
        "feed_forward.gate_proj": (mlp, hidden),
        "feed_forward.up_proj": (mlp, hidden),
        "feed_forward.down_proj": (hidden, mlp),
    }
    tensors: Shapes = {
        "encoder.vision_tower.patch_conv.weight": (hidden, vision.num_channels, patch, patch),
        "encoder.vision_tower.ln_pre.weight": (hidden,),
        "encoder.multi_modal_projector.norm.weight": (hidden,),
        "encoder.multi_modal_projector.patch_merger.merging_layer.weight": (
            hidden,
            hidden * config.spatial_merge_size**2,
        ),
        "encoder.multi_modal_projector.linear_1.weight": (text, hidden),
        "encoder.multi_modal_projector.linear_2.weight": (text, text),
    }
    for index in range(vision.num_hidden_layers):
        prefix = f"encoder.vision_tower.transformer.layers.{index}"
        tensors |= {f"{prefix}.{name}.weight": shape for name, shape in layer.items()}
    return tensors


def check_tensors(folder: Path, config: NemotronLabsDiffusionConfig, quantized: bool = False) -> None:
    """Check the ``*.safetensors`` of ``folder``; a folder without any is left to vLLM.

    Args:
        folder: the checkpoint's folder.
        config: its ``config.json``.
        quantized: matrices may be packed, under other names (GPTQ ``qweight``, compressed-tensors ``weight_packed``)
            and in other shapes. Then only the shapes of the norms are checked, and that every matrix has some tensor.

    Raises:
        NLDError: tensors are missing or misshapen; the first few are named.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return
    found: Shapes = {}
    for file in files:
        found |= tensor_shapes(file)
    expected = expected_tensors(config)
    if quantized:
        modules = {name.rpartition(".")[0] for name in found}
        matrices = [name for name, shape in expected.items() if len(shape) > 1]
        absent = [f"{name} is missing, packed or plain" for name in matrices if name.rpartition(".")[0] not in modules]
        complain(f"checkpoint {folder}", absent)
        expected = {name: shape for name, shape in expected.items() if len(shape) == 1}
    problems = differences(found, expected, "config.json asks for")
    if config.tie_word_embeddings and HEAD in found:
        problems.append(f"{HEAD} is there, but tie_word_embeddings=true in config.json asks for none")
    complain(f"checkpoint {folder}", problems)


def tensor_shapes(file: Path) -> Shapes:
    """Return the names and shapes in a ``.safetensors`` file, from its header."""
    with safe_open(file, framework="numpy") as handle:
        return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118


def differences(found: Shapes, expected: Shapes, wants: str) -> list[str]:
    """List the expected tensors that are missing or have another shape; ``wants`` says what expects them."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} has shape {list(found[name])}, {wants} {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return problems


def complain(where: str, problems: list[str], most: int = _SHOWN) -> None:
    """Raise an NLDError that names the first few problems, at most ``most``, if there are any."""
    if problems:
        more = f" (and {len(problems) - most} more)" if len(problems) > most else ""
        raise NLDError(f"{where}: " + "; ".join(problems[:most]) + more)

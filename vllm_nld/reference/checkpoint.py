"""Load a checkpoint folder, in the released layout, into the dense reference model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from vllm_nld.config import NemotronLabsDiffusionConfig, NemotronLabsDiffusionVLMConfig
from vllm_nld.names import VLM_MODEL_TYPE
from vllm_nld.reference.model import ReferenceModel
from vllm_nld.reference.vision_language import ReferenceVLM


def load_reference(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> ReferenceModel:
    """Return the model of ``folder`` (``config.json`` and ``*.safetensors``), in evaluation mode.

    It is a :class:`ReferenceVLM` if the config is of a model that reads images.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: a tensor is missing, unexpected or misshapen; the message names each.
    """
    folder = Path(folder)
    # The released folders keep the draft adapter in a subfolder, so a flat glob finds only the base weights.
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    config = _config_of(folder)
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    with torch.device(device):
        model = ReferenceVLM(config) if isinstance(config, NemotronLabsDiffusionVLMConfig) else ReferenceModel(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    problems = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ValueError(f"{folder}: " + "; ".join(sorted(problems)))
    # Every parameter is there; of tied ones a state dict has both names, the files have one.
    model.load_state_dict(tensors, strict=False)
    return model.to(dtype).eval()


def _config_of(folder: Path) -> NemotronLabsDiffusionConfig:
    settings, _ = NemotronLabsDiffusionConfig.get_config_dict(folder)
    reads_images = settings.get("model_type") == VLM_MODEL_TYPE
    kind = NemotronLabsDiffusionVLMConfig if reads_images else NemotronLabsDiffusionConfig
    config: NemotronLabsDiffusionConfig = kind.from_pretrained(folder)
    return config

"""A Hugging Face folder as a source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vllm_nld.checkpoints.headers import HEAD, Shapes, expected_tensors, tensor_shapes
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.conversion import rope
from vllm_nld.conversion.source import DTYPES, NEEDED, Source, Vocabulary
from vllm_nld.errors import NLDError, shown
from vllm_nld.names import MODEL_TYPE

MODEL_TYPES = ("llama", "mistral")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish", None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}
"""Keys of ``config.json`` that would make another network, and what they may be."""
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
_CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_RECOMPUTED = ".rotary_emb.inv_freq"
"""End of the names of tensors that old folders have; they are computed instead of read."""
_TOKENIZER_TEXT = "The 3 foxes' dens, at 10:45:\n\tdef f(x):\n        return x  # naïve 漢字 🙂"


class HuggingFaceSource(Source):
    """``config.json``, ``*.safetensors`` and ``tokenizer.json`` of a Llama or Mistral model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = self._json("config.json", f"allowed: {NEEDED}")
        self._check_architecture(raw)
        self.settings = self._settings()
        self.files = self._tensor_files()
        self.dtype = self._dtype()
        self.vocabulary = self._vocabulary()

    def tensor(self, name: str) -> Tensor:
        theirs = _their_name(name)
        with safe_open(self.files[theirs], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(theirs)
        return tensor

    def write_tokenizer(self, folder: Path) -> None:
        for pattern in _CARRIED:
            for file in self.path.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        target = folder / "tokenizer_config.json"
        settings = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
        if "tokenizer_class" not in settings:
            # For Llama, transformers knows the class from the model type; for NLD it does not.
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            target.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def check_tokenizer(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        AutoConfig.register(MODEL_TYPE, NemotronLabsDiffusionConfig, exist_ok=True)
        before, after = (
            AutoTokenizer.from_pretrained(str(path), trust_remote_code=False) for path in (self.path, folder)
        )
        if before.encode(_TOKENIZER_TEXT) != after.encode(_TOKENIZER_TEXT):
            raise NLDError(
                f"SOURCE={self.path}: its tokenizer cuts text differently once it is loaded for an NLD model; allowed: "
                "one that tokenizer.json describes completely (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )

    def network(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(str(self.path), dtype=torch.float32, trust_remote_code=False)
        return _Logits(model.eval())

    def _json(self, name: str, advice: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            raise NLDError(f"SOURCE={self.path}: no {name} there; {advice}")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise NLDError(f"SOURCE={self.path}: {name} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise NLDError(f"SOURCE={self.path}: {name} holds no object")
        return content

    def _check_architecture(self, raw: dict[str, Any]) -> None:
        kind = raw.get("model_type")
        if kind not in MODEL_TYPES:
            raise NLDError(f"SOURCE={self.path}: model_type={shown(kind)}; allowed: {', '.join(MODEL_TYPES)}")
        for key, allowed in _PLAIN.items():
            if raw.get(key, allowed[0]) not in allowed:
                raise NLDError(
                    f"SOURCE={self.path}: {key}={shown(raw[key])} in config.json makes another network than NLD's; "
                    f"allowed: {allowed[0]!r}"
                )

    def _settings(self) -> dict[str, Any]:
        """Take sizes and rotary parameters from transformers' own config class, which knows the defaults."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(str(self.path), trust_remote_code=False)
        except Exception as error:  # transformers' validation raises many kinds
            raise NLDError(f"SOURCE={self.path}: config.json: {' '.join(str(error).split())}") from None
        window, positions = getattr(config, "sliding_window", None), config.max_position_embeddings
        if window is not None and window < positions:
            raise NLDError(
                f"SOURCE={self.path}: sliding_window={window} is in use, since max_position_embeddings={positions}; "
                "allowed: null, or a window no shorter than that"
            )
        found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        parameters = {"rope_theta": getattr(config, "rope_theta", 10_000.0)} | dict(found)
        settings = {key: getattr(config, key, None) for key in _SIZES}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            settings[key] = getattr(config, key, None)
        return settings | {"rope_parameters": rope.of_huggingface(self.path, parameters)}

    def _tensor_files(self) -> dict[str, Path]:
        """Return tensor name -> file, once names and shapes are what the config asks for."""
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise NLDError(
                f"SOURCE={self.path}: no *.safetensors there (pickled weights are not read); allowed: {NEEDED}"
            )
        shapes: Shapes = {}
        homes: dict[str, Path] = {}
        for file in files:
            try:
                found = tensor_shapes(file)
            except SafetensorError as error:
                raise NLDError(f"SOURCE={self.path}: {file.name} cannot be read: {error}") from None
            shapes |= found
            homes |= dict.fromkeys(found, file)
        expected = {_their_name(name): shape for name, shape in expected_tensors(self.config(mask_token_id=0)).items()}
        ignored = {name for name in shapes if name.endswith(_RECOMPUTED)}
        if self.settings["tie_word_embeddings"]:
            ignored.add(_their_name(HEAD))  # some tied models store their head all the same
        self.compare_shapes(shapes, expected, "config.json asks for", ignored)
        return homes

    def _dtype(self) -> torch.dtype:
        name = "model.embed_tokens.weight"
        with safe_open(self.files[name], framework="pt") as handle:
            dtype: torch.dtype = handle.get_slice(name)[:1].dtype
        if dtype not in DTYPES.values():
            raise NLDError(f"SOURCE={self.path}: weights of {dtype}; allowed: {', '.join(DTYPES)}")
        return dtype

    def _vocabulary(self) -> Vocabulary:
        advice = "where there is another tokenizer, AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it"
        tokens = self._json("tokenizer.json", advice)
        settings, generation = self._optional("tokenizer_config.json"), self._optional("generation_config.json")
        added = [entry for entry in tokens.get("added_tokens", []) if isinstance(entry, dict)]
        special = {entry["content"]: entry["id"] for entry in added if entry.get("special")}
        names = {_text(settings.get(f"{role}_token")) for role in ("bos", "eos", "pad", "unk")}
        ids = _token_ids(self.settings) | _token_ids(generation)
        template = self._template(settings)
        in_use = {id for text, id in special.items() if id in ids or text in names or text in template}
        pieces = (tokens.get("model") or {}).get("vocab") or {}
        known = [*pieces.values()] if isinstance(pieces, dict) else [len(pieces) - 1]
        return Vocabulary(special, frozenset(in_use), 1 + max([*known, *(entry["id"] for entry in added)], default=-1))

    def _optional(self, name: str) -> dict[str, Any]:
        return self._json(name, "") if (self.path / name).is_file() else {}

    def _template(self, settings: dict[str, Any]) -> str:
        """Return all chat templates there are, one after the other."""
        files = [self.path / name for name in ("chat_template.jinja", "chat_template.json")]
        texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        return "\n".join([str(settings.get("chat_template") or ""), *texts])


class _Logits(nn.Module):
    """transformers' model: int64 ``[tokens]`` to logits ``[tokens, vocab]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids[None]).logits[0]
        return logits


def _their_name(name: str) -> str:
    return "lm_head.weight" if name == HEAD else name.replace("encoder.", "model.", 1)


def _token_ids(settings: dict[str, Any]) -> set[int]:
    """Return all ids that settings have under ``..._token_id``, one by one or in lists."""
    values = [value for key, value in settings.items() if key.endswith("token_id")]
    return {id for value in values for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)}


def _text(token: Any) -> str | None:
    """Return a special token's text: files have it plain, or as an object."""
    return token.get("content") if isinstance(token, dict) else token

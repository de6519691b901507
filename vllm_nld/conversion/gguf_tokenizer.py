"""Rebuilding a Hugging Face tokenizer from a GGUF file's metadata.

Of how text is split before byte pairs are merged, GGUF has only the name (``tokenizer.ggml.pre``). A name that is not
known here is refused, since a tokenizer that is almost right gives no sign of being wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vllm_nld.conversion.source import Vocabulary
from vllm_nld.errors import NLDError, shown

Value = Callable[..., Any]
"""Metadata by key, with a default."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""llama.cpp's kinds of tokens that matter here; a sixth is bytes."""
ROLES = ("bos", "eos", "unknown", "padding", "eot", "eom")
_SPACE = "▁"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> Any:
    split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_SPLITTERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
}


def rebuild(source: object, value: Value) -> Tokenizer:
    """Return the tokenizer.

    Args:
        source: named in messages.
        value: the file's metadata.

    Raises:
        NLDError: there is none, or of a kind that is not known.
    """
    kind = value("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama") or not value("tokenizer.ggml.tokens") or not value("tokenizer.ggml.token_type"):
        raise NLDError(
            f"SOURCE={source}: tokenizer.ggml.model={shown(kind)}, or its tokens or token_type are missing; allowed: "
            "gpt2 (byte pairs) or llama (SentencePiece), with both"
        )
    tokenizer = _byte_pairs(source, value) if kind == "gpt2" else _sentence_pieces(source, value)
    kinds = list(zip(value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type"), strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text, kind in kinds if kind in (CONTROL, UNKNOWN)]
    )
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text, kind in kinds if kind == USER_DEFINED]
    )
    if adds_bos(value):
        first = value("tokenizer.ggml.tokens")[value("tokenizer.ggml.bos_token_id")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}:0 $A:0",
            pair=f"{first}:0 $A:0 {first}:1 $B:1",
            special_tokens=[(first, value("tokenizer.ggml.bos_token_id"))],
        )
    return tokenizer


def adds_bos(value: Value) -> bool:
    """Return whether plain text begins with a begin token; llama.cpp's default where the file does not say it."""
    if value("tokenizer.ggml.bos_token_id") is None:
        return False
    pieces = value("tokenizer.ggml.model") == "llama"
    default = pieces or _SPLITTERS.get(value("tokenizer.ggml.pre")) is _llama3
    return bool(value("tokenizer.ggml.add_bos_token", default))


def _byte_pairs(source: object, value: Value) -> Tokenizer:
    pre = value("tokenizer.ggml.pre")
    if pre not in _SPLITTERS:
        raise NLDError(f"SOURCE={source}: tokenizer.ggml.pre={shown(pre)}; allowed: {', '.join(_SPLITTERS)}")
    merges = value("tokenizer.ggml.merges")
    if not merges:
        raise NLDError(f"SOURCE={source}: tokenizer.ggml.merges is missing; allowed: a tokenizer with its merges")
    vocabulary = {token: id for id, token in enumerate(value("tokenizer.ggml.tokens"))}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    llama3 = _SPLITTERS[pre] is _llama3
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=llama3))
    tokenizer.pre_tokenizer = _SPLITTERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_pieces(source: object, value: Value) -> Tokenizer:
    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    scores = value("tokenizer.ggml.scores")
    if not scores:
        raise NLDError(f"SOURCE={source}: tokenizer.ggml.scores is missing; allowed: a tokenizer with its scores")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    unknown = value("tokenizer.ggml.unknown_token_id", kinds.index(UNKNOWN) if UNKNOWN in kinds else 0)
    model = models.BPE(
        vocab=vocabulary,
        merges=list(_merges(tokens, kinds, scores)),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = value("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _merges(tokens: list[str], kinds: list[int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """Yield the merges that SentencePiece would make, best first: it joins the neighbors whose union scores highest."""
    pieces = {token: id for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL}
    for piece in sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece])):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        yield from sorted(
            ((left, right) for left, right in splits if left in pieces and right in pieces),
            key=lambda pair: (pieces[pair[0]], pieces[pair[1]]),
        )


def vocabulary(value: Value) -> Vocabulary:
    """Return the file's special tokens."""
    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    special = {
        token: id
        for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, UNKNOWN, UNUSED)
    }
    roles = {value(f"tokenizer.ggml.{role}_token_id") for role in ROLES}
    template = value("tokenizer.chat_template") or ""
    in_use = {id for token, id in special.items() if id in roles or kinds[id] == UNKNOWN or token in template}
    return Vocabulary(special, frozenset(in_use), len(tokens))


def write(tokenizer: Tokenizer, value: Value, settings: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer, its settings, the chat template and the generation defaults in Hugging Face layout."""
    tokens = value("tokenizer.ggml.tokens")
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos(value),
        "clean_up_tokenization_spaces": False,
        "model_max_length": settings["max_position_embeddings"],
    }
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        id = value(f"tokenizer.ggml.{name}_token_id")
        if id is not None:
            content[f"{role}_token"] = tokens[id]
    ends = [value(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(id for id in ends if id is not None))
    generation: dict[str, Any] = {"bos_token_id": settings["bos_token_id"]}
    generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, data in (("tokenizer_config.json", content), ("generation_config.json", generation)):
        data = {key: entry for key, entry in data.items() if entry is not None}
        (folder / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    template = value("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

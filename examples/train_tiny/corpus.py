"""The training text: CPython's standard library without the held-out part, as BPE tokens.

Documents come in two forms: whole modules as plain text, and single functions as a chat turn, so that the model
learns where an answer ends.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from vllm_nld.checkpoints.held_out import HELD_OUT_MODULES

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Tables and fixtures, whose thousands of near-identical lines teach a small model nothing about code.
_SKIPPED_PACKAGES = {"encodings", "pydoc_data", "lib2to3", "idlelib"}

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", *(f"<special_{i}>" for i in range(3, 10))]
# The released models' ids for the turn markers: 10 to 13.
SPECIAL_TOKENS += ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<mask>", "<pad>"]
BOS_ID, EOS_ID, MASK_ID, PAD_ID = 1, 11, 14, 15


def library_files() -> list[Path]:
    """Return the standard library's source files that may be trained on, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        if folders & _SKIPPED_FOLDERS or relative.parts[0] in _SKIPPED_PACKAGES or relative.parts[0] == "config-3":
            continue
        if relative.as_posix() not in HELD_OUT_MODULES:
            files.append(path)
    return files


def read(path: Path) -> str:
    """Return the file's text; a few files of the library have other encodings on purpose."""
    return path.read_text(encoding="utf-8", errors="ignore").expandtabs(8)


def chat_turn(question: str, answer: str) -> str:
    """Render one exchange as the chat template does, without thinking."""
    return (
        "<|im_start|>system\n<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n"
        f"<|im_start|>assistant\n<think></think>{answer}<|im_end|>"
    )


def functions(source: str, longest: int = 50) -> Iterator[tuple[str, str]]:
    """Yield (name, dedented source) of each function of at most ``longest`` lines."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        body = lines[node.lineno - 1 : node.end_lineno]
        if 3 <= len(body) <= longest:
            yield node.name, "\n".join(line[node.col_offset :] for line in body)


def documents(seed: int = 0) -> list[str]:
    """Return all training documents in a fixed random order."""
    rng = random.Random(seed)
    texts = []
    for path in library_files():
        source = read(path)
        texts.append(f"<s>{source}<|im_end|>")
        for name, body in functions(source):
            if rng.random() < 0.2:
                texts.append(chat_turn(f"Write the Python function {name}.", body))
    # A source that contains a special token's text would put its id into the stream.
    texts = [text for text in texts if "<mask>" not in text and "<pad>" not in text]
    rng.shuffle(texts)
    return texts


def unseen_documents(seed: int = 0, longest: int = 12_000) -> list[str]:
    """Return Python text that neither the language model's training nor the held-out modules contain.

    Predictors of the language model's mistakes train on it, because on its training text the model is surer than when
    it is used. It consists of CPython's tests (only their beginnings, or they would be most of it), idlelib, lib2to3,
    and the bundled pip and setuptools; documents that share lines with a held-out module are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for folder in ("test", "idlelib", "lib2to3") for path in sorted((root / folder).rglob("*.py"))]
    texts = [read(path)[:longest] for path in files]
    for wheel in sorted((root / "ensurepip" / "_bundled").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in sorted(archive.namelist()) if name.endswith(".py")]
            texts += [archive.read(name).decode("utf-8", errors="ignore")[:longest] for name in names]
    held_out = _long_lines("\n".join(read(root / name) for name in HELD_OUT_MODULES if (root / name).is_file()))
    texts = [text for text in texts if len(text) > 500 and len(_long_lines(text) & held_out) <= 2]
    texts = [f"<s>{text}<|im_end|>" for text in texts if "<mask>" not in text and "<pad>" not in text]
    random.Random(seed).shuffle(texts)
    return texts


def _long_lines(text: str) -> set[str]:
    """Return the lines that are long enough to distinguish a copy from a coincidence."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 40}


def train_tokenizer(texts: list[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Train a byte-level BPE tokenizer whose first ids are ``special_tokens``."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Return all documents as one int32 stream."""
    batches = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.asarray(batch.ids, dtype=np.int32) for batch in batches])


def draw(stream: np.ndarray, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return int64 ``[count, length]``: pieces of the token stream with random starts."""
    starts = torch.randint(len(stream) - length, (count,), generator=generator).tolist()
    return torch.stack([torch.from_numpy(stream[s : s + length].astype(np.int64)) for s in starts])

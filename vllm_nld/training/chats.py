"""Conversations to train on: answers, each after all that its conversation says before it, in the model's template."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_nld.errors import NLDError
from vllm_nld.training.settings import Settings
from vllm_nld.training.text import HELD_OUT_SHARE, Corpus, Rows, digest

Message = dict[str, Any]
Template = Callable[[list[Message], bool], str]
"""Spells messages out; the flag asks for the beginning of an answer at the end."""


@dataclass(frozen=True)
class Answer:
    """One answer of a conversation.

    Attributes:
        prompt: int64 ``[tokens]``, the conversation up to the answer's beginning.
        text: int64 ``[tokens]``, the data's answer; None: the data has none.
    """

    prompt: Tensor
    text: Tensor | None


@dataclass(frozen=True)
class Chats(Corpus):
    """Answers, in the files' order; a conversation whose last message is a question asks for one more."""

    answers: ClassVar[bool] = True
    train: list[Answer]
    held_out: list[Answer]

    @classmethod
    def read(cls, data: Path, held_out: Path | None, tokenizer: Any, template: Template) -> Chats:
        """Read the files; without a ``held_out`` one, the last twentieth of the conversations is held out.

        Raises:
            NLDError: a file cannot be read, a line is not what it should be, or the template does not take it.
        """
        found = read_conversations(data, "--data", tokenizer, template)
        if held_out is not None:
            after = read_conversations(held_out, "--held-out", tokenizer, template)
        else:
            cut = len(found) - max(1, int(HELD_OUT_SHARE * len(found)))
            found, after = found[:cut], found[cut:]
        return cls([answer for one in found for answer in one], [answer for one in after for answer in one])

    def check(self, settings: Settings) -> None:
        """Check that there is an answer with a prompt that is short enough, of the data's if it is to be trained on."""
        parts = (("--data", self.train, settings.own_text), ("held-out text", self.held_out, True))
        for name, part, own in parts:
            wanted = [answer for answer in part if own or answer.text is not None]
            if not wanted:
                raise NLDError(
                    f"{name}: no answers"
                    + ("; allowed: one conversation or more" if own else " (--no-own-text); allowed: one or more")
                )
            shortest = min(len(answer.prompt) for answer in wanted)
            if shortest > settings.prefix_tokens:
                raise NLDError(
                    f"--prefix-tokens {settings.prefix_tokens}: {name} has no prompt as short as that; allowed: "
                    f"{shortest} or more"
                )

    def left_out(self, settings: Settings) -> int:
        """Return how many answers have a prompt that is longer than ``--prefix-tokens``; they take no part."""
        return sum(len(answer.prompt) > settings.prefix_tokens for answer in (*self.train, *self.held_out))

    def rows(
        self, part: list[Answer], count: int, prefix: int, new_tokens: int, pad: int, generator: torch.Generator
    ) -> Rows:
        """Return answers in order of their prompts' lengths, those with the longest prompts left out."""
        usable = [one for one in part if len(one.prompt) <= prefix and (one.text is not None or not new_tokens)]
        chosen = [usable[index] for index in torch.randperm(len(usable), generator=generator)[:count].tolist()]
        chosen.sort(key=lambda answer: len(answer.prompt))
        empty = torch.zeros(0, dtype=torch.int64)
        texts = [empty if one.text is None else one.text[:new_tokens] for one in chosen]
        return Rows.of([one.prompt for one in chosen], texts, new_tokens, pad)

    def digest(self, part: list[Answer]) -> str:
        """Return a hash of all tokens, and of where prompts end."""
        ends = torch.tensor([[len(one.prompt), -1 if one.text is None else len(one.text)] for one in part])
        return digest(ends, *(tensor for one in part for tensor in (one.prompt, one.text) if tensor is not None))


def holds_conversations(data: Path) -> bool:
    """Whether a file is ``.jsonl`` whose first line has ``messages``; reading it says what is wrong with it."""
    if data.suffix != ".jsonl" or not data.is_file():
        return False
    with data.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        return "messages" in json.loads(first)
    except (ValueError, TypeError):
        return False


def read_conversations(path: Path, option: str, tokenizer: Any, template: Template) -> list[list[Answer]]:
    """Return the answers of each line's ``messages``.

    Raises:
        NLDError: the file cannot be read, holds none, a line is not what it should be, or the template rejects it.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise NLDError(f"{option} {path}: {error}; allowed: a .jsonl file with messages in every line") from None
    if not lines:
        raise NLDError(f"{option} {path}: the file holds no text; allowed: a .jsonl file with messages in every line")
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"{option} {path}, line {number}"
        messages = _messages(line, where)
        try:
            found.append(list(_answers(messages, tokenizer, template, where)))
        except NLDError:
            raise
        except Exception as error:  # a template may raise anything
            raise NLDError(f"{where}: the chat template does not take it: {' '.join(str(error).split())}") from None
    return found


def _messages(line: str, where: str) -> list[Message]:
    try:
        messages = json.loads(line)["messages"]
        good = bool(messages) and all(isinstance(one["role"], str) for one in messages)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise NLDError(
            f'{where}: every line must be an object such as {{"messages": [{{"role": "user", "content": "..."}}]}}'
        )
    return list(messages)


def _answers(messages: list[Message], tokenizer: Any, template: Template, where: str) -> list[Answer]:
    """Return an answer per message of the assistant, and one without a text if the last message is not its."""

    def encoded(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)

    found = []
    for place, message in enumerate(messages):
        if place and message["role"] == "assistant":
            prompt, whole = template(messages[:place], True), template(messages[: place + 1], False)
            if not whole.startswith(prompt):
                raise NLDError(f"{where}: the chat template spells answers otherwise than they are begun")
            found.append(Answer(encoded(prompt), encoded(whole.removeprefix(prompt))))
    if messages[-1]["role"] != "assistant":
        found.append(Answer(encoded(template(messages, True)), None))
    return found


def chat_template(folder: Path) -> Template:
    """Return the chat template of a checkpoint's tokenizer.

    Raises:
        NLDError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise NLDError(f"MODEL={folder}: no tokenizer with a chat template: {' '.join(str(error).split())}") from None
    if not tokenizer.chat_template:
        raise NLDError(f"MODEL={folder}: has no chat template, which messages need; allowed: lines with a key text")

    def spell(messages: list[Message], begin_answer: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin_answer))

    return spell

"""Training of draft adapters on conversations: what is taken from them, and that it trains as on any text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.support import models
from tests.support.adapters import random_adapter
from tests.support.commands import invoke
from vllm_nld.checkpoints.draft_lora import TARGETS
from vllm_nld.errors import NLDError
from vllm_nld.reference import DraftAdapter, ReferenceModel, ar_generate, load_reference
from vllm_nld.training.chats import Answer, Chats, chat_template, holds_conversations
from vllm_nld.training.objective import Drafts, Objective, Target
from vllm_nld.training.settings import Settings
from vllm_nld.training.text import Rows, own_text
from vllm_nld.training.trainer import Schedule, Trainer

END = 3
TEMPLATE = (
    "{% for m in messages %}t{{ 1 if m.role == 'user' else 2 }} {{ m.content }} t3 {% endfor %}"
    "{% if add_generation_prompt %}t2 {% endif %}"
)
SMALL: dict[str, Any] = {
    "rank": 3, "steps": 4, "batch": 4, "blocks": 3, "rows": 12, "prefix_tokens": 14, "new_tokens": 20,
    "held_out_rows": 3, "learning_rate": 0.01, "warm_up": 1,
}  # fmt: skip


def model_of() -> ReferenceModel:
    return models.random_model(models.small_config(eos_token_id=END)).requires_grad_(False)


def words(*ids: int) -> str:
    return " ".join(f"t{id_}" for id_ in ids)


def said(*contents: str) -> str:
    """A line of data: user and assistant by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return json.dumps({"messages": messages})


def conversations(count: int) -> str:
    generator = torch.Generator().manual_seed(count)

    def text(length: int) -> str:
        return words(*torch.randint(6, 24, (length,), generator=generator).tolist())

    return "\n".join(said(text(2 + number % 5), text(4 + number % 7)) for number in range(count))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models.save(model_of(), tmp_path_factory.mktemp("model") / "small")
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(24)}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "data.jsonl").write_text(conversations(40))
    return folder


def read(checkpoint: Path, content: str, held_out: str = said("t9")) -> Chats:
    files = checkpoint / "read.jsonl", checkpoint / "held_out.jsonl"
    for file, text in zip(files, (content, held_out), strict=True):
        file.write_text(text)
    return Chats.read(*files, Tokenizer.from_file(str(checkpoint / "tokenizer.json")), chat_template(checkpoint))


def lists(answers: list[Answer]) -> list[tuple[list[int], list[int] | None]]:
    return [(one.prompt.tolist(), None if one.text is None else one.text.tolist()) for one in answers]


def test_every_answer_follows_all_that_was_said_before(checkpoint: Path) -> None:
    found = read(checkpoint, said("t7 t8", "t9", "t10") + "\n\n" + said("t11", "t12 t13"))
    assert lists(found.train) == [
        ([1, 7, 8, 3, 2], [9, 3]),
        ([1, 7, 8, 3, 2, 9, 3, 1, 10, 3, 2], None),
        ([1, 11, 3, 2], [12, 13, 3]),
    ]
    assert lists(found.held_out) == [([1, 9, 3, 2], None)]


def test_a_twentieth_of_the_conversations_is_held_out(checkpoint: Path) -> None:
    tokenizer, template = Tokenizer.from_file(str(checkpoint / "tokenizer.json")), chat_template(checkpoint)
    found = Chats.read(checkpoint / "data.jsonl", None, tokenizer, template)
    assert (len(found.train), len(found.held_out)) == (38, 2)


def test_rows_hold_prompts_and_perhaps_answers(checkpoint: Path) -> None:
    found = read(checkpoint, "\n".join([said("t7 t8", "t9 t10 t11"), said("t6", "t12"), said(words(*range(6, 20)))]))
    chosen = torch.Generator().manual_seed(0)
    with_answers = found.rows(found.train, 9, 10, 3, END, chosen)
    assert with_answers.ids.tolist() == [[1, 6, 3, 2, 12, 3, 3, 3], [1, 7, 8, 3, 2, 9, 10, 11]]
    assert with_answers.begins.tolist() == [4, 5]
    prompts = found.rows(found.train, 9, 10, 0, END, chosen)
    assert (prompts.ids.tolist(), prompts.begins.tolist()) == ([[1, 6, 3, 2, 3], [1, 7, 8, 3, 2]], [4, 5])
    assert len(found.rows(found.train, 2, 99, 0, END, chosen)) == 2
    assert found.left_out(Settings.of(prefix_tokens=10)) == 1


def test_padding_counts_for_nothing() -> None:
    """Rows of different lengths in one batch, as each by itself."""
    model, generator = model_of(), torch.Generator().manual_seed(1)
    adapter = random_adapter(model.config, targets=TARGETS, mask_row=True, size=0.2)
    prompts = [torch.randint(6, 24, (length,), generator=generator) for length in (3, 6, 11)]
    texts = [torch.tensor(ar_generate(model, prompt.tolist(), 20).ids[len(prompt) :]) for prompt in prompts]
    texts[1] = torch.cat((texts[1][:12], torch.tensor([END])))
    offsets = torch.tensor([[0, 4, 11]] * 3)
    objective, eos = Objective(), frozenset({END})

    def outcome(rows: Rows) -> tuple[list[list[int]], float]:
        target = Target.of(model, rows.ids, rows.begins[:, None], eos)
        drafts = Drafts.over(model, adapter, target, rows.begins[:, None] + offsets[: len(rows)], 8)
        return drafts.emitted().tolist(), float(objective.loss_sum(model, target, drafts))

    emitted, loss = outcome(Rows.of(prompts, texts, 20, END))
    alone = [outcome(Rows.of([prompt], [text], 20, END)) for prompt, text in zip(prompts, texts, strict=True)]
    assert emitted == [found[0] for found, _ in alone]
    assert loss == pytest.approx(sum(found for _, found in alone), rel=1e-4)
    assert emitted[1][2] <= 3, "the text ends"


def trainer_in(folder: Path, checkpoint: Path, resume: bool = False, **changed: Any) -> Trainer:
    chats = read(checkpoint, conversations(30), conversations(4))
    trainer = Trainer(model_of(), chats, Settings.of(**SMALL | changed), folder)
    trainer.begin(resume)
    return trainer


@pytest.mark.parametrize("own", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one(checkpoint: Path, tmp_path: Path, own: bool) -> None:
    changed = {"own_text": own, "targets": "all", "mask_row": True}
    runs = {}
    for name in ("straight", "parts"):
        trainer = trainer_in(tmp_path / name, checkpoint, **changed)
        with Progress(disable=True) as progress:
            if name == "parts":
                assert not trainer.run(Schedule(minutes=1e-9), progress)
                trainer = trainer_in(tmp_path / name, checkpoint, True, **changed)
            assert trainer.run(Schedule(), progress)
        runs[name] = trainer
    assert runs["parts"].curve == runs["straight"].curve
    pairs = zip(runs["parts"].adapter.parameters, runs["straight"].adapter.parameters, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_blocks_begin_inside_the_answers(checkpoint: Path, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, checkpoint, own_text=False)
    ids = torch.full((3, 34), END)
    ids[0, :14], ids[1, :9], ids[2, :34] = 7, 8, 9
    for _ in range(20):
        starts = trainer._starts(Rows(ids, torch.tensor([4, 7, 14])))
        assert starts.shape == (3, 3)
        assert all(len(set(row)) == 3 for row in starts.tolist())
        assert starts.min(1).values.ge(torch.tensor([4, 7, 14])).all()
        assert starts[0].max() < 14
        assert set(starts[1].tolist()) >= {7, 8}, "then some after it"
        assert starts[2].max() <= 34 - 8


def test_own_answers_are_the_model_s(checkpoint: Path, tmp_path: Path) -> None:
    model, found = model_of(), read(checkpoint, conversations(9))
    prompts = found.rows(found.train, 9, 14, 0, END, torch.Generator().manual_seed(0))
    rows = own_text(model, prompts, 20, END, tmp_path / "own.pt", lambda _: None)
    for row, begin in zip(rows.ids.tolist(), rows.begins.tolist(), strict=True):
        written = ar_generate(model, row[:begin], 20).ids
        assert row[: len(written)] == written
        assert set(row[begin + 20 :]) <= {END}


def command(checkpoint: Path, data: str, *arguments: str) -> Any:
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "warm_up"]
    file = str(checkpoint / data)
    return invoke("train-draft-lora", str(checkpoint), "--data", file, *small, *arguments)


def test_the_command_trains_on_conversations(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "long.jsonl").write_text(conversations(40) + "\n" + said(words(*[7] * 30), "t9"))
    result = command(checkpoint, "long.jsonl", f"--output={tmp_path}", "--targets=q_proj,down_proj", "--mask-row")
    assert result.exit_code == 0, result.output
    assert "1 answers are left out" in result.output
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "down_proj"]
    assert settings["trainable_token_indices"] == {"embed_tokens": [5]}
    adapter, row = DraftAdapter.read(tmp_path), load_reference(checkpoint).encoder.embed_tokens.weight[5].detach()
    assert adapter.targets == ("q_proj", "down_proj")
    assert adapter.mask_row is not None
    assert 0 < float((adapter.mask_row - row).abs().max()) < 0.1, "it began as the model's own"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (said("t7", "t8") + '\n{"text": "t9"}', [], "line 2: every line must be an object such as"),
        ('{"messages": []}', [], "line 1: every line must be"),
        ('{"messages": [{"content": "t7"}]}', [], "line 1: every line must be"),
        ('{"messages": "t7"}', [], "line 1: every line must be"),
        (conversations(30), ["--prefix-tokens=3"], "--prefix-tokens 3: --data has no prompt as short as that"),
        ("\n".join([said("t7")] * 30), ["--no-own-text"], "--data: no answers (--no-own-text)"),
        (said("t7", "t8"), [], "--data: no answers; allowed: one conversation or more"),
    ],
)
def test_unsuitable_conversations(
    checkpoint: Path, tmp_path: Path, content: str, arguments: list[str], message: str
) -> None:
    (checkpoint / "bad.jsonl").write_text(content)
    result = command(checkpoint, "bad.jsonl", f"--output={tmp_path / 'out'}", *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_template_that_is_missing_or_fails(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors", "data.jsonl"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    for template, message in (
        (None, "has no chat template, which messages need"),
        ("{{ raise_exception('no system here') }}", "line 1: the chat template does not take it: no system here"),
        ("{{ messages | length }}{{ 7 if add_generation_prompt }}", "spells answers otherwise than they are begun"),
    ):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        result = command(tmp_path, "data.jsonl")
        assert result.exit_code == 1
        assert message in result.output


def test_a_model_without_an_end_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = models.random_model(models.small_config())
    with pytest.raises(NLDError, match="no eos_token_id"):
        Trainer(model, read(checkpoint, conversations(30)), Settings.of(**SMALL), tmp_path)


def test_what_holds_conversations(tmp_path: Path) -> None:
    for name, content, expected in (
        ("a.jsonl", "\n" + said("t7"), True),
        ("b.jsonl", '{"text": "t7"}', False),
        ("c.txt", said("t7"), False),
        ("d.jsonl", "{", False),
        ("e.jsonl", "7", False),
        ("f.jsonl", "", False),
    ):
        (tmp_path / name).write_text(content)
        assert holds_conversations(tmp_path / name) == expected
    assert not holds_conversations(tmp_path / "gone.jsonl")

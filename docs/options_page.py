"""Write ``user/options.md``, every option of the extension, from the code: ``python docs/options_page.py``.

Run it after a change of an option, a command or an environment variable; ``tests/unit/test_options_page.py`` fails
until the page is fresh.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import typer.main

from vllm_nld.cli import app
from vllm_nld.model.speculative_keys import INSTEAD
from vllm_nld.names import ENVIRONMENT, PROPOSER_PATHS
from vllm_nld.options import MODES_OF_KEY, MOST_BRANCHES, NLDOptions

PAGE = Path(__file__).parent / "user/options.md"

PAGES = {
    "mode": "modes.md",
    "draft_lora": "draft_lora.md",
    "draft_adapter": "draft_lora.md",
    "prompt_lookup": "speculation.md#looking-drafts-up",
    "sampled_drafts": "speculation.md#sampled-requests",
    "branches": "branches.md",
    "branch_length": "branches.md",
    "sampler": "modes.md#diffusion",
}
"""Where to read more about an option."""

_INTRODUCTION = """# Options

Generated from the code by `python docs/options_page.py`. [Modes](modes.md) explains how they work together.

## For requests and for the server

The server's defaults are an object, `--additional-config '{"nld": {"mode": "diffusion", "threshold": 0.8}}'`. A request
overrides them with `vllm_xargs` over HTTP, `{"nld.mode": "diffusion", "nld.threshold": 0.8}`, or offline with
`SamplingParams(extra_args={"nld": {"mode": "diffusion"}})`. Unknown keys, values out of range, and keys without effect
in the request's mode are refused with one line that names what is allowed.
"""

_SPECULATIVE = """## Keys of `--speculative-config`

`--speculative-config '{"model": "vllm_nld.SelfSpeculation"}'` switches self-speculation, diffusion and auto mode on.
Without it, the server decodes in AR.
"""

_OWN_KEYS = (
    ("model", f"`{PROPOSER_PATHS[0]}`"),
    ("num_speculative_tokens", "drafts in a cycle, 1 to the checkpoint's block length - 1, which is the default"),
    ("rejection_sample_method", "only vLLM's `standard`, its default, because the others change the text"),
)

_REFUSED = """vLLM has other keys for its own draft methods. They are refused, because they have no effect here:
"""

_ENVIRONMENT = """## Environment variables

vLLM's own variables hold as well. `VLLM_PLUGINS`, if it is set, must include `vllm_nld`.
`VLLM_USE_V2_MODEL_RUNNER` chooses between [two runners](../operate/runners.md). `VLLM_LOGGING_LEVEL=DEBUG` shows auto
mode's choices, and each request's counts when it ends.
"""

_COMMANDS = """## Commands

`vllm-nld COMMAND --help` prints the same. A failure that you can mend is one line, `vllm-nld: error: ...`, with exit
status 1.
"""


def page() -> str:
    """Return the page's text."""
    lines = [
        _INTRODUCTION,
        *_options(),
        _SPECULATIVE,
        *_table(("Key", "Meaning"), ((f"`{key}`", meaning) for key, meaning in _OWN_KEYS)),
        _REFUSED,
        *_table(("Key", "Instead"), ((f"`{key}`", _escaped(text)) for key, text in INSTEAD.items())),
        _ENVIRONMENT,
        *_table(("Variable", "Meaning"), ((f"`{name}`", text) for name, text in ENVIRONMENT.items())),
        _COMMANDS,
        *(line for command in _commands(typer.main.get_command(app), "vllm-nld") for line in _command(*command)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return a Markdown table and an empty line."""
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)] + [""]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _options() -> Iterator[str]:
    """Yield the options under ``nld``: a table for those that have an effect in the same modes."""
    groups: dict[tuple[str, ...], list[str]] = {}
    names = NLDOptions.keys()
    for name in names:
        groups.setdefault(MODES_OF_KEY.get(name, ()), []).append(name)
    for modes, keys in groups.items():
        yield f"### In {' and '.join(modes).replace(' and ', ', ', len(modes) - 2) or 'every mode'}\n"
        yield from _table(("Key", "Values", "Default", "Meaning"), map(_option, keys))


def _option(name: str) -> tuple[str, ...]:
    """Return the row of an option under ``nld``."""
    field = NLDOptions.model_fields[name]
    meaning = _escaped(" ".join((field.description or "").split()))
    more = f" [More]({PAGES[name]})" if name in PAGES else ""
    return f"`{name}`", _values(name, field), _default(field.default), meaning + more


def _values(name: str, field: Any) -> str:
    """Return what an option may be, in words."""
    if name == "branches":  # pydantic calls a function to check it
        return f"`off`, `auto`, `all`, or 1 to {MOST_BRANCHES}"
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{kind}`" for kind in kinds)
    kind = kinds[0] if kinds else field.annotation
    bounds = [value for item in field.metadata for value in (getattr(item, "ge", None), getattr(item, "le", None))]
    span = " to ".join(f"{value:.7g}" for value in bounds if value is not None)
    return {bool: "`true`, `false`", str: "text", int: f"number, {span}", float: span}[kind]


def _default(value: object) -> str:
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every command below ``command``, with the words that start it."""
    inside = getattr(command, "commands", None)
    if inside is not None:
        for word, inner in inside.items():
            yield from _commands(inner, f"{name} {word}")
    else:
        yield name, command


def _command(name: str, command: Any) -> list[str]:
    """Return a command's section."""
    return [
        f"### `{name}`\n",
        _escaped(" ".join((command.help or "").replace("``", "`").split())) + "\n",
        *_table(("Argument", "Default", "Meaning"), map(_parameter, command.params)),
    ]


def _parameter(parameter: Any) -> tuple[str, str, str]:
    """Return the row of a command's argument or option."""
    is_option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name.upper()]
    return ", ".join(f"`{name}`" for name in names), _default(parameter.default), _escaped(parameter.help or "")


if __name__ == "__main__":
    PAGE.write_text(page())

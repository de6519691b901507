"""Imports go down: the rooms of the package have levels, and a module imports from lower ones only."""

from __future__ import annotations

import ast
import pkgutil
from functools import cache
from pathlib import Path

import vllm_nld

PACKAGE = Path(vllm_nld.__file__).parent

OLD_NAMES = ("replica", "learned_sampler")
"""Modules that moved, by their old names, for one more release."""

LEVELS: tuple[tuple[str, ...], ...] = (
    ("names", "errors", "option", "origins", "branches"),
    ("policies", "draft_sources"),
    ("config", "options", "ops"),
    ("checkpoints", "serving", "vllm_glue", "attention", "vision"),
    ("planning", "model"),
    ("draft_pass",),
    ("auto", "reference"),
    ("proposer", "speculator", "training", "conversion"),
    ("worker", "scheduler"),
    ("async_scheduler",),
    ("chat",),
    ("cli", "plugin", *OLD_NAMES),
)
"""Rooms and modules of the top level, from the lowest level up."""

LAZY_EXPORTS = {("model", "network"), ("model", "vision_language"), ("proposer", "self_speculation")}
"""Names that the ``__init__`` of a room or of the package resolves on demand, for paths that users and vLLM use."""


@cache
def modules() -> dict[str, ast.Module]:
    """Return every module of the package, by its dotted name."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in ("vllm_nld", *parts) if part != "__init__")] = ast.parse(file.read_text())
    return found


def imported(tree: ast.Module, known: dict[str, ast.Module]) -> set[str]:
    """Return the package's modules that a module imports, also in functions, but not only for type checkers."""
    found: set[str] = set()
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known.keys()) or {node.module}
    return {name for name in found if name in known}


@cache
def imports() -> dict[str, set[str]]:
    """Return what each module of the package imports of it."""
    return {module: imported(tree, modules()) for module, tree in modules().items()}


def room(module: str) -> str:
    """Return the room of a module; the package itself is the room ''."""
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_level() -> None:
    rooms = {room(module) for module in modules()} - {""}
    assert rooms == {name for level in LEVELS for name in level}


def test_imports_go_down() -> None:
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room(module) and room(other) and room(module) != room(other)
        if level[room(module)] <= level[room(other)]
    ]
    assert not wrong


def test_no_import_cycles() -> None:
    """Also within a room; exports on demand are left out."""
    edges = {module: others - {module} for module, others in imports().items() if "." in module}
    for name, inner in LAZY_EXPORTS:
        edges[f"vllm_nld.{name}"] -= {f"vllm_nld.{name}.{inner}"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for other in sorted(edges.get(module, ())):
            visit(other, (*path, module))
        done.add(module)

    for module in edges:
        visit(module, ())


def test_public_names_resolve() -> None:
    """Also where they were before the package had rooms."""
    for name in (
        "vllm_nld.SelfSpeculation",
        "vllm_nld.proposer.SelfSpeculation",
        "vllm_nld.model.NLDForCausalLM",
        "vllm_nld.worker.NLDCPUWorker",
        "vllm_nld.scheduler.NLDScheduler",
        "vllm_nld.scheduler.ParkingScheduler",
        "vllm_nld.serving.replica.check_engine",
        "vllm_nld.draft_pass.learned_sampler.LearnedSampler",
        "vllm_nld.checkpoints.checkpoint_path",
        "vllm_nld.config.NemotronLabsDiffusionConfig",
        "vllm_nld.reference.load_reference",
        "vllm_nld.ops.function",
    ):
        assert pkgutil.resolve_name(name) is not None

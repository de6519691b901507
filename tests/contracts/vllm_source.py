"""vLLM's source, read without importing it, so that any unpacked version can be checked."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_nld.vllm_glue.versions import release_of


@dataclass(frozen=True)
class VllmSource:
    """One version's package folder, the one that holds ``__init__.py``."""

    folder: Path

    @property
    def release(self) -> tuple[int, ...]:
        """(major, minor) of the version."""
        return release_of(re.search(r"version = '(.+?)'", (self.folder / "_version.py").read_text())[1])  # type: ignore[index]

    def parameters(self, file: str, name: str) -> list[str]:
        """Return the parameters of a function, or of ``Class.method`` (without ``self``)."""
        node = self._find(file, name)
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), f"{file}: {name} is no function"
        names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        return names[1:] if names[:1] == ["self"] else names

    def fields(self, file: str, name: str) -> set[str]:
        """Return the annotated attributes in the body of a class."""
        node = self._find(file, name)
        assert isinstance(node, ast.ClassDef), f"{file}: {name} is no class"
        found = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
        return {target.id for target in found if isinstance(target, ast.Name)}

    def text(self, file: str, name: str = "") -> str:
        """Return the source of a file, a class, a function or a method, in one normal form and without comments."""
        return ast.unparse(self._find(file, name) if name else _parsed(self.folder / file))

    def has(self, file: str, name: str) -> bool:
        """Whether a file defines a class, a function, a method or a module constant."""
        try:
            self._find(file, name)
        except LookupError:
            return False
        return True

    def _find(self, file: str, name: str) -> ast.stmt:
        body = _parsed(self.folder / file).body
        *classes, last = name.split(".")
        for part in classes:
            body = next((n.body for n in _statements(body) if isinstance(n, ast.ClassDef) and n.name == part), [])
        for node in _statements(body):
            if last in _names(node):
                return node
        raise LookupError(f"{self.folder / file} defines no {name}")


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements of a body, also those under ``if`` and ``else``."""
    flat: list[ast.stmt] = []
    for node in body:
        flat += _statements([*node.body, *node.orelse]) if isinstance(node, ast.If) else [node]
    return flat


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]

"""Files of a resumable batch: input prompts, and a folder of results that has every row exactly once.

Only the driver of the batch writes. A part file gets its name only when it is complete, so the folder has only complete
results, however the driver ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class BatchError(Exception):
    """An error that the user can fix; shown as one line."""


@dataclass(frozen=True)
class Row:
    """A prompt and the name of its result."""

    id: str
    prompt: str

    @property
    def digest(self) -> str:
        """Digest that ties a result to this prompt."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


def read_rows(paths: Iterable[Path], prompt_column: str, id_column: str | None) -> Iterator[Row]:
    """Yield the rows of JSONL (``.jsonl``, ``.json``) and Parquet (``.parquet``) files.

    Args:
        paths: the files, in order.
        prompt_column: column of the prompt, a text.
        id_column: column of the row's id, text or number; None numbers all rows from 0.

    Raises:
        BatchError: a row lacks a column, or an id occurs twice.
    """
    seen: set[str] = set()
    for path in paths:
        for place, record in _records(path, [prompt_column] + ([id_column] if id_column else [])):
            prompt = record.get(prompt_column)
            if not isinstance(prompt, str):
                raise BatchError(f"{place}: --prompt-column {prompt_column} must be a text, not {prompt!r}")
            id_ = record.get(id_column) if id_column else len(seen)
            if not isinstance(id_, str | int):
                raise BatchError(f"{place}: --id-column {id_column} must be a text or a number, not {id_!r}")
            if str(id_) in seen:
                raise BatchError(f"{place}: --id-column {id_column} must be unique, but {id_!r} occurs twice")
            seen.add(str(id_))
            yield Row(str(id_), prompt)


def _records(path: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        if missing := set(columns) - set(file.schema_arrow.names):
            raise BatchError(f"{path} has no column {missing.pop()!r}; it has {', '.join(file.schema_arrow.names)}")
        records = (record for batch in file.iter_batches(columns=columns) for record in batch.to_pylist())
        yield from ((f"{path}, row {index}", record) for index, record in enumerate(records))
    elif path.suffix in (".jsonl", ".json"):
        with path.open(encoding="utf-8") as lines:
            for index, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise BatchError(f"{path}, line {index}: not JSON ({error})") from None
                if not isinstance(record, dict):
                    raise BatchError(f"{path}, line {index}: must be a JSON object, not {line.strip()[:40]!r}")
                yield f"{path}, line {index}", record
    else:
        raise BatchError(f"{path}: allowed are .jsonl, .json (one object per line) and .parquet")


class Output:
    """The folder of a batch's results.

    Attributes:
        done: digest of the prompt by id, for every row that has a result.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Open a folder, new or of an earlier run.

        Args:
            folder: where ``part-*.jsonl`` lie.
            settings: the settings that affect results; an earlier run must have had equal ones.

        Raises:
            BatchError: another run uses the folder, or an earlier one had other settings.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = (folder / ".lock").open("w")  # held until this process ends, in any way
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(f"--output {folder}: another run is writing there") from None
        self._check(settings)
        self.done: dict[str, str] = {}
        self._next = 0
        for leftover in folder.glob("*.partial"):
            leftover.unlink()
        for path in sorted(folder.glob("part-*.jsonl")):
            self._next = int(path.stem.removeprefix("part-")) + 1
            with path.open(encoding="utf-8") as lines:
                self.done.update((row["id"], row["prompt_digest"]) for row in map(json.loads, lines))

    def _check(self, settings: dict[str, Any]) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            self._write(path, json.dumps(settings, indent=2) + "\n")
            return
        earlier = json.loads(path.read_text(encoding="utf-8"))
        for key in settings | earlier:
            if settings.get(key) != earlier.get(key):
                raise BatchError(
                    f"--output {self.folder}: its results were made with {key}={json.dumps(earlier.get(key))}, and now "
                    f"{key}={json.dumps(settings.get(key))}; give the old value, or another folder"
                )

    def missing(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows that have no result yet.

        Raises:
            BatchError: a row has one, but for another prompt.
        """
        for row in rows:
            if row.id not in self.done:
                yield row
            elif self.done[row.id] != row.digest:
                raise BatchError(
                    f"row {row.id!r} had another prompt when its result was written to {self.folder}; "
                    "give the old input, or another --output"
                )

    def add(self, results: Iterable[dict[str, Any]]) -> int:
        """Write results as a new part file, without rows that have a result; return the number of new ones.

        If a replica dies at the wrong moment, Ray may run a batch again whose results it has already delivered.
        """
        new = {result["id"]: result for result in results if result["id"] not in self.done}
        if new:
            text = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in new.values())
            self._write(self.folder / f"part-{self._next:06d}.jsonl", text)
            self._next += 1
            self.done.update((id_, result["prompt_digest"]) for id_, result in new.items())
        return len(new)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

"""What models answered, on disk: one JSON line a question, appended as answers come, never lost to a kill.

    <folder>/<task>-<kind>-<8 hex of the identity>.jsonl

The first line is the identity: everything that decides the answers (exam.py). The lines behind it come in the order in
which they were computed; each names its question by its index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panda_jax.errors import InputError

Record = dict[str, Any]


class Answers:
    """One model's answers to the questions of one exam."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Open what an earlier run with the same identity left, or nothing; a line that a kill cut is dropped.

        Raises InputError where the file is damaged in another way.
        """
        self.identity = json.loads(json.dumps(identity))
        text = json.dumps(self.identity, ensure_ascii=False, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.path = folder / f"{identity['task']}-{identity['kind']}-{digest[:8]}.jsonl"
        self._by_index: dict[int, Record] = {}
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        whole = self.path.read_bytes()
        lines = whole.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            with self.path.open("r+b") as file:
                file.truncate(len(whole) - len(lines.pop()))
        for number, line in enumerate(lines, start=1):
            try:
                found = json.loads(line)
                if number > 1:
                    self._by_index[int(found["index"])] = found
                elif found != self.identity:
                    raise ValueError("the first line is not what was asked now")
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path}:{number}: damaged ({error}); delete the file, and its questions are asked again"
                ) from error

    def missing(self) -> list[int]:
        """Return the indices of the questions without an answer, ascending."""
        return [index for index in range(self.identity["num_questions"]) if index not in self._by_index]

    def add(self, record: Record, write: bool) -> None:
        """Keep a record, which has its question's `index`; `write`: in the file too, by one process of the run."""
        if write:
            self._append(record)
        self._by_index[record["index"]] = record

    def _append(self, record: Record) -> None:
        lines = [record]
        if not self._by_index:
            # Whatever is there was cut within its first line.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
            lines = [self.identity, record]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.path.open("ab") as file:
            file.write(text.encode())

    def in_order(self) -> list[Record]:
        """Return every record in the order of the questions."""
        return [self._by_index[index] for index in sorted(self._by_index)]

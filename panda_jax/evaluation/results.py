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
from typing import Any, BinaryIO

from panda_jax.atomic import lock
from panda_jax.errors import InputError

Record = dict[str, Any]


class Answers:
    """One model's answers to the questions of one exam."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Read what earlier runs with the same identity left, or nothing.

        Raises InputError where the file is damaged, unless a kill cut its last line.
        """
        self.identity = json.loads(json.dumps(identity))
        text = json.dumps(self.identity, ensure_ascii=False, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.path = folder / f"{identity['task']}-{identity['kind']}-{digest[:8]}.jsonl"
        self._by_index: dict[int, Record] = {}
        self._file: BinaryIO | None = None
        if self.path.is_file():
            self._read()

    def open(self) -> None:
        """Make this the one process that writes the file until it is closed, and read what others have written since.

        Raises InputError where another process is writing it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("ab")
        if not lock(file):
            file.close()
            raise InputError(
                f"{self.path}: another evaluation is writing these answers; wait for it, or choose another --output"
            )
        whole_lines = self._read()
        file.truncate(whole_lines)
        self._file = file
        if not whole_lines:
            self._append(self.identity)

    def close(self) -> None:
        """Let others write."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> int:
        """Take in every whole line; return how many bytes they are."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
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
        return sum(map(len, lines))

    def missing(self) -> list[int]:
        """Return the indices of the questions without an answer, ascending."""
        return [index for index in range(self.identity["num_questions"]) if index not in self._by_index]

    def add(self, record: Record) -> None:
        """Keep a record, which has its question's `index`; in the file too where this process has opened it."""
        if self._file is not None:
            self._append(record)
        self._by_index[record["index"]] = record

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def in_order(self) -> list[Record]:
        """Return every record in the order of the questions."""
        return [self._by_index[index] for index in sorted(self._by_index)]

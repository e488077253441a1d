"""A sequence of safetensors files of at most a given size, written as a stream."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert.disk_file import DiskFile
from convert.transfer import Entries
from panda_jax.errors import InputError
from panda_jax.weights import safetensors_header, tensor_bytes

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_size(text: str) -> int:
    """Return the bytes in a text such as 500MB or 4GB; raise InputError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise InputError(f"--shard-size {text}: expected a number and a unit, such as 500MB or 4GB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def plan_shards(entries: Entries, shard_bytes: int) -> list[Entries]:
    """Cut the tensors into files of at most `shard_bytes`, in order; a larger tensor gets a file of its own."""
    shards: list[Entries] = []
    filled = 0
    for name, (shape, dtype) in entries.items():
        size = tensor_bytes(shape, dtype)
        if not shards or filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (shape, dtype)
        filled += size
    return shards


class SafetensorsSink:
    """Writes tensors, in the order of `entries`, into `<stem>-0000i-of-0000n.safetensors` files."""

    def __init__(
        self,
        folder: Path,
        stem: str,
        entries: Entries,
        names: Mapping[str, str],
        shard_bytes: int,
        is_single_bare: bool,
    ) -> None:
        """`names`: our name -> name in the file; `is_single_bare`: one file alone is called `<stem>.safetensors`."""
        self._shards = plan_shards(entries, shard_bytes)
        self._names, self._folder = names, folder
        count = len(self._shards)
        self.file_of: dict[str, str] = {}
        """Our name -> the file that holds it."""
        for number, shard in enumerate(self._shards, 1):
            bare = is_single_bare and count == 1
            file = f"{stem}.safetensors" if bare else f"{stem}-{number:05}-of-{count:05}.safetensors"
            self.file_of |= dict.fromkeys(shard, file)
        self._file: DiskFile | None = None
        self._left: list[str] = []

    def append(self, name: str, array: np.ndarray) -> None:
        """Write the next tensor; its turn, shape and dtype must be those of the plan."""
        if not self._left:
            self._open_next()
        assert self._file is not None and self._left.pop(0) == name
        # A transposed view would be written in the order of its memory: refuse instead of storing another matrix.
        assert array.flags.c_contiguous and (array.shape, array.dtype) == self._shard[name]
        self._file.write(array.reshape(-1).view(np.uint8).data)
        if not self._left:
            self._close()

    def _open_next(self) -> None:
        self._shard = self._shards.pop(0)
        self._left = list(self._shard)
        entries = {self._names[name]: entry for name, entry in self._shard.items()}
        self._file = DiskFile(self._folder / self.file_of[self._left[0]])
        self._file.write(safetensors_header(entries, {"format": "pt"}))

    def _close(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None

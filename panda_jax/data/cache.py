"""The token cache: tokenised sources on disk, memory-mapped and read-only. preparation.py builds it.

    <cache_dir>/<label>-<fingerprint>/
        shard-000000.bin …                     one per block of records
        lengths.npy trained.npy offsets.npy    one entry per window, in the order of records
        manifest.json                          written last: where it is, the cache is complete
    <cache_dir>/<run>.caches.json              which of these folders a run reads

A shard holds the windows of one block of records, in one file that never changes:

    magic · size of the header · header (JSON, padded with spaces) · records int64 [windows] · lengths int32 [windows]
    · trained int32 [windows] · tokens uint16 or uint32 [tokens]

A token is an id with the trained flag in its top bit. Numbers are little-endian.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from panda_jax.atomic import write_atomically
from panda_jax.config import Config
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer

MAGIC = b"panda_jax shard\n"
SIZE_BYTES = 8
# The header's end, so that the arrays behind it are aligned whatever their type.
ALIGNMENT_BYTES = 64
# Shards mapped at a time: each takes a file descriptor.
OPEN_SHARDS = 128
# Marks around trained text: colours in a terminal, brackets elsewhere.
MARKS = {True: ("\x1b[1;32m", "\x1b[0m"), False: ("⟦", "⟧")}
# Control characters in a text could rewrite the reader's terminal; their pictures cannot.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


@dataclass(frozen=True)
class Header:
    """What a shard holds, and what was left out on the way."""

    index: int
    """Position of its block among the source's blocks."""
    file: str
    """The raw file, for messages."""
    first_record: int
    """Number of the block's first record within the source."""
    first_line: int
    """Line of that record in its file."""
    dtype: str
    """Type of a token: uint16 or uint32."""
    windows: int
    tokens: int
    """Ids of all windows, BOS included."""
    trained: int
    """Ids that carry the trained flag."""
    payload_bytes: int
    """Size of the raw block."""
    records: int
    """Raw records read."""
    examples: int
    """Examples the records gave, the dropped ones included."""
    changed: dict[str, int]
    """Examples that were cut or split, by reason."""
    dropped: dict[str, int]
    """Examples that left no window, by reason."""

    @property
    def array_bytes(self) -> int:
        """Size of what follows the header in the file."""
        return self.windows * (8 + 4 + 4) + self.tokens * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class Shard:
    """An open shard; the arrays are memory-mapped and read-only."""

    header: Header
    records: np.ndarray
    """int64 [windows]: number of the record each window came from, within the source."""
    lengths: np.ndarray
    """int32 [windows]: ids in each window."""
    trained: np.ndarray
    """int32 [windows]: trained ids in each window."""
    tokens: np.ndarray
    """uint16 or uint32 [tokens]."""


def shard_path(folder: Path, index: int) -> Path:
    """Return where the shard of block `index` lies."""
    return folder / f"shard-{index:06d}.bin"


def token_dtype(vocab_size: int) -> str:
    """Return the smallest type that holds an id and the trained flag above it."""
    return "uint16" if vocab_size <= 1 << 15 else "uint32"


def pack(ids: np.ndarray, trained: np.ndarray, dtype: str) -> np.ndarray:
    """Return tokens: `ids` with `trained` in the top bit of `dtype`."""
    tokens = ids.astype(dtype)
    tokens |= trained.astype(dtype) << np.array(np.iinfo(dtype).bits - 1, dtype)
    return tokens


def unpack(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids int32, trained bool) of packed tokens."""
    flag = 1 << (np.iinfo(tokens.dtype).bits - 1)
    return (tokens & (flag - 1)).astype(np.int32), tokens >= flag


class Tokenized(Protocol):
    """The windows of a block, one after the other."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def trained(self) -> np.ndarray: ...
    @property
    def lengths(self) -> np.ndarray: ...


def write_shard(path: Path, header: Header, records: np.ndarray, windows: Tokenized) -> None:
    """Write a shard, wholly or not at all; raises OSError, with nothing left behind."""
    text = json.dumps(asdict(header), ensure_ascii=False, sort_keys=True).encode()
    text += b" " * (-(len(MAGIC) + SIZE_BYTES + len(text)) % ALIGNMENT_BYTES)
    ends = np.cumsum(windows.lengths)
    counts = np.concatenate([[0], np.cumsum(windows.trained)])
    arrays = [
        records.astype("<i8"),
        windows.lengths.astype("<i4"),
        (counts[ends] - counts[ends - windows.lengths]).astype("<i4"),
        pack(windows.ids, windows.trained, header.dtype),
    ]
    write_atomically(path, [MAGIC, len(text).to_bytes(SIZE_BYTES, "little"), text, *(array.data for array in arrays)])


def read_header(path: Path) -> Header:
    """Return a shard's header; raises InputError where the file is not a whole shard, FileNotFoundError without it."""
    with path.open("rb") as file:
        start = file.read(len(MAGIC) + SIZE_BYTES)
        text = file.read(int.from_bytes(start[len(MAGIC) :], "little")) if start.startswith(MAGIC) else b""
        actual = os.fstat(file.fileno()).st_size
    try:
        fields: dict[str, Any] = json.loads(text)
        header = Header(**fields)
        expected = len(start) + len(text) + header.array_bytes
    except (ValueError, TypeError):
        raise InputError(f"{path}: {actual} bytes that are not a shard; delete it and run prepare again") from None
    if actual != expected:
        raise InputError(f"{path}: {actual} bytes, expected {expected}; delete it and run prepare again")
    return header


def open_shard(path: Path) -> Shard:
    """Map a shard into memory; raises InputError where the file is missing or not whole."""
    try:
        header = read_header(path)
    except FileNotFoundError:
        raise InputError(f"{path}: missing, and the cache's manifest names it; run prepare again") from None
    raw = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    first = len(raw) - header.array_bytes
    records, lengths, trained, tokens = np.split(raw[first:], np.cumsum(np.array([8, 4, 4]) * header.windows))
    return Shard(header, records.view("<i8"), lengths.view("<i4"), trained.view("<i4"), tokens.view(header.dtype))


class TokenCache:
    """One prepared source, memory-mapped and read-only. Safe to use from threads; a pickle of it reopens the files."""

    def __init__(self, folder: Path) -> None:
        """Open a complete cache; raises InputError naming the file that is missing, cut short or damaged."""
        self.folder = folder
        path = folder / "manifest.json"
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{folder}: the cache is not complete; run prepare again") from None
        except ValueError:
            raise InputError(f"{path}: not valid JSON; delete it and run prepare again") from None
        self.source: str = self.manifest["source"]
        """Label of the source."""
        self.fingerprint: str = self.manifest["fingerprint"]
        """Content address of everything the tokens depend on."""
        shards = self.manifest["shards"]
        for index, shard in enumerate(shards):
            _check_size(shard_path(folder, index), shard["bytes"])
        self._first_windows = np.cumsum([0, *(shard["windows"] for shard in shards)])
        self.lengths = self._index("lengths", "int32")
        """int32 [windows]: positions each window occupies in a row, one less than its ids."""
        self.trained = self._index("trained", "int32")
        """int32 [windows]: trained targets in each window."""
        self._offsets = self._index("offsets", "uint32")
        self._shard = functools.lru_cache(OPEN_SHARDS)(self._open_shard)

    def __reduce__(self) -> tuple[type[TokenCache], tuple[Path]]:
        return TokenCache, (self.folder,)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32 [n], trained bool [n]) of window i; targets are ids[1:], their flags trained[1:]."""
        shard = self._shard(self._shard_of(i))
        start = int(self._offsets[i])
        return unpack(shard.tokens[start : start + int(self.lengths[i]) + 1])

    def record_id(self, i: int) -> str:
        """Return "label: file:line (record number)" of the record that window i came from, for messages.

        The line is that of the record, or its number within a list or archive; blank lines since the beginning of its
        block are not counted. Windows of one record share it, and no others.
        """
        number = self._shard_of(i)
        shard = self._shard(number)
        record = int(shard.records[i - self._first_windows[number]])
        line = shard.header.first_line + record - shard.header.first_record
        return f"{self.source}: {shard.header.file}:{line} (record {record})"

    def _shard_of(self, i: int) -> int:
        if not 0 <= i < len(self.lengths):
            raise IndexError(f"window {i} of {len(self.lengths)} in {self.folder}")
        return int(np.searchsorted(self._first_windows, i, side="right")) - 1

    def _open_shard(self, index: int) -> Shard:
        return open_shard(shard_path(self.folder, index))

    def _index(self, name: str, dtype: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        _check_size(path, self.manifest["index_bytes"][name])
        array = np.load(path, mmap_mode="r").view(np.ndarray)
        if array.dtype != dtype or array.shape != (self.manifest["windows"],):
            raise InputError(
                f"{path}: {array.dtype} {array.shape}, expected {dtype} ({self.manifest['windows']},); "
                f"delete {self.folder} and run prepare again"
            )
        return array


def _check_size(path: Path, expected: int) -> None:
    actual = path.stat().st_size if path.exists() else "no file"
    if actual != expected:
        raise InputError(f"{path}: {actual}, expected {expected} bytes; delete it and run prepare again")


# ---- which caches a run reads ---------------------------------------------------------------------------------------


def _listing(config: Config) -> Path:
    return Path(config.data.cache_dir) / f"{config.name}.caches.json"


def _what_caches_depend_on(config: Config) -> str:
    return hashlib.sha256(repr((config.data, config.tokenizer, config.model.vocab_size)).encode()).hexdigest()


def list_caches(config: Config, caches: Sequence[TokenCache]) -> None:
    """Write down which caches the run's sources have become, in their order."""
    content = {"settings": _what_caches_depend_on(config), "caches": [str(cache.folder) for cache in caches]}
    write_atomically(_listing(config), [json.dumps(content, ensure_ascii=False, indent=1).encode()])


def open_listed(config: Config) -> list[TokenCache]:
    """Open the caches that `list_caches` wrote down; raises InputError where they are of other settings."""
    path = _listing(config)
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        raise InputError(f"{path}: missing or not JSON; run prepare again") from None
    if content["settings"] != _what_caches_depend_on(config):
        raise InputError(f"{path}: another run called {config.name!r} has prepared its data meanwhile; rename this one")
    return [TokenCache(Path(folder)) for folder in content["caches"]]


# ---- decoded samples ------------------------------------------------------------------------------------------------


def preview(cache: TokenCache, tokenizer: Tokenizer, i: int, use_colour: bool) -> str:
    """Return window i as text, its trained part marked, under a line with its record and its numbers of ids.

    BOS and EOS are shown as their pieces: `<s>问：一加一？⟦二。</s>⟧`.
    """
    ids, trained = cache.read(i)
    left, right = MARKS[use_colour]
    parts = []
    starts = np.flatnonzero(np.diff(trained, prepend=not trained[0]))
    for run, flags in zip(np.split(ids, starts[1:]), np.split(trained, starts[1:]), strict=True):
        text = _readable(run, tokenizer)
        parts.append(f"{left}{text}{right}" if flags[0] else text)
    return f"{cache.record_id(i)}: {len(ids)} ids, {cache.trained[i]} trained\n{''.join(parts)}"


def _readable(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    special = np.isin(ids, (tokenizer.bos_id, tokenizer.eos_id))
    cuts = np.flatnonzero(special)
    text = []
    for piece in np.split(ids, np.unique(np.concatenate([cuts, cuts + 1]))):
        if len(piece) == 1 and piece[0] in (tokenizer.bos_id, tokenizer.eos_id):
            text += tokenizer.pieces(piece)
        else:
            text.append(tokenizer.decode(piece).translate(CONTROL_PICTURES))
    return "".join(text)

"""Preparing the data: raw files tokenised once, on every core, into the shards of a token cache.

The fingerprint of a cache covers everything its tokens depend on, so a changed file or setting makes another folder and
an old folder is never wrong, only unused. Every file is written under another name and then renamed; two processes that
prepare the same source at once write the same bytes, and whoever comes second replaces a file by its equal.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from panda_jax.atomic import UNFINISHED, write_atomically
from panda_jax.config import Config, Source
from panda_jax.data import corpora, files
from panda_jax.data.build import Job
from panda_jax.data.cache import Header, TokenCache, open_shard, read_header, shard_path, token_dtype
from panda_jax.data.files import Block
from panda_jax.data.pool import Pool, num_cores
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer

# Part of the fingerprint. Raise it when the same files and settings give other tokens or another layout than before.
FORMAT = 1
# A block is a 64th of the source within these bounds: enough of them for many cores, few and small enough for memory.
MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = 2**19, 2**23
# Nobody takes this long to write one file: an unfinished one of this age was left by a crash.
ABANDONED_S = 86_400
COMPRESSED = (".gz", ".tgz", ".zip")


class Progress(NamedTuple):
    """How far one source is; `prepare` reports it at the start, after every shard and at the end."""

    source: str
    done_bytes: int
    """Raw bytes, uncompressed, whose shards exist."""
    total_bytes: int | None
    """Raw bytes in all; None where a compressed file hides it."""
    records: int
    is_finished: bool


def _and_extra_ids(config: Config) -> str:
    extra_ids = config.tokenizer.extra_ids
    return f" and tokenizer.extra_ids is {extra_ids}" if extra_ids else ""


def prepare(config: Config, tokenizer: Tokenizer, progress: Callable[[Progress], None]) -> list[TokenCache]:
    """Tokenise every source of config.data that is not in the cache yet, and open all, in the order of the sources.

    A run that was killed is continued at the shard where it stopped. The bytes written do not depend on the number of
    workers. Raises InputError for bad records, for a tokenizer of another size than the model, and for a source that
    loses more than config.data.max_dropped_fraction of its examples; OSError where the disk is full or read-only.
    """
    rows = tokenizer.vocab_size + config.tokenizer.extra_ids
    if rows != config.model.vocab_size:
        raise InputError(
            f"model.vocab_size: {config.model.vocab_size}, but {config.tokenizer.path} has {tokenizer.vocab_size} "
            f"pieces{_and_extra_ids(config)}; set model.vocab_size={rows} or name another tokenizer"
        )
    caches = []
    hashes = _FileHashes(Path(config.data.cache_dir) / "file-hashes.json")
    with Pool(config.data.tokenize_workers or num_cores()) as pool:
        for number, source in enumerate(config.data.sources):
            if source.compat == "panda" and source.overlong != "truncate":
                raise InputError(
                    f"data.sources[{number}].overlong: {source.overlong!r}, but compat: panda cuts on the right; "
                    "remove one of the two"
                )
            paths = files.list_files(source.path)
            work = _Work(source, paths, hashes.get(paths), tokenizer, config)
            if not work.is_complete():
                hashes.save()
                work.build(pool, progress)
            cache = TokenCache(work.folder)
            _check_dropped(cache.manifest, config, number)
            caches.append(cache)
    return caches


class _Work:
    """One source on its way into the cache."""

    def __init__(
        self, source: Source, paths: Sequence[str], hashes: Sequence[str], tokenizer: Tokenizer, config: Config
    ) -> None:
        self.source, self.paths, self.hashes, self.tokenizer = source, paths, hashes, tokenizer
        self.seq_len = config.data.seq_len
        sizes = [Path(path).stat().st_size for path in paths]
        self.block_bytes = min(max(sum(sizes) // 64, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
        self.total_bytes = None if any(path.endswith(COMPRESSED) for path in paths) else sum(sizes)
        self.fingerprint = self._fingerprint()
        label = re.sub(r"[^\w.-]+", "_", source.label)
        self.folder = Path(config.data.cache_dir) / f"{label}-{self.fingerprint[:16]}"

    def _fingerprint(self) -> str:
        source = self.source
        key = {
            "format": FORMAT,
            "files": [[Path(path).name, digest] for path, digest in zip(self.paths, self.hashes, strict=True)],
            "block_bytes": self.block_bytes,
            "corpus": source.corpus,
            "template": corpora.template_of(source).fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "seq_len": self.seq_len,
            "compat": source.compat,
            "overlong": source.overlong,
            "direction": source.direction,
            "instruction": corpora.find_corpus(source.corpus).instruction
            if source.instruction is None
            else source.instruction,
            "max_records": source.max_records,
        }
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def is_complete(self) -> bool:
        """Return whether the manifest and every shard it names are there; sizes are checked on opening."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except ValueError:
            return True  # TokenCache will say what is wrong with it
        names = {path.name for path in self.folder.iterdir()}
        shards = {shard_path(self.folder, index).name for index in range(len(manifest["shards"]))}
        return shards | {f"{name}.npy" for name in manifest["index_bytes"]} <= names

    def build(self, pool: Pool, progress: Callable[[Progress], None]) -> None:
        """Build the missing shards, then the index, then the manifest."""
        _make_folder(self.folder)
        for path in self.folder.glob(f"{UNFINISHED}*"):
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink(missing_ok=True)
        job = Job(self.source, self.seq_len, self.tokenizer.model_bytes, str(self.folder))
        done_bytes = records = num_blocks = 0

        def done(header: Header) -> None:
            nonlocal done_bytes, records
            done_bytes += header.payload_bytes
            records += header.records
            progress(Progress(self.source.label, done_bytes, self.total_bytes, records, False))

        def missing() -> Iterator[Block]:
            nonlocal num_blocks
            for block in files.blocks(self.source, self.block_bytes):
                num_blocks = block.index + 1
                header = self._existing(block.index)
                if header is None:
                    yield block
                else:
                    done(header)

        progress(Progress(self.source.label, 0, self.total_bytes, 0, False))
        pool.build(job, missing(), done)
        self._finish(num_blocks)
        progress(Progress(self.source.label, done_bytes, self.total_bytes, records, True))

    def _existing(self, index: int) -> Header | None:
        """Return the header of a shard that an earlier run left whole."""
        try:
            return read_header(shard_path(self.folder, index))
        except (FileNotFoundError, InputError):
            return None

    def _finish(self, num_shards: int) -> None:
        """Write the index over all shards, one shard in memory at a time, and then the manifest."""
        paths = [shard_path(self.folder, index) for index in range(num_shards)]
        headers = [read_header(path) for path in paths]
        num_windows = sum(header.windows for header in headers)
        index_bytes = {}
        for name, dtype, column in (
            ("lengths", "<i4", lambda shard: shard.lengths - 1),
            ("trained", "<i4", lambda shard: shard.trained),
            ("offsets", "<u4", lambda shard: np.cumsum(shard.lengths) - shard.lengths),
        ):
            columns = (np.ascontiguousarray(column(open_shard(path)).astype(dtype)).data for path in paths)
            write_atomically(self.folder / f"{name}.npy", _npy(dtype, num_windows, columns))
            index_bytes[name] = (self.folder / f"{name}.npy").stat().st_size
        manifest = {
            "source": self.source.label,
            "fingerprint": self.fingerprint,
            "corpus": self.source.corpus,
            "template": corpora.template_of(self.source).fingerprint,
            "files": [{"path": path, "sha256": sha} for path, sha in zip(self.paths, self.hashes, strict=True)],
            "dtype": token_dtype(self.tokenizer.vocab_size),
            "records": sum(header.records for header in headers),
            "examples": sum(header.examples for header in headers),
            "windows": num_windows,
            "tokens": sum(header.tokens - header.windows for header in headers),
            "trained_tokens": sum(header.trained for header in headers),
            "changed": dict(sorted(sum((Counter(header.changed) for header in headers), Counter()).items())),
            "dropped": dict(sorted(sum((Counter(header.dropped) for header in headers), Counter()).items())),
            "index_bytes": index_bytes,
            "shards": [
                {"windows": header.windows, "bytes": path.stat().st_size}
                for header, path in zip(headers, paths, strict=True)
            ],
        }
        text = json.dumps(manifest, ensure_ascii=False, indent=1, sort_keys=True)
        write_atomically(self.folder / "manifest.json", [text.encode()])


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"data.cache_dir: {error.filename} is a file, expected a folder; name another one") from None


def _npy(dtype: str, length: int, columns: Iterator[memoryview]) -> Iterator[bytes | memoryview]:
    """Yield a .npy file of one dimension in parts."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": dtype, "fortran_order": False, "shape": (length,)})
    yield head.getvalue()
    yield from columns


class _FileHashes:
    """SHA-256 of raw files, remembered by path, size and time of change so that a start does not read them again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known: dict[str, list[Any]] = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            self.known = {}  # only a memory: without it every file is read once more

    def get(self, paths: Sequence[str]) -> list[str]:
        """Return the hash of each file, computed on several cores where it is not known."""
        with ThreadPoolExecutor(num_cores()) as threads:
            return list(threads.map(self._one, paths))

    def _one(self, path: str) -> str:
        stat = os.stat(path)
        key = str(Path(path).resolve())
        state = [stat.st_size, stat.st_mtime_ns]
        if self.known.get(key, [])[:2] != state:
            self.known[key] = [*state, files.file_hash(path)]
        return self.known[key][2]

    def save(self) -> None:
        """Write what is known."""
        _make_folder(self.path.parent)
        write_atomically(self.path, [json.dumps(self.known, ensure_ascii=False, indent=1, sort_keys=True).encode()])


def _check_dropped(manifest: dict[str, Any], config: Config, number: int) -> None:
    """Raise InputError, with the counts by reason, where a source lost too much."""
    source, data = config.data.sources[number], config.data
    examples, dropped = manifest["examples"], sum(manifest["dropped"].values())
    place = f"data.sources[{number}] ({source.label})"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items())
    if not examples:
        raise InputError(f"{place}: no record in {source.path}; check `path` and `corpus`")
    if not manifest["windows"]:
        raise InputError(
            f"{place}: none of {examples:,} examples keeps a trained token: {reasons}; "
            f"check `corpus`, `template` and data.seq_len"
        )
    if dropped > data.max_dropped_fraction * examples:
        raise InputError(
            f"{place}: {dropped:,} of {examples:,} examples dropped ({dropped / examples:.2%}): {reasons}; expected at "
            f"most data.max_dropped_fraction={data.max_dropped_fraction}; mend the data, set `overlong`, or raise it"
        )

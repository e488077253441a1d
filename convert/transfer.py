"""From one folder to another, tensor by tensor: planned, hashed on the way, read back, and renamed when it is proven.

A conversion writes into `<output>.unfinished-<random>` and renames that folder at the end, so that at `<output>` lies
the old folder or the whole new one. At most three tensors are in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from panda_jax.atomic import lock, sync_folder, write_atomically
from panda_jax.errors import InputError
from panda_jax.weights import NUMPY_NAMES, REPORT, Lazy, Weights, tensor_bytes, tensor_sha256

Entries = dict[str, tuple[tuple[int, ...], np.dtype]]
"""Name -> shape and dtype, in the order of writing."""

# What tells a folder that a conversion wrote, or a published model, from one that must not be replaced.
MODEL_FILES = (REPORT, "weights.json", "config.json", "params.json", "delta.json")
# Room for headers, tokenizer files and the report.
SMALL_FILES_BYTES = 16 << 20


class Sink(Protocol):
    """A folder of some format while it is written."""

    def append(self, name: str, array: np.ndarray) -> None:
        """Write the next tensor, in the order of the entries; the array is stored, contiguous and of its dtype."""
        ...

    def finish(self, hashes: Mapping[str, str]) -> None:
        """Write everything beside the tensors, what makes the folder loadable last; all of it is on the disk then."""
        ...


class Target(Protocol):
    """A format that conversions write."""

    is_lossless: ClassVar[bool]
    """Whether every bit must come back; the published delta forms round."""

    def open(self, folder: Path, source: Weights, entries: Entries) -> Sink: ...

    def reopen(self, folder: Path) -> Weights:
        """Open what was written with the reader that users of the format have."""
        ...


@dataclass(frozen=True)
class Written:
    """What a finished copy is."""

    hashes: dict[str, str]
    """Name -> SHA-256 of the stored tensor as it was handed to the sink."""
    num_bytes: int
    seconds: float


class ProofFailed(Exception):
    """What was written is not what was read, or computes something else; it is kept as `<output>.bad`."""


@contextlib.contextmanager
def staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside `output` that takes its name when the block ends without an exception.

    What killed conversions to the same output left behind is deleted. Raises InputError when `output` holds something,
    unless `overwrite` is given and it looks like a model.
    """
    output = output.resolve()  # a link stays, and what it leads to is replaced
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise InputError(f"{output}: not empty; choose another folder, or give --overwrite to replace it")
        if not any((output / name).is_file() for name in MODEL_FILES):
            raise InputError(f"{output}: --overwrite replaces a folder with a model, and this one has none of "
                             f"{', '.join(MODEL_FILES)}; remove it yourself")  # fmt: skip
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{output.parent}: not a folder; choose another --output") from error
    for debris in output.parent.glob(f"{glob.escape(output.name)}.unfinished-*"):
        _delete_unless_alive(debris)
    folder = output.with_name(f"{output.name}.unfinished-{uuid.uuid4().hex[:12]}")
    folder.mkdir()
    try:
        with (folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield folder
            (folder / ".lock").unlink()
            _take_the_name(folder, output)
    except ProofFailed:
        bad = output.with_name(f"{output.name}.bad")
        shutil.rmtree(bad, ignore_errors=True)
        (folder / ".lock").unlink()
        folder.rename(bad)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _delete_unless_alive(debris: Path) -> None:
    """Delete an unfinished folder unless the process that writes it still holds its lock."""
    try:
        with (debris / ".lock").open("w") as file:
            if lock(file):
                shutil.rmtree(debris)
    except FileNotFoundError:  # killed before it had its lock, or a moment before the rename
        shutil.rmtree(debris, ignore_errors=True)


def _take_the_name(folder: Path, output: Path) -> None:
    sync_folder(folder)
    if not output.exists():
        folder.rename(output)
    elif _exchange(folder, output):
        shutil.rmtree(folder)
    else:
        former = output.with_name(f"{output.name}.unfinished-{uuid.uuid4().hex[:12]}")
        output.rename(former)
        folder.rename(output)
        shutil.rmtree(former)
    sync_folder(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders swap their names in one step; False where the system cannot: Linux can, on most disks."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at_working_directory, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of rename(2)
    if rename is None:
        return False
    return rename(at_working_directory, os.fsencode(one), at_working_directory, os.fsencode(other), swap) == 0


# mallopt's parameters in glibc: memory is given back above this size; pieces above this size are mapped by themselves;
# one heap for all threads.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Let one tensor be read into the memory of the last: fresh pages cost more than reading into them does.

    For the whole process, before it has threads. Without glibc nothing changes.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Give back what `keep_freed_memory` has kept, and from now on all that is freed, at once."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        library.mallopt(M_TRIM_THRESHOLD, 1 << 20)
        library.malloc_trim(0)


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise InputError unless the disk has room for the planned files."""
    needed, free = num_bytes + SMALL_FILES_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder.parent}: the conversion needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                         f"make room or choose another disk")  # fmt: skip


def plan_entries(tensors: Mapping[str, Lazy], dtype: str) -> Entries:
    """Return the shape and dtype of every tensor to write; `dtype` is `keep` or one of float32, float16, bfloat16."""
    wanted = NUMPY_NAMES.get(dtype)
    return {name: (tensor.shape, wanted or tensor.dtype) for name, tensor in tensors.items()}


def num_bytes(entries: Entries) -> int:
    return sum(tensor_bytes(shape, dtype) for shape, dtype in entries.values())


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the array in `dtype`, rounded to nearest even; raises InputError where a finite value becomes infinite."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype.itemsize < array.dtype.itemsize or dtype == np.float16:
        lost = np.isinf(result) & ~np.isinf(array)
        if lost.any():
            raise InputError(f"{name}: {dtype.name} cannot hold {float(array[lost].flat[0]):g}; use --dtype bfloat16 "
                             f"or float32")  # fmt: skip
    return result


def copy(tensors: Mapping[str, Lazy], entries: Entries, sink: Sink, title: str) -> Written:
    """Hand every tensor to the sink, in order and in the planned dtype.

    While one is written its hash is taken and the next one is read: all three run outside the interpreter's lock.
    """
    start = time.monotonic()
    hashes: dict[str, str] = {}
    names = list(entries)

    def load(name: str) -> np.ndarray:
        return cast(name, tensors[name].read(), entries[name][1])

    with progress_bar(title, num_bytes(entries)) as advance, ThreadPoolExecutor(2) as pool:
        following = pool.submit(load, names[0])
        for number, name in enumerate(names, 1):
            array = following.result()
            if number < len(names):
                following = pool.submit(load, names[number])
            is_cast = array.dtype != tensors[name].dtype
            known = None if is_cast else tensors[name].sha256
            digest = pool.submit(lambda array=array, known=known: known or tensor_sha256(array))
            sink.append(name, array)
            hashes[name] = digest.result()
            advance(array.nbytes)
        sink.finish(hashes)
    return Written(hashes, num_bytes(entries), time.monotonic() - start)


def differences(tensors: Mapping[str, Lazy], hashes: Mapping[str, str]) -> list[str]:
    """Read every tensor back; return the names of those that are absent or whose SHA-256 is not the expected one."""
    with progress_bar("proving", sum(tensor.nbytes for tensor in tensors.values())) as advance:

        def is_same(name: str) -> bool:
            tensor = tensors[name]
            try:
                array = tensor.read()
            except InputError:  # the file is not what its own hashes say
                return False
            advance(tensor.nbytes)
            return (tensor.sha256 or tensor_sha256(array)) == hashes[name]

        with ThreadPoolExecutor(2) as pool:
            same = dict(zip(tensors, pool.map(is_same, tensors), strict=True))
    return [name for name in hashes if not same.get(name, False)]


@contextlib.contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Any]:
    """Show a bar with MB/s and the time left where somebody watches; yields the function that moves it by bytes."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda count: bar.advance(task, count)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    write_atomically(folder / REPORT, [json.dumps(report, ensure_ascii=False, indent=1).encode() + b"\n"])

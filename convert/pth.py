"""PyTorch's checkpoint container (consolidated.NN.pth, pytorch_model*.bin), read and written without PyTorch.

A zip archive whose members are stored uncompressed, all in one folder:

    <folder>/data.pkl      a pickled dict; where a tensor's numbers belong it names a storage
    <folder>/byteorder     "little"; absent in old files
    <folder>/data/<key>    the bytes of one storage; several tensors may be views of it
    <folder>/version

Files are read by offset, not mapped: mapped pages count as memory of the process.

The format is that of torch/serialization.py, `_save` and `_load`, and of the zip specification, APPNOTE.TXT §4.3.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert import state_pickle
from convert.disk_file import DiskFile
from convert.state_pickle import DTYPES, WEIGHT_DTYPES, Tensor, shown
from panda_jax.errors import InputError
from panda_jax.weights import Lazy, read_fully

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
# A model has some thousand tensors of about 150 bytes each in data.pkl; more than this is no state dict.
MAX_PICKLE_BYTES = 64 << 20
# Small enough that the checksum finds the bytes still in the processor's cache.
CHUNK_BYTES = 4 << 20
# The alignment that PyTorch gives to storages, so that it can map them.
ALIGNMENT = 64
# From these on a zip archive says a size or offset, and the number of its members, in 64 bits.
ZIP64_LIMIT = ZIP64_MARK = 0xFFFFFFFF
ZIP64_MEMBERS = 0xFFFF
FETCH_AGAIN = "fetch it again"


@dataclass(frozen=True)
class _Record:
    """A member of the archive: where its bytes begin in the file, and how many they are."""

    start: int
    size: int
    crc: int
    """CRC-32 of the bytes; 0 where PyTorch was told not to compute it."""


# ---- reading: the archive -------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Lazy]:
    """Return the tensors of a PyTorch checkpoint by name; only its directory and its data.pkl are read now.

    The file holds one dict, or OrderedDict, of names and tensors; any other value in it is refused, as its meaning is
    unknown. A tensor's `read` returns it contiguous whatever its strides, and reads no more than the span that it
    covers in its storage; where that is the whole storage, the CRC-32 of the archive is checked. It takes float32,
    float16 and bfloat16: tensors of other dtypes are listed but refused when read.

    Raises InputError, also from `Lazy.read`, for a file that is missing, truncated, damaged, compressed, big-endian, in
    the format before PyTorch 1.6, no checkpoint, or whose pickle needs more than a state dict does.
    """
    try:
        with path.open("rb") as file:
            members = _members(file, path)
            folder = next(iter(members)).partition("/")[0]
            _check_byte_order(file, members, folder, path)
            tensors = {}
            described = state_pickle.unpickle(_content(file, members, f"{folder}/data.pkl", path), path)
            for name, tensor in described.items():
                record = _record(file, members, f"{folder}/data/{tensor.storage.key}", path)
                tensors[name] = _lazy(name, tensor, record, path)
            return tensors
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; is a file of the model missing?") from error


def _members(file: BinaryIO, path: Path) -> dict[str, zipfile.ZipInfo]:
    beginning = file.read(64)
    if not beginning:
        raise InputError(f"{path}: the file is empty; {FETCH_AGAIN}")
    if LEGACY_MAGIC in beginning:
        raise InputError(f"{path}: in the format from before PyTorch 1.6; with a newer PyTorch, load it with "
                         "weights_only=True and save it again")  # fmt: skip
    if beginning.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer in place of the file; run git lfs pull")
    if not beginning.startswith(b"PK"):
        raise InputError(f"{path}: not a PyTorch checkpoint, which is a zip archive; check what was fetched")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, IndexError, OverflowError, MemoryError,
            struct.error) as error:  # fmt: skip
        # The directory of a zip archive lies at its end.
        raise InputError(f"{path}: the directory of the archive is missing or damaged, so the file is probably "
                         f"truncated; {FETCH_AGAIN}") from error  # fmt: skip
    members = {entry.filename: entry for entry in entries}
    if not members or len(members) != len(entries):
        raise InputError(f"{path}: the archive has {len(entries)} members of {len(members)} names; {FETCH_AGAIN}")
    return members


def _record(file: BinaryIO, members: Mapping[str, zipfile.ZipInfo], name: str, path: Path) -> _Record:
    entry = members.get(name)
    if entry is None:
        raise InputError(f"{path}: has no member {shown(name)}; not a whole PyTorch checkpoint: {FETCH_AGAIN}")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise InputError(f"{path}: {shown(name)} is compressed or encrypted, expected stored as it is; load the file "
                         "with PyTorch and save it again")  # fmt: skip
    size = file.seek(0, os.SEEK_END)
    encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
    member, header = entry.orig_filename.encode(encoding), b""
    if 0 <= entry.header_offset <= size:
        file.seek(entry.header_offset)
        header = file.read(30 + len(member))
    if len(header) != 30 + len(member) or header[:4] != b"PK\3\4" or header[30:] != member:
        raise InputError(f"{path}: {shown(name)} does not begin at byte {entry.header_offset}, as the directory says; "
                         f"{FETCH_AGAIN}")  # fmt: skip
    # The lengths stand here again, and differ from the directory's: PyTorch pads the extra field to align the data.
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + entry.file_size > size:
        raise InputError(f"{path}: {shown(name)} ends at byte {start + entry.file_size} of {size}; {FETCH_AGAIN}")
    return _Record(start, entry.file_size, entry.CRC)


def _content(file: BinaryIO, members: Mapping[str, zipfile.ZipInfo], name: str, path: Path) -> bytes:
    record = _record(file, members, name, path)
    if record.size > MAX_PICKLE_BYTES:
        raise InputError(f"{path}: {shown(name)} has {record.size} bytes, expected at most {MAX_PICKLE_BYTES}; "
                         "is it a state dict?")  # fmt: skip
    array = np.empty(record.size, np.uint8)
    file.seek(record.start)
    read_fully(file, array, path)
    if record.crc not in (0, zlib.crc32(array.data)):
        raise InputError(f"{path}: {shown(name)} is damaged (CRC-32 differs); {FETCH_AGAIN}")
    return array.tobytes()


def _check_byte_order(file: BinaryIO, members: Mapping[str, zipfile.ZipInfo], folder: str, path: Path) -> None:
    name = f"{folder}/byteorder"
    if name in members and (order := _content(file, members, name, path)) != b"little":
        raise InputError(f"{path}: byte order {shown(order.decode('ascii', 'replace'))}, expected 'little'; load the "
                         "file with PyTorch on an ordinary machine and save it again")  # fmt: skip


# ---- reading: a tensor ----------------------------------------------------------------------------------------------


def _lazy(name: str, tensor: Tensor, record: _Record, path: Path) -> Lazy:
    dtype, shape, strides, first = DTYPES[tensor.dtype], tensor.shape, tensor.strides, tensor.offset
    where = f"{path}: {shown(name)}"
    if not all(type(number) is int and number >= 0 for number in (first, *shape, *strides)) or not (
        len(shape) == len(strides) <= 16
    ):
        raise InputError(f"{where} has an impossible shape; {FETCH_AGAIN}")
    storage_bytes = tensor.storage.num_elements * DTYPES[tensor.storage.dtype].itemsize
    count = math.prod(shape)
    # One past the last element; an empty tensor covers nothing, wherever it is said to begin.
    first = first if count else 0
    end = first + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if count else 0
    if end * dtype.itemsize > storage_bytes or storage_bytes > record.size:
        raise InputError(f"{where} needs {end * dtype.itemsize} bytes of a storage of {storage_bytes}, of which the "
                         f"archive has {record.size}; {FETCH_AGAIN}")  # fmt: skip
    if count * dtype.itemsize > storage_bytes or tensor.is_lazily_changed:
        raise InputError(f"{where} is expanded, negated or conjugated without a copy; save it again after "
                         ".resolve_conj().resolve_neg().contiguous()")  # fmt: skip

    def read() -> np.ndarray:
        if tensor.dtype not in WEIGHT_DTYPES:
            raise InputError(f"{where} is {tensor.dtype}, expected {', '.join(WEIGHT_DTYPES)}; is it a weight? If so, "
                             "convert it to one of these and save the file again")  # fmt: skip
        flat = np.empty(end - first, dtype)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(record.start + first * dtype.itemsize)
                crc = _read_and_sum(file, flat, path)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; it could be opened before") from error
        if flat.nbytes == record.size and record.crc not in (0, crc):
            raise InputError(f"{where} is damaged (CRC-32 differs); {FETCH_AGAIN}")
        strided = np.lib.stride_tricks.as_strided(flat, shape, [stride * dtype.itemsize for stride in strides])
        return strided.copy() if not strided.flags.c_contiguous else flat.reshape(shape)

    return Lazy(shape, dtype, read)


def _read_and_sum(file: Any, array: np.ndarray, path: Path) -> int:
    """Fill a contiguous array from a file and return the CRC-32 of its bytes."""
    content, crc = array.view(np.uint8), 0
    for start in range(0, len(content), CHUNK_BYTES):
        chunk = content[start : start + CHUNK_BYTES]
        read_fully(file, chunk, path)
        crc = zlib.crc32(chunk.data, crc)
    return crc


# ---- writing --------------------------------------------------------------------------------------------------------


class Writer:
    """A dict of tensors for `torch.load`, with weights_only and mmap if wished, written one tensor after the other.

    Each tensor has a storage of its own, aligned to 64 bytes. The same tensors give the same bytes. Until `close` has
    returned the file has no directory, so that nobody can load it.
    """

    def __init__(self, path: Path, entries: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        """Create `path`; `entries` gives every name with its shape and dtype: float32, float16 or bfloat16.

        Raises ValueError for another dtype, and OSError, as where `path` exists.
        """
        pickled = state_pickle.pickle(entries)
        self._announced = list(entries.items())
        self._count = 0
        self._directory: list[bytes] = []
        self._file = DiskFile(path)
        self._add("data.pkl", memoryview(pickled))
        self._add("byteorder", memoryview(b"little"))

    def append(self, array: np.ndarray) -> None:
        """Write the next tensor of the entries; raises ValueError where it is not the announced one, and OSError."""
        if self._count == len(self._announced):
            raise ValueError(f"more tensors than the {self._count} that were announced")
        name, (shape, dtype) = self._announced[self._count]
        if array.shape != tuple(shape) or array.dtype != dtype:
            raise ValueError(f"{name}: {array.dtype} {array.shape}, but {dtype} {tuple(shape)} was announced")
        self._add(f"data/{self._count}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._count += 1

    def close(self) -> None:
        """Complete the file and bring it to the disk; raises ValueError where tensors are missing, and OSError."""
        if self._count != len(self._announced):
            raise ValueError(f"{self._announced[self._count][0]}: announced but not written")
        self._add("version", memoryview(b"3\n"))
        self._file.write(self._end())
        self._file.close()

    def _add(self, name: str, data: memoryview) -> None:
        """Write one stored member: its header, padded so that the data are aligned, and the data."""
        member, size, crc, offset = f"archive/{name}".encode(), len(data), zlib.crc32(data), self._file.tell()
        extra, short_size, short_offset = b"", size, offset
        if size >= ZIP64_LIMIT:
            extra, short_size = struct.pack("<QQ", size, size), ZIP64_MARK
        local_extra = _zip64_field(extra)
        # Padding is an extra field of the kind that PyTorch uses too; its own header takes 4 bytes.
        padding = -(offset + 30 + len(member) + len(local_extra) + 4) % ALIGNMENT
        local_extra += struct.pack("<2sH", b"FB", padding) + bytes(padding)
        # Version 4.5 for 64-bit sizes, no flags, stored, midnight of 1 January 1980.
        common = struct.pack("<HHHHHIII", 45, 0, 0, 0, 0x21, crc, short_size, short_size)
        self._file.write(b"PK\3\4" + common + struct.pack("<HH", len(member), len(local_extra)) + member + local_extra)
        self._file.write(data)
        if offset >= ZIP64_LIMIT:
            extra, short_offset = extra + struct.pack("<Q", offset), ZIP64_MARK
        extra = _zip64_field(extra)
        lengths = struct.pack("<HHHHHII", len(member), len(extra), 0, 0, 0, 0, short_offset)
        self._directory.append(b"PK\1\2" + struct.pack("<H", 45) + common + lengths + member + extra)

    def _end(self) -> bytes:
        """Return the directory, which ends the archive."""
        entries, count, start = b"".join(self._directory), len(self._directory), self._file.tell()
        size, long_end = len(entries), b""
        if count >= ZIP64_MEMBERS or max(start, size) >= ZIP64_LIMIT:
            record = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
            long_end = b"PK\6\6" + record + b"PK\6\7" + struct.pack("<IQI", 0, start + size, 1)
            count, size, start = 0xFFFF, ZIP64_MARK, ZIP64_MARK
        return entries + long_end + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, size, start, 0)


def _zip64_field(content: bytes) -> bytes:
    return struct.pack("<HH", 1, len(content)) + content if content else b""

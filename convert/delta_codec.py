"""Our lossless weight delta, one tensor at a time, and the hash of a set of tensors. No file is touched here.

It works on bit patterns, so it is exact for every value, NaN payloads and -0 included. Per tensor:

    same   the base, cast to the target's dtype, is the target; no payload
    diff   differences from the base
    rows   another number of rows: differences for the rows that both have, the target's other rows coded as below
    copy   no base, or another shape: differences from +0, which leaves the exponents in bytes of their own

A difference is taken between integers in the order of the floats: s(u) = u for a positive pattern u, u ^ 0x7FFF for a
negative one (0x7FFFFFFF with 32 bits). s(target) - s(base), modulo 2^16 or 2^32, becomes 2d for d >= 0 and -2d - 1 for
d < 0, so that small changes of either sign are small numbers. A payload is a sequence of chunks of CHUNK_ELEMENTS
elements, the last of a run shorter; all numbers are little-endian uint32:

    number of elements; per byte of the dtype, lowest first, the stored length of that plane;
    CRC-32 of the fields before it and of the planes; the planes, each a zstd frame

zstd rather than zlib because decoding must keep up with the disk: it restores the planes of a usual update some five
times as fast as zlib's Huffman coding does, from as many bytes. With a small hash table and long matches zstd hardly
looks for repetitions, which noise has not, and codes bytes by their frequency: smaller, and faster to make, than its
level 1.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import ml_dtypes
import numpy as np
import zstandard

from panda_jax.errors import InputError
from panda_jax.weights import DTYPE_NAMES, DTYPES

FLOAT32, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)

CHUNK_ELEMENTS = 1 << 18  # half a MiB of 16 bits: smaller ones make two threads wait for the interpreter's lock
FORMAT = {
    "name": "panda_jax lossless delta",
    "version": 1,
    "cast": "through float32, half to even, any NaN to the positive quiet one",
    "difference": "ordered integers, zigzag",
    "planes": "lowest byte first",
    "chunk_elements": CHUNK_ELEMENTS,
    "compression": "zstd",
    "checksum": "crc32",
}
"""What a decoder must know; stored with a delta and compared by `check_format`."""

_ZSTD = zstandard.ZstdCompressionParameters(
    window_log=18, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0, strategy=zstandard.STRATEGY_FAST
)
Job = TypeVar("Job")
Result = TypeVar("Result")


# ---- casts ----------------------------------------------------------------------------------------------------------


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return float32, float16 or bfloat16 values in another of these dtypes, rounded half to even.

    Nothing changes where the dtype stays, NaN payloads included. Otherwise every NaN becomes the positive quiet one
    (0x7FC0 in bfloat16, 0x7E00 in float16, 0x7FC00000 in float32): processors and libraries differ in what they make of
    a NaN, and a base must look the same to everyone. Raises InputError for another dtype.
    """
    for each in (array.dtype, dtype):
        if each not in DTYPE_NAMES:
            raise InputError(f"dtype {each}, expected one of {', '.join(map(str, DTYPE_NAMES))}; convert the tensor")
    if array.dtype == dtype:
        return array
    if array.dtype == FLOAT32:
        return _narrow(array, dtype)
    return _cast_table(array.dtype, dtype).take(array.view(np.uint16), mode="wrap").view(dtype)


@functools.cache
def _cast_table(source: np.dtype, dtype: np.dtype) -> np.ndarray:
    """Return the bit pattern in `dtype` of each of the 65,536 patterns of a 16-bit dtype."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    if source == BFLOAT16:
        wide = (patterns.astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(invalid="ignore"):
            wide = patterns.view(np.float16).astype(np.float32)
    bits = wide.view(np.uint32)
    bits[np.isnan(wide)] = 0x7FC00000
    return bits if dtype == FLOAT32 else _narrow(wide, dtype).view(np.uint16)


def _narrow(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == BFLOAT16:
        bits = array.view(np.uint32)
        # Half of the last kept bit, less one, plus that bit: a tie goes to the even pattern.
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        quiet = 0x7FC0
    else:
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            rounded = array.astype(np.float16).view(np.uint16)
        quiet = 0x7E00
    nan = np.isnan(array)
    return (np.where(nan, np.uint16(quiet), rounded) if nan.any() else rounded).view(dtype)


def parts(size: int) -> Iterator[slice]:
    """Yield the chunks of `size` elements."""
    for start in range(0, size, CHUNK_ELEMENTS):
        yield slice(start, min(start + CHUNK_ELEMENTS, size))


def flat(array: np.ndarray) -> np.ndarray:
    """Return an array as one axis; it is copied only where it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1)


# ---- lossless form --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coded:
    """What is stored about a coded tensor beside its payload."""

    op: str
    shape: tuple[int, ...]
    dtype: np.dtype
    num_bytes: int
    """Length of the payload."""


def check_format(found: Mapping[str, object], label: str) -> None:
    """Raise InputError, beginning with `label`, unless `found` is the FORMAT that this module decodes."""
    for key in [*FORMAT, *found]:
        if key not in found or key not in FORMAT or found[key] != FORMAT[key]:
            raise InputError(f"{label}: delta format has {key} {found.get(key)!r}, this program reads "
                             f"{FORMAT.get(key)!r}; use the panda_jax that wrote it, or a newer one")  # fmt: skip


def encode(base: np.ndarray | None, target: np.ndarray, num_threads: int) -> tuple[str, Iterator[bytes]]:
    """Return the op for a tensor and its payload, chunk by chunk; what memory it needs is that of some chunks."""
    op = choose_op(base, target)
    runs = _runs(op, base, target.shape)
    target_flat = flat(target)
    starts = itertools.accumulate((size for _, size in runs), initial=0)
    chunks = (
        encode_chunks(old, target_flat[start : start + size], num_threads)
        for start, (old, size) in zip(starts, runs, strict=False)
    )
    return op, iter(()) if op == "same" else itertools.chain.from_iterable(chunks)


def choose_op(base: np.ndarray | None, target: np.ndarray) -> str:
    """Return same, diff, rows or copy, as the module's docstring explains them."""
    cast(flat(target)[:0], target.dtype)  # refuses a dtype that is not one of ours
    if base is None or base.ndim != target.ndim:
        return "copy"
    if base.shape != target.shape:
        return "rows" if base.ndim > 1 and base.shape[1:] == target.shape[1:] else "copy"
    old, new = flat(base), flat(target)
    is_same = all(np.array_equal(_bits(cast(old[part], target.dtype)), _bits(new[part])) for part in parts(target.size))
    return "same" if is_same else "diff"


def encode_chunks(base: np.ndarray | None, target: np.ndarray, num_threads: int) -> Iterator[bytes]:
    """Yield the chunks of a target against a base of the same number of elements, or against +0."""
    new = flat(target)
    old = None if base is None else flat(base)
    assert old is None or old.size == new.size
    jobs = ((None if old is None else old[part], new[part]) for part in parts(new.size))
    return in_order(lambda job: _encode_chunk(*job), jobs, num_threads)


def decode(label: str, coded: Coded, base: np.ndarray | None, source: BinaryIO, num_threads: int) -> np.ndarray:
    """Return the target whole; see `decode_chunks`."""
    target, end = np.empty(coded.shape, coded.dtype), 0
    for chunk in decode_chunks(label, coded, base, source, num_threads):
        target.reshape(-1)[end : end + chunk.size] = chunk
        end += chunk.size
    return target


def decode_chunks(
    label: str, coded: Coded, base: np.ndarray | None, source: BinaryIO, num_threads: int
) -> Iterator[np.ndarray]:
    """Yield the target's elements in order, as arrays of one axis in its dtype; `source` stands at the payload's start.

    The base must be the one of `encode`: that it is, only the caller's hashes can tell. Raises InputError, beginning
    with `label` and naming the chunk, where the payload is damaged, too short or too long, and where the base has a
    shape that contradicts the op.
    """
    expected = () if base is None else base.shape
    fits = {"same": expected == coded.shape, "diff": expected == coded.shape, "copy": True,
            "rows": len(expected) > 1 and expected[1:] == coded.shape[1:]}  # fmt: skip
    if not fits.get(coded.op, False) or (base is None and coded.op != "copy"):
        raise InputError(f"{label}: {coded.op!r} to shape {coded.shape}, but the base is {expected or 'absent'}; "
                         f"take the base that the delta was made from")  # fmt: skip
    runs = _runs(coded.op, base, coded.shape)
    if coded.op == "same":
        assert base is not None
        if coded.num_bytes:
            raise InputError(f"{label}: {coded.num_bytes} bytes for an unchanged tensor, expected 0; fetch it again")
        old = flat(base)
        return (cast(old[part], coded.dtype) for part in parts(old.size))
    jobs = _read_chunks(label, coded, runs, source)
    return in_order(lambda job: _decode_chunk(coded.dtype, *job), jobs, num_threads)


def _runs(op: str, base: np.ndarray | None, shape: tuple[int, ...]) -> list[tuple[np.ndarray | None, int]]:
    """Return runs of elements that are coded one after the other: the flat base, or None, and their number."""
    size = int(np.prod(shape, dtype=np.int64))
    if op == "copy" or base is None:
        return [(None, size)]
    common = flat(base[: shape[0]] if op == "rows" else base)
    return [(common, common.size), (None, size - common.size)]


def _read_chunks(
    label: str, coded: Coded, runs: list[tuple[np.ndarray | None, int]], source: BinaryIO
) -> Iterator[tuple[str, np.ndarray | None, int, list[int], bytes]]:
    plan = [
        (None if base is None else base[part], part.stop - part.start) for base, size in runs for part in parts(size)
    ]
    head_bytes, left = 4 * (coded.dtype.itemsize + 2), coded.num_bytes
    for number, (old, count) in enumerate(plan, 1):
        place = f"{label}: chunk {number} of {len(plan)}"
        head = source.read(min(head_bytes, left))
        body = b""
        if len(head) == head_bytes:
            found, *lengths, checksum = struct.unpack(f"<{head_bytes // 4}I", head)
            # No plane grows by more than zstd's small overhead: a larger number is damage, not a reason to read.
            if found != count or max(lengths) > count + count // 128 + 64:
                raise InputError(f"{place} is damaged (its lengths are wrong); fetch the delta again")
            body = source.read(min(sum(lengths), left - head_bytes))
        if len(head) < head_bytes or len(body) < sum(lengths):
            raise InputError(f"{place} is cut off; fetch the delta again")
        # Checked here, in order: after a wrong length the next chunk is rubbish, and would be blamed in its stead.
        if _checksum(head[:-4], [body]) != checksum:
            raise InputError(f"{place} is damaged (CRC-32 differs); fetch the delta again")
        left -= head_bytes + len(body)
        yield place, old, count, lengths, body
    if left:
        raise InputError(f"{label}: {left} bytes after chunk {len(plan)}, the last; fetch the delta again")


def _encode_chunk(old: np.ndarray | None, new: np.ndarray) -> bytes:
    wide = _ordered(_bits(new))
    if old is not None:
        wide -= _ordered(_bits(cast(old, new.dtype)))
    sign = _sign_mask(wide)
    wide <<= 1
    wide ^= sign
    compressor = zstandard.ZstdCompressor(compression_params=_ZSTD)
    planes = [compressor.compress((wide >> 8 * i).astype(np.uint8).data) for i in range(new.dtype.itemsize)]
    head = struct.pack(f"<{len(planes) + 1}I", new.size, *map(len, planes))
    return b"".join([head, struct.pack("<I", _checksum(head, planes)), *planes])


def _decode_chunk(
    dtype: np.dtype, place: str, old: np.ndarray | None, count: int, lengths: list[int], body: bytes
) -> np.ndarray:
    wide = np.zeros(count, f"u{dtype.itemsize}")
    end = len(body)
    for length in reversed(lengths):
        wide <<= 8
        wide |= _plane(body[end - length : end], count, place)
        end -= length
    sign = wide & 1
    np.negative(sign, out=sign)
    wide >>= 1
    wide ^= sign
    if old is not None:
        wide += _ordered(_bits(cast(old, dtype)))
    return _ordered(wide).view(dtype)


def _plane(frame: bytes, count: int, place: str) -> np.ndarray:
    try:
        if zstandard.frame_content_size(frame) == count:  # asked first: a forged size must not claim the memory
            return np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8, count)
    except (zstandard.ZstdError, ValueError):
        pass
    raise InputError(f"{place} does not hold {count} elements; make the delta again")


def _checksum(head: bytes, planes: Iterable[bytes]) -> int:
    return functools.reduce(lambda crc, plane: zlib.crc32(plane, crc), planes, zlib.crc32(head))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def _sign_mask(bits: np.ndarray) -> np.ndarray:
    """Return all ones where the highest bit is set, else 0."""
    return (bits.view(f"i{bits.itemsize}") >> (8 * bits.itemsize - 1)).view(bits.dtype)


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Return the patterns of floats as integers in the floats' order; it is its own inverse. Always a new array."""
    mask = _sign_mask(bits)
    mask >>= 1
    mask ^= bits
    return mask


def in_order(function: Callable[[Job], Result], jobs: Iterable[Job], num_threads: int) -> Iterator[Result]:
    """Yield function(job) in the order of the jobs, a few of them ahead of the reader."""
    if num_threads == 1:
        yield from map(function, jobs)
        return
    pool, pending = ThreadPoolExecutor(num_threads), deque[Future[Result]]()
    try:
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- fingerprint ----------------------------------------------------------------------------------------------------


def root_hash(entries: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Return one SHA-256, in hex, for a set of tensors: (name, dtype as F32, F16 or BF16, shape, SHA-256 in hex) each.

    The order of the entries does not matter, and neither do files and shards. The bytes that are hashed: the line
    "panda_jax tensors 1\\n"; then per tensor, sorted by the name's UTF-8 bytes: length of the name (uint32),
    the name, length of the dtype (uint32), the dtype, number of axes (uint32), each axis (uint64), 32 bytes of SHA-256.
    All numbers are little-endian.

    Raises InputError for a name that comes twice, an unknown dtype or a malformed SHA-256.
    """
    total, seen = hashlib.sha256(b"panda_jax tensors 1\n"), set[str]()
    for name, dtype, shape, digest in sorted(entries, key=lambda entry: entry[0].encode()):
        if name in seen:
            raise InputError(f"{name}: two tensors of this name; remove one")
        if dtype not in DTYPES:
            raise InputError(f"{name}: dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        try:
            raw = bytes.fromhex(digest)
        except ValueError:
            raw = b""
        if len(raw) != 32:
            raise InputError(f"{name}: SHA-256 {digest!r}, expected 64 hexadecimal digits")
        seen.add(name)
        for text in (name.encode(), dtype.encode()):
            total.update(struct.pack("<I", len(text)) + text)
        total.update(struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + raw)
    return total.hexdigest()

"""The lossless delta against every bit pattern and every damage; casts against torch; hashes by hand."""

import hashlib
import io
import json
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
from float_arrays import BF16, BITS, F16, F32, TORCH, from_torch, normal, random_patterns, to_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import delta_codec
from convert.delta_codec import Coded, cast, check_format, choose_op, decode, decode_chunks, encode, root_hash
from panda_jax.errors import InputError
from panda_jax.weights import tensor_sha256

QUIET_NAN = {F32: 0x7FC00000, F16: 0x7E00, BF16: 0x7FC0}
PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def round_trip(base: np.ndarray | None, target: np.ndarray, num_threads: int = 1) -> tuple[str, bytes]:
    """Encode, decode, compare bit by bit; return the op and the payload."""
    op, chunks = encode(base, target, num_threads)
    payload = b"".join(chunks)
    coded = Coded(op, target.shape, target.dtype, len(payload))
    found = decode("t", coded, base, io.BytesIO(payload), num_threads)
    assert found.dtype == target.dtype and found.shape == target.shape
    assert found.tobytes() == target.tobytes()
    return op, payload


# ---- casts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (PATTERNS.view(F16), BF16),
        (PATTERNS.view(F16), F32),
        (PATTERNS.view(BF16), F16),
        (PATTERNS.view(BF16), F32),
        (random_patterns(0, 1_000_000, F32), BF16),
        (random_patterns(1, 1_000_000, F32), F16),
        # Random patterns are hardly ever ties: every bfloat16 and float16 value, half a last place further.
        (((PATTERNS.astype(np.uint32) << 16) | 0x8000).view(F32), BF16),
        (np.arange(0x38001000, 0x47800000, 0x2000).astype(np.uint32).view(F32), F16),
    ],
    ids=str,
)
def test_casts_round_as_torch_does_and_make_one_nan(values: np.ndarray, dtype: np.dtype):
    found = cast(values, dtype)
    expected = from_torch(to_torch(values).float().to(TORCH[dtype]), dtype)
    nan = np.isnan(values.astype(np.float32))
    np.testing.assert_array_equal(found.view(BITS[dtype])[~nan], expected.view(BITS[dtype])[~nan])
    assert (found.view(BITS[dtype])[nan] == QUIET_NAN[dtype]).all()


def test_a_cast_to_the_same_dtype_keeps_every_bit_and_other_dtypes_are_refused():
    for dtype in (F16, BF16):
        np.testing.assert_array_equal(cast(PATTERNS.view(dtype), dtype).view(np.uint16), PATTERNS)
    for array, dtype in [(np.zeros(2, np.int64), F32), (np.zeros(2, F32), np.dtype(np.float64))]:
        with pytest.raises(InputError, match="dtype (int64|float64), expected one of float32, float16, bfloat16"):
            cast(array, dtype)


# ---- lossless form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "target"), [(F16, BF16), (BF16, BF16), (F16, F16), (BF16, F16)], ids=str)
def test_every_16_bit_pattern_comes_back_from_every_kind_of_base(base: np.dtype, target: np.dtype):
    rng = np.random.default_rng(0)
    old = np.concatenate([rng.permutation(PATTERNS) for _ in range(8)]).view(base)
    assert round_trip(old, np.tile(PATTERNS, 8).view(target))[0] == "diff"
    assert round_trip(None, PATTERNS.view(target))[0] == "copy"


@pytest.mark.parametrize(("base", "target"), [(F32, F32), (F32, BF16), (F32, F16), (F16, F32), (BF16, F32)], ids=str)
def test_random_32_bit_patterns_come_back(base: np.dtype, target: np.dtype):
    special = [0, 1 << 31, 1, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x007FFFFF]
    special = np.repeat(np.array(special, np.uint32), 8)  # each once against each
    old, new = random_patterns(4, 100_000, base), random_patterns(5, 100_000, target)
    if base == F32:
        old[:64] = special.view(F32)
    if target == F32:
        new[:64] = special.reshape(8, 8).T.reshape(-1).view(F32)
    assert round_trip(old, new)[0] == "diff"


@pytest.mark.parametrize(("sigma", "limit"), [(1e-5, 0.25), (1e-4, 0.5), (1e-3, 0.95)])
def test_bytes_per_parameter_of_a_fine_tuned_model(sigma: float, limit: float):
    """The bar is 0.6 at 1e-4; zlib at level 6 took 0.22, 0.54 and 0.92 of similar weights."""
    base = cast(normal(6, (1000, 1000)), F16)
    target = cast(base.astype(np.float32) + normal(7, (1000, 1000), sigma), BF16)
    _, payload = round_trip(base, target)
    assert len(payload) / target.size <= limit


def test_a_target_without_a_base_needs_three_quarters_of_its_bytes():
    _, payload = round_trip(None, cast(normal(8, (500, 500)), BF16))
    assert len(payload) / 250_000 < 1.5


def test_ops():
    base = cast(normal(9, (5, 4)), F16)
    assert round_trip(base, cast(base, BF16)) == ("same", b"")
    assert round_trip(base, base) == ("same", b"")
    changed = base.copy()
    changed[4, 3] = 1
    assert round_trip(base, changed)[0] == "diff"
    minus_zero = np.zeros(3, F16)
    minus_zero[1] = -0.0
    assert round_trip(np.zeros(3, F16), minus_zero)[0] == "diff"
    for rows in (0, 3, 7):
        assert round_trip(base, cast(normal(10, (rows, 4)), BF16))[0] == "rows"
    assert round_trip(np.zeros((0, 4), F16), base)[0] == "rows"
    for other in ((4, 5), (20,), (5, 4, 1), ()):
        assert round_trip(base, cast(normal(11, other), BF16))[0] == "copy"
    assert round_trip(np.zeros(3, F16), np.ones(4, F16))[0] == "copy"
    with pytest.raises(InputError, match="dtype int32"):
        choose_op(None, np.zeros(3, np.int32))


def test_rows_that_both_have_cost_nothing_where_they_agree():
    base = cast(normal(12, (4000, 50)), F16)
    grown = np.concatenate([cast(base, BF16), cast(normal(13, (1, 50)), BF16)])
    op, payload = round_trip(base, grown)
    assert op == "rows" and len(payload) < 500  # of 400,100: 4 chunks of two constant planes, and 50 weights


def test_the_stored_bytes_by_hand():
    """One chunk against float16 1, 1, 1, -2, 1, 0: in bfloat16 0x3F80, for -2 0xC000, and 0.

    Targets 0x3F80, 0x3F82, 0x3F7F, 0xC001 differ by 0, +2, -1 and, as more of a negative number is less, -1: that makes
    0, 4, 1, 1. 0x3E80 - 0x3F80 = -256 makes 511 = 0x01FF. From +0 the smallest negative number is two steps down, past
    -0: that makes 3.
    """
    base = np.array([1, 1, 1, -2, 1, 0], F16)
    target = np.array([0x3F80, 0x3F82, 0x3F7F, 0xC001, 0x3E80, 0x8001], np.uint16).view(BF16)
    op, payload = round_trip(base, target)
    count, low, high, crc = struct.unpack_from("<4I", payload)
    assert (op, count, len(payload)) == ("diff", 6, 16 + low + high)
    assert zstandard.ZstdDecompressor().decompress(payload[16 : 16 + low]) == bytes([0, 4, 1, 1, 0xFF, 3])
    assert zstandard.ZstdDecompressor().decompress(payload[16 + low :]) == bytes([0, 0, 0, 0, 1, 0])
    assert crc == zlib.crc32(payload[:12] + payload[16:])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_bits_and_shapes_come_back(data: st.DataObject):
    dtypes = st.sampled_from([F32, F16, BF16])
    base_dtype, dtype = data.draw(dtypes), data.draw(dtypes)
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
    other = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
    base_shape = data.draw(st.sampled_from([None, shape, (4, *shape[1:]), other]))
    seed, threads, chunk = data.draw(st.integers(0, 2**32)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 50))
    target = random_patterns(seed, int(np.prod(shape)), dtype).reshape(shape)
    base = None
    if base_shape is not None:
        base = random_patterns(seed + 1, int(np.prod(base_shape)), base_dtype).reshape(base_shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_codec, "CHUNK_ELEMENTS", chunk)
        round_trip(base, target, threads)


def test_arrays_that_are_not_contiguous_and_any_number_of_threads_give_the_same_bytes():
    base, target = cast(normal(14, (900, 1000)), F16), cast(normal(15, (900, 1000)), BF16)
    _, expected = round_trip(base, target)
    for threads in (2, 5):
        assert round_trip(base, target, threads)[1] == expected
    assert round_trip(np.asfortranarray(base), np.asfortranarray(target))[1] == expected


def test_only_a_few_chunks_are_in_memory():
    """16 MiB of target in 128 chunks: neither direction may hold more than some chunks' arrays."""
    chunk_bytes = 2 * delta_codec.CHUNK_ELEMENTS
    target = cast(normal(16, (8 << 20,), 1.0), BF16)
    base = target.copy()
    base[::3] = 0
    _, payload = encode(base, target, 2)
    payload = b"".join(payload)
    coded = Coded("diff", target.shape, target.dtype, len(payload))
    tracemalloc.start()
    try:
        for _ in encode(base, target, 2)[1]:
            pass
        encoding = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        for _ in decode_chunks("t", coded, base, io.BytesIO(payload), 2):
            pass
        decoding = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert encoding < 16 * chunk_bytes and decoding < 16 * chunk_bytes


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def damageable(monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, Coded, list[bytes]]:
    """A tensor in three chunks: the base, what is stored about it, the chunks."""
    monkeypatch.setattr(delta_codec, "CHUNK_ELEMENTS", 40)
    base = cast(normal(17, (100,)), F16)
    target = cast(base.astype(np.float32) + normal(18, (100,), 1e-3), BF16)
    op, chunks = encode(base, target, 1)
    stored = list(chunks)
    assert len(stored) == 3
    return base, Coded(op, target.shape, target.dtype, sum(map(len, stored))), stored


@pytest.mark.parametrize("num_threads", [1, 2])
def test_every_flipped_bit_is_refused_and_its_chunk_is_named(damageable, num_threads: int):
    base, coded, chunks = damageable
    payload, rng = b"".join(chunks), random.Random(0)
    ends = np.cumsum([len(chunk) for chunk in chunks])
    for position in range(len(payload)):
        damaged = bytearray(payload)
        damaged[position] ^= 1 << rng.randrange(8)
        number = int(np.searchsorted(ends, position, side="right")) + 1
        with pytest.raises(InputError, match=f"^x.delta: wq: chunk {number} of 3 is (damaged|cut off)"):
            # Chunk by chunk: what follows a wrong length is read as rubbish, and must not be blamed first.
            for _ in decode_chunks("x.delta: wq", coded, base, io.BytesIO(bytes(damaged)), num_threads):
                pass


def test_every_truncation_and_every_excess_is_refused(damageable):
    base, coded, chunks = damageable
    payload = b"".join(chunks)
    ends = np.cumsum([len(chunk) for chunk in chunks])
    for length in range(len(payload)):
        number = int(np.searchsorted(ends, length, side="right")) + 1
        with pytest.raises(InputError, match=f"^wq: chunk {number} of 3 is cut off"):
            decode("wq", coded, base, io.BytesIO(payload[:length]), 1)
        short = Coded(coded.op, coded.shape, coded.dtype, length)  # the record says so, though the file goes on
        with pytest.raises(InputError, match=f"^wq: chunk {number} of 3 is cut off"):
            decode("wq", short, base, io.BytesIO(payload), 1)
    longer = Coded(coded.op, coded.shape, coded.dtype, len(payload) + 3)
    with pytest.raises(InputError, match="^wq: 3 bytes after chunk 3, the last"):
        decode("wq", longer, base, io.BytesIO(payload + b"abc"), 1)
    with pytest.raises(InputError, match="^wq: 5 bytes for an unchanged tensor"):
        decode("wq", Coded("same", (100,), BF16, 5), base, io.BytesIO(b"abcde"), 1)


@pytest.mark.parametrize(
    ("count", "high", "message"),
    [
        (3, bytes(1 << 20), "does not hold 3 elements"),
        (3, bytes(2), "does not hold 3 elements"),
        (3, None, "does not hold 3 elements"),
        (4, bytes(4), "its lengths are wrong"),
    ],
    ids=["too much", "too little", "no zstd", "another chunk"],
)
def test_a_chunk_that_lies_is_refused_though_its_checksum_is_right(count: int, high: bytes | None, message: str):
    compress = zstandard.ZstdCompressor().compress
    planes = [compress(bytes(count)), b"no zstd" if high is None else compress(high)]
    assert len(planes[1]) < 60  # what a megabyte of zeros takes: its length does not give it away
    head = struct.pack("<3I", count, *map(len, planes))
    payload = head + struct.pack("<I", zlib.crc32(head + b"".join(planes))) + b"".join(planes)
    with pytest.raises(InputError, match=f"^wq: chunk 1 of 1 .*{message}"):
        decode("wq", Coded("copy", (3,), BF16, len(payload)), None, io.BytesIO(payload), 1)


def test_a_damaged_length_does_not_make_the_reader_fetch_all_that_follows(damageable):
    base, coded, chunks = damageable
    payload = bytearray(b"".join(chunks)) + bytes(10_000)
    payload[5] ^= 1 << 4  # the low plane of the first chunk grows by 4096 bytes, which the file has
    longer = Coded(coded.op, coded.shape, coded.dtype, len(payload))
    with pytest.raises(InputError, match="^wq: chunk 1 of 3 is damaged .its lengths are wrong"):
        decode("wq", longer, base, io.BytesIO(bytes(payload)), 1)


@pytest.mark.parametrize(
    ("op", "base", "shape"),
    [("diff", None, (4,)), ("diff", (5,), (4,)), ("same", (5,), (4,)), ("rows", (4,), (5,)), ("rows", (2, 3), (2, 4)),
     ("xor", (4,), (4,)), ("diff", None, ())],
)  # fmt: skip
def test_ops_that_contradict_the_base_are_refused(op, base, shape):
    with pytest.raises(InputError, match=f"^wq: '{op}' to shape .* but the base is"):
        decode("wq", Coded(op, shape, BF16, 0), None if base is None else np.zeros(base, F16), io.BytesIO(), 1)


def test_formats_that_are_not_ours_are_refused():
    check_format(json.loads(json.dumps(delta_codec.FORMAT)), "delta.json")
    with pytest.raises(InputError, match="^delta.json: delta format has version 2, this program reads 1"):
        check_format(delta_codec.FORMAT | {"version": 2}, "delta.json")
    with pytest.raises(InputError, match="has encryption 'x', this program reads None"):
        check_format(delta_codec.FORMAT | {"encryption": "x"}, "delta.json")
    with pytest.raises(InputError, match="has name None"):
        check_format({}, "delta.json")


# ---- fingerprint ----------------------------------------------------------------------------------------------------


def test_the_root_hash_by_hand_and_in_any_order():
    first, second = hashlib.sha256(b"1"), hashlib.sha256(b"2")
    expected = hashlib.sha256(
        b"panda_jax tensors 1\n"
        + b"\x05\0\0\0embed" + b"\x04\0\0\0BF16" + b"\x02\0\0\0" + b"\x01\x7d\0\0\0\0\0\0" + b"\x06" + bytes(7)
        + first.digest()
        + b"\x04\0\0\0norm" + b"\x03\0\0\0F32" + b"\x01\0\0\0" + b"\x06" + bytes(7)
        + second.digest()
    ).hexdigest()  # fmt: skip
    entries = [("norm", "F32", (6,), second.hexdigest()), ("embed", "BF16", (32001, 6), first.hexdigest())]
    assert root_hash(entries) == root_hash(reversed(entries)) == expected
    others = [
        ("norm", "F32", (6,), first.hexdigest()), ("norm", "F16", (6,), second.hexdigest()),
        ("norm", "F32", (2, 3), second.hexdigest()), ("norms", "F32", (6,), second.hexdigest()),
    ]  # fmt: skip
    assert len({root_hash([other, entries[1]]) for other in others} | {root_hash(entries[:1]), expected}) == 6


def test_the_root_hash_refuses_what_is_no_set_of_tensors():
    digest = "ab" * 32
    for entries, message in [
        ([("a", "F32", (1,), digest), ("a", "F32", (1,), digest)], "a: two tensors"),
        ([("a", "float32", (1,), digest)], "a: dtype 'float32'"),
        ([("a", "F32", (1,), "ab")], "a: SHA-256 'ab'"),
        ([("a", "F32", (1,), "xy" * 32)], "a: SHA-256 'xy"),
    ]:
        with pytest.raises(InputError, match=message):
            root_hash(entries)


def test_the_hash_of_a_tensor_is_that_of_its_rows_wherever_they_lie():
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    expected = hashlib.sha256(struct.pack("<6e", 0, 1, 2, 3, 4, 5)).hexdigest()
    assert tensor_sha256(array) == tensor_sha256(np.asfortranarray(array)) == expected
    assert tensor_sha256(np.asarray(array.T).T) == tensor_sha256(np.repeat(array, 2, axis=1)[:, ::2]) == expected


def test_no_torch_in_the_codec():
    for module in ("delta_codec", "delta_published"):
        assert "torch" not in (Path(delta_codec.__file__).parent / f"{module}.py").read_text(encoding="utf-8")

"""The .pth container against PyTorch itself, in both directions."""

import os
import pickletools
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from pth_files import HUGE_ELEMENTS, TORCH, bits, huge, random_tensor, save, torch_bits, without_checksums

from convert import pth, state_pickle
from panda_jax.errors import InputError

# ---- reading --------------------------------------------------------------------------------------------------------

STATES = {
    "dtypes": {dtype: random_tensor(5, 7, dtype=dtype) for dtype in TORCH},
    "names": {"层.0/权重 \n'": random_tensor(2), "": random_tensor(3), "a" * 300: random_tensor(1)},
    "ordered": OrderedDict(b=random_tensor(3), a=random_tensor(2)),
    "parameter": {
        "w": torch.nn.Parameter(random_tensor(3, 2)),
        "frozen": torch.nn.Parameter(random_tensor(4), requires_grad=False),
    },
    "transposed": {"w": random_tensor(6, 4, 5).transpose(0, 2), "t": random_tensor(3, 8, dtype="bfloat16").t()},
    "slices": {
        "rows": random_tensor(10, 4)[3:7],
        "columns": random_tensor(10, 4)[:, 1:3],
        "steps": random_tensor(30)[4::5],
    },
    "single": {
        "scalar": torch.tensor(2.5),
        "one": random_tensor(1, 1, 1),
        "column": random_tensor(9, 3)[4:5, 1:2],
    },
    "empty": {
        "e": torch.empty(0),
        "rows": torch.empty(0, 4),
        "columns": torch.empty(4, 0),
        "end": random_tensor(4)[4:],
    },
    "no tensors": {},
    "many": {str(i): random_tensor(2, seed=i) for i in range(300)},  # more than a one-byte memo number can name
    "module": torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict(),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves_is_read(tmp_path: Path, state: dict[str, torch.Tensor], protocol: int) -> None:
    tensors = pth.read(save(tmp_path / "x.pth", state, pickle_protocol=protocol))
    assert list(tensors) == list(state)
    for name, tensor in tensors.items():
        array = tensor.read()
        assert bits(array) == torch_bits(state[name])
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
        assert array.flags.c_contiguous and array.flags.writeable


def test_views_share_a_storage_and_are_read_alone(tmp_path: Path) -> None:
    """Of a storage of 8 MB, `row` needs one row of 4 kB, and a change to what was read changes nothing else."""
    whole = random_tensor(2000, 1000)
    state = {
        "whole": whole,
        "again": whole,
        "row": whole[1234],
        "column": whole[5:9, 3],
        "tied": whole.view(1000, 2000),
    }
    tensors = pth.read(save(tmp_path / "x.pth", state))
    tracemalloc.start()
    row = tensors["row"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    row[:] = 0
    for name, tensor in tensors.items():
        assert bits(tensor.read()) == torch_bits(state[name])


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    path = without_checksums(tmp_path / "x.pth", {"w": random_tensor(100)})
    assert bits(pth.read(path)["w"].read()) == torch_bits(random_tensor(100))


def test_the_real_checkpoint(shared_data: Path) -> None:
    path = shared_data / "weights" / "stories260K-meta" / "consolidated.00.pth"
    expected = torch.load(path, weights_only=True)
    tensors = pth.read(path)
    assert list(tensors) == list(expected) and len(tensors) > 40
    for name, tensor in tensors.items():
        assert bits(tensor.read()) == torch_bits(expected[name])


def test_a_small_tensor_beyond_four_gigabytes(tmp_path: Path) -> None:
    """The archive's directory and sizes then have 64 bits; the storage before it is a hole that nobody reads."""
    small = random_tensor(100)
    path = huge(tmp_path, small, HUGE_ELEMENTS * 4)
    assert path.stat().st_size > 6 << 30
    tracemalloc.start()
    tensors = pth.read(path)
    assert tensors["huge"].shape == (HUGE_ELEMENTS,) and tensors["huge"].nbytes == 6 << 30
    assert bits(tensors["small"].read()) == torch_bits(small)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    loaded = torch.load(path, mmap=True, weights_only=True)  # the file is a good one
    assert loaded["huge"].shape == (HUGE_ELEMENTS,) and torch_bits(loaded["small"]) == torch_bits(small)


# ---- writing --------------------------------------------------------------------------------------------------------


def _write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    writer = pth.Writer(path, {name: (array.shape, array.dtype) for name, array in arrays.items()})
    for array in arrays.values():
        writer.append(array)
    writer.close()
    return path


def _array(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


ARRAYS = {
    "layers.0.wq": _array(6, 4),
    "half": _array(5, dtype=np.float16),
    "brain": np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16),  # every bit pattern, NaNs too
    "transposed": _array(3, 70, 2).T,
    "scalar": np.array(0.5, np.float16),
    "empty": np.empty((3, 0, 2), np.float32),
    "权重": _array(1),
    "long": _array(70_000),  # its length needs more than two bytes
}


def _check_in_torch(path: Path, arrays: dict[str, np.ndarray]) -> None:
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == list(arrays)
        for name, tensor in loaded.items():
            assert torch_bits(tensor) == bits(arrays[name])
            assert tensor.is_contiguous() and not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == arrays[name].nbytes, "a storage of its own"


def test_what_we_write_is_loaded_by_torch(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.pth", ARRAYS)
    _check_in_torch(path, ARRAYS)
    assert {name: bits(tensor.read()) for name, tensor in pth.read(path).items()} == {
        name: bits(array) for name, array in ARRAYS.items()
    }
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # checksums
        assert archive.namelist()[0] == "archive/data.pkl"
        for entry in archive.infolist():
            header = path.read_bytes()[entry.header_offset :][:30]
            start = entry.header_offset + 30 + header[26] + header[27] * 256 + header[28] + header[29] * 256
            assert start % 64 == 0
    assert path.read_bytes() == _write(tmp_path / "y.pth", ARRAYS).read_bytes(), "the same tensors, the same bytes"


def test_the_same_strides_as_torch_gives(tmp_path: Path) -> None:
    shapes = [(), (0,), (3, 0, 2), (0, 4), (4, 3, 2)]
    loaded = torch.load(_write(tmp_path / "x.pth", {str(shape): np.zeros(shape, np.float32) for shape in shapes}))
    assert [loaded[str(shape)].stride() for shape in shapes] == [torch.zeros(shape).stride() for shape in shapes]


@pytest.mark.parametrize(("limit", "members"), [(150, 0xFFFF), (100_000, 0xFFFF), (0xFFFFFFFF, 5)])
def test_long_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, members: int) -> None:
    """What files over 4 GB and over 65,535 members have, made by small ones under lowered limits."""
    monkeypatch.setattr(pth, "ZIP64_LIMIT", limit)
    monkeypatch.setattr(pth, "ZIP64_MEMBERS", members)
    path = _write(tmp_path / "x.pth", ARRAYS)
    assert b"PK\6\6" in path.read_bytes() and b"PK\6\7" in path.read_bytes()
    _check_in_torch(path, ARRAYS)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            is_long, is_far = entry.file_size >= limit, entry.header_offset >= limit
            local_sizes = path.read_bytes()[entry.header_offset + 18 :][:8]
            assert local_sizes == (bytes([255] * 8) if is_long else entry.file_size.to_bytes(4, "little") * 2)
            assert len(entry.extra) == (4 if is_long or is_far else 0) + 16 * is_long + 8 * is_far
    assert bits(pth.read(path)["long"].read()) == bits(ARRAYS["long"])


@pytest.mark.parametrize("number", [0, 255, 256, 65_535, 65_536, (1 << 31) - 1, 1 << 31, (1 << 40) + 5])
def test_numbers_of_every_length(number: int) -> None:
    pickled = state_pickle.pickle({"w": ((number,), np.dtype(np.float32))})
    opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(pickled)]
    numbers = [argument for name, argument in opcodes if name in ("BININT", "LONG1")]
    assert numbers == [number, 0, number, 1]  # the storage's length, the offset, the shape, the stride


def test_one_tensor_is_in_memory(tmp_path: Path) -> None:
    shape, count = (1000, 1000), 6
    tracemalloc.start()
    writer = pth.Writer(tmp_path / "x.pth", {str(i): (shape, np.dtype(np.float32)) for i in range(count)})
    for i in range(count):
        writer.append(np.full(shape, i, np.float32))
    writer.close()
    for i, tensor in enumerate(pth.read(tmp_path / "x.pth").values()):
        assert tensor.read()[-1, -1] == i
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * 4e6


def test_the_writer_holds_to_what_was_announced(tmp_path: Path) -> None:
    f32 = np.dtype(np.float32)
    with pytest.raises(ValueError, match="w: float64, expected float32"):
        pth.Writer(tmp_path / "x.pth", {"w": ((2,), np.dtype(np.float64))})
    assert not (tmp_path / "x.pth").exists()
    writer = pth.Writer(tmp_path / "x.pth", {"w": ((2,), f32), "b": ((3,), f32)})
    for wrong in (_array(3), _array(1, 2), _array(2, dtype=np.float16), _array(2).astype(">f4")):
        with pytest.raises(ValueError, match=r"but float32 \(2,\) was announced"):
            writer.append(wrong)
    writer.append(_array(2))
    with pytest.raises(ValueError, match="b: announced but not written"):
        writer.close()
    with pytest.raises(InputError):
        pth.read(tmp_path / "x.pth")
    writer.append(_array(3))
    with pytest.raises(ValueError, match="more tensors than the 2"):
        writer.append(_array(3))
    writer.close()
    _check_in_torch(tmp_path / "x.pth", {"w": _array(2), "b": _array(3)})
    with pytest.raises(FileExistsError):
        pth.Writer(tmp_path / "x.pth", {})


def test_the_file_is_on_the_disk_before_close_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    monkeypatch.setattr(os, "fsync", lambda number: lengths.append(os.fstat(number).st_size))
    path = _write(tmp_path / "x.pth", {"w": _array(5)})
    assert lengths == [path.stat().st_size]


def test_nothing_of_torch_is_needed() -> None:
    code = "import sys; import convert.pth; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Bad and malicious .pth files are refused, each in one line that names what is wrong."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pth_files import bits, huge, pickle_of, random_tensor, rezip, save, torch_bits, without_checksums

from convert import pth
from panda_jax.errors import InputError


def _refusal(path: Path, *tensors: str) -> str:
    with pytest.raises(InputError) as caught:
        state = pth.read(path)
        for name in tensors:
            state[name].read()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < len(str(path)) + 400
    return message


class _Touch:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    path = save(tmp_path / "x.pth", {"w": random_tensor(3), "b": random_tensor(2)}, pickle_protocol=2)
    malicious = pickle.dumps({"w": _Touch(marker)}, protocol)
    changed = rezip(path, {"data.pkl": malicious})
    message = _refusal(changed)
    # Protocol 0 builds its dict by an opcode that torch.save does not use, before it comes to the code.
    assert protocol == 0 or f"carries code: {os.system.__module__}.system; refused" in message
    assert not marker.exists()
    pickle.loads(malicious)
    assert marker.exists(), "the pickle would have run"


@pytest.mark.parametrize(
    ("pickled", "expected"),
    [
        (b"\x80\x02(X\x01\0\0\0aios\nsystem\n.", "carries code: os.system"),
        (b"\x80\x02cbuiltins\neval\nX\x01\0\0\0001\x85R.", "carries code: builtins.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x011\x85R.", "carries code: builtins.exec"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "carries code: torch.storage._load_from_bytes"),
        (b"\x80\x02ccollections\nOrderedDict.__init__.__globals__\n.", "OrderedDict.__init__.__globals__"),
        # Attributes set on a function or class that is allowed, and an object made without a call.
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\0\0\0__defaults__)sb.",
            "0 keys and values for a torch._utils",
        ),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ, which a state dict does not need"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "collections.OrderedDict with unexpected arguments"),
        # Values from before the mark, keys that could be nested deeply enough to break a hash, containers mistaken.
        (b"\x80\x02N(\x85.", "too few values"),
        (b"\x80\x02}N)s.", "2 keys and values for a dict"),
        (b"\x80\x02}(X\x01\0\0\0au.", "1 keys and values for a dict"),
        (b"\x80\x02}Na.", "items for a dict"),
        (b"\x80\x02]X\x01\0\0\0aNs.", "2 keys and values for a list"),
        (b"\x80\x02(X\x07\0\0\0storageX\x01\0\0\0aX\x01\0\0\0bX\x01\0\0\0cK\x01tQ.", "a storage without its type"),
        (b"\x80\x02}", "damaged: "),
    ],
)
def test_other_programs_are_refused(tmp_path: Path, pickled: bytes, expected: str) -> None:
    path = save(tmp_path / "x.pth", {"w": random_tensor(3)})
    assert expected in _refusal(rezip(path, {"data.pkl": pickled}))


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"model": {"w": random_tensor(2)}}, "'model' is of type dict, expected tensors with names"),
        ({"w": random_tensor(2), "epoch": 3}, "'epoch' is of type int"),
        ({"n" * 100_000: 3}, "n' is of type int"),
        ({0: random_tensor(2)}, "0 is of type tensor, expected tensors with names"),
        ([random_tensor(2)], "holds a list, expected a dict"),
        (random_tensor(2), "holds a tensor, expected a dict"),
        ({"w": torch.complex(random_tensor(2), random_tensor(2)).conj().imag}, "'w' is expanded, negated"),
        ({"w": torch.ones(1).expand(1000)}, "'w' is expanded"),
        ({"w": np.ones(2)}, "carries code: numpy"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, state: Any, expected: str) -> None:
    assert expected in _refusal(save(tmp_path / "x.pth", state))


@pytest.mark.parametrize(
    "dtype", ["float64", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "uint16", "float8_e4m3fn"]
)
def test_other_dtypes_are_listed_and_refused_when_read(tmp_path: Path, dtype: str) -> None:
    path = save(tmp_path / "x.pth", {"w": random_tensor(3), "position_ids": torch.ones(4).to(getattr(torch, dtype))})
    tensors = pth.read(path)
    assert (tensors["position_ids"].shape, tensors["position_ids"].dtype.name) == ((4,), dtype)
    assert bits(tensors["w"].read()) == torch_bits(random_tensor(3))
    message = _refusal(path, "position_ids")
    assert f"'position_ids' is {dtype}, expected float32, float16, bfloat16" in message


def test_wrong_containers_are_refused_with_the_fix(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"w": random_tensor(300)})
    legacy = save(tmp_path / "legacy.pth", {"w": random_tensor(3)}, _use_new_zipfile_serialization=False)
    assert "before PyTorch 1.6" in _refusal(legacy)
    assert "is compressed or encrypted, expected stored" in _refusal(rezip(path, {}, zipfile.ZIP_DEFLATED))
    assert "byte order 'big', expected 'little'" in _refusal(rezip(path, {"byteorder": b"big"}))
    assert "has no member 'x/data/0'" in _refusal(rezip(path, {"data/0": None}))
    assert "has no member 'x/data.pkl'" in _refusal(rezip(path, {"data.pkl": None}))
    assert "of which the archive has 1199" in _refusal(rezip(path, {"data/0": bytes(1199)}))
    assert "is no state dict, or damaged" in _refusal(rezip(path, {"data.pkl": b""}))
    for content, expected in (
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>404</html>", "not a PyTorch checkpoint"),
        (b"PK\5\6" + bytes(18), "0 members"),
    ):
        (tmp_path / "bad.pth").write_bytes(content)
        assert expected in _refusal(tmp_path / "bad.pth")
    assert "No such file" in _refusal(tmp_path / "absent.pth")
    assert "directory" in _refusal(tmp_path)
    with zipfile.ZipFile(tmp_path / "twice.pth", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x/data.pkl", pickle_of(path))
        archive.writestr("x/data.pkl", pickle_of(path))
    assert "2 members of 1 names" in _refusal(tmp_path / "twice.pth")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"w": random_tensor(50), "b": random_tensor(3, dtype="bfloat16")})
    content = path.read_bytes()
    for length in (*range(0, len(content) - 1, 37), len(content) - 1):
        path.write_bytes(content[:length])
        _refusal(path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"w": random_tensor(5000)})
    tensors = pth.read(path)
    os.truncate(path, 4000)
    with pytest.raises(InputError, match="ends .* bytes too early"):
        tensors["w"].read()
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        tensors["w"].read()


def test_sizes_beyond_the_file_or_the_storage_are_refused(tmp_path: Path) -> None:
    assert "ends at byte 6442" in _refusal(huge(tmp_path, random_tensor(1), hole_bytes=100))
    path = save(tmp_path / "x.pth", {"w": random_tensor(10)})
    offset, numel = b"QK\x00", b"cpuq\x06K\x0a"
    for old, new in ((offset, b"QK\x05"), (numel, b"cpuq\x06K\x09"), (numel, b"cpuq\x06K\x0b")):
        assert old in pickle_of(path)
        changed = rezip(path, {"data.pkl": pickle_of(path).replace(old, new)})
        assert "'w' needs" in _refusal(changed)


def test_a_directory_that_points_at_another_member(tmp_path: Path) -> None:
    """Without checksums nothing else would show that two tensors have changed places."""
    path = without_checksums(tmp_path / "x.pth", {"w": random_tensor(5), "b": random_tensor(5, seed=1)})
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"x/data/{key}").header_offset.to_bytes(4, "little") for key in (0, 1))
    content = path.read_bytes()
    assert content.count(first + b"x/data/0") == content.count(second + b"x/data/1") == 1
    swapped = content.replace(first + b"x/data/0", second + b"x/data/0").replace(
        second + b"x/data/1", first + b"x/data/1"
    )
    path.write_bytes(swapped)
    assert "'x/data/0' does not begin at byte" in _refusal(path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"w": random_tensor(50), "b": random_tensor(3)})
    renamed = path.read_bytes().replace(b"X\x01\0\0\0b", b"X\x01\0\0\0c")
    (tmp_path / "renamed.pth").write_bytes(renamed)
    assert renamed != path.read_bytes()
    assert "'x/data.pkl' is damaged" in _refusal(tmp_path / "renamed.pth")
    content = bytearray(path.read_bytes())
    content[content.index(bytes(random_tensor(50).numpy())) + 77] ^= 1
    path.write_bytes(content)
    assert bits(pth.read(path)["b"].read()) == torch_bits(random_tensor(3))
    assert "'w' is damaged" in _refusal(path, "w")


def _changed_bytes(content: bytes) -> list[bytes]:
    """Return copies with one byte changed: in its lowest bit, to opcodes that allocate memory, and to 255."""
    values = [(i, value) for i, byte in enumerate(content) for value in (byte ^ 1, *b"rX\xff")]
    return [content[:i] + bytes([value]) + content[i + 1 :] for i, value in values]


def test_a_damaged_pickle_raises_only_input_error(tmp_path: Path) -> None:
    """With right checksums, so that the pickle itself is at fault; some changes are harmless, such as in a name."""
    state = {"w": torch.nn.Parameter(random_tensor(6)), "b": random_tensor(3, 2).t()}
    path = save(tmp_path / "x.pth", state)
    outcomes = {True: 0, False: 0}
    for pickled in _changed_bytes(pickle_of(path)):
        try:
            for tensor in pth.read(rezip(path, {"data.pkl": pickled})).values():
                tensor.read()
            outcomes[True] += 1
        except InputError as error:
            assert "\n" not in str(error)
            outcomes[False] += 1
    assert outcomes[False] > outcomes[True] > 0


def test_a_damaged_archive_raises_only_input_error(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    saved = io.BytesIO()
    torch.save({"w": random_tensor(6)}, saved)
    directory = saved.getvalue().index(b"PK\1\2")
    for changed in _changed_bytes(saved.getvalue()[directory:])[::5]:
        path.write_bytes(saved.getvalue()[:directory] + changed)
        try:
            pth.read(path)["w"].read()
        except InputError as error:
            assert "\n" not in str(error)

"""Files for the tests of the .pth container, made by PyTorch and then damaged, and bytes to compare."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import set_crc32_options

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def bits(array: np.ndarray) -> tuple:
    """Return shape, dtype and bytes, in the form of torch_bits."""
    return array.shape, array.dtype.name, np.ascontiguousarray(array).tobytes()


def torch_bits(tensor: torch.Tensor) -> tuple:
    tensor = tensor.detach().contiguous()
    return tuple(tensor.shape), str(tensor.dtype)[6:], bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def random_tensor(*shape: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(TORCH[dtype])


def save(path: Path, state: Any, **settings: Any) -> Path:
    torch.save(state, path, **settings)
    return path


def rezip(path: Path, changed: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> Path:
    """Copy an archive, with right checksums, after replacing (or dropping: None) some of its members."""
    result = path.with_name(f"changed_{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(result, "w", method) as new:
        for name in old.namelist():
            content = changed.get(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return result


def without_checksums(path: Path, state: Any) -> Path:
    set_crc32_options(False)
    try:
        return save(path, state)
    finally:
        set_crc32_options(True)


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{path.stem}/data.pkl")


HUGE_ELEMENTS = (6 << 30) // 4


def huge(folder: Path, small: torch.Tensor, hole_bytes: int) -> Path:
    """Write a checkpoint of `huge`, 6 GB by its directory and pickle but only `hole_bytes` of hole, and of `small`."""
    saved = save(folder / "x.pth", {"huge": torch.empty(4), "small": small})
    # The first BININT1 4 of the pickle is the length of the huge storage, the second its shape.
    pickled = pickle_of(saved).replace(b"K\x04", b"\x8a\x08" + HUGE_ELEMENTS.to_bytes(8, "little"), 2)
    path = folder / "huge.pth"
    with path.open("w+b") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        hole = zipfile.ZipInfo("x/data/0")
        hole.file_size = hole.compress_size = HUGE_ELEMENTS * 4
        hole.header_offset, hole.CRC = file.tell(), 0
        header = hole.FileHeader(zip64=True)
        file.write(header)
        file.seek(hole_bytes, os.SEEK_CUR)
        archive.filelist.append(hole)
        archive.start_dir = file.tell()
        archive.writestr("x/data/1", bytes(small.numpy()))
        archive.writestr("x/version", b"3\n")
    return path

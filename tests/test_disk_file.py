"""Files that go to the disk while they are written: nothing is lost, and a disk that fails is reported."""

import errno
import os

import numpy as np
import pytest

from convert import disk_file
from convert.disk_file import DiskFile


def test_every_byte_arrives_in_order(tmp_path, monkeypatch):
    """Writes that are smaller than a window, as large, and larger; 1,000 is no multiple of any of them."""
    monkeypatch.setattr(disk_file, "WINDOW_BYTES", 256)
    generator = np.random.default_rng(0)
    pieces = [generator.bytes(size) for size in (0, 1, 255, 256, 257, 1000, 3)]
    file = DiskFile(tmp_path / "file")
    for end, piece in zip(np.cumsum([len(piece) for piece in pieces]), pieces, strict=True):
        file.write(piece)
        assert file.tell() == end
    file.close()
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_a_file_that_exists_is_not_written_over(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        DiskFile(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_disk_that_fills_up_behind_the_writer_is_reported(tmp_path, monkeypatch):
    """The failure of a window that is on its way surfaces at the latest on closing."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk_file, "WINDOW_BYTES", 256)
    monkeypatch.setattr(os, "fdatasync", full)
    for size in (256, 2560):
        file = DiskFile(tmp_path / str(size))
        with pytest.raises(OSError, match="No space left"):
            file.write(bytes(size))
            file.close()

"""Files that are either complete or absent, whatever happens while they are written, and files with one owner."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import IO

# Unfinished files begin with this; whoever finds an old one may delete it.
UNFINISHED = ".unfinished-"


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts` one after the other to `path`; a reader sees the old file or the whole new one.

    The new file is on the disk before it gets its name. Two processes that write the same path do not meet: each
    writes a file of its own, and the last one to finish names the result. Raises OSError with `path` as its filename;
    then nothing is left behind.
    """
    unfinished = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        error.filename, error.filename2 = str(path), None
        raise
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: a crash of the machine can lose the name of a file that is there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO) -> bool:
    """Tell whether this process has `file` to itself from now on, until it is closed or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

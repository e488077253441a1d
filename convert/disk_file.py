"""A new file that reaches the disk while it is written, and leaves the page cache behind it as it was.

A model is larger than what the page cache should hold: its pages would push out everything else, and each costs time to
claim. Here at most two windows of a file wait for the disk; what has arrived there gives its pages to what comes next.
What is read back afterwards therefore comes from the disk.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

WINDOW_BYTES = 64 << 20


class DiskFile:
    """A file opened for writing from its start; it must not exist."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._written = self._handed_over = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; raises OSError, also for bytes that an earlier call has taken."""
        left = memoryview(data).cast("B")
        while left:
            count = self._file.write(left[:WINDOW_BYTES])
            left = left[count:]
            self._written += count
            if self._written - self._handed_over >= WINDOW_BYTES:
                self._hand_over()

    def tell(self) -> int:
        return self._written

    def _hand_over(self) -> None:
        self._wait()
        start, self._handed_over = self._handed_over, self._written
        self._pending = self._pool.submit(self._settle, start, self._written - start)

    def _settle(self, start: int, count: int) -> None:
        os.fdatasync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), start, count, os.POSIX_FADV_DONTNEED)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Return once every byte is on the disk; raises OSError where one is not."""
        try:
            self._wait()
            os.fsync(self._file.fileno())
        finally:
            self._pool.shutdown()
            self._file.close()

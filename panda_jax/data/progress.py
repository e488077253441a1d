"""What `prepare` shows while it works: a live line per source in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as LiveProgress

from panda_jax.data.preparation import Progress

PLAIN_INTERVAL_S = 30.0


class Display:
    """Shows Progress reports on standard error. Use it as a context manager and pass it to `preparation.prepare`."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._bars = LiveProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[records]:,} records"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._tasks: dict[str, tuple] = {}
        self._started = self._last_line = 0.0

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Show one report."""
        if self._live:
            self._draw(progress)
        else:
            self._print(progress)

    def _draw(self, progress: Progress) -> None:
        if progress.source not in self._tasks:
            task = self._bars.add_task(progress.source, total=progress.total_bytes, records=0)
            self._tasks[progress.source] = (task,)
        (task,) = self._tasks[progress.source]
        # A block leaves out blank lines and a list's brackets, so the last report does not reach the files' size.
        total = progress.done_bytes if progress.is_finished else progress.total_bytes
        self._bars.update(task, completed=progress.done_bytes, total=total, records=progress.records)

    def _print(self, progress: Progress) -> None:
        now = time.monotonic()
        if not (progress.done_bytes or progress.is_finished):
            self._started = self._last_line = now
            return
        if now - self._last_line < PLAIN_INTERVAL_S and not progress.is_finished:
            return
        self._last_line = now
        elapsed = max(now - self._started, 1e-3)
        of_total = f" of {progress.total_bytes / 1e6:.1f}" if progress.total_bytes and not progress.is_finished else ""
        print(
            f"{progress.source}: {progress.done_bytes / 1e6:.1f}{of_total} MB, {progress.records:,} records "
            f"in {elapsed:.1f} s ({progress.done_bytes / 1e6 / elapsed:.1f} MB/s)",
            file=sys.stderr,
        )

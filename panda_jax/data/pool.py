"""The parent's side of tokenisation: worker processes, a bounded number of blocks under way, and what goes wrong."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import IO, Any

from panda_jax.command_line import start_module
from panda_jax.data.build import Job
from panda_jax.data.cache import Header
from panda_jax.data.files import Block
from panda_jax.errors import InputError

# Blocks read ahead, so that a worker that finishes finds the next one ready.
BLOCKS_AHEAD = 2


def num_cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """One child process, and a pipe to it in each direction."""

    def __init__(self) -> None:
        self.process = start_module(
            "panda_jax.data.worker",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C in the terminal reaches the parent alone, which then ends its workers in order
        )
        self.job: Job | None = None

    def ask(self, job: Job, block: Block) -> Header:
        """Have the block's shard built; raises what the worker raised, or InputError if it died."""
        requests, replies = _pipe(self.process.stdin), _pipe(self.process.stdout)
        try:
            if job is not self.job:
                pickle.dump(job, requests)
                self.job = job
            pickle.dump(block, requests)
            requests.flush()
            reply = pickle.load(replies)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            place = f"block {block.index}, which begins at {block.file}:{block.first_line}"
            raise InputError(f"{_death(self.process.wait())} on {place}") from error
        if isinstance(reply, Exception):
            raise reply
        return reply

    def end(self) -> None:
        """Close the pipes; the worker notices and exits."""
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):  # it died with a request unread, and that was reported
                _pipe(pipe).close()
        self.process.wait()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _death(status: int) -> str:
    if status >= 0:
        return f"a tokenising process exited with status {status} (its own message is above)"
    name = signal.Signals(-status).name
    fix = "; memory was short: lower data.tokenize_workers" if -status == signal.SIGKILL else ""
    return f"a tokenising process was killed by {name}{fix}"


class Pool:
    """Worker processes, started when first needed and shared by all sources. Use it as a context manager."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="tokenise")
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        """End every worker after the block it has in hand, whose shard is kept."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().end()

    def build(self, job: Job, blocks: Iterable[Block], done: Callable[[Header], None]) -> None:
        """Build the shard of every block; `done` is called here after each, in the order they finish.

        At most num_workers + BLOCKS_AHEAD blocks exist at a time. After a failure no new block is begun; of several
        failures that of the first block is raised, so that the message does not depend on the number of workers.
        """
        running: dict[Future[Header], int] = {}
        failures: dict[int, BaseException] = {}

        def collect() -> None:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                index = running.pop(future)
                if future.cancelled():
                    continue
                if error := future.exception():
                    failures[index] = error
                else:
                    done(future.result())
            for future, index in running.items():
                if failures and index > min(failures):
                    future.cancel()

        submitted = 0
        try:
            for block in blocks:
                running[self._threads.submit(self._run, job, block)] = submitted
                submitted += 1
                while len(running) >= self.num_workers + BLOCKS_AHEAD:
                    collect()
                if failures:
                    break
        except InputError as error:
            failures[submitted] = error  # the reader's; a block before that place may still fail, and comes first
        while running:
            collect()
        if failures:
            raise failures[min(failures)]

    def _run(self, job: Job, block: Block) -> Header:
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker()
        try:
            return worker.ask(job, block)
        finally:
            if worker.process.poll() is None:
                self._idle.put(worker)
            else:
                worker.end()

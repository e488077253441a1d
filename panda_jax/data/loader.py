"""Rows of the plan, filled with tokens, as one batch per step. The only file that imports grain.

Grain reads ahead: in a background thread, or in `data.loader_workers` processes. Its unit of work is a whole step, so
that workers share out steps, never rows, and every number of workers yields the same batches in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import grain
import numpy as np
from absl import flags

from panda_jax.config import Config
from panda_jax.data.mixture import Windows
from panda_jax.data.packing import Plan

# Batches that wait, filled, in front of the consumer (per worker process, if there are any).
BATCHES_AHEAD = 2


class ReadableWindows(Windows, Protocol):
    """What filling rows asks of a token cache; it must be picklable if there are worker processes."""

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32 [n], trained bool [n]) of window i."""
        ...


def assemble(plan: Plan, caches: Sequence[ReadableWindows], rows: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the batch that holds these rows of the plan: int32 [rows, T], and float32 [rows, T] loss_weights.

    A window of n ids takes n - 1 positions: inputs are ids[:-1], targets ids[1:], each weighted 1 if it is trained.
    With the windows B a b E (a untrained; b and E trained) and B c E (both trained), and T = 7:

        tokens        B a b B c . .
        targets       a b E c E . .
        loss_weights  0 1 1 1 1 0 0
        segment_ids   1 1 1 2 2 0 0      0 is padding
        positions     0 1 2 0 1 0 0
        (a dot is the id 0)

    Rows from plan.num_rows on are empty: all zeros. Raises ValueError when a window has another length than planned.
    """
    shape = (len(rows), plan.seq_len)
    types = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), np.int32) | {"loss_weights": np.float32}
    batch: dict[str, np.ndarray] = {name: np.zeros(shape, dtype) for name, dtype in types.items()}
    count = np.arange(plan.seq_len, dtype=np.int32)
    for line, row in enumerate(rows):
        if row >= plan.num_rows:
            continue
        tokens, targets, segment_ids, positions, loss_weights = (array[line] for array in batch.values())
        start = 0
        for segment, (source, window) in enumerate(plan.row(row), start=1):
            ids, trained = caches[source].read(window)
            stop = start + len(ids) - 1
            tokens[start:stop] = ids[:-1]
            targets[start:stop] = ids[1:]
            segment_ids[start:stop] = segment
            positions[start:stop] = count[: stop - start]
            loss_weights[start:stop] = trained[1:]
            start = stop
        if start != plan.row_tokens[row]:
            raise ValueError(f"row {row} holds {start} tokens, planned {plan.row_tokens[row]}; the cache has changed")
    return batch


class _Steps:
    """The steps from `start` on as a random-access source of batches."""

    def __init__(self, plan: Plan, caches: Sequence[ReadableWindows], start: int, local_rows: np.ndarray):
        self.plan, self.caches, self.start, self.local_rows = plan, tuple(caches), start, local_rows.tolist()

    def __len__(self) -> int:
        return self.plan.num_steps - self.start

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rows = self.plan.step_rows(self.start + int(index))
        return assemble(self.plan, self.caches, [rows[offset] for offset in self.local_rows])


def _read_ahead(
    steps: grain.MapDataset[dict[str, np.ndarray]], workers: int
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Return the steps in order, read ahead by one thread, or by worker processes and a thread that collects."""
    if not workers:
        return steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=BATCHES_AHEAD))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which no absl.app has parsed here.
    inline = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=BATCHES_AHEAD)
    # Workers hand over batches in shared memory, which must not outlive them: the collecting thread copies it.
    copied = inline.mp_prefetch(options).map(_copy)
    return grain.experimental.ThreadPrefetchIterDataset(copied, prefetch_buffer_size=1)


def _copy(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in batch.items()}


class Loader:
    """The batches of steps start_step, start_step + 1, … up to the plan's last, as far as this process feeds them.

    `local_rows`, int [local rows], are offsets within the global batch: line k of a batch is row
    plan.step_rows(step)[local_rows[k]]. Each batch is the dict of arrays [local rows, T] that `assemble` describes, in
    memory of its own. Reading ahead begins with iter(). Use it as a context manager, or close() it: that ends its
    threads and processes. What they raise is raised by next().

    Raises ValueError when start_step or local_rows lie outside the plan.
    """

    def __init__(
        self, plan: Plan, caches: Sequence[ReadableWindows], config: Config, start_step: int, local_rows: np.ndarray
    ):
        local_rows = np.asarray(local_rows)
        if not 0 <= start_step <= plan.num_steps:
            raise ValueError(f"start_step {start_step} lies outside the plan's {plan.num_steps} steps")
        if local_rows.size and not (local_rows.min() >= 0 and local_rows.max() < plan.global_batch_size):
            raise ValueError(f"local_rows {local_rows} lie outside the global batch of {plan.global_batch_size} rows")
        self._steps = _Steps(plan, caches, start_step, local_rows)
        self._workers = config.data.loader_workers
        self._open: grain.DatasetIterator[dict[str, np.ndarray]] | None = None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Begin at start_step; a former iteration ends."""
        self.close()
        if not len(self._steps):
            return iter(())
        self._open = iter(_read_ahead(grain.MapDataset.source(self._steps), self._workers))
        self._open.start_prefetch()
        return self._open

    def close(self) -> None:
        """End the threads and processes that read ahead; harmless when there are none."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

"""The packing plan: which windows stand in which row of which step, for the whole run, decided before it starts.

    caches' lengths -> held-out windows set aside -> uses of each window per pass (`epochs` or `weight`)
                    -> one seeded order over all sources -> rows of seq_len -> global batches

A plan depends on the windows' lengths and records, on config.data, on config.train.{epochs, max_steps,
global_batch_size} and on config.seed, and on nothing else. So a resume is a step number, and the number of processes,
loader workers or micro-batches cannot change what a step sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from panda_jax.config import Config, Data
from panda_jax.data.mixture import Windows, held_out_windows, pass_items, permutation, streams_of
from panda_jax.errors import InputError

# Windows packed together: enough to fill rows to over 99 %, few enough that a window stays near its place in the order.
BLOCK_WINDOWS = 65_536


class Totals(NamedTuple):
    """What a run reads; one token is one position of a row that holds a token."""

    tokens: int
    """Positions used over all steps of the run."""
    tokens_per_step: float
    """Mean positions used per step."""
    padding_fraction: float
    """Share of the positions of all steps that stay empty."""
    tokens_per_source: dict[str, int]
    """Positions used over all steps of the run, per source label."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of one run (or of its held-out windows), as flat arrays with random access by row.

    A window is named by (source index, window index within that source's cache).
    """

    labels: tuple[str, ...]
    """Label of each source, in the order of config.data.sources."""
    contents: tuple[str, ...]
    """Fingerprint of each source's cache."""
    first_item: np.ndarray
    """int64 [sources + 1]: item number of each source's window 0; an item is a window counted over all sources."""
    items: np.ndarray
    """int32 or int64 [uses]: the items in reading order."""
    row_starts: np.ndarray
    """int64 [num_rows + 1]: row i holds items[row_starts[i] : row_starts[i + 1]]."""
    row_tokens: np.ndarray
    """int32 [num_rows]: positions used in each row."""
    pass_rows: tuple[int, ...]
    """Row at which each pass over the data begins, and num_rows at the end."""
    seq_len: int
    """Positions per row."""
    global_batch_size: int
    """Rows per step."""
    max_steps: int | None
    """Steps after which the run stops, if that is before its rows are used up."""
    held_out: Plan | None
    """The held-out windows, once each and in their order; None when there are none."""

    @property
    def num_rows(self) -> int:
        """Rows that hold at least one window."""
        return len(self.row_starts) - 1

    @property
    def num_steps(self) -> int:
        """Steps of the run; the last one is filled up with empty rows."""
        steps = -(-self.num_rows // self.global_batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the rows, their shape and the sources' content: equal means the same batch at every step."""
        digest = hashlib.sha256(repr((self.seq_len, self.global_batch_size, self.labels, self.contents)).encode())
        for array in (self.first_item, self.row_starts, self.items):
            digest.update(array.data)
        return digest.hexdigest()

    def row(self, i: int) -> list[tuple[int, int]]:
        """Return the (source index, window index) pairs of row i, from left to right; raises IndexError."""
        if not 0 <= i < self.num_rows:
            raise IndexError(f"row {i} of a plan with {self.num_rows} rows")
        items = self.items[self.row_starts[i] : self.row_starts[i + 1]]
        sources = np.searchsorted(self.first_item, items, side="right") - 1
        return list(zip(sources.tolist(), (items - self.first_item[sources]).tolist(), strict=True))

    def step_rows(self, step: int) -> range:
        """Return the global_batch_size row numbers of a step; those from num_rows on are empty rows."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a plan with {self.num_steps} steps")
        return range(step * self.global_batch_size, (step + 1) * self.global_batch_size)

    def epoch(self, step: int) -> float:
        """Return how many passes over the data are done when `step` steps are done, e.g. 1.25."""
        row = min(step * self.global_batch_size, self.num_rows)
        return float(np.interp(row, self.pass_rows, range(len(self.pass_rows))))

    def tokens_until(self, step: int) -> int:
        """Return the positions used by the first `step` steps."""
        return int(self.row_tokens[: step * self.global_batch_size].sum(dtype=np.int64))

    def describe(self, step: int, caches: Sequence[Windows]) -> list[str]:
        """Return the record ids ("label: file:line") of a step's windows, row after row."""
        rows = self.step_rows(step)
        filled = range(rows.start, min(rows.stop, self.num_rows))
        return [caches[source].record_id(window) for i in filled for source, window in self.row(i)]

    def ledger(self) -> list[np.ndarray]:
        """Return, for each source, int64 [windows]: how often the run uses each window."""
        last_row = min(self.num_steps * self.global_batch_size, self.num_rows)
        counts = np.bincount(self.items[: self.row_starts[last_row]], minlength=int(self.first_item[-1]))
        return np.split(counts, self.first_item[1:-1])

    def totals(self, caches: Sequence[Windows]) -> Totals:
        """Return the token totals of the run, counted from the ledger."""
        used = [int(uses @ cache.lengths.astype(np.int64)) for uses, cache in zip(self.ledger(), caches, strict=True)]
        tokens, steps = sum(used), self.num_steps
        positions = steps * self.global_batch_size * self.seq_len
        return Totals(tokens, tokens / steps, 1 - tokens / positions, dict(zip(self.labels, used, strict=True)))


def plan(config: Config, caches: Sequence[Windows]) -> Plan:
    """Plan the whole run: config.train.epochs passes over the mixture, packed into rows and global batches.

    `caches` holds one cache per entry of config.data.sources, in that order. About 1 microsecond per use of a window.
    Raises InputError when a source, or the whole mixture, has no windows to train on; ValueError when a window does
    not fit a row.
    """
    data = config.data
    _check_windows(config, caches)
    lengths = np.concatenate([cache.lengths for cache in caches])
    first_item = np.concatenate([[0], np.cumsum([len(cache.lengths) for cache in caches])])
    item_type = np.int32 if len(lengths) <= np.iinfo(np.int32).max else np.int64
    held = [
        held_out_windows(source, cache, config.seed, f"data.sources[{i}]")
        for i, (source, cache) in enumerate(zip(data.sources, caches, strict=True))
    ]
    streams = streams_of(config, caches, held)
    rows, passes = _Rows(data, lengths), [0]
    for number in range(config.train.epochs):
        items = pass_items(streams, first_item, config, number).astype(item_type)
        rows.extend(items, (config.seed, "rows", number) if data.shuffle else None)
        passes.append(rows.count)
    if not rows.count:
        raise InputError(
            "data.sources: no windows to train on, because every source has `epochs: 0` or `held_out: all`; "
            "expected at least one source that is trained on: change one of them"
        )
    training = rows.plan(config, caches, first_item, passes)
    aside, held_rows = np.flatnonzero(np.concatenate(held)).astype(item_type), _Rows(data, lengths)
    held_rows.extend(aside, None)
    held_out = held_rows.plan(config, caches, first_item, [0, held_rows.count]) if len(aside) else None
    return replace(training, max_steps=config.train.max_steps, held_out=held_out)


def _check_windows(config: Config, caches: Sequence[Windows]) -> None:
    labels = [source.label for source in config.data.sources]
    if [cache.source for cache in caches] != labels:
        raise ValueError(f"caches {[cache.source for cache in caches]} do not belong to data.sources {labels}")
    for i, cache in enumerate(caches):
        if not len(cache.lengths):
            raise InputError(
                f"data.sources[{i}] ({cache.source}): 0 windows, expected at least 1; "
                f"check {config.data.sources[i].path} or take the source out"
            )
        wrong = np.flatnonzero((cache.lengths < 1) | (cache.lengths > config.data.seq_len))
        if len(wrong):
            found = f"{cache.record_id(int(wrong[0]))} has {cache.lengths[wrong[0]]} positions"
            raise ValueError(f"{found}, expected 1 to data.seq_len {config.data.seq_len}; rebuild the cache")


# ---- rows -----------------------------------------------------------------------------------------------------------


class _Rows:
    """Rows collected so far, block by block."""

    def __init__(self, data: Data, lengths: np.ndarray):
        self.data, self.lengths, self.count = data, lengths, 0
        self.items = [np.empty(0, np.int32)]
        self.sizes = [np.empty(0, np.int64)]
        self.tokens = [np.empty(0, np.int32)]

    def extend(self, items: np.ndarray, name: tuple | None) -> None:
        """Pack a pass's items into rows, in blocks whose rows are shuffled by draws of that name; None keeps order."""
        for number, block in enumerate(_blocks(items, len(items) if name is None else BLOCK_WINDOWS)):
            lengths = self.lengths[block]
            if not self.data.packing:
                row_of = np.arange(len(block))
            elif name is None:
                row_of = next_fit(lengths, self.data.seq_len)
            else:
                row_of = best_fit_decreasing(lengths, self.data.seq_len)
                # Rows come out ordered by the length of their first window: training must not see that order.
                row_of = permutation(int(row_of.max()) + 1, *name, number)[row_of]
            in_rows = np.argsort(row_of, kind="stable")
            self.items.append(block[in_rows])
            self.sizes.append(np.bincount(row_of))
            self.tokens.append(np.bincount(row_of, weights=lengths).astype(np.int32))
            self.count += len(self.sizes[-1])

    def plan(self, config: Config, caches: Sequence[Windows], first_item: np.ndarray, passes: list[int]) -> Plan:
        """Return these rows as a plan without an end of its own and without held-out windows."""
        return Plan(
            labels=tuple(cache.source for cache in caches),
            contents=tuple(cache.fingerprint for cache in caches),
            first_item=first_item,
            items=np.concatenate(self.items),
            row_starts=np.concatenate([[0], np.cumsum(np.concatenate(self.sizes))]),
            row_tokens=np.concatenate(self.tokens),
            pass_rows=tuple(passes),
            seq_len=config.data.seq_len,
            global_batch_size=config.train.global_batch_size,
            max_steps=None,
            held_out=None,
        )


def _blocks(items: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(items), max(size, 1)):
        yield items[start : start + size]


def next_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Return int64 [n]: the row of each window, when rows are filled in the order given.

    next_fit([3, 3, 2, 5], 8) == [0, 0, 0, 1]; next_fit([5, 5, 3], 8) == [0, 1, 1].
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    # A row that begins at window i goes up to the first window whose end is more than seq_len behind i's beginning.
    next_start = np.searchsorted(ends, ends - lengths + seq_len, side="right")
    is_start, i = np.zeros(len(lengths), np.int64), 0
    while i < len(lengths):
        is_start[i] = 1
        i = next_start.item(i)
    return np.cumsum(is_start) - 1


def best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Return int64 [n]: the row of each window; the longest come first, each into the row it fills best.

    best_fit_decreasing([2, 5, 3, 6, 2], 8) == [0, 1, 1, 0, 2]: 6 opens row 0, 5 opens row 1, 3 fits only row 1 (and
    fills it), 2 fills row 0, the last 2 opens row 2. (arXiv:2404.10830 §3.)

    Rows are kept by the room they have left, and the sizes of room that occur are bits of one integer, so that the
    best fit is its lowest set bit at or above the length. Windows of equal length share a row until it is full, because
    the row just filled has the least room of all that still fit: they are placed together.
    """
    counts = np.bincount(lengths, minlength=seq_len + 1).tolist()
    rows_with: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms, num_rows, row_of = 0, 0, []
    for length in range(seq_len, 0, -1):
        left = counts[length]
        while left:
            if fitting := rooms >> length:
                room = length + (fitting & -fitting).bit_length() - 1
                row = rows_with[room].pop()
                if not rows_with[room]:
                    rooms ^= 1 << room
            else:
                room, row = seq_len, num_rows
                num_rows += 1
            placed = min(room // length, left)
            row_of += [row] * placed
            left -= placed
            room -= placed * length
            if room:
                rows_with[room].append(row)
                rooms |= 1 << room
    result = np.empty(len(lengths), np.int64)
    result[np.argsort(-lengths, kind="stable")] = row_of
    return result

"""The loader: batches by hand, the same global batches however they are read, and the ledger read back from tokens."""

import multiprocessing
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from plans import configure

from panda_jax.config import Config
from panda_jax.data.loader import Loader, assemble
from panda_jax.data.packing import plan

BOS, EOS = 1, 2


class MemoryCache:
    """A token cache in memory. Window w of source s is BOS, 100 + s, 1000 + w, filler …, EOS: it can be recognised."""

    def __init__(self, source: str, number: int, sizes: list[int], broken: int | None = None):
        self.source, self.fingerprint, self.broken = source, f"content of {source}", broken
        self.windows = [[BOS, 100 + number, 1000 + w, *range(3, size - 1), EOS] for w, size in enumerate(sizes)]
        self.lengths = np.array([len(ids) - 1 for ids in self.windows], np.int32)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if i == self.broken:
            raise OSError(f"{self.source}: window {i} cannot be read")
        ids = np.array(self.windows[i], np.int32)
        return ids, np.arange(len(ids)) % 3 != 1  # Every third id, from the second on, is not trained.

    def record_id(self, i: int) -> str:
        return f"{self.source}: memory:{i + 1}"


def configured(names: list[str], seq_len: int, batch: int, workers: int = 0, passes: int = 1) -> Config:
    """Every source is used 1.5 times per pass, without three records that are held out."""
    sources = [{"name": name, "epochs": 1.5, "held_out": 3} for name in names]
    return configure(sources, seq_len, batch, 3, {"loader_workers": workers}, {"epochs": passes})


@pytest.fixture(scope="module")
def run() -> tuple[Config, list[MemoryCache]]:
    """Two sources of 60 and 40 windows of 4 to 24 ids, rows of 32, batches of 8, two passes."""
    sizes = np.random.default_rng(1).integers(4, 25, 100).tolist()
    return configured(["a", "b"], 32, 8, passes=2), [MemoryCache("a", 0, sizes[:60]), MemoryCache("b", 1, sizes[60:])]


def read(config: Config, caches: list[MemoryCache], start: int = 0, rows: np.ndarray | None = None) -> list[dict]:
    """Return all batches from step `start` on; all rows unless told otherwise."""
    rows = np.arange(config.train.global_batch_size) if rows is None else rows
    with Loader(plan(config, caches), caches, config, start, rows) as loader:
        return list(loader)


def assert_equal(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def test_batch_by_hand():
    """Two windows of 4 and 3 ids in a row of 7: the drawing in the docstring of `assemble`; then an empty row."""

    class Drawn(MemoryCache):
        def read(self, i):
            ids, trained = [([1, 7, 8, 2], [0, 0, 1, 1]), ([1, 9, 2], [1, 1, 1])][i]
            return np.array(ids, np.int32), np.array(trained, bool)

    cache = Drawn("a", 0, [])
    cache.lengths = np.array([3, 2], np.int32)
    config = configure([{"name": "a"}], 7, 2, data={"shuffle": False})
    batch = assemble(plan(config, [cache]), [cache], [0, 1])
    drawn = {
        "tokens": [1, 7, 8, 1, 9, 0, 0],
        "targets": [7, 8, 2, 9, 2, 0, 0],
        "loss_weights": [0, 1, 1, 1, 1, 0, 0],
        "segment_ids": [1, 1, 1, 2, 2, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0, 0],
    }
    assert {name: array.tolist() for name, array in batch.items()} == {k: [row, [0] * 7] for k, row in drawn.items()}
    assert {name: str(array.dtype) for name, array in batch.items()} == {
        name: "float32" if name == "loss_weights" else "int32" for name in drawn
    }


def recover(batches: list[dict]) -> Counter:
    """Count windows, as tuples of ids, by cutting rows where the segment id changes and appending the last target."""
    found: Counter = Counter()
    for batch in batches:
        for tokens, targets, segments in zip(batch["tokens"], batch["targets"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max(initial=0) + 1):
                place = np.flatnonzero(segments == segment)
                assert (np.diff(place) == 1).all() and (tokens[place[1:]] == targets[place[:-1]]).all()
                found[(*tokens[place].tolist(), int(targets[place[-1]]))] += 1
    return found


def test_ledger_read_back_from_the_tokens(run):
    """epochs 1.5 twice over is 3: each of the 57 + 37 windows not held out is read 3 times; the 3 + 3 others never.

    The held-out plan shows those 6 once each.
    """
    config, caches = run
    order = plan(config, caches)
    found, held = recover(read(config, caches)), Counter()
    assert order.held_out is not None
    with Loader(order.held_out, caches, config, 0, np.arange(8)) as loader:
        held = recover(list(loader))
    windows = {tuple(ids) for cache in caches for ids in cache.windows}
    assert len(windows) == 100 and found.keys() | held.keys() == windows and not found.keys() & held.keys()
    assert set(found.values()) == {3} and set(held.values()) == {1}
    assert sum(ids[1] == 100 for ids in held) == sum(ids[1] == 101 for ids in held) == 3


def test_weights_positions_and_padding_of_every_batch(run):
    """Padding is zero everywhere; positions count from 0 in each segment; weights repeat the windows' flags.

    A target at position p is id p + 1 of its window, which is trained unless p + 1 leaves 1 when divided by 3.
    """
    config, caches = run
    batches = read(config, caches)
    for batch in batches:
        empty = batch["segment_ids"] == 0
        assert all((array[empty] == 0).all() for array in batch.values())
        restart = np.diff(batch["segment_ids"], axis=1, prepend=0) != 0
        assert (batch["positions"][restart] == 0).all()
        inside = ~restart & ~empty
        assert (np.diff(batch["positions"], axis=1, prepend=0)[inside] == 1).all()
        assert (batch["loss_weights"] == np.where(empty, 0, (batch["positions"] + 1) % 3 != 1)).all()
    last_rows = batches[-1]["segment_ids"].any(axis=1)
    assert last_rows.any() and not last_rows.all(), "the run should end within a batch"


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batches_do_not_depend_on_the_processes(run, processes):
    """The local batches of 2 and 4 processes, put together, are the global batches of one."""
    config, caches = run
    parts = [read(config, caches, rows=rows) for rows in np.split(np.arange(8), processes)]
    joined = [{name: np.concatenate([p[name] for p in step]) for name in step[0]} for step in zip(*parts, strict=True)]
    assert_equal(joined, read(config, caches))


def test_rows_may_be_asked_for_in_any_order(run):
    """A mesh may give a process rows 6, 1 and 3."""
    config, caches = run
    expected = [{name: array[[6, 1, 3]] for name, array in batch.items()} for batch in read(config, caches)]
    assert_equal(read(config, caches, rows=np.array([6, 1, 3])), expected)


def test_batches_do_not_depend_on_the_micro_batch(run):
    config, caches = run
    micro = replace(config, train=replace(config.train, micro_batch_size=2))
    assert_equal(read(micro, caches), read(config, caches))


@pytest.mark.parametrize(("workers", "steps"), [(2, None), (3, 2)])
def test_batches_do_not_depend_on_the_workers(run, workers, steps):
    """Two workers over the whole run; three where only two steps are left."""
    config, caches = run
    expected = read(config, caches)
    assert len(expected) > 6
    several = replace(config, data=replace(config.data, loader_workers=workers))
    start = len(expected) - steps if steps else 0
    assert_equal(read(several, caches, start=start), expected[start:])
    assert_nothing_is_left_running()


def test_resume_is_the_tail_of_the_full_run(run):
    config, caches = run
    full = read(config, caches)
    for step in range(len(full)):
        assert_equal(read(config, caches, start=step), full[step:])
    assert read(config, caches, start=len(full)) == []


def test_batches_own_their_memory(run):
    """A batch that is changed, or kept while others are read, does not change another."""
    config, caches = run
    expected = [{name: array.copy() for name, array in batch.items()} for batch in read(config, caches)]
    with Loader(plan(config, caches), caches, config, 0, np.arange(8)) as loader:
        for batch, other in zip(loader, expected, strict=True):
            assert_equal([batch], [other])
            for array in batch.values():
                array[:] = 1
    assert_equal(read(config, caches), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_while_reading_reaches_the_consumer(workers):
    """Window 20 cannot be read: next() raises the cause when its step comes, and closing still ends everything."""
    cache = MemoryCache("a", 0, [10] * 40, broken=20)
    config = configured(["a"], 9, 2, workers)
    with (
        pytest.raises(OSError, match="a: window 20 cannot be read"),
        Loader(plan(config, [cache]), [cache], config, 0, np.arange(2)) as loader,
    ):
        list(loader)
    assert_nothing_is_left_running()


def assert_nothing_is_left_running() -> None:
    """Grain names its threads and worker processes; wait a moment for those that are ending."""
    deadline = time.monotonic() + 10
    while True:
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("grain")]
        processes = [process.name for process in multiprocessing.active_children()]
        if not threads and not processes:
            return
        assert time.monotonic() < deadline, f"still running: {threads} {processes}"
        time.sleep(0.05)


@pytest.mark.parametrize(("workers", "steps_read"), [(0, 0), (0, 1), (0, 4), (2, 0), (2, 1)])
def test_close_ends_threads_and_processes(run, workers, steps_read):
    config, caches = run
    config = replace(config, data=replace(config.data, loader_workers=workers))
    loader = Loader(plan(config, caches), caches, config, 0, np.arange(8))
    batches = iter(loader)
    for _ in range(steps_read):
        next(batches)
    loader.close()
    loader.close()
    assert_nothing_is_left_running()


def test_reading_ahead_happens_in_the_background(run):
    """While the consumer is away the next batches are read: the reads go on without a call of next()."""
    config, caches = run
    reads: list[str] = []

    class Watched(MemoryCache):
        def read(self, i):
            reads.append(threading.current_thread().name)
            return super().read(i)

    watched = [Watched(cache.source, i, [len(ids) for ids in cache.windows]) for i, cache in enumerate(caches)]
    with Loader(plan(config, watched), watched, config, 0, np.arange(8)) as loader:
        batches = iter(loader)
        deadline = time.monotonic() + 10
        while not reads and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reads and threading.current_thread().name not in reads
        next(batches)


def test_a_cache_that_does_not_match_the_plan_is_refused(run):
    """A cache whose windows are one id shorter than planned."""
    config, caches = run
    shorter = [MemoryCache(cache.source, i, [len(w) - 1 for w in cache.windows]) for i, cache in enumerate(caches)]
    with pytest.raises(ValueError, match="the cache has changed"):
        assemble(plan(config, caches), shorter, [0])


def test_arguments_outside_the_plan_are_refused(run):
    config, caches = run
    order = plan(config, caches)
    with pytest.raises(ValueError, match="start_step"):
        Loader(order, caches, config, order.num_steps + 1, np.arange(8))
    with pytest.raises(ValueError, match="local_rows"):
        Loader(order, caches, config, 0, np.arange(9))

"""The packing plan: hand-drawn cases, and properties over random mixtures."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import QUICK, cache, configure, many, mixtures, rows_of

from panda_jax.config import Compute, Mesh
from panda_jax.data.packing import best_fit_decreasing, next_fit, plan

# ---- rows -----------------------------------------------------------------------------------------------------------


def test_best_fit_decreasing_by_hand():
    """Rows of 8: |6 6 6 6 6 6 2 2| |5 5 5 5 5 3 3 3| |2 2|. 6 opens row 0, 5 row 1, 3 fills row 1, 2 row 0, 2 row 2."""
    assert best_fit_decreasing(np.array([2, 5, 3, 6, 2]), 8).tolist() == [0, 1, 1, 0, 2]


def test_best_fit_takes_the_tightest_row():
    """The 6s and the 5 open rows with room for 2, 2 and 3: the 3 goes to the 5's row, the 2s to those of the 6s."""
    row_of = best_fit_decreasing(np.array([3, 2, 6, 5, 2, 6]), 8).tolist()
    assert row_of[0] == row_of[3] and {row_of[1], row_of[4]} == {row_of[2], row_of[5]} and len(set(row_of)) == 3


def test_next_fit_by_hand():
    """|3 3 2| is exactly full, |5|, then |4 4|; |8| stands alone."""
    assert next_fit(np.array([3, 3, 2, 5, 4, 4, 8, 1]), 8).tolist() == [0, 0, 0, 1, 2, 2, 3, 4]


def naive_best_fit_decreasing(lengths: list[int], seq_len: int) -> list[int]:
    """Return the rows' loads, sorted, by looking at every row for every window."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, load in enumerate(loads) if load + length <= seq_len]
        if fitting:
            loads[max(fitting, key=lambda i: loads[i])] += length
        else:
            loads.append(length)
    return sorted(loads)


@QUICK
@given(
    st.integers(1, 40).flatmap(lambda t: st.tuples(st.just(t), st.lists(st.integers(1, t), min_size=1, max_size=80)))
)
def test_best_fit_decreasing_equals_the_naive_search(case):
    """Which of two equally full rows takes a window does not matter to the loads, so the sorted loads must agree."""
    seq_len, lengths = case
    row_of = best_fit_decreasing(np.array(lengths, np.int32), seq_len)
    loads = [
        sum(length for length, row in zip(lengths, row_of, strict=True) if row == r) for r in range(max(row_of) + 1)
    ]
    assert sorted(loads) == naive_best_fit_decreasing(lengths, seq_len)


# ---- the plan by hand -----------------------------------------------------------------------------------------------


def test_unshuffled_plan_by_hand():
    """seq_len 8, batches of 2, two passes of a = [3 4 2], b = [5 3], b twice per pass.

    pass 0: |a0 a1| |a2 b0| |b1 b0| |b1|      pass 1 the same; rows 0-3 and 4-7, so steps 0-3.
    """
    config = configure([{"name": "a"}, {"name": "b", "epochs": 2}], data={"shuffle": False}, train={"epochs": 2})
    caches = [cache("a", 3, 4, 2), cache("b", 5, 3)]
    order = plan(config, caches)
    a0, a1, a2, b0, b1 = (0, 0), (0, 1), (0, 2), (1, 0), (1, 1)
    assert rows_of(order) == [[a0, a1], [a2, b0], [b1, b0], [b1]] * 2
    assert (order.num_rows, order.num_steps, order.pass_rows) == (8, 4, (0, 4, 8))
    assert [uses.tolist() for uses in order.ledger()] == [[2, 2, 2], [4, 4]]
    assert order.row_tokens.tolist() == [7, 7, 8, 3] * 2
    assert [order.tokens_until(step) for step in range(5)] == [0, 14, 25, 39, 50]
    assert [order.epoch(step) for step in range(5)] == [0, 0.5, 1, 1.5, 2]
    totals = order.totals(caches)
    assert (totals.tokens, totals.tokens_per_step) == (50, 12.5)
    assert totals.tokens_per_source == {"a": 18, "b": 32}
    assert totals.padding_fraction == pytest.approx(14 / 64)
    assert order.describe(1, caches) == ["b: file.json:2", "b: file.json:1", "b: file.json:2"]


def test_max_steps_shortens_the_run_but_not_the_plan():
    """As above, stopped after 3 of 4 steps: rows 6 and 7 (b1 b0, b1) are not reached."""
    sources, more = [{"name": "a"}, {"name": "b", "epochs": 2}], {"shuffle": False}
    caches = [cache("a", 3, 4, 2), cache("b", 5, 3)]
    whole = plan(configure(sources, data=more, train={"epochs": 2}), caches)
    order = plan(configure(sources, data=more, train={"epochs": 2, "max_steps": 3}), caches)
    assert (order.num_steps, order.num_rows) == (3, 8)
    assert [uses.tolist() for uses in order.ledger()] == [[2, 2, 2], [3, 2]]
    assert order.totals(caches).tokens == 39
    assert order.fingerprint == whole.fingerprint
    with pytest.raises(IndexError):
        order.step_rows(3)


def test_last_batch_is_filled_with_empty_rows():
    """Three rows in batches of two: step 1 names row 3, which the plan does not have."""
    order = plan(configure([{"name": "a"}], data={"packing": False}), [cache("a", 1, 2, 3)])
    assert (order.num_rows, order.num_steps, order.step_rows(1)) == (3, 2, range(2, 4))
    with pytest.raises(IndexError):
        order.row(3)


def test_held_out_plan_by_hand():
    """`all` of b is held out, in its order: |5 2| |3 4|; a alone is trained on."""
    config = configure([{"name": "a"}, {"name": "b", "held_out": "all"}])
    order = plan(config, [cache("a", 1), cache("b", 5, 2, 3, 4)])
    assert rows_of(order) == [[(0, 0)]]
    assert order.held_out is not None and order.held_out.held_out is None
    assert rows_of(order.held_out) == [[(1, 0), (1, 1)], [(1, 2), (1, 3)]]
    assert order.held_out.num_steps == 1


# ---- properties -----------------------------------------------------------------------------------------------------


@QUICK
@given(mixtures())
def test_rows_fit_and_steps_cover_them_once(case):
    config, caches = case
    order = plan(config, caches)
    loads = [sum(int(caches[s].lengths[w]) for s, w in row) for row in rows_of(order)]
    assert all(1 <= load <= config.data.seq_len for load in loads)
    assert order.row_tokens.tolist() == loads
    named = [row for step in range(order.num_steps) for row in order.step_rows(step)]
    assert named == list(range(len(named))) and 0 <= len(named) - order.num_rows < config.train.global_batch_size
    if not config.data.packing:
        assert all(len(row) == 1 for row in rows_of(order))


@QUICK
@given(mixtures(), st.randoms(use_true_random=False))
def test_random_access_equals_sequential_and_is_reproducible(case, random):
    config, caches = case
    first, second = plan(config, caches), plan(config, caches)
    shuffled = random.sample(range(first.num_rows), first.num_rows)
    access = {i: second.row(i) for i in shuffled}
    assert [access[i] for i in range(first.num_rows)] == rows_of(first)
    assert first.fingerprint == second.fingerprint


@QUICK
@given(mixtures(shuffle=False))
def test_without_shuffle_the_order_is_kept(case):
    """Within a pass: source by source; within a source, first uses in order, then second uses in order, …"""
    config, caches = case
    order = plan(config, caches)
    for start, stop in zip(order.pass_rows[:-1], order.pass_rows[1:], strict=True):
        read = [window for i in range(start, stop) for window in order.row(i)]
        times: Counter = Counter()
        keyed = []
        for source, window in read:
            keyed.append((source, times[source, window], window))
            times[source, window] += 1
        assert keyed == sorted(keyed)


def test_shuffled_rows_mix_sources_and_lengths_evenly():
    """Of 4,000 windows each tenth of the rows has 0.25 ± 0.1 of its windows from b, and no sorting by size is left."""
    caches = [many("a", 3000, 0), many("b", 1000, 1)]
    order = plan(configure([{"name": "a"}, {"name": "b"}], seq_len=64), caches)
    rows = rows_of(order)
    tenth = len(rows) // 10
    for part in range(10):
        windows = [window for row in rows[part * tenth : (part + 1) * tenth] for window in row]
        assert abs(sum(source == 1 for source, _ in windows) / len(windows) - 0.25) < 0.1
    longest = [max(int(caches[s].lengths[w]) for s, w in row) for row in rows]
    assert abs(np.mean(longest[: len(rows) // 2]) - np.mean(longest[len(rows) // 2 :])) < 0.1 * np.mean(longest)
    assert 0.97 < order.row_tokens.sum() / (64 * len(rows)) <= 1


# ---- fingerprint ----------------------------------------------------------------------------------------------------


def test_plan_is_independent_of_devices_workers_and_micro_batches():
    caches = [many("a", 200, 0)]
    config = configure([{"name": "a"}], 64, 8)
    expected = plan(config, caches).fingerprint
    others = [
        replace(config, train=replace(config.train, micro_batch_size=2)),
        replace(config, data=replace(config.data, loader_workers=3)),
        replace(config, mesh=Mesh(data=2, fsdp=2)),
        replace(config, compute=Compute(remat="none")),
    ]
    assert [plan(other, caches).fingerprint for other in others] == [expected] * len(others)


def test_fingerprint_changes_with_anything_that_changes_a_batch():
    def fingerprint(entry=None, **changes):
        base = {"seq_len": 64, "batch": 8, "seed": 7} | changes
        return plan(configure([{"name": "a"}], **base), [entry or many("a", 200, 0)]).fingerprint

    prints = [
        fingerprint(),
        fingerprint(seed=8),
        fingerprint(batch=4),
        fingerprint(seq_len=65),
        fingerprint(data={"shuffle": False}),
        fingerprint(data={"packing": False}),
        fingerprint(train={"epochs": 2}),
        fingerprint(many("a", 201, 0)),
        fingerprint(replace(many("a", 200, 0), fingerprint="other content")),
    ]
    assert len(set(prints)) == len(prints)


# ---- programming errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [9, 0])
def test_a_window_that_does_not_fit_is_a_programming_error(length):
    with pytest.raises(ValueError, match=rf"a: file.json:2 has {length} positions, expected 1 to data.seq_len 8"):
        plan(configure([{"name": "a"}]), [cache("a", 8, length)])


def test_caches_of_other_sources_are_a_programming_error():
    with pytest.raises(ValueError, match="do not belong"):
        plan(configure([{"name": "a"}]), [cache("b", 1)])

"""The mixture: reproducible draws, how often windows are used, and what is held out."""

import hashlib
import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import QUICK, Lengths, cache, configure, many, mixtures, rows_of

from panda_jax.config import Config
from panda_jax.data.mixture import draws, permutation
from panda_jax.data.packing import plan
from panda_jax.errors import InputError

# ---- draws ----------------------------------------------------------------------------------------------------------


def philox_block(counter: int, key: int) -> list[int]:
    """Four words of Philox4x64-10, written from the algorithm's description with unbounded integers."""
    low = 2**64 - 1
    words = [counter >> 64 * i & low for i in range(4)]
    keys = [key & low, key >> 64]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [second >> 64 ^ words[1] ^ keys[0], second & low, first >> 64 ^ words[3] ^ keys[1], first & low]
        keys = [keys[0] + 0x9E3779B97F4A7C15 & low, keys[1] + 0xBB67AE8584CAA73B & low]
    return words


def test_philox_reference_gives_the_published_vector():
    """Random123's known answer for counter 0, key 0."""
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox_block(0, 0) == expected


def test_draws_are_raw_philox_words_keyed_by_name():
    key = int.from_bytes(hashlib.sha256("42\norder\n3\n百科".encode()).digest()[:16], "little")
    expected = [word for counter in (1, 2, 3) for word in philox_block(counter, key)][:10]
    assert draws(10, 42, "order", 3, "百科").tolist() == expected


def test_permutation_is_pinned_across_numpy_versions():
    """The ranks of ten words of the reference above, sorted in plain Python."""
    key = int.from_bytes(hashlib.sha256(b"-1\nrepeat\nwiki").digest()[:16], "little")
    words = [word for counter in (1, 2, 3) for word in philox_block(counter, key)][:10]
    assert permutation(10, -1, "repeat", "wiki").tolist() == sorted(range(10), key=words.__getitem__)
    assert permutation(10, -1, "repeat", "wiki").tolist() == [4, 6, 8, 2, 7, 3, 5, 0, 1, 9]


# ---- uses -----------------------------------------------------------------------------------------------------------


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


@QUICK
@given(mixtures())
def test_every_window_is_used_as_often_as_configured(case):
    """Counted over the rows: held-out windows never; any other floor(P e) or ceil(P e) times, round(P e n) in total."""
    config, caches = case
    order = plan(config, caches)
    seen = Counter(window for row in rows_of(order) for window in row)
    held = Counter(window for row in (rows_of(order.held_out) if order.held_out else []) for window in row)
    assert not seen.keys() & held.keys()
    assert set(held.values()) <= {1}
    for s, (source, entry) in enumerate(zip(config.data.sources, caches, strict=True)):
        assert sum(window[0] == s for window in held) == source.held_out
        uses = [seen[s, w] for w in range(len(entry.lengths)) if (s, w) not in held]
        wanted = config.train.epochs * Fraction(1 if source.epochs is None else source.epochs)
        assert set(uses) <= {math.floor(wanted), math.ceil(wanted)}
        assert sum(uses) == half_up(wanted * len(uses))
        assert order.ledger()[s].tolist() == [seen[s, w] for w in range(len(entry.lengths))]


@QUICK
@given(mixtures())
def test_each_pass_repeats_fractions_by_count(case):
    """The first pass uses each window floor(e) times and round((e - floor(e)) n) of them once more."""
    config, caches = case
    order = plan(config, caches)
    first = Counter(window for i in range(order.pass_rows[1]) for window in order.row(i))
    for s, (source, entry) in enumerate(zip(config.data.sources, caches, strict=True)):
        epochs = Fraction(1 if source.epochs is None else source.epochs)
        n = len(entry.lengths) - source.held_out
        more = half_up((epochs - math.floor(epochs)) * n)
        assert sum(uses for (part, _), uses in first.items() if part == s) == math.floor(epochs) * n + more
        assert all(uses in (math.floor(epochs), math.floor(epochs) + 1) for (p, _), uses in first.items() if p == s)


@QUICK
@given(
    st.lists(
        st.tuples(st.floats(1, 10), st.lists(st.integers(1, 20), min_size=3, max_size=50)), min_size=1, max_size=3
    ),
    st.integers(1000, 5000),
    st.integers(1, 3),
)
def test_weights_give_the_asked_share_of_tokens(parts, total_tokens, passes):
    """Each source's tokens are within one window (20 tokens) of weight / sum(weights) * total_tokens in each pass.

    A pass is cut at the window nearest to the asked token on both sides; the whole run only at its end, so it is
    within half a window. One token more is allowed for the rounding of the asked number.
    """
    sources = [{"name": f"s{i}", "weight": weight} for i, (weight, _) in enumerate(parts)]
    caches = [cache(f"s{i}", *lengths) for i, (_, lengths) in enumerate(parts)]
    data = {"total_tokens": total_tokens}
    order = plan(configure(sources, 20, 3, data=data, train={"epochs": passes}), caches)
    whole = sum(weight for weight, _ in parts)
    for s, (weight, lengths) in enumerate(parts):
        target = weight / whole * total_tokens
        used = []
        for start, stop in zip(order.pass_rows[:-1], order.pass_rows[1:], strict=True):
            used.append(sum(lengths[w] for i in range(start, stop) for source, w in order.row(i) if source == s))
        assert all(abs(tokens - target) <= 20 + 1 for tokens in used)
        assert abs(sum(used) - passes * target) <= 10 + 1


def test_each_pass_and_each_source_has_its_own_order():
    """100 windows of a and of b, one per row, twice: four different orders of the numbers 0 to 99."""
    config = configure([{"name": "a"}, {"name": "b"}], 64, data={"packing": False}, train={"epochs": 2})
    rows = rows_of(plan(config, [many("a", 100, 0), many("b", 100, 1)]))
    orders = [
        tuple(w for [(s, w)] in rows[start : start + 200] if s == source) for start in (0, 200) for source in (0, 1)
    ]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(100)) for order in orders)


# ---- held out -------------------------------------------------------------------------------------------------------


def held_out_of(config: Config, caches: list[Lengths], source: int) -> set[int]:
    held_out = plan(config, caches).held_out
    assert held_out is not None
    return {w for row in rows_of(held_out) for s, w in row if s == source}


def test_another_source_does_not_change_what_is_held_out():
    a = {"name": "a", "held_out": 10}
    alone = held_out_of(configure([a], seq_len=64), [many("a", 100, 0)], 0)
    with_b = [{"name": "b", "held_out": 5}, a]
    assert held_out_of(configure(with_b, seq_len=64), [many("b", 50, 1), many("a", 100, 0)], 1) == alone
    assert held_out_of(configure([a], seq_len=64, seed=8), [many("a", 100, 0)], 0) != alone
    other_name = configure([{"name": "c", "held_out": 10}], seq_len=64)
    assert held_out_of(other_name, [many("c", 100, 0)], 0) != alone


def test_adding_a_source_keeps_the_relative_order_of_the_others():
    """Without packing, the rows of a read in the same order with and without b."""
    caches = [many("a", 100, 0), many("b", 50, 1)]
    alone = plan(configure([{"name": "a"}], 64, data={"packing": False}), caches[:1])
    both = plan(configure([{"name": "a"}, {"name": "b"}], 64, data={"packing": False}), caches)
    assert rows_of(alone) == [row for row in rows_of(both) if row[0][0] == 0]
    assert rows_of(both)[:100] != rows_of(alone)


def test_records_are_held_out_whole():
    """Records 1, 1, 2, 3, 3, 3, …: two held-out records take all of their windows, and only those."""
    records = [1, 1, 2, 3, 3, 3, 4, 5, 5, 6]
    for seed in range(20):
        config = configure([{"name": "a", "held_out": 2}], seed=seed)
        held = held_out_of(config, [cache("a", *[2] * 10, records=records)], 0)
        names = {records[w] for w in held}
        assert len(names) == 2 and held == {w for w in range(10) if records[w] in names}


def test_long_records_are_not_favoured_when_held_out():
    """Of 2 records one has 99 windows: over 400 seeds it is drawn 200 ± 60 times (six standard deviations)."""
    records = [1] * 99 + [2]
    caches = [cache("a", *[2] * 100, records=records)]
    drawn = sum(
        0 in held_out_of(configure([{"name": "a", "held_out": 1}], seed=seed), caches, 0) for seed in range(400)
    )
    assert abs(drawn - 200) < 60


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "lengths", "message"),
    [
        ({}, [], r"data.sources\[0\] \(a\): 0 windows"),
        ({"held_out": 3}, [1, 2, 3], r"data.sources\[0\].held_out \(a\): 3 of 3 records"),
        ({"held_out": 9}, [1, 2, 3], r"9 of 3 records"),
        ({"held_out": "all"}, [1, 2, 3], "no windows to train on"),
        ({"epochs": 0}, [1, 2, 3], "no windows to train on"),
        ({"epochs": 0.1}, [1, 2, 3], "epochs 0.1 of 3 windows uses none of them"),
    ],
)
def test_nothing_to_train_on_is_an_input_error(source, lengths, message):
    with pytest.raises(InputError, match=message) as caught:
        plan(configure([{"name": "a"} | source]), [cache("a", *lengths)])
    assert "\n" not in str(caught.value)

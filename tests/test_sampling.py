"""The choice of one token: transformers' processors on the same logits, and how often what is drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from panda_jax.errors import InputError
from panda_jax.generation import sampling
from panda_jax.generation.sampling import Sampling

SHAPE = (6, 211)
PLAIN = Sampling(12, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seed=3, stop_ids=())
GREEDY = Sampling.greedy(12, ())
cut = jax.jit(sampling.cut)
choose = jax.jit(sampling.choose, static_argnames="kind")


def random_logits() -> np.ndarray:
    logits = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) * 3
    logits[0] *= 10  # one token has nearly all of the probability
    logits[1] = np.linspace(-0.01, 0.01, SHAPE[1])  # and here none stands out
    return logits


@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 7, 210, 500])
def test_cuts_equal_transformers(top_k: int, top_p: float):
    logits = random_logits()
    expected = torch.from_numpy(logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)  # pyright: ignore[reportArgumentType]
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)  # pyright: ignore[reportArgumentType]
    numbers = replace(PLAIN, top_k=top_k, top_p=top_p).numbers(SHAPE[1])
    found = np.asarray(cut(jnp.asarray(logits), numbers.top_k, numbers.top_p))
    np.testing.assert_array_equal(found, expected.numpy())


def test_equal_scores_stay_or_go_together():
    scores = jnp.array([[2.0, 1.0, 1.0, 0.0, -0.0, -5.0]])
    kept = lambda k: np.isfinite(np.asarray(cut(scores, jnp.int32(k), jnp.float32(1))))[0].tolist()  # noqa: E731
    assert kept(1) == [True, False, False, False, False, False]
    assert kept(2) == kept(3) == [True, True, True, False, False, False]
    assert kept(4) == [True, True, True, True, True, False]


def test_penalty_temperature_and_cuts_come_in_the_order_of_transformers():
    """The distribution that remains, drawn from 4,000 times, against the one that transformers' processors leave."""
    logits, prompt = random_logits()[2:3], [3, 5, 8, 13]
    choice = replace(PLAIN, temperature=1.6, top_k=12, top_p=0.8, repetition_penalty=1.9)
    processors = LogitsProcessorList([
        RepetitionPenaltyLogitsProcessor(1.9), TemperatureLogitsWarper(1.6), TopKLogitsWarper(12), TopPLogitsWarper(0.8)
    ])  # fmt: skip
    logits[0, prompt] = [4.0, -1.0, 7.5, 6.0]
    given: Any = torch.tensor([prompt])
    expected = torch.softmax(processors(given, torch.from_numpy(logits.copy())), -1)[0].double().numpy()
    count = 4000
    seen = jnp.zeros((count, SHAPE[1]), bool).at[:, jnp.array(prompt)].set(True)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(1), row))(jnp.arange(count))
    ids, logprobs = choose(
        jnp.tile(jnp.asarray(logits), (count, 1)), seen, keys, jnp.zeros(count, jnp.int32), kind=choice.kind,
        numbers=
        choice.numbers(SHAPE[1]),
    )  # fmt: skip
    drawn = np.bincount(np.asarray(ids), minlength=SHAPE[1])
    possible = expected > 0
    assert 3 <= possible.sum() <= 12 and drawn[~possible].sum() == 0
    # Pearson's statistic has mean n - 1 and standard deviation sqrt(2 (n - 1)); five of them above is never seen.
    statistic = np.sum((drawn - count * expected)[possible] ** 2 / (count * expected[possible]))
    freedom = possible.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)
    own = torch.log_softmax(torch.from_numpy(logits[0]), -1).numpy()
    np.testing.assert_allclose(np.asarray(logprobs), own[np.asarray(ids)], atol=1e-5)


def test_draws_at_two_places_of_a_row_are_independent():
    """A fair coin at 2,000 pairs of positions shows every pair of sides a quarter of the time, within 5 sigma (97)."""
    coin, choice = jnp.zeros((2000, 2)), PLAIN
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(2), row))(jnp.arange(2000))
    sides = [
        np.asarray(
            choose(coin, None, keys, jnp.full(2000, place, jnp.int32), kind=choice.kind, numbers=choice.numbers(2))[0]
        )
        for place in (4, 5)
    ]
    counts = Counter(zip(*(side.tolist() for side in sides), strict=True))
    assert len(counts) == 4 and all(abs(number - 500) < 97 for number in counts.values())


def test_greedy_takes_the_first_of_equals():
    """As torch.argmax does on CPU."""
    logits = jnp.array([[0.0, 3.0, 1.0, 3.0], [-2.0, -2.0, -9.0, -2.0]])
    ids, _ = choose(
        logits,
        None,
        jax.random.split(jax.random.key(0)),
        jnp.zeros(2, jnp.int32),
        kind=GREEDY.kind,
        numbers=GREEDY.numbers(4),
    )
    assert np.asarray(ids).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
        ("top_p", 1.01), ("repetition_penalty", 0.0), ("seed", -1), ("seed", 2**32),
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing(name: str, value: float):
    with pytest.raises(InputError, match=f"^{name}: {value}, expected"):
        replace(PLAIN, **{name: value})

"""How the next token is chosen: greedily or by a draw, from logits [B, V], with the definitions of transformers.

In this order: the repetition penalty (arXiv:1909.05858 §4.1) over prompt and generated tokens, the temperature, top-k,
top-p (arXiv:1904.09751 §3.1) over what top-k left. The log-probability that comes with a token is the model's own: the
log-softmax of the logits as the network gave them, in float32, whatever was done to them before the draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from panda_jax.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How long and how to generate; raises InputError for a value that means nothing."""

    max_new_tokens: int
    """Tokens at most, a stop id included."""
    temperature: float
    """The logits are divided by it before a draw; 0 takes the most probable token and draws nothing."""
    top_k: int
    """Draw among this many most probable tokens; 0 among all."""
    top_p: float
    """Draw among the fewest most probable tokens that hold this much probability; 1 among all."""
    repetition_penalty: float
    """Positive logits of tokens that are there already are divided by it, negative ones multiplied; 1 for none."""
    seed: int
    """Seeds the draws. A prompt's draws depend on its place among the prompts and on no other prompt."""
    stop_ids: tuple[int, ...]
    """A row ends with the first of these; it is not part of what is returned."""

    def __post_init__(self) -> None:
        self._require("max_new_tokens", self.max_new_tokens >= 1, "1 or more")
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        self._require("temperature", finite, "0 (greedy) or more")
        self._require("top_k", self.top_k >= 0, "a number of tokens, or 0 for all")
        self._require("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        positive = math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0
        self._require("repetition_penalty", positive, "more than 0, and 1 for none")
        self._require("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 4294967295")

    def _require(self, name: str, is_fulfilled: bool, expected: str) -> None:
        if not is_fulfilled:
            raise InputError(f"{name}: {getattr(self, name)}, expected {expected}")

    @classmethod
    def greedy(cls, max_new_tokens: int, stop_ids: tuple[int, ...]) -> Sampling:
        """Return what takes the most probable token every time."""
        return cls(max_new_tokens, 0.0, 0, 1.0, 1.0, 0, stop_ids)

    @property
    def kind(self) -> Kind:
        is_greedy = self.temperature == 0
        is_cut = not is_greedy and (self.top_k > 0 or self.top_p < 1)
        return Kind(is_greedy, self.repetition_penalty != 1, is_cut)

    def numbers(self, vocab_size: int) -> Numbers:
        """Return the numbers that a compiled choice takes as arguments."""
        is_stop = jnp.zeros(vocab_size, bool)
        if self.stop_ids:
            is_stop = is_stop.at[jnp.array(self.stop_ids)].set(True)
        return Numbers(
            temperature=jnp.float32(self.temperature),
            top_k=jnp.int32(min(self.top_k or vocab_size, vocab_size)),
            top_p=jnp.float32(self.top_p),
            repetition_penalty=jnp.float32(self.repetition_penalty),
            is_stop=is_stop,
        )


class Kind(NamedTuple):
    """Which steps the choice has at all: every kind is a program of its own."""

    is_greedy: bool
    is_penalised: bool
    is_cut: bool
    """By top-k, top-p or both."""


class Numbers(NamedTuple):
    """What may change without a new program."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array
    is_stop: jax.Array
    """bool [V]"""


def choose(
    logits: jax.Array, seen: jax.Array | None, keys: jax.Array, positions: jax.Array, kind: Kind, numbers: Numbers
) -> tuple[jax.Array, jax.Array]:
    """Return a token per row, int32 [B], and its log-probability, float32 [B].

    logits float32 [B, V]; seen bool [B, V], the tokens that are there already, where the kind is penalised; keys [B],
    one PRNG key per row; positions int32 [B], where the token will lie in its row. A row's draw depends on its key and
    position alone, and on no other row.
    """
    scores = penalise(logits, seen, numbers.repetition_penalty) if seen is not None else logits
    if kind.is_greedy:
        tokens = _first_largest(scores)
    else:
        scores = scores / numbers.temperature
        if kind.is_cut:
            scores = cut(scores, numbers.top_k, numbers.top_p)
        keys = jax.vmap(jax.random.fold_in)(keys, positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:], jnp.float32))(keys)
        # The largest of log p + Gumbel noise is a draw from p.
        tokens = _first_largest(scores + noise)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=1)


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Return the logits [B, V] with those of the tokens in `seen` [B, V] made less probable (penalty > 1)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def cut(scores: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return the scores [B, V] with -inf for what top-k and then top-p leave out; equal scores stay or go together.

    top-p keeps a token when it and the less probable ones hold more than 1 - top_p; the most probable one stays always.
    """
    # Bisection over the float32 bit patterns instead of a sort: 32 passes, where a sort of 32,000 takes far longer.
    ranks = _ranks(scores)
    too_high = _smallest(lambda value: jnp.sum(ranks >= value, axis=1, keepdims=True) < top_k, ranks)
    scores = jnp.where(ranks >= too_high - 1, scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=1)
    largest = jnp.max(ranks, axis=1, keepdims=True)

    def is_enough(value: jax.Array) -> jax.Array:
        below = jnp.sum(jnp.where(ranks <= value, probabilities, 0), axis=1, keepdims=True)
        return (below > 1 - top_p) | (value >= largest) | (top_p >= 1)

    return jnp.where(ranks >= _smallest(is_enough, ranks), scores, -jnp.inf)


def _ranks(values: jax.Array) -> jax.Array:
    """Return int32 in the same order as the float32 `values`, NaN aside."""
    one_zero = jnp.where(values == 0, 0.0, values)  # not + 0.0, which the compiler removes
    bits = jax.lax.bitcast_convert_type(one_zero, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _smallest(holds: Callable[[jax.Array], jax.Array], ranks: jax.Array) -> jax.Array:
    """Return the smallest int32 per row [B, 1] for which `holds` is true; it stays true above, and is at the top."""
    shape = (ranks.shape[0], 1)
    low, high = jnp.full(shape, -(2**31), jnp.int32), jnp.full(shape, 2**31 - 1, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        is_true = holds(middle)
        return jnp.where(is_true, low, middle + 1), jnp.where(is_true, middle, high)

    return jax.lax.fori_loop(0, 32, halve, (low, high))[1]


def _first_largest(scores: jax.Array) -> jax.Array:
    """Return argmax over the last axis, int32, the first of equals; XLA's own takes six times as long on CPU."""
    largest = jnp.max(scores, axis=-1, keepdims=True)
    numbers = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    # The last number stands for a row of NaN, in which nothing is largest.
    return jnp.min(jnp.where(scores == largest, numbers, scores.shape[-1] - 1), axis=-1)

"""Text from a model: prompts of any number and length in batches, on the whole mesh, in a bounded number of programs.

Prompts of one length bucket share a batch, and the bucket alone decides how many slots the cache has; a batch has
always the same number of rows. So what stands beside a prompt changes nothing in its arithmetic, and after one batch
per bucket nothing is compiled any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from panda_jax import sharding
from panda_jax.config import Compute, Model
from panda_jax.errors import InputError
from panda_jax.generation.sampling import Kind, Numbers, Sampling, choose
from panda_jax.model.cached import Cache, CachedLlama, Prepared, prepare

# Prompts and caches are padded to one of these, or to the context where that is shorter than the next.
BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# Tokens that are computed before the host looks whether all rows have stopped.
TOKENS_PER_ROUND = 32
ROWS = 8
NOTHING = -1


@dataclass(frozen=True)
class Generated:
    """What was written after one prompt."""

    ids: list[int]
    """Without the stop id."""
    logprobs: list[float]
    """Of each id: the log-softmax of the model's own logits, float32, before penalty, temperature and cuts."""
    stopped: bool
    """A stop id came; otherwise max_new_tokens ended it."""


class State(NamedTuple):
    """A batch between two tokens."""

    cache: Cache
    seen: jax.Array | None
    """bool [B, V]: tokens of prompt and answer, where the repetition penalty needs them."""
    tokens: jax.Array
    """int32 [B]: chosen last, not in the cache yet."""
    positions: jax.Array
    """int32 [B]: where that token lies in its row."""
    is_active: jax.Array
    """bool [B]"""


class Generator:
    """Generates with one model; raises InputError for prompts that it cannot continue.

    `parameters` are global arrays on `mesh`, named as in model/parameters.py. Rows are spread over data and fsdp, heads
    over tensor. Every process of a run calls it with the same arguments and gets the same results.
    """

    def __init__(
        self, model: Model, parameters: dict[str, jax.Array], compute: Compute, mesh: jax.sharding.Mesh
    ) -> None:
        self.model, self.compute, self.mesh = model, compute, mesh
        self.batch_size = ROWS
        """Rows of a batch, for the caller to set; rounded up to a multiple of the devices that share rows."""
        with jax.set_mesh(mesh):
            self._weights = prepare(parameters, model, compute)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generated]:
        """Return what follows each prompt (ids, BOS included by the caller), in the order of the prompts.

        Greedy tokens and log-probabilities of a prompt do not depend on the others, nor does its draw; with another
        batch_size its sums may round differently.
        """
        self._check(prompts, sampling)
        results: dict[int, Generated] = {}
        rows = self.batch_size
        for batch in self._batches(prompts, rows):
            written = list(self._rounds(prompts, batch, rows, sampling, TOKENS_PER_ROUND))
            ids = np.concatenate([round_ids for round_ids, _ in written], axis=1)
            logprobs = np.concatenate([round_logprobs for _, round_logprobs in written], axis=1)
            for row, number in enumerate(batch):
                results[number] = _without_stop(ids[row], logprobs[row], sampling.stop_ids)
                if not np.isfinite(results[number].logprobs).all():
                    raise InputError(
                        f"prompt {number}: a log-probability is not finite; the weights are broken, or overflow in "
                        f"{self.compute.dtype}: look at them, or try --dtype float32"
                    )
        return [results[number] for number in range(len(prompts))]

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[tuple[int, float]]:
        """Yield each new id with its log-probability once it is known, as generate([prompt]) in batches of 1."""
        self._check([prompt], sampling)
        for ids, logprobs in self._rounds([prompt], [0], 1, sampling, 1):
            for new, logprob in zip(ids[0], logprobs[0], strict=True):
                if new in sampling.stop_ids or new == NOTHING:
                    return
                yield int(new), float(logprob)

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        context, vocab_size, new = self.model.context_length, self.model.vocab_size, sampling.max_new_tokens
        if self.batch_size < 1:
            raise InputError(f"batch_size: {self.batch_size}, expected 1 or more rows")
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise InputError(f"prompt {number} is empty; begin it with BOS")
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                wrong = next(i for i in prompt if not 0 <= i < vocab_size)
                raise InputError(f"prompt {number}: id {wrong}, expected 0 to {vocab_size - 1} (model.vocab_size)")
            if len(prompt) + new > context:
                raise InputError(
                    f"prompt {number}: {len(prompt)} ids and max_new_tokens {new} exceed the model's context of "
                    f"{context}; shorten the prompt or generate at most {max(context - len(prompt), 0)}"
                )
        for stop in sampling.stop_ids:
            if not 0 <= stop < vocab_size:
                raise InputError(f"stop_ids: id {stop}, expected 0 to {vocab_size - 1} (model.vocab_size)")

    def _batches(self, prompts: Sequence[Sequence[int]], rows: int) -> Iterator[list[int]]:
        """Yield numbers of prompts of one bucket, the shortest first, `rows` at a time."""
        by_bucket: dict[int, list[int]] = {}
        for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number])):
            by_bucket.setdefault(self._bucket(len(prompts[number])), []).append(number)
        rows = self._rounded(rows)
        for numbers in by_bucket.values():
            yield from (numbers[first : first + rows] for first in range(0, len(numbers), rows))

    def _rounds(
        self, prompts: Sequence[Sequence[int]], batch: list[int], rows: int, sampling: Sampling, per_round: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ids and log-probabilities [rows, new]; ids are NOTHING after a stop id and in rows without a prompt."""
        columns = self._bucket(max(len(prompts[number]) for number in batch))
        capacity = self._bucket(min(columns + sampling.max_new_tokens, self.model.context_length))
        tokens, lengths, numbers = _arranged(prompts, batch, self._rounded(rows), columns)
        kind = sampling.kind
        with jax.set_mesh(self.mesh):
            placed = self._placed({"tokens": tokens, "lengths": lengths, "numbers": numbers})
            settings = sampling.numbers(self.model.vocab_size)
            keys = _row_keys(placed["numbers"], np.uint32(sampling.seed))
            logits, cache = _prefill(
                self._weights, placed["tokens"], placed["lengths"], self.model, self.compute, capacity
            )
            state, first = _begin(logits, cache, placed, keys, settings, kind)
        yield first
        left = sampling.max_new_tokens - 1
        while left:
            with jax.set_mesh(self.mesh):
                if not np.asarray(_any_active(state)):
                    return
                limit = min(per_round, left)
                state, new_ids, new_logprobs = _advance(
                    self._weights, state, keys, settings, np.int32(limit), self.model, self.compute, kind
                )
            yield np.asarray(new_ids)[:, :limit], np.asarray(new_logprobs)[:, :limit]
            left -= limit

    def _bucket(self, length: int) -> int:
        context = self.model.context_length
        return min(next((bucket for bucket in BUCKETS if bucket >= length), context), context)

    def _rounded(self, rows: int) -> int:
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-rows // shards) * shards

    def _placed(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Return the rows spread over data and fsdp; each process places those of its devices."""
        count = len(rows["lengths"])
        mine = sharding.local_rows(self.mesh, count)
        return sharding.to_global({name: values[mine] for name, values in rows.items()}, mine, self.mesh, count)


def decoding(compute: Compute, mesh: jax.sharding.Mesh) -> Compute:
    """Return `compute` with the layer loop that decodes best on these devices.

    On CPUs slices of stacked layers cost a third of the time; elsewhere one program for all layers compiles sooner.
    """
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return replace(compute, layer_loop="unroll" if is_cpu else "scan")


def num_programs() -> int:
    """Return how many programs this process has compiled for generation so far."""
    programs: tuple[Any, ...] = (_prefill, _begin, _advance)
    return sum(program._cache_size() for program in programs)


def _arranged(
    prompts: Sequence[Sequence[int]], batch: list[int], rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens int32 [rows, columns], lengths and numbers int32 [rows]; rows without a prompt have number -1."""
    tokens = np.zeros((rows, columns), np.int32)
    lengths, numbers = np.ones(rows, np.int32), np.full(rows, NOTHING, np.int32)
    for row, number in enumerate(batch):
        lengths[row], numbers[row] = len(prompts[number]), number
        tokens[row, : lengths[row]] = prompts[number]
    return tokens, lengths, numbers


def _without_stop(ids: np.ndarray, logprobs: np.ndarray, stop_ids: tuple[int, ...]) -> Generated:
    num_ids = int(np.count_nonzero(ids != NOTHING))
    stopped = bool(num_ids) and int(ids[num_ids - 1]) in stop_ids
    num_ids -= stopped
    return Generated(ids[:num_ids].tolist(), logprobs[:num_ids].tolist(), stopped)


# ---- the compiled programs ------------------------------------------------------------------------------------------


@jax.jit
def _row_keys(numbers: jax.Array, seed: jax.Array) -> jax.Array:
    """Return one key per row, by the number of its prompt: whatever batch it is in, its draws are the same."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers.astype(jnp.uint32))


@partial(jax.jit, static_argnames=("model", "compute", "capacity"))
def _prefill(
    weights: Prepared, tokens: jax.Array, lengths: jax.Array, model: Model, compute: Compute, capacity: int
) -> tuple[jax.Array, Cache]:
    return CachedLlama(weights, model, compute).prefill(tokens, lengths, capacity)


@partial(jax.jit, static_argnames=("kind",), donate_argnames=("cache",))
def _begin(
    logits: jax.Array, cache: Cache, placed: dict[str, jax.Array], keys: jax.Array, settings: Numbers, kind: Kind
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """Return the state behind the first token of each row, and that token with its log-probability, [B, 1]."""
    tokens, lengths = placed["tokens"], placed["lengths"]
    seen = None
    if kind.is_penalised:
        is_real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        seen = jax.vmap(lambda row, real: jnp.zeros(logits.shape[1], bool).at[row].max(real))(tokens, is_real)
    ids, logprobs = choose(logits, seen, keys, lengths, kind, settings)
    is_active = placed["numbers"] >= 0
    written = jnp.where(is_active, ids, NOTHING)
    state = State(cache, _with(seen, ids), ids, lengths, is_active & ~settings.is_stop[ids])
    return state, (_everywhere(written[:, None]), _everywhere(logprobs[:, None]))


@partial(jax.jit, static_argnames=("model", "compute", "kind"), donate_argnames=("state",))
def _advance(
    weights: Prepared,
    state: State,
    keys: jax.Array,
    settings: Numbers,
    limit: jax.Array,
    model: Model,
    compute: Compute,
    kind: Kind,
) -> tuple[State, jax.Array, jax.Array]:
    """Return the state at most `limit` tokens later, and those tokens with their log-probabilities, [B, 32] each.

    It ends early when every row has stopped.
    """
    network = CachedLlama(weights, model, compute)
    shape = (state.tokens.shape[0], TOKENS_PER_ROUND)

    def is_unfinished(carry) -> jax.Array:
        count, state, _, _ = carry
        return (count < limit) & jnp.any(state.is_active)

    def write(carry):
        count, state, all_ids, all_logprobs = carry
        logits, cache = network.step(state.tokens, state.positions, state.cache)
        # A stopped row stays where it is: it writes its last token into the same slot again.
        positions = state.positions + state.is_active
        ids, logprobs = choose(logits, state.seen, keys, positions, kind, settings)
        ids = jnp.where(state.is_active, ids, state.tokens)
        all_ids = all_ids.at[:, count].set(jnp.where(state.is_active, ids, NOTHING))
        all_logprobs = all_logprobs.at[:, count].set(logprobs)
        is_active = state.is_active & ~settings.is_stop[ids]
        return count + 1, State(cache, _with(state.seen, ids), ids, positions, is_active), all_ids, all_logprobs

    empty = (jnp.int32(0), state, jnp.full(shape, NOTHING, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, state, ids, logprobs = jax.lax.while_loop(is_unfinished, write, empty)
    return state, _everywhere(ids), _everywhere(logprobs)


@jax.jit
def _any_active(state: State) -> jax.Array:
    return _everywhere(jnp.any(state.is_active))


def _with(seen: jax.Array | None, ids: jax.Array) -> jax.Array | None:
    """Return `seen` [B, V] with one more token per row."""
    if seen is None:
        return None
    return seen | (jnp.arange(seen.shape[1]) == ids[:, None])


def _everywhere(x: jax.Array) -> jax.Array:
    """Pin x whole to every device, so that every process can read it."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec())

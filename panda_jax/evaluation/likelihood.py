"""The log-probability of every option of a question, with lm-evaluation-harness's semantics (PROTOCOLS.md §5.3).

    B rows, T positions of a row, G groups of rows (one per shard of the mesh), S sites, C sites of a chunk
    D width, V vocab, W options of a row

A site is a position whose next token is scored. Rows are built in rows.py; here they are batched, computed and read.
Only sites reach the output layer, C at a time, so logits [B, T, V] never exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from panda_jax.config import Compute, Model
from panda_jax.errors import InputError
from panda_jax.evaluation.rows import (
    NO_OPTION,
    OPTIONS_OF_ROW,
    Batch,
    Option,
    Request,
    Row,
    batch_of,
    encode,
    lengths_for,
    num_dropped,
    rows_of,
    shortest_length,
)
from panda_jax.model.llama import Llama
from panda_jax.model.parameters import Parameters
from panda_jax.sharding import BATCH_SPEC, LOGICAL_AXES, constrain
from panda_jax.text.tokenizer import Tokenizer


class Portions(NamedTuple):
    """How much a device computes at a time."""

    batch_tokens: int
    """Positions of its part of a batch, unless one row is longer."""
    chunk_sites: int
    """C."""


# CPUs are fastest while activations stay in their cache, and every site of a chunk costs, used or not.
PORTIONS = {"cpu": Portions(1024, 32), "gpu": Portions(32768, 512), "tpu": Portions(32768, 512)}


@dataclass(frozen=True)
class ChoiceScores:
    """What the model gives the options of one question."""

    loglikelihoods: tuple[float, ...]
    """Sum of the natural log-probabilities of each continuation's tokens."""
    is_greedy: tuple[bool, ...]
    """Whether each continuation's every token is the most likely one at its place."""
    num_truncated: int
    """Options whose context lost tokens on its left."""


class Scorer:
    """Scores questions with one model on one mesh; programs are compiled once per row length."""

    def __init__(
        self,
        model: Model,
        parameters: dict[str, jax.Array],
        compute: Compute,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
    ) -> None:
        """`parameters` are global arrays on `mesh`, named as by model/parameters.py."""
        self._model, self._mesh, self._tokenizer = model, mesh, tokenizer
        self.parameters = parameters
        self._num_groups = prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"][1] or ())
        self._sharding = NamedSharding(mesh, BATCH_SPEC)
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._dtype = compute.dtype
        self._portions = PORTIONS[mesh.devices.flat[0].platform]
        settings = replace(compute, remat="none")
        program = partial(
            _score, Parameters(model), settings, min(self._portions.chunk_sites, compute.loss_chunk_tokens)
        )
        self._program = jax.jit(program, out_shardings=self._whole)

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, ChoiceScores]]:
        """Yield (index, scores) of every request as its batch is done, longest first.

        Raises InputError for a continuation without a token of its own or longer than the model's context. In a run
        of several processes every process gives the same requests and receives every score.
        """
        return self.score_tokens(encode(requests, self._tokenizer))

    def score_tokens(self, questions: Sequence[Sequence[Option]]) -> Iterator[tuple[int, ChoiceScores]]:
        """Do the same for options that are tokens already."""
        context_length = self._model.context_length
        rows, waiting = [], {}
        for number, options in enumerate(questions):
            own = list(rows_of(number, options, context_length))
            rows += own
            waiting[number] = len(own)
        totals = {
            number: (np.zeros(len(options)), np.ones(len(options), bool)) for number, options in enumerate(questions)
        }
        for batch, log_probs, is_best in self._compute(rows):
            _add(batch, log_probs, is_best, totals)
            for row in batch.rows:
                waiting[row.question] -= 1
                if waiting[row.question] == 0:
                    options = questions[row.question]
                    sums, greedy = totals.pop(row.question)
                    if not np.isfinite(sums).all():
                        raise InputError(
                            f"request {row.question}: log-probabilities {sums.tolist()}, expected finite numbers; the "
                            f"weights are broken, or overflow in {self._dtype}: look at them, or try --dtype float32"
                        )
                    truncated = sum(num_dropped(option, context_length) > 0 for option in options)
                    yield row.question, ChoiceScores(tuple(sums.tolist()), tuple(greedy.tolist()), truncated)

    def _compute(self, rows: list[Row]) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
        """Yield every batch with its log-probabilities and hits [G, S, W]; the next one is computed meanwhile."""
        running = None
        for batch in self._batches(rows):
            started = (batch, *self._start(batch))
            if running is not None:
                yield running[0], np.asarray(running[1]), np.asarray(running[2])
            running = started
        if running is not None:
            yield running[0], np.asarray(running[1]), np.asarray(running[2])

    def _batches(self, rows: list[Row]) -> Iterator[Batch]:
        by_length: dict[int, list[Row]] = {length: [] for length in lengths_for(self._model.context_length)}
        for row in rows:
            by_length[shortest_length(len(row.tokens), self._model.context_length)].append(row)
        for length, own in sorted(by_length.items(), reverse=True):
            size = self._num_groups * max(1, self._portions.batch_tokens // length)
            for start in range(0, len(own), size):
                yield batch_of(own[start : start + size], length, size, self._num_groups)

    def _start(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Set a batch going; the arrays it returns hold the same on every process."""
        arrays = {
            name: jax.make_array_from_callback(array.shape, self._sharding, array.__getitem__)
            for name, array in batch.arrays.items()
        }
        with jax.set_mesh(self._mesh):
            return self._program(self.parameters, arrays, np.int32(batch.num_sites))


def _add(batch: Batch, log_probs: np.ndarray, is_best: np.ndarray, totals: dict) -> None:
    """Add what a batch gave to the sums of its questions, in float64."""
    for group, owners in enumerate(batch.owners):
        sites, slots = np.nonzero(owners[..., 1] != NO_OPTION)
        for site, slot in zip(sites.tolist(), slots.tolist(), strict=True):
            number, option = owners[site, slot]
            sums, greedy = totals[batch.rows[number].question]
            sums[option] += log_probs[group, site, slot]
            greedy[option] &= is_best[group, site, slot]


def _score(parameters: Parameters, compute: Compute, chunk: int, values: dict, batch: dict, num_sites: jax.Array):
    """Return log-probabilities, float32, and whether nothing is likelier, bool: both [G, S, W], 0 beyond `num_sites`.

    How many chunks are computed depends on the data, the shapes do not.
    """
    model = parameters.module(values)
    hidden = model.hidden(batch["tokens"], batch["segments"], batch["positions"], compute, batch["branches"])
    groups, room = batch["sites"].shape
    hidden = constrain(hidden.reshape(groups, room, -1), ("batch", None, "embed"))
    chunk = min(chunk, room)

    def step(number: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Where `chunk` does not divide S, the last chunk starts early and computes some sites once more.
        start = jnp.minimum(number * chunk, room - chunk)
        sites, targets = (jax.lax.dynamic_slice_in_dim(batch[name], start, chunk, 1) for name in ("sites", "targets"))
        found = _read(model, jnp.take_along_axis(hidden, sites[..., None], axis=1), targets)
        log_probs, is_best = (
            jax.lax.dynamic_update_slice_in_dim(old, new, start, 1) for old, new in zip(results, found, strict=True)
        )
        return log_probs, is_best

    shape = (groups, room, OPTIONS_OF_ROW)
    log_probs, is_best = (constrain(jnp.zeros(shape, dtype), ("batch", None, None)) for dtype in (jnp.float32, bool))
    return jax.lax.fori_loop(0, (num_sites + chunk - 1) // chunk, step, (log_probs, is_best))


def _read(model: Llama, states: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the targets' log-probabilities and whether each is the most likely token, [G, C, W], of states [G, C, D].

    Of several tokens equally likely the one of the lowest id counts as the most likely.
    """
    logits = constrain(model.logits(states), ("batch", None, "vocab"))
    largest = jnp.max(logits, axis=2, keepdims=True)
    # argmax, in one pass with the sum below; XLA's own takes as long as the product with the table does.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    best = jnp.min(jnp.where(logits == largest, ids, logits.shape[2]), axis=2, keepdims=True)
    normalizer = largest + jnp.log(jnp.sum(jnp.exp(logits - largest), axis=2, keepdims=True))
    return jnp.take_along_axis(logits, targets, axis=2) - normalizer, targets == best

"""Questions as rows of tokens: what is put before the model, where it is read, and which option a number belongs to.

The options of a question share the row of their context. With the context [1, 5, 6], whose last token predicts the
first one of every option, and the options [7, 8, 9] and [4], one row reads

    tokens     1 5 6 7 8     the last token of an option predicts nothing that is scored, so it stays out
    positions  0 1 2 3 4
    branches   0 0 0 1 1     0 is what all share; 1, 2, ... do not see each other (model/attention.py)
    sites          2 3 4     positions whose next token is scored
    targets        7 8 9
                   4         up to OPTIONS_OF_ROW tokens are scored at a site

Token rules are lm-evaluation-harness's (PROTOCOLS.md §5.3), so its scores can be compared with ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer

# Options behind one prefix, at most: the number of targets that a site has room for. Benchmarks have 2 to 5.
OPTIONS_OF_ROW = 8
# Row lengths, each compiled once: as many as keep padding below a sixth of a benchmark, which costs less than more.
LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
NO_OPTION = -1


class Request(Protocol):
    """A context and what may follow it; evaluation/prompts.py has the benchmarks'."""

    @property
    def context(self) -> str: ...

    @property
    def continuations(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Option:
    """A continuation behind its context, as token ids."""

    context: list[int]
    """Not empty."""
    continuation: list[int]
    """Not empty; what is scored."""


@dataclass(frozen=True)
class Row:
    """Some options of one question, behind what they share."""

    question: int
    """Number of the question in the list that was asked."""
    tokens: np.ndarray
    """int32 [T]; `positions` and `branches` as well."""
    positions: np.ndarray
    branches: np.ndarray
    sites: np.ndarray
    """int32 [S], positions in the row."""
    targets: np.ndarray
    """int32 [S, OPTIONS_OF_ROW], token ids; 0 where there is none."""
    options: np.ndarray
    """int32 [S, OPTIONS_OF_ROW]: which option of the question a target belongs to; NO_OPTION where there is none."""


def encode(requests: Sequence[Request], tokenizer: Tokenizer) -> list[list[Option]]:
    """Return the options of each request.

    White space at the end of a context belongs to the continuations. An option's tokens are those of context and
    continuation together, behind BOS, from where the context's own tokens end; an empty context is BOS alone. Raises
    InputError for a continuation that leaves no token of its own.
    """
    moved = []
    for request in requests:
        context = request.context.rstrip()
        space = request.context[len(context) :]
        moved.append((context, [space + continuation for continuation in request.continuations]))
    texts = [text for context, endings in moved for text in (context, *(context + ending for ending in endings))]
    encoded = iter(tokenizer.encode_batch(texts))
    questions = []
    for context, endings in moved:
        prefix = [tokenizer.bos_id, *next(encoded).tolist()]
        options = []
        for ending in endings:
            continuation = [tokenizer.bos_id, *next(encoded).tolist()][len(prefix) :]
            if not continuation:
                raise InputError(
                    f"the continuation {ending!r} behind {context[-20:]!r} has no token of its own, nothing can be "
                    f"scored; change the prompt so that the two do not merge into one piece"
                )
            options.append(Option(prefix, continuation))
        questions.append(options)
    return questions


def num_dropped(option: Option, context_length: int) -> int:
    """Return how many tokens the context loses on its left: all but the last token must fit the model.

    Raises InputError for a continuation that alone is longer than the model's context.
    """
    if len(option.continuation) > context_length:
        raise InputError(
            f"a continuation of {len(option.continuation)} tokens does not fit the model's context of "
            f"{context_length} (model.context_length); shorten it"
        )
    return max(0, len(option.context) + len(option.continuation) - (context_length + 1))


def rows_of(question: int, options: Sequence[Option], context_length: int) -> Iterator[Row]:
    """Yield the rows of one question.

    Options share a row when they keep the same tokens of the same context, and while the row is no longer than
    the longest that is compiled (lengths_for).
    """
    longest = lengths_for(context_length)[-1]
    shared: dict[tuple[int, ...], list[int]] = {}
    for index, option in enumerate(options):
        shared.setdefault(tuple(option.context[num_dropped(option, context_length) :]), []).append(index)
    for prefix, indices in shared.items():
        taken: list[int] = []
        length = len(prefix)
        for index in indices:
            more = len(options[index].continuation) - 1
            if taken and (len(taken) == OPTIONS_OF_ROW or length + more > longest):
                yield _row(question, prefix, {i: options[i].continuation for i in taken})
                taken, length = [], len(prefix)
            taken.append(index)
            length += more
        yield _row(question, prefix, {i: options[i].continuation for i in taken})


def _row(question: int, prefix: tuple[int, ...], endings: dict[int, list[int]]) -> Row:
    """Return one row; `endings` maps the number of an option to its tokens."""
    start = len(prefix)
    tokens, positions, branches = list(prefix), list(range(start)), [0] * start
    sites, targets, options = [start - 1], [[0] * OPTIONS_OF_ROW], [[NO_OPTION] * OPTIONS_OF_ROW]
    for branch, (index, ending) in enumerate(endings.items(), 1):
        targets[0][branch - 1], options[0][branch - 1] = ending[0], index
        for offset, target in enumerate(ending[1:]):
            sites.append(len(tokens))
            tokens.append(ending[offset])
            positions.append(start + offset)
            branches.append(branch)
            targets.append([target] + [0] * (OPTIONS_OF_ROW - 1))
            options.append([index] + [NO_OPTION] * (OPTIONS_OF_ROW - 1))
    placed = (np.asarray(values, np.int32) for values in (tokens, positions, branches))
    read = (np.asarray(values, np.int32) for values in (sites, targets, options))
    return Row(question, *placed, *read)


def lengths_for(context_length: int) -> tuple[int, ...]:
    """Return the row lengths that a model is compiled for, rising; the last one holds any single option."""
    fitting = [length for length in LENGTHS if length < context_length]
    return (*fitting, context_length + context_length % 2)


def shortest_length(num_tokens: int, context_length: int) -> int:
    """Return the length of the shortest compiled row that holds `num_tokens`."""
    return next(length for length in lengths_for(context_length) if length >= num_tokens)


@dataclass(frozen=True)
class Batch:
    """Rows of one length, as arrays."""

    rows: list[Row]
    """Row i of the arrays; the arrays' further rows are padding."""
    arrays: dict[str, np.ndarray]
    """int32: tokens, segments, positions, branches [B, T]; sites [G, S] into the T * B/G positions of a group of
    rows, and targets [G, S, OPTIONS_OF_ROW], where the groups are the mesh's shards of the rows."""
    num_sites: int
    """Of the group that has most."""
    owners: list[np.ndarray]
    """Per group: int64 [used sites, OPTIONS_OF_ROW, 2], row and option of every target; NO_OPTION as in Row."""


def batch_of(rows: list[Row], length: int, batch_size: int, num_groups: int) -> Batch:
    """Return the arrays of up to `batch_size` rows of up to `length` tokens, dealt to `num_groups` shards in turn.

    A site array has room for every position of its shard, so its shape does not depend on the rows.
    """
    per_group = batch_size // num_groups
    room = per_group * length
    arrays = {
        name: np.zeros((batch_size, length), np.int32) for name in ("tokens", "segments", "positions", "branches")
    }
    sites = np.zeros((num_groups, room), np.int32)
    targets = np.zeros((num_groups, room, OPTIONS_OF_ROW), np.int32)
    owners: list[list[np.ndarray]] = [[] for _ in range(num_groups)]
    used = [0] * num_groups
    for number, row in enumerate(rows):
        place, group = divmod(number, num_groups)
        index, end = group * per_group + place, len(row.tokens)
        arrays["tokens"][index, :end] = row.tokens
        arrays["segments"][index, :end] = 1
        arrays["positions"][index, :end] = row.positions
        arrays["branches"][index, :end] = row.branches
        start, stop = used[group], used[group] + len(row.sites)
        sites[group, start:stop] = place * length + row.sites
        targets[group, start:stop] = row.targets
        owners[group].append(np.stack([np.full_like(row.options, number), row.options], axis=-1))
        used[group] = stop
    empty = np.zeros((0, OPTIONS_OF_ROW, 2), np.int32)
    arrays |= {"sites": sites, "targets": targets}
    return Batch(rows, arrays, max(used), [np.concatenate([empty, *parts]) for parts in owners])

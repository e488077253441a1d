"""The mixture: which windows are set aside, how often each of the others is used, and in which order.

Every draw comes from a Philox stream named after its purpose, source and pass. Raw Philox words are the same in all
versions of numpy, and adding a source leaves the draws of the others as they were.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from panda_jax.config import Config, Source
from panda_jax.errors import InputError


class Windows(Protocol):
    """What planning asks of a token cache: the lengths, and names for what they belong to."""

    @property
    def source(self) -> str:
        """Label of the source."""
        ...

    @property
    def fingerprint(self) -> str:
        """Content address of the tokens."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """int32 [windows]: positions each window occupies in a row."""
        ...

    def record_id(self, i: int) -> str:
        """Return the name of the record that window i came from."""
        ...


def draws(count: int, *name: object) -> np.ndarray:
    """Return uint64 [count]: raw words of the Philox4x64-10 stream whose key is the SHA-256 of the name's parts.

    The parts are joined by line feeds; the key is the first 16 bytes of the hash, little-endian; the first block of
    four words has the counter 1. (doi:10.1145/2063384.2063405.)
    """
    key = hashlib.sha256("\n".join(str(part) for part in name).encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)


def permutation(count: int, *name: object) -> np.ndarray:
    """Return int64 [count]: a permutation of range(count), the stable argsort of `draws`.

    Not Generator.permutation, whose result may change between versions of numpy.
    """
    return np.argsort(draws(count, *name), kind="stable")


def held_out_windows(source: Source, cache: Windows, seed: int, key: str) -> np.ndarray:
    """Return bool [windows]: those set aside. All windows of a drawn record are, so that no part of it is trained on.

    Windows of one record are neighbours in the cache and share its record id. Only a record's first window can draw
    it, so that long records are not favoured.
    """
    aside = np.zeros(len(cache.lengths), bool)
    if source.held_out == "all":
        return ~aside
    left = source.held_out
    for first in permutation(len(aside), seed, "held_out", source.label).tolist() if left else []:
        record = cache.record_id(first)
        if first and cache.record_id(first - 1) == record:
            continue
        stop = first + 1
        while stop < len(aside) and cache.record_id(stop) == record:
            stop += 1
        aside[first:stop] = True
        left -= 1
        if not left:
            break
    if aside.all():
        raise InputError(
            f"{key}.held_out ({source.label}): {source.held_out} of {source.held_out - left} records set aside, "
            "expected at least one left to train on; lower it, or write `held_out: all` if that is meant"
        )
    return aside


@dataclass(frozen=True, eq=False)
class Stream:
    """One source's training windows in a seeded order, repeated for ever; pass p reads from cuts[p] to cuts[p + 1].

    Reading on where the last pass stopped keeps the uses of any two windows within one of each other, however many
    passes there are: with `epochs: 0.5`, two passes use each window exactly once.
    """

    label: str
    windows: np.ndarray
    order: np.ndarray
    cuts: list[int]

    def uses(self, number: int) -> np.ndarray:
        """Return int64: the windows of a pass, all first uses in the source's order, then all second uses, …"""
        start, size = self.cuts[number], self.cuts[number + 1] - self.cuts[number]
        whole, more = divmod(size, len(self.windows))
        counts = np.full(len(self.windows), whole)
        if more:
            counts[self.order[np.arange(start, start + more) % len(self.windows)]] += 1
        return np.concatenate([self.windows[:0]] + [self.windows[counts > copy] for copy in range(counts.max())])


def streams_of(config: Config, caches: Sequence[Windows], held: list[np.ndarray]) -> list[Stream | None]:
    """Return each source's stream; None for a source that is only held out, or switched off by `epochs: 0`."""
    sources, passes = config.data.sources, range(config.train.epochs + 1)
    used = [source.held_out != "all" and source.epochs != 0 for source in sources]
    weights = sum(source.weight or 0 for source, is_used in zip(sources, used, strict=True) if is_used)
    streams: list[Stream | None] = []
    for i, (source, cache) in enumerate(zip(sources, caches, strict=True)):
        if not used[i]:
            streams.append(None)
            continue
        windows = np.flatnonzero(~held[i])
        order = permutation(len(windows), config.seed, "repeat", source.label)
        if source.weight is None:
            epochs = 1 if source.epochs is None else source.epochs
            cuts = [math.floor(p * epochs * len(windows) + 0.5) for p in passes]
            asked = f"epochs {epochs:g}"
        else:
            tokens = source.weight / weights * (config.data.total_tokens or 0)
            ends = np.cumsum(cache.lengths[windows[order]], dtype=np.int64)
            cuts = [_nearest(ends, round(p * tokens)) for p in passes]
            asked = f"{tokens:.0f} tokens"
        if not cuts[-1]:
            raise InputError(
                f"data.sources[{i}] ({source.label}): {asked} of {len(windows)} windows uses none of them in "
                f"{config.train.epochs} passes, expected at least one; raise it or take the source out"
            )
        streams.append(Stream(source.label, windows, order, cuts))
    return streams


def _nearest(ends: np.ndarray, tokens: int) -> int:
    """Return how many windows of an endless stream come nearest to `tokens`; `ends` are one round's running totals."""
    rounds, rest = divmod(tokens, int(ends[-1]))
    below = int(np.searchsorted(ends, rest, side="right"))
    before = int(ends[below - 1]) if below else 0
    return rounds * len(ends) + below + (rest - before > int(ends[below]) - rest)


def pass_items(streams: list[Stream | None], first_item: np.ndarray, config: Config, number: int) -> np.ndarray:
    """Return int64 [uses]: the items of a pass in reading order; shuffled over all sources if data.shuffle says so."""
    items, keys = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for stream, first in zip(streams, first_item[:-1], strict=True):
        if stream is not None:
            items.append(stream.uses(number) + first)
            keys.append(draws(len(items[-1]), config.seed, "order", number, stream.label))
    joined = np.concatenate(items)
    return joined[np.argsort(np.concatenate(keys), kind="stable")] if config.data.shuffle else joined

"""What a corpus reader yields: Examples, ordered segments of text that are trained or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from panda_jax.text.turns import Segment


class Example(NamedTuple):
    """One training record.

    `segments` are tokenised one by one and their ids joined, so the loss mask is exact by construction:
    [("问：一加一？", untrained), ("二。", trained)] trains on the ids of "二。" and on EOS, and on nothing else.
    """

    segments: tuple[Segment, ...]


class Skip(NamedTuple):
    """A record that a reader or the tokeniser left out, and why (a short reason, counted in the data report)."""

    reason: str


class Examples:
    """What the records of a block became: examples, as columns, and Skips. Iterates over (record number, either).

    Columns, because a block holds some ten thousand short records: an object for each, and for each segment, would take
    about as long as it takes to encode them.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        """Of every segment, one example after the other."""
        self.trained: list[bool] = []
        """Whether each segment is trained."""
        self.ends: list[int] = []
        """Where the segments of each example end in `texts`."""
        self.records: list[int] = []
        """Number of the record that each example came from."""
        self.skipped: list[tuple[int, int, Skip]] = []
        """(examples before it, number of its record, Skip) of what was left out."""

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """Return the columns of `examples`, as if each came from a record of its own."""
        columns = cls()
        for number, example in enumerate(examples):
            columns.texts += [segment.text for segment in example.segments]
            columns.trained += [segment.trained for segment in example.segments]
            columns.end(number)
        return columns

    def end(self, record: int) -> None:
        """End an example, whose segments were just appended to `texts` and `trained`."""
        self.ends.append(len(self.texts))
        self.records.append(record)

    def skip(self, record: int, skip: Skip) -> None:
        """Note that a record, or a part of it, was left out."""
        self.skipped.append((len(self.ends), record, skip))

    def __len__(self) -> int:
        """Return the number of examples, Skips not counted."""
        return len(self.ends)

    def __getitem__(self, index: int) -> Example:
        """Return example number `index`, from 0."""
        segments = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return Example(tuple(map(Segment, self.texts[segments], self.trained[segments])))

    def __iter__(self) -> Iterator[tuple[int, Example | Skip]]:
        """Yield (number of the record, Example or Skip) in the order of the records."""
        done = 0
        for position, record, skip in [*self.skipped, (len(self), 0, None)]:
            yield from ((self.records[i], self[i]) for i in range(done, position))
            if skip:
                yield record, skip
            done = position

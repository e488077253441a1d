"""A conversation before rendering (turns) and after it (segments)."""

from __future__ import annotations

from typing import NamedTuple


class Turn(NamedTuple):
    """One question and its answer, as a corpus gives them: no template wording is in it yet.

    Language modelling is one turn with only an `output`. For a prompt, the last turn's `output` is not looked at.
    """

    instruction: str
    input: str
    output: str


class Segment(NamedTuple):
    """A piece of text that is tokenised on its own.

    `trained` text is what the model learns to write: an end-of-sequence id follows it and is learnt as well.
    """

    text: str
    trained: bool

"""Reading one field of a raw record, and saying what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from panda_jax.data.records import Skip
from panda_jax.errors import InputError
from panda_jax.text.turns import Turn

# What a corpus function yields: a conversation, or why there is none.
Reading = Iterator[tuple[Turn, ...] | Skip]

_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


@dataclass(slots=True)
class Context:
    """What a corpus function may know besides its record. One serves a whole block: only its number moves on."""

    number: int
    """Number of the record within the source, from 0: what stands in for chance."""
    instruction: str
    """Source.instruction, or the corpus's own."""
    direction: str
    """Source.direction."""


def kind(value: Any) -> str:
    """Return the JSON type of a parsed value in words."""
    return "null" if value is None else _KINDS[type(value)]


def text(record: Mapping[str, Any], key: str) -> str:
    """Return a field as it stands, or "" where it is absent or null; raises InputError when it is not a string."""
    value = record.get(key)
    if value is None or isinstance(value, str):
        return value or ""
    raise InputError(f"field {key!r}: expected a string, found {kind(value)}")


def is_blank(*texts: str) -> bool:
    """Whether all of the texts are empty or white space."""
    for part in texts:
        if part and not part.isspace():
            return False
    return True

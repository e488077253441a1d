"""Weight deltas as Panda and FastChat published them, one tensor at a time, under our names. No file is touched here.

    panda     embed and lm_head in full; of every other tensor target - base, in float32
    fastchat  target - base of every tensor, in float16; rows by which a vocabulary has grown count as 0 in the base

Both are applied by one rule: base and delta as float32, added, rounded once to the dtype that is asked for. For float16
that is FastChat's own float16 sum too, because float32 has more than twice float16's bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convert.delta_codec import FLOAT16, FLOAT32, cast, flat, in_order, parts
from panda_jax.errors import InputError

VOCABULARY = ("embed", "lm_head")
RULES = {"panda": FLOAT32, "fastchat": FLOAT16}
"""Published form -> dtype in which its deltas are computed and stored."""


@dataclass(frozen=True)
class Evidence:
    """What the numbers of a published delta say about the base, as its files have no hashes; add up those of parts."""

    inexact: int = 0
    """Elements whose float32 sum the dtype cannot hold. Under Panda's rule none, given the right base and the dtype of
    the target; FastChat's float16 deltas are rounded, so that there the number says nothing."""
    delta_squares: float = 0.0
    base_squares: float = 0.0
    """Sums of squares over the elements that were added, so not over the tensors that are published in full."""

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(
            self.inexact + other.inexact,
            self.delta_squares + other.delta_squares,
            self.base_squares + other.base_squares,
        )

    @property
    def rms_ratio(self) -> float:
        """RMS of the delta over RMS of the base: far below 1 for the right base, 0.5 and more for a wrong one."""
        if self.delta_squares == 0:
            return 0.0
        return (self.delta_squares / self.base_squares) ** 0.5 if self.base_squares else float("inf")


def make_published(rule: str, name: str, base: np.ndarray | None, target: np.ndarray, num_threads: int) -> np.ndarray:
    """Return the delta of tensor `name` under a rule of RULES, in that rule's dtype and the target's shape.

    `base` may be None for what the rule stores in full. Raises InputError for shapes that the rule cannot subtract.
    """
    dtype, new = RULES[rule], flat(target)
    old = _needed_base(rule, name, base, target.shape)
    delta = np.empty(target.shape, dtype)
    flat_delta = delta.reshape(-1)

    def subtract(part: slice) -> None:
        flat_delta[part] = cast(new[part], dtype)
        if old is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                flat_delta[part] -= _padded(old, part, dtype)

    for _ in in_order(subtract, parts(target.size), num_threads):
        pass
    return delta


def apply_published(
    rule: str, name: str, base: np.ndarray | None, delta: np.ndarray, dtype: np.dtype, num_threads: int
) -> tuple[np.ndarray, Evidence]:
    """Return the target of tensor `name` in `dtype`, and what its numbers say about the base.

    `base` may be None for what the rule stores in full. Raises InputError for shapes that the rule cannot add.
    """
    old, difference = _needed_base(rule, name, base, delta.shape), flat(delta)
    target = np.empty(delta.shape, dtype)
    flat_target = target.reshape(-1)

    def add(part: slice) -> Evidence:
        exact, squares = cast(difference[part], FLOAT32), (0.0, 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            if old is not None:
                addend = _padded(old, part, FLOAT32)
                squares = (_sum_of_squares(exact), _sum_of_squares(addend))
                exact = addend + exact
            rounded = cast(exact, dtype)
            flat_target[part] = rounded
            # NaN is unlike itself and counts: no model has one.
            return Evidence(int(np.count_nonzero(cast(rounded, FLOAT32) != exact)), *squares)

    return target, sum(in_order(add, parts(delta.size), num_threads), Evidence())


def _needed_base(rule: str, name: str, base: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the base as one axis, or None where the rule stores the tensor in full."""
    if rule == "panda" and name in VOCABULARY:
        return None
    found = None if base is None else base.shape
    may_grow = rule == "fastchat" and name in VOCABULARY
    if base is None or (found != shape and not (may_grow and base.shape[1:] == shape[1:] and len(base) < shape[0])):
        raise InputError(f"{name}: {found or 'absent'} in the base, {shape} beside it; {rule} needs equal shapes: "
                         f"take the base that the delta was made from")  # fmt: skip
    return flat(base)


def _padded(base: np.ndarray, part: slice, dtype: np.dtype) -> np.ndarray:
    """Return elements of a flat base; beyond its end it is 0."""
    found = cast(base[part], dtype)
    missing = part.stop - part.start - found.size
    return np.concatenate([found, np.zeros(missing, dtype)]) if missing else found


def _sum_of_squares(array: np.ndarray) -> float:
    return float(np.square(array, dtype=np.float64).sum())

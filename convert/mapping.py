"""The one table of names: our parameter <-> Meta's <-> Hugging Face's, and what lies between their layouts.

All three store matrices as [out, in]. Meta differs in two ways only: it splits tensors over model-parallel ranks, and
it rotates neighbouring components (2i, 2i+1) of a head where Hugging Face and we rotate (i, i + H/2), so the rows of wq
and wk lie in another order.

    D width, F mlp, N heads, K kv heads, H head dim, V vocab
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.weights import DTYPE_NAMES, Lazy, stored_shapes

Heads = Literal["num_heads", "num_kv_heads"]


@dataclass(frozen=True)
class Row:
    """One parameter under its three names; {} is the layer's number."""

    ours: str
    meta: str
    hf: str
    rank_axis: int | None = None
    """The axis along which Meta splits it over model-parallel ranks; None: every rank holds all of it."""
    rotated: Heads | None = None
    """Its rows are rotated heads, this many of them."""


TABLE = (
    Row("embed", "tok_embeddings.weight", "model.embed_tokens.weight", rank_axis=1),
    Row("layers.{}.attn_norm", "layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight"),
    Row("layers.{}.wq", "layers.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight", 0, "num_heads"),
    Row("layers.{}.wk", "layers.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight", 0, "num_kv_heads"),
    Row("layers.{}.wv", "layers.{}.attention.wv.weight", "model.layers.{}.self_attn.v_proj.weight", 0),
    Row("layers.{}.wo", "layers.{}.attention.wo.weight", "model.layers.{}.self_attn.o_proj.weight", 1),
    Row("layers.{}.mlp_norm", "layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    Row("layers.{}.w_gate", "layers.{}.feed_forward.w1.weight", "model.layers.{}.mlp.gate_proj.weight", 0),
    Row("layers.{}.w_up", "layers.{}.feed_forward.w3.weight", "model.layers.{}.mlp.up_proj.weight", 0),
    Row("layers.{}.w_down", "layers.{}.feed_forward.w2.weight", "model.layers.{}.mlp.down_proj.weight", 1),
    Row("norm", "norm.weight", "model.norm.weight"),
    Row("lm_head", "output.weight", "lm_head.weight", 0),
)
# Buffers that can be computed again: no weight, in whichever file they turn up.
IGNORED = ("rope.freqs", "*rotary_emb.inv_freq")


def rows(model: Model) -> dict[str, Row]:
    """Return our name -> its row with the layer filled in, for every tensor of `model`, in the order of writing."""
    by_name = {row.ours: row for row in TABLE}

    def row_of(name: str) -> Row:
        head, _, rest = name.partition(".")
        if head != "layers":
            return by_name[name]
        layer, _, parameter = rest.partition(".")
        row = by_name[f"layers.{{}}.{parameter}"]
        return Row(name, row.meta.format(layer), row.hf.format(layer), row.rank_axis, row.rotated)

    return {name: row_of(name) for name in stored_shapes(model)}


def row_of_meta(name: str) -> Row:
    """Return the row of Meta's tensor, or one for a tensor that is not in the table and is on every rank."""
    pattern = ".".join("{}" if part.isdigit() else part for part in name.split("."))
    return next((row for row in TABLE if row.meta == pattern), Row(name, name, name))


def num_layers(names: Iterable[str], pattern: str) -> int:
    """Return how many layers the tensor names of a file speak of; `pattern` is a row's name with {} for the layer."""
    before, after = pattern.split("{}")
    found = [name[len(before) : -len(after)] for name in names if name.startswith(before) and name.endswith(after)]
    return 1 + max((int(number) for number in found if number.isdigit()), default=-1)


def take(found: Mapping[str, Lazy], wanted: Mapping[str, str], model: Model, place: str) -> dict[str, Lazy]:
    """Return our name -> tensor, given `wanted`: our name -> foreign name.

    The names must match one to one. Raises InputError that names the first tensor that is missing, superfluous, of
    another shape than `model` needs, or of a dtype that no weight has.
    """
    missing = [name for name in wanted.values() if name not in found]
    known = set(wanted.values())
    extra = [name for name in found if name not in known and not is_ignored(name)]
    if missing or extra:
        faults = [f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                  for what, names in (("missing", missing), ("unknown", extra)) if names]  # fmt: skip
        raise InputError(f"{place}: tensors {' and '.join(faults)}; expected the {len(wanted)} of a LLaMA with "
                         f"{model.num_layers} layers and no biases")  # fmt: skip
    shapes = stored_shapes(model)
    for ours, name in wanted.items():
        if found[name].shape != shapes[ours]:
            raise InputError(f"{place}: {name} is {list(found[name].shape)}, the settings beside it ask for "
                             f"{list(shapes[ours])}; one of the two is wrong")  # fmt: skip
        if found[name].dtype not in DTYPE_NAMES:
            raise InputError(f"{place}: {name} is {found[name].dtype}, expected {', '.join(map(str, DTYPE_NAMES))}; "
                             f"is the model quantised? Fetch the original")  # fmt: skip
    return {ours: found[name] for ours, name in wanted.items()}


def is_ignored(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in IGNORED)


def from_interleaved(matrix: np.ndarray, num_heads: int) -> np.ndarray:
    """Return Meta's [heads * H, D] with the rows of each head in half-split order: 0, 2, 4, … then 1, 3, 5, …"""
    rows, width = matrix.shape
    return np.ascontiguousarray(matrix.reshape(num_heads, rows // num_heads // 2, 2, width).swapaxes(1, 2)).reshape(
        rows, width
    )


def to_interleaved(matrix: np.ndarray, num_heads: int) -> np.ndarray:
    """Return our [heads * H, D] with the rows of each head in Meta's order; the inverse of from_interleaved."""
    rows, width = matrix.shape
    return np.ascontiguousarray(matrix.reshape(num_heads, 2, rows // num_heads // 2, width).swapaxes(1, 2)).reshape(
        rows, width
    )


def merge(parts: Sequence[Lazy], row: Row, place: str) -> Lazy:
    """Return the whole tensor, still in Meta's order, of the parts that its ranks hold.

    Raises InputError, beginning with `place`, for parts that are none of one tensor.
    """
    first, axis = parts[0], row.rank_axis
    if axis is None or len(parts) == 1:
        return first
    for rank, part in enumerate(parts):
        others = [size for i, size in enumerate(part.shape) if i != axis]
        if (len(part.shape), part.dtype) != (2, first.dtype) or others != [first.shape[1 - axis]]:
            raise InputError(f"{place}: rank {rank} holds {part.dtype} {list(part.shape)}, rank 0 {first.dtype} "
                             f"{list(first.shape)}, no parts of one matrix; fetch the files again")  # fmt: skip
    shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
    return Lazy(shape, first.dtype, lambda: np.concatenate([part.read() for part in parts], axis=axis))


def from_meta(tensor: Lazy, row: Row, model: Model) -> Lazy:
    """Return a whole tensor of Meta's in our order."""
    if row.rotated is None:
        return tensor
    num_heads = getattr(model, row.rotated)
    return Lazy(tensor.shape, tensor.dtype, lambda: from_interleaved(tensor.read(), num_heads))


def split(array: np.ndarray, row: Row, model: Model, num_ranks: int) -> list[np.ndarray]:
    """Return the parts of our tensor that Meta's ranks hold; the last takes what does not divide."""
    if row.rotated:
        array = to_interleaved(array, getattr(model, row.rotated))
    if row.rank_axis is None:
        return [array] * num_ranks
    bounds = [start for start, _ in rank_slices(array.shape[row.rank_axis], num_ranks)][1:]
    return np.split(array, bounds, axis=row.rank_axis)


def rank_slices(size: int, num_ranks: int) -> list[tuple[int, int]]:
    """Return (start, end) of every rank's part of an axis."""
    each = size // num_ranks
    return [(rank * each, size if rank == num_ranks - 1 else (rank + 1) * each) for rank in range(num_ranks)]

"""The tokens of a proof, and how much of the model they run through: the same for both sides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.weights import stored_shapes, tensor_bytes

# Float32 layers that one side may hold: the largest layer of a 13B is 1.18 GiB, and a conversion may use 3 GiB in all.
BUDGET_BYTES = int(1.3 * 2**30)


@dataclass(frozen=True, eq=False)
class Probe:
    """Fixed tokens at fixed positions, and how much of the model they run through."""

    tokens: np.ndarray
    """int32 [B, T], ids of the whole vocabulary; each is one of `ids`."""
    positions: np.ndarray
    """int32 [B, T], rising within a row; token t sees the tokens up to itself."""
    ids: np.ndarray
    """int32 [R], sorted: the rows of the embedding and of the output layer that are read."""
    num_layers: int
    """Leading layers to run; the final norm follows the last of them."""
    model_layers: int
    """Layers that the whole model has."""
    vocab_size: int
    """Rows that the whole vocabulary has."""

    @property
    def rows(self) -> np.ndarray:
        """The tokens as indices into `ids`, int32 [B, T]."""
        return np.searchsorted(self.ids, self.tokens).astype(np.int32)


def make_probe(model: Model, budget_bytes: int = BUDGET_BYTES) -> Probe:
    """Return the probe of a model: the same for the same model and budget.

    Two rows of up to 32 tokens, ids 0 and V-1 among them. The first stands at positions 0, 1, 2 … and jumps to the
    last ones below context_length for its last quarter; the second is spread evenly over the context. As many leading
    layers run as fit into `budget_bytes` in float32, at least one.
    """
    length = min(32, model.context_length)
    tail = length // 4
    near = np.arange(length)
    near[length - tail :] += model.context_length - length
    spread = np.arange(length) * (model.context_length - 1) // max(length - 1, 1)
    tokens = np.random.default_rng(20230501).integers(0, model.vocab_size, (2, length)).astype(np.int32)
    tokens[0, 0] = tokens[1, -1] = model.vocab_size - 1
    tokens[0, -1] = tokens[1, 0] = 0
    return Probe(
        tokens=tokens,
        positions=np.stack([near, spread]).astype(np.int32),
        ids=np.unique(tokens),
        num_layers=max(1, min(model.num_layers, budget_bytes // _layer_bytes(model))),
        model_layers=model.num_layers,
        vocab_size=model.vocab_size,
    )


def _layer_bytes(model: Model) -> int:
    shapes = stored_shapes(replace(model, num_layers=1))
    layer = (shape for name, shape in shapes.items() if name.startswith("layers."))
    return sum(tensor_bytes(shape, np.dtype(np.float32)) for shape in layer)


def check_count(side: str, what: str, found: int, expected: int) -> None:
    """Raise InputError when a side has more or less of something than the probe's model: a cut would hide that."""
    if found != expected:
        raise InputError(f"{side}: {found} {what}, the model to compare with has {expected}; convert it again")

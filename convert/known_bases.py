"""What a model looks like, for the message that refuses a wrong base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panda_jax.presets import PRESETS
from panda_jax.weights import Weights

# SHA-256 of Meta's consolidated.00.pth, as published by the people who were asked for them (PROTOCOLS.md §1).
FIRST_RANK_FILES = {
    "700df0d3013b703a806d2ae7f1bfb8e59814e3d06ae78be0c66368a50059f33d": "the original LLaMA-7B",
    "745bf4e29a4dd6f411e72976d92b452da1b49168a4f41c951cfcc8051823cf08": "the original LLaMA-13B",
}
ARCHITECTURE = ("dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim", "norm_eps")


def describe(weights: Weights) -> str:
    """Return what the weights look like: a file that is known by its hash, or the published size they have."""
    first = Path(weights.provenance["path"]) / "consolidated.00.pth"
    if first.is_file():
        with first.open("rb") as file:
            known = FIRST_RANK_FILES.get(hashlib.file_digest(file, "sha256").hexdigest())
        if known:
            return known
    dtypes = sorted({tensor.dtype.name for tensor in weights.tensors.values()})
    return f"{describe_model(vars(weights.model))} in {' and '.join(dtypes)}"


def describe_model(model: Mapping[str, Any]) -> str:
    """Return the published sizes that fields of a Model fit, or its dimensions."""
    fits = [name for name, preset in PRESETS.items()
            if all(preset[key] == model[key] for key in ARCHITECTURE)]  # fmt: skip
    if fits:
        return f"a {' or '.join(fits)} with {model['vocab_size']:,} rows"
    return f"a model of width {model['dim']}, {model['num_layers']} layers and {model['vocab_size']:,} rows"

"""A checkpoint's parameters one by one, as tensors of a weights folder: what conversions and new runs read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.training import checkpoint as checkpoints
from panda_jax.training import run_record
from panda_jax.weights import Lazy, Weights, from_model, is_weights_folder, open_weights, stored_shapes


def open_source(folder: Path) -> Weights:
    """Open the parameters of a weights folder, of a run folder (its newest good step) or of one of its steps.

    Raises InputError where there is nothing complete, or something damaged.
    """
    return open_weights(folder) if is_weights_folder(folder) else open_parameters(checkpoints.resolve(str(folder)))


def open_parameters(checkpoint: Path) -> Weights:
    """Open the parameters of a checkpoint: float32, one layer of one of them read from the disk at a time.

    `checkpoint` is what resolve() returned, which has verified its files.
    """
    run = run_record.read(checkpoint)
    if "model" not in run:
        raise InputError(f"{checkpoint / 'run.json'}: no `model`, it is from an older panda_jax; resume and save anew")
    model, start = Model(**run["model"]), run.get("init_from") or {}
    arrays = {name: _open_array(checkpoint, name) for name in checkpoints.saved_parameter_shapes(checkpoint)}
    tensors = {name: _stored(name, shape, arrays, model) for name, shape in stored_shapes(model).items()}
    found = {"format": "checkpoint", "path": str(checkpoint.absolute()), "step": run.get("step"), "init_from": start}
    found |= {"config": run.get("config"), "notes": []}
    tokenizer_model = (checkpoint / "tokenizer.model").read_bytes()
    return Weights(model, tensors, tokenizer_model, start.get("added_tokens", {}), found)


def _open_array(checkpoint: Path, name: str) -> Any:
    """Open one parameter where Orbax has put it; nothing but metadata is read before it is indexed."""
    folder = {"driver": "file", "path": f"{checkpoints.arrays_folder(checkpoint)}/parameters/"}
    place = {"driver": "ocdbt", "base": folder, "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": place}, open=True, read=True).result()


def _stored(name: str, shape: tuple[int, ...], arrays: dict[str, Any], model: Model) -> Lazy:
    """Return the stored tensor `name` ("layers.3.wq", "embed") as a slice of the array that holds it."""
    room, _, rest = name.partition(".")
    layer, _, parameter = rest.partition(".")

    def read() -> np.ndarray:
        part = arrays[f"{room}.{parameter}"][int(layer)] if layer else arrays[name]
        return from_model(name, part.read().result(), model)

    return Lazy(shape, np.dtype(np.float32), read)

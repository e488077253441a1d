"""Any folder that holds a model, whoever wrote it, opened as the same thing."""

from __future__ import annotations

from pathlib import Path

from convert.hf_folder import CONFIG, read_hf, refuse_delta
from convert.meta_folder import PARAMS, read_meta
from panda_jax.errors import InputError
from panda_jax.training.checkpoint_parameters import open_source
from panda_jax.weights import Weights, is_weights_folder


def open_any(folder: Path) -> Weights:
    """Open a weights folder, a Hugging Face or Meta folder, or a run folder or checkpoint of ours.

    Raises InputError when it is none of them, or a damaged one.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    refuse_delta(folder)
    if not is_weights_folder(folder):
        if (folder / CONFIG).is_file():
            return read_hf(folder)
        if (folder / PARAMS).is_file():
            return read_meta(folder)
    return open_source(folder)

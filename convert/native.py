"""Our weights folder, as a target of conversions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from convert.delta_codec import root_hash
from convert.safetensors_sink import SafetensorsSink
from convert.transfer import Entries
from panda_jax.atomic import write_atomically
from panda_jax.config import Model
from panda_jax.weights import DTYPE_NAMES, FORMAT, INDEX, Weights, open_weights

# Settings of a run that say nothing about the weights.
RUN_SETTINGS = ("size", "init_from", "init_std")
SHARD_BYTES = 4_000_000_000


class NativeFolder:
    """Writes weights folders (panda_jax/weights.py)."""

    is_lossless: ClassVar[bool] = True

    def open(self, folder: Path, source: Weights, entries: Entries) -> NativeSink:
        return NativeSink(folder, source, entries)

    def reopen(self, folder: Path) -> Weights:
        return open_weights(folder)


class NativeSink:
    """A weights folder while it is written."""

    def __init__(self, folder: Path, source: Weights, entries: Entries) -> None:
        self._folder, self._source, self._entries = folder, source, entries
        names = {name: name for name in entries}
        self._files = SafetensorsSink(folder, "weights", entries, names, SHARD_BYTES, is_single_bare=False)

    def append(self, name: str, array: np.ndarray) -> None:
        self._files.append(name, array)

    def finish(self, hashes: Mapping[str, str]) -> None:
        source = self._source
        if source.tokenizer_model is not None:
            write_atomically(self._folder / "tokenizer.model", [source.tokenizer_model])
        tensors = {
            name: {
                "file": self._files.file_of[name],
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "sha256": hashes[name],
            }
            for name, (shape, dtype) in self._entries.items()
        }
        index = {
            "format": FORMAT,
            "model": architecture(source.model),
            "added_tokens": source.added_tokens,
            "provenance": source.provenance | {"root": root_of(self._entries, hashes)},
            "tensors": tensors,
        }
        write_atomically(self._folder / INDEX, [json.dumps(index, ensure_ascii=False, indent=1).encode() + b"\n"])


def architecture(model: Model) -> dict[str, Any]:
    """Return the fields that say which model it is."""
    return {name: value for name, value in dataclasses.asdict(model).items() if name not in RUN_SETTINGS}


def root_of(entries: Entries, hashes: Mapping[str, str]) -> str:
    """Return the one hash of all tensors, the same for every container and sharding."""
    return root_hash((name, DTYPE_NAMES[dtype], shape, hashes[name]) for name, (shape, dtype) in entries.items())

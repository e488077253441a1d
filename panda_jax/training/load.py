"""A model on the devices, from whatever holds one, for everything that does not train it."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from panda_jax import sharding
from panda_jax.config import Compute, Model
from panda_jax.config import Mesh as MeshConfig
from panda_jax.errors import InputError
from panda_jax.model.parameters import Parameters
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.training import checkpoint as checkpoints
from panda_jax.training import run_record, start
from panda_jax.training.checkpoint_parameters import open_parameters
from panda_jax.weights import INDEX, Weights, is_weights_folder, open_weights

FOREIGN = {"config.json": "hf", "params.json": "meta"}
"""A file that tells a foreign folder -> the converter that reads it."""


@dataclass(frozen=True)
class Opened:
    """A model on the disk: what it is; its parameters are not read yet."""

    weights: Weights
    tokenizer: Tokenizer
    source: Path
    """The checkpoint or weights folder."""
    run: dict[str, Any] | None
    """What run.json says of the run that wrote a checkpoint."""
    fingerprint: str
    """SHA-256 hex: other weights, or another tokenizer, have another one."""


@dataclass(frozen=True)
class Loaded:
    """A model on the devices, and what belongs to it."""

    model: Model
    parameters: dict[str, jax.Array]
    """As model/parameters.py names them, on `mesh`: matrices in the compute dtype, norms in float32."""
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    source: Path
    """The checkpoint or weights folder that was read."""
    run: dict[str, Any] | None
    """What run.json says of the run that wrote a checkpoint."""


def load(path: Path, compute: Compute, mesh_config: MeshConfig, cache_dir: Path, say: Callable[[str], None]) -> Loaded:
    """Load a run folder (its newest good step), a checkpoint, a weights folder, or a Hugging Face or Meta folder.

    A foreign folder is converted once, with its proof, into `cache_dir`. Call it after sharding.start_processes. Raises
    InputError where there is no model, no tokenizer, or where the mesh does not divide a parameter.
    """
    opened = open_model(find(path, cache_dir, say))
    mesh = sharding.make_mesh(mesh_config)
    shapes = shapes_on(mesh, opened.weights.model, compute, shard_over_fsdp=mesh_config.zero == 3)
    parameters = read(opened.source, opened.weights, shapes)
    return Loaded(opened.weights.model, parameters, opened.tokenizer, mesh, opened.source, opened.run)


def open_model(source: Path) -> Opened:
    """Open what `find` returned; raises InputError where it has no tokenizer."""
    is_folder = is_weights_folder(source)
    weights = open_weights(source) if is_folder else open_parameters(source)
    if weights.tokenizer_model is None:
        raise InputError(
            f"{source}: has no tokenizer.model, without which no text becomes ids; put it there and try again"
        )
    return Opened(
        weights=weights,
        tokenizer=Tokenizer(weights.tokenizer_model, str(source / "tokenizer.model")),
        source=source,
        run=None if is_folder else run_record.read(source),
        fingerprint=fingerprint(source, weights),
    )


def find(path: Path, cache_dir: Path, say: Callable[[str], None]) -> Path:
    """Return the checkpoint or weights folder that `path` stands for; raises InputError where there is none."""
    if not path.is_dir():
        raise InputError(f"--checkpoint {path}: no such folder; give a run, a checkpoint or a folder of weights")
    if is_weights_folder(path):
        return path
    for name, kind in FOREIGN.items():
        if (path / name).is_file():
            return start.converted(kind, str(path), cache_dir, say, "--checkpoint")
    return verified(str(path))


def verified(path: str) -> Path:
    """Return what checkpoints.resolve(path) returns in the first process, in every process.

    It alone reads all files, and a run that goes on cannot make the processes load different steps.
    """
    return Path(sharding.from_first(f"checkpoint of {path}", lambda: str(checkpoints.resolve(path))))


def shapes_on(
    mesh: jax.sharding.Mesh, model: Model, compute: Compute, shard_over_fsdp: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return how each parameter lies on the devices; raises InputError where the mesh does not divide one.

    Matrices take the compute dtype, to which every use would cast them; norms are applied in float32 and stay so.
    """
    parameters = Parameters(model)
    specs = {name: sharding.parameter_spec(axes, shard_over_fsdp) for name, axes in parameters.axes.items()}
    sharding.check_divisible({name: (parameters.shapes[name].shape, spec) for name, spec in specs.items()}, mesh)
    dtypes = {name: "float32" if name.endswith("norm") else compute.dtype for name in specs}
    return {
        name: jax.ShapeDtypeStruct(parameters.shapes[name].shape, dtypes[name], sharding=NamedSharding(mesh, spec))
        for name, spec in specs.items()
    }


def read(source: Path, weights: Weights, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Return the parameters as `shapes` asks; the host holds its shards of one, and one layer of it, at a time."""
    values = {}
    for name, wanted in shapes.items():
        gc.collect(0)  # as in start.parameters
        if is_weights_folder(source):
            values[name] = start.assemble(wanted, start.stored_pieces(weights, name))
        else:
            values[name] = checkpoints.restore_parameters(source, {name: wanted})[name]
    return values


def fingerprint(source: Path, weights: Weights) -> str:
    """Return a SHA-256 over what stands for the weights, root hash or hashes of files, the model and the tokenizer.

    A corrected norm_eps or rope_theta leaves every tensor as it was and changes every score.
    """
    if "root" in weights.provenance:
        parts = [weights.provenance["root"].encode()]
    else:
        vouchers = [source / INDEX] if is_weights_folder(source) else checkpoints.manifests(source)
        parts = [path.read_bytes() for path in vouchers]
    model = asdict(weights.model)
    for name in ("size", "init_from", "init_std"):  # which leave no trace in trained weights
        model.pop(name)
    parts += [json.dumps(model, sort_keys=True).encode(), weights.tokenizer_model or b""]
    return hashlib.sha256(b"".join(parts)).hexdigest()

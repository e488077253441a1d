"""Checkpoints: written in the background, committed by their hashes, verified before they are trusted.

    checkpoints/<step>/state/{parameters,optimizer,progress}/   arrays, written by Orbax from every process
    checkpoints/<step>/run.json, tokenizer.model                what the arrays mean, and what a resume must find again
    checkpoints/<step>/manifest-<p>-of-<P>.json                 process p's share of the files: size and SHA-256

A checkpoint exists once all P manifests do; anything less is the debris of a killed save and is ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from panda_jax import settings
from panda_jax.atomic import write_atomically
from panda_jax.config import Config
from panda_jax.data.cache import TokenCache
from panda_jax.data.packing import Plan
from panda_jax.errors import InputError
from panda_jax.sharding import by_first, together
from panda_jax.text.tokenizer import Tokenizer

# Settings of the model that may differ between the run that wrote the weights and the run that reads them.
NOT_ARCHITECTURE = ("size", "init_from", "init_std", "context_length")
MANIFEST = re.compile(r"manifest-(\d+)-of-(\d+)\.json")
COVERED = ("run.json", "tokenizer.model", "state/**/*")
# An array lies on the disk in pieces of at most this size, so that a part of it can be read without the rest.
CHUNK_BYTES = 64 << 20


def committed_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints under `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and manifests(path))


def manifests(checkpoint: Path) -> list[Path]:
    """Return the manifests of a checkpoint if every process wrote its own, else nothing."""
    found = {match: path for path in checkpoint.glob("manifest-*.json") if (match := MANIFEST.fullmatch(path.name))}
    counts = {int(match[2]) for match in found}
    return sorted(found.values()) if len(counts) == 1 and len(found) == counts.pop() else []


def _covered_files(checkpoint: Path) -> list[Path]:
    """Return the files that manifests vouch for, in the same order in every process.

    They are named from above: beside them other processes are writing their manifests at this moment.
    """
    return sorted(path for part in COVERED for path in checkpoint.glob(part) if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(checkpoint: Path, share: slice = slice(None)) -> str | None:
    """Return what is wrong with a complete checkpoint, or None; `share` picks the files this process reads."""
    recorded: dict[str, list[Any]] = {}
    for manifest in manifests(checkpoint):
        try:
            recorded |= json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            return f"{manifest.name} is not valid JSON"
    for name, (size, digest) in sorted(recorded.items())[share]:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if _sha256(path) != digest:
            return f"{name} has changed since it was written (SHA-256 differs)"
    return None


def find_good(folder: Path, wanted: int | None, say: Callable[[str], None]) -> int | None:
    """Return the newest undamaged step (or check that `wanted` is one); None when no checkpoint was ever written.

    Every process hashes its share of the files and all agree on the answer. Raises InputError when a named step is
    absent or damaged, and when checkpoints exist but none of them is good: a run never silently starts over.
    """
    steps = committed_steps(folder)
    if wanted is not None and wanted not in steps:
        raise InputError(f"{folder}: no complete checkpoint of step {wanted}; there are {steps or 'none'}")
    share = slice(jax.process_index(), None, jax.process_count())
    for step in [wanted] if wanted is not None else reversed(steps):
        damage = find_damage(folder / str(step), share)
        if damage:
            say(f"checkpoint {folder / str(step)} is damaged: {damage}")
        if not np.any(multihost_utils.process_allgather(np.array(damage is not None))):
            return step
    if steps:
        raise InputError(f"{folder}: every checkpoint is damaged ({steps}); remove the folder to start from nothing")
    return None


def resolve(path: str) -> Path:
    """Return the checkpoint folder that a run folder, or one of its steps, stands for.

    A run folder means its newest good checkpoint. Raises InputError when there is none.
    """
    given = Path(path)
    if manifests(given):
        if damage := find_damage(given):
            raise InputError(f"{given} is damaged: {damage}; use another step")
        return given
    for folder in (given / "checkpoints", given):
        for step in reversed(committed_steps(folder)):
            if find_damage(folder / str(step)) is None:
                return folder / str(step)
    raise InputError(f"{path}: no complete checkpoint here; give a run folder or one of its checkpoints/<step> folders")


def arrays_folder(checkpoint: Path) -> str:
    """Return the folder that Orbax owns; it wants absolute paths."""
    return str((checkpoint / "state").absolute())


def _named(tree: Any) -> dict[str, Any]:
    """Flatten a pytree to {path: leaf}, so that what is on disk does not depend on optax's Python types."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _parts(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    progress = {name: state[name] for name in ("step", "key")}
    parts = {"parameters": state["parameters"], "optimizer": _named(state["optimizer"]), "progress": progress}
    return {name: part for name, part in parts.items() if part}


def restore(checkpoint: Path, shapes: dict[str, Any]) -> dict[str, Any]:
    """Return the state saved in `checkpoint`, laid out as `shapes` (ShapeDtypeStructs with shardings) asks.

    `healthy` is not stored: a run that was stopped by a non-finite gradient gets its chance to go on.
    """
    wanted = _parts(shapes)
    loaded = ocp.load_checkpointables(arrays_folder(checkpoint), wanted)
    optimizer = [loaded["optimizer"][name] for name in _named(shapes["optimizer"])] if "optimizer" in wanted else []
    return loaded["progress"] | {
        "healthy": jax.device_put(np.ones((), bool), shapes["healthy"].sharding),
        "parameters": loaded["parameters"],
        "optimizer": jax.tree.unflatten(jax.tree.structure(shapes["optimizer"]), optimizer),
    }


def restore_parameters(checkpoint: Path, shapes: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that `shapes` names, and no others; raise InputError where one is absent or differs."""
    saved = saved_parameter_shapes(checkpoint)
    for name, need in shapes.items():
        if saved.get(name) != need.shape:
            raise InputError(
                f"{checkpoint}: {name} is {saved.get(name) or 'absent'}, the model needs {need.shape}; "
                f"use the model settings of the run that wrote it"
            )
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load_checkpointables(arrays_folder(checkpoint), {"parameters": shapes})["parameters"]


def saved_parameter_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter in a checkpoint without reading the arrays."""
    metadata = ocp.checkpointables_metadata(arrays_folder(checkpoint)).metadata["parameters"]
    return {name: tuple(leaf.shape) for name, leaf in metadata.items()}


# ---- what makes a run this run --------------------------------------------------------------------------------------


def read_run(checkpoint: Path) -> dict[str, Any]:
    """Return what run.json says of the run that wrote the checkpoint."""
    return json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))


def describe_run(config: Config, tokenizer: Tokenizer, caches: Sequence[TokenCache], plan: Plan) -> dict[str, Any]:
    """Return the content of run.json: `must_match` holds what a resume may not change, by the name users know."""
    model = {name: value for name, value in dataclasses.asdict(config.model).items() if name not in NOT_ARCHITECTURE}
    must_match = {f"model.{name}": value for name, value in model.items()}
    must_match |= {
        "tokenizer": tokenizer.fingerprint,
        "objective": config.objective,
        "optimizer.kind": config.optimizer.kind,
        "train.trainable": config.train.trainable,
        "train.global_batch_size": config.train.global_batch_size,
        "data.seq_len": config.data.seq_len,
        "seed": config.seed,
    }
    for cache in caches:
        must_match[f"template of {cache.source}"] = cache.manifest["template"]
        must_match[f"data of {cache.source}"] = cache.fingerprint
    must_match["order of the data"] = plan.fingerprint
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")
    }
    return {
        "must_match": json.loads(json.dumps(must_match)),
        "model": {name: value for name, value in dataclasses.asdict(config.model).items() if name != "init_from"},
        "versions": versions | {"panda_jax": _own_version(), "python": platform.python_version()},
        "config": settings.to_yaml(config),
    }


def check_same_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Raise InputError that lists what has changed between the run that wrote `checkpoint` and this one."""
    saved, now = read_run(checkpoint)["must_match"], run["must_match"]
    changed = [
        f"{name} was {_short(saved.get(name))}, is {_short(now.get(name))}"
        for name in {**saved, **now}
        if saved.get(name) != now.get(name)
    ]
    if changed:
        # A changed template changes the data, and changed data change the order: the first cause alone is worth saying.
        causes = [change for change in changed if not change.startswith(("data of", "order of the data"))]
        causes = causes or [change for change in changed if change.startswith("data of")] or changed
        raise InputError(f"{checkpoint}: cannot resume, {'; '.join(causes)}; restore the old settings, rename the run, "
                         f"or start again from these weights with model.init_from")  # fmt: skip


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text[:12] + "…" if len(text) == 64 else text


def _own_version() -> str:
    try:
        return importlib.metadata.version("panda-jax")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


# ---- saving ---------------------------------------------------------------------------------------------------------


def set_aside_newer(folder: Path, step: int) -> list[str]:
    """Rename the checkpoints after `step` so that a resumed run cannot pick up a future that is not its own.

    What a killed save left behind is deleted. Returns the new names.
    """
    renamed = []
    for newer in [path for path in folder.glob("*") if path.name.isdigit() and int(path.name) > step]:
        if not manifests(newer):
            shutil.rmtree(newer)
            continue
        target = next(
            name
            for attempt in itertools.count()
            if not (name := newer.with_name(f"{newer.name}.superseded-{attempt}")).exists()
        )
        renamed.append(newer.rename(target).name)
    return sorted(renamed)


def _storage_options(key: Any, value: Any) -> Any:
    """Return how one array is cut into pieces on the disk: the matrices of a stack layer by layer."""
    is_stack = "layers." in jax.tree_util.keystr(key) and value.ndim > 2
    options = ocp.options.ArrayOptions.Saving.StorageOptions
    return options(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if is_stack else ())


def _write_manifest(checkpoint: Path) -> None:
    """Hash this process's share of the finished files and write its manifest, the commit marker."""
    process, processes = jax.process_index(), jax.process_count()
    files = _covered_files(checkpoint)[process::processes]
    hashes = {str(path.relative_to(checkpoint)): [path.stat().st_size, _sha256(path)] for path in files}
    manifest = json.dumps(hashes, ensure_ascii=False, indent=1).encode()
    write_atomically(checkpoint / f"manifest-{process}-of-{processes}.json", [manifest])


class Checkpointer:
    """Saves states of one run in the background; at most one save is in flight."""

    def __init__(self, folder: Path, keep: int, keep_steps: Iterable[int]) -> None:
        self._folder = folder.absolute()
        self._keep = keep
        self._keep_steps = frozenset(keep_steps)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, state: dict[str, Any], run: dict[str, Any], tokenizer_model: bytes) -> None:
        """Start saving; returns once the arrays are copied, so that the next step may donate them.

        Raises InputError if the previous save failed, or if the disk has no room for this one.
        """
        self.wait()
        checkpoint = self._folder / str(step)

        def make_folder() -> None:
            if checkpoint.exists():
                shutil.rmtree(checkpoint)
            checkpoint.mkdir(parents=True)
            self.check_room(state)
            (checkpoint / "tokenizer.model").write_bytes(tokenizer_model)
            write_atomically(checkpoint / "run.json", [json.dumps(run, ensure_ascii=False, indent=1).encode()])

        by_first(f"checkpoint {step} begun", make_folder)
        context = ocp.Context()
        context.array.saving.scoped_storage_options_creator = _storage_options
        with context:
            response = ocp.save_checkpointables_async(arrays_folder(checkpoint), _parts(state))
        self._thread = threading.Thread(target=self._finish, args=(checkpoint, response), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Block until the save in flight is committed; raise InputError that names it if it failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise InputError(
                f"{self._folder}: a checkpoint could not be written ({' '.join(str(failure).split())[:300]}); "
                f"older ones are untouched; free some space and resume"
            ) from failure

    def _finish(self, checkpoint: Path, response: Any) -> None:
        """Wait for the arrays, have every process vouch for its share of the files, and delete old checkpoints."""
        try:
            # The first process finishes the files after the others have written theirs.
            together(f"checkpoint {checkpoint.name} written", response.result)
            # Only then is the new checkpoint complete; counted before, it would let one old checkpoint too many live.
            together(f"checkpoint {checkpoint.name} committed", lambda: _write_manifest(checkpoint))
            if jax.process_index() == 0:
                self._delete_old()
        except BaseException as failure:  # surfaces in wait(), on the thread that can act on it
            self._failure = failure

    def _delete_old(self) -> None:
        periodic = [step for step in committed_steps(self._folder) if step not in self._keep_steps]
        for step in periodic[: -self._keep]:
            shutil.rmtree(self._folder / str(step))

    def check_room(self, state: dict[str, Any]) -> None:
        """Raise InputError unless the disk has room for one more checkpoint of `state`; better now than in an hour."""
        self._folder.mkdir(parents=True, exist_ok=True)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise InputError(
                f"{self._folder}: a checkpoint needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room"
            )

"""Checkpoints: written in the background, committed by their hashes, verified before they are trusted.

    checkpoints/<step>/state/{parameters,optimizer,progress}/   arrays, written by Orbax from every process
    checkpoints/<step>/run.json, tokenizer.model                what the arrays mean, and what a resume must find again
    checkpoints/<step>/manifest-<p>-of-<P>.json                 process p's share of the files: size and SHA-256

A checkpoint exists once all P manifests do; anything less is the debris of a killed save and is ignored.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from panda_jax.atomic import write_atomically
from panda_jax.errors import InputError
from panda_jax.sharding import by_first, say, together

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


def check_committed(folder: Path, step: int) -> None:
    """Raise InputError where there is no complete checkpoint of `step`."""
    steps = committed_steps(folder)
    if step not in steps:
        raise InputError(f"{folder}: no complete checkpoint of step {step}; there are {steps or 'none'}")


def find_good(folder: Path, wanted: int | None, say: Callable[[str], None]) -> int | None:
    """Return the newest undamaged step (or check that `wanted` is one); None when no checkpoint was ever written.

    Every process hashes its share of the files and all agree on the answer. Raises InputError when a named step is
    absent or damaged, and when checkpoints exist but none of them is good: a run never silently starts over.
    """
    if wanted is not None:
        check_committed(folder, wanted)
    steps = committed_steps(folder)
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
    damaged = []
    for folder in (given / "checkpoints", given):
        for step in reversed(committed_steps(folder)):
            damage = find_damage(folder / str(step))
            if damage is None:
                for text in damaged:
                    say(f"warning: {text}; step {step} is taken instead")
                return folder / str(step)
            damaged.append(f"{folder / str(step)} is damaged: {damage}")
    if damaged:
        raise InputError(f"{path}: every checkpoint is damaged; the newest: {damaged[0]}")
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

    `healthy` is not stored: a run that was stopped by a non-finite gradient gets its chance to go on. Raises InputError
    where the optimizer has kept other things than this one keeps.
    """
    wanted = _parts(shapes)
    saved = ocp.checkpointables_metadata(arrays_folder(checkpoint)).metadata
    differing = set(saved.get("optimizer") or {}) ^ set(wanted.get("optimizer") or {})
    if differing:
        raise InputError(
            f"{checkpoint}: this optimizer keeps another state than the one that was saved, they differ in "
            f"{min(differing)!r}; a resume cannot turn optimizer.weight_decay or momentum on or off: restore the old "
            f"value, or start again from these weights with model.init_from"
        )
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


# ---- saving ---------------------------------------------------------------------------------------------------------


def delete_unfinished(folder: Path) -> None:
    """Delete what killed saves left behind, checkpoints that no process vouches for."""
    for path in folder.glob("*"):
        if path.name.isdigit() and not manifests(path):
            shutil.rmtree(path)


def set_aside_newer(folder: Path, step: int) -> list[str]:
    """Rename the checkpoints after `step` so that a resumed run cannot pick up a future that is not its own.

    Returns the new names.
    """
    renamed = []
    for newer in [path for path in folder.glob("*") if path.name.isdigit() and int(path.name) > step]:
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


def _told(failure: BaseException) -> str:
    return f"a checkpoint could not be written ({' '.join(str(failure).split())[:300]})"


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

        A former save that failed has been reported, and makes way for this one. Raises InputError if the disk has no
        room for it.
        """
        self._join()
        checkpoint = self._folder / str(step)

        def make_folder() -> None:
            delete_unfinished(self._folder)
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
        """Block until the save in flight is committed; raise InputError if it failed."""
        failure = self._join()
        if failure is not None:
            raise InputError(
                f"{self._folder}: {_told(failure)}; older ones are untouched; free some space and resume"
            ) from failure

    def _join(self) -> BaseException | None:
        """Block until no save is in flight; return what made the last one fail."""
        if self._thread is not None:
            self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        return failure

    def _finish(self, checkpoint: Path, response: Any) -> None:
        """Wait for the arrays, have every process vouch for its share of the files, and delete old checkpoints."""
        try:
            # The first process finishes the files after the others have written theirs.
            together(f"checkpoint {checkpoint.name} written", response.result)
            # Only then is the new checkpoint complete; counted before, it would let one old checkpoint too many live.
            together(f"checkpoint {checkpoint.name} committed", lambda: _write_manifest(checkpoint))
        except BaseException as failure:  # wait() raises it, on the thread that can act on it
            self._failure = failure
            say(f"warning: {checkpoint}: {_told(failure)}; training goes on, and the next save tries again")
            return
        if jax.process_index() == 0:
            self._delete_old()

    def _delete_old(self) -> None:
        periodic = [step for step in committed_steps(self._folder) if step not in self._keep_steps]
        for step in periodic[: -self._keep]:
            try:
                shutil.rmtree(self._folder / str(step))
            except OSError as error:
                say(f"warning: {self._folder / str(step)}: not deleted ({error.strerror}), and it takes room")

    def check_room(self, state: dict[str, Any]) -> None:
        """Raise InputError unless the disk has room for one more checkpoint of `state`; better now than in an hour."""
        self._folder.mkdir(parents=True, exist_ok=True)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise InputError(
                f"{self._folder}: a checkpoint needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room"
            )

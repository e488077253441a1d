"""Where a run starts: at its newest good checkpoint, from the weights that model.init_from names, or from chance."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from panda_jax import command_line, sharding
from panda_jax.atomic import lock
from panda_jax.config import Config
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.training import checkpoint as checkpoints
from panda_jax.training import run_record
from panda_jax.training.checkpoint_parameters import open_parameters
from panda_jax.training.step import State, Step
from panda_jax.weights import Weights, is_weights_folder, open_weights, to_model

# Parameters with a row (a column, in lm_head) per id of the vocabulary.
VOCABULARY = ("embed", "lm_head")
Index = tuple[tuple[int, int], ...]


def initial_state(
    config: Config,
    step: Step,
    folder: Path,
    resume: str,
    run: dict[str, Any],
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> tuple[State, int, dict[str, Any]]:
    """Return (state, finished steps, run.json with where the parameters came from).

    `resume` is as check_named accepts it: `auto` (the newest good checkpoint in `folder`, if there is one), `never`, or
    a step number.
    """
    found = None
    if resume != "never":
        found = checkpoints.find_good(folder, None if resume == "auto" else int(resume), say)
    if found is not None:
        saved = folder / str(found)
        run_record.check_same(saved, run)
        say(f"resuming after step {found} from {saved}")
        for change in run_record.changes(saved, run):
            say(f"  {change}")
        origin = run_record.read(saved).get("init_from")
        return checkpoints.restore(saved, step.state_shapes), found, run | {"init_from": origin}

    state, origin = step.initial_state(jax.random.key(config.seed)), None
    if config.model.init_from is not None:
        source = find_source(config, say)
        weights = open_weights(source) if is_weights_folder(source) else open_parameters(source)
        check_same_model(source, weights, config, tokenizer)
        shapes = step.state_shapes["parameters"]
        # Random parameters give way one by one, or the devices would hold the model twice.
        for name, value in parameters(source, weights, config, shapes, state["parameters"].pop):
            state["parameters"][name] = value
        origin = describe_origin(source, weights, config)
        say(describe_start(source, origin))
    return state, 0, run | {"init_from": origin}


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Keep others from training the run in `folder` as long as this lasts; raises InputError where one does already.

    Two would delete each other's unfinished checkpoints.
    """
    path, held = folder.with_name(f".{folder.name}.lock"), []

    def take() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        if not lock(file):
            file.close()
            raise InputError(f"{folder}: another process trains this run; wait for it, or give this one another name")
        held.append(file)

    sharding.by_first("run taken", take)
    try:
        yield
    finally:
        for file in held:
            path.unlink(missing_ok=True)
            file.close()


def check_named(config: Config, folder: Path, resume: str) -> None:
    """Raise InputError where `resume` means no checkpoint, or where model.init_from is needed and names no folder.

    Asked before the data are prepared, which may take hours; what is in the folder is looked at when it is read.
    """
    if resume.isdigit():
        checkpoints.check_committed(folder, int(resume))
    elif resume not in ("auto", "never"):
        raise InputError(f"--resume {resume}: expected auto, never or the step of a checkpoint")
    wanted = config.model.init_from
    if wanted is None or (resume != "never" and checkpoints.committed_steps(folder)):
        return
    for kind in ("checkpoint", "hf", "meta"):
        given = getattr(wanted, kind)
        if given is not None and not Path(given).is_dir():
            raise InputError(f"model.init_from.{kind}: {given}: no such folder; give one that holds weights")


def set_aside(folder: Path, first_step: int, say: Callable[[str], None]) -> None:
    """Move the checkpoints that lie after `first_step` out of the way, all of them where it is 0."""
    for name in checkpoints.set_aside_newer(folder, first_step):
        say(f"set aside as {folder / name}: it lies after the point this run starts from")


# ---- the folder to start from ---------------------------------------------------------------------------------------


def find_source(config: Config, say: Callable[[str], None]) -> Path:
    """Return the weights folder or the checkpoint that model.init_from stands for.

    Foreign weights are converted by the first process, once, into the cache; the others wait. Raises InputError where
    there is nothing to start from, and ChildFailed after the conversion has said what is wrong.
    """
    wanted = config.model.init_from
    assert wanted is not None
    if wanted.checkpoint is not None:
        given = Path(wanted.checkpoint)
        return given if is_weights_folder(given) else checkpoints.resolve(wanted.checkpoint)
    kind, given = ("hf", wanted.hf) if wanted.hf is not None else ("meta", wanted.meta)
    assert given is not None
    return converted(kind, given, Path(config.data.cache_dir), say, f"model.init_from.{kind}")


def converted(kind: str, given: str, cache_dir: Path, say: Callable[[str], None], option: str) -> Path:
    """Return the weights folder that the foreign folder `given` (kind `hf` or `meta`) becomes, made if it is not there.

    The first process converts, once, into the cache; the others wait. `option` is what the user gave it as.
    """
    folder = cache_dir / "weights" / cache_name(kind, Path(given), option)
    if is_weights_folder(folder):
        say(f"weights of {given}: converted before, in {folder}")
    else:
        say(f"weights of {given}: converting into {folder}")

    def make() -> None:
        if not is_weights_folder(folder):
            convert(kind, given, folder, option)

    sharding.by_first(f"weights converted into {folder}", make)
    return folder


def cache_name(kind: str, folder: Path, option: str) -> str:
    """Return the name under which a converted folder is kept: its own, and a hash of where it lies and of its files.

    Names, sizes and times of modification stand for the content of the files, as for the data; Meta's tokenizer.model
    lies a level above its weights. Raises InputError where the folder is missing.
    """
    try:
        place = folder.resolve(strict=True)
        files = sorted(path for path in place.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{option}: {folder}: {error.strerror}; expected a folder with weights") from error
    if kind == "meta":
        files += [path for path in [place.parent / "tokenizer.model"] if path.is_file()]
    known = [kind, str(place), *((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)]
    return f"{place.name}-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}"


def convert(kind: str, folder: str, output: Path, option: str) -> None:
    """Run the import door, which verifies what it writes; raises ChildFailed after it has said why it failed."""
    root = Path(command_line.__file__).resolve().parents[1]
    if not (root / "convert" / f"{kind}.py").is_file():
        raise InputError(
            f"{option}: {root} has no convert/{kind}.py, which an installed panda_jax lacks; start from the checkout, "
            f"or run `python -m convert.{kind} import` there and give its output instead (model.init_from.checkpoint, "
            f"--checkpoint)"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    command_line.run_module(f"convert.{kind}", "import", "--input", folder, "--output", str(output))


def describe_origin(source: Path, weights: Weights, config: Config) -> dict[str, Any]:
    """Return what run.json remembers of the weights: where they lay, what they were, and what was added."""
    new_rows = config.model.vocab_size - weights.model.vocab_size
    wanted = config.model.init_from
    return {
        "path": str(source.resolve()),
        "provenance": weights.provenance,
        "dtype": ", ".join(sorted({tensor.dtype.name for tensor in weights.tensors.values()})),
        "added_tokens": weights.added_tokens,
        "new_rows": f"{new_rows} {wanted.new_rows}" if wanted and new_rows else None,
    }


def describe_start(source: Path, origin: dict[str, Any]) -> str:
    """Return e.g. `parameters from cache/weights/7B-… (meta: data/llama/7B, float16, root 1a2b3c4d5e6f…)`."""
    provenance = origin["provenance"]
    facts = [f"{provenance['format']}: {provenance['path']}"] if not _is_step(provenance) else []
    facts.append(origin["dtype"])
    if "root" in provenance:
        facts.append(f"root {provenance['root'][:12]}…")
    if origin["new_rows"]:
        facts.append(f"new rows: {origin['new_rows']}")
    return f"parameters from {source} ({', '.join(facts)})"


# ---- do they fit this run? ------------------------------------------------------------------------------------------


def check_same_model(source: Path, weights: Weights, config: Config, tokenizer: Tokenizer) -> None:
    """Raise InputError, with what to write, where the weights are of another architecture, vocabulary or tokenizer."""
    model, theirs = config.model, weights.model
    compared = [field.name for field in dataclasses.fields(model) if field.name not in run_record.NOT_ARCHITECTURE]
    compared.remove("vocab_size")
    wrong = [name for name in compared if getattr(model, name) != getattr(theirs, name)]
    if wrong:
        found = "; ".join(f"model.{name} {getattr(theirs, name)}, this run {getattr(model, name)}" for name in wrong)
        lines = ", ".join(f"`{name}: {json.dumps(getattr(theirs, name))}`" for name in wrong)
        raise InputError(f"model.init_from: {source} has {found}; write {lines} under `model:`")
    if weights.tokenizer_model is not None:
        digest = hashlib.sha256(weights.tokenizer_model).hexdigest()
        if digest != tokenizer.fingerprint:
            raise InputError(
                f"model.init_from: {source} has tokenizer {digest[:12]}…, this run {tokenizer.fingerprint[:12]}… "
                f"(SHA-256 of the file); write `path: {source / 'tokenizer.model'}` under `tokenizer:`"
            )
    check_rows(source, theirs.vocab_size, config, tokenizer)


def check_rows(source: Path, have: int, config: Config, tokenizer: Tokenizer) -> None:
    """Raise InputError where the run has fewer rows of vocabulary than the weights, or more and no rule for them."""
    rows, pieces, wanted = config.model.vocab_size, tokenizer.vocab_size, config.model.init_from
    found = f"model.init_from: {source} has {have} rows of vocabulary, this run {rows}"
    agree = f"write `vocab_size: {have}` under `model:` and `extra_ids: {have - pieces}` under `tokenizer:`"
    if rows < have:
        raise InputError(f"{found}; {agree}, or convert the weights with --drop-pad")
    if rows > have and wanted is not None and wanted.new_rows == "refuse":
        instead = f"{agree}, or " if have >= pieces else ""
        raise InputError(
            f"{found}; {instead}say how the {rows - have} new ones begin: `new_rows: normal`, `mean` or `zeros` under "
            f"`init_from:`"
        )


# ---- onto the devices, one parameter at a time ----------------------------------------------------------------------


def parameters(
    source: Path,
    weights: Weights,
    config: Config,
    shapes: dict[str, jax.ShapeDtypeStruct],
    release: Callable[[str], Any] = lambda name: None,
) -> Iterator[tuple[str, jax.Array]]:
    """Yield (name, array) of every parameter in `shapes`, laid out as they ask; `release(name)` is called before.

    Of weights on disk this process holds its shards of one parameter and one layer of it, never more. Checkpoints are
    read by Orbax, shard by shard, except for a vocabulary that grows.
    """
    grows = config.model.vocab_size > weights.model.vocab_size
    for name, wanted in shapes.items():
        release(name)
        # JAX lets go of the last parameter's host buffers only when Python collects garbage, be it of the young alone.
        gc.collect(0)
        if is_weights_folder(source) or (grows and name in VOCABULARY):
            yield name, assemble(wanted, itertools.chain(stored_pieces(weights, name), new_rows(weights, name, config)))
        else:
            yield name, checkpoints.restore_parameters(source, {name: wanted})[name]


def stored_pieces(weights: Weights, name: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Yield (where it begins, values in the model's layout) of each stored tensor of one of the model's parameters."""
    room, _, parameter = name.partition(".")
    if not parameter:
        array = to_model(name, weights.tensors[name].read(), weights.model)
        yield (0,) * array.ndim, array
        return
    for layer in range(weights.model.num_layers):
        stored = f"{room}.{layer}.{parameter}"
        array = to_model(stored, weights.tensors[stored].read(), weights.model)[None]
        yield (layer,) + (0,) * (array.ndim - 1), array


def new_rows(weights: Weights, name: str, config: Config) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Yield (where it begins, values in the model's layout) of the rows that the weights lack, if there are any.

    The rule is model.init_from.new_rows. The normal draws depend on `seed` and the parameter's name alone; the mean is
    taken in float64.
    """
    old, new = weights.model.vocab_size, config.model.vocab_size
    if name not in VOCABULARY or new == old or config.model.init_from is None:
        return
    rule, width = config.model.init_from.new_rows, weights.model.dim
    if rule == "normal":
        key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))
        rows = config.model.init_std * np.asarray(jax.random.normal(key, (new - old, width)))
    elif rule == "mean":
        mean = weights.tensors[name].read().mean(axis=0, dtype=np.float64)
        rows = np.broadcast_to(mean, (new - old, width))
    else:
        rows = np.zeros((new - old, width))
    values = rows.astype(np.float32)
    yield ((old, 0), values) if name == "embed" else ((0, old), values.T)


def assemble(wanted: jax.ShapeDtypeStruct, pieces: Iterable[tuple[tuple[int, ...], np.ndarray]]) -> jax.Array:
    """Return the array `wanted`, with its sharding, made of `pieces`: (where it begins, values), which must cover it.

    The host holds one piece, and each distinct shard of this process's devices once.
    """
    assert wanted.sharding is not None
    places = wanted.sharding.addressable_devices_indices_map(wanted.shape)
    bounds: dict[Any, Index] = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index or (), wanted.shape, strict=True))
        for device, index in places.items()
    }
    shards = {bound: np.empty([end - start for start, end in bound], wanted.dtype) for bound in bounds.values()}
    for origin, piece in pieces:
        for bound, shard in shards.items():
            _copy_overlap(origin, piece, bound, shard)
    arrays = [jax.device_put(shards[bound], device) for device, bound in bounds.items()]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, arrays))


def _copy_overlap(origin: tuple[int, ...], piece: np.ndarray, bound: Index, shard: np.ndarray) -> None:
    """Copy what `piece`, which begins at `origin`, shares with the shard that covers `bound`."""
    source, target = [], []
    for start, size, (first, last) in zip(origin, piece.shape, bound, strict=True):
        low, high = max(start, first), min(start + size, last)
        if low >= high:
            return
        source.append(slice(low - start, high - start))
        target.append(slice(low - first, high - first))
    shard[tuple(target)] = piece[tuple(source)]


def _is_step(provenance: dict[str, Any]) -> bool:
    return provenance.get("format") == "checkpoint"

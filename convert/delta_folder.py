"""Folders that hold differences between two models: our lossless form, and the two published ones.

ours        delta.json (written last), delta-00001.bin …, tokenizer.model: payloads of convert/delta_codec.py, the
            SHA-256 of every tensor of base and target, and the root hash of both models
published   a Hugging Face folder with differences in the place of weights; no hashes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from convert import delta_codec, mapping
from convert.delta_codec import Coded
from convert.delta_published import RULES, VOCABULARY, Evidence, apply_published, make_published
from convert.disk_file import DiskFile
from convert.hf_folder import CONFIG, config_of, model_of, read_config, read_tensors, special_ids, tokenizer_of
from convert.native import SHARD_BYTES, architecture, root_of
from convert.safetensors_sink import SafetensorsSink
from convert.tokenizer_files import sentencepiece_files
from convert.transfer import Entries, check_room, num_bytes
from panda_jax.atomic import write_atomically
from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.weights import DTYPE_NAMES, DTYPES, NUMPY_NAMES, Lazy, Weights, stored_shapes, tensor_sha256

INDEX = "delta.json"
NUM_THREADS = 2
RESTORE = "Restore the model with `python -m convert.delta apply --base BASE --delta THIS --output DIR`."
WARNING = "Differences between two models. Not a model: loaded as one it produces noise."


def is_ours(folder: Path) -> bool:
    """Tell our form from a published one; raises InputError where there is neither."""
    if not (folder / INDEX).is_file() and not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: no delta; expected {INDEX}, or {CONFIG} of a published one")
    return (folder / INDEX).is_file() and not (folder / CONFIG).is_file()


# ---- ours, written --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeltaFolder:
    """Writes our lossless delta between `base` and the model that is handed over."""

    base: Weights
    is_lossless: ClassVar[bool] = True

    def open(self, folder: Path, source: Weights, entries: Entries) -> DeltaSink:
        return DeltaSink(folder, self.base, source, entries)

    def reopen(self, folder: Path) -> Weights:
        return applied(folder, self.base)


class DeltaSink:
    """A delta folder while it is written."""

    def __init__(self, folder: Path, base: Weights, target: Weights, entries: Entries) -> None:
        self._folder, self._base, self._target, self._entries = folder, base, target, entries
        self._file: DiskFile | None = None
        self._listed: dict[str, dict[str, Any]] = {}
        self._num_files = 0

    def append(self, name: str, array: np.ndarray) -> None:
        tensor = self._base.tensors.get(name)
        base = tensor.read() if tensor is not None else None
        op, chunks = delta_codec.encode(base, array, NUM_THREADS)
        if self._file is None or self._file.tell() > SHARD_BYTES:
            self._close()
            self._num_files += 1
            self._file = DiskFile(self._folder / f"delta-{self._num_files:05}.bin")
        start = self._file.tell()
        for chunk in chunks:
            self._file.write(chunk)
        entry: dict[str, Any] = {"op": op, "shape": list(array.shape), "dtype": DTYPE_NAMES[array.dtype]}
        entry |= {"file": f"delta-{self._num_files:05}.bin", "offset": start, "num_bytes": self._file.tell() - start}
        if base is not None:
            entry["base"] = {"dtype": DTYPE_NAMES[base.dtype], "shape": list(base.shape), "sha256": tensor_sha256(base)}
        self._listed[name] = entry

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def finish(self, hashes: Mapping[str, str]) -> None:
        self._close()
        target = self._target
        for name, entry in self._listed.items():
            entry["sha256"] = hashes[name]
        if target.tokenizer_model is not None:
            write_atomically(self._folder / "tokenizer.model", [target.tokenizer_model])
        bases = {name: entry["base"] for name, entry in self._listed.items() if "base" in entry}
        index = {
            "format": delta_codec.FORMAT,
            "warning": WARNING,
            "base": {"root": root_of_entries(bases), "model": architecture(self._base.model)},
            "target": {"root": root_of(self._entries, hashes), "model": architecture(target.model),
                       "added_tokens": target.added_tokens},
            "files": {path.name: path.stat().st_size for path in sorted(self._folder.glob("delta-*.bin"))},
            "tensors": self._listed,
        }  # fmt: skip
        write_atomically(self._folder / "README.md", [f"# {WARNING}\n\n{RESTORE}\n".encode()])
        write_atomically(self._folder / INDEX, [json.dumps(index, ensure_ascii=False, indent=1).encode() + b"\n"])


# ---- ours, read -----------------------------------------------------------------------------------------------------


def read_index(folder: Path) -> dict[str, Any]:
    """Return delta.json; raises InputError for a damaged one, another format, or a file that is missing or cut off."""
    path = folder / INDEX
    index = read_config(path)
    try:
        delta_codec.check_format(index["format"], str(path))
        for name, size in index["files"].items():
            file = folder / name
            if file.parent != folder:
                raise InputError(f"{path}: names {name}, which lies outside the folder; do not trust it")
            if not file.is_file():
                raise InputError(f"{file}: missing; fetch it")
            if file.stat().st_size != size:
                raise InputError(f"{file}: {file.stat().st_size} bytes, expected {size}; fetch it again")
        Model(**index["base"]["model"])
        _check_entries(index, stored_shapes(Model(**index["target"]["model"])), path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{path}: damaged ({type(error).__name__} {message}); fetch it again") from error
    return index


def _check_entries(index: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise InputError, or what a missing field raises, unless the entries are those of a model with these shapes."""
    tensors = index["tensors"]
    for name in [*shapes, *tensors]:
        entry = tensors[name]
        whole = all(isinstance(entry[key], int) and entry[key] >= 0 for key in ("offset", "num_bytes"))
        is_coded = entry["op"] == "copy" or (entry["op"] in ("same", "diff", "rows") and "base" in entry)
        if not (whole and is_coded and tuple(entry["shape"]) == shapes[name] and entry["file"] in index["files"]):
            raise InputError(f"{path}: the entry of {name} is not of this model; fetch it again")
    bases = {name: entry["base"] for name, entry in tensors.items() if "base" in entry}
    for side, entries in (("base", bases), ("target", tensors)):
        if index[side]["root"] != root_of_entries(entries):
            raise InputError(f"{path}: the SHA-256 of the {side}'s tensors do not give its root; fetch it again")
    dict(index["target"]["added_tokens"])


def root_of_entries(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the root hash of tensors as delta.json lists them."""
    return delta_codec.root_hash((name, each["dtype"], tuple(each["shape"]), each["sha256"])
                                 for name, each in entries.items())  # fmt: skip


def applied(folder: Path, base: Weights) -> Weights:
    """Return the target of our delta: tensors that read the base, apply the difference, and check the result's SHA-256.

    The base itself is not checked here; see `check_base`.
    """
    index = read_index(folder)
    tensors: dict[str, Lazy] = {}
    model = Model(**index["target"]["model"])
    for name in stored_shapes(model):
        tensors[name] = _applied(folder, name, index["tensors"][name], base.tensors.get(name))
    tokenizer = folder / "tokenizer.model"
    provenance = {
        "format": "delta",
        "path": str(folder.absolute()),
        "base": base.provenance,
        "base_root": index["base"]["root"],
        "notes": [],
    }
    tokenizer_model = tokenizer.read_bytes() if tokenizer.is_file() else None
    return Weights(model, tensors, tokenizer_model, index["target"]["added_tokens"], provenance)


def _applied(folder: Path, name: str, entry: Mapping[str, Any], base: Lazy | None) -> Lazy:
    coded = Coded(entry["op"], tuple(entry["shape"]), DTYPES[entry["dtype"]], entry["num_bytes"])
    path = folder / entry["file"]

    def read() -> np.ndarray:
        array = _base_array(base, entry) if base is not None and coded.op != "copy" else None
        with path.open("rb") as file:
            file.seek(entry["offset"])
            result = delta_codec.decode(f"{path}: {name}", coded, array, file, NUM_THREADS)
        if tensor_sha256(result) != entry["sha256"]:
            raise InputError(f"{path}: {name} does not come out as it was made (SHA-256 differs); the base or the "
                             f"delta has changed")  # fmt: skip
        return result

    return Lazy(coded.shape, coded.dtype, read, entry["sha256"])


def _base_array(base: Lazy, entry: Mapping[str, Any]) -> np.ndarray:
    """Return the base in the dtype in which the delta was made: float32 copies of float16 weights serve as well."""
    return delta_codec.cast(base.read(), DTYPES[entry["base"]["dtype"]])


def check_base(folder: Path, base: Weights, advance: Any) -> str | None:
    """Return why `base` is not the one that our delta was made from, or None; every tensor of it is hashed."""
    index = read_index(folder)

    def fault(name: str) -> str | None:
        entry, tensor = index["tensors"][name], base.tensors.get(name)
        expected = entry.get("base")
        if expected is None or entry["op"] == "copy":
            return None
        if tensor is None or tensor.shape != tuple(expected["shape"]):
            return f"{name} is {list(tensor.shape) if tensor else 'absent'}, expected {expected['shape']}"
        array = _base_array(tensor, entry)
        advance(tensor.nbytes)
        known = tensor.sha256 if array.dtype == tensor.dtype else None
        is_same = (known or tensor_sha256(array)) == expected["sha256"]
        return None if is_same else f"{name} is another tensor (SHA-256 differs)"

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return next((found for found in pool.map(fault, index["tensors"]) if found), None)


# ---- published ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedFolder:
    """Writes a delta by Panda's or FastChat's rule, as a Hugging Face folder that says what it is."""

    base: Weights
    rule: str
    with_buffers: bool
    """Add the zero inv_freq buffers that transformers of 2023 wrote, for tools that ask for them."""
    is_lossless: ClassVar[bool] = False

    def open(self, folder: Path, source: Weights, entries: Entries) -> PublishedSink:
        return PublishedSink(folder, source, entries, self)

    def reopen(self, folder: Path) -> Weights:
        return applied_published(folder, self.base, self.rule, "keep", Ledger())


class PublishedSink:
    """A published delta while it is written."""

    def __init__(self, folder: Path, source: Weights, entries: Entries, target: PublishedFolder) -> None:
        self._folder, self._source, self._target = folder, source, target
        self._dtype = next(iter(entries.values()))[1]
        planned: Entries = {name: (shape, RULES[target.rule]) for name, (shape, _) in entries.items()}
        names = {name: row.hf for name, row in mapping.rows(source.model).items()}
        self._buffers = []
        if target.with_buffers:
            for layer in range(source.model.num_layers):
                name = f"layers.{layer}.inv_freq"
                planned[name] = ((source.model.head_dim // 2,), RULES[target.rule])
                names[name] = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
                self._buffers.append(name)
        check_room(folder, num_bytes(planned))  # more than the target's own size
        self._planned, self._names = planned, names
        self._files = SafetensorsSink(folder, "model", planned, names, SHARD_BYTES, is_single_bare=True)

    def append(self, name: str, array: np.ndarray) -> None:
        base = self._target.base.tensors.get(name)
        needs_base = self._target.rule != "panda" or name not in VOCABULARY
        old = base.read() if base is not None and needs_base else None
        self._files.append(name, make_published(self._target.rule, name, old, array, NUM_THREADS))

    def finish(self, hashes: Mapping[str, str]) -> None:
        for name in self._buffers:
            shape, dtype = self._planned[name]
            self._files.append(name, np.zeros(shape, dtype))
        source = self._source
        files: dict[str, bytes] = {"README.md": f"# {WARNING}\n\n{RESTORE}\n".encode()}
        if source.tokenizer_model is not None:
            length = source.model.context_length
            files |= sentencepiece_files(source.tokenizer_model, source.added_tokens, length, None)
        if len(set(self._files.file_of.values())) > 1:
            listed = {self._names[name]: file for name, file in self._files.file_of.items()}
            files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": listed}).encode()
        marks = {
            "architectures": ["LlamaDelta"],
            "delta_rule": self._target.rule,
            "delta_target_dtype": self._dtype.name,
        }
        config = config_of(source.model, RULES[self._target.rule].name) | special_ids(source) | marks
        files[CONFIG] = json.dumps(config, indent=2).encode() + b"\n"
        for name, content in files.items():
            write_atomically(self._folder / name, [content])


@dataclass
class Ledger:
    """What the tensors read so far of a published delta say about its base."""

    evidence: dict[str, Evidence] = field(default_factory=dict)

    def total(self) -> Evidence:
        return sum(self.evidence.values(), Evidence())


# Above this the differences are as large as the weights: they were taken from other weights.
SUSPICIOUS_RMS_RATIO = 0.5
SUSPICIOUS_INEXACT_SHARE = 0.01


def _rule_of(path: Path, settings: Mapping[str, Any], found: Mapping[str, Lazy], given: str | None) -> str:
    """Return the rule that was given, that config.json names, or that the dtype speaks for."""
    named = settings.get("delta_rule")
    if (named or given or next(iter(RULES))) not in RULES or (named and given and named != given):
        raise InputError(f"{path}: delta_rule is {named!r}, expected {given or ' or '.join(RULES)}; leave out --rule")
    if named or given:
        return str(named or given)
    dtypes = {tensor.dtype for name, tensor in found.items() if not mapping.is_ignored(name)}
    fitting = [rule for rule, dtype in RULES.items() if dtypes == {dtype}]
    if not fitting:
        raise InputError(f"{path.parent}: a delta in {' and '.join(sorted(map(str, dtypes)))}, which no published one "
                         f"is; name its rule by --rule {' or '.join(RULES)}")  # fmt: skip
    return fitting[0]


def applied_published(folder: Path, base: Weights, rule: str | None, dtype: str, ledger: Ledger) -> Weights:
    """Return the target of a published delta; `rule` None is the one that it names or that its dtype speaks for.

    `dtype` keep is the one that the delta names, or else the usual one of its rule. Every tensor that is
    read enters the ledger. Raises InputError, on reading, where the differences are as large as the weights.
    """
    settings = read_config(folder / CONFIG)
    found, container = read_tensors(folder)
    rule = _rule_of(folder / CONFIG, settings, found, rule)
    model = model_of(settings, folder / CONFIG, is_tied="lm_head.weight" not in found)
    notes: list[str] = []
    deltas = mapping.take(found, {name: row.hf for name, row in mapping.rows(model).items()}, model, str(folder))
    _check_shapes(deltas, base, rule)
    usual = settings.get("delta_target_dtype") or ("bfloat16" if rule == "panda" else "float16")
    wanted = NUMPY_NAMES.get(usual if dtype == "keep" else dtype)
    if wanted is None:
        raise InputError(f"{folder / CONFIG}: delta_target_dtype is {usual!r}, expected float32, float16 or bfloat16")
    tensors = {name: _published(folder, rule, name, delta, base.tensors.get(name), wanted, ledger)
               for name, delta in deltas.items()}  # fmt: skip
    tokenizer_model, added_tokens = tokenizer_of(folder, model, notes)
    provenance = {"format": f"{rule} delta", "path": str(folder.absolute()), "container": container,
                  "base": base.provenance, "notes": notes}  # fmt: skip
    return Weights(model, tensors, tokenizer_model, added_tokens, provenance)


def _check_shapes(deltas: Mapping[str, Lazy], base: Weights, rule: str) -> None:
    """Raise InputError before anything is written where the base has other tensors than the delta was made from."""
    for name, delta in deltas.items():
        found = base.tensors.get(name)
        is_free = name in VOCABULARY and (rule == "panda" or (found and found.shape[1:] == delta.shape[1:]))
        if not is_free and (found is None or found.shape != delta.shape):
            raise InputError(f"the base's {name} is {list(found.shape) if found else 'absent'}, the delta's "
                             f"{list(delta.shape)}: it was made from another model")  # fmt: skip


def _published(
    folder: Path, rule: str, name: str, delta: Lazy, base: Lazy | None, dtype: np.dtype, ledger: Ledger
) -> Lazy:
    is_full = rule == "panda" and name in VOCABULARY

    def read() -> np.ndarray:
        old = None if is_full or base is None else base.read()
        result, evidence = apply_published(rule, name, old, delta.read(), dtype, NUM_THREADS)
        if not name.endswith("norm"):
            _refuse_suspicious(f"{folder}: {name}", evidence, result, rule)
        ledger.evidence[name] = evidence
        return result

    return Lazy(delta.shape, dtype, read)


def _refuse_suspicious(place: str, evidence: Evidence, result: np.ndarray, rule: str) -> None:
    """Raise InputError where the numbers speak of another base than the delta's."""
    if evidence.rms_ratio >= SUSPICIOUS_RMS_RATIO:
        raise InputError(f"{place}: the difference is {evidence.rms_ratio:.2f} times the base's weights; the delta was "
                         f"made from another base")  # fmt: skip
    # The target was stored in 16 bits: with its own base every sum is one of its values, with another one hardly any.
    share = evidence.inexact / max(result.size, 1)
    if rule == "panda" and result.dtype.itemsize == 2 and share > SUSPICIOUS_INEXACT_SHARE:
        raise InputError(f"{place}: {share:.0%} of base + delta are no {result.dtype.name} numbers; the delta was made "
                         f"from another base, or for another dtype: keep the sums with --dtype float32")  # fmt: skip

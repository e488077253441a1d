"""A Hugging Face folder with a LLaMA: read in every container it is published in, written as safetensors."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import ValidationError

from convert import mapping, pth
from convert.safetensors_sink import SafetensorsSink
from convert.tokenizer_files import read_tokenizer, sentencepiece_files, tokenizer_files
from convert.transfer import Entries, num_bytes
from panda_jax.atomic import write_atomically
from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.weights import Lazy, Weights, read_safetensors, refuse_unproven

CONFIG = "config.json"
# What files of 2023 leave out: transformers fills it in with these.
ABSENT = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048}
# The containers, in the order in which transformers looks for them: index or single file.
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


# ---- reading --------------------------------------------------------------------------------------------------------


def read_hf(folder: Path) -> Weights:
    """Open a folder with config.json and weights; nothing of the weights is read yet.

    Raises InputError for another architecture, for settings that our model does not have, and for tensors that are
    missing, superfluous or of another shape than config.json says.
    """
    refuse_delta(folder)
    refuse_unproven(folder)
    settings = read_config(folder / CONFIG)
    found, container = read_tensors(folder)
    model = model_of(settings, folder / CONFIG, is_tied="lm_head.weight" not in found)
    wanted = {name: row.hf for name, row in mapping.rows(model).items()}
    notes = []
    if model.tie_embeddings and found.pop("lm_head.weight", None):
        notes.append("lm_head.weight left out: config.json ties it to the embedding")
    tensors = mapping.take(found, wanted, model, str(folder))
    if any(mapping.is_ignored(name) for name in found):
        notes.append("rotary inv_freq buffers left out: they are computed")
    tokenizer_model, added_tokens = tokenizer_of(folder, model, notes)
    provenance = {"format": "hf", "path": str(folder.absolute()), "container": container, "notes": notes}
    return Weights(model, tensors, tokenizer_model, added_tokens, provenance)


def read_config(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a Hugging Face model folder") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: a JSON {type(settings).__name__}, expected an object; fetch it again")
    return settings


def refuse_delta(folder: Path) -> None:
    """Raise InputError for a folder that is marked as holding differences instead of weights."""
    named = read_config(folder / CONFIG).get("architectures") if (folder / CONFIG).is_file() else None
    if (folder / "delta.json").exists() or "Delta" in str(named):
        raise InputError(f"{folder}: a delta, not a model; run `python -m convert.delta apply --base BASE --delta "
                         f"{folder} --output DIR` first")  # fmt: skip


def model_of(settings: Mapping[str, Any], path: Path, is_tied: bool) -> Model:
    """Return the model that a config.json of any age describes; `is_tied`: the files hold no output layer."""
    if settings.get("model_type") != "llama":
        raise InputError(f"{path}: model_type is {settings.get('model_type')!r}, expected 'llama'")
    refused = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    for key, expected in refused.items():
        if settings.get(key, expected) != expected:
            raise InputError(f"{path}: {key} is {settings[key]!r}, and our LLaMA has {expected!r} only")
    rope = _rope(settings, path)
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    if wrong := [key for key in keys if not isinstance(settings.get(key), int) or settings[key] < 1]:
        raise InputError(f"{path}: {wrong[0]} is {settings.get(wrong[0])!r}, expected a whole number above 0")
    vocab_size, dim, num_layers, num_heads, mlp_dim = (settings[key] for key in keys)
    head_dim = settings.get("head_dim") or dim // num_heads
    if head_dim * num_heads != dim:
        raise InputError(f"{path}: head_dim {head_dim} times {num_heads} heads is not hidden_size {dim}; our LLaMA "
                         f"has no such heads")  # fmt: skip
    if is_tied and not settings.get("tie_word_embeddings"):
        raise InputError(f"{path}: tie_word_embeddings is false, or absent, and there is no lm_head.weight; is a shard "
                         f"missing?")  # fmt: skip
    return build_model(
        path,
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=settings.get("num_key_value_heads") or num_heads,
        mlp_dim=mlp_dim,
        norm_eps=settings.get("rms_norm_eps", ABSENT["rms_norm_eps"]),
        context_length=settings.get("max_position_embeddings")
        or settings.get("max_sequence_length")
        or ABSENT["max_position_embeddings"],
        rope_theta=rope,
        tie_embeddings=bool(settings.get("tie_word_embeddings")),
    )


def build_model(path: Path, **fields: Any) -> Model:
    """Return the model with these fields; raise InputError, beginning with `path`, where they contradict each other."""
    try:
        return Model(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{name}: " for name in first["loc"])
        raise InputError(f"{path}: {field}{first['msg'].removeprefix('Value error, ')}") from error


def _rope(settings: Mapping[str, Any], path: Path) -> float:
    """Return the base of the rotary frequencies, from the old keys or the new; refuse a scaling we do not have."""
    parameters, scaling = (settings.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise InputError(f"{path}: rope_parameters or rope_scaling is no object; fetch it again")
    kinds = {each.get(key) for each in (parameters, scaling) for key in ("rope_type", "type")} - {None, "default"}
    if kinds:
        raise InputError(f"{path}: rotary scaling {kinds.pop()!r} is not supported; expected 'default' or none")
    theta = parameters.get("rope_theta") or settings.get("rope_theta") or ABSENT["rope_theta"]
    if not isinstance(theta, int | float):
        raise InputError(f"{path}: rope_theta is {theta!r}, expected a number")
    return float(theta)


def read_tensors(folder: Path) -> tuple[dict[str, Lazy], str]:
    """Return every tensor of a folder under its own name, and the container's name, without reading the weights.

    Raises InputError for an index that names a missing file or tensor, and for files that hold more than it says.
    """
    for single, read in ((SAFETENSORS, read_safetensors), (PICKLED, pth.read)):
        if (folder / single).is_file():
            return read(folder / single), single
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _read_indexed(index, read), index.name
    raise InputError(f"{folder}: no weights; expected {SAFETENSORS} or {PICKLED}, or their .index.json with shards")


def _read_indexed(index: Path, read: Any) -> dict[str, Lazy]:
    listed = read_config(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise InputError(f"{index}: no weight_map from tensors to files; fetch it again")
    found: dict[str, Lazy] = {}
    for file in sorted(set(listed.values())):
        path = index.parent / file
        if path.parent != index.parent:
            raise InputError(f"{index}: names {file}, which lies outside the folder; do not trust it")
        if not path.is_file():
            raise InputError(f"{index}: names {file}, which is not there; fetch it")
        tensors = read(path)
        expected = {name for name, place in listed.items() if place == file}
        for name in sorted(expected.symmetric_difference(tensors)):
            where = "is not in it" if name in expected else "is in it but not in the index"
            raise InputError(f"{path}: {name} {where}; fetch the index and the shards of one and the same model")
        found |= tensors
    return found


def tokenizer_of(folder: Path, model: Model, notes: list[str]) -> tuple[bytes | None, dict[str, int]]:
    """Return the SentencePiece file and the added tokens; raise InputError when they need more rows than there are."""
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")):
        notes.append("no tokenizer in the folder")
        return None, {}
    tokenizer_model, added_tokens = read_tokenizer(folder)
    check_vocabulary(tokenizer_model, added_tokens, model, str(folder), notes)
    return tokenizer_model, added_tokens


def check_vocabulary(
    tokenizer_model: bytes, added_tokens: Mapping[str, int], model: Model, place: str, notes: list[str]
) -> None:
    """Raise InputError when text can become an id that the model has no row for; note rows that no text reaches."""
    needed = 1 + max([Tokenizer(tokenizer_model, place).vocab_size - 1, *added_tokens.values()])
    if needed > model.vocab_size:
        raise InputError(f"{place}: the tokenizer has {needed} ids, the embedding {model.vocab_size} rows; they "
                         f"belong to different models")  # fmt: skip
    if needed < model.vocab_size:
        notes.append(f"{model.vocab_size - needed} rows of the embedding beyond the tokenizer's {needed} ids")


# ---- writing --------------------------------------------------------------------------------------------------------


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    """Add the choice of what is written for a vocabulary that tokenizer.json cannot reproduce."""
    parser.add_argument(
        "--tokenizer", choices=("exact", "sentencepiece"), default="exact",
        help="exact: tokenizer.json with SentencePiece's very ids, or refuse; sentencepiece: tokenizer.model alone",
    )  # fmt: skip


@dataclass(frozen=True)
class HfFolder:
    """Writes folders that transformers 4 and 5, vLLM and llama.cpp load."""

    shard_bytes: int
    chat_template: str | None
    card: str
    """README.md."""
    is_tokenizer_exact: bool
    """Write tokenizer.json, or refuse; otherwise tokenizer.model alone."""
    is_lossless: ClassVar[bool] = True

    def open(self, folder: Path, source: Weights, entries: Entries) -> HfSink:
        return HfSink(folder, source, entries, self)

    def reopen(self, folder: Path) -> Weights:
        return read_hf(folder)


class HfSink:
    """A Hugging Face folder while it is written."""

    def __init__(self, folder: Path, source: Weights, entries: Entries, target: HfFolder) -> None:
        self._folder, self._source, self._entries, self._target = folder, source, entries, target
        self._names = {name: row.hf for name, row in mapping.rows(source.model).items()}
        self._files = SafetensorsSink(folder, "model", entries, self._names, target.shard_bytes, is_single_bare=True)

    def append(self, name: str, array: np.ndarray) -> None:
        self._files.append(name, array)

    def finish(self, hashes: Mapping[str, str]) -> None:
        source, target = self._source, self._target
        files: dict[str, bytes] = {"README.md": target.card.encode()}
        if source.tokenizer_model is not None:
            length = source.model.context_length
            write = tokenizer_files if target.is_tokenizer_exact else sentencepiece_files
            files |= write(source.tokenizer_model, source.added_tokens, length, target.chat_template)
        if len(set(self._files.file_of.values())) > 1:
            files[f"{SAFETENSORS}.index.json"] = _json(self._index())
        special = special_ids(source)
        dtype = next(iter(self._entries.values()))[1].name
        files["generation_config.json"] = _json({name: value for name, value in special.items() if value is not None})
        files[CONFIG] = _json(config_of(source.model, dtype) | special)
        for name, content in files.items():
            write_atomically(self._folder / name, [content])

    def _index(self) -> dict[str, Any]:
        count = sum(math.prod(shape) for shape, _ in self._entries.values())
        weight_map = {self._names[name]: file for name, file in self._files.file_of.items()}
        sizes = {"total_size": num_bytes(self._entries), "total_parameters": count}
        return {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}


def special_ids(source: Weights) -> dict[str, int | None]:
    """Return the ids that generation needs; a padding id only where there is a token for it."""
    if source.tokenizer_model is None:
        return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    tokenizer = Tokenizer(source.tokenizer_model, "tokenizer.model")
    pad = source.added_tokens.get("[PAD]")
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}


def config_of(model: Model, dtype: str) -> dict[str, Any]:
    """Return config.json with the keys of transformers 4 and of 5, where they differ both."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
        "initializer_range": model.init_std,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n"

"""Meta's layout: consolidated.00.pth … one file per model-parallel rank, params.json, tokenizer.model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from convert import mapping, pth
from convert.hf_folder import build_model, check_vocabulary, read_config
from convert.transfer import Entries
from panda_jax.atomic import write_atomically
from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.weights import Lazy, Weights, refuse_unproven, tensor_sha256

PARAMS = "params.json"
RANK_FILE = re.compile(r"consolidated\.(\d+)\.pth")
# Keys of Llama 3's params.json: its embedding is split along the other axis and its rotation is scaled.
LLAMA_3_KEYS = ("use_scaled_rope", "scaled_rope", "vision_chunk_size")
LLAMA_1_CONTEXT, LLAMA_2_CONTEXT = 2048, 4096
# What Meta's code takes where params.json is silent.
DEFAULT_NORM_EPS, DEFAULT_ROPE_THETA = 1e-5, 10000.0


# ---- reading --------------------------------------------------------------------------------------------------------


def read_meta(folder: Path) -> Weights:
    """Open a folder as Meta publishes it; nothing of the weights is read yet, but tensors that every rank holds.

    Raises InputError where params.json and the tensors disagree, for missing ranks, and for Llama 3.
    """
    refuse_unproven(folder)
    params = read_params(folder / PARAMS)
    ranks = read_ranks(folder)
    notes: list[str] = []
    model = model_of(params, ranks, folder, notes)
    table = mapping.rows(model)
    wanted = {name: row.meta for name, row in table.items()}
    found = mapping.take(merged(ranks, folder), wanted, model, str(folder))
    tensors = {name: mapping.from_meta(found[name], row, model) for name, row in table.items()}
    _compare_replicas(ranks, table, notes)
    tokenizer_model = _tokenizer(folder, model, notes)
    provenance = {
        "format": "meta",
        "path": str(folder.absolute()),
        "ranks": len(ranks),
        "params": params,
        "notes": notes,
    }
    return Weights(model, tensors, tokenizer_model, {}, provenance)


def read_ranks(folder: Path) -> list[dict[str, Lazy]]:
    """Return the tensors of every rank's file, under Meta's names; raise InputError unless all have the same ones."""
    ranks = [pth.read(path) for path in rank_files(folder)]
    for number, rank in enumerate(ranks):
        if differing := sorted(set(rank) ^ set(ranks[0])):
            raise InputError(f"{folder}: {differing[0]} is in one of ranks 0 and {number} only; fetch the files again")
    return ranks


def merged(ranks: list[dict[str, Lazy]], folder: Path) -> dict[str, Lazy]:
    """Return the whole tensors of all ranks, under Meta's names and in Meta's order of rows."""
    return {name: mapping.merge([rank[name] for rank in ranks], mapping.row_of_meta(name), f"{folder}: {name}")
            for name in ranks[0] if not mapping.is_ignored(name)}  # fmt: skip


def read_params(path: Path) -> dict[str, Any]:
    params = read_config(path)
    for key in LLAMA_3_KEYS:
        if key in params:
            raise InputError(f"{path}: {key} says that this is Llama 3, which is not supported; LLaMA-1 and 2 are")
    for key in ("dim", "n_layers", "n_heads", "multiple_of"):
        if not isinstance(params.get(key), int) or params[key] < 1:
            raise InputError(f"{path}: {key} is {params.get(key)!r}, expected a whole number above 0")
    for key in ("n_kv_heads", "max_seq_len", "ffn_dim_multiplier", "norm_eps", "rope_theta"):
        kinds = int if key in ("n_kv_heads", "max_seq_len") else (int, float)
        if params.get(key) is not None and (not isinstance(params[key], kinds) or params[key] <= 0):
            raise InputError(f"{path}: {key} is {params[key]!r}, expected a number above 0")
    return params


def rank_files(folder: Path) -> list[Path]:
    """Return the files of all ranks in their numeric order; raise InputError unless they are 0, 1, 2, …"""
    found = {
        int(match[1]): path for path in folder.glob("consolidated.*.pth") if (match := RANK_FILE.fullmatch(path.name))
    }
    if sorted(found) != list(range(len(found))) or not found:
        raise InputError(f"{folder}: ranks {sorted(found) or 'none'} of consolidated.NN.pth, expected 0, 1, 2 … "
                         f"without a gap; fetch the missing ones")  # fmt: skip
    return [found[rank] for rank in sorted(found)]


def mlp_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Return Meta's hidden width; int() after each step is part of the rule."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def is_llama_2(params: Mapping[str, Any], dtype: np.dtype) -> bool:
    """Guess by dtype: LLaMA-1 was published in float16, Llama-2 in bfloat16; params.json does not tell 65B from it."""
    return dtype == ml_dtypes.bfloat16 or "n_kv_heads" in params


def context_of(params: Mapping[str, Any], dtype: np.dtype) -> int:
    """Return the number of positions: what params.json says, or that of the family."""
    return params.get("max_seq_len") or (LLAMA_2_CONTEXT if is_llama_2(params, dtype) else LLAMA_1_CONTEXT)


def model_of(params: Mapping[str, Any], ranks: list[dict[str, Lazy]], folder: Path, notes: list[str]) -> Model:
    """Return the model; the vocabulary comes from the tensors, for params.json may say -1."""
    dim, num_heads = params["dim"], params["n_heads"]
    num_kv_heads = params.get("n_kv_heads") or num_heads
    if num_kv_heads % len(ranks):
        raise InputError(f"{folder}: {num_kv_heads} key/value heads cannot lie on {len(ranks)} ranks; a rank is "
                         f"missing or there is one too many")  # fmt: skip
    embedding = ranks[0].get("tok_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{folder}: no matrix tok_embeddings.weight in consolidated.00.pth; expected Meta's names")
    found_layers = mapping.num_layers(ranks[0], "layers.{}.attention.wq.weight")
    if found_layers != params["n_layers"]:
        raise InputError(f"{folder / PARAMS}: n_layers is {params['n_layers']}, the files hold {found_layers} layers")
    frequencies = ranks[0].get("rope.freqs")
    if frequencies is not None and frequencies.shape != (dim // num_heads // 2,):
        raise InputError(f"{folder / PARAMS}: n_heads {num_heads} and dim {dim} make heads of {dim // num_heads}, the "
                         f"files' rope.freqs is for {2 * math.prod(frequencies.shape)}; one is wrong")  # fmt: skip
    width = mlp_dim(dim, params["multiple_of"], params.get("ffn_dim_multiplier"))
    context = context_of(params, embedding.dtype)
    if "max_seq_len" not in params:
        notes.append(f"params.json does not say for how many positions: {context} assumed")
    eps = params.get("norm_eps") or DEFAULT_NORM_EPS
    if eps == 1e-6 and is_llama_2(params, embedding.dtype):
        notes.append("norm_eps is 1e-6: Llama-2-7b-chat was first shipped with this by mistake, 1e-5 is right there")
    return build_model(
        folder / PARAMS,
        vocab_size=embedding.shape[0],
        dim=dim,
        num_layers=params["n_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_dim=width,
        norm_eps=eps,
        context_length=context,
        rope_theta=params.get("rope_theta") or DEFAULT_ROPE_THETA,
    )


def _compare_replicas(ranks: list[dict[str, Lazy]], table: Mapping[str, mapping.Row], notes: list[str]) -> None:
    """Note the tensors that every rank should hold alike and does not; rank 0 wins, as in Meta's own loader."""
    for row in table.values():
        if row.rank_axis is None and len(ranks) > 1:
            hashes = [tensor_sha256(rank[row.meta].read()) for rank in ranks]
            if differing := [number for number, digest in enumerate(hashes) if digest != hashes[0]]:
                notes.append(f"{row.meta} differs between rank 0 and {differing}: rank 0 taken")


def _tokenizer(folder: Path, model: Model, notes: list[str]) -> bytes | None:
    """Return tokenizer.model from the folder or, as Meta ships it, from the one above."""
    for path in (folder / "tokenizer.model", folder.absolute().parent / "tokenizer.model"):
        if path.is_file():
            content = path.read_bytes()
            check_vocabulary(content, {}, model, str(path), notes)
            return content
    notes.append("no tokenizer.model in the folder or above it")
    return None


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetaFolder:
    """Writes folders in Meta's layout."""

    num_ranks: int
    is_lossless: ClassVar[bool] = True

    def open(self, folder: Path, source: Weights, entries: Entries) -> MetaSink:
        model = source.model
        if model.tie_embeddings:
            raise InputError("Meta's layout has no tied output layer; export to Hugging Face's instead")
        if model.num_kv_heads % self.num_ranks:
            raise InputError(f"--shards {self.num_ranks}: does not divide the {model.num_kv_heads} key/value heads")
        if source.added_tokens:
            names = ", ".join(source.added_tokens)
            source.provenance.setdefault("notes", []).append(
                f"Meta's layout has no place for the added tokens {names}; their rows stay"
            )
        return MetaSink(folder, source, entries, self.num_ranks)

    def reopen(self, folder: Path) -> Weights:
        return read_meta(folder)


class MetaSink:
    """A folder in Meta's layout while it is written: every rank's file grows at the same time."""

    def __init__(self, folder: Path, source: Weights, entries: Entries, num_ranks: int) -> None:
        self._folder, self._source, self._num_ranks = folder, source, num_ranks
        self._rows = mapping.rows(source.model)
        self._params = params_of(source, entries["embed"][1])
        self._pool = ThreadPoolExecutor(2)
        self._writers = [
            pth.Writer(folder / f"consolidated.{rank:02}.pth", self._rank_entries(entries, rank))
            for rank in range(num_ranks)
        ]

    def _rank_entries(self, entries: Entries, rank: int) -> Entries:
        result: Entries = {}
        for name, (shape, dtype) in entries.items():
            row, size = self._rows[name], list(shape)
            if row.rank_axis is not None:
                start, end = mapping.rank_slices(size[row.rank_axis], self._num_ranks)[rank]
                size[row.rank_axis] = end - start
            result[row.meta] = (tuple(size), dtype)
        return result

    def append(self, name: str, array: np.ndarray) -> None:
        parts = mapping.split(array, self._rows[name], self._source.model, self._num_ranks)
        # The checksums of the parts are taken at the same time.
        list(self._pool.map(pth.Writer.append, self._writers, parts))

    def finish(self, hashes: Mapping[str, str]) -> None:
        list(self._pool.map(pth.Writer.close, self._writers))
        self._pool.shutdown()
        if self._source.tokenizer_model is not None:
            write_atomically(self._folder / "tokenizer.model", [self._source.tokenizer_model])
        write_atomically(self._folder / PARAMS, [json.dumps(self._params, indent=1).encode() + b"\n"])


def params_of(source: Weights, dtype: np.dtype) -> dict[str, Any]:
    """Return params.json: the one the weights came with, or one whose rule gives the model's width.

    Meta's code stops at keys that it does not know, so the newer ones are written only where its defaults are wrong.
    """
    model = source.model
    params: dict[str, Any] | None = source.provenance.get("params")
    if params is None:
        params = {"dim": model.dim, "n_layers": model.num_layers, "n_heads": model.num_heads}
        params |= {"norm_eps": model.norm_eps} | _width_rule(model)
        if model.num_kv_heads != model.num_heads:
            params["n_kv_heads"] = model.num_kv_heads
        if model.rope_theta != DEFAULT_ROPE_THETA:
            params["rope_theta"] = model.rope_theta
    if context_of(params, dtype) != model.context_length:
        params = params | {"max_seq_len": model.context_length}
    return params | {"vocab_size": -1}


def _width_rule(model: Model) -> dict[str, Any]:
    """Return multiple_of and, if needed, ffn_dim_multiplier, which give model.mlp_dim by Meta's rule."""
    for multiple_of in (256, 4096, *(2**power for power in range(7, -1, -1))):
        for rest in ({}, {"ffn_dim_multiplier": 1.3}):
            if mlp_dim(model.dim, multiple_of, rest.get("ffn_dim_multiplier")) == model.mlp_dim:
                return {"multiple_of": multiple_of} | rest
    multiplier = model.mlp_dim / int(2 * (4 * model.dim) / 3)
    for candidate in (multiplier, np.nextafter(multiplier, np.inf)):
        if mlp_dim(model.dim, 1, float(candidate)) == model.mlp_dim:
            return {"multiple_of": 1, "ffn_dim_multiplier": float(candidate)}
    raise InputError(f"Meta's rule for the hidden width gives no {model.mlp_dim} at dim {model.dim}")

"""A weights folder written by hand, and what its tensors are in the model's layout, both without our code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from panda_jax.config import Model

DTYPES = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}


def random_tensors(model: Model, dtype: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Return every tensor of `model` as it is stored, [out, in], one per layer."""
    draw = np.random.default_rng(seed)
    D, F, V, H = model.dim, model.mlp_dim, model.vocab_size, model.dim // model.num_heads
    NH, KH = model.num_heads * H, model.num_kv_heads * H
    layer = {"attn_norm": (D,), "wq": (NH, D), "wk": (KH, D), "wv": (KH, D), "wo": (D, NH), "mlp_norm": (D,)}
    layer |= {"w_gate": (F, D), "w_up": (F, D), "w_down": (D, F)}
    shapes = {f"layers.{i}.{name}": shape for i in range(model.num_layers) for name, shape in layer.items()}
    shapes |= {"embed": (V, D), "norm": (D,)} | ({} if model.tie_embeddings else {"lm_head": (V, D)})
    return {name: draw.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(folder: Path, model: Model, tensors: dict[str, np.ndarray], tokenizer_model: bytes | None) -> Path:
    """Write the folder, its tensors in two files, and return it."""
    folder.mkdir(parents=True)
    names = list(tensors)
    entries = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"weights-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        for name in part:
            digest = hashlib.sha256(tensors[name].tobytes()).hexdigest()
            dtype = DTYPES[tensors[name].dtype.name]
            entries[name] = {"file": file, "dtype": dtype, "shape": list(tensors[name].shape), "sha256": digest}
    if tokenizer_model is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer_model)
    architecture = {name: value for name, value in dataclasses.asdict(model).items() if name != "init_from"}
    provenance = {"format": "hf", "path": "somebody/llama", "root": "1a2b" * 16}
    index = {"format": "panda_jax weights 1", "model": architecture, "tensors": entries, "provenance": provenance}
    (folder / "weights.json").write_text(json.dumps(index | {"added_tokens": {"[PAD]": 95}}), "utf-8")
    return folder


def in_model_layout(tensors: dict[str, np.ndarray], model: Model) -> dict[str, np.ndarray]:
    """Return the model's arrays, float32: output o = n * H + h of a projection is head n, component h."""
    N, K, H, D = model.num_heads, model.num_kv_heads, model.dim // model.num_heads, model.dim
    turn = {
        "wq": lambda w: w.reshape(N, H, D).transpose(2, 0, 1),
        "wk": lambda w: w.reshape(K, H, D).transpose(2, 0, 1),
        "wv": lambda w: w.reshape(K, H, D).transpose(2, 0, 1),
        "wo": lambda w: w.reshape(D, N, H).transpose(1, 2, 0),
        "w_gate": np.transpose, "w_up": np.transpose, "w_down": np.transpose, "lm_head": np.transpose,
    }  # fmt: skip
    wide = {name: turn.get(name.split(".")[-1], lambda w: w)(w.astype(np.float32)) for name, w in tensors.items()}
    arrays = {name: wide[name] for name in ("embed", "norm", "lm_head") if name in wide}
    for parameter in [name.split(".")[-1] for name in tensors if name.startswith("layers.0.")]:
        stack = [wide[f"layers.{layer}.{parameter}"] for layer in range(model.num_layers)]
        arrays[f"layers.{parameter}"] = np.stack(stack)
    return arrays

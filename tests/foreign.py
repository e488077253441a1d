"""Models in other people's layouts, written by torch and by loops, not by our code; and calls of the converters' doors.

    D width, F mlp, N heads, K kv heads, H head dim, V vocab

A model is a dict of torch tensors under Hugging Face's names. PROTOCOLS.md §1 says how Meta lays out the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import spelled_models
import torch
from pth_files import torch_bits
from safetensors import safe_open
from safetensors.torch import save_file

from panda_jax.command_line import exit_status

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Size:
    dim: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    params: dict[str, Any]
    """The keys of params.json that give mlp_dim: h = int(8/3 D), times the multiplier, up to a multiple."""
    num_layers: int = 2
    vocab_size: int = 271
    context_length: int = 96
    norm_eps: float = 1e-5
    rope_theta: float = 5e4

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


# int(8 * 32 / 3) = 85 -> 88; int(0.75 * 85) = 63, and without the first int() 64 -> 70; int(8 * 48 / 3) = 128 -> 132.
# 271 is prime, 2 does not divide 63, and 8 does not divide 132.
GQA = Size(32, 4, 2, 88, {"multiple_of": 44})
SMALL_MLP = Size(32, 4, 2, 63, {"multiple_of": 7, "ffn_dim_multiplier": 0.75})
EIGHT_HEADS = Size(48, 8, 8, 132, {"multiple_of": 44})

# The tokenizer has 271 pieces: three control pieces, 256 bytes, twelve characters.
TOKENIZER = spelled_models.spell(spelled_models.singles("▁天地玄黄宇宙洪荒日月盈"))

# Hugging Face's name -> ours, Meta's, the axis that Meta splits (None: on every rank), the rotated heads.
LAYER = {
    "input_layernorm": ("attn_norm", "attention_norm", None, None),
    "self_attn.q_proj": ("wq", "attention.wq", 0, "num_heads"),
    "self_attn.k_proj": ("wk", "attention.wk", 0, "num_kv_heads"),
    "self_attn.v_proj": ("wv", "attention.wv", 0, None),
    "self_attn.o_proj": ("wo", "attention.wo", 1, None),
    "post_attention_layernorm": ("mlp_norm", "ffn_norm", None, None),
    "mlp.gate_proj": ("w_gate", "feed_forward.w1", 0, None),
    "mlp.up_proj": ("w_up", "feed_forward.w3", 0, None),
    "mlp.down_proj": ("w_down", "feed_forward.w2", 1, None),
}
WHOLE = {
    "model.embed_tokens": ("embed", "tok_embeddings", 1, None),
    "model.norm": ("norm", "norm", None, None),
    "lm_head": ("lm_head", "output", 0, None),
}


def names(hf: str) -> tuple[str, str, int | None, str | None]:
    """Return our name, Meta's, the split axis and the rotated heads of a tensor of Hugging Face's."""
    stem = hf.removesuffix(".weight")
    if stem in WHOLE:
        ours, meta, axis, heads = WHOLE[stem]
        return ours, f"{meta}.weight", axis, heads
    _, _, layer, rest = stem.split(".", 3)
    ours, meta, axis, heads = LAYER[rest]
    return f"layers.{layer}.{ours}", f"layers.{layer}.{meta}.weight", axis, heads


def random_state(size: Size, dtype: torch.dtype, seed: int = 0, is_tied: bool = False) -> State:
    """Return every tensor of a model; each draws from a generator of its own, so seeds alone tell models apart."""
    D, F, V, kv = size.dim, size.mlp_dim, size.vocab_size, size.num_kv_heads * size.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (V, D)}
    of_layer = {"q_proj": (D, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, D), "gate_proj": (F, D),
                "up_proj": (F, D), "down_proj": (D, F)}  # fmt: skip
    for layer in range(size.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": of_layer.get(name.split(".")[-1], (D,)) for name in LAYER}
    shapes |= {"model.norm": (D,)} | ({} if is_tied else {"lm_head": (V, D)})
    state = {}
    for number, (name, shape) in enumerate(shapes.items()):
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + number))
        state[f"{name}.weight"] = (1 + 0.1 * draw if len(shape) == 1 else draw / D**0.5).to(dtype)
    return state


# ---- Meta -----------------------------------------------------------------------------------------------------------


def interleaved(matrix: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return half-split rows in Meta's order: of head h, rows i and i + H/2 become neighbours."""
    result, size = torch.empty_like(matrix), len(matrix) // num_heads
    for head in range(num_heads):
        for i in range(size // 2):
            result[head * size + 2 * i] = matrix[head * size + i]
            result[head * size + 2 * i + 1] = matrix[head * size + i + size // 2]
    return result


def meta_ranks(state: State, size: Size, num_ranks: int) -> list[State]:
    """Return what the file of each rank holds; what does not divide goes to the last."""
    ranks: list[State] = [{} for _ in range(num_ranks)]
    for name, tensor in state.items():
        _, meta, axis, heads = names(name)
        if heads is not None:
            tensor = interleaved(tensor, getattr(size, heads))
        for rank in range(num_ranks):
            part = tensor
            if axis is not None:
                each = tensor.shape[axis] // num_ranks
                count = each if rank < num_ranks - 1 else tensor.shape[axis] - rank * each
                part = tensor.narrow(axis, rank * each, count)
            ranks[rank][meta] = part.clone()
    return ranks


def params_of(size: Size, **changes: Any) -> dict[str, Any]:
    params = {"dim": size.dim, "n_layers": size.num_layers, "n_heads": size.num_heads, "norm_eps": size.norm_eps,
              "n_kv_heads": size.num_kv_heads, "vocab_size": -1, "rope_theta": size.rope_theta,
              "max_seq_len": size.context_length}  # fmt: skip
    changed = params | size.params | changes
    return {key: value for key, value in changed.items() if value is not ...}


def write_meta(
    folder: Path, size: Size, state: State, num_ranks: int = 1, tokenizer: bytes | None = TOKENIZER, **changes: Any
) -> Path:
    """Write a folder as Meta publishes it; `changes` are other values of params.json, ... for none."""
    folder.mkdir(parents=True)
    for number, rank in enumerate(meta_ranks(state, size, num_ranks)):
        rank["rope.freqs"] = torch.ones(size.head_dim // 2)
        torch.save(rank, folder / f"consolidated.{number:02}.pth")
    (folder / "params.json").write_text(json.dumps(params_of(size, **changes)))
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def hf_config(size: Size, **changes: Any) -> dict[str, Any]:
    """Return config.json as transformers 5 writes it; `changes` are other values, ... for none."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size.vocab_size,
        "hidden_size": size.dim, "intermediate_size": size.mlp_dim, "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads, "num_key_value_heads": size.num_kv_heads, "head_dim": size.head_dim,
        "hidden_act": "silu", "max_position_embeddings": size.context_length, "rms_norm_eps": size.norm_eps,
        "rope_parameters": {"rope_theta": size.rope_theta, "rope_type": "default"}, "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": False, "dtype": "float32",
    }  # fmt: skip
    return {key: value for key, value in (config | changes).items() if value is not ...}


def write_hf(folder: Path, size: Size, state: State, tokenizer: bytes | None = TOKENIZER, **changes: Any) -> Path:
    """Write a Hugging Face folder with one file of safetensors; `changes` are other values of config.json."""
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return write_beside(folder, size, tokenizer, **changes)


def write_beside(folder: Path, size: Size, tokenizer: bytes | None = TOKENIZER, **changes: Any) -> Path:
    """Write config.json and the tokenizer."""
    (folder / "config.json").write_text(json.dumps(hf_config(size, **changes)))
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def write_index(folder: Path, file: str, listed: dict[str, str]) -> None:
    (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


# ---- what a folder holds --------------------------------------------------------------------------------------------


def bits(state: State) -> dict[str, tuple]:
    """Return shape, dtype and bytes of every tensor."""
    return {name: torch_bits(tensor) for name, tensor in state.items()}


def our_bits(state: State) -> dict[str, tuple]:
    return {names(name)[0]: torch_bits(tensor) for name, tensor in state.items()}


def loaded(folder: Path) -> State:
    """Return every tensor of a folder's safetensors files, read by the safetensors library."""
    state: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    return state


def loaded_ranks(folder: Path) -> list[State]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "conversion.json").read_text("utf-8"))


# ---- doors ----------------------------------------------------------------------------------------------------------


def call(door: ModuleType, *arguments: Any) -> int:
    """Return the exit status of a door, in this process."""
    return exit_status(door.main, [str(argument) for argument in arguments])


def done(door: ModuleType, *arguments: Any) -> None:
    assert call(door, *arguments) == 0


def refused(capsys: Any, door: ModuleType, *arguments: Any) -> str:
    """Check that a door exits with 2 and one line, and leaves nothing at its output or beside it; return the line."""
    output = Path(arguments[arguments.index("--output") + 1]) if "--output" in arguments else None
    before = contents(output.parent) if output else None
    capsys.readouterr()
    status, said = call(door, *arguments), capsys.readouterr()
    assert status == 2, said
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert output is None or contents(output.parent) == before
    return said.err


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def sized(size: Size, **changes: Any) -> Size:
    return replace(size, **changes)

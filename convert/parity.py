"""The proof that ends a conversion: both sides compute the logits of the same tokens, and they agree.

    B batch, T token, N heads, K kv heads, H head dim, D width, V vocab, R the probe's vocabulary rows

Names, shapes and hashes cannot tell a wrong conversion from a right one: rotary order, epsilon, rotary base and the
orientation of a square matrix leave them all intact. Three implementations that share no arithmetic can:

    our_logits           panda_jax/model/llama.py from our tensors
    meta_logits          Meta's convention in numpy: pairs (2i, 2i+1) turned as complex numbers (arXiv:2104.09864)
    transformers_logits  transformers' LlamaForCausalLM from a Hugging Face folder, config.json included

A big model is cut to what memory allows: its leading layers, and the vocabulary rows of the probe's tokens. Every side
makes the same cut, and releases what it read before it returns.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from panda_jax.config import Compute, Model
from panda_jax.errors import InputError
from panda_jax.model.llama import Llama
from panda_jax.weights import Lazy, stored_shapes, to_model

if TYPE_CHECKING:
    import torch

# Float32 layers that one side may hold: the largest layer of a 13B is 1.18 GiB, and a conversion may use 3 GiB in all.
BUDGET_BYTES = int(1.3 * 2**30)
# float32 rounds to 6e-8, and two right sides sum thousands of products in different orders: one layer of a 13B, and all
# twelve of a 110M, differ by 2e-6 of the largest logit. A wrong epsilon (1e-5 for 1e-6) makes 5e-4, wrong rotary 0.5.
RELATIVE_TOLERANCE = 1e-5

COMPUTE = Compute(dtype="float32", attention="xla", remat="none", layer_loop="scan")


# ---- what is compared -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Probe:
    """Fixed tokens at fixed positions, and how much of the model they run through."""

    tokens: np.ndarray
    """int32 [B, T], ids of the whole vocabulary; each is one of `ids`."""
    positions: np.ndarray
    """int32 [B, T], rising within a row; token t sees the tokens up to itself."""
    ids: np.ndarray
    """int32 [R], sorted: the rows of the embedding and of the output layer that are read."""
    num_layers: int
    """Leading layers to run; the final norm follows the last of them."""
    model_layers: int
    """Layers that the whole model has."""
    vocab_size: int
    """Rows that the whole vocabulary has."""

    @property
    def rows(self) -> np.ndarray:
        """The tokens as indices into `ids`, int32 [B, T]."""
        return np.searchsorted(self.ids, self.tokens).astype(np.int32)


@dataclass(frozen=True)
class Parity:
    """What the comparison of two sides found."""

    max_abs_difference: float
    max_abs_logit: float
    layers_compared: int
    num_layers: int
    num_tokens: int
    against: str
    """The implementation on the other side, in words."""

    @property
    def tolerance(self) -> float:
        """The largest difference that rounding explains: 1e-5 of the largest logit, or 1e-5 when that is below 1."""
        return RELATIVE_TOLERANCE * max(1.0, self.max_abs_logit)

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; False when it is not a number."""
        return self.max_abs_difference <= self.tolerance


def make_probe(model: Model, budget_bytes: int = BUDGET_BYTES) -> Probe:
    """Return the probe of a model: the same for the same model and budget.

    Two rows of up to 32 tokens, ids 0 and V-1 among them. The first stands at positions 0, 1, 2 … and jumps to the
    last ones below context_length for its last quarter; the second is spread evenly over the context. As many leading
    layers run as fit into `budget_bytes` in float32, at least one.
    """
    length = min(32, model.context_length)
    tail = length // 4
    near = np.arange(length)
    near[length - tail :] += model.context_length - length
    spread = np.arange(length) * (model.context_length - 1) // max(length - 1, 1)
    tokens = np.random.default_rng(20230501).integers(0, model.vocab_size, (2, length)).astype(np.int32)
    tokens[0, 0] = tokens[1, -1] = model.vocab_size - 1
    tokens[0, -1] = tokens[1, 0] = 0
    return Probe(
        tokens=tokens,
        positions=np.stack([near, spread]).astype(np.int32),
        ids=np.unique(tokens),
        num_layers=max(1, min(model.num_layers, budget_bytes // _layer_bytes(model))),
        model_layers=model.num_layers,
        vocab_size=model.vocab_size,
    )


def _layer_bytes(model: Model) -> int:
    shapes = stored_shapes(replace(model, num_layers=1))
    return 4 * sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith("layers."))


def compare(ours: np.ndarray, theirs: np.ndarray, probe: Probe, against: str) -> Parity:
    """Return how far two sides' logits, float32 [B, T, R], are apart; `against` names the other side.

    Raises InputError when the two are not logits of this probe.
    """
    shape = (*probe.tokens.shape, len(probe.ids))
    for side, logits in (("our side", ours), (against, theirs)):
        if logits.shape != shape:
            raise InputError(f"{side}: logits of shape {logits.shape}, the probe gives {shape}; is it another model?")
    return Parity(
        max_abs_difference=float(np.max(np.abs(ours - theirs))),
        max_abs_logit=float(np.max(np.abs(theirs))),
        layers_compared=probe.num_layers,
        num_layers=probe.model_layers,
        num_tokens=probe.tokens.size,
        against=against,
    )


def _check(side: str, what: str, found: int, expected: int) -> None:
    """Raise InputError when a side has more or less of something than the probe's model: a cut would hide that."""
    if found != expected:
        raise InputError(f"{side}: {found} {what}, the model to compare with has {expected}; convert it again")


def _read(tensors: Mapping[str, Lazy], name: str) -> np.ndarray:
    if name not in tensors:
        raise InputError(f"{name} is absent, the model needs it; convert the weights again")
    return tensors[name].read()


def _read_rows(tensors: Mapping[str, Lazy], name: str, probe: Probe) -> np.ndarray:
    """Return the probe's rows [R, D] of a table [V, D]; the rest is released."""
    table = _read(tensors, name)
    _check(name, "rows", len(table), probe.vocab_size)
    return table[probe.ids]


# ---- our side -------------------------------------------------------------------------------------------------------


def our_logits(tensors: Mapping[str, Lazy], model: Model, probe: Probe) -> np.ndarray:
    """Return our model's logits, float32 [B, T, R], from our tensors in any dtype; computed on the CPU.

    Raises InputError for an absent or misshapen tensor, and when the model is not the one of the probe.
    """
    _check("our side", "layers", model.num_layers, probe.model_layers)
    cut = replace(model, num_layers=probe.num_layers, vocab_size=len(probe.ids))
    with jax.default_device(_cpu()), jax.default_matmul_precision("highest"):
        parameters: dict[str, Any] = {"layers": {}}
        for name in stored_shapes(replace(cut, num_layers=1)):
            if name.startswith("layers.0."):
                role = name.removeprefix("layers.0.")
                parameters["layers"][role] = _stacked(tensors, role, cut)
            else:
                array = _read(tensors, name) if name == "norm" else _read_rows(tensors, name, probe)
                parameters[name] = jnp.asarray(to_model(name, array, cut), jnp.float32)
        return np.array(_forward(cut, parameters, probe.rows, probe.positions))


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise InputError("JAX_PLATFORMS leaves out cpu, where logits are compared; set JAX_PLATFORMS=cpu") from error


def _stacked(tensors: Mapping[str, Lazy], role: str, model: Model) -> jax.Array:
    """Return one parameter of every layer, float32 with a leading L axis."""
    stack = None
    for i in range(model.num_layers):
        array = to_model(f"layers.{i}.{role}", _read(tensors, f"layers.{i}.{role}"), model)
        stack = np.empty((model.num_layers, *array.shape), np.float32) if stack is None else stack
        for row, values in enumerate(array):  # at once, numpy would walk it in the order of the file, a page an element
            stack[i, row] = values
    return jnp.asarray(stack)


@partial(jax.jit, static_argnums=0)
def _forward(model: Model, parameters: dict[str, Any], tokens: jax.Array, positions: jax.Array) -> jax.Array:
    graph = nnx.graphdef(nnx.eval_shape(lambda: Llama(model, jax.random.key(0))))
    network = nnx.merge(graph, parameters)
    return network.logits(network.hidden(tokens, jnp.ones_like(tokens), positions, COMPUTE))


# ---- Meta's convention ----------------------------------------------------------------------------------------------


def meta_logits(tensors: Mapping[str, Lazy], params: Mapping[str, Any], probe: Probe) -> np.ndarray:
    """Return the logits, float32 [B, T, R], of a model in Meta's names and rotary order.

    tensors: whole ones, the model-parallel ranks already merged. params: what params.json says. Raises InputError for
    an absent tensor, and when the model is not the one of the probe.
    """
    num_heads = params["n_heads"]
    num_kv_heads = params.get("n_kv_heads") or num_heads
    eps = np.float32(params["norm_eps"])
    turns = _rotors(probe.positions, params["dim"] // num_heads, params.get("rope_theta") or 10000.0)
    hidden_from = np.triu(np.full((probe.tokens.shape[1],) * 2, -np.inf, np.float32), 1)

    def weight(name: str) -> np.ndarray:
        return _read(tensors, f"{name}.weight").astype(np.float32)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight(name)

    def heads(x: np.ndarray, name: str) -> np.ndarray:
        return (x @ weight(name).T).reshape(*x.shape[:2], -1, params["dim"] // num_heads)

    _check("params.json", "layers", params["n_layers"], probe.model_layers)
    x = _read_rows(tensors, "tok_embeddings.weight", probe)[probe.rows].astype(np.float32)
    for i in range(probe.num_layers):
        layer = f"layers.{i}"
        h = norm(x, f"{layer}.attention_norm")
        q, k = (_turn(heads(h, f"{layer}.attention.{name}"), turns) for name in ("wq", "wk"))
        k, v = (np.repeat(y, num_heads // num_kv_heads, axis=2) for y in (k, heads(h, f"{layer}.attention.wv")))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(q.shape[-1])) + hidden_from
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + mixed @ weight(f"{layer}.attention.wo").T
        h = norm(x, f"{layer}.ffn_norm")
        gate, up = (h @ weight(f"{layer}.feed_forward.{name}").T for name in ("w1", "w3"))
        with np.errstate(over="ignore"):  # exp(-gate) is infinite for a very negative gate, and the quotient rightly 0
            gate = gate / (1 + np.exp(-gate))
        x = x + (gate * up) @ weight(f"{layer}.feed_forward.w2").T
    return norm(x, "norm") @ _read_rows(tensors, "output.weight", probe).astype(np.float32).T


def _rotors(positions: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
    """Return exp(i * position * frequency), complex64 [B, T, 1, H/2].

    Frequencies and angles are rounded to float32 as in Meta's code: at position 4095 a unit in the last place of a
    frequency is 2e-4 radians, which is no rounding error of a logit any more.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(np.float64(theta) ** exponents)
    angles = positions[..., None, None].astype(np.float32) * frequencies
    return np.exp(1j * angles.astype(np.float64)).astype(np.complex64)


def _turn(x: np.ndarray, turns: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x).view(np.complex64) * turns).view(np.float32)


# ---- transformers ---------------------------------------------------------------------------------------------------


def available() -> bool:
    """Tell whether torch and transformers are installed, without importing them."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def transformers_logits(folder: Path, probe: Probe) -> np.ndarray:
    """Return transformers' logits, float32 [B, T, R], from a Hugging Face folder: safetensors or .bin, in any shards.

    Its config.json is read by transformers and its tensors by the safetensors library or torch, nothing of it by us.
    Raises InputError for a folder that lacks a file or tensor, or is not the model of the probe.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        config = LlamaConfig.from_pretrained(folder, attn_implementation="eager", local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: transformers cannot read config.json ({error}); convert it again") from error
    _check(f"{folder / 'config.json'}", "layers", config.num_hidden_layers, probe.model_layers)
    _check(f"{folder / 'config.json'}", "rows of vocabulary", config.vocab_size, probe.vocab_size)
    config.num_hidden_layers, config.vocab_size = probe.num_layers, len(probe.ids)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None  # may lie beyond the cut vocabulary
    with torch.device("meta"):
        network = LlamaForCausalLM(config).eval()
    network.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies are in no file
    wanted = set(network.state_dict())
    if config.tie_word_embeddings:
        wanted.remove("lm_head.weight")
    state = _read_huggingface(folder, wanted, probe)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"{folder}: the tensors do not fit config.json ({error}); convert it again") from error
    tokens, positions = (torch.from_numpy(x.astype(np.int64)) for x in (probe.rows, probe.positions))
    with torch.inference_mode():
        # Without a mask transformers takes a jump in the positions for the start of another document.
        logits = network(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=positions, use_cache=False
        ).logits
    return logits.numpy().copy()


def _read_huggingface(folder: Path, wanted: set[str], probe: Probe) -> dict[str, torch.Tensor]:
    """Return the wanted tensors in float32, of the embedding and the output layer the probe's rows only."""
    state = {}
    for path, reader in _huggingface_files(folder, wanted):
        if not path.is_file():
            raise InputError(f"{path}: the index names it, but it is absent; convert it again")
        for name, tensor in reader(path, wanted):
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                _check(f"{path}: {name}", "rows", len(tensor), probe.vocab_size)
                tensor = tensor[probe.ids.tolist()]
            # A copy: a tensor that lies in a mapped file would keep its pages in memory.
            state[name] = tensor.float() if tensor.element_size() < 4 else tensor.clone()
            del tensor
    if missing := sorted(wanted - state.keys()):
        raise InputError(f"{folder}: {missing[0]} is absent, config.json needs it; convert it again")
    return state


Reader = Callable[[Path, set[str]], Iterable[tuple[str, Any]]]


def _huggingface_files(folder: Path, wanted: set[str]) -> list[tuple[Path, Reader]]:
    """Return the files that hold the wanted tensors, in transformers' order of preference."""
    for whole, reader in (("model.safetensors", _safetensors), ("pytorch_model.bin", _torch_file)):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [(folder / whole, reader)]
        if index.is_file():
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (OSError, ValueError, KeyError) as error:
                raise InputError(f"{index}: damaged ({error}), expected a weight_map; convert it again") from error
            return [(folder / name, reader) for name in sorted({places[key] for key in wanted & places.keys()})]
    raise InputError(f"{folder}: neither model.safetensors nor pytorch_model.bin; expected a Hugging Face folder")


def _safetensors(path: Path, wanted: set[str]) -> Iterable[tuple[str, torch.Tensor]]:
    import torch
    from safetensors import safe_open

    # framework="pt" maps the file for writing, which Linux refuses when it is larger than the memory.
    with safe_open(path, framework="np") as file:
        names = sorted(wanted & set(file.keys()))
    for name in names:
        with safe_open(path, framework="np") as file:  # anew for each tensor: the mapping goes with it
            yield name, torch.from_numpy(file.get_tensor(name).astype(np.float32))


def _torch_file(path: Path, wanted: set[str]) -> Iterable[tuple[str, torch.Tensor]]:
    import torch

    tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    for name in sorted(wanted & tensors.keys()):
        yield name, tensors.pop(name)

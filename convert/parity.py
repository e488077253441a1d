"""The proof that ends a conversion: both sides compute the logits of the same tokens, and they agree.

    B batch, T token, N heads, K kv heads, H head dim, D width, V vocab, R the probe's vocabulary rows

Names, shapes and hashes cannot tell a wrong conversion from a right one: rotary order, epsilon, rotary base and the
orientation of a square matrix leave them all intact. Three implementations that share no arithmetic can:

    our_logits           panda_jax/model/llama.py from our tensors
    meta_logits          Meta's convention in numpy: pairs (2i, 2i+1) turned as complex numbers (arXiv:2104.09864)
    transformers_logits  transformers' LlamaForCausalLM, in transformers_side.py, in a process of its own

A big model is cut to what memory allows: its leading layers, and the vocabulary rows of the probe's tokens. Every side
makes the same cut, and releases what it read before it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.probe import Probe, check_count
from panda_jax.config import Compute, Model
from panda_jax.errors import InputError
from panda_jax.model.llama import Llama
from panda_jax.weights import Lazy, stored_shapes, to_model

# float32 rounds to 6e-8, and two right sides sum thousands of products in different orders: one layer of a 13B, and all
# twelve of a 110M, differ by 2e-6 of the largest logit. A wrong epsilon (1e-5 for 1e-6) makes 5e-4, wrong rotary 0.5.
RELATIVE_TOLERANCE = 1e-5

COMPUTE = Compute(dtype="float32", attention="xla", remat="none", layer_loop="scan")


# ---- what is compared -----------------------------------------------------------------------------------------------


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


def _read(tensors: Mapping[str, Lazy], name: str) -> np.ndarray:
    if name not in tensors:
        raise InputError(f"{name} is absent, the model needs it; convert the weights again")
    return tensors[name].read()


def _read_rows(tensors: Mapping[str, Lazy], name: str, probe: Probe) -> np.ndarray:
    """Return the probe's rows [R, D] of a table [V, D]; the rest is released."""
    table = _read(tensors, name)
    check_count(name, "rows", len(table), probe.vocab_size)
    return table[probe.ids]


# ---- our side -------------------------------------------------------------------------------------------------------


def our_logits(tensors: Mapping[str, Lazy], model: Model, probe: Probe) -> np.ndarray:
    """Return our model's logits, float32 [B, T, R], from our tensors in any dtype; computed on the CPU.

    Raises InputError for an absent or misshapen tensor, and when the model is not the one of the probe.
    """
    check_count("our side", "layers", model.num_layers, probe.model_layers)
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

    check_count("params.json", "layers", params["n_layers"], probe.model_layers)
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

"""The loss: a float64 oracle, its gradients, chunking, positions that must not count, and its spread over devices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from panda_jax import sharding
from panda_jax.config import Compute, Mesh, Model
from panda_jax.model.cross_entropy import cross_entropy
from panda_jax.model.llama import Llama
from panda_jax.objectives import OBJECTIVES

BATCH, LENGTH, DIM, VOCAB = 4, 11, 6, 23
COMPUTE = Compute(dtype="float32", remat="none", attention_block=16, loss_chunk_tokens=12)


loss_of = jax.jit(cross_entropy, static_argnames=("is_tied", "compute"))
loss_and_gradients_of = jax.jit(
    jax.value_and_grad(cross_entropy, argnums=(0, 1)), static_argnames=("is_tied", "compute")
)


def case(seed: int) -> tuple[Any, Any, Any, Any]:
    """hidden [B, T, D], table [D, V], targets, weights with zeros and fractions."""
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(BATCH, LENGTH, DIM)).astype(np.float32)
    table = random.normal(size=(DIM, VOCAB)).astype(np.float32)
    targets = random.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    weights = random.choice([0.0, 0.25, 1.0], (BATCH, LENGTH)).astype(np.float32)
    return hidden, table, targets, weights


def oracle(hidden, table, targets, weights) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss and its gradients for hidden and table in float64: d logits = weight * (softmax - one-hot)."""
    hidden, table = hidden.astype(np.float64), table.astype(np.float64)
    logits = hidden @ table
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    one_hot = np.eye(table.shape[1])[targets]
    loss = -(weights * np.log((probabilities * one_hot).sum(-1))).sum()
    d_logits = (probabilities - one_hot) * weights[..., None]
    return loss, d_logits @ table.T, np.einsum("btd,btv->dv", hidden, d_logits)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 12, 20, 44, 1000])
def test_loss_and_gradients_equal_the_float64_oracle(chunk_tokens: int, is_tied: bool):
    """44 tokens: chunks of 1, 3, 5 and 11 positions of all four rows, with a remainder for 3 and 5."""
    hidden, table, targets, weights = case(0)
    expected = oracle(hidden, table, targets, weights)
    compute = replace(COMPUTE, loss_chunk_tokens=chunk_tokens)
    stored = table.T if is_tied else table
    arguments = dict(hidden=hidden, table=stored, targets=targets, weights=weights, is_tied=is_tied, compute=compute)
    np.testing.assert_allclose(loss_of(**arguments), expected[0], rtol=1e-6)
    value, (d_hidden, d_stored) = loss_and_gradients_of(
        hidden, stored, targets, weights, is_tied=is_tied, compute=compute
    )
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(d_hidden, expected[1], atol=2e-6)
    np.testing.assert_allclose(d_stored.T if is_tied else d_stored, expected[2], atol=4e-6)


def test_gradients_follow_the_scale_of_what_comes_after():
    hidden, table, targets, weights = case(1)
    expected = oracle(hidden, table, targets, weights)
    found = jax.grad(lambda h, t: cross_entropy(h, t, targets, weights, False, COMPUTE) * -3.0, argnums=(0, 1))
    for gradient, reference in zip(jax.jit(found)(hidden, table), expected[1:], strict=True):
        np.testing.assert_allclose(gradient, -3.0 * reference, atol=1e-5)


def test_positions_of_weight_zero_cannot_poison_anything():
    hidden, table, targets, weights = case(2)
    expected = oracle(hidden, table, targets, weights)
    assert (weights == 0).sum() > 5
    hidden = np.where((weights == 0)[..., None], np.nan, hidden)
    hidden[0, np.argmax(weights[0] == 0)] = np.inf
    targets = np.where(weights == 0, -100, targets)
    value, gradients = loss_and_gradients_of(hidden, table, targets, weights, is_tied=False, compute=COMPUTE)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    for gradient, reference in zip(gradients, expected[1:], strict=True):
        np.testing.assert_allclose(gradient, reference, atol=4e-6)


def test_a_target_outside_the_vocabulary_is_not_hidden():
    hidden, table, targets, weights = case(3)
    targets[weights != 0] = VOCAB
    assert not np.isfinite(loss_of(hidden, table, targets, weights, is_tied=False, compute=COMPUTE))


def test_large_logits_do_not_overflow():
    """One token, logits 1000 and 0, target the second: -log p = 1000."""
    hidden, table = np.full((1, 1, 1), 1000, np.float32), np.array([[1.0, 0.0]], np.float32)
    value = loss_of(hidden, table, np.array([[1]]), np.ones((1, 1), np.float32), is_tied=False, compute=COMPUTE)
    assert float(value) == 1000.0


def test_bfloat16_states_give_float32_sums():
    """Products of bfloat16 numbers summed in float32 stay within bfloat16's rounding of the oracle."""
    hidden, table, targets, weights = case(4)
    hidden, table = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (hidden, table))
    expected = oracle(hidden, table, targets, weights)
    compute = replace(COMPUTE, dtype="bfloat16")
    value, (d_hidden, d_table) = loss_and_gradients_of(
        jnp.asarray(hidden, jnp.bfloat16), table, targets, weights, is_tied=False, compute=compute
    )
    assert (value.dtype, d_hidden.dtype, d_table.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(d_hidden, np.float32), expected[1], atol=4 * 2**-8)
    np.testing.assert_allclose(d_table, expected[2], atol=4 * 2**-8)


def sub_jaxprs(jaxpr):
    """Yield a jaxpr and every jaxpr inside it."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sub_jaxprs(inner)


def equations(function, *arguments):
    return [equation for part in sub_jaxprs(jax.make_jaxpr(function)(*arguments).jaxpr) for equation in part.eqns]


def test_no_array_of_all_logits_exists_and_the_gradient_costs_three_products():
    hidden, table, targets, weights = case(5)
    compute = replace(COMPUTE, loss_chunk_tokens=8)

    def loss(hidden, table):
        return cross_entropy(hidden, table, targets, weights, False, compute)

    def num_products(found) -> int:
        return sum(equation.primitive.name == "dot_general" for equation in found)

    forward = equations(loss, hidden, table)
    both = equations(jax.value_and_grad(loss, argnums=(0, 1)), hidden, table)
    assert num_products(forward) == 1
    assert num_products(both) == 3
    sizes = [int(np.prod(out.aval.shape)) for equation in forward + both for out in equation.outvars]
    assert max(sizes) < BATCH * LENGTH * VOCAB / 2
    whole = equations(lambda h, t: jax.nn.log_softmax(h @ t), hidden, table)
    assert max(int(np.prod(out.aval.shape)) for equation in whole for out in equation.outvars) == BATCH * LENGTH * VOCAB


MODEL = Model(
    vocab_size=96, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=40, norm_eps=1e-5, context_length=64
)


def batch(seed: int) -> dict[str, jax.Array]:
    """Eight rows of 24: documents of 10 and 8 positions, each trained from its third on, then padding."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, MODEL.vocab_size, (2, 8, 24))
    segments = np.array([1] * 10 + [2] * 8 + [0] * 6)
    positions = np.array([*range(10), *range(8), *[0] * 6])
    weights = np.where((segments > 0) & (positions > 1), 1.0, 0.0)
    rows = {"segment_ids": segments, "positions": positions, "loss_weights": weights}
    arrays = {"tokens": ids[0], "targets": ids[1]} | {name: np.tile(row, (8, 1)) for name, row in rows.items()}
    kinds = {name: np.float32 if name == "loss_weights" else np.int32 for name in arrays}
    return {name: jnp.asarray(array, kinds[name]) for name, array in arrays.items()}


@partial(jax.jit, static_argnums=(2, 3))
def sums_and_gradients(params, rows, compute: Compute, model: Model):
    graph = nnx.graphdef(nnx.eval_shape(lambda: Llama(model, jax.random.key(0))))

    def total(params):
        loss_sum, weight, _ = OBJECTIVES["causal"](nnx.merge(graph, params), None, rows, jax.random.key(0), compute)
        return loss_sum, weight

    return jax.value_and_grad(total, has_aux=True)(params)


def params_of(model: Model):
    return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(Llama(model, key))))(jax.random.key(0))


def test_the_weight_counts_trained_positions_and_the_sums_add_up():
    rows, params = batch(0), params_of(MODEL)
    (total, weight), gradients = sums_and_gradients(params, rows, COMPUTE, MODEL)
    assert float(weight) == 8 * (8 + 6)
    masks = [np.arange(8)[:, None] % 2 == parity for parity in (0, 1)]
    halves = [rows | {"loss_weights": rows["loss_weights"] * mask} for mask in masks]
    parts = [sums_and_gradients(params, half, COMPUTE, MODEL) for half in halves]
    np.testing.assert_allclose(total, sum(float(part[0][0]) for part in parts), rtol=1e-6)
    jax.tree.map(lambda g, a, b: np.testing.assert_allclose(g, a + b, atol=1e-5), gradients, parts[0][1], parts[1][1])


def test_rows_without_trained_tokens_give_zero_and_no_gradient():
    rows = batch(1) | {"loss_weights": jnp.zeros((8, 24))}
    (total, weight), gradients = sums_and_gradients(params_of(MODEL), rows, COMPUTE, MODEL)
    assert float(total) == 0.0 and float(weight) == 0.0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(("is_tied", "zero"), [(False, 1), (True, 3)])
def test_eight_devices_compute_what_one_does(is_tied: bool, zero: Literal[1, 3]):
    """data x fsdp x tensor = 2 x 2 x 2 against no mesh at all; the chunk is per device, so it differs as well."""
    model = replace(MODEL, tie_embeddings=is_tied)
    rows, params = batch(2), params_of(model)
    expected = sums_and_gradients(params, rows, COMPUTE, model)
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2, zero=zero))
    variables = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Llama(model, jax.random.key(0))))).leaves
    specs = [sharding.parameter_spec(variable.get_metadata("axes"), zero == 3) for variable in variables]
    leaves, structure = jax.tree.flatten(params)
    placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs, strict=True)]
    spread = jax.tree.unflatten(structure, placed)
    with jax.set_mesh(mesh):
        rows = sharding.to_global({k: np.asarray(v) for k, v in rows.items()}, np.arange(8), mesh, 8)
        found = sums_and_gradients(spread, rows, COMPUTE, model)
    np.testing.assert_allclose(found[0][0], expected[0][0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[1], expected[1])

"""The model: parity with transformers on the same weights, packing, its settings, and where its parameters lie."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM

from panda_jax import sharding
from panda_jax.config import Compute, Mesh, Model
from panda_jax.model import llama
from panda_jax.model.llama import Llama
from panda_jax.objectives import causal
from panda_jax.presets import PRESETS

# Every dimension differs from every other, so that a confused axis cannot pass: B 5, T 37, G 4, H 6 and these.
GROUPED = Model(
    vocab_size=97, dim=48, num_layers=3, num_heads=8, num_kv_heads=2, mlp_dim=80, norm_eps=1e-5, context_length=8192
)
FULL = replace(GROUPED, num_kv_heads=8)
TIED = replace(GROUPED, tie_embeddings=True, norm_eps=1e-2, rope_theta=500.0)
BATCH, LENGTH = 5, 37
SEED = 7
COMPUTE = Compute(dtype="float32", remat="none", attention_block=24, loss_chunk_tokens=40)

Params = dict[str, Any]


@cache
def params_of(model: Model) -> Params:
    """Random parameters, large enough for attention to be far from uniform and norms far from one."""
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Llama(model, jax.random.key(0)))))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        is_norm = "norm" in path[-1].key
        values = random.uniform(0.5, 1.5, leaf.shape) if is_norm else random.normal(size=leaf.shape) * 0.1
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def build(model: Model, params: Params) -> Llama:
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Llama(model, jax.random.key(0)))), params)


def rows_of_one_document(start: int) -> dict[str, jax.Array]:
    """Rows [B, T] that hold one document each, from position `start`."""
    tokens = np.random.default_rng(1).integers(0, GROUPED.vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)
    positions = np.tile(np.arange(start, start + LENGTH, dtype=np.int32), (BATCH, 1))
    weights = np.random.default_rng(2).choice([0.0, 1.0, 0.5], (BATCH, LENGTH)).astype(np.float32)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "loss_weights": weights}
    return jax.tree.map(jnp.asarray, rows | {"segment_ids": np.ones_like(positions)})


def logits_now(model: Model, params: Params, rows: dict[str, jax.Array], compute: Compute) -> jax.Array:
    network = build(model, params)
    return network.logits(network.hidden(rows["tokens"], rows["segment_ids"], rows["positions"], compute))


logits_of = jax.jit(logits_now, static_argnums=(0, 3))


def trace_mean_loss_and_gradients(model: Model, params: Params, rows: dict[str, jax.Array], compute: Compute):
    def mean_loss(params: Params) -> jax.Array:
        total, weight, _ = causal.loss(build(model, params), None, rows, jax.random.key(0), compute)
        return total / weight

    return jax.value_and_grad(mean_loss)(params)


mean_loss_and_gradients = jax.jit(trace_mean_loss_and_gradients, static_argnums=(0, 3))


def as_torch_state(model: Model, params: Params) -> dict[str, np.ndarray]:
    """Our parameters, or gradients of their shapes, under transformers' names: [out, in] matrices per layer."""
    stacked, width = params["layers"], model.dim
    state = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["norm"]}
    if not model.tie_embeddings:
        state["lm_head.weight"] = params["lm_head"].T
    for i in range(model.num_layers):
        layer = {name: np.asarray(value[i]) for name, value in stacked.items()}
        names = {
            "input_layernorm": layer["attn_norm"],
            "post_attention_layernorm": layer["mlp_norm"],
            "self_attn.q_proj": layer["wq"].reshape(width, -1).T,
            "self_attn.k_proj": layer["wk"].reshape(width, -1).T,
            "self_attn.v_proj": layer["wv"].reshape(width, -1).T,
            "self_attn.o_proj": layer["wo"].reshape(-1, width).T,
            "mlp.gate_proj": layer["w_gate"].T,
            "mlp.up_proj": layer["w_up"].T,
            "mlp.down_proj": layer["w_down"].T,
        }
        state |= {f"model.layers.{i}.{name}.weight": value for name, value in names.items()}
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


@cache
def peer(model: Model) -> LlamaForCausalLM:
    """transformers' LLaMA with the parameters of `params_of(model)`, float32."""
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.dim,
            intermediate_size=model.mlp_dim,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            max_position_embeddings=model.context_length,
            rms_norm_eps=model.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=model.tie_embeddings,
            attn_implementation="eager",  # pyright: ignore[reportCallIssue]
            use_cache=False,
        )
    ).eval()
    state = {name: torch.from_numpy(value.copy()) for name, value in as_torch_state(model, params_of(model)).items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if model.tie_embeddings else set())
    return network


def peer_logits(model: Model, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    ids, places = (torch.from_numpy(np.array(x, np.int64)) for x in (tokens, positions))
    return peer(model)(input_ids=ids, position_ids=places).logits


@pytest.mark.parametrize("model", [FULL, GROUPED, TIED], ids=["full", "grouped", "tied"])
@pytest.mark.parametrize("start", [0, 8000])
def test_logits_equal_transformers(model: Model, start: int):
    rows = rows_of_one_document(start)
    expected = peer_logits(model, np.asarray(rows["tokens"]), np.asarray(rows["positions"])).detach().numpy()
    assert np.abs(expected).max() > 1
    found = logits_of(model, params_of(model), rows, COMPUTE)
    assert np.abs(np.asarray(found) - expected).max() <= 1e-5


def test_interleaved_rotation_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    """The negative control: pairing (0, 1), (2, 3) as in Meta's files on weights in half-split order."""

    def rotate_pairs(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
        cos, sin = angles
        even, odd = x[..., ::2], x[..., 1::2]
        return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)

    rows = rows_of_one_document(0)
    expected = peer_logits(GROUPED, np.asarray(rows["tokens"]), np.asarray(rows["positions"])).detach().numpy()
    monkeypatch.setattr(llama, "rotate", rotate_pairs)
    found = logits_now(GROUPED, params_of(GROUPED), rows, COMPUTE)
    assert np.abs(np.asarray(found) - expected).max() >= 1e-1


@pytest.mark.parametrize("model", [GROUPED, TIED], ids=["grouped", "tied"])
def test_loss_and_every_gradient_equal_torch(model: Model):
    rows = rows_of_one_document(100)
    value, gradients = mean_loss_and_gradients(model, params_of(model), rows, COMPUTE)
    targets, weights = (torch.from_numpy(np.array(rows[name])) for name in ("targets", "loss_weights"))
    network = peer(model)
    network.zero_grad()
    logits = peer_logits(model, np.asarray(rows["tokens"]), np.asarray(rows["positions"]))
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets.long(), reduction="none")
    expected = (losses * weights).sum() / weights.sum()
    expected.backward()
    assert abs(float(value) - expected.item()) <= 1e-5
    found = as_torch_state(model, gradients)
    compared = dict(network.named_parameters())
    assert set(compared) == set(found)
    for name, parameter in compared.items():
        assert parameter.grad is not None
        reference = parameter.grad.numpy()
        assert np.abs(reference).max() > 1e-4, name
        assert np.abs(found[name] - reference).max() <= 1e-5, name


@pytest.mark.parametrize(
    ("layer_loop", "remat"),
    [("scan", "full"), ("scan", "dots"), ("unroll", "none"), ("unroll", "full"), ("unroll", "dots")],
)
def test_every_way_to_run_the_layers_gives_the_same(layer_loop: Any, remat: Any):
    """Against scan without recomputation, which the test above compares with torch."""
    rows, params = rows_of_one_document(100), params_of(GROUPED)
    expected = mean_loss_and_gradients(GROUPED, params, rows, COMPUTE)
    compute = replace(COMPUTE, layer_loop=layer_loop, remat=remat)
    found = mean_loss_and_gradients(GROUPED, params, rows, compute)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)


def count_products(jaxpr) -> int:
    """Count the matrix products written in a jaxpr and in every jaxpr inside it."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                count += count_products(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_recomputation_recomputes(layer_loop: Any):
    """Under remat the jaxpr repeats the layer's products: full more often than dots, dots more often than none."""

    def num_products(remat: Any) -> int:
        compute = replace(COMPUTE, layer_loop=layer_loop, remat=remat)
        function = partial(trace_mean_loss_and_gradients, GROUPED, compute=compute)
        whole = jax.make_jaxpr(lambda params: function(params, rows_of_one_document(0)))(params_of(GROUPED))
        return count_products(whole.jaxpr)

    assert num_products("none") < num_products("dots") < num_products("full")


def packed_rows() -> dict[str, jax.Array]:
    """Documents of 15 and 18 tokens and 4 of padding in each row."""
    rows = rows_of_one_document(0)
    lengths = [15, 18, 4]
    rows["segment_ids"] = jnp.tile(jnp.repeat(jnp.array([1, 2, 0]), jnp.array(lengths)), (BATCH, 1))
    rows["positions"] = jnp.tile(jnp.concatenate([jnp.arange(15), jnp.arange(18), jnp.zeros(4, int)]), (BATCH, 1))
    return rows


def test_packed_documents_equal_transformers_on_each_alone():
    rows = packed_rows()
    found = np.asarray(logits_of(GROUPED, params_of(GROUPED), rows, COMPUTE))
    assert np.isfinite(found).all()
    for start, end in ((0, 15), (15, 33)):
        tokens = np.asarray(rows["tokens"])[:, start:end]
        alone = peer_logits(GROUPED, tokens, np.tile(np.arange(end - start), (BATCH, 1))).detach().numpy()
        assert np.abs(found[:, start:end] - alone).max() <= 1e-5


def test_changing_one_document_leaves_the_other_bitwise_equal():
    rows, params = packed_rows(), params_of(GROUPED)
    before = np.asarray(logits_of(GROUPED, params, rows, COMPUTE))
    for changed, kept in ((slice(0, 15), slice(15, 37)), (slice(15, 33), slice(0, 15))):
        tokens = rows["tokens"].at[:, changed].set((rows["tokens"][:, changed] + 7) % GROUPED.vocab_size)
        after = np.asarray(logits_of(GROUPED, params, rows | {"tokens": tokens}, COMPUTE))
        np.testing.assert_array_equal(after[:, kept], before[:, kept])
        assert np.abs(after[:, changed] - before[:, changed]).max() > 0.1


def test_bfloat16_follows_float32():
    """bfloat16 keeps 8 bits, so after three layers the logits may be off by a few per cent, and by no more."""
    rows, params = packed_rows(), params_of(GROUPED)
    expected = np.asarray(logits_of(GROUPED, params, rows, COMPUTE))
    found = logits_of(GROUPED, params, rows, replace(COMPUTE, dtype="bfloat16"))
    assert found.dtype == jnp.float32
    error = np.sqrt(np.mean((np.asarray(found) - expected) ** 2) / np.mean(expected**2))
    assert 1e-4 < error < 0.05


CHANGES: dict[str, Any] = {
    "vocab_size": 98,
    "dim": 96,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 4,
    "mlp_dim": 81,
    "norm_eps": 1e-3,
    "rope_theta": 500.0,
    "tie_embeddings": True,
    "init_std": 0.03,
}
EXEMPT = {
    "context_length": "checked against data.seq_len in config.py, no part of the model",
    "size": "fills the other fields",
    "init_from": "read by the training loop",
}


def test_every_field_of_the_model_is_listed_here():
    assert {field.name for field in fields(Model)} == CHANGES.keys() | EXEMPT.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_no_setting_of_the_model_is_dead(name: str):
    changed = replace(GROUPED, **{name: CHANGES[name]})
    if shapes_of(changed) != shapes_of(GROUPED):
        return
    rows = rows_of_one_document(0)
    before, after = (np.asarray(logits_of(m, initial(m, SEED), rows, COMPUTE)) for m in (GROUPED, changed))
    assert np.abs(after - before).max() > 1e-4


def shapes_of(model: Model) -> Params:
    return jax.eval_shape(partial(initial, model), SEED)


@partial(jax.jit, static_argnums=0)
def initial(model: Model, seed: int) -> Params:
    return nnx.to_pure_dict(nnx.state(Llama(model, jax.random.key(seed))))


def test_parameters_are_named_and_laid_out_by_role():
    L, D, N, K, H, F, V = 3, 48, 8, 2, 6, 80, 97
    expected = {
        "embed": ((V, D), ("vocab", "embed")),
        "layers.attn_norm": ((L, D), ("layers", "embed")),
        "layers.wq": ((L, D, N, H), ("layers", "embed", "heads", "head_dim")),
        "layers.wk": ((L, D, K, H), ("layers", "embed", "kv_heads", "head_dim")),
        "layers.wv": ((L, D, K, H), ("layers", "embed", "kv_heads", "head_dim")),
        "layers.wo": ((L, N, H, D), ("layers", "heads", "head_dim", "embed")),
        "layers.mlp_norm": ((L, D), ("layers", "embed")),
        "layers.w_gate": ((L, D, F), ("layers", "embed", "mlp")),
        "layers.w_up": ((L, D, F), ("layers", "embed", "mlp")),
        "layers.w_down": ((L, F, D), ("layers", "mlp", "embed")),
        "norm": ((D,), ("embed",)),
        "lm_head": ((D, V), ("embed", "vocab")),
    }
    state = nnx.state(nnx.eval_shape(lambda: Llama(GROUPED, jax.random.key(0))))
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    assert {name: (v.shape, v.get_metadata("axes")) for name, v in variables.items()} == expected
    assert all(variable.dtype == jnp.float32 for variable in variables.values())
    tied = nnx.state(nnx.eval_shape(lambda: Llama(TIED, jax.random.key(0))))
    assert {".".join(map(str, path)) for path, _ in nnx.to_flat_state(tied)} == expected.keys() - {"lm_head"}


@pytest.mark.parametrize(
    ("size", "num_parameters"),
    [("llama-7b", 6_738_415_616), ("llama-65b", 65_285_660_672), ("llama2-70b", 68_976_648_192)],
)
def test_published_sizes_are_built_without_allocating_them(size: str, num_parameters: int):
    """Counts from PROTOCOLS.md §1."""
    state = nnx.state(nnx.eval_shape(lambda: Llama(Model(**PRESETS[size]), jax.random.key(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == num_parameters


def test_initial_matrices_are_normal_and_differ_from_each_other():
    """The mean of n draws lies within 5 / sqrt(n) deviations of 0, their deviation within 5 / sqrt(2n) of init_std."""
    params = initial(replace(GROUPED, init_std=0.5), SEED)
    leaves = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    norms = [x for name, x in leaves.items() if "norm" in name]
    matrices = [x for name, x in leaves.items() if "norm" not in name]
    assert len(norms) == 3 and all((x == 1).all() for x in norms)
    assert len(matrices) == 9
    for x in matrices:
        assert abs(x.mean()) < 0.5 * 5 / np.sqrt(x.size)
        assert abs(x.std() / 0.5 - 1) < 5 / np.sqrt(2 * x.size)
    drawn = np.concatenate([x.ravel() for x in matrices])
    assert len(np.unique(drawn)) > 0.99 * len(drawn)


def test_a_draw_does_not_depend_on_the_sharding():
    """Drawn into place on 2 x 2 x 2 devices, every parameter is bitwise what one device draws."""
    model = replace(GROUPED, vocab_size=98)
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2, zero=3))
    variables = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Llama(model, jax.random.key(0)))))
    specs = [sharding.parameter_spec(variable.get_metadata("axes"), True) for _, variable in variables]
    places = [jax.NamedSharding(mesh, spec) for spec in specs]
    leaves, structure = jax.tree.flatten(initial(model, SEED))
    spread = jax.jit(partial(initial, model), out_shardings=jax.tree.unflatten(structure, places))(SEED)
    for one, many, place in zip(leaves, jax.tree.leaves(spread), places, strict=True):
        assert many.sharding == place
        np.testing.assert_array_equal(one, many)

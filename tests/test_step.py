"""The train step: sharding, accumulation, optimizer, schedule, trainable sets and the non-finite policy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch

from panda_jax import sharding
from panda_jax.config import Adafactor, AdamW, Config, Lion, Schedule
from panda_jax.errors import InputError
from panda_jax.training import step as steps
from panda_jax.training.step import learning_rate


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return jax.make_mesh(
        (data, fsdp, tensor), sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices
    )


def run(config: Config, mesh: jax.sharding.Mesh, num_steps: int, batches=None):
    """Return (host parameters, metrics of every step, step, device state) after `num_steps` steps."""
    step = steps.build(config, mesh, run_steps=num_steps)
    size = config.train.global_batch_size
    results = []
    with jax.set_mesh(mesh):
        state = step.initial_state(jax.random.key(config.seed))
        for number in range(num_steps):
            host = batches[number] if batches else tiny.batch(number)
            batch = sharding.to_global(host, sharding.local_rows(mesh, size), mesh, size)
            state, result = step.train(state, batch)
            results.append(jax.device_get(result))
    return jax.device_get(state["parameters"]), results, step, state


CONSTANT = Schedule(kind="constant", warmup_steps=0)


def gradient_config(mesh: dict, micro_batch_size: int | None = None) -> Config:
    """Return a run whose one step subtracts the gradient: plain descent of rate 1, unclipped."""
    train = {"clip_norm": None, "micro_batch_size": micro_batch_size}
    return tiny.config(optimizer=tiny.sgd(1.0), schedule=CONSTANT, mesh=mesh, train=train, model={"init_std": 0.2})


@pytest.fixture(scope="module")
def one_device():
    """Parameters, metrics and initial parameters of one whole-batch step on one device."""
    after, (result,), step, _ = run(gradient_config({"data": 1}), mesh_of(1, 1, 1), 1)
    return after, result, jax.device_get(step.initial_state(jax.random.key(42)))["parameters"]


@pytest.mark.parametrize("zero", [1, 3])
def test_eight_devices_compute_what_one_computes(one_device, zero):
    """Parameters agree iff gradients do; no parameter may be without one."""
    one, first, start = one_device
    many, (other,), _, _ = run(gradient_config({"data": 2, "fsdp": 2, "tensor": 2, "zero": zero}), mesh_of(2, 2, 2), 1)
    assert abs(first["loss"] - other["loss"]) < 1e-5
    for name in one:
        np.testing.assert_allclose(many[name], one[name], atol=1e-5, rtol=0, err_msg=name)
        assert np.abs(one[name] - start[name]).max() > 1e-4, f"{name} has no gradient"


@pytest.mark.parametrize("micro_batch_size", [4, 2, 1])
def test_accumulation_does_not_change_the_gradient(one_device, micro_batch_size):
    """Ragged rows and a row without trained tokens: a mean of means would differ in the second digit."""
    whole, first, _ = one_device
    split, (other,), _, _ = run(gradient_config({"data": 1}, micro_batch_size), mesh_of(1, 1, 1), 1)
    assert abs(first["loss"] - other["loss"]) < 1e-6
    for name in whole:
        np.testing.assert_allclose(split[name], whole[name], atol=1e-6, rtol=0, err_msg=name)


def test_accumulation_and_sharding_together(one_device):
    whole, _, _ = one_device
    split, _, _, _ = run(gradient_config({"data": 2, "fsdp": 2, "zero": 3}, 1), mesh_of(2, 2, 1), 1)
    for name in whole:
        np.testing.assert_allclose(split[name], whole[name], atol=1e-5, rtol=0, err_msg=name)


def test_zero_layouts_hold_what_they_promise():
    """On data 2 x fsdp 4, wq [3, 32, 8, 4] float32 is 12,288 bytes whole and 3,072 split over fsdp."""
    for zero, parameter_bytes in ((1, 12288), (3, 3072)):
        config = tiny.config(mesh={"data": 2, "fsdp": 4, "zero": zero})
        mesh = mesh_of(2, 4, 1)
        step = steps.build(config, mesh, 1)
        with jax.set_mesh(mesh):
            state = step.initial_state(jax.random.key(0))
        moments = [
            leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state["optimizer"]) if "layers.wq" in str(path)
        ]
        assert len(moments) == 2
        assert state["parameters"]["layers.wq"].addressable_shards[0].data.nbytes == parameter_bytes
        assert all(moment.addressable_shards[0].data.nbytes == 3072 for moment in moments)


def test_three_adamw_steps_equal_torch():
    """torch gets the same gradients for its own copy of the parameters: clip by global norm, then AdamW."""
    optimizer = AdamW(learning_rate=3e-3, beta1=0.9, beta2=0.97, eps=1e-6, weight_decay=0.1)
    schedule = Schedule(kind="linear", warmup_steps=2, total_steps=10)
    config = tiny.config(optimizer=optimizer, schedule=schedule, train={"clip_norm": 0.5})
    ours, results, step, _ = run(config, mesh_of(1, 1, 1), 3)

    start = jax.device_get(step.initial_state(jax.random.key(config.seed))["parameters"])
    theirs = {name: torch.tensor(np.array(value), requires_grad=True) for name, value in start.items()}
    groups = [
        {"params": [value for name, value in theirs.items() if not name.endswith("norm")], "weight_decay": 0.1},
        {"params": [value for name, value in theirs.items() if name.endswith("norm")], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.97), eps=1e-6)
    rates = [0.0, 1.5e-3, 3e-3]  # 0 -> 3e-3 over two steps
    for number, rate in enumerate(rates):
        values = {name: jax.numpy.asarray(value.detach().numpy()) for name, value in theirs.items()}

        batch = tiny.batch(number)
        sums = lambda values, batch=batch: step.evaluate(values, batch)  # noqa: E731
        for name, gradient in jax.grad(lambda values, sums=sums: sums(values)[0] / sums(values)[1])(values).items():
            theirs[name].grad = torch.tensor(np.array(gradient))
        norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.5)
        assert norm > 0.5, "the clip must be active for this test to mean anything"
        assert abs(float(norm) - results[number]["gradient_norm"]) < 1e-4
        assert results[number]["learning_rate"] == pytest.approx(rate, abs=1e-9)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value.detach().numpy(), atol=1e-5, rtol=0, err_msg=name)


def test_adafactor_clips_the_update_of_each_layer_by_itself():
    """Two stacked matrices and one alone; the root mean squares of their updates are 4, 0.5 and 2, the limit is 1."""
    updates = {
        "layers.w": jnp.array([[[4.0, -4.0], [4.0, 4.0]], [[0.5, 0.5], [-0.5, 0.5]]]),
        "embed": jnp.array([[2.0, -2.0], [2.0, 2.0]]),
    }
    clipped: Any = steps._clip_by_rms(1.0).update(updates, optax.EmptyState(), None)[0]
    np.testing.assert_allclose(clipped["layers.w"], [[[1, -1], [1, 1]], [[0.5, 0.5], [-0.5, 0.5]]], rtol=1e-6)
    np.testing.assert_allclose(clipped["embed"], [[1, -1], [1, 1]], rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer", [Lion(kind="lion"), Adafactor(kind="adafactor"), tiny.sgd(0.1)], ids=lambda o: o.kind
)
def test_every_optimizer_lowers_the_loss_on_eight_devices(optimizer):
    config = tiny.config(optimizer=optimizer, schedule=CONSTANT, mesh={"data": 2, "fsdp": 2, "tensor": 2, "zero": 3})
    _, results, _, _ = run(config, mesh_of(2, 2, 2), 8, batches=[tiny.batch(0)] * 8)
    assert results[-1]["loss"] < results[0]["loss"]


def test_schedule_of_the_published_config():
    """PROTOCOLS.md §8 oracle 20: 1157 warm-up steps of 115,721 at peak 1e-5."""
    rate = learning_rate(Schedule(kind="linear", warmup_steps=1157, total_steps=115_721), 1e-5, run_steps=1)
    values = [float(rate(jnp.int32(step))) for step in (0, 250, 1157, 1750)]
    np.testing.assert_allclose(values, [0.0, 2.16e-6, 1e-5, 9.948e-6], rtol=5e-4)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Schedule(kind="linear", warmup_fraction=0.2, final_fraction=0.1), [0, 1, 2, 1.1, 0.2]),
        (Schedule(kind="cosine", warmup_fraction=0.2, final_fraction=0.1), [0, 1, 2, 1.1, 0.2]),
        (Schedule(kind="constant", warmup_fraction=0.2), [0, 1, 2, 2, 2]),
    ],
    ids=lambda value: value.kind if isinstance(value, Schedule) else "",
)
def test_schedule_shapes(schedule, values):
    """Peak 2, 10 steps, warm-up 20 % = 2 steps, end at a tenth: half-way (step 6) linear is 1.1, cosine 1.1."""
    rate = learning_rate(schedule, 2.0, run_steps=10)
    np.testing.assert_allclose([float(rate(jnp.int32(step))) for step in (0, 1, 2, 6, 10)], values, atol=1e-6)


def test_frozen_parameters_stay_bit_equal():
    config = tiny.config(train={"trainable": "embeddings"}, schedule=CONSTANT)
    after, _, step, state = run(config, mesh_of(1, 1, 1), 2)
    before = jax.device_get(step.initial_state(jax.random.key(config.seed))["parameters"])
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {"embed", "lm_head"}
    moments = [path for path, _ in jax.tree_util.tree_leaves_with_path(state["optimizer"])]
    assert len(moments) == 1 + 2 * 2  # a count, and two moments of two matrices


def test_trainable_pattern_without_a_match():
    with pytest.raises(InputError, match=r"train.trainable: 'layer.w\*' matches no parameter; the names are embed"):
        steps.build(tiny.config(train={"trainable": ("layer.w*",)}), mesh_of(1, 1, 1), 1)


def poisoned(number: int) -> dict[str, np.ndarray]:
    batch = tiny.batch(number)
    batch["loss_weights"][0, 0] = np.inf
    return batch


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_non_finite_gradient_never_reaches_the_parameters(policy):
    """Bad at step 1 of 3. Skipping equals never having seen the step; stopping freezes the state before it."""
    config = tiny.config(train={"nonfinite": policy}, optimizer=AdamW(learning_rate=1e-2), schedule=CONSTANT)
    mesh = mesh_of(1, 1, 1)
    after, results, _, state = run(config, mesh, 3, [tiny.batch(0), poisoned(1), tiny.batch(2)])
    good = [tiny.batch(0), tiny.batch(2)] if policy == "skip" else [tiny.batch(0)]
    expected, _, _, _ = run(config, mesh, len(good), good)
    assert [bool(result["finite"]) for result in results] == [True, False, True]
    assert int(state["step"]) == {"skip": 3, "stop": 1}[policy]
    for name in after:
        np.testing.assert_array_equal(after[name], expected[name], err_msg=name)


def test_the_step_compiles_once():
    _, _, step, _ = run(tiny.config(mesh={"data": 2, "fsdp": 2, "tensor": 2}), mesh_of(2, 2, 2), 3)
    assert step.train._cache_size() == 1


def test_the_step_keeps_no_second_copy_of_the_optimizer_state():
    """Beside its donated state a step needs the gradients, 1.0 of the parameters' bytes, and room for few activations.

    192 tokens x 16 layers x 128 states in float32 are 0.1 of the parameters; copies of both moments would be 2.0.
    """
    config = tiny.config(
        model={"vocab_size": 64, "dim": 128, "num_layers": 16, "mlp_dim": 512}, compute={"remat": "full"}
    )
    mesh = mesh_of(1, 1, 1)
    step = steps.build(config, mesh, 1)
    with jax.set_mesh(mesh):
        temporary = step.compile().memory_analysis().temp_size_in_bytes
    parameters = sum(4 * shape.size for shape in step.parameters.shapes.values())
    assert parameters < temporary < 1.6 * parameters


@pytest.mark.parametrize(
    ("mesh", "train", "message"),
    [
        ((1, 1, 8), {}, r"mesh.tensor: 8 does not divide layers.wk of shape \(3, 32, 4, 4\)"),
        ((8, 1, 1), {"global_batch_size": 12}, "train.global_batch_size: 12 rows cannot be spread over data 8"),
        ((2, 1, 1), {"micro_batch_size": 3}, "train.micro_batch_size: 3 does not divide the 4 rows of a device"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(mesh, train, message):
    with pytest.raises(InputError, match=message):
        steps.build(tiny.config(train=train), mesh_of(*mesh), 1)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 3}, "mesh data 3 x fsdp 1 x tensor 1 is 3 devices, but there are 8; set mesh.data=-1"),
        ({"data": -1, "tensor": 3}, "3 does not divide the 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one of data and fsdp may be -1"),
        ({"platform": "tpu"}, "mesh.platform: asked for tpu, found cpu"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(tiny.config(mesh=mesh).mesh)

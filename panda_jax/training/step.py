"""The train step: one jitted function over a pytree of arrays, its initial state, where each array lies, its optimizer.

state = {"parameters": {name: array},   float32, names such as "embed" and "layers.wq"
         "optimizer": optax state,      of the trainable parameters only
         "step": int32 [],              finished steps = the data position
         "key": uint32 [2],             every draw of step k is folded out of (key, k)
         "healthy": bool []}            False once a non-finite gradient stopped the run
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from panda_jax import sharding
from panda_jax.config import Adafactor, AdamW, Config, Lion, Optimizer, Schedule
from panda_jax.errors import InputError
from panda_jax.model.parameters import Parameters
from panda_jax.objectives import OBJECTIVES

State = dict[str, Any]
Batch = dict[str, jax.Array]

# Largest root mean square of an Adafactor update (arXiv:1804.04235 §6); the paper's constant, not a setting.
ADAFACTOR_UPDATE_RMS = 1.0


@dataclass(frozen=True)
class Step:
    """Everything that runs on the devices for one config and mesh."""

    mesh: jax.sharding.Mesh
    parameters: Parameters
    trainable: tuple[str, ...]
    """Names of the parameters that are trained."""
    state_shapes: State
    """ShapeDtypeStruct of every array of the state, with its sharding."""
    gradient_shapes: dict[str, jax.ShapeDtypeStruct]
    """ShapeDtypeStruct of the accumulated gradient of every trained parameter, with its sharding."""
    initial_state: Callable[[jax.Array], State]
    """Seed key -> state, jitted into place."""
    train: Any
    """jitted (state, batch) -> (state, metrics); the state is donated."""
    evaluate: Any
    """jitted (parameters, batch) -> (loss_sum, weight)."""
    batch_shapes: dict[str, jax.ShapeDtypeStruct]
    """ShapeDtypeStruct of every array of a global batch, with its sharding."""

    def compile(self) -> Any:
        """Return the compiled `train`; call it under the mesh."""
        return self.train.lower(self.state_shapes, self.batch_shapes).compile()


def batch_shapes(config: Config, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the abstract global batch: int32 and float32 [global_batch_size, seq_len]."""
    shape = (config.train.global_batch_size, config.data.seq_len)
    spread = NamedSharding(mesh, sharding.BATCH_SPEC)
    integers = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=spread)
        for name in ("tokens", "targets", "segment_ids", "positions")
    }
    return integers | {"loss_weights": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=spread)}


def build(config: Config, mesh: jax.sharding.Mesh, run_steps: int) -> Step:
    """Assemble the step of a run of `run_steps` steps; nothing is allocated or compiled yet.

    Raises InputError for an unknown objective, and for a mesh that does not divide the batch or a parameter.
    """
    if config.objective not in OBJECTIVES:
        raise InputError(f"objective: unknown {config.objective!r}; choose one of {', '.join(OBJECTIVES)}")
    parameters = Parameters(config.model)
    trainable = trainable_names(config, parameters.names)
    optimizer = make_optimizer(config.optimizer)
    schedule = learning_rate(config.schedule, config.optimizer.learning_rate, run_steps)

    def initial_state(key: jax.Array) -> State:
        values = parameters.initial(key)
        return {
            "parameters": values,
            "optimizer": optimizer.init({name: values[name] for name in trainable}),
            "step": jnp.zeros((), jnp.int32),
            "key": jax.random.key_data(jax.random.fold_in(key, 1)),
            "healthy": jnp.ones((), bool),
        }

    shapes = jax.eval_shape(initial_state, jax.random.key(0))
    shardings = _state_shardings(config, mesh, parameters, shapes)
    gradient_specs = {name: sharding.parameter_spec(parameters.axes[name], shard_over_fsdp=True) for name in trainable}
    gradient_shapes = {
        name: jax.ShapeDtypeStruct(parameters.shapes[name].shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, spec in gradient_specs.items()
    }
    gradient_sums = _gradient_function(config, mesh, parameters, trainable, gradient_specs)
    train = _train_function(config, gradient_sums, trainable, optimizer, schedule)
    objective = OBJECTIVES[config.objective]

    def evaluate(values: dict[str, jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss_sum, weight, _ = objective(parameters.module(values), None, batch, jax.random.key(0), config.compute)
        return loss_sum, weight

    rows = NamedSharding(mesh, sharding.BATCH_SPEC)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return Step(
        mesh=mesh,
        parameters=parameters,
        trainable=trainable,
        state_shapes=jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
        ),
        gradient_shapes=gradient_shapes,
        initial_state=jax.jit(initial_state, out_shardings=shardings),
        train=jax.jit(train, donate_argnums=0, in_shardings=(shardings, rows), out_shardings=(shardings, everywhere)),
        evaluate=jax.jit(evaluate, in_shardings=(shardings["parameters"], rows), out_shardings=everywhere),
        batch_shapes=batch_shapes(config, mesh),
    )


def _state_shardings(config: Config, mesh: jax.sharding.Mesh, parameters: Parameters, shapes: State) -> State:
    """Give every array of the state its place; raise InputError where the mesh does not divide a dimension."""
    for_state = {name: sharding.parameter_spec(axes, shard_over_fsdp=True) for name, axes in parameters.axes.items()}
    sharding.check_divisible(
        {name: (parameters.shapes[name].shape, for_state[name]) for name in parameters.names}, mesh
    )
    for_parameters = {
        name: sharding.parameter_spec(axes, shard_over_fsdp=config.mesh.zero == 3)
        for name, axes in parameters.axes.items()
    }

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        # Optimizer state that mirrors a parameter carries its name as the last dict key; factored moments have
        # other shapes and are small enough to be replicated.
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey) and entry.key in for_state]
        if path[0].key == "parameters":
            return NamedSharding(mesh, for_parameters[names[-1]])
        if names and leaf.shape == parameters.shapes[names[-1]].shape:
            return NamedSharding(mesh, for_state[names[-1]])
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, shapes)


def _gradient_function(
    config: Config,
    mesh: jax.sharding.Mesh,
    parameters: Parameters,
    trainable: tuple[str, ...],
    specs: dict[str, PartitionSpec],
) -> Callable[[State, Batch, jax.Array], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]:
    """Return (state, batch, key) -> (loss_sum, weight, gradients of loss_sum): sums over all rows, not divided."""
    objective = OBJECTIVES[config.objective]
    num_micro_batches = sharding.batch_split(config, mesh)

    def of_rows(state: State, batch: Batch, key: jax.Array):
        def loss(values: dict[str, jax.Array]):
            module = parameters.module(state["parameters"] | values)
            loss_sum, weight, _ = objective(module, None, batch, key, config.compute)
            return loss_sum, weight

        values = {name: state["parameters"][name] for name in trainable}
        (loss_sum, weight), gradients = jax.value_and_grad(loss, has_aux=True)(values)
        return loss_sum, weight, jax.lax.with_sharding_constraint(gradients, specs)

    def split(rows: jax.Array) -> jax.Array:
        # Row r goes to micro-batch r % num_micro_batches, so every device keeps its own contiguous rows.
        stacked = rows.reshape(-1, num_micro_batches, *rows.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(stacked, PartitionSpec(None, *sharding.BATCH_SPEC))

    def accumulated(state: State, batch: Batch, key: jax.Array):
        def add(total, item):
            micro_batch, index = item
            return jax.tree.map(jnp.add, total, of_rows(state, micro_batch, jax.random.fold_in(key, index))), None

        zeros = {name: jnp.zeros(state["parameters"][name].shape, jnp.float32) for name in trainable}
        start = (jnp.zeros(()), jnp.zeros(()), jax.lax.with_sharding_constraint(zeros, specs))
        return jax.lax.scan(add, start, (jax.tree.map(split, batch), jnp.arange(num_micro_batches)))[0]

    return of_rows if num_micro_batches == 1 else accumulated


def _train_function(
    config: Config,
    gradient_sums: Callable[[State, Batch, jax.Array], tuple[jax.Array, jax.Array, dict[str, jax.Array]]],
    trainable: tuple[str, ...],
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """Return the step: one division by the global weight, clipping, the update, and the guard around it."""

    def train(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        loss_sum, weight, gradients = gradient_sums(state, batch, key)
        # A batch without a single trained token has zero gradients; dividing by 1 keeps them zero.
        divisor = jnp.maximum(weight, 1.0)
        norm = optax.tree.norm(gradients) / divisor
        finite = jnp.isfinite(norm) & jnp.isfinite(loss_sum)
        scale = 1.0 / divisor
        if config.train.clip_norm is not None:
            scale *= jnp.minimum(1.0, config.train.clip_norm / jnp.maximum(norm, 1e-30))
        apply = finite & state["healthy"]
        advance = state["healthy"] & (finite | (config.train.nonfinite == "skip"))
        rate = schedule(state["step"])

        def move(values: dict[str, jax.Array], optimizer_state: Any) -> tuple[dict[str, jax.Array], Any]:
            scaled = jax.tree.map(lambda gradient: gradient * scale, gradients)
            updates, optimizer_state = optimizer.update(scaled, optimizer_state, values)
            return jax.tree.map(lambda value, update: value - rate * update, values, updates), optimizer_state

        # A branch, not a select per array: between select(new, old) pairs XLA keeps a copy of every old moment alive
        # through the whole step, 8 bytes a parameter.
        former = {name: state["parameters"][name] for name in trainable}
        values, optimizer_state = jax.lax.cond(apply, move, lambda *unchanged: unchanged, former, state["optimizer"])
        state = {
            "parameters": state["parameters"] | values,
            "optimizer": optimizer_state,
            "step": state["step"] + advance.astype(jnp.int32),
            "key": state["key"],
            "healthy": advance,
        }
        metrics = {
            "loss": loss_sum / divisor,
            "trained_tokens": weight,
            "gradient_norm": norm,
            "learning_rate": rate,
            "finite": finite,
        }
        return state, metrics

    return train


# ---- optimizer, schedule, what is trained ----------------------------------------------------------------------------


def learning_rate(schedule: Schedule, peak: float, run_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Return lr(finished steps) as float32: linear from 0 to `peak` over the warm-up, then the schedule's shape.

    The step numbered k from 0 uses lr(k), as DeepSpeed's WarmupDecayLR and transformers do: the first step of a
    warm-up has rate 0. `run_steps` is the length of the run, used where the schedule names no total_steps.
    """
    total = schedule.total_steps or run_steps
    warmup = schedule.warmup_steps if schedule.warmup_steps is not None else round(schedule.warmup_fraction * total)
    final = peak * schedule.final_fraction

    def value(step: jax.Array) -> jax.Array:
        step = step.astype(jnp.float32)
        rising = peak * step / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
        if schedule.kind == "linear":
            falling = peak + (final - peak) * progress
        elif schedule.kind == "cosine":
            falling = final + (peak - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        else:
            falling = jnp.full_like(step, peak)
        return jnp.where(step < warmup, rising, falling)

    return value


def make_optimizer(config: Optimizer) -> optax.GradientTransformation:
    """Return the transformation from gradients to updates of unit learning rate; the step multiplies by -lr.

    Parameters are a flat dict name -> array. Weight decay leaves out every name that ends in `norm`.
    """
    if isinstance(config, AdamW):
        direction = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    elif isinstance(config, Lion):
        direction = optax.scale_by_lion(config.beta1, config.beta2)
    elif isinstance(config, Adafactor):
        direction = optax.chain(
            optax.scale_by_factored_rms(decay_rate=config.decay_rate),
            _clip_by_rms(ADAFACTOR_UPDATE_RMS),
        )
    else:
        direction = optax.trace(config.momentum) if config.momentum else optax.identity()
    if not config.weight_decay:
        return direction

    def is_decayed(parameters: Any) -> dict[str, bool]:
        return {name: not name.endswith("norm") for name in parameters}

    return optax.chain(direction, optax.add_decayed_weights(config.weight_decay, mask=is_decayed))


def _clip_by_rms(limit: float) -> optax.GradientTransformation:
    """Scale down updates whose root mean square exceeds `limit` (arXiv:1804.04235 §6), each layer's by itself.

    optax.clip_by_block_rms would take a stack of layers for one matrix.
    """

    def clip(updates: Any, parameters: Any) -> dict[str, jax.Array]:
        def scaled(name: str, update: jax.Array) -> jax.Array:
            axes = range(1 if name.startswith("layers.") else 0, update.ndim)
            rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=tuple(axes), keepdims=True))
            return update / jnp.maximum(1.0, rms / limit)

        return {name: scaled(name, update) for name, update in updates.items()}

    return optax.stateless(clip)


def trainable_names(config: Config, names: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters that train.trainable selects, in order; raise InputError for a pattern without a match."""
    if config.train.trainable == "all":
        return tuple(names)
    patterns = ("embed", "lm_head") if config.train.trainable == "embeddings" else config.train.trainable
    for pattern in patterns:
        if config.train.trainable != "embeddings" and not fnmatch.filter(names, pattern):
            raise InputError(f"train.trainable: {pattern!r} matches no parameter; the names are {', '.join(names)}")
    return tuple(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))

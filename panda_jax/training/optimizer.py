"""The optimizers and learning-rate schedules that a config can name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from panda_jax.config import Adafactor, AdamW, Config, Lion, Optimizer, Schedule
from panda_jax.errors import InputError

# Largest root mean square of an Adafactor update (arXiv:1804.04235 §6); the paper's constant, not a setting.
ADAFACTOR_UPDATE_RMS = 1.0


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
            optax.clip_by_block_rms(ADAFACTOR_UPDATE_RMS),
        )
    else:
        direction = optax.trace(config.momentum) if config.momentum else optax.identity()
    if not config.weight_decay:
        return direction

    def is_decayed(parameters: Any) -> dict[str, bool]:
        return {name: not name.endswith("norm") for name in parameters}

    return optax.chain(direction, optax.add_decayed_weights(config.weight_decay, mask=is_decayed))


def trainable_names(config: Config, names: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters that train.trainable selects, in order; raise InputError for a pattern without a match."""
    if config.train.trainable == "all":
        return tuple(names)
    patterns = ("embed", "lm_head") if config.train.trainable == "embeddings" else config.train.trainable
    for pattern in patterns:
        if config.train.trainable != "embeddings" and not fnmatch.filter(names, pattern):
            raise InputError(f"train.trainable: {pattern!r} matches no parameter; the names are {', '.join(names)}")
    return tuple(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))

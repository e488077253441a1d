"""The card a run prints before its first step: what will be trained, on what, where."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax

from panda_jax.config import Config
from panda_jax.data.cache import TokenCache, preview
from panda_jax.data.packing import Plan
from panda_jax.model.attention import choose_backend
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.training.step import Step


def start_card(
    config: Config, step: Step, plan: Plan, caches: Sequence[TokenCache], tokenizer: Tokenizer, first_step: int
) -> str:
    """Return the start card as text, the first training record of the run among it, its trained part marked."""
    model, mesh, batch = config.model, step.mesh, config.train.global_batch_size
    totals = plan.totals(caches)
    trainable = sum(leaf.size for name, leaf in step.parameters.shapes.items() if name in step.trainable)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    micro = config.train.micro_batch_size
    device = mesh.devices.flat[0]
    optimizer, schedule = config.optimizer, config.schedule
    lines = {
        "run": f"{config.name}, objective {config.objective}, seed {config.seed}",
        "model": f"{model.size or 'llama'}: {model.num_parameters:,} parameters"
        + ("" if trainable == model.num_parameters else f", {trainable:,} trained")
        + f"; {model.num_layers} layers x {model.dim}, {model.num_heads} heads, {model.num_kv_heads} kv heads",
        "devices": f"{mesh.devices.size} x {device.device_kind} ({device.platform}), {shape}, zero {config.mesh.zero}"
        + (f", {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        "compute": f"{config.compute.dtype}, attention {choose_backend(model, config.compute, config.data.seq_len)}, "
        f"remat {config.compute.remat}, layers {config.compute.layer_loop}",
        "batch": f"{batch} rows x {config.data.seq_len} = {batch * config.data.seq_len:,} tokens a step"
        + (f", in micro-batches of {micro} rows a device" if micro else ""),
        "steps": f"{plan.num_steps:,} = {plan.epoch(plan.num_steps):.2f} epochs, {totals.tokens:,} tokens, "
        f"{totals.padding_fraction:.1%} padding" + (f"; {first_step:,} are done" if first_step else ""),
        "sources": ", ".join(
            f"{name} {tokens / totals.tokens:.1%}" for name, tokens in totals.tokens_per_source.items()
        ),
        "optimizer": f"{optimizer.kind}, {schedule.kind} schedule, peak learning rate {optimizer.learning_rate:g}",
    }
    width = max(map(len, lines))
    source, window = plan.row(0)[0]
    example = preview(caches[source], tokenizer, window, sys.stdout.isatty())
    return "\n".join([*(f"{name:<{width}}  {text}" for name, text in lines.items()), "", "first record:", example])

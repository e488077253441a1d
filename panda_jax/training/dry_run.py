"""Compile a run's train step on simulated devices, without its weights or data, and say whether it would fit."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterable
from typing import Any

import jax

from panda_jax import sharding
from panda_jax.config import Config
from panda_jax.errors import InputError
from panda_jax.training import step as steps

GIB = 2**30
MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)", re.IGNORECASE)
UNITS = {"gb": 10**9, "gib": GIB, "mb": 10**6, "mib": 2**20}


def parse_memory(text: str) -> int:
    """Return the bytes in a text such as 80GB or 24GiB; raise InputError for anything else."""
    match = MEMORY.fullmatch(text.strip())
    if match is None:
        raise InputError(f"--memory {text}: expected a number and a unit, such as 80GB or 24GiB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def simulate_devices(config: Config) -> None:
    """Make JAX show as many CPU devices as the config's mesh has; must run before JAX is used."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", sharding.num_devices_of(config.mesh))


def dry_run(config: Config, memory_bytes: int) -> tuple[str, bool]:
    """Return (a table of bytes per device by kind, whether they fit into `memory_bytes`).

    The step is lowered and compiled for the config's mesh on simulated devices; nothing of the model is allocated.
    Parameters and optimizer state are exact. The rest is what XLA's CPU compiler asks for; it keeps some bfloat16
    values in float32, so that a GPU or TPU needs no more than this.
    """
    # The devices are simulated, whatever platform the run itself asks for.
    mesh = sharding.make_mesh(dataclasses.replace(config.mesh, platform=None))
    if config.compute.attention == "cudnn":  # which they lack; it needs no more memory than ours
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, attention="xla"))
    run_steps = config.train.max_steps or config.schedule.total_steps or 1000
    step = steps.build(config, mesh, run_steps)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = step.compile()
    seconds = time.perf_counter() - start
    analysis: Any = compiled.memory_analysis()

    parameters = per_device_bytes(step.state_shapes["parameters"].values())
    optimizer = per_device_bytes(jax.tree.leaves(step.state_shapes["optimizer"]))
    gradients = per_device_bytes(step.gradient_shapes.values())
    batch = per_device_bytes(step.batch_shapes.values())
    activations = max(int(analysis.temp_size_in_bytes) - gradients, 0)
    table = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations and temporaries": activations,
        "batch": batch,
    }
    total = sum(table.values())
    fits = total <= memory_bytes
    lines = [
        f"{config.name}: {config.model.num_parameters:,} parameters on {mesh.devices.size} devices {dict(mesh.shape)}"
    ]
    lines += [f"  {name:<28}{size / GIB:10.2f} GiB" for name, size in table.items()]
    lines += [f"  {'total per device':<28}{total / GIB:10.2f} GiB of {memory_bytes / GIB:.2f} GiB"]
    lines += [f"compiled in {seconds:.0f} s; it {'fits' if fits else 'does NOT fit'}"]
    if not fits:
        lines.append(f"to make it fit: {cheapest_change(config, table)}")
    return "\n".join(lines), fits


def per_device_bytes(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Return the bytes that the given sharded arrays take on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)  # pyright: ignore


def cheapest_change(config: Config, table: dict[str, int]) -> str:
    """Return advice on the largest part of the table, cheapest in speed first."""
    largest = max(table, key=lambda name: table[name])
    if largest == "activations and temporaries":
        if config.compute.remat != "full":
            return "set compute.remat=full"
        if config.train.micro_batch_size != 1:
            return "lower train.micro_batch_size (same result, more accumulation)"
        return "raise mesh.tensor, or lower compute.loss_chunk_tokens"
    if config.mesh.zero == 1 and config.mesh.fsdp > 1:
        return "set mesh.zero=3, which shards parameters over fsdp as well"
    return "raise mesh.fsdp (with mesh.zero=3) or mesh.tensor, or use more devices"

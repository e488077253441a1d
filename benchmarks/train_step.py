"""One full train step of panda_jax against transformers' LLaMA on torch, on this machine's CPU.

    python benchmarks/train_step.py                                    # every case, about 40 minutes on 2 idle cores
    python benchmarks/train_step.py --cases tiny-15m --rounds 1        # a quick look

A step is forward, backward, clipping by the global norm and an AdamW update, float32, on 4 rows of 512 random tokens;
the output layer is tied on both sides. Each side runs in a process of its own; the sides take turns, `--rounds` times,
so that a busy machine slows all of them alike. Reported are the median step over all rounds and the largest resident
set of a whole process, imports and compilation included. Ratios are to `torch`, which is without checkpointing:

    panda           layers scanned, products with weights kept, the rest recomputed (remat: dots)
    panda-remat     layers scanned, everything recomputed (remat: full)
    panda-unroll    layers unrolled, nothing recomputed (remat: none)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from panda_jax.config import (  # noqa: E402  (the benchmark runs from the checkout)
    AdamW,
    Compute,
    Config,
    Data,
    Mesh,
    Model,
    Schedule,
    Source,
    Tokenizer,
    Train,
)  # fmt: skip
from panda_jax.presets import PRESETS  # noqa: E402

BATCH, LENGTH = 4, 512
LEARNING_RATE, BETAS, EPS, CLIP_NORM = 1e-4, (0.9, 0.99), 1e-6, 5.0

CASES = {
    "tiny-15m": Model(**PRESETS["tiny-15m"]),
    "tiny-110m": Model(**PRESETS["tiny-110m"]),
    "tiny-110m-79458": replace(Model(**PRESETS["tiny-110m"]), vocab_size=79458),
}

_KEEP_PRODUCTS = Compute(
    dtype="float32", remat="dots", layer_loop="scan", loss_chunk_tokens=512, compilation_cache_dir=None
)
PANDA_SIDES = {
    "panda": _KEEP_PRODUCTS,
    "panda-remat": replace(_KEEP_PRODUCTS, remat="full"),
    "panda-unroll": replace(_KEEP_PRODUCTS, remat="none", layer_loop="unroll"),
}
TORCH_SIDES = {"torch": False, "torch-checkpoint": True}
SIDES = (*PANDA_SIDES, *TORCH_SIDES)


@dataclass(frozen=True)
class Result:
    """What one process measured."""

    step_s: list[float]
    cpu_s: list[float]
    """Processor time of the same steps, over all threads: steadier than the clock on a machine that others use."""
    peak_bytes: int
    first_loss: float
    compile_s: float


def measure(step: Callable[[], float], num_steps: int) -> Result:
    """Run a step once to compile and once to warm up, then `num_steps` times against the clock."""
    started = time.perf_counter()
    first_loss = step()
    compile_s = time.perf_counter() - started
    step()
    step_s, cpu_s = [], []
    for _ in range(num_steps):
        started, cpu_started = time.perf_counter(), time.process_time()
        step()
        step_s.append(time.perf_counter() - started)
        cpu_s.append(time.process_time() - cpu_started)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Result(step_s, cpu_s, peak_bytes, first_loss, compile_s)


def random_tokens(model: Model) -> np.ndarray:
    """Return int64 [BATCH, LENGTH + 1]; the targets are the tokens shifted by one."""
    return np.random.default_rng(0).integers(0, model.vocab_size, (BATCH, LENGTH + 1))


def run_panda(model: Model, compute: Compute, num_steps: int) -> Result:
    """Measure the step of the train door, as built for one device."""
    import jax

    from panda_jax import sharding
    from panda_jax.training import step as steps

    config = Config(
        name="benchmark",
        model=model,
        tokenizer=Tokenizer(path="unused"),
        data=Data(seq_len=LENGTH, sources=(Source(corpus="text_lines", path="unused"),)),
        optimizer=AdamW(learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=0.0),
        schedule=Schedule(kind="constant"),
        train=Train(global_batch_size=BATCH, clip_norm=CLIP_NORM),
        compute=compute,
        mesh=Mesh(data=1),
    )
    mesh = sharding.make_mesh(config.mesh)
    tokens = random_tokens(model).astype(np.int32)
    rows = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((BATCH, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
        "loss_weights": np.ones((BATCH, LENGTH), np.float32),
    }
    with jax.set_mesh(mesh):
        built = steps.build(config, mesh, 1000)
        batch = jax.device_put(rows, {name: shape.sharding for name, shape in built.batch_shapes.items()})
        held: dict[str, Any] = {"state": built.initial_state(jax.random.key(0))}

        def step() -> float:
            held["state"], metrics = built.train(held.pop("state"), batch)
            jax.block_until_ready(held["state"])
            return float(metrics["loss"])

        return measure(step, num_steps)


def run_torch(model: Model, is_checkpointed: bool, num_steps: int) -> Result:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from convert.hf_folder import config_of

    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig.from_dict(config_of(model, "float32"), attn_implementation="sdpa", use_cache=False)
    )
    network.train()
    if is_checkpointed:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True
    )
    # transformers shifts the labels itself and leaves the last position out: the same 4 x 512 positions are computed.
    tokens = torch.from_numpy(random_tokens(model)[:, :-1])

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = network(input_ids=tokens, labels=tokens).loss
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()
        return float(value)

    return measure(step, num_steps)


def run_worker(side: str, case: str, num_steps: int, overrides: dict[str, Any]) -> None:
    model = CASES[case]
    if side in PANDA_SIDES:
        result = run_panda(model, replace(PANDA_SIDES[side], **overrides), num_steps)
    else:
        result = run_torch(model, TORCH_SIDES[side], num_steps)
    print(json.dumps(asdict(result)))


def run_side(side: str, case: str, arguments: argparse.Namespace) -> Result:
    """Run one side once in a fresh process."""
    command = [sys.executable, __file__, "--worker", side, "--cases", case, "--steps", str(arguments.steps)]
    command += [f"--compute={item}" for item in arguments.compute]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} on {case} failed:\n{done.stderr[-2000:]}")
    return Result(**json.loads(done.stdout.strip().splitlines()[-1]))


def summarise(case: str, runs: dict[str, list[Result]]) -> list[dict[str, Any]]:
    """Return one row per side: medians, and ratios to torch where torch took part."""
    rows = []
    for side, results in runs.items():
        step_s = statistics.median(second for result in results for second in result.step_s)
        row = {"case": case, "side": side, "step_s": step_s, "tokens_per_s": BATCH * LENGTH / step_s}
        row["cpu_s"] = statistics.median(second for result in results for second in result.cpu_s)
        row["peak_bytes"] = max(result.peak_bytes for result in results)
        row["first_loss"], row["compile_s"] = results[0].first_loss, results[0].compile_s
        rows.append(row)
    if base := next((row for row in rows if row["side"] == "torch"), None):
        for row in rows:
            row["speed_ratio"] = row["tokens_per_s"] / base["tokens_per_s"]
            row["memory_ratio"] = row["peak_bytes"] / base["peak_bytes"]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "case", "side", "step, s", "CPU, s", "tokens/s", "peak, MB", "tokens/s ratio", "memory ratio", "first loss"
    )
    for row in rows:
        ratios = [f"{row[name]:.2f}" if name in row else "" for name in ("speed_ratio", "memory_ratio")]
        figures = [f"{row['step_s']:.3f}", f"{row['cpu_s']:.3f}", f"{row['tokens_per_s']:.0f}"]
        figures.append(f"{row['peak_bytes'] / 1e6:.0f}")
        table.add_row(row["case"], row["side"], *figures, *ratios, f"{row['first_loss']:.3f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3, help="how often the sides take turns")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--compute", action="append", default=[], help="name=value of a compute setting to override")
    parser.add_argument("--output", type=Path, help="write the rows and the machine as JSON")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        overrides = dict(item.split("=", 1) for item in arguments.compute)
        return run_worker(arguments.worker, arguments.cases[0], arguments.steps, overrides)
    rows = []
    for case in arguments.cases:
        runs: dict[str, list[Result]] = {side: [] for side in arguments.sides}
        for _ in range(arguments.rounds):
            for side in arguments.sides:
                runs[side].append(run_side(side, case, arguments))
        rows += summarise(case, runs)
        show(rows[-len(runs) :])
    if arguments.output:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What a run reports: the card before its first step, metrics.jsonl, TensorBoard, W&B if asked, the progress line, and
the loss figure.
"""

from __future__ import annotations

import collections
import json
import resource
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
from rich.console import Console

from panda_jax.atomic import write_atomically
from panda_jax.config import Config
from panda_jax.config import Model as ModelConfig
from panda_jax.data.cache import TokenCache, preview
from panda_jax.data.packing import Plan
from panda_jax.model.attention import choose_backend
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.training.step import Step

# Dense bfloat16 peak of one device in FLOP/s, by a part of JAX's device_kind; from the vendors' data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # what a v5p calls itself
    "TPU v4": 275e12,
}


def peak_flops(device: Any) -> float | None:
    """Return the bfloat16 peak of a device in FLOP/s, or None where it is not known (CPU)."""
    return next((flops for kind, flops in PEAK_FLOPS.items() if kind in device.device_kind), None)


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return model FLOPs of one trained position, forward and backward.

    6 per weight of every matrix product (arXiv:2001.08361 §2.1), the output layer included and the embedding look-up
    not, plus 6 * num_layers * dim * seq_len for attention over the causal half. Recomputation does not count.
    """
    matrices = model.num_parameters - model.num_layers * 2 * model.dim - model.dim
    if not model.tie_embeddings:
        matrices -= model.vocab_size * model.dim
    return 6.0 * matrices + 6.0 * model.num_layers * model.dim * seq_len


def peak_memory_bytes() -> int:
    """Return the peak bytes of the fullest local device; on CPU, of this process."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in statistics if entry and "peak_bytes_in_use" in entry]
    return max(peaks) if peaks else host_peak_bytes()


def host_peak_bytes() -> int:
    """Return the peak resident size of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """Return 4000.2 as `1h 06m`, 64.9 as `1m 04s`."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def start_card(
    config: Config, step: Step, plan: Plan, caches: Sequence[TokenCache], tokenizer: Tokenizer, first_step: int
) -> str:
    """Return what will be trained, on what and where, and the first record of the run, its trained part marked."""
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


class Recorder:
    """Writes the numbers of one run; only process 0 has one that writes."""

    def __init__(self, config: Config, folder: Path, resume_step: int, writes: bool) -> None:
        self._config = config
        self._path = folder / "metrics.jsonl"
        self._folder = folder
        self._file: TextIO | None = None
        self._sinks: list[Callable[[dict[str, Any]], None]] = []
        self._closers: list[Callable[[], None]] = []
        self._console = Console(highlight=False)
        if not writes:
            return
        # A run that starts over measures step 0 again.
        _forget_after(self._path, resume_step or -1)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        if config.log.tensorboard:
            self._open_tensorboard(resume_step)
        if config.log.wandb_project:
            self._open_wandb(config.log.wandb_project, resume_step)

    def record(self, metrics: dict[str, Any]) -> None:
        """Append one line of metrics; `step` is among them."""
        if self._file is None:
            return
        self._file.write(json.dumps(metrics) + "\n")
        for sink in self._sinks:
            sink(metrics)

    def show(self, metrics: dict[str, Any], num_steps: int) -> None:
        """Print the progress line: rewritten in place on a terminal, one per log step elsewhere."""
        if self._file is None:
            return
        mfu = "" if metrics["mfu"] is None else f"mfu {metrics['mfu']:.1%}  "
        line = (
            f"step {metrics['step']}/{num_steps}  loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
            f"grad {metrics['gradient_norm']:.2f}  {metrics['tokens_per_s']:,.0f} tok/s  {mfu}"
            f"data wait {metrics['data_wait']:.1%}  left {duration(metrics['seconds_left'])}"
        )
        if self._console.is_terminal:
            self._console.print("\r" + line[: self._console.width - 1].ljust(self._console.width - 1), end="")
        else:
            self._console.print(line, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a message on a line of its own, from process 0 only."""
        if self._file is not None:
            if self._console.is_terminal:
                self._console.print("\r" + " " * (self._console.width - 1) + "\r", end="")
            self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Flush and close everything."""
        if self._file is None:
            return
        if self._console.is_terminal:
            self._console.print()
        self._file.close()
        for close in self._closers:
            close()

    def _open_tensorboard(self, resume_step: int) -> None:
        from tensorboardX import SummaryWriter

        # The points of the steps that will be taken again are taken back.
        purge_step = resume_step + 1 if resume_step else 0
        writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=purge_step)

        def write(metrics: dict[str, Any]) -> None:
            for name, value in metrics.items():
                if name != "step" and isinstance(value, int | float):
                    writer.add_scalar(name, value, metrics["step"])

        self._sinks.append(write)
        self._closers.append(writer.close)

    def _open_wandb(self, project: str, resume_step: int) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            from panda_jax.errors import InputError

            raise InputError("log.wandb_project: wandb is not installed; pip install 'panda-jax[wandb]'") from error
        identity = self._folder / "wandb_id"  # a resumed run goes on with its own curves there
        if not resume_step or not identity.is_file():
            write_atomically(identity, [uuid.uuid4().hex.encode()])
        run = wandb.init(
            project=project,
            name=self._config.name,
            dir=str(self._folder),
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
        )
        self._sinks.append(lambda metrics: run.log(metrics, step=metrics["step"]))
        self._closers.append(run.finish)


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which the resumed run will write again, and a half-written last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    write_atomically(path, ["".join(kept).encode()])


class CompileReport:
    """Tells how long the block took to compile and how much of it came from the persistent cache."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._events = collections.Counter[str]()

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        jax.monitoring.register_event_listener(self._count)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._count)
        if kind is None:
            seconds = time.perf_counter() - self._start
            cached = self._events["/jax/compilation_cache/cache_hits"] > 0
            self._say(
                f"train step ready after {seconds:.1f} s ({'found in the compilation cache' if cached else 'compiled'})"
            )

    def _count(self, event: str, **_: Any) -> None:
        self._events[event] += 1


class Clock:
    """Measures the intervals between log lines."""

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin an interval after `step` finished steps."""
        self.step = step
        self._start = time.perf_counter()
        self._waited = 0.0

    def fetch(self, produce: Callable[[], Any], devices_idle: Callable[[], bool]) -> Any:
        """Return produce(), counting its time as data wait if the devices ran out of work before it returned."""
        start = time.perf_counter()
        result = produce()
        if devices_idle():
            self._waited += time.perf_counter() - start
        return result

    def read(self) -> tuple[float, float]:
        """Return (seconds of the interval, seconds of it that the devices waited for data; an upper bound)."""
        return time.perf_counter() - self._start, self._waited


def speed(
    config: Config, mesh: jax.sharding.Mesh, seconds: float, waited: float, num_steps: int, tokens: int
) -> dict[str, Any]:
    """Return the speed of `num_steps` steps that held `tokens` real tokens and took `seconds`, for metrics.jsonl.

    MFU = flops_per_token * positions per second / (devices * their bfloat16 peak), over all positions of a row, padding
    included, since the devices compute them; null where the peak is not known.
    """
    positions = num_steps * config.train.global_batch_size * config.data.seq_len
    peak = peak_flops(mesh.devices.flat[0])
    work = flops_per_token(config.model, config.data.seq_len) * positions
    return {
        "step_s": seconds / num_steps,
        "tokens_per_s": tokens / seconds,
        "padded_tokens_per_s": positions / seconds,
        "mfu": None if peak is None else work / seconds / (mesh.devices.size * peak),
        "data_wait": waited / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def plot_loss(folder: Path) -> Path:
    """Draw training and held-out loss over steps from metrics.jsonl into plots/loss.png and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if training:
        axes.plot(*zip(*training, strict=True), linewidth=1, color="tab:blue", alpha=0.45, label="training, per step")
        axes.plot(*zip(*_smoothed(training), strict=True), color="tab:blue", label="training, moving average")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.set_title(folder.name)
    axes.grid(alpha=0.3)
    if training or held_out:
        axes.legend()
    path = folder / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Average every point with its neighbours in a window of a twentieth of the run."""
    half = max(len(points) // 40, 1)
    windows = [points[max(i - half, 0) : i + half + 1] for i in range(len(points))]
    return [(point[0], sum(p[1] for p in window) / len(window)) for point, window in zip(points, windows, strict=True)]

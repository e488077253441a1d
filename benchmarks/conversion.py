"""Conversions against a plain file copy, on the same disk in the same run, and their peak memory.

    python benchmarks/conversion.py [--folder DIR] [--layers 4] [--rounds 3]   speed; needs about 12 GB of disk
    python benchmarks/conversion.py --memory [--folder DIR]                  13B-shaped; needs about 110 GB of disk
    python benchmarks/conversion.py --memory --keep-none                     the same within about 55 GB

Speed: a float16 model with the layers of LLaMA-7B, of random numbers. The copy reads and writes the bytes of the output
in blocks of 16 MiB and calls fsync; the sides take turns. `command` is the whole process, its start and the proof
included; `transfer` is reading, converting, hashing, writing and fsync. Ratios are to the copy's bytes per second.

Memory: the largest resident set of each command and its children together, sampled every 20 ms, on a sparse float16
model in the shape of LLaMA-13B; the target of the delta differs in the embedding and in one layer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from convert.hf_folder import config_of  # noqa: E402  (the benchmark runs from the checkout)
from convert.mapping import rows  # noqa: E402
from panda_jax.config import Model  # noqa: E402
from panda_jax.presets import PRESETS  # noqa: E402
from panda_jax.weights import read_safetensors, safetensors_header, stored_shapes  # noqa: E402

BLOCK_BYTES = 16 << 20
START_S = 3
SAMPLE_S = 0.02


def write_model(folder: Path, model: Model, dtype: np.dtype, fill: dict[str, np.random.Generator]) -> None:
    """Write a Hugging Face folder: tensors named in `fill` are random, the others holes that read as zeros."""
    folder.mkdir(parents=True)
    names = {name: row.hf for name, row in rows(model).items()}
    shapes = stored_shapes(model)
    (folder / "config.json").write_text(json.dumps(config_of(model, dtype.name)))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(
            safetensors_header({names[name]: (shape, dtype) for name, shape in shapes.items()}, {"format": "pt"})
        )
        for name, shape in shapes.items():
            size = int(np.prod(shape)) * dtype.itemsize
            if name not in fill:
                file.seek(size, os.SEEK_CUR)
                continue
            for _ in range(shape[0]):
                row = 0.02 * fill[name].standard_normal(size // dtype.itemsize // shape[0], np.float32)
                file.write(row.astype(dtype).tobytes())
        file.truncate(file.tell())


def copy_files(source: Path, target: Path) -> tuple[float, int]:
    """Copy a folder's files with fsync; return (seconds, bytes)."""
    started, num_bytes = time.perf_counter(), 0
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb") as old, (target / path.name).open("wb") as new:
            shutil.copyfileobj(old, new, BLOCK_BYTES)
            new.flush()
            os.fsync(new.fileno())
            num_bytes += new.tell()
    return time.perf_counter() - started, num_bytes


def run(*arguments: str | Path) -> float:
    """Run a converter; return seconds."""
    started = time.perf_counter()
    with start(*arguments) as process:
        printed, _ = process.communicate()
    seconds = time.perf_counter() - started
    check(process, printed)
    return seconds


def run_watched(*arguments: str | Path) -> tuple[float, int]:
    """Run a converter; return (seconds, bytes of the largest sum of its and its children's resident sets)."""
    started, peak = time.perf_counter(), 0
    with start(*arguments) as process:
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(SAMPLE_S)
        printed, _ = process.communicate()
    check(process, printed)
    return time.perf_counter() - started, peak


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check(process: subprocess.Popen[str], printed: str) -> None:
    if process.returncode:
        raise SystemExit(f"{process.args} failed:\n{printed}")


def resident_bytes(process: int) -> int:
    """Return what a process and its children hold now; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0
    own = re.search(r"VmRSS:\s+(\d+) kB", status)
    return (1024 * int(own[1]) if own else 0) + sum(resident_bytes(int(child)) for child in children)


def measure_speed(folder: Path, num_layers: int, rounds: int) -> None:
    model = replace(Model(**PRESETS["llama-7b"]), num_layers=num_layers, size=None)
    half, brain = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
    base, target = folder / "base", folder / "target"
    names = stored_shapes(model)
    write_model(base, model, half, {name: np.random.default_rng([0, i]) for i, name in enumerate(names)})
    nudge(base, target, model, half, brain)
    run("convert.hf", "import", "--input", base, "--output", folder / "ours", "--no-verify")
    run("convert.meta", "export", "--input", folder / "ours", "--output", folder / "meta", "--no-verify")
    run("convert.delta", "make", "--base", base, "--target", target, "--output", folder / "delta", "--no-verify")
    delta_bytes = sum(path.stat().st_size for path in (folder / "delta").glob("*.bin"))
    print(f"model of {model.num_parameters:,} parameters; delta: {delta_bytes / model.num_parameters:.3f} bytes each")
    commands = {
        "hf import": ("convert.hf", "import", "--input", base),
        "hf export": ("convert.hf", "export", "--input", folder / "ours"),
        "meta import": ("convert.meta", "import", "--input", folder / "meta"),
        "meta export": ("convert.meta", "export", "--input", folder / "ours", "--shards", "2"),
        "delta apply": ("convert.delta", "apply", "--base", base, "--delta", folder / "delta"),
    }
    copies: list[float] = []
    ratios: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            # A converter's process starts for about as long. In a virtual machine memory that was freed a moment ago is
            # several times as fast to write to as memory that has gone back to the host: neither side may profit.
            time.sleep(START_S)
            seconds, num_bytes = copy_files(base, folder / "copied")
            shutil.rmtree(folder / "copied")
            copies.append(num_bytes / seconds)
            output = folder / "written"
            whole_s = run(*command, "--output", output)
            report = json.loads((output / "conversion.json").read_text())
            bare_s = report["seconds"]
            shutil.rmtree(output)
            speed = num_bytes / seconds
            ratios[name].append((report["bytes"] / bare_s / speed, report["bytes"] / whole_s / speed, bare_s))
    print(f"copy with fsync: {statistics.median(copies) / 1e6:.0f} MB/s (median of {len(copies)})")
    print(f"{'':14} {'transfer / copy':>16} {'command / copy':>16} {'transfer, s':>12}")
    for name, found in ratios.items():
        medians = [statistics.median(column) for column in zip(*found, strict=True)]
        print(f"{name:14} {medians[0]:16.2f} {medians[1]:16.2f} {medians[2]:12.2f}")


def nudge(base: Path, target: Path, model: Model, old: np.dtype, new: np.dtype) -> None:
    """Write `target`: the base with normal changes of deviation 1e-4 everywhere."""
    tensors = read_safetensors(base / "model.safetensors")
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config_of(model, new.name)))
    generator = np.random.default_rng(1)
    with (target / "model.safetensors").open("wb") as file:
        file.write(
            safetensors_header({name: (tensor.shape, new) for name, tensor in tensors.items()}, {"format": "pt"})
        )
        for tensor in tensors.values():
            array = tensor.read().astype(np.float32)
            array += 1e-4 * generator.standard_normal(array.shape, np.float32)
            file.write(array.astype(new).tobytes())


def measure_memory(folder: Path, keep_none: bool) -> None:
    model = replace(Model(**PRESETS["llama-13b"]), size=None)
    base, target = folder / "base", folder / "target"
    write_model(base, model, np.dtype(np.float16), {})
    changed = {name: np.random.default_rng(0) for name in ("embed", "layers.0.w_up")}
    write_model(target, model, np.dtype(ml_dtypes.bfloat16), changed)

    def show(name: str, output: Path, *command: str | Path) -> Path:
        seconds, peak = run_watched(*command, "--output", output)
        print(f"{name:14} {peak / 2**30:6.2f} GiB {seconds:8.0f} s", flush=True)
        return output

    def drop(path: Path) -> None:
        if keep_none:
            shutil.rmtree(path)

    ours = show("hf import", folder / "ours", "convert.hf", "import", "--input", base)
    meta = show("meta export", folder / "meta", "convert.meta", "export", "--shards", "2", "--input", ours)
    drop(ours)
    again = show("meta import", folder / "again", "convert.meta", "import", "--input", meta)
    drop(meta)
    drop(show("hf export", folder / "hf", "convert.hf", "export", "--input", again))
    drop(again)
    delta = show("delta make", folder / "delta", "convert.delta", "make", "--base", base, "--target", target)
    drop(show("delta apply", folder / "applied", "convert.delta", "apply", "--base", base, "--delta", delta))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--keep-none", action="store_true", help="delete what the next command does not read")
    arguments = parser.parse_args()
    cores = os.cpu_count()
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.memory:
            measure_memory(Path(folder), arguments.keep_none)
        else:
            measure_speed(Path(folder), arguments.layers, arguments.rounds)


if __name__ == "__main__":
    main()

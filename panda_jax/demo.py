"""The whole recipe in miniature: `python -m panda_jax.demo [--dir demo] [--seed N]`, minutes on a laptop.

Writes a small world as files in the corpora's native formats, then calls the doors that everyone uses: prepare and
train, for pre-training and for instruction tuning. The second training is sent a real SIGTERM half-way and started
again. Started again itself, the demo goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from panda_jax import settings
from panda_jax.command_line import Parser, run_door, start_module
from panda_jax.data.world import World, make_world
from panda_jax.data.world_files import write_world
from panda_jax.errors import InputError

STAGES = {"stage1": "pre-training on five corpora", "stage2": "instruction tuning on COIG"}
INTERRUPT_AFTER_STEP = 60
POLL_S = 0.2
NEXT = """

next:
  cd {folder}
  python -m panda_jax.prepare --config stage2.yaml --preview 3
  python -m panda_jax.train --config stage2.yaml name=longer train.epochs=24
  then your own corpora: copy stage1.yaml and change data.sources (configs/panda has the full-size runs)"""


def main(arguments: list[str]) -> int:
    """Run the demo in its folder; return 0, or the exit status of the door that failed."""
    parser = Parser(prog="python -m panda_jax.demo", description="Pre-train and instruct a 1 M parameter model.")
    parser.add_argument("--dir", default="demo", metavar="DIR", help="folder that everything goes to (default demo)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="draws another world (default 1)")
    options = parser.parse_args(arguments)
    folder = Path(options.dir)
    # A demo that is told to stop passes it on: the training then saves before it leaves.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    _say(f"a small world (seed {options.seed}) as files in {folder / 'corpora'}")
    _write_inputs(make_world(options.seed), folder)
    for stage, purpose in STAGES.items():
        _say(f"{stage}, {purpose}: prepare the data")
        if status := _run_door("prepare", stage, folder):
            return status
        _say(f"{stage}, {purpose}: train")
        if stage == "stage2" and _last_step(folder, stage) < INTERRUPT_AFTER_STEP:
            if status := _run_door("train", stage, folder, INTERRUPT_AFTER_STEP):
                return status
            _say(f"{stage}: stopped on purpose by SIGTERM; the same command goes on from the checkpoint it left")
        if status := _run_door("train", stage, folder):
            return status
    _say("done")
    print(_summary(folder))
    return 0


def _say(text: str) -> None:
    print(f"\n── {text}", flush=True)


def _write_inputs(world: World, folder: Path) -> None:
    """Write the corpora and the two configs unless they are there; raises InputError for another seed's folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--dir {folder}: found a file, expected a folder or a new name; choose another")
    marker = folder / "world.json"
    if not marker.exists():
        for path in write_world(world, folder / "corpora").values():
            print(f"{path.name}: {path.stat().st_size / 1e3:,.0f} kB")
        truth = {"seed": world.seed, "people": {person.name: person.facts for person in world.people}}
        marker.write_text(json.dumps(truth, ensure_ascii=False, indent=1), encoding="utf-8")
    found = json.loads(marker.read_text(encoding="utf-8"))["seed"]
    if found != world.seed:
        raise InputError(f"{marker}: this world has seed {found}, expected --seed {world.seed}; choose another --dir")
    for stage in STAGES:
        if not (folder / f"{stage}.yaml").exists():
            shutil.copyfile(_configs() / f"{stage}.yaml", folder / f"{stage}.yaml")


def _configs() -> Path:
    """Return where the demo's configs are: in an installed package, or in the checkout that the package stands in."""
    package = Path(__file__).parent
    for folder in (package / "configs" / "demo", package.parent / "configs" / "demo"):
        if folder.is_dir():
            return folder
    raise InputError(f"{package}: configs/demo is missing from this installation; install panda_jax again")


def _run_door(door: str, stage: str, folder: Path, stop_after_step: int | None = None) -> int:
    """Run a door on a stage's config inside the demo's folder; send it SIGTERM once it has logged the given step."""
    print(f"$ cd {folder} && python -m panda_jax.{door} --config {stage}.yaml", flush=True)
    process = start_module(f"panda_jax.{door}", "--config", f"{stage}.yaml", cwd=folder)
    try:
        while stop_after_step is not None and process.poll() is None:
            if _last_step(folder, stage) >= stop_after_step:
                process.send_signal(signal.SIGTERM)
                break
            try:
                process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                continue
        status = process.wait()
        return status if status >= 0 else 128 - status
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _run_folder(folder: Path, stage: str) -> Path:
    config = settings.load(str(folder / f"{stage}.yaml"))
    return folder / config.log.runs_dir / config.name


def _metrics(folder: Path, stage: str) -> list[dict]:
    """Return the complete lines of a run's metrics.jsonl, none where the run has not begun."""
    path = _run_folder(folder, stage) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _last_step(folder: Path, stage: str) -> int:
    return max((line["step"] for line in _metrics(folder, stage)), default=0)


def _summary(folder: Path) -> str:
    """Return the held-out losses, the figures' paths, and what to try next."""
    rows = ["stage   held-out loss before -> after   figure"]
    for stage in STAGES:
        losses = [line["held_out_loss"] for line in _metrics(folder, stage) if "held_out_loss" in line]
        change = f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "nothing held out"
        rows.append(f"{stage}  {change:>29}   {_run_folder(folder, stage) / 'plots' / 'loss.png'}")
    return "\n".join(rows) + NEXT.format(folder=folder)


if __name__ == "__main__":
    run_door(main)

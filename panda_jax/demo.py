"""The whole recipe in miniature: `python -m panda_jax.demo [--dir demo] [--seed N]`, minutes on a laptop.

Writes a small world as files in the corpora's native formats, and tests about it in those of LogiQA-v2 and C3. Then
calls the doors that everyone uses: prepare and train, for pre-training and for instruction tuning, and evaluate. The
second training is sent a real SIGTERM half-way and started again. The demo itself goes on where it was stopped.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from panda_jax import settings
from panda_jax.command_line import Parser, run_door, start_module
from panda_jax.data.demo_inputs import write_inputs
from panda_jax.data.strangers import write_reports
from panda_jax.data.world import make_world
from panda_jax.evaluation.demo_table import PROTOCOLS, TASKS, staircase
from panda_jax.evaluation.reading_exercises import write_reading

STAGES = {"stage1": "pre-training on five corpora", "stage2": "instruction tuning on COIG"}
ABLATION = {"all_mixed": "the data of both stages in one run of as many steps"}
LONG = {f"long_{stage}": f"{purpose}, a larger model" for stage, purpose in STAGES.items()}
# What only the long variant reads: file of corpora/ -> how it is written.
STRANGERS = {"news2016zh_strangers.json.gz": write_reports, "reading_dialogues.tar.gz": write_reading}
INTERRUPT_AFTER_STEP = 60
POLL_S = 0.2
NEXT = """
next:
  cd {folder}
  python -m panda_jax.prepare --config {last}.yaml --preview 3
  python -m panda_jax.generate --checkpoint {model} --chat
  then your own corpora: copy {first}.yaml and change data.sources (configs/panda has the full-size runs)"""


def main(arguments: list[str]) -> int:
    """Run the demo in its folder; return 0, or the exit status of the door that failed."""
    parser = Parser(prog="python -m panda_jax.demo", description="Pre-train, instruct and test a 1 M parameter model.")
    parser.add_argument("--dir", default="demo", metavar="DIR", help="folder that everything goes to (default demo)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="draws another world (default 1)")
    more = parser.add_mutually_exclusive_group()
    more.add_argument("--ablation", action="store_true", help="also train on both stages' data in one run")
    more.add_argument("--long", action="store_true", help="two layers more, and practice in reading; 40 minutes")
    options = parser.parse_args(arguments)
    folder, world = Path(options.dir), make_world(options.seed)
    runs = LONG if options.long else STAGES | (ABLATION if options.ablation else {})
    # A demo that is told to stop passes it on: the training then saves before it leaves.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    _say(f"a small world (seed {options.seed}) and tests about it, as files in {folder}")
    write_inputs(world, folder, runs)
    for name, write in STRANGERS.items() if options.long else ():
        if not (folder / "corpora" / name).exists():
            write(world, folder / "corpora" / name)
    for run, purpose in runs.items():
        if status := _train(run, purpose, folder):
            return status
    _say("evaluate every checkpoint: 128 facts that stage 1 tells and nothing asks")
    models = [place for run in runs for place in _checkpoints(folder, run)]
    lists = ("--tasks", ",".join(TASKS), "--protocol", ",".join(PROTOCOLS), "--data", "exams")
    with (folder / "evaluate.log").open("w", encoding="utf-8") as log:  # ours puts the protocols side by side
        if status := _run_door(folder, "evaluate", "--checkpoint", *map(str, models), *lists, stdout=log):
            return status
    _say("done")
    print(_summary(folder, runs, models))
    return 0


def _say(text: str) -> None:
    print(f"\n── {text}", flush=True)


def _train(run: str, purpose: str, folder: Path) -> int:
    """Prepare a run's data and train it; return 0, or the exit status of the door that failed."""
    config = ("--config", f"{run}.yaml")
    _say(f"{run}, {purpose}: prepare the data")
    if status := _run_door(folder, "prepare", *config):
        return status
    _say(f"{run}, {purpose}: train")
    if run.endswith("stage2") and _last_step(folder, run) < INTERRUPT_AFTER_STEP:
        if status := _run_door(folder, "train", *config, stop_run=run):
            return status
        _say(f"{run}: stopped on purpose by SIGTERM; the same command goes on from the checkpoint it left")
    return _run_door(folder, "train", *config)


def _run_door(folder: Path, door: str, *arguments: str, stop_run: str = "", stdout: IO[str] | None = None) -> int:
    """Run a door inside the demo's folder; send it SIGTERM once `stop_run` has logged INTERRUPT_AFTER_STEP steps."""
    print(f"$ cd {folder} && python -m panda_jax.{door} {' '.join(arguments)}", flush=True)
    process = start_module(f"panda_jax.{door}", *arguments, cwd=folder, stdout=stdout)
    try:
        while stop_run and process.poll() is None:
            if _last_step(folder, stop_run) >= INTERRUPT_AFTER_STEP:
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


def _checkpoints(folder: Path, run: str) -> list[Path]:
    """Return the checkpoints that the run's config keeps, or its last one, relative to the demo's folder."""
    config, last = settings.load(str(folder / f"{run}.yaml")), _last_step(folder, run)
    steps = [step for step in config.checkpoint.steps if step <= last] or [last]
    return [Path(config.log.runs_dir, config.name, "checkpoints", str(step)) for step in steps]


def _run_folder(folder: Path, run: str) -> Path:
    config = settings.load(str(folder / f"{run}.yaml"))
    return folder / config.log.runs_dir / config.name


def _metrics(folder: Path, run: str) -> list[dict]:
    """Return the complete lines of a run's metrics.jsonl, none where the run has not begun."""
    path = _run_folder(folder, run) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _last_step(folder: Path, run: str) -> int:
    return max((line["step"] for line in _metrics(folder, run)), default=0)


def _summary(folder: Path, runs: dict[str, str], models: list[Path]) -> str:
    """Return the held-out losses, the figures' paths, the table of scores, and what to try next."""
    rows = [f"{'run':<11}  held-out loss before -> after   figure"]
    for run in runs:
        losses = [line["held_out_loss"] for line in _metrics(folder, run) if "held_out_loss" in line]
        change = f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "nothing held out"
        rows.append(f"{run:<11}  {change:>29}   {_run_folder(folder, run) / 'plots' / 'loss.png'}")
    # The evaluate door names a model after its run and step.
    labels = [f"{model.parts[-3]} step {model.name}" for model in models]
    scored = [(label, folder / "evaluations" / label.replace(" ", "-")) for label in labels]
    hints = NEXT.format(folder=folder, first=[*runs][0], last=[*runs][1], model=models[-1])
    return "\n".join([*rows, "", staircase(scored, folder / "exams"), hints])


if __name__ == "__main__":
    run_door(main)

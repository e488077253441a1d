"""Score models on multiple-choice tasks: `python -m panda_jax.evaluate --checkpoint DIR --tasks c3-d,c3-m --data DIR`.

Several checkpoints, or several steps of a run, make a table like Panda's Table 4. Answers are kept question by question
under --output, so that the same command goes on after an interruption and repeats nothing that is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from panda_jax import sharding
from panda_jax.command_line import Parser, run_door
from panda_jax.config import Compute, Mesh
from panda_jax.errors import InputError
from panda_jax.evaluation.exam import Exam, set_exam
from panda_jax.evaluation.prompts import PROTOCOLS
from panda_jax.evaluation.report import publish
from panda_jax.evaluation.tasks import TASKS
from panda_jax.training.examination import examine, find_models


def main(arguments: list[str]) -> int:
    """Evaluate what `arguments` name and print the tables; return the exit status."""
    options = parser().parse_args(arguments)
    exams = [
        set_exam(options.data, task, protocol, options.split, options.shots, options.limit)
        for task in listed("--tasks", options.tasks)
        for protocol in listed("--protocol", options.protocol)
    ]
    mesh = Mesh(fsdp=options.fsdp, tensor=options.tensor, zero=3)
    sharding.start_processes(mesh)
    say_warnings(exams, options.strict)
    compute = Compute(dtype=options.dtype)
    sharding.configure_jax(compute)
    models = find_models(options.checkpoint, options.steps, options.cache_dir, sharding.say)
    rows = examine(models, exams, compute, mesh, options.output, sharding.say)
    sharding.by_first("tables written", lambda: publish(rows, options.output, sharding.say))
    return 0


def parser() -> Parser:
    """Return the door's arguments."""
    result = Parser(prog="python -m panda_jax.evaluate", description=__doc__, allow_abbrev=False)
    result.add_argument(
        "--checkpoint", required=True, nargs="+", type=Path, metavar="DIR",
        help="runs, checkpoints, weights folders or Hugging Face folders; each is a row of the table",
    )  # fmt: skip
    result.add_argument("--tasks", required=True, metavar="T,T", help=f"any of {', '.join(TASKS)}")
    result.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder with the tasks' official files")
    known = f"any of {', '.join(PROTOCOLS)} (default: likelihood)"
    result.add_argument("--protocol", default="likelihood", metavar="P,P", help=known)
    result.add_argument("--steps", metavar="N,N", help="steps of a run, or `all` it has kept (default: its newest)")
    result.add_argument("--split", help="default: the task's own, test or C-Eval's val")
    result.add_argument(
        "--shots", type=natural, metavar="K", help="worked examples (default: the protocol's own number)"
    )
    result.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of each task")
    result.add_argument("--output", type=Path, default=Path("evaluations"), metavar="DIR", help="default: evaluations")
    result.add_argument("--strict", action="store_true", help="refuse files that are not the published ones")
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    result.add_argument("--fsdp", type=int, default=1, metavar="N", help="devices that share the parameters")
    result.add_argument("--tensor", type=int, default=1, metavar="N", help="devices that split each matrix")
    result.add_argument(
        "--cache-dir", type=Path, default=Path("cache"), metavar="DIR", help="converted weights (default: cache)"
    )
    return result


def natural(text: str) -> int:
    """Return a whole number that is not negative; argparse turns ValueError into its message."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def positive(text: str) -> int:
    """Return a whole number from 1; argparse turns ValueError into its message."""
    if natural(text) == 0:
        raise ValueError
    return int(text)


def listed(option: str, text: str) -> list[str]:
    """Return the names in `a,b`; raises InputError where one is empty or named twice."""
    names = text.split(",")
    for name in names:
        if not name or names.count(name) > 1:
            raise InputError(f"{option} {text}: expected names with commas between them, each once")
    return names


def say_warnings(exams: Sequence[Exam], is_strict: bool) -> None:
    """Print how the files differ from the published ones; raises InputError instead where that is to be refused."""
    for warning in dict.fromkeys(warning for exam in exams for warning in exam.warnings):
        if is_strict:
            raise InputError(f"{warning}; --strict takes the published files alone")
        sharding.say(f"warning: {warning}")


if __name__ == "__main__":
    run_door(main)

"""Exams for models on disk: which ones, each loaded only if it has questions left, and their answers kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from panda_jax import sharding
from panda_jax.config import Compute
from panda_jax.config import Mesh as MeshConfig
from panda_jax.errors import InputError
from panda_jax.evaluation.candidate import Candidate, check_context
from panda_jax.evaluation.exam import Exam
from panda_jax.evaluation.report import Row, Sitting, folder_name
from panda_jax.evaluation.results import Answers
from panda_jax.training import checkpoint as checkpoints
from panda_jax.training.load import Opened, find, open_model, read, shapes_on, verified

LINE_EVERY_S = 30


@dataclass(frozen=True)
class Examinee:
    """A row of the table before it is scored."""

    label: str
    """What the table calls it."""
    step: int | None
    source: Path
    """The checkpoint or weights folder."""


def find_models(
    given: Sequence[Path], steps: str | None, cache_dir: Path, say: Callable[[str], None]
) -> list[Examinee]:
    """Return what is to be scored: each path, or each of its `steps` ("3000,6000" or "all") where it is a run.

    Raises InputError where a path holds no model, a step is not there, or two rows would have the same name.
    """
    runs = [path for path in given if steps is not None and (path / "checkpoints").is_dir()]
    if steps is not None and not runs:
        raise InputError(f"--steps {steps}: {given[0]} has no checkpoints; give the folder of a run")
    found: list[Examinee] = []
    for path in given:
        found += _steps_of(path, steps) if steps is not None and path in runs else [_whole(path, cache_dir, say)]
    folders = [folder_name(examinee.label) for examinee in found]
    for folder in folders:
        if folders.count(folder) > 1:
            places = " and ".join(str(examinee.source) for examinee in found if folder_name(examinee.label) == folder)
            raise InputError(f"--checkpoint: {places} would both be called {folder!r}; rename one folder")
    return found


def _whole(path: Path, cache_dir: Path, say: Callable[[str], None]) -> Examinee:
    source = find(path, cache_dir, say)
    whole = source.absolute().resolve()
    if whole.name.isdigit() and whole.parent.name == "checkpoints":
        return Examinee(f"{whole.parent.parent.name} step {whole.name}", int(whole.name), source)
    # A link has the name that its maker chose.
    return Examinee(path.absolute().name, None, source)


def _steps_of(run: Path, steps: str) -> list[Examinee]:
    there = checkpoints.committed_steps(run / "checkpoints")
    found = []
    for step in there if steps == "all" else [_step(text, steps) for text in steps.split(",")]:
        if step not in there:
            raise InputError(f"--steps {step}: {run} has the steps {', '.join(map(str, there)) or 'none'}")
        source = verified(str(run / "checkpoints" / str(step)))
        found.append(Examinee(f"{run.resolve().name} step {step}", step, source))
    if not found:
        raise InputError(f"--steps {steps}: {run} has no complete checkpoint yet")
    return found


def _step(text: str, steps: str) -> int:
    if not text.isdigit():
        raise InputError(f"--steps {steps}: expected numbers with commas between them, or all")
    return int(text)


def examine(
    examinees: Sequence[Examinee],
    exams: Sequence[Exam],
    compute: Compute,
    mesh_config: MeshConfig,
    folder: Path,
    say: Callable[[str], None],
) -> list[Row]:
    """Put every exam to every model and return the rows of the table; answers are kept under folder/answers.

    Every row is opened before the first is scored. Raises InputError where one has no tokenizer, does not fit the mesh,
    or has a context too short for a protocol, and where a checkpoint is deleted while others are scored.
    """
    mesh = sharding.make_mesh(mesh_config)
    opened_models = []
    for examinee in examinees:
        opened = open_model(examinee.source)
        shapes = shapes_on(mesh, opened.weights.model, compute, shard_over_fsdp=mesh_config.zero == 3)
        for exam in exams:
            check_context(exam.protocol, opened.weights.model)
        opened_models.append((opened, shapes))
    rows = []
    for examinee, (opened, shapes) in zip(examinees, opened_models, strict=True):
        # Protocols that ask alike share one file, and so one entry here.
        opened_by_path: dict[Path, Answers] = {}
        answers = []
        for exam in exams:
            own = Answers(folder / "answers", exam.identity(opened.fingerprint, compute.dtype))
            answers.append(opened_by_path.setdefault(own.path, own))
        rest = sum(len(own.missing()) for own in opened_by_path.values())
        if sharding.first_decides(rest > 0):
            say(f"{examinee.label}: {rest:,} questions to ask")
            _ask(opened, shapes, list(zip(exams, answers, strict=True)), compute, mesh)
        sittings = {
            (exam.task.name, exam.protocol.name): Sitting(exam, [exam.judge(record) for record in own.in_order()])
            for exam, own in zip(exams, answers, strict=True)
        }
        rows.append(Row(examinee.label, examinee.step, sittings))
    return rows


def _ask(
    opened: Opened,
    shapes: dict[str, jax.ShapeDtypeStruct],
    asked: Sequence[tuple[Exam, Answers]],
    compute: Compute,
    mesh: jax.sharding.Mesh,
) -> None:
    """Load one model as `shapes` says, which leaves the devices with this call, and have it answer."""
    try:
        parameters = read(opened.source, opened.weights, shapes)
    except Exception as error:
        if opened.source.is_dir():
            raise
        raise InputError(
            f"{opened.source}: deleted meanwhile, as a training does with old checkpoints; evaluate what is left, and "
            f"name the steps to keep in its checkpoint.steps"
        ) from error
    candidate = Candidate(opened.weights.model, parameters, compute, mesh, opened.tokenizer)
    for exam, own in asked:
        with progress_bar(f"{exam.task.name} {exam.protocol.name}", len(exam.questions)) as progress:
            candidate.sit(exam, own, progress)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show questions done and time left: a bar on a terminal, elsewhere a line now and then.

    Yields what takes the number of questions that are done.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=jax.process_index() > 0) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)


class _Lines:
    """Prints how far a task is, every LINE_EVERY_S seconds."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._told = title, total, time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self._told > LINE_EVERY_S:
            self._told = time.monotonic()
            sharding.say(f"{self._title}: {done:,} of {self._total:,}")

"""The demo's own Table 4: every protocol beside the others, models as rows, what guessing scores below them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from panda_jax.errors import InputError
from panda_jax.evaluation.prompts import find_protocol
from panda_jax.evaluation.statistics import baselines
from panda_jax.evaluation.tasks import find_task

HEADLINE = "likelihood-bare"
PROTOCOLS = (HEADLINE, "likelihood", "likelihood-letter", "panda")
TASKS = ("logiqa2", "c3-d", "c3-m")
LEGEND = f"""\
right answers in % to questions that stage 1's text answers and no training file asks
* the headline, {HEADLINE}: closed book, the option whose text is likelier after the bare question
  likelihood: the same after passage and question; likelihood-letter: the likelier letter after the options as well;
  panda: the first letter written, where an answer without a letter counts as wrong"""


def staircase(models: Sequence[tuple[str, Path]], exams: Path) -> str:
    """Return the table of `models`, as (label, folder that the evaluate door has written for it).

        models      (label, <output>/<model> of `python -m panda_jax.evaluate`)
        exams       the folder with the tests' files, for the baselines

    Raises InputError where a score is missing.
    """
    scores = [(label, [_score(folder, *column) for column in _columns()]) for label, folder in models]
    known = [baselines(find_task(task).read(exams, "test")) for task in TASKS]
    guesses = [
        ("random letter", [each.uniform for each in known]),
        ("the best one letter", [each.letters[each.majority] for each in known]),
        ("longest option", [each.longest for each in known]),
    ]
    titles = [find_task(task).title for task in TASKS]
    label_width = max(len(label) for label, _ in [*scores, *guesses])
    widths = [max(len(title), len("100.0")) for title in titles] * len(PROTOCOLS)

    def line(label: str, cells: Sequence[str]) -> str:
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        groups = [aligned[i : i + len(TASKS)] for i in range(0, len(aligned), len(TASKS))]
        return " | ".join([label.ljust(label_width), *(" ".join(group) for group in groups)])

    def row(label: str, shares: Sequence[float]) -> str:
        return line(label, [f"{100 * share:.1f}" for share in shares])

    group_width = sum(widths[: len(TASKS)]) + len(TASKS) - 1
    names = [f"{name} *" if name == HEADLINE else name for name in PROTOCOLS]
    head = " | ".join([" " * label_width, *(name.ljust(group_width) for name in names)])
    below = line("", titles * len(PROTOCOLS))
    rule = "-" * len(below)
    body = [row(label, shares) for label, shares in scores]
    chance = [row(label, shares * len(PROTOCOLS)) for label, shares in guesses]
    return "\n".join([head.rstrip(), below, rule, *body, rule, *chance, "", LEGEND])


def _columns() -> list[tuple[str, str]]:
    return [(protocol, task) for protocol in PROTOCOLS for task in TASKS]


def _score(folder: Path, protocol: str, task: str) -> float:
    path = folder / f"{task}-{find_protocol(protocol).name}.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the score that the evaluate door writes; run the demo again")
    return json.loads(path.read_text(encoding="utf-8"))["acc"]

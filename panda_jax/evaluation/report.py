"""The tables and the figure: models beside baselines, as in Panda's Table 4, each score with its 95 % interval."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panda_jax.atomic import write_atomically
from panda_jax.evaluation.exam import Exam, Record, hits
from panda_jax.evaluation.questions import LETTERS
from panda_jax.evaluation.statistics import Accuracy, Baselines, accuracy, averages, baselines, compare
from panda_jax.evaluation.tasks import write_submission


@dataclass(frozen=True)
class Sitting:
    """One model's judged answers to one exam."""

    exam: Exam
    records: Sequence[Record]
    """As Exam.judge returns them, in the order of the questions."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of this exam, none where every answer is hidden; acc_norm where options differ in length."""
        if not hits(self.records, "acc"):
            return ()
        has_lengths = any(len(set(record.get("lengths", ()))) > 1 for record in self.records)
        return ("acc", "acc_norm") if has_lengths else ("acc",)

    def accuracy(self, metric: str) -> Accuracy:
        return accuracy(hits(self.records, metric))

    def summary(self) -> dict[str, Any]:
        """Return everything but the questions: scores, averages over subjects, what was cut or could not be read."""
        found: dict[str, Any] = {"num_questions": len(self.records)}
        for metric in self.metrics:
            score = self.accuracy(metric)
            found[metric] = score.value
            found[f"{metric}_95"] = [score.low, score.high]
            found[f"{metric}_stderr"] = score.stderr
        if self.exam.task.subjects and self.metrics:
            known = [record for record in self.records if record["correct"] is not None]
            by_subject = averages([self._subject(record) for record in known], hits(known, "acc"))
            found |= {"micro": by_subject.micro, "macro": by_subject.macro}
            found["by_subject"] = {name: score.value for name, score in by_subject.by_subject.items()}
        if self.exam.protocol.kind == "generative":
            found["unread"] = sum(record["prediction"] is None for record in self.records) / len(self.records)
        found["truncated"] = sum(bool(record["truncated"]) for record in self.records)
        return found

    def _subject(self, record: Record) -> str:
        return self.exam.questions[record["index"]].subject

    def whole(self) -> dict[str, Any]:
        """Return what was asked and answered, question by question, under the summary."""
        asked = {"task": self.exam.task.name, "split": self.exam.split, "shots": self.exam.shots}
        protocol = self.exam.protocol
        asked |= {"protocol": protocol.name, "version": protocol.version}
        asked |= {"prompt_sha256": self.exam.asked["prompt_sha256"]}
        return asked | self.summary() | {"questions": list(self.records)}


@dataclass(frozen=True)
class Row:
    """One model in the table."""

    label: str
    step: int | None
    """The step of a run's checkpoint."""
    sittings: Mapping[tuple[str, str], Sitting]
    """(task, protocol) -> what it scored."""

    @property
    def run(self) -> str:
        """What the rows of one run share."""
        return self.label.removesuffix(f" step {self.step}")


def folder_name(label: str) -> str:
    """Return the name of the folder that holds a row's scores."""
    return label.replace(" ", "-")


def publish(rows: Sequence[Row], folder: Path, say: Callable[[str], None]) -> None:
    """Print the tables and write everything under `folder`.

    tables.md                          what is printed
    <model>/<task>-<protocol>.json     the score, and every question's prompt, prediction and per-option scores
    <model>/<task>-<protocol>-submission.json     where the answers are hidden: what the benchmark's site takes
    scores.png                         the scores over the steps, where there are several
    """
    for row in rows:
        for (task, protocol), sitting in row.sittings.items():
            place = folder / folder_name(row.label) / f"{task}-{protocol}"
            write_json(place.with_suffix(".json"), sitting.whole())
            if not sitting.metrics:
                letters = [
                    None if each["prediction"] is None else LETTERS[each["prediction"]] for each in sitting.records
                ]
                submission = place.with_name(f"{place.name}-submission.json")
                write_submission(submission, sitting.exam.questions, letters)
                say(f"{row.label}, {task}: the answers are not public; submit {submission}")
    text = tables(rows)
    write_atomically(folder / "tables.md", [text.encode() + b"\n"])
    say(f"\n{text}\n\nwritten to {folder / 'tables.md'}")
    if figure := plot_scores(rows, folder / "scores.png"):
        say(f"figure {figure}")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n"])


Column = tuple[str, str, str]
"""(task, protocol, metric)."""


def columns(rows: Sequence[Row], protocol: str) -> list[Column]:
    """Return the columns of a protocol's table: its tasks, each with its metrics."""
    found: dict[Column, None] = {}
    for row in rows:
        for (task, own), sitting in row.sittings.items():
            if own == protocol:
                found |= {(task, protocol, metric): None for metric in sitting.metrics}
    return list(found)


def protocols(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(protocol for row in rows for _, protocol in row.sittings))


def tables(rows: Sequence[Row]) -> str:
    """Return every table and remark as Markdown, which reads as well on a screen."""
    parts = []
    for protocol in protocols(rows):
        if own := columns(rows, protocol):
            remarks = "\n".join(_remarks(rows, protocol))
            parts += [f"### {describe(rows, protocol)}", _table(rows, own), remarks, _differences(rows, own)]
    return "\n\n".join(filter(None, parts))


def describe(rows: Sequence[Row], protocol: str) -> str:
    """Return e.g. `protocol likelihood, version 1: LogiQA-v2 test 0-shot, C3-d test 0-shot`."""
    exams = {task: sitting.exam for row in rows for (task, own), sitting in row.sittings.items() if own == protocol}
    asked = ", ".join(f"{exam.task.title} {exam.split} {exam.shots}-shot" for exam in exams.values())
    version = next(iter(exams.values())).protocol.version
    return f"protocol {protocol}, version {version}: {asked}"


def _table(rows: Sequence[Row], own: Sequence[Column]) -> str:
    head = ["model", *(_title(rows, column) for column in own)]
    body = [[row.label, *(_cell(row, column) for column in own)] for row in rows]
    known = [_baselines(rows, column) for column in own]
    body.append(["random", *(f"{100 * each.uniform:.2f}" for each in known)])
    body.append(["one letter", *(f"{100 * each.letters[each.majority]:.2f} ({each.majority})" for each in known)])
    body.append(["longest option", *(f"{100 * each.longest:.2f}" for each in known)])
    return aligned([head, *body])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of `lines`, the first its head, with columns that line up in a fixed-width font."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def written(line: Sequence[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(cells)} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    text = [written(lines[0]), rule, *map(written, lines[1:])]
    return "\n".join(text)


def _title(rows: Sequence[Row], column: Column) -> str:
    task, protocol, metric = column
    title = next(row.sittings[task, protocol].exam.task.title for row in rows if (task, protocol) in row.sittings)
    return title if metric == "acc" else f"{title} norm"


def _cell(row: Row, column: Column) -> str:
    """Return e.g. `31.93 ±2.3`: the score, and half its interval, in points."""
    task, protocol, metric = column
    sitting = row.sittings.get((task, protocol))
    if sitting is None:
        return "-"
    score = sitting.accuracy(metric)
    return f"{100 * score.value:.2f} ±{50 * (score.high - score.low):.1f}"


def _baselines(rows: Sequence[Row], column: Column) -> Baselines:
    task, protocol, _ = column
    return baselines(
        next(row.sittings[task, protocol] for row in rows if (task, protocol) in row.sittings).exam.questions
    )


def _remarks(rows: Sequence[Row], protocol: str) -> Iterator[str]:
    """Yield a line for what a score hides: answers without a letter, prompts that were cut, averages over subjects."""
    for row in rows:
        for (task, own), sitting in row.sittings.items():
            if own != protocol:
                continue
            found = sitting.summary()
            if "macro" in found:
                yield (
                    f"- {row.label}, {task}: {100 * found['macro']:.2f} as the mean over "
                    f"{len(found['by_subject'])} subjects (the table counts every question the same)"
                )
            if found.get("unread"):
                unread = f"{100 * found['unread']:.1f} %"
                yield f"- {row.label}, {task}: no letter in {unread} of the answers; they count as wrong"
            if found["truncated"]:
                limit = sitting.exam.protocol.max_input_tokens
                beyond = f"{limit:,} tokens at their end, as published, or beyond " if limit else ""
                beyond += "the context at their beginning"
                yield f"- {row.label}, {task}: prompts cut, beyond {beyond}: {found['truncated']}"


def _differences(rows: Sequence[Row], own: Sequence[Column]) -> str:
    """Return the table of how every model differs from the first one on the same questions; "" for one model."""
    first, *others = rows
    if not others:
        return ""
    head = [f"minus {first.label}", *(_title(rows, column) for column in own)]
    body = [[row.label, *(_difference(first, row, column) for column in own)] for row in others]
    legend = "In points, with the 95 % interval and the p-value of McNemar's exact test."
    return f"{aligned([head, *body])}\n\n{legend}"


def _difference(first: Row, other: Row, column: Column) -> str:
    """Return e.g. `+25.00 (+14.4 to +34.9) p 9e-06`; "-" where the two were not asked the same."""
    task, protocol, metric = column
    one, two = first.sittings.get((task, protocol)), other.sittings.get((task, protocol))
    if one is None or two is None or one.exam.questions != two.exam.questions:
        return "-"
    found = compare(hits(one.records, metric), hits(two.records, metric))
    interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return f"{100 * found.difference:+.2f} ({interval}) p {found.p_value:.1g}"


def plot_scores(rows: Sequence[Row], path: Path) -> Path | None:
    """Draw the scores over the steps, a line per run, chance as dotted lines; None where no run has two steps."""
    import matplotlib.figure

    runs: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row.step is not None), key=lambda row: row.step or 0):
        runs.setdefault(row.run, []).append(row)
    runs = {run: own for run, own in runs.items() if len(own) > 1}
    if not runs:
        return None
    names = protocols([row for own in runs.values() for row in own])
    figure = matplotlib.figure.Figure(figsize=(5.2 * len(names), 4.2), layout="constrained")
    for axes, protocol in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, (run, own) in enumerate(runs.items()):
            for column, marker in zip(columns(own, protocol), itertools.cycle("osD^v<>P"), strict=False):
                scores = [row.sittings[column[:2]].accuracy(column[2]) for row in own]
                below = [100 * (score.value - score.low) for score in scores]
                above = [100 * (score.high - score.value) for score in scores]
                label = f"{run}, {_title(own, column)}" if len(runs) > 1 else _title(own, column)
                colour = f"C{number}" if len(runs) > 1 else None
                line = axes.errorbar(
                    [row.step for row in own], [100 * score.value for score in scores], [below, above],
                    marker=marker, markersize=4, capsize=2, linewidth=1.2, color=colour, label=label,
                )  # fmt: skip
                chance = 100 * _baselines(own, column).uniform
                axes.axhline(chance, color=line.lines[0].get_color(), linestyle=":", linewidth=1)
        axes.set(title=protocol, xlabel="step", ylabel="right answers, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path

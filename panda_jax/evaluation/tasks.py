"""The benchmarks: which official files a split is, how they are read, and whether they are the published ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from panda_jax.atomic import write_atomically
from panda_jax.errors import InputError
from panda_jax.evaluation.questions import Question, read_c3, read_ceval, read_cmmlu, read_logiqa2
from panda_jax.evaluation.subjects import CEVAL_SUBJECTS, CMMLU_SUBJECTS
from panda_jax.text.templates import unknown_name


@dataclass(frozen=True)
class Split:
    """The files of one split."""

    files: Mapping[str, str]
    """Path within the task's folder -> subject key ("" where the task has no subjects), in the order of reading."""
    num_questions: int | None
    """How many questions the published files hold; None where that is not known."""


@dataclass(frozen=True)
class Task:
    """A benchmark whose files lie in FOLDER or in FOLDER/`family`."""

    name: str
    title: str
    """What tables call it."""
    family: str
    splits: Mapping[str, Split]
    default_split: str
    """What published results are measured on, where its answers are public."""
    few_shot_split: str
    """Its first questions, per subject, are the examples of a few-shot prompt."""
    default_shots: int
    reader: Callable[[Path, str], Iterator[Question]]
    subjects: Mapping[str, str]
    """Subject key -> Chinese name; empty where there are none."""

    def find_split(self, split: str) -> Split:
        """Return the split of that name; raises InputError that lists those there are."""
        if split not in self.splits:
            raise InputError(f"{self.name}: no split is called {split!r}; choose one of {', '.join(self.splits)}")
        return self.splits[split]

    def locate(self, folder: Path, split: str) -> dict[Path, str]:
        """Return the split's files, all of one folder, each with its subject.

        Raises InputError that lists what was looked for, and where, when FOLDER/`family` and FOLDER both lack some.
        """
        wanted = self.find_split(split).files
        places = (folder / self.family, folder)
        for place in places:
            if all((place / name).is_file() for name in wanted):
                return {place / name: subject for name, subject in wanted.items()}
        best = max(places, key=lambda place: sum((place / name).is_file() for name in wanted))
        absent = [name for name in wanted if not (best / name).is_file()]
        listed = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        raise InputError(
            f"{self.name}, split {split}: {len(absent)} of {len(wanted)} files missing ({listed}); looked in "
            f"{places[0]} and {places[1]}; put the official files there, or choose another split"
        )

    def read(self, folder: Path, split: str) -> list[Question]:
        """Return the split's questions in the order of its files.

        Raises InputError where a file is missing or malformed (with its line or record), or an id occurs twice.
        """
        questions: list[Question] = []
        seen: dict[str, Path] = {}
        for path, subject in self.locate(folder, split).items():
            before = len(questions)
            for question in self.reader(path, subject):
                if question.id in seen:
                    raise InputError(f"{path}: the id {question.id!r} occurs twice; expected it once in {split}")
                seen[question.id] = path
                questions.append(question)
            if len(questions) == before:
                raise InputError(f"{path}: holds no question; fetch the official file again")
        return questions

    def examples(self, folder: Path, split: str, shots: int) -> dict[str, tuple[Question, ...]]:
        """Return the `shots` examples that precede a question of `split`, by subject: the first of `few_shot_split`.

        Raises InputError where the two splits are the same, so that questions would come with their own answers, and
        where a subject has too few questions, or such a question has no public answer.
        """
        subjects = list(self.find_split(split).files.values())
        if shots == 0:
            return {subject: () for subject in subjects}
        if shots < 0:
            raise InputError(f"{self.name}: {shots} shots; expected 0 or more")
        if split == self.few_shot_split:
            raise InputError(
                f"{self.name}: the examples of a few-shot prompt are the first questions of {split!r}, the split "
                f"that is to be evaluated; use 0 shots or another split"
            )
        by_subject: dict[str, list[Question]] = {subject: [] for subject in subjects}
        for question in self.read(folder, self.few_shot_split):
            by_subject[question.subject].append(question)
        for subject, questions in by_subject.items():
            usable = sum(question.answer is not None for question in questions[:shots])
            if usable < shots:
                raise InputError(
                    f"{self.name}, split {self.few_shot_split}: {usable} answered questions"
                    f"{f' of {subject}' * bool(subject)}; {shots} shots need that many; use fewer"
                )
        return {subject: tuple(questions[:shots]) for subject, questions in by_subject.items()}

    def warnings(self, folder: Path, split: str, questions: Sequence[Question]) -> list[str]:
        """Return one line for each way in which the split's files are not the published ones; [] where none is known.

        `questions` is what `read` returned. A file whose hash is not known to us is not remarked upon.
        """
        lines = []
        for path in self.locate(folder, split):
            known = SHA256.get(path.name)
            found = hashlib.sha256(path.read_bytes()).hexdigest() if known else None
            if found != known:
                lines.append(f"{path}: SHA-256 {found}; the published {path.name} has {known}")
        expected = self.find_split(split).num_questions
        if expected is not None and len(questions) != expected:
            lines.append(f"{self.name}, split {split}: {len(questions)} questions; the published files have {expected}")
        return lines


# PROTOCOLS.md §5.4 gives them, some by their first digits; in full they are those of the authors' own repositories
# (csitfun/LogiQA2.0, logiqa/DATA/LOGIQA; nlpdata/c3, data). The English LogiQA files are from the former.
SHA256: dict[str, str] = {
    "test_zh.txt": "7a8db83ccb3ebdc8d5b3886fd0ad9346c7e565722d2d592987b24dd57f251853",
    "dev_zh.txt": "a72a23160c9e12e15ea8c13e57af5032a7c37157573ebdd7e7c8e0ad34aef780",
    "test.txt": "71940b37ae0184b677c253a148d57ad4e75d6113447b1563c2ca82483e4e4f8d",
    "dev.txt": "bbefb563b7ddc02640ccdc314c1315d5727dba48539d0ecdd126fa351e511b09",
    "c3-d-train.json": "baf81f327dee84c6f451c9a4dd662e6193c67473b8791ffb72cce75cdb528f20",
    "c3-d-dev.json": "8c7054930a40aeb288ad7c51c42fa93d54aef678ccab29c75d46a7432f4f6278",
    "c3-d-test.json": "e9920491b31f9d00ecf31e51727b495dd6b0d05f4a96f273a343e81b6775a8f0",
    "c3-m-train.json": "4c84a534f1eec2c72e5f60f0c044cc39e2e42a88df01134e677e03217472d6af",
    "c3-m-dev.json": "357d0d8d2a29bc845cbe50e048c263629f5e527b70f24c3e0838c387c8d3cb54",
    "c3-m-test.json": "7d8074be56cf574536a3284bc2d6b04d137694d5e5f5b1368143c0cf3e336822",
}


def _one_file(name: str, num_questions: int | None) -> Split:
    return Split({name: ""}, num_questions)


def _ceval(split: str, num_questions: int) -> Split:
    return Split({f"{split}/{subject}_{split}.csv": subject for subject in CEVAL_SUBJECTS}, num_questions)


def _cmmlu(split: str, num_questions: int) -> Split:
    return Split({f"{split}/{subject}.csv": subject for subject in CMMLU_SUBJECTS}, num_questions)


# Counts: PROTOCOLS.md §5.2 and §5.3; CMMLU's were counted in its authors' repository (haonan-li/CMMLU).
TASKS: dict[str, Task] = {
    "logiqa2": Task(
        name="logiqa2",
        title="LogiQA-v2",
        family="logiqa2",
        splits={
            "train": _one_file("train_zh.txt", None),
            "dev": _one_file("dev_zh.txt", 1593),
            "test": _one_file("test_zh.txt", 1594),
        },
        default_split="test",
        few_shot_split="dev",
        default_shots=0,
        reader=read_logiqa2,
        subjects={},
    ),
    "logiqa2-en": Task(
        name="logiqa2-en",
        title="LogiQA-v2 (en)",
        family="logiqa2",
        splits={
            "train": _one_file("train.txt", None),
            "dev": _one_file("dev.txt", 1569),
            "test": _one_file("test.txt", 1572),
        },
        default_split="test",
        few_shot_split="dev",
        default_shots=0,
        reader=read_logiqa2,
        subjects={},
    ),
    "c3-d": Task(
        name="c3-d",
        title="C3-d",
        family="c3",
        splits={
            "train": _one_file("c3-d-train.json", 5856),
            "dev": _one_file("c3-d-dev.json", 1825),
            "test": _one_file("c3-d-test.json", 1890),
        },
        default_split="test",
        few_shot_split="dev",
        default_shots=0,
        reader=read_c3,
        subjects={},
    ),
    "c3-m": Task(
        name="c3-m",
        title="C3-m",
        family="c3",
        splits={
            "train": _one_file("c3-m-train.json", 6013),
            "dev": _one_file("c3-m-dev.json", 1991),
            "test": _one_file("c3-m-test.json", 2002),
        },
        default_split="test",
        few_shot_split="dev",
        default_shots=0,
        reader=read_c3,
        subjects={},
    ),
    "ceval": Task(
        name="ceval",
        title="C-Eval",
        family="ceval",
        splits={"dev": _ceval("dev", 260), "val": _ceval("val", 1346), "test": _ceval("test", 12342)},
        default_split="val",
        few_shot_split="dev",
        default_shots=5,
        reader=read_ceval,
        subjects=CEVAL_SUBJECTS,
    ),
    "cmmlu": Task(
        name="cmmlu",
        title="CMMLU",
        family="cmmlu",
        splits={"dev": _cmmlu("dev", 335), "test": _cmmlu("test", 11582)},
        default_split="test",
        few_shot_split="dev",
        default_shots=5,
        reader=read_cmmlu,
        subjects=CMMLU_SUBJECTS,
    ),
}


def find_task(name: str) -> Task:
    """Return the task of that name; raises InputError that suggests the nearest one."""
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]


def write_submission(path: Path, questions: Sequence[Question], letters: Sequence[str | None]) -> None:
    """Write the file that C-Eval's site takes for its test split: {"physics": {"0": "A", "1": ""}, ...}.

    `letters` holds one prediction per question; None (no answer was given) becomes "", which counts as wrong.
    The file is complete or absent. Raises ValueError where the two differ in length, OSError where it cannot be
    written.
    """
    answers: dict[str, dict[str, str]] = {}
    for question, letter in zip(questions, letters, strict=True):
        number = question.id.removeprefix(f"{question.subject}/")
        answers.setdefault(question.subject, {})[number] = letter or ""
    write_atomically(path, [json.dumps(answers, ensure_ascii=False, indent=1).encode(), b"\n"])

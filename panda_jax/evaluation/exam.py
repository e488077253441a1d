"""One task under one protocol, ready for any model: its questions, what is asked, and how answers are judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from panda_jax.evaluation.prompts import ChoiceRequest, Protocol, find_protocol, prompt_hash
from panda_jax.evaluation.questions import LETTERS, Question
from panda_jax.evaluation.tasks import Task, find_task

Record = dict[str, Any]


@dataclass(frozen=True)
class Exam:
    """The questions of one task's split, asked as one protocol says."""

    task: Task
    protocol: Protocol
    split: str
    shots: int
    questions: tuple[Question, ...]
    examples: Mapping[str, tuple[Question, ...]]
    """Worked examples by subject."""
    warnings: tuple[str, ...]
    """How the files differ from the published ones."""

    def prompt(self, index: int) -> str:
        """Return the text before the answer of question `index`, of a generative protocol."""
        question = self.questions[index]
        return self.protocol.prompt(self.task.name, question, self.examples[question.subject])

    def request(self, index: int) -> ChoiceRequest:
        """Return question `index` with its continuations, of a likelihood protocol."""
        question = self.questions[index]
        return self.protocol.request(self.task.name, question, self.examples[question.subject])

    @cached_property
    def asked(self) -> dict[str, Any]:
        """All that decides the answers of a model: the same where protocols ask alike and read answers differently."""
        asked = [[asdict(question), self.examples[question.subject]] for question in self.questions]
        text = json.dumps(asked, ensure_ascii=False, default=asdict)
        return {
            "task": self.task.name,
            "split": self.split,
            "kind": self.protocol.kind,
            "version": self.protocol.version,
            "prompt_sha256": prompt_hash(self.protocol, self.task.name),
            "shots": self.shots,
            "num_questions": len(self.questions),
            "questions_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "max_input_tokens": self.protocol.max_input_tokens,
            "max_new_tokens": self.protocol.max_new_tokens,
        }

    def identity(self, fingerprint: str, dtype: str) -> dict[str, Any]:
        """Return `asked` with the model: `fingerprint` of its weights and tokenizer, dtype of its products.

        Protocols that ask alike and read answers differently have the same identity, so they share the answers.
        """
        return self.asked | {"weights": fingerprint, "dtype": dtype}

    def judge(self, record: Record) -> Record:
        """Return the record with `answer`, `prediction` and `correct`; likelihoods also with `..._norm`.

        All three are option numbers from 0, or None: a hidden answer, a text without a letter. Likelihoods: the first
        of the largest, and the first of the largest divided by the characters of the option (acc_norm), whose empty
        options never win (PROTOCOLS.md §5.3).
        """
        question = self.questions[record["index"]]
        judged = {"answer": question.answer}
        if self.protocol.kind == "generative":
            assert self.protocol.extract is not None
            text = record["continuation_to_eos" if self.protocol.ends_at_eos else "continuation"]
            letter = self.protocol.extract(text, len(question.options))
            judged["prediction"] = None if letter is None else LETTERS.index(letter)
            return record | judged | _hit("", judged)
        scores, lengths = np.array(record["loglikelihoods"]), np.array(record["lengths"])
        judged["prediction"] = int(np.argmax(scores))
        per_character = np.where(lengths > 0, scores / np.maximum(lengths, 1), -np.inf)
        judged["prediction_norm"] = int(np.argmax(per_character))
        return record | judged | _hit("", judged) | _hit("_norm", judged)


def _hit(suffix: str, judged: Mapping[str, int | None]) -> dict[str, bool | None]:
    answer = judged["answer"]
    return {f"correct{suffix}": None if answer is None else judged[f"prediction{suffix}"] == answer}


def set_exam(
    folder: Path, task_name: str, protocol_name: str, split: str | None, shots: int | None, limit: int | None
) -> Exam:
    """Return the exam of a task's official files under `folder`; None takes the task's and the protocol's own choice.

    `limit` keeps the first questions. Raises InputError for an unknown name, a protocol without a wording for the task,
    and for files that are missing or malformed.
    """
    task, protocol = find_task(task_name), find_protocol(protocol_name)
    protocol.wording(task.name)
    split = split or task.default_split
    if shots is None:
        shots = task.default_shots if protocol.shots is None else protocol.shots
    questions = task.read(folder, split)
    return Exam(
        task=task,
        protocol=protocol,
        split=split,
        shots=shots,
        questions=tuple(questions[:limit]),
        examples=task.examples(folder, split, shots),
        warnings=tuple(task.warnings(folder, split, questions)),
    )


def sampled(exam: Exam, num_questions: int, seed: int) -> Exam:
    """Return the exam with `num_questions` of its questions, drawn by `seed`, in order; all where it has fewer."""
    size = len(exam.questions)
    kept = np.sort(np.random.default_rng(seed).permutation(size)[:num_questions])
    return replace(exam, questions=tuple(exam.questions[index] for index in kept))


def hits(records: Sequence[Record], metric: str) -> list[bool]:
    """Return which questions were answered right, by `acc` or `acc_norm`, of those whose answer is known."""
    field = {"acc": "correct", "acc_norm": "correct_norm"}[metric]
    return [record[field] for record in records if record[field] is not None]

"""Tasks scored while a run trains: a sample of their questions, the same ones every time.

The rooms of evaluation and generation are entered by runs that name tasks, and by no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from panda_jax.config import Config
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.training.metrics import Recorder

if TYPE_CHECKING:
    from panda_jax.evaluation.candidate import Candidate
    from panda_jax.evaluation.exam import Exam


class TaskScores:
    """Scores the tasks of `eval.tasks` and records them."""

    def __init__(
        self,
        config: Config,
        exams: Sequence[Exam],
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
        recorder: Recorder,
    ) -> None:
        self._config, self._exams = config, exams
        self._mesh, self._tokenizer, self._recorder = mesh, tokenizer, recorder
        self._candidate: Candidate | None = None

    def measure(self, parameters: dict[str, jax.Array], finished: int) -> None:
        """Record and print the scores of `parameters` after `finished` steps; no-op where no task is named."""
        if not self._exams:
            return
        from panda_jax.evaluation.candidate import Candidate
        from panda_jax.evaluation.exam import hits
        from panda_jax.evaluation.statistics import accuracy

        if self._candidate is None:
            config = self._config
            self._candidate = Candidate(config.model, parameters, config.compute, self._mesh, self._tokenizer)
        self._candidate.parameters = parameters
        line: dict[str, float] = {"step": finished}
        shown = []
        for exam in self._exams:
            answered = self._candidate.answer(exam, range(len(exam.questions)))
            score = accuracy(hits([exam.judge(record) for record in answered], "acc"))
            line[f"{exam.task.name}/{exam.protocol.name}"] = score.value
            half = 50 * (score.high - score.low)
            shown.append(f"{exam.task.title} {exam.protocol.name} {100 * score.value:.1f} ±{half:.1f}")
        self._recorder.record(line)
        self._recorder.say(f"right answers after step {finished}, %: {', '.join(shown)}")


def exams_of(config: Config) -> list[Exam]:
    """Return the exams that `eval` names, each with its sample of questions; none where it names no task.

    Raises InputError for an unknown task or protocol, for files that are not there, and where the answers are hidden.
    """
    wanted = config.eval
    if not wanted.tasks:
        return []
    from panda_jax.evaluation.exam import sampled, set_exam

    if not wanted.data:
        raise InputError("eval.tasks are named but eval.data is not; give the folder with their official files")
    exams = []
    for task in wanted.tasks:
        for protocol in wanted.protocols:
            whole = set_exam(Path(wanted.data), task, protocol, wanted.split or None, wanted.shots, None)
            if any(question.answer is None for question in whole.questions):
                raise InputError(f"eval.split: the answers of {task} {whole.split} are hidden; choose another split")
            exams.append(sampled(whole, wanted.num_questions, config.seed))
    return exams

"""A model that sits exams: likelihoods through likelihood.py, written answers through generation/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import jax
import numpy as np
from jax.experimental import multihost_utils

from panda_jax import sharding
from panda_jax.config import Compute, Model
from panda_jax.errors import InputError
from panda_jax.evaluation.exam import Exam, Record
from panda_jax.evaluation.likelihood import Scorer
from panda_jax.evaluation.prompts import Protocol
from panda_jax.evaluation.results import Answers
from panda_jax.generation.decode import Generator, Sampling, decoding
from panda_jax.text.tokenizer import Tokenizer

# Written answers that are computed between two entries in the file: what a kill can cost.
PROMPTS_AT_A_TIME = 64


class Candidate:
    """A model on the devices that answers questions; every process of a run calls it alike and gets every answer."""

    def __init__(
        self,
        model: Model,
        parameters: dict[str, jax.Array],
        compute: Compute,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
    ) -> None:
        """`parameters` are global arrays on `mesh`, named as by model/parameters.py; others may be set later."""
        self._model, self._compute, self._mesh, self._tokenizer = model, compute, mesh, tokenizer
        self.parameters = parameters

    def sit(self, exam: Exam, answers: Answers, progress: Callable[[int], None]) -> None:
        """Answer the questions of `exam` that `answers` lacks; `progress` is called with the number that are done.

        The first process writes. What it finds on its disk decides for all, since others may not see that disk.
        """
        size = len(exam.questions)
        if not _same_everywhere(answers.missing(), size):
            progress(size)
            return
        sharding.by_first(f"{answers.path} opened for {exam.protocol.name}", answers.open)
        try:
            missing = _same_everywhere(answers.missing(), size)
            done = size - len(missing)
            progress(done)
            for number, record in enumerate(self.answer(exam, missing), start=1):
                answers.add(record)
                progress(done + number)
        finally:
            answers.close()

    def answer(self, exam: Exam, indices: Sequence[int]) -> Iterator[Record]:
        """Yield the record of each of the questions `indices` as it comes, in any order."""
        yield from (self._choose if exam.protocol.kind == "likelihood" else self._write)(exam, indices)

    def _choose(self, exam: Exam, indices: Sequence[int]) -> Iterator[Record]:
        requests = [exam.request(index) for index in indices]
        self._scorer.parameters = self.parameters
        for place, scores in self._scorer.score(requests):
            request = requests[place]
            yield {
                "index": indices[place],
                "id": exam.questions[indices[place]].id,
                "prompt": request.context,
                "continuations": request.continuations,
                "lengths": request.lengths,
                "loglikelihoods": scores.loglikelihoods,
                "is_greedy": scores.is_greedy,
                "truncated": scores.num_truncated > 0,
            }

    def _write(self, exam: Exam, indices: Sequence[int]) -> Iterator[Record]:
        assert exam.protocol.max_new_tokens is not None
        check_context(exam.protocol, self._model)
        greedy = Sampling.greedy(exam.protocol.max_new_tokens, stop_ids=())
        texts = {index: exam.prompt(index) for index in indices}
        prompts = {index: self._cut(exam, text) for index, text in texts.items()}
        # The longest first: a batch holds prompts of like length, and what is left to do gets faster.
        order = sorted(indices, key=lambda index: -len(prompts[index][0]))
        generator = Generator(self._model, self.parameters, decoding(self._compute, self._mesh), self._mesh)
        for start in range(0, len(order), PROMPTS_AT_A_TIME):
            chunk = order[start : start + PROMPTS_AT_A_TIME]
            written = generator.generate([prompts[index][0] for index in chunk], greedy)
            for index, answer in zip(chunk, written, strict=True):
                yield {
                    "index": index,
                    "id": exam.questions[index].id,
                    "prompt": texts[index],
                    "continuation": self._tokenizer.decode(answer.ids),
                    "continuation_to_eos": self._tokenizer.decode(_before(answer.ids, self._tokenizer.eos_id)),
                    "truncated": prompts[index][1],
                }

    def _cut(self, exam: Exam, prompt: str) -> tuple[list[int], bool]:
        """Return (ids of a prompt with BOS, whether it lost some).

        Beyond the protocol's own limit it loses its end, as published; beyond the model's context its beginning, or
        the question would be gone.
        """
        ids = [self._tokenizer.bos_id, *self._tokenizer.encode(prompt)]
        kept = ids[: exam.protocol.max_input_tokens]
        room = self._model.context_length - (exam.protocol.max_new_tokens or 0)
        if len(kept) > room:
            kept = [self._tokenizer.bos_id, *kept[len(kept) - room + 1 :]]
        return kept, len(kept) < len(ids)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._model, self.parameters, self._compute, self._mesh, self._tokenizer)


def check_context(protocol: Protocol, model: Model) -> None:
    """Raise InputError where what the protocol has a model write leaves no room for a prompt in its context."""
    if model.context_length <= (protocol.max_new_tokens or 0):
        raise InputError(
            f"protocol {protocol.name} writes {protocol.max_new_tokens} tokens, and the model's context is "
            f"{model.context_length}; choose a likelihood protocol"
        )


def _before(ids: Sequence[int], end: int) -> Sequence[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _same_everywhere(indices: Sequence[int], size: int) -> list[int]:
    """Return the first process's `indices`, each below `size`, in every process."""
    if jax.process_count() == 1:
        return list(indices)
    wanted = np.zeros(size, bool)
    wanted[np.asarray(indices, int)] = True
    return np.flatnonzero(multihost_utils.broadcast_one_to_all(wanted)).tolist()

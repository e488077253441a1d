"""What a model is asked: a protocol and a task give the exact text, its delimiters, and how the answer is taken.

Likelihood contexts and continuations are the arguments of lm-evaluation-harness's requests (PROTOCOLS.md §5.3). Its
rule that white space at the end of a context belongs to the continuation is the scorer's, not applied here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from panda_jax.errors import InputError
from panda_jax.evaluation.extract import first_letter, strict_letter
from panda_jax.evaluation.questions import LETTERS, Question
from panda_jax.evaluation.subjects import CEVAL_SUBJECTS, CMMLU_SUBJECTS
from panda_jax.evaluation.tasks import TASKS, find_task
from panda_jax.text.templates import unknown_name


@dataclass(frozen=True)
class ChoiceRequest:
    """One question for a likelihood scorer."""

    context: str
    """Everything before the continuation, as lm-evaluation-harness would build it."""
    continuations: tuple[str, ...]
    """One per option, target delimiter included."""
    lengths: tuple[int, ...]
    """Characters of each choice without its delimiter, for acc_norm; 0 for the empty options of LogiQA-v2."""


@dataclass(frozen=True)
class Wording:
    """How a task is asked: head(subject), then the examples and the question, joined by fewshot_delimiter."""

    head: Callable[[str], str]
    example: Callable[[Question], str]
    """An answered question, target delimiter included."""
    body: Callable[[Question], str]
    choices: Callable[[Question], tuple[str, ...]]
    """What is scored, one per option; likelihood protocols only."""
    target_delimiter: str
    """Between body and choice."""
    fewshot_delimiter: str
    is_delimited_without_examples: bool
    """Whether fewshot_delimiter stands between head and body where there is no example."""


@dataclass(frozen=True)
class Protocol:
    """A named way to ask and to score. Scores of different versions do not compare: wording or rules have changed."""

    name: str
    version: int
    kind: Literal["generative", "likelihood"]
    wordings: Mapping[str, Wording]
    """By task name."""
    shots: int | None
    """Examples before a question where nothing else is said; None: the task's own number."""
    extract: Callable[[str, int], str | None] | None
    """Generative: (what was written, number of options) -> letter, or None where there is none."""
    max_input_tokens: int | None
    """Generative: prompts longer than this, BOS included, lose tokens on the right."""
    max_new_tokens: int | None
    """Generative: this many greedy tokens."""
    ends_at_eos: bool
    """Generative: whether what comes behind an end-of-sequence token is left out. Panda's and LLaMA's published configs
    name no such token, so that it counts there; BELLE's and Linly's do."""

    def wording(self, task: str) -> Wording:
        """Return how `task` is asked; raises InputError where this protocol has no wording for it."""
        if task not in self.wordings:
            raise InputError(
                f"protocol {self.name}: has no wording for the task {task!r}; it has {', '.join(self.wordings)}"
            )
        return self.wordings[task]

    def prompt(self, task: str, question: Question, examples: Sequence[Question]) -> str:
        """Return the text that precedes the answer, after `examples`, which must have answers."""
        wording = self.wording(task)
        written = [wording.example(example) for example in examples]
        if not written and wording.is_delimited_without_examples:
            written = [""]
        return wording.head(question.subject) + wording.fewshot_delimiter.join([*written, wording.body(question)])

    def request(self, task: str, question: Question, examples: Sequence[Question]) -> ChoiceRequest:
        """Return the prompt with one continuation per option; raises ValueError where the protocol is generative."""
        if self.kind != "likelihood":
            raise ValueError(f"protocol {self.name} generates; it scores no continuations")
        wording = self.wording(task)
        choices = wording.choices(question)
        return ChoiceRequest(
            context=self.prompt(task, question, examples),
            continuations=tuple(wording.target_delimiter + choice for choice in choices),
            lengths=tuple(map(len, choices)),
        )


def _gold(question: Question) -> int:
    if question.answer is None:
        raise ValueError(f"question {question.id} has no public answer; it cannot be an example")
    return question.answer


def _letters(question: Question) -> tuple[str, ...]:
    return tuple(LETTERS[: len(question.options)])


def _texts(question: Question) -> tuple[str, ...]:
    return question.options


def _listed(question: Question, mark: str) -> str:
    """Return "A. first\nB. second\n" for mark ". "."""
    return "".join(f"{LETTERS[i]}{mark}{option}\n" for i, option in enumerate(question.options))


def _nothing(subject: str) -> str:
    return ""


def _scored(
    body: Callable[[Question], str],
    choices: Callable[[Question], tuple[str, ...]],
    target_delimiter: str,
    head: Callable[[str], str],
) -> Wording:
    """Return a likelihood wording as lm-evaluation-harness builds it: an example is body, delimiter, right choice."""
    return Wording(
        head=head,
        example=lambda question: body(question) + target_delimiter + choices(question)[_gold(question)],
        body=body,
        choices=choices,
        target_delimiter=target_delimiter,
        fewshot_delimiter="\n\n",
        is_delimited_without_examples=False,
    )


# ---- Panda's generative prompt (PROTOCOLS.md §5.1) -----------------------------------------------------------------


def _panda_body(question: Question) -> str:
    listed = _listed(question, ": ")
    return f"{question.context}\n\n问题：\n{question.question}\n\n选项：\n{listed}\n\n本题的答案是："


def _panda_example(question: Question) -> str:
    """The published form of an example is English, for Chinese questions too."""
    return (
        f"Context:\n{question.context}\n\nQuestion:\n{question.question}\n\n"
        f"Options:\n{_listed(question, ': ')}\n\nThe answer is {LETTERS[_gold(question)]}"
    )


PANDA = Wording(
    head=lambda subject: "阅读下面的文章并从选项中选择的答案回答问题：\n\n",
    example=_panda_example,
    body=_panda_body,
    choices=_letters,
    target_delimiter="",
    fewshot_delimiter="\n\n",
    # Four line breaks in a row, as published.
    is_delimited_without_examples=True,
)

_LABEL = r"\s*[{half}{full}]\s*[.．、,，·:：)）]\s*"


def strip_option_labels(question: Question) -> Question:
    """Return the question without the letters that its option texts begin with: ("A.x", "B、y") becomes ("x", "y").

    927 of LogiQA-v2's 1594 test questions come with "A." or "A、" in their first option, so that Panda's prompt shows
    "A: A.…". Only where every option carries its own letter, and has a text after it, is that taken for a label.
    """
    matches = [
        re.match(_LABEL.format(half=half, full=full), option)
        for half, full, option in zip(LETTERS, "ＡＢＣＤＥ", question.options, strict=False)
    ]
    stripped = tuple(
        option[match.end() :] for match, option in zip(matches, question.options, strict=True) if match is not None
    )
    return replace(question, options=stripped) if len(stripped) == len(matches) and all(stripped) else question


PANDA_STRIPPED = replace(
    PANDA,
    example=lambda question: _panda_example(strip_option_labels(question)),
    body=lambda question: _panda_body(strip_option_labels(question)),
)

# ---- Likelihood (PROTOCOLS.md §5.3) --------------------------------------------------------------------------------


def _passage_body(question: Question) -> str:
    """lm-evaluation-harness's logiqa2, in English for the Chinese files too: it has no wording of its own for those."""
    return f"Passage: {question.context}\nQuestion: {question.question}\n{_listed(question, '. ')}Answer:"


def _article_body(question: Question) -> str:
    """C3 has no task in the harness. Ours asks in Chinese and does not list the options, whose texts are scored."""
    return f"文章：{question.context}\n问题：{question.question}\n答案："


def _lettered_article_body(question: Question) -> str:
    return f"文章：{question.context}\n问题：{question.question}\n{_listed(question, '. ')}答案："


def _exam_body(question: Question) -> str:
    return f"{question.question.strip()}\n{_listed(question, '. ')}答案："


def _ceval_head(subject: str) -> str:
    return f"以下是中国关于{CEVAL_SUBJECTS[subject]}的单项选择题，请选出其中的正确答案。\n\n"


def _cmmlu_head(subject: str) -> str:
    return f"以下是关于{CMMLU_SUBJECTS[subject]}的单项选择题，请直接给出正确答案的选项。\n\n"


CEVAL = _scored(_exam_body, _letters, " ", _ceval_head)
CMMLU = _scored(_exam_body, _letters, " ", _cmmlu_head)
LOGIQA2 = _scored(_passage_body, _texts, " ", _nothing)
LOGIQA2_LETTER = _scored(_passage_body, _letters, " ", _nothing)
# No space before a Chinese answer: none stands there in Chinese text.
C3 = _scored(_article_body, _texts, "", _nothing)
C3_LETTER = _scored(_lettered_article_body, _letters, " ", _nothing)
# Closed book: nothing but the question. The space is the '▁' with which an answer begins that was tokenised by itself,
# as training does.
BARE = _scored(lambda question: question.question, _texts, " ", _nothing)


def _first_letter(text: str, num_options: int) -> str | None:
    return first_letter(text)


def _generative(name: str, wording: Wording, extract: Callable[[str, int], str | None], ends_at_eos: bool) -> Protocol:
    """Return a protocol with Panda's lengths, version 1."""
    return Protocol(
        name=name,
        version=1,
        kind="generative",
        wordings=dict.fromkeys(TASKS, wording),
        shots=0,
        extract=extract,
        max_input_tokens=2048,
        max_new_tokens=64,
        ends_at_eos=ends_at_eos,
    )


def _likelihood(name: str, wordings: Mapping[str, Wording], shots: int | None) -> Protocol:
    """Return a protocol that scores continuations, version 1."""
    return Protocol(
        name=name,
        version=1,
        kind="likelihood",
        wordings=wordings,
        shots=shots,
        extract=None,
        max_input_tokens=None,
        max_new_tokens=None,
        ends_at_eos=False,
    )


_EXAMS = {"ceval": CEVAL, "cmmlu": CMMLU}
_TEXTS = {"logiqa2": LOGIQA2, "logiqa2-en": LOGIQA2, "c3-d": C3, "c3-m": C3}
_LETTERS = {"logiqa2": LOGIQA2_LETTER, "logiqa2-en": LOGIQA2_LETTER, "c3-d": C3_LETTER, "c3-m": C3_LETTER}

PROTOCOLS: dict[str, Protocol] = {
    "panda": _generative("panda", PANDA, _first_letter, ends_at_eos=False),
    "panda-eos": _generative("panda-eos", PANDA, _first_letter, ends_at_eos=True),
    "panda-strict": _generative("panda-strict", PANDA, strict_letter, ends_at_eos=True),
    "panda-stripped": _generative("panda-stripped", PANDA_STRIPPED, _first_letter, ends_at_eos=False),
    "likelihood": _likelihood("likelihood", _TEXTS | _EXAMS, shots=None),
    "likelihood-letter": _likelihood("likelihood-letter", _LETTERS | _EXAMS, shots=None),
    "likelihood-bare": _likelihood("likelihood-bare", dict.fromkeys(TASKS, BARE), shots=0),
}


def find_protocol(name: str) -> Protocol:
    """Return the protocol of that name; raises InputError that suggests the nearest one."""
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


# They reach every branch of the wordings: no context, 2 to 5 options, white space, labels in the option texts.
PROBES: tuple[Question, ...] = (
    Question("0", "甲 乙\n丙", " 丁？ ", ("戊", "己"), 1, ""),
    Question("1", "", "庚？", ("A.辛", "B、壬", "C．癸", "D)子"), 2, ""),
    Question("2", "丑", "寅", ("E 卯", "B.辰", " 巳", "午 ", "未"), 4, ""),
    Question("3", "申", "酉？", ("戌", "亥", "A.甲"), 0, ""),
)


def prompt_hash(protocol: Protocol, task: str) -> str:
    """Return SHA-256 hex of fixed questions as rendered without and with examples, in every subject of the task.

    A changed wording, delimiter, choice or subject name changes it; a new extractor does not: it is not asked.
    Raises InputError where the protocol has no wording for the task.
    """
    rendered: list[object] = []
    for subject in find_task(task).subjects or ("",):
        for shots in range(len(PROBES)):
            for probe in PROBES:
                question = replace(probe, subject=subject)
                examples = [replace(example, subject=subject) for example in PROBES[:shots]]
                if protocol.kind == "likelihood":
                    request = protocol.request(task, question, examples)
                    rendered.append([request.context, request.continuations, request.lengths])
                else:
                    rendered.append(protocol.prompt(task, question, examples))
    return hashlib.sha256(json.dumps(rendered, ensure_ascii=False).encode()).hexdigest()

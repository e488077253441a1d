"""How sure a score is, whether two scores differ, and what answering without reading would score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from panda_jax.evaluation.questions import LETTERS, Question

# The quantile of a two-sided 95 % interval, 1.959964.
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers, between 0 and 1, with its 95 % interval and standard error."""

    num_correct: int
    num_questions: int
    value: float
    low: float
    high: float
    stderr: float
    """Sample standard deviation over the root of n, as lm-evaluation-harness prints it; 0 for a single question."""


def accuracy(correct: Sequence[bool]) -> Accuracy:
    """Return the share of `correct` with Wilson's 95 % interval; raises ValueError where there is no question.

    With p = k / n and z = 1.96 the interval is (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) (Wilson 1927).
    81 right of 263: (0.3080 + 0.0073 ± 1.96 sqrt(0.0008104 + 0.0000139)) / 1.0146 = 0.3107 ± 0.0555. It stays within
    0 and 1, and 0 of 10 is still (0, 0.278), where p ± z sqrt(p(1-p)/n) would be (0, 0).
    """
    n, k = len(correct), sum(map(bool, correct))
    if not n:
        raise ValueError("an accuracy needs at least one question")
    p, spread = k / n, _Z**2 / n
    centre = (p + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n)) / (1 + spread)
    return Accuracy(
        num_correct=k,
        num_questions=n,
        value=p,
        low=max(0.0, centre - half) if k else 0.0,
        high=min(1.0, centre + half) if k < n else 1.0,
        stderr=math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0,
    )


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions; `difference` is second minus first, in shares of the questions."""

    only_first: int
    """Questions that only the first model answers rightly."""
    only_second: int
    difference: float
    low: float
    high: float
    p_value: float


def compare(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two models by the questions on which they disagree; raises ValueError where the lengths differ or are 0.

    p_value: McNemar's exact test, two-sided. Among n = only_first + only_second disagreements either side is equally
    likely where the models are equally good: p = min(1, 2 · P(X ≤ min of the two)), X binomial(n, 1/2). With 1 and 7
    it is 2 · (1 + 8) / 256 = 0.0703; without disagreement it is 1.
    low, high: 95 % interval of the difference after Bonett and Price (2012), J. Educ. Behav. Stat. 37(4): with
    p = (only_first + 1) / (N + 2) and q = (only_second + 1) / (N + 2), q - p ± z sqrt((p + q - (q - p)²) / (N + 2)).
    With 1 and 7 of N = 21 questions it is 0.2609 ± 0.2475. It is centred a little nearer 0 than the difference, and
    is an approximation: near the border it and the exact p_value can disagree, as here.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"a paired comparison needs the same questions twice, found {len(first)} and {len(second)}")
    size = len(first)
    only_first = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    disagreements = only_first + only_second
    # Whole numbers: with thousands of disagreements the terms leave the range of floats long before their quotient.
    term = tail = 1
    for k in range(min(only_first, only_second)):
        term = term * (disagreements - k) // (k + 1)
        tail += term
    p, q = (only_first + 1) / (size + 2), (only_second + 1) / (size + 2)
    half = _Z * math.sqrt((p + q - (q - p) ** 2) / (size + 2))
    return Paired(
        only_first=only_first,
        only_second=only_second,
        difference=(only_second - only_first) / size,
        low=max(-1.0, q - p - half),
        high=min(1.0, q - p + half),
        p_value=min(1.0, 2 * tail / 2**disagreements),
    )


@dataclass(frozen=True)
class Baselines:
    """Scores, as shares, of answering without a model."""

    uniform: float
    """Expected score of a letter drawn evenly from each question's options: the mean of 1 / number of options."""
    letters: dict[str, float]
    """Score of the same letter everywhere; a question that has no such option counts as wrong."""
    majority: str
    """The letter that scores best (the first of equals)."""
    longest: float
    """Score of the option with the most characters (the first of equals)."""


def baselines(questions: Sequence[Question]) -> Baselines:
    """Return what can be had without reading `questions`; those whose answer is hidden do not count.

    Raises ValueError where no question has a public answer. `longest` counts characters, not tokens or bytes, and
    takes the first of equally long options: that gives PROTOCOLS.md §5.2's column (LogiQA-v2 29.67 %, C3-d 30.63 %,
    C3-m 32.97 %).
    """
    asked = [question for question in questions if question.answer is not None]
    if not asked:
        raise ValueError("baselines need at least one question with a public answer")
    size = len(asked)
    num_letters = max(len(question.options) for question in asked)
    right = [sum(question.answer == index for question in asked) for index in range(num_letters)]
    longest = sum(question.answer == longest_option(question) for question in asked)
    return Baselines(
        uniform=sum(1 / len(question.options) for question in asked) / size,
        letters={letter: count / size for letter, count in zip(LETTERS, right, strict=False)},
        majority=LETTERS[right.index(max(right))],
        longest=longest / size,
    )


def longest_option(question: Question) -> int:
    """Return the index of the option with the most characters, the first of equals."""
    lengths = [len(option) for option in question.options]
    return lengths.index(max(lengths))


@dataclass(frozen=True)
class Averages:
    """A score over subjects, in shares."""

    micro: float
    """Every question counts the same: what lm-evaluation-harness prints for a group."""
    macro: float
    """Every subject counts the same: what C-Eval's leaderboard prints."""
    by_subject: dict[str, Accuracy]
    """In the order in which the subjects first occur."""


def averages(subjects: Sequence[str], correct: Sequence[bool]) -> Averages:
    """Return both averages of `correct`, where question i is of subject subjects[i].

    Subject a with 1 of 4 and b with 1 of 1: micro is 2 / 5, macro is (1/4 + 1) / 2. Raises ValueError where the two
    differ in length or are empty.
    """
    grouped: dict[str, list[bool]] = {}
    for subject, is_right in zip(subjects, correct, strict=True):
        grouped.setdefault(subject, []).append(bool(is_right))
    by_subject = {subject: accuracy(answers) for subject, answers in grouped.items()}
    return Averages(
        micro=accuracy(correct).value,
        macro=sum(entry.value for entry in by_subject.values()) / len(by_subject),
        by_subject=by_subject,
    )

"""Intervals and paired tests against scipy, exact fractions and published examples; baselines on the real files."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from panda_jax.evaluation.questions import Question
from panda_jax.evaluation.statistics import accuracy, averages, baselines, compare, longest_option
from panda_jax.evaluation.tasks import TASKS

# PROTOCOLS.md §5.2: (options 2, 3, 4), then percentages: uniform, A, B, C, D, majority letter, longest option.
PUBLISHED = {
    "logiqa2": ((0, 0, 1594), "25.00", ("21.64", "26.10", "25.85", "26.41"), "D", "29.67"),
    "c3-d": ((0, 362, 1528), "26.60", ("24.18", "28.36", "29.58", "17.88"), "C", "30.63"),
    "c3-m": ((171, 159, 1672), "27.80", ("23.48", "27.82", "24.88", "23.83"), "B", "32.97"),
}


def asked(options: tuple[str, ...], answer: int | None) -> Question:
    return Question("1", "", "问", options, answer, "")


@pytest.mark.parametrize("task", PUBLISHED)
def test_baselines_of_the_real_test_sets(shared_data: Path, task: str) -> None:
    counts, uniform, letters, majority, longest = PUBLISHED[task]
    questions = TASKS[task].read(shared_data / "eval", "test")
    found = baselines(questions)
    assert tuple(sum(len(q.options) == n for q in questions) for n in (2, 3, 4)) == counts
    assert f"{100 * found.uniform:.2f}" == uniform
    assert {letter: f"{100 * share:.2f}" for letter, share in found.letters.items()} == dict(
        zip("ABCD", letters, strict=True)
    )
    assert found.majority == majority
    assert f"{100 * found.longest:.2f}" == longest


@pytest.mark.parametrize("task", PUBLISHED)
def test_random_numbers_score_as_the_uniform_column_says(shared_data: Path, task: str) -> None:
    """Of 400 random scorers about 95 % have the uniform baseline in their interval: 380 ± 4.4; 5 deviations are 22."""
    questions = TASKS[task].read(shared_data / "eval", "test")
    uniform = baselines(questions).uniform
    gold = np.array([question.answer for question in questions])
    is_option = np.array([[i < len(question.options) for i in range(5)] for question in questions])
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        chosen = np.where(is_option, random.random(is_option.shape), -1).argmax(axis=1)
        interval = accuracy((chosen == gold).tolist())
        inside += interval.low <= uniform <= interval.high
    assert 358 <= inside <= 400


def test_baselines_of_a_hand_drawn_set() -> None:
    """Uniform (1/2 + 1/4 + 1/4) / 3; A is right once, D once, C once; the hidden answer does not count."""
    questions = [
        asked(("长长", "短"), 0),
        asked(("一", "二二", "三三", "四"), 3),
        asked(("一", "二", "三三三", "aaa"), 2),
        asked(("一", "二"), None),
    ]
    found = baselines(questions)
    assert found.uniform == pytest.approx(1 / 3)
    assert found.letters == {"A": 1 / 3, "B": 0, "C": 1 / 3, "D": 1 / 3}
    assert found.majority == "A"
    assert found.longest == pytest.approx(2 / 3)
    assert [longest_option(question) for question in questions] == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="public answer"):
        baselines(questions[3:])


# Newcombe (1998), Statistics in Medicine 17, table I, method 3.
@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (81, 263, "0.2553", "0.3662"),
        (15, 148, "0.0624", "0.1605"),
        (0, 20, "0.0000", "0.1611"),
        (1, 29, "0.0061", "0.1718"),
    ],
)
def test_wilson_of_published_examples(right: int, total: int, low: str, high: str) -> None:
    found = accuracy([True] * right + [False] * (total - right))
    assert (f"{found.low:.4f}", f"{found.high:.4f}") == (low, high)
    assert (found.num_correct, found.num_questions, found.value) == (right, total, right / total)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_and_stderr_equal_scipy_and_numpy(case: tuple[int, int]) -> None:
    right, total = case
    answers = [True] * right + [False] * (total - right)
    found = accuracy(answers)
    expected = stats.binomtest(right, total).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.stderr == pytest.approx(np.std(answers, ddof=1) / math.sqrt(total) if total > 1 else 0)


@given(st.integers(0, 900), st.integers(0, 900), st.integers(0, 900))
def test_mcnemar_equals_scipy(only_first: int, only_second: int, both: int) -> None:
    if only_first + only_second + both == 0:
        return
    first = [True] * only_first + [False] * only_second + [True] * both
    second = [False] * only_first + [True] * only_second + [True] * both
    found = compare(first, second)
    disagreements = only_first + only_second
    expected = stats.binomtest(only_first, disagreements, 0.5).pvalue if disagreements else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-9)
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.difference == pytest.approx(np.mean(second) - np.mean(first))
    assert -1 <= found.low <= found.high <= 1
    turned = compare(second, first)
    assert (turned.low, turned.high, turned.p_value) == pytest.approx((-found.high, -found.low, found.p_value))


def test_a_comparison_by_hand() -> None:
    """1 against 7 of 21: p = 2 (1 + 8) / 2^8; q - p = 6/23, variance (10/23 - (6/23)²) / 23, so 0.26087 ± 0.24749."""
    first = [True] + [False] * 7 + [True] * 6 + [False] * 7
    second = [False] + [True] * 7 + [True] * 6 + [False] * 7
    found = compare(first, second)
    assert found.p_value == 18 / 256
    assert found.difference == pytest.approx(6 / 21)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0134, 0.5084)


def test_many_disagreements_stay_within_reach_of_floats() -> None:
    """As on all of C-Eval: 5000 against 5200 of 12342, where 2**-10200 itself is no float."""
    first = [True] * 5000 + [False] * 7342
    second = [False] * 5000 + [True] * 5200 + [False] * 2142
    assert compare(first, second).p_value == pytest.approx(2 * stats.binom.cdf(5000, 10200, 0.5), rel=1e-9)


def test_the_interval_of_the_difference_covers_the_truth() -> None:
    """2000 simulated pairs whose true difference is 0.1: about 1900 ± 10 intervals hold it; 5 deviations are 50."""
    random = np.random.default_rng(1)
    draws = random.choice(4, size=(2000, 300), p=[0.15, 0.25, 0.3, 0.3])
    inside = 0
    for only_first, only_second in zip((draws == 0).sum(axis=1), (draws == 1).sum(axis=1), strict=True):
        first = [True] * only_first + [False] * (300 - only_first)
        second = [False] * only_first + [True] * only_second + [False] * (300 - only_first - only_second)
        found = compare(first, second)
        inside += found.low <= 0.1 <= found.high
    assert 1850 <= inside <= 1950


def test_micro_and_macro_by_hand() -> None:
    """a: 1 of 4, b: 1 of 1, c: 0 of 1. Micro 2/6, macro (1/4 + 1 + 0) / 3."""
    found = averages(["b", "a", "a", "c", "a", "a"], [True, True, False, False, False, False])
    assert found.micro == pytest.approx(2 / 6)
    assert found.macro == pytest.approx(1.25 / 3)
    assert list(found.by_subject) == ["b", "a", "c"]
    assert (found.by_subject["a"].num_correct, found.by_subject["a"].num_questions) == (1, 4)


def test_scores_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        accuracy([])
    with pytest.raises(ValueError, match="at least one"):
        averages([], [])
    with pytest.raises(ValueError, match="same questions"):
        compare([True], [True, False])
    with pytest.raises(ValueError, match="same questions"):
        compare([], [])

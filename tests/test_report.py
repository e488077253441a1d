"""Tables drawn by hand, averages by arithmetic, answers on disk, and a submission for hidden answers."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.axes
import pytest

from panda_jax.errors import InputError
from panda_jax.evaluation.exam import Exam, sampled
from panda_jax.evaluation.prompts import PROTOCOLS
from panda_jax.evaluation.questions import Question
from panda_jax.evaluation.report import Row, Sitting, columns, plot_scores, publish, tables
from panda_jax.evaluation.results import Answers
from panda_jax.evaluation.tasks import TASKS


def exam_of(task: str, protocol: str, answers: list[int | None], subjects: list[str] | None = None) -> Exam:
    subjects = subjects or [""] * len(answers)
    questions = tuple(
        Question(str(i), "文", "问？", ("甲", "乙乙", "丙", "丁"), answer, subject)
        for i, (answer, subject) in enumerate(zip(answers, subjects, strict=True))
    )
    return Exam(TASKS[task], PROTOCOLS[protocol], "test", 0, questions, dict.fromkeys(subjects, ()), ())


def chosen(exam: Exam, predictions: list[int]) -> Sitting:
    """Answer with likelihoods of -1 at the prediction and -4 elsewhere; option 1 has two characters."""
    records = []
    for index, prediction in enumerate(predictions):
        scores = [-1.0 if option == prediction else -4.0 for option in range(4)]
        record = {"index": index, "loglikelihoods": scores, "lengths": [1, 2, 1, 1], "truncated": index == 3}
        records.append(exam.judge(record))
    return Sitting(exam, records)


def test_a_table_like_table_4():
    """Gold 0, 1, 2, 3; the first model answers 0, 1, 0, 0 (2 of 4), the second 0, 1, 2, 3.

    Wilson's interval of 2 of 4 is 0.5 ± 0.35 (z² = 3.8415: 0.98 sqrt(0.0625 + 0.0600) / 1.9604), of 4 of 4 it is
    (0.5101, 1). McNemar: two disagreements, both for the second: p = 2 / 2² = 0.5.
    """
    exam = exam_of("c3-d", "likelihood", [0, 1, 2, 3])
    rows = [
        Row("model step 10", 10, {("c3-d", "likelihood"): chosen(exam, [0, 1, 0, 0])}),
        Row("model step 20", 20, {("c3-d", "likelihood"): chosen(exam, [0, 1, 2, 3])}),
    ]
    drawn = """\
### protocol likelihood, version 1: C3-d test 0-shot

| model          |         C3-d |    C3-d norm |
|----------------|-------------:|-------------:|
| model step 10  |  50.00 ±35.0 |  50.00 ±35.0 |
| model step 20  | 100.00 ±24.5 | 100.00 ±24.5 |
| random         |        25.00 |        25.00 |
| one letter     |    25.00 (A) |    25.00 (A) |
| longest option |        25.00 |        25.00 |
"""
    text = tables(rows)
    lines = text.splitlines()
    assert text.startswith(drawn)
    # Bonett and Price: p = 1/6, q = 3/6, 1/3 ± 1.96 sqrt((2/3 - 1/9) / 6) = 0.333 ± 0.596.
    assert "| model step 20       | +50.00 (-26.3 to +93.0) p 0.5 | +50.00 (-26.3 to +93.0) p 0.5 |" in lines
    assert "| minus model step 10 |                          C3-d |                     C3-d norm |" in lines
    assert lines.count("- model step 20, c3-d: prompts cut, beyond the context at their beginning: 1") == 1


def test_the_norm_divides_by_characters():
    """-3, -4, -5, -6 over 1, 2, 1, 0 characters are -3, -2, -5 and never: the first wins, by characters the second."""
    exam = exam_of("c3-d", "likelihood", [1])
    record = {"index": 0, "loglikelihoods": [-3.0, -4.0, -5.0, -6.0], "lengths": [1, 2, 1, 0], "truncated": False}
    judged = exam.judge(record)
    assert (judged["prediction"], judged["prediction_norm"]) == (0, 1)
    assert (judged["correct"], judged["correct_norm"]) == (False, True)
    assert exam.judge(record | {"loglikelihoods": [-3.0, -3.0, -3.0, -3.0]})["prediction"] == 0


def test_what_stands_behind_the_end_counts_in_pandas_own_protocol_alone():
    """Its published config names no end-of-sequence token, so that the letter behind one is found."""
    record = {"index": 0, "continuation": "不知道 B", "continuation_to_eos": "不知道", "truncated": False}
    found = {name: exam_of("c3-d", name, [1]).judge(record) for name in ("panda", "panda-eos", "panda-strict")}
    assert {name: judged["prediction"] for name, judged in found.items()} == {
        "panda": 1, "panda-eos": None, "panda-strict": None,
    }  # fmt: skip
    assert [judged["correct"] for judged in found.values()] == [True, False, False]


def test_subjects_are_averaged_both_ways():
    """Logic 1 of 2, law 1 of 1: each question the same 66.67, each subject the same (50 + 100) / 2."""
    exam = exam_of("ceval", "likelihood", [0, 0, 0], ["logic", "logic", "law"])
    found = chosen(exam, [0, 2, 0]).summary()
    assert (found["micro"], found["macro"]) == (pytest.approx(2 / 3), 0.75)
    assert found["by_subject"] == {"logic": 0.5, "law": 1.0}
    text = tables([Row("m", None, {("ceval", "likelihood"): chosen(exam, [0, 2, 0])})])
    assert "- m, ceval: 75.00 as the mean over 2 subjects" in text


def test_hidden_answers_become_a_submission(tmp_path):
    exam = exam_of("ceval", "likelihood", [None, None], ["logic", "law"])
    said: list[str] = []
    publish([Row("m", None, {("ceval", "likelihood"): chosen(exam, [3, 1])})], tmp_path, said.append)
    submission = tmp_path / "m" / "ceval-likelihood-submission.json"
    assert json.loads(submission.read_text("utf-8")) == {"logic": {"0": "D"}, "law": {"1": "B"}}
    assert f"submit {submission}" in said[0]


def test_a_figure_needs_two_steps(tmp_path):
    exam = exam_of("c3-d", "likelihood", [0, 1])
    rows = [Row(f"m step {step}", step, {("c3-d", "likelihood"): chosen(exam, [0, 2])}) for step in (1, 2)]
    assert plot_scores(rows[:1], tmp_path / "scores.png") is None
    assert plot_scores(rows, tmp_path / "scores.png") == tmp_path / "scores.png"
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_sample_is_drawn_once():
    exam = exam_of("c3-d", "likelihood", [0] * 50)
    first, again, other = (sampled(exam, 10, seed).questions for seed in (1, 1, 2))
    assert first == again != other and len(first) == 10
    assert [int(question.id) for question in first] == sorted(int(question.id) for question in first)
    assert sampled(exam, 80, 1).questions == exam.questions


def test_answers_are_kept_and_damage_is_named(tmp_path):
    identity = {"task": "c3-d", "kind": "likelihood", "num_questions": 3}
    answers = Answers(tmp_path, identity)
    answers.open()
    answers.add({"index": 2})
    answers.add({"index": 0})
    assert Answers(tmp_path, identity).missing() == [1]
    assert Answers(tmp_path, identity).in_order() == [{"index": 0}, {"index": 2}]
    assert Answers(tmp_path, identity | {"num_questions": 4}).missing() == [0, 1, 2, 3]
    answers.close()
    whole = answers.path.read_bytes()
    answers.path.write_bytes(whole[:20])
    cut = Answers(tmp_path, identity)
    assert cut.missing() == [0, 1, 2]
    cut.open()
    cut.add({"index": 1})
    cut.close()
    assert Answers(tmp_path, identity).missing() == [0, 2]
    answers.path.write_bytes(whole.replace(b'{"index": 2}', b'{"index": '))
    with pytest.raises(InputError, match=rf"{answers.path}:2: damaged .*delete the file"):
        Answers(tmp_path, identity)


def test_answers_have_one_writer_at_a_time(tmp_path):
    """Who reads meanwhile changes nothing, not even a line half written; who waits finds what the first wrote."""
    identity = {"task": "c3-d", "kind": "likelihood", "num_questions": 3}
    first, second = Answers(tmp_path, identity), Answers(tmp_path, identity)
    first.open()
    first.add({"index": 0})
    with first.path.open("ab") as file:
        file.write(b'{"index": 1')
    half = first.path.read_bytes()
    with pytest.raises(InputError, match="another evaluation is writing these answers; wait for it"):
        second.open()
    assert Answers(tmp_path, identity).missing() == [1, 2]
    assert first.path.read_bytes() == half
    first.close()
    assert second.missing() == [0, 1, 2]
    second.open()
    assert second.missing() == [1, 2]
    second.add({"index": 2})
    second.close()
    assert Answers(tmp_path, identity).in_order() == [{"index": 0}, {"index": 2}]


def test_an_answer_that_is_hidden_does_not_count_in_its_subject():
    """Of logic's two questions one has no public answer; law's one is right: 1 of 2, and macro (0 + 1) / 2."""
    exam = exam_of("ceval", "likelihood", [0, None, 1], ["logic", "logic", "law"])
    summary = chosen(exam, [3, 0, 1]).summary()
    assert (summary["micro"], summary["macro"]) == (0.5, 0.5)
    assert summary["by_subject"] == {"logic": 0.0, "law": 1.0}


def test_every_column_is_in_the_figure(tmp_path, monkeypatch):
    """Nine tasks of the likelihood protocol are nine lines, one marker more than there are."""
    names = [name for name in TASKS if name in PROTOCOLS["likelihood"].wordings]
    sittings = {(name, "likelihood"): chosen(exam_of(name, "likelihood", [0, 1, 2, 3]), [0, 1, 0, 0]) for name in names}
    rows = [Row(f"model step {step}", step, sittings) for step in (10, 20)]
    drawn: list[str] = []
    errorbar = matplotlib.axes.Axes.errorbar
    monkeypatch.setattr(
        matplotlib.axes.Axes, "errorbar", lambda self, *a, **k: drawn.append(k["label"]) or errorbar(self, *a, **k)
    )
    assert plot_scores(rows, tmp_path / "scores.png")
    assert len(drawn) == len(set(drawn)) == len(columns(rows, "likelihood")) > 8


def test_two_models_of_one_name_are_told_apart_by_their_weights():
    exam = exam_of("c3-d", "likelihood", [0, 1])
    one, other = exam.identity("a" * 64, "float32"), exam.identity("b" * 64, "float32")
    assert one != other
    changed = exam_of("c3-d", "likelihood", [0, 2]).identity("a" * 64, "float32")
    assert changed["questions_sha256"] != one["questions_sha256"]
    strict = exam_of("c3-d", "panda-strict", [0, 1]).identity("a" * 64, "float32")
    assert strict == exam_of("c3-d", "panda", [0, 1]).identity("a" * 64, "float32") != one
    assert Path(Answers(Path("x"), one).path).name != Path(Answers(Path("x"), other).path).name

"""Tasks scored while a run trains, and by the sweep over its checkpoints: the same scores, whoever computes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
from test_processes import start_processes, start_trainings

# Several processes, several times: on busy cores that takes minutes.
pytestmark = [pytest.mark.whole_run, pytest.mark.timeout(900)]


def write_exam(folder: Path) -> Path:
    """Write C3-d's test file: the corpus' own instructions as questions, the right answer among three."""
    pairs = json.loads((folder / "pairs.json").read_text("utf-8"))[:30]
    answers = [pair["output"] for pair in pairs]
    items = []
    for number, pair in enumerate(pairs):
        options = sorted({pair["output"], answers[number - 1], answers[number - 2]})
        asked = {"question": pair["instruction"], "choice": options, "answer": pair["output"]}
        items.append([["一问一答。"], [asked], f"{number}"])
    exams = folder / "exams"
    exams.mkdir()
    (exams / "c3-d-test.json").write_text(json.dumps(items, ensure_ascii=False), "utf-8")
    return exams


def score_lines(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {line["step"]: line["c3-d/likelihood"] for line in lines if "c3-d/likelihood" in line}


def test_a_run_scores_its_tasks_and_the_sweep_agrees(tmp_path):
    """At steps 0, 8, 16 and at the end, 20; one process with 2 devices and two with one each, to the same scores."""
    tiny_run.write_corpora(tmp_path)
    exams = write_exam(tmp_path)
    settings = {"mesh": {"data": 2}, "checkpoint": {"steps": [8, 16]}}
    settings["eval"] = {"tasks": ["c3-d"], "data": str(exams), "every_steps": 8}
    config = tiny_run.write_config(tmp_path, **settings, log={"runs_dir": str(tmp_path / "one"), "tensorboard": True})
    output = tiny_run.finish(tiny_run.start(config, num_devices=2))
    assert "right answers after step 20, %: C3-d likelihood " in output
    scores = score_lines(tmp_path / "one" / "tiny")
    assert list(scores) == [0, 8, 16, 20]

    many = tiny_run.write_config(tmp_path, **settings, log={"runs_dir": str(tmp_path / "many")})
    for process in start_trainings(many, 2, 1):
        tiny_run.finish(process)
    assert score_lines(tmp_path / "many" / "tiny") == scores

    sweep = ["-m", "panda_jax.evaluate", "--checkpoint", str(tmp_path / "one" / "tiny"), "--steps", "all"]
    sweep += ["--tasks", "c3-d", "--data", str(exams), "--output"]
    printed = tiny_run.finish(tiny_run.start_python(*sweep, str(tmp_path / "sweep")))
    for step in (8, 16, 20):
        found = json.loads((tmp_path / "sweep" / f"tiny-step-{step}" / "c3-d-likelihood.json").read_text("utf-8"))
        assert found["acc"] == scores[step]
        assert f"| tiny step {step} " in printed
    assert (tmp_path / "sweep" / "scores.png").stat().st_size > 10_000
    assert "| minus tiny step 8 |" in printed

    outputs = [tiny_run.finish(process) for process in start_processes(2, 1, *sweep, str(tmp_path / "two"))]
    assert "tables.md" in outputs[0] and "tables.md" not in outputs[1]
    for step in (8, 16, 20):
        one, two = (
            json.loads((tmp_path / place / f"tiny-step-{step}" / "c3-d-likelihood.json").read_text("utf-8"))
            for place in ("sweep", "two")
        )
        assert [record["prediction"] for record in one["questions"]] == [
            record["prediction"] for record in two["questions"]
        ]
        for first, second in zip(one["questions"], two["questions"], strict=True):
            assert first["loglikelihoods"] == pytest.approx(second["loglikelihoods"], abs=1e-4)

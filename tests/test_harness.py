"""Scores against lm-evaluation-harness on the exported model, and the harness running on our checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch

from convert import hf
from panda_jax.config import Compute, Mesh
from panda_jax.evaluation.likelihood import Scorer
from panda_jax.evaluation.prompts import find_protocol
from panda_jax.evaluation.questions import Question, read_c3, read_ceval, read_logiqa2
from panda_jax.harness import model_class
from panda_jax.training.load import load

pytestmark = pytest.mark.whole_run

REPOSITORY = Path(__file__).resolve().parent.parent
# Shorter than some prompts, so that truncation is compared as well.
SIZE = foreign.Size(48, 6, 2, 132, {"multiple_of": 44}, vocab_size=32000, context_length=640)
NUM_QUESTIONS = 7

# The prompts as PROTOCOLS.md §5.3 states them, written for the harness.
LISTED = "{% for option in options %}{{ 'ABCDE'[loop.index0] }}. {{ option }}\n{% endfor %}"
LETTERS = '{{ "ABCDE"[:(options | length)] | list }}'
PASSAGE = {"doc_to_text": "Passage: {{context}}\nQuestion: {{question}}\n" + LISTED + "Answer:"}
ARTICLE = {"doc_to_text": "文章：{{context}}\n问题：{{question}}\n答案：", "target_delimiter": ""}
EXAM = {"doc_to_text": "{{question.strip()}}\n" + LISTED + "答案：", "doc_to_choice": LETTERS}
# name: (our task, its file, our reader, subject, what the yaml adds)
TASKS: dict[str, tuple[str, str, Any, str, dict[str, str]]] = {
    "zh": ("logiqa2", "logiqa2/test_zh.txt", read_logiqa2, "", PASSAGE),
    "en": ("logiqa2-en", "", None, "", PASSAGE),
    "c3": ("c3-m", "c3/c3-m-test.json", read_c3, "", ARTICLE),
    "ceval": (
        "ceval", "ceval/dev/computer_network_dev.csv", read_ceval, "computer_network",
        EXAM | {"description": "以下是中国关于计算机网络的单项选择题，请选出其中的正确答案。\n\n"},
    ),
    "cmmlu": (
        "cmmlu", "ceval/dev/clinical_medicine_dev.csv", read_ceval, "arts",
        EXAM | {"description": "以下是关于艺术学的单项选择题，请直接给出正确答案的选项。\n\n"},
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Folders:
    weights: Path
    exported: Path
    tasks: Path


@pytest.fixture(scope="module")
def offline_harness() -> Any:
    """lm-evaluation-harness, kept from the network; skipped where it is not installed."""
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[lm-eval]'")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Folders:
    """A random model with LLaMA's tokenizer: ours, and exported by the converter; and room for tasks."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = (shared_data / "tokenizers" / "llama-32000.model").read_bytes()
    source = foreign.write_hf(folder / "source", SIZE, foreign.random_state(SIZE, torch.float32), tokenizer)
    foreign.done(hf, "import", "--input", source, "--output", folder / "weights")
    foreign.done(hf, "export", "--input", folder / "weights", "--output", folder / "exported")
    (folder / "tasks").mkdir()
    return Folders(folder / "weights", folder / "exported", folder / "tasks")


def questions_of(name: str, shared_data: Path) -> tuple[list[Question], list[Question]]:
    """Return what is asked, every number of options among it, and five examples."""
    _, file, reader, subject, _ = TASKS[name]
    if name == "en":
        return english_questions(8), english_questions(13)[8:]
    every = list(reader(shared_data / "eval" / file, subject))
    if len(every) == 5:  # C-Eval's dev split: five questions, which stand for both
        return every, every
    by_count = {len(question.options): question for question in every[5 + NUM_QUESTIONS :]}
    return every[5 : 5 + NUM_QUESTIONS] + list(by_count.values()), every[:5]


def english_questions(count: int) -> list[Question]:
    """Return questions of our own, four options each: the English file is not among the shared data."""
    people = ["Ann", "Bob", "Cy", "Dora"]
    return [
        Question(
            id=str(number),
            context=f"{people[number % 4]} is older than {people[(number + 1) % 4]}. " * (1 + number % 3)
            + "Nobody else came.",
            question=f"Who is the youngest of the {number + 2} guests? ",
            options=tuple(f"{name} is{' not' * (place % 2)} the youngest." for place, name in enumerate(people)),
            answer=(number + 1) % 4,
            subject="",
        )
        for number in range(count)
    ]


def write_task(folder: Path, name: str, asked: Sequence[Question], examples: Sequence[Question], more: dict) -> None:
    """Write a task of the harness: its data and its yaml, which is JSON."""
    for split, questions in (("test", asked), ("dev", examples)):
        lines = (json.dumps(dataclasses.asdict(question), ensure_ascii=False) for question in questions)
        (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines), "utf-8")
    task = {
        "task": f"own_{name}", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {s: str(folder / f"{name}-{s}.jsonl") for s in ("test", "dev")}},
        "test_split": "test", "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice", "doc_to_choice": "options", "doc_to_target": "answer",
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task | more, ensure_ascii=False), "utf-8")


def run_harness(tasks: list[str], folder: Path, shots: int | None, **model: Any) -> dict[str, Any]:
    evaluate: Any = import_module("lm_eval").simple_evaluate
    manager = import_module("lm_eval.tasks").TaskManager(include_path=str(folder), include_defaults=False)
    found = evaluate(
        tasks=tasks, num_fewshot=shots, log_samples=True, bootstrap_iters=0,
        task_manager=manager, **model,
    )  # fmt: skip
    assert found is not None
    return found


def hf_backend(folders: Folders) -> dict[str, Any]:
    arguments = {"pretrained": str(folders.exported), "dtype": "float32"}
    return {"model": "hf", "model_args": arguments, "device": "cpu", "batch_size": 4}


def values_of(sample: dict[str, Any]) -> list[float]:
    return [float(response[0][0]) for response in sample["resps"]]


@pytest.mark.parametrize("shots", [0, 5])
def test_scores_equal_the_harness(offline_harness: Any, folders: Folders, shared_data: Path, shots: int) -> None:
    compute = Compute(dtype="float32", compilation_cache_dir=None)
    loaded = load(folders.weights, compute, Mesh(), folders.tasks, print)
    scorer = Scorer(loaded.model, loaded.parameters, compute, loaded.mesh, loaded.tokenizer)
    questions = {name: questions_of(name, shared_data) for name in TASKS}
    assert {len(question.options) for question in questions["c3"][0]} == {2, 3, 4}
    for name, (asked, examples) in questions.items():
        write_task(folders.tasks, name, asked, examples, TASKS[name][4])
    theirs = run_harness([f"own_{name}" for name in TASKS], folders.tasks, shots, **hf_backend(folders))
    num_truncated = 0
    for name, (asked, examples) in questions.items():
        task, _, _, subject, _ = TASKS[name]
        samples = sorted(theirs["samples"][f"own_{name}"], key=lambda sample: sample["doc_id"])
        protocol = find_protocol("likelihood")
        requests = [
            protocol.request(task, dataclasses.replace(question, subject=subject), examples[:shots])
            for question in asked
        ]
        scores = dict(scorer.score(requests))
        num_truncated += sum(one.num_truncated for one in scores.values())
        right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
        for number, (question, request, sample) in enumerate(zip(asked, requests, samples, strict=True)):
            prompts = [(argument[0], argument[1]) for argument in sample["arguments"]]
            assert [(request.context, ending) for ending in request.continuations] == prompts
            own = np.array(scores[number].loglikelihoods)
            np.testing.assert_allclose(own, values_of(sample), rtol=0, atol=1e-3)
            assert list(scores[number].is_greedy) == [response[0][1] for response in sample["resps"]]
            right["acc"].append(int(own.argmax()) == question.answer)
            right["acc_norm"].append(int((own / np.array(request.lengths)).argmax()) == question.answer)
            for metric, found in right.items():
                assert found[-1] == sample[metric]
        for metric, found in right.items():
            assert float(np.mean(found)) == theirs["results"][f"own_{name}"][f"{metric},none"]
    assert num_truncated > 0


def test_the_harness_runs_on_our_checkpoint(offline_harness: Any, folders: Folders, shared_data: Path) -> None:
    """Four devices in two axes; probabilities, whole texts and generation as from the Hugging Face backend."""
    asked, examples = questions_of("c3", shared_data)
    write_task(folders.tasks, "choice", asked, examples, ARTICLE)
    whole = {
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "output_type": "loglikelihood_rolling",
        "doc_to_choice": None,
    }
    write_task(folders.tasks, "whole", asked, examples, whole | {"metric_list": [{"metric": "bits_per_byte"}]})
    write = {
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{question}}",
        "output_type": "generate_until",
        "doc_to_choice": None,
    }
    write |= {"metric_list": [{"metric": "exact_match"}]}
    settings = {"until": ["。", "e"], "max_gen_toks": 24}
    write_task(folders.tasks, "write", asked, examples, write | {"generation_kwargs": settings})
    ours = model_class()(str(folders.weights), dtype="float32", data=2, fsdp=2, tensor=2, cache=str(folders.tasks))
    tasks = ["own_choice", "own_whole", "own_write"]
    found = run_harness(tasks, folders.tasks, None, model=ours)
    theirs = run_harness(tasks, folders.tasks, None, **hf_backend(folders))
    for sample, other in zip(found["samples"]["own_choice"], theirs["samples"]["own_choice"], strict=True):
        np.testing.assert_allclose(values_of(sample), values_of(other), rtol=0, atol=1e-3)
    for sample, other in zip(found["samples"]["own_whole"], theirs["samples"]["own_whole"], strict=True):
        assert sample["resps"][0][0] == pytest.approx(other["resps"][0][0], rel=1e-6)
    written, expected = (
        [sample["resps"][0][0] for sample in result["samples"]["own_write"]] for result in (found, theirs)
    )
    assert written == expected and any(written)
    assert found["results"]["own_choice"]["acc,none"] == theirs["results"]["own_choice"]["acc,none"]


def test_the_command_line_of_the_harness(offline_harness: Any, folders: Folders, shared_data: Path) -> None:
    asked, examples = questions_of("en", shared_data)
    write_task(folders.tasks, "door", asked, examples, PASSAGE)
    arguments = f"checkpoint={folders.weights},dtype=float32,cache={folders.tasks}"
    command = [sys.executable, "-m", "panda_jax.lm_eval", "--model", "panda_jax", "--model_args", arguments]
    command += ["--tasks", "own_door", "--include_path", str(folders.tasks)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "own_door" in done.stdout and "acc_norm" in done.stdout
    command[command.index(arguments)] = f"checkpoint={folders.weights},colour=red"
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "colour is unknown" in done.stderr and "Traceback" not in done.stderr

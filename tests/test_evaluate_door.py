"""The evaluate door: scores that can be counted by hand, answers that outlive a kill, clear words for bad input."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
import weights_folder

from panda_jax.command_line import exit_status
from panda_jax.config import Compute, Model
from panda_jax.evaluate import main
from panda_jax.evaluation.candidate import Candidate
from panda_jax.evaluation.exam import set_exam
from panda_jax.text.tokenizer import Tokenizer

PASSAGE = "小明早上去公园跑步，下午在家里看书，晚上和朋友一起吃饭。"
# (question, options, right answer): options of different lengths, one question of two options and one of three.
QUESTIONS = [
    ("小明早上做什么？", ["看书", "去公园跑步", "和朋友吃饭", "睡觉"], "去公园跑步"),
    ("小明在哪里看书？", ["家里", "公园里的长椅上"], "家里"),
    ("小明和谁吃饭？", ["一个人", "朋友", "老师和同学"], "朋友"),
    ("下午呢？", ["早上去公园跑步", "看书", "吃", "在家里睡觉"], "看书"),
    ("他什么时候吃饭？", ["晚上", "早上", "下午", "明天早上去公园的时候"], "晚上"),
    ("小明去了哪里跑步？", ["公园", "家里", "朋友家", "晚上"], "公园"),
]


@pytest.fixture(scope="module")
def tokenizer_model() -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PASSAGE, *(f"{asked} {' '.join(options)}" for asked, options, _ in QUESTIONS)] * 4),
        model_writer=written, model_type="bpe", vocab_size=380, byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return written.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """C3's files in their own format: two passages of three questions."""
    folder = tmp_path_factory.mktemp("data")
    asked = [{"question": q, "choice": options, "answer": answer} for q, options, answer in QUESTIONS]
    passages = [[["甲：" + PASSAGE, "乙：好。"], asked[:3], "p-0"], [[PASSAGE], asked[3:], "p-1"]]
    for split in ("test", "dev"):
        (folder / f"c3-d-{split}.json").write_text(json.dumps(passages, ensure_ascii=False), "utf-8")
    return folder


def model_folder(folder: Path, tokenizer_model: bytes, seed: int | None) -> Path:
    """Write a random model, or for None one whose every next token is as likely as any other."""
    size = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model).vocab_size()
    model = Model(
        vocab_size=size, dim=24, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=40, norm_eps=1e-5,
        context_length=160,
    )  # fmt: skip
    tensors = weights_folder.random_tensors(model, np.float32, seed or 0)
    tensors = {name: values * np.float32(0.1 if values.ndim > 1 else 1) for name, values in tensors.items()}
    if seed is None:
        tensors["lm_head"][:] = 0
    return weights_folder.write(folder, replace(model), tensors, tokenizer_model)


@pytest.fixture(scope="module")
def uniform(tmp_path_factory, tokenizer_model) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "uniform", tokenizer_model, None)


def evaluate(*arguments: object) -> int:
    return exit_status(main, [str(argument) for argument in arguments])


def test_a_uniform_model_prefers_the_option_of_fewest_tokens(uniform, data, tmp_path, tokenizer_model, capsys):
    """Every token costs ln V, so a sum is -n ln V; the harness's rule divides it by the option's characters."""
    status = evaluate("--checkpoint", uniform, "--tasks", "c3-d", "--data", data, "--output", tmp_path)
    assert status == 0
    found = json.loads((tmp_path / "uniform" / "c3-d-likelihood.json").read_text("utf-8"))
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    hits, norm_hits = [], []
    for record, (asked, options, answer) in zip(found["questions"], QUESTIONS, strict=True):
        assert record["prompt"].endswith(f"\n问题：{asked}\n答案：")
        before = len(processor.encode(record["prompt"]))
        costs = [len(processor.encode(record["prompt"] + option)) - before for option in options]
        expected = [-cost * math.log(processor.vocab_size()) for cost in costs]
        np.testing.assert_allclose(record["loglikelihoods"], expected, atol=1e-4)
        per_character = [cost / len(option) for cost, option in zip(costs, options, strict=True)]
        hits.append(options[costs.index(min(costs))] == answer)
        norm_hits.append(options[int(np.argmin(np.round(per_character, 9)))] == answer)
        assert record["correct"] == hits[-1]
    assert found["acc"] == sum(hits) / 6 and 0 < sum(hits) < 6
    assert found["acc_norm"] == pytest.approx(sum(norm_hits) / 6)
    printed = capsys.readouterr().out
    # 2, 3 and four times 4 options: (1/2 + 1/3 + 4/4) / 6; B, A, B, B, A, A are right.
    assert "warning" in printed and "6 questions; the published files have 1890" in printed
    assert "30.56" in printed and "50.00 (A)" in printed
    assert (tmp_path / "tables.md").read_text("utf-8").strip() in printed


def test_answers_outlive_a_kill(uniform, data, tmp_path, tokenizer_model, capsys):
    """A file cut within its fourth answer keeps three, and the rerun gives the same scores to the last byte."""
    random = model_folder(tmp_path / "random", tokenizer_model, 3)
    ask = ("--checkpoint", random, uniform, "--tasks", "c3-d", "--data", data, "--protocol", "likelihood,panda")
    assert evaluate(*ask, "--output", tmp_path / "whole") == 0
    assert evaluate(*ask, "--output", tmp_path / "cut") == 0
    kept = {}
    for path in (tmp_path / "cut" / "answers").iterdir():
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 7
        kept[path] = b"".join(lines[:4])
        path.write_bytes(kept[path] + lines[4][:9])
    (tmp_path / "cut" / "random" / "c3-d-likelihood.json").unlink()
    capsys.readouterr()
    assert evaluate(*ask, "--output", tmp_path / "cut") == 0
    assert "random: 6 questions to ask" in capsys.readouterr().out
    for path, lines in kept.items():
        # What was there stays, and the three that were missing came behind it, once each.
        assert path.read_bytes().startswith(lines) and path.read_bytes().count(b"\n") == 7
    for model in ("random", "uniform"):
        for name in ("c3-d-likelihood.json", "c3-d-panda.json"):
            whole, cut = ((tmp_path / place / model / name).read_bytes() for place in ("whole", "cut"))
            assert whole == cut
    capsys.readouterr()
    assert evaluate(*ask, "--output", tmp_path / "cut") == 0
    assert "questions to ask" not in capsys.readouterr().out


def test_two_extractors_read_the_same_answers(uniform, data, tmp_path, capsys, monkeypatch):
    """The likeliest of equals is id 0, `<unk>`, which is no letter: nothing is right, and the table says why."""
    asked, answer = [], Candidate.answer
    monkeypatch.setattr(
        Candidate, "answer", lambda self, exam, indices: (asked.extend(indices), answer(self, exam, indices))[1]
    )
    ask = ("--checkpoint", uniform, "--tasks", "c3-d", "--data", data, "--output", tmp_path, "--limit", 3)
    assert evaluate(*ask, "--protocol", "panda,panda-strict") == 0
    (answers,) = (tmp_path / "answers").iterdir()
    assert answers.read_bytes().count(b"\n") == 4, "the identity and three answers"
    assert asked == [0, 1, 2]
    printed = capsys.readouterr().out
    assert "uniform, c3-d: no letter in 100.0 % of the answers" in printed
    assert "uniform: 3 questions to ask" in printed
    found = json.loads((tmp_path / "uniform" / "c3-d-panda.json").read_text("utf-8"))
    assert (found["acc"], found["unread"], found["num_questions"]) == (0.0, 1.0, 3)


def test_prompts_beyond_the_context_are_cut_on_the_left_and_counted(uniform, data, tmp_path, capsys):
    long = [[[PASSAGE * 60], [{"question": "问", "choice": ["是", "不是"], "answer": "是"}], "x"]]
    (tmp_path / "c3-d-test.json").write_text(json.dumps(long, ensure_ascii=False), "utf-8")
    ask = ("--checkpoint", uniform, "--tasks", "c3-d", "--data", tmp_path, "--output", tmp_path / "out")
    assert evaluate(*ask, "--protocol", "likelihood,panda") == 0
    printed = capsys.readouterr().out
    assert "- uniform, c3-d: prompts cut, beyond the context at their beginning: 1\n" in printed
    assert (
        "prompts cut, beyond 2,048 tokens at their end, as published, or beyond the context at their beginning: 1"
        in printed
    )


def test_a_written_answer_sees_the_end_of_a_prompt_beyond_the_context(data, tokenizer_model):
    """128 of context less 64 new tokens leave BOS and the last 63; beyond 2,048 the end goes first, as published."""
    tokenizer = Tokenizer(tokenizer_model, "tokenizer.model")
    exam = set_exam(data, "c3-d", "panda", "test", None, None)
    text = exam.prompt(0) * 40
    ids = tokenizer.encode(text)
    assert len(ids) > 2500
    for context, expected in ((128, ids[2047 - 63 : 2047]), (4096, ids[:2047])):
        model = Model(
            vocab_size=tokenizer.vocab_size, dim=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_dim=8, norm_eps=1e-5,
            context_length=context,
        )  # fmt: skip
        candidate = Candidate(model, {}, Compute(), jax.make_mesh((1,), ("data",)), tokenizer)
        assert candidate._cut(exam, text) == ([tokenizer.bos_id, *expected], True)
    short = tokenizer.encode("问")
    assert candidate._cut(exam, "问") == ([tokenizer.bos_id, *short], False)


def test_bad_input_is_told_in_one_line(uniform, data, tmp_path, tokenizer_model, capsys):
    bare = model_folder(tmp_path / "bare", tokenizer_model, 1)
    (bare / "tokenizer.model").unlink()
    run = tmp_path / "run"
    (run / "checkpoints" / "5").mkdir(parents=True)
    cases = {
        ("--tasks", "c3-x"): "task: no task is called 'c3-x' (did you mean 'c3-m'?)",
        ("--tasks", "c3-d,c3-d"): "--tasks c3-d,c3-d: expected names with commas between them, each once",
        ("--protocol", "likelyhood"): "did you mean 'likelihood'?",
        ("--split", "train"): "c3-d, split train: 1 of 1 files missing (c3-d-train.json)",
        ("--split", "tset"): "c3-d: no split is called 'tset'; choose one of train, dev, test",
        ("--split", "dev", "--shots", "2"): "the examples of a few-shot prompt are the first questions of 'dev'",
        ("--strict",): "--strict takes the published files alone",
        ("--steps", "7"): "uniform has no checkpoints; give the folder of a run",
        ("--steps", "x", "--checkpoint", run): "--steps x: expected numbers with commas between them, or all",
        ("--steps", "7", "--checkpoint", run): "--steps 7: ",
        ("--steps", "all", "--checkpoint", run): "has no complete checkpoint yet",
        ("--limit", "-1"): "argument --limit: invalid positive value: '-1'",
        ("--limit", "0"): "argument --limit: invalid positive value: '0'",
        ("--checkpoint", tmp_path / "nowhere"): "nowhere: no such folder",
        ("--checkpoint", bare): "bare: has no tokenizer.model",
        ("--checkpoint", uniform, bare): "bare: has no tokenizer.model",
        ("--checkpoint", uniform, uniform): "would both be called 'uniform'; rename one folder",
        ("--checkpoint", data): "no complete checkpoint here",
    }
    for changed, expected in cases.items():
        arguments = {"--checkpoint": (uniform,), "--tasks": ("c3-d",), "--data": (data,), "--output": (tmp_path / "o",)}
        options: dict[str, list[object]] = {name: list(values) for name, values in arguments.items()}
        name = ""
        for word in changed:
            if str(word).startswith("--"):
                name = str(word)
                options[name] = []
            else:
                options[name].append(word)
        status = evaluate(*[word for name, values in options.items() for word in (name, *values)])
        told = capsys.readouterr().err
        assert status == 2 and expected in told and told.count("\n") == 1, (changed, status, told)
    assert not (tmp_path / "o").exists()  # nothing was scored before the last of several models was found wanting

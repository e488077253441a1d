"""The generate door: files, one text, a conversation, and what it refuses, as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
import weights_folder
from spelled_models import singles, spell
from test_parity import write_huggingface
from transformers import LlamaForCausalLM

from panda_jax import generate
from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.whole_run

# 290 ids: <unk>, <s>, </s>, the bytes and the pieces below; every other dimension differs too.
PIECES = [
    ("▁", -1.0),
    ("▁天", -2.0),
    ("天地", -3.0),
    *singles("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁"),
]
MODEL = Model(
    vocab_size=259 + len(PIECES), dim=48, num_layers=3, num_heads=8, num_kv_heads=2, mlp_dim=80, norm_eps=1e-5,
    context_length=72,
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random weights, beside it the same in Hugging Face's form, written by hand."""
    folder = tmp_path_factory.mktemp("weights")
    tensors = {name: 0.3 * value for name, value in weights_folder.random_tensors(MODEL, np.float32).items()}
    (folder / "hf").mkdir()
    write_huggingface(folder / "hf", MODEL, tensors)
    return weights_folder.write(folder / "ours", MODEL, tensors, spell(PIECES))


def arguments(weights: Path, *more: str) -> list[str]:
    cache = str(weights.parent / "cache")
    return ["--checkpoint", str(weights), "--max-new-tokens", "16", "--cache-dir", cache, *more]


def start(weights: Path, *more: str) -> subprocess.Popen[str]:
    return tiny_run.start_python(
        "-m", "panda_jax.generate", *arguments(weights, *more), HOME=str(weights.parent), num_devices=1
    )


def expected_ids(weights: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return what transformers writes greedily behind each, up to </s>."""
    network: Any = LlamaForCausalLM.from_pretrained(weights.parent / "hf", dtype=torch.float32)
    written = []
    for prompt in prompts:
        given = torch.tensor([prompt])
        out = network.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=16, do_sample=False)
        written.append([i for i in out[0, len(prompt) :].tolist() if i != 2])
    return written


def as_read(text: str) -> str:
    """Return what a pipe in text mode makes of it: random weights write every kind of line end."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.whole_run
def test_a_file_of_prompts_is_answered_in_order(weights: Path, tmp_path: Path):
    rows = [{"prompt": "天地 玄黄"}, {"instruction": "宇宙", "input": "洪荒"}, {"prompt": "日"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    tiny_run.finish(
        start(weights, "--prompts", str(tmp_path / "p.jsonl"), "--template", "coig", "--output", str(output))
    )
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    tokenizer = Tokenizer.load(weights / "tokenizer.model")
    prompts = [[1, *tokenizer.encode(text)] for text in ("天地 玄黄", "宇宙\n\n洪荒", "日")]
    assert [line["ids"] for line in lines] == expected_ids(weights, prompts)
    assert [{name: line[name] for name in row} for line, row in zip(lines, rows, strict=True)] == rows
    for line, prompt in zip(lines, prompts, strict=True):
        assert line["logprob"] < 0 and line["stopped"] == (len(line["ids"]) < 16)
        if "prompt" in line:
            assert line["prompt"] + line["text"] == tokenizer.decode(prompt + line["ids"])


@pytest.mark.whole_run
def test_a_text_is_continued_on_screen(weights: Path):
    printed = tiny_run.finish(start(weights, "--prompt", "天地 玄黄"))
    tokenizer = Tokenizer.load(weights / "tokenizer.model")
    prompt = [1, *tokenizer.encode("天地 玄黄")]
    whole = tokenizer.decode(prompt + expected_ids(weights, [prompt])[0])
    assert printed == as_read(whole.removeprefix("天地 玄黄") + "\n")


@pytest.mark.whole_run
def test_a_conversation_ends_with_the_input(weights: Path):
    """Three questions of 12 characters with 16 ids for each answer exceed 72 ids; the third too-long one is refused."""
    question = "宇宙洪荒日月盈昃辰宿列张"
    lines = f"{question}\n\n{question}\n{question * 6}\n{question}\n{question}\n"
    command = [sys.executable, "-m", "panda_jax.generate", *arguments(weights, "--chat", "--template", "coig")]
    variables = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny_run.REPOSITORY), "HOME": str(weights.parent)}
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=variables, timeout=240)
    assert done.returncode == 0, done.stderr
    first, *_ = parts = done.stdout.split("> ")[1:]
    tokenizer = Tokenizer.load(weights / "tokenizer.model")
    prompt = [1, *tokenizer.encode(question)]
    answer = tokenizer.decode(expected_ids(weights, [prompt])[0])
    assert first.rstrip("\n") == as_read(answer).rstrip("\n")
    assert "oldest 1 of its turns left out" in done.stdout
    assert "there is room for 56" in done.stdout
    assert len(parts) == 7, done.stdout  # six lines and the end of the input
    assert "Wording: coig. Ctrl-C ends an answer, Ctrl-D leaves." in done.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "one of the arguments --prompt --prompts --chat is required"),
        (["--prompt", "a", "--chat"], "not allowed with"),
        (["--prompt", "a", "--template", "pnada"], "no template is called 'pnada' .did you mean 'panda'"),
        (["--prompt", "a", "--temperature", "-1"], "temperature: -1.0, expected 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens: 0, expected 1 or more"),
        (["--prompt", "a", "--top-p", "0"], "top_p: 0.0, expected more than 0"),
        (["--prompt", "a", "--output", "."], "--output .: is a folder; give the name of a file"),
    ],
)
def test_arguments_that_mean_nothing(more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are refused before anything is loaded: there is no checkpoint here."""
    monkeypatch.setattr(generate.sharding, "configure_jax", lambda compute: None)
    with pytest.raises(InputError, match=message):
        generate.main(arguments(tmp_path / "absent", *more))


def test_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generate.sharding, "configure_jax", lambda compute: None)
    with pytest.raises(InputError, match="--checkpoint .*absent: no such folder"):
        generate.main(arguments(tmp_path / "absent", "--prompt", "a"))


@pytest.mark.whole_run
def test_refusals_of_a_loaded_model_are_one_line(weights: Path):
    assert "--template: these weights do not say which wording" in tiny_run.finish(start(weights, "--chat"), status=2)
    printed = tiny_run.finish(start(weights, "--prompt", "天" * 70), status=2)
    assert printed.startswith("error: --prompt: 71 ids and --max-new-tokens 16 exceed the model's context of 72")
    assert printed.count("\n") == 1

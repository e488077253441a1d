"""A whole run in miniature: corpora on disk, a config, and the train door in a process of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


def write_corpora(folder: Path) -> None:
    """Write 240 short texts and 120 instructions with answers, both of ragged lengths."""
    generator = random.Random(7)
    sentence = lambda low, high: "".join(generator.choices(WORDS, k=generator.randint(low, high))) + "。"  # noqa: E731
    texts = [{"text": sentence(5, 30)} for _ in range(240)]
    pairs = [{"instruction": sentence(2, 8), "input": "", "output": sentence(2, 12)} for _ in range(120)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    (folder / "pairs.json").write_text(json.dumps(pairs, ensure_ascii=False), "utf-8")


def write_config(folder: Path, **changes: Any) -> Path:
    """Write folder/run.yaml: 20 steps of 8 rows x 40 tokens over two sources; `changes` are merged over it."""
    settings: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "vocab_size": 352, "dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 24,
            "norm_eps": 1e-5, "context_length": 64,
        },
        "tokenizer": {"path": str(folder / "tokenizer.model"), "train_vocab_size": 352},
        "data": {
            "seq_len": 40,
            "cache_dir": str(folder / "cache"),
            "tokenize_workers": 1,
            "sources": [
                {"corpus": "jsonl_text", "path": str(folder / "texts.jsonl"), "epochs": 1.5, "held_out": 8},
                {"corpus": "alpaca", "path": str(folder / "pairs.json"), "epochs": 2},
            ],
        },
        "optimizer": {"learning_rate": 1e-2},
        "train": {"global_batch_size": 8, "max_steps": 20, "log_every_steps": 1, "epochs": 4},
        "checkpoint": {"every_steps": 3},
        "compute": {"dtype": "float32", "compilation_cache_dir": str(folder / "xla")},
        "log": {"runs_dir": str(folder / "runs"), "tensorboard": False},
    }  # fmt: skip
    for name, fields in changes.items():
        settings[name] = settings[name] | fields if isinstance(fields, dict) and name in settings else fields
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings, allow_unicode=True), "utf-8")
    return path


def start(config: Path, *arguments: str, num_devices: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Start the train door in a new process; its output is captured."""
    door = ("-m", "panda_jax.train", "--config", str(config), *arguments)
    return start_python(*door, num_devices=num_devices, cwd=config.parent, **environment)


def start_python(
    *arguments: str, num_devices: int = 1, cwd: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start Python on `arguments` in a new process; its output is captured."""
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices), "PYTHONPATH": str(REPOSITORY),
    } | environment  # fmt: skip
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *arguments], env=variables, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for a started process, check its exit status and return what it printed."""
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"no end in 240 s, killed; it printed:\n{output}") from None
    assert process.returncode == status, output
    return output


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the training lines of a run's metrics, without the speeds that differ from machine to machine."""
    kept = ("step", "tokens_seen", "epoch", "loss", "learning_rate", "gradient_norm", "trained_tokens")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: line[name] for name in kept} for line in lines if "loss" in line]


def saved_arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """Return every array of a checkpoint by name: parameters, optimizer state and progress."""
    from orbax.checkpoint import v1 as ocp

    loaded = ocp.load_checkpointables(str(checkpoint / "state"))
    return {f"{part}/{name}": np.asarray(value) for part, values in loaded.items() for name, value in values.items()}


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Check that two run folders hold, bit for bit, the same metrics and the same state at `step`."""
    assert logged(one) == logged(other)
    first, second = (saved_arrays(run / "checkpoints" / str(step)) for run in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)

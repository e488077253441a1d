"""Scoring multiple-choice questions: panda_jax against lm-evaluation-harness's Hugging Face backend, on this CPU.

    python benchmarks/likelihood.py --data DIR                    # DIR holds eval/ and tokenizers/; about ten minutes
    python benchmarks/likelihood.py --data DIR --questions 40     # a quick look

Both score the option texts of the same C3-m questions with the same model, preset tiny-15m in float32 with random
weights and LLaMA's tokenizer; the harness reads it from the folder that our converter exports. Each side runs in a
process of its own. Ours scores everything twice: `first` holds compilation, `again` does not. The harness takes each of
`--batch-sizes` in turn, and its best one counts. Log-likelihoods are compared as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from panda_jax.config import Compute, Mesh, Model  # noqa: E402  (the benchmark runs from the checkout)
from panda_jax.evaluation.exam import set_exam  # noqa: E402
from panda_jax.evaluation.prompts import ChoiceRequest  # noqa: E402
from panda_jax.presets import PRESETS  # noqa: E402

MODEL = Model(**PRESETS["tiny-15m"])
# Fewer and longer blocks of attention compile faster, which is worth more here than the work they add.
COMPUTE = Compute(dtype="float32", attention_block=256, compilation_cache_dir=None)


def write_model(folder: Path, tokenizer: Path) -> None:
    """Write random weights as a Hugging Face folder, import it, and export it again."""
    import torch
    from safetensors.torch import save_file

    from panda_jax.weights import stored_shapes

    draw = torch.Generator().manual_seed(0)
    names = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "wq": "self_attn.q_proj",
             "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
             "w_gate": "mlp.gate_proj", "w_up": "mlp.up_proj", "w_down": "mlp.down_proj"}  # fmt: skip
    tensors = {}
    for name, shape in stored_shapes(MODEL).items():
        parts = name.split(".")
        known = {"embed": "model.embed_tokens", "norm": "model.norm"}.get(name)
        theirs = known or f"model.layers.{parts[1]}.{names[parts[2]]}"
        is_norm = len(shape) == 1
        tensors[f"{theirs}.weight"] = torch.ones(shape) if is_norm else 0.05 * torch.randn(shape, generator=draw)
    source = folder / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": MODEL.vocab_size,
        "hidden_size": MODEL.dim, "intermediate_size": MODEL.mlp_dim, "num_hidden_layers": MODEL.num_layers,
        "num_attention_heads": MODEL.num_heads, "num_key_value_heads": MODEL.num_kv_heads, "hidden_act": "silu",
        "max_position_embeddings": MODEL.context_length, "rms_norm_eps": MODEL.norm_eps, "rope_theta": MODEL.rope_theta,
        "tie_word_embeddings": MODEL.tie_embeddings, "torch_dtype": "float32",
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    for command, input_name, output_name in (("import", "source", "ours"), ("export", "ours", "theirs")):
        arguments = ["--input", str(folder / input_name), "--output", str(folder / output_name)]
        subprocess.run([sys.executable, "-m", "convert.hf", command, *arguments], cwd=REPOSITORY, check=True)


def timed(score: Callable[[], list[list[float]]], rounds: int) -> dict[str, Any]:
    """Score everything `rounds` times; seconds and processor seconds of the first and the last."""
    seconds, cpu = [], []
    values: list[list[float]] = []
    for _ in range(rounds):
        started, cpu_started = time.perf_counter(), time.process_time()
        values = score()
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - cpu_started)
    return {
        "first_s": seconds[0],
        "again_s": seconds[-1],
        "first_cpu_s": cpu[0],
        "again_cpu_s": cpu[-1],
        "values": values,
    }


def run_panda(folder: Path, requests: list[ChoiceRequest]) -> dict[str, Any]:
    from panda_jax.evaluation.likelihood import Scorer
    from panda_jax.training.load import load

    loaded = load(folder / "ours", COMPUTE, Mesh(), folder, print)
    scorer = Scorer(loaded.model, loaded.parameters, COMPUTE, loaded.mesh, loaded.tokenizer)

    def score() -> list[list[float]]:
        found = dict(scorer.score(requests))
        return [list(found[number].loglikelihoods) for number in range(len(requests))]

    return timed(score, rounds=2)


def run_harness(folder: Path, requests: list[ChoiceRequest], batch_size: str) -> dict[str, Any]:
    size = batch_size if batch_size == "auto" else int(batch_size)
    backend: Any = import_module("lm_eval.models.huggingface").HFLM
    model = backend(
        pretrained=str(folder / "theirs"), dtype="float32", device="cpu", batch_size=size, max_batch_size=64
    )
    asked: Any = [
        SimpleNamespace(args=(one.context, ending), task_name="c3")
        for one in requests for ending in one.continuations
    ]  # fmt: skip

    def score() -> list[list[float]]:
        found = iter(value for value, _ in model.loglikelihood(asked, disable_tqdm=True))
        return [[next(found) for _ in one.continuations] for one in requests]

    return timed(score, rounds=1)  # it compiles nothing


def run_side(side: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", side, "--data", str(folder)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def worker(side: str, folder: Path) -> None:
    requests = [
        ChoiceRequest(one["context"], tuple(one["continuations"]), tuple(one["lengths"]))
        for one in json.loads((folder / "requests.json").read_text())
    ]
    result = run_panda(folder, requests) if side == "panda" else run_harness(folder, requests, side)
    print("\n" + json.dumps(result))


def show(results: dict[str, dict[str, Any]], num_questions: int) -> None:
    base = {key: min(one[key] for side, one in results.items() if side != "panda") for key in ("first_s", "again_s")}
    table = Table(
        "side", "first, s", "again, s", "CPU, s", "questions/s", "again", "ratio", "again", "largest difference"
    )
    for side, one in results.items():
        pairs = zip(one["values"], results["panda"]["values"], strict=True)
        difference = max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs)
        rates = [f"{num_questions / one[key]:.2f}" for key in ("first_s", "again_s")]
        ratios = [f"{base[key] / one[key]:.2f}" for key in ("first_s", "again_s")]
        name = side if side == "panda" else f"harness, batch {side}"
        seconds = [
            f"{one['first_s']:.1f}",
            f"{one['again_s']:.1f}",
            f"{one['first_cpu_s']:.0f}/{one['again_cpu_s']:.0f}",
        ]
        table.add_row(name, *seconds, *rates, *ratios, f"{difference:.1e}")
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with eval/ and tokenizers/llama-32000.model")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--batch-sizes", nargs="+", default=["1", "8", "16", "auto"])
    parser.add_argument("--output", type=Path, help="write the figures and the machine as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options.data)
    exam = set_exam(options.data / "eval", "c3-m", "likelihood", None, None, options.questions)
    requests = [exam.request(number) for number in range(len(exam.questions))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "requests.json").write_text(json.dumps([asdict(request) for request in requests]))
        write_model(folder, options.data / "tokenizers" / "llama-32000.model")
        results = {side: run_side(side, folder) for side in ("panda", *options.batch_sizes)}
    load = os.getloadavg()[0]
    show(results, len(requests))
    machine = f"{os.cpu_count()} cores, load {load:.1f}"
    print(f"{len(requests)} questions of C3-m, model of {MODEL.num_parameters:,} parameters, {machine}")
    if options.output:
        figures = {side: {key: value for key, value in one.items() if key != "values"} for side, one in results.items()}
        options.output.write_text(
            json.dumps({"load": load, "cores": os.cpu_count(), "sides": figures}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()

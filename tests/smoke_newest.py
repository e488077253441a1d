"""A short run of the installed package: every module imports, a sharded step trains, a checkpoint round-trips, and is
exported and imported by the checkout's converters without torch, scored and asked to write.

Run as a script, so that it needs no test runner: `.ci/run` starts it on the newest Python of the machine, with the core
dependencies alone, from a folder that is not the checkout.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """\
name: smoke
model:
  {dim: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, mlp_dim: 48, norm_eps: 1e-5, vocab_size: 400,
    context_length: 64}
tokenizer: {path: smoke.model, train_vocab_size: 400}
data:
  seq_len: 64
  sources: [{corpus: jsonl_text, path: corpus.jsonl, held_out: 8}]
optimizer: {kind: adamw, learning_rate: 1e-3}
train: {global_batch_size: 8, micro_batch_size: 1, max_steps: 3, log_every_steps: 1}
compute: {dtype: float32, compilation_cache_dir: null}
mesh: {data: 2, fsdp: 2, tensor: 2, zero: 3, platform: cpu}
checkpoint: {steps: [2]}
"""


def import_everything() -> int:
    """Import every module of the package and return how many there are."""
    package = importlib.import_module("panda_jax")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "panda_jax.")]
    for name in names:
        importlib.import_module(name)
    return len(names)


def write_corpus(folder: Path) -> None:
    """Write 300 short records of three invented sentence patterns."""
    foods, towns = ("米饭", "面条", "豆腐", "饺子", "白菜"), ("青石镇", "柳河村", "望山城", "白沙湾")
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for n in range(300):
            food, town = foods[n % 5], towns[n % 4]
            text = f"第{n}天，{town}的人们吃{food}。{food}在{town}很常见，Day {n} in {town}: {food}."
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def train(folder: Path, resume: str) -> list[dict[str, float]]:
    """Run the train door on eight simulated devices; return the lines of metrics.jsonl that have a loss."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "panda_jax.train", "--config", "smoke.yaml", "--resume", resume]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"the train door exited with {done.returncode}:\n{done.stdout}")
    lines = (folder / "runs" / "smoke" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def convert(folder: Path) -> str:
    """Export the run's checkpoint, import it again, and return what the two conversions printed."""
    # A link, so that of the checkout nothing but the converters is found before the installed package.
    (folder / "found").mkdir()
    (folder / "found" / "convert").symlink_to(Path(__file__).resolve().parents[1] / "convert")
    environment = os.environ | {"PYTHONPATH": str(folder / "found")}
    printed = ""
    for command, source, target in (("export", "runs/smoke", "exported"), ("import", "exported", "imported")):
        arguments = ["-m", "convert.hf", command, "--input", source, "--output", target]
        done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"convert.hf {command} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        printed += done.stdout
    roots = [json.loads((folder / name / "conversion.json").read_text())["root"] for name in ("exported", "imported")]
    assert roots[0] == roots[1], roots
    return printed


def ask(folder: Path) -> str:
    """Score the run's checkpoint and the imported weights on one question, continue a text, and return the table."""
    question = {"question": "青石镇的人们吃什么？", "choice": ["米饭", "石头和木头"], "answer": "米饭"}
    (folder / "c3-d-test.json").write_text(json.dumps([[["第0天，青石镇的人们吃米饭。"], [question], "1"]]), "utf-8")
    doors = (
        ("evaluate", "--checkpoint", "runs/smoke", "imported", "--tasks", "c3-d", "--data", "."),
        (
            "generate",
            "--checkpoint",
            "imported",
            "--prompt",
            "青石镇",
            "--max-new-tokens",
            "4",
            "--output",
            "text.jsonl",
        ),
    )
    printed = []
    for door, *arguments in doors:
        command = [sys.executable, "-m", f"panda_jax.{door}", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the door {door} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        printed.append(done.stdout)
    found = [json.loads(path.read_text("utf-8")) for path in (folder / "evaluations").glob("*/c3-d-likelihood.json")]
    assert len(found) == 2 and found[0] == found[1], found
    assert len(json.loads((folder / "text.jsonl").read_text("utf-8"))["ids"]) <= 4
    return printed[0]


def main() -> None:
    """Raise or exit with a message for the first thing that does not work."""
    num_modules = import_everything()
    print(f"Python {sys.version.split()[0]}: {num_modules} modules import from {sys.modules['panda_jax'].__file__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        (folder / "smoke.yaml").write_text(RUN, encoding="utf-8")
        straight = {line["step"]: line["loss"] for line in train(folder, "never")}
        assert sorted(straight) == [1, 2, 3], straight
        # ln 400 = 5.99: a fresh model knows nothing.
        assert 5.7 < straight[1] < 6.3, straight
        resumed = train(folder, "2")[-1]
        assert (resumed["step"], resumed["loss"]) == (3, straight[3]), (resumed, straight)
        print(convert(folder), end="")
        print(ask(folder), end="")
    print(
        f"3 steps on 2 x 2 x 2 devices, loss {straight[1]:.3f} to {straight[3]:.3f}; step 3 again after a resume: equal"
    )


if __name__ == "__main__":
    main()

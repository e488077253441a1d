"""The README's chain of conversions on the demo's own model, and the same on real weights where they are present.

    cd FOLDER_OF_THE_DEMO && python CHECKOUT/tests/weights_chain.py

Runs the commands of the README word for word, then asks transformers and the safetensors library, which share no code
with the converters, whether the exported model loads and writes, and whether the restored tensors equal the exported.
The real weights then write and are scored by our own doors, from two formats with one result.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("PANDA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))


def shell(commands: str) -> None:
    """Run lines of shell with this interpreter as `python` and the checkout's packages."""
    search_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    print("\n".join(f"$ {line}" for line in commands.strip().splitlines()), flush=True)
    subprocess.run(["bash", "-euo", "pipefail", "-c", commands], check=True,
                   env=os.environ | {"PATH": places, "PYTHONPATH": search_path})  # fmt: skip


def tensors(folder: Path) -> dict:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_equal(one: Path, other: Path) -> None:
    """Compare two Hugging Face folders tensor by tensor, bit for bit."""
    first, second = tensors(one), tensors(other)
    assert first and first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
    print(f"{other}: {len(first)} tensors equal those of {one}, bit for bit")


def write_on(folder: Path, prompt: str, num_tokens: int) -> str:
    """Return what transformers writes greedily after `prompt`, the prompt included."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def demo() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- chain commands -->\n```sh\n(.*?)```", readme, re.DOTALL)
    assert match, "the README has no chain of conversions"
    shell(match[1])
    check_equal(Path("exported"), Path("restored"))
    print(f"transformers writes on from the exported model: {write_on(Path('exported'), '你好', 24)!r}")


def stories() -> None:
    source = DATA / "weights" / "stories260K-meta"
    if not source.is_dir():
        print(f"skipped: no real weights at {source}; set PANDA_SHARED_DATA")
        return
    shell(f"""
python -m convert.meta import --input {source} --output stories
python -m convert.meta import --input {source}-mp2 --output stories-mp2
python -m convert.hf export --input stories --output stories-hf
python -m convert.hf export --input stories-mp2 --output stories-half --dtype bfloat16
python -m convert.delta make --base stories-hf --target stories-half --output stories-delta
python -m convert.delta apply --base {source} --delta stories-delta --output stories-restored
""")
    check_equal(Path("stories-half"), Path("stories-restored"))
    expected = re.search(r'begins "(Once upon a time.*?)"', (DATA / "README.md").read_text(encoding="utf-8"))
    assert expected, "the data's README no longer quotes the story"
    written = write_on(Path("stories-hf"), "", 60)
    assert written.startswith(expected[1]), written
    print(f"transformers writes the story that the data's README quotes: {expected[1]!r}")
    Path("begin.txt").write_text("Once upon a time\n", "utf-8")
    shell(f"""
python -m panda_jax.generate --checkpoint stories --prompts begin.txt --max-new-tokens 60 --output story.jsonl
python -m panda_jax.evaluate --checkpoint stories stories-hf --tasks logiqa2,c3-d,c3-m --data {DATA / "eval"} \\
    --limit 10 --strict
""")
    story = json.loads(Path("story.jsonl").read_text("utf-8"))
    assert (story["prompt"] + story["text"]).startswith(expected[1]), story
    print("and so do we")
    for task in ("logiqa2", "c3-d", "c3-m"):
        one, other = (
            json.loads(Path("evaluations", model, f"{task}-likelihood.json").read_text("utf-8"))["questions"]
            for model in ("stories", "stories-hf")
        )
        assert len(one) == 10
        assert [question["loglikelihoods"] for question in one] == [question["loglikelihoods"] for question in other]


if __name__ == "__main__":
    demo()
    stories()

"""Hugging Face folders: `python -m convert.hf import --input DIR --output DIR | export --input DIR --output DIR`.

`import` reads safetensors or .bin, whole or sharded, and writes our weights folder; `export` writes safetensors with
every file that transformers, vLLM and llama.cpp look for. Both read everything back and compare hashes and, where
transformers is installed, logits.
"""

from __future__ import annotations

import re
from pathlib import Path

from convert import parity
from convert.card import model_card
from convert.chat_template import chat_template
from convert.conversion import ConversionParser, convert, run, unrounded
from convert.hf_folder import HfFolder, add_tokenizer_argument, read_hf
from convert.native import NativeFolder
from convert.parity import Parity
from convert.sources import open_any
from panda_jax.errors import InputError
from panda_jax.weights import Weights

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}


def main(arguments: list[str]) -> int:
    """Import or export as `arguments` say; returns the exit status."""
    parser = ConversionParser("hf", "LLaMA weights in Hugging Face's layout, to ours and back.")
    parser.exporting.add_argument(
        "--shard-size", default="4GB", metavar="SIZE", help="largest file, such as 500MB or 4GB"
    )
    add_tokenizer_argument(parser.exporting)
    options = parser.parse_args(arguments)
    source: Path = options.input
    if options.command == "import":
        weights = read_hf(source)
        proof = lambda _, ours: compare(source, unrounded(weights, ours))  # noqa: E731
        return convert(weights, NativeFolder(), options, "importing", proof)
    weights = open_any(source)
    card, is_exact = model_card(weights, options.output.name), options.tokenizer == "exact"
    target = HfFolder(shard_bytes(options.shard_size), chat_template(weights), card, is_exact)
    return convert(weights, target, options, "exporting", compare)


def compare(folder: Path, ours: Weights) -> Parity | str:
    """Compare our logits with those that transformers computes from a Hugging Face folder."""
    if not parity.available():
        return "transformers is not installed (pip install 'panda-jax[test]')"
    probe = parity.make_probe(ours.model)
    theirs = parity.transformers_logits(folder, probe)
    return parity.compare(parity.our_logits(ours.tensors, ours.model, probe), theirs, probe, "transformers")


def shard_bytes(text: str) -> int:
    """Return the bytes in a text such as 500MB or 4GB; raise InputError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise InputError(f"--shard-size {text}: expected a number and a unit, such as 500MB or 4GB")
    return int(float(match[1]) * UNITS[match[2].lower()])


if __name__ == "__main__":
    run(main)

"""Hugging Face folders: `python -m convert.hf import --input DIR --output DIR | export --input DIR --output DIR`.

`import` reads safetensors or .bin, whole or sharded, and writes our weights folder; `export` writes safetensors with
every file that transformers, vLLM and llama.cpp look for. Both read everything back and compare hashes and, where
transformers is installed, logits.
"""

from __future__ import annotations

from pathlib import Path

from convert.card import model_card
from convert.chat_template import chat_template
from convert.conversion import ConversionParser, convert, run, unrounded
from convert.hf_folder import HfFolder, add_tokenizer_argument, read_hf
from convert.native import NativeFolder
from convert.parity import Parity
from convert.proofs import against_transformers
from convert.rows import drop_pad
from convert.safetensors_sink import parse_size
from convert.sources import open_any
from panda_jax.weights import Weights


def main(arguments: list[str]) -> int:
    """Import or export as `arguments` say; returns the exit status."""
    parser = ConversionParser("hf", "LLaMA weights in Hugging Face's layout, to ours and back.")
    parser.exporting.add_argument(
        "--shard-size", default="4GB", metavar="SIZE", help="largest file, such as 500MB or 4GB"
    )
    add_tokenizer_argument(parser.exporting)
    parser.importing.add_argument(
        "--drop-pad", action="store_true", help="leave out rows beyond the tokenizer's own pieces"
    )
    options = parser.parse_args(arguments)
    source: Path = options.input
    if options.command == "import":
        weights = read_hf(source)
        kept = drop_pad(weights) if options.drop_pad else weights

        def proof(_: Path, ours: Weights) -> Parity | str:
            # What is cut or rounded on the way is compared before that: the folder that was read has all of it.
            return against_transformers(source, weights if options.drop_pad else unrounded(weights, ours))

        return convert(kept, NativeFolder(), options, "importing", proof)
    weights = open_any(source)
    card, is_exact = model_card(weights, options.output.name), options.tokenizer == "exact"
    target = HfFolder(parse_size(options.shard_size), chat_template(weights), card, is_exact)
    return convert(weights, target, options, "exporting", against_transformers)


if __name__ == "__main__":
    run(main)

"""Meta's LLaMA folders: `python -m convert.meta import --input DIR --output DIR | export --input DIR --output DIR`.

`import` writes our weights folder, `export` Meta's consolidated.NN.pth files. Both read everything back, compare
hashes, and compare our logits with a forward pass in Meta's own convention.
"""

from __future__ import annotations

from pathlib import Path

from convert.conversion import ConversionParser, convert, run, unrounded
from convert.meta_folder import MetaFolder, read_meta
from convert.native import NativeFolder
from convert.proofs import against_meta
from convert.sources import open_any
from panda_jax.errors import InputError


def main(arguments: list[str]) -> int:
    """Import or export as `arguments` say; returns the exit status."""
    parser = ConversionParser("meta", "LLaMA-1 and Llama-2 weights in Meta's layout, to ours and back.")
    parser.exporting.add_argument("--shards", type=int, default=1, metavar="N", help="model-parallel ranks to write")
    options = parser.parse_args(arguments)
    if options.command == "import":
        source: Path = options.input
        weights = read_meta(source)
        proof = lambda _, ours: against_meta(source, unrounded(weights, ours))  # noqa: E731
        return convert(weights, NativeFolder(), options, "importing", proof)
    if options.shards < 1:
        raise InputError(f"--shards {options.shards}: expected 1 or more")
    target = MetaFolder(options.shards)
    return convert(open_any(options.input), target, options, "exporting", against_meta)


if __name__ == "__main__":
    run(main)

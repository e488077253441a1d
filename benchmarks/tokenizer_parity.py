"""How many texts an exported tokenizer cuts or joins differently from SentencePiece, over all text of a folder.

    python benchmarks/tokenizer_parity.py [--model tokenizer.model] [--texts FOLDER] [--every N]

Texts: every string of the JSON files and JSON lines, every cell of the CSV files, every line of any other text file
(with its line break), and each file once more in blocks of 100,000 characters as it is. .gz files are opened.
Each text is encoded by SentencePiece and by AutoTokenizer on the export, with and without BOS, and the ids are decoded
by both. Prints the number of texts, characters and tokens and the mismatches; exit status 1 if there are any.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from convert.tokenizer_files import tokenizer_files
from panda_jax.text.tokenizer import Tokenizer

SHARED = Path(os.environ.get("PANDA_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".md", "")
BLOCK_CHARACTERS = 100_000
BATCH = 512


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Count the texts on which an exported tokenizer differs.")
    parser.add_argument("--model", type=Path, default=SHARED / "tokenizers" / "llama-32000.model")
    parser.add_argument("--texts", type=Path, default=SHARED)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth text (default 1)")
    options = parser.parse_args(arguments)
    oracle, start = Tokenizer.load(options.model), time.perf_counter()
    num_texts = num_characters = num_tokens = num_encode = num_decode = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, content in tokenizer_files(oracle.model_bytes, {}, 2048, None).items():
            (Path(folder) / name).write_bytes(content)
        exported: Any = AutoTokenizer.from_pretrained(folder)
        texts = islice(_texts(options.texts), 0, None, options.every)
        while batch := list(islice(texts, BATCH)):
            expected = [ids.tolist() for ids in oracle.encode_batch(batch)]
            bare, whole = exported(batch, add_special_tokens=False).input_ids, exported(batch).input_ids
            for text, ids, found, with_bos in zip(batch, expected, bare, whole, strict=True):
                if found != ids or with_bos != [oracle.bos_id, *ids]:
                    num_encode += 1
                    print(f"encode: {text[:80]!r}")
                if exported.decode(with_bos, skip_special_tokens=True) != oracle.decode(ids):
                    num_decode += 1
                    print(f"decode: {text[:80]!r}")
            num_texts += len(batch)
            num_characters += sum(map(len, batch))
            num_tokens += sum(map(len, expected))
    print(
        f"{options.model.name}: {num_texts:,} texts, {num_characters:,} characters, {num_tokens:,} tokens: "
        f"{num_encode} encode and {num_decode} decode mismatches ({time.perf_counter() - start:.0f} s)"
    )
    return 1 if num_encode or num_decode or not num_texts else 0


def _texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        content_path = path.with_suffix("") if path.suffix == ".gz" else path
        if not path.is_file() or content_path.suffix not in SUFFIXES:
            continue
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8")
        for first in range(0, len(text), BLOCK_CHARACTERS):
            yield text[first : first + BLOCK_CHARACTERS]
        if content_path.suffix == ".csv":
            yield from (cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row)
            continue
        try:
            yield from _strings(json.loads(text))
        except ValueError:
            for line in text.splitlines(keepends=True):
                try:
                    yield from _strings(json.loads(line))
                except ValueError:
                    yield line


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Deltas: `python -m convert.delta make|apply|verify|inspect`, to release a model whose base cannot be released.

    make    --base DIR --target DIR --output DIR [--format v2|panda|fastchat]
    apply   --base DIR --delta DIR --output DIR [--to hf|ours] [--drop-pad]
    verify  --base DIR --delta DIR
    inspect --delta DIR

A model may be ours, Hugging Face's or Meta's. v2 is lossless and knows its base by hashes; the published forms do not,
and what they restore is reported as unverified.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from convert import delta_folder, known_bases
from convert.card import model_card
from convert.chat_template import chat_template
from convert.conversion import add_output_arguments, convert, run
from convert.delta_folder import DeltaFolder, Ledger, PublishedFolder
from convert.delta_published import RULES
from convert.hf_folder import CONFIG, HfFolder, add_tokenizer_argument, read_config
from convert.native import SHARD_BYTES, NativeFolder
from convert.proofs import against_transformers
from convert.rows import drop_pad
from convert.sources import open_any
from convert.transfer import Target, progress_bar
from panda_jax.command_line import Parser
from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.weights import Weights


def main(arguments: list[str]) -> int:
    """Do what `arguments` say; returns the exit status."""
    options = parser().parse_args(arguments)
    return {"make": make, "apply": apply, "verify": verify, "inspect": inspect}[options.command](options)


def parser() -> Parser:
    result = Parser(prog="python -m convert.delta", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    making = commands.add_parser("make", help="write the differences from --base to --target", allow_abbrev=False)
    applying = commands.add_parser("apply", help="restore a model from its base and a delta", allow_abbrev=False)
    verifying = commands.add_parser("verify", help="check base and delta without writing", allow_abbrev=False)
    inspecting = commands.add_parser("inspect", help="say what a delta holds", allow_abbrev=False)
    for each in (making, applying, verifying):
        each.add_argument(
            "--base", required=True, type=Path, metavar="DIR", help="the model that the delta starts from"
        )
    for each in (applying, verifying, inspecting):
        each.add_argument("--delta", required=True, type=Path, metavar="DIR", help="the delta folder")
    for each in (applying, verifying):
        each.add_argument("--rule", choices=RULES, help="of a published delta (default: the one that it names, or "
                          "else panda for float32 and fastchat for float16)")  # fmt: skip
    making.add_argument("--target", required=True, type=Path, metavar="DIR", help="the model to restore later")
    making.add_argument("--format", choices=("v2", *RULES), default="v2", help="v2: lossless (default)")
    making.add_argument("--inv-freq", action="store_true", help="published forms: add the zero buffers of 2023")
    applying.add_argument("--to", choices=("hf", "ours"), default="hf", help="format of the restored model")
    add_tokenizer_argument(applying)
    applying.add_argument("--drop-pad", action="store_true", help="leave out rows beyond the tokenizer's own pieces")
    for each in (making, applying):
        add_output_arguments(each)
    return result


def make(options: argparse.Namespace) -> int:
    """Write a delta and prove that it restores the target from the base."""
    base, target = open_any(options.base), open_any(options.target)
    is_published = options.format in RULES
    folder = PublishedFolder(base, options.format, options.inv_freq) if is_published else DeltaFolder(base)
    return convert(target, folder, options, "making the delta", lambda *_: "the delta is no model")


def apply(options: argparse.Namespace) -> int:
    """Restore a model; the base is checked before a byte is written, the result tensor by tensor."""
    ledger = Ledger()
    restored, options.dtype = open_restored(options, options.dtype, ledger)
    if options.drop_pad:
        restored = drop_pad(restored)
    target: Target = NativeFolder()
    if options.to == "hf":
        card = model_card(restored, options.output.name)
        target = HfFolder(SHARD_BYTES, chat_template(restored), card, options.tokenizer == "exact")
    status = convert(
        restored, target, options, "applying the delta", against_transformers if options.to == "hf" else no_logits
    )
    if status == 0 and ledger.evidence:
        print(unverified(ledger))
    return status


def open_restored(options: argparse.Namespace, dtype: str, ledger: Ledger) -> tuple[Weights, str]:
    """Return the model that base and delta make, read tensor by tensor, and the dtype still to cast it to.

    Raises InputError for a wrong base of our form; a published delta enters the ledger as it is read.
    """
    base = open_any(options.base)
    if delta_folder.is_ours(options.delta):
        refuse_wrong_base(options.delta, base)
        return delta_folder.applied(options.delta, base), dtype
    # The sum of a published delta is rounded once, to the dtype that is asked for.
    return delta_folder.applied_published(options.delta, base, options.rule, dtype, ledger), "keep"


def no_logits(folder: Path, ours: Weights) -> str:
    return "our own format needs no other implementation"


def refuse_wrong_base(delta: Path, base: Weights) -> None:
    """Raise InputError that names the first tensor that differs, and what the base looks like."""
    with progress_bar("checking the base", sum(tensor.nbytes for tensor in base.tensors.values())) as advance:
        reason = delta_folder.check_base(delta, base, advance)
    if reason:
        wanted = delta_folder.read_index(delta)["base"]
        raise InputError(f"{base.provenance['path']}: not the base of {delta}: {reason}; it looks like "
                         f"{known_bases.describe(base)}, the delta was made from "
                         f"{known_bases.describe_model(wanted['model'])} "
                         f"with root {wanted['root'][:16]}")  # fmt: skip


def unverified(ledger: Ledger) -> str:
    """Return the line on a published delta: what its numbers say, for want of hashes."""
    total = ledger.total()
    line = f"unverified: a published delta has no hashes; differences are {total.rms_ratio:.1%} of the base's weights"
    if not total.inexact:
        return f"{line}, and every sum is exact in the dtype written, as with the right base"
    return f"{line}, and {total.inexact:,} sums were rounded to the dtype written"


def verify(options: argparse.Namespace) -> int:
    """Check a base and a delta against each other without writing anything."""
    ledger = Ledger()
    restored, _ = open_restored(options, "keep", ledger)
    with progress_bar("applying", sum(tensor.nbytes for tensor in restored.tensors.values())) as advance:
        for tensor in restored.tensors.values():
            tensor.read()
            advance(tensor.nbytes)
    count = len(restored.tensors)
    print(unverified(ledger) if ledger.evidence else f"base and delta are right: {count} tensors restored and hashed")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Print what a delta holds."""
    if not delta_folder.is_ours(options.delta):
        settings = read_config(options.delta / CONFIG)
        print(f"{options.delta}: a published delta without hashes, {settings.get('vocab_size')} rows, rule "
              f"{settings.get('delta_rule', 'not named; see --rule')}")  # fmt: skip
        return 0
    index = delta_folder.read_index(options.delta)
    tensors: dict[str, dict[str, Any]] = index["tensors"]
    ops = {op: sum(entry["op"] == op for entry in tensors.values()) for op in ("same", "diff", "rows", "copy")}
    stored = sum(entry["num_bytes"] for entry in tensors.values())
    elements = Model(**index["target"]["model"]).num_parameters
    print(
        f"{options.delta}: lossless delta of {len(tensors)} tensors ({', '.join(f'{n} {op}' for op, n in ops.items())})"
    )
    print(f"  stored  {stored / 1e6:,.1f} MB, {stored / elements:.3f} bytes a parameter")
    for side in ("base", "target"):
        described = known_bases.describe_model(index[side]["model"])
        print(f"  {side:7} {described}, root {index[side]['root']}")
    return 0


if __name__ == "__main__":
    run(main)

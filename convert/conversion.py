"""One conversion from its arguments to its proof: what `import` and `export` of every format have in common."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from convert import transfer
from convert.native import architecture, root_of
from convert.parity import Parity
from convert.transfer import ProofFailed, Target, Written
from panda_jax.command_line import Parser, run_door
from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.weights import NUMPY_NAMES, Weights

Proof = Callable[[Path, Weights], Parity | str]
"""(finished folder, what its reader makes of it) -> the comparison of logits, or why there is none."""


class ConversionParser(Parser):
    """Arguments of a door with the commands `import` and `export`."""

    def __init__(self, door: str, purpose: str) -> None:
        super().__init__(prog=f"python -m convert.{door}", description=purpose, allow_abbrev=False)
        commands = self.add_subparsers(dest="command", required=True, metavar="import | export", parser_class=Parser)
        self.importing = commands.add_parser("import", help=f"{door} folder -> our weights folder", allow_abbrev=False)
        self.exporting = commands.add_parser("export", help=f"any model -> {door} folder", allow_abbrev=False)
        for parser in (self.importing, self.exporting):
            parser.add_argument("--input", required=True, type=Path, metavar="DIR", help="the model to read")
            add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of everything that writes a folder."""
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write; must be empty")
    parser.add_argument(
        "--dtype", choices=("keep", *NUMPY_NAMES), default="keep", help="of the tensors written; keep: as they are read"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the model in --output, at the end and at once"
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the proof; the report says so")


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Call a door's `main` with the command line and exit. No accelerator is needed, nor taken from who is training."""
    jax.config.update("jax_platforms", "cpu")
    transfer.keep_freed_memory()
    run_door(main)


def convert(source: Weights, target: Target, options: argparse.Namespace, title: str, prove_logits: Proof) -> int:
    """Write `source` to options.output in the format of `target`, prove it, and print one line.

    Returns the exit status: 0, or 1 when the proof failed; what was written then lies at `<output>.bad`. Raises
    InputError, and OSError of a full disk, before anything is at options.output.
    """
    entries = transfer.plan_entries(source.tensors, options.dtype)
    output: Path = options.output
    for name in vars(options).keys() & {"input", "base", "target", "delta"}:
        if output.resolve() in getattr(options, name).resolve().parents:
            raise InputError(
                f"--{name} {getattr(options, name)}: lies inside --output {output}, which would be replaced"
            )
    try:
        with transfer.staged(output, options.overwrite) as folder:
            transfer.check_room(folder, transfer.num_bytes(entries))
            sink = target.open(folder, source, entries)
            written = transfer.copy(source.tensors, entries, sink, title)
            report = describe(source, entries, written)
            if not options.no_verify:
                report |= prove(folder, target, source.model, written, prove_logits)
            transfer.write_report(folder, report)
            if report["passed"] is False:
                raise ProofFailed(report["failure"])
    except ProofFailed as failure:
        print(f"error: {failure}; what was written is kept as {output}.bad: do not use it", file=sys.stderr)
        return 1
    for note in source.provenance.get("notes", ()):
        print(f"note: {note}")
    print(summary(output, report))
    return 0


def describe(source: Weights, entries: transfer.Entries, written: Written) -> dict[str, Any]:
    """Return the report before the proof."""
    return {
        "source": source.provenance,
        "tensors": len(entries),
        "bytes": written.num_bytes,
        "seconds": round(written.seconds, 3),
        "dtypes_read": Counter(tensor.dtype.name for tensor in source.tensors.values()),
        "dtypes_written": Counter(dtype.name for _, dtype in entries.values()),
        "root": root_of(entries, written.hashes),
        "sha256": written.hashes,
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "jax")},
        "verified": False,
        "passed": None,
    }


def prove(folder: Path, target: Target, model: Model, written: Written, prove_logits: Proof) -> dict[str, Any]:
    """Return what the proof adds to the report: read back, settings, hashes and logits compared."""
    reopened = target.reopen(folder)
    # Both sides of an export's logits take these from what was written: a wrong epsilon would pass there.
    before, after = architecture(model), architecture(reopened.model)
    for name, value in before.items():
        if after[name] != value:
            failure = f"{name} {value!r} reads back as {after[name]!r}"
            return {"verified": True, "passed": False, "failure": failure}
    changed = transfer.differences(reopened.tensors, written.hashes)
    result: dict[str, Any] = {"verified": True, "round_trip_equal": len(written.hashes) - len(changed)}
    if not target.is_lossless:
        result["round_trip"] = (
            f"{len(written.hashes) - len(changed)} of {len(written.hashes)} tensors restored bit for bit"
        )
    elif changed:
        failure = f"{len(changed)} tensors read back differ from what was written, the first is {changed[0]}"
        return result | {"passed": False, "failure": failure}
    transfer.return_freed_memory()
    logits = prove_logits(folder, reopened)
    if isinstance(logits, str):
        return result | {"passed": True, "logits": f"not compared: {logits}"}
    result["logits"] = dataclasses.asdict(logits) | {"tolerance": logits.tolerance}
    if logits.passed:
        return result | {"passed": True}
    failure = (
        f"logits differ from {logits.against} by {logits.max_abs_difference:.2g}, above the tolerance of "
        f"{logits.tolerance:.2g}"
    )
    return result | {"passed": False, "failure": failure}


def unrounded(source: Weights, written: Weights) -> Weights:
    """Return what to compare with the folder that was read: `written`, or before --dtype rounded it, `source`."""
    is_kept = all(tensor.dtype == source.tensors[name].dtype for name, tensor in written.tensors.items())
    return written if is_kept else source


def summary(output: Path, report: dict[str, Any]) -> str:
    """Return the one line that a conversion ends with."""
    speed = report["bytes"] / 1e6 / max(report["seconds"], 1e-9)
    line = f"{output}: {report['tensors']} tensors, {report['bytes'] / 1e6:,.1f} MB at {speed:,.0f} MB/s"
    line += f", root {report['root'][:16]}"
    if not report["verified"]:
        return f"{line}; NOT verified (--no-verify)"
    logits, line = report["logits"], f"{line}; {report.get('round_trip', 'every tensor read back equal')}"
    if isinstance(logits, str):
        return f"{line}; logits {logits}"
    layers = f"{logits['layers_compared']} of {logits['num_layers']} layers"
    return (f"{line}; logits within {logits['max_abs_difference']:.1e} of "
            f"{logits['against']} ({layers})")  # fmt: skip

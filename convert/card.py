"""The README.md of an exported model: what it is, what it was trained on and how far, in the run's own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from panda_jax.data.corpora import CORPORA
from panda_jax.weights import Weights


def model_card(weights: Weights, name: str) -> str:
    """Return Markdown with the front matter that Hugging Face reads: facts from the weights and their run."""
    model, provenance = weights.model, weights.provenance
    lines = [
        "---", "language:", "- zh", "library_name: transformers", "pipeline_tag: text-generation", "---", "",
        f"# {name}", "",
        f"A LLaMA of {model.num_parameters:,} parameters: {model.num_layers} layers, width {model.dim}, "
        f"{model.num_heads} heads ({model.num_kv_heads} for keys and values), vocabulary {model.vocab_size:,}, "
        f"up to {model.context_length:,} tokens.", "",
    ]  # fmt: skip
    run = provenance.get("config")
    if run is None:
        lines += [f"Converted from a {provenance['format']} folder, `{Path(provenance['path']).name}`.", ""]
    else:
        lines += training(yaml.safe_load(run), provenance)
    lines += [
        "Each tensor's SHA-256, and how the conversion was proven, are in `conversion.json`.",
        "",
        "The licence of the weights it started from and the terms of its training data apply to it.",
    ]
    return "\n".join(lines) + "\n"


def training(run: dict[str, Any], provenance: dict[str, Any]) -> list[str]:
    """Return the section on the training run: its data, its settings and its last losses."""
    step = provenance["step"]
    lines = [f"Trained by the run `{run['name']}`, checkpoint of step {step:,}.", "", "## Data", ""]
    lines += ["| corpus | template | epochs |", "|---|---|---|"]
    for source in run["data"]["sources"]:
        amount = f"weight {source['weight']:g}" if source.get("weight") else f"{source.get('epochs') or 1:g}"
        template = source.get("template") or CORPORA[source["corpus"]].template
        lines.append(f"| {source['corpus']} | {template} | {amount} |")
    optimizer, train = run["optimizer"], run["train"]
    lines += [
        "", "## Settings", "",
        f"{optimizer['kind']}, peak learning rate {optimizer['learning_rate']:g}, {run['schedule']['kind']} schedule, "
        f"{train['global_batch_size']} sequences of {run['data']['seq_len']} tokens a step, computed in "
        f"{run['compute']['dtype']}.", "",
    ]  # fmt: skip
    if losses := last_losses(Path(provenance["path"]), step):
        lines += ["## Losses", "", *(f"- {name}: {value:.4f}" for name, value in losses.items()), ""]
    return lines


def last_losses(checkpoint: Path, step: int) -> dict[str, float]:
    """Return the training loss and held-out loss last logged up to `step`; empty when the log is not there."""
    log = checkpoint.parent.parent / "metrics.jsonl"
    found: dict[str, float] = {}
    if log.is_file():
        for text in log.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if line["step"] <= step:
                names = {"loss": "training loss", "held_out_loss": "held-out loss"}
                found |= {label: line[key] for key, label in names.items() if key in line}
    return found

"""Our logits against those of somebody else's code, for a folder of each foreign format."""

from __future__ import annotations

from pathlib import Path

from convert import parity, transformers_side
from convert.meta_folder import DEFAULT_NORM_EPS, PARAMS, merged, read_params, read_ranks
from convert.parity import Parity
from convert.probe import make_probe
from panda_jax.weights import Weights


def against_transformers(folder: Path, ours: Weights) -> Parity | str:
    """Compare our logits with those that transformers computes from a Hugging Face folder, or say why not."""
    if not transformers_side.available():
        return "transformers is not installed (pip install -e '.[hf]' in the checkout)"
    probe = make_probe(ours.model)
    theirs = transformers_side.logits_of_child(folder, probe)
    return parity.compare(parity.our_logits(ours.tensors, ours.model, probe), theirs, probe, "transformers")


def against_meta(folder: Path, ours: Weights) -> Parity:
    """Compare our logits with those of a Meta folder, computed in Meta's convention."""
    probe = make_probe(ours.model)
    params = {"norm_eps": DEFAULT_NORM_EPS} | read_params(folder / PARAMS)
    theirs = parity.meta_logits(merged(read_ranks(folder), folder), params, probe)
    return parity.compare(parity.our_logits(ours.tensors, ours.model, probe), theirs, probe, "Meta's convention")

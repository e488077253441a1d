"""run.json: what a checkpoint's run was, what of it a resume must find again, and what has changed since."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from panda_jax import settings
from panda_jax.config import Config
from panda_jax.data.cache import TokenCache
from panda_jax.data.packing import Plan
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer

# Settings of the model that may differ between the run that wrote the weights and the run that reads them.
NOT_ARCHITECTURE = ("size", "init_from", "init_std", "context_length")


def read(checkpoint: Path) -> dict[str, Any]:
    """Return what run.json says of the run that wrote the checkpoint."""
    return json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))


def describe(config: Config, tokenizer: Tokenizer, caches: Sequence[TokenCache], plan: Plan) -> dict[str, Any]:
    """Return the content of run.json: `must_match` holds what a resume may not change, by the name users know."""
    model = {name: value for name, value in dataclasses.asdict(config.model).items() if name not in NOT_ARCHITECTURE}
    must_match = {f"model.{name}": value for name, value in model.items()}
    must_match |= {
        "tokenizer": tokenizer.fingerprint,
        "objective": config.objective,
        "optimizer.kind": config.optimizer.kind,
        "train.trainable": config.train.trainable,
        "train.global_batch_size": config.train.global_batch_size,
        "data.seq_len": config.data.seq_len,
        "seed": config.seed,
    }
    for cache in caches:
        must_match[f"template of {cache.source}"] = cache.manifest["template"]
        must_match[f"data of {cache.source}"] = cache.fingerprint
    must_match["order of the data"] = plan.fingerprint
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")
    }
    return {
        "must_match": json.loads(json.dumps(must_match)),
        "model": {name: value for name, value in dataclasses.asdict(config.model).items() if name != "init_from"},
        "versions": versions | {"panda_jax": _own_version(), "python": platform.python_version()},
        "config": settings.to_yaml(config),
    }


def check_same(checkpoint: Path, run: dict[str, Any]) -> None:
    """Raise InputError that lists what has changed between the run that wrote `checkpoint` and this one."""
    saved, now = read(checkpoint)["must_match"], run["must_match"]
    changed = [
        f"{name} was {_short(saved.get(name))}, is {_short(now.get(name))}"
        for name in {**saved, **now}
        if saved.get(name) != now.get(name)
    ]
    if changed:
        # A changed template changes the data, and changed data change the order: the first cause alone is worth saying.
        causes = [change for change in changed if not change.startswith(("data of", "order of the data"))]
        causes = causes or [change for change in changed if change.startswith("data of")] or changed
        raise InputError(f"{checkpoint}: cannot resume, {'; '.join(causes)}; restore the old settings, rename the run, "
                         f"or start again from these weights with model.init_from")  # fmt: skip


def changes(checkpoint: Path, run: dict[str, Any]) -> list[str]:
    """Return "train.max_steps: 1000 -> 2000" for every setting that differs from the run that wrote `checkpoint`.

    What a resume may not change is not among them: check_same refuses it.
    """
    before, now = (_flat(yaml.safe_load(each["config"])) for each in (read(checkpoint), run))
    return [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Return {"data.sources.0.epochs": 2, …} for a nested config."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat = [_flat(each, f"{path}.{key}" if path else str(key)) for key, each in items]
    return {name: leaf for leaves in flat for name, leaf in leaves.items()}


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text[:12] + "…" if len(text) == 64 else text


def _own_version() -> str:
    try:
        return importlib.metadata.version("panda-jax")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"

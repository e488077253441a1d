"""What the demo's folder holds before anything runs: a small world's corpora, its tests, and the runs' configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from panda_jax.data.world import World
from panda_jax.data.world_exams import write_exams
from panda_jax.data.world_files import write_world
from panda_jax.errors import InputError


def write_inputs(world: World, folder: Path, runs: Iterable[str]) -> None:
    """Write corpora/, exams/, world.json and a <run>.yaml per run below `folder`, each unless it is there.

    Raises InputError where the folder holds the world of another seed, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--dir {folder}: found a file, expected a folder or a new name; choose another")
    marker = folder / "world.json"
    if not marker.exists():
        for path in [*write_world(world, folder / "corpora").values(), *write_exams(world, folder / "exams").values()]:
            print(f"{path.name}: {path.stat().st_size / 1e3:,.0f} kB")
        truth = {"seed": world.seed, "people": {person.name: person.facts for person in world.people}}
        marker.write_text(json.dumps(truth, ensure_ascii=False, indent=1), encoding="utf-8")
    found = json.loads(marker.read_text(encoding="utf-8"))["seed"]
    if found != world.seed:
        raise InputError(f"{marker}: this world has seed {found}, expected --seed {world.seed}; choose another --dir")
    if not (folder / "exams").is_dir():
        raise InputError(f"{folder}: holds no exams, it is from an older panda_jax; choose another --dir")
    for run in runs:
        if not (folder / f"{run}.yaml").exists():
            shutil.copyfile(_configs() / f"{run}.yaml", folder / f"{run}.yaml")


def _configs() -> Path:
    """Return where the demo's configs are: in an installed package, or in the checkout that the package stands in."""
    package = Path(__file__).parents[1]
    for folder in (package / "configs" / "demo", package.parent / "configs" / "demo"):
        if folder.is_dir():
            return folder
    raise InputError(f"{package}: configs/demo is missing from this installation; install panda_jax again")

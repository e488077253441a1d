"""Exact resume: 20 steps equal 10 steps, kill -9 at a random moment, and the rest.

`pytest tests/test_resume.py --kill-points 20` kills at twenty random moments over packing x mixture x accumulation x
devices; the unit suite does one.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny_run

from panda_jax.training.checkpoint import committed_steps

pytestmark = pytest.mark.whole_run

COMBINATIONS = [
    (packing, mixture, micro, devices)
    for packing in (True, False)
    for mixture in ("epochs", "weight")
    for micro in (None, 1)
    for devices in (1, 8)
]


def changes(folder: Path, packing: bool, mixture: str, micro: int | None, devices: int) -> dict:
    """Return the settings of one combination."""
    shares = [{"epochs": 1.5}, {"epochs": 2}] if mixture == "epochs" else [{"weight": 0.7}, {"weight": 0.3}]
    sources = [
        {"corpus": "jsonl_text", "path": str(folder / "texts.jsonl"), "held_out": 8} | shares[0],
        {"corpus": "alpaca", "path": str(folder / "pairs.json")} | shares[1],
    ]
    data = {"packing": packing, "sources": sources} | ({"total_tokens": 6000} if mixture == "weight" else {})
    mesh = {"data": 2, "fsdp": 2, "tensor": 2} if devices == 8 else {"data": 1}
    return {"data": data, "mesh": mesh, "train": {"micro_batch_size": micro}}


def write(folder: Path, combination: tuple, runs: str) -> Path:
    """Write the config of a combination whose runs go to folder/<runs>."""
    log = {"runs_dir": str(folder / runs)}
    return tiny_run.write_config(folder, **changes(folder, *combination), log=log)


def kill_at_random(config: Path, run: Path, devices: int, generator: random.Random) -> int:
    """Start the run, kill -9 it some moment after a random step, and return the last step it logged."""
    last = generator.randint(1, 18)
    process = tiny_run.start(config, num_devices=devices)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(tiny_run.logged(run)) >= last):
        time.sleep(0.005)
    time.sleep(generator.random() * 0.1)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return len(tiny_run.logged(run))


def test_killed_runs_end_bit_for_bit_like_the_uninterrupted_one(tmp_path, request):
    kill_points = request.config.getoption("--kill-points")
    generator = random.Random(20230505)
    tiny_run.write_corpora(tmp_path)
    order = COMBINATIONS * (kill_points // len(COMBINATIONS) + 1) if kill_points > 1 else [(True, "epochs", 1, 8)]
    for point, combination in enumerate(order[:kill_points]):
        devices = combination[-1]
        whole = write(tmp_path, combination, "whole")
        tiny_run.finish(tiny_run.start(whole, num_devices=devices))
        killed = write(tmp_path, combination, "killed")
        step = kill_at_random(killed, tmp_path / "killed" / "tiny", devices, generator)
        committed = committed_steps(tmp_path / "killed" / "tiny" / "checkpoints")
        output = tiny_run.finish(tiny_run.start(killed, num_devices=devices))
        # Saves end in the background: a run killed soon after one may have to go back to the one before it.
        assert not committed or f"resuming after step {committed[-1]}" in output, output
        assert committed or step < 12, "after 12 steps at least the save of step 3 must be complete"
        tiny_run.assert_same_run(tmp_path / "whole" / "tiny", tmp_path / "killed" / "tiny", 20)
        print(f"kill point {point}: {combination}, killed after step {step}: resumed after {committed[-1:]}: identical")
        shutil.rmtree(tmp_path / "whole")
        shutil.rmtree(tmp_path / "killed")

"""Several processes on this machine: they train, save and resume, also as another number of processes."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from panda_jax.training.checkpoint import committed_steps

pytestmark = pytest.mark.whole_run


def start_processes(config: Path, count: int, devices_each: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start `count` processes of one run as torchrun would describe them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        tiny_run.start(
            config, *arguments, num_devices=devices_each, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            WORLD_SIZE=str(count), RANK=str(rank),
        )
        for rank in range(count)
    ]  # fmt: skip


def test_two_processes_stop_and_four_go_on(tmp_path):
    """20 steps in one process with 4 devices equal 10 in 2 x 2, and 10 more in 4 x 1, up to the order of sums."""
    tiny_run.write_corpora(tmp_path)
    mesh, schedule = {"data": 2, "fsdp": 2, "zero": 3}, {"total_steps": 20}
    one = tiny_run.write_config(tmp_path, mesh=mesh, schedule=schedule, log={"runs_dir": str(tmp_path / "one")})
    tiny_run.finish(tiny_run.start(one, num_devices=4))

    many = tiny_run.write_config(tmp_path, mesh=mesh, schedule=schedule, log={"runs_dir": str(tmp_path / "many")})
    for process in start_processes(many, 2, 2, "train.max_steps=10"):
        tiny_run.finish(process)
    folder = tmp_path / "many" / "tiny" / "checkpoints"
    assert committed_steps(folder) == [6, 9, 10]
    assert (folder / "10" / "manifest-1-of-2.json").exists()
    outputs = [tiny_run.finish(process) for process in start_processes(many, 4, 1)]
    assert "resuming after step 10" in outputs[0]

    whole, parts = (tiny_run.logged(tmp_path / name / "tiny") for name in ("one", "many"))
    assert [line["step"] for line in parts] == list(range(1, 21))
    np.testing.assert_allclose([line["loss"] for line in parts], [line["loss"] for line in whole], atol=1e-5)
    assert [line["tokens_seen"] for line in parts] == [line["tokens_seen"] for line in whole]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    tiny_run.write_corpora(tmp_path)
    config = tiny_run.write_config(tmp_path, mesh={"data": 2}, train={"max_steps": 2000, "epochs": 400})
    processes = start_processes(config, 2, 1)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    while not metrics.exists() or len(tiny_run.logged(metrics.parent)) < 3:
        time.sleep(0.02)
        assert all(process.poll() is None for process in processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [tiny_run.finish(process) for process in processes]
    stopped = committed_steps(tmp_path / "runs" / "tiny" / "checkpoints")[-1]
    assert stopped < 2000
    assert f"stopped after step {stopped} of 2000" in outputs[0]


def test_a_missing_process_is_reported(tmp_path):
    tiny_run.write_corpora(tmp_path)
    config = tiny_run.write_config(tmp_path, mesh={"data": 2, "init_timeout_s": 3})
    first, second = start_processes(config, 2, 1)
    second.kill()
    second.communicate()
    output = tiny_run.finish(first, status=2)
    assert "rank 0: no word from rank 1 of 2 at 127.0.0.1:" in output and "mesh.init_timeout_s 3 s" in output, output

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

# Several processes, several times: on busy cores that takes minutes.
pytestmark = [pytest.mark.whole_run, pytest.mark.timeout(900)]


def start_trainings(config: Path, count: int, devices_each: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start the `count` processes of one run."""
    return start_processes(count, devices_each, "-m", "panda_jax.train", "--config", str(config), *arguments)


def start_processes(count: int, devices_each: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start `count` Python processes as torchrun would describe them."""
    port = free_port()
    return [
        tiny_run.start_python(
            *arguments, num_devices=devices_each, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            WORLD_SIZE=str(count), RANK=str(rank),
        )
        for rank in range(count)
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_stop_and_four_go_on(tmp_path):
    """20 steps in one process with 4 devices equal 10 in 2 x 2, and 10 more in 4 x 1, up to the order of sums."""
    tiny_run.write_corpora(tmp_path)
    mesh, schedule = {"data": 2, "fsdp": 2, "zero": 3}, {"total_steps": 20}
    one = tiny_run.write_config(tmp_path, mesh=mesh, schedule=schedule, log={"runs_dir": str(tmp_path / "one")})
    tiny_run.finish(tiny_run.start(one, num_devices=4))

    many = tiny_run.write_config(tmp_path, mesh=mesh, schedule=schedule, log={"runs_dir": str(tmp_path / "many")})
    for process in start_trainings(many, 2, 2, "train.max_steps=10"):
        tiny_run.finish(process)
    folder = tmp_path / "many" / "tiny" / "checkpoints"
    assert committed_steps(folder) == [6, 9, 10]
    assert (folder / "10" / "manifest-1-of-2.json").exists()
    outputs = [tiny_run.finish(process) for process in start_trainings(many, 4, 1)]
    assert "resuming after step 10" in outputs[0]

    whole, parts = (tiny_run.logged(tmp_path / name / "tiny") for name in ("one", "many"))
    assert [line["step"] for line in parts] == list(range(1, 21))
    np.testing.assert_allclose([line["loss"] for line in parts], [line["loss"] for line in whole], atol=1e-5)
    assert [line["tokens_seen"] for line in parts] == [line["tokens_seen"] for line in whole]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    tiny_run.write_corpora(tmp_path)
    config = tiny_run.write_config(tmp_path, mesh={"data": 2}, train={"max_steps": 2000, "epochs": 400})
    processes = start_trainings(config, 2, 1)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    while not metrics.exists() or len(tiny_run.logged(metrics.parent)) < 3:
        time.sleep(0.02)
        assert all(process.poll() is None for process in processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [tiny_run.finish(process) for process in processes]
    stopped = committed_steps(tmp_path / "runs" / "tiny" / "checkpoints")[-1]
    assert stopped < 2000
    assert f"stopped after step {stopped} of 2000" in outputs[0]


def test_what_fails_in_one_process_fails_in_each(tmp_path):
    """Rank 1 has no room for its manifest; no process waits for it, and the checkpoint before it is the newest."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import jax
from pathlib import Path
from test_checkpoint import small_state
from panda_jax.command_line import run_door
from panda_jax.config import Mesh
from panda_jax.sharding import start_processes
from panda_jax.training import checkpoint

def main(arguments):
    start_processes(Mesh())
    mesh = jax.make_mesh((2,), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(replicated, leaf), small_state())
    saver = checkpoint.Checkpointer(Path({str(tmp_path)!r}), keep=2, keep_steps=())
    saver.save(1, state, {{}}, b"")
    saver.wait()
    if jax.process_index() == 1:
        checkpoint._sha256 = fail
    saver.save(2, state, {{}}, b"")
    saver.wait()

def fail(path):
    raise OSError(28, "No space left on device", str(path))

run_door(main)
"""
    outputs = [tiny_run.finish(process, status=2) for process in start_processes(2, 1, "-c", program)]
    assert "rank 1 failed, and with it the run: OSError: [Errno 28] No space left on device" in outputs[0]
    assert "a checkpoint could not be written ([Errno 28] No space left on device" in outputs[1]
    assert committed_steps(tmp_path) == [1]


def test_torchrun_starts_a_run(tmp_path):
    """The real one, which listens on MASTER_PORT itself."""
    tiny_run.write_corpora(tmp_path)
    config = tiny_run.write_config(tmp_path, mesh={"data": 2}, train={"max_steps": 2})
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    output = tiny_run.finish(tiny_run.start_python(*launcher, "-m", "panda_jax.train", "--config", str(config)))
    assert "2 x cpu (cpu), data 2" in output and "done after 2 steps" in output
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "2" / "manifest-1-of-2.json").exists()


def test_a_missing_process_is_reported(tmp_path):
    tiny_run.write_corpora(tmp_path)
    config = tiny_run.write_config(tmp_path, mesh={"data": 2, "init_timeout_s": 3})
    first, second = start_trainings(config, 2, 1)
    second.kill()
    second.communicate()
    output = tiny_run.finish(first, status=2)
    assert "rank 0: no word from rank 1 of 2 at 127.0.0.1:" in output and "mesh.init_timeout_s 3 s" in output, output

"""The train door from outside: stopping, resuming, damage, changed settings, starting weights, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import weights_folder
import yaml

from panda_jax import sharding, train
from panda_jax.command_line import exit_status
from panda_jax.config import Model
from panda_jax.training import loop, start
from panda_jax.training.checkpoint import Checkpointer, committed_steps

pytestmark = pytest.mark.whole_run

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with corpora, a tokenizer, a cache, compiled programs, and one run of 20 steps called `whole`."""
    folder = tmp_path_factory.mktemp("world")
    tiny_run.write_corpora(folder)
    assert exit_status(train.main, arguments(folder, "whole")) == 0
    return folder


def arguments(folder: Path, name: str, *extra: str, **changes: Any) -> list[str]:
    """Return the door's command line for a run called `name`."""
    config = tiny_run.write_config(folder, mesh=MESH, **changes)
    target = config.rename(folder / f"{name}.yaml")
    return ["--config", str(target), f"name={name}", *extra]


def copy_run(world: Path, name: str) -> Path:
    """Copy the finished run and forget its last checkpoint's successors: steps 15, 18 and 20 remain."""
    shutil.copytree(world / "runs" / "whole", world / "runs" / name)
    return world / "runs" / name


def some_array_file(checkpoint: Path) -> Path:
    """Return the largest file of a checkpoint, which holds arrays."""
    return max((checkpoint / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)


def test_the_run_folder(world):
    run = world / "runs" / "whole"
    assert [line["step"] for line in tiny_run.logged(run)] == list(range(1, 21))
    assert yaml.safe_load((run / "config.yaml").read_text("utf-8"))["optimizer"]["beta2"] == 0.99
    assert (run / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert committed_steps(run / "checkpoints") == [15, 18, 20]
    assert tiny_run.logged(run)[-1]["loss"] < tiny_run.logged(run)[0]["loss"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(world, capsys, number):
    name = signal.Signals(number).name
    metrics = world / "runs" / name / "metrics.jsonl"

    def stop_after_four_steps() -> None:
        while not metrics.exists() or len(tiny_run.logged(metrics.parent)) < 4:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop_after_four_steps)
    thread.start()
    assert exit_status(train.main, arguments(world, name, train={"max_steps": 20})) == 0
    thread.join()
    stopped = committed_steps(metrics.parent / "checkpoints")[-1]
    assert 4 <= stopped < 20
    assert f"stopped after step {stopped} of 20; the same command goes on from there" in capsys.readouterr().out
    assert exit_status(train.main, arguments(world, name)) == 0
    assert f"resuming after step {stopped}" in capsys.readouterr().out
    tiny_run.assert_same_run(world / "runs" / "whole", metrics.parent, 20)


@pytest.mark.parametrize("damage", ["bit flip", "truncation", "missing file", "half a save"])
def test_a_damaged_checkpoint_is_walked_over(world, capsys, damage):
    name = damage.replace(" ", "-")
    run = copy_run(world, name)
    newest = run / "checkpoints" / "20"
    file = some_array_file(newest)
    if damage == "bit flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncation":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "missing file":
        file.unlink()
    else:
        (newest / "manifest-0-of-1.json").unlink()
    assert exit_status(train.main, arguments(world, name)) == 0
    output = capsys.readouterr().out
    assert "resuming after step 18" in output
    if damage != "half a save":
        reason = {"bit flip": "SHA-256 differs", "truncation": "bytes, expected", "missing file": "is missing"}[damage]
        assert f"checkpoints/20 is damaged: {file.relative_to(newest)}" in output
        assert reason in output
    tiny_run.assert_same_run(world / "runs" / "whole", run, 20)


def test_a_run_never_starts_over_because_all_its_checkpoints_are_damaged(world, capsys):
    run = copy_run(world, "all-damaged")
    for step in (15, 18, 20):
        file = some_array_file(run / "checkpoints" / str(step))
        file.write_bytes(file.read_bytes()[:-1])
    assert exit_status(train.main, arguments(world, "all-damaged")) == 2
    assert "every checkpoint is damaged ([15, 18, 20])" in capsys.readouterr().err


def test_resume_from_a_named_step_or_not_at_all(world, capsys):
    run = copy_run(world, "named")
    assert exit_status(train.main, arguments(world, "named", "--resume", "17")) == 2
    assert "no complete checkpoint of step 17; there are [15, 18, 20]" in capsys.readouterr().err
    assert exit_status(train.main, arguments(world, "named", "--resume", "soon")) == 2
    assert "expected auto, never or the step" in capsys.readouterr().err
    assert exit_status(train.main, arguments(world, "named", "--resume", "15")) == 0
    output = capsys.readouterr().out
    assert "18.superseded-0" in output and "resuming after step 15" in output
    tiny_run.assert_same_run(world / "runs" / "whole", run, 20)
    assert exit_status(train.main, arguments(world, "named", "--resume", "never", "train.max_steps=2")) == 0
    assert [line["step"] for line in tiny_run.logged(run)] == [1, 2]
    assert committed_steps(run / "checkpoints") == [2]


def test_a_changed_run_is_not_resumed(world, capsys):
    copy_run(world, "changed")
    for change, said in {
        "model.rope_theta=500000": "model.rope_theta was 10000.0, is 500000.0",
        "data.sources.0.epochs=1": "order of the data was",
        "data.sources.1.template=belle": "template of alpaca was",
        "seed=1": "seed was 42, is 1",
        "optimizer.kind=lion": "optimizer.kind was adamw, is lion",
        "train.global_batch_size=16": "train.global_batch_size was 8, is 16",
    }.items():
        assert exit_status(train.main, arguments(world, "changed", change)) == 2
        error = capsys.readouterr().err
        assert "cannot resume" in error and said in error, error
        assert error.splitlines()[-1].startswith("error: ")
    texts = world / "texts.jsonl"
    original = texts.read_text("utf-8")
    texts.write_text(original + '{"text": "天地。"}\n', "utf-8")
    assert exit_status(train.main, arguments(world, "changed")) == 2
    assert "data of jsonl_text was" in capsys.readouterr().err
    texts.write_text(original, "utf-8")
    assert exit_status(train.main, arguments(world, "changed", "optimizer.learning_rate=0.5")) == 0


def test_stage_two_starts_from_the_weights_of_stage_one(world, capsys):
    whole = {"init_from": {"checkpoint": str(world / "runs" / "whole")}}
    one_step = {"max_steps": 1}
    assert (
        exit_status(
            train.main, arguments(world, "second", model=whole, train=one_step, optimizer={"learning_rate": 1e-30})
        )
        == 0
    )
    assert "parameters from" in capsys.readouterr().out
    before = tiny_run.saved_arrays(world / "runs" / "whole" / "checkpoints" / "20")
    after = tiny_run.saved_arrays(world / "runs" / "second" / "checkpoints" / "1")
    names = [name for name in before if name.startswith("parameters/")]
    assert len(names) == 12
    for name in names:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert exit_status(train.main, arguments(world, "third", "model.num_layers=3", model=whole, train=one_step)) == 2
    assert "model.num_layers 2, this run 3; write `num_layers: 2` under `model:`" in capsys.readouterr().err
    empty = {"init_from": {"checkpoint": str(world / "runs")}}
    assert exit_status(train.main, arguments(world, "third", model=empty)) == 2
    assert "no complete checkpoint here" in capsys.readouterr().err


def test_a_refused_start_leaves_the_checkpoints_where_they_are(world, capsys):
    before = sorted(path.name for path in (copy_run(world, "refused") / "checkpoints").iterdir())
    assert exit_status(train.main, arguments(world, "refused", "--resume", "15", "seed=1")) == 2
    assert "cannot resume, seed was 42, is 1" in capsys.readouterr().err
    other = {"init_from": {"checkpoint": str(world / "runs" / "whole")}, "num_layers": 3}
    assert exit_status(train.main, arguments(world, "refused", "--resume", "never", model=other)) == 2
    assert "model.num_layers 2, this run 3" in capsys.readouterr().err
    assert exit_status(train.main, arguments(world, "refused", train={"max_steps": 19})) == 2
    assert "refused/checkpoints/20: this run ends before that checkpoint, after 19 steps" in capsys.readouterr().err
    assert sorted(path.name for path in (world / "runs" / "refused" / "checkpoints").iterdir()) == before


def test_a_resume_tells_which_settings_have_changed(world, capsys):
    copy_run(world, "changed-settings")
    changed = arguments(world, "changed-settings", "optimizer.beta2=0.5", train={"max_steps": 21})
    assert exit_status(train.main, changed) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("resuming after step 20"))
    told = [line.strip() for line in lines[first + 1 : lines.index(next(x for x in lines if x.startswith("run  ")))]]
    # The copy has another name, too.
    assert sorted(told) == [
        "name: whole -> changed-settings", "optimizer.beta2: 0.99 -> 0.5", "train.max_steps: 20 -> 21"
    ]  # fmt: skip
    off = arguments(world, "changed-settings", "optimizer.weight_decay=0.25", train={"max_steps": 22})
    assert exit_status(train.main, off) == 2
    assert "a resume cannot turn optimizer.weight_decay or momentum on or off" in capsys.readouterr().err


def test_a_run_is_trained_by_one_start_at_a_time(world, capsys):
    with start.taken(world / "runs" / "whole"):
        assert exit_status(train.main, arguments(world, "whole")) == 2
    assert "runs/whole: another process trains this run; wait for it" in capsys.readouterr().err
    assert exit_status(train.main, arguments(world, "whole")) == 0
    assert not list((world / "runs").glob(".*"))


def test_a_signal_during_the_last_save_does_not_kill_it(world, monkeypatch):
    wait = Checkpointer.wait

    def interrupted(self: Checkpointer) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        wait(self)

    monkeypatch.setattr(Checkpointer, "wait", interrupted)
    assert exit_status(train.main, arguments(world, "late", train={"max_steps": 1})) == 0
    assert committed_steps(world / "runs" / "late" / "checkpoints") == [1]


def test_the_held_out_loss_takes_no_more_rows_at_a_time_than_a_step(world, monkeypatch):
    """8 held-out records in rows of their own; 4 devices of 1 row each take 4 at a time, and the loss is the same."""
    sizes: list[int] = []
    spread = sharding.to_global

    def recorded(batch: Any, rows: Any, mesh: Any, size: int) -> Any:
        sizes.append(size)
        return spread(batch, rows, mesh, size)

    monkeypatch.setattr(sharding, "to_global", recorded)
    one = {"max_steps": 1}
    for name, micro_batch_size in (("at-once", None), ("in-parts", 1)):
        sizes.clear()
        train_settings = one | {"micro_batch_size": micro_batch_size}
        assert exit_status(train.main, arguments(world, name, train=train_settings)) == 0
        assert set(sizes) == ({8} if micro_batch_size is None else {8, 4})
    losses = [
        [json.loads(line) for line in (world / "runs" / name / "metrics.jsonl").read_text("utf-8").splitlines()]
        for name in ("at-once", "in-parts")
    ]
    at_once, in_parts = ([line["held_out_loss"] for line in lines if "held_out_loss" in line] for lines in losses)
    assert len(at_once) == 2
    np.testing.assert_allclose(in_parts, at_once, rtol=1e-6)


def test_a_run_that_starts_over_keeps_no_record_of_the_former(world):
    copy_run(world, "over")
    assert exit_status(train.main, arguments(world, "over", "--resume", "never", train={"max_steps": 1})) == 0
    lines = [json.loads(line) for line in (world / "runs" / "over" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 1]


def test_what_a_config_names_is_looked_for_before_the_data_are_prepared(world, capsys, monkeypatch):
    """And not again by a run that goes on: it has weights of its own."""
    prepared: list[str] = []
    monkeypatch.setattr(loop, "prepare_data", lambda config: prepared.append(config.name))
    for kind in ("checkpoint", "hf", "meta"):
        missing = {"init_from": {kind: str(world / "nowhere")}}
        assert exit_status(train.main, arguments(world, "unborn", model=missing)) == 2
        assert f"model.init_from.{kind}: {world / 'nowhere'}: no such folder" in capsys.readouterr().err
        assert exit_status(train.main, arguments(world, "whole", "--resume", "never", model=missing)) == 2
        assert f"model.init_from.{kind}: " in capsys.readouterr().err
    tasks = {"tasks": ["c3-d"], "data": str(world)}
    assert exit_status(train.main, arguments(world, "unborn", eval=tasks)) == 2
    assert "1 of 1 files missing (c3-d-test.json)" in capsys.readouterr().err
    for resume, said in (("lastest", "expected auto, never or the step"), ("7", "no complete checkpoint of step 7")):
        assert exit_status(train.main, arguments(world, "whole", "--resume", resume)) == 2
        assert said in capsys.readouterr().err
    for wrong in ("train.trainable=['nothing']", "train.global_batch_size=6", "compute.attention=cudnn"):
        assert exit_status(train.main, arguments(world, "unborn", wrong)) == 2
        assert wrong.partition("=")[0] in capsys.readouterr().err
    assert prepared == [] and not (world / "runs" / "unborn").exists()
    assert exit_status(train.main, arguments(world, "whole", model=missing)) == 0
    assert prepared == ["whole"]


def test_weights_from_elsewhere_grow_and_are_remembered(world, tmp_path, capsys):
    """352 pieces and four rows more, from a folder of float16; a resumed run still knows where it began."""
    heads: dict[str, Any] = dict(num_heads=4, num_kv_heads=2, mlp_dim=24, norm_eps=1e-5, context_length=64)
    theirs = Model(vocab_size=352, dim=16, num_layers=2, **heads)
    tensors = weights_folder.random_tensors(theirs, np.float16)
    tokenizer = (world / "tokenizer.model").read_bytes()
    source = weights_folder.write(tmp_path / "w", theirs, tensors, tokenizer)
    changes: dict[str, Any] = {
        "model": {"vocab_size": 356, "init_from": {"checkpoint": str(source), "new_rows": "zeros"}},
        "tokenizer": {"path": str(world / "tokenizer.model"), "extra_ids": 4},
        "optimizer": {"learning_rate": 1e-30},
        "schedule": {"total_steps": 2},
    }
    assert exit_status(train.main, arguments(world, "foreign", train={"max_steps": 1}, **changes)) == 0
    said = f"parameters from {source} (hf: somebody/llama, float16, root 1a2b1a2b1a2b…, new rows: 4 zeros)"
    assert said in capsys.readouterr().out
    checkpoints = world / "runs" / "foreign" / "checkpoints"
    saved = tiny_run.saved_arrays(checkpoints / "1")
    for name, expected in weights_folder.in_model_layout(tensors, theirs).items():
        rows = {"embed": ((0, 4), (0, 0)), "lm_head": ((0, 0), (0, 4))}.get(name, ((0, 0),) * expected.ndim)
        found = saved[f"parameters/{name}"]
        np.testing.assert_allclose(found, np.pad(expected, rows), rtol=0, atol=1e-29, err_msg=name)
    assert exit_status(train.main, arguments(world, "foreign", train={"max_steps": 2}, **changes)) == 0
    assert "resuming after step 1" in capsys.readouterr().out
    origins = [json.loads((checkpoints / step / "run.json").read_text("utf-8"))["init_from"] for step in ("1", "2")]
    assert origins[0] == origins[1] and origins[0]["provenance"]["root"] == "1a2b" * 16


def test_a_non_finite_gradient_stops_with_the_records_named(world, capsys):
    assert (
        exit_status(train.main, arguments(world, "exploding", "optimizer.learning_rate=1e38", "train.clip_norm=null"))
        == 2
    )
    captured = capsys.readouterr()
    assert "non-finite gradient; the parameters are those before it and are saved" in captured.err
    assert "records: " in captured.out and "texts.jsonl:" in captured.out
    steps = committed_steps(world / "runs" / "exploding" / "checkpoints")
    assert f"step {steps[-1] + 1}: non-finite" in captured.err


def test_a_checkpoint_that_does_not_fit_the_disk_is_refused(world, capsys, monkeypatch):
    usage = shutil.disk_usage(world)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert exit_status(train.main, arguments(world, "full")) == 2
    assert "GB are free; make room" in capsys.readouterr().err


def test_the_card_shows_what_will_be_trained(world, capsys):
    assert exit_status(train.main, arguments(world, "card", train={"max_steps": 1})) == 0
    output = capsys.readouterr().out
    assert "8 x cpu (cpu), data 2 x fsdp 2 x tensor 2, zero 1" in output
    assert "attention xla" in output
    assert "</s>⟧" in output
    assert "held-out loss after step 0" in output

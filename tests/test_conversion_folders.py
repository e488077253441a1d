"""Where conversions write: arguments, folders that hold something, and disks that are full. Nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import foreign
import pytest
import torch
from foreign import EIGHT_HEADS, GQA, refused

from convert import delta, hf, meta, transfer
from convert.native import NativeSink
from convert.safetensors_sink import SafetensorsSink
from panda_jax.weights import open_weights

F32, F16 = torch.float32, torch.float16
STATE = foreign.random_state(GQA, F16)


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    source = foreign.write_meta(folder / "meta", GQA, STATE)
    foreign.done(meta, "import", "--input", source, "--output", folder / "ours", "--no-verify")
    return folder / "ours"


@pytest.fixture
def ours(imported, tmp_path) -> Path:
    """A weights folder that may be changed."""
    shutil.copytree(imported, tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--shard-size", "4"], "--shard-size 4: expected a number and a unit"),
        (["--shard-size", "0GB"], "--shard-size 0GB: expected"),
        (["--shard-size", "-1GB"], "--shard-size"),
        (["--shards", "2"], "unrecognized arguments: --shards 2"),
    ],
)
def test_arguments_of_the_export(imported, tmp_path, capsys, arguments, said):
    assert said in refused(capsys, hf, "export", "--input", imported, "--output", tmp_path / "out", *arguments)


def test_what_metas_layout_cannot_hold(imported, tmp_path, capsys):
    arguments = "export", "--input", imported, "--output", tmp_path / "out", "--shards"
    assert "--shards 4: does not divide the 2 key/value heads" in refused(capsys, meta, *arguments, 4)
    assert "--shards 0: expected 1 or more" in refused(capsys, meta, *arguments, 0)
    state = foreign.random_state(GQA, F16, is_tied=True)
    tied = foreign.write_hf(tmp_path / "tied", GQA, state, tie_word_embeddings=True)
    line = refused(capsys, meta, "export", "--input", tied, "--output", tmp_path / "out")
    assert "no tied output layer" in line


def test_a_number_that_float16_cannot_hold(tmp_path, capsys):
    """65520 is the first that rounds to infinity; an infinite number may stay one."""
    state = foreign.random_state(GQA, F32)
    state["lm_head.weight"][3, 4], state["lm_head.weight"][0, 0] = 65520, float("inf")
    source = foreign.write_meta(tmp_path / "source", GQA, state)
    arguments = "import", "--input", source, "--output", tmp_path / "out", "--dtype", "float16", "--no-verify"
    assert "lm_head: float16 cannot hold 65520; use --dtype bfloat16" in refused(capsys, meta, *arguments)
    state["lm_head.weight"][3, 4] = 65519
    shutil.rmtree(source)
    foreign.write_meta(source, GQA, state)
    foreign.done(meta, *arguments)
    assert foreign.loaded(tmp_path / "out")["lm_head"].isinf().sum() == 1


@pytest.mark.parametrize("door", [hf, meta])
def test_folders_that_are_nothing(tmp_path, capsys, door):
    (tmp_path / "empty").mkdir()
    for name, said in (("empty", "empty"), ("nowhere", "nowhere")):
        for command in ("import", "export"):
            assert said in refused(capsys, door, command, "--input", tmp_path / name, "--output", tmp_path / "out")
    (tmp_path / "file").touch()
    source = foreign.write_meta(tmp_path / "source", GQA, STATE)
    arguments = "export", "--input", source, "--no-verify", "--output"
    assert "file: not empty" in refused(capsys, door, *arguments, tmp_path / "file")
    assert "file: not a folder" in refused(capsys, door, *arguments, tmp_path / "file" / "out")


def test_a_folder_with_something_in_it(imported, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    arguments = "export", "--input", imported, "--output", out, "--no-verify"
    assert "out: not empty; choose another folder, or give --overwrite" in refused(capsys, hf, *arguments)
    assert "out: --overwrite replaces a folder with a model" in refused(capsys, hf, *arguments, "--overwrite")
    (out / "thesis.txt").unlink()
    foreign.done(hf, *arguments)


@pytest.mark.parametrize("swaps", [True, False])
def test_overwrite_replaces_at_the_end(ours, tmp_path, capsys, monkeypatch, swaps):
    """Also where the system cannot swap two folders in one step, and through a link."""
    if swaps:
        # With two renames there would be a moment without either folder.
        monkeypatch.setattr(Path, "rename", lambda one, other: pytest.fail(f"{one} renamed"))
    else:
        monkeypatch.setattr(transfer, "_exchange", lambda one, other: False)
    other = foreign.write_hf(tmp_path / "other", GQA, foreign.random_state(GQA, F16, seed=5))
    (tmp_path / "link").symlink_to(ours)
    arguments = "import", "--input", other, "--output", tmp_path / "link", "--no-verify"
    former, finish = foreign.loaded(ours), NativeSink.finish

    def last_moment(sink, hashes):
        finish(sink, hashes)
        assert foreign.bits(foreign.loaded(ours)) == foreign.bits(former)

    monkeypatch.setattr(NativeSink, "finish", last_moment)
    assert "not empty" in refused(capsys, hf, *arguments)
    (tmp_path / "ours.unfinished-0123").mkdir()  # of a killed conversion
    foreign.done(hf, *arguments, "--overwrite")
    assert foreign.bits(foreign.loaded(ours)) == foreign.our_bits(foreign.random_state(GQA, F16, seed=5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "other", "ours"]
    assert (tmp_path / "link").is_symlink()


def test_a_failed_overwrite_leaves_the_old_folder(ours, tmp_path, capsys):
    state = foreign.random_state(GQA, F32)
    state["lm_head.weight"][:] = 1e9
    other = foreign.write_hf(tmp_path / "source", GQA, state)
    arguments = "import", "--input", other, "--output", ours, "--overwrite", "--dtype", "float16"
    assert "cannot hold 1e+09" in refused(capsys, hf, *arguments)
    assert foreign.bits(foreign.loaded(ours)) == foreign.our_bits(STATE)
    assert all(tensor.read() is not None for tensor in open_weights(ours).tensors.values())


def test_another_conversion_to_the_same_folder_is_left_alone(tmp_path, imported):
    with transfer.staged(tmp_path / "out", overwrite=False) as alive:
        (alive / "half").touch()
        foreign.done(hf, "export", "--input", imported, "--output", tmp_path / "out", "--no-verify")
        assert (alive / "half").exists()
        shutil.rmtree(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["half"]


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("door", [hf, meta])
def test_a_disk_without_room_is_seen_before_writing(imported, tmp_path, capsys, monkeypatch, door):
    """The tensors are 0.09 MB; 16 MiB more are asked for, for everything beside them."""
    size = sum(tensor.nbytes for tensor in STATE.values()) + (16 << 20)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda folder: Usage(10**9, 0, size - 1))
    arguments = "export", "--input", imported, "--output", tmp_path / "out", "--no-verify"
    assert "the conversion needs 0.02 GB, 0.02 GB are free; make room" in refused(capsys, door, *arguments)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda folder: Usage(10**9, 0, size))
    foreign.done(door, *arguments)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_it_is_written(imported, tmp_path, capsys, monkeypatch, number):
    append = SafetensorsSink.append

    def full(sink, name, array):
        if name == "layers.1.wo":
            raise OSError(number, os.strerror(number))
        append(sink, name, array)

    monkeypatch.setattr(SafetensorsSink, "append", full)
    line = refused(capsys, hf, "export", "--input", imported, "--output", tmp_path / "out")
    assert os.strerror(number) in line and "choose another folder" in line


def test_a_published_delta_needs_room_for_float32(tmp_path, capsys, monkeypatch):
    """Twice the float16 target."""
    source = foreign.write_hf(tmp_path / "source", EIGHT_HEADS, foreign.random_state(EIGHT_HEADS, F16))
    size = sum(tensor.nbytes for tensor in foreign.random_state(EIGHT_HEADS, F16).values()) + (16 << 20)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda folder: Usage(10**9, 0, size))
    arguments = "make", "--base", source, "--target", source, "--output", tmp_path / "out", "--format"
    assert "make room" in refused(capsys, delta, *arguments, "panda")
    foreign.done(delta, *arguments, "fastchat")


def test_the_input_may_not_lie_in_the_folder_that_is_replaced(ours, capsys):
    inner = ours / "inner"
    shutil.copytree(ours, inner)
    line = refused(capsys, hf, "export", "--input", inner, "--output", ours, "--overwrite")
    assert f"--input {inner}: lies inside --output {ours}" in line
    assert open_weights(ours).tensors["norm"].read().size == open_weights(inner).tensors["norm"].read().size


def test_an_output_layer_that_config_json_ties_is_left_out_and_said(tmp_path, capsys):
    state = foreign.random_state(GQA, F16)
    tied = foreign.write_hf(tmp_path / "tied", GQA, state, tie_word_embeddings=True)
    foreign.done(hf, "import", "--input", tied, "--output", tmp_path / "ours", "--no-verify")
    assert "lm_head.weight left out: config.json ties it" in capsys.readouterr().out
    assert "lm_head" not in open_weights(tmp_path / "ours").tensors

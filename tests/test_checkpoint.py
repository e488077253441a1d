"""Checkpoints on their own: other meshes, parameters alone, failed saves, what is kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import weights_folder
from test_step import mesh_of

from panda_jax import sharding
from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.training import checkpoint as checkpoints
from panda_jax.training import checkpoint_parameters, run_record
from panda_jax.training import step as steps
from panda_jax.training.checkpoint_parameters import open_source

ORIGIN = {"added_tokens": {"[PAD]": 95}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint written by 2 x 2 x 2 devices with sharded parameters, and the same state on the host."""
    config = tiny.config(mesh={"data": 2, "fsdp": 2, "tensor": 2, "zero": 3})
    mesh = mesh_of(2, 2, 2)
    step = steps.build(config, mesh, run_steps=2)
    with jax.set_mesh(mesh):
        state = step.initial_state(jax.random.key(0))
        batch = sharding.to_global(tiny.batch(0), np.arange(8), mesh, 8)
        state, _ = step.train(state, batch)
    folder = tmp_path_factory.mktemp("checkpoints")
    saver = checkpoints.Checkpointer(folder, keep=1, keep_steps=())
    saver.save(1, state, {"must_match": {}, "model": tiny.MODEL, "step": 1, "init_from": ORIGIN}, b"model")
    saver.wait()
    return folder / "1", jax.device_get(state)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=str(path))


@pytest.mark.parametrize(("shape", "zero"), [((1, 1, 1), 1), ((1, 2, 1), 3), ((2, 1, 2), 1), ((2, 4, 1), 1)])
def test_a_checkpoint_of_eight_devices_opens_on_any_mesh(saved, shape, zero):
    path, expected = saved
    mesh = mesh_of(*shape)
    sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    step = steps.build(tiny.config(mesh=sizes | {"zero": zero}), mesh, run_steps=2)
    state = checkpoints.restore(path, step.state_shapes)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(step.state_shapes), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert_equal(jax.device_get(state), expected)


def test_parameters_alone(saved):
    path, expected = saved
    step = steps.build(tiny.config(), mesh_of(1, 1, 1), run_steps=2)
    values = checkpoints.restore_parameters(path, step.state_shapes["parameters"])
    assert_equal(jax.device_get(values), expected["parameters"])
    assert checkpoints.saved_parameter_shapes(path)["layers.wk"] == (3, 32, 4, 4)
    some = {name: step.state_shapes["parameters"][name] for name in ("norm", "layers.wo")}
    assert_equal(
        jax.device_get(checkpoints.restore_parameters(path, some)),
        {name: expected["parameters"][name] for name in some},
    )


def test_parameters_of_another_model_are_refused(saved):
    path, _ = saved
    shapes = steps.build(tiny.config(model={"mlp_dim": 48}), mesh_of(1, 1, 1), run_steps=2).state_shapes["parameters"]
    with pytest.raises(InputError, match=r"layers.w_down is \(3, 40, 32\), the model needs \(3, 48, 32\)"):
        checkpoints.restore_parameters(path, shapes)
    with pytest.raises(InputError, match=r"layers.bias is absent, the model needs \(32,\)"):
        checkpoints.restore_parameters(path, {"layers.bias": shapes["norm"]})


def test_parameters_one_by_one_are_those_restored_whole(saved, tmp_path):
    """Each stored tensor, [out, in], is its layer of the array; output n * H + h of a projection is head n, part h."""
    path, expected = saved
    values = expected["parameters"]
    for folder in (path, path.parent):
        weights = open_source(folder)
        assert weights.model == Model(**tiny.MODEL)
        assert (weights.tokenizer_model, weights.added_tokens) == (b"model", {"[PAD]": 95})
        assert (weights.provenance["step"], weights.provenance["init_from"]) == (1, ORIGIN)
    assert len(weights.tensors) == 3 + 9 * 3
    tensors = {name: lazy.read() for name, lazy in weights.tensors.items()}
    assert_equal(weights_folder.in_model_layout(tensors, weights.model), values)
    for name, lazy in weights.tensors.items():
        array = tensors[name]
        assert (array.shape, array.dtype, array.flags.c_contiguous) == (lazy.shape, np.float32, True), name
    with pytest.raises(InputError, match="no complete checkpoint here"):
        open_source(tmp_path)


def test_a_layer_can_be_read_without_the_others(tmp_path, monkeypatch):
    """On the disk a stack of matrices is cut between layers, and an array too large for one piece in any dimension.

    600 x 1 kB in pieces of at most 256 kB: 200 rows, the largest divisor of 600 under 256, are 204,800 bytes.
    """
    monkeypatch.setattr(checkpoints, "CHUNK_BYTES", 256 << 10)
    sizes = {"layers.wq": (3, 32, 8, 4), "layers.attn_norm": (3, 32), "embed": (600, 256), "norm": (32,)}
    values = {name: np.arange(np.prod(size), dtype=np.float32).reshape(size) for name, size in sizes.items()}
    saver = checkpoints.Checkpointer(tmp_path, keep=1, keep_steps=())
    saver.save(1, jax.device_put(small_state() | {"parameters": values}), {}, b"")
    saver.wait()
    arrays = {name: checkpoint_parameters._open_array(tmp_path / "1", name) for name in sizes}
    pieces = {name: tuple(array.chunk_layout.read_chunk.shape) for name, array in arrays.items()}
    assert pieces == {"layers.wq": (1, 32, 8, 4), "layers.attn_norm": (3, 32), "embed": (200, 256), "norm": (32,)}
    np.testing.assert_array_equal(arrays["layers.wq"][1].read().result(), values["layers.wq"][1])


def test_a_damaged_checkpoint_is_not_opened(saved, tmp_path):
    path, _ = saved
    copy = shutil.copytree(path, tmp_path / "1")
    (copy / "tokenizer.model").write_bytes(b"nodel")
    with pytest.raises(InputError, match="tokenizer.model has changed since it was written"):
        open_source(copy)
    assert open_source(path).tokenizer_model == b"model"


def test_periodic_checkpoints_are_deleted_and_named_ones_kept(tmp_path):
    """Saves at 1 … 6 that keep two, and 2 for good, leave 2, 5 and 6."""
    saver = checkpoints.Checkpointer(tmp_path, keep=2, keep_steps=(2,))
    state = small_state()
    for step in range(1, 7):
        saver.save(step, state, {}, b"")
    saver.wait()
    assert checkpoints.committed_steps(tmp_path) == [2, 5, 6]


def small_state() -> dict[str, Any]:
    values = {"embed": np.arange(6, dtype=np.float32).reshape(2, 3)}
    return jax.device_put({"parameters": values, "optimizer": (), "step": np.int32(1), "key": np.zeros(2, np.uint32)})


def test_a_failed_save_is_told_and_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    saver = checkpoints.Checkpointer(tmp_path, keep=2, keep_steps=())
    saver.save(1, small_state(), {}, b"")
    saver.wait()

    def fail(path: Path) -> str:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_sha256", fail)
        saver.save(2, small_state(), {}, b"")
        with pytest.raises(InputError, match="No space left on device.*older ones are untouched"):
            saver.wait()
    assert checkpoints.committed_steps(tmp_path) == [1]
    assert checkpoints.find_damage(tmp_path / "1") is None
    saver.save(2, small_state(), {}, b"")
    saver.wait()
    assert checkpoints.committed_steps(tmp_path) == [1, 2]


def test_a_save_after_a_failed_one_is_made(tmp_path, monkeypatch, capsys):
    """The failure is told at once; its debris is gone, and the newer state is not thrown away for it."""
    saver = checkpoints.Checkpointer(tmp_path, keep=2, keep_steps=())

    def fail(path: Path) -> str:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_sha256", fail)
        saver.save(1, small_state(), {}, b"")
        saver._thread.join()  # type: ignore[union-attr]
    told = capsys.readouterr().out
    assert f"warning: {tmp_path / '1'}: a checkpoint could not be written ([Errno 28] No space left" in told
    saver.save(2, small_state(), {}, b"")
    saver.wait()
    assert checkpoints.committed_steps(tmp_path) == [2] and not (tmp_path / "1").exists()


def test_an_old_checkpoint_that_cannot_be_deleted_fails_no_save(tmp_path, monkeypatch, capsys):
    saver = checkpoints.Checkpointer(tmp_path, keep=1, keep_steps=())
    saver.save(1, small_state(), {}, b"")
    saver.wait()
    refuse = lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(path)))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", refuse)
        saver.save(2, small_state(), {}, b"")
        saver.wait()
    assert f"warning: {tmp_path / '1'}: not deleted (Permission denied)" in capsys.readouterr().out
    assert checkpoints.committed_steps(tmp_path) == [1, 2]


def test_a_manifest_vouches_for_finished_files_alone(tmp_path):
    """What another process is writing at this moment, its manifest, shifts nobody's share of the files."""
    names = ["run.json", "tokenizer.model", "state/d/0", "state/manifest.ocdbt", "state/x.json"]
    for name in [*names, ".unfinished-1f", "manifest-1-of-2.json", ".unfinished-2e"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    covered = [str(path.relative_to(tmp_path)) for path in checkpoints._covered_files(tmp_path)]
    assert covered == sorted(names)


def test_two_processes_commit_together(tmp_path):
    """One manifest of two is no checkpoint; both are, and both are read when the files are verified."""
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    (folder / "manifest-1-of-2.json").write_text(json.dumps({"a.bin": [3, digest]}))
    assert checkpoints.committed_steps(tmp_path) == []
    (folder / "manifest-0-of-2.json").write_text("{}")
    assert checkpoints.committed_steps(tmp_path) == [7]
    assert checkpoints.find_damage(folder) is None
    (folder / "a.bin").write_bytes(b"abd")
    assert checkpoints.find_damage(folder) == "a.bin has changed since it was written (SHA-256 differs)"


def test_resolving_a_run_folder_or_a_step(tmp_path, saved):
    path, _ = saved
    assert checkpoints.resolve(str(path)) == path
    assert checkpoints.resolve(str(path.parent)) == path
    with pytest.raises(InputError, match="no complete checkpoint here"):
        checkpoints.resolve(str(tmp_path))


def test_resolving_never_walks_past_damage_in_silence(tmp_path, capsys):
    saver = checkpoints.Checkpointer(tmp_path / "run" / "checkpoints", keep=2, keep_steps=())
    for step in (1, 2):
        saver.save(step, small_state(), {}, b"")
        saver.wait()
    for step, told in ((2, True), (1, False)):
        (tmp_path / "run" / "checkpoints" / str(step) / "run.json").write_text("{ }")
        if told:
            assert checkpoints.resolve(str(tmp_path / "run")).name == "1"
            assert "checkpoints/2 is damaged: run.json" in capsys.readouterr().out
    with pytest.raises(InputError, match="every checkpoint is damaged; the newest: .*/2 is damaged: run.json"):
        checkpoints.resolve(str(tmp_path / "run"))


def test_settings_that_change_no_weight_do_not_stop_a_resume():
    """Every field of the model is either compared on resume or named as one that does not shape the weights."""
    fields = {field.name for field in dataclasses.fields(tiny.config().model)}
    assert set(run_record.NOT_ARCHITECTURE) < fields
    assert fields - set(run_record.NOT_ARCHITECTURE) == {
        "vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim", "norm_eps", "rope_theta",
        "tie_embeddings",
    }  # fmt: skip

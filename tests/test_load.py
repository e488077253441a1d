"""A model on the devices, from every kind of folder: the right values, in the right place and dtype."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
import weights_folder

from panda_jax.config import Compute, Mesh, Model
from panda_jax.errors import InputError
from panda_jax.training import load as loading
from panda_jax.training import start

MODEL = Model(**tiny.MODEL)


@pytest.fixture(autouse=True)
def any_tokenizer(monkeypatch):
    """No text is encoded here: what the file holds does not matter."""
    monkeypatch.setattr(loading, "Tokenizer", lambda model_bytes, origin: (model_bytes, origin))


def silent(text: str) -> None:
    pass


def test_matrices_take_the_compute_dtype_and_lie_as_the_mesh_says(tmp_path):
    """float16 on disk, bfloat16 on 2 x 2 x 2 devices; norms stay float32: rounding twice is rounding as numpy does."""
    tensors = weights_folder.random_tensors(MODEL, np.float16)
    folder = weights_folder.write(tmp_path / "w", MODEL, tensors, b"model")
    mesh = Mesh(data=2, fsdp=2, tensor=2, zero=3)
    loaded = loading.load(folder, Compute(dtype="bfloat16"), mesh, tmp_path, silent)
    expected = weights_folder.in_model_layout(tensors, MODEL)
    assert loaded.parameters.keys() == expected.keys()
    for name, values in expected.items():
        is_norm = name.endswith("norm")
        wanted = values if is_norm else values.astype(ml_dtypes.bfloat16)
        assert loaded.parameters[name].dtype == (jnp.float32 if is_norm else jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(loaded.parameters[name]), wanted, err_msg=name)
    shard = loaded.parameters["layers.wq"].addressable_shards[0].data.shape
    assert shard == (3, 32 // 2, 8 // 2, 4), "width over fsdp, heads over tensor"
    assert loaded.tokenizer == (b"model", str(folder / "tokenizer.model"))
    assert (loaded.model, loaded.source, loaded.run) == (MODEL, folder, None)


def test_the_fingerprint_tells_weights_and_tokenizers_apart(tmp_path):
    tensors = weights_folder.random_tensors(MODEL, np.float32)
    one = weights_folder.write(tmp_path / "one", MODEL, tensors, b"model")
    same = weights_folder.write(tmp_path / "same", MODEL, tensors, b"model")
    other = weights_folder.write(tmp_path / "other", MODEL, tensors, b"nodel")
    index = json.loads((one / "weights.json").read_text("utf-8"))
    found = {name: loading.open_model(tmp_path / name).fingerprint for name in ("one", "same", "other")}
    assert found["one"] == found["same"] != found["other"]
    index["provenance"]["root"] = "2b3c" * 16
    (same / "weights.json").write_text(json.dumps(index), "utf-8")
    rooted = loading.open_model(same).fingerprint
    assert rooted != found["one"]
    index["model"]["norm_eps"] = 2e-3  # corrected: no tensor has changed, and every score has
    (same / "weights.json").write_text(json.dumps(index), "utf-8")
    assert loading.open_model(same).fingerprint != rooted
    assert other.is_dir()


def test_foreign_folders_are_converted_once_into_the_cache(tmp_path, monkeypatch):
    """The door that converts is replaced by one that writes the weights a conversion would."""
    converted: list[tuple[str, str]] = []

    def convert(kind: str, folder: str, output: Path, option: str) -> None:
        converted.append((kind, folder))
        weights_folder.write(output, MODEL, weights_folder.random_tensors(MODEL, np.float32), b"model")

    monkeypatch.setattr(start, "convert", convert)
    for marker, kind in (("config.json", "hf"), ("params.json", "meta")):
        given = tmp_path / kind
        given.mkdir()
        (given / marker).write_text("{}")
        first, second = (loading.find(given, tmp_path / "cache", silent) for _ in range(2))
        assert first == second and first.is_relative_to(tmp_path / "cache" / "weights")
        assert converted == [(kind, str(given))]
        converted.clear()


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        loading.find(tmp_path / "nowhere", tmp_path, silent)
    with pytest.raises(InputError, match="no complete checkpoint here"):
        loading.find(tmp_path, tmp_path, silent)
    folder = weights_folder.write(tmp_path / "w", MODEL, weights_folder.random_tensors(MODEL, np.float32), None)
    with pytest.raises(InputError, match=r"has no tokenizer\.model"):
        loading.open_model(folder)


def test_a_mesh_that_does_not_divide_a_matrix_is_refused(tmp_path):
    folder = weights_folder.write(tmp_path / "w", MODEL, weights_folder.random_tensors(MODEL, np.float32), b"model")
    with pytest.raises(InputError, match=r"mesh.tensor: 8 does not divide layers\.w[kv] of shape \(3, 32, 4, 4\)"):
        loading.load(folder, Compute(), Mesh(tensor=8), tmp_path, silent)

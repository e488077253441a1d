"""Where a run starts: weights on disk reach the devices in place, grow by a named rule, or are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import weights_folder
from test_step import mesh_of

from panda_jax import command_line
from panda_jax.command_line import ChildFailed
from panda_jax.config import Config, InitFrom, Model
from panda_jax.errors import InputError
from panda_jax.training import checkpoint as checkpoints
from panda_jax.training import start
from panda_jax.training import step as steps
from panda_jax.training.checkpoint_parameters import open_source
from panda_jax.weights import open_weights

MODEL = Model(**tiny.MODEL)
EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}


def config_of(new_rows: Any = "refuse", mesh: dict[str, Any] | None = None, **model: Any) -> Config:
    """Return a tiny run that starts from `unused`; `model` are changed fields."""
    return tiny.config(
        model=model | {"init_from": InitFrom(checkpoint="unused", new_rows=new_rows)}, mesh=mesh or {"data": 1}
    )


def tokenizer_of(content: bytes = b"pieces", vocab_size: int = 96) -> Any:
    """Return what a start looks at of a tokenizer."""
    return SimpleNamespace(vocab_size=vocab_size, fingerprint=hashlib.sha256(content).hexdigest())


def loaded(source: Path, config: Config, shape: tuple[int, int, int]) -> tuple[dict[str, jax.Array], steps.Step]:
    """Return the parameters of `source` on a mesh, and the step they are for."""
    mesh = mesh_of(*shape)
    step = steps.build(config, mesh, run_steps=2)
    with jax.set_mesh(mesh):
        weights = open_source(source)
        return dict(start.parameters(source, weights, config, step.state_shapes["parameters"])), step


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A float16 weights folder of the tiny model, and its stored tensors."""
    tensors = weights_folder.random_tensors(MODEL, np.float16)
    return weights_folder.write(tmp_path_factory.mktemp("half") / "w", MODEL, tensors, b"pieces"), tensors


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint of a run that eight devices wrote, and its stored tensors."""
    tensors = weights_folder.random_tensors(MODEL, np.float32, seed=1)
    step = steps.build(tiny.config(mesh=EIGHT), mesh_of(2, 2, 2), run_steps=2)
    shardings = {name: shape.sharding for name, shape in step.state_shapes["parameters"].items()}
    values = jax.device_put(weights_folder.in_model_layout(tensors, MODEL), shardings)
    rest = jax.device_put({"optimizer": (), "step": np.int32(1), "key": np.zeros(2, np.uint32)})
    state = {"parameters": values} | rest
    folder = tmp_path_factory.mktemp("trained")
    saver = checkpoints.Checkpointer(folder / "checkpoints", keep=1, keep_steps=())
    architecture = {name: value for name, value in dataclasses.asdict(MODEL).items() if name != "init_from"}
    saver.save(1, state, {"must_match": {}, "model": architecture, "step": 1}, b"pieces")
    saver.wait()
    return folder / "checkpoints" / "1", tensors


# ---- onto the devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [1, 3])
def test_every_tensor_lies_where_the_mesh_wants_it(half, zero):
    source, tensors = half
    found, step = loaded(source, config_of(mesh=EIGHT | {"zero": zero}), (2, 2, 2))
    expected = weights_folder.in_model_layout(tensors, MODEL)
    assert found.keys() == expected.keys() == step.state_shapes["parameters"].keys()
    for name, array in found.items():
        wanted = step.state_shapes["parameters"][name]
        assert (array.shape, array.dtype) == (wanted.shape, np.float32)
        assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim), name
        np.testing.assert_array_equal(jax.device_get(array), expected[name], err_msg=name)
    # Replicas must agree as well: each device is asked for its own shard.
    for shard in found["layers.wq"].addressable_shards:
        np.testing.assert_array_equal(shard.data, expected["layers.wq"][shard.index])


def test_tied_bfloat16_weights(tmp_path):
    model = dataclasses.replace(MODEL, tie_embeddings=True)
    tensors = weights_folder.random_tensors(model, ml_dtypes.bfloat16)
    source = weights_folder.write(tmp_path / "w", model, tensors, None)
    found, _ = loaded(source, config_of(tie_embeddings=True), (1, 1, 1))
    expected = weights_folder.in_model_layout(tensors, model)
    assert found.keys() == expected.keys() and "lm_head" not in found
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_replicas_may_be_donated(half):
    """On CPU replicas share the host's buffer; a step that is given them must not compute in that buffer."""
    source, tensors = half
    found, _ = loaded(source, config_of(mesh=EIGHT), (2, 2, 2))
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    result = add(add(found["layers.wq"]))
    expected = weights_folder.in_model_layout(tensors, MODEL)["layers.wq"] + 1 + 1
    for shard in result.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])


def test_the_host_holds_one_parameter(tmp_path):
    """14 parameters of 4.1 MB in all, the largest 0.7 MB: at no moment are two of them in host memory.

    Width 128, 4 layers, MLP 344: w_gate, w_up and w_down take 4 x 128 x 344 x 4 = 704,512 bytes each. One layer of
    float16 and its float32 part beside it are 264,192 more.
    """
    sizes: dict[str, Any] = dict(dim=128, num_heads=4, num_kv_heads=2, mlp_dim=344, num_layers=4)
    model = dataclasses.replace(MODEL, **sizes)
    tensors = weights_folder.random_tensors(model, np.float16)
    source = weights_folder.write(tmp_path / "w", model, tensors, None)
    config = config_of(mesh=EIGHT | {"zero": 3}, **sizes)
    step = steps.build(config, mesh_of(2, 2, 2), run_steps=2)
    weights, total = open_weights(source), 0
    shapes = step.state_shapes["parameters"]
    dict(start.parameters(source, weights, config, {"norm": shapes["norm"]}))  # what is imported on first use
    tracemalloc.start()
    try:
        for _, array in start.parameters(source, weights, config, shapes):
            total += array.nbytes
            del array  # on CPU a device's memory is the host's, and may be the very buffer
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 4 * 704_512
    assert 704_512 < peak < 704_512 + 264_192 + 100_000, peak


def test_random_parameters_give_way_one_by_one(half):
    source, _ = half
    config = config_of()
    step = steps.build(config, mesh_of(1, 1, 1), run_steps=2)
    released: list[str] = []
    places = start.parameters(source, open_weights(source), config, step.state_shapes["parameters"], released.append)
    for count, (name, _) in enumerate(places, 1):
        assert released[-1] == name and len(released) == count


def test_a_checkpoint_gives_what_a_weights_folder_of_the_same_tensors_gives(trained):
    source, tensors = trained
    found, _ = loaded(source, config_of(mesh={"data": 2, "fsdp": 4, "zero": 3}), (2, 4, 1))
    for name, expected in weights_folder.in_model_layout(tensors, MODEL).items():
        np.testing.assert_array_equal(jax.device_get(found[name]), expected, err_msg=name)


# ---- more rows than the weights have --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["half", "trained"])
@pytest.mark.parametrize("rule", ["normal", "mean", "zeros"])
def test_a_vocabulary_grows_by_the_named_rule(request, kind, rule):
    """96 rows become 112; the normal draws (2 x 512 of them, of deviation 0.5) stay within 4 standard errors."""
    source, tensors = request.getfixturevalue(kind)
    config = config_of(rule, EIGHT | {"zero": 3}, vocab_size=112, init_std=0.5)
    found = {name: np.asarray(array) for name, array in loaded(source, config, (2, 2, 2))[0].items()}
    assert found["embed"].shape == (112, 32) and found["lm_head"].shape == (32, 112)
    old = weights_folder.in_model_layout(tensors, MODEL)
    np.testing.assert_array_equal(found["embed"][:96], old["embed"])
    np.testing.assert_array_equal(found["lm_head"][:, :96], old["lm_head"])
    np.testing.assert_array_equal(found["layers.wo"], old["layers.wo"])
    new = {"embed": found["embed"][96:], "lm_head": found["lm_head"][:, 96:].T}
    if rule == "normal":
        draws = np.concatenate([new["embed"], new["lm_head"]]).astype(np.float64).ravel()
        assert abs(draws.mean()) < 4 * 0.5 / math.sqrt(1024)
        assert abs(draws.std() - 0.5) < 4 * 0.5 / math.sqrt(2 * 1024)
        assert len(np.unique(draws)) > 1000  # every row and both tables have draws of their own
        other = config_of(rule, vocab_size=112, init_std=0.5)
        for name, array in loaded(source, other, (1, 1, 1))[0].items():
            np.testing.assert_array_equal(array, found[name], err_msg=name)
    else:
        for name, rows in new.items():
            means = [math.fsum(map(float, column)) / 96 for column in tensors[name].T]
            expected = np.asarray(means, np.float32) if rule == "mean" else np.zeros(32, np.float32)
            np.testing.assert_allclose(rows, np.tile(expected, (16, 1)), rtol=1e-6, atol=1e-9, err_msg=name)


def test_a_vocabulary_that_did_not_divide_grows_to_one_that_does(tmp_path):
    """33 rows cannot lie over two devices; the 34 of the run can."""
    model = dataclasses.replace(MODEL, vocab_size=33)
    tensors = weights_folder.random_tensors(model, np.float16)
    source = weights_folder.write(tmp_path / "w", model, tensors, None)
    found, _ = loaded(source, config_of("zeros", {"data": 1, "tensor": 2}, vocab_size=34), (1, 1, 2))
    np.testing.assert_array_equal(np.asarray(found["embed"])[:33], tensors["embed"].astype(np.float32))
    assert not np.asarray(found["embed"])[33].any()


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "found", "write"),
    [
        ({"dim": 48}, "model.dim 32, this run 48", "`dim: 32`"),
        ({"num_layers": 4}, "model.num_layers 3, this run 4", "`num_layers: 3`"),
        ({"num_heads": 4}, "model.num_heads 8, this run 4", "`num_heads: 8`"),
        ({"num_kv_heads": 2}, "model.num_kv_heads 4, this run 2", "`num_kv_heads: 4`"),
        ({"mlp_dim": 48}, "model.mlp_dim 40, this run 48", "`mlp_dim: 40`"),
        ({"norm_eps": 1e-6}, "model.norm_eps 1e-05, this run 1e-06", "`norm_eps: 1e-05`"),
        ({"rope_theta": 5e5}, "model.rope_theta 10000.0, this run 500000.0", "`rope_theta: 10000.0`"),
        ({"tie_embeddings": True}, "model.tie_embeddings False, this run True", "`tie_embeddings: false`"),
        (
            {"norm_eps": 1e-6, "mlp_dim": 48},
            "model.mlp_dim 40, this run 48; model.norm_eps 1e-05, this run 1e-06",
            "`mlp_dim: 40`, `norm_eps: 1e-05`",
        ),
    ],
)
def test_another_architecture_is_refused_by_name(half, changes, found, write):
    source, _ = half
    with pytest.raises(InputError) as caught:
        start.check_same_model(source, open_weights(source), config_of(**changes), tokenizer_of())
    assert str(caught.value) == f"model.init_from: {source} has {found}; write {write} under `model:`"


def test_settings_that_shape_no_weight_may_differ(half):
    source, _ = half
    config = config_of(init_std=0.5, context_length=32, size="tiny-1m")
    start.check_same_model(source, open_weights(source), config, tokenizer_of())


def test_another_tokenizer_is_refused_with_the_right_one(half):
    source, _ = half
    with pytest.raises(InputError) as caught:
        start.check_same_model(source, open_weights(source), config_of(), tokenizer_of(b"others"))
    theirs, ours = (hashlib.sha256(content).hexdigest()[:12] for content in (b"pieces", b"others"))
    message = str(caught.value)
    assert f"has tokenizer {theirs}…, this run {ours}…" in message
    assert f"write `path: {source}/tokenizer.model` under `tokenizer:`" in message


@pytest.mark.parametrize(
    ("rows", "rule", "pieces", "said"),
    [
        (88, "normal", 88, "has 96 rows of vocabulary, this run 88; write `vocab_size: 96` under `model:` and "
         "`extra_ids: 8` under `tokenizer:`, or convert the weights with --drop-pad"),
        (97, "refuse", 96, "has 96 rows of vocabulary, this run 97; write `vocab_size: 96` under `model:` and "
         "`extra_ids: 0` under `tokenizer:`, or say how the 1 new ones begin: `new_rows: normal`"),
        (97, "refuse", 97, "has 96 rows of vocabulary, this run 97; say how the 1 new ones begin: `new_rows: normal`"),
        (97, "normal", 96, None),
        (96, "refuse", 90, None),
    ],
)  # fmt: skip
def test_rows_of_the_vocabulary(half, rows, rule, pieces, said):
    source, _ = half
    config, tokenizer = config_of(rule, vocab_size=rows), tokenizer_of(vocab_size=pieces)
    if said is None:
        start.check_same_model(source, open_weights(source), config, tokenizer)
        return
    with pytest.raises(InputError) as caught:
        start.check_same_model(source, open_weights(source), config, tokenizer)
    assert said in str(caught.value) and "  " not in str(caught.value)


# ---- foreign weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A folder that pretends to hold foreign weights, and a conversion that writes the tiny model in its place."""
    (tmp_path / "llama" / "7B").mkdir(parents=True)
    (tmp_path / "llama" / "7B" / "params.json").write_text("{}")
    seen = SimpleNamespace(folder=tmp_path / "llama" / "7B", calls=[], said=[], fails=False)

    def run_module(module: str, *arguments: str) -> None:
        seen.calls.append((module, *arguments))
        if seen.fails:
            raise ChildFailed(2)
        output = Path(arguments[arguments.index("--output") + 1])
        weights_folder.write(output, MODEL, weights_folder.random_tensors(MODEL, np.float16), None)

    monkeypatch.setattr(command_line, "run_module", run_module)
    for door in ("hf", "meta"):
        (tmp_path / "root" / "convert").mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / "convert" / f"{door}.py").touch()
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "root" / "panda_jax" / "command_line.py"))
    place: Callable[[str], dict[str, Any]] = lambda kind: {kind: str(seen.folder)}  # noqa: E731
    seen.config = lambda kind: tiny.config(
        model={"init_from": InitFrom(**place(kind))}, data={"cache_dir": str(tmp_path / "cache")}
    )
    return seen


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_foreign_weights_are_converted_once(foreign, tmp_path, kind):
    config = foreign.config(kind)
    found = start.find_source(config, foreign.said.append)
    assert found.parent == tmp_path / "cache" / "weights"
    assert found.name.startswith("7B-") and len(found.name) == len("7B-") + 16
    assert foreign.calls == [(f"convert.{kind}", "import", "--input", str(foreign.folder), "--output", str(found))]
    assert open_weights(found).model == MODEL
    assert start.find_source(config, foreign.said.append) == found and len(foreign.calls) == 1
    assert foreign.said == [
        f"weights of {foreign.folder}: converting into {found}",
        f"weights of {foreign.folder}: converted before, in {found}",
    ]


def test_changed_files_are_converted_anew(foreign, tmp_path):
    config = foreign.config("meta")
    names = [start.find_source(config, foreign.said.append).name]
    (foreign.folder / "params.json").write_text('{"dim": 8}')
    names.append(start.find_source(config, foreign.said.append).name)
    os.utime(foreign.folder / "params.json", (1, 1))
    names.append(start.find_source(config, foreign.said.append).name)
    (tmp_path / "llama" / "tokenizer.model").write_bytes(b"pieces")
    names.append(start.find_source(config, foreign.said.append).name)
    names.append(start.find_source(foreign.config("hf"), foreign.said.append).name)
    assert len(set(names)) == 5 and len(foreign.calls) == 5


def test_a_conversion_that_fails_stops_the_start_and_is_tried_again(foreign):
    foreign.fails = True
    with pytest.raises(ChildFailed):
        start.find_source(foreign.config("hf"), foreign.said.append)
    foreign.fails = False
    start.find_source(foreign.config("hf"), foreign.said.append)
    assert len(foreign.calls) == 2


def test_a_missing_folder_and_a_missing_converter_are_told(foreign, tmp_path):
    (tmp_path / "root" / "convert" / "hf.py").unlink()
    with pytest.raises(InputError, match=r"model\.init_from\.hf: .*root has no convert/hf\.py.*init_from\.checkpoint"):
        start.find_source(foreign.config("hf"), foreign.said.append)
    foreign.folder = tmp_path / "nowhere"
    with pytest.raises(InputError, match=r"model\.init_from\.meta: .*nowhere: No such file or directory; expected a"):
        start.find_source(foreign.config("meta"), foreign.said.append)
    assert foreign.calls == []


def test_what_is_remembered_and_said_of_the_start(half, trained):
    source, _ = half
    config = config_of("normal", vocab_size=98)
    origin = start.describe_origin(source, open_weights(source), config)
    assert origin == {
        "path": str(source),
        "provenance": {"format": "hf", "path": "somebody/llama", "root": "1a2b" * 16},
        "dtype": "float16",
        "added_tokens": {"[PAD]": 95},
        "new_rows": "2 normal",
    }
    assert start.describe_start(source, origin) == (
        f"parameters from {source} (hf: somebody/llama, float16, root 1a2b1a2b1a2b…, new rows: 2 normal)"
    )
    source, _ = trained
    origin = start.describe_origin(source, open_source(source), config_of())
    assert start.describe_start(source, origin) == f"parameters from {source} (float32)"

"""The proof by logits: three implementations agree on right weights, and every wrong conversion is noticed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor

from convert import transformers_side
from convert.parity import Parity, compare, meta_logits, our_logits
from convert.probe import Probe, make_probe
from convert.transformers_side import logits_of_child, transformers_logits
from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.presets import PRESETS
from panda_jax.weights import Lazy, from_model, to_model

Arrays = dict[str, np.ndarray]

# All different, so that a confused axis cannot pass: D 48, N 6, K 2, G 3, H 8, F 40, V 61, L 4; the probe has T 32.
GROUPED = Model(
    vocab_size=61, dim=48, num_layers=4, num_heads=6, num_kv_heads=2, mlp_dim=40, norm_eps=1e-6, context_length=4096
)
FULL = replace(GROUPED, num_kv_heads=6, rope_theta=500.0, norm_eps=1e-2)
TIED = replace(GROUPED, tie_embeddings=True)
MODELS = [pytest.param(GROUPED, id="grouped"), pytest.param(FULL, id="full"), pytest.param(TIED, id="tied")]

# our name, Meta's, Hugging Face's: PROTOCOLS.md §1
LAYER_NAMES = [
    ("attn_norm", "attention_norm", "input_layernorm"),
    ("wq", "attention.wq", "self_attn.q_proj"),
    ("wk", "attention.wk", "self_attn.k_proj"),
    ("wv", "attention.wv", "self_attn.v_proj"),
    ("wo", "attention.wo", "self_attn.o_proj"),
    ("mlp_norm", "ffn_norm", "post_attention_layernorm"),
    ("w_gate", "feed_forward.w1", "mlp.gate_proj"),
    ("w_up", "feed_forward.w3", "mlp.up_proj"),
    ("w_down", "feed_forward.w2", "mlp.down_proj"),
]
OTHER_NAMES = [
    ("embed", "tok_embeddings", "model.embed_tokens"),
    ("norm", "norm", "model.norm"),
    ("lm_head", "output", "lm_head"),
]


def lazy(array: np.ndarray) -> Lazy:
    return Lazy(array.shape, array.dtype, array.copy)


def lazies(arrays: Arrays) -> dict[str, Lazy]:
    return {name: lazy(array) for name, array in arrays.items()}


@cache
def meta_arrays(model: Model) -> Arrays:
    """Random weights in Meta's names and rotary order, large enough for attention to be far from uniform."""
    D, F, V, kv = model.dim, model.mlp_dim, model.vocab_size, model.num_kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (V, D), "norm": (D,), "output": (V, D)}
    for i in range(model.num_layers):
        shapes |= {f"layers.{i}.attention.{name}": (D, D) for name in ("wq", "wo")}
        shapes |= {f"layers.{i}.attention.{name}": (kv, D) for name in ("wk", "wv")}
        shapes |= {f"layers.{i}.feed_forward.{name}": (F, D) for name in ("w1", "w3")}
        shapes |= {f"layers.{i}.feed_forward.w2": (D, F)}
        shapes |= {f"layers.{i}.{name}": (D,) for name in ("attention_norm", "ffn_norm")}
    random = np.random.default_rng(0)
    arrays = {}
    for name, shape in shapes.items():
        values = random.uniform(0.5, 1.5, shape) if name.endswith("norm") else random.normal(0, 0.15, shape)
        arrays[f"{name}.weight"] = values.astype(np.float32)
    if model.tie_embeddings:
        arrays["output.weight"] = arrays["tok_embeddings.weight"]
    return arrays


def half_split(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Row 2i of every head of Meta's goes to i, row 2i + 1 to i + H/2 (PROTOCOLS.md §1)."""
    head_dim = len(array) // num_heads
    moved = np.empty_like(array)
    for head in range(num_heads):
        for i in range(head_dim // 2):
            moved[head * head_dim + i] = array[head * head_dim + 2 * i]
            moved[head * head_dim + head_dim // 2 + i] = array[head * head_dim + 2 * i + 1]
    return moved


def stored_arrays(model: Model, meta: Arrays) -> Arrays:
    """The same weights under our names and in half-split order."""
    arrays = {ours: meta[f"{theirs}.weight"] for ours, theirs, _ in OTHER_NAMES}
    for i in range(model.num_layers):
        arrays |= {f"layers.{i}.{ours}": meta[f"layers.{i}.{theirs}.weight"] for ours, theirs, _ in LAYER_NAMES}
        arrays[f"layers.{i}.wq"] = half_split(arrays[f"layers.{i}.wq"], model.num_heads)
        arrays[f"layers.{i}.wk"] = half_split(arrays[f"layers.{i}.wk"], model.num_kv_heads)
    return {name: array for name, array in arrays.items() if name != "lm_head" or not model.tie_embeddings}


def stored(model: Model) -> Arrays:
    return stored_arrays(model, meta_arrays(model))


def params(model: Model) -> dict[str, Any]:
    """What params.json of the model says; published LLaMA-1 files leave n_kv_heads and rope_theta out."""
    says = {"dim": model.dim, "n_layers": model.num_layers, "n_heads": model.num_heads, "norm_eps": model.norm_eps}
    says |= {"vocab_size": -1, "rope_theta": model.rope_theta}
    return says | ({"n_kv_heads": model.num_kv_heads} if model.num_kv_heads != model.num_heads else {})


def config_json(model: Model) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": model.vocab_size - 1,
    }


def write_huggingface(
    folder: Path, model: Model, arrays: Arrays, dtype: torch.dtype = torch.float32, form: str = "safetensors"
) -> Path:
    """Write a Hugging Face folder by hand; `form` is safetensors or bin, with " sharded" for two files and an index."""
    names = {
        f"layers.{i}.{o}": f"model.layers.{i}.{h}.weight" for i in range(model.num_layers) for o, _, h in LAYER_NAMES
    }
    names |= {ours: f"{theirs}.weight" for ours, _, theirs in OTHER_NAMES}
    tensors = {names[name]: torch.from_numpy(array.copy()).to(dtype) for name, array in arrays.items()}
    stem, suffix = ("model", "safetensors") if form.startswith("safetensors") else ("pytorch_model", "bin")
    save: Callable[[dict[str, torch.Tensor], Path], None] = save_file if suffix == "safetensors" else torch.save
    if form.endswith("sharded"):
        order = sorted(tensors)
        shards = {f"{stem}-0000{n + 1}-of-00002.{suffix}": order[n::2] for n in range(2)}
        for file, held in shards.items():
            save({name: tensors[name] for name in held}, folder / file)
        places = {name: file for file, held in shards.items() for name in held}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        save(tensors, folder / f"{stem}.{suffix}")
    (folder / "config.json").write_text(json.dumps(config_json(model)))
    return folder


@cache
def reference(model: Model) -> np.ndarray:
    return meta_logits(lazies(meta_arrays(model)), params(model), make_probe(model))


def against_meta(model: Model, arrays: Arrays, settings: Model | None = None) -> Parity:
    """Ours from `arrays`, read with `settings`, against Meta's convention on the right weights."""
    probe = make_probe(model)
    return compare(our_logits(lazies(arrays), settings or model, probe), reference(model), probe, "meta")


# ---- right weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_ours_meta_and_transformers_agree(model: Model, tmp_path: Path) -> None:
    probe = make_probe(model)
    ours = our_logits(lazies(stored(model)), model, probe)
    theirs = transformers_logits(write_huggingface(tmp_path, model, stored(model)), probe)
    assert ours.dtype == theirs.dtype == reference(model).dtype == np.float32
    for found in (compare(ours, theirs, probe, "transformers"), compare(ours, reference(model), probe, "meta")):
        assert found.passed and found.max_abs_difference <= 1e-5
        assert found.max_abs_logit > 1
        assert (found.layers_compared, found.num_layers, found.num_tokens) == (4, 4, 64)


def test_a_child_computes_the_same_logits(tmp_path: Path) -> None:
    folder, probe = write_huggingface(tmp_path, GROUPED, stored(GROUPED)), make_probe(GROUPED)
    np.testing.assert_allclose(logits_of_child(folder, probe), transformers_logits(folder, probe), atol=1e-6)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("safetensors sharded", torch.bfloat16), ("bin", torch.float16), ("bin sharded", torch.bfloat16)],
)
def test_every_container_and_dtype_reads_alike(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Both sides round the same weights to 16 bits and compute in float32, whatever config.json says of the dtype."""
    narrow = np.dtype(np.float16 if dtype == torch.float16 else ml_dtypes.bfloat16)
    probe = make_probe(GROUPED)
    ours = our_logits(lazies({n: a.astype(narrow) for n, a in stored(GROUPED).items()}), GROUPED, probe)
    theirs = transformers_logits(write_huggingface(tmp_path, GROUPED, stored(GROUPED), dtype, form), probe)
    assert np.abs(ours - theirs).max() <= 1e-5
    assert np.abs(ours - reference(GROUPED)).max() > 1e-4  # the rounding is there


def test_trained_weights_agree_and_continue_as_published(shared_data: Path) -> None:
    """Greedy decoding in Meta's convention gives the sentence quoted beside the weights; ours picks the same tokens."""
    folder = shared_data / "weights" / "stories260K-meta"
    quoted = re.search(r"stories260K-meta/.*?begins \"(.*?)\"", (shared_data / "README.md").read_text(encoding="utf-8"))
    assert quoted and len(quoted[1]) > 100
    says = json.loads((folder / "params.json").read_text(encoding="utf-8"))
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    meta = {name: tensor.numpy() for name, tensor in state.items()}
    model = Model(
        vocab_size=len(meta["tok_embeddings.weight"]),
        dim=says["dim"],
        num_layers=says["n_layers"],
        num_heads=says["n_heads"],
        num_kv_heads=says["n_kv_heads"],
        mlp_dim=len(meta["layers.0.feed_forward.w1.weight"]),
        norm_eps=says["norm_eps"],
        context_length=512,
    )
    theirs, ours = lazies(meta), lazies(stored_arrays(model, meta))
    probe = make_probe(model)
    found = compare(our_logits(ours, model, probe), meta_logits(theirs, says, probe), probe, "meta")
    assert found.max_abs_difference <= 1e-5 and found.layers_compared == 5

    tokenizer = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = [tokenizer.bos_id()]
    while len(tokenizer.decode(tokens)) < len(quoted[1]):
        last = meta_logits(theirs, says, whole_vocabulary(model, tokens))[0, -1]
        tokens.append(int(last.argmax()))
    assert tokenizer.decode(tokens).startswith(quoted[1])
    picked = our_logits(ours, model, whole_vocabulary(model, tokens[:-1])).argmax(axis=-1)
    assert picked[0].tolist() == tokens[1:]


def whole_vocabulary(model: Model, tokens: list[int]) -> Probe:
    """One row from position 0, every layer, logits of every id."""
    return Probe(
        tokens=np.array([tokens], np.int32),
        positions=np.arange(len(tokens), dtype=np.int32)[None],
        ids=np.arange(model.vocab_size, dtype=np.int32),
        num_layers=model.num_layers,
        model_layers=model.num_layers,
        vocab_size=model.vocab_size,
    )


# ---- wrong weights --------------------------------------------------------------------------------------------------


def changed(role: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    """Return a function that changes one parameter in every layer."""
    return lambda arrays: {n: change(a) if n.endswith(role) else a for n, a in arrays.items()}


def swapped(one: str, other: str) -> Callable[[Arrays], Arrays]:
    def swap(arrays: Arrays) -> Arrays:
        def twin(name: str) -> str:
            ending, new = (one, other) if name.endswith(one) else (other, one)
            return name.removesuffix(ending) + new if name.endswith((one, other)) else name

        return {name: arrays[twin(name)] for name in arrays}

    return swap


def unpermuted(arrays: Arrays) -> Arrays:
    """Meta's rows of wq and wk where half-split ones belong."""
    meta = meta_arrays(GROUPED)
    rows = {f"layers.{i}.{w}": meta[f"layers.{i}.attention.{w}.weight"] for i in range(4) for w in ("wq", "wk")}
    return arrays | rows


def test_the_unpermuted_control_fails_by_far() -> None:
    assert against_meta(GROUPED, unpermuted(stored(GROUPED))).max_abs_difference >= 0.1


WRONG: dict[str, Callable[[Arrays], Arrays]] = {
    "wq alone unpermuted": lambda arrays: arrays | {n: a for n, a in unpermuted(arrays).items() if n.endswith("wq")},
    "permuted twice": changed("wq", lambda a: half_split(a, 6)),
    "gate and up swapped": swapped("w_gate", "w_up"),
    "keys and values swapped": swapped("wk", "wv"),
    "norms swapped": swapped("attn_norm", "mlp_norm"),
    "a square matrix transposed": changed("wo", lambda a: np.ascontiguousarray(a.T)),
    "kv heads in another order": changed("wv", lambda a: a.reshape(2, 8, 48)[::-1].reshape(16, 48)),
    "query heads in another order": changed("wq", lambda a: np.roll(a, 8, axis=0)),
    "two layers swapped": swapped("0.w_down", "1.w_down"),
    "embedding shifted by a row": changed("embed", lambda a: np.roll(a, 1, axis=0)),
    "output shifted by a row": changed("lm_head", lambda a: np.roll(a, 1, axis=0)),
    "tied by mistake": lambda arrays: arrays | {"lm_head": arrays["embed"]},
    "final norm left out": lambda arrays: arrays | {"norm": np.ones(48, np.float32)},
    "one weight of 2304 wrong": lambda arrays: arrays | {"layers.3.wo": one_wrong(arrays["layers.3.wo"])},
}


def one_wrong(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed[5, 7] += 0.2
    return changed


@pytest.mark.parametrize("mistake", WRONG)
def test_every_mistake_in_the_tensors_is_noticed(mistake: str) -> None:
    found = against_meta(GROUPED, WRONG[mistake](stored(GROUPED)))
    assert not found.passed and found.max_abs_difference > 10 * found.tolerance


@pytest.mark.parametrize("setting", [{"rope_theta": 500.0}, {"norm_eps": 1e-2}, {"norm_eps": 1e-5}], ids=str)
def test_every_mistake_in_the_settings_is_noticed(setting: dict[str, float], tmp_path: Path) -> None:
    wrong = replace(GROUPED, **setting)
    assert against_meta(GROUPED, stored(GROUPED), wrong).max_abs_difference > 1e-3
    probe = make_probe(GROUPED)
    theirs = transformers_logits(write_huggingface(tmp_path, wrong, stored(GROUPED)), probe)
    assert compare(theirs, reference(GROUPED), probe, "meta").max_abs_difference > 1e-3


# ---- the probe and its cuts -----------------------------------------------------------------------------------------


def test_the_probe_is_fixed_and_reaches_the_ends() -> None:
    probe, again = make_probe(GROUPED), make_probe(GROUPED)
    for name in ("tokens", "positions", "ids"):
        np.testing.assert_array_equal(getattr(probe, name), getattr(again, name))
    assert probe.tokens.shape == probe.positions.shape == (2, 32)
    assert probe.tokens.dtype == probe.positions.dtype == np.int32
    assert probe.positions[0].tolist() == [*range(24), *range(4088, 4096)]
    assert (probe.positions[1, 0], probe.positions[1, -1]) == (0, 4095)
    assert (np.diff(probe.positions) > 0).all()
    assert (probe.ids[0], probe.ids[-1]) == (0, 60) and len(set(probe.ids.tolist())) == len(probe.ids) > 30
    np.testing.assert_array_equal(probe.ids[probe.rows], probe.tokens)
    short = make_probe(replace(GROUPED, context_length=10))
    assert short.positions.tolist() == [[*range(10)], [*range(10)]]
    assert make_probe(replace(GROUPED, context_length=1)).positions.tolist() == [[0], [0]]


def test_as_many_layers_run_as_fit() -> None:
    """A layer has 2·48·48 + 2·16·48 + 3·48·40 + 2·48 = 12,000 parameters, 48,000 bytes."""
    for budget, num_layers in ((1, 1), (95_999, 1), (96_000, 2), (191_999, 3), (192_000, 4), (10**9, 4)):
        assert make_probe(GROUPED, budget).num_layers == num_layers
    sizes = {"tiny-110m": 12, "llama-7b": 1, "llama-13b": 1, "llama-65b": 1}
    assert {size: make_probe(Model(**PRESETS[size])).num_layers for size in sizes} == sizes


def test_a_cut_equals_the_model_without_the_rest(tmp_path: Path) -> None:
    """Two layers of four, the others absent, against all layers of a model that has two; and against all rows."""
    small = replace(GROUPED, num_layers=2)
    cut, whole = make_probe(GROUPED, 96_000), make_probe(small)
    assert cut.num_layers == whole.num_layers == 2
    arrays = {n: a for n, a in stored(GROUPED).items() if not n.startswith(("layers.2", "layers.3"))}
    meta = {n: a for n, a in meta_arrays(GROUPED).items() if not n.startswith(("layers.2", "layers.3"))}
    ours = our_logits(lazies(arrays), GROUPED, cut)
    np.testing.assert_array_equal(ours, our_logits(lazies(arrays), small, whole))
    every_row = replace_ids(whole, np.arange(61, dtype=np.int32))
    np.testing.assert_allclose(ours, our_logits(lazies(arrays), small, every_row)[..., cut.ids], atol=1e-6)
    assert np.abs(ours - meta_logits(lazies(meta), params(GROUPED), cut)).max() <= 1e-5
    assert np.abs(ours - transformers_logits(write_huggingface(tmp_path, GROUPED, arrays), cut)).max() <= 1e-5
    assert np.abs(ours - our_logits(lazies(stored(GROUPED)), GROUPED, make_probe(GROUPED))).max() > 0.1


def replace_ids(probe: Probe, ids: np.ndarray) -> Probe:
    return Probe(probe.tokens, probe.positions, ids, probe.num_layers, probe.model_layers, probe.vocab_size)


# ---- the verdict ----------------------------------------------------------------------------------------------------


def test_the_tolerance_grows_with_the_logits_and_nothing_undefined_passes() -> None:
    """The largest logit is 4, so 4e-5 is allowed; below 1 it is 1e-5. The values are sums of powers of two."""
    probe = whole_vocabulary(replace(GROUPED, vocab_size=2), [0, 1])
    theirs = np.array([[[4.0, -1.0], [0.0, 2.0]]], np.float32)
    within, beyond = np.float32(2.0**-15), np.float32(2.0**-14)  # 3.1e-5 and 6.1e-5
    assert compare(theirs, theirs, probe, "x").max_abs_difference == 0
    found = compare(theirs + np.array([[[0, 0], [within, 0]]], np.float32), theirs, probe, "x")
    assert found == Parity(float(within), 4.0, 4, 4, 2, "x") and found.passed and found.tolerance == 4e-5
    assert not compare(theirs - np.array([[[0, 0], [beyond, 0]]], np.float32), theirs, probe, "x").passed
    small = theirs / 8
    assert not compare(small + np.array([[[0, 0], [within, 0]]], np.float32), small, probe, "x").passed
    slight = np.array([[[0, 0], [2.0**-17, 0]]], np.float32)  # 7.6e-6
    assert compare(small + slight, small, probe, "x").passed
    broken = theirs.copy()
    broken[0, 1, 1] = np.nan
    assert not compare(broken, broken, probe, "x").passed
    with pytest.raises(InputError, match=r"our side: logits of shape \(1, 2, 1\), the probe gives \(1, 2, 2\)"):
        compare(theirs[..., :1], theirs, probe, "x")


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_what_a_cut_would_hide_is_refused(tmp_path: Path) -> None:
    probe = make_probe(GROUPED, 48_000)
    shallow, narrow = replace(GROUPED, num_layers=3), replace(GROUPED, vocab_size=60)
    with pytest.raises(InputError, match="our side: 3 layers, the model to compare with has 4"):
        our_logits(lazies(stored(shallow)), shallow, probe)
    with pytest.raises(InputError, match="params.json: 3 layers, the model to compare with has 4"):
        meta_logits(lazies(meta_arrays(shallow)), params(shallow), probe)
    with pytest.raises(InputError, match="config.json: 3 layers, the model to compare with has 4"):
        transformers_logits(write_huggingface(tmp_path, shallow, stored(shallow)), probe)
    with pytest.raises(InputError, match="embed: 60 rows, the model to compare with has 61"):
        our_logits(lazies(stored(narrow)), GROUPED, probe)
    with pytest.raises(InputError, match="tok_embeddings.weight: 60 rows, the model to compare with has 61"):
        meta_logits(lazies(meta_arrays(narrow)), params(narrow), probe)
    with pytest.raises(InputError, match="config.json: 60 rows of vocabulary, the model to compare with has 61"):
        transformers_logits(write_huggingface(tmp_path, narrow, stored(narrow)), probe)


@pytest.mark.parametrize("name", ["embed", "norm", "lm_head", "layers.2.wk"])
def test_an_absent_tensor_is_named(name: str, tmp_path: Path) -> None:
    arrays = {n: a for n, a in stored(GROUPED).items() if n != name}
    with pytest.raises(InputError, match=f"^{re.escape(name)} is absent"):
        our_logits(lazies(arrays), GROUPED, make_probe(GROUPED))
    with pytest.raises(InputError, match=r"(embed_tokens|norm|lm_head|layers\.2\.self_attn\.k_proj)\.weight is absent"):
        transformers_logits(write_huggingface(tmp_path, GROUPED, arrays), make_probe(GROUPED))


def test_a_damaged_huggingface_folder_is_refused(tmp_path: Path) -> None:
    probe = make_probe(GROUPED)
    with pytest.raises(InputError, match="config.json"):
        transformers_logits(tmp_path, probe)
    write_huggingface(tmp_path, GROUPED, stored(GROUPED), form="safetensors sharded")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors: the index names it, but it is absent"):
        transformers_logits(tmp_path, probe)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match="index.json: damaged"):
        transformers_logits(tmp_path, probe)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor pytorch_model.bin"):
        transformers_logits(tmp_path, probe)
    write_huggingface(tmp_path, GROUPED, changed("w_up", lambda a: a[:-1])(stored(GROUPED)))
    with pytest.raises(InputError, match="do not fit config.json"):
        transformers_logits(tmp_path, probe)


def test_transformers_is_available_here_and_its_absence_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transformers_side.available()
    found = transformers_side.importlib.util.find_spec
    monkeypatch.setattr(
        transformers_side.importlib.util, "find_spec", lambda name: None if name == "torch" else found(name)
    )
    assert not transformers_side.available()


# ---- orientation ----------------------------------------------------------------------------------------------------

PRODUCTS = {
    "wq": "d,dnh->nh",
    "wk": "d,dkh->kh",
    "wv": "d,dkh->kh",
    "wo": "nh,nhd->d",
    "w_gate": "d,df->f",
    "w_up": "d,df->f",
    "w_down": "f,fd->d",
    "lm_head": "d,dv->v",
}


@pytest.mark.parametrize("role", PRODUCTS)
def test_the_model_file_multiplies_as_the_stored_matrix_does(role: str) -> None:
    """Stored [out, in] maps x to matrix @ x; the model file's einsum must give the same numbers in its own shapes."""
    name = role if role == "lm_head" else f"layers.2.{role}"
    matrix = stored(GROUPED)[name].astype(np.float64)
    held = to_model(name, matrix, GROUPED)
    sizes = {"d": 48, "n": 6, "k": 2, "h": 8, "f": 40, "v": 61}
    inputs, weight = PRODUCTS[role].split("->")[0].split(",")
    assert held.shape == tuple(sizes[axis] for axis in weight)
    x = np.random.default_rng(3).normal(size=[sizes[axis] for axis in inputs])
    np.testing.assert_allclose(np.einsum(PRODUCTS[role], x, held).ravel(), matrix @ x.ravel(), rtol=1e-12, atol=1e-12)


def test_orientation_is_a_bijection_that_keeps_the_bits() -> None:
    for name, array in stored(GROUPED).items():
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            narrow = array.astype(dtype)
            held = np.ascontiguousarray(to_model(name, narrow, GROUPED))
            back = from_model(name, held, GROUPED)
            assert back.dtype == narrow.dtype and back.shape == narrow.shape and back.flags.c_contiguous
            assert back.tobytes() == narrow.tobytes()


def test_a_matrix_of_another_shape_is_refused() -> None:
    array = stored(GROUPED)["layers.0.w_gate"]
    with pytest.raises(InputError, match=r"layers.0.w_gate has shape \(48, 40\), the model needs \(40, 48\)"):
        to_model("layers.0.w_gate", array.T, GROUPED)
    with pytest.raises(InputError, match=r"wo has shape \(48, 6, 8\), the model needs \(6, 8, 48\)"):
        from_model("wo", np.zeros((48, 6, 8), np.float32), GROUPED)

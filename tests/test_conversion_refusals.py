"""Bad input to the converters: exit status 2, one line that names what is wrong, and nothing lost or left behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from foreign import GQA, refused
from safetensors.torch import load_file, save_file

from convert import hf, meta

F32, F16 = torch.float32, torch.float16
STATE = foreign.random_state(GQA, F16)
WQ = "layers.1.attention.wq.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def import_of(door, tmp_path: Path, capsys) -> str:
    """Refuse the import of tmp_path/source."""
    return refused(capsys, door, "import", "--input", tmp_path / "source", "--output", tmp_path / "out", "--no-verify")


# ---- Meta's folders -------------------------------------------------------------------------------------------------


def on_rank(number: int, change):
    """Return a change of a folder: of what one rank's file holds."""

    def apply(folder: Path) -> None:
        path = folder / f"consolidated.{number:02}.pth"
        state = torch.load(path)
        change(state)
        torch.save(state, path)

    return apply


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def truncated(file: str, count: int):
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - count)


def all_ranks(change):
    return lambda folder: [on_rank(number, change)(folder) for number in (0, 1)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: torch.save({"a": Evil()}, f / "consolidated.01.pth"), ["consolidated.01.pth", "posix.system"]),
        (truncated("consolidated.01.pth", 9), ["consolidated.01.pth", "truncated"]),
        (lambda f: (f / "consolidated.01.pth").rename(f / "consolidated.02.pth"), ["ranks [0, 2]", "0, 1, 2 …"]),
        (lambda f: (f / "consolidated.00.pth").unlink(), ["ranks [1]"]),
        (lambda f: [path.unlink() for path in f.glob("*.pth")], ["ranks none of consolidated.NN.pth"]),
        (on_rank(1, lambda s: s.update({"odd": s.pop(WQ)})), [WQ, "ranks 0 and 1 only"]),
        (all_ranks(lambda s: s.pop(WQ)), ["n_layers is 2, the files hold 1 layers"]),
        (all_ranks(lambda s: s.pop("norm.weight")), ["tensors 1 missing (norm.weight)"]),
        (all_ranks(lambda s: s.update({"layers.0.attention.wq.bias": torch.ones(16)})),
         ["1 unknown (layers.0.attention.wq.bias)", "no biases"]),
        (all_ranks(lambda s: s.update({WQ: s[WQ].long()})), [WQ, "int64, expected float32"]),
        (all_ranks(lambda s: s.update({WQ: s[WQ][:, 1:]})), [WQ, "is [32, 31]", "ask for [32, 32]"]),
        (on_rank(1, lambda s: s.update({WQ: s[WQ][:, 1:]})), [WQ, "rank 1 holds float16 [16, 31]", "rank 0"]),
        (on_rank(1, lambda s: s.update({WQ: s[WQ].float()})), [WQ, "rank 1 holds float32 [16, 32]", "float16"]),
        (all_ranks(lambda s: s.pop("tok_embeddings.weight")), ["no matrix tok_embeddings.weight"]),
        (lambda f: (f / "tokenizer.model").write_bytes(b"rubbish"), ["tokenizer.model", "not a SentencePiece model"]),
        (lambda f: (f / "params.json").write_text("{"), ["params.json", "not JSON"]),
        (lambda f: (f / "params.json").unlink(), ["params.json: No such file"]),
    ],
)  # fmt: skip
def test_metas_files(tmp_path, capsys, change, said):
    source = foreign.write_meta(tmp_path / "source", GQA, STATE, 2)
    change(source)
    line = import_of(meta, tmp_path, capsys)
    assert all(text in line for text in said), line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 3}, "n_layers is 3, the files hold 2 layers"),
        ({"dim": 64}, "n_heads 4 and dim 64 make heads of 16, the files' rope.freqs is for 8"),
        ({"dim": 64, "n_heads": 8}, "is [271, 32], the settings beside it ask for [271, 64]"),
        ({"multiple_of": 45}, "feed_forward.w1.weight is [88, 32], the settings beside it ask for [90, 32]"),
        ({"n_heads": 8}, "n_heads 8 and dim 32 make heads of 4, the files' rope.freqs is for 8"),
        ({"n_kv_heads": 4}, "wk.weight is [16, 32], the settings beside it ask for [32, 32]"),
        ({"n_kv_heads": 1}, "1 key/value heads cannot lie on 2 ranks"),
        ({"dim": 33}, "params.json: dim 33 must be num_heads 4 times an even head size; change one\n"),
        ({"dim": ...}, "dim is None, expected a whole number above 0"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"n_kv_heads": "2"}, "n_kv_heads is '2', expected a number above 0"),
        ({"norm_eps": -1e-5}, "norm_eps is -1e-05"),
        ({"rope_theta": [1]}, "rope_theta is [1]"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier is '1.3'"),
        ({"use_scaled_rope": True}, "use_scaled_rope says that this is Llama 3"),
    ],
)
def test_params_json_that_the_tensors_contradict(tmp_path, capsys, changes, said):
    foreign.write_meta(tmp_path / "source", GQA, STATE, 2, **changes)
    assert said in import_of(meta, tmp_path, capsys)


@pytest.mark.parametrize("door", [meta, hf])
def test_a_tokenizer_of_another_model(tmp_path, capsys, door):
    size = foreign.sized(GQA, vocab_size=270)
    write = foreign.write_meta if door is meta else foreign.write_hf
    write(tmp_path / "source", size, foreign.random_state(size, F16))
    assert "the tokenizer has 271 ids, the embedding 270 rows" in import_of(door, tmp_path, capsys)


# ---- Hugging Face's folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', expected 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling 'linear' is not supported"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"}}, "rotary scaling 'llama3'"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x', expected a number"),
        ({"rope_parameters": [1]}, "rope_parameters or rope_scaling is no object"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number above 0"),
        ({"hidden_size": ...}, "hidden_size is None"),
        ({"head_dim": 16}, "head_dim 16 times 4 heads is not hidden_size 32"),
        ({"rms_norm_eps": 0}, "norm_eps: Input should be greater than 0"),
        ({"num_key_value_heads": 3}, "config.json: num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"num_hidden_layers": 3}, "tensors 9 missing (model.layers.2."),
        ({"num_hidden_layers": 1}, "9 unknown (model.layers.1."),
        ({"intermediate_size": 90}, "gate_proj.weight is [88, 32], the settings beside it ask for [90, 32]"),
        ({"vocab_size": 300}, "embed_tokens.weight is [271, 32], the settings beside it ask for [300, 32]"),
        ({"architectures": ["LlamaDelta"]}, "a delta, not a model; run `python -m convert.delta apply"),
    ],
)
def test_config_json(tmp_path, capsys, changes, said):
    foreign.write_hf(tmp_path / "source", GQA, STATE, **changes)
    assert said in import_of(hf, tmp_path, capsys)


def header_changed(old: bytes, new: bytes):
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        assert old in content and len(old) == len(new)
        path.write_bytes(content.replace(old, new))

    return change


def sharded(listed: dict[str, Any]):
    """Return a change of a folder: two shards, and an index with other entries."""

    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(state)
        places = {name: f"part{1 + (i > 9)}.safetensors" for i, name in enumerate(names)}
        for place in set(places.values()):
            save_file({name: state[name] for name in names if places[name] == place}, folder / place)
        changed = {name: place for name, place in (places | listed).items() if place != "none"}
        foreign.write_index(folder, "model.safetensors", changed)

    return change


def resaved(change):
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (truncated("model.safetensors", 5), ["model.safetensors", "its header says"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), ["model.safetensors: not a safetensors file"]),
        (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 9) + b'"a header' + b'"'),
         ["model.safetensors: not a safetensors file"]),
        (header_changed(b'"data_offsets":[0,', b'"data_0ffsets":[0,'), ["not a safetensors file", "data_offsets"]),
        (header_changed(b'"shape":[271,32]', b'"shape":[271,31]'), ["fits neither its shape"]),
        (header_changed(b'"F16"', b'"I16"'), ["is I16, expected one of F32, F16, BF16"]),
        (lambda f: (f / "model.safetensors").unlink(), ["no weights; expected model.safetensors"]),
        (resaved(lambda s: s.pop(Q_PROJ)), [f"1 missing ({Q_PROJ})"]),
        (resaved(lambda s: s.update(extra=torch.ones(3))), ["1 unknown (extra)"]),
        (resaved(lambda s: s.update({Q_PROJ: torch.ones(32, 31)})), [f"{Q_PROJ} is [32, 31]"]),
        (resaved(lambda s: s.pop("lm_head.weight")), ["tie_word_embeddings is false", "no lm_head.weight"]),
        (sharded({"x": "part3.safetensors"}), ["names part3.safetensors, which is not there"]),
        (sharded({"x": "../part1.safetensors"}), ["names ../part1.safetensors, which lies outside the folder"]),
        (sharded({"x": "part1.safetensors"}), ["part1.safetensors: x is not in it"]),
        (sharded({"lm_head.weight": "none"}), ["part1.safetensors: lm_head.weight is in it but not in the index"]),
        (sharded({"x": 3}), ["no weight_map from tensors to files"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json: a JSON list, expected an object"]),
        (lambda f: (f / "config.json").unlink(), ["config.json: No such file"]),
        (lambda f: (f / "delta.json").touch(), ["a delta, not a model"]),
    ],
)  # fmt: skip
def test_hugging_faces_files(tmp_path, capsys, change, said):
    change(foreign.write_hf(tmp_path / "source", GQA, STATE))
    line = import_of(hf, tmp_path, capsys)
    assert all(text in line for text in said), line


def test_a_bin_that_carries_code(tmp_path, capsys):
    source = foreign.write_hf(tmp_path / "source", GQA, STATE)
    (source / "model.safetensors").unlink()
    torch.save(STATE | {"x": Evil()}, source / "pytorch_model.bin")
    line = import_of(hf, tmp_path, capsys)
    assert "pytorch_model.bin" in line and "posix.system" in line
    torch.save(STATE | {Q_PROJ: STATE[Q_PROJ].long()}, source / "pytorch_model.bin")
    assert f"{Q_PROJ} is int64" in import_of(hf, tmp_path, capsys)


# ---- our own folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    source = foreign.write_meta(folder / "meta", GQA, STATE)
    foreign.done(meta, "import", "--input", source, "--output", folder / "ours", "--no-verify")
    return folder / "ours"


@pytest.fixture
def ours(imported, tmp_path) -> Path:
    """A weights folder that may be damaged."""
    shutil.copytree(imported, tmp_path / "ours")
    return tmp_path / "ours"


def test_every_flipped_bit_is_found(ours, tmp_path, capsys):
    path = next(ours.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-7] ^= 4  # in lm_head, the last
    path.write_bytes(content)
    line = refused(capsys, hf, "export", "--input", ours, "--output", tmp_path / "out")
    assert f"{path.name}: lm_head has changed since it was written (SHA-256 differs)" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: i.pop("tensors"), "damaged ('tensors')"),
        (lambda i: i.pop("provenance"), "damaged ('provenance')"),
        (lambda i: i.update(format="panda_jax weights 2"), "format 'panda_jax weights 2', expected"),
        (lambda i: i["model"].update(dim=31), "damaged"),
        (lambda i: i["model"].update(num_layers=1), "layers.1.attn_norm is no tensor of its model"),
        (lambda i: i["model"].update(num_layers=3), "layers.2.attn_norm is absent"),
        (lambda i: i["tensors"]["norm"].update(dtype="BF16"), "norm is float16 (32,), the model needs BF16 (32,)"),
        (lambda i: i["tensors"]["norm"].update(file="gone"), "gone: No such file"),
        (lambda i: i["tensors"]["norm"].pop("sha256"), "damaged ('sha256')"),
    ],
)
def test_an_index_of_ours(ours, tmp_path, capsys, change, said):
    path = ours / "weights.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    assert said in refused(capsys, hf, "export", "--input", ours, "--output", tmp_path / "out")

"""Conversions as users start them: byte for byte there and back, the same in transformers, and no wrong one passes.

The oracles are torch, the safetensors library, transformers and the loops of tests/foreign.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import foreign
import numpy as np
import pytest
import torch
from foreign import EIGHT_HEADS, GQA, SMALL_MLP, TOKENIZER, bits, done, our_bits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from convert import hf, mapping, meta
from convert.hf_folder import HfSink
from panda_jax.weights import open_weights

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "dtype", "num_ranks"),
    [(GQA, F16, 1), (GQA, BF16, 2), (SMALL_MLP, F32, 2), (EIGHT_HEADS, F16, 8), (EIGHT_HEADS, BF16, 2),
     (EIGHT_HEADS, F32, 1)],
)  # fmt: skip
def test_meta_to_ours_to_hf_to_ours_to_meta(tmp_path, capsys, size, dtype, num_ranks):
    state = foreign.random_state(size, dtype)
    source = foreign.write_meta(tmp_path / "meta", size, state, num_ranks)
    done(meta, "import", "--input", source, "--output", tmp_path / "ours")
    done(hf, "export", "--input", tmp_path / "ours", "--output", tmp_path / "hf", "--shard-size", "40KB")
    done(hf, "import", "--input", tmp_path / "hf", "--output", tmp_path / "again")
    done(meta, "export", "--input", tmp_path / "again", "--output", tmp_path / "back", "--shards", num_ranks)
    assert bits(foreign.loaded(tmp_path / "ours")) == our_bits(state)
    assert bits(foreign.loaded(tmp_path / "hf")) == bits(state)
    assert bits(foreign.loaded(tmp_path / "again")) == our_bits(state)
    expected = foreign.meta_ranks(state, size, num_ranks)
    assert [bits(rank) for rank in foreign.loaded_ranks(tmp_path / "back")] == [bits(rank) for rank in expected]
    reports = [foreign.report(tmp_path / name) for name in ("ours", "hf", "again", "back")]
    assert len({report["root"] for report in reports}) == 1
    assert all(report["passed"] and report["verified"] and report["round_trip_equal"] == 21 for report in reports)
    against = ["Meta's convention", "transformers", "transformers", "Meta's convention"]
    assert [report["logits"]["against"] for report in reports] == against
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == TOKENIZER
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("21 tensors" in line and "every tensor read back equal" in line for line in lines)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_hf_to_ours_to_hf(tmp_path, dtype):
    """From a folder that transformers wrote."""
    state = foreign.random_state(GQA, dtype)
    source = saved_by_transformers(tmp_path / "hf", GQA, state)
    done(hf, "import", "--input", source, "--output", tmp_path / "ours")
    done(hf, "export", "--input", tmp_path / "ours", "--output", tmp_path / "back")
    assert bits(load_file(tmp_path / "back" / "model.safetensors")) == bits(state)
    assert bits(load_file(source / "model.safetensors")) == bits(state)
    before, after = (LlamaConfig.from_pretrained(folder) for folder in (source, tmp_path / "back"))
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "intermediate_size", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "head_dim",
                 "tie_word_embeddings", "dtype"):  # fmt: skip
        assert getattr(before, name) == getattr(after, name), name


def saved_by_transformers(folder: Path, size: foreign.Size, state: foreign.State) -> Path:
    dtype = next(iter(state.values())).dtype
    config = LlamaConfig(**foreign.hf_config(size, dtype=str(dtype)[6:]))
    with torch.device("meta"):
        network = LlamaForCausalLM(config)
    network.load_state_dict(state, assign=True)
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "torch_dtype"), [("float32", F32), ("float16", F16), ("bfloat16", BF16)])
def test_a_wished_dtype_is_torchs_rounding(tmp_path, name, torch_dtype):
    source, wished = (BF16, F32) if torch_dtype == F32 else (F32, torch_dtype)
    state = foreign.random_state(GQA, source)
    folder = foreign.write_meta(tmp_path / "meta", GQA, state)
    done(meta, "import", "--input", folder, "--output", tmp_path / "ours", "--dtype", name)
    expected = {name: tensor.to(wished) for name, tensor in state.items()}
    assert bits(foreign.loaded(tmp_path / "ours")) == our_bits(expected)
    report = foreign.report(tmp_path / "ours")
    assert (report["dtypes_read"], report["dtypes_written"]) == ({str(source)[6:]: 21}, {name: 21})


def test_another_number_of_ranks_is_the_same_model(tmp_path):
    state = foreign.random_state(EIGHT_HEADS, F16)
    for ranks in (1, 4):
        folder = foreign.write_meta(tmp_path / f"meta{ranks}", EIGHT_HEADS, state, ranks)
        done(meta, "import", "--input", folder, "--output", tmp_path / f"ours{ranks}")
    assert foreign.report(tmp_path / "ours1")["root"] == foreign.report(tmp_path / "ours4")["root"]


def test_params_json_of_an_export_knows_only_what_metas_own_code_knows(tmp_path):
    """Its ModelArgs is called with max_seq_len beside params.json, so a second one is an error; LLaMA-1's has no more
    than dim, n_layers, n_heads, vocab_size, multiple_of and norm_eps."""
    size = foreign.sized(EIGHT_HEADS, rope_theta=10000.0, context_length=2048, num_layers=1, mlp_dim=128)
    source = foreign.write_hf(tmp_path / "hf", size, foreign.random_state(size, F16))
    done(meta, "export", "--input", source, "--output", tmp_path / "meta")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert params.keys() == {"dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps"}
    assert params["vocab_size"] == -1 and 128 % params["multiple_of"] == 0  # int(8 / 3 * 48) = 128
    done(meta, "export", "--input", source, "--output", tmp_path / "bf16", "--dtype", "bfloat16", "--no-verify")
    assert json.loads((tmp_path / "bf16" / "params.json").read_text())["max_seq_len"] == 2048


def test_params_json_comes_back_as_it_was(tmp_path):
    """ffn_dim_multiplier included: a rule of our own would give the same width by another multiple_of."""
    state = foreign.random_state(SMALL_MLP, F16)
    source = foreign.write_meta(tmp_path / "meta", SMALL_MLP, state)
    done(meta, "import", "--input", source, "--output", tmp_path / "ours")
    done(meta, "export", "--input", tmp_path / "ours", "--output", tmp_path / "back")
    found, expected = (json.loads((tmp_path / name / "params.json").read_text()) for name in ("back", "meta"))
    assert found == expected


# ---- what Hugging Face's readers find -------------------------------------------------------------------------------


def test_transformers_computes_the_same_from_an_export(tmp_path):
    state = foreign.random_state(GQA, F32)
    original = LlamaForCausalLM.from_pretrained(saved_by_transformers(tmp_path / "hf", GQA, state))
    source = foreign.write_meta(tmp_path / "meta", GQA, state, 2)
    done(meta, "import", "--input", source, "--output", tmp_path / "ours")
    done(hf, "export", "--input", tmp_path / "ours", "--output", tmp_path / "out", "--shard-size", "30kb")
    network, info = cast(Any, AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True))
    assert not any(info.values()), info
    tokens = torch.randint(0, GQA.vocab_size, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        difference = (network(tokens).logits - original(tokens).logits).abs().max()
    assert difference <= 1e-5
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, None)


def test_the_files_of_an_export(tmp_path):
    """Sizes in bytes: 271 x 32 x 2 = 17,344 for an embedding, and so on; the index counts all of them."""
    state = foreign.random_state(GQA, F16)
    source = foreign.write_meta(tmp_path / "meta", GQA, state)
    done(hf, "export", "--input", source, "--output", tmp_path / "out", "--shard-size", "20KB")
    done(hf, "export", "--input", source, "--output", tmp_path / "whole")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = foreign.hf_config(GQA, dtype="float16") | {
        "torch_dtype": "float16", "rope_theta": 5e4, "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": None,
    }  # fmt: skip
    assert {name: config.get(name, "absent") for name in expected} == expected
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in state.values())
    assert index["weight_map"].keys() == state.keys()
    files = sorted(path.name for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()
        assert sum(tensor.nbytes for tensor in held.values()) <= 20_000
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == state.keys()
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == TOKENIZER
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# out" in card and "2 layers, width 32, 4 heads (2 for keys and values)" in card


OLD = {"rope_parameters": ..., "dtype": ..., "head_dim": ..., "rope_theta": 5e4, "torch_dtype": "float32"}


@pytest.mark.parametrize("container", ["single .bin", "sharded .bin", "sharded safetensors"])
def test_every_container_and_configs_of_2023(tmp_path, container):
    """Old keys: rope_theta, torch_dtype, max_sequence_length; no head_dim, no num_key_value_heads. Buffers go."""
    size = foreign.sized(EIGHT_HEADS, num_layers=3)
    state = foreign.random_state(size, F32)
    folder = tmp_path / "hf"
    folder.mkdir()
    changes = OLD | {"num_key_value_heads": ..., "max_position_embeddings": ..., "max_sequence_length": 96}
    foreign.write_beside(folder, size, **changes)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(3)}
    if container == "single .bin":
        torch.save(state | buffers, folder / "pytorch_model.bin")
    elif container == "sharded .bin":
        write_shards(folder, "pytorch_model.bin", "pytorch_model-{}-of-00002.bin", state | buffers, torch.save)
    else:
        write_shards(folder, "model.safetensors", "model-{}-of-00002.safetensors", state, foreign.save_file)
    done(hf, "import", "--input", folder, "--output", tmp_path / "ours")
    assert bits(foreign.loaded(tmp_path / "ours")) == our_bits(state)
    model = open_weights(tmp_path / "ours").model
    assert (model.num_kv_heads, model.context_length, model.rope_theta, model.norm_eps) == (8, 96, 5e4, 1e-5)


def write_shards(folder, file, name, state, save):
    names = list(state)
    places = {key: name.format(f"{1 + i % 2:05}") for i, key in enumerate(names)}
    for place in set(places.values()):
        save({key: state[key] for key in names if places[key] == place}, folder / place)
    foreign.write_index(folder, file, places)


def test_settings_that_are_absent_are_transformers_own(tmp_path):
    changes = {"rope_parameters": ..., "rms_norm_eps": ..., "max_position_embeddings": ..., "rope_scaling": None}
    folder = foreign.write_hf(tmp_path / "hf", GQA, foreign.random_state(GQA, F32), None, **changes)
    done(hf, "import", "--input", folder, "--output", tmp_path / "ours")
    model, theirs = open_weights(tmp_path / "ours").model, LlamaConfig()
    found = model.norm_eps, model.context_length, model.rope_theta
    theta = cast(Any, theirs.rope_parameters)["rope_theta"]
    assert found == (theirs.rms_norm_eps, theirs.max_position_embeddings, theta)
    assert found == (1e-6, 2048, 10000.0)


def test_tied_embeddings_stay_tied(tmp_path):
    state = foreign.random_state(GQA, F32, is_tied=True)
    folder = foreign.write_hf(tmp_path / "hf", GQA, state, tie_word_embeddings=True)
    done(hf, "import", "--input", folder, "--output", tmp_path / "ours")
    done(hf, "export", "--input", tmp_path / "ours", "--output", tmp_path / "out")
    assert bits(foreign.loaded(tmp_path / "ours")) == our_bits(state)
    assert bits(load_file(tmp_path / "out" / "model.safetensors")) == bits(state)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    original, network = (LlamaForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "out"))
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(network(tokens).logits, original(tokens).logits)


def test_a_folder_of_another_models_added_token(tmp_path):
    """271 pieces and [PAD] = 271, as Panda's 32000: it is the padding id of the export."""
    size = foreign.sized(GQA, vocab_size=272)
    folder = foreign.write_hf(tmp_path / "hf", size, foreign.random_state(size, BF16))
    (folder / "added_tokens.json").write_text('{"[PAD]": 271}')
    done(hf, "import", "--input", folder, "--output", tmp_path / "ours")
    assert open_weights(tmp_path / "ours").added_tokens == {"[PAD]": 271}
    done(hf, "export", "--input", tmp_path / "ours", "--output", tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").pad_token_id == 271
    assert json.loads((tmp_path / "out" / "added_tokens.json").read_text()) == {"[PAD]": 271}
    # Panda's 32001 rows to LLaMA's 32000: the rows that stay are the same, byte for byte.
    foreign.done(hf, "import", "--input", folder, "--output", tmp_path / "cut", "--drop-pad")
    cut = open_weights(tmp_path / "cut")
    assert cut.added_tokens == {} and cut.model.vocab_size == 271
    for name, tensor in cut.tensors.items():
        whole = open_weights(tmp_path / "ours").tensors[name].read()
        np.testing.assert_array_equal(tensor.read(), whole[:271] if len(whole) == 272 else whole, err_msg=name)


# ---- what is only noted ---------------------------------------------------------------------------------------------


def test_replicas_that_differ_are_noted_and_rank_0_is_taken(tmp_path, capsys):
    state = foreign.random_state(GQA, F16)
    folder = foreign.write_meta(tmp_path / "meta", GQA, state, 2)
    path = folder / "consolidated.01.pth"
    rank = torch.load(path)
    rank["layers.1.ffn_norm.weight"] += 1
    torch.save(rank, path)
    done(meta, "import", "--input", folder, "--output", tmp_path / "ours")
    assert "note: layers.1.ffn_norm.weight differs between rank 0 and [1]: rank 0 taken" in capsys.readouterr().out
    assert bits(foreign.loaded(tmp_path / "ours")) == our_bits(state)


@pytest.mark.parametrize(
    ("dtype", "changes", "context", "is_suspected"),
    [
        (BF16, {"norm_eps": 1e-6, "n_kv_heads": ...}, 4096, True),
        (F16, {"norm_eps": 1e-6, "n_kv_heads": ...}, 2048, False),
        (BF16, {"norm_eps": 1e-5, "n_kv_heads": ...}, 4096, False),
        (F16, {"norm_eps": ...}, 4096, False),
    ],
)
def test_the_epsilon_of_llama_2_chat_and_the_context_are_noted(tmp_path, capsys, dtype, changes, context, is_suspected):
    size = foreign.sized(EIGHT_HEADS, num_layers=1)
    state = foreign.random_state(size, dtype)
    folder = foreign.write_meta(tmp_path / "meta", size, state, max_seq_len=..., rope_theta=..., **changes)
    # One proof: that without norm_eps the other side takes the same.
    rest = [] if changes["norm_eps"] is ... else ["--no-verify"]
    done(meta, "import", "--input", folder, "--output", tmp_path / "ours", *rest)
    said, model = capsys.readouterr().out, open_weights(tmp_path / "ours").model
    assert f"{context} assumed" in said and (model.context_length, model.rope_theta) == (context, 10000.0)
    assert ("norm_eps is 1e-6: Llama-2-7b-chat" in said) == is_suspected
    assert model.norm_eps == (1e-5 if changes["norm_eps"] is ... else changes["norm_eps"])


def test_without_a_proof_the_report_says_so(tmp_path, capsys):
    folder = foreign.write_meta(tmp_path / "meta", GQA, foreign.random_state(GQA, F16), tokenizer=None)
    done(meta, "import", "--input", folder, "--output", tmp_path / "ours", "--no-verify")
    said = capsys.readouterr().out
    assert "NOT verified (--no-verify)" in said and "note: no tokenizer.model in the folder or above it" in said
    report = foreign.report(tmp_path / "ours")
    assert (report["verified"], report["passed"]) == (False, None) and "logits" not in report


# ---- a wrong conversion does not pass -------------------------------------------------------------------------------


def failed(capsys, door, *arguments) -> str:
    """Check that a door exits with 1, leaves nothing at its output, and a folder that cannot be used beside it."""
    assert foreign.call(door, *arguments) == 1
    output = Path(arguments[arguments.index("--output") + 1])
    said = capsys.readouterr().err
    assert not output.exists() and said.count("\n") == 1 and f"kept as {output}.bad" in said
    assert foreign.report(Path(f"{output}.bad"))["passed"] is False
    assert not list(output.parent.glob("*.unfinished-*"))
    assert "failed its proof" in foreign.refused(
        capsys, hf, "export", "--input", f"{output}.bad", "--output", output.with_name("never")
    )
    return said


@pytest.fixture
def of_meta(tmp_path) -> tuple:
    folder = foreign.write_meta(tmp_path / "meta", GQA, foreign.random_state(GQA, F32), 2)
    return "import", "--input", folder, "--output", tmp_path / "ours"


def test_rows_left_in_metas_order(capsys, monkeypatch, of_meta, tmp_path):
    monkeypatch.setattr(mapping, "from_interleaved", lambda matrix, num_heads: matrix)
    said = failed(capsys, meta, *of_meta)
    assert "logits differ from Meta's convention by" in said
    assert foreign.report(tmp_path / "ours.bad")["logits"]["max_abs_difference"] >= 0.1
    monkeypatch.undo()
    done(meta, *of_meta)


def test_parts_of_the_ranks_in_the_wrong_order(capsys, monkeypatch, of_meta):
    whole = mapping.merge

    def backwards(parts, row, place):
        result = whole(parts, row, place)
        if row.ours.endswith("w_up"):
            return mapping.Lazy(result.shape, result.dtype, lambda: np.concatenate([p.read() for p in parts[::-1]]))
        return result

    monkeypatch.setattr("convert.mapping.merge", backwards)
    monkeypatch.setattr("convert.proofs.merged", lambda ranks, folder: swapless(ranks, whole))
    assert "logits differ" in failed(capsys, meta, *of_meta)


def swapless(ranks, merge):
    """Return the whole tensors as Meta's convention has them."""
    rows = {name: mapping.row_of_meta(name) for name in ranks[0] if not name.startswith("rope")}
    return {name: merge([rank[name] for rank in ranks], row, name) for name, row in rows.items()}


@pytest.mark.parametrize("name", ["layers.0.wo", "layers.1.wq"])
def test_a_square_matrix_written_transposed(capsys, monkeypatch, of_meta, tmp_path, name):
    append = HfSink.append

    def transposed(sink, given, array):
        append(sink, given, np.ascontiguousarray(array.T) if given == name else array)

    monkeypatch.setattr(HfSink, "append", transposed)
    said = failed(capsys, hf, "export", "--input", of_meta[2], "--output", tmp_path / "hf")
    assert f"1 tensors read back differ from what was written, the first is {name}" in said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rms_norm_eps", 1e-6, "norm_eps 1e-05 reads back as 1e-06"),
        ("rope_parameters", {"rope_theta": 1e4}, "rope_theta 50000.0 reads back as 10000.0"),
        ("max_position_embeddings", 64, "context_length 96 reads back as 64"),
    ],
)
def test_a_wrong_setting_beside_the_right_tensors(capsys, monkeypatch, of_meta, tmp_path, key, value, said):
    """Both sides of the logits would take it from the same config.json."""
    right = hf.HfFolder.open.__globals__["config_of"]
    monkeypatch.setattr("convert.hf_folder.config_of", lambda *arguments: right(*arguments) | {key: value})
    assert said in failed(capsys, hf, "export", "--input", of_meta[2], "--output", tmp_path / "hf")

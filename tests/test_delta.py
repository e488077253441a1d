"""Deltas through their door: exact restores, the arithmetic that Panda and FastChat published, and refusals by name.

The oracles are torch's own additions and subtractions; see PROTOCOLS.md §3 for the two published rules.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import foreign
import pytest
import torch
from foreign import GQA, bits, done, our_bits, refused

from convert import delta, delta_folder, hf, known_bases, meta
from panda_jax.presets import PRESETS
from panda_jax.weights import open_weights

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
GROWN = foreign.sized(GQA, vocab_size=272)
WQ = "model.layers.1.self_attn.q_proj.weight"
FULL = ("model.embed_tokens.weight", "lm_head.weight")


def trained(base: foreign.State, dtype: torch.dtype, rows: int) -> foreign.State:
    """Return `base` after an update of 1 % in `dtype`, its norms as they were, its vocabulary grown by `rows`."""
    result = {}
    for number, (name, tensor) in enumerate(base.items()):
        draw = torch.Generator().manual_seed(number + 77)
        update = 0.002 * torch.randn(tensor.shape, generator=draw) if tensor.ndim > 1 else torch.zeros(tensor.shape)
        result[name] = (tensor.float() + update).to(dtype)
        if name in FULL:
            new = 0.02 * torch.randn(rows, tensor.shape[1], generator=draw)
            result[name] = torch.cat([result[name], new.to(dtype)])
    return result


BASE = foreign.random_state(GQA, F16)
TARGET = trained(BASE, BF16, rows=1)


def write_target(folder: Path, state: foreign.State, size: foreign.Size = GROWN) -> Path:
    dtype = str(next(iter(state.values())).dtype)[6:]
    foreign.write_hf(folder, size, state, dtype=dtype)
    if size is GROWN:
        (folder / "added_tokens.json").write_text('{"[PAD]": 271}')
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with `base` as Hugging Face's, `meta`, `ours` and `wide` (float32), `target`, and the delta `v2`."""
    folder = tmp_path_factory.mktemp("delta")
    foreign.write_hf(folder / "base", GQA, BASE)
    foreign.write_meta(folder / "meta", GQA, BASE, 2)
    done(meta, "import", "--input", folder / "meta", "--output", folder / "ours", "--no-verify")
    foreign.write_hf(folder / "wide", GQA, {name: tensor.float() for name, tensor in BASE.items()})
    write_target(folder / "target", TARGET)
    done(delta, "make", "--base", folder / "base", "--target", folder / "target", "--output", folder / "v2")
    return folder


@pytest.fixture
def damaged(made, tmp_path) -> Path:
    """A copy of the delta that may be damaged."""
    shutil.copytree(made / "v2", tmp_path / "v2")
    return tmp_path / "v2"


# ---- our lossless form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "to"), [("base", "hf"), ("meta", "ours"), ("ours", "hf"), ("wide", "ours")])
def test_a_delta_restores_the_target_from_any_form_of_its_base(made, tmp_path, base, to):
    done(delta, "apply", "--base", made / base, "--delta", made / "v2", "--output", tmp_path / "out", "--to", to)
    assert bits(foreign.loaded(tmp_path / "out")) == (bits(TARGET) if to == "hf" else our_bits(TARGET))
    index = json.loads((made / "v2" / "delta.json").read_text())
    assert foreign.report(tmp_path / "out")["root"] == foreign.report(made / "v2")["root"] == index["target"]["root"]
    assert index["base"]["root"] == foreign.report(made / "ours")["root"]
    again = tmp_path / "again"
    if to == "ours":
        assert open_weights(tmp_path / "out").added_tokens == {"[PAD]": 271}
        done(hf, "export", "--input", tmp_path / "out", "--output", again, "--no-verify")
        assert bits(foreign.loaded(again)) == bits(TARGET)


@pytest.mark.parametrize("base", ["meta", "ours"])
def test_the_same_delta_is_made_from_any_form_of_the_base(made, tmp_path, base):
    done(delta, "make", "--base", made / base, "--target", made / "target", "--output", tmp_path / "v2")
    for name in ("delta-00001.bin", "delta.json"):
        assert (tmp_path / "v2" / name).read_bytes() == (made / "v2" / name).read_bytes()


def test_what_inspect_and_verify_say(made, capsys):
    """The five norms are as they were, the two tables have a row more, the 14 other matrices differ."""
    done(delta, "inspect", "--delta", made / "v2")
    said, index = capsys.readouterr().out, json.loads((made / "v2" / "delta.json").read_text())
    assert "lossless delta of 21 tensors (5 same, 14 diff, 2 rows, 0 copy)" in said
    count, stored = sum(tensor.numel() for tensor in TARGET.values()), (made / "v2" / "delta-00001.bin").stat().st_size
    assert f"stored  {stored / 1e6:,.1f} MB, {stored / count:.3f} bytes a parameter" in said
    assert f"a model of width 32, 2 layers and 272 rows, root {index['target']['root']}" in said
    done(delta, "verify", "--base", made / "meta", "--delta", made / "v2")
    assert "base and delta are right: 21 tensors restored and hashed" in capsys.readouterr().out


def test_a_delta_in_several_files(made, tmp_path, monkeypatch):
    monkeypatch.setattr(delta_folder, "SHARD_BYTES", 20_000)
    done(delta, "make", "--base", made / "base", "--target", made / "target", "--output", tmp_path / "v2")
    assert len(list((tmp_path / "v2").glob("delta-*.bin"))) == 2
    done(delta, "apply", "--base", made / "base", "--delta", tmp_path / "v2", "--output", tmp_path / "out")
    assert bits(foreign.loaded(tmp_path / "out")) == bits(TARGET)


@pytest.mark.parametrize("command", ["apply", "verify"])
def test_a_wrong_base_is_refused_by_its_first_tensor(made, tmp_path, capsys, monkeypatch, command):
    other = {name: tensor.clone() for name, tensor in BASE.items()}
    other[WQ][3, 5] += 1
    other["lm_head.weight"][0, 0] += 1
    base = foreign.write_meta(tmp_path / "wrong", GQA, other)
    rest = ["--output", tmp_path / "out"] if command == "apply" else []
    line = refused(capsys, delta, command, "--base", base, "--delta", made / "v2", *rest)
    assert "layers.1.wq is another tensor (SHA-256 differs)" in line
    assert "looks like a model of width 32, 2 layers and 271 rows in float16" in line
    assert f"with root {json.loads((made / 'v2' / 'delta.json').read_text())['base']['root'][:16]}" in line
    digest = hashlib.sha256((base / "consolidated.00.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(known_bases.FIRST_RANK_FILES, digest, "the original LLaMA-7B")
    line = refused(capsys, delta, command, "--base", base, "--delta", made / "v2", *rest)
    assert "it looks like the original LLaMA-7B, the delta was made from" in line


def test_a_base_of_another_size(made, tmp_path, capsys):
    size = foreign.sized(GQA, num_layers=1)
    state = {name: tensor for name, tensor in BASE.items() if "layers.1" not in name}
    base = foreign.write_hf(tmp_path / "small", size, state)
    line = refused(capsys, delta, "apply", "--base", base, "--delta", made / "v2", "--output", tmp_path / "out")
    assert "layers.1.attn_norm is absent, expected [32]" in line
    base = write_target(tmp_path / "grown", TARGET)
    line = refused(capsys, delta, "apply", "--base", base, "--delta", made / "v2", "--output", tmp_path / "out")
    assert "embed is [272, 32], expected [271, 32]" in line


def test_published_sizes_have_names():
    assert known_bases.describe_model(PRESETS["llama-7b"]) == "a llama-7b with 32,000 rows"
    assert known_bases.describe_model(PRESETS["llama-13b"] | {"vocab_size": 32001}) == "a llama-13b with 32,001 rows"


def flipped(folder: Path) -> None:
    """Flip one bit within the payload of layers.1.wo."""
    entry = json.loads((folder / "delta.json").read_text())["tensors"]["layers.1.wo"]
    content = bytearray((folder / entry["file"]).read_bytes())
    content[entry["offset"] + entry["num_bytes"] // 2] ^= 16
    (folder / entry["file"]).write_bytes(content)


def index_changed(change):
    def apply(folder: Path) -> None:
        index = json.loads((folder / "delta.json").read_text())
        change(index)
        (folder / "delta.json").write_text(json.dumps(index))

    return apply


def changed(name: str, **fields):
    return index_changed(lambda index: index["tensors"][name].update(fields))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flipped, "delta-00001.bin: layers.1.wo: chunk 1 of 1 is damaged"),
        (lambda f: os.truncate(f / "delta-00001.bin", 900), "delta-00001.bin: 900 bytes, expected "),
        (lambda f: (f / "delta-00001.bin").unlink(), "delta-00001.bin: missing; fetch it"),
        (lambda f: os.truncate(f / "delta.json", 900), "delta.json: not JSON"),
        (index_changed(lambda i: i["tensors"].pop("norm")), "delta.json: damaged (KeyError 'norm')"),
        (index_changed(lambda i: i["tensors"]["norm"].pop("op")), "delta.json: damaged (KeyError 'op')"),
        (index_changed(lambda i: i["target"].pop("root")), "delta.json: damaged (KeyError 'root')"),
        (index_changed(lambda i: i["target"].pop("added_tokens")), "damaged (KeyError 'added_tokens')"),
        (index_changed(lambda i: i["base"].pop("model")), "damaged (KeyError 'model')"),
        (index_changed(lambda i: i["target"]["model"].update(num_layers=1)), "damaged (KeyError 'layers.1.attn_norm')"),
        (index_changed(lambda i: i["files"].update({"../x.bin": 3})), "names ../x.bin, which lies outside the folder"),
        (index_changed(lambda i: i["format"].update(version=2)), "delta format has version 2, this program reads 1"),
        (changed("norm", sha256="0" * 64), "the SHA-256 of the target's tensors do not give its root"),
        (changed("norm", op="scale"), "the entry of norm is not of this model"),
        (changed("norm", offset=-1), "the entry of norm is not of this model"),
        (changed("layers.1.wo", offset=0), "delta-00001.bin: layers.1.wo"),
    ],
)
def test_a_damaged_delta_is_refused_by_name(made, damaged, tmp_path, capsys, change, said):
    change(damaged)
    line = refused(capsys, delta, "apply", "--base", made / "base", "--delta", damaged, "--output", tmp_path / "out")
    assert said in line
    assert said in refused(capsys, delta, "verify", "--base", made / "base", "--delta", damaged)


# ---- Panda's form ---------------------------------------------------------------------------------------------------


def pandas_delta(base: foreign.State, target: foreign.State) -> foreign.State:
    """Panda's make: the two tables in full, everything else subtracted, in float32."""
    result = {}
    for name, tensor in target.items():
        if "embed_tokens" in name or "lm_head.weight" in name:
            result[name] = tensor.float()
        else:
            result[name] = tensor.float() - base[name].float()
    return result


def pandas_apply(base: foreign.State, difference: foreign.State) -> foreign.State:
    """Panda's apply, in float32."""
    result = {}
    for name, tensor in difference.items():
        if "embed_tokens" in name or "lm_head.weight" in name:
            result[name] = tensor
        elif "inv_freq" not in name:
            result[name] = base[name].float() + tensor
    return result


def inv_freq(size: foreign.Size) -> foreign.State:
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(size.num_layers)]
    return {name: torch.zeros(size.head_dim // 2) for name in names}


def write_pandas(folder: Path, difference: foreign.State) -> Path:
    """Write a delta as transformers 4.28 did: shards of .bin, zero buffers, config.json without a mark."""
    folder.mkdir()
    foreign.write_beside(folder, GROWN, rope_parameters=..., rope_theta=5e4, dtype=..., torch_dtype="float32")
    (folder / "added_tokens.json").write_text('{"[PAD]": 271}')
    state = difference | inv_freq(GROWN)
    places = {name: f"pytorch_model-{1 + i % 3:05}-of-00003.bin" for i, name in enumerate(state)}
    for place in set(places.values()):
        torch.save({name: state[name] for name in state if places[name] == place}, folder / place)
    foreign.write_index(folder, "pytorch_model.bin", places)
    return folder


def test_pandas_delta_is_made_bit_for_bit(made, tmp_path):
    arguments = "make", "--base", made / "meta", "--target", made / "target", "--format", "panda", "--output"
    done(delta, *arguments, tmp_path / "plain")
    done(delta, *arguments, tmp_path / "buffers", "--inv-freq")
    expected = pandas_delta(BASE, TARGET)
    assert bits(foreign.loaded(tmp_path / "plain")) == bits(expected)
    assert bits(foreign.loaded(tmp_path / "buffers")) == bits(expected | inv_freq(GROWN))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["architectures"] == ["LlamaDelta"] and config["vocab_size"] == 272
    assert "Not a model" in (tmp_path / "plain" / "README.md").read_text()
    report = foreign.report(tmp_path / "plain")
    assert report["passed"] and report["round_trip"] == "21 of 21 tensors restored bit for bit"


@pytest.mark.parametrize("to", ["hf", "ours"])
def test_pandas_published_delta_is_applied_bit_for_bit(made, tmp_path, capsys, to):
    folder = write_pandas(tmp_path / "published", pandas_delta(BASE, TARGET))
    done(delta, "apply", "--base", made / "meta", "--delta", folder, "--output", tmp_path / "out", "--to", to)
    expected = {name: tensor.to(BF16) for name, tensor in pandas_apply(BASE, pandas_delta(BASE, TARGET)).items()}
    assert bits(expected) == bits(TARGET)  # float32 loses nothing here
    assert bits(foreign.loaded(tmp_path / "out")) == (bits(expected) if to == "hf" else our_bits(expected))
    said = capsys.readouterr().out.splitlines()
    added = [(pandas_delta(BASE, TARGET)[name].double(), BASE[name].double()) for name in TARGET if name not in FULL]
    squares = [sum(float(pair[side].square().sum()) for pair in added) for side in (0, 1)]
    ratio = (squares[0] / squares[1]) ** 0.5
    assert said[-1].startswith("unverified: a published delta has no hashes; differences are ")
    assert f" {ratio:.1%} of the base's weights" in said[-1] and 0.005 < ratio < 0.02
    assert "every sum is exact in the dtype written" in said[-1]
    done(delta, "verify", "--base", made / "meta", "--delta", folder)
    assert capsys.readouterr().out.startswith("unverified: ")
    done(delta, "inspect", "--delta", folder)
    assert "a published delta without hashes, 272 rows, rule not named" in capsys.readouterr().out


def test_pandas_sums_can_be_kept_in_float32_and_rounded_to_float16(made, tmp_path, capsys):
    """A float16 target is exact as float16 only; the sums are those of torch in any dtype."""
    target = trained(BASE, F16, rows=1)
    folder = write_pandas(tmp_path / "published", pandas_delta(BASE, target))
    sums = pandas_apply(BASE, pandas_delta(BASE, target))
    for name, dtype in (("float32", F32), ("float16", F16)):
        arguments = "--base", made / "base", "--delta", folder, "--output", tmp_path / name, "--dtype", name
        done(delta, "apply", *arguments)
        assert bits(foreign.loaded(tmp_path / name)) == bits({key: tensor.to(dtype) for key, tensor in sums.items()})
    line = refused(capsys, delta, "apply", "--base", made / "base", "--delta", folder, "--output", tmp_path / "out")
    assert "of base + delta are no bfloat16 numbers" in line


def test_the_padding_row_can_be_left_out(made, tmp_path, capsys):
    folder = write_pandas(tmp_path / "published", pandas_delta(BASE, TARGET))
    for given, name in ((folder, "a"), (made / "v2", "b")):
        out = tmp_path / name
        done(delta, "apply", "--base", made / "base", "--delta", given, "--output", out, "--drop-pad")
        cut = {name: tensor[:271].contiguous() if name in FULL else tensor for name, tensor in TARGET.items()}
        assert bits(foreign.loaded(out)) == bits(cut)
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 271
        assert not (out / "added_tokens.json").exists()
    (folder / "tokenizer.model").unlink()
    (folder / "added_tokens.json").unlink()
    arguments = "--base", made / "base", "--delta", folder, "--output", tmp_path / "out", "--drop-pad"
    assert "--drop-pad: no tokenizer.model beside the weights" in refused(capsys, delta, "apply", *arguments)


def test_numbers_that_speak_of_another_base(made, tmp_path, capsys):
    """A small difference added to another base gives no bfloat16 numbers; one taken from another base is large.

    Two independent matrices of the same size differ by sqrt(2) = 1.41 of either.
    """
    other = foreign.random_state(GQA, F16, seed=9)
    folder = write_pandas(tmp_path / "published", pandas_delta(BASE, TARGET))
    base = foreign.write_hf(tmp_path / "other", GQA, other)
    for command, rest in (("apply", ["--output", tmp_path / "out"]), ("verify", [])):
        line = refused(capsys, delta, command, "--base", base, "--delta", folder, *rest)
        assert "% of base + delta are no bfloat16 numbers; the delta was made from another base" in line
    wrong = write_pandas(tmp_path / "wrong", pandas_delta(other, TARGET))
    line = refused(capsys, delta, "apply", "--base", made / "base", "--delta", wrong, "--output", tmp_path / "out")
    assert "layers.0.wq: the difference is 1.4" in line and "made from another base" in line
    small = foreign.sized(GQA, num_layers=1)
    state = {name: tensor for name, tensor in BASE.items() if "layers.1" not in name}
    base = foreign.write_hf(tmp_path / "small", small, state)
    line = refused(capsys, delta, "apply", "--base", base, "--delta", folder, "--output", tmp_path / "out")
    assert "the base's layers.1.attn_norm is absent, the delta's [32]" in line


# ---- FastChat's form ------------------------------------------------------------------------------------------------


def test_fastchats_delta_bit_for_bit(made, tmp_path, capsys):
    """Every tensor, in float16, as FastChat's two loops do: target -= base, and base + delta."""
    target = trained(BASE, F16, rows=0)
    expected = {name: tensor - BASE[name] for name, tensor in target.items()}
    restored = {name: BASE[name] + tensor for name, tensor in expected.items()}
    write_target(tmp_path / "target", target, GQA)
    arguments = "--base", made / "base", "--target", tmp_path / "target", "--output", tmp_path / "made"
    done(delta, "make", *arguments, "--format", "fastchat")
    assert bits(foreign.loaded(tmp_path / "made")) == bits(expected)
    published = foreign.write_hf(tmp_path / "published", GQA, expected)
    for folder in (tmp_path / "made", published):
        out = tmp_path / f"{folder.name}-out"
        done(delta, "apply", "--base", made / "base", "--delta", folder, "--output", out)
        assert bits(foreign.loaded(out)) == bits(restored)
        assert "unverified: " in capsys.readouterr().out


def test_the_rule_that_a_delta_names_is_not_overruled(made, tmp_path, capsys):
    """Under the other rule a difference would pass for a whole embedding."""
    arguments = "make", "--base", made / "base", "--target", made / "base", "--output", tmp_path / "made"
    done(delta, *arguments, "--format", "fastchat")
    apply = "apply", "--base", made / "base", "--output", tmp_path / "out", "--delta"
    line = refused(capsys, delta, *apply, tmp_path / "made", "--rule", "panda")
    assert "delta_rule is 'fastchat', expected panda; leave out --rule" in line
    done(delta, "inspect", "--delta", tmp_path / "made")
    assert "rule fastchat" in capsys.readouterr().out
    unnamed = foreign.write_hf(tmp_path / "unnamed", GQA, {name: tensor.to(BF16) for name, tensor in BASE.items()})
    assert "a delta in bfloat16, which no published one is; name its rule" in refused(capsys, delta, *apply, unnamed)
    junk = foreign.write_hf(tmp_path / "junk", GQA, BASE, delta_rule="x")
    assert "delta_rule is 'x', expected panda or fastchat" in refused(capsys, delta, *apply, junk)
    junk = foreign.write_hf(tmp_path / "junk2", GQA, BASE, delta_rule="panda", delta_target_dtype="int4")
    assert "delta_target_dtype is 'int4', expected float32" in refused(capsys, delta, *apply, junk)


# ---- a delta is no model --------------------------------------------------------------------------------------------


def test_no_door_takes_a_delta_for_a_model(made, tmp_path, capsys):
    arguments = "make", "--base", made / "base", "--target", made / "target", "--output", tmp_path / "published"
    done(delta, *arguments, "--format", "panda")
    for folder in (made / "v2", tmp_path / "published"):
        out = ["--output", tmp_path / "out"]
        for line in (
            refused(capsys, hf, "import", "--input", folder, *out),
            refused(capsys, hf, "export", "--input", folder, *out),
            refused(capsys, meta, "export", "--input", folder, *out),
            refused(capsys, delta, "make", "--base", folder, "--target", made / "target", *out),
        ):
            assert f"{folder}: a delta, not a model; run `python -m convert.delta apply --base BASE" in line
    line = refused(capsys, delta, "apply", "--base", made / "base", "--delta", tmp_path, "--output", tmp_path / "out")
    assert "no delta; expected delta.json, or config.json of a published one" in line

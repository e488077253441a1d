"""The table of names and Meta's order of rows, against loops and lists written out here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert import mapping
from panda_jax.config import Model
from panda_jax.errors import InputError
from panda_jax.weights import Lazy, stored_shapes

MODEL = Model(vocab_size=27, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=20, norm_eps=1e-5,
              context_length=8)  # fmt: skip


def lazy(array: np.ndarray) -> Lazy:
    return Lazy(array.shape, array.dtype, array.copy)


def test_rows_of_a_head_drawn_by_hand():
    """One head of 6 rows a…f: Meta turns (0, 1), (2, 3), (4, 5) together; we turn (0, 3), (1, 4), (2, 5)."""
    ours = np.arange(6, dtype=np.float16)[:, None]
    metas = np.array([0, 3, 1, 4, 2, 5], np.float16)[:, None]
    np.testing.assert_array_equal(mapping.to_interleaved(ours, 1), metas)
    np.testing.assert_array_equal(mapping.from_interleaved(metas, 1), ours)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_rows_of_many_heads_are_those_of_loops(num_heads, half, width):
    ours = np.arange(num_heads * 2 * half * width, dtype=np.float32).reshape(-1, width)
    metas = np.empty_like(ours)
    for head in range(num_heads):
        for i in range(half):
            for side in range(2):
                metas[head * 2 * half + 2 * i + side] = ours[head * 2 * half + side * half + i]
    np.testing.assert_array_equal(mapping.to_interleaved(ours, num_heads), metas)
    back = mapping.from_interleaved(metas, num_heads)
    np.testing.assert_array_equal(back, ours)
    assert back.flags.c_contiguous


@given(st.integers(1, 40), st.integers(1, 8))
def test_the_last_rank_takes_what_does_not_divide(size, num_ranks):
    places = [list(range(start, end)) for start, end in mapping.rank_slices(size, num_ranks)]
    assert sum(places, []) == list(range(size)) and len(places) == num_ranks
    assert [len(place) for place in places[:-1]] == [size // num_ranks] * (num_ranks - 1)


def test_published_vocabulary_of_49953_over_two_ranks():
    """PROTOCOLS.md §1: Chinese-LLaMA-13B lies as 24,976 and 24,977 rows."""
    assert mapping.rank_slices(49953, 2) == [(0, 24976), (24976, 49953)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_splitting_and_merging_are_inverse(num_ranks):
    draw = np.random.default_rng(0)
    for name, row in mapping.rows(MODEL).items():
        array = draw.standard_normal(stored_shapes(MODEL)[name]).astype(np.float32)
        parts = [lazy(part) for part in mapping.split(array, row, MODEL, num_ranks)]
        whole = mapping.from_meta(mapping.merge(parts, row, "here"), row, MODEL)
        assert whole.shape == array.shape
        np.testing.assert_array_equal(whole.read(), array, err_msg=name)


def test_the_names_of_one_layer():
    """Every name, written out; 9 tensors a layer and 3 of the whole."""
    rows = mapping.rows(MODEL)
    assert len(rows) == 2 * 9 + 3 and list(rows) == list(stored_shapes(MODEL))
    found = [(row.ours, row.meta, row.hf, row.rank_axis, row.rotated) for row in rows.values()]
    meta, hf = "layers.1.", "model.layers.1."
    assert set(found) >= {
        ("embed", "tok_embeddings.weight", "model.embed_tokens.weight", 1, None),
        ("norm", "norm.weight", "model.norm.weight", None, None),
        ("lm_head", "output.weight", "lm_head.weight", 0, None),
        ("layers.1.attn_norm", f"{meta}attention_norm.weight", f"{hf}input_layernorm.weight", None, None),
        ("layers.1.mlp_norm", f"{meta}ffn_norm.weight", f"{hf}post_attention_layernorm.weight", None, None),
        ("layers.1.wq", f"{meta}attention.wq.weight", f"{hf}self_attn.q_proj.weight", 0, "num_heads"),
        ("layers.1.wk", f"{meta}attention.wk.weight", f"{hf}self_attn.k_proj.weight", 0, "num_kv_heads"),
        ("layers.1.wv", f"{meta}attention.wv.weight", f"{hf}self_attn.v_proj.weight", 0, None),
        ("layers.1.wo", f"{meta}attention.wo.weight", f"{hf}self_attn.o_proj.weight", 1, None),
        ("layers.1.w_gate", f"{meta}feed_forward.w1.weight", f"{hf}mlp.gate_proj.weight", 0, None),
        ("layers.1.w_up", f"{meta}feed_forward.w3.weight", f"{hf}mlp.up_proj.weight", 0, None),
        ("layers.1.w_down", f"{meta}feed_forward.w2.weight", f"{hf}mlp.down_proj.weight", 1, None),
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.pop("norm"), "tensors 1 missing (norm)"),
        (lambda found: found.update(bias=found["norm"]), "1 unknown (bias)"),
        (lambda found: found.update(norm=lazy(np.zeros(17, np.float32))), "norm is [17], the settings"),
        (lambda found: found.update(norm=lazy(np.zeros(16, np.int64))), "norm is int64, expected float32, float16"),
        (lambda found: (found.pop("embed"), found.update(a=1, b=2, c=3, d=4)), "4 unknown (a, b, c, …)"),
    ],
)
def test_tensors_match_one_to_one_or_are_named(change, said):
    shapes = stored_shapes(MODEL)
    found = {name: lazy(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    found["layers.0.self_attn.rotary_emb.inv_freq"] = found["norm"]
    assert list(mapping.take(found, {name: name for name in shapes}, MODEL, "here")) == list(shapes)
    change(found)
    with pytest.raises(InputError) as caught:
        mapping.take(found, {name: name for name in shapes}, MODEL, "here")
    assert str(caught.value).startswith("here: ") and said in str(caught.value)


@pytest.mark.parametrize(
    "other", [np.zeros((4, 5), np.float32), np.zeros((4, 6), np.float16), np.zeros(24, np.float32)]
)
def test_ranks_that_hold_parts_of_different_matrices(other):
    row = next(row for row in mapping.TABLE if row.ours == "lm_head")
    with pytest.raises(InputError, match=r"here: rank 1 holds .*, rank 0 float32 \[4, 6\], no parts of one matrix"):
        mapping.merge([lazy(np.zeros((4, 6), np.float32)), lazy(other)], row, "here")

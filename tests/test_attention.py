"""Attention: hand-drawn masks, a float64 oracle, isolation of documents, and the choice of the backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panda_jax.config import Compute, Model
from panda_jax.errors import InputError
from panda_jax.model import attention
from panda_jax.model.attention import Accelerator, Visibility, block_mask, choose_backend, cudnn_obstacle
from panda_jax.presets import PRESETS

attend = jax.jit(attention.attend, static_argnames=("backend", "block"))

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 13, 6, 3, 8
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] * 2 + [0] * 2, [1] * 13], np.int32)
PACKED = Visibility(jnp.asarray(SEGMENTS), None)


def inputs(seed: int) -> tuple[Any, Any, Any]:
    draw = np.random.default_rng(seed).normal
    shapes = [(BATCH, LENGTH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (draw(size=shape).astype(np.float32) for shape in shapes)
    return q, k, v


def oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen_by=None) -> np.ndarray:
    """Attention in float64, one query at a time, from the definition; seen_by(b, t) lists the keys that t may see."""
    seen_by = seen_by or (lambda b, t: [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]])
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        group = n // (q.shape[2] // k.shape[2])
        seen = seen_by(b, t)
        scores = k[b, seen, group].astype(np.float64) @ q[b, t, n].astype(np.float64) / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, group].astype(np.float64)
    return out


def test_mask_of_two_documents_and_padding():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0]])
    drawn = """
        1 0 0 0 0 0 0
        1 1 0 0 0 0 0
        1 1 1 0 0 0 0
        0 0 0 1 0 0 0
        0 0 0 1 1 0 0
        0 0 0 0 0 1 0
        0 0 0 0 0 1 1
    """
    expected = np.array([line.split() for line in drawn.strip().splitlines()], int)
    np.testing.assert_array_equal(block_mask(Visibility(segments, None), 0, 7)[0], expected)


def test_mask_of_a_later_block_reaches_back_to_the_start_of_its_document():
    segments = jnp.array([[1, 2, 2, 2, 3, 0]])
    drawn = """
        0 1 1 1 0
        0 0 0 0 1
    """
    expected = np.array([line.split() for line in drawn.strip().splitlines()], int)
    np.testing.assert_array_equal(block_mask(Visibility(segments, None), 3, 5)[0], expected)


def test_mask_of_two_texts_with_alternative_endings():
    """The first text shares two tokens and ends in two ways; the second shares one and ends in one."""
    visibility = Visibility(jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]]), jnp.array([[0, 0, 1, 1, 2, 0, 1, 0]]))
    drawn = """
        1 0 0 0 0 0 0 0
        1 1 0 0 0 0 0 0
        1 1 1 0 0 0 0 0
        1 1 1 1 0 0 0 0
        1 1 0 0 1 0 0 0
        0 0 0 0 0 1 0 0
        0 0 0 0 0 1 1 0
        0 0 0 0 0 0 0 1
    """
    expected = np.array([line.split() for line in drawn.strip().splitlines()], int)
    np.testing.assert_array_equal(block_mask(visibility, 0, 8)[0], expected)
    np.testing.assert_array_equal(block_mask(visibility, 4, 7)[0], expected[4:7, :7])


@pytest.mark.parametrize(("backend", "block"), [("xla", 5), ("cudnn", 5)])
def test_endings_attend_as_if_each_stood_alone_behind_the_shared_part(backend: str, block: int, monkeypatch):
    """Row 0: four shared tokens, endings of 3, 2 and 1, padding; row 1: one shared token and an ending of 12."""
    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **o: original(*a, **o))
    segments = jnp.array([[1] * 10 + [0] * 3, [1] * 13])
    branches = np.array([[0] * 4 + [1] * 3 + [2] * 2 + [3] + [0] * 3, [0] + [1] * 12])
    ranges = {0: [(0, 4), (4, 7), (7, 9), (9, 10)], 1: [(0, 1), (1, 13)]}

    def seen_by(b: int, t: int) -> list[int]:
        if b == 0 and t >= 10:
            return list(range(10, t + 1))
        start = next(start for start, end in ranges[b] if start <= t < end)
        return [*range(ranges[b][0][1] if start else 0), *range(start, t + 1)]

    q, k, v = inputs(8)
    found = attend(q, k, v, Visibility(segments, jnp.asarray(branches)), backend=backend, block=block)
    np.testing.assert_allclose(found, oracle(q, k, v, seen_by), atol=2e-6)


@pytest.mark.parametrize("block", [4, 5, 13, 64])
def test_blocked_attention_equals_the_float64_oracle(block: int):
    q, k, v = inputs(0)
    found = attend(q, k, v, PACKED, backend="xla", block=block)
    np.testing.assert_allclose(found, oracle(q, k, v), atol=2e-6)


@pytest.mark.parametrize("block", [4, 13])
def test_gradients_equal_finite_differences_of_the_oracle(block: int):
    """Central differences of the float64 oracle, in eight random directions at once for q, k and v."""
    arrays, out_weights = inputs(1), np.random.default_rng(2).normal(size=(BATCH, LENGTH, HEADS, HEAD_DIM))

    def scalar(q, k, v):
        return jnp.sum(attend(q, k, v, PACKED, backend="xla", block=block) * out_weights)

    gradients = jax.jit(jax.grad(scalar, argnums=(0, 1, 2)))(*arrays)
    for seed in range(8):
        directions = [np.random.default_rng(10 + seed).normal(size=x.shape) for x in arrays]
        values = []
        for sign in (1, -1):
            mq, mk, mv = (x.astype(np.float64) + sign * 1e-5 * d for x, d in zip(arrays, directions, strict=True))
            values.append((oracle(mq, mk, mv) * out_weights).sum())
        expected = (values[0] - values[1]) / 2e-5
        found = sum((np.asarray(g) * d).sum() for g, d in zip(gradients, directions, strict=True))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("block", [4, 13])
def test_no_document_reads_another_one(block: int):
    q, k, v = inputs(3)
    before = np.asarray(attend(q, k, v, PACKED, backend="xla", block=block))
    for array in (q, k, v):
        array[0, 0:5] = np.random.default_rng(4).normal(size=array[0, 0:5].shape) * 9
    after = np.asarray(attend(q, k, v, PACKED, backend="xla", block=block))
    np.testing.assert_array_equal(after[0, 5:], before[0, 5:])
    assert np.abs(after[0, :5] - before[0, :5]).max() > 0.1


def test_padding_is_finite_and_takes_no_part_in_the_gradients_of_real_tokens():
    q, k, v = inputs(5)

    def sum_of_real_rows(q, k, v):
        out = attend(q, k, v, PACKED, backend="xla", block=4)
        return jnp.sum(jnp.where((SEGMENTS != 0)[..., None, None], out, 0) ** 2)

    assert np.isfinite(attend(q, k, v, PACKED, backend="xla", block=4)).all()
    for gradient in jax.jit(jax.grad(sum_of_real_rows, argnums=(0, 1, 2)))(q, k, v):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[0, 11:], 0)
        assert np.abs(gradient[0, :11]).max() > 0


def test_keys_of_bfloat16_are_compared_in_float32():
    """The bfloat16 result stays within bfloat16's rounding (2^-8) of the oracle on the same rounded inputs."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(6))
    found = attend(q, k, v, PACKED, backend="xla", block=4)
    assert found.dtype == jnp.bfloat16
    rounded_q, rounded_k, rounded_v = (np.asarray(x, np.float32) for x in (q, k, v))
    expected = oracle(rounded_q, rounded_k, rounded_v)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=3 * 2**-8)


def test_what_cudnn_is_asked_for_is_the_same_attention(monkeypatch: pytest.MonkeyPatch):
    """JAX's own XLA implementation stands in for the kernel; the causal flag and the segment mask must do the rest."""
    original, asked = jax.nn.dot_product_attention, []

    def stand_in(*arguments, implementation: str, **options):
        asked.append((implementation, options["is_causal"]))
        return original(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v = inputs(7)
    found = attend(q, k, v, PACKED, backend="cudnn", block=4)
    assert asked == [("cudnn", True)]
    np.testing.assert_allclose(found, oracle(q, k, v), atol=2e-6)


HOPPER, AMPERE = Accelerator("gpu", (9, 0)), Accelerator("gpu", (8, 0))
BF16, FP32 = Compute(dtype="bfloat16"), Compute(dtype="float32")


def model_with_head_dim(head_dim: int) -> Model:
    return replace(Model(**PRESETS["tiny-1m"]), dim=4 * head_dim)


@pytest.mark.parametrize(
    ("head_dim", "compute", "seq_len", "machine", "reason"),
    [
        (128, BF16, 2048, HOPPER, None),
        (128, BF16, 2048, AMPERE, None),
        (256, BF16, 2048, HOPPER, None),
        (256, BF16, 2048, AMPERE, "exceeds 128"),
        (264, BF16, 2048, HOPPER, "exceeds 256"),
        (84, BF16, 2048, HOPPER, "not a multiple of 8"),
        (128, FP32, 2048, HOPPER, "needs bfloat16"),
        (128, BF16, 2047, HOPPER, "even number"),
        (128, BF16, 2048, Accelerator("gpu", (7, 0)), "needs (8, 0)"),
        (128, BF16, 2048, Accelerator("gpu", None), "needs an NVIDIA GPU"),
        (128, BF16, 2048, Accelerator("cpu", None), "the platform is cpu"),
    ],
)
def test_cudnn_says_what_it_cannot_do(head_dim, compute, seq_len, machine, reason, monkeypatch: pytest.MonkeyPatch):
    model = model_with_head_dim(head_dim)
    monkeypatch.setattr(attention, "accelerator", lambda: machine)
    obstacle = cudnn_obstacle(model, compute, seq_len, machine)
    asked = Compute(dtype=compute.dtype, attention="cudnn")
    if reason is None:
        assert obstacle is None
        assert choose_backend(model, compute, seq_len) == choose_backend(model, asked, seq_len) == "cudnn"
        return
    assert obstacle is not None and reason in obstacle
    assert choose_backend(model, compute, seq_len) == "xla"
    with pytest.raises(InputError, match="compute.attention") as raised:
        choose_backend(model, asked, seq_len)
    assert obstacle in str(raised.value) and "\n" not in str(raised.value)


def test_on_this_cpu_auto_is_xla_and_cudnn_is_refused():
    model = model_with_head_dim(64)
    assert choose_backend(model, BF16, 512) == "xla"
    assert choose_backend(model, Compute(attention="xla"), 512) == "xla"
    with pytest.raises(InputError, match="the platform is cpu"):
        choose_backend(model, Compute(attention="cudnn"), 512)

"""Published deltas against the same arithmetic in torch, bit by bit, and what they tell of a wrong base."""

import numpy as np
import pytest
import torch
from float_arrays import BF16, F16, F32, TORCH, from_torch, normal, random_patterns, to_torch

from convert.delta_codec import cast
from convert.delta_published import Evidence, apply_published, make_published
from panda_jax.errors import InputError


def torch_panda(base: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Panda's make: both models in float32; the two vocabulary tensors as they are, of the others the difference."""
    delta = {}
    for name, value in target.items():
        value = value.float()
        delta[name] = value if name in ("embed", "lm_head") else value - base[name].float()
    return delta


def torch_panda_apply(base: dict[str, torch.Tensor], delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: d if n in ("embed", "lm_head") else d + base[n].float() for n, d in delta.items()}


def torch_grown(base: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """FastChat's base at a larger vocabulary: its new rows are set to zero."""
    grown = torch.zeros_like(like)
    grown[: len(base)] = base
    return grown


def models(base_dtype: np.dtype, target_dtype: np.dtype) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A base with 32,000 rows of vocabulary and a target with one more."""
    shapes = {"embed": (32000, 6), "layers.0.wq": (700, 500), "norm": (13,), "lm_head": (32000, 6)}
    base = {name: cast(normal(i, shape), base_dtype) for i, (name, shape) in enumerate(shapes.items())}
    target = {}
    for i, (name, value) in enumerate(base.items()):
        new = value.astype(np.float32) + normal(i + 10, value.shape, 1e-3)
        if name in ("embed", "lm_head"):
            new = np.concatenate([new, normal(i + 20, (1, 6))])
            new[-1, 0] = -0.0
        target[name] = cast(new, target_dtype)
    return base, target


@pytest.mark.parametrize(("base_dtype", "target_dtype"), [(F16, BF16), (BF16, BF16), (F16, F16), (F32, F32)], ids=str)
def test_panda_deltas_equal_torch_bit_by_bit(base_dtype: np.dtype, target_dtype: np.dtype):
    base, target = models(base_dtype, target_dtype)
    torch_base = {name: to_torch(value) for name, value in base.items()}
    deltas = torch_panda(torch_base, {name: to_torch(value) for name, value in target.items()})
    sums = torch_panda_apply(torch_base, deltas)
    for name, value in target.items():
        made = make_published("panda", name, base[name], value, 1)
        assert made.dtype == F32 and made.tobytes() == from_torch(deltas[name], F32).tobytes()
        for dtype in (F32, F16, BF16):
            applied, _ = apply_published("panda", name, base[name], made, dtype, 1)
            assert applied.tobytes() == from_torch(sums[name].to(TORCH[dtype]), dtype).tobytes()
        restored, evidence = apply_published("panda", name, base[name], made, target_dtype, 2)
        if target_dtype != F32:
            assert restored.tobytes() == value.tobytes() and evidence.inexact == 0


def test_panda_stores_the_vocabulary_in_full_even_where_the_shapes_agree():
    base, target = np.full((4, 2), 3, F16), np.full((4, 2), 5, BF16)
    assert (make_published("panda", "embed", base, target, 1) == 5).all()
    assert (make_published("panda", "layers.0.wq", base, target, 1) == 2).all()
    assert (apply_published("panda", "lm_head", None, np.full((4, 2), 5, F32), BF16, 1)[0] == 5).all()


def test_fastchat_deltas_equal_torch_bit_by_bit():
    base, target = models(F16, F16)
    for name, value in target.items():
        old = torch_grown(to_torch(base[name]), to_torch(value))
        delta = to_torch(value) - old
        made = make_published("fastchat", name, base[name], value, 1)
        assert made.dtype == F16 and made.tobytes() == from_torch(delta, F16).tobytes()
        old += delta
        applied, _ = apply_published("fastchat", name, base[name], made, F16, 1)
        assert applied.tobytes() == from_torch(old, F16).tobytes()


def test_float16_sums_through_float32_are_torchs_float16_sums():
    base, delta = random_patterns(2, 1_000_000, F16), random_patterns(3, 1_000_000, F16)
    expected = from_torch(to_torch(base) + to_torch(delta), F16)
    found, _ = apply_published("fastchat", "norm", base, delta, F16, 1)
    nan = np.isnan(expected)
    assert nan.any() and (np.isnan(found) == nan).all()
    np.testing.assert_array_equal(found.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


def test_evidence_by_hand():
    """bfloat16 has 8 bits: 1 + 2^-7 fits and 1 + 2^-9 does not. (0.75, 1) is a quarter of (3, 4)."""
    base = np.array([1, 1, 1], F32)
    _, found = apply_published("panda", "norm", base, np.array([2**-7, 2**-9, 0], F32), BF16, 1)
    assert found.inexact == 1 and found.base_squares == 3
    _, part = apply_published("panda", "norm", np.array([3, 4], F16), np.array([0.75, 1], F32), F32, 1)
    assert part == Evidence(0, 0.75**2 + 1, 25.0) and part.rms_ratio == 0.25
    assert found + part == Evidence(1, 2**-14 + 2**-18 + 1.5625, 28.0)
    _, full = apply_published("panda", "embed", None, np.array([[1.0, 1 + 2**-9, np.nan]], F32), BF16, 1)
    assert full == Evidence(2, 0.0, 0.0) and full.rms_ratio == 0


def test_evidence_tells_a_wrong_base_from_the_right_one():
    right, wrong = cast(normal(1, (300, 200)), F16), cast(normal(2, (300, 200)), F16)
    target = cast(right.astype(np.float32) + normal(3, (300, 200), 1e-4), BF16)
    delta = make_published("panda", "layers.0.wq", right, target, 1)
    _, good = apply_published("panda", "layers.0.wq", right, delta, BF16, 1)
    _, bad = apply_published("panda", "layers.0.wq", wrong, delta, BF16, 1)
    assert good.inexact == 0 and good.rms_ratio < 0.05
    assert bad.inexact > 0.5 * delta.size
    foreign = make_published("panda", "layers.0.wq", wrong, target, 1)  # a delta that was never meant for this base
    _, worst = apply_published("panda", "layers.0.wq", right, foreign, BF16, 1)
    assert worst.rms_ratio == pytest.approx(2**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("rule", "name", "base", "delta"),
    [
        ("panda", "layers.0.wq", (4, 3), (3, 4)),
        ("panda", "layers.0.wq", None, (3, 4)),
        ("fastchat", "embed", None, (3, 4)),
        ("fastchat", "embed", (4, 4), (3, 4)),
        ("fastchat", "embed", (3, 3), (4, 4)),
        ("fastchat", "layers.0.wk", (3, 4), (4, 4)),
    ],
)
def test_shapes_that_the_rule_cannot_add_are_refused(rule, name, base, delta):
    old, new = None if base is None else np.zeros(base, F16), np.zeros(delta, F16)
    with pytest.raises(InputError, match=f"^{name}: .*{rule} needs equal shapes"):
        apply_published(rule, name, old, new, F16, 1)
    with pytest.raises(InputError, match=f"^{name}: .*{rule} needs equal shapes"):
        make_published(rule, name, old, new, 1)

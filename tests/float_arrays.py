"""What the tests of deltas share: arrays of normal or of any bit patterns, to torch and back bit by bit."""

import ml_dtypes
import numpy as np
import torch

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
TORCH = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
BITS = {F32: np.uint32, F16: np.uint16, BF16: np.uint16}


def to_torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(f"i{array.itemsize}").copy()).view(TORCH[array.dtype])


def from_torch(tensor: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    assert tensor.dtype == TORCH[dtype]
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[dtype.itemsize]).numpy().view(dtype)


def random_patterns(seed: int, count: int, dtype: np.dtype) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 1 << 8 * dtype.itemsize, count, dtype=np.uint64)
    return bits.astype(BITS[dtype]).view(dtype)


def normal(seed: int, shape: tuple[int, ...], sigma: float = 0.02) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * sigma, np.float32)

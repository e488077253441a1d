"""The published sizes of LLaMA, and tiny ones, as fields of config.Model."""

from __future__ import annotations

from typing import Any


def _llama(dim: int, num_layers: int, num_heads: int, mlp_dim: int, norm_eps: float, context_length: int, **other: Any):
    """Return the fields shared by every published LLaMA of the given size (PROTOCOLS.md §1)."""
    sizes = dict(dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads, mlp_dim=mlp_dim)
    return sizes | dict(vocab_size=32000, norm_eps=norm_eps, context_length=context_length) | other


# size name -> model fields. The published sizes' parameter counts are checked in tests/test_config.py.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-7b": _llama(4096, 32, 32, 11008, 1e-6, 2048),
    "llama-13b": _llama(5120, 40, 40, 13824, 1e-6, 2048),
    "llama-33b": _llama(6656, 60, 52, 17920, 1e-6, 2048),
    "llama-65b": _llama(8192, 80, 64, 22016, 1e-5, 2048),
    "llama2-7b": _llama(4096, 32, 32, 11008, 1e-5, 4096),
    "llama2-13b": _llama(5120, 40, 40, 13824, 1e-5, 4096),
    "llama2-70b": _llama(8192, 80, 64, 28672, 1e-5, 4096, num_kv_heads=8),
    "tiny-1m": _llama(128, 4, 4, 344, 1e-5, 512, num_kv_heads=2, vocab_size=768),
    "tiny-15m": _llama(288, 6, 6, 768, 1e-5, 1024, tie_embeddings=True),
    "tiny-110m": _llama(768, 12, 12, 2048, 1e-5, 2048, tie_embeddings=True),
}

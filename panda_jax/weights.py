"""Weights on disk, one tensor at a time: the folder that conversions write and every door can start from.

    <folder>/weights-00001-of-00002.safetensors   the tensors, named as below
    <folder>/weights.json                         model, tensors with their SHA-256, provenance; written last
    <folder>/tokenizer.model

Tensors lie as [out, in], as everybody publishes them, with half-split rotary order, one per layer:

    embed [V, D]   norm [D]   lm_head [V, D], absent when tied
    layers.<i>.{attn_norm [D], wq [N*H, D], wk [K*H, D], wv [K*H, D], wo [D, N*H],
                mlp_norm [D], w_gate [F, D], w_up [F, D], w_down [D, F]}

so a tensor has the same bytes, and the same SHA-256, here and in a Hugging Face folder. Files are read by offset, not
mapped: mapped pages count as memory of the process, and the 26 GB of a 13B model would too.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from panda_jax.config import Model
from panda_jax.errors import InputError

# safetensors' names of the dtypes that weights come in.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NUMPY_NAMES = {dtype.name: dtype for dtype in DTYPES.values()}
FORMAT = "panda_jax weights 1"
INDEX = "weights.json"
# How a conversion to any format was proven.
REPORT = "conversion.json"
# A header is JSON of some hundred bytes a tensor; more than this is not a safetensors file.
MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    """Return the tensor, contiguous; the caller may keep or change it."""
    sha256: str | None = None
    """What `read` checks the tensor against, where its hash is known."""

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.shape, self.dtype)


def tensor_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return how many bytes a tensor takes."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def stored_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of `model`, in the order in which they are written."""
    D, F, V = model.dim, model.mlp_dim, model.vocab_size
    kv = model.num_kv_heads * model.head_dim
    layer = {
        "attn_norm": (D,), "wq": (D, D), "wk": (kv, D), "wv": (kv, D), "wo": (D, D),
        "mlp_norm": (D,), "w_gate": (F, D), "w_up": (F, D), "w_down": (D, F),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"embed": (V, D)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(model.num_layers) for name, shape in layer.items()}
    shapes["norm"] = (D,)
    return shapes if model.tie_embeddings else shapes | {"lm_head": (V, D)}


# ---- the container --------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, Lazy]:
    """Return the tensors of a safetensors file by name; only its header is read now.

    Raises InputError for a file that is truncated, longer than its header says, or not safetensors at all.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header, start = _read_header(file, size)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; is a file of the model missing?") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path}: not a safetensors file ({error}); fetch it again") from error
    tensors, end = {}, 0
    for name, (first, last, kind, shape) in sorted(header.items(), key=lambda item: item[1]):
        if kind not in DTYPES:
            raise InputError(f"{path}: {name} is {kind}, expected one of {', '.join(DTYPES)}")
        dtype = DTYPES[kind]
        if first != end or last - first != tensor_bytes(shape, dtype):
            raise InputError(f"{path}: the header gives {name} bytes {first} to {last}, which fits neither its shape "
                             f"{shape} nor its neighbour; fetch the file again")  # fmt: skip
        end = last
        tensors[name] = lazy_from_file(path, start + first, shape, dtype)
    if start + end != size:
        raise InputError(f"{path}: {size} bytes, its header says {start + end}; fetch it again")
    return tensors


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, tuple[int, int, str, tuple[int, ...]]], int]:
    """Return first and last byte, dtype and shape of every tensor, and where byte 0 lies in the file."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        numbers = [first, last, *entry["shape"]]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"{name} with offsets and shape {numbers}")
        entries[name] = (first, last, str(entry["dtype"]), tuple(entry["shape"]))
    return entries, 8 + length


def lazy_from_file(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Lazy:
    """Return a tensor that lies contiguous and little-endian in `path` from byte `offset` on."""

    def read() -> np.ndarray:
        array = np.empty(shape, dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            read_fully(file, array, path)
        return array

    return Lazy(shape, dtype, read)


def read_fully(file: Any, array: np.ndarray, path: Path) -> None:
    """Fill a contiguous array from an unbuffered file; raises InputError when the file ends too early."""
    left = memoryview(array.reshape(-1).view(np.uint8).data)
    while left:
        count = file.readinto(left)
        if not count:
            raise InputError(f"{path}: the file ends {len(left)} bytes too early; fetch it again")
        left = left[count:]


def safetensors_header(entries: Mapping[str, tuple[tuple[int, ...], np.dtype]], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a safetensors file whose tensors follow in the order of `entries`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (shape, dtype) in entries.items():
        end = offset + tensor_bytes(shape, dtype)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# ---- the folder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """A model's weights, wherever they lie."""

    model: Model
    tensors: dict[str, Lazy]
    """Every name of stored_shapes(model), in that order."""
    tokenizer_model: bytes | None
    """The SentencePiece file."""
    added_tokens: dict[str, int]
    """Tokens beyond the SentencePiece vocabulary, such as Panda's [PAD]."""
    provenance: dict[str, Any]
    """Where they come from, in words and hashes."""


def is_weights_folder(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def open_weights(folder: Path) -> Weights:
    """Open a weights folder; every tensor is checked against its SHA-256 when it is read.

    Raises InputError where the folder is incomplete, or marked bad by the conversion that wrote it.
    """
    refuse_unproven(folder)
    index_path = folder / INDEX
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise InputError(
                f"{index_path}: format {index['format']!r}, expected {FORMAT!r}; use the panda_jax it needs"
            )
        model = Model(**index["model"])
        listed = {
            name: (folder / entry["file"], entry["dtype"], entry["sha256"]) for name, entry in index["tensors"].items()
        }
        added_tokens, provenance = dict(index["added_tokens"]), dict(index["provenance"])
    except OSError as error:
        raise InputError(f"{index_path}: {error.strerror}; expected a weights folder") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index_path}: damaged ({' '.join(str(error).split())}); convert the weights again"
        ) from error
    shapes = stored_shapes(model)
    if extra := sorted(listed.keys() - shapes.keys()):
        raise InputError(f"{index_path}: {extra[0]} is no tensor of its model; convert the weights again")
    files = {path: read_safetensors(path) for path in sorted({path for path, _, _ in listed.values()})}
    tensors = {}
    for name, shape in shapes.items():
        path, kind, digest = listed.get(name, (folder, "", ""))
        found = files[path].get(name) if name in listed else None
        if found is None or found.shape != shape or DTYPE_NAMES[found.dtype] != kind:
            held = f"{found.dtype} {found.shape}" if found else "absent"
            raise InputError(f"{folder}: {name} is {held}, the model needs {kind} {shape}; convert the weights again")
        tensors[name] = _checked(name, found, digest, path)
    tokenizer = folder / "tokenizer.model"
    tokenizer_model = tokenizer.read_bytes() if tokenizer.is_file() else None
    return Weights(model, tensors, tokenizer_model, added_tokens, provenance)


def refuse_unproven(folder: Path) -> None:
    """Raise InputError for a folder whose conversion found it wrong; such a folder is kept to be looked at only."""
    path = folder / REPORT
    try:
        if json.loads(path.read_text(encoding="utf-8"))["passed"] is False:
            raise InputError(f"{path}: the conversion failed its proof, so these are no weights to use; convert again")
    except (OSError, ValueError, KeyError, TypeError):
        return  # no report of a conversion


def _checked(name: str, tensor: Lazy, digest: str, path: Path) -> Lazy:
    def read() -> np.ndarray:
        array = tensor.read()
        if tensor_sha256(array) != digest:
            raise InputError(f"{path}: {name} has changed since it was written (SHA-256 differs); convert it again")
        return array

    return Lazy(tensor.shape, tensor.dtype, read, digest)


def tensor_sha256(array: np.ndarray) -> str:
    """Return the SHA-256 of a tensor's little-endian contiguous bytes, in hex."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


# ---- orientation ----------------------------------------------------------------------------------------------------


def _axes(name: str, model: Model) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the input and the output axes of a matrix in the model file; None for what lies alike in both places."""
    D, F, V = model.dim, model.mlp_dim, model.vocab_size
    N, K, H = model.num_heads, model.num_kv_heads, model.head_dim
    return {
        "wq": ((D,), (N, H)),
        "wk": ((D,), (K, H)),
        "wv": ((D,), (K, H)),
        "wo": ((N, H), (D,)),
        "w_gate": ((D,), (F,)),
        "w_up": ((D,), (F,)),
        "w_down": ((F,), (D,)),
        "lm_head": ((D,), (V,)),
    }.get(name.rpartition(".")[2])


def to_model(name: str, array: np.ndarray, model: Model) -> np.ndarray:
    """Return one layer's tensor `name` ("layers.3.wq", or "wq") as model/llama.py holds it; a view, dtype kept.

    A matrix [out, in] becomes [*in, *out]: wq [N*H, D] -> [D, N, H], wo [D, N*H] -> [N, H, D], w_down [D, F] ->
    [F, D], lm_head [V, D] -> [D, V]. The embedding and the norms stay as they are. Raises InputError for another shape.
    """
    axes = _axes(name, model)
    if axes is None:
        return array
    inputs, outputs = axes
    _expect(name, array, (int(np.prod(outputs)), int(np.prod(inputs))))
    return array.T.reshape(*inputs, *outputs)


def from_model(name: str, array: np.ndarray, model: Model) -> np.ndarray:
    """Return the inverse of `to_model`, contiguous: what is hashed and written. Raises InputError for another shape."""
    axes = _axes(name, model)
    if axes is None:
        return np.ascontiguousarray(array)
    inputs, outputs = axes
    _expect(name, array, (*inputs, *outputs))
    return np.ascontiguousarray(array.reshape(int(np.prod(inputs)), int(np.prod(outputs))).T)


def _expect(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, the model needs {shape}; do its settings fit the weights?")

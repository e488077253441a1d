"""The pickle inside a PyTorch checkpoint: which names its tensors have, and where their numbers lie.

A pickle is a program for a stack machine. Ours knows only what a state dict needs: it builds dicts, lists, tuples,
strings, numbers and descriptions of tensors, and calls nothing. A global beyond CALLS, STORAGES and DTYPES is refused
by name, and so is any opcode that `torch.save` has no use for.

The calls and their arguments are those of torch/_utils.py and torch/serialization.py; the opcodes are documented in
Python's pickletools.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from panda_jax.errors import InputError

# The dtypes that weights come in: these can be read and written. Storages of the others are listed, as the buffers of
# some models have them, and refused when they are read.
WEIGHT_DTYPES = ("float32", "float16", "bfloat16")
DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *WEIGHT_DTYPES, "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128",
        "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
    )
}  # fmt: skip
STORAGES = {
    "torch.FloatStorage": "float32", "torch.HalfStorage": "float16", "torch.BFloat16Storage": "bfloat16",
    "torch.DoubleStorage": "float64", "torch.LongStorage": "int64", "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16", "torch.CharStorage": "int8", "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool", "torch.ComplexFloatStorage": "complex64", "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "uint8",
}  # fmt: skip
ORDERED_DICT = "collections.OrderedDict"
REBUILD_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
CALLS = (ORDERED_DICT, *REBUILD_TENSOR, REBUILD_PARAMETER)
ALLOWED = {*CALLS, *STORAGES, *(f"torch.{name}" for name in DTYPES)}

# The pickle opcodes that stand for a value, and the value of those that have no argument.
PLAIN_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()} | dict.fromkeys(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
)


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: str
    num_elements: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_lazily_changed: bool
    """The numbers are those of the storage negated or conjugated."""


def unpickle(data: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors that `data`, the data.pkl of `path`, describes; calls nothing, whatever `data` says.

    Raises InputError where it is damaged, needs a global that a state dict does not, or has values that are no tensors.
    """
    try:
        state = _interpret(data, path)
    except (ValueError, TypeError, LookupError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: its data.pkl is no state dict, or damaged: {reason}; fetch it again") from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {_kind(state)}, expected a dict of tensors; save the model's state dict")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: {shown(name)} is of type {_kind(value)}, expected tensors with names; save "
                             "the model's state dict alone, without what surrounds it")  # fmt: skip
    return state


def _interpret(data: bytes, path: Path) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int) -> list[Any]:
        start = len(stack) - count
        if start < (marks[-1] if marks else 0):
            raise ValueError("too few values")
        values = stack[start:]
        del stack[start:]
        return values

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return pop(1)[0]
            case "GLOBAL":
                stack.append(_global(argument.replace(" ", "."), path))
            case "STACK_GLOBAL":
                stack.append(_global(".".join(pop(2)), path))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if opcode.name == "EMPTY_LIST" else {})
            case "APPEND" | "SETITEM":
                values = pop(1 if opcode.name == "APPEND" else 2)
                _fill(stack[-1], values, opcode.name == "SETITEM")
            case "APPENDS" | "SETITEMS":
                values = pop_to_mark()
                _fill(stack[-1], values, opcode.name == "SETITEMS")
            case "BINPERSID":
                stack.append(_storage(*pop(1)))
            case "REDUCE":
                stack.append(_call(*pop(2)))
            case "BUILD":  # attributes of an OrderedDict: versions of modules, which say nothing about the weights
                _fill(stack[-2], pop(1)[:0], is_dict=True)
            case name if name in PLAIN_VALUES:
                stack.append(PLAIN_VALUES[name] if argument is None else argument)
            case name:
                if name == "INST":  # calls as it names
                    _global(argument.replace(" ", "."), path)
                raise ValueError(f"{name}, which a state dict does not need")
    raise ValueError("no end")


def _global(name: str, path: Path) -> _Global:
    if name not in ALLOWED:
        raise InputError(f"{path}: carries code: {shown(name)[1:-1]}; refused, as loading the file would run it: get "
                         "the model as safetensors or as a plain state dict")  # fmt: skip
    return _Global(name)


def _fill(target: Any, values: list[Any], is_dict: bool) -> None:
    if not is_dict:
        if not isinstance(target, list):
            raise ValueError(f"items for a {_kind(target)}")
        target.extend(values)
        return
    names = values[::2]
    if not isinstance(target, dict) or len(values) % 2 or not all(type(name) in (str, int) for name in names):
        raise ValueError(f"{len(values)} keys and values for a {_kind(target)}")
    target.update(zip(names, values[1::2], strict=True))


def _storage(identity: Any) -> Storage:
    match identity:
        case ("storage", _Global(name), str(key), str(), int(count)) if name in STORAGES and count >= 0:
            return Storage(key, STORAGES[name], count)
    raise ValueError("a storage without its type, key or size")


def _call(function: Any, arguments: Any) -> Any:
    """Return what a call of a pickle stands for; nothing is called."""
    match function, arguments:
        case _Global(name), () if name == ORDERED_DICT:
            return {}
        case _Global(name), (Tensor() as tensor, _, _) if name == REBUILD_PARAMETER:
            return tensor
        case _Global(name), (Storage() as storage, offset, tuple(shape), tuple(strides), *rest) if (
            name in REBUILD_TENSOR and len(rest) <= 4
        ):
            # The rest: requires_grad, hooks, the dtype where the storage has none, changes yet to be applied.
            dtype = storage.dtype
            if name.endswith("v3"):
                dtype = _kind(rest.pop(2)).removeprefix("torch.")
            if dtype in DTYPES:
                return Tensor(storage, dtype, offset, shape, strides, bool(rest[2:] and rest[2]))
    raise ValueError(f"a call of a {_kind(function)} with unexpected arguments")


def _kind(value: Any) -> str:
    return value.name if isinstance(value, _Global) else type(value).__name__.strip("_").lower()


def shown(text: str | int) -> str:
    """Return a name that a file chose as one short line."""
    return ascii(text[:100] if isinstance(text, str) else text)


def pickle(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """Return a pickle, protocol 2, of a dict of tensors of which number i is all of storage i."""
    out = bytearray(b"\x80\x02}(")
    for key, (name, (shape, dtype)) in enumerate(shapes.items()):
        if dtype.name not in WEIGHT_DTYPES:
            raise ValueError(f"{name}: {dtype}, expected {', '.join(WEIGHT_DTYPES)}")
        (storage,) = (storage for storage, stored in STORAGES.items() if stored == dtype.name)
        out += _pickled(name) + _called("torch._utils._rebuild_tensor_v2") + b"(("
        out += _pickled("storage") + _called(storage) + _pickled(str(key)) + _pickled("cpu")
        out += _pickled(math.prod(shape)) + b"tQ" + _pickled(0)
        # Row-major strides; a dimension without elements counts as one.
        strides = [math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape))]
        for numbers in (shape, strides):
            out += b"(" + b"".join(map(_pickled, numbers)) + b"t"
        # No gradient is required, and an OrderedDict has no hooks.
        out += b"\x89" + _called(ORDERED_DICT) + b")RtR"
    return bytes(out + b"u.")


def _called(name: str) -> bytes:
    return b"c%b\n%b\n" % tuple(part.encode() for part in name.rsplit(".", 1))


def _pickled(value: int | str) -> bytes:
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)

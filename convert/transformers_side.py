"""The logits that transformers computes from a Hugging Face folder, in a process of its own.

    python -m convert.transformers_side FOLDER PROBE.npz LOGITS.npy

A process of its own, because what torch and transformers take of memory goes back only when their process ends.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.probe import Probe, check_count
from panda_jax.command_line import run_door, run_module
from panda_jax.errors import InputError

if TYPE_CHECKING:
    import torch


def available() -> bool:
    """Tell whether torch and transformers are installed, without importing them."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def logits_of_child(folder: Path, probe: Probe) -> np.ndarray:
    """Return transformers_logits(folder, probe), computed in a child process.

    Raises ChildFailed after the child has said what is wrong with the folder.
    """
    with tempfile.TemporaryDirectory() as place:
        question, answer = Path(place) / "probe.npz", Path(place) / "logits.npy"
        np.savez(question, **{field.name: getattr(probe, field.name) for field in dataclasses.fields(probe)})
        run_module("convert.transformers_side", str(folder), str(question), str(answer))
        return np.load(answer)


def main(arguments: list[str]) -> None:
    """Answer logits_of_child."""
    folder, question, answer = map(Path, arguments)
    with np.load(question) as saved:
        probe = Probe(**{name: value if value.ndim else value.item() for name, value in saved.items()})
    np.save(answer, transformers_logits(folder, probe))


def transformers_logits(folder: Path, probe: Probe) -> np.ndarray:
    """Return transformers' logits, float32 [B, T, R], from a Hugging Face folder: safetensors or .bin, in any shards.

    Its config.json is read by transformers and its tensors by the safetensors library or torch, nothing of it by us.
    Raises InputError for a folder that lacks a file or tensor, or is not the model of the probe.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        config = LlamaConfig.from_pretrained(folder, attn_implementation="eager", local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: transformers cannot read config.json ({error}); convert it again") from error
    check_count(f"{folder / 'config.json'}", "layers", config.num_hidden_layers, probe.model_layers)
    check_count(f"{folder / 'config.json'}", "rows of vocabulary", config.vocab_size, probe.vocab_size)
    config.num_hidden_layers, config.vocab_size = probe.num_layers, len(probe.ids)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None  # may lie beyond the cut vocabulary
    with torch.device("meta"):
        network = LlamaForCausalLM(config).eval()
    network.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies are in no file
    wanted = set(network.state_dict())
    if config.tie_word_embeddings:
        wanted.remove("lm_head.weight")
    state = _read_huggingface(folder, wanted, probe)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"{folder}: the tensors do not fit config.json ({error}); convert it again") from error
    tokens, positions = (torch.from_numpy(x.astype(np.int64)) for x in (probe.rows, probe.positions))
    with torch.inference_mode():
        # Without a mask transformers takes a jump in the positions for the start of another document.
        logits = network(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=positions, use_cache=False
        ).logits
    return logits.numpy().copy()


def _read_huggingface(folder: Path, wanted: set[str], probe: Probe) -> dict[str, torch.Tensor]:
    """Return the wanted tensors in float32, of the embedding and the output layer the probe's rows only."""
    state = {}
    for path, reader in _huggingface_files(folder, wanted):
        if not path.is_file():
            raise InputError(f"{path}: the index names it, but it is absent; convert it again")
        for name, tensor in reader(path, wanted):
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                check_count(f"{path}: {name}", "rows", len(tensor), probe.vocab_size)
                tensor = tensor[probe.ids.tolist()]  # before anything makes float32 of a whole table
            state[name] = _float32(tensor)
            del tensor
    if missing := sorted(wanted - state.keys()):
        raise InputError(f"{folder}: {missing[0]} is absent, config.json needs it; convert it again")
    return state


def _float32(tensor: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Return a copy in any case: a tensor that lies in a mapped file would keep its pages in memory."""
    import torch

    if isinstance(tensor, np.ndarray):
        return torch.from_numpy(tensor.astype(np.float32))
    return tensor.to(torch.float32, copy=True)


Reader = Callable[[Path, set[str]], Iterable[tuple[str, Any]]]


def _huggingface_files(folder: Path, wanted: set[str]) -> list[tuple[Path, Reader]]:
    """Return the files that hold the wanted tensors, in transformers' order of preference."""
    for whole, reader in (("model.safetensors", _safetensors), ("pytorch_model.bin", _torch_file)):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [(folder / whole, reader)]
        if index.is_file():
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (OSError, ValueError, KeyError) as error:
                raise InputError(f"{index}: damaged ({error}), expected a weight_map; convert it again") from error
            return [(folder / name, reader) for name in sorted({places[key] for key in wanted & places.keys()})]
    raise InputError(f"{folder}: neither model.safetensors nor pytorch_model.bin; expected a Hugging Face folder")


def _safetensors(path: Path, wanted: set[str]) -> Iterable[tuple[str, np.ndarray]]:
    from safetensors import safe_open

    # framework="pt" maps the file for writing, which Linux refuses when it is larger than the memory.
    with safe_open(path, framework="np") as file:
        names = sorted(wanted & set(file.keys()))
    for name in names:
        with safe_open(path, framework="np") as file:  # anew for each tensor: the mapping goes with it
            yield name, file.get_tensor(name)


def _torch_file(path: Path, wanted: set[str]) -> Iterable[tuple[str, torch.Tensor]]:
    import torch

    tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    for name in sorted(wanted & tensors.keys()):
        yield name, tensors.pop(name)


if __name__ == "__main__":
    run_door(main)

"""Tokens per second of generation: panda_jax against transformers' generate, the same model, on this machine's CPU.

    python benchmarks/decode.py                        # 15 M parameters, about five minutes on 2 idle cores
    python benchmarks/decode.py --cases tiny-110m      # 110 M, about fifteen

Greedy, float32, 128 new tokens behind 64 random ones, batches of 1 and 8, random weights that both sides share, nothing
stops early. Both sides run in one process, each a warm-up and then in turns, so that a busy machine slows both; medians
over the rounds. Their tokens are compared: a faster wrong answer does not count.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import jax  # noqa: E402  (the benchmark runs from the checkout)
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from convert.hf_folder import config_of  # noqa: E402
from panda_jax import sharding  # noqa: E402
from panda_jax.config import Compute, Mesh, Model  # noqa: E402
from panda_jax.generation.decode import Generator  # noqa: E402
from panda_jax.generation.sampling import Sampling  # noqa: E402
from panda_jax.model.parameters import Parameters  # noqa: E402
from panda_jax.presets import PRESETS  # noqa: E402

CASES = ("tiny-15m", "tiny-110m")
BATCHES = (1, 8)
PROMPT_TOKENS, NEW_TOKENS = 64, 128
# transformers' name of each of our matrices, and the shape of one layer of it as (out, in).
LAYER_NAMES = {
    "attn_norm": "input_layernorm", "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj", "w_down": "mlp.down_proj",
}  # fmt: skip


def torch_model(model: Model, parameters: dict[str, jax.Array]) -> LlamaForCausalLM:
    """Return transformers' LLaMA with the same weights, float32, its default attention, no end-of-sequence id."""
    network = LlamaForCausalLM(
        LlamaConfig.from_dict(
            config_of(model, "float32") | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        )
    ).eval()
    values = {name: np.asarray(value) for name, value in parameters.items()}
    state = {"model.embed_tokens.weight": values["embed"], "model.norm.weight": values["norm"]}
    state["lm_head.weight"] = values["embed"] if model.tie_embeddings else values["lm_head"].T
    for ours, theirs in LAYER_NAMES.items():
        for layer, value in enumerate(values[f"layers.{ours}"]):
            if value.ndim > 1:
                value = (value.reshape(-1, model.dim) if ours == "wo" else value.reshape(len(value), -1)).T
            state[f"model.layers.{layer}.{theirs}.weight"] = value
    network.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    return network


def sides(model: Model) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Return what writes NEW_TOKENS ids [B, new] behind prompts [B, P], by name."""
    mesh = sharding.make_mesh(Mesh(data=1))
    parameters = jax.jit(Parameters(model).initial)(jax.random.key(0))
    # Larger than at the start of a training, so that the tokens differ and near-ties are rare.
    parameters = {name: value if name.endswith("norm") else 3 * value for name, value in parameters.items()}
    network: Any = torch_model(model, parameters)

    def panda(layer_loop) -> Callable[[np.ndarray], np.ndarray]:
        made = Generator(model, parameters, Compute(dtype="float32", layer_loop=layer_loop), mesh)

        def write(prompts: np.ndarray) -> np.ndarray:
            found = made.generate(prompts.tolist(), Sampling.greedy(NEW_TOKENS, ()))
            return np.array([row.ids for row in found])

        return write

    def transformers(prompts: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(prompts)
        with torch.inference_mode():
            out = network.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        return out[:, PROMPT_TOKENS:].numpy()

    return {"panda unroll": panda("unroll"), "panda scan": panda("scan"), "transformers": transformers}


def measure(case: str, batch: int, num_rounds: int, writers: dict[str, Callable], table: Table) -> None:
    """Add a row per side: median seconds, tokens per second, processor seconds, and how much faster than torch."""
    prompts = np.random.default_rng(batch).integers(3, 32000, (batch, PROMPT_TOKENS))
    written = {name: write(prompts) for name, write in writers.items()}  # compiles
    wall: dict[str, list[float]] = {name: [] for name in writers}
    cpu: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(num_rounds):
        for name, write in writers.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            write(prompts)
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - cpu_started)
    wall_s, cpu_s = ({name: statistics.median(times[name]) for name in writers} for times in (wall, cpu))
    for name in writers:
        same = float(np.mean(written[name] == written["transformers"]))
        table.add_row(
            case, str(batch), name, f"{wall_s[name]:.3f}", f"{batch * NEW_TOKENS / wall_s[name]:,.0f}",
            f"{wall_s['transformers'] / wall_s[name]:.2f}", f"{cpu_s[name]:.2f}", f"{same:.1%}",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["tiny-15m"])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {cores} cores, torch {torch.__version__}, jax {jax.__version__}, load {load:.1f}")
    columns = ("model", "batch", "side", "seconds", "tokens/s", "times transformers", "CPU s", "same tokens")
    table = Table(*columns, title=f"greedy, float32, {NEW_TOKENS} new tokens behind {PROMPT_TOKENS}")
    for case in options.cases:
        model = Model(**PRESETS[case])
        writers = sides(model)
        for batch in options.batches:
            measure(case, batch, options.rounds, writers, table)
    Console(width=120).print(table)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()

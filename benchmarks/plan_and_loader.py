"""Time the packing plan on a mixture of the size of Panda's, and the loader that reads rows by it.

Purpose: the plan of 15.3 million uses of records in at most 60 s and 2 GiB, with rows at least 97 % full; the loader
         at 1 million tokens/s or more at seq_len 2048.
Command: python benchmarks/plan_and_loader.py [--records-per-thousand 1000] [--steps 60] [--workers 0]
Prints:  seconds, peak resident memory of the process and fill of the plan; tokens/s of the loader; and the share of a
         step of --step-seconds that is spent waiting for data. Lengths are lognormal; the token ids are random.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from panda_jax.config import Config, Data, Model, Source, Tokenizer, Train
from panda_jax.data.loader import Loader
from panda_jax.data.packing import Plan, plan

SEQ_LEN, GLOBAL_BATCH_SIZE, SEED = 2048, 128, 42
# name: records (PROTOCOLS.md §4.1; COIG as the paper's Table 3 up-samples it), passes, median length in tokens, spread.
MIXTURE = {
    "wiki2019zh": (1_040_000, 1, 300, 1.0),
    "news2016zh": (2_430_000, 1, 500, 0.9),
    "baike2018qa": (1_430_000, 1, 150, 0.9),
    "webtext2019zh": (4_120_000, 1, 150, 0.9),
    "translation2019zh": (5_160_000, 1, 80, 0.5),
    "coig": (580_000, 2, 200, 0.8),
}


class SyntheticCache:
    """A token cache of random ids with lognormal lengths: what a plan and a loader ask of a TokenCache."""

    def __init__(self, source: str, folder: Path, num_windows: int, median: float, spread: float):
        draw = np.random.default_rng(list(source.encode()))
        self.source, self.fingerprint = source, f"{num_windows} {median} {spread}"
        self.lengths = np.clip(draw.lognormal(np.log(median), spread, num_windows), 1, SEQ_LEN).astype(np.int32)
        # As in a real cache the ids come from a mapped file; windows beyond its end start again at its beginning.
        self.path = folder / f"{source}.ids"
        draw.integers(3, 32000, 4_000_000, np.int32).tofile(self.path)
        self.__setstate__(vars(self))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("ids", "flags")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.ids = np.asarray(np.memmap(self.path, np.int32, "r"))
        self.flags = np.ones(SEQ_LEN + 1, bool)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        size = int(self.lengths[i]) + 1
        start = (i * 997) % (len(self.ids) - SEQ_LEN - 1)
        return self.ids[start : start + size], self.flags[:size]

    def record_id(self, i: int) -> str:
        return f"{self.source}: synthetic:{i + 1}"


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_plan(config: Config, caches: list[SyntheticCache]) -> Plan:
    start = time.perf_counter()
    order = plan(config, caches)
    fingerprint = order.fingerprint
    seconds = time.perf_counter() - start
    fill = order.row_tokens.sum(dtype=np.int64) / (order.num_rows * SEQ_LEN)
    records = sum(len(cache.lengths) for cache in caches)
    print(
        f"plan: {records:,} records used {len(order.items):,} times, {order.num_rows:,} rows, {order.num_steps:,} steps"
        f"; {seconds:.1f} s, peak {peak_gib():.2f} GiB, fill {fill:.2%}, fingerprint {fingerprint[:16]}"
    )
    return order


def measure_loader(config: Config, order: Plan, caches: list[SyntheticCache], steps: int, step_seconds: float) -> None:
    local_rows, warm_up = np.arange(GLOBAL_BATCH_SIZE), 5 + 4 * config.data.loader_workers
    with Loader(order, caches, config, 0, local_rows) as loader:
        batches, tokens = iter(loader), 0
        for _ in range(warm_up):
            next(batches)
        start = time.perf_counter()
        for _ in range(steps):
            tokens += int((next(batches)["segment_ids"] > 0).sum())
        seconds = time.perf_counter() - start
        print(
            f"loader: {config.data.loader_workers} workers, {tokens / seconds / 1e6:.2f} M tokens/s over {steps} steps"
        )
        waited = 0.0
        for _ in range(20):
            time.sleep(step_seconds)
            start = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - start
        print(f"loader: data wait {waited / 20 / step_seconds:.3%} of a step of {step_seconds} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records-per-thousand", type=int, default=1000, help="share of the records that is planned")
    parser.add_argument("--steps", type=int, default=60, help="steps timed")
    parser.add_argument("--step-seconds", type=float, default=0.5, help="length of the pretended training step")
    parser.add_argument("--workers", type=int, default=0, help="data.loader_workers")
    arguments = parser.parse_args()
    sources = tuple(Source(corpus=name, path=name, epochs=epochs) for name, (_, epochs, _, _) in MIXTURE.items())
    model = Model(
        vocab_size=32000,
        dim=64,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        mlp_dim=64,
        norm_eps=1e-6,
        context_length=SEQ_LEN,
    )
    config = Config(
        name="plan_and_loader",
        model=model,
        tokenizer=Tokenizer(path="none"),
        data=Data(sources=sources, seq_len=SEQ_LEN, loader_workers=arguments.workers),
        train=Train(global_batch_size=GLOBAL_BATCH_SIZE),
        seed=SEED,
    )
    with tempfile.TemporaryDirectory() as folder:
        caches = [
            SyntheticCache(name, Path(folder), records * arguments.records_per_thousand // 1000, median, spread)
            for name, (records, _, median, spread) in MIXTURE.items()
        ]
        order = measure_plan(config, caches)
        measure_loader(config, order, caches, arguments.steps, arguments.step_seconds)


if __name__ == "__main__":
    main()

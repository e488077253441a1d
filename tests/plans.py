"""What the tests of the plan share: a cache reduced to lengths, configs, and random mixtures."""

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from panda_jax.config import Config, Data, Model, Source, Tokenizer, Train
from panda_jax.data.packing import Plan

QUICK = settings(max_examples=60, deadline=None)


@dataclass
class Lengths:
    """A token cache reduced to what a plan asks of it; `records` names the record of each window."""

    source: str
    lengths: np.ndarray
    records: list[int] | None = None
    fingerprint: str = "content"

    def record_id(self, i: int) -> str:
        return f"{self.source}: file.json:{self.records[i] if self.records else i + 1}"


def cache(name: str, *lengths: int, records: list[int] | None = None) -> Lengths:
    return Lengths(name, np.array(lengths, np.int32), records)


def configure(sources: list[dict], seq_len: int = 8, batch: int = 2, seed: int = 7, data=None, train=None) -> Config:
    """A config of the named sources; `data` and `train` add further settings."""
    model = Model(
        vocab_size=97, dim=6, num_layers=1, num_heads=1, num_kv_heads=1, mlp_dim=5, norm_eps=1e-5, context_length=4096
    )
    parts = tuple(Source(corpus="text", path="unread", **source) for source in sources)
    return Config(
        name="test",
        model=model,
        tokenizer=Tokenizer(path="unread"),
        data=Data(sources=parts, seq_len=seq_len, **(data or {})),
        train=Train(global_batch_size=batch, **(train or {})),
        seed=seed,
    )


def rows_of(order: Plan) -> list[list[tuple[int, int]]]:
    return [order.row(i) for i in range(order.num_rows)]


def many(name: str, count: int, seed: int) -> Lengths:
    lengths = np.random.default_rng(seed).integers(1, 64, count, dtype=np.int32)
    return Lengths(name, lengths)


@st.composite
def mixtures(draw, **fixed):
    """A config with one to three sources, and their caches."""
    seq_len, count = draw(st.integers(3, 30)), draw(st.integers(1, 3))
    sources, caches = [], []
    for i in range(count):
        lengths = draw(st.lists(st.integers(1, seq_len), min_size=2, max_size=40))
        epochs = draw(st.sampled_from([None, 1, 2, 0.5, 1.5, 2.25, 0.75]))
        sources.append({"name": f"s{i}", "epochs": epochs, "held_out": draw(st.integers(0, len(lengths) - 1))})
        caches.append(cache(f"s{i}", *lengths))
    data = {"packing": draw(st.booleans()), "shuffle": draw(st.booleans())} | fixed
    batch, seed, train = draw(st.integers(1, 5)), draw(st.integers(-5, 5)), {"epochs": draw(st.integers(1, 3))}
    return configure(sources, seq_len, batch, seed, data, train), caches

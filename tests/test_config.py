"""The settings' own rules: published sizes, fields that must agree, and the arithmetic of the shipped runs."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pydantic
import pytest

from panda_jax import settings
from panda_jax.config import Config, Data, InitFrom, Lion, Model, Source, Tokenizer
from panda_jax.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parent.parent

# size: (parameters, width, layers, heads, key/value heads, MLP width, epsilon, context); PROTOCOLS.md §1.
PUBLISHED = {
    "llama-7b": (6_738_415_616, 4096, 32, 32, 32, 11008, 1e-6, 2048),
    "llama-13b": (13_015_864_320, 5120, 40, 40, 40, 13824, 1e-6, 2048),
    "llama-33b": (32_528_943_616, 6656, 60, 52, 52, 17920, 1e-6, 2048),
    "llama-65b": (65_285_660_672, 8192, 80, 64, 64, 22016, 1e-5, 2048),
    "llama2-7b": (6_738_415_616, 4096, 32, 32, 32, 11008, 1e-5, 4096),
    "llama2-13b": (13_015_864_320, 5120, 40, 40, 40, 13824, 1e-5, 4096),
    "llama2-70b": (68_976_648_192, 8192, 80, 64, 8, 28672, 1e-5, 4096),
}
SOURCES = (Source(corpus="wiki2019zh", path="data/wiki"), Source(corpus="baike2018qa", path="data/baike"))


def model(**changes: Any) -> Model:
    return Model(**(PRESETS["tiny-1m"] | changes))


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_exact(size: str) -> None:
    built = Model(**PRESETS[size])
    sizes = (built.dim, built.num_layers, built.num_heads, built.num_kv_heads, built.mlp_dim)
    assert (built.num_parameters, *sizes, built.norm_eps, built.context_length) == PUBLISHED[size]
    assert (built.vocab_size, built.head_dim, built.rope_theta, built.tie_embeddings) == (32000, 128, 10000.0, False)
    # Meta's own rule for the MLP: two thirds of 4 x width, times a factor, rounded up; int() after each step.
    multiple, factor = (4096, 1.3) if size == "llama2-70b" else (256, 1.0)
    assert built.mlp_dim == multiple * math.ceil(int(factor * int(2 * 4 * built.dim / 3)) / multiple)


def test_every_preset_is_a_model_and_only_the_published_ones_are_large() -> None:
    tiny = {size for size in PRESETS if Model(**PRESETS[size]).num_parameters < 200_000_000}
    assert tiny == {"tiny-1m", "tiny-15m", "tiny-110m"} and set(PRESETS) == tiny | set(PUBLISHED)


def test_parameters_of_a_small_model_by_hand() -> None:
    """Width 8, 2 layers, 4 heads of 2, 2 key/value heads, MLP 12, vocabulary 10.

    A layer: wq and wo 2 x 8 x 8 = 128, wk and wv 2 x 8 x 4 = 64, MLP 3 x 8 x 12 = 288, two norms 16: 496.
    Embedding 10 x 8 = 80, output the same, last norm 8: 80 + 2 x 496 + 8 = 1080, and 80 more when untied.
    """
    small = model(dim=8, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=12, vocab_size=10)
    assert small.num_parameters == 1160
    assert dataclasses.replace(small, tie_embeddings=True).num_parameters == 1080


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: model(dim=130), "dim 130 must be num_heads 4 times an even head size"),
        (lambda: model(dim=12), "dim 12 must be num_heads 4 times an even head size"),
        (lambda: model(num_kv_heads=3), "num_heads 4 must be a multiple of num_kv_heads 3"),
        (lambda: model(norm_eps=0.0), "greater than 0"),
        (lambda: model(norm_eps=math.nan), "finite"),
        (lambda: model(init_std=math.inf), "finite"),
        (lambda: model(width=7), "width"),
        (lambda: Source(corpus="text", path="a", epochs=1, weight=1), "give `epochs` or `weight`, not both"),
        (lambda: Source(corpus="text", path="a", held_out=-1), "greater than or equal to 0"),
        (lambda: Source(corpus="text", path="a", weight=0.0), "greater than 0"),
        (lambda: Data(sources=()), "`sources` is empty"),
        (lambda: Data(sources=SOURCES, total_tokens=9), "sources with `weight` need `total_tokens`"),
        (lambda: Data(sources=(weighted("a"), SOURCES[0]), total_tokens=9), "given for some sources only"),
        (lambda: Data(sources=(weighted("a"), weighted("b"))), "sources with `weight` need `total_tokens`"),
        (lambda: Data(sources=(SOURCES[0], SOURCES[0])), "two sources are called 'wiki2019zh'"),
        (lambda: Data(sources=SOURCES, max_dropped_fraction=1.1), "less than or equal to 1"),
        (lambda: InitFrom(), "found none of them; give one of `checkpoint`, `hf` and `meta`"),
        (lambda: InitFrom(hf="a", meta="b"), "found hf and meta; give one of"),
        (lambda: InitFrom(checkpoint="a", hf="b", meta="c"), "found checkpoint and hf and meta; give one of"),
        (lambda: InitFrom(hf="a", new_rows="random"), "new_rows"),  # pyright: ignore[reportArgumentType]
        (lambda: Tokenizer(path="a", extra_ids=-1), "greater than or equal to 0"),
        (lambda: Lion(kind="adamw"), "lion"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_settings_that_cannot_be_meant_are_refused(build: Any, reason: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=reason):
        build()


def weighted(name: str) -> Source:
    return Source(corpus="text", path="a", name=name, weight=1.0)


def test_names_weights_and_windows_that_fit_are_accepted() -> None:
    twice = (SOURCES[0], dataclasses.replace(SOURCES[0], name="again"))
    assert [source.label for source in Data(sources=twice).sources] == ["wiki2019zh", "again"]
    assert Data(sources=(weighted("a"), weighted("b")), total_tokens=9).total_tokens == 9
    whole = Config(name="a", model=model(), tokenizer=Tokenizer(path="a"), data=Data(sources=SOURCES, seq_len=512))
    with pytest.raises(pydantic.ValidationError, match="data.seq_len 513 exceeds model.context_length 512"):
        dataclasses.replace(whole, data=dataclasses.replace(whole.data, seq_len=513))
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


# run: devices, data-parallel shards, rows a shard and pass, passes; the product of the last three is the batch.
BATCHES = {
    "7b_pretrain": (16, 16, 4, 128),
    "7b_pretrain_published_warmup": (16, 16, 4, 128),
    "7b_coig": (16, 16, 4, 2),
    "7b_all_mixed": (16, 16, 4, 128),
    "13b_pretrain": (16, 16, 2, 128),
    "13b_coig": (16, 16, 2, 4),
    "33b_pretrain": (32, 32, 2, 64),
    "65b_pretrain": (64, 16, 2, 128),
    "llama2_13b_pretrain": (16, 16, 1, 128),
}


def panda_run(name: str) -> Config:
    return settings.load(str(REPOSITORY / "configs" / "panda" / f"{name}.yaml"), [])


def test_every_run_of_the_paper_has_its_arithmetic_checked() -> None:
    assert {file.stem for file in (REPOSITORY / "configs" / "panda").glob("*.yaml")} == set(BATCHES)


@pytest.mark.parametrize("name", BATCHES)
def test_mesh_and_batch_of_the_papers_runs(name: str) -> None:
    run, (devices, shards, micro, passes) = panda_run(name), BATCHES[name]
    assert (run.mesh.data * run.mesh.fsdp * run.mesh.tensor, run.mesh.data * run.mesh.fsdp) == (devices, shards)
    assert (run.train.micro_batch_size, run.train.global_batch_size) == (micro, micro * passes * shards)
    sizes = (run.model.num_heads, run.model.num_kv_heads, run.model.mlp_dim, run.model.vocab_size)
    assert [size % run.mesh.tensor for size in sizes] == [0, 0, 0, 0] and run.model.dim % run.mesh.fsdp == 0
    assert run.mesh.platform == "gpu" and run.model.init_from is not None


def test_values_of_the_papers_runs() -> None:
    """PROTOCOLS.md §4.4: learning rate, epochs, batch, warm-up, clipping and AdamW of each run."""
    expected = {
        "7b_pretrain": (1e-5, 1, 8192, 5.0, 0.9, 0.99, 1e-6, 0.0),
        "7b_coig": (3e-5, 5, 128, 5.0, 0.9, 0.99, 1e-6, 0.0),
        "13b_pretrain": (1e-5, 1, 4096, 5.0, 0.9, 0.99, 1e-6, 0.0),
        "13b_coig": (1e-5, 5, 128, 5.0, 0.9, 0.99, 1e-6, 0.0),
        "llama2_13b_pretrain": (1e-5, 1, 2048, 1.0, 0.9, 0.96, 1e-6, 0.01),
    }
    for name, values in expected.items():
        run = panda_run(name)
        adam = run.optimizer
        assert adam.kind == "adamw"
        batch = (run.train.epochs, run.train.global_batch_size, run.train.clip_norm)
        assert (adam.learning_rate, *batch, adam.beta1, adam.beta2, adam.eps, adam.weight_decay) == values
        assert (run.seed, run.data.seq_len, run.schedule.kind) == (42, 2048, "linear")
    published = panda_run("7b_pretrain_published_warmup")
    assert (published.schedule.warmup_steps, published.schedule.total_steps) == (1157, 115_721)
    ours = panda_run("7b_pretrain")
    assert (ours.schedule.warmup_steps, ours.schedule.warmup_fraction, ours.schedule.total_steps) == (None, 0.01, None)
    same_but = {"name", "schedule"}
    for field in dataclasses.fields(ours):
        assert (getattr(ours, field.name) == getattr(published, field.name)) == (field.name not in same_but)


def test_the_second_stage_starts_from_the_first() -> None:
    for size in ("7b", "13b"):
        first, second = panda_run(f"{size}_pretrain"), panda_run(f"{size}_coig")
        assert second.model.init_from == InitFrom(checkpoint=f"{first.log.runs_dir}/{first.name}")
        assert second.checkpoint.steps == (3000, 6000, 9000) and second.tokenizer == first.tokenizer
        assert len(second.data.sources) == 6 and len(first.data.sources) == 5


def test_foreign_weights_and_the_row_for_padding() -> None:
    """PROTOCOLS.md §4.4: the original's vocabulary is 32,001 rows; 32,001 = 3 x 10,667 does not divide over 65B's 4."""
    for name in BATCHES:
        run = panda_run(name)
        start = run.model.init_from
        assert start is not None and run.model.vocab_size == 32000 + run.tokenizer.extra_ids
        assert run.tokenizer.extra_ids == (0 if name in ("65b_pretrain", "llama2_13b_pretrain") else 1)
        assert (start.hf is None) == name.endswith("_coig")
        assert start.new_rows == ("normal" if start.hf and run.tokenizer.extra_ids else "refuse")
    meta = ["model.init_from.hf=null", "model.init_from.meta=data/llama/7B"]
    start = settings.load(str(REPOSITORY / "configs" / "panda" / "7b_pretrain.yaml"), meta).model.init_from
    assert start == InitFrom(meta="data/llama/7B", new_rows="normal")


def test_the_mixed_run_uses_instructions_twice_and_corpora_once() -> None:
    mixed = {source.corpus: source.epochs for source in panda_run("7b_all_mixed").data.sources}
    assert len(mixed) == 11
    assert {corpus for corpus, epochs in mixed.items() if epochs == 2} == {c for c in mixed if c.startswith("coig_")}

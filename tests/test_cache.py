"""The token cache: what is stored, kill and resume, any number of workers, and what is refused."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from panda_jax import config
from panda_jax.atomic import write_atomically
from panda_jax.data import files, pool
from panda_jax.data import preparation as cache_module
from panda_jax.data.cache import TokenCache, pack, token_dtype, unpack
from panda_jax.data.preparation import Progress, prepare
from panda_jax.data.records import Example, Segment
from panda_jax.data.tokens import tokenize
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.text.vocab import train_vocabulary

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_RECORDS = 400
BLOCK_BYTES = 2_000


def record(i: int) -> dict[str, str]:
    return {"inputs": f"问题{i}：{i}加{i}？", "targets": f"{2 * i}。" + "今天天气很好。" * (i % 7)}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    texts = (text for i in range(NUM_RECORDS) for text in record(i).values())
    train_vocabulary(texts, config.Tokenizer(path=str(path), train_vocab_size=290))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "records.jsonl"
    path.write_text("".join(json.dumps(record(i), ensure_ascii=False) + "\n" for i in range(NUM_RECORDS)))
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MIN_BLOCK_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(cache_module, "MAX_BLOCK_BYTES", BLOCK_BYTES)


def make_config(tokenizer: Path, cache_dir: Path, *sources: config.Source, **data: Any) -> config.Config:
    size: dict[str, Any] = dict(
        dim=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_dim=8, norm_eps=1e-5, context_length=512
    )
    settings: dict[str, Any] = {"seq_len": 40, "tokenize_workers": 2} | data
    return config.Config(
        name="test",
        model=config.Model(vocab_size=290, **size),
        tokenizer=config.Tokenizer(path=str(tokenizer)),
        data=config.Data(sources=sources, cache_dir=str(cache_dir), **settings),
    )


def flan(path: Path, **settings: Any) -> config.Source:
    return config.Source(corpus="flan", path=str(path), **settings)


def quiet(progress: Progress) -> None:
    """Show nothing."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def prepare_one(run: config.Config) -> TokenCache:
    (cache,) = prepare(run, Tokenizer.load(run.tokenizer.path), quiet)
    return cache


def count_built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the index of every block that goes to a worker."""
    built: list[int] = []
    build = pool.Pool.build

    def counted(self: pool.Pool, job: Any, blocks: Any, done: Any) -> None:
        def watched() -> Iterator[files.Block]:
            for block in blocks:
                built.append(block.index)
                yield block

        build(self, job, watched(), done)

    monkeypatch.setattr(pool.Pool, "build", counted)
    return built


def test_the_cache_holds_every_window_in_the_order_of_records(tokenizer_path: Path, corpus: Path, tmp_path: Path):
    reports: list[Progress] = []
    run = make_config(tokenizer_path, tmp_path / "cache", flan(corpus))
    tokenizer = Tokenizer.load(tokenizer_path)
    (cache,) = prepare(run, tokenizer, reports.append)
    assert len(cache.manifest["shards"]) > 10
    windows = []
    for i in range(NUM_RECORDS):
        inputs, targets = record(i).values()
        example = Example((Segment(inputs, False), Segment(targets, True)))
        found = tokenize(example, tokenizer, run.data.sources[0], 40)
        assert isinstance(found, list)
        windows += [(i, window) for window in found]
    assert len(cache) == len(windows) == NUM_RECORDS
    for i, (number, window) in enumerate(windows):
        ids, trained = cache.read(i)
        assert (ids.dtype, trained.dtype) == (np.int32, np.bool_)
        assert ids.tolist() == window.ids.tolist() and trained.tolist() == window.trained.tolist()
        assert cache.lengths[i] == len(ids) - 1 and cache.trained[i] == sum(trained)
        assert cache.record_id(i) == f"flan: {corpus}:{number + 1} (record {number})"
    assert cache.manifest["records"] == NUM_RECORDS
    assert cache.manifest["tokens"] == int(cache.lengths.sum())
    assert cache.manifest["trained_tokens"] == int(cache.trained.sum())
    assert reports[-1] == Progress("flan", reports[-1].done_bytes, corpus.stat().st_size, NUM_RECORDS, True)
    assert abs(reports[-1].done_bytes - corpus.stat().st_size) <= len(cache.manifest["shards"])
    for i in (-1, NUM_RECORDS):
        with pytest.raises(IndexError):
            cache.read(i)


def test_a_token_is_an_id_with_the_flag_on_top():
    assert [token_dtype(size) for size in (300, 32768, 32769, 79458)] == ["uint16", "uint16", "uint32", "uint32"]
    ids, trained = np.array([0, 1, 32767], np.int32), np.array([True, False, True])
    assert pack(ids, trained, "uint16").tolist() == [32768, 1, 65535]
    assert pack(np.array([79457], np.int32), np.array([True]), "uint32").tolist() == [2**31 + 79457]
    for dtype in ("uint16", "uint32"):
        back_ids, back_trained = unpack(pack(ids, trained, dtype))
        assert back_ids.tolist() == [0, 1, 32767] and back_trained.tolist() == [True, False, True]


def test_the_bytes_do_not_depend_on_the_workers(tokenizer_path: Path, corpus: Path, tmp_path: Path):
    folders = []
    for workers in (1, 3):
        run = make_config(tokenizer_path, tmp_path / f"{workers}", flan(corpus), tokenize_workers=workers)
        folders.append(contents(prepare_one(run).folder))
    assert folders[0] == folders[1]
    assert not [name for name in folders[0] if name.startswith(".")]


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        # What Ctrl-C in a terminal does: SIGINT for everyone in the foreground process group.
        ("os.killpg(0, signal.SIGINT)", 130),
    ],
)
def test_a_run_that_was_ended_goes_on_where_it_stopped(
    tokenizer_path: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, status: int
):
    """The first process ends itself at 60 %; its workers end by themselves, and only missing shards are redone."""
    whole = contents(prepare_one(make_config(tokenizer_path, tmp_path / "whole", flan(corpus))).folder)
    shards = {name for name in whole if name.startswith("shard")}
    run = make_config(tokenizer_path, tmp_path / "ended", flan(corpus))
    (tmp_path / "run.pickle").write_bytes(pickle.dumps(run))
    script = f"""
import os, pickle, signal, sys
from pathlib import Path
from panda_jax.data import preparation
from panda_jax.text.tokenizer import Tokenizer
# A shell that runs the tests in the background has its jobs ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
preparation.MIN_BLOCK_BYTES = preparation.MAX_BLOCK_BYTES = {BLOCK_BYTES}
def progress(report):
    if report.done_bytes > 0.6 * report.total_bytes:
        {end}
run = pickle.loads(Path({str(tmp_path / "run.pickle")!r}).read_bytes())
try:
    preparation.prepare(run, Tokenizer.load(run.tokenizer.path), progress)
except KeyboardInterrupt:
    sys.exit(130)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        timeout=60,
        cwd=REPOSITORY,
        start_new_session=True,
        check=False,
    )
    # The workers hold the pipe too: that `run` returned means they are gone, and they said nothing.
    assert (ended.returncode, ended.stderr) == (status, b"")
    (folder,) = (tmp_path / "ended").glob("flan-*")
    left = set(contents(folder))
    assert left < shards and 0.6 * len(shards) <= len(left)
    built = count_built(monkeypatch)
    assert contents(prepare_one(run).folder) == whole
    assert {f"shard-{index:06d}.bin" for index in built} == shards - left and len(built) == len(shards - left)


def test_a_complete_cache_is_opened_without_work(
    tokenizer_path: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make_config(tokenizer_path, tmp_path / "cache", flan(corpus))
    first = prepare_one(run)
    built = count_built(monkeypatch)
    monkeypatch.setattr(files, "file_hash", lambda path: pytest.fail("the file was hashed again"))
    monkeypatch.setattr(pool, "_Worker", lambda: pytest.fail("a worker was started"))
    second = prepare_one(run)
    assert not built and second.fingerprint == first.fingerprint


def test_the_fingerprint_covers_file_and_settings(tokenizer_path: Path, tmp_path: Path):
    corpus = tmp_path / "records.jsonl"
    corpus.write_text('{"inputs": "甲", "targets": "乙"}\n')
    run = make_config(tokenizer_path, tmp_path / "cache", flan(corpus))
    seen = {prepare_one(run).fingerprint}
    for settings, data in (
        ({"template": "panda"}, {}),
        ({"overlong": "drop"}, {}),
        ({"compat": "panda"}, {}),
        ({"max_records": 1}, {}),
        ({}, {"seq_len": 41}),
    ):
        seen.add(
            prepare_one(make_config(tokenizer_path, tmp_path / "cache", flan(corpus, **settings), **data)).fingerprint
        )
    corpus.write_text('{"inputs": "甲", "targets": "丙"}\n')
    changed = prepare_one(run)
    assert changed.fingerprint not in seen and len(seen) == 6
    assert "丙" in Tokenizer.load(tokenizer_path).decode(changed.read(0)[0])
    repeated = make_config(tokenizer_path, tmp_path / "cache", flan(corpus, epochs=3, name="flan"))
    assert prepare_one(repeated).fingerprint == changed.fingerprint  # neither changes a token


def test_two_processes_at_once(tokenizer_path: Path, corpus: Path, tmp_path: Path):
    run = make_config(tokenizer_path, tmp_path / "cache", flan(corpus), tokenize_workers=1)
    results: list[dict[str, bytes]] = []
    threads = [threading.Thread(target=lambda: results.append(contents(prepare_one(run).folder))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = contents(prepare_one(make_config(tokenizer_path, tmp_path / "alone", flan(corpus))).folder)
    (folder,) = (tmp_path / "cache").glob("flan-*")
    assert len(results) == 2 and contents(folder) == alone


def test_a_cache_can_be_pickled_and_read_by_threads(tokenizer_path: Path, corpus: Path, tmp_path: Path):
    cache = prepare_one(make_config(tokenizer_path, tmp_path / "cache", flan(corpus)))
    copy = pickle.loads(pickle.dumps(cache))
    expected = [cache.read(i)[0].tolist() for i in range(len(cache))]
    found: dict[int, list[list[int]]] = {}

    def read(name: int) -> None:
        found[name] = [copy.read(i)[0].tolist() for i in range(len(copy))]

    threads = [threading.Thread(target=read, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 4


def test_damaged_files_are_named_and_can_be_redone(
    tokenizer_path: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make_config(tokenizer_path, tmp_path / "cache", flan(corpus))
    folder = prepare_one(run).folder
    whole = contents(folder)
    built = count_built(monkeypatch)
    for name, expected in (("shard-000003.bin", [3]), ("lengths.npy", []), ("manifest.json", [])):
        path = folder / name
        path.write_bytes(whole[name][:-5])
        with pytest.raises(InputError, match=f"{name}.* delete it and run prepare again"):
            prepare_one(run)
        path.unlink()
        built.clear()
        prepare_one(run)
        assert built == expected and contents(folder) == whole
    (folder / "shard-000002.bin").unlink()
    with pytest.raises(InputError, match=r"shard-000002\.bin"):
        TokenCache(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="not complete; run prepare again"):
        TokenCache(folder)


def test_a_shard_cut_short_in_an_unfinished_cache_is_redone(
    tokenizer_path: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make_config(tokenizer_path, tmp_path / "cache", flan(corpus))
    folder = prepare_one(run).folder
    whole = contents(folder)
    (folder / "manifest.json").unlink()
    (folder / "shard-000001.bin").write_bytes(whole["shard-000001.bin"][:-2])
    (folder / "shard-000004.bin").write_bytes(b"")
    built = count_built(monkeypatch)
    prepare_one(run)
    assert built == [1, 4] and contents(folder) == whole


def test_drops_over_the_limit_stop_with_the_counts(tokenizer_path: Path, tmp_path: Path):
    corpus = tmp_path / "records.jsonl"
    rows = [{"inputs": "问", "targets": "答" if i % 10 else " "} for i in range(50)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_config(tokenizer_path, tmp_path / "cache", flan(corpus))
    message = r"data\.sources\[0\] \(flan\): 5 of 50 examples dropped \(10\.00%\): 5 blank output; .*fraction=0\.01"
    for _ in range(2):  # the second time the cache is complete already
        with pytest.raises(InputError, match=message):
            prepare_one(run)
    tolerant = make_config(tokenizer_path, tmp_path / "cache", flan(corpus), max_dropped_fraction=0.1)
    assert prepare_one(tolerant).manifest["dropped"] == {"blank output": 5}


def test_a_source_without_a_trained_token_stops_always(tokenizer_path: Path, tmp_path: Path):
    corpus = tmp_path / "records.jsonl"
    corpus.write_text('{"inputs": "问", "targets": ""}\n' * 3)
    run = make_config(tokenizer_path, tmp_path / "cache", flan(corpus), max_dropped_fraction=1.0)
    with pytest.raises(InputError, match="none of 3 examples keeps a trained token: 3 blank output"):
        prepare_one(run)


def test_a_tokenizer_of_another_size_is_refused(tokenizer_path: Path, corpus: Path, tmp_path: Path):
    other = tmp_path / "other.model"
    train_vocabulary(iter(["今天天气很好。"]), config.Tokenizer(path=str(other), train_vocab_size=270))
    with pytest.raises(InputError, match=r"model\.vocab_size: 290, but .*other\.model has 270 pieces; set model"):
        prepare_one(make_config(other, tmp_path / "cache", flan(corpus)))


def test_a_bad_record_is_reported_by_file_and_line_whatever_the_workers(tokenizer_path: Path, tmp_path: Path):
    corpus = tmp_path / "records.jsonl"
    lines = [json.dumps(record(i), ensure_ascii=False) for i in range(NUM_RECORDS)]
    for broken in (150, 172, 195):  # three blocks that are under way at the same time
        lines[broken] = '{"inputs": "问", '
    corpus.write_text("\n".join(lines))
    for workers in (1, 3):
        run = make_config(tokenizer_path, tmp_path / f"{workers}", flan(corpus), tokenize_workers=workers)
        with pytest.raises(InputError, match=r"records\.jsonl:151"):
            prepare_one(run)


def test_panda_with_another_rule_for_long_records_is_refused(tokenizer_path: Path, corpus: Path, tmp_path: Path):
    run = make_config(tokenizer_path, tmp_path / "cache", flan(corpus, compat="panda", overlong="split"))
    with pytest.raises(InputError, match=r"data\.sources\[0\]\.overlong: 'split'"):
        prepare_one(run)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("kill -9 $$", "killed by SIGKILL; memory was short: lower data.tokenize_workers on block 0"),
        ("exit 7", "exited with status 7"),
    ],
)
def test_a_worker_that_dies_is_reported(
    tokenizer_path: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{command}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(InputError, match=message):
        prepare_one(make_config(tokenizer_path, tmp_path / "cache", flan(corpus)))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(tmp_path / "file", [b"new"])
    assert error.value.filename == str(tmp_path / "file")
    assert contents(tmp_path) == {"file": b"old"}


def test_what_the_disk_says_in_a_worker_reaches_the_parent(tokenizer_path: Path, corpus: Path, tmp_path: Path):
    """The cache's folder vanishes before the workers write: their OSError comes back with the file's name."""
    run = make_config(tokenizer_path, tmp_path / "cache", flan(corpus))

    def vanish(progress: Progress) -> None:
        (folder,) = (tmp_path / "cache").glob("flan-*")
        folder.rmdir()

    with pytest.raises(FileNotFoundError) as error:
        prepare(run, Tokenizer.load(tokenizer_path), vanish)
    assert str(error.value.filename).endswith("shard-000000.bin")


def test_a_cache_dir_that_is_a_file(tokenizer_path: Path, corpus: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match=r"data\.cache_dir: .*cache.* is a file"):
        prepare_one(make_config(tokenizer_path, tmp_path / "cache", flan(corpus)))

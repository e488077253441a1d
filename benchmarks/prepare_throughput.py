"""How fast `prepare` is against bare SentencePiece on the same text, in one run and alternating.

    python benchmarks/prepare_throughput.py [--megabytes 200] [--rounds 3] [--workers N] [--shape documents] [--peer]

bare: one process per worker encodes its share of the texts, already in memory as a list of strings, with num_threads=1;
the clock starts when all of them are ready.
prepare: from the file to the finished cache, start of the workers included. The page cache is warm for both.
Shapes: documents are JSON lines of about 1,500 bytes of text, as news2016zh; lines are plain lines of about 120 bytes,
where the Python work per record weighs most.
cpu: the ratio of the processor seconds of all processes, which other users of the machine disturb less.
Memory: the sum of the peak resident sizes of the parent and of each worker, an upper bound.
--peer adds `datasets.map` with the same tokenizer, where `datasets` is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np

from panda_jax import config
from panda_jax.data.pool import num_cores
from panda_jax.data.preparation import prepare
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.text.vocab import train_vocabulary

SHARED = Path(os.environ.get("PANDA_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
DOCUMENT_BYTES = 1500
# Texts that bare SentencePiece gets at a time, so that the lists of ids do not fill the memory.
BATCH_BYTES = 4_000_000


@dataclass(frozen=True)
class Task:
    """One text file and how it is read; picklable."""

    path: str
    shape: str
    model: str
    workers: int

    def texts(self) -> list[str]:
        """Return the file's records as plain strings."""
        lines = Path(self.path).read_text(encoding="utf-8").rstrip("\n").split("\n")
        return [json.loads(line)["text"] for line in lines] if self.shape == "documents" else lines


def write_text(path: Path, shape: str, num_bytes: int) -> str:
    """Write about `num_bytes` of Chinese records to `path`, and return where they come from."""
    files = sorted((SHARED / "corpora" / "rawtext").glob("*.txt"))
    if files:
        lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        origin = f"{len(files)} files of rawtext"
    else:
        draws = np.random.default_rng(0).zipf(1.3, size=(40_000, 40)) % 3_000
        lines = ["".join(chr(0x4E00 + number) for number in line) for line in draws]
        origin = "generated Zipf-distributed characters"
    if shape == "documents":
        documents, pending = [], ""
        for line in lines:
            pending += line + "\n"
            if len(pending.encode()) >= DOCUMENT_BYTES:
                documents.append(json.dumps({"text": pending}, ensure_ascii=False))
                pending = ""
        lines = documents
    once = ("\n".join(lines) + "\n").encode()
    with path.open("wb") as file:
        for _ in range(max(num_bytes // len(once), 1)):
            file.write(once)
    return origin


def find_model(folder: Path) -> Path:
    """Return LLaMA's vocabulary, or one of 4,000 pieces trained on generated text."""
    llama = SHARED / "tokenizers" / "llama-32000.model"
    if llama.exists():
        return llama
    write_text(folder / "vocabulary.txt", "lines", 5_000_000)
    path = folder / "trained.model"
    with (folder / "vocabulary.txt").open(encoding="utf-8") as lines:
        train_vocabulary(lines, config.Tokenizer(path=str(path), train_vocab_size=4000))
    return path


def _encode_share(task: Task, worker: int, barrier: Any, result: Queue) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=task.model)
    texts = task.texts()[worker :: task.workers]
    size = max(1, BATCH_BYTES * len(texts) // max(1, sum(map(len, texts)) * 3))
    barrier.wait()
    start, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), size):
        processor.encode(texts[first : first + size], num_threads=1)
    result.put((time.perf_counter() - start, time.process_time() - cpu))


def bare(task: Task) -> tuple[float, float]:
    """Return (seconds of the slowest process, processor seconds of all) that SentencePiece alone takes."""
    context = multiprocessing.get_context("spawn")
    barrier, result = context.Barrier(task.workers), context.Queue()
    children = [
        context.Process(target=_encode_share, args=(task, worker, barrier, result)) for worker in range(task.workers)
    ]
    for child in children:
        child.start()
    answers = [result.get() for _ in children]
    for child in children:
        child.join()
    return max(wall for wall, _ in answers), sum(cpu for _, cpu in answers)


class MemoryWatch(threading.Thread):
    """Collects the peak resident size of this process and of its children from /proc, until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self.stopped = threading.Event()

    def run(self) -> None:
        """Look several times a second; a peak is a high-water mark, so little is missed."""
        while not self.stopped.wait(0.1):
            children = (path.read_text().split() for path in Path("/proc/self/task").glob("*/children"))
            for process in ["self", *itertools.chain.from_iterable(children)]:
                with contextlib.suppress(OSError):  # it ended meanwhile
                    status = Path(f"/proc/{process}/status").read_text()
                    if mark := re.search(r"VmHWM:\s+(\d+) kB", status):
                        self.peaks[process] = max(self.peaks.get(process, 0), int(mark[1]))

    def total_gib(self) -> float:
        """Stop, and return the sum of the peaks."""
        self.stopped.set()
        self.join()
        return sum(self.peaks.values()) / 2**20


def _prepare_once(task: Task, result: Queue) -> None:
    tokenizer = Tokenizer.load(task.model)
    corpus = "jsonl_text" if task.shape == "documents" else "text_lines"
    with tempfile.TemporaryDirectory(dir=Path(task.path).parent) as folder:
        run = config.Config(
            name="benchmark",
            model=config.Model(
                vocab_size=tokenizer.vocab_size,
                dim=8,
                num_layers=1,
                num_heads=1,
                num_kv_heads=1,
                mlp_dim=8,
                norm_eps=1e-5,
                context_length=2048,
            ),
            tokenizer=config.Tokenizer(path=task.model),
            data=config.Data(
                sources=(config.Source(corpus=corpus, path=task.path),),
                cache_dir=folder,
                tokenize_workers=task.workers,
            ),
        )
        watch = MemoryWatch()
        watch.start()
        start, cpu = time.perf_counter(), time.process_time()
        prepare(run, tokenizer, lambda _: None)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    result.put((seconds, cpu + children.ru_utime + children.ru_stime, watch.total_gib()))


def prepared(task: Task) -> tuple[float, float, float]:
    """Return (seconds, processor seconds, GiB of memory at most) of one `prepare`, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    child = context.Process(target=_prepare_once, args=(task, result))
    child.start()
    answer = result.get()
    child.join()
    return answer


def peer(task: Task) -> float:
    """Return the seconds of datasets.map on the same texts and model; raises ImportError without `datasets`."""
    import datasets  # pyright: ignore[reportMissingImports]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=task.model)
    rows = datasets.Dataset.from_dict({"text": task.texts()})
    start = time.perf_counter()
    rows.map(lambda batch: {"ids": processor.encode(batch["text"], num_threads=1)}, batched=True, num_proc=task.workers)
    return time.perf_counter() - start


def measure(task: Task, rounds: int, with_peer: bool) -> None:
    """Alternate the contestants, and print speeds, ratios and memory."""
    megabytes = sum(len(text.encode()) for text in task.texts()) / 1e6
    speeds: dict[str, list[float]] = {"bare": [], "prepare": []}
    walls, cpus, peaks = [], [], []
    for _ in range(rounds):
        bare_wall, bare_cpu = bare(task)
        wall, cpu, peak = prepared(task)
        speeds["bare"].append(megabytes / bare_wall)
        speeds["prepare"].append(megabytes / wall)
        walls.append(bare_wall / wall)
        cpus.append(bare_cpu / cpu)
        peaks.append(peak)
    if with_peer:
        speeds["datasets.map"] = [megabytes / peer(task)]
    print(f"\n{task.shape}: {megabytes:.0f} MB of text")
    for kind, values in speeds.items():
        print(f"  {kind:12} {statistics.median(values):6.1f} MB/s   {[round(value, 1) for value in values]}")
    for kind, values in (("time", walls), ("cpu", cpus)):
        print(
            f"  prepare / bare, by {kind:4}: {statistics.median(values):.2f}   {[round(value, 2) for value in values]}"
        )
    print(f"  memory of prepare: at most {max(peaks):.2f} GiB")


def main() -> None:
    """Measure both shapes, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=num_cores())
    parser.add_argument("--shape", choices=("documents", "lines"))
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {num_cores()} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = find_model(Path(folder))
        for shape in [options.shape] if options.shape else ["documents", "lines"]:
            path = Path(folder) / f"{shape}.txt"
            origin = write_text(path, shape, options.megabytes * 10**6)
            print(f"{origin}, {model.name}, {options.workers} workers")
            measure(Task(str(path), shape, str(model), options.workers), options.rounds, options.peer)


if __name__ == "__main__":
    main()

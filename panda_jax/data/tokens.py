"""Records to windows of ids with a flag per id: trained or not.

    [("问：", untrained), ("二。", trained), ("再问：", untrained), ("三。", trained)]
    ids      BOS 问 ： 二 。 EOS 再 问 ： 三 。 EOS      (each segment is encoded on its own)
    trained   .  .  .  x  x   x   .  .  .  x  x   x

A window of n ids teaches n - 1 targets, ids[1:], each predicted from the ids before it; it occupies n - 1 positions of
a row. Its first id is context only and never carries a flag.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from panda_jax.config import Source
from panda_jax.data.records import Example, Examples, Skip
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer

# Reasons, as the data report prints them. Those of the first group keep the record.
PROMPT_CUT = "prompt cut from the left"
TARGET_CUT = "target cut at its end"
PANDA_CUT = "cut on the right (compat: panda)"
PANDA_HALF = "prompt fills the window, half of it is trained (compat: panda)"
SPLIT = "split into windows"
UNTRAINED_WINDOW = "windows without a trained token left out (overlong: split)"
TOO_LONG = "longer than the window (overlong: drop)"
NOTHING_TRAINED = "no trained token"
NOT_UNICODE = "not valid Unicode (lone surrogate)"
# Texts encoded before their ids are joined: few enough that the many small arrays are still in the processor's cache.
TEXTS_AT_ONCE = 1000


class Window(NamedTuple):
    """A piece of one record that fits a row."""

    ids: np.ndarray
    """int32 [n], 2 <= n <= seq_len + 1 (seq_len under compat: panda)."""
    trained: np.ndarray
    """bool [n]; trained[0] is False."""


class Windows(NamedTuple):
    """All windows of a run of examples, end to end."""

    ids: np.ndarray
    """int32 [ids of all windows]."""
    trained: np.ndarray
    """bool, like ids."""
    lengths: np.ndarray
    """int64 [windows]: ids in each."""
    owners: np.ndarray
    """int64 [windows]: index of the example each came from; ascending."""
    changed: Counter[str]
    """Examples (or windows, where the reason says so) that were cut or split, by reason."""
    dropped: Counter[str]
    """Examples that left no window, by reason."""


class _Joined(NamedTuple):
    """Whole examples end to end, before any cut."""

    ids: np.ndarray
    trained: np.ndarray
    sizes: np.ndarray
    """int64 [examples]: ids of each."""
    num_trained: np.ndarray
    """int64 [examples]: trained ids of each."""


def tokenize(example: Example, tokenizer: Tokenizer, source: Source, seq_len: int) -> list[Window] | Skip:
    """Return the windows of one example, or why it has none; see tokenize_all."""
    windows = tokenize_all([example], tokenizer, source, seq_len)
    if windows.dropped:
        return Skip(next(iter(windows.dropped)))
    ends = np.cumsum(windows.lengths)
    return [
        Window(windows.ids[end - length : end], windows.trained[end - length : end])
        for end, length in zip(ends, windows.lengths, strict=True)
    ]


def tokenize_all(examples: Examples | Sequence[Example], tokenizer: Tokenizer, source: Source, seq_len: int) -> Windows:
    """Return the windows of `examples`, each at most `seq_len` positions, and what was cut, split or dropped.

    A longer example follows source.overlong (PROTOCOLS.md §4.4, "our rule"):
    truncate: untrained ids go first, the oldest first, BOS stays; if the trained ids alone are too many, the last ones
        go, and EOS with them.  seq_len 4:  BOS p q r x y EOS -> BOS r x y EOS;  BOS p v w x y z EOS -> BOS v w x y
    split: consecutive windows that share one id, so every target is trained once. Later windows do not begin with BOS:
        their first id is the last target of the window before, now as context.
        seq_len 3:  BOS a b c d e EOS -> BOS a b c | c d e EOS
    drop: the example is dropped.
    With source.compat "panda" see _panda. Raises InputError for an example that Panda's format cannot express.
    """
    changed: Counter[str] = Counter()
    dropped: Counter[str] = Counter()

    def encode(chosen: Examples) -> _Joined:
        if source.compat == "panda":
            return _panda(chosen, tokenizer, seq_len, changed)
        return _join(chosen, tokenizer)

    columns = examples if isinstance(examples, Examples) else Examples.of(examples)
    numbers = np.arange(len(columns))
    try:
        joined = encode(columns)
    except UnicodeEncodeError:
        numbers = np.array([i for i in range(len(columns)) if _is_unicode(columns[i])], np.int64)
        dropped[NOT_UNICODE] = len(columns) - len(numbers)
        joined = encode(Examples.of(columns[i] for i in numbers))
    return _fit(joined, numbers, source, seq_len, changed, dropped)


def _join(examples: Examples, tokenizer: Tokenizer) -> _Joined:
    """Encode segment by segment: BOS, then each segment's ids, then EOS after those of a trained segment."""
    text_ids, text_lengths = _encode(examples.texts, tokenizer)
    # Every id's place follows from lengths alone, so a block is put together at once and not piece by piece.
    is_trained = np.array(examples.trained, bool)
    lengths = text_lengths + is_trained
    owners = np.repeat(np.arange(len(examples)), np.diff(np.array(examples.ends, np.int64), prepend=0))
    sizes = 1 + _sum_by_owner(lengths, owners, examples)
    bos = np.cumsum(sizes) - sizes
    eos = (np.cumsum(lengths) + owners)[is_trained]
    is_text = np.ones(sizes.sum(), bool)
    is_text[bos] = is_text[eos] = False
    ids = np.empty(len(is_text), np.int32)
    ids[is_text], ids[bos], ids[eos] = text_ids, tokenizer.bos_id, tokenizer.eos_id
    trained = np.ones(len(ids), bool)
    trained[bos] = False
    trained[trained] = np.repeat(is_trained, lengths)
    return _Joined(ids, trained, sizes, _sum_by_owner(lengths * is_trained, owners, examples))


def _encode(texts: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all texts end to end, int32, and how many each has, int64."""
    ids, lengths = [], []
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        encoded = tokenizer.encode_batch(texts[first : first + TEXTS_AT_ONCE])
        ids.append(_concatenate(encoded, np.int32))
        lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
    return _concatenate(ids, np.int32), _concatenate(lengths, np.int64)


def _sum_by_owner(values: np.ndarray, owners: np.ndarray, examples: Examples) -> np.ndarray:
    """Return int64 [examples]: the sum of the values that belong to each; float64 is exact far beyond them."""
    return np.bincount(owners, values, len(examples)).astype(np.int64)


def _panda(examples: Examples, tokenizer: Tokenizer, seq_len: int, changed: Counter[str]) -> _Joined:
    """Encode, cut and mask as the original did (PROTOCOLS.md §4.3); an example has at most seq_len ids.

    ids = the first seq_len of BOS + slow(inputs + " " + targets + "</s>"), where slow() is the Python LlamaTokenizer of
    2023: the texts "</s>", "<s>" and "<unk>" become those ids wherever they stand, and the text between them is encoded
    piece by piece. Trained are the ids from the length of BOS + slow(inputs), encoded alone and cut alike; where the
    inputs fill the window, from the middle of the window, rounded up, so that half of the prompt is trained.
    A literal "[PAD]" stays text here: the model file has no such piece.
    """
    specials = {tokenizer.pieces([i])[0]: i for i in (tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id)}
    pattern = re.compile("(" + "|".join(map(re.escape, specials)) + ")")
    pairs = [_inputs_and_targets(examples[i]) for i in range(len(examples))]
    texts = [text for inputs, targets in pairs for text in (f"{inputs} {targets}", inputs)]
    chunks = [[chunk for chunk in pattern.split(text) if chunk] for text in texts]
    encoded = iter(tokenizer.encode_batch([chunk for parts in chunks for chunk in parts if chunk not in specials]))
    bos, eos = np.array([tokenizer.bos_id], np.int32), np.array([tokenizer.eos_id], np.int32)
    parts: list[np.ndarray] = []
    flags: list[np.ndarray] = []
    for i in range(len(pairs)):
        together, alone = (
            [np.array([specials[c]], np.int32) if c in specials else next(encoded) for c in chunks[2 * i + k]]
            for k in (0, 1)
        )
        ids = np.concatenate([bos, *together, eos])
        changed[PANDA_CUT] += len(ids) > seq_len
        ids = ids[:seq_len]
        num_inputs = min(1 + sum(map(len, alone)), seq_len)
        if num_inputs == len(ids):
            changed[PANDA_HALF] += 1
            num_inputs -= num_inputs // 2
        parts.append(ids)
        flags.append(np.arange(len(ids)) >= max(num_inputs, 1))
    sizes = np.fromiter(map(len, parts), np.int64, len(parts))
    num_trained = np.fromiter(map(np.count_nonzero, flags), np.int64, len(flags))
    return _Joined(_concatenate(parts, np.int32), _concatenate(flags, bool), sizes, num_trained)


def _concatenate(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Join any number of arrays, none included."""
    return np.concatenate([np.empty(0, dtype), *parts])


def _inputs_and_targets(example: Example) -> tuple[str, str]:
    """Return Panda's two texts; raises InputError where the example is not untrained text followed by trained text."""
    shape = [segment.trained for segment in example.segments]
    if shape not in ([True], [False, True]):
        raise InputError(
            "compat: panda takes one question and one answer per example, "
            f"found segments {['trained' if trained else 'untrained' for trained in shape]}; set compat: none"
        )
    texts = [segment.text for segment in example.segments]
    return ("", texts[0]) if len(texts) == 1 else (texts[0], texts[1])


def _is_unicode(example: Example) -> bool:
    try:
        for segment in example.segments:
            segment.text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _fit(
    joined: _Joined,
    numbers: np.ndarray,
    source: Source,
    seq_len: int,
    changed: Counter[str],
    dropped: Counter[str],
) -> Windows:
    """Cut, split or drop the examples that do not fit; the others are copied through in long runs."""
    ends = np.cumsum(joined.sizes)
    starts = ends - joined.sizes
    ids, trained, lengths, owners = [], [], [], []

    def keep(windows: Sequence[Window], sizes: np.ndarray, examples: np.ndarray) -> None:
        ids.extend(window.ids for window in windows)
        trained.extend(window.trained for window in windows)
        lengths.append(sizes)
        owners.append(numbers[examples])

    def keep_run(first: int, last: int) -> None:
        run = slice(starts[first], ends[last - 1]) if first < last else slice(0)
        keep([Window(joined.ids[run], joined.trained[run])], joined.sizes[first:last], np.arange(first, last))

    done = 0
    for i in np.flatnonzero((joined.sizes > seq_len + 1) | (joined.num_trained == 0)).tolist():
        keep_run(done, i)
        done = i + 1
        if joined.num_trained[i] == 0:
            dropped[NOTHING_TRAINED] += 1
        elif source.overlong == "drop":
            dropped[TOO_LONG] += 1
        else:
            shorten = _split if source.overlong == "split" else _truncate
            windows = shorten(joined.ids[starts[i] : ends[i]], joined.trained[starts[i] : ends[i]], seq_len, changed)
            keep(windows, np.array([len(window.ids) for window in windows]), np.repeat(i, len(windows)))
    keep_run(done, len(starts))
    return Windows(
        _concatenate(ids, np.int32),
        _concatenate(trained, bool),
        _concatenate(lengths, np.int64),
        _concatenate(owners, np.int64),
        +changed,
        dropped,
    )


def _truncate(ids: np.ndarray, trained: np.ndarray, seq_len: int, changed: Counter[str]) -> list[Window]:
    untrained = np.flatnonzero(~trained)[1:]  # the first one is BOS
    kept = np.ones(len(ids), bool)
    kept[untrained[: len(ids) - (seq_len + 1)]] = False
    ids, trained = ids[kept], trained[kept]
    changed[TARGET_CUT if len(ids) > seq_len + 1 else PROMPT_CUT] += 1
    return [Window(ids[: seq_len + 1], trained[: seq_len + 1])]


def _split(ids: np.ndarray, trained: np.ndarray, seq_len: int, changed: Counter[str]) -> list[Window]:
    changed[SPLIT] += 1
    windows = []
    for start in range(0, len(ids) - 1, seq_len):
        flags = trained[start : start + seq_len + 1].copy()
        flags[0] = False
        if flags.any():
            windows.append(Window(ids[start : start + seq_len + 1], flags))
        else:
            changed[UNTRAINED_WINDOW] += 1
    return windows

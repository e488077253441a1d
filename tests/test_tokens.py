"""Windows and masks: drawn by hand, by property on random conversations, and against Panda's rule written anew."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from panda_jax import config
from panda_jax.data.records import Example, Segment, Skip
from panda_jax.data.tokens import tokenize, tokenize_all
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.text.vocab import train_vocabulary

BOS, EOS = 1, 2


class Letters:
    """A tokenizer double: one id per character, its code point; ids 1 and 2 are BOS and EOS."""

    bos_id, eos_id, unk_id = BOS, EOS, 0

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([ord(character) for character in text], np.int32) for text in texts]


def source(**settings: Any) -> config.Source:
    return config.Source(corpus="jsonl_text", path="unused", **settings)


def example(*segments: str) -> Example:
    """Return an example from texts; one in capitals or with a capital first letter is trained."""
    return Example(tuple(Segment(text, text[:1].isupper()) for text in segments))


def drawn(result: Any) -> list[tuple[str, str]]:
    """Draw windows as (ids, flags): `^` is BOS, `$` is EOS, `x` is trained."""
    assert not isinstance(result, Skip), result
    marks = {BOS: "^", EOS: "$"}
    return [
        (
            "".join(marks.get(i, chr(i)) for i in window.ids.tolist()),
            "".join("x" if flag else "." for flag in window.trained.tolist()),
        )
        for window in result
    ]


def windows(item: Example, seq_len: int, **settings: Any) -> list[tuple[str, str]]:
    return drawn(tokenize(item, Letters(), source(**settings), seq_len))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("segments", "ids", "flags"),
    [
        (["ABC"], "^ABC$", ".xxxx"),
        (["pq", "XY"], "^pqXY$", "...xxx"),
        (["p", "X", "q", "YZ"], "^pX$qYZ$", "..xx.xxx"),
        (["p", "X", "q"], "^pX$q", "..xx."),
    ],
)
def test_masks(segments: list[str], ids: str, flags: str):
    assert windows(example(*segments), 100) == [(ids, flags)]


def test_a_window_of_exactly_the_length_is_not_cut():
    # 5 positions: ^pqXY$ has 6 ids and teaches 5 targets.
    assert windows(example("pq", "XY"), 5) == [("^pqXY$", "...xxx")]
    assert windows(example("pq", "XY"), 4) == [("^qXY$", "..xxx")]


@pytest.mark.parametrize(
    ("segments", "seq_len", "ids", "flags"),
    [
        (["pqrs", "XY"], 5, "^rsXY$", "...xxx"),
        (["pqrs", "XY"], 3, "^XY$", ".xxx"),
        (["pqrs", "XYZ"], 3, "^XYZ", ".xxx"),
        (["pqrs", "XYZ"], 1, "^X", ".x"),
        (["pq", "X", "rs", "Y"], 6, "^X$rsY$", ".xx..xx"),
        (["pq", "X", "rs", "Y"], 5, "^X$sY$", ".xx.xx"),
        (["pq", "X", "rs", "Y"], 3, "^X$Y", ".xxx"),
        (["pq", "X", "rs"], 4, "^X$rs", ".xx.."),
    ],
)
def test_truncation_takes_untrained_ids_first_and_the_oldest_first(
    segments: list[str], seq_len: int, ids: str, flags: str
):
    assert windows(example(*segments), seq_len, overlong="truncate") == [(ids, flags)]


def test_splitting_trains_each_target_once():
    # Targets A B C D E $ = 6 = 2 windows of 3; the second begins with C, now as context, and not with BOS.
    assert windows(example("ABCDE"), 3, overlong="split") == [("^ABC", ".xxx"), ("CDE$", ".xxx")]
    assert windows(example("ABCDEF"), 3, overlong="split") == [("^ABC", ".xxx"), ("CDEF", ".xxx"), ("F$", ".x")]
    assert windows(example("AB"), 3, overlong="split") == [("^AB$", ".xxx")]


def test_splitting_leaves_out_windows_without_a_trained_token():
    result = tokenize_all(
        [example("pqrstu", "XY")],
        Letters(),  # pyright: ignore[reportArgumentType]
        source(overlong="split"),
        3,
    )
    assert result.ids.tolist() == [ord("u"), ord("X"), ord("Y"), EOS]
    assert result.trained.tolist() == [False, True, True, True]
    assert result.changed == {
        "split into windows": 1,
        "windows without a trained token left out (overlong: split)": 2,
    }


def test_every_loss_is_counted_by_reason():
    examples = [
        example("p", "X"),  # ^pX$ fits
        example("pqrs", "X"),  # prompt cut
        example("p", "XYZUV"),  # target cut
        example("pqr"),  # nothing trained
        example("p", "X\ud800"),  # no encoding can write it
        example("p", "Y"),
    ]

    class Strict(Letters):
        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            for text in texts:
                text.encode()
            return super().encode_batch(texts)

    result = tokenize_all(examples, Strict(), source(), 3)  # pyright: ignore[reportArgumentType]
    assert result.changed == {"prompt cut from the left": 1, "target cut at its end": 1}
    assert result.dropped == {"no trained token": 1, "not valid Unicode (lone surrogate)": 1}
    assert result.owners.tolist() == [0, 1, 2, 5]
    assert result.lengths.tolist() == [4, 4, 4, 4]
    shortened = tokenize_all(examples[:4], Strict(), source(overlong="drop"), 3)  # pyright: ignore[reportArgumentType]
    assert shortened.dropped == {"longer than the window (overlong: drop)": 2, "no trained token": 1}
    assert shortened.owners.tolist() == [0] and not shortened.changed


def test_one_example_that_leaves_nothing_is_a_skip():
    assert tokenize(example("pqr"), Letters(), source(), 9) == Skip("no trained token")  # pyright: ignore[reportArgumentType]
    empty = tokenize_all([], Letters(), source(), 9)  # pyright: ignore[reportArgumentType]
    assert (empty.ids.dtype, empty.trained.dtype, len(empty.ids), len(empty.lengths)) == ("int32", "bool", 0, 0)


# --- with SentencePiece ------------------------------------------------------------------------------------------

TEXT = st.lists(
    st.one_of(
        st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
        st.sampled_from(["a", "Be", " ", "  ", "\n", "，", "。", "😀", "👨\u200d👩\u200d👧", "7", "</s>", "<s>", "é"]),
        st.characters(exclude_categories=["Cs"], exclude_characters="▁"),
    ),
    max_size=25,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    texts = ["今天天气很好，我们去公园看花。", "The weather is fine today.", "在家里喝茶，读 书 。"] * 5
    train_vocabulary(iter(texts), config.Tokenizer(path=str(path), train_vocab_size=340))
    return Tokenizer.load(path)


@settings(deadline=None, max_examples=200)
@given(segments=st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=6).filter(lambda s: any(t for _, t in s)))
def test_the_mask_selects_the_trained_text_and_eos(tokenizer: Tokenizer, segments: list[tuple[str, bool]]):
    (window,) = windows_of(Example(tuple(Segment(*segment) for segment in segments)), tokenizer, source(), 10_000)
    selected = window.ids[window.trained].tolist()
    assert selected[-1] == EOS
    # No text becomes EOS, so every EOS ends a turn; an empty turn is EOS alone.
    ends = [i for i, token in enumerate(selected) if token == EOS]
    starts = [0, *(end + 1 for end in ends)]
    texts = [tokenizer.decode(selected[start:end]) for start, end in zip(starts, ends, strict=False)]
    assert texts == [text for text, trained in segments if trained]
    assert window.ids[0] == BOS and BOS not in window.ids[1:]


@settings(deadline=None, max_examples=100)
@given(texts=st.lists(TEXT, min_size=1, max_size=4), seq_len=st.integers(1, 12))
def test_splitting_loses_and_repeats_nothing(tokenizer: Tokenizer, texts: list[str], seq_len: int):
    item = Example(tuple(Segment(text, True) for text in texts))
    (whole,) = windows_of(item, tokenizer, source(), 10_000)
    parts = windows_of(item, tokenizer, source(overlong="split"), seq_len)
    targets = [token for part in parts for token, flag in zip(part.ids[1:], part.trained[1:], strict=True) if flag]
    assert targets == whole.ids[1:].tolist()
    assert all(2 <= len(part.ids) <= seq_len + 1 and not part.trained[0] for part in parts)


@settings(deadline=None, max_examples=100)
@given(segments=st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=5), seq_len=st.integers(1, 30))
def test_truncation_keeps_a_trained_token_and_the_order(
    tokenizer: Tokenizer, segments: list[tuple[str, bool]], seq_len: int
):
    item = Example(tuple(Segment(*segment) for segment in segments))
    result = tokenize(item, tokenizer, source(), seq_len)
    if not any(trained for _, trained in segments):
        assert result == Skip("no trained token")
        return
    (whole,), (window,) = windows_of(item, tokenizer, source(), 10_000), windows_of(item, tokenizer, source(), seq_len)
    assert len(window.ids) == min(len(whole.ids), seq_len + 1)
    trained, expected = window.ids[window.trained].tolist(), whole.ids[whole.trained].tolist()
    assert trained == expected[:seq_len]
    if len(expected) < seq_len:  # room for untrained ids: the newest ones
        untrained = whole.ids[~whole.trained][1:].tolist()
        kept = len(window.ids) - 1 - len(expected)
        assert window.ids[~window.trained].tolist() == [BOS, *untrained[len(untrained) - kept :]]


def windows_of(item: Example, tokenizer: Tokenizer, chosen: config.Source, seq_len: int) -> list[Any]:
    result = tokenize(item, tokenizer, chosen, seq_len)
    assert isinstance(result, list), result
    return result


# --- compat: panda -----------------------------------------------------------------------------------------------


def panda_script(processor: Any, inputs: str, targets: str, max_length: int) -> tuple[list[int], list[int]]:
    """PROTOCOLS.md §4.3, character by character: (ids, labels) with -100 where nothing is learnt."""

    def slow(text: str) -> list[int]:
        found, start, at = [], 0, 0
        while at < len(text):
            special = next((s for s in ("</s>", "<s>", "<unk>") if text.startswith(s, at)), None)
            if special is None:
                at += 1
                continue
            found += processor.encode_as_ids(text[start:at]) + [processor.piece_to_id(special)]
            start = at = at + len(special)
        return found + processor.encode_as_ids(text[start:])

    ids = ([processor.bos_id()] + slow(inputs + " " + targets + "</s>"))[:max_length]
    input_len = len(([processor.bos_id()] + slow(inputs))[:max_length])
    if input_len == len(ids):
        input_len = input_len - input_len // 2
    return ids, [-100 if position < input_len else token for position, token in enumerate(ids)]


def assert_like_panda(tokenizer: Tokenizer, inputs: str, targets: str, seq_len: int) -> bool:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    ids, labels = panda_script(processor, inputs, targets, seq_len)
    item = Example((Segment(inputs, False), Segment(targets, True)))
    result = tokenize(item, tokenizer, source(compat="panda"), seq_len)
    if all(label == -100 for label in labels[1:]):
        assert result == Skip("no trained token")
        return False
    assert isinstance(result, list)
    (window,) = result
    assert window.ids.tolist() == ids
    assert np.where(window.trained, window.ids, -100).tolist()[1:] == labels[1:]
    return True


@settings(deadline=None, max_examples=150)
@given(inputs=TEXT, targets=TEXT, seq_len=st.integers(1, 60))
def test_panda_on_random_text(tokenizer: Tokenizer, inputs: str, targets: str, seq_len: int):
    assert_like_panda(tokenizer, inputs, targets, seq_len)


def test_panda_on_real_rows(shared_data: Path):
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "llama-32000.model")
    corpora = shared_data / "corpora"
    with (corpora / "translation2019zh" / "translation2019zh_valid.json").open(encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file][:200]
    with (corpora / "wiki2019zh" / "wiki_00").open(encoding="utf-8") as file:
        articles = [json.loads(line)["text"] for line in file][:60]
    rows = [("将以下英文翻译为中文 " + pair["english"], pair["chinese"]) for pair in pairs]
    rows += [(" ", article) for article in articles]
    rows += [(article, "好") for article in articles]  # inputs that fill the window
    matched = [assert_like_panda(tokenizer, inputs, targets, 257) for inputs, targets in rows]
    assert sum(matched) == len(rows)


def test_panda_by_hand_with_llama(shared_data: Path):
    """PROTOCOLS.md §4.3: the first trained piece of a Chinese target is "▁"; for inputs " " it lies inside "▁▁▁"."""
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "llama-32000.model")
    asked = Example((Segment("问", False), Segment("好", True)))
    (window,) = windows_of(asked, tokenizer, source(compat="panda"), 50)
    assert tokenizer.pieces(window.ids) == ["<s>", "▁", "问", "▁", "好", "</s>"]
    assert window.trained.tolist() == [False, False, False, True, True, True]
    plain = Example((Segment(" ", False), Segment("好", True)))
    (window,) = windows_of(plain, tokenizer, source(compat="panda"), 50)
    assert tokenizer.pieces(window.ids) == ["<s>", "▁▁▁", "好", "</s>"]
    assert window.trained.tolist() == [False, False, True, True]
    literal = Example((Segment("a", False), Segment("b</s>c", True)))
    (window,) = windows_of(literal, tokenizer, source(compat="panda"), 50)
    assert tokenizer.pieces(window.ids) == ["<s>", "▁a", "▁b", "</s>", "▁c", "</s>"]


def test_panda_windows_have_seq_len_ids_and_half_a_full_prompt_is_trained(tokenizer: Tokenizer):
    long = Example((Segment("今天" * 50, False), Segment("好", True)))
    result = tokenize_all([long], tokenizer, source(compat="panda"), 9)
    # 9 ids, not 10. The inputs fill them, so 9 - 9 // 2 = 5 ids stay untrained.
    assert result.lengths.tolist() == [9]
    assert result.trained.tolist() == [False] * 5 + [True] * 4
    assert set(result.changed) == {
        "cut on the right (compat: panda)",
        "prompt fills the window, half of it is trained (compat: panda)",
    }


def test_panda_refuses_a_conversation(tokenizer: Tokenizer):
    with pytest.raises(InputError, match="one question and one answer per example"):
        tokenize(example("p", "X", "q", "Y"), tokenizer, source(compat="panda"), 9)

"""Text from ids one by one: nothing half, nothing lost, nothing changed later."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled_models import singles, spell

from panda_jax.text.streaming import Detokenizer
from panda_jax.text.tokenizer import Tokenizer

REAL = ("tokenizers/llama-32000.model", "weights/stories260K-meta/tokenizer.model", "tokenizers/chinese_sp.model")
TEXTS = (
    "中文，English 和 emoji 🐼🐼 混在一起。", "  two  spaces ", "龘靐齉爩，生僻字", "�already�broken�", "a\n\nb\tc",
    "🇨🇳👨‍👩‍👧", "", " 空格", "é", "\x00",
)  # fmt: skip


@cache
def spelled() -> Tokenizer:
    """A vocabulary of bytes (ids 3 to 258) and some pieces behind them."""
    return Tokenizer(spell([("▁", -1.0), ("▁天", -2.0), ("天地", -3.0), *singles("天地�a")]), "spelled")


@cache
def real(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


def pieces_of(tokenizer: Tokenizer, ids: list[int], after: list[int] | None = None) -> list[str]:
    """Return what each id gave, and what the flush gave last."""
    stream = Detokenizer(tokenizer, after or [])
    return [*(stream.feed(new) for new in ids), stream.flush()]


def as_bytes(data: bytes) -> list[int]:
    """Return the byte pieces of a LLaMA-like vocabulary, which begin at id 3."""
    return [3 + byte for byte in data]


def test_a_character_comes_with_its_last_byte():
    assert pieces_of(spelled(), as_bytes("公🐼a".encode())) == ["", "", "公", "", "", "", "🐼", "a", ""]


def test_bytes_that_become_no_character_come_at_once():
    """E5 waits for two bytes; "A" breaks it. FF, a lone 80, and E0 80 (overlong) never begin a character."""
    assert pieces_of(spelled(), as_bytes(b"\xe5A")) == ["", "�A", ""]
    assert pieces_of(spelled(), as_bytes(b"\xff\x80A")) == ["�", "�", "A", ""]
    assert pieces_of(spelled(), as_bytes(b"\xe0\x80")) == ["", "��", ""]
    assert pieces_of(spelled(), as_bytes(b"\xe5\x85\xe5\x85\xac")) == ["", "", "��", "", "公", ""]
    # D800 to DFFF are no characters, nor is what lies beyond 10FFFF.
    assert pieces_of(spelled(), as_bytes(b"\xed\xa0\xf4\x90")) == ["", "��", "", "��", ""]


def test_what_waits_at_the_end_comes_with_the_flush():
    assert pieces_of(spelled(), as_bytes(b"a\xf0\x9f\x90")) == ["a", "", "", "", "���"]


def test_a_piece_that_is_a_replacement_character_does_not_wait():
    sign = spelled().encode("�")[-1]
    assert spelled().pieces([sign]) == ["�"]
    assert pieces_of(spelled(), [sign, sign]) == ["�", "�", ""]


def test_the_first_space_vanishes_only_at_the_beginning():
    space, sky = spelled().pieces(range(259, 261)), [259, 260]
    assert space == ["▁", "▁天"]
    assert pieces_of(spelled(), [sky[1], sky[1]]) == ["天", " 天", ""]
    assert pieces_of(spelled(), [1, sky[1], 2, sky[1]]) == ["", "天", "", " 天", ""]
    assert pieces_of(spelled(), [sky[0], sky[1]]) == ["", " 天", ""]
    assert pieces_of(spelled(), [sky[1]], after=[1, sky[1]]) == [" 天", ""]
    assert pieces_of(spelled(), [sky[1]], after=[1]) == ["天", ""]


def test_half_a_character_of_the_prompt_comes_when_it_is_whole():
    assert pieces_of(spelled(), as_bytes(b"\xacb"), after=as_bytes(b"a\xe5\x85")) == ["公", "b", ""]


def test_an_id_beyond_the_vocabulary_has_no_text():
    extra = spelled().vocab_size
    assert pieces_of(spelled(), [260, extra, 260]) == ["天", "", " 天", ""]
    assert spelled().decode([260, extra, extra + 7]) == "天"
    assert pieces_of(spelled(), [*as_bytes(b"\xc2"), extra, *as_bytes(b"\x80")]) == ["", "", "\x80", ""]


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 270), st.integers(3 + 0x80, 258), st.sampled_from([1, 2, 259, 260])), max_size=24)
)
def test_the_parts_are_the_whole(ids: list[int]):
    check(spelled(), ids)


@pytest.mark.parametrize("name", REAL)
def test_the_parts_are_the_whole_with_real_vocabularies(name: str, shared_data: Path):
    tokenizer = real(shared_data / name)
    for text in TEXTS:
        check(tokenizer, tokenizer.encode(text))
        assert "".join(pieces_of(tokenizer, tokenizer.encode(text))) == tokenizer.decode(tokenizer.encode(text))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.one_of(st.integers(0, tokenizer.vocab_size), st.integers(0, 258)), max_size=30), st.data())
    def anything(ids: list[int], data: st.DataObject) -> None:
        check(tokenizer, ids)
        split = data.draw(st.integers(0, len(ids)))
        given_before = "".join(pieces_of(tokenizer, ids[:split])[:-1])
        behind = "".join(pieces_of(tokenizer, ids[split:], after=ids[:split]))
        assert given_before + behind == tokenizer.decode(ids)

    anything()


def check(tokenizer: Tokenizer, ids: list[int]) -> None:
    """What came so far is always a beginning of the whole text, and all of it is the whole text.

    Nothing waits without need: what is held back is at most the three bytes of an unfinished character.
    """
    parts = pieces_of(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    given = ""
    for number, part in enumerate(parts[:-1], 1):
        given += part
        so_far = tokenizer.decode(ids[:number])
        assert so_far.startswith(given)
        assert set(so_far[len(given) :]) <= {"�"} and len(so_far) - len(given) <= 3

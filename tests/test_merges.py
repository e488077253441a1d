"""Merge lists against SentencePiece on models drawn at random, and orders drawn by hand."""

import itertools
import random

import pytest
import sentencepiece
from spelled_models import singles, spell

from convert.merges import exact_merges
from convert.tokenizer_files import tokenizer_files
from panda_jax.errors import InputError


@pytest.mark.parametrize("with_user_defined", [False, True])
def test_any_scores_are_exact_or_refused(with_user_defined: bool):
    """Random pieces over three characters, in no order a trainer gives: every way of overlapping occurs."""
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(7)
    texts = ["".join(letters) for n in range(8) for letters in itertools.product("ab ", repeat=n)]
    accepted_ties = refused = 0
    for _ in range(40):
        pieces = sorted({"".join(rng.choices("ab▁", k=rng.randint(2, 5))) for _ in range(rng.randint(3, 12))})
        scores = [-float(rng.randint(1, rng.choice([10, 1000]))) for _ in pieces]
        user_defined = sorted({"".join(rng.choices("ab▁", k=3)) for _ in range(2 * with_user_defined)} - set(pieces))
        model = spell([*zip(pieces, scores, strict=True), *singles("ab▁")], user_defined)
        has_ties = len(set(scores)) < len(scores)
        try:
            content = tokenizer_files(model, {}, 8, None)["tokenizer.json"]
        except InputError:
            assert has_ties, f"{pieces} {scores} are refused, although no two scores are equal"
            refused += 1
            continue
        accepted_ties += has_ties
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        tokenizer.encode_special_tokens = True
        drawn = rng.sample(texts, 200)
        drawn += [a + piece + a for a in user_defined for piece in (*pieces, "<0x41>", "<s>")]
        found = [encoding.ids for encoding in tokenizer.encode_batch(drawn, add_special_tokens=False)]
        expected = sentencepiece.SentencePieceProcessor(model_proto=model).encode(drawn)
        wrong = [text for text, ids, wanted in zip(drawn, found, expected, strict=True) if ids != wanted]
        assert not wrong, f"{wrong[0]!r} with {pieces} {scores} {user_defined}"
    assert accepted_ties >= 5 and refused >= 1


def test_merges_drawn_by_hand():
    scores = {"a": -9.0, "b": -9.0, "c": -9.0, "ab": -1.0, "bc": -2.0, "abc": -3.0, "cb": -4.0, "abcb": -5.0}
    # "abc" alone is cut ab|c; "abcb" first to ab|c|b, then, as abc comes before cb, to abc|b.
    assert exact_merges(scores) == [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "b"), ("abc", "b")]


def test_of_equal_overlapping_pieces_the_left_one_comes_first():
    """In "xyz" SentencePiece takes xy, the leftmost; the file lists yz first."""
    assert exact_merges({"x": -9.0, "y": -9.0, "z": -9.0, "yz": -1.0, "xy": -1.0}) == [("x", "y"), ("y", "z")]


def test_runs_of_one_score_grow_one_by_one():
    """As LLaMA's spaces: five are cut 3 + 2 from the left, so a run of 3 must be finished before another begins."""
    assert exact_merges({"▁": -5.0, "▁▁": -1e9, "▁▁▁": -1e9}) == [("▁▁", "▁"), ("▁", "▁")]


@pytest.mark.parametrize(
    "pieces",
    [["ab", "ba"], ["ab", "bc", "ca"], ["ab", "abc"]],
    ids=["aba and bab", "a circle of three", "one goes on to the other"],
)
def test_ties_that_depend_on_the_place_are_refused(pieces: list[str]):
    with pytest.raises(InputError, match=r"tokenizer\.model: the pieces .*SentencePiece then chooses by their place"):
        tokenizer_files(spell([*((piece, 0.0) for piece in pieces), *singles("abc▁")]), {}, 8, None)


def test_a_piece_of_unknown_characters_is_refused():
    with pytest.raises(InputError, match="'xy' is made from 'x', which is no piece"):
        tokenizer_files(spell([("xy", -1.0), *singles("y▁")]), {}, 8, None)

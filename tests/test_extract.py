"""Both extractors on hand-written replies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda_jax.evaluation.extract import first_letter, strict_letter

# (reply, published rule, strict rule with four options); the first six are PROTOCOLS.md §8 row 16.
REPLIES = [
    ("A", "A", "A"),
    ("答案是B", "B", "B"),
    ("Because…", "B", None),
    ("", None, None),
    ("选E", None, None),
    ("D", "D", "D"),
    # Forms of a letter.
    (" C", "C", "C"),
    ("B.", "B", "B"),
    ("(B)", "B", "B"),
    ("（C）", "C", "C"),
    ("B：养宠物", "B", "B"),
    ("C、养宠物", "C", "C"),
    ("D: 养宠物\n", "D", "D"),
    ("选 C", "C", "C"),
    ("选项C正确", "C", "C"),
    ("**D**", "D", "D"),
    ("【A】", "A", "A"),
    ("“B”", "B", "B"),
    ("Ｂ", None, "B"),
    ("答案：（Ｃ）。", None, "C"),
    ("a", None, None),
    ("答案是b", None, None),
    # Letters that are part of something else.
    ("ABC", "A", None),
    ("ＡＢＣ", None, None),
    ("Ｂｅｃａｕｓｅ", None, None),
    ("DNA的结构", "D", None),
    ("Ａnswer", None, None),
    ("CPU很快，答案是D", "C", "D"),
    ("A4纸", "A", None),
    ("3B铅笔", "B", None),
    ("C++", "C", None),
    ("25°C", "C", None),
    ("D'Arc", "D", None),
    ("B-cell", "B", None),
    ("T-B", "B", None),
    ("U.S.A.", "A", None),
    ("Washington D.C.", "D", None),
    ("option_A", "A", None),
    ("Émile É A", "A", "A"),
    ("ÀB", "B", None),
    # The English article, and a letter that only looks like it.
    ("A dog barks.", "A", None),
    ("A dog barks, so the answer is C.", "A", "C"),
    ("A is right.", "A", "A"),
    ("A because it says so", "A", "A"),
    ("A", "A", "A"),
    ("A\nthe end", "A", "A"),
    ("A isomer", "A", None),
    ("B dog", "B", "B"),
    # Several letters: after a cue, else the first.
    ("A和B都不对，答案是C", "A", "C"),
    ("A、B、C中，应选C", "A", "C"),
    ("B。因为A不对", "B", "B"),
    ("答案是A。不，答案是B", "A", "A"),
    ("选项A说的是狗，正确答案应该是：D", "A", "D"),
    ("B or C", "B", "B"),
    ("The correct answer is (B), not A", "B", "B"),
    ("I choose D over A", "D", "D"),
    ("根据A的说法，我选择了B", "A", "B"),
    ("A与众不同，故选D。", "A", "D"),
    ("答案\n\nB\n\nA", "B", "B"),
    ("答案在文章里说得很清楚。A", "A", "A"),
    ("Answers: A", "A", "A"),
    # Denied letters.
    ("不选A，选B", "A", "B"),
    ("别选A，选B", "A", "B"),
    ("答案不是A，是C", "A", "C"),
    ("不是A", "A", None),
    ("排除A和B", "A", "B"),
    ("The answer is not A", "A", None),
    # What a cue names decides, even where it is no option.
    ("答案是E，不是A", "A", None),
    ("E", None, None),
    ("F", None, None),
    ("没有答案", None, None),
]


@pytest.mark.parametrize(("reply", "published", "strict"), REPLIES)
def test_letters_of_replies(reply: str, published: str | None, strict: str | None) -> None:
    assert first_letter(reply) == published
    assert strict_letter(reply, 4) == strict


@pytest.mark.parametrize(
    ("reply", "num_options", "letter"),
    [
        ("D", 3, None),
        ("C", 3, "C"),
        ("选D，不选A", 3, None),
        ("选C", 2, None),
        ("B", 2, "B"),
        ("选E", 5, "E"),
        ("选Ｅ", 5, "E"),
        ("E", 4, None),
    ],
)
def test_only_options_of_the_question_count(reply: str, num_options: int, letter: str | None) -> None:
    assert strict_letter(reply, num_options) == letter


@given(st.text(alphabet="ABCDEＡＢabz 选答案是不：.()'-，\n"), st.integers(2, 5))
def test_a_strict_letter_is_an_option_and_stands_in_the_text(text: str, num_options: int) -> None:
    letter = strict_letter(text, num_options)
    wide = {"A": "Ａ", "B": "Ｂ"}
    assert letter is None or (letter in "ABCDE"[:num_options] and (letter in text or wide.get(letter, letter) in text))


@given(st.text(alphabet="甲乙丙丁，。：（）\n 0", max_size=20), st.sampled_from("ABCD"))
def test_one_letter_among_chinese_is_found_unless_a_digit_touches_it(text: str, letter: str) -> None:
    assert strict_letter(f"{text}。{letter}。{text}", 4) == first_letter(f"{text}{letter}") == letter

"""From what a model wrote to the letter it chose."""

from __future__ import annotations

import re

from panda_jax.evaluation.questions import LETTERS

_PUBLISHED = re.compile("A|B|C|D")

# Full-width Latin letters, both cases, so that a full-width word is seen as one.
_HALF_WIDTH = {0xFF21 + i: chr(ord("A") + i) for i in range(26)} | {0xFF41 + i: chr(ord("a") + i) for i in range(26)}

_LATIN = "A-Za-z0-9_À-ÖØ-öø-ɏ"
# A letter by itself: not in a word, number or unit (ABC, A4, C++, 5°C), in an abbreviation (U.S.A., D.C.), beside an
# apostrophe (D'Arc) or hyphen (B-cell), nor the English article (A dog; but what follows a name is no dog: A is).
_ALONE = (
    rf"(?<![{_LATIN}°])(?<![A-Za-z][.'’-])"
    rf"(?P<letter>[{LETTERS}])"
    rf"(?![{_LATIN}+#])(?!['’-][A-Za-z])(?!\.[A-Za-z](?![a-z]))"
    r"(?!(?<=A)[ ]+(?!(?:is|was|and|or|as|because|since|follows)\b)[a-z])"
)
_JOINT = (
    r"(?:应该|应当|应|就|的?是|为|了|正确|可能|选项|选择|选|项|option|is|be|would|must"
    r"|[\s:：,，\"“”'‘’(（\[【「<《*$]){0,12}?"
)
# 选项 names an option and chooses none.
_CUE = re.compile(r"(?:答案|选择?(?!项)|[Aa]nswer|[Cc]hoice|[Cc]hoose|[Ss]elect)(?![a-z])" + _JOINT + _ALONE)
_DENIED = re.compile(r"(?:不是|并非|[不别]选择?|不应选|不能选|排除|(?<![A-Za-z])not(?![A-Za-z]))" + _JOINT + _ALONE)
_STAND_ALONE = re.compile(_ALONE)


def first_letter(text: str) -> str | None:
    """Return the first A, B, C or D anywhere in `text`, or None: the published rule (PROTOCOLS.md §5.1).

    Case counts, surroundings do not: "Because" gives B. Whether the question has such an option is not asked.
    """
    found = _PUBLISHED.search(text)
    return found[0] if found else None


def strict_letter(text: str, num_options: int) -> str | None:
    """Return the letter that `text` chooses among the first `num_options` of A to E, or None.

    Only letters by themselves count, half or full width, capital: "B", "(B)", "B.", "B：因为", "选Ｂ", not "Because",
    "ABC", "A4", "U.S.A.", "B-cell" nor the article of "A dog". Those that are denied ("不是A", "不选A") do not count.
    Where several remain: the first one after a cue (答案, 选, answer, choose ...) with at most words of the kind 是 or
    应该 between; else the first of all. So "A和B都不对，答案是C" gives C, and "答案是A，不，答案是B" gives A.
    Where the one found is no option of this question, the answer is None: "选E" of four options chose nothing, and
    what else the text mentions is not what it chose.
    """
    text = text.translate(_HALF_WIDTH)
    denied = {match.start("letter") for match in _DENIED.finditer(text)}
    for pattern in (_CUE, _STAND_ALONE):
        for match in pattern.finditer(text):
            if match.start("letter") not in denied:
                letter = match["letter"]
                return letter if letter in LETTERS[:num_options] else None
    return None

"""The wordings, written out by hand, and the rule that a prompt is a prefix of what was trained."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda_jax.errors import InputError
from panda_jax.text.templates import TEMPLATES, Template, find_template
from panda_jax.text.turns import Turn

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n翻译\n\n### Input:\n天\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n问\n\n### Response:"
)
# (template, turns, expected segments): the wordings of PROTOCOLS.md §4.1, §4.2, §6 and of the published Alpaca prompt.
WORDINGS = [
    ("plain", [Turn("", "", "文")], [("文", True)]),
    ("plain", [Turn("", "问", "答")], [("问", False), ("答", True)]),
    ("plain", [Turn("指", "问", "答")], [("指\n问", False), ("答", True)]),
    ("panda", [Turn("指：", "问", "答")], [("指： 问", False), ("答", True)]),
    ("panda", [Turn("", "问", "答")], [(" 问", False), ("答", True)]),
    ("panda", [Turn("指", "", "答")], [("指 ", False), ("答", True)]),
    ("coig", [Turn("指", "问", "答")], [("指\n\n问", False), ("答", True)]),
    ("coig", [Turn("", "问", "答")], [("问", False), ("答", True)]),
    (
        "coig",
        [Turn("", "一", "二"), Turn("", "三", "四")],
        [("一", False), ("二", True), ("\n\n三", False), ("四", True)],
    ),
    ("alpaca", [Turn("翻译", "天", "sky")], [(ALPACA_INPUT, False), ("sky", True)]),
    (
        "alpaca",
        [Turn("问", "", "答"), Turn("再问", "", "再答")],
        [
            (ALPACA_NO_INPUT, False),
            ("答", True),
            ("\n\n### Instruction:\n再问\n\n### Response:", False),
            ("再答", True),
        ],
    ),
    (
        "belle",
        [Turn("翻译", "天", "sky"), Turn("地", "", "earth")],
        [
            ("Human: \n翻译天\n\nAssistant: \n", False),
            ("sky", True),
            ("Human: \n地\n\nAssistant: \n", False),
            ("earth", True),
        ],
    ),
]
TURNS = st.lists(st.builds(Turn, *[st.text(max_size=8)] * 3), min_size=1, max_size=4)


@pytest.mark.parametrize(("name", "turns", "expected"), WORDINGS)
def test_wording(name, turns, expected):
    assert list(TEMPLATES[name].render(turns)) == expected


def test_every_template_has_a_wording_row():
    assert {name for name, _, _ in WORDINGS} == set(TEMPLATES)
    assert all(template.name == name for name, template in TEMPLATES.items())


@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=TURNS, answer=st.text(max_size=8))
def test_prompt_is_a_prefix_of_training(name, turns, answer):
    """What a chat feeds, without the last answer, begins what training saw, whatever that answer is."""
    template = TEMPLATES[name]
    asked = [*turns[:-1], turns[-1]._replace(output="")]
    told = [*turns[:-1], turns[-1]._replace(output=answer)]
    prompt = template.render_prompt(asked)
    rendered = template.render(told)
    assert rendered[: len(prompt)] == prompt
    assert rendered[len(prompt) :] == ((answer, True),)
    assert [segment.text for segment in rendered if segment.trained] == [turn.output for turn in told]


@pytest.mark.parametrize("name", TEMPLATES)
def test_fingerprint_changes_with_any_wording(name):
    """One more character in one kind of turn (first or not, with what) or another name: another fingerprint."""
    template = TEMPLATES[name]
    seen = {other.fingerprint for other in TEMPLATES.values()}
    assert len(seen) == len(TEMPLATES)
    for case in itertools.product((False, True), repeat=3):

        def prompt(turn, i, case=case):
            return template.prompt(turn, i) + "!" * (case == (i > 0, bool(turn.instruction), bool(turn.input)))

        changed = Template(name, prompt)
        assert changed.fingerprint not in seen
        seen.add(changed.fingerprint)
    assert dataclasses.replace(template, name="other").fingerprint not in seen
    assert template.fingerprint == dataclasses.replace(template).fingerprint


def test_unknown_template_names_the_nearest():
    with pytest.raises(InputError, match=r"'alpacca' \(did you mean 'alpaca'\?\); choose one of plain, panda"):
        find_template("alpacca")

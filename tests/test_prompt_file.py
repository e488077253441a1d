"""Prompts and conversations to ids: as training has them, from files of either kind, cut where they must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled_models import singles, spell

from panda_jax.config import Source
from panda_jax.data.records import Example
from panda_jax.data.tokens import tokenize_all
from panda_jax.errors import InputError
from panda_jax.generation.chat import Chat, template_of_run
from panda_jax.generation.decode import Generated
from panda_jax.generation.prompt_file import check_lengths, of_text, read_prompts, written_line
from panda_jax.generation.sampling import Sampling
from panda_jax.text.encoding import encode_prompt
from panda_jax.text.templates import TEMPLATES, Template, find_template
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.text.turns import Turn

TEXTS = st.text("天地玄黄 \n:ab", max_size=8)
COIG = find_template("coig")


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(spell([("▁", -1.0), ("▁天", -2.0), ("天地", -3.0), *singles("天地玄黄ab")]), "spelled")


def trained_ids(template: Template, turns: list[Turn]) -> list[int]:
    """Return the whole conversation as training gets it."""
    source = Source(corpus="alpaca", path="unused", template=template.name)
    windows = tokenize_all([Example(template.render(turns))], tokenizer(), source, 10_000)
    assert not windows.changed and not windows.dropped
    return windows.ids.tolist()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=3), st.sampled_from(sorted(TEMPLATES)))
def test_a_prompt_is_the_beginning_of_what_was_trained(said: list[tuple[str, str, str]], name: str):
    """Id by id, answers of earlier turns included; what is left is the last answer, encoded alone, and EOS."""
    turns = [Turn(*texts) for texts in said]
    prompt = encode_prompt(TEMPLATES[name].render_prompt(turns), tokenizer())
    whole = trained_ids(TEMPLATES[name], turns)
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :] == [*tokenizer().encode(turns[-1].output), tokenizer().eos_id]


# ---- conversations --------------------------------------------------------------------------------------------------


class Script:
    """In a generator's place: answers with the given ids and keeps the prompts."""

    def __init__(self, *answers: str, context: int = 60) -> None:
        self.answers = [tokenizer().encode(answer) for answer in answers]
        self.model = type("Shape", (), {"context_length": context})
        self.prompts: list[list[int]] = []

    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[tuple[int, float]]:
        self.prompts.append(list(prompt))
        for new in self.answers.pop(0):
            yield new, -1.0


def chat(script: Any, said: list[str], max_new_tokens: int = 10) -> Chat:
    return Chat(script, tokenizer(), COIG, Sampling.greedy(max_new_tokens, (2,)), said.append)


def test_every_prompt_of_a_conversation_is_a_training_prompt():
    """After three turns the prompt and the answer are the ids that training makes of these turns."""
    script, said = Script("天 地", "公", "ab", context=200), []
    talk = chat(script, said)
    questions, answers = ["天地?", "玄黄", "b"], []
    for number, question in enumerate(questions):
        answers.append("".join(talk.ask(question)))
        turns = [Turn(q, "", a) for q, a in zip(questions, answers, strict=False)]
        answer = tokenizer().encode(answers[-1])
        assert script.prompts[number] + answer + [tokenizer().eos_id] == trained_ids(COIG, turns)
    assert answers == ["天 地", "公", "ab"]
    assert said == []


def test_an_answer_comes_in_whole_characters():
    """公 is three byte pieces here, behind the "▁" that every encoded text begins with and decoding drops."""
    assert len(tokenizer().encode("公")) == 4
    assert list(chat(Script("公天"), []).ask("?")) == ["公", "天"]


def test_the_oldest_turns_are_left_out_and_it_is_said():
    """Room for 30 ids. A turn 天 -> 地 takes 2 + 3 ids, and "\\n\\n" before a later one 2 bytes more."""
    script, said = Script(*"地" * 9, context=40), []
    talk = chat(script, said)
    for _ in range(9):
        list(talk.ask("天"))
    assert max(map(len, script.prompts)) <= 30
    kept = [prompt.count(tokenizer().eos_id) for prompt in script.prompts]
    assert kept[:4] == [0, 1, 2, 3] and kept[-1] == kept[-2] < 8
    full = len(said)
    assert full > 0 and all("oldest 1 of its turns left out" in text for text in said)
    assert len(talk.turns) == 9 - full
    turns = [Turn("天", "", "地")] * (len(talk.turns))
    assert script.prompts[-1] == encode_prompt(COIG.render_prompt(turns), tokenizer())
    assert len(encode_prompt(COIG.render_prompt([turns[0], *turns]), tokenizer())) > 30


def test_an_interrupted_answer_is_remembered_as_far_as_it_came():
    talk = chat(Script("天地ab", "b"), [])
    answer: Any = talk.ask("?")
    first = next(answer)
    answer.close()
    assert talk.turns == [Turn("?", "", first)]
    list(talk.ask("a"))
    assert [turn.output for turn in talk.turns] == [first, "b"]


def test_a_question_that_cannot_be_asked_is_forgotten():
    script = Script("b", "a")
    talk = chat(script, [])
    list(talk.ask("a"))
    for question, message in (("天b" * 60, r"has \d+ ids, and there is room for 50"), ("\ud800", "not valid Unicode")):
        before = list(talk.turns)
        with pytest.raises(InputError, match=message):
            list(talk.ask(question))
        assert talk.turns == before
    assert "".join(talk.ask("b")) == "a"


def test_no_room_for_a_prompt():
    with pytest.raises(InputError, match="--max-new-tokens 59: leaves no room .* context of 60"):
        chat(Script(), [], max_new_tokens=59)


def run_with(*sources: dict[str, str]) -> dict[str, Any]:
    return {"config": yaml.safe_dump({"data": {"sources": list(sources)}})}


def test_the_runs_own_wording():
    """Text without instructions has none; a source's `template` wins over its corpus's own, alpaca."""
    instructions, text = {"corpus": "alpaca", "template": "belle"}, {"corpus": "wiki2019zh"}
    assert template_of_run(run_with(instructions, text)).name == "belle"
    assert template_of_run(run_with(text)).name == "plain"
    assert template_of_run(run_with({"corpus": "coig_exam"}, {"corpus": "coig_exam", "name": "b"})).name == "coig"


def test_no_single_wording_asks_for_one():
    mixed = run_with({"corpus": "alpaca", "template": "belle"}, {"corpus": "alpaca", "template": "alpaca"})
    with pytest.raises(InputError, match="--template: the run mixes the wordings alpaca, belle; give --template, one"):
        template_of_run(mixed)
    for nothing in (None, {}, {"config": None}):
        with pytest.raises(InputError, match="--template: these weights do not say .* give --template"):
            template_of_run(nothing)


# ---- files ----------------------------------------------------------------------------------------------------------


def never() -> Template:
    raise AssertionError("the run's wording is not needed")


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_json_lines(tmp_path: Path):
    rows = [{"prompt": "天 地"}, {"instruction": "玄", "input": "黄"}, {"instruction": "a"}]
    file = write(tmp_path, "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(file, tokenizer(), None, lambda: COIG)
    assert [prompt.shown for prompt in found] == rows
    assert found[0].ids == [1, *tokenizer().encode("天 地")]
    assert found[1].ids == [1, *tokenizer().encode("玄\n\n黄")]
    assert found[2].ids == [1, *tokenizer().encode("a")]
    assert [prompt.is_turn for prompt in found] == [False, True, True]
    given = read_prompts(file, tokenizer(), find_template("belle"), never)
    assert given[0].ids == found[0].ids
    assert given[1].ids == [1, *tokenizer().encode("Human: \n玄黄\n\nAssistant: \n")]


def test_lines_of_text(tmp_path: Path):
    file = write(tmp_path, "p.txt", '天\r\n{"prompt": 1}')
    plain = read_prompts(file, tokenizer(), None, never)
    assert [prompt.ids for prompt in plain] == [[1, *tokenizer().encode(text)] for text in ("天", '{"prompt": 1}')]
    turns = read_prompts(file, tokenizer(), find_template("belle"), never)
    assert turns[0].ids == [1, *tokenizer().encode("Human: \n天\n\nAssistant: \n")]
    assert turns[0].where == f"{file}:1" and turns[0].is_turn


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', r'p.jsonl:2: {"prompt": 3}; expected {"prompt": …}'),
        ("p.jsonl", '{"prompt": "a"\n', "p.jsonl:1: not valid JSON"),
        ("p.jsonl", '["a"]\n', "p.jsonl:1: .*expected"),
        ("p.jsonl", '{"prompt": "a", "input": "b"}\n', "p.jsonl:1: found the fields prompt, input; expected"),
        ("p.jsonl", '{"input": "b"}\n', "p.jsonl:1: found the fields input; expected"),
        ("p.jsonl", "{}\n", "p.jsonl:1: found the fields none; expected"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', "p.jsonl:1: not valid Unicode"),
        ("p.txt", "a\n\nb\n", "p.txt:2: the line is empty"),
        ("p.txt", "", "p.txt: the file is empty"),
    ],
)
def test_files_that_are_no_prompts(name: str, text: str, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        read_prompts(write(tmp_path, name, text), tokenizer(), None, lambda: COIG)


def test_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(InputError, match="--prompts .*absent.txt: No such file"):
        read_prompts(tmp_path / "absent.txt", tokenizer(), None, never)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match=r"latin.txt: not UTF-8 \(.* at byte 3\)"):
        read_prompts(tmp_path / "latin.txt", tokenizer(), None, never)


def test_a_prompt_without_room_is_named():
    prompt = of_text("file:7", "天地", tokenizer(), None)
    check_lengths([prompt], 5, len(prompt.ids) + 5)
    with pytest.raises(InputError, match=f"^file:7: {len(prompt.ids)} ids and --max-new-tokens 6 exceed"):
        check_lengths([prompt], 6, len(prompt.ids) + 5)


def test_a_continuation_begins_where_its_prompt_ends():
    """ "▁天" behind text begins with a space; behind the prompt of a turn it is where the answer begins."""
    sky = tokenizer().encode("天")
    assert tokenizer().pieces(sky) == ["▁天"]
    written = Generated([*sky, *sky], [-0.5, -0.25], True)
    going_on = of_text("a", "地", tokenizer(), None)
    line = json.loads(written_line(going_on, written, tokenizer()))
    assert line == {"prompt": "地", "text": " 天 天", "ids": sky * 2, "logprob": -0.75, "stopped": True}
    turn = of_text("a", "地", tokenizer(), COIG)
    line = written_line(turn, written, tokenizer())
    assert line.endswith("\n") and "天" in line
    assert json.loads(line) | {"logprob": 0} == {
        "instruction": "地", "text": "天 天", "ids": sky * 2, "logprob": 0, "stopped": True
    }  # fmt: skip

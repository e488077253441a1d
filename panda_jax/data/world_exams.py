"""Multiple-choice tests about the miniature world, as files in the official formats of LogiQA-v2 and C3.

The tests ask for the facts that stage 1 tells and that no training file ever asks for (`World.held_out`): each of the
three asks for every one of them once, in its own words. The dev files, meant for examples in a prompt, ask for facts
that stage 2 asks for as well. A passage states the fact asked for, and the same property of somebody else, whose value
is among the wrong options; so the answer can be had by reading, or from memory without the passage.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from panda_jax.data.world import Person, World, tell
from panda_jax.data.world_wordings import FACT_TYPES, FactType

NUM_DEV_FACTS = 40
"""Facts that each dev file asks for."""

Fact = tuple[Person, FactType]


class Choice(NamedTuple):
    """One question; `options` are values of one fact type, and `options[answer]` is the true one."""

    question: str
    options: list[str]
    answer: int


class Passage(NamedTuple):
    """Two people, what is told of each of them, and the questions that this answers."""

    people: tuple[Person, Person]
    told: tuple[str, str]
    choices: list[Choice]


class Exam(NamedTuple):
    """One test: how many options its questions have, by turns; how many ask about one passage; how it is written."""

    num_options: tuple[int, ...]
    questions_per_passage: int
    write: Callable[[str, list[Passage], random.Random], str]


def write_exams(world: World, folder: Path) -> dict[str, Path]:
    """Write logiqa2/{test,dev}_zh.txt and c3/c3-{d,m}-{test,dev}.json below `folder`; return {"c3-d/test": path, …}.

    Equal worlds give equal bytes.
    """
    written = {}
    for task, exam in EXAMS.items():
        for split, facts in (("test", _held_out(world)), ("dev", _asked(world, task))):
            rng = world.generator(f"{task}/{split}")
            name = f"logiqa2/{split}_zh.txt" if task == "logiqa2" else f"c3/{task}-{split}.json"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(exam.write(f"{task}-{split}", _passages(world, exam, facts, rng), rng).encode())
            written[f"{task}/{split}"] = path
    return written


def _held_out(world: World) -> list[Fact]:
    return [
        (person, fact_type)
        for person in world.people
        for fact_type in FACT_TYPES
        if (person.name, fact_type.key) in world.held_out
    ]


def _asked(world: World, task: str) -> list[Fact]:
    """Return some facts that stage 2 asks for, others for each task."""
    facts = [(person, fact_type) for person in world.people for fact_type in world.asked(person)]
    return world.generator(f"{task}/dev facts").sample(facts, NUM_DEV_FACTS)


def _passages(world: World, exam: Exam, facts: Sequence[Fact], rng: random.Random) -> list[Passage]:
    """Return the facts as questions about passages of one person each, in random order, the right options spread."""
    by_person = [
        (person, rng.sample(types, len(types)))
        for person in world.people
        if (types := [fact_type for who, fact_type in facts if who is person])
    ]
    groups = [
        (person, types[i : i + exam.questions_per_passage])
        for person, types in by_person
        for i in range(0, len(types), exam.questions_per_passage)
    ]
    rng.shuffle(groups)
    right = iter(places(len(facts), exam.num_options, rng))
    return [passage((person, _another(world, person, types, rng)), types, right, rng) for person, types in groups]


def places(count: int, num_options: tuple[int, ...], rng: random.Random) -> list[tuple[int, int]]:
    """Return (number of options, index of the right one) per question; each index as often as the others."""
    numbers = [num_options[i % len(num_options)] for i in range(count)]
    found = [(number, i % number) for number in sorted(set(numbers)) for i in range(numbers.count(number))]
    return rng.sample(found, count)


def passage(
    people: tuple[Person, Person], types: Sequence[FactType], right: Iterator[tuple[int, int]], rng: random.Random
) -> Passage:
    """Return a passage that tells `types` of both people, and one type more of each, and asks them of the first.

    The two differ in `types`. `right` is as for choices_about.
    """
    told = []
    for person in people:
        more = rng.choice([fact_type for fact_type in FACT_TYPES if fact_type not in types])
        told.append(tell(person, rng.sample([*types, more], len(types) + 1), rng))
    return Passage(people, (told[0], told[1]), choices_about(*people, types, right, rng))


def choices_about(
    person: Person, other: Person, types: Sequence[FactType], right: Iterator[tuple[int, int]], rng: random.Random
) -> list[Choice]:
    """Return a question per type about `person`; the value of `other` is among the wrong options.

    `right` gives each question's number of options (from 2) and the index of the right one.
    """
    choices = []
    for fact_type in types:
        number, answer = next(right)
        value, wrong = person.facts[fact_type.key], other.facts[fact_type.key]
        rest = [each for each in fact_type.values if each not in (value, wrong)]
        options = rng.sample([wrong, *rng.sample(rest, number - 2)], number - 1)
        options.insert(answer, value)
        choices.append(Choice(rng.choice(fact_type.questions).format(n=person.name), options, answer))
    return choices


def _another(world: World, person: Person, types: Sequence[FactType], rng: random.Random) -> Person:
    """Return somebody with other values of all the types."""
    keys = [fact_type.key for fact_type in types]
    return rng.choice([each for each in world.people if all(each.facts[key] != person.facts[key] for key in keys)])


def _logiqa(name: str, passages: list[Passage], rng: random.Random) -> str:
    """JSON lines without a line end after the last, as in the published test."""
    lines = []
    for each in passages:
        text = running_text(each, rng)
        for choice in each.choices:
            row = {"example_id": len(lines) + 1, "answer": choice.answer, "text": text}
            lines.append(json.dumps(row | {"question": choice.question, "options": choice.options}, ensure_ascii=False))
    return "\n".join(lines)


def _c3_dialogue(name: str, passages: list[Passage], rng: random.Random) -> str:
    return _c3(name, [(dialogue(each, rng), each.choices) for each in passages])


def _c3_mixed(name: str, passages: list[Passage], rng: random.Random) -> str:
    return _c3(name, [([running_text(each, rng)], each.choices) for each in passages])


def _c3(name: str, documents: list[tuple[list[str], list[Choice]]]) -> str:
    """One JSON list of [turns, questions, id], indented by one space, as published."""
    rows = []
    for number, (turns, choices) in enumerate(documents, start=1):
        questions = [
            {"question": choice.question, "choice": choice.options, "answer": choice.options[choice.answer]}
            for choice in choices
        ]
        rows.append([turns, questions, f"{name}-{number}"])
    return json.dumps(rows, ensure_ascii=False, indent=1)


def running_text(passage: Passage, rng: random.Random) -> str:
    """Return what is told of the one person and then of the other."""
    return "".join(rng.sample(passage.told, 2))


def dialogue(passage: Passage, rng: random.Random) -> list[str]:
    """Return four turns of two speakers, who come to speak of the one person and then of the other."""
    speakers = rng.sample(("男：", "女："), 2)
    about = rng.sample(list(zip(passage.people, passage.told, strict=True)), 2)
    openings = (rng.choice(("说说{n}吧。", "你见过{n}吗？")), rng.choice(("那{n}呢？", "也说说{n}吧。")))
    turns = []
    for opening, (person, told) in zip(openings, about, strict=True):
        turns += [speakers[0] + opening.format(n=person.name), speakers[1] + told]
    return turns


# In the published tests 19 % of C3-d have three options, and of C3-m 8 % three and 9 % two; LogiQA-v2 has four.
EXAMS: dict[str, Exam] = {
    "logiqa2": Exam((4,), 1, _logiqa),
    "c3-d": Exam((4, 4, 4, 4, 3), 1, _c3_dialogue),
    "c3-m": Exam((4, 4, 4, 4, 4, 3, 4, 4, 4, 4, 4, 2), 2, _c3_mixed),
}

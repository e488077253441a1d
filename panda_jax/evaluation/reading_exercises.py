"""Exercises for the demo's long variant: read a passage, answer with the option's text or with its letter.

COIG's exam format. Every passage is about two people who exist in no other file and whose properties are drawn anew, so
the passage alone can tell the answer. The layouts are those in which the protocols put their questions: letters and
reading are learnt where they will be asked for.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from panda_jax.atomic import write_atomically
from panda_jax.data.world import Person, World
from panda_jax.data.world_exams import dialogue, passage, places, running_text
from panda_jax.data.world_wordings import FACT_TYPES, MEN, SURNAMES, WOMEN, FactType
from panda_jax.evaluation.prompts import find_protocol
from panda_jax.evaluation.questions import LETTERS, Question

NUM_EXERCISES = 24_000
NUM_OPTIONS = (4, 4, 4, 4, 4, 3, 4, 4, 4, 4, 3, 2)
"""Options of an exercise, by turns, in about the shares of C3-m."""
LAYOUTS = (
    ("panda", "logiqa2"),
    ("panda", "c3-d"),
    ("likelihood", "logiqa2"),
    ("likelihood", "c3-d"),
    ("likelihood-letter", "logiqa2"),
    ("likelihood-letter", "c3-d"),
)
"""(protocol, task) pairs, drawn with equal chances; C3's two tests are put alike."""


def write_reading(world: World, path: Path) -> None:
    """Write the exercises to `path`, whole or not at all; equal worlds give equal bytes."""
    rng = world.generator("reading")
    taken = {person.name for person in world.people}
    free = [
        (surname + name, pronoun)
        for names, pronoun in ((MEN, "他"), (WOMEN, "她"))
        for surname in SURNAMES
        for name in names
        if surname + name not in taken
    ]
    right = iter(places(NUM_EXERCISES, NUM_OPTIONS, rng))
    lines = []
    for _ in range(NUM_EXERCISES):
        asked = rng.choice(FACT_TYPES)
        told = passage(_strangers(free, asked, rng), [asked], right, rng)
        context = " ".join(dialogue(told, rng)) if rng.random() < 0.5 else running_text(told, rng)
        (choice,) = told.choices
        question = Question("", context, choice.question, tuple(choice.options), choice.answer, "")
        record = _exercise(question, *rng.choice(LAYOUTS))
        lines.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    write_atomically(path, lines)


def _strangers(free: list[tuple[str, str]], asked: FactType, rng: random.Random) -> tuple[Person, Person]:
    """Return two people of names that the world lacks, with properties of their own and different ones of `asked`."""
    columns = {fact_type.key: rng.choices(list(fact_type.values), k=2) for fact_type in FACT_TYPES}
    columns[asked.key] = rng.sample(list(asked.values), 2)
    first, second = (
        Person(name, "", pronoun, {key: column[i] for key, column in columns.items()})
        for i, (name, pronoun) in enumerate(rng.sample(free, 2))
    )
    return first, second


def _exercise(question: Question, protocol_name: str, task: str) -> dict[str, str]:
    """Return the question as the protocol puts it, with the answer that the protocol wants, as a COIG exam record."""
    protocol = find_protocol(protocol_name)
    assert question.answer is not None
    answer = LETTERS[question.answer]
    if protocol.kind == "likelihood":
        answer = protocol.request(task, question, ()).continuations[question.answer].strip()
    return {
        "textbox_q_instruction": "",
        "textbox_q_context": "",
        "textbox_question": protocol.prompt(task, question, ()),
        "textbox_answer": answer,
        "textbox_answer_analysis": "",
        "subject": "阅读",
    }

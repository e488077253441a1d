"""Exercises for the demo's long variant: read a passage, answer with an option's text or with its letter.

COIG's dialogue format: the first turn gives a passage and a question, further ones ask more about it. Every passage is
about two strangers, so the passage alone can tell the answer. The layouts are those in which the protocols put their
questions: letters and reading are learnt where they will be asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from panda_jax.data.strangers import Strangers
from panda_jax.data.world import World
from panda_jax.data.world_exams import choices_about, dialogue, passage, places, running_text
from panda_jax.data.world_files import dialogue_member, write_tar
from panda_jax.data.world_wordings import FACT_TYPES
from panda_jax.evaluation.prompts import find_protocol
from panda_jax.evaluation.questions import LETTERS, Question

NUM_DIALOGUES = 20_000
NUM_FACTS = (1, 2, 2, 3)
"""Types that a passage tells of both of its people, drawn with equal chances."""
MOST_TURNS = 4
NUM_OPTIONS = (4, 4, 4, 4, 4, 3, 4, 4, 4, 4, 3, 2)
"""Options of a question, by turns, in about the shares of C3-m."""
LAYOUTS = (
    ("panda", "logiqa2"),
    ("likelihood", "logiqa2"),
    ("likelihood", "c3-d"),
    ("likelihood-letter", "logiqa2"),
    ("likelihood-letter", "c3-d"),
)
"""(protocol, task) pairs, drawn with equal chances for every turn; C3's two tests are put alike."""


def write_reading(world: World, path: Path) -> None:
    """Write the exercises to `path`, whole or not at all; equal worlds give equal bytes."""
    write_tar(path, _dialogues(world))


def _dialogues(world: World) -> Iterator[tuple[str, bytes]]:
    rng, strangers = world.generator("reading"), Strangers(world)
    right = iter(places(NUM_DIALOGUES * 2 * max(NUM_FACTS), NUM_OPTIONS, rng))
    for number in range(NUM_DIALOGUES):
        types = rng.sample(FACT_TYPES, rng.choice(NUM_FACTS))
        first, second = strangers.draw(2, types, rng)
        told = passage((first, second), types, right, rng)
        context = " ".join(dialogue(told, rng)) if rng.random() < 0.5 else running_text(told, rng)
        asked = [*told.choices, *choices_about(second, first, types, right, rng)]
        turns = []
        for choice in rng.sample(asked, min(len(asked), MOST_TURNS)):
            question = Question("", context, choice.question, tuple(choice.options), choice.answer, "")
            turns.append(_turn(question, *rng.choice(LAYOUTS), is_first=not turns))
        yield dialogue_member(number, first.name, turns)


def _turn(question: Question, protocol_name: str, task: str, is_first: bool) -> str:
    """Return a turn of a dialogue: the question as the protocol puts it, and the answer that the protocol wants.

    Only the first turn has the passage: what stands from there on is all that the others say.
    """
    protocol = find_protocol(protocol_name)
    assert question.answer is not None
    asked, answer = protocol.prompt(task, question, ()), LETTERS[question.answer]
    if not is_first:
        asked = asked.split(question.context, 1)[1].lstrip("\n")
    if protocol.kind == "likelihood":
        answer = protocol.request(task, question, ()).continuations[question.answer].strip()
    return json.dumps({"Q": asked, "A": answer}, ensure_ascii=False)

"""A miniature world, drawn from a seed: 48 people, eight facts about each, their friends, towns, animals and seasons.

Stage 1 of the demo tells every fact in many wordings and asks for none of a named person's (only who somebody's friend
is, and what that friend is like). Stage 2 asks about two thirds of the (person, fact type) pairs; the other third is
held out: no stage asks for it, not by way of a friend either, and world_exams.py makes tests of it. A sixth of the
people do not occur in stage 2.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from panda_jax.data.world_wordings import (
    ANIMAL_LORE,
    DIRECTIONS,
    FACT_TYPES,
    JOB_LORE,
    MEN,
    SEASON_LORE,
    SIGHTS,
    SURNAMES,
    WOMEN,
    FactType,
    Lore,
)

NUM_SILENT_PEOPLE = 8
"""People whom stage 2 never mentions."""
NUM_HELD_OUT_PER_TYPE = 8
"""Held-out pairs per fact type among the people whom stage 2 does mention."""
REVERSE_SHARE = 0.2
"""Share of sentences that go from the value to the person."""
PRONOUN_SHARE = 0.4
"""Share of later forward sentences whose subject is a pronoun; names bind facts better."""


@dataclass(frozen=True)
class Person:
    """One inhabitant; `facts` maps a fact type's key to its Chinese value."""

    name: str
    english: str
    pronoun: str
    facts: dict[str, str]


@dataclass(frozen=True)
class World:
    """Everything that is true, and which (name, fact type key) pairs stage 2 must not touch."""

    seed: int
    people: tuple[Person, ...]
    friends: dict[str, str]
    lore: tuple[Lore, ...]
    held_out: frozenset[tuple[str, str]]

    def generator(self, purpose: str) -> random.Random:
        """Return a generator of its own for each purpose, so that one text does not depend on how long another is."""
        return random.Random(f"{self.seed}/{purpose}")

    def asked(self, person: Person) -> list[FactType]:
        """Return the fact types that stage 2 may ask about this person."""
        return [fact_type for fact_type in FACT_TYPES if (person.name, fact_type.key) not in self.held_out]


def make_world(seed: int) -> World:
    """Draw a world; equal seeds give equal worlds on every Python and machine."""
    rng = random.Random(f"{seed}/world")
    people = _people(rng)
    pairs = rng.sample(people, len(people))
    friends = {a.name: b.name for a, b in zip(pairs[::2], pairs[1::2], strict=True)}
    return World(
        seed=seed,
        people=tuple(people),
        friends=friends | {b: a for a, b in friends.items()},
        lore=(*ANIMAL_LORE, *JOB_LORE, *SEASON_LORE, *_town_lore(rng)),
        held_out=_held_out(people, rng),
    )


def tell(person: Person, fact_types: Sequence[FactType], rng: random.Random) -> str:
    """Return one sentence per fact, each in a drawn wording; the first names the person, later ones may not."""
    sentences = []
    for fact_type in fact_types:
        value = person.facts[fact_type.key]
        if rng.random() < REVERSE_SHARE:
            sentences.append(rng.choice(fact_type.reverse).format(v=value, n=person.name))
        else:
            subject = person.pronoun if sentences and rng.random() < PRONOUN_SHARE else person.name
            sentences.append(rng.choice(fact_type.statements).format(v=value, s=subject))
    return "".join(sentences)


def _people(rng: random.Random) -> list[Person]:
    """Return everyone; each value of a fact type is held by equally many people, give or take one."""
    given = [(*name, "他") for name in MEN.items()] + [(*name, "她") for name in WOMEN.items()]
    rng.shuffle(given)
    surnames = _spread(list(SURNAMES), len(given), rng)
    columns = {fact_type.key: _spread(list(fact_type.values), len(given), rng) for fact_type in FACT_TYPES}
    return [
        Person(
            name=surname + name,
            english=f"{SURNAMES[surname]} {english}",
            pronoun=pronoun,
            facts={key: column[i] for key, column in columns.items()},
        )
        for i, (surname, (name, english, pronoun)) in enumerate(zip(surnames, given, strict=True))
    ]


def _spread(values: list[str], count: int, rng: random.Random) -> list[str]:
    """Return `count` draws in random order in which the values occur equally often, give or take one."""
    order = rng.sample(values, len(values))
    return rng.sample([order[i % len(order)] for i in range(count)], count)


def _town_lore(rng: random.Random) -> list[Lore]:
    """Return in which direction each town lies and what stands there."""
    towns = next(fact_type for fact_type in FACT_TYPES if fact_type.key == "town").values
    sights = _spread(list(SIGHTS), len(towns), rng)
    directions = _spread(list(DIRECTIONS), len(towns), rng)
    lore = []
    for (town, english), sight, direction in zip(towns.items(), sights, directions, strict=True):
        lore += [
            Lore(f"{town}有{sight}。", f"{english} has {SIGHTS[sight]}.", f"{town}有什么？", sight),
            Lore(
                f"{town}在{direction}。", f"{english} is in the {DIRECTIONS[direction]}.", f"{town}在哪边？", direction
            ),
        ]
    return lore


def _held_out(people: list[Person], rng: random.Random) -> frozenset[tuple[str, str]]:
    """Return a third of all pairs: every pair of the silent people, and equally many per type from the others."""
    order = rng.sample(people, len(people))
    silent, asked = order[:NUM_SILENT_PEOPLE], order[NUM_SILENT_PEOPLE:]
    pairs = {(person.name, fact_type.key) for person in silent for fact_type in FACT_TYPES}
    for fact_type in FACT_TYPES:
        pairs |= {(person.name, fact_type.key) for person in rng.sample(asked, NUM_HELD_OUT_PER_TYPE)}
    return frozenset(pairs)

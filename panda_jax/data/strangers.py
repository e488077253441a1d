"""People of one text only: names that the world lacks, with properties drawn anew for every text.

No model can know them, so whoever answers about them, or tells the same once more, has read. The demo's long variant
learns to read from them: here as news that say what they have to say twice, in reading_exercises.py as questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from panda_jax.data.world import Person, World, tell
from panda_jax.data.world_files import write_gzip
from panda_jax.data.world_wordings import FACT_TYPES, MEN, SURNAMES, WOMEN, FactType

NUM_REPORTS = 60_000
CROWDS = ((2, 1), (2, 2), (2, 3), (2, 1), (2, 2), (2, 3), (3, 1), (4, 1))
"""(people, facts told of each), drawn with equal chances; of more people fewer facts, or a text gets long."""
WORD_FOR_WORD = 0.75
"""Share of reports that repeat their sentences; the others say the same in other words, which is harder to learn."""
IN_ORDER = 0.8
"""Share of those that repeat them in the same order: copying comes first, finding what belongs to a name later."""


class Strangers:
    """Draws people whose names the world lacks."""

    def __init__(self, world: World) -> None:
        taken = {person.name for person in world.people}
        self._free = [
            (surname + name, pronoun)
            for names, pronoun in ((MEN, "他"), (WOMEN, "她"))
            for surname in SURNAMES
            for name in names
            if surname + name not in taken
        ]

    def draw(self, count: int, differing: Sequence[FactType], rng: random.Random) -> list[Person]:
        """Return `count` people, at most 4, no two of whom share a property of the types `differing`."""
        columns = {fact_type.key: rng.choices(list(fact_type.values), k=count) for fact_type in FACT_TYPES}
        for fact_type in differing:
            columns[fact_type.key] = rng.sample(list(fact_type.values), count)
        return [
            Person(name, "", pronoun, {key: column[i] for key, column in columns.items()})
            for i, (name, pronoun) in enumerate(rng.sample(self._free, count))
        ]


def write_reports(world: World, path: Path) -> None:
    """Write news about strangers in news2016zh's format to `path`; equal worlds give equal bytes."""
    write_gzip(path, _reports(world))


def _reports(world: World) -> Iterator[dict[str, Any]]:
    """Two to four people per item; every fact is told by a sentence of its own, and once more after a line break."""
    rng, strangers = world.generator("strangers"), Strangers(world)
    for number in range(NUM_REPORTS):
        num_people, num_facts = rng.choice(CROWDS)
        types = rng.sample(FACT_TYPES, num_facts)
        people = strangers.draw(num_people, types, rng)
        facts = [(person, fact_type) for person in people for fact_type in types]
        rng.shuffle(facts)
        first = again = [tell(person, [fact_type], rng) for person, fact_type in facts]
        if rng.random() >= WORD_FOR_WORD:
            again = [tell(person, [fact_type], rng) for person, fact_type in facts]
        if again is not first or rng.random() >= IN_ORDER:
            again = rng.sample(again, len(again))
        names = [person.name for person in people]
        yield {
            "news_id": f"{620000000 + number}",
            "keywords": "，".join(names),
            "title": "和".join(names),
            "desc": first[0],
            "source": "小镇日报",
            "time": f"{number % 12 + 1:02d}-{number % 28 + 1:02d} 12:00",
            "content": "".join(first) + "\n" + "".join(again),
        }

"""What the demo's long variant learns to read from: strangers, told of twice, and asked about."""

from __future__ import annotations

import gzip
import json
import random
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from panda_jax.data import strangers
from panda_jax.data.strangers import Strangers
from panda_jax.data.world import World, make_world
from panda_jax.data.world_files import write_world
from panda_jax.data.world_wordings import FACT_TYPES, MEN, WOMEN
from panda_jax.evaluation import reading_exercises

TYPES = {fact_type.key: fact_type for fact_type in FACT_TYPES}
TYPE_OF_VALUE = {value: fact_type.key for fact_type in FACT_TYPES for value in fact_type.values}
VALUES = "|".join(TYPE_OF_VALUE)
GIVEN = "|".join([*MEN, *WOMEN])


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(5)


def names_of(world: World) -> list[str]:
    return [person.name for person in world.people]


def test_strangers_are_nobody_known_and_differ(world: World) -> None:
    drawn, rng = Strangers(world), random.Random(0)
    for count in (2, 3, 4):
        people = drawn.draw(count, FACT_TYPES, rng)
        assert len({person.name for person in people} - set(names_of(world))) == count
        for person in people:
            assert person.facts.keys() == TYPES.keys() and person.pronoun == ("他" if person.name[1] in MEN else "她")
        for key in TYPES:
            assert len({person.facts[key] for person in people}) == count
    alike = [drawn.draw(2, (), rng) for _ in range(200)]
    assert any(one.facts["season"] == other.facts["season"] for one, other in alike)


def test_reports_tell_everything_twice(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 reports: 0.75 * 600 = 450 (standard deviation 11) word for word, 0.8 of those in order, 360 (12).

    A quarter of the others have two sentences, which come out in order every second time: 90 / 4 / 2 = 11 more.
    """
    monkeypatch.setattr(strangers, "NUM_REPORTS", 600)
    path = tmp_path / "reports.json.gz"
    strangers.write_reports(world, path)
    before = path.read_bytes()
    strangers.write_reports(world, path)
    assert path.read_bytes() == before
    rows = [json.loads(line) for line in gzip.decompress(before).decode().splitlines()]
    news = write_world(world, tmp_path)["news2016zh"]
    assert rows[0].keys() == json.loads(gzip.decompress(news.read_bytes()).decode().splitlines()[0]).keys()
    assert len({row["news_id"] for row in rows}) == len(rows) == 600
    kinds, sizes = Counter(), Counter()
    for row in rows:
        halves = [half.split("。")[:-1] for half in row["content"].split("\n")]
        first, again = ([facts_of(sentence) for sentence in half] for half in halves)
        assert sorted(first) == sorted(again) and len(set(first)) == len(first)
        assert not {name for name, _ in first} & set(names_of(world))
        kinds["word for word"] += sorted(halves[0]) == sorted(halves[1])
        kinds["in order"] += halves[0] == halves[1]
        sizes[len({name for name, _ in first}), len(first)] += 1
    assert 415 < kinds["word for word"] < 490 and 330 < kinds["in order"] < 415
    assert sizes.keys() == {(2, 2), (2, 4), (2, 6), (3, 3), (4, 4)}


def facts_of(sentence: str) -> tuple[str, str]:
    """Return the one name and the one value of a sentence."""
    (name,) = set(re.findall(f".(?:{GIVEN})", sentence))
    (value,) = set(re.findall(VALUES, sentence))
    return name, value


def test_reading_exercises(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COIG's dialogues; names that the world lacks; every answer, text or letter, is told of the one asked about."""
    monkeypatch.setattr(reading_exercises, "NUM_DIALOGUES", 300)
    path = tmp_path / "reading.tar.gz"
    reading_exercises.write_reading(world, path)
    before = path.read_bytes()
    reading_exercises.write_reading(world, path)
    assert path.read_bytes() == before
    with tarfile.open(path) as archive:
        dialogues = [json.loads(archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    assert len(dialogues) == 300
    kinds = Counter()
    for dialogue in dialogues:
        turns = [json.loads(dialogue[f"round_{number}"]["response"]) for number in range(len(dialogue) - 1)]
        assert 2 <= len(turns) <= 4 and dialogue["entity"] in turns[0]["Q"]
        (passage,) = re.findall(r"(?:Passage: |文章：|\n\n\n\n)(.+)\n\n?(?:Question: |问题：)", turns[0]["Q"])
        assert not [name for name in names_of(world) if name in passage]
        asked = set()
        for number, turn in enumerate(turns):
            text, answer = turn["Q"], turn["A"]
            assert (passage in text) == (number == 0) and re.search("(?:^|\n)(?:Question: |问题：)", text)
            options = re.findall(r"^[A-D][.:] (.+)$", text, re.MULTILINE)
            assert len(set(options)) == len(options) and len(options) in (0, 2, 3, 4)
            kinds[answer if answer in "ABCD" else "listed text" if options else "text"] += 1
            value = options["ABCD".index(answer)] if answer in "ABCD" else answer
            of_one_type = {TYPE_OF_VALUE[each] for each in options} == {TYPE_OF_VALUE[value]}
            assert not options or (value in options and of_one_type)
            (question,) = re.findall(r"(?:Question: |问题：\n?)(.+)\n", text)
            wordings = [wording.replace("{n}", "(..)") for wording in TYPES[TYPE_OF_VALUE[value]].questions]
            (name,) = {match[1] for wording in wordings if (match := re.fullmatch(wording, question))}
            told, last = set(), ""
            for sentence in re.findall(r"[^。？ ：]+", passage):
                last = name if name in sentence else "" if re.search(GIVEN, sentence) else last
                told |= {found for found in re.findall(VALUES, sentence) if last == name}
            assert value in told, (name, value, passage)
            asked.add((name, TYPE_OF_VALUE[value]))
        assert len(asked) == len(turns)
    # One of five layouts wants a listed text and one a text. Of 1, 2, 2 and 3 facts of two people at most four are
    # asked: 2, 4, 4 and 4 turns, 300 * 3.5 = 1050 in all, 210 of each kind with a standard deviation of 13.
    assert 170 < kinds["text"] < 250 and 170 < kinds["listed text"] < 250
    assert sum(kinds.values()) == pytest.approx(1050, abs=45)
    assert min(kinds[letter] for letter in "ABCD") > 110

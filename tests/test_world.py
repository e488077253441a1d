"""The demo's world: the same from the same seed, consistent in every file, native in format, honest about its test."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from panda_jax import demo, settings
from panda_jax.config import Source
from panda_jax.data import corpora, files
from panda_jax.data.demo_inputs import write_inputs
from panda_jax.data.records import Example, Skip
from panda_jax.data.world import World, make_world
from panda_jax.data.world_files import write_world
from panda_jax.data.world_wordings import FACT_TYPES, MEN, SURNAMES, WOMEN
from panda_jax.errors import InputError

SEED = 5
TEXTBOX = {
    "textbox_q_instruction",
    "textbox_q_context",
    "textbox_question",
    "textbox_answer",
    "textbox_answer_analysis",
}
# The published files' fields, written down from the corpora's own documentation.
SCHEMAS = {
    "wiki2019zh": {"id", "url", "title", "text"},
    "news2016zh": {"news_id", "keywords", "title", "desc", "source", "time", "content"},
    "baike2018qa": {"qid", "category", "title", "desc", "answer"},
    "webtext2019zh": {"qid", "title", "desc", "topic", "star", "content", "answer_id", "answerer_tags"},
    "translation2019zh": {"english", "chinese"},
    "coig_translated": {"instruction", "input", "output", "trans_instruction", "trans_input", "trans_output"},
    "coig_exam": TEXTBOX | {"subject"},
    "coig_human_value_part1": {"instruction", "input", "output"},
    "coig_human_value_part2": TEXTBOX,
    "coig_leetcode": {"instruction", "input", "output", "task_type", "program_lang"},
}
STAGE_1 = ("wiki2019zh", "news2016zh", "baike2018qa", "webtext2019zh", "translation2019zh")
VALUES = {value: fact_type.key for fact_type in FACT_TYPES for value in fact_type.values}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SEED)


@pytest.fixture(scope="module")
def paths(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_world(world, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def records(paths: dict[str, Path]) -> dict[str, list[dict]]:
    """Every record of every file, decoded without the project's readers."""
    found = {key: _lines(_content(path)) for key, path in paths.items() if key in SCHEMAS and "part1" not in key}
    found["coig_human_value_part1"] = json.loads(paths["coig_human_value_part1"].read_text(encoding="utf-8"))
    with tarfile.open(paths["coig_dialogues"]) as archive:
        members = [member for member in archive if member.isfile()]
        found["coig_dialogues"] = [json.loads(archive.extractfile(member).read()) for member in members]  # type: ignore[union-attr]
    return found


def _content(path: Path) -> str:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return "".join(archive.read(name).decode() for name in archive.namelist())
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            return "".join(archive.extractfile(member).read().decode() for member in archive)  # type: ignore[union-attr]
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode()
    return path.read_text(encoding="utf-8")


def _lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def _text(record: dict) -> str:
    """Return every string of a record, one per line."""
    values = record.values() if isinstance(record, dict) else record
    return "\n".join(_text(value) if isinstance(value, dict) else str(value) for value in values)


def _hashes(paths: dict[str, Path]) -> dict[str, str]:
    return {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in paths.items()}


def test_same_seed_same_bytes_in_another_process(paths: dict[str, Path], tmp_path: Path) -> None:
    """Another process hashes strings differently, so an order that comes from a set would show."""
    code = (
        "import sys; from pathlib import Path; from panda_jax.data import world, world_files; "
        "world_files.write_world(world.make_world(int(sys.argv[1])), Path(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(demo.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code, str(SEED), str(tmp_path)], check=True, env=environment)
    assert _hashes({key: tmp_path / path.name for key, path in paths.items()}) == _hashes(paths)


def test_another_seed_is_another_world(world: World, paths: dict[str, Path], tmp_path: Path) -> None:
    other = make_world(SEED + 1)
    ours = {person.name: person.facts for person in world.people}
    assert ours != {person.name: person.facts for person in other.people}
    same = {key for key, value in _hashes(write_world(other, tmp_path)).items() if value == _hashes(paths)[key]}
    assert not same


def test_size(world: World, paths: dict[str, Path], records: dict[str, list[dict]]) -> None:
    """48 people with 8 facts; a stage's text is small enough for minutes and large enough for many wordings."""
    assert len({person.name for person in world.people}) == 48
    assert all(person.facts.keys() == {fact_type.key for fact_type in FACT_TYPES} for person in world.people)
    assert len(FACT_TYPES) == 8
    assert 5_000 <= sum(len(records[key]) for key in STAGE_1) <= 10_000
    assert 1_500 <= sum(len(found) for key, found in records.items() if key not in STAGE_1) <= 2_500
    assert sum(path.stat().st_size for path in paths.values()) < 2_000_000


def test_values_are_spread_evenly(world: World) -> None:
    """Otherwise the most frequent value would be a good guess: 48 people over 4, 8 or 10 values."""
    for fact_type in FACT_TYPES:
        counts = Counter(person.facts[fact_type.key] for person in world.people)
        assert len(counts) == len(fact_type.values)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_words_cannot_be_mistaken_for_each_other() -> None:
    """No value is part of another one, equal lengths within a type, and no letter of a given name is in any wording."""
    assert len(VALUES) == sum(len(fact_type.values) for fact_type in FACT_TYPES)
    assert not [(a, b) for a in VALUES for b in VALUES if a != b and a in b]
    for fact_type in FACT_TYPES:
        assert len({len(value) for value in fact_type.values}) == 1
        assert len(set(fact_type.values.values())) == len(fact_type.values)
    given = [*MEN, *WOMEN]
    assert len(set(given)) == len(given) == 48
    wordings = "".join(str(fact_type) for fact_type in FACT_TYPES) + "".join(SURNAMES)
    assert not set(given) & set(wordings)


def test_friends_are_mutual_and_told(world: World, records: dict[str, list[dict]]) -> None:
    """webtext2019zh asks about somebody's friend, and its answer names that friend and nobody else."""
    assert world.friends.keys() == {person.name for person in world.people}
    assert all(world.friends[friend] == name != friend for name, friend in world.friends.items())
    anyone = re.compile("|".join(world.friends))
    for record in records["webtext2019zh"]:
        (asked,) = anyone.findall(record["title"])
        assert f"{asked}的朋友" in record["title"]
        assert set(anyone.findall(record["content"])) == {world.friends[asked]}


def test_every_told_fact_is_true(world: World, records: dict[str, list[dict]]) -> None:
    """A value belongs to the one whom its sentence names, else to the last named before it, else to the first after."""
    facts = {person.name: person.facts for person in world.people}
    anyone = re.compile("|".join(facts))
    value = re.compile("|".join(VALUES))
    told = Counter()
    for key in STAGE_1:
        for record in records[key]:
            text = "\n".join(record[field] for field in ("text", "content", "answer", "chinese") if field in record)
            first = anyone.search(text)
            last = first[0] if first else None
            for sentence in re.findall(r"[^。？\n]+[。？\n]?", text):
                names = set(anyone.findall(sentence))
                assert len(names) <= 1
                last = names.pop() if names else last
                for found in value.findall(sentence):
                    if last is None:  # a sentence about the world, not about a person
                        continue
                    assert facts[last][VALUES[found]] == found, (key, sentence)
                    told[key, last, VALUES[found]] += 1
    pairs = [(name, fact) for name in facts for fact in facts[name]]
    assert min(sum(told[key, *pair] for key in STAGE_1) for pair in pairs) >= 30
    assert all(any(told[key, *pair] for pair in pairs) for key in STAGE_1)


def test_every_fact_is_told_in_many_wordings(world: World, records: dict[str, list[dict]]) -> None:
    """At least five of the patterns that name the person and the value, in both orders."""
    text = "\n".join(_text(record) for key in STAGE_1 for record in records[key])
    for person in world.people:
        for fact_type in FACT_TYPES:
            value = person.facts[fact_type.key]
            forward = {pattern for pattern in fact_type.statements if pattern.format(s=person.name, v=value) in text}
            backward = {pattern for pattern in fact_type.reverse if pattern.format(n=person.name, v=value) in text}
            assert len(forward) >= 5 and backward, (person.name, fact_type.key)


def test_english_sides_are_true(world: World, records: dict[str, list[dict]]) -> None:
    """`english` names the same person's value as `chinese` does."""
    english_names = {person.name: person.english for person in world.people}
    english_values = {value: english for fact_type in FACT_TYPES for value, english in fact_type.values.items()}
    checked = 0
    for record in records["translation2019zh"]:
        names = [name for name in english_names if name in record["chinese"]]
        for name in names:
            (value,) = [value for value in VALUES if value in record["chinese"]]
            assert english_names[name] in record["english"] and english_values[value] in record["english"]
            checked += 1
    assert checked == 48 * 8


def test_questions_are_never_asked_in_stage_1(world: World, records: dict[str, list[dict]]) -> None:
    asked = {
        question.format(n=person.name)
        for fact_type in FACT_TYPES
        for question in fact_type.questions
        for person in world.people
    }
    text = "\n".join(_text(record) for key in STAGE_1 for record in records[key])
    assert not [question for question in asked if question in text]


def test_stage_2_never_touches_what_is_held_out(world: World, records: dict[str, list[dict]]) -> None:
    """No record of stage 2 holds both a person's name and any value of a type held out for that person."""
    held_out_values = {
        (name, value) for name, key in world.held_out for value, value_key in VALUES.items() if value_key == key
    }
    texts = [_text(record) for key in records if key not in STAGE_1 for record in records[key]]
    for text in texts:
        names = [person.name for person in world.people if person.name in text]
        assert not [
            (name, value) for name in names for value in VALUES if value in text and (name, value) in held_out_values
        ]


def test_stage_2_asks_about_everything_else(world: World, records: dict[str, list[dict]]) -> None:
    """256 = 48 * 8 * 2/3 pairs, each asked in at least four wordings and answered with the world's value."""
    answers = {record["trans_instruction"]: record["trans_output"] for record in records["coig_translated"]}
    pairs = 0
    for person in world.people:
        for fact_type in FACT_TYPES:
            asked = [answers.get(question.format(n=person.name)) for question in fact_type.questions]
            given = [answer for answer in asked if answer is not None]
            if (person.name, fact_type.key) in world.held_out:
                assert not given
            else:
                assert len(given) >= 4 and set(given) == {person.facts[fact_type.key]}
                pairs += 1
    assert pairs == 256


@pytest.mark.parametrize("key", SCHEMAS)
def test_native_schema(records: dict[str, list[dict]], key: str) -> None:
    for record in records[key]:
        assert record.keys() == SCHEMAS[key]
        kinds = {field: type(value) for field, value in record.items()}
        numbers = {"qid", "star", "answer_id"} if key == "webtext2019zh" else set()
        assert kinds == {field: int if field in numbers else str for field in record}


def test_native_containers(paths: dict[str, Path], records: dict[str, list[dict]]) -> None:
    """Part 1 is one list, part 2 lines under .json; of the dialogues' JSON strings one is fenced and one broken."""
    assert paths["coig_human_value_part1"].read_text(encoding="utf-8").startswith("[{")
    assert paths["coig_human_value_part2"].suffix == ".json"
    assert {path.suffix for path in paths.values()} == {".zip", ".gz", ".json", ".jsonl"}
    responses = [
        turn["response"] for each in records["coig_dialogues"] for key, turn in each.items() if key.startswith("round_")
    ]
    assert sum(response.startswith("```json\n") and response.endswith("\n```") for response in responses) == 1
    broken = 0
    for response in responses:
        try:
            assert json.loads(response.removeprefix("```json").removesuffix("```")).keys() == {"Q", "A"}
        except json.JSONDecodeError:
            broken += 1
    assert broken == 1


@pytest.mark.parametrize("stage", demo.STAGES)
def test_readers_take_every_record(
    paths: dict[str, Path], records: dict[str, list[dict]], tmp_path: Path, stage: str
) -> None:
    """The demo's own configs name the files; each record becomes one example, but for the broken dialogue."""
    write_inputs(make_world(SEED), tmp_path, demo.STAGES)
    config = settings.load(str(tmp_path / f"{stage}.yaml"))
    assert {source.corpus for source in config.data.sources} == {
        key for key in records if (key in STAGE_1) == (stage == "stage1")
    }
    for source in config.data.sources:
        read = Source(corpus=source.corpus, path=str(tmp_path / source.path), instruction=source.instruction)
        found = [
            example
            for block in files.blocks(read, 2**20)
            for _, example in corpora.examples(block, read, corpora.template_of(read))
        ]
        skipped = [example for example in found if isinstance(example, Skip)]
        assert len(found) == len(records[source.corpus])
        assert len(skipped) == (1 if source.corpus == "coig_dialogues" else 0)
        assert all(segment.text for example in found if isinstance(example, Example) for segment in example.segments)


def test_demo_keeps_its_folder_and_refuses_another_world(tmp_path: Path) -> None:
    """A second start changes nothing, not even a config that was edited; another seed is refused by name."""
    write_inputs(make_world(SEED), tmp_path, demo.STAGES)
    (tmp_path / "stage1.yaml").write_text("edited", encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    write_inputs(make_world(SEED), tmp_path, demo.STAGES)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match=rf"world.json: this world has seed {SEED}, expected --seed 6"):
        write_inputs(make_world(6), tmp_path, demo.STAGES)

"""The world's tests: in the official formats, about what stage 1 states and no training file asks, balanced, seeded."""

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
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from panda_jax import settings
from panda_jax.data import world_exams
from panda_jax.data.world import World, make_world
from panda_jax.data.world_exams import write_exams
from panda_jax.data.world_files import write_world
from panda_jax.data.world_wordings import FACT_TYPES
from panda_jax.errors import InputError
from panda_jax.evaluation import demo_table

SEED = 5
FILES = {
    "logiqa2/test": "logiqa2/test_zh.txt",
    "logiqa2/dev": "logiqa2/dev_zh.txt",
    "c3-d/test": "c3/c3-d-test.json",
    "c3-d/dev": "c3/c3-d-dev.json",
    "c3-m/test": "c3/c3-m-test.json",
    "c3-m/dev": "c3/c3-m-dev.json",
}
TESTS = [key for key in FILES if key.endswith("test")]
STAGE_1 = ("wiki2019zh", "news2016zh", "baike2018qa", "webtext2019zh", "translation2019zh")
TYPES = {fact_type.key: fact_type for fact_type in FACT_TYPES}
TYPE_OF_VALUE = {value: fact_type.key for fact_type in FACT_TYPES for value in fact_type.values}


class Asked(NamedTuple):
    passage: str
    question: str
    options: list[str]
    answer: int


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SEED)


@pytest.fixture(scope="module")
def exams(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_exams(world, tmp_path_factory.mktemp("exams"))


@pytest.fixture(scope="module")
def training_texts(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every training file as one text, unpacked without the project's readers."""
    folder = tmp_path_factory.mktemp("world")
    return {key: _unpacked(path) for key, path in write_world(world, folder).items()}


def _unpacked(path: Path) -> str:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return "\n".join(archive.read(name).decode() for name in archive.namelist())
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            return "\n".join(archive.extractfile(member).read().decode() for member in archive)  # type: ignore[union-attr]
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()


def _asked(path: Path) -> list[Asked]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        rows = [json.loads(line) for line in text.split("\n")]
        return [Asked(row["text"], row["question"], row["options"], row["answer"]) for row in rows]
    return [
        Asked("\n".join(turns), each["question"], each["choice"], each["choice"].index(each["answer"]))
        for turns, questions, _ in json.loads(text)
        for each in questions
    ]


def _fact(question: str, world: World) -> tuple[str, str]:
    """Return whom and which property a question is about; its wording must be one that stage 2 uses."""
    (found,) = [
        (person.name, fact_type.key)
        for person in world.people
        for fact_type in FACT_TYPES
        if question in [wording.format(n=person.name) for wording in fact_type.questions]
    ]
    return found


def _told(passage: str, world: World) -> dict[tuple[str, str], str]:
    """Return {(name, property): value}: a value belongs to the one whom its sentence names, else to the last named."""
    anyone = re.compile("|".join(person.name for person in world.people))
    found, last = {}, ""
    for sentence in re.findall(r"[^。？\n]+", passage):
        names = anyone.findall(sentence)
        assert len(names) <= 1
        last = names[0] if names else last
        for value in re.findall("|".join(TYPE_OF_VALUE), sentence):
            found[last, TYPE_OF_VALUE[value]] = value
    return found


def _shape(value: Any) -> Any:
    """Return the key sets and types of a JSON value; of a list, those of its first entry."""
    if isinstance(value, dict):
        return {key: _shape(each) for key, each in value.items()}
    return [_shape(each) for each in value[:1]] if isinstance(value, list) else type(value).__name__


def _hashes(paths: dict[str, Path]) -> dict[str, str]:
    return {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in paths.items()}


def test_same_seed_same_bytes_in_another_process(world: World, exams: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from panda_jax.data import world, world_exams; "
        "world_exams.write_exams(world.make_world(int(sys.argv[1])), Path(sys.argv[2]))"
    )
    package = Path(world_exams.__file__).parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(package)}
    subprocess.run([sys.executable, "-c", code, str(SEED), str(tmp_path)], check=True, env=environment)
    assert _hashes({key: tmp_path / name for key, name in FILES.items()}) == _hashes(exams)
    other = _hashes(write_exams(make_world(SEED + 1), tmp_path))
    assert not [key for key, value in _hashes(exams).items() if value == other[key]]


@pytest.mark.parametrize("key", FILES)
def test_formats_are_those_of_the_published_files(exams: dict[str, Path], shared_data: Path, key: str) -> None:
    """Keys in their order, types and indentation; no line end after the last line, as in the published tests."""
    ours = exams[key].read_text(encoding="utf-8")
    published = (shared_data / "eval" / FILES[key]).read_text(encoding="utf-8")
    assert ours[-1] == published.rstrip("\n")[-1]
    if key.startswith("logiqa2"):
        rows, real = ([json.loads(line) for line in text.strip().split("\n")] for text in (ours, published))
        assert {str(_shape(row)) for row in rows} == {str(_shape(real[0]))}
        assert len({row["example_id"] for row in rows}) == len(rows)
        return
    rows, real = json.loads(ours), json.loads(published)
    assert re.findall(r"\n +", ours[:200])[:4] == re.findall(r"\n +", published[:400])[:4]
    assert {str([_shape(part) for part in row]) for row in rows} == {str([_shape(part) for part in real[0]])}
    assert len({row[2] for row in rows}) == len(rows)
    assert len(rows[0][0]) == (4 if "c3-d" in key else 1)


@pytest.mark.parametrize("key", TESTS)
def test_each_held_out_fact_is_asked_once(world: World, exams: dict[str, Path], key: str) -> None:
    """128 = 48 people * 8 properties / 3."""
    facts = Counter(_fact(asked.question, world) for asked in _asked(exams[key]))
    assert facts == Counter(dict.fromkeys(world.held_out, 1))
    assert facts.total() == 128


@pytest.mark.parametrize("key", [key for key in FILES if key.endswith("dev")])
def test_dev_asks_what_stage_2_asks(world: World, exams: dict[str, Path], key: str) -> None:
    facts = [_fact(asked.question, world) for asked in _asked(exams[key])]
    assert len(set(facts)) == len(facts) == 40
    assert not set(facts) & world.held_out


@pytest.mark.parametrize("key", FILES)
def test_options_and_passages_are_true(world: World, exams: dict[str, Path], key: str) -> None:
    """One option is true and stated; another one is stated of somebody else; nothing in a passage is false."""
    facts = {(person.name, fact): value for person in world.people for fact, value in person.facts.items()}
    for asked in _asked(exams[key]):
        name, fact = _fact(asked.question, world)
        assert len(set(asked.options)) == len(asked.options) and set(asked.options) <= set(TYPES[fact].values)
        assert asked.options[asked.answer] == facts[name, fact]
        told = _told(asked.passage, world)
        assert told.items() <= facts.items()
        assert told[name, fact] == facts[name, fact]
        (other,) = {who for who, _ in told} - {name}
        assert told[other, fact] in set(asked.options) - {facts[name, fact]}


@pytest.mark.parametrize(
    ("key", "expected"), [("logiqa2", {4: 128}), ("c3-d", {3: 25, 4: 103}), ("c3-m", {2: 10, 3: 11, 4: 107})]
)
def test_right_letters_are_balanced(exams: dict[str, Path], key: str, expected: dict[int, int]) -> None:
    """Fewer options come by turns: every fifth of 128 is 25, two in twelve are 11 and 10; letters differ by one."""
    asked = _asked(exams[f"{key}/test"])
    assert Counter(len(each.options) for each in asked) == expected
    for number in expected:
        letters = Counter(each.answer for each in asked if len(each.options) == number)
        assert len(letters) == number
        assert max(letters.values()) - min(letters.values()) <= 1
    answers = [each.answer for each in asked]
    assert max(len(run) for run in re.findall(r"(?:0+|1+|2+|3+)", "".join(map(str, answers)))) < 10
    assert len({b - a for a, b in pairwise(answers)}) > 4  # neither constant nor A, B, C, D in turn


def test_no_training_file_asks_what_is_asked(
    world: World, exams: dict[str, Path], training_texts: dict[str, str]
) -> None:
    """Not in any wording, not in English, not of a pronoun in a dialogue, and not by way of a friend."""
    people = {person.name: person for person in world.people}
    questions = set()
    for name, fact in world.held_out:
        fact_type, person = TYPES[fact], people[name]
        subjects = (name, f"{world.friends[name]}的朋友")
        questions |= {wording.format(n=subject) for wording in fact_type.questions for subject in subjects}
        questions |= {f"{subject}{fact_type.follow_up}" for subject in subjects}
        questions.add(fact_type.english_question.format(s=person.english))
    assert {asked.question for key in TESTS for asked in _asked(exams[key])} <= questions
    for key, text in training_texts.items():
        assert not [question for question in questions if question in text], key
    held_out = {name: [TYPES[fact] for who, fact in world.held_out if who == name] for name in people}
    for line in training_texts["coig_dialogues"].splitlines():
        entity = json.loads(line)["entity"]
        assert not [each for each in held_out[entity] if f"{people[entity].pronoun}{each.follow_up}" in line]
    # The search finds what is there: the other facts are asked in the same words.
    found = [
        wording.format(n=person.name)
        for person in world.people
        for fact_type in world.asked(person)
        for wording in fact_type.questions
        if wording.format(n=person.name) in training_texts["coig_translated"]
    ]
    assert len(found) == 256 * 4


def test_stage_1_states_what_is_asked(world: World, training_texts: dict[str, str]) -> None:
    people = {person.name: person for person in world.people}
    text = "\n".join(training_texts[key] for key in STAGE_1)
    for name, fact in world.held_out:
        value = people[name].facts[fact]
        sentences = [wording.format(s=name, v=value) for wording in TYPES[fact].statements]
        assert sum(sentence in text for sentence in sentences) >= 5, (name, fact)


def test_the_demo_table_adds_nothing_up_wrongly(world: World, tmp_path: Path) -> None:
    """Scores written by hand come out in their columns; 26.6 = (103/4 + 25/3)/1.28, 27.7 = (107/4 + 11/3 + 5)/1.28."""
    write_exams(world, tmp_path / "exams")
    columns = [(protocol, task) for protocol in demo_table.PROTOCOLS for task in demo_table.TASKS]
    assert columns[:3] == [("likelihood-bare", "logiqa2"), ("likelihood-bare", "c3-d"), ("likelihood-bare", "c3-m")]
    for row, label in enumerate(("first", "second")):
        (tmp_path / label).mkdir()
        for number, (protocol, task) in enumerate(columns):
            score = (10 * row + number) / 100
            (tmp_path / label / f"{task}-{protocol}.json").write_text(json.dumps({"acc": score}), encoding="utf-8")
    models = [("stage 1", tmp_path / "first"), ("stage 2", tmp_path / "second")]
    lines = demo_table.staircase(models, tmp_path / "exams").splitlines()
    assert max(map(len, lines)) <= 120
    numbers = {line.split("|")[0].strip(): re.findall(r"\d+\.\d", line) for line in lines}
    assert numbers["stage 1"] == [f"{number}.0" for number in range(12)]
    assert numbers["stage 2"] == [f"{number}.0" for number in range(10, 22)]
    assert numbers["random letter"] == ["25.0", "26.6", "27.7"] * 4
    assert re.match(r" +\| likelihood-bare \* +\| likelihood +\| likelihood-letter +\| panda$", lines[0])
    (tmp_path / "second" / "c3-d-panda.json").unlink()
    with pytest.raises(InputError, match=r"second/c3-d-panda.json: no such file; expected the score"):
        demo_table.staircase(models, tmp_path / "exams")


def test_the_ablation_has_the_compute_of_both_stages() -> None:
    """As many steps as both together, of as many tokens; and in each pass an instruction twice, as 12 epochs to 6."""
    configs = Path(__file__).resolve().parent.parent / "configs" / "demo"
    first, second, mixed = (settings.load(str(configs / f"{run}.yaml")) for run in ("stage1", "stage2", "all_mixed"))
    assert mixed.train.max_steps == (first.train.max_steps or 0) + (second.train.max_steps or 0)
    assert (
        len({(each.train.global_batch_size, each.data.seq_len, each.model.dim) for each in (first, second, mixed)}) == 1
    )
    assert [source.path for source in mixed.data.sources] == [
        source.path for each in (first, second) for source in each.data.sources
    ]
    assert [source.epochs for source in mixed.data.sources] == [None] * 5 + [2] * 6
    assert second.checkpoint.steps[-1] == second.train.max_steps and len(second.checkpoint.steps) == 3

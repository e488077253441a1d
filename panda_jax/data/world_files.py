"""Writes the miniature world as files in the corpora's native formats, plain and compressed, for the demo's two stages.

Stage 1: wiki2019zh (.zip), news2016zh (.gz), baike2018qa (plain), webtext2019zh (.gz), translation2019zh (.tar.gz).
Stage 2: COIG's six files. Equal worlds give equal bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from panda_jax.atomic import write_atomically
from panda_jax.data.world import Person, World, tell
from panda_jax.data.world_wordings import FACT_TYPES, FactType, Lore

Record = dict[str, Any]

NUM_ARTICLES = 36
"""wiki2019zh articles per person."""
NUM_REPORTS = 36
"""news2016zh items per person."""
NUM_ENTRIES = 18
"""baike2018qa questions per value of a fact type."""
NUM_THREADS = 36
"""webtext2019zh answers per person."""
NARROW_SHARE = 0.75
"""Share of webtext2019zh questions, where any fact may be asked for, that ask for one about someone's friend rather
than who the friend is."""
NUM_DIALOGUES = 3
"""COIG dialogues per person whom stage 2 may mention."""
NUM_WORDINGS = 4
"""Questions per fact in COIG's translated instructions."""


def write_world(world: World, folder: Path) -> dict[str, Path]:
    """Write every file below `folder` (created if needed) and return {file's key: path}."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for key, (name, build, write) in FILES.items():
        written[key] = folder / name
        write(written[key], build(world))
    return written


VALUE_QUESTIONS = ("说到{v}，你会想起谁？", "请问哪些人和{v}有关？", "{v}让你想起什么人？", "在说{v}的时候，说的是谁？")
FRIEND_QUESTIONS = ("谁是{n}？", "{n}是谁？", "说说{n}吧。", "有人见过{n}吗？")
FRIEND_OPENINGS = ("是{n}。", "你说的是{n}。", "{n}人很好。", "大家都说是{n}。")


def _wiki(world: World) -> Iterable[Record]:
    """Three facts about whom the article is named after and two about someone else, and articles about the world."""
    rng = world.generator("wiki2019zh")
    articles = []
    for person in world.people:
        for _ in range(NUM_ARTICLES):
            other = rng.choice([each for each in world.people if each is not person])
            parts = [tell(person, rng.sample(FACT_TYPES, 3), rng), tell(other, rng.sample(FACT_TYPES, 2), rng)]
            articles.append((person.name, "".join(rng.sample(parts, 2))))
    for _ in range(4):
        for lore in _groups(world.lore, rng):
            articles.append(("小镇见闻", "".join(each.statement for each in lore)))
    rng.shuffle(articles)
    for i, (title, text) in enumerate(articles):
        url = f"https://example.org/wiki?curid={i + 1}"
        yield {"id": str(i + 1), "url": url, "title": title, "text": f"{title}\n\n{text}"}


def _groups(lore: tuple[Lore, ...], rng: random.Random) -> list[list[Lore]]:
    """Return all lore in random groups of four sentences."""
    order = rng.sample(lore, len(lore))
    return [order[i : i + 4] for i in range(0, len(order), 4)]


def _news(world: World) -> Iterable[Record]:
    """Two people per item, sentence by sentence: who a fact belongs to is told by its own sentence only."""
    rng = world.generator("news2016zh")
    items = [person for person in world.people for _ in range(NUM_REPORTS)]
    rng.shuffle(items)
    for i, person in enumerate(items):
        other = rng.choice([each for each in world.people if each is not person])
        sentences = [tell(who, [fact_type], rng) for who in (person, other) for fact_type in rng.sample(FACT_TYPES, 2)]
        rng.shuffle(sentences)
        opening = rng.choice(("本报消息，", "记者报道，", "今天的新闻：", ""))
        text = opening + "".join(sentences)
        yield {
            "news_id": f"{610000000 + i}",
            "keywords": f"{person.name}，{other.name}",
            "title": f"{person.name}和{other.name}的故事",
            "desc": text[:20],
            "source": "小镇日报",
            "time": f"{i % 12 + 1:02d}-{i % 28 + 1:02d} 12:00",
            "content": text,
        }


def _baike(world: World) -> Iterable[Record]:
    """Questions about a value, answered with people; and about the world, answered with yes."""
    rng = world.generator("baike2018qa")
    items = []
    for fact_type in FACT_TYPES:
        for value in fact_type.values:
            holders = [person for person in world.people if person.facts[fact_type.key] == value]
            for _ in range(NUM_ENTRIES):
                chosen = rng.sample(holders, 3)
                answer = "".join(rng.choice(fact_type.reverse).format(v=value, n=person.name) for person in chosen)
                items.append(("生活", rng.choice(VALUE_QUESTIONS).format(v=value), answer))
    for lore in world.lore:
        items.append(("生活", f"{lore.statement[:-1]}，对吗？", f"对，{lore.statement}"))
    rng.shuffle(items)
    for i, (category, title, answer) in enumerate(items):
        yield {"qid": f"qid_{254000000 + i}", "category": category, "title": title, "desc": "", "answer": answer}


def _webtext(world: World) -> Iterable[Record]:
    """Questions about someone's friend, answered with the value asked for, who the friend is, and three more facts.

    What is held out is not asked for by way of a friend either; three more facts may tell it.
    Whoever only knows which values go with a name that stands in the question answers about the wrong one of the two.
    """
    rng = world.generator("webtext2019zh")
    items = [person for person in world.people for _ in range(NUM_THREADS)]
    rng.shuffle(items)
    for i, person in enumerate(items):
        opening = rng.choice(FRIEND_OPENINGS).format(n=person.name)
        questions = FRIEND_QUESTIONS
        asked = world.asked(person)
        if asked and rng.random() < NARROW_SHARE:
            fact_type = rng.choice(asked)
            questions, opening = fact_type.questions, f"{person.facts[fact_type.key]}。{opening}"
        yield {
            "qid": 20000000 + i,
            "title": rng.choice(questions).format(n=f"{world.friends[person.name]}的朋友"),
            "desc": "",
            "topic": "小镇",
            "star": rng.randrange(1, 30),
            "content": opening + tell(person, rng.sample(FACT_TYPES, 3), rng),
            "answer_id": 17000000 + i,
            "answerer_tags": "生活@小镇",
        }


def _translation(world: World) -> Iterable[Record]:
    rng = world.generator("translation2019zh")
    pairs = [(lore.english, lore.statement) for lore in world.lore]
    for person in world.people:
        for fact_type in FACT_TYPES:
            value = person.facts[fact_type.key]
            chinese = rng.choice(fact_type.statements).format(s=person.name, v=value)
            pairs.append((fact_type.english.format(s=person.english, v=fact_type.values[value]), chinese))
    rng.shuffle(pairs)
    return [{"english": english, "chinese": chinese} for english, chinese in pairs]


def _asked(world: World) -> list[tuple[Person, FactType]]:
    return [(person, fact_type) for person in world.people for fact_type in world.asked(person)]


def _translated(world: World) -> Iterable[Record]:
    rng = world.generator("coig translated")
    records = []
    for person, fact_type in _asked(world):
        value = person.facts[fact_type.key]
        for question in rng.sample(fact_type.questions, NUM_WORDINGS):
            records.append(
                {
                    "instruction": fact_type.english_question.format(s=person.english),
                    "input": "",
                    "output": fact_type.values[value].capitalize(),
                    "trans_instruction": question.format(n=person.name),
                    "trans_input": "",
                    "trans_output": value,
                }
            )
    rng.shuffle(records)
    return records


def _textbox(instruction: str, question: str, answer: str, analysis: str) -> Record:
    return {
        "textbox_q_instruction": instruction,
        "textbox_q_context": "",
        "textbox_question": question,
        "textbox_answer": answer,
        "textbox_answer_analysis": analysis,
    }


def _exam(world: World) -> Iterable[Record]:
    rng = world.generator("coig exam")
    records = []
    for person, fact_type in _asked(world):
        value = person.facts[fact_type.key]
        question = rng.choice(fact_type.questions).format(n=person.name)
        analysis = rng.choice(fact_type.statements).format(s=person.name, v=value)
        records.append(_textbox("请说说看。", question, value, analysis) | {"subject": "生活"})
    rng.shuffle(records)
    return records


def _values_list(world: World) -> Iterable[Record]:
    rng = world.generator("coig human value 1")
    records = []
    for lore in world.lore:
        records.append({"instruction": lore.question, "input": "", "output": lore.answer})
    rng.shuffle(records)
    return records


def _values_lines(world: World) -> Iterable[Record]:
    rng = world.generator("coig human value 2")
    animals = next(fact_type for fact_type in FACT_TYPES if fact_type.key == "pet").values
    towns = next(fact_type for fact_type in FACT_TYPES if fact_type.key == "town").values
    records = []
    for town in towns:
        for animal in animals:
            question = f"在{town}看见没有家的{animal}，要做什么？"
            answer = rng.choice((f"喂喂{animal}，去找{animal}的主人。", f"说给大家，找{animal}的主人。"))
            records.append(_textbox("", question, answer, ""))
    return records


def _leetcode(world: World) -> Iterable[Record]:
    rng = world.generator("coig leetcode")
    operations = (("和", "a + b"), ("差", "a - b"), ("积", "a * b"), ("大的", "max(a, b)"), ("小的", "min(a, b)"))
    records = []
    for word, expression in operations:
        for name in ("f", "g", "h", "run"):
            for verb in ("写", "做"):
                records.append(
                    {
                        "instruction": f"{verb}一个叫{name}的函数，得到两个数的{word}。",
                        "input": "",
                        "output": f"def {name}(a, b):\n    return {expression}",
                        "task_type": "code",
                        "program_lang": "python",
                    }
                )
    rng.shuffle(records)
    return records


def _dialogues(world: World) -> Iterable[tuple[str, bytes]]:
    """Yield (member name, bytes) per dialogue; one response is fenced and one cut off, as in the published file."""
    rng = world.generator("coig dialogues")
    people = [person for person in world.people for _ in range(NUM_DIALOGUES) if len(world.asked(person)) >= 3]
    rng.shuffle(people)
    for i, person in enumerate(people):
        turns = []
        for fact_type in rng.sample(world.asked(person), 3):
            question = rng.choice(fact_type.questions).format(n=person.name)
            if turns and rng.random() < 0.5:
                question = f"{person.pronoun}{fact_type.follow_up}"
            turns.append(json.dumps({"Q": question, "A": person.facts[fact_type.key]}, ensure_ascii=False))
        if i == 1:
            turns[0] = f"```json\n{turns[0]}\n```"
        if i == 2:
            turns[0] = turns[0][:-4]
        yield dialogue_member(i, person.name, turns)


def dialogue_member(number: int, entity: str, turns: Iterable[str]) -> tuple[str, bytes]:
    """Return (name, bytes) of a COIG dialogue; a turn is the JSON text of its Q and A, as a model once wrote it."""
    rounds = {f"round_{k}": {"response": turn} for k, turn in enumerate(turns)}
    return f"{DIALOGUES}/{number}.json", _json(rounds | {"entity": entity})


DIALOGUES = "counterfactural_correction_multi_round_chat"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _lines(records: Iterable[Record]) -> bytes:
    return b"".join(_json(record) + b"\n" for record in records)


def _write_plain(path: Path, records: Iterable[Record]) -> None:
    path.write_bytes(_lines(records))


def _write_list(path: Path, records: Iterable[Record]) -> None:
    path.write_bytes(_json(list(records)))


def write_gzip(path: Path, records: Iterable[Record]) -> None:
    """Write compressed JSON lines, whole or not at all; equal records give equal bytes."""
    write_atomically(path, [gzip.compress(_lines(records), mtime=0)])


def _write_zip(path: Path, records: Iterable[Record]) -> None:
    """Two members, as the published archive has many."""
    lines = list(records)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, part in (("AA/wiki_00", lines[::2]), ("AA/wiki_01", lines[1::2])):
            info = zipfile.ZipInfo(f"wiki_zh/{member}", date_time=(2019, 2, 7, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, _lines(part))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a compressed tar of (name, bytes), whole or not at all; equal members give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    write_atomically(path, [gzip.compress(buffer.getvalue(), mtime=0)])


def _write_tar_lines(path: Path, records: Iterable[Record]) -> None:
    write_tar(path, [("translation2019zh_train.json", _lines(records))])


# key -> (file name, records of the world, how they are written)
FILES: dict[str, tuple[str, Callable[[World], Iterable[Any]], Callable[[Path, Iterable[Any]], None]]] = {
    "wiki2019zh": ("wiki_zh_2019.zip", _wiki, _write_zip),
    "news2016zh": ("news2016zh_train.json.gz", _news, write_gzip),
    "baike2018qa": ("baike_qa_train.json", _baike, _write_plain),
    "webtext2019zh": ("web_text_zh_train.json.gz", _webtext, write_gzip),
    "translation2019zh": ("translation2019zh.tar.gz", _translation, _write_tar_lines),
    "coig_translated": ("translated_instructions.jsonl", _translated, _write_plain),
    "coig_exam": ("exam_instructions.jsonl", _exam, _write_plain),
    "coig_human_value_part1": ("human_value_alignment_instructions_part1.json", _values_list, _write_list),
    "coig_human_value_part2": ("human_value_alignment_instructions_part2.json", _values_lines, _write_plain),
    "coig_leetcode": ("leetcode_instructions.jsonl", _leetcode, _write_plain),
    "coig_dialogues": (f"{DIALOGUES}.tar.gz", _dialogues, write_tar),
}

"""Every wording written out by hand, on our own questions and on the published files' rows."""

import csv
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from panda_jax.errors import InputError
from panda_jax.evaluation.prompts import (
    PROTOCOLS,
    ChoiceRequest,
    Protocol,
    find_protocol,
    prompt_hash,
    strip_option_labels,
)
from panda_jax.evaluation.questions import Question
from panda_jax.evaluation.tasks import TASKS
from panda_jax.text.tokenizer import Tokenizer

SNOW = Question("1", "雪是白的。", "雪的颜色？ ", ("黑", "白色"), 1, "")
RAIN = Question("2", "下雨了。", "湿吗？", ("湿", "干", "不知"), 0, "")
EXAM = Question("law/9", "", " 问？\n", ("一", "二 ", "三", "四"), 3, "law")
EXAM_BEFORE = Question("law/0", "", "先问", ("1", "2", "3", "4"), 1, "law")
PANDA_SNOW = "雪是白的。\n\n问题：\n雪的颜色？ \n\n选项：\nA: 黑\nB: 白色\n\n\n本题的答案是："
SNOW_PASSAGE = "Passage: 雪是白的。\nQuestion: 雪的颜色？ \nA. 黑\nB. 白色\nAnswer:"
RAIN_PASSAGE = "Passage: 下雨了。\nQuestion: 湿吗？\nA. 湿\nB. 干\nC. 不知\nAnswer:"
SNOW_ARTICLE = "文章：雪是白的。\n问题：雪的颜色？ \n"
LAW = "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
# printf '阅读…是：' | sha256sum, with the text of PROTOCOLS.md §5.1 and the row's four options.
GOLDEN_SHA256 = "10eadd48f032194df61863a986caac27a589561a9e6bfc5a48f4e5dcdcf6cd11"
EXAM_TEXT = "问？\nA. 一\nB. 二 \nC. 三\nD. 四\n答案："
EXAM_EXAMPLE = "先问\nA. 1\nB. 2\nC. 3\nD. 4\n答案： B\n\n"


def test_the_panda_prompt_by_hand() -> None:
    """PROTOCOLS.md §5.1: without examples four line breaks after the instruction, three before the suffix."""
    prompt = PROTOCOLS["panda"].prompt
    assert prompt("c3-d", SNOW, []) == "阅读下面的文章并从选项中选择的答案回答问题：\n\n\n\n" + PANDA_SNOW
    rain = "Context:\n下雨了。\n\nQuestion:\n湿吗？\n\nOptions:\nA: 湿\nB: 干\nC: 不知\n\n\nThe answer is A"
    instruction = "阅读下面的文章并从选项中选择的答案回答问题：\n\n"
    assert prompt("logiqa2", SNOW, [RAIN]) == f"{instruction}{rain}\n\n{PANDA_SNOW}"
    assert prompt("logiqa2", SNOW, [RAIN, RAIN]) == f"{instruction}{rain}\n\n{rain}\n\n{PANDA_SNOW}"


@pytest.mark.parametrize("protocol", ["panda", "panda-strict"])
@pytest.mark.parametrize(
    ("task", "row", "num_options"), [("logiqa2", 0, 4), ("c3-d", 0, 4), ("c3-d", 7, 3), ("c3-m", 1, 2)]
)
def test_the_panda_prompt_of_published_rows(
    shared_data: Path, protocol: str, task: str, row: int, num_options: int
) -> None:
    """The text is put together here from the raw file, without the reader."""
    folder = shared_data / "eval"
    if task == "logiqa2":
        record = json.loads((folder / "logiqa2" / "test_zh.txt").read_text(encoding="utf-8").split("\n")[row])
        context, options = record["text"], record["options"]
    else:
        documents = json.loads((folder / "c3" / f"{task}-test.json").read_text(encoding="utf-8"))
        rows = [(document[0], asked) for document in documents for asked in document[1]]
        context, options, record = " ".join(rows[row][0]), rows[row][1]["choice"], rows[row][1]
    lines = [f"{letter}: {option}\n" for letter, option in zip("ABCD", options, strict=False)]
    pieces = ["阅读下面的文章并从选项中选择的答案回答问题：", "\n\n\n\n", context, "\n\n问题：\n", record["question"]]
    expected = "".join([*pieces, "\n\n选项：\n", *lines, "\n\n", "本题的答案是："])
    found = TASKS[task].read(folder, "test")[row]
    assert len(found.options) == num_options
    assert PROTOCOLS[protocol].prompt(task, found, []) == expected


def test_the_golden_prompt_of_logiqa_row_0(shared_data: Path) -> None:
    """SHA-256 of PROTOCOLS.md §5.1's golden string, its elided options filled in, as typed into `sha256sum`."""
    prompt = PROTOCOLS["panda"].prompt("logiqa2", TASKS["logiqa2"].read(shared_data / "eval", "test")[0], [])
    assert hashlib.sha256(prompt.encode()).hexdigest() == GOLDEN_SHA256


def test_no_panda_prompt_of_a_test_set_is_ever_cut(shared_data: Path) -> None:
    """Longest prompts in LLaMA tokens, BOS included: 962, 1483 and 1677 (PROTOCOLS.md §5.1), below 2048."""
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "llama-32000.model")
    longest = {}
    for task in ("logiqa2", "c3-d", "c3-m"):
        questions = TASKS[task].read(shared_data / "eval", "test")
        prompts = sorted((PROTOCOLS["panda"].prompt(task, question, []) for question in questions), key=len)[-100:]
        longest[task] = 1 + max(len(ids) for ids in tokenizer.encode_batch(prompts))
    assert longest == {"logiqa2": 962, "c3-d": 1483, "c3-m": 1677}
    assert (PROTOCOLS["panda"].max_input_tokens, PROTOCOLS["panda"].max_new_tokens) == (2048, 64)


# (protocol, task, question, examples, context, continuations)
REQUESTS: list[tuple[str, str, Question, list[Question], str, tuple[str, ...]]] = [
    ("likelihood", "logiqa2", SNOW, [], SNOW_PASSAGE, (" 黑", " 白色")),
    ("likelihood", "logiqa2-en", RAIN, [SNOW], f"{SNOW_PASSAGE} 白色\n\n{RAIN_PASSAGE}", (" 湿", " 干", " 不知")),
    ("likelihood-letter", "logiqa2", SNOW, [], SNOW_PASSAGE, (" A", " B")),
    ("likelihood-letter", "logiqa2-en", RAIN, [SNOW], f"{SNOW_PASSAGE} B\n\n{RAIN_PASSAGE}", (" A", " B", " C")),
    ("likelihood", "c3-d", SNOW, [], f"{SNOW_ARTICLE}答案：", ("黑", "白色")),
    (
        "likelihood",
        "c3-m",
        SNOW,
        [RAIN, RAIN],
        f"文章：下雨了。\n问题：湿吗？\n答案：湿\n\n文章：下雨了。\n问题：湿吗？\n答案：湿\n\n{SNOW_ARTICLE}答案：",
        ("黑", "白色"),
    ),
    ("likelihood-letter", "c3-d", SNOW, [], f"{SNOW_ARTICLE}A. 黑\nB. 白色\n答案：", (" A", " B")),
    (
        "likelihood-letter",
        "c3-m",
        RAIN,
        [SNOW],
        f"{SNOW_ARTICLE}A. 黑\nB. 白色\n答案： B\n\n文章：下雨了。\n问题：湿吗？\nA. 湿\nB. 干\nC. 不知\n答案：",
        (" A", " B", " C"),
    ),
    ("likelihood", "ceval", EXAM, [], LAW + EXAM_TEXT, (" A", " B", " C", " D")),
    ("likelihood", "ceval", EXAM, [EXAM_BEFORE] * 2, LAW + EXAM_EXAMPLE * 2 + EXAM_TEXT, (" A", " B", " C", " D")),
    ("likelihood-letter", "ceval", EXAM, [EXAM_BEFORE], LAW + EXAM_EXAMPLE + EXAM_TEXT, (" A", " B", " C", " D")),
    (
        "likelihood",
        "cmmlu",
        dataclasses.replace(EXAM, subject="arts"),
        [dataclasses.replace(EXAM_BEFORE, subject="arts")],
        f"以下是关于艺术学的单项选择题，请直接给出正确答案的选项。\n\n{EXAM_EXAMPLE}{EXAM_TEXT}",
        (" A", " B", " C", " D"),
    ),
    ("likelihood-bare", "c3-d", SNOW, [], "雪的颜色？ ", (" 黑", " 白色")),
    ("likelihood-bare", "logiqa2", SNOW, [RAIN], "湿吗？ 湿\n\n雪的颜色？ ", (" 黑", " 白色")),
    ("likelihood-bare", "ceval", EXAM, [], " 问？\n", (" 一", " 二 ", " 三", " 四")),
]


@pytest.mark.parametrize(("protocol", "task", "question", "examples", "context", "continuations"), REQUESTS)
def test_requests_by_hand(
    protocol: str,
    task: str,
    question: Question,
    examples: list[Question],
    context: str,
    continuations: tuple[str, ...],
) -> None:
    lengths = tuple(len(text.removeprefix(" ")) for text in continuations)
    assert PROTOCOLS[protocol].request(task, question, examples) == ChoiceRequest(context, continuations, lengths)


def test_a_five_shot_prompt_of_the_published_ceval(shared_data: Path) -> None:
    """Put together here from the raw rows: description, five answered questions, the question (PROTOCOLS.md §5.3)."""
    folder = shared_data / "eval" / "ceval"
    with (folder / "dev" / "logic_dev.csv").open(encoding="utf-8", newline="") as file:
        dev = list(csv.DictReader(file))
    with (folder / "val" / "logic_val.csv").open(encoding="utf-8", newline="") as file:
        val = list(csv.DictReader(file))

    def text(row: dict[str, str]) -> str:
        return (
            row["question"].strip() + "\nA. " + row["A"] + "\nB. " + row["B"] + "\nC. " + row["C"] + "\nD. " + row["D"]
            + "\n答案："
        )  # fmt: skip

    expected = "以下是中国关于逻辑学的单项选择题，请选出其中的正确答案。\n\n"
    expected += "".join(text(row) + " " + row["answer"] + "\n\n" for row in dev[:5]) + text(val[2])
    question = next(q for q in TASKS["ceval"].read(shared_data / "eval", "val") if q.id == "logic/2")
    examples = TASKS["ceval"].examples(shared_data / "eval", "val", 5)
    request = PROTOCOLS["likelihood"].request("ceval", question, examples["logic"])
    assert request.context == expected and request.continuations == (" A", " B", " C", " D")


@pytest.mark.parametrize(
    ("options", "stripped"),
    [
        (("A.一", "B、二", "C．三", "D 四"), None),
        (("A.一", "B、二", "C．三", "D) 四"), ("一", "二", "三", "四")),
        ((" A . 一 ", "B：二"), ("一 ", "二")),
        (("Ａ,一", "B·二", "C）三", "D，四", "E:五"), ("一", "二", "三", "四", "五")),
        (("一", "B.二"), None),
        (("Ａ.一", "Ｃ.二"), None),
        (("A.一", "C.二", "B.三"), None),
        (("A", "B"), None),
        (("A.", "B.二"), None),
        (("A一", "B二"), None),
        (("A.A.一", "B.二"), ("A.一", "二")),
    ],
)
def test_labels_are_stripped_only_where_every_option_has_its_own(
    options: tuple[str, ...], stripped: tuple[str, ...] | None
) -> None:
    question = dataclasses.replace(SNOW, options=options)
    assert strip_option_labels(question) == dataclasses.replace(question, options=stripped or options)


def test_the_labels_of_logiqa(shared_data: Path) -> None:
    """927 of 1594 first options begin with "A." or "A、" (PROTOCOLS.md §5.1): Panda's prompt says "A: A." there."""
    questions = TASKS["logiqa2"].read(shared_data / "eval", "test")
    doubled = ("\nA: A.", "\nA: A、")
    count = {
        name: sum(any(mark in PROTOCOLS[name].prompt("logiqa2", q, []) for mark in doubled) for q in questions)
        for name in ("panda", "panda-stripped")
    }
    assert count["panda"] == 927
    # Left alone: lines 403 (its third option says D), 1027, 1393 and 1487 (an option has the letter and no stop).
    assert count["panda-stripped"] == 4
    example = dataclasses.replace(RAIN, options=("A.湿", "B.干"))
    assert "A: 湿\nB: 干\n" in PROTOCOLS["panda-stripped"].prompt("logiqa2", SNOW, [example])


def test_kinds_and_extractors() -> None:
    generative = {"panda": "B", "panda-eos": "B", "panda-strict": None, "panda-stripped": "B"}
    assert {name for name, protocol in PROTOCOLS.items() if protocol.kind == "generative"} == set(generative)
    for name, letter in generative.items():
        extract = PROTOCOLS[name].extract
        assert extract is not None and extract("Because", 4) == letter
        assert PROTOCOLS[name].shots == 0
        with pytest.raises(ValueError, match="generates"):
            PROTOCOLS[name].request("c3-d", SNOW, [])
    assert {name: protocol.name for name, protocol in PROTOCOLS.items()} == {name: name for name in PROTOCOLS}
    assert all(set(protocol.wordings) == set(TASKS) for protocol in PROTOCOLS.values())


def test_unknown_names_are_answered() -> None:
    with pytest.raises(InputError, match="did you mean 'panda-strict'"):
        find_protocol("panda_strict")
    with pytest.raises(InputError, match="likelihood: has no wording for the task 'race'"):
        PROTOCOLS["likelihood"].prompt("race", SNOW, [])
    with pytest.raises(ValueError, match="no public answer"):
        PROTOCOLS["panda"].prompt("c3-d", SNOW, [dataclasses.replace(RAIN, answer=None)])


def with_wording(protocol: str, task: str, **changes: Any) -> Protocol:
    """Return a protocol that asks `task` otherwise."""
    base = PROTOCOLS[protocol]
    wording = dataclasses.replace(base.wordings[task], **changes)
    return dataclasses.replace(base, wordings={**base.wordings, task: wording})


CHANGES: list[dict[str, Callable[..., Any] | str | bool]] = [
    {"head": lambda subject: "请" if subject in ("", "law") else ""},
    {"body": lambda question: question.question + "？"},
    {"example": lambda question: question.question},
    {"fewshot_delimiter": "\n"},
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_hash_changes_with_every_part_of_the_wording(protocol: str, task: str) -> None:
    changes = list(CHANGES)
    if PROTOCOLS[protocol].kind == "likelihood":
        changes += [{"target_delimiter": "\t"}, {"choices": lambda question: question.options[::-1]}]
    if "arts" in TASKS[task].subjects:
        changes[0] = {"head": lambda subject: "请" if subject == "world_religions" else ""}
    hashes = [prompt_hash(PROTOCOLS[protocol], task)]
    hashes += [prompt_hash(with_wording(protocol, task, **change), task) for change in changes]
    assert len(set(hashes)) == len(hashes) and all(len(digest) == 64 for digest in hashes)


def test_hashes_tell_wordings_apart_and_only_wordings() -> None:
    digest = {(name, task): prompt_hash(PROTOCOLS[name], task) for name, task in itertools.product(PROTOCOLS, TASKS)}
    assert all(
        digest["panda", task] == digest["panda-strict", task] != digest["panda-stripped", task] for task in TASKS
    )
    assert (
        digest["likelihood", "logiqa2"] == digest["likelihood", "logiqa2-en"] != digest["likelihood-letter", "logiqa2"]
    )
    assert digest["likelihood", "c3-d"] != digest["likelihood-letter", "c3-d"] != digest["likelihood-bare", "c3-d"]
    assert digest["likelihood", "ceval"] == digest["likelihood-letter", "ceval"] != digest["likelihood", "cmmlu"]
    renamed = dataclasses.replace(PROTOCOLS["panda"], name="other", version=9)
    assert prompt_hash(renamed, "c3-d") == digest["panda", "c3-d"]

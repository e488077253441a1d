"""The official files as published, hand-written ones of the same forms, and every way in which a file can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from panda_jax.errors import InputError
from panda_jax.evaluation.questions import Question
from panda_jax.evaluation.subjects import CEVAL_SUBJECTS, CMMLU_SUBJECTS
from panda_jax.evaluation.tasks import TASKS, find_task, write_submission
from panda_jax.text.tokenizer import Tokenizer

# Questions of our own; PROTOCOLS.md §5.1 and §5.3 name the fields.
LOGIQA = {"example_id": 7, "answer": 1, "text": "雪是白的。", "question": "雪的颜色？ ", "options": ["黑", "白", "红"]}
DOCUMENT = [["甲：下雪了。", "乙：冷。"], [{"question": "冷吗？", "choice": ["冷", "热"], "answer": "冷"}], "1-2"]
CEVAL_DEV = (
    'id,question,A,B,C,D,answer,explanation\n0,"雪的\n颜色,",黑,白,红,绿,B,"1. 雪,\n2. 白"\n1,问,一,二,三,四,A,\n'
)
CEVAL_TEST = "id,question,A,B,C,D\n0,问,一,二,三,四\n3,再问,一,二,三,四\n"
CMMLU = ",Question,A,B,C,D,Answer\n0,雪____,黑,白,红,绿,B\n1,问,一,二,三,四,D\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def subject_files(folder: Path, task: str, split: str, text: str) -> None:
    for name in TASKS[task].splits[split].files:
        write(folder / name, text)


# ---- the published files ------------------------------------------------------------------------------------------

# PROTOCOLS.md §5.2 and §5.3.
COUNTS = {
    ("logiqa2", "dev"): 1593,
    ("logiqa2", "test"): 1594,
    ("c3-d", "train"): 5856,
    ("c3-d", "dev"): 1825,
    ("c3-d", "test"): 1890,
    ("c3-m", "train"): 6013,
    ("c3-m", "dev"): 1991,
    ("c3-m", "test"): 2002,
    ("ceval", "dev"): 260,
    ("ceval", "val"): 1346,
}


@pytest.mark.parametrize(("task", "split"), COUNTS)
def test_the_published_files_are_read_whole_and_recognised(shared_data: Path, task: str, split: str) -> None:
    questions = TASKS[task].read(shared_data / "eval", split)
    assert len(questions) == COUNTS[task, split] == len({question.id for question in questions})
    assert TASKS[task].warnings(shared_data / "eval", split, questions) == []
    assert all(q.answer is not None and 0 <= q.answer < len(q.options) <= 4 for q in questions)


# PROTOCOLS.md §5.2, Panda's Table 5: 333 / 246 / 484.
@pytest.mark.parametrize(("task", "mean"), [("logiqa2", "333.1"), ("c3-d", "246.1"), ("c3-m", "484.5")])
def test_mean_lengths_in_llama_tokens(shared_data: Path, task: str, mean: str) -> None:
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "llama-32000.model")
    questions = TASKS[task].read(shared_data / "eval", "test")
    texts = [" ".join([question.context, question.question, *question.options]) for question in questions]
    assert f"{np.mean([len(ids) for ids in tokenizer.encode_batch(texts)]):.1f}" == mean


@pytest.mark.parametrize(("task", "split"), [("c3-d", "test"), ("c3-m", "test"), ("c3-d", "dev"), ("c3-m", "dev")])
def test_questions_with_fewer_options_stand_where_the_list_has_them(shared_data: Path, task: str, split: str) -> None:
    listed = json.loads((shared_data / "eval" / "c3_fewer_than_4_options.json").read_text(encoding="utf-8"))
    questions = TASKS[task].read(shared_data / "eval", split)
    found = [
        {"row": row, "doc": question.id.split("#")[0], "n": len(question.options)}
        for row, question in enumerate(questions)
        if len(question.options) < 4
    ]
    assert found == listed[f"{task}-{split}"]
    assert all(set(q.options) == {"正确", "错误"} for q in questions if len(q.options) == 2)


@pytest.mark.parametrize("task", ["c3-d", "c3-m"])
def test_of_a_repeated_right_option_the_last_counts(shared_data: Path, task: str) -> None:
    questions = TASKS[task].read(shared_data / "eval", "train")
    doubled = [q for q in questions if q.answer is not None and q.options.count(q.options[q.answer]) > 1]
    assert len(doubled) == 1
    gold = doubled[0].options[doubled[0].answer or 0]
    assert doubled[0].answer == max(i for i, option in enumerate(doubled[0].options) if option == gold)
    assert doubled[0].options.index(gold) < (doubled[0].answer or 0)


def test_ceval_has_its_published_subjects_and_five_examples_each(shared_data: Path) -> None:
    mapping = json.loads((shared_data / "eval" / "ceval" / "subject_mapping.json").read_text(encoding="utf-8"))
    assert {key: names[1] for key, names in mapping.items()} == CEVAL_SUBJECTS
    assert list(mapping) == list(CEVAL_SUBJECTS)
    task = TASKS["ceval"]
    examples = task.examples(shared_data / "eval", "val", 5)
    assert {subject: [q.id for q in questions] for subject, questions in examples.items()} == {
        subject: [f"{subject}/{n}" for n in range(5)] for subject in mapping
    }


def test_there_are_67_subjects_of_cmmlu_with_their_own_names() -> None:
    assert len(CMMLU_SUBJECTS) == len(set(CMMLU_SUBJECTS.values())) == 67
    assert len(CEVAL_SUBJECTS) == len(set(CEVAL_SUBJECTS.values())) == 52
    assert CMMLU_SUBJECTS["college_engineering_hydrology"] == "大学工程水文学"


def test_published_counts_add_up() -> None:
    """C-Eval has 13948 questions in all; CMMLU five examples in each of 67 subjects."""
    assert sum(split.num_questions or 0 for split in TASKS["ceval"].splits.values()) == 13948
    assert TASKS["cmmlu"].splits["dev"].num_questions == 67 * 5


# ---- hand-written files of every form -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["", "logiqa2"])
def test_logiqa2_as_written(tmp_path: Path, family: str) -> None:
    """White space stays; U+2028 breaks no line; a blank line counts; a missing id leaves the line number."""
    english = {"answer": 0, "text": "a\u2028b", "question": "q", "options": ["x", ""]}
    lines = [json.dumps(LOGIQA, ensure_ascii=False), "", json.dumps(english, ensure_ascii=False)]
    write(tmp_path / family / "test_zh.txt", "\r\n".join(lines))
    assert TASKS["logiqa2"].read(tmp_path, "test") == [
        Question("1-7", "雪是白的。", "雪的颜色？ ", ("黑", "白", "红"), 1, ""),
        Question("3-", "a\u2028b", "q", ("x", ""), 0, ""),
    ]


def test_c3_as_written(tmp_path: Path) -> None:
    twice = {"question": "几？", "choice": ["一", "二", "一", "三", "四"], "answer": "一"}
    document = [["只有一句。"], [DOCUMENT[1][0], twice], "3-4"]
    write(tmp_path / "c3" / "c3-m-dev.json", "\ufeff" + json.dumps([DOCUMENT, document]))
    assert TASKS["c3-m"].read(tmp_path, "dev") == [
        Question("1-2#0", "甲：下雪了。 乙：冷。", "冷吗？", ("冷", "热"), 0, ""),
        Question("3-4#0", "只有一句。", "冷吗？", ("冷", "热"), 0, ""),
        Question("3-4#1", "只有一句。", "几？", ("一", "二", "一", "三", "四"), 2, ""),
    ]


def test_ceval_as_written(tmp_path: Path) -> None:
    subject_files(tmp_path / "ceval", "ceval", "dev", CEVAL_DEV)
    subject_files(tmp_path / "ceval", "ceval", "test", CEVAL_TEST)
    task = TASKS["ceval"]
    physics = [question for question in task.read(tmp_path, "dev") if question.subject == "college_physics"]
    assert physics == [
        Question("college_physics/0", "", "雪的\n颜色,", ("黑", "白", "红", "绿"), 1, "college_physics"),
        Question("college_physics/1", "", "问", ("一", "二", "三", "四"), 0, "college_physics"),
    ]
    hidden = task.read(tmp_path, "test")
    assert {question.answer for question in hidden} == {None} and len(hidden) == 104
    assert task.examples(tmp_path, "test", 2)["college_physics"] == tuple(physics)
    assert task.warnings(tmp_path, "test", hidden) == [
        "ceval, split test: 104 questions; the published files have 12342"
    ]


def test_cmmlu_as_written(tmp_path: Path) -> None:
    subject_files(tmp_path, "cmmlu", "test", CMMLU)
    questions = TASKS["cmmlu"].read(tmp_path, "test")
    assert questions[:2] == [
        Question("agronomy/0", "", "雪____", ("黑", "白", "红", "绿"), 1, "agronomy"),
        Question("agronomy/1", "", "问", ("一", "二", "三", "四"), 3, "agronomy"),
    ]
    assert len(questions) == 134 and list(dict.fromkeys(q.subject for q in questions)) == list(CMMLU_SUBJECTS)


def test_the_submission_of_ceval(tmp_path: Path) -> None:
    subject_files(tmp_path, "ceval", "test", CEVAL_TEST)
    questions = TASKS["ceval"].read(tmp_path, "test")
    write_submission(tmp_path / "out.json", questions, ["C", None] * 52)
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written == {subject: {"0": "C", "3": ""} for subject in CEVAL_SUBJECTS}
    with pytest.raises(ValueError, match="argument 2"):
        write_submission(tmp_path / "out.json", questions, ["A"])


def test_examples_come_first_to_last_from_the_split_for_them(tmp_path: Path) -> None:
    records = [LOGIQA | {"example_id": n} for n in range(4)]
    write(tmp_path / "dev_zh.txt", "\n".join(map(json.dumps, records)))
    task = TASKS["logiqa2"]
    assert [question.id for question in task.examples(tmp_path, "test", 3)[""]] == ["1-0", "2-1", "3-2"]
    assert task.examples(tmp_path, "dev", 0) == {"": ()}
    for split, shots, message in [
        ("test", 5, "4 answered"),
        ("dev", 1, "first questions of 'dev'"),
        ("test", -1, "0 or"),
    ]:
        with pytest.raises(InputError, match=message):
            task.examples(tmp_path, split, shots)


# ---- what is not as published -------------------------------------------------------------------------------------


def test_another_file_under_a_published_name_is_named(shared_data: Path, tmp_path: Path) -> None:
    """One option of one question differs: the number of questions is right, the hash is not."""
    text = (shared_data / "eval" / "c3" / "c3-d-dev.json").read_text(encoding="utf-8")
    path = write(tmp_path / "c3-d-dev.json", text.replace("丈夫", "大夫", 1))
    task = TASKS["c3-d"]
    (line,) = task.warnings(tmp_path, "dev", task.read(tmp_path, "dev"))
    assert str(path) in line and "8c7054930a40aeb288ad7c51c42fa93d54aef678ccab29c75d46a7432f4f6278" in line
    questions = task.read(tmp_path, "dev")[:-1]
    assert "1824 questions; the published files have 1825" in task.warnings(tmp_path, "dev", questions)[1]


def test_missing_files_are_listed_with_the_places_searched(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        TASKS["c3-d"].read(tmp_path, "test")
    for part in ("c3-d", "split test", "c3-d-test.json", str(tmp_path), str(tmp_path / "c3")):
        assert part in str(caught.value)
    subject_files(tmp_path / "ceval", "ceval", "val", CEVAL_DEV)
    (tmp_path / "ceval" / "val" / "law_val.csv").unlink()
    with pytest.raises(InputError, match=r"1 of 52 files missing \(val/law_val.csv\)"):
        TASKS["ceval"].read(tmp_path, "val")
    with pytest.raises(InputError, match="no split is called 'valid'; choose one of dev, val, test"):
        TASKS["ceval"].read(tmp_path, "valid")
    with pytest.raises(InputError, match="did you mean 'c3-d'"):
        find_task("c3d")


def changed(**fields: Any) -> str:
    """Return two lines, the second of them a LogiQA record with changed fields; None takes a field away."""
    record = {key: value for key, value in (LOGIQA | fields).items() if value is not None}
    return json.dumps(LOGIQA) + "\n" + json.dumps(record)


def question(**fields: Any) -> str:
    """Return a C3 file whose second document's first question has changed fields; None takes a field away."""
    record = {key: value for key, value in (DOCUMENT[1][0] | fields).items() if value is not None}
    return json.dumps([DOCUMENT, [["x"], [record], "2-1"]])


def document(*parts: Any) -> str:
    return json.dumps([DOCUMENT, list(parts)])


def second_row(row: str) -> str:
    return CMMLU.splitlines()[0] + "\n0,问,一,二,三,四,A\n" + row + "\n"


# (task, text of its dev file, what the message must name besides the file)
BROKEN: list[tuple[str, str, tuple[str, ...]]] = [
    ("logiqa2", json.dumps(LOGIQA) + "\n{", ("line 2", "broken JSON")),
    ("logiqa2", "[1]", ("line 1", "a list", "object")),
    ("logiqa2", "[" * 100_000, ("line 1", "broken JSON")),
    ("logiqa2", changed(text=None), ("line 2", "`text`", "example_id")),
    ("logiqa2", changed(question=3), ("line 2", "`question`", "a number", "a string")),
    ("logiqa2", changed(answer=None), ("line 2", "`answer`")),
    ("logiqa2", changed(answer="B"), ("line 2", "`answer`", "'B'", "0 to 2")),
    ("logiqa2", changed(answer=True), ("line 2", "`answer`", "True")),
    ("logiqa2", changed(answer=3), ("line 2", "`answer` is 3", "3 options", "0 to 2")),
    ("logiqa2", changed(answer=-1), ("line 2", "`answer` is -1")),
    ("logiqa2", changed(options=["一"] * 6), ("line 2", "6 options", "2 to 5")),
    ("logiqa2", changed(options=["一"], answer=0), ("line 2", "1 options", "2 to 5")),
    ("logiqa2", changed(options=["一", 2]), ("line 2", "`options`", "strings")),
    ("logiqa2", changed(options="一二"), ("line 2", "`options`", "list")),
    ("logiqa2", changed(text="\ud800"), ("line 2", "'\\ud800'", "half")),
    ("logiqa2", "\n\n", ("no question",)),
    ("c3-d", "[\n[", ("broken JSON", "line 2")),
    ("c3-d", "{}", ("an object", "expected a list")),
    ("c3-d", document(["x"], []), ("document 2", "a list of 2", "[turns, questions, id]")),
    ("c3-d", json.dumps([DOCUMENT, 5]), ("document 2", "a number")),
    ("c3-d", document("x", [], "2-1"), ("document 2", "first element")),
    ("c3-d", document(["x"], {}, "2-1"), ("document 2", "second element", "an object")),
    ("c3-d", document(["x"], [], 3), ("document 2", "third element", "3")),
    ("c3-d", document(["\udc00"], [{}], "2-1"), ("document 2", "half")),
    ("c3-d", document(["x"], ["?"], "2-1"), ("document 2, question 1", "a string")),
    ("c3-d", question(answer="暖"), ("document 2, question 1", "'暖'", "none of its options", "热")),
    ("c3-d", question(answer=None), ("document 2, question 1", "`answer`")),
    ("c3-d", question(choice=list("一二三四五六"), answer="六"), ("document 2, question 1", "6 options")),
    ("c3-d", question(choice=["冷", ""]), ("document 2, question 1", "option B", "empty")),
    ("c3-d", json.dumps([DOCUMENT, DOCUMENT]), ("'1-2#0'", "twice")),
    ("cmmlu", "", ("the file is empty",)),
    ("cmmlu", CMMLU.splitlines()[0], ("no question",)),
    ("cmmlu", "Question,A,B,C,D,Answer\n", ("line 1", "header", ",Question,A,B,C,D,Answer")),
    ("cmmlu", ",Question,A,B,C,D\n", ("line 1", "header")),
    ("cmmlu", ",Question,A,B,D,Answer\n", ("line 1", "header")),
    ("cmmlu", ",Question,A,B,B,C,D,Answer\n", ("line 1", "header")),
    ("cmmlu", ",Question,A,B,C,D,E,F,Answer\n", ("line 1", "option F", "A to E")),
    ("cmmlu", second_row("1,问,一,二,三,A"), ("line 3", "6 cells", "7")),
    ("cmmlu", second_row("1,问,一,二,三,四,E"), ("line 3", "'E'", "A, B, C, D")),
    ("cmmlu", second_row("1,问,一,二,三,四,AB"), ("line 3", "'AB'")),
    ("cmmlu", second_row("1,问,一,二,三,四,"), ("line 3", "''", "A, B, C, D")),
    ("cmmlu", second_row("1,问,一,二, ,四,A"), ("line 3", "'C'", "empty")),
    ("cmmlu", second_row(",问,一,二,三,四,A"), ("line 3", "'number 1'", "empty")),
    ("cmmlu", second_row("0,问,一,二,三,四,A"), ("'agronomy/0'", "twice")),
    ("cmmlu", second_row('1,"问"x,一,二,三,四,A'), ("line 3", "broken CSV")),
    ("cmmlu", second_row('1,"问,一'), ("line 3", "broken CSV")),
    ("ceval", "id,question,A,B,C,D,answer\n0,问,一,二,三,四,F\n", ("line 2", "'F'")),
    ("ceval", ",question,A,B,C,D,answer\n", ("line 1", "header")),
]


@pytest.mark.parametrize(("task", "text", "parts"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, task: str, text: str, parts: tuple[str, ...]) -> None:
    names = list(TASKS[task].splits["dev"].files)
    good = {"cmmlu": CMMLU, "ceval": CEVAL_DEV}.get(task, "")
    for name in names[1:]:
        write(tmp_path / name, good)
    path = write(tmp_path / names[0], text)
    with pytest.raises(InputError) as caught:
        TASKS[task].read(tmp_path, "dev")
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message, message


@pytest.mark.parametrize(
    "spoil", [lambda path: path.write_bytes("雪是白的".encode("gb18030")), lambda path: path.chmod(0)]
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    path = write(tmp_path / "dev_zh.txt", "{}")
    spoil(path)
    with pytest.raises(InputError, match=r"dev_zh\.txt.*(not UTF-8|denied|no field)"):
        TASKS["logiqa2"].read(tmp_path, "dev")

"""Multiple-choice questions, and readers of the benchmarks' official files as published.

Texts stay as the files have them, surrounding white space included: the prompts of the published results do so too.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panda_jax.errors import InputError

LETTERS = "ABCDE"


@dataclass(frozen=True)
class Question:
    """One question with 2 to 5 options, whose letters are A, B, C, ... in order."""

    id: str
    """Unique within a task and split, and the same in every reading of the same files."""
    context: str
    """The passage; "" where there is none."""
    question: str
    options: tuple[str, ...]
    answer: int | None
    """Index of the right option, from 0; None where it is hidden (C-Eval's test split)."""
    subject: str
    """Key of C-Eval's or CMMLU's subject; "" elsewhere."""


def read_logiqa2(path: Path, subject: str) -> Iterator[Question]:
    """Yield the questions of a LogiQA 2.0 file: JSON lines with text, question, options and answer (an index from 0).

    {"example_id": 7, "answer": 1, "text": "T", "question": "Q", "options": ["a", "b"]} in line 1 is
    Question("1-7", "T", "Q", ("a", "b"), 1, ""). The English files repeat some ids, hence the line number in ours.
    A few published questions have an empty option; they stay. Raises InputError with the line where one is malformed.
    """
    # Not splitlines: a passage may contain U+2028, which JSON leaves as it is.
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: broken JSON ({error}); expected one object in each line; fetch it again"
            ) from error
        if not isinstance(record, dict):
            raise InputError(f"{where}: found {_kind(record)}; expected a JSON object with text, question, options")
        options = _options(record, "options", where)
        answer = _field(record, "answer", where)
        if not isinstance(answer, int) or isinstance(answer, bool):
            raise InputError(f"{where}: `answer` is {answer!r}; expected a number from 0 to {len(options) - 1}")
        if not 0 <= answer < len(options):
            raise InputError(
                f"{where}: `answer` is {answer}, and there are {len(options)} options; "
                f"expected a number from 0 to {len(options) - 1}"
            )
        identifier = record.get("example_id", record.get("id", ""))
        yield Question(
            id=f"{number}-{identifier}",
            context=_string(record, "text", where),
            question=_string(record, "question", where),
            options=options,
            answer=answer,
            subject=subject,
        )


def read_c3(path: Path, subject: str) -> Iterator[Question]:
    """Yield the questions of a C3 file: [[[turn, ...], [{question, choice, answer}, ...], id], ...].

    The context is the turns joined by spaces. The answer is given as text: its index is the *last* option with that
    text, as in Panda's reader; that matters for one training question each of C3-d and C3-m (PROTOCOLS.md §5.2).
    [["a", "b"], [{"question": "Q", "choice": ["x", "y"], "answer": "y"}], "1-2"] is
    Question("1-2#0", "a b", "Q", ("x", "y"), 1, ""). Raises InputError with the document where one is malformed.
    """
    try:
        documents = json.loads(_text_of(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken JSON ({error}); fetch the file again") from error
    if not isinstance(documents, list):
        raise InputError(f"{path}: found {_kind(documents)}; expected a list of [turns, questions, id]")
    for number, document in enumerate(documents, start=1):
        where = f"{path}, document {number}"
        if not isinstance(document, list) or len(document) != 3:
            found = f"a list of {len(document)}" if isinstance(document, list) else _kind(document)
            raise InputError(f"{where}: found {found}; expected [turns, questions, id]")
        turns, asked, identifier = document
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise InputError(f"{where}: its first element is not a list of strings; expected the passage's turns")
        if not isinstance(asked, list):
            raise InputError(f"{where}: its second element is {_kind(asked)}; expected a list of questions")
        if not isinstance(identifier, str) or not identifier:
            raise InputError(f"{where}: its third element is {identifier!r}; expected the document's id, a string")
        context = " ".join(_encodable(turn, where) for turn in turns)
        for index, record in enumerate(asked):
            yield _c3_question(f"{identifier}#{index}", context, record, subject, f"{where}, question {index + 1}")


def _c3_question(identifier: str, context: str, record: Any, subject: str, where: str) -> Question:
    if not isinstance(record, dict):
        raise InputError(f"{where}: found {_kind(record)}; expected an object with question, choice and answer")
    options = _options(record, "choice", where)
    answer = _string(record, "answer", where)
    if answer not in options:
        raise InputError(f"{where}: the answer {answer!r} is none of its options {list(options)}; correct the file")
    if "" in options:
        raise InputError(f"{where}: option {LETTERS[options.index('')]} is empty; expected its text")
    last = len(options) - 1 - options[::-1].index(answer)
    return Question(identifier, context, _string(record, "question", where), options, last, subject)


def read_ceval(path: Path, subject: str) -> Iterator[Question]:
    """Yield the questions of a C-Eval file: CSV with id, question, A, B, C, D and, but for the test split, answer.

    The dev split's further column, explanation, is not read. In physics' file the row `3,Q,a,b,c,d,B` is
    Question("physics/3", "", "Q", ("a", "b", "c", "d"), 1, "physics"). Raises InputError with the line.
    """
    return _read_csv(path, subject, ("id", "question", "answer"), is_answer_hidden=True)


def read_cmmlu(path: Path, subject: str) -> Iterator[Question]:
    """Yield the questions of a CMMLU file: CSV with a nameless column of row numbers, Question, A, B, C, D, Answer.

    In arts' file the row `3,Q,a,b,c,d,B` is Question("arts/3", "", "Q", ("a", "b", "c", "d"), 1, "arts").
    Raises InputError with the line.
    """
    return _read_csv(path, subject, ("", "Question", "Answer"), is_answer_hidden=False)


def _read_csv(path: Path, subject: str, names: tuple[str, str, str], is_answer_hidden: bool) -> Iterator[Question]:
    """Yield a CSV file's questions; `names` are its columns for id, question and answer."""
    identifier, question, answer = names
    reader = csv.reader(io.StringIO(_text_of(path), newline=""), strict=True)
    header: list[str] = []
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not header:
                header = row
                letters = _check_header(header, names, is_answer_hidden, where)
            elif row:
                if len(row) != len(header):
                    raise InputError(
                        f"{where}: {len(row)} cells; expected {len(header)} as in the header {','.join(header)}"
                    )
                cells = dict(zip(header, row, strict=True))
                for name in (identifier, question, *letters):
                    if not cells[name].strip():
                        raise InputError(f"{where}: column {name or 'number 1'!r} is empty; expected its text")
                options = tuple(cells[letter] for letter in letters)
                yield Question(
                    id=f"{subject}/{cells[identifier].strip()}",
                    context="",
                    question=cells[question],
                    options=options,
                    answer=_letter(cells.get(answer, ""), len(options), is_answer_hidden, where),
                    subject=subject,
                )
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: broken CSV ({error}); fetch the file again") from error
    if not header:
        raise InputError(f"{path}: the file is empty; expected a header and a question in each row; fetch it again")


def _check_header(header: list[str], names: tuple[str, str, str], is_answer_hidden: bool, where: str) -> list[str]:
    """Return the letters of the option columns, in order; raises InputError where a column is missing or too many."""
    identifier, question, answer = names
    if "F" in header:
        raise InputError(f"{where}: the header has an option F; expected options A to E at most")
    required = [identifier, question, "A", "B", *([] if is_answer_hidden else [answer])]
    missing = [name or "a nameless first column" for name in required if name not in header]
    letters = [letter for letter in LETTERS if letter in header]
    gaps = [letter for letter in LETTERS[: len(letters)] if letter not in letters]
    if missing or gaps or len(set(header)) < len(header):
        raise InputError(
            f"{where}: the header is {','.join(header)!r}; expected the columns "
            f"{','.join((identifier, question, 'A', 'B', 'C', 'D', answer))!r}, each once; fetch the official file"
        )
    return letters


def _letter(cell: str, num_options: int, is_answer_hidden: bool, where: str) -> int | None:
    """Return the index of an answer's letter, or None where it is empty and may be hidden."""
    letter = cell.strip()
    if not letter and is_answer_hidden:
        return None
    valid = LETTERS[:num_options]
    if len(letter) != 1 or letter not in valid:
        raise InputError(f"{where}: the answer is {cell!r}; expected one letter of {', '.join(valid)}")
    return valid.index(letter)


def _text_of(path: Path) -> str:
    """Return a file's text, without a byte order mark; raises InputError where it is unreadable or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a benchmark's official file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); fetch the official file again") from error


def _kind(value: Any) -> str:
    """Return the JSON type of a parsed value in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds[type(value)]


def _field(record: dict[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise InputError(f"{where}: no field `{key}`; found {', '.join(record) or 'no field at all'}; correct the file")
    return record[key]


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = _field(record, key, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: `{key}` is {_kind(value)}; expected a string")
    return _encodable(value, where)


def _encodable(text: str, where: str) -> str:
    """Return the text; raises InputError where it holds half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: holds {text[error.start]!r}, half of a character; expected whole ones; fetch it again"
        ) from error
    return text


def _options(record: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Return a record's options; raises InputError unless they are 2 to 5 strings."""
    options = _field(record, key, where)
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise InputError(f"{where}: `{key}` is not a list of strings; expected 2 to {len(LETTERS)} options")
    if not 2 <= len(options) <= len(LETTERS):
        raise InputError(
            f"{where}: {len(options)} options; expected 2 to {len(LETTERS)} (A to {LETTERS[-1]}); leave this one out"
        )
    return tuple(_encodable(option, where) for option in options)

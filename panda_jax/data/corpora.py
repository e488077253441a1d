"""One reader per corpus: from a raw record to conversations, and from those to Examples.

To add a corpus: write one function (record, context) that yields conversations or Skips, add one line to CORPORA, and
one row to tests/test_corpora.py. Text is kept as it stands, `<br>` and carriage returns included: what a corpus holds
is what the original was trained on, and a quiet clean-up would make two runs on "the same data" differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from panda_jax import config
from panda_jax.data import coig
from panda_jax.data.fields import Context, Reading, is_blank, kind, text
from panda_jax.data.layouts import Block, Layout, records
from panda_jax.data.records import Examples, Skip
from panda_jax.errors import InputError
from panda_jax.text.templates import Template, find_template, unknown_name
from panda_jax.text.turns import Turn

QUESTION_INSTRUCTION = "请阅读文章回答问题："
TRANSLATION_INSTRUCTION = "将以下{source}翻译为{target}"
# Templates that the original's data went through; `compat: panda` is defined for these only.
PANDA_TEMPLATES = ("plain", "panda", "coig")
BLANK_OUTPUT = Skip("blank output")


@dataclass(frozen=True)
class Corpus:
    """How one corpus is read."""

    read: Callable[[Any, Context], Reading]
    """From one raw record (a dict, or str for plain text) to conversations or Skips."""
    required: tuple[str, ...]
    """Fields every record must have; `a|b` means either. They also tell corpora apart in messages."""
    template: str = "plain"
    """The corpus's own template, a key of TEMPLATES; Source.template wins."""
    layout: Layout = "json"
    """How records lie in a file."""
    instruction: str | None = None
    """Written before every question; Source.instruction wins. None where records carry their own or have none."""
    is_dialogue: bool = False
    """`compat: panda` expands it to one example per turn even when it has one turn only."""
    skip_malformed: bool = False
    """The published files are known to hold records that do not parse: count them instead of stopping."""


def plain_text(record: str, context: Context) -> Reading:
    """Plain text: language modelling.

    `text` takes what stands between blank lines as one document, so a file without blank lines is one document;
    `text_lines` takes every line that is not blank as one record.
    """
    yield (Turn("", "", record),)


def jsonl_text(record: dict[str, Any], context: Context) -> Reading:
    """{"text"}, and wiki2019zh, whose title is repeated in its text: language modelling (PROTOCOLS.md §4.1)."""
    yield (Turn("", "", text(record, "text")),)


def news2016zh(record: dict[str, Any], context: Context) -> Reading:
    """News: language modelling on the content alone (PROTOCOLS.md §4.1)."""
    yield (Turn("", "", text(record, "content")),)


def baike2018qa(record: dict[str, Any], context: Context) -> Reading:
    """Baike questions: question | answer (PROTOCOLS.md §4.1)."""
    return _question_answer(record, text(record, "answer"), context)


def webtext2019zh(record: dict[str, Any], context: Context) -> Reading:
    """Forum questions: question | the answer in `content` (PROTOCOLS.md §4.1)."""
    return _question_answer(record, text(record, "content"), context)


def _question_answer(record: dict[str, Any], answer: str, context: Context) -> Reading:
    """Reconstruction: the question is the title, then the description on its own line where there is one.

    A description that begins with the title replaces it: such titles are the description, cut short.
    """
    title, description = text(record, "title"), text(record, "desc")
    question = title if is_blank(description) else f"{title}\n{description}"
    if description.startswith(title.strip()) and not is_blank(description):
        question = description
    yield Skip("blank question") if is_blank(question) else (Turn(context.instruction, question, answer),)


def translation2019zh(record: dict[str, Any], context: Context) -> Reading:
    """Sentence pairs (PROTOCOLS.md §4.1; which directions the original used is unknown, so it is a setting).

    `alternate` reads even records as en-zh and odd ones as zh-en; `both` yields the two examples of each record.
    """
    english, chinese = text(record, "english"), text(record, "chinese")
    direction = context.direction
    if direction == "alternate":
        direction = "zh-en" if context.number % 2 else "en-zh"
    if direction in ("en-zh", "both"):
        instruction = context.instruction.replace("{source}", "英文").replace("{target}", "中文")
        yield Skip("blank question") if is_blank(english) else (Turn(instruction, english, chinese),)
    if direction in ("zh-en", "both"):
        instruction = context.instruction.replace("{source}", "中文").replace("{target}", "英文")
        yield Skip("blank question") if is_blank(chinese) else (Turn(instruction, chinese, english),)


def flan(record: dict[str, Any], context: Context) -> Reading:
    """FLAN-style pairs: inputs | targets."""
    yield (Turn("", text(record, "inputs"), text(record, "targets")),)


def alpaca(record: dict[str, Any], context: Context) -> Reading:
    """Alpaca: instruction, input | output, with earlier turns in `history` and a `system` text before the first turn.

    Of a list of instructions, record n takes number n modulo its length (the original drew one at random).
    """
    instruction = record["instruction"]
    if isinstance(instruction, list) and instruction:
        instruction = instruction[context.number % len(instruction)]
    if not isinstance(instruction, str | None):
        raise InputError(f"field 'instruction': expected a string or a list of strings, found {kind(instruction)}")
    history = record.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        raise InputError("field 'history': expected a list of [question, answer] pairs of strings")
    last = Turn(instruction or "", text(record, "input"), text(record, "output"))
    yield _conversation([*(Turn(asked, "", told) for asked, told in history), last], text(record, "system"))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _conversation(turns: list[Turn], system: str) -> tuple[Turn, ...] | Skip:
    """Return the turns with the system text before the first instruction, or a Skip when a question is blank."""
    if any(is_blank(turn.instruction, turn.input) for turn in turns):
        return Skip("blank question")
    if not is_blank(system):
        first = turns[0]
        turns[0] = first._replace(instruction=f"{system}\n\n{first.instruction}" if first.instruction else system)
    return tuple(turns)


_ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
}


def sharegpt(record: dict[str, Any], context: Context) -> Reading:
    """ShareGPT: `conversations` of from/value, or `messages` of role/content.

    A system message may come first. An answer without a question at the start, and a question without an answer at the
    end, are left out; a conversation that is irregular in another way is a Skip.
    """
    messages = [_message(each) for each in _messages(record)]
    system = text(record, "system")
    if messages and messages[0][0] == "system":
        system = messages.pop(0)[1]
    if any(role not in ("human", "assistant") for role, _ in messages):
        yield Skip("a role other than human and assistant inside the conversation")
        return
    if messages and messages[0][0] == "assistant":
        del messages[0]
    if messages and messages[-1][0] == "human":
        del messages[-1]
    asked, told = messages[::2], messages[1::2]
    if not messages:
        yield Skip("no question with an answer")
    elif any(role != "human" for role, _ in asked) or any(role != "assistant" for role, _ in told):
        yield Skip("roles do not alternate")
    else:
        pairs = zip(asked, told, strict=True)
        yield _conversation([Turn(question, "", answer) for (_, question), (_, answer) in pairs], system)


def _messages(record: dict[str, Any]) -> list[Any]:
    key = "conversations" if "conversations" in record else "messages"
    if not isinstance(record[key], list):
        raise InputError(f"field {key!r}: expected a list of messages, found {kind(record[key])}")
    return record[key]


def _message(message: Any) -> tuple[str, str]:
    """Return (role, text); the role is human, assistant, system, or the name found."""
    for role_key, text_key in (("from", "value"), ("role", "content")):
        if isinstance(message, dict) and role_key in message and text_key in message:
            role = text(message, role_key)
            return _ROLES.get(role.lower(), role), text(message, text_key)
    raise InputError("a message of the conversation: expected an object with from and value, or role and content")


_PAIR = ("instruction", "output")
_TEXTBOX = ("textbox_question", "textbox_answer")

CORPORA: dict[str, Corpus] = {
    # Where two corpora have the same fields, messages suggest the first.
    "wiki2019zh": Corpus(jsonl_text, ("id", "title", "text")),
    "news2016zh": Corpus(news2016zh, ("news_id", "content")),
    "baike2018qa": Corpus(baike2018qa, ("qid", "title", "answer"), "panda", instruction=QUESTION_INSTRUCTION),
    "webtext2019zh": Corpus(webtext2019zh, ("qid", "title", "content"), "panda", instruction=QUESTION_INSTRUCTION),
    "translation2019zh": Corpus(
        translation2019zh, ("english", "chinese"), "panda", instruction=TRANSLATION_INSTRUCTION
    ),
    "jsonl_text": Corpus(jsonl_text, ("text",)),
    "alpaca": Corpus(alpaca, _PAIR, "alpaca"),
    "sharegpt": Corpus(sharegpt, ("conversations|messages",), "belle", is_dialogue=True),
    "flan": Corpus(flan, ("inputs", "targets")),
    "text": Corpus(plain_text, (), layout="documents"),
    "text_lines": Corpus(plain_text, (), layout="lines"),
    "coig_translated": Corpus(coig.translated, ("trans_instruction", "trans_output"), "coig"),
    "coig_exam": Corpus(coig.textbox, _TEXTBOX, "coig", skip_malformed=True),
    "coig_human_value_part1": Corpus(coig.instruction, _PAIR, "coig"),
    "coig_human_value_part2": Corpus(coig.textbox, _TEXTBOX, "coig", skip_malformed=True),
    "coig_leetcode": Corpus(coig.instruction, _PAIR, "coig"),
    "coig_dialogues": Corpus(
        coig.dialogue, ("round_0",), "coig", layout="members", is_dialogue=True, skip_malformed=True
    ),
}


def find_corpus(name: str) -> Corpus:
    """Return the corpus of that name; raises InputError that suggests the nearest one."""
    if name not in CORPORA:
        raise unknown_name("corpus", name, CORPORA)
    return CORPORA[name]


def template_of(source: config.Source) -> Template:
    """Return the source's template, or its corpus's own; raises InputError for settings that would have no effect."""
    corpus = find_corpus(source.corpus)
    template = find_template(source.template or corpus.template)
    if source.instruction is not None and corpus.instruction is None:
        raise InputError(
            f"source {source.label!r}: `instruction` has no place in corpus {source.corpus}, whose records carry their "
            f"own or have none; remove it"
        )
    if source.compat == "panda" and template.name not in PANDA_TEMPLATES:
        raise InputError(
            f"source {source.label!r}: `compat: panda` is not defined for template {template.name!r}; choose one of "
            f"{', '.join(PANDA_TEMPLATES)}, or remove `compat`"
        )
    return template


def examples(block: Block, source: config.Source, template: Template) -> Examples:
    """Return what each record of the block became, in order; records are numbered within the source, from 0.

    A record gives several examples when it is read in both directions or expanded by turns. Raises InputError with the
    place in the file for malformed JSON, another encoding than UTF-8, a missing field, or a record of another corpus.
    """
    corpus = find_corpus(source.corpus)
    instruction = (corpus.instruction or "") if source.instruction is None else source.instruction
    context = Context(block.first_record, instruction, source.direction)
    check = _check_text if corpus.layout in ("documents", "lines") else _check_fields
    add = _add_panda_examples if source.compat == "panda" else _add_example
    found = Examples()
    numbers = range(block.first_record, block.first_record + block.num_records)
    for number, (place, raw) in zip(numbers, records(block, corpus.skip_malformed), strict=False):
        if isinstance(raw, Skip):
            found.skip(number, raw)
            continue
        context.number = number
        try:
            check(raw, source.corpus, corpus, number)
            for turns in corpus.read(raw, context):
                if isinstance(turns, Skip):
                    found.skip(number, turns)
                else:
                    add(found, number, turns, corpus, template)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    return found


def _add_example(found: Examples, number: int, turns: tuple[Turn, ...], corpus: Corpus, template: Template) -> None:
    """Add the one example of a conversation."""
    for turn in turns:
        if is_blank(turn.output):
            found.skip(number, BLANK_OUTPUT)
            return
    template.append(turns, found.texts, found.trained)
    found.end(number)


def _add_panda_examples(
    found: Examples, number: int, turns: tuple[Turn, ...], corpus: Corpus, template: Template
) -> None:
    """Add the original's (inputs, targets): one pair per turn of a dialogue, with all earlier turns in its inputs.

    Dialogue a/b, c/d: "\n\na" | "b", then "a\n\nb\n\nc" | "d"; plain text has inputs " " (PROTOCOLS.md §4.1, §4.2).
    """
    is_dialogue = corpus.is_dialogue or len(turns) > 1
    history = ""
    for turn in turns:
        prompt = template.prompt(turn, 0)
        inputs = f"{history}\n\n{prompt}" if is_dialogue else prompt or " "
        history += ("\n\n" if history else "") + f"{prompt}\n\n{turn.output}"
        if is_blank(turn.output):
            found.skip(number, BLANK_OUTPUT)
        else:
            found.texts += (inputs, turn.output)
            found.trained += (False, True)
            found.end(number)


def _check_text(raw: str, name: str, corpus: Corpus, number: int) -> None:
    """Raise InputError when a source that should be plain text begins with JSON, and say of which corpus it seems."""
    if number == 0 and (parsed := _as_json(raw)) is not None:
        raise InputError(f"corpus {name!r} is plain text, but this is JSON{_resemblance(parsed)}")


def _check_fields(raw: Any, name: str, corpus: Corpus, number: int) -> None:
    """Raise InputError when a record is not of the corpus, and say of which other one it seems to be."""
    if not isinstance(raw, dict):
        raise InputError(f"corpus {name!r}: expected a JSON object, found {kind(raw)}")
    for field in corpus.required:
        if field not in raw and not any(alternative in raw for alternative in field.split("|")):
            found = ", ".join(list(raw)[:12]) or "none"
            raise InputError(
                f"corpus {name!r} needs the field {field!r}, and the fields found are: {found}{_resemblance(raw)}"
            )


def _as_json(line: str) -> dict[str, Any] | None:
    """Return the JSON object that the first line of a plain text is or, for a list, begins with; None for text."""
    start = line.lstrip("[ \t\r\n") if line.startswith("[") else line
    if not start.startswith("{"):
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        return None
    return value


def _resemblance(record: dict[str, Any]) -> str:
    """Return "; this looks like ..." for the corpus with the most required fields that the record has all of."""
    fitting = [
        name
        for name, corpus in CORPORA.items()
        if corpus.required and all(set(field.split("|")) & set(record) for field in corpus.required)
    ]
    if not fitting:
        return ""
    return f"; this looks like {max(fitting, key=lambda name: len(CORPORA[name].required))}: check `corpus`"

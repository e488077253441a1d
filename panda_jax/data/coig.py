"""The six files of COIG (arXiv:2304.07987) in their native form, joined as Panda joined them (PROTOCOLS.md §4.2).

Reconstruction: Panda's notebook is known by its outputs; that the joins below apply to every file is inferred.
"""

from __future__ import annotations

import json
import re
from typing import Any

from panda_jax.data.fields import Context, Reading, text
from panda_jax.data.records import Skip
from panda_jax.text.turns import Turn

_FENCED = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL | re.IGNORECASE)
_ROUND = re.compile(r"round_(\d+)")


def instruction(record: dict[str, Any], context: Context) -> Reading:
    """Human values part 1 and LeetCode: instruction, input | output, as they stand."""
    yield (Turn(text(record, "instruction"), text(record, "input"), text(record, "output")),)


def translated(record: dict[str, Any], context: Context) -> Reading:
    """Translated instructions: the Chinese side of each field."""
    yield (Turn(text(record, "trans_instruction"), text(record, "trans_input"), text(record, "trans_output")),)


def textbox(record: dict[str, Any], context: Context) -> Reading:
    """Exams and human values part 2: instruction, context and question | answer, then its analysis; empty parts go."""
    asked = [_loose(record, key) for key in ("textbox_q_context", "textbox_question")]
    told = [_loose(record, key) for key in ("textbox_answer", "textbox_answer_analysis")]
    question, answer = ("\n\n".join(part for part in parts if part) for parts in (asked, told))
    yield (Turn(_loose(record, "textbox_q_instruction"), question, answer),)


def _loose(record: dict[str, Any], key: str) -> str:
    """Return a field that may be a string, a number, null, or a list of strings (often an empty one)."""
    value = record.get(key)
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return text(record, key)


def dialogue(record: dict[str, Any], context: Context) -> Reading:
    """Counterfactual correction chats: rounds in the order of their numbers, each a JSON string with Q and A."""
    rounds = {int(match[1]): record[key] for key in record if (match := _ROUND.fullmatch(key))}
    turns = []
    for number in sorted(rounds):
        parsed = _response(rounds[number])
        if not isinstance(parsed, dict):
            yield Skip("a round's response is not a JSON object")
            return
        if "Q" not in parsed or "A" not in parsed:
            yield Skip("a round's response lacks Q or A")
            return
        turns.append(Turn("", _spoken(parsed["Q"]), _spoken(parsed["A"])))
    yield tuple(turns)


def _response(content: Any) -> Any:
    """Return a round's parsed response, or None; it may be wrapped in a ```json fence, and it may be broken."""
    response = content.get("response") if isinstance(content, dict) else None
    if not isinstance(response, str):
        return response
    fenced = _FENCED.fullmatch(response)
    try:
        return json.loads(fenced[1] if fenced else response)
    except (ValueError, RecursionError):
        return None


def _spoken(value: Any) -> str:
    """Return Q or A as text: a string as it stands, null as nothing, anything else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)

"""The one renderer of prompts: training, evaluation and chat all take their wording from here.

Segments are tokenised one by one, and SentencePiece puts its '▁' before each of them. So no template ends a prompt with
the space that Panda writes between inputs and targets: the '▁' of the answer is that space (PROTOCOLS.md §4.3).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from panda_jax.errors import InputError
from panda_jax.text.turns import Segment, Turn


@dataclass(frozen=True)
class Template:
    """A wording. `prompt(turn, i)` is the untrained text before the answer of turn number i (from 0)."""

    name: str
    prompt: Callable[[Turn, int], str]

    def render(self, turns: Sequence[Turn]) -> tuple[Segment, ...]:
        """Return the segments of a conversation: per turn its prompt (left out when empty), then its trained answer.

        render([Turn("问", "", "答")]) of `coig` is (Segment("问", False), Segment("答", True)).
        """
        texts, trained = [], []
        self.append(turns, texts, trained)
        return tuple(map(Segment, texts, trained))

    def append(self, turns: Sequence[Turn], texts: list[str], trained: list[bool]) -> None:
        """Append the conversation's segments to two columns, as `render` returns them."""
        for position, turn in enumerate(turns):
            if prompt := self.prompt(turn, position):
                texts.append(prompt)
                trained.append(False)
            texts.append(turn.output)
            trained.append(True)

    def render_prompt(self, turns: Sequence[Turn]) -> tuple[Segment, ...]:
        """Return what precedes the last answer: `render` of the same turns without its final segment."""
        return self.render(turns)[:-1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 hex of the name and of fixed conversations as rendered: another wording, another fingerprint."""
        rendered = [self.render(turns) for turns in PROBES]
        return hashlib.sha256(json.dumps([self.name, rendered], ensure_ascii=False).encode()).hexdigest()


# They reach every branch of the wordings below: with and without instruction and input, one turn and more.
PROBES: tuple[tuple[Turn, ...], ...] = (
    (Turn("", "", "甲"),),
    (Turn("乙", "", "丙"),),
    (Turn("", "丁", "戊"),),
    (Turn("己", "庚", "辛"),),
    (Turn("壬", "", "癸"), Turn("", "子", "丑"), Turn("寅", "卯", "辰")),
    (Turn("巳", "午", "未"), Turn("申", "", "酉"), Turn("", "", "戌")),
)


def _join(separator: str, first: str, second: str) -> str:
    return f"{first}{separator}{second}" if first and second else first or second


def _plain(turn: Turn, position: int) -> str:
    """No wording at all: language modelling, or inputs followed by targets."""
    return _join("\n", turn.instruction, turn.input)


def _panda(turn: Turn, position: int) -> str:
    """Panda's single-turn form: a space between the two even when one is empty (PROTOCOLS.md §4.1).

    Further turns do not exist in the original; they begin with a blank line here, as in COIG's dialogues.
    """
    return ("\n\n" if position else "") + turn.instruction + " " + turn.input


def _coig(turn: Turn, position: int) -> str:
    """Panda's form of COIG: non-empty parts joined by a blank line, and no role marks (PROTOCOLS.md §4.2)."""
    return ("\n\n" if position else "") + _join("\n\n", turn.instruction, turn.input)


def _alpaca(turn: Turn, position: int) -> str:
    """Stanford Alpaca's English prompt; its introduction stands before the first turn only."""
    ask = f"### Instruction:\n{turn.instruction}\n\n"
    if turn.input:
        ask += f"### Input:\n{turn.input}\n\n"
    ask += "### Response:"
    if position:
        return "\n\n" + ask
    context = ", paired with an input that provides further context" if turn.input else ""
    task = f"Below is an instruction that describes a task{context}."
    return f"{task} Write a response that appropriately completes the request.\n\n{ask}"


def _belle(turn: Turn, position: int) -> str:
    """BELLE's training form: instruction and input without a separator, the same in every turn (PROTOCOLS.md §6)."""
    return f"Human: \n{turn.instruction}{turn.input}\n\nAssistant: \n"


TEMPLATES: dict[str, Template] = {
    "plain": Template("plain", _plain),
    "panda": Template("panda", _panda),
    "coig": Template("coig", _coig),
    "alpaca": Template("alpaca", _alpaca),
    "belle": Template("belle", _belle),
}


def find_template(name: str) -> Template:
    """Return the template of that name; raises InputError that suggests the nearest one."""
    if name not in TEMPLATES:
        raise unknown_name("template", name, TEMPLATES)
    return TEMPLATES[name]


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> InputError:
    """Return the error for a name that is not in a table: the nearest entry, then all of them."""
    names = list(valid)
    nearest = difflib.get_close_matches(name, names, n=1)
    suggestion = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return InputError(f"{kind}: no {kind} is called {name!r}{suggestion}; choose one of {', '.join(names)}")

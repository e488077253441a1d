"""Prompts from a file or the command line, to ids, and the texts behind them, to lines of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from panda_jax.errors import InputError
from panda_jax.generation.decode import Generated
from panda_jax.text.encoding import encode_prompt
from panda_jax.text.streaming import Detokenizer
from panda_jax.text.templates import Template
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.text.turns import Segment, Turn

FIELDS = 'expected {"prompt": …} or {"instruction": …, "input": …}'


class Prompt(NamedTuple):
    """A prompt, and what to show of it."""

    where: str
    """File and line, for messages."""
    shown: dict[str, str]
    """As it was given."""
    ids: list[int]
    is_turn: bool
    """It ends where an answer begins, as in training; otherwise it is text to be continued."""


def read_prompts(
    path: Path, tokenizer: Tokenizer, template: Template | None, own_template: Callable[[], Template]
) -> list[Prompt]:
    """Return the prompts of a .jsonl file, one object a line, or of any other file, one text a line.

    {"prompt"} is continued as it is. {"instruction"}, with or without "input", becomes a turn of `template`, and of
    `own_template()`, the run's, where that is None. So does a line of text, which without a template is continued as it
    is. Raises InputError with file and line for whatever else is there.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 ({error.reason} at byte {error.start})"
        raise InputError(f"--prompts {path}: {reason}; expected a text file with a prompt per line") from error
    lines = lines[:-1] if lines[-1] == "" else lines
    prompts = []
    for number, line in enumerate(lines, 1):
        where, line = f"{path}:{number}", line.removesuffix("\r")
        if not line.strip():
            raise InputError(f"{where}: the line is empty, expected a prompt; delete the line")
        if path.suffix == ".jsonl":
            prompts.append(_of_object(where, line, tokenizer, template, own_template))
        else:
            prompts.append(of_text(where, line, tokenizer, template))
    if not prompts:
        raise InputError(f"--prompts {path}: the file is empty; expected a prompt per line")
    return prompts


def of_text(where: str, text: str, tokenizer: Tokenizer, template: Template | None) -> Prompt:
    """Return a text to be continued, or with a template the turn whose instruction it is."""
    if template is None:
        return Prompt(where, {"prompt": text}, _encoded(where, [Segment(text, False)], tokenizer), False)
    segments = template.render_prompt([Turn(text, "", "")])
    return Prompt(where, {"instruction": text}, _encoded(where, segments, tokenizer), True)


def check_lengths(prompts: Sequence[Prompt], max_new_tokens: int, context: int) -> None:
    """Raise InputError, with file and line, for a prompt that leaves no room for what is to follow."""
    for prompt in prompts:
        if len(prompt.ids) + max_new_tokens > context:
            raise InputError(
                f"{prompt.where}: {len(prompt.ids)} ids and --max-new-tokens {max_new_tokens} exceed the model's "
                f"context of {context}; shorten the prompt or lower --max-new-tokens"
            )


def written_line(prompt: Prompt, generated: Generated, tokenizer: Tokenizer) -> str:
    """Return the prompt as it was given and what was written, as a line of JSON.

    `text` goes on exactly where the prompt's text ends; `logprob` is the sum over `ids`; `stopped` says that the model
    ended it. Half a character at the end of the ids is U+FFFD in the text.
    """
    text = Detokenizer(tokenizer, after=() if prompt.is_turn else prompt.ids)
    written = "".join(text.feed(new) for new in generated.ids) + text.flush()
    facts = {"text": written, "ids": generated.ids, "logprob": sum(generated.logprobs), "stopped": generated.stopped}
    return json.dumps(prompt.shown | facts, ensure_ascii=False) + "\n"


def _of_object(
    where: str, line: str, tokenizer: Tokenizer, template: Template | None, own_template: Callable[[], Template]
) -> Prompt:
    try:
        given: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error}); {FIELDS}") from error
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise InputError(f"{where}: {line[:80]}; {FIELDS}, each a text")
    if given.keys() == {"prompt"}:
        return of_text(where, given["prompt"], tokenizer, None)
    if "instruction" not in given or given.keys() - {"instruction", "input"}:
        raise InputError(f"{where}: found the fields {', '.join(given) or 'none'}; {FIELDS}")
    turn = Turn(given["instruction"], given.get("input", ""), "")
    segments = (template or own_template()).render_prompt([turn])
    return Prompt(where, given, _encoded(where, segments, tokenizer), True)


def _encoded(where: str, segments: Sequence[Segment], tokenizer: Tokenizer) -> list[int]:
    try:
        return encode_prompt(segments, tokenizer)
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: not valid Unicode ({error.reason}); remove the character") from error

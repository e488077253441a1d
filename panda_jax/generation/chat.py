"""A conversation with a model, in the wording that it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import yaml

from panda_jax.data.corpora import CORPORA
from panda_jax.errors import InputError
from panda_jax.generation.decode import Generator
from panda_jax.generation.sampling import Sampling
from panda_jax.text.encoding import encode_prompt
from panda_jax.text.streaming import Detokenizer
from panda_jax.text.templates import TEMPLATES, Template, find_template
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.text.turns import Turn


def template_of_run(run: dict[str, Any] | None) -> Template:
    """Return the one wording of the run's instructions, from run.json; `plain` where it has none but text.

    Raises InputError, which asks for --template, for a run that mixes wordings and for weights without a run.
    """
    choice = f"give --template, one of {', '.join(TEMPLATES)}"
    if run is None or not run.get("config"):
        raise InputError(f"--template: these weights do not say which wording they were trained with; {choice}")
    sources = yaml.safe_load(run["config"])["data"]["sources"]
    names = {source.get("template") or CORPORA[source["corpus"]].template for source in sources}
    names = names - {"plain"} or names
    if len(names) > 1:
        raise InputError(f"--template: the run mixes the wordings {', '.join(sorted(names))}; {choice}")
    return find_template(names.pop())


class Chat:
    """Turns of a conversation; the oldest are left out when all of them exceed the context."""

    def __init__(
        self, generator: Generator, tokenizer: Tokenizer, template: Template, sampling: Sampling,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`say` is told when turns are left out. Raises InputError where no prompt would fit beside an answer."""
        self._generator, self._tokenizer, self._template = generator, tokenizer, template
        self._sampling, self._say = sampling, say
        self._room = generator.model.context_length - sampling.max_new_tokens
        self.turns: list[Turn] = []
        """What the next prompt is made of: questions and answers as they were said."""
        if self._room < 2:
            raise InputError(
                f"--max-new-tokens {sampling.max_new_tokens}: leaves no room for a prompt in the model's context of "
                f"{generator.model.context_length}; give a smaller number"
            )

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece; whatever was yielded when it ends is the answer that is remembered.

        Raises InputError for a question that is no valid Unicode or too long by itself; it is then forgotten.
        """
        history, self.turns = self.turns, [*self.turns, Turn(question, "", "")]
        try:
            ids = self._prompt()
        except BaseException:
            self.turns = history
            raise
        answer, text = "", Detokenizer(self._tokenizer, after=())
        try:
            for new, _ in self._generator.stream(ids, self._sampling):
                if piece := text.feed(new):
                    answer += piece
                    yield piece
            if piece := text.flush():
                answer += piece
                yield piece
        finally:
            self.turns[-1] = self.turns[-1]._replace(output=answer)

    def _prompt(self) -> list[int]:
        """Return the ids of as many of the last turns as fit, and forget the others."""
        num_turns = len(self.turns)
        try:
            ids = self._encoded()
            while len(ids) > self._room and len(self.turns) > 1:
                self.turns = self.turns[1:]
                ids = self._encoded()
        except UnicodeEncodeError as error:
            raise InputError(f"the question is not valid Unicode ({error.reason}); type it again") from error
        if len(ids) > self._room:
            raise InputError(
                f"the question has {len(ids)} ids, and there is room for {self._room}: the model's context is "
                f"{self._generator.model.context_length}, of which --max-new-tokens {self._sampling.max_new_tokens} "
                f"are kept for the answer; shorten it"
            )
        if left_out := num_turns - len(self.turns):
            self._say(f"(the conversation exceeds the model's context: the oldest {left_out} of its turns left out)")
        return ids

    def _encoded(self) -> list[int]:
        return encode_prompt(self._template.render_prompt(self.turns), self._tokenizer)

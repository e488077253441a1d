"""The chat template of an exported model, made from the wording that its run was trained with."""

from __future__ import annotations

import json

import yaml

from panda_jax.data.corpora import CORPORA
from panda_jax.text.templates import find_template
from panda_jax.text.turns import Turn
from panda_jax.weights import Weights

QUESTION = "\x00"


def chat_template(weights: Weights) -> str | None:
    """Return the Jinja template that transformers applies to messages, or None where there is no single one.

    That is so for weights without a run of ours, for runs without instructions, and for runs that mix wordings.
    """
    run = weights.provenance.get("config")
    if run is None:
        return None
    sources = yaml.safe_load(run)["data"]["sources"]
    names = {source.get("template") or CORPORA[source["corpus"]].template for source in sources} - {"plain"}
    return jinja(names.pop()) if len(names) == 1 else None


def jinja(name: str) -> str | None:
    """Return the template `name` as Jinja: BOS, then per turn its prompt, a space, the answer and EOS.

    The space is the '▁' with which SentencePiece begins the answer, which is encoded by itself in training. A prompt
    that ends in a space (panda's) has no form as one text: the two would become one piece. Then None is returned.
    """
    template = find_template(name)
    first, later = (template.prompt(Turn(QUESTION, "", ""), position).split(QUESTION) for position in (0, 1))
    if first[1].endswith(" ") or later[1].endswith(" "):
        return None
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'user' and loop.first %}"
        f"{{{{ {json.dumps(first[0])} + message.content + {json.dumps(first[1])} }}}}"
        "{% elif message.role == 'user' %}"
        f"{{{{ {json.dumps(later[0])} + message.content + {json.dumps(later[1])} }}}}"
        "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
        "{% else %}{{ raise_exception('roles are user and assistant, not ' + message.role) }}{% endif %}{% endfor %}"
    )

"""What the README tells people to write works as written."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from panda_jax import settings
from panda_jax.data import corpora
from panda_jax.data.fields import Context
from panda_jax.data.records import Skip
from panda_jax.text.turns import Turn

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def code(language: str, number: int) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[number]


def test_the_run_of_the_readme_loads(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(code("yaml", 0), encoding="utf-8")
    config = settings.load(str(file), [])
    assert [source.corpus for source in config.data.sources] == ["jsonl_text", "alpaca"]
    assert {source.corpus for source in config.data.sources} <= set(corpora.CORPORA)
    assert config.model.vocab_size == config.tokenizer.train_vocab_size


def test_the_corpus_of_the_readme_reads() -> None:
    names = vars(corpora) | {"CORPORA": {}}
    exec(code("python", 0), names)
    forum = names["CORPORA"]["forum"]
    context = Context(number=0, instruction=forum.instruction, direction="alternate")
    records = [{"title": "猫吃什么？", "best_reply": "鱼。"}, {"title": " ", "best_reply": "鱼。"}]
    readings = [reading for record in records for reading in forum.read(record, context)]
    assert readings == [(Turn("请回答：", "猫吃什么？", "鱼。"),), Skip("blank question")]
    assert set(forum.required) == set(records[0])


def test_the_objective_of_the_readme_weights_the_beginning() -> None:
    causal = SimpleNamespace(loss=lambda model, frozen, batch, rng, compute: batch["loss_weights"])
    names = {"jnp": np, "causal": causal}
    exec(code("python", 1), names)
    batch = {"positions": np.array([[126, 127, 128, 0]]), "loss_weights": np.array([[1.0, 1.0, 1.0, 0.0]])}
    np.testing.assert_array_equal(names["loss"](None, None, batch, None, None), [[2.0, 2.0, 1.0, 0.0]])
    np.testing.assert_array_equal(batch["loss_weights"], [[1.0, 1.0, 1.0, 0.0]])


@pytest.mark.parametrize("marker", ["demo command", "test command"])
def test_set_up_is_one_line_each(marker: str) -> None:
    block = README.split(f"<!-- {marker} -->")[1].split("```")[1].strip()
    assert len(block.splitlines()) == 2 and block.startswith("sh\npython -m venv .venv && ")

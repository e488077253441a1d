"""The prepare door: what it prints, its exit statuses, and what it must not import."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from panda_jax import config
from panda_jax.data.cache import preview
from panda_jax.data.preparation import prepare
from panda_jax.data.report import report
from panda_jax.data.vocabulary import load_or_train_tokenizer
from panda_jax.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent
TALK = [("你好", "你好，有什么事？"), ("一加一", "二。"), ("再见", "再见。")] * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder: run.yaml, talk.jsonl and text.txt, and no tokenizer yet."""
    rows = [json.dumps({"inputs": asked, "targets": told}, ensure_ascii=False) for asked, told in TALK]
    (tmp_path / "talk.jsonl").write_text("\n".join(rows))
    (tmp_path / "text.txt").write_text("今天天气很好，我们去公园。\n明天下雨\x1b[2J，我们在家。\n" * 30)
    (tmp_path / "run.yaml").write_text(
        """
name: test
model: {vocab_size: 300, dim: 8, num_layers: 1, num_heads: 1, num_kv_heads: 1, mlp_dim: 8, norm_eps: 1e-5,
        context_length: 64}
tokenizer: {path: new/tokenizer.model, train_vocab_size: 300}
data:
  seq_len: 64
  tokenize_workers: 1
  sources:
    - {corpus: flan, path: talk.jsonl, epochs: 2}
    - {corpus: text_lines, path: text.txt, name: 正文}
"""
    )
    return tmp_path


def door(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the door from `folder`, which is not the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "panda_jax.prepare", "--config", "run.yaml", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_door_reports_and_previews(folder: Path):
    """Share by arithmetic: tokens x epochs, from the token counts of the same table."""
    first = door(folder, "--preview", "2")
    assert first.returncode == 0, first.stderr
    assert re.search(r"^flan: 0\.0 MB, 60 records in ", first.stderr, re.MULTILINE)
    table = [line.split() for line in first.stdout.split("\n")[:4]]
    assert table[1][:3] == ["flan", "60", "60"] and table[2][:3] == ["正文", "60", "60"]
    flan, text = (int(row[3].replace(",", "")) for row in table[1:3])
    assert table[1][-3:] == ["x", "2", f"{2 * flan / (2 * flan + text):.1%}"]
    assert table[2][-3:] == ["x", "1", f"{text / (2 * flan + text):.1%}"]
    assert table[3][:4] == ["total", "120", "120", f"{flan + text:,}"]
    assert "<s>你好⟦你好，有什么事？</s>⟧" in first.stdout
    assert "flan: talk.jsonl:31 (record 30): " in first.stdout  # of 60 windows, number 0 and number 30
    assert "<s>⟦今天天气很好，我们去公园。</s>⟧" in first.stdout
    again = door(folder)
    assert again.returncode == 0 and again.stderr == ""  # nothing left to do
    assert first.stdout.startswith(again.stdout.rstrip("\n"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.sources.0.path=none.jsonl"], "none.jsonl: no such file"),
        (["data.sources.1.corpus=flan"], "text.txt:1: expected JSON"),
        (["data.sources.0.corpus=alpaca"], "talk.jsonl:1"),
        (["tokenizer.train_vocab_size=null"], "tokenizer.path new/tokenizer.model: No such file"),
        (["tokenizer.train_vocab_size=9000", "model.vocab_size=9000"], "the largest possible value is"),
        (["data.cache_dir=talk.jsonl"], "is a file, expected a folder"),
        (["--preview", "-1"], "--preview"),
    ],
)
def test_bad_input_is_one_line_and_status_2(folder: Path, arguments: list[str], message: str):
    result = door(folder, *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
    assert result.stdout == ""


def test_prepare_and_its_workers_never_import_jax(folder: Path):
    script = """
import sys
from panda_jax import prepare
import panda_jax.data.worker
prepare.main(["--config", "run.yaml"])
heavy = {"jax", "flax", "grain", "orbax", "torch", "transformers"} & {name.split(".")[0] for name in sys.modules}
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def make_config(folder: Path, *sources: config.Source, **tokenizer: Any) -> config.Config:
    return config.Config(
        name="test",
        model=config.Model(
            vocab_size=300,
            dim=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            mlp_dim=8,
            norm_eps=1e-5,
            context_length=64,
        ),
        tokenizer=config.Tokenizer(path=str(folder / "new.model"), **tokenizer),
        data=config.Data(sources=sources, cache_dir=str(folder / "cache"), seq_len=64, tokenize_workers=1),
    )


def test_the_vocabulary_is_trained_on_all_trained_sources_once(folder: Path):
    path = folder / "other.jsonl"
    path.write_text('{"inputs": "龙", "targets": "凤凤凤"}\n' * 50)
    (folder / "held.jsonl").write_text('{"text": "囍囍囍囍"}\n' * 50)
    sources = (
        config.Source(corpus="flan", path=str(folder / "talk.jsonl")),
        config.Source(corpus="text_lines", path=str(folder / "text.txt")),
        config.Source(corpus="flan", path=str(path), name="b"),
        config.Source(corpus="jsonl_text", path=str(folder / "held.jsonl"), held_out="all"),
    )
    tokenizer = load_or_train_tokenizer(make_config(folder, *sources, train_vocab_size=300, character_coverage=1.0))
    assert {"龙", "凤", "公", "你"} <= set(tokenizer.pieces(range(300)))
    assert "囍" not in tokenizer.pieces(range(300))
    path.unlink()  # the file exists now, so the sources are not read again
    assert load_or_train_tokenizer(make_config(folder, *sources, train_vocab_size=300)).model_bytes == (
        tokenizer.model_bytes
    )
    with pytest.raises(InputError, match="train_vocab_size: 301, but .* has 300 pieces; delete the file"):
        load_or_train_tokenizer(make_config(folder, *sources, train_vocab_size=301))
    (folder / "new.model").unlink()
    with pytest.raises(InputError, match=r"train_vocab_size: 301, but model\.vocab_size is 300"):
        load_or_train_tokenizer(make_config(folder, *sources, train_vocab_size=301))
    with pytest.raises(InputError, match=r"new\.model: No such file"):
        load_or_train_tokenizer(make_config(folder, *sources))


def test_shares_without_held_out_records_and_safe_previews(folder: Path):
    """20 of 60 records of `flan` are set aside: its share counts 2/3 of its tokens; a held-out source has none."""
    flan = config.Source(corpus="flan", path=str(folder / "talk.jsonl"), held_out=20)
    text = config.Source(corpus="text_lines", path=str(folder / "text.txt"), epochs=3)
    held = config.Source(corpus="text_lines", path=str(folder / "text.txt"), name="held", held_out="all")
    run = make_config(folder, flan, text, held, train_vocab_size=300)
    tokenizer = load_or_train_tokenizer(run)
    caches = prepare(run, tokenizer, lambda progress: None)
    rows = [line.split() for line in report(caches, run).split("\n")]
    tokens = [int(row[3].replace(",", "")) for row in rows[1:4]]
    planned = [tokens[0] * 2 / 3, tokens[1] * 3, 0]
    assert [row[-1] for row in rows[1:4]] == [f"{each / sum(planned):.1%}" for each in planned]
    assert [row[6] for row in rows[1:4]] == ["20", "0", "all"]

    plain = preview(caches[1], tokenizer, 1, use_colour=False)
    ids, _ = caches[1].read(1)
    assert plain.split("\n")[0] == f"text_lines: {folder}/text.txt:2 (record 1): {len(ids)} ids, {len(ids) - 1} trained"
    assert plain.split("\n")[1] == "<s>⟦明天下雨␛[2J，我们在家。</s>⟧"  # the escape sequence is shown, not obeyed
    coloured = preview(caches[0], tokenizer, 1, use_colour=True)
    assert coloured.endswith("<s>一加一\x1b[1;32m二。</s>\x1b[0m")


def test_a_preview_shows_a_dialogue_cut_in_the_middle(folder: Path):
    rows = {"conversations": [{"from": "human", "value": "你好" * 40}, {"from": "gpt", "value": "再见。"}]}
    (folder / "chat.jsonl").write_text(json.dumps(rows, ensure_ascii=False))
    sources = (
        config.Source(corpus="text_lines", path=str(folder / "text.txt")),
        config.Source(corpus="sharegpt", path=str(folder / "chat.jsonl")),
    )
    # A vocabulary of the first source alone: one that has seen the question would hold all of it in a few pieces.
    tokenizer = load_or_train_tokenizer(make_config(folder, sources[0], train_vocab_size=300))
    run = make_config(folder, *sources)
    cache = prepare(run, tokenizer, lambda progress: None)[1]
    assert cache.lengths[0] == 64 and cache.manifest["changed"] == {"prompt cut from the left": 1}
    shown = preview(cache, tokenizer, 0, use_colour=False)
    assert shown.endswith("\n\nAssistant: \n⟦再见。</s>⟧") and "Human" not in shown

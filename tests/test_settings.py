"""Settings: reading, overriding, presets, round trips, and one-line reports of every kind of mistake."""

import ast
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from panda_jax import command_line, settings
from panda_jax.config import AdamW, Lion
from panda_jax.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent

# Line numbers matter: the tests name them.
RUN = """\
name: trial
model:
  size: tiny-1m
tokenizer:
  path: small.model
data:
  seq_len: 128
  sources:
    - corpus: wiki2019zh
      path: data/wiki
      epochs: 1
    - corpus: baike2018qa
      path: data/baike
optimizer:
  learning_rate: 3e-5
schedule:
  kind: cosine
train:
  global_batch_size: 16
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write(tmp_path, RUN)


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def reason(file: Path, *overrides: str) -> str:
    """Return the one line that loading fails with, the folder left out."""
    with pytest.raises(InputError) as caught:
        settings.load(str(file), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{file.parent}/", "")


def test_a_file_is_read_with_its_types_presets_and_defaults(run_file: Path) -> None:
    config = settings.load(str(run_file), [])
    assert config.optimizer == AdamW(kind="adamw", learning_rate=0.00003)
    assert (config.model.dim, config.model.vocab_size, config.model.size) == (128, 768, "tiny-1m")
    assert [source.corpus for source in config.data.sources] == ["wiki2019zh", "baike2018qa"]
    assert config.train.clip_norm == 5.0 and config.seed == 42


def test_fields_of_the_file_win_over_the_preset(tmp_path: Path) -> None:
    file = write(tmp_path, RUN.replace("  size: tiny-1m", "  size: tiny-1m\n  vocab_size: 900"))
    assert settings.load(str(file), []).model.vocab_size == 900
    assert settings.load(str(file), ["model.vocab_size=901"]).model.vocab_size == 901


def test_overrides_reach_groups_lists_and_absent_groups(run_file: Path) -> None:
    overrides = [
        "data.sources.1.epochs=2.5",
        "data.sources.0.name='7'",
        "compute.remat=none",
        "train.clip_norm=null",
        "checkpoint.steps=[3000, 6000]",
        "train.trainable=[layers/w*, embed]",
        "model.init_from.checkpoint=runs/first",
        "train.max_steps=1",
        "train.max_steps=2",
        "name=a=b",
        "tokenizer.path=2024-01-01",
    ]
    config = settings.load(str(run_file), overrides)
    assert config.data.sources[1].epochs == 2.5 and config.data.sources[0].name == "7"
    assert config.compute.remat == "none" and config.train.clip_norm is None
    assert config.checkpoint.steps == (3000, 6000) and config.train.trainable == ("layers/w*", "embed")
    assert config.model.init_from is not None and config.model.init_from.checkpoint == "runs/first"
    assert config.train.max_steps == 2, "the last override of a setting wins"
    assert config.name == "a=b" and config.tokenizer.path == "2024-01-01", "a date is text"


def test_another_kind_of_optimizer_drops_the_old_ones_settings(run_file: Path) -> None:
    # AdamW's 3e-5 of the file would be ten times Lion's own default of 3e-6.
    assert settings.load(str(run_file), ["optimizer.kind=lion"]).optimizer == Lion(kind="lion", learning_rate=3e-6)
    for overrides in (["optimizer.kind=lion", "optimizer.beta1=0.8"], ["optimizer.beta1=0.8", "optimizer.kind=lion"]):
        assert settings.load(str(run_file), overrides).optimizer == Lion(kind="lion", beta1=0.8)
    same_kind = settings.load(str(run_file), ["optimizer.kind=adamw"])
    assert same_kind.optimizer.learning_rate == 3e-5, "the same kind keeps its settings"
    assert settings.load(str(run_file), ["schedule.kind=linear", "schedule.warmup_steps=3"]).schedule.warmup_steps == 3


def test_resolved_yaml_loads_back_equal(run_file: Path, tmp_path: Path) -> None:
    overrides = [
        "name='3e-5'",
        "data.sources.0.instruction='请回答：\\n\"问\"'",
        "optimizer.kind=adafactor",
        "model.size=llama-7b",
    ]
    config = settings.load(str(run_file), [*overrides, "tokenizer.path='2024-01-01'", "data.sources.0.held_out=all"])
    resolved = write(tmp_path, settings.to_yaml(config))
    assert settings.load(str(resolved), []) == config
    assert config.name == "3e-5" and config.tokenizer.path == "2024-01-01"


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_run_round_trips(file: Path, tmp_path: Path) -> None:
    config = settings.load(str(file), [])
    assert settings.load(str(write(tmp_path, settings.to_yaml(config))), []) == config


# (wrong, right): slips of the finger, plurals, other spellings, and the names other trainers use.
MISSPELLINGS = [
    ("nmae", "name"),
    ("modle", "model"),
    ("models", "model"),
    ("tokeniser", "tokenizer"),
    ("dataset", "data"),
    ("objctive", "objective"),
    ("random_seed", "seed"),
    ("optim", "optimizer"),
    ("scheduler", "schedule"),
    ("training", "train"),
    ("checkpoints", "checkpoint"),
    ("logs", "log"),
    ("model.vocabsize", "vocab_size"),
    ("model.hidden_size", "dim"),
    ("model.n_layers", "num_layers"),
    ("model.num_head", "num_heads"),
    ("model.num_key_value_heads", "num_kv_heads"),
    ("model.intermediate_size", "mlp_dim"),
    ("model.rms_norm_eps", "norm_eps"),
    ("model.context_lenght", "context_length"),
    ("model.rope_base", "rope_theta"),
    ("model.tied_embeddings", "tie_embeddings"),
    ("model.init-from", "init_from"),
    ("tokenizer.pth", "path"),
    ("tokenizer.vocab_size", "train_vocab_size"),
    ("data.seq_length", "seq_len"),
    ("data.max_length", "seq_len"),
    ("data.pack", "packing"),
    ("data.shufle", "shuffle"),
    ("data.source", "sources"),
    ("data.cache_directory", "cache_dir"),
    ("data.max_drop_fraction", "max_dropped_fraction"),
    ("data.sources.0.corpora", "corpus"),
    ("data.sources.0.epoch", "epochs"),
    ("data.sources.0.heldout", "held_out"),
    ("data.sources.0.over_long", "overlong"),
    ("data.sources.0.wieght", "weight"),
    ("optimizer.lr", "learning_rate"),
    ("optimizer.beta_2", "beta2"),
    ("optimizer.epsilon", "eps"),
    ("optimizer.weigth_decay", "weight_decay"),
    ("schedule.warmup", "warmup_steps"),
    ("schedule.warm_up_fraction", "warmup_fraction"),
    ("train.batch_size", "global_batch_size"),
    ("train.microbatch_size", "micro_batch_size"),
    ("train.max_step", "max_steps"),
    ("train.max_grad_norm", "clip_norm"),
    ("train.non_finite", "nonfinite"),
    ("train.learning_rate", "optimizer.learning_rate"),
    ("compute.attn", "attention"),
    ("compute.rematerialisation", "remat"),
    ("mesh.tensors", "tensor"),
    ("checkpoint.save_steps", "every_steps"),
    ("log.wandb", "wandb_project"),
]


@pytest.mark.parametrize(("wrong", "right"), MISSPELLINGS, ids=[wrong for wrong, _ in MISSPELLINGS])
def test_a_misspelt_key_is_named_with_what_was_meant(run_file: Path, wrong: str, right: str) -> None:
    found = reason(run_file, f"{wrong}=1")
    assert found.startswith(f"override '{wrong}=1': {wrong}: unexpected key (did you mean '{right}'?)")


def test_there_are_fifty_misspellings() -> None:
    assert len(set(MISSPELLINGS)) >= 50


DID_YOU_MEAN = [
    ("  seq_len: 128", "  seq_length: 128", "7: data.seq_length: unexpected key (did you mean 'seq_len'?)"),
    ("      epochs: 1", "      epoch: 1", "11: data.sources.0.epoch: unexpected key (did you mean 'epochs'?)"),
    (
        "  kind: cosine",
        "  kind: cosin",
        "17: schedule.kind: found \"cosin\"; expected 'linear', 'cosine' or 'constant'",
    ),
    ("  kind: cosine", "  kind: cosin", "(did you mean 'cosine'?)"),
    ("  learning_rate: 3e-5", "  kind: adam", "15: optimizer.kind: found \"adam\"; expected 'adamw', 'sgd', 'lion' or"),
    ("  learning_rate: 3e-5", "  kind: adam", "(did you mean 'adamw'?)"),
    ("  size: tiny-1m", "  size: llama-7B", '3: model.size: found "llama-7B"; expected one of llama-7b, llama-13b, '),
    ("  size: tiny-1m", "  size: llama-7B", "(did you mean 'llama-7b'?)"),
]
WRONG_VALUES = [
    ("  seq_len: 128", "  seq_len: long", '7: data.seq_len: found "long"; expected integer > 0'),
    ("  seq_len: 128", "  seq_len: true", "7: data.seq_len: found true; expected integer > 0"),
    ("  seq_len: 128", "  seq_len: 0", "7: data.seq_len: found 0; expected integer > 0"),
    ("  seq_len: 128", "  seq_len: 1.5", "7: data.seq_len: found 1.5; expected integer > 0"),
    ("name: trial", "name: 7", "1: name: found 7; expected text"),
    (
        "  learning_rate: 3e-5",
        "  learning_rate: .inf",
        "15: optimizer.learning_rate: found Infinity; expected number >",
    ),
    ("  path: small.model\n", "  path:\n", "5: tokenizer.path: found null; expected text"),
    ("  size: tiny-1m", "  size: 7", "3: model.size: found 7; expected one of llama-7b, "),
    ("  size: tiny-1m", "  size: tiny-1m\n  dim: 129", "2: model: dim 129 must be num_heads 4 times an even head size"),
    ("  seq_len: 128", "  seq_len: 1024", " data.seq_len 1024 exceeds model.context_length 512; lower it"),
]
ABSENT_KEYS = [
    ("  path: small.model\n", "  train_vocab_size: 9\n", "4: tokenizer.path: missing; expected text"),
    ("      path: data/baike\n", "", "12: data.sources.1.path: missing; expected text"),
    ("name: trial\n", "", " name: missing; expected text"),
    ("  size: tiny-1m", "  dim: 128", "2: model.vocab_size: missing; expected integer > 0 (or a preset in model.size)"),
]
BROKEN_YAML = [
    ("      epochs: 1", "      epochs: 1\n      epochs: 2", "12: data.sources.0.epochs: given twice, first in line 11"),
    ("name: trial", "name: [", "3: not YAML: "),
    ("name: trial", "name: !!python/name:os.system", "1: not YAML: could not determine a constructor"),
    (
        "name: trial",
        "name: !!binary aGVsbG8=",
        "1: found the YAML type tag:yaml.org,2002:binary; expected text, number",
    ),
    ("name: trial", "7: trial", "1: found the key '7'; expected a word"),
    ("name: trial", "name: &loop [*loop]", "1: not usable: nested too deeply, or an alias that contains itself"),
]


@pytest.mark.parametrize(("old", "new", "expected"), DID_YOU_MEAN + WRONG_VALUES + ABSENT_KEYS + BROKEN_YAML)
def test_a_mistake_in_the_file_is_placed_and_explained(tmp_path: Path, old: str, new: str, expected: str) -> None:
    found = reason(write(tmp_path, RUN.replace(old, new, 1)))
    assert found.startswith("run.yaml:") and (f"run.yaml:{expected}" in found or expected.startswith("("))
    assert expected in found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.sources.2.epochs=1", "data.sources is a list: found '2'; expected an entry from 0 to 1"),
        ("data.sources.wiki.epochs=1", "data.sources is a list: found 'wiki'; expected an entry from 0 to 1"),
        ("data.seq_len.x=1", "data.seq_len is 128, so it has no setting 'x'"),
        ("train.0=1", "train is not a list; expected a name instead of 0"),
        ("train.max_steps", "expected a.b=c, such as train.max_steps=100"),
        ("train..max_steps=1", "expected a.b=c, such as train.max_steps=100"),
        ("mesh.zero=2", "mesh.zero: found 2; expected 1 or 3"),
        ("train.trainable=embedding", "expected 'all', 'embeddings' or a list of text (did you mean 'embeddings'?)"),
        ("checkpoint.steps=[5, 0]", "checkpoint.steps.1: found 0; expected integer > 0"),
        ("optimizer={kind: lion, eps: 1}", "optimizer.eps: unexpected key"),
        ("optimizer=lion", "expected settings with a kind of 'adamw', 'sgd', 'lion' or 'adafactor'"),
        ("mesh={data: 1, data: 2}", "data: given twice"),
        ("mesh={", "not YAML: "),
        ("data.sources=[]", "`sources` is empty; name at least one corpus"),
        ("data.sources.0.weight=1", "give `epochs` or `weight`, not both"),
    ],
)
def test_a_mistake_in_an_override_names_the_override(run_file: Path, override: str, expected: str) -> None:
    found = reason(run_file, "seed=1", override)
    assert f"override '{override}'" in found and expected in found and "seed=1" not in found


def test_all_mistakes_of_a_file_are_named_in_the_one_line(tmp_path: Path) -> None:
    file = write(tmp_path, RUN.replace("seq_len: 128", "seq_length: 128").replace("size: 16", "size: no"))
    assert reason(file) == (
        "run.yaml:7: data.seq_length: unexpected key (did you mean 'seq_len'?); also wrong: train.global_batch_size"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "run.yaml: found nothing; expected `key: value` lines"),
        (b"- a\n- b\n", "run.yaml: found a list; expected `key: value` lines"),
        ("name: 熊猫".encode("gb18030"), "run.yaml: byte 6 is not UTF-8; save the file as UTF-8"),
        (b"name: a\x00b", "run.yaml:1: not YAML: "),
        (b"name: a\n---\nname: b\n", "run.yaml:2: not YAML: "),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    assert expected in reason(file)


def test_an_absent_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert "absent.yaml: no such file" in reason(tmp_path / "absent.yaml")
    assert "Is a directory; expected a readable YAML file" in reason(tmp_path)


def test_help_names_every_setting_with_type_default_and_documentation() -> None:
    text = settings.help_text()
    flat = " ".join(text.split())
    for expected in (
        "name (text; required) Name of the run and of its folder.",
        "model.norm_eps (number > 0; required) Epsilon inside RMSNorm",
        "model.init_from.checkpoint (text or null; default null)",
        "data.sources.N.held_out (integer >= 0 or 'all'; default 0)",
        "data.sources.N.epochs (number >= 0 or null; default null)",
        "[optimizer, kind: lion] Sign of an interpolated momentum",
        "train.clip_norm (number > 0 or null; default 5.0) Largest global gradient norm",
        "mesh.zero (1 or 3; default 1)",
        "schedule.warmup_fraction (number >= 0 and <= 1; default 0.01)",
        "[data.sources.N] The mixture. One corpus, or one part of one.",
        "checkpoint.steps (a list of integer > 0; default [])",
    ):
        assert expected in flat
    assert "optimizer.kind (" not in flat, "the kind is in the heading of its group"
    assert max(map(len, text.splitlines())) <= 100
    classes = [item for item in ast.parse((REPOSITORY / "panda_jax" / "config.py").read_text()).body]
    bodies = [item.body for item in classes if isinstance(item, ast.ClassDef)]
    documented = [ast.literal_eval(item.value) for body in bodies for item in body if isinstance(item, ast.Expr)]
    assert len(documented) > 90 and [doc for doc in documented if " ".join(doc.split()) not in flat] == []


def test_settings_import_no_jax() -> None:
    code = "import sys, panda_jax.command_line; print('jax' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def status_of(capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[int, str]:
    def main(_: list[str]) -> None:
        raise error

    return command_line.exit_status(main, []), capsys.readouterr().err


def test_doors_turn_failures_into_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.exit_status(lambda arguments: None, []) == 0
    assert command_line.exit_status(lambda arguments: len(arguments), ["a", "b", "c"]) == 3
    assert status_of(capsys, InputError("run.yaml:3: two\nlines")) == (2, "error: run.yaml:3: two lines\n")
    assert status_of(capsys, KeyboardInterrupt()) == (130, "interrupted\n")
    full = OSError(errno.ENOSPC, "x", "runs/a/metrics.jsonl")
    expected = "error: runs/a/metrics.jsonl: No space left on device; free some space or choose another folder\n"
    assert status_of(capsys, full) == (2, expected)
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = OSError(errno.EROFS, "x", "runs")
    expected = "error: runs: Read-only file system; choose a folder that can be written\n"
    assert status_of(capsys, wrapped) == (2, expected)
    full = type("JaxRuntimeError", (RuntimeError,), {})("RESOURCE_EXHAUSTED: Out of memory.\n  at x")
    status, told = status_of(capsys, full)
    assert status == 2 and told.count("\n") == 1 and "train.micro_batch_size" in told
    assert told.startswith("error: the memory of a device is full (RESOURCE_EXHAUSTED: Out of memory.)")
    status, told = status_of(capsys, ZeroDivisionError("our fault"))
    assert status == 1 and told.startswith("Traceback") and told.endswith("ZeroDivisionError: our fault\n")


def test_arguments_of_a_run_door(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = command_line.RunParser("train", "Train a model.")
    parser.add_argument("--dry-run", action="store_true")
    config, arguments = parser.parse(["seed=7", "--config", str(run_file), "--dry-run", "train.max_steps=3"])
    assert (config.seed, config.train.max_steps, arguments.dry_run) == (7, 3, True)
    for mistaken, expected in ((["seed=7"], "--config"), (["--config", str(run_file), "--dryrun"], "--dryrun")):
        with pytest.raises(InputError, match=f"{expected}.*; see python -m panda_jax.train --help"):
            parser.parse(mistaken)
    with pytest.raises(SystemExit) as exit_:
        parser.parse(["--help"])
    told = capsys.readouterr().out
    assert exit_.value.code == 0 and "--dry-run" in told and "data.seq_len (integer > 0; default 2048)" in told

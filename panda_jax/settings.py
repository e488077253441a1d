"""Read a run's settings: a YAML file, `a.b=c` overrides, presets, and one-line reports of mistakes."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from panda_jax import schema
from panda_jax.config import Config
from panda_jax.errors import InputError
from panda_jax.presets import PRESETS

Where = tuple[str | int, ...]

# Names that other trainers use for our settings and that no edit distance would find.
SYNONYMS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "max_seq_length": "seq_len",
    "max_length": "seq_len",
    "num_train_epochs": "epochs",
    "max_grad_norm": "clip_norm",
    "hidden_size": "dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "n_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "context_length",
    "tie_word_embeddings": "tie_embeddings",
    "optim": "optimizer",
    "save_steps": "every_steps",
    "gradient_checkpointing": "remat",
    "betas": "beta1",
}


class _Loader(yaml.SafeLoader):
    """YAML in which `3e-5` is a number and a date is text."""


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads: a text that looks like a number is quoted."""


def _set_resolvers(loader_or_dumper: Any) -> None:
    kept = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
        for first, rules in loader_or_dumper.yaml_implicit_resolvers.items()
    }
    loader_or_dumper.yaml_implicit_resolvers = kept
    number = re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
    loader_or_dumper.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))


_set_resolvers(_Loader)
_set_resolvers(_Dumper)


@dataclasses.dataclass
class _Tree:
    """The settings as plain values, and where each of them was written."""

    file: str
    values: dict[str, Any]
    lines: dict[Where, int]
    overrides: dict[Where, str] = dataclasses.field(default_factory=dict)

    def place(self, where: Where) -> str:
        """Name the override or the file and line that a mistake at `where` comes from."""
        for length in range(len(where), 0, -1):
            if where[:length] in self.overrides:
                return f"override '{self.overrides[where[:length]]}'"
            if where[:length] in self.lines:
                break
        below = [f"'{text}'" for path, text in self.overrides.items() if path[: len(where)] == where]
        if below and where and where not in self.lines:
            return f"override {below[0]}"
        known = [self.lines[where[:length]] for length in range(1, len(where) + 1) if where[:length] in self.lines]
        place = f"{self.file}:{known[-1]}" if known else self.file
        return f"{place} with override {', '.join(below)}" if below and where in (*self.lines, ()) else place

    def fail(self, where: Where, message: str) -> InputError:
        name = ".".join(map(str, where))
        return InputError(f"{self.place(where)}: {name}: {message}" if name else f"{self.place(where)}: {message}")


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Return the run described by the YAML file at `path` with `a.b=c` overrides applied.

    An index names an entry of a list (`data.sources.0.epochs=2`); the right side is YAML (`train.clip_norm=null`).
    Overriding the `kind` of a group drops the settings of the old kind. `model.size` fills what is not given.
    Raises InputError naming file:line or override, key, value found, value expected.
    """
    tree = _read(path)
    parsed = [_parse_override(text) for text in overrides]
    # Kinds first: `optimizer.learning_rate=1e-4 optimizer.kind=lion` must not lose the learning rate.
    for where, value, text in sorted(parsed, key=lambda override: not _is_kind(override[0])):
        _apply(tree, where, value, text)
    _fill_kinds(tree)
    _fill_preset(tree)
    try:
        # JSON mode is pydantic's strict mode for plain trees: 1 is a number, true and "1" are not.
        return pydantic.TypeAdapter(Config).validate_json(json.dumps(tree.values), strict=True)
    except pydantic.ValidationError as mistakes:
        raise _report(mistakes, tree) from None


def to_yaml(config: Config) -> str:
    """Return the resolved settings as YAML that `load` reads back to an equal Config."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def help_text() -> str:
    """Return every setting with its type, its default and its documentation, for a terminal."""
    return schema.document(Config)


def _read(path: str) -> _Tree:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; expected the YAML file of a run, such as those under configs/"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a readable YAML file") from None
    lines: dict[Where, int] = {}
    values = _parse(text, lambda line: f"{path}:{line}", lines)
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise InputError(f"{path}: found {found}; expected `key: value` lines, starting with `name:`")
    return _Tree(path, values, lines)


def _parse(text: str, place: Callable[[int], str], lines: dict[Where, int]) -> Any:
    """Parse YAML to plain values and note the line of every key; `place` renders a line number for messages."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _plain(loader, node, (), place, lines)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        reason = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise InputError(f"{place(line)}: not YAML: {reason}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{place(1)}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{place(1)}: not usable: nested too deeply, or an alias that contains itself") from None


def _plain(loader: _Loader, node: yaml.Node, where: Where, place: Callable[[int], str], lines: dict[Where, int]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[*where, index] = item.start_mark.line + 1
        return [_plain(loader, item, (*where, index), place, lines) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        written: dict[Any, list[int]] = {}
        for key, _ in node.value:
            written.setdefault(str(key.value), []).append(key.start_mark.line + 1)
        loader.flatten_mapping(node)
        values: dict[str, Any] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if not (isinstance(key, yaml.ScalarNode) and key.tag.endswith(":str")):
                raise InputError(f"{place(line)}: found the key {key.value!r}; expected a word")
            if len(given := written.get(key.value, [])) > 1:
                name = ".".join(map(str, (*where, key.value)))
                raise InputError(f"{place(given[1])}: {name}: given twice, first in line {given[0]}; keep one")
            lines[*where, key.value] = line
            values[key.value] = _plain(loader, item, (*where, key.value), place, lines)
        return values
    value = loader.construct_object(node)
    if not isinstance(value, str | int | float | bool | None):
        line = node.start_mark.line + 1
        raise InputError(f"{place(line)}: found the YAML type {node.tag}; expected text, number, true, false or null")
    return value


def _parse_override(text: str) -> tuple[Where, Any, str]:
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f"override '{text}': expected a.b=c, such as train.max_steps=100")
    where = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    return where, _parse(value, lambda line: f"override '{text}'", {}), text


def _is_kind(where: Where) -> bool:
    return len(where) == 2 and where[0] in schema.tagged_unions(Config) and where[1] == "kind"


def _apply(tree: _Tree, where: Where, value: Any, text: str) -> None:
    parent: Any = tree.values
    for depth, part in enumerate(where[:-1]):
        _check_step(parent, where[: depth + 1], text)
        if isinstance(parent, dict) and parent.get(part) is None:
            parent[part] = {}
        parent = parent[part]
    _check_step(parent, where, text)
    replaced = where
    if _is_kind(where) and parent.get("kind", schema.tagged_unions(Config)[str(where[0])]) != value:
        parent.clear()
        replaced = where[:-1]
    parent[where[-1]] = value
    for places in (tree.lines, tree.overrides):
        for old in [old for old in places if old[: len(replaced)] == replaced and len(old) >= len(where)]:
            del places[old]
    tree.overrides[where] = text


def _check_step(parent: Any, where: Where, text: str) -> None:
    part, name = where[-1], ".".join(map(str, where[:-1]))
    if isinstance(parent, list):
        if not (isinstance(part, int) and part < len(parent)):
            entries = f"an entry from 0 to {len(parent) - 1}" if parent else "no entry, for it is empty"
            raise InputError(f"override '{text}': {name} is a list: found '{part}'; expected {entries}")
    elif not isinstance(parent, dict):
        raise InputError(f"override '{text}': {name} is {_show(parent)}, so it has no setting '{part}'")
    elif not isinstance(part, str):
        raise InputError(f"override '{text}': {name or 'the run'} is not a list; expected a name instead of {part}")


def _fill_kinds(tree: _Tree) -> None:
    for name, default_kind in schema.tagged_unions(Config).items():
        if isinstance(group := tree.values.get(name), dict):
            group.setdefault("kind", default_kind)


def _fill_preset(tree: _Tree) -> None:
    model = tree.values.get("model")
    if not isinstance(model, dict) or model.get("size") is None:
        return
    size = model["size"]
    if not isinstance(size, str) or size not in PRESETS:
        near = _nearest(str(size), list(PRESETS))
        expected = f"one of {', '.join(PRESETS)}" + (f" (did you mean '{near}'?)" if near else "")
        raise tree.fail(("model", "size"), f"found {_show(size)}; expected {expected}")
    tree.values["model"] = PRESETS[size] | model


def _report(mistakes: pydantic.ValidationError, tree: _Tree) -> InputError:
    """Return one line: the mistake to mend first, and the names of the others."""
    found: dict[Where, tuple[bool, str]] = {}
    for mistake in mistakes.errors():
        where = _locate(mistake["loc"], mistake["type"], tree.values)
        if not any(where[:length] in found for length in range(len(where) + 1)):
            found[where] = (mistake["type"] == "unexpected_keyword_argument", _explain(mistake, where, tree.values))
    misspelt = {where[:-1] for where, (is_unexpected, _) in found.items() if is_unexpected}
    # A misspelt key is usually the missing one as well: say it once.
    wrong = [where for where, (_, text) in found.items() if not (text.startswith("missing") and where[:-1] in misspelt)]
    wrong.sort(key=lambda where: not found[where][0])
    others = ", ".join(".".join(map(str, where)) for where in wrong[1:])
    return tree.fail(wrong[0], found[wrong[0]][1] + (f"; also wrong: {others}" if others else ""))


def _locate(location: Sequence[str | int], kind: str, values: Any) -> Where:
    """Drop from pydantic's location what is no key: tags of unions and names of types."""
    where: list[str | int] = []
    value: Any = values
    for depth, part in enumerate(location):
        if part in _keys(value):
            where.append(part)
            value = value[part]
        elif kind == "missing" and depth == len(location) - 1:
            where.append(part)
    if kind == "union_tag_invalid":
        where.append("kind")
    return tuple(where)


def _keys(value: Any) -> Iterable[str | int]:
    return range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()


def _explain(mistake: Any, where: Where, values: Any) -> str:
    if mistake["type"] == "unexpected_keyword_argument":
        return f"unexpected key ({_suggest(str(where[-1]), schema.names_at(Config, values, where[:-1]))})"
    if mistake["type"] == "value_error":
        return str(mistake["ctx"]["error"])
    expected = schema.describe_at(Config, values, where)
    if mistake["type"] == "missing":
        return f"missing; expected {expected}" + (" (or a preset in model.size)" if where[0] == "model" else "")
    value: Any = values
    for part in where:
        value = value[part]
    near = _nearest(str(value), schema.choices_at(Config, values, where)) if isinstance(value, str) else None
    return f"found {_show(value)}; expected {expected}" + (f" (did you mean '{near}'?)" if near else "")


def _suggest(key: str, names: list[str]) -> str:
    elsewhere = schema.all_names(Config)
    if near := _nearest(key, names):
        return f"did you mean '{near}'?"
    leaf = _nearest(key, list(elsewhere), cutoff=0.8)
    return f"did you mean '{elsewhere[leaf]}'?" if leaf else f"expected one of: {', '.join(names)}"


def _nearest(word: str, names: list[str], cutoff: float = 0.6) -> str | None:
    plain = word.lower().replace("-", "_")
    if SYNONYMS.get(plain) in names:
        return SYNONYMS[plain]
    lowered = {name.lower().replace("-", "_"): name for name in names}
    close = difflib.get_close_matches(plain, lowered, n=1, cutoff=cutoff)
    if not close and len(plain) >= 4:  # part of a name or more than it: wandb for wandb_project, random_seed for seed
        close = [name for name in lowered if plain in name or (len(name) >= 4 and name in plain)]
    return lowered[close[0]] if close else None


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

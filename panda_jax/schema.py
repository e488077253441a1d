"""The settings' classes in words: which names a group has, what each setting may be, and the `--help` text."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

WIDTH = 100
TYPE_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null"}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def tagged_unions(root: type) -> dict[str, str]:
    """Return the fields of `root` that hold one of several groups told apart by `kind`, with the default kind."""
    return {
        name: field.get_default(call_default_factory=True).kind
        for name, field in _fields(root).items()
        if field.discriminator == "kind"
    }


def names_at(root: type, values: Any, where: tuple[str | int, ...]) -> list[str]:
    """Return the settings of the group at `where`; `values` decides between the kinds of a union."""
    annotation, value = _walk(root, values, where)
    group = _group(annotation, value)
    return list(_fields(group)) if group else []


def describe_at(root: type, values: Any, where: tuple[str | int, ...]) -> str:
    """Return in words what the setting at `where` may be."""
    return describe(_walk(root, values, where)[0])


def choices_at(root: type, values: Any, where: tuple[str | int, ...]) -> list[str]:
    """Return the texts that the setting at `where` is limited to, or nothing."""
    members = _members(_walk(root, values, where)[0])
    literals = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    return [choice for choice in literals if isinstance(choice, str)]


def all_names(root: type) -> dict[str, str]:
    """Return last name -> full name of every setting; the first one in the order of the classes wins."""
    names: dict[str, str] = {}
    for group_name, group, _ in _groups(root, "", ""):
        for name in _fields(group):
            names.setdefault(name, f"{group_name}.{name}" if group_name else name)
    return names


def document(root: type) -> str:
    """Return every setting of `root`, group by group: name, type, default and documentation."""
    paragraphs = []
    for group_name, group, purpose in _groups(root, "", ""):
        kind = _kind(group)
        title = (group_name or "the run") + (f", kind: {kind}" if kind else "")
        paragraphs.append(_wrap(f"[{title}] {purpose} {group.__doc__}", ""))
        for name, field in _fields(group).items():
            annotation = _annotation(field)
            if _is_nested(annotation) or (name == "kind" and kind):
                continue
            full = f"{group_name}.{name}" if group_name else name
            default = "required" if field.is_required() else f"default {_yaml(field.default)}"
            paragraphs.append(_wrap(f"{full} ({describe(annotation)}; {default})", "  "))
            paragraphs.append(_wrap(field.description or "", "      "))
        paragraphs.append("")
    return "\n".join(paragraphs).rstrip() + "\n"


def describe(annotation: Any) -> str:
    """Return a type annotation in words, bounds included: `integer > 0 or 'all'`."""
    members = _members(annotation)
    if all(map(dataclasses.is_dataclass, members)) and len(members) > 1:
        kinds = [repr(_kind(member)) for member in members]
        return f"settings with a kind of {_join(kinds)}"
    words = [word for member in members for word in _describe_member(member)]
    return _join(words)


def _describe_member(annotation: Any) -> list[str]:
    bounds: list[str] = []
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        constraints = [c for item in metadata for c in (item.metadata if isinstance(item, FieldInfo) else [item])]
        bounds = [
            f"{sign} {getattr(c, name):g}" for c in constraints for name, sign in SIGNS.items() if hasattr(c, name)
        ]
    if get_origin(annotation) is Literal:
        return [repr(choice) for choice in get_args(annotation)]
    if get_origin(annotation) is tuple:
        return [f"a list of {describe(get_args(annotation)[0])}"]
    if dataclasses.is_dataclass(annotation):
        return [f"settings ({', '.join(_fields(annotation))})"]
    return [f"{TYPE_NAMES[annotation]} {' and '.join(bounds)}".strip()]


def _fields(group: Any) -> dict[str, FieldInfo]:
    return group.__pydantic_fields__


def _annotation(field: FieldInfo) -> Any:
    """Return the annotation with the bounds that pydantic moved into the field."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _kind(group: Any) -> str | None:
    """Return the value of `kind` that selects this group in a tagged union."""
    choices = get_args(_fields(group)["kind"].annotation) if "kind" in _fields(group) else ()
    return choices[0] if len(choices) == 1 else None


def _group(annotation: Any, value: Any) -> Any:
    """Return the class that a mapping at this place is checked against, None when that is undecided."""
    groups = [member for member in _members(annotation) if dataclasses.is_dataclass(member)]
    if len(groups) > 1:
        kind = value.get("kind") if isinstance(value, dict) else None
        groups = [group for group in groups if _kind(group) == kind]
    return groups[0] if groups else None


def _walk(root: type, values: Any, where: tuple[str | int, ...]) -> tuple[Any, Any]:
    annotation: Any = root
    for part in where:
        if isinstance(part, int):
            lists = [member for member in _members(annotation) if get_origin(member) is tuple]
            annotation = get_args(lists[0])[0]
            values = values[part]
        else:
            group = _group(annotation, values)
            if group is None:  # an unknown kind: the place of `kind` itself
                return Literal[tuple(_kind(member) for member in _members(annotation))], None
            annotation = _annotation(_fields(group)[part])
            values = values.get(part)
    return annotation, values


def _is_nested(annotation: Any) -> bool:
    return any(dataclasses.is_dataclass(member) for member in _members(_element(annotation)))


def _element(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is tuple else annotation


def _groups(group: Any, name: str, purpose: str) -> Iterator[tuple[str, Any, str]]:
    """Yield name, class and the documentation of the field that holds it, for this group and those inside it."""
    yield name, group, purpose
    for field_name, field in _fields(group).items():
        annotation = _annotation(field)
        inner = ".".join(filter(None, (name, field_name, "N" if get_origin(annotation) is tuple else "")))
        for member in _members(_element(annotation)):
            if dataclasses.is_dataclass(member):
                yield from _groups(member, inner, field.description or "")


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _wrap(text: str, indent: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _yaml(value: Any) -> str:
    return "unset" if value is PydanticUndefined else json.dumps(value, ensure_ascii=False)

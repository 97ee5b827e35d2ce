"""A recipe while it is read: its values, the line of each, and everything that is wrong with them.

YAML, `--set` and pydantic each complain in their own way; here all of it becomes a `Problem` with file, line and key.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t

Key = tuple[str | int, ...]
M = typing.TypeVar("M", bound=BaseModel)


@dataclass
class Draft:
    """A recipe's values and where each of them stands, while it is read and checked."""

    file: str
    values: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)
    from_flags: set[Key] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def where(self, key: Key) -> str:
        """`recipes/hatch.yaml:12 (stages.base.model.size)`."""
        dotted = ".".join(str(part) for part in key)
        for length in range(len(key), -1, -1):
            if key[:length] in self.from_flags:
                return f"--set {dotted}"
            if key[:length] in self.lines:
                return f"{self.file}:{self.lines[key[:length]]}" + (f" ({dotted})" if dotted else "")
        return f"{self.file} ({dotted})"

    def complain(self, key: Key, what: str, **rest: str) -> None:
        self.problems.append(Problem(what, where=self.where(key), **rest))

    def raise_problems(self) -> None:
        if self.problems:
            raise FledgeError(*dict.fromkeys(self.problems))


def parse(text: str, file: str) -> Draft:
    """Read YAML. Raises FledgeError where it is none."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else file
        raise FledgeError(
            Problem(t("not valid YAML: {why}", why=getattr(error, "problem", None) or error), where=where)
        ) from None
    draft = Draft(file, {})
    if not isinstance(root, yaml.MappingNode):
        raise FledgeError(Problem(t("a recipe is a mapping with the keys name and stages"), where=file))
    _note_lines(root, (), draft)
    draft.values = loader.construct_document(root)
    return draft


def _note_lines(node: yaml.Node, key: Key, draft: Draft) -> None:
    draft.lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for name_node, value in node.value:
            name = str(name_node.value)
            draft.lines[(*key, name)] = name_node.start_mark.line + 1
            if name in seen:
                draft.complain((*key, name), t('"{key}" stands twice', key=name), fix=t("keep one of them"))
            seen.add(name)
            _note_lines(value, (*key, name), draft)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*key, index), draft)


def apply_setting(draft: Draft, setting: str, top: Mapping[str, Any]) -> None:
    """`base.model.size=1M` sets a stage's key, `seed=7` or `execution.threads=1` one of the recipe's (`top`)."""
    dotted, equals, text = setting.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        draft.problems.append(Problem(t("--set takes stage.key=value"), where=f"--set {setting}", found=setting))
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    stages = draft.values.get("stages") or {}
    at_top = parts[0] in top and parts[0] not in stages
    if not at_top and parts[0] != "stages":
        if parts[0] not in stages:
            names = [*stages, *top]
            draft.problems.append(
                Problem(
                    t('the recipe has no stage "{name}"', name=parts[0]),
                    where=f"--set {setting}",
                    allowed=listing(names, 40),
                    fix=did_you_mean(parts[0], names),
                )
            )
            return
        parts = ["stages", *parts]
    key: Key = ()
    target: Any = draft.values
    for part in parts[:-1]:
        step: str | int = int(part) if isinstance(target, list) and part.isdigit() else part
        key = (*key, step)
        if isinstance(target, dict):
            target = target.setdefault(step, {})
        elif isinstance(target, list) and isinstance(step, int) and step < len(target):
            target = target[step]
        else:
            target = None
        if not isinstance(target, (dict, list)):
            draft.problems.append(
                Problem(t("{key} has no keys below it", key=".".join(map(str, key))), where=f"--set {setting}")
            )
            return
    last: str | int = int(parts[-1]) if isinstance(target, list) and parts[-1].isdigit() else parts[-1]
    if isinstance(target, list) and not (isinstance(last, int) and last < len(target)):
        draft.problems.append(
            Problem(
                t("the list {key} has no such entry", key=".".join(parts[:-1])),
                where=f"--set {setting}",
                found=str(parts[-1]),
            )
        )
        return
    target[last] = value
    draft.from_flags.add((*key, last))


def build(schema: type[M], values: object, key: Key, draft: Draft) -> M | None:
    """The schema filled in, or None when it cannot be; the draft then holds the reasons."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        for entry in error.errors():
            draft.problems.append(_translate(schema, dict(entry), key, draft))
        return None


def _translate(schema: type[BaseModel], error: dict[str, Any], key: Key, draft: Draft) -> Problem:
    """One pydantic error as a Problem that speaks of the recipe."""
    path = tuple(part for part in error["loc"] if _in_values(part))
    where = draft.where((*key, *path))
    kind, given = error["type"], error.get("input")
    if kind == "extra_forbidden":
        allowed = _keys_at(schema, path[:-1])
        return Problem(
            t('unknown key "{key}"', key=path[-1]),
            where,
            allowed=listing(allowed, 40),
            fix=did_you_mean(str(path[-1]), allowed),
        )
    if kind == "missing":
        return Problem(
            t('the key "{key}" is missing', key=path[-1] if path else ""),
            draft.where((*key, *path[:-1])) if path else where,
        )
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        context = error.get("ctx", {})
        expected = str(context.get("expected") or context.get("expected_tags", ""))
        words = re.findall(r"'([^']*)'", expected)
        return Problem(
            t("is not one of the values allowed here"),
            where,
            found=repr(given),
            allowed=expected,
            fix=did_you_mean(str(given), words) if isinstance(given, str) else "",
        )
    return Problem(rule_of(error), where, found=_short(given))


def rule_of(error: Mapping[str, Any]) -> str:
    """The rule that a value broke (one of pydantic's `errors()`), in the user's language where its own words are
    English."""
    kind = error["type"]
    context = error.get("ctx", {})
    rules = {
        "greater_than": lambda: t("must be greater than {limit}", limit=context["gt"]),
        "greater_than_equal": lambda: t("must be at least {limit}", limit=context["ge"]),
        "less_than": lambda: t("must be less than {limit}", limit=context["lt"]),
        "less_than_equal": lambda: t("must be at most {limit}", limit=context["le"]),
        "too_short": lambda: t("needs at least {limit} entries", limit=context["min_length"]),
        "missing": lambda: t('the key "{key}" is missing', key=error["loc"][-1]),
        "literal_error": lambda: t("is not one of the values allowed here"),
        "string_type": lambda: t("must be a text"),
    }
    numbers = ("int_parsing", "int_type", "int_from_float", "float_parsing", "float_type")
    if kind in rules:
        return rules[kind]()
    if kind in numbers:
        return t("must be a whole number") if kind.startswith("int") else t("must be a number")
    if kind in ("bool_parsing", "bool_type"):
        return t("must be true or false")
    if kind == "list_type":
        return t("must be a list")
    if kind in ("dict_type", "model_type"):
        return t("must be a mapping")
    return str(error["msg"]).removeprefix("Value error, ")


def _in_values(part: str | int) -> bool:
    """pydantic puts the names of types into a location (`list[Source]`, `function-before[…]`); a recipe has none."""
    return isinstance(part, int) or not re.search(r"[\[\](),]|^(?:function|constrained|nullable|is-instance)", part)


def _keys_at(schema: type[BaseModel], path: Key) -> list[str]:
    """The keys allowed at a place inside a schema, unions included."""
    candidates: list[Any] = [schema]
    for part in path:
        nested: list[Any] = []
        for candidate in candidates:
            for model in _models_in(candidate):
                if part in model.model_fields:
                    nested.append(model.model_fields[str(part)].annotation)
                else:
                    nested.append(model)  # a list's index or a union's tag
        candidates = nested
    return sorted({name for candidate in candidates for model in _models_in(candidate) for name in model.model_fields})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif not isinstance(annotation, types.GenericAlias) or typing.get_args(annotation):
        for inner in typing.get_args(annotation):
            yield from _models_in(inner)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "…"

"""A recipe is a YAML file that names stages and refers from one to another. It is checked whole before anything runs:
every problem is found, each with its line and key, and raised as one error.
"""

from __future__ import annotations

import importlib.util
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from fledge.core.artifact import KINDS, sha256_of
from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.core.reference import Digest, Outside, Ref, Source, resolve
from fledge.core.stage import Config, Execution, Stage, all_stages

Key = tuple[str | int, ...]
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


class Header(Config):
    """The keys of a recipe beside its stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    seed: int = Field(0, ge=0)
    execution: Execution = Execution()
    description: str = ""


@dataclass(frozen=True)
class Node:
    """One stage of a recipe: its schema filled in, and what its references mean.

    `parents` maps a dotted key to (stage, part); `outside` maps a text to what was found for it.
    """

    name: str
    stage: Stage
    execution: Execution
    seed: int
    parents: Mapping[str, tuple[str, str]]
    outside: Mapping[str, Outside]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `nodes` are in an order in which they can run."""

    name: str
    text: str
    nodes: tuple[Node, ...]
    file: str = ""

    def node(self, name: str) -> Node:
        """The stage called `name`."""
        for node in self.nodes:
            if node.name == name:
                return node
        names = [node.name for node in self.nodes]
        raise FledgeError(
            Problem(
                t('the recipe has no stage "{name}"', name=name),
                allowed=listing(names, 40),
                fix=did_you_mean(name, names),
            )
        )


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


def load(file: Path, settings: Iterable[str] = (), digest: Digest = sha256_of) -> Recipe:
    """Read and check a recipe. `settings` are `stage.key=value` texts. Raises FledgeError with every problem."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FledgeError(
            Problem(
                t("there is no recipe {file}", file=file),
                fix=t("name a YAML file, or one of the recipes that come with fledge: hatch, adapt-smollm2"),
            )
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FledgeError(Problem(t("the recipe cannot be read"), where=str(file), found=str(error))) from None
    draft = _parse(text, str(file))
    for setting in settings:
        _apply(draft, setting)
    return _check(draft, text, digest)


def from_values(
    values: dict[str, Any], settings: Iterable[str] = (), digest: Digest = sha256_of, file: str = "command line"
) -> Recipe:
    """Check a recipe that is already in memory (one stage run on its own)."""
    draft = Draft(file, values)
    for setting in settings:
        _apply(draft, setting)
    return _check(draft, yaml.safe_dump(values, sort_keys=False, allow_unicode=True), digest)


# --- reading -------------------------------------------------------------------------------------------------------


def _parse(text: str, file: str) -> Draft:
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


def _apply(draft: Draft, setting: str) -> None:
    """`base.model.size=1M` sets a stage's key, `seed=7` or `execution.threads=1` a key of the recipe."""
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
    at_top = parts[0] in Header.model_fields and parts[0] not in stages
    if not at_top and parts[0] != "stages":
        if parts[0] not in stages:
            names = [*stages, *Header.model_fields]
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


# --- checking ------------------------------------------------------------------------------------------------------


def _check(draft: Draft, text: str, digest: Digest) -> Recipe:
    values = dict(draft.values)
    stages = values.pop("stages", None)
    header = _build(Header, values, (), draft)
    if not isinstance(stages, dict) or not stages:
        draft.complain(("stages",), t("a recipe needs stages: a mapping from names to stages"))
        draft.raise_problems()
    assert isinstance(stages, dict)
    built = {
        str(name): node for name, block in stages.items() if (node := _build_stage(str(name), block, header, draft))
    }
    parents, outside = _resolve_references(built, set(map(str, stages)), draft, digest)
    order = _order(built, parents, draft)
    _check_kinds(order, built, parents, draft)
    _check_extras(built, draft)
    draft.raise_problems()
    assert header is not None
    nodes = tuple(Node(name, *built[name], parents=parents[name], outside=outside[name]) for name in order)
    return Recipe(header.name, text, nodes, draft.file)


def _build_stage(name: str, block: object, header: Header | None, draft: Draft) -> tuple[Stage, Execution, int] | None:
    key: Key = ("stages", name)
    if not _NAME.fullmatch(name):
        draft.complain(key, t("a stage's name holds letters, digits, _ and - only"), found=name)
        return None
    if not isinstance(block, dict) or not isinstance(block.get("use"), str):
        draft.complain(
            key,
            t("a stage is a mapping with the key use"),
            fix=t("for example: {example}", example="{use: train.pretrain, …}"),
        )
        return None
    fields = dict(block)
    use = fields.pop("use")
    if use not in (known := all_stages()):
        draft.complain(
            (*key, "use"),
            t('there is no stage "{use}"', use=use),
            allowed=listing(list(known), 40),
            fix=did_you_mean(use, known),
        )
        return None
    own = fields.pop("execution", {})
    default = header.execution if header else Execution()
    execution = _build(
        Execution, {**default.model_dump(), **own} if isinstance(own, dict) else own, (*key, "execution"), draft
    )
    seed = fields.pop("seed", header.seed if header else 0)
    if not isinstance(seed, int):
        draft.complain((*key, "seed"), t("must be a whole number"), found=repr(seed))
    stage = _build(known[use], fields, key, draft)
    if stage is None or execution is None:
        return None
    draft.problems += [
        Problem(p.what, draft.where((*key, *filter(None, p.where.split(".")))), p.found, p.allowed, p.fix)
        for p in stage.check()
    ]
    return stage, execution, seed


M = typing.TypeVar("M", bound=BaseModel)


def _build(schema: type[M], values: object, key: Key, draft: Draft) -> M | None:
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
    return Problem(_rule(kind, error), where, found=_short(given))


def _rule(kind: str, error: Mapping[str, Any]) -> str:
    """The rule that a value broke, in the user's language where pydantic's own words are English."""
    context = error.get("ctx", {})
    rules = {
        "greater_than": lambda: t("must be greater than {limit}", limit=context["gt"]),
        "greater_than_equal": lambda: t("must be at least {limit}", limit=context["ge"]),
        "less_than": lambda: t("must be less than {limit}", limit=context["lt"]),
        "less_than_equal": lambda: t("must be at most {limit}", limit=context["le"]),
        "too_short": lambda: t("needs at least {limit} entries", limit=context["min_length"]),
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


Built = dict[str, tuple[Stage, Execution, int]]


def _resolve_references(
    built: Built, names: set[str], draft: Draft, digest: Digest
) -> tuple[dict[str, dict[str, tuple[str, str]]], dict[str, dict[str, Outside]]]:
    parents: dict[str, dict[str, tuple[str, str]]] = {}
    outside: dict[str, dict[str, Outside]] = {}
    for name, (stage, _, _) in built.items():
        parents[name], outside[name] = {}, {}
        for dotted, ref in stage.references().items():
            target, _, part = ref.text.partition(".")
            key: Key = ("stages", name, *dotted.split("."))
            if ref.looks_like_output and target in names:
                parents[name][dotted] = (target, part)
                continue
            found = _find(ref.text, key, draft, digest, names if ref.looks_like_output else None)
            if found is not None:
                outside[name][ref.text] = found
                _check_raw(ref, found, key, draft)
        for dotted, source in stage.outside_sources().items():
            key = ("stages", name, *dotted.split("."))
            for found in _find_source(source, key, draft, digest):
                outside[name][found.text] = found
    return parents, outside


def _find(text: str, key: Key, draft: Draft, digest: Digest, names: set[str] | None) -> Outside | None:
    try:
        return resolve(text, digest)
    except FledgeError as error:
        for problem in error.problems:
            fix = (did_you_mean(text.partition(".")[0], names) if names else "") or problem.fix
            draft.complain(key, problem.what, found=problem.found, allowed=problem.allowed, fix=fix)
        return None


def _find_source(source: Source | tuple[Source, ...], key: Key, draft: Draft, digest: Digest) -> list[Outside]:
    if isinstance(source, Source):
        found = _find(source.text, key, draft, digest, None)
        return [found] if found else []
    errors: list[Problem] = []
    for candidate in source:  # the first that is there
        try:
            return [resolve(candidate.text, digest)]
        except FledgeError as error:
            errors += error.problems
    for problem in errors:
        draft.complain(key, problem.what, found=problem.found, fix=problem.fix)
    return []


def _check_raw(ref: Ref[Any], found: Outside, key: Key, draft: Draft) -> None:
    wrong = [kind.problem_with(found.path) for kind in ref.kinds]
    if all(wrong):
        draft.complain(key, f'"{ref.text}" {wrong[0]}', allowed=ref.expects)


def _order(built: Built, parents: Mapping[str, Mapping[str, tuple[str, str]]], draft: Draft) -> list[str]:
    """Stages after everything they refer to, otherwise as they stand in the file."""
    order: list[str] = []
    state: dict[str, str] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if state.get(name) == "done" or name not in built:
            return
        if state.get(name) == "open":
            circle = " → ".join([*trail[trail.index(name) :], name])
            draft.complain(("stages", name), t("the stages refer to one another in a circle: {circle}", circle=circle))
            return
        state[name] = "open"
        for parent, _ in parents[name].values():
            visit(parent, (*trail, name))
        state[name] = "done"
        order.append(name)

    for name in built:
        visit(name, ())
    return order


def _check_kinds(
    order: list[str], built: Built, parents: Mapping[str, Mapping[str, tuple[str, str]]], draft: Draft
) -> None:
    """Every reference points at a part that exists and is of a kind that may stand there."""
    kinds: dict[str, dict[str, str]] = {}
    for name in order:
        stage = built[name][0]
        refs = stage.references()
        for dotted, (target, part) in parents[name].items():
            if target not in kinds:
                continue
            key: Key = ("stages", name, *dotted.split("."))
            if part not in kinds[target]:
                parts = [f"{target}.{p}" if p else target for p in kinds[target]]
                draft.complain(
                    key,
                    t('"{stage}" has no output "{part}"', stage=target, part=part or target),
                    allowed=listing(parts),
                    fix=did_you_mean(refs[dotted].text, parts),
                )
            elif not refs[dotted].accepts(kinds[target][part]):
                draft.complain(
                    key,
                    t('"{ref}" is a {kind}', ref=refs[dotted].text, kind=kinds[target][part]),
                    allowed=refs[dotted].expects,
                )
        outputs = {part: kind.kind for part, kind in stage.output_kinds().items()}
        same = parents[name].get(stage.same_kind_as) if stage.same_kind_as else None
        if same and same[0] in kinds and same[1] in kinds[same[0]]:
            outputs = dict.fromkeys(outputs, kinds[same[0]][same[1]])
        kinds[name] = outputs


def _check_extras(built: Built, draft: Draft) -> None:
    for name, (stage, _, _) in built.items():
        for module, extra in stage.extras.items():
            if importlib.util.find_spec(module) is None:
                draft.complain(
                    ("stages", name, "use"),
                    t("{package} is not installed", package=module),
                    fix=t("run: pip install 'fledge-llm[{extra}]'", extra=extra),
                )


__all__ = ["KINDS", "Draft", "Header", "Node", "Recipe", "from_values", "load"]

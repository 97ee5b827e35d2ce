"""A recipe is a YAML file that names stages and refers from one to another. It is checked whole before anything runs:
every problem is found, each with its line and key, and raised as one error.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from fledge.core.artifact import sha256_of
from fledge.core.draft import Draft, Key, apply_setting, build, parse
from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.core.reference import Digest, Outside, Ref, Source, resolve
from fledge.core.stage import Config, Execution, Stage, all_stages

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


class Header(Config):
    """The keys of a recipe beside its stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    seed: int = Field(0, ge=0)
    execution: Execution = Execution()
    description: str = ""
    log: list[Literal["tensorboard", "mlflow", "wandb", "trackio"]] = Field(
        default_factory=list, description="programs that keep the curves; TensorBoard's files are always there"
    )


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
    log: tuple[str, ...] = ()
    """programs that hear the events (`core.listeners`)"""

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
    draft = parse(text, str(file))
    for setting in settings:
        apply_setting(draft, setting, Header.model_fields)
    return _check(draft, text, digest)


def from_values(
    values: dict[str, Any], settings: Iterable[str] = (), digest: Digest = sha256_of, file: str = "command line"
) -> Recipe:
    """Check a recipe that is already in memory (one stage run on its own)."""
    draft = Draft(file, values)
    for setting in settings:
        apply_setting(draft, setting, Header.model_fields)
    return _check(draft, yaml.safe_dump(values, sort_keys=False, allow_unicode=True), digest)


def _check(draft: Draft, text: str, digest: Digest) -> Recipe:
    values = dict(draft.values)
    stages = values.pop("stages", None)
    header = build(Header, values, (), draft)
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
    return Recipe(header.name, text, nodes, draft.file, tuple(header.log))


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
    execution = build(
        Execution, {**default.model_dump(), **own} if isinstance(own, dict) else own, (*key, "execution"), draft
    )
    seed = fields.pop("seed", header.seed if header else 0)
    if not isinstance(seed, int):
        draft.complain((*key, "seed"), t("must be a whole number"), found=repr(seed))
    stage = build(known[use], fields, key, draft)
    if stage is None or execution is None:
        return None
    draft.problems += [
        Problem(p.what, draft.where((*key, *filter(None, p.where.split(".")))), p.found, p.allowed, p.fix)
        for p in (*stage.check(), *stage.check_execution(execution))
    ]
    return stage, execution, seed


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
    if found.scheme == "url":
        draft.complain(key, t("a URL can only be a source"), found=ref.text, fix=t("collect it first: data.collect"))
        return
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
        configs = [stage, *(value for _, value in stage if isinstance(value, Config))]
        for module, extra in {m: e for config in configs for m, e in config.extras.items()}.items():
            if importlib.util.find_spec(module) is None:
                draft.complain(
                    ("stages", name, "use"),
                    t("{package} is not installed", package=module),
                    fix=t("run: pip install 'fledge-llm[{extra}]'", extra=extra),
                )

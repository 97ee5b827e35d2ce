"""Every stage as a command: its flags are its schema's fields, so help, checking and recipe can never disagree."""

from __future__ import annotations

import shutil
import types
import typing
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fledge.cli.execution import execution_options, log_option
from fledge.cli.running import carry_out
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.recipe import from_values
from fledge.core.reference import Ref
from fledge.core.stage import Execution, stage_class
from fledge.core.store import Store

Leaf = tuple[str, FieldInfo, Any]


class StageFlags:
    """The flags of one stage and what happens when they are given."""

    def __init__(self, use: str) -> None:
        self.use, self.name = use, use.rpartition(".")[2]
        self.stage = stage_class(use)

    def options(self) -> list[click.Parameter]:
        """What it works on may be named without a flag; a flag for every field, then those that every stage has."""
        alone = [click.Argument(["data_alone"], required=False, metavar="[DATA]")] if self._takes_data else []
        return [*alone, *map(_option, leaves(self.stage)), *_common()]

    @property
    def _takes_data(self) -> bool:
        """`fledge data contamination CORPUS` is `--data CORPUS`."""
        return "data" in self.stage.model_fields and not _is_dict(self.stage.model_fields["data"].annotation)

    def run(self, **flags: Any) -> None:
        out, name, settings, log = (flags.pop(key) for key in ("out", "run_name", "set", "log_to"))
        if (alone := flags.pop("data_alone", None)) is not None:
            if flags["data"] is not None and not isinstance(flags["data"], tuple):
                raise FledgeError(Problem(t("the data was named twice"), found=f"{alone}, --data {flags['data']}"))
            flags["data"] = (alone, *flags["data"]) if isinstance(flags["data"], tuple) else alone
        execution = {key: flags.pop(key) for key in list(flags) if key in Execution.model_fields}
        seed = flags.pop("seed")
        store = Store()
        fields = {_key(leaf[0]): leaf for leaf in leaves(self.stage)}
        block: dict[str, Any] = {"use": self.use}
        for key, given in flags.items():
            if given is not None and given != ():
                dotted, _, annotation = fields[key]
                _put(block, dotted, _value(given, annotation, store))
        values = {
            "name": name or self.use.replace(".", "-"), "seed": seed, "stages": {self.name: block},
            "execution": {k: v for k, v in execution.items() if v is not None},
        }  # fmt: skip
        recipe = from_values(values, settings, store.db.digest, file=f"fledge {self.use.replace('.', ' ')}")
        paths = carry_out(recipe, store, command=f"fledge {self.use.replace('.', ' ')} …", log=log)
        if out:
            shutil.copytree(paths[self.name], out, dirs_exist_ok=True)
            for file in Path(out).rglob("*"):
                file.chmod(file.stat().st_mode | 0o200)  # the copy is the user's own
        click.echo(str(out or paths[self.name]))


def leaves(schema: type[BaseModel], prefix: str = "", depth: int = 0) -> list[Leaf]:
    """(dotted key, field, annotation) of everything that can be set by a flag; nested configs are opened."""
    found: list[Leaf] = []
    for name, info in schema.model_fields.items():
        nested = _config_in(info.annotation)
        if nested is not None and depth < 3:
            inside = leaves(nested, f"{prefix}{name}.", depth + 1)
            if info.annotation is not nested or not inside:  # optional: `--lora true` takes all defaults; or a name
                found.append((prefix + name, info, info.annotation))
            found += inside
        else:
            found.append((prefix + name, info, info.annotation))
    return found


def _config_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(inner) == 1:
            return _config_in(inner[0])
    return None


def _key(dotted: str) -> str:
    return dotted.replace(".", "__").replace("-", "_").lower()


def _is_list(annotation: Any) -> bool:
    origins = [typing.get_origin(a) for a in (annotation, *typing.get_args(annotation))]
    return any(origin in (list, tuple) for origin in origins) and not isinstance(annotation, type)


def _is_dict(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


def _option(leaf: Leaf) -> click.Option:
    dotted, info, annotation = leaf
    flag = "--" + dotted.replace("_", "-")
    default = (
        ""
        if info.is_required() or info.default in (None, "") or info.default_factory
        else f"  [default: {_plain(info.default)}]"
    )
    need = "  [required]" if info.is_required() and "." not in dotted else ""
    multiple = _is_list(annotation) or _is_dict(annotation)
    metavar = "NAME=VALUE" if _is_dict(annotation) else type_name(annotation)
    return click.Option(
        [flag, _key(dotted)],
        help=f"{info.description or ''}{default}{need}",
        multiple=multiple,
        default=None,
        metavar=metavar,
    )


def _plain(value: Any) -> Any:
    return (
        yaml.safe_dump(value.model_dump(mode="json"), default_flow_style=True).strip()
        if isinstance(value, BaseModel)
        else value
    )


def type_name(annotation: Any) -> str:
    """`MODEL`, `a|b`, `INT` for help."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Ref:
        inner = typing.get_args(args[0]) or args
        return "|".join(kind.kind for kind in inner).upper()
    if origin is typing.Literal:
        return "|".join(map(str, args))
    if origin is typing.Annotated or origin in (list, tuple):
        return type_name(args[0])
    if origin in (typing.Union, types.UnionType):
        return "|".join(type_name(a) for a in args if a is not type(None))
    if (use := getattr(annotation, "model_fields", {}).get("use")) is not None and isinstance(use.default, str):
        return use.default  # one of several, told apart by name
    return getattr(annotation, "__name__", str(annotation)).upper()


def _value(given: Any, annotation: Any, store: Store) -> Any:
    """A flag's text as a YAML value; `RUN/STAGE` becomes the artifact's path where a run has it."""
    if _is_dict(annotation):
        return {name: _scalar(text, store) for name, _, text in (item.partition("=") for item in given)}
    if isinstance(given, tuple):
        values = [_scalar(item, store) for item in given]
        return values[0] if len(values) == 1 and isinstance(values[0], list) else values
    return _scalar(given, store)


def _scalar(text: str, store: Store) -> Any:
    run, slash, stage = text.partition("/")
    if slash and not Path(text).exists():
        name, _, part = stage.partition(".")
        for row in store.db.stages(run):
            if row.name == name and row.path:
                return str(Path(row.path) / part)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _put(block: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        inner = block.get(part)
        block = (
            block.setdefault(part, {})
            if isinstance(inner, dict) or inner is None
            else block.__setitem__(part, {}) or block[part]
        )
    block[last] = {} if value is True and last == "lora" else value


def _common() -> list[click.Parameter]:
    """The flags that every stage has."""
    return [
        click.Option(
            ["--out"],
            type=click.Path(file_okay=False),
            help="also copy the artifact into this folder",
            metavar="FOLDER",
        ),
        click.Option(["--name", "run_name"], help="name of the run under which it is listed"),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="seed of every random choice"),
        click.Option(["--set"], multiple=True, metavar="STAGE.KEY=VALUE", help="set any key, however deep"),
        log_option(),
        *execution_options(),
    ]

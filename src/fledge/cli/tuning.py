"""The flags of our own engine, the same for every command that opens one: its memory, its batches, its guesses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import click

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.store import Store, find_model


class Size(click.ParamType):
    """`512MB`, `2GiB`."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from fledge.core.units import parse_bytes

        try:
            return parse_bytes(value)
        except ValueError as error:
            raise FledgeError(Problem(str(error), param.opts[0] if param else "", found=str(value))) from None


_FROM_ONE = click.IntRange(1)
_FLAGS: dict[str, dict[str, Any]] = {
    "--draft": dict(metavar="MODEL", help="a smaller model with the same tokenizer that guesses ahead"),
    "--lookup/--no-lookup": dict(default=None, help="guess ahead from the text so far  [default: lookup]"),
    "--context": dict(type=_FROM_ONE, metavar="TOKENS", help="the longest text  [default: the model's own]"),
    "--cache-bytes": dict(type=Size(), help="the most that keys and values may take  [default: 2GiB]"),
    "--max-slots": dict(type=_FROM_ONE, metavar="N", help="answers that are written together  [default: 64]"),
    "--prefill-tokens": dict(type=_FROM_ONE, metavar="N", help="prompt tokens read in one step  [default: 512]"),
}


def tuning(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these flags. What the user said of them comes as the argument `tuning`, by the engine's names."""

    @wraps(command)
    def called(**values: Any) -> None:
        said = {option: values.pop(option) for option in map(option_of, _FLAGS)}
        command(**values, tuning={option: value for option, value in said.items() if value is not None})

    for flag, words in reversed(_FLAGS.items()):
        called = click.option(flag, **words)(called)
    return called


def option_of(flag: str) -> str:
    """`--cache-bytes` → `cache_bytes`."""
    return flag.partition("/")[0].removeprefix("--").replace("-", "_")


def options_for(place: Path | str, engine: str, tuning: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """The options of `NativeEngine.from_folder`. Raises FledgeError where it is not the one that reads the model."""
    from fledge.inference.opening import kind_of

    if tuning and (engine != "native" or isinstance(place, str) or kind_of(place) != "decoder"):
        flags = [flag.split("/")[tuning[name] is False] for flag in _FLAGS if (name := option_of(flag)) in tuning]
        found = engine if engine != "native" else place if isinstance(place, str) else kind_of(place)
        what = t("only the native engine on a decoder-only model takes these flags")
        raise FledgeError(Problem(what, ", ".join(flags), found=str(found)))
    return dict(tuning) | ({"draft": find_model(tuning["draft"], store)} if "draft" in tuning else {})

"""`fledge engines`: what is on this machine, and what an engine answers when it is asked what it can do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fledge.core.language import t
from fledge.inference.engine import Engine
from fledge.inference.engines.capabilities import CHECKS, MARKS, probe
from fledge.inference.engines.environments import how_to_get, peers, present


def show_present(as_json: bool) -> None:
    """Every engine: whether it can be started here, else the command that brings it."""
    found = {peer.name: (peer.about, present(peer), how_to_get(peer)) for peer in peers().values()}
    if as_json:
        print(json.dumps({"native": True, **{name: here for name, (_, here, _) in found.items()}}))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in (t("engine"), t("here"), t("what it is, how to get it")):
        table.add_column(title)
    table.add_row("native", MARKS[True], t("our own, in this process"))
    for name, (about, here, command) in found.items():
        table.add_row(name, MARKS[here], about if here else f"{about}: {command}")
    table.add_row("http://…", MARKS[True], t("any server with OpenAI's API, at its address"))
    Console(highlight=False, markup=False).print(table)


def show_matrix(engine: Engine, name: str, adapters: Mapping[str, Path], as_json: bool) -> None:
    """Ask `engine` for everything and print what works."""
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        done = 0

        def tell(check: str) -> None:
            nonlocal done
            done += 1
            status.update(f"{name} {done}/{len(CHECKS)}: {check}")

        found = probe(engine, tuple(adapters), tell)
    if as_json:
        print(json.dumps({item.name: item.works for item in found}))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", name, t("why not")):
        table.add_column(title, overflow="fold")
    for item in found:
        unnamed = item.name == "adapters" and not adapters
        unseen = t("name one: --adapter NAME=FOLDER") if unnamed else t("its answers did not show it")
        table.add_row(item.name, MARKS[item.works], item.found or (unseen if item.works is None else ""))
    Console(highlight=False, markup=False).print(table)

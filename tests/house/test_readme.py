"""The README's commands and snippets are what the program takes, and both languages show the same."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from fledge.core.stage import stage_class
from tests.house.sources import ROOT

PAGES = ("README.md", "README.zh-CN.md")
COMMAND = str(Path(sys.executable).parent / "fledge")
ENVIRONMENT = re.compile(r"^(?:[A-Z_]+=\S+\s+)+")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(page: str) -> list[str]:
    """Every command line of the page's shell blocks, without comments."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [re.split(r"\s+#\s", line)[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@cache
def help_of(*words: str) -> str:
    """What `fledge WORDS --help` prints; empty when there is no such command."""
    done = subprocess.run([COMMAND, *words, "--help"], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def fledge_lines() -> list[str]:
    """The `fledge …` lines of both pages, each once."""
    lines = {ENVIRONMENT.sub("", line).strip() for page in PAGES for line in commands(page)}
    return sorted(line for line in lines if line.startswith("fledge "))


@pytest.mark.parametrize("line", fledge_lines())
def test_command_exists_and_knows_its_options(line: str) -> None:
    words = shlex.split(re.split(r"\s[|<>]", line)[0])[1:]
    assert words[0] in help_of() or words[0].startswith("-"), f"`fledge {words[0]}` is not in `fledge --help`"
    group = [words[0]]
    if len(words) > 1 and re.fullmatch(r"[a-z][a-z-]*", words[1]) and help_of(words[0], words[1]):
        group.append(words[1])
    page = help_of(*group)
    assert page, f"`fledge {' '.join(group)} --help` fails"
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in page]
    assert not unknown, f"`fledge {' '.join(group)}` does not know {unknown}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    used = {shlex.split(line)[1] for page in PAGES for line in commands(page) if line.startswith("make ")}
    assert {"demo", "test"} <= used <= targets


@pytest.mark.parametrize("page", PAGES)
def test_yaml_is_what_the_stages_take(page: str) -> None:
    found = [stages for block in blocks(page, "yaml") for stages in [yaml.safe_load(block)]]
    assert found
    for stages in found:
        for name, stage in stages.get("stages", stages).items():
            if isinstance(stage, dict) and "use" in stage:
                config = {key: value for key, value in stage.items() if key != "use"}
                assert stage_class(stage["use"]).model_validate(config), name


def test_both_languages_show_the_same_commands_snippets_and_pictures() -> None:
    english, chinese = PAGES
    assert commands(english) == commands(chinese)
    assert [yaml.safe_load(b) for b in blocks(english, "yaml")] == [yaml.safe_load(b) for b in blocks(chinese, "yaml")]
    pictures = [re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / page).read_text("utf-8")) for page in PAGES]
    assert pictures[0] == pictures[1]

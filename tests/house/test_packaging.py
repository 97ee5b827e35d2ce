"""What the project says it needs is what it uses, and what it is told to install is what its recipes read."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version

import pytest

from tests.house.sources import ROOT, modules, nodes, place

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEMO = (ROOT / "requirements" / "demo.txt").read_text(encoding="utf-8")
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+) \\\n +--hash=sha256:[0-9a-f]{64}$", DEMO, re.M))  # name → version


def plain(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_library_that_is_imported_is_declared() -> None:
    # Libraries that come with a declared one and are part of its interface.
    together = {"pydantic_core": "pydantic", "markupsafe": "jinja2"}
    extras = [line for lines in PROJECT.get("optional-dependencies", {}).values() for line in lines]
    declared = {plain(re.split(r"[^\w.-]", line)[0]) for line in [*PROJECT["dependencies"], *extras]}
    distributions = packages_distributions()
    undeclared = []
    for file in modules():
        for node in nodes(file):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - {"fledge"} - sys.stdlib_module_names:
                if not declared & {plain(name) for name in distributions.get(together.get(top, top), [top])}:
                    undeclared.append(f"{place(file, node.lineno)}: {top}")
    assert not undeclared, "\n".join(undeclared)


def test_demonstration_data_is_pinned_installed_and_enough_for_the_recipes() -> None:
    named = [line.split("==")[0] for line in DEMO.splitlines() if re.match(r"[\w.-]+", line)]
    assert list(PINNED) == named, "a line without an exact version or without a hash"
    assert {name: version(name) for name in PINNED} == PINNED
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    read = {plain(name) for file in recipes for name in re.findall(r"\bpackage:([\w.-]+)", file.read_text("utf-8"))}
    assert read <= {plain(name) for name in PINNED}, f"not in requirements/demo.txt: {read - set(PINNED)}"


def test_only_the_data_packages_lack_what_they_declare() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    broken = {plain(line.split()[0]) for line in done.stdout.splitlines() if " requires " in line or " has " in line}
    assert broken <= {plain(name) for name in PINNED}, done.stdout


def test_pytorch_came_without_gigabytes_of_cuda() -> None:
    if "+cpu" not in version("torch"):
        pytest.skip(f"PyTorch {version('torch')} is not a CPU build: TORCH was chosen by hand")
    done = subprocess.run([sys.executable, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True)
    assert not re.findall(r"^(?:nvidia|triton|cuda)\S*", done.stdout, re.M | re.I)

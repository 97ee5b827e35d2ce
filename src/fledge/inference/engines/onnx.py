"""ONNX Runtime on a model folder: its graph (`graph.py`), our loop (`local.py`).

    engine = OnnxEngine("model/")

In fp32 it writes the same greedy tokens as the native engine. It is for checking an export and for machines where this
runtime is what there is; it copies the cache at every step and is slower than the native engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fledge.core.errors import need
from fledge.inference.engines.graph import graph_of
from fledge.inference.engines.local import LocalEngine
from fledge.inference.engines.process import Tell, progress
from fledge.inference.engines.rows import Feeds, GraphRows


class OnnxEngine(LocalEngine):
    """An `Engine` over ONNX Runtime."""

    def __init__(self, folder: Path | str, *, threads: int = 0, tell: Tell = progress) -> None:
        """`threads`: of one step (0: all cores). Raises FledgeError for what cannot be exported."""
        runtime: Any = need("onnxruntime", "onnx")
        file, shape = graph_of(Path(folder), tell)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = runtime.InferenceSession(str(file), options, providers=runtime.get_available_providers())

        def compute(outputs: Sequence[str], feeds: Feeds) -> list[NDArray[Any]]:
            found: list[NDArray[Any]] = session.run(list(outputs), dict(feeds))
            return found

        super().__init__("onnx", GraphRows(shape, compute), Path(folder))

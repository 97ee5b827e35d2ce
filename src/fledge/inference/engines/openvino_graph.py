"""A model folder as OpenVINO's GenAI wants it: one stateful graph whose attention it can make paged.

inputs   input_ids, attention_mask, position_ids (B, T), beam_idx (B): whose keys and values each row goes on with
outputs  logits (B, T, V); keys and values are the graph's own state, which begins empty
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fledge.inference.engines.graph import Shape, cache_of, kept, tensors_of

_HIDDEN = -1e30


class _Step(nn.Module):
    """The model with its cache as plain tensors and a mask of whole rows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache, read, whole = cache_of(past), input_ids.shape[1], attention_mask.shape[1]
        before = torch.arange(whole)[None] <= torch.arange(read)[:, None] + (whole - read)  # (T, P + T)
        seen = before[None, None] & (attention_mask[:, None, None] > 0)
        output = self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=torch.where(seen, 0.0, _HIDDEN),
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return (output.logits, *tensors_of(cache))


def pipeline_of(folder: Path, tell: Callable[[str], None]) -> tuple[Path, Shape]:
    """The folder for GenAI of a model folder, made now when it is not there, and its shape.

    Raises FledgeError for models that cannot be written so."""
    return kept(folder, "openvino", _export, tell)


def _export(model: Any, shape: Shape, place: Path) -> None:
    import openvino

    layers, heads, size = shape.layers, shape.heads, shape.head_size
    example = {
        "input_ids": torch.tensor([[5, 6, 7], [7, 6, 5]]),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "position_ids": torch.arange(2, 5).expand(2, 3),
        "past": [torch.zeros(2, heads, 2, size) for _ in range(2 * layers)],
    }
    graph = openvino.convert_model(_Step(model), example_input=example)
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past.{part}" for part in parts)]
    outputs = ["logits", *(f"present.{part}" for part in parts)]
    for port, name in zip(graph.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        dims = [-1, heads, -1, size] if name.startswith("past.") else [-1, -1]
        port.get_node().set_partial_shape(openvino.PartialShape(dims))
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    _keep_state(graph, inputs[3:], outputs[1:], [heads, 0, size])
    openvino.save_model(graph, place / "openvino_model.xml", compress_to_fp16=False)
    model.config.save_pretrained(place)


def _keep_state(graph: Any, past: list[str], present: list[str], dims: list[int]) -> None:
    """Make keys and values the graph's own: rows chosen by `beam_idx`, empty at first."""
    import openvino
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    whose = opset13.parameter([-1], openvino.Type.i32, name="beam_idx")
    whose.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([whose])
    first = opset13.constant(np.int64(0))
    for name in past:
        port = graph.input(name)
        readers = port.get_target_inputs()
        chosen = opset13.gather(port, whose, first)
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, dict(zip(past, present, strict=True)))
    ids = opset13.shape_of(graph.input("input_ids"), output_type="i64")
    batch = opset13.gather(ids, opset13.constant(np.array([0], np.int64)), first)
    shape = opset13.concat([batch, opset13.constant(np.array(dims, np.int64))], 0)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([opset13.broadcast(opset13.constant(np.float32(0)), shape)])
    graph.validate_nodes_and_infer_types()

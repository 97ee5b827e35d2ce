"""Tensor parallelism with sequence parallelism (Shoeybi et al., 2019; Korthikanti et al., 2022) on DTensors.

Every matrix of a layer is divided: those that read the residual stream by their outputs (*columns*: whole heads, a
part of the feed-forward layer), those that write to it by their inputs (*rows*). Between them the residual stream and
its norms are divided along the sequence, so each process keeps 1/n of a layer's activations. Around attention and
around the feed-forward layer there is one all-gather and one reduce-scatter each. The embedding and the output layer
are divided by the vocabulary, and the loss is computed on the parts (`vocabulary.py`).

A parameter is a DTensor, which is what checkpoints and FSDP2 know; its module computes with the local part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fledge.training.layout.families import FAMILIES, Family
from fledge.training.likelihood import decoder_of

SEQUENCE = 1
"""The axis of the residual stream (B, T, D) that is divided."""


def divide(model: Any, mesh: DeviceMesh) -> None:
    """Divide the matrices of `model` among the processes of `mesh` (one dimension), in place.

    Every process holds the whole model before, with the same weights.
    """
    family, body = FAMILIES[model.config.model_type], decoder_of(model)
    layers = body.get_submodule(family.layers)
    held = [layer for layer in layers if any(True for _ in layer.parameters())]  # a pipeline stage has gaps
    for layer in held:
        _divide_layer(layer, family, mesh)
    if held:
        held[0].register_forward_pre_hook(_first_argument(lambda x: _scatter(x, mesh)), with_kwargs=True)
    _divide_ends(model, body, family, mesh, bool(held))


def _divide_layer(layer: nn.Module, family: Family, mesh: DeviceMesh) -> None:
    for path, parts in family.columns:
        _each_adapter(layer.get_submodule(path), lambda m, a, p=parts: _column(m, mesh, p), lambda m: _shared(m, mesh))
    for path in family.rows:
        _each_adapter(layer.get_submodule(path), lambda m, a: _row(m, mesh), lambda m: _row(m, mesh), after=True)
    for path in (*family.norms, *family.inner_norms):
        if _has(layer, path):
            _shared(layer.get_submodule(path), mesh)
    attention = layer.get_submodule(family.attention)
    if hasattr(attention, "split_size"):  # GPT-2 takes the fused matrix apart by this width
        attention.split_size //= mesh.size()
    for path in (family.attention, family.feed_forward):
        layer.get_submodule(path).register_forward_pre_hook(
            _first_argument(lambda x: _gather(x, mesh)), with_kwargs=True
        )


def _each_adapter(
    module: nn.Module,
    base: Callable[[Any, bool], None],
    first: Callable[[Any], None],
    after: bool = False,
) -> None:
    """Divide a linear layer, or the base of an adapted one and its two small matrices.

    W + B·A: where W is a column, A is whole and B divided like W; where W is a row, A is divided like W and B whole
    (`after`), because it then stands behind the reduce-scatter.
    """
    if not hasattr(module, "base_layer"):
        base(module, False)
        return
    base(module.base_layer, False)
    for name in module.lora_A:
        first(module.lora_A[name])
        if after:
            _shared_like(module.lora_B[name], module.lora_A[name])
        else:
            base(module.lora_B[name], True)


def _divide_ends(model: Any, body: nn.Module, family: Family, mesh: DeviceMesh, in_pieces: bool) -> None:
    """The embedding and the output layer by the vocabulary; the residual stream is whole again after the last norm."""
    head, embedding = model.get_output_embeddings(), body.get_submodule(family.embedding)
    tied = isinstance(head, nn.Linear) and getattr(embedding, "weight", None) is head.weight
    if isinstance(embedding, nn.Embedding):
        _place(embedding, "weight", Shard(0), mesh)
        embedding.forward = lambda ids: _look_up(embedding, ids, mesh)
    if isinstance(head, nn.Linear):
        if tied:
            if not isinstance(embedding, nn.Embedding):  # the last stage of a pipeline keeps it for the output layer
                _place(embedding, "weight", Shard(0), mesh)
            head.weight = embedding.weight
        else:
            _place(head, "weight", Shard(0), mesh)
        if head.bias is not None:
            _place(head, "bias", Shard(0), mesh)
    norm = body.get_submodule(family.final_norm)
    if any(True for _ in norm.parameters()):
        _shared(norm, mesh)
        norm.register_forward_hook(lambda module, args, output: _whole(output, mesh))
    elif in_pieces:  # not the last stage: what goes to the next one is whole
        norm.register_forward_hook(lambda module, args, output: _whole(output, mesh))


# --- modules -------------------------------------------------------------------------------------------------------


class _Local:
    """A module as its class's `forward` sees it: every parameter is this process's part."""

    def __init__(self, module: nn.Module, cut: Mapping[str, tuple[int, int]], other: Mapping[str, Any]) -> None:
        self._module, self._cut, self._other = module, cut, other

    def __getattr__(self, name: str) -> Any:
        if name in self._other:
            return self._other[name]
        value = getattr(self._module, name)
        if not isinstance(value, DTensor):
            return value
        part = local_part(value)
        return _cut(part, *self._cut[name], value.device_mesh) if name in self._cut else part


def local_part(parameter: DTensor) -> Tensor:
    """This process's part; a gradient for a parameter that is whole everywhere is one summand of the whole one."""
    placements = [Partial() if isinstance(placed, Replicate) else placed for placed in parameter.placements]
    local: Tensor = parameter.to_local(grad_placements=placements)
    return local


def _compute_locally(module: nn.Module, cut: Mapping[str, tuple[int, int]] | None = None, **other: Any) -> None:
    forward: Any = type(module).forward
    stand_in = _Local(module, cut or {}, other)
    module.forward = lambda *args, **kwargs: forward(stand_in, *args, **kwargs)  # type: ignore[method-assign]


def _column(module: Any, mesh: DeviceMesh, parts: int) -> None:
    """Divide the outputs: Y = X·W, all of X here, some columns of W.

    What is fused (GPT-2's query, key and value matrix) stays whole and is cut when it is used: its part is no single
    block, and neither FSDP2 nor a checkpoint could put it together again.
    """
    axis, wide = _output_axis(module)
    cut: dict[str, tuple[int, int]] = {}
    for name, along in (("weight", axis), ("bias", 0)):
        if getattr(module, name) is None:
            continue
        if parts > 1:
            cut[name] = along, parts
        _place(module, name, Replicate() if name in cut else Shard(along), mesh)
    _compute_locally(module, cut, **({"nf": wide // mesh.size()} if hasattr(module, "nf") else {}))


def _row(module: Any, mesh: DeviceMesh) -> None:
    """Divide the inputs: each process has a summand of Y; a piece of the sequence of the sum remains."""
    axis, _ = _output_axis(module)
    _place(module, "weight", Shard(1 - axis), mesh)
    if module.bias is not None:
        _place(module, "bias", Replicate(), mesh)

    def forward(x: Tensor) -> Tensor:
        weight = local_part(module.weight)
        summand = F.linear(x, weight if axis == 0 else weight.T)
        piece = DTensor.from_local(summand, mesh, [Partial()], run_check=False).redistribute(mesh, [Shard(SEQUENCE)])
        found: Tensor = piece.to_local()
        return found if module.bias is None else found + local_part(module.bias)

    module.forward = forward


def _shared(module: nn.Module, mesh: DeviceMesh) -> None:
    """Whole everywhere; each process sees other tokens or other heads, so the gradients have to be summed."""
    for name, _ in list(module.named_parameters(recurse=False)):
        _place(module, name, Replicate(), mesh)
    _compute_locally(module)


def _shared_like(module: nn.Module, other: Any) -> None:
    _shared(module, other.weight.device_mesh)


def _look_up(embedding: nn.Embedding, ids: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows of the tokens that are here, zero for others, summed over the processes: (B, T, D)."""
    weight = local_part(embedding.weight)  # type: ignore[arg-type]
    first = first_row(embedding.weight)  # type: ignore[arg-type]
    inside = (ids >= first) & (ids < first + len(weight))
    if len(weight):
        found = F.embedding((ids - first).clamp(0, len(weight) - 1), weight) * inside[..., None].to(weight.dtype)
    else:
        found = weight.new_zeros(*ids.shape, weight.shape[1])
    summed = DTensor.from_local(found, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()])
    return summed.to_local()


# --- the residual stream ---------------------------------------------------------------------------------------------


def _scatter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Whole everywhere → a piece of the sequence each (backwards: all-gather)."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(SEQUENCE)]).to_local()


def _gather(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Pieces → whole, for modules that are divided (backwards: their summands, reduce-scatter)."""
    whole = DTensor.from_local(x, mesh, [Shard(SEQUENCE)], run_check=False).redistribute(mesh, [Replicate()])
    found: Tensor = whole.to_local(grad_placements=[Partial()])
    return found


def _whole(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Pieces → whole, for what every process computes alike (backwards: its piece of the gradient)."""
    return DTensor.from_local(x, mesh, [Shard(SEQUENCE)], run_check=False).redistribute(mesh, [Replicate()]).to_local()


def _first_argument(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
        return (change(args[0]), *args[1:]), kwargs

    return hook


# --- parameters ----------------------------------------------------------------------------------------------------


def _place(module: nn.Module, name: str, placement: Placement, mesh: DeviceMesh) -> None:
    """Keep this process's part of a parameter that is whole here."""
    parameter = getattr(module, name)
    part = parameter.detach()
    if isinstance(placement, Shard):
        part = _cut(part, placement.dim, 1, mesh)
    part = part.clone(memory_format=torch.contiguous_format)
    made = DTensor.from_local(
        part, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    setattr(module, name, nn.Parameter(made, requires_grad=parameter.requires_grad))


def _cut(whole: Tensor, axis: int, parts: int, mesh: DeviceMesh) -> Tensor:
    """This process's piece along an axis, of each of its `parts`."""
    pieces = []
    for part in whole.chunk(parts, axis):
        found = part.chunk(mesh.size(), axis)
        pieces.append(found[mesh.get_local_rank()] if mesh.get_local_rank() < len(found) else part.narrow(axis, 0, 0))
    return pieces[0] if parts == 1 else torch.cat(pieces, axis)


def _output_axis(module: Any) -> tuple[int, int]:
    """Which axis of a linear layer's weight is the outputs', and how many there are (GPT-2's Conv1D is transposed)."""
    axis = 1 if hasattr(module, "nf") else 0
    return axis, int(module.weight.shape[axis])


def first_row(weight: DTensor) -> int:
    """The number of the first row that is here, of a matrix divided by rows."""
    size, place = weight.device_mesh.size(), weight.device_mesh.get_local_rank()
    each = -(-weight.shape[0] // size)
    return min(each * place, weight.shape[0])


def _has(module: nn.Module, path: str) -> bool:
    try:
        return module.get_submodule(path) is not None
    except AttributeError:
        return False

"""Linear layers as the engine computes them: packed once for the processor, several in one product, in 8 bits.

`F.linear` lays the weights out anew for every call; oneDNN's packed product reads them as they are (twice as fast at
one row, and at 16 to 64 rows more than that in fp32), and its bits do not depend on how many rows there are from two
rows on. Where oneDNN is not (GPUs, macOS, fp16), the same classes compute with `F.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fledge.inference import kernels

_WIDE = 8192
"""outputs from which 8-bit weights are laid out once: below, oneDNN does it as fast while it multiplies"""


class PackedLinear(nn.Module):
    """The outputs of some linear layers side by side: y = x · [W₁; W₂; …]ᵀ + [b₁; b₂; …]."""

    def __init__(self, sources: Sequence[nn.Module], keep: bool = False) -> None:
        """`sources`: `nn.Linear` or GPT-2's `Conv1D` of equal inputs. `keep` them, so that `repack` may follow them."""
        super().__init__()
        self._sources = tuple(sources)  # a tuple: they are no parts of this one
        self.repack()
        if not keep:
            self._sources = ()

    def repack(self) -> int:
        """Read the sources' weights anew; the bytes that were written."""
        weights, self.bias = joined(self._sources)
        self.out_features, self.in_features = weights.shape
        self.dtype = weights.dtype
        self._pack(weights)
        return weights.nbytes

    def _pack(self, weights: Tensor) -> None:
        self.packed = on_onednn(weights)
        if self.packed:
            weights = torch.ops.mkldnn._reorder_linear_weight(weights.detach().clone(), 16)
        self.weights = weights

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(…, in) → (…, out), `residual` added before the result is rounded."""
        if not self.packed:
            found = F.linear(x, self.weights, self.bias)
            return found if residual is None else found + residual
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weights, self.bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x, self.weights, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.dtype}"


class Int8Linear(PackedLinear):
    """The same with weights in 8 bits, a scale for each output; each row of x is rounded to 8 bits as it comes.

    Products are summed in whole numbers: a row's result does not depend on the other rows. (W8A8 with dynamic scales
    per token: Dettmers et al., LLM.int8(), 2022, without its split for outliers.)
    """

    def _pack(self, weights: Tensor) -> None:
        rows = weights.detach().float()
        self.scales = (rows.abs().amax(1) / 127).clamp(min=1e-12)  # (out,)
        self.weights = (rows / self.scales[:, None]).round().to(torch.int8)
        self.packed = on_onednn(weights)
        self._blocked = None
        if self.packed and len(rows) > _WIDE:
            self._ones, self._zeros = torch.ones(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
            self._blocked = torch.ops.onednn.qlinear_prepack(self.weights.clone(), None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(…, in) → (…, out) in the type of x."""
        flat = x.reshape(-1, self.in_features)
        rows, scale = _in_int8(flat)
        more = None if residual is None else residual.reshape(len(flat), -1)
        return _from_int8(self._products(rows), scale, self.scales, self.bias, more, x.dtype).view(
            *x.shape[:-1], self.out_features
        )

    def _products(self, rows: Tensor) -> Tensor:
        """The whole numbers rows · weightsᵀ (T, out), in whatever type they come."""
        if not self.packed:
            return F.linear(rows.float(), self.weights.float())
        if self._blocked is None or len(rows) == 1:
            return torch._int_mm(rows, self.weights.T)
        positive = (rows.to(torch.int16) + 128).to(torch.uint8)  # what the processor multiplies by whole numbers
        return torch.ops.onednn.qlinear_pointwise(
            positive, 1.0, 128, self._blocked, self._ones, self._zeros, None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip


def _in_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (T, in) as whole numbers -127 … 127, and their scales (T,)."""
    if kernels.available(x.dtype, x.device) and x.is_contiguous():
        rows, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)
        kernels.to_int8(x.dtype)(4 * x.numel(), *map(kernels.of, (x, rows, scale)), *x.shape)
        return rows, scale
    highest = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True, dtype=torch.float32).clamp_(min=1e-12)
    return (x.float() * (127 / highest)).round().to(torch.int8), highest[:, 0] / 127


def _from_int8(
    x: Tensor, by_row: Tensor, by_column: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x (T, out) times both scales, plus bias and residual."""
    if kernels.available(dtype, x.device) and (residual is None or residual.is_contiguous()):
        found = x.new_empty(x.shape, dtype=dtype)
        more = [0 if each is None else kernels.of(each) for each in (bias, residual)]
        loop = kernels.from_int8(dtype, x.dtype == torch.int32)
        loop(2 * x.numel(), *map(kernels.of, (x, by_row, by_column)), *more, kernels.of(found), *x.shape)
        return found
    whole = x.float() * by_column * by_row[:, None]
    for each in (bias, residual):
        if each is not None:
            whole += each
    return whole.to(dtype)


def joined(sources: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """The weights (out, in) and bias (out,) of linear layers side by side."""
    weights = [_turned(source) for source in sources]
    biases = [source.bias for source in sources]
    bias = None
    if any(each is not None for each in biases):
        parts = [
            weight.new_zeros(len(weight)) if each is None else each
            for weight, each in zip(weights, biases, strict=True)
        ]
        bias = torch.cat([part.detach() for part in parts])
    return torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0], bias


def _turned(source: Any) -> Tensor:
    return source.weight.T.contiguous() if isinstance(source, Conv1D) else source.weight


def is_linear(module: nn.Module) -> bool:
    """Whether it is a plain linear layer: exactly one of the two classes, for a subclass may compute anything, with
    weights that are numbers as they stand (compressed ones are computed as their library does)."""
    weight = module._parameters.get("weight")
    plain = type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)
    return plain and weight is not None and weight.is_floating_point()


def on_onednn(weights: Tensor) -> bool:
    """Whether oneDNN's packed products can be had for these weights."""
    return (
        weights.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and weights.dtype in (torch.float32, torch.bfloat16)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )

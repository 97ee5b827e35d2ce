"""Linear layers as the engine computes them: packed once for the processor, several in one product, in 8 or 4 bits.

`F.linear` lays the weights out anew for every call. Here they are laid out once: in tiles (`tiles.py`) where the
processor has AVX-512, else as oneDNN packs them, whose bits do not depend on how many rows there are from two rows on.
Where neither is (GPUs, macOS, fp16), the same classes compute with `F.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.inference import tiles
from fledge.inference.formats import DTYPES, FORMATS, Weights
from fledge.inference.int4 import GROUP, Int4
from fledge.inference.kernels import of
from fledge.inference.loops import PLAIN, Op
from fledge.inference.program import Program, multiplies

_WIDE = 8192
"""outputs from which 8-bit weights are laid out once: below, oneDNN does it as fast while it multiplies"""
_HIGHEST = 448
"""the largest number of float8_e4m3fn"""
_FP8_UNIT = 16
"""what GPUs ask of the sides of a matrix in fp8"""


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
        self.tiled, self.packed = in_tiles(weights), on_onednn(weights)
        if self.tiled:
            weights = tiles.pack(weights.detach())
        elif self.packed:
            weights = torch.ops.mkldnn._reorder_linear_weight(weights.detach().clone(), 16)
        self.weights = weights

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(…, in) → (…, out), `residual` added before the result is rounded."""
        if self.tiled:
            return self._in_tiles(x, residual)
        if not self.packed:
            found = F.linear(x, self.weights, self.bias)
            return found if residual is None else found + residual
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weights, self.bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x, self.weights, self.bias, "none", [], "")

    def _in_tiles(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The product as a program of the loops. Raises TypeError for numbers in another format than the weights'."""
        if x.dtype != self.dtype:
            raise TypeError(f"inputs in {x.dtype}, weights in {self.dtype}")
        x, out = x.contiguous(), x.new_empty(*x.shape[:-1], self.out_features)
        residual = None if residual is None else residual.contiguous()
        rows = x.numel() // self.in_features
        program = Program(x.dtype)
        self.add_to(program, "x", "out", 0 if residual is None else of(residual))
        program.run(2 * x.numel() * self.out_features, rows=rows, x=of(x), out=of(out), **self._room(rows))
        return out

    def add_to(self, program: Program, x: str, out: str, residual: str | int = 0, becomes: int = PLAIN) -> None:
        """The product of "rows" rows as instructions: from `x` to `out`, both names of the program's."""
        bias = 0 if self.bias is None else of(self.bias)
        sizes = ("rows", self.in_features, self.out_features)
        program.add(Op.PRODUCT, x, of(self.weights), out, *sizes, bias, residual, becomes)

    def _room(self, rows: int) -> dict[str, int]:
        """Addresses of what the instructions need beside input and output, good until it is asked again."""
        return {}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.dtype}"


class Int8Linear(PackedLinear):
    """Weights in 8 bits, a scale for each output; each row of x is rounded to 8 bits as it comes.

    Products are summed in whole numbers: a row's result does not depend on the other rows. (W8A8 with dynamic scales
    per token: Dettmers et al., LLM.int8(), 2022, without its split for outliers.)
    """

    def _pack(self, weights: Tensor) -> None:
        self.tiled, self.packed = in_tiles(weights), on_onednn(weights)
        self.scales = _scales(weights, 127)  # (out,)
        self._keep(weights.detach().float() / self.scales[:, None])

    def _keep(self, rows: Tensor) -> None:
        """Keep weights (out, in) that lie between -127 and 127."""
        self.weights = rows.round().to(torch.int8)
        self._blocked = None
        if self.tiled:
            self.shifts = 128 * self.weights.sum(1, dtype=torch.int32)  # (out,): inputs are moved by 128
            self.weights = tiles.pack(self.weights)
            return
        if self.packed and len(rows) > _WIDE:
            self._ones, self._zeros = torch.ones(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
            self._blocked = torch.ops.onednn.qlinear_prepack(self.weights.clone(), None)

    def add_to(self, program: Program, x: str, out: str, residual: str | int = 0, becomes: int = PLAIN) -> None:
        bias = 0 if self.bias is None else of(self.bias)
        sizes = ("rows", self.in_features, self.out_features)
        program.add(Op.TO_INT8, x, "x8", "scales", "rows", self.in_features)
        program.add(
            Op.PRODUCT_INT8, "x8", of(self.weights), out, *sizes, bias, residual, becomes,
            "scales", of(self.scales), of(self.shifts),
        )  # fmt: skip

    def _room(self, rows: int) -> dict[str, int]:
        self._held = torch.empty(rows, self.in_features, dtype=torch.uint8), torch.empty(rows)
        return dict(zip(("x8", "scales"), map(of, self._held), strict=True))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(…, in) → (…, out) in the type of x."""
        if self.tiled:
            return self._in_tiles(x, residual)
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


class Int4Linear(Int8Linear):
    """Weights in 4 bits (`int4.Int4`), of which every product makes 8 (W4A8): what holds for `Int8Linear` holds here.

    The number of inputs is a multiple of 32.
    """

    def _keep(self, rows: Tensor) -> None:
        self.matrix = Int4.nearest(rows)

    def add_to(self, program: Program, x: str, out: str, residual: str | int = 0, becomes: int = PLAIN) -> None:
        bias = 0 if self.bias is None else of(self.bias)
        matrix, sizes = self.matrix, ("rows", self.in_features, self.out_features)
        program.unpacked = max(program.unpacked, 2 * tiles.COLUMNS * self.in_features)
        program.add(Op.TO_INT8, x, "x8", "scales", "rows", self.in_features)
        program.add(
            Op.PRODUCT_INT4, "x8", of(matrix.pairs), out, *sizes, bias, residual, becomes,
            "scales", of(self.scales), of(matrix.shifts), of(matrix.steps), of(matrix.offsets),
        )  # fmt: skip

    def _products(self, rows: Tensor) -> Tensor:
        weights = self.matrix.unpacked()
        return torch._int_mm(rows, weights.T) if self.packed else F.linear(rows.float(), weights.float())


class Fp8Linear(PackedLinear):
    """Weights and inputs in 8 bits with a floating point (e4m3: Micikevicius et al., FP8 Formats for Deep Learning,
    2022), a scale for each output and for each row as it comes; the product comes in bf16.

    The numbers of inputs and outputs are multiples of 16.
    """

    def _pack(self, weights: Tensor) -> None:
        self.tiled = self.packed = False
        self.scales = _scales(weights, _HIGHEST)  # (out,)
        self.weights = (weights.detach().float() / self.scales[:, None]).to(torch.float8_e4m3fn)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(…, in) → (…, out) in the type of x."""
        flat = x.reshape(-1, self.in_features)
        scale = _scales(flat, _HIGHEST)[:, None]
        found = torch._scaled_mm(
            (flat.float() / scale).to(torch.float8_e4m3fn), self.weights.T,
            scale_a=scale, scale_b=self.scales[None], out_dtype=torch.bfloat16,
        ).to(x.dtype).view(*x.shape[:-1], self.out_features)  # fmt: skip
        for each in (self.bias, residual):
            if each is not None:
                found = found + each
        return found


def pack(
    sources: Sequence[nn.Module], weights: Weights = "", *, keep: bool = False, last: bool = False
) -> PackedLinear:
    """Linear layers side by side with their weights as `weights` says, or the next format that suits them.

    Where the others have 4 bits the `last` layer, behind which nothing evens errors out, and layers whose inputs are no
    multiple of 32 have 8; beside fp8 it and what is no multiple of 16 stay as they are. `keep` as in `PackedLinear`.
    """
    layer: type[PackedLinear] = Int8Linear if weights in ("int8", "int4") else PackedLinear
    if not last:
        inputs = _shape(sources[0])[1]
        outputs = sum(_shape(source)[0] for source in sources)
        if weights == "int4" and inputs % GROUP == 0:
            layer = Int4Linear
        elif weights == "fp8" and inputs % _FP8_UNIT == outputs % _FP8_UNIT == 0:
            layer = Fp8Linear
    return layer(sources, keep)


def check(weights: str, device: torch.device) -> None:
    """Raises FledgeError for weights in a format that is unknown or that `device` does not multiply."""
    if weights and weights not in FORMATS:
        raise FledgeError(Problem(t("unknown number format"), "weights", weights, listing(FORMATS)))
    if weights == "fp8" and not _has_fp8(device):
        raise FledgeError(
            Problem(
                t("fp8 needs an NVIDIA GPU that multiplies it (compute capability 8.9 or higher)"),
                "dtype",
                found=device.type,
                allowed=listing([each for each in DTYPES if each != "fp8"]),
                fix=t("int8 takes as little memory, and is computed everywhere"),
            )
        )


def _has_fp8(device: torch.device) -> bool:
    """On a processor PyTorch multiplies fp8 as well, but it converts number by number: slower than fp32."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _scales(rows: Tensor, highest: int) -> Tensor:
    """By row of (N, width), what `highest` stands for in it: (N,) fp32."""
    largest = torch.linalg.vector_norm(rows.detach(), float("inf"), -1, dtype=torch.float32)
    return (largest / highest).clamp_(min=1e-12)


def _in_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (T, in) as whole numbers -127 … 127, and their scales (T,)."""
    highest = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True, dtype=torch.float32).clamp_(min=1e-12)
    return (x.float() * (127 / highest)).round().to(torch.int8), highest[:, 0] / 127


def _from_int8(
    x: Tensor, by_row: Tensor, by_column: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x (T, out) times both scales, plus bias and residual."""
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


def _shape(source: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    one, other = source.weight.shape
    return (other, one) if isinstance(source, Conv1D) else (one, other)


def _turned(source: Any) -> Tensor:
    return source.weight.T.contiguous() if isinstance(source, Conv1D) else source.weight


def is_linear(module: nn.Module) -> bool:
    """Whether it is a plain linear layer: exactly one of the two classes, for a subclass may compute anything, with
    weights that are numbers as they stand (compressed ones are computed as their library does)."""
    weight = module._parameters.get("weight")
    plain = type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)
    return plain and weight is not None and weight.is_floating_point()


def in_tiles(weights: Tensor) -> bool:
    """Whether our own loops multiply these weights."""
    return multiplies(weights.dtype, weights.device) and weights.shape[1] % 4 == 0


def on_onednn(weights: Tensor) -> bool:
    """Whether oneDNN's packed products can be had for these weights."""
    return (
        weights.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and weights.dtype in (torch.float32, torch.bfloat16)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )

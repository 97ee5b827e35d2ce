"""All layers of a LLaMA-like model, its last norm and its output layer as two programs (`program.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fledge.inference.fusion import FusedLayer
from fledge.inference.kernel_step import KernelStep
from fledge.inference.kernels import bits, of
from fledge.inference.loops import GATED, WIDE, Op
from fledge.inference.paged import KeyValues
from fledge.inference.program import Program, attention_room
from fledge.inference.weights import PackedLinear


def stack_of(model: Any, kv: KeyValues) -> Stack | None:
    """The stack of a model whose layers are all fused over products that the loops have; None for any other."""
    body, head = getattr(model, "model", None), model.get_output_embeddings()
    layers = list(getattr(body, "layers", []))
    if not layers or not all(isinstance(layer, FusedLayer) and layer.swish for layer in layers):
        return None
    linears = [head, *(linear for layer in layers for linear in _linears(layer))]
    if not all(getattr(linear, "tiled", False) for linear in linears):
        return None
    return Stack(body, layers, head, kv)


class Stack:
    """Computes what the model's modules would, without adapters: the same loops over the same packed weights."""

    def __init__(self, body: Any, layers: Sequence[FusedLayer], head: PackedLinear, kv: KeyValues) -> None:
        first, norm = layers[0], body.norm
        self.embed, self.rotary = body.embed_tokens, body.rotary_emb
        self.kv, self.dtype, self.head = kv, norm.weight.dtype, head
        self._heads, self._dim = first.heads, first.dim
        self._layers = Program(self.dtype)
        for place, layer in enumerate(layers):
            self._add(place, layer)
        self._hidden, self._mixed, self._inner = first.qkv.in_features, first.qkv.out_features, first.down.in_features
        self._seen = first.heads * first.dim
        self._rows = 0
        self._last = Program(self.dtype)
        self._norm(self._last, norm)
        head.add_to(self._last, "x", "out", becomes=WIDE)
        self._work = sum(linear.in_features * linear.out_features for linear in _linears(first)) * len(layers)

    def __call__(self, ids: Tensor, step: KernelStep, wanted: Tensor) -> Tensor:
        """The logits (n, V), fp32, of the tokens at the places `wanted` (n,) among a step's ids (T,)."""
        hidden = self.embed(ids)
        cos, sin = self.rotary(hidden[None], position_ids=step.positions)
        return self.logits(self.run(hidden, cos[0], sin[0], step)[wanted])

    def _add(self, place: int, layer: FusedLayer) -> None:
        """The instructions of a layer."""
        program = self._layers
        self._norm(program, layer.norm_in)
        layer.qkv.add_to(program, "x", "mixed")
        norms = [0 if norm is None else of(norm.weight) for norm in (layer.norm_q, layer.norm_k)]
        least = 0 if layer.norm_q is None else bits(layer.norm_q.variance_epsilon)
        program.add(
            Op.ROTATE, "mixed", "cos", "sin", "query", f"pool{place}", "slots", "kept", "rows", "blocks",
            layer.heads, layer.kv_heads, *norms, least, layer.dim,
        )  # fmt: skip
        program.add(
            Op.ATTEND, "query", f"pool{place}", "seen", "pieces", "table", "count", layer.heads, layer.kv_heads,
            "blocks", "width", bits(layer.scale), layer.window or 0, 0, 0, layer.dim,
        )  # fmt: skip
        layer.out.add_to(program, "seen", "hidden", "hidden")
        self._norm(program, layer.norm_mid)
        if layer.down.in_features % 64 == 0:
            layer.gate_up.add_to(program, "x", "inner", becomes=GATED)
        else:  # gate and up have no blocks of their own
            layer.gate_up.add_to(program, "x", "both")
            program.add(Op.GATE, "both", "inner", "rows", layer.down.in_features)
        layer.down.add_to(program, "inner", "hidden", "hidden")

    @staticmethod
    def _norm(program: Program, norm: Any) -> None:
        program.add(Op.NORM, "hidden", of(norm.weight), "x", "rows", norm.weight.shape[0], bits(norm.variance_epsilon))

    def _buffers(self, rows: int) -> dict[str, int]:
        """What stands between the instructions, for at least so many rows."""
        if rows > self._rows:
            self._rows = max(2 * self._rows, rows)
            widths = {
                "x": self._hidden, "mixed": self._mixed, "query": self._seen, "seen": self._seen,
                "inner": self._inner, "both": 2 * self._inner,
            }  # fmt: skip
            self._tensors = {name: torch.empty(self._rows, width, dtype=self.dtype) for name, width in widths.items()}
            widest = max(self._hidden, self._seen, self._inner)
            self._tensors["x8"] = torch.empty(self._rows, widest, dtype=torch.uint8)
            self._tensors["scales"] = torch.empty(self._rows)
            self._addresses = {name: of(tensor) for name, tensor in self._tensors.items()}
        return self._addresses

    def run(self, hidden: Tensor, cos: Tensor, sin: Tensor, step: KernelStep) -> Tensor:
        """hidden (T, width) before the layers → behind them, in place. cos, sin (T, D) as `Rotation` gives them."""
        rows = len(hidden)
        pools = {f"pool{place}": of(pool) for place, pool in enumerate(self.kv.layers)}
        work = 2 * (rows * self._work + step.seen * self._heads * self._dim * len(pools))
        self._layers.run(
            work, attention_room(self._dim, step.keys), rows=rows, hidden=of(hidden), cos=of(cos), sin=of(sin),
            slots=of(step.slots), kept=len(step.slots), pieces=of(step.pieces), count=len(step.pieces),
            table=of(step.table), width=step.table.shape[1], blocks=self.kv.blocks, **self._buffers(rows), **pools,
        )  # fmt: skip
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, width) behind the layers → (n, V) fp32."""
        out = torch.empty(len(hidden), self.head.out_features)
        work = 2 * len(hidden) * self.head.in_features * self.head.out_features
        self._last.run(work, rows=len(hidden), hidden=of(hidden), out=of(out), **self._buffers(len(hidden)))
        return out


def _linears(layer: FusedLayer) -> list[PackedLinear]:
    return [layer.qkv, layer.out, layer.gate_up, layer.down]

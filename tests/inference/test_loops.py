"""The compiled loops against float64, and row by row the same whatever stands beside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fledge.inference import loops, program, tiles
from fledge.inference.kernels import bits, of
from fledge.inference.loops import GATED, PLAIN, WIDE, Op

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not program.available(torch.float32, CPU) or not program.available(torch.bfloat16, CPU),
    reason="no Numba, no libgomp of PyTorch's, or no AVX-512 with bfloat16 here",
)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ALL = 10**9
"""work that is worth all threads"""


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    return bool((found.double() - expected).abs().max() <= tolerance * expected.abs().max())


@BOTH
@pytest.mark.parametrize(("outputs", "width"), [(64, 8), (100, 72), (192, 130)])
def test_products(dtype: torch.dtype, outputs: int, width: int) -> None:
    torch.manual_seed(0)
    rows = 13  # two tiles of six rows, and one more
    x, w = torch.randn(rows, width).to(dtype), torch.randn(outputs, width).to(dtype)
    bias, residual = torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    packed = tiles.pack(w)

    def run(x: Tensor, more: tuple[int, int], becomes: int = PLAIN, work: int = 0) -> Tensor:
        out = torch.full((len(x), outputs), torch.nan, dtype=torch.float32 if becomes == WIDE else dtype)
        program.run(dtype, work, Op.PRODUCT, of(x), of(packed), of(out), len(x), width, outputs, *more, becomes)
        return out

    plain = x.double() @ w.double().T
    for more, expected in (
        ((0, 0), plain), ((of(bias), 0), plain + bias), ((0, of(residual)), plain + residual),
        ((of(bias), of(residual)), plain + bias + residual),
    ):  # fmt: skip
        found = run(x, more)
        assert near(found, expected, dtype)
        assert torch.equal(found, run(x, more, work=ALL))
    wide = run(x, (0, 0), WIDE)
    assert near(wide, plain, torch.float32)
    for count in range(1, rows + 1):  # the same bits in any company
        assert torch.equal(run(x[:count], (0, 0), WIDE), wide[:count])
        assert torch.equal(run(x[rows - count :], (0, 0), WIDE), wide[rows - count :])


@BOTH
def test_a_gated_pair_of_products(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, inner, width = 9, 128, 40
    x, w = torch.randn(rows, width).to(dtype), torch.randn(2 * inner, width).to(dtype)
    packed, out = tiles.pack(w), torch.empty(rows, inner, dtype=dtype)
    program.run(dtype, 0, Op.PRODUCT, of(x), of(packed), of(out), rows, width, 2 * inner, 0, 0, GATED)
    both = x.double() @ w.double().T
    assert near(out, F.silu(both[:, :inner]) * both[:, inner:], dtype)


@BOTH
@pytest.mark.parametrize("width", [40, 68])
def test_norm_gate_and_8_bits(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    x, w, rows = (3 * torch.randn(5, width)).to(dtype), torch.randn(width).to(dtype), 5
    out = torch.empty_like(x)
    program.run(dtype, 0, Op.NORM, of(x), of(w), of(out), rows, width, bits(1e-5))
    assert near(out, F.rms_norm(x.double(), (width,), w.double(), 1e-5), dtype)

    both = torch.cat((x, x.flip(0)), 1)
    program.run(dtype, 0, Op.GATE, of(both), of(out), rows, width)
    assert near(out, F.silu(x.double()) * x.flip(0).double(), dtype)

    whole, scales = torch.empty(rows, width, dtype=torch.uint8), torch.empty(rows)
    program.run(dtype, 0, Op.TO_INT8, of(x), of(whole), of(scales), rows, width)
    moved = whole.double() - 128
    assert torch.allclose(scales.double(), x.double().abs().amax(1) / 127)
    assert ((moved * scales[:, None].double() - x.double()).abs() <= 0.5001 * scales[:, None]).all()

    outputs = 70
    weights, columns = torch.randint(-127, 128, (outputs, width), dtype=torch.int8), torch.rand(outputs)
    packed, shifts = tiles.pack(weights), 128 * weights.sum(1, dtype=torch.int32)
    bias, residual = torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    out = torch.empty(rows, outputs, dtype=dtype)
    plain = moved @ weights.double().T * scales[:, None].double() * columns.double()
    for b, more in ((bias, residual), (bias, None), (None, residual), (None, None)):
        expected = plain + (0 if b is None else b.double()) + (0 if more is None else more.double())
        program.run(
            dtype, 0, Op.PRODUCT_INT8, of(whole), of(packed), of(out), rows, width, outputs,
            0 if b is None else of(b), 0 if more is None else of(more), PLAIN, of(scales), of(columns), of(shifts),
        )  # fmt: skip
        assert near(out, expected, dtype)


@BOTH
def test_what_is_no_number_is_not_hidden(dtype: torch.dtype) -> None:
    x = torch.full((1, 32), 0.5, dtype=dtype)
    x[0, 7] = float("nan")
    out, ones = torch.empty(1, 32, dtype=dtype), torch.ones(32, dtype=dtype)
    program.run(dtype, 0, Op.NORM, of(x), of(ones), of(out), 1, 32, bits(1e-5))
    assert out.isnan().all()
    program.run(dtype, 0, Op.GATE, of(x), of(out), 1, 16)
    assert out[0, 7].isnan() and out[0, 8:16].isfinite().all()
    whole, scales = torch.empty(1, 32, dtype=torch.uint8), torch.empty(1)
    program.run(dtype, 0, Op.TO_INT8, of(x), of(whole), of(scales), 1, 32)
    assert scales.isnan().all()


@BOTH
def test_rotation_and_where_keys_and_values_go(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, groups, dim, blocks, block, tokens, kept = 3, 1, 16, 4, loops.BLOCK, 5, 4
    mixed = torch.randn(tokens, (heads + 2 * groups) * dim).to(dtype)
    given = mixed.clone()
    angles = torch.rand(tokens, dim // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    signed = torch.cat((-sin[:, : dim // 2], sin[:, dim // 2 :]), 1).contiguous()
    pool, query = torch.zeros(2, groups, blocks, block, dim, dtype=dtype), torch.empty(tokens, heads, dim, dtype=dtype)
    slots = torch.tensor([17, 3, 40, 63])

    def run(norm_q: Tensor | None = None, norm_k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The keys as they lie, in the order of their slots, and the values."""
        norms = [0 if norm is None else of(norm) for norm in (norm_q, norm_k)]
        program.run(
            dtype, 0, Op.ROTATE, of(mixed), of(cos), of(signed), of(query), of(pool), of(slots), kept, tokens, blocks,
            heads, groups, *norms, bits(1e-6), dim,
        )  # fmt: skip
        n = tiles.together(dtype)
        keys = pool[0].view(groups, blocks, dim // n, block, n).transpose(2, 3).reshape(groups, -1, dim)
        return keys[:, slots], pool[1].view(groups, -1, dim)[:, slots]

    def turned(x: Tensor) -> Tensor:
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        return x * cos.double()[:, None] + torch.cat((-second, first), -1) * sin.double()[:, None]

    by_head = given.view(tokens, -1, dim).double()
    keys, values = run()
    assert near(query, turned(by_head)[:, :heads], dtype)
    assert near(keys, turned(by_head)[:kept, heads : heads + groups].transpose(0, 1), dtype)
    assert torch.equal(values.double(), by_head[:kept, heads + groups :].transpose(0, 1))
    assert pool.count_nonzero() <= 2 * groups * kept * dim  # nothing else was written

    norm_q, norm_k = torch.rand(dim).to(dtype), torch.rand(dim).to(dtype)
    mixed.copy_(given)
    keys, _ = run(norm_q, norm_k)
    assert near(query, turned(F.rms_norm(by_head[:, :heads], (dim,), norm_q.double(), 1e-6)), dtype)
    normed = F.rms_norm(by_head[:, heads : heads + groups], (dim,), norm_k.double(), 1e-6)
    assert near(keys, turned(normed)[:kept].transpose(0, 1), dtype)


@BOTH
@pytest.mark.parametrize(
    ("shared", "dim", "window", "softcap", "slopes"),
    [
        (3, 16, 0, 0.0, False),
        (3, 16, 24, 0.0, False),
        (3, 16, 0, 5.0, False),
        (3, 16, 0, 0.0, True),
        (7, 80, 70, 0.0, False),
        (1, 64, 0, 0.0, False),
    ],
)
def test_attention(dtype: torch.dtype, shared: int, dim: int, window: int, softcap: float, slopes: bool) -> None:
    torch.manual_seed(0)
    groups, block, blocks, count, width, n = 2, loops.BLOCK, 20, 150, 10, tiles.together(dtype)
    heads, keys = groups * shared, width * block
    pool = torch.randn(2, groups, blocks, block, dim).to(dtype)
    table = torch.randperm(blocks)[:width][None].contiguous()
    query, slope = torch.randn(count, heads, dim).to(dtype), torch.rand(heads)

    def run(rows: Tensor, pieces: list[tuple[int, int, int, int]], work: int) -> Tensor:
        out, sequences = torch.empty_like(rows), torch.tensor(pieces)  # what lies at an address must live as long
        program.run(
            dtype, work, Op.ATTEND, of(rows), of(pool), of(out), of(sequences), of(table), len(pieces), heads, groups,
            blocks, width, bits(0.2), window, of(slope) if slopes else 0, bits(softcap), dim,
            room=program.attention_room(dim, keys),
        )  # fmt: skip
        return out

    pieces = [(first, min(16, count - first), first, 0) for first in range(0, count, 16)]
    found = run(query, pieces, 0)
    assert torch.equal(found, run(query, pieces, ALL))  # by one thread and by all
    for place in (0, 15, 16, 57, 100, count - 1):
        assert torch.equal(run(query[place : place + 1].contiguous(), [(0, 1, place, 0)], 0)[0], found[place])

    turned = pool[0].view(groups, blocks, dim // n, block, n).transpose(2, 3).reshape(groups, blocks, block, dim)
    k, v = (
        each[:, table[0]].reshape(groups, -1, dim).double().repeat_interleave(shared, 0) for each in (turned, pool[1])
    )
    scores = torch.einsum("thd,hkd->htk", query.double(), k) * 0.2
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes:
        scores = scores + slope.double()[:, None, None] * torch.arange(keys)
    ago = torch.arange(count)[:, None] - torch.arange(keys)
    seen = (ago >= 0) & (ago < window) if window else ago >= 0
    expected = torch.einsum("htk,hkd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    assert near(found, expected, dtype)

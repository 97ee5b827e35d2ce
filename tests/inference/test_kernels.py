"""The compiled loops against float64, and row by row the same whatever stands beside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fledge.inference import kernels
from fledge.inference.kernels import bits, of

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not kernels.available(torch.float32, CPU), reason="Numba, or PyTorch's OpenMP library (libgomp), is not here"
)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    return bool((found.double() - expected).abs().max() <= tolerance * expected.abs().max())


@BOTH
@pytest.mark.parametrize(
    ("shared", "dim", "window", "softcap", "slopes"),
    [
        (3, 16, 0, 0.0, False),
        (3, 16, 24, 0.0, False),
        (3, 16, 0, 5.0, False),
        (3, 16, 0, 0.0, True),
    ],
)
def test_attention(dtype: torch.dtype, shared: int, dim: int, window: int, softcap: float, slopes: bool) -> None:
    torch.manual_seed(0)
    groups, block, blocks, count = 2, 16, 20, 100
    heads, width = groups * shared, 7
    pool = torch.randn(2, groups, blocks, block, dim).to(dtype)
    table = torch.randperm(blocks)[:width][None].contiguous()
    query, slope = torch.randn(count, heads, dim).to(dtype), torch.rand(heads)
    keys = width * block
    room = shared * (keys + 2 * dim) + 32

    def run(rows: Tensor, pieces: list[tuple[int, int, int, int]], work: int) -> Tensor:
        out, scratch = torch.empty_like(rows), torch.empty(torch.get_num_threads() * room)
        sequences = torch.tensor(pieces)  # a kernel takes addresses: what lies there must live as long
        kernels.attention(dtype, dim, shared, block)(
            work, of(rows), of(pool), of(out), of(sequences), of(table), len(pieces), heads, groups, blocks,
            width, bits(0.2), of(scratch), room, keys, window, of(slope) if slopes else 0, bits(softcap),
        )  # fmt: skip
        return out

    pieces = [(first, min(16, count - first), first, 0) for first in range(0, count, 16)]
    found = run(query, pieces, work=0)
    assert torch.equal(found, run(query, pieces, work=10**9))  # by one thread and by all
    for place in (0, 15, 16, 57, count - 1):
        assert torch.equal(run(query[place : place + 1].contiguous(), [(0, 1, place, 0)], 0)[0], found[place])

    k, v = (pool[n][:, table[0]].reshape(groups, -1, dim).double().repeat_interleave(shared, 0) for n in (0, 1))
    scores = torch.einsum("thd,hkd->htk", query.double(), k) * 0.2
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes:
        scores = scores + slope.double()[:, None, None] * torch.arange(keys)
    ago = torch.arange(count)[:, None] - torch.arange(keys)
    seen = (ago >= 0) & (ago < window) if window else ago >= 0
    expected = torch.einsum("htk,hkd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    assert near(found, expected, dtype)


@BOTH
@pytest.mark.parametrize("width", [40, 65])
def test_norm_gate_and_8_bits(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    x, w, rows = (3 * torch.randn(5, width)).to(dtype), torch.randn(width).to(dtype), 5
    out = torch.empty_like(x)
    kernels.rms_norm(dtype)(0, of(x), of(w), of(out), rows, width, bits(1e-5))
    assert near(out, F.rms_norm(x.double(), (width,), w.double(), 1e-5), dtype)

    both = torch.cat((x, x.flip(0)), 1)
    kernels.gate(dtype)(0, of(both), of(out), rows, width)
    assert near(out, F.silu(x.double()) * x.flip(0).double(), dtype)

    whole, scales = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)
    kernels.to_int8(dtype)(0, of(x), of(whole), of(scales), rows, width)
    assert torch.allclose(scales.double(), x.double().abs().amax(1) / 127)
    assert ((whole.double() * scales[:, None].double() - x.double()).abs() <= 0.5001 * scales[:, None]).all()

    product, columns = torch.randint(-9000, 9000, (rows, width), dtype=torch.int32), torch.rand(width)
    for given in (product, product.float()):
        for bias, more in ((w, x), (w, None), (None, x), (None, None)):
            expected = product.double() * scales[:, None].double() * columns.double()
            for each in (bias, more):
                expected = expected if each is None else expected + each.double()
            kernels.from_int8(dtype, given.dtype == torch.int32)(
                0, of(given), of(scales), of(columns), 0 if bias is None else of(bias), 0 if more is None else of(more),
                of(out), rows, width,
            )  # fmt: skip
            assert near(out, expected, dtype)


@BOTH
def test_what_is_no_number_is_not_hidden(dtype: torch.dtype) -> None:
    x = torch.full((1, 32), 0.5, dtype=dtype)
    x[0, 7] = float("nan")
    out = torch.empty(1, 32, dtype=dtype)
    ones = torch.ones(32, dtype=dtype)
    kernels.rms_norm(dtype)(0, of(x), of(ones), of(out), 1, 32, bits(1e-5))
    assert out.isnan().all()
    kernels.gate(dtype)(0, of(x), of(out), 1, 16)
    assert out[0, 7].isnan() and out[0, 8:16].isfinite().all()


@BOTH
def test_rotation_and_where_keys_and_values_go(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, groups, dim, blocks, block, tokens, kept = 3, 1, 16, 4, 16, 5, 4
    mixed = torch.randn(tokens, (heads + 2 * groups) * dim).to(dtype)
    angles = torch.rand(tokens, dim // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    signed = torch.cat((-sin[:, : dim // 2], sin[:, dim // 2 :]), 1).contiguous()
    pool, query = torch.zeros(2, groups, blocks, block, dim, dtype=dtype), torch.empty(tokens, heads, dim, dtype=dtype)
    slots = torch.tensor([17, 3, 40, 63])
    kernels.rotate_and_keep(dtype, dim, block)(
        0,
        of(mixed),
        of(cos),
        of(signed),
        of(query),
        of(pool),
        of(slots),
        kept,
        tokens,
        blocks,
        heads,
        groups,
    )
    by_head = mixed.view(tokens, -1, dim).double()
    first, second = by_head[..., : dim // 2], by_head[..., dim // 2 :]
    turned = by_head * cos.double()[:, None] + torch.cat((-second, first), -1) * sin.double()[:, None]
    assert near(query, turned[:, :heads], dtype)
    flat = pool.view(2, groups, -1, dim)
    assert near(flat[0, :, slots], turned[:kept, heads : heads + groups].transpose(0, 1), dtype)
    assert torch.equal(flat[1, :, slots].double(), by_head[:kept, heads + groups :].transpose(0, 1))
    assert pool.count_nonzero() <= 2 * groups * kept * dim  # nothing else was written

"""The compiled loops around products in 8 bits, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fledge.inference import kernels
from fledge.inference.kernels import of

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not kernels.available(torch.float32, CPU), reason="Numba, or PyTorch's OpenMP library (libgomp), is not here"
)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    return bool((found.double() - expected).abs().max() <= tolerance * expected.abs().max())


@BOTH
@pytest.mark.parametrize("width", [40, 65])
def test_to_8_bits_and_back(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    x, w, rows = (3 * torch.randn(5, width)).to(dtype), torch.randn(width).to(dtype), 5
    out = torch.empty_like(x)
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

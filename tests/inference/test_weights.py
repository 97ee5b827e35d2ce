"""Linear layers in every format: what they compute, against the weights that they stand for, in double precision."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fledge.core.errors import FledgeError
from fledge.inference import kernels
from fledge.inference.engine import Request
from fledge.inference.engines.opening import open_other
from fledge.inference.formats import Weights
from fledge.inference.forward import Forward
from fledge.inference.int4 import Int4
from fledge.inference.native import NativeEngine
from fledge.inference.step import Part
from fledge.inference.weights import Fp8Linear, Int4Linear, Int8Linear, PackedLinear, check, pack
from tests.inference import tiny

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(params=["compiled", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Numba's loops and without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "available", lambda dtype, device: False)


def linear(
    inputs: int, outputs: int, dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0
) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(inputs, outputs, bias).to(dtype)
    made.weight.data *= torch.rand(outputs, 1).to(dtype) * 10  # outputs differ in size
    return made


def far(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def whole(matrix: Int4) -> Tensor:
    """What the 4 bits stand for, one by one."""
    found = torch.empty(matrix.outputs, matrix.steps.shape[1] * 32, dtype=torch.int32)
    for n, k in itertools.product(*map(range, found.shape)):
        (block, output), (group, place) = divmod(n, 64), divmod(k, 32)
        pair = int(matrix.pairs[block, group, place // 4 % 4, output, place % 4])
        q = pair & 15 if place < 16 else pair >> 4
        found[n, k] = int(matrix.offsets[block, group, output]) + (q * int(matrix.steps[block, group, output]) + 4) // 8
    return found


@pytest.mark.parametrize("groups", [1, 4, 9])
def test_whole_numbers_in_4_bits(groups: int) -> None:
    torch.manual_seed(groups)
    rows = (torch.randn(16, groups * 32) * 40).clamp(-127, 127)
    rows[0] = 127
    rows[1] = -127
    rows[2, ::2], rows[2, 1::2] = -127, 127
    rows[3, :16], rows[3, 16:32] = 126.6, -99.4  # where a step more would be no number of 8 bits
    rows[4] = 0
    matrix = Int4.nearest(rows)
    expected = whole(matrix)
    assert torch.equal(matrix.unpacked().int(), expected)
    assert torch.equal(expected[0], torch.full_like(expected[0], 127)) and not expected[4].any()
    low, high = (x[..., None] for x in rows.unflatten(1, (-1, 32)).aminmax(dim=-1))
    grid = (low + torch.arange(16) * (high - low) / 15)[..., None, :]  # the plain way: 16 numbers from low to high
    plain = (grid - rows.unflatten(1, (-1, 32))[..., None]).abs().amin(-1)
    error = (expected - rows).abs().unflatten(1, (-1, 32))
    assert (error.norm(dim=-1) <= (plain + 0.8).norm(dim=-1)).all()  # numbers are whole and steps are eighths
    assert error[5:].norm() < 0.97 * plain[5:].norm()
    assert matrix.nbytes == 64 * (groups * 32 * 4.5 / 8 + 4)  # a block is 64 outputs


@BOTH
@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_products_in_whole_numbers(kind: type[Int8Linear], dtype: torch.dtype, bias: bool) -> None:
    """Against inputs and weights as rounded, in double precision; and to the bit the same for any number of rows."""
    parts = [linear(96, 33, dtype, bias), linear(96, 20, dtype, False, seed=1)]
    made = kind(parts)
    exact = torch.cat([part.weight for part in parts]).detach().double()
    scales = exact.abs().amax(1, keepdim=True) / 127
    weights = (made.matrix.unpacked() if isinstance(made, Int4Linear) else (exact / scales).round()) * scales
    assert 0 < far(weights, exact) < (0.12 if kind is Int4Linear else 0.01)
    x, residual = torch.randn(3, 7, 96).to(dtype), torch.randn(3, 7, 53).to(dtype)
    step = x.double().abs().amax(-1, keepdim=True) / 127
    expected = (x.double() / step).round() * step @ weights.T
    if bias:
        expected = expected + F.pad(parts[0].bias.double(), (0, 20))
    near = 2e-3 if dtype == torch.float32 else 6e-3  # an input that lies halfway may be rounded either way
    assert far(made(x), expected) < near
    assert far(made(x, residual), expected + residual.double()) < near
    flat = made(x).view(21, 53)
    for count in (1, 2, 6, 7, 13):
        assert torch.equal(made(x.view(21, 96)[-count:]), flat[-count:])


@BOTH
def test_products_in_fp8(dtype: torch.dtype) -> None:
    """PyTorch has them on the processor, too: slow, but the same."""
    source = linear(64, 48, dtype)
    made = Fp8Linear([source])
    weights = made.weights.double() * made.scales[:, None]
    assert 0 < far(weights, source.weight.double()) < 0.04
    x, residual = torch.randn(2, 5, 64).to(dtype), torch.randn(2, 5, 48).to(dtype)
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    expected = (x.float() / scale).to(torch.float8_e4m3fn).double() * scale @ weights.T + source.bias.double()
    assert far(made(x), expected) < 6e-3
    assert far(made(x, residual), expected + residual.double()) < 6e-3
    x[0, 0, 3] = float("nan")
    assert made(x)[0, 0].isnan().all() and made(x)[0, 1:].isfinite().all()


def test_each_layer_gets_the_format_that_suits_it() -> None:
    odd, narrow, fit = linear(40, 48), linear(64, 20), linear(64, 48)
    turned = Conv1D(48, 40)  # GPT-2's: (inputs, outputs)
    expected: dict[Weights, list[type[PackedLinear]]] = {
        "": [PackedLinear] * 5,
        "int8": [Int8Linear] * 5,
        "int4": [Int8Linear, Int4Linear, Int4Linear, Int8Linear, Int8Linear],
        "fp8": [PackedLinear, PackedLinear, Fp8Linear, PackedLinear, PackedLinear],
    }
    for weights, kinds in expected.items():
        found = [pack([source], weights) for source in (odd, narrow, fit, turned)] + [pack([fit], weights, last=True)]
        assert [type(each) for each in found] == kinds
    assert type(pack([narrow, linear(64, 12)], "fp8")) is Fp8Linear  # 20 + 12 outputs side by side


def test_a_reward_models_score_keeps_8_bits() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**tiny.llama().config.to_dict() | {"num_labels": 1})).eval()
    Forward(model, weights="int4")
    assert type(model.score) is Int8Linear and type(model.model.layers[0].down) is Int4Linear


def test_what_cannot_be_multiplied_here_is_refused_in_words() -> None:
    model: Any = tiny.llama()
    for weights, words in (("fp8", "compute capability 8.9"), ("int3", "unknown number format")):
        with pytest.raises(FledgeError, match=words) as caught:
            Forward(model, weights=weights)  # type: ignore[arg-type]
        assert "int8, int4" in str(caught.value)
    check("int4", torch.device("cpu"))


def test_other_engines_do_not_pretend_to_have_our_formats() -> None:
    for engine in ("vllm", "onnx", "openvino", "http://127.0.0.1:9"):
        with pytest.raises(FledgeError, match="weights in int4"):
            open_other("nowhere", engine, dtype="int4")


@torch.no_grad()
def rounded(model: Any) -> Any:
    """The model with the weights that 4 bits stand for, the last layer as it is."""
    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            packed = Int4Linear([layer])
            layer.weight.copy_(packed.matrix.unpacked() * packed.scales[:, None])
    return model


@pytest.mark.parametrize("loops", [False, True], ids=["torch", "compiled"])
def test_a_model_in_4_bits_answers_the_same_alone_in_pieces_and_in_a_batch(loops: bool) -> None:
    """... and as transformers does with weights that are rounded alike, but for the inputs in 8 bits."""
    model = tiny.llama(initializer_range=0.1)
    ids = list(range(4, 60))
    expected = rounded(model)(torch.tensor([ids])).logits[0].detach().double()
    forward = Forward(model, weights="int4", loops=loops)
    kinds = {name.split(".")[-1]: type(each) for name, each in model.named_modules() if isinstance(each, PackedLinear)}
    assert kinds.pop("lm_head") is Int8Linear and set(kinds.values()) == {Int4Linear}
    forward.allocate(12)
    whole = forward.run([Part(ids, 0, list(range(4)), len(ids))])
    assert 0 < far(whole, expected) < 0.03
    other = Part([7, 8, 9], 0, [10], 3)
    pieces = [(n, ids[n : n + 9]) for n in range(0, len(ids), 9)]
    found = [forward.run([Part(piece, n, [4, 5, 6, 7], len(piece)), other])[:-3] for n, piece in pieces]
    alone = [forward.run([Part([id], place, [8, 9, 11, 3])]) for place, id in enumerate(ids)]
    assert torch.equal(torch.cat(found), whole) and torch.equal(torch.cat(alone), whole)


def test_a_trainer_is_followed_in_4_bits() -> None:
    model = tiny.llama()
    ask = [Request(prompt_ids=(5, 6, 7), temperature=0, max_new_tokens=8, stop_ids=())]
    with NativeEngine.follow(model, tiny.tokenizer(), weights="int4") as engine:
        before = engine.generate(ask)[0].choice.token_ids
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        engine.refresh()
        after = engine.generate(ask)[0].choice.token_ids
    with NativeEngine(model, tiny.tokenizer(), weights="int4") as fresh:
        assert fresh.generate(ask)[0].choice.token_ids == after != before

"""Whether to compile follows from the settings; compiled layers compute the same and can be undone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fledge.core.stage import Execution
from fledge.training import compiling
from fledge.training.compiling import compile_layers, decide, forget, has_compiler
from fledge.training.kernels import fast_kernels
from fledge.training.likelihood import hidden_states
from fledge.training.objective import as_batch
from fledge.training.objectives.causal_lm import CausalLM
from tests.training.toys import VOCAB, Packed, tiny

LONG, SHORT = 10 * compiling.WORTH, 0.1 * compiling.WORTH


def test_the_settings_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    assert [decide(Execution(compile=c), f)[0] for c, f in (("auto", LONG), ("auto", SHORT))] == [True, False]
    assert [decide(Execution(compile=c), f)[0] for c, f in (("on", SHORT), ("off", LONG))] == [True, False]
    monkeypatch.setattr(compiling, "has_compiler", lambda: False)
    compiled, message = decide(Execution(), LONG)
    assert not compiled and "nothing is compiled" in message
    assert decide(Execution(), SHORT) == (False, "")


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler is installed: torch.compile cannot be tried")
def test_compiled_layers_compute_the_same_and_can_be_undone(tmp_path: Path) -> None:
    model, batch = tiny(), as_batch(Packed().batch(0))
    names = list(model.state_dict())
    with torch.no_grad():
        expected = hidden_states(model, batch)
        layers = compile_layers(model, tmp_path)
        assert len(layers) == 2 and list(model.state_dict()) == names
        torch.testing.assert_close(hidden_states(model, batch), expected, rtol=1e-4, atol=1e-5)
        forget(layers)
        assert torch.equal(hidden_states(model, batch), expected)


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_packed_rows_of_many_lengths_share_one_piece_of_code(tmp_path: Path) -> None:
    """Losses and gradients are those of the layers as they are, and the second length compiles nothing."""
    model = tiny().double()
    batches = []
    for length in (40, 56):
        ids = torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))
        places = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])[None]
        batches.append({"input_ids": ids, "labels": ids, "position_ids": places})

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            CausalLM().forward({"model": model}, batch)[0].backward()
        return [p.grad.clone() for p in model.parameters()]

    with fast_kernels([model], "cpu"):
        expected = gradients()
        layers = compile_layers(model, tmp_path, varying=True)
        torch._dynamo.utils.counters.clear()
        found = gradients()
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        forget(layers)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # norms are taken in fp32
    assert made == 1

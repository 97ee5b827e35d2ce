"""Whether to compile follows from the settings; compiled layers compute the same and can be undone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fledge.core.stage import Execution
from fledge.training import compiling
from fledge.training.compiling import compile_layers, decide, forget, has_compiler
from fledge.training.likelihood import hidden_states
from fledge.training.objective import as_batch
from tests.training.toys import Packed, tiny

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

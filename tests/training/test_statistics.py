"""Statistics by layer: exact against a computation by hand, without a trace in the result, and free on other steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fledge.core.events import Emitter, Event
from fledge.training.monitoring.statistics import Statistics, is_layer, layer_of
from fledge.training.objective import as_batch
from tests.training.test_diagnosis import relu_model
from tests.training.test_trainer import trainer, weights, with_dropout
from tests.training.toys import Packed, tiny


def told(heard: list[Event], step: int) -> dict[str, float]:
    return {e.name: float(e.value) for e in heard if e.kind == "metric" and e.step == step and "/" in e.name}


def watched(model: Any, events: Emitter, heard: list[Event], step: int = 1, **options: Any) -> dict[str, float]:
    heard.clear()
    trainer(model, events, statistics_every=1, source=Packed(rows=3), **{"steps": step, **options}).fit()
    return told(heard, step)


def test_every_number_is_what_one_computes_by_hand(events: Emitter, heard: list[Event]) -> None:
    model, by_hand = relu_model(0.0), relu_model(0.0).double()
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    found = watched(model, events, heard)

    outputs: dict[str, Any] = {}
    for index, layer in enumerate(by_hand.transformer.h):
        layer.register_forward_hook(lambda m, a, out, i=index: outputs.update({f"{i:02d}": out}))
        layer.mlp.act.register_forward_hook(lambda m, a, out, i=index: outputs.update({f"act{i:02d}": out}))
    batch = as_batch(Packed(rows=3).batch(0))
    length = batch["input_ids"].shape[1]
    starts = batch["position_ids"] == 0
    document = starts.long().cumsum(1)
    allowed = (document[:, :, None] == document[:, None, :]) & torch.ones(length, length).tril().bool()
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)[:, None]
    logits = by_hand(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask, use_cache=False
    ).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in by_hand.named_parameters()}
    groups = {"embeddings": ("wte", "wpe"), "00": (".h.0.",), "01": (".h.1.",), "rest": ("ln_f",)}
    for group, marks in groups.items():
        names = [name for name in before if any(mark in name for mark in marks)]
        norm = torch.stack([gradients[name].norm() for name in names]).norm()
        assert found[f"grad_norm/{group}"] == pytest.approx(float(norm), rel=1e-4)
        after = {name: p.detach().double() for name, p in model.named_parameters()}
        moved = torch.stack([(after[name] - before[name]).norm() for name in names]).norm()
        length_ = torch.stack([before[name].norm() for name in names]).norm()
        assert found[f"update_ratio/{group}"] == pytest.approx(float(moved / length_), rel=1e-3)
    for layer in ("00", "01"):
        x = outputs[layer] if isinstance(outputs[layer], torch.Tensor) else outputs[layer][0]
        assert found[f"activation_mean/{layer}"] == pytest.approx(float(x.mean()), rel=1e-3, abs=1e-6)
        assert found[f"activation_rms/{layer}"] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
        assert found[f"activation_max/{layer}"] == pytest.approx(float(x.abs().max()), rel=1e-5)
        act = outputs[f"act{layer}"]
        assert found[f"zeros/{layer}"] == pytest.approx(float((act == 0).double().mean()), abs=2e-3)
        dead = (act == 0).flatten(0, -2).all(dim=0).double().mean()
        assert found[f"dead/{layer}"] == pytest.approx(float(dead), abs=0.01)
    assert float(found["zeros/00"]) > 0.2, "ReLU cuts off about half of it"

    attentions = by_hand_attention(relu_model(0.0).double(), batch, mask)
    for layer, probabilities in enumerate(attentions):  # (B, H, T, T)
        entropy = torch.special.entr(probabilities[0]).sum(-1).mean()
        assert found[f"attention_entropy/{layer:02d}"] == pytest.approx(float(entropy), rel=1e-4)
    assert 0 < found["attention_logit_max/00"] < 5


def by_hand_attention(model: Any, batch: Any, mask: torch.Tensor) -> Any:
    """The probabilities of every layer, by the eager attention of transformers."""
    model.set_attn_implementation("eager")
    given = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        return model(**given, attention_mask=mask, use_cache=False, output_attentions=True).attentions


def test_micro_batches_and_checkpointing_are_counted_once(events: Emitter, heard: list[Event]) -> None:
    whole = watched(tiny(), events, heard)
    split = watched(tiny(), events, heard, micro_batch=1)
    run = trainer(tiny(), events, steps=1, statistics_every=1, source=Packed(rows=3))
    run.activation_checkpointing = True
    heard.clear()
    run.fit()
    again = told(heard, 1)
    assert whole.keys() == split.keys() == again.keys() and len(whole) > 15
    for name, value in whole.items():
        tolerance = {"rel": 1e-3, "abs": 1e-6} if name.startswith("update_ratio") else {"rel": 1e-4, "abs": 1e-7}
        assert split[name] == pytest.approx(value, **tolerance), name
        assert again[name] == pytest.approx(value, **tolerance), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_result_is_the_same_to_the_last_bit(events: Emitter, heard: list[Event], dtype: str) -> None:
    found = []
    for every in (0, 1, 3):
        model = with_dropout(tiny())
        options: dict[str, Any] = {"diagnose": "words" if every else "off", "dtype": dtype, "micro_batch": 4}
        trainer(model, events, steps=7, statistics_every=every, **options).fit()
        found.append(weights(model))
    assert found[0] == found[1] == found[2]
    assert told(heard, 6) and "update_ratio/00" in told(heard, 6)


def test_a_compiled_layer_is_asked_from_outside_and_not_compiled_again(events: Emitter, heard: list[Event]) -> None:
    import torch._dynamo as dynamo

    plain = watched(tiny(), events, heard, 2)
    dynamo.reset()
    model = tiny()
    impl = []
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=False)
        impl.append(layer._compiled_call_impl)
    trainer(model, events, steps=2, source=Packed(rows=3), diagnose="off").fit()
    compiled = dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    model.load_state_dict(tiny().state_dict())
    found = watched(model, events, heard, 2)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert [layer._compiled_call_impl for layer in model.model.layers] == impl, "it is as it was"
    for name in ("activation_rms/00", "activation_max/01", "grad_norm/01", "update_ratio/rest"):
        assert found[name] == pytest.approx(plain[name], rel=1e-3), name
    dynamo.reset()


class Counted(TorchDispatchMode):
    """How many operations on tensors are done."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(events: Emitter, steps: int, **options: Any) -> int:
    with Counted() as mode:
        trainer(tiny(), events, steps=steps, **options).fit()
    return mode.count


def test_a_step_that_is_not_asked_for_costs_nothing(events: Emitter) -> None:
    without = operations(events, 4, diagnose="off")
    assert operations(events, 4, diagnose="words") == without, "diagnosis looks at numbers that are there"
    assert operations(events, 4, statistics_every=5) == without
    a_step = operations(events, 5, diagnose="off") - without
    asked = operations(events, 5, statistics_every=5) - without - a_step
    assert 0 < asked < a_step, "and the step that is asked for not even twice as many"


def test_the_layers_of_every_family_are_found() -> None:
    assert layer_of("model.model.layers.3.mlp.up_proj.weight") == "03"
    assert layer_of("transformer.h.11.attn.c_attn.bias") == "11"
    assert layer_of("bert.encoder.layer.0.output.dense.weight") == "encoder.00"
    assert layer_of("decoder.block.2.layer.1.EncDecAttention.q.weight") == "decoder.02"
    assert layer_of("model.decoder.layers.7.fc1.weight") == "decoder.07"
    assert layer_of("model.embed_tokens.weight") == "" == layer_of("lm_head.weight")
    assert is_layer("model.layers.3") and is_layer("encoder.block.1") and not is_layer("encoder.block.1.layer.0")
    assert not is_layer("model.layers.3.mlp.experts.0") and not is_layer("model.layers")


def test_near_the_limit_of_the_format() -> None:
    model = tiny()
    statistics = Statistics([("model", model)], 1, limit=1.0)
    statistics.begin(0)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e3)
        model(input_ids=torch.arange(8)[None], use_cache=False)
    statistics.gradients({})
    assert statistics.found["near_limit/00"] > 0.3
    statistics.begin(1)
    statistics.gradients({})
    assert statistics.found == {}, "what was not run has no statistics"


def test_several_models_keep_their_names() -> None:
    models = [("generator", tiny()), ("discriminator", tiny(seed=2))]
    statistics = Statistics(models, 1)
    parameters = {f"{name}.{key}": p for name, model in models for key, p in model.named_parameters()}
    statistics.begin(0)
    ids = torch.arange(8)[None]
    sum(model(input_ids=ids, labels=ids, use_cache=False).loss for _, model in models).backward()
    statistics.gradients(parameters)
    found = statistics.found
    assert found["grad_norm/generator.00"] != found["grad_norm/discriminator.00"]
    assert {"activation_rms/generator.01", "attention_entropy/discriminator.00", "grad_norm/generator.rest"} <= set(
        found
    )

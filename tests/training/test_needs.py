"""What the stages that train say they need, before anything is loaded."""

from __future__ import annotations

import numpy as np
import pytest

from fledge.core.machine import Machine
from fledge.core.stage import Execution, Size
from fledge.data.tokens.batches import joined
from fledge.records.chat import Rendered
from fledge.training.estimation import needs
from fledge.training.scaling.stages import Scaling
from fledge.training.search.stages import RateRange
from fledge.training.stages import SFT, Continue
from fledge.training.strategies.stages import CrossValidate
from fledge.training.understanding.stages import Classify, Embed, Meta, Tag

DECODER = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 2048, "tie_word_embeddings": True,
}  # fmt: skip
ENCODER = {
    "model_type": "bert", "vocab_size": 30_522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072,
}  # fmt: skip
PLANNED = {
    "m": Size(parameters=9.1e7, config=DECODER), "e": Size(parameters=1.1e8, config=ENCODER),
    "d": Size(rows=1000, bytes=1e6), "t": Size(tokens=4096), **{f"f.{part}": Size(rows=500) for part in ("1", "2")},
    **{f"f.train_{part}": Size(rows=500) for part in ("1", "2")},
}  # fmt: skip
PRETRAIN = {"use": "train.pretrain", "data": ["d"], "tokenizer": "t", "model": {"size": "30M"}, "tokens": "1M"}
TRAININGS = {
    "classify": Classify(model="e", data=["d"]),
    "tag": Tag(model="e", data=["d"]),
    "embed": Embed(model="e", data=["d"]),
    "meta": Meta(model="m", data=["d"]),
    "cross-validate": CrossValidate(folds="f", k=2, stage={"use": "train.classify", "model": "e"}),
    "rate range": RateRange(of={"use": "train.sft", "model": "m", "data": ["d"]}),
    "scaling": Scaling(of=PRETRAIN, sizes=["10M", "30M"], tokens=["1M", "2M"]),
    "continue": Continue(model="m", data=["d"], tokens="1M"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_every_training_has_parts_operations_and_a_refusal(name: str) -> None:
    stage = TRAININGS[name]
    found = stage.estimate(PLANNED, Machine(2, 64e9, execution=Execution()))
    assert found.too_large is None and found.flops > 1e12 and {"weights", "activations"} <= found.parts.keys()
    assert sum(found.parts.values()) * needs.HIGH == pytest.approx(found.memory[1])
    little = Machine(2, 0.6 * sum(found.parts.values()), execution=Execution())
    problem = stage.estimate(PLANNED, little).too_large
    assert problem is not None and problem.what == "the training does not fit into memory"
    if name == "meta":
        assert "execution.micro_batch" not in problem.fix, "tasks are learned one by one: their rows are another key's"


def test_conversations_laid_end_to_end_fill_rows_of_the_planned_length() -> None:
    stage = SFT(model="m", data=["d"], train={"batch_size": 16, "max_length": 256})
    machine = Machine(2, 64e9, execution=Execution(compile="off"))
    packed = needs.row_of_conversations(16, 256)
    random = np.random.default_rng(0)
    longest = 0
    for _ in range(200):
        lengths = np.clip(random.lognormal(4.9, 0.5, 16), 16, 256).astype(int)
        texts = [Rendered(list(range(n)), [1.0] * n) for n in lengths]
        longest = max(longest, joined(texts, 256, 0, needs.AT_ONCE).input_ids.shape[1])
    assert longest == pytest.approx(packed, rel=0.1)
    large = stage.estimate(PLANNED, machine)
    padded = stage.model_copy(update={"packing": False}).estimate(PLANNED, machine)
    assert large.parts["activations"] > padded.parts["activations"], "a row of 1,280 tokens, and four of 256"

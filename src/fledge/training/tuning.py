"""`train.sft`, `train.reward` and `train.dpo`: a model that exists, taught by conversations or by preferences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.core.allocator import keep_few_products
from fledge.core.artifact import Artifact, Model, RewardModel
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.data.tokens.batches import ConversationBatches, PreferenceBatches, permutation
from fledge.models.load import load_model
from fledge.models.save import save_model
from fledge.models.states import decoder_of, require_packable
from fledge.records import shards
from fledge.records.chat import ChatRenderer, Rendered
from fledge.records.kinds import Conversation, Labelled, Preference
from fledge.training.compiling import compiled
from fledge.training.held_out import answer_loss
from fledge.training.kernels import fast_kernels
from fledge.training.layout.check import require_layout
from fledge.training.layout.ranks import Ranks, device_of
from fledge.training.objective import Batch, BatchSource, Objective
from fledge.training.objectives.chat import Chat
from fledge.training.objectives.dpo import DPO, answer_logprobs, pair_logprobs
from fledge.training.objectives.reward import Reward, scores
from fledge.training.pairs import Contest, accuracy, ask, baselines, contests
from fledge.training.policy import Policy, open_policy
from fledge.training.reference import WithReference, reference_logprobs
from fledge.training.settings import TrainSettings, flops_per_token
from fledge.training.stability.diagnosis import worse_on_held_out
from fledge.training.strategies.consolidation import consolidate
from fledge.training.strategies.forgetting import Watch
from fledge.training.strategies.penalty import Penalty
from fledge.training.strategies.replay import OneByOne, Replayed, laid_end_to_end, replayed, side_by_side
from fledge.training.trainer import Trainer

if TYPE_CHECKING:
    from fledge.training.stages import SFT, DirectPreferences, RewardModelling
    from fledge.training.strategies.settings import Replay

LARGE = 50_000_000
"""Parameters from which a step's rows are read a few at a time, to bound the memory of their activations."""
TOKENS_AT_ONCE = 1024


def sft(stage: SFT, job: Job) -> Model:
    """Supervised fine-tuning; the loss on held-out answers before and after."""
    run = Run(job, stage.train, stage.packing)
    policy = open_policy(job.open(stage.model).path, stage.train, stage.lora, job.rng_seed("adapter"), run.device)
    renderer, length = ChatRenderer(policy.tokenizer), min(stage.train.max_length, policy.context)
    rows = run.rendered(renderer, stage.data)
    if stage.packing:
        require_packable(decoder_of(policy.model))
    source = run.batches(rows, renderer, length, stage.replay, stage.packing)
    watch = Watch(job, stage.forgetting, policy.tokenizer, length, stage.train.dtype)
    held_out = run.conversations(stage.held_out, stage.held_out_rows) if stage.held_out else []
    metrics: dict[str, Any] = {"rows": len(rows), "dropped_rows": source.dropped}

    def loss() -> float:
        found, metrics["held_out_tokens"] = answer_loss(policy.model, renderer, held_out, length, stage.train.dtype)
        return found

    def measure(name: str) -> None:
        if held_out:
            job.events.message(t("measuring the loss on {count} held-out conversations", count=len(held_out)))
            metrics[name] = loss()

    measure("answer_loss_before")
    watch.start(policy.model)
    penalties = consolidate(job, stage.ewc, policy, length, run.ranks, run.device)
    tokens = source.tokens if isinstance(source, ConversationBatches) else 0
    metrics |= run.fit(Chat(), policy, source, len(source), loss if held_out else None, penalties, tokens)
    measure("answer_loss")
    metrics |= watch.compare(policy.model)
    if held_out and (
        warning := worse_on_held_out(metrics["answer_loss_before"], metrics["answer_loss"], metrics["final_loss"])
    ):
        job.events.message(warning, "warning")
    return policy.save(job, metrics, renderer.template)


def reward(stage: RewardModelling, job: Job) -> RewardModel:
    """Pairwise ranking; accuracy on held-out pairs beside the baselines."""
    run, path = Run(job, stage.train), job.open(stage.model).path
    policy = open_policy(path, stage.train, None, 0, run.device, reward=True)
    renderer, length, pad = ChatRenderer(policy.tokenizer), stage.train.max_length, _pad(policy.tokenizer)
    length = min(length, policy.context)
    pairs = run.contests(renderer, [stage.data], length)
    source = PreferenceBatches([c.pair for c in pairs], stage.train.batch_size, length, pad, job.rng_seed("order"))
    metrics: dict[str, Any] = {"pairs": len(pairs), "dropped_pairs": source.dropped}
    held = run.contests(renderer, [stage.held_out], length, stage.held_out_rows) if stage.held_out else []

    def margins() -> Tensor:
        with run.autocast():
            found = ask(held, pad, lambda batch: scores(policy.model, batch), run.device)
        return found[:, 0] - found[:, 1]

    metrics |= run.fit(Reward(), policy, source, len(source), ranking_loss(margins) if held else None)
    if held:
        with run.autocast():
            start = load_model(path, "float32", run.device)
            before = ask(held, pad, lambda batch: answer_logprobs(start, batch), run.device)
        metrics |= {"held_out_pairs": len(held), **accuracy(margins(), held), **baselines(before, held)}
    if job.rank == 0:
        save_model(policy.model, policy.tokenizer, job.out, renderer.template)
    return RewardModel(job.out, {**policy.parameters, **metrics})


def dpo(stage: DirectPreferences, job: Job) -> Model:
    """Direct preference optimisation; implicit-reward accuracy on held-out pairs beside the baselines."""
    run = Run(job, stage.train)
    policy = open_policy(job.open(stage.model).path, stage.train, stage.lora, job.rng_seed("adapter"), run.device)
    policy.model.eval()  # the policy as it is now is the reference
    renderer, pad = ChatRenderer(policy.tokenizer), _pad(policy.tokenizer)
    length = min(stage.train.max_length, policy.context)
    pairs = run.contests(renderer, [stage.data], length)
    source = PreferenceBatches([c.pair for c in pairs], stage.train.batch_size, length, pad, job.rng_seed("order"))
    metrics: dict[str, Any] = {"pairs": len(pairs), "dropped_pairs": source.dropped, "beta": stage.beta}
    known = run.reference(policy, source)
    watch = Watch(job, stage.forgetting, policy.tokenizer, length, stage.train.dtype)
    watch.start(policy.model)
    penalties = consolidate(job, stage.ewc, policy, length, run.ranks, run.device)
    held = run.contests(renderer, [stage.held_out], length, stage.held_out_rows) if stage.held_out else []

    def logprobs() -> Tensor:
        with run.autocast():
            return ask(held, pad, lambda batch: answer_logprobs(policy.model, batch), run.device)

    before = logprobs() if held else torch.zeros(0, 2)

    def margins() -> Tensor:
        gained = stage.beta * (logprobs() - before)  # implicit rewards, (N, 2)
        return gained[:, 0] - gained[:, 1]

    loss = ranking_loss(margins) if held else None
    metrics |= run.fit(DPO(stage.beta), policy, WithReference(source, known), len(source), loss, penalties)
    metrics |= watch.compare(policy.model)
    if held:
        found = margins()
        metrics |= {"held_out_pairs": len(held), **accuracy(found, held)}
        metrics |= {**baselines(before, held), "held_out_margin": float(found.mean())}
    return policy.save(job, metrics, renderer.template)


def ranking_loss(margins: Callable[[], Tensor]) -> Callable[[], float]:
    """The mean of −log σ(margin) in nats, of margins measured when it is asked for."""
    return lambda: float(-F.logsigmoid(margins()).mean())


class Run:
    """What the three stages share: reading, rendering, and the Trainer with its checkpoints."""

    def __init__(self, job: Job, settings: TrainSettings, packed: bool = False) -> None:
        keep_few_products(settings.max_length if packed else 0)
        self.job, self.settings = job, settings
        self.device = device_of(job.execution)
        for given in job.inputs.values():
            if given.kind in ("model", "adapter"):
                require_layout(given.path, job.execution, job.world, settings.optimizer)
        self.ranks = Ranks.join(job.rank, job.world, self.device, job.execution.layout)
        self.row_tokens = settings.max_length
        """about how many tokens a row of a batch has, at most"""

    def fit(
        self,
        objective: Objective,
        policy: Policy,
        source: BatchSource,
        steps_an_epoch: int,
        held_out_loss: Callable[[], float] | None = None,
        penalties: Sequence[Penalty] = (),
        tokens_an_epoch: int = 0,
    ) -> dict[str, Any]:
        """Train for as many steps as the settings ask for, or until `held_out_loss` gets no better.

        With `tokens_an_epoch` known, and many, the layers are compiled.
        """
        settings, cost = self.settings, flops_per_token(policy.parameters["parameters"], policy.base is not None)
        steps = settings.steps or max(1, math.ceil(settings.epochs * steps_an_epoch))
        trainer = Trainer(
            objective, {"model": policy.model}, source, settings, steps, self.job.rng_seed("steps"), self.job.events,
            self.job.checkpoints, self.micro_batch(policy), self.ranks, self.device,
            self.job.execution.activation_checkpointing == "on", held_out_loss, penalties,
            self.job.execution.keep_last,
        )  # fmt: skip
        flops = cost * tokens_an_epoch * steps / steps_an_epoch
        with compiled(policy.model, self.job.execution, flops, self.job.events, varying=True):
            metrics = trainer.fit()
        if metrics["tokens_per_second"]:
            self.job.events.metric("rate/tune.flops", metrics["tokens_per_second"] * cost)
        return metrics

    def batches(
        self,
        rows: Sequence[Rendered],
        renderer: ChatRenderer,
        length: int,
        replay: Replay | None = None,
        packing: bool = False,
    ) -> ConversationBatches | Replayed:
        """Batches of rendered conversations, with those of earlier corpora among them where a recipe asks for it."""
        size, order, pad = self.settings.batch_size, self.job.rng_seed("order"), _pad(renderer.tokenizer)
        if packing:
            self.row_tokens = TOKENS_AT_ONCE
        if replay is None:
            return ConversationBatches(rows, size, length, pad, order, row_tokens=self.row_tokens if packing else 0)
        new, *old = (
            OneByOne(ConversationBatches(some, 1, length, pad, self.job.rng_seed("order", number)))
            for number, some in enumerate((rows, *(self.rendered(renderer, [ref]) for ref in replay.data)))
        )
        stack = laid_end_to_end(length, pad, self.row_tokens) if packing else side_by_side(length, pad)
        return replayed(new, old, replay, size, stack)

    def micro_batch(self, policy: Policy) -> int:
        """Rows at once: what the user says, all of them for a small model, a few for a large one."""
        if self.job.execution.micro_batch or policy.parameters["parameters"] < LARGE:
            return self.job.execution.micro_batch
        return max(1, TOKENS_AT_ONCE // min(self.row_tokens, policy.context))

    def reference(self, policy: Policy, source: PreferenceBatches) -> dict[str, Tensor]:
        """Log-probabilities of all pairs under the policy before its first step, in the shapes of the first epoch."""
        size = self.micro_batch(policy)

        def ask_policy(batch: Batch) -> Tensor:
            mine = [slice(s, s + size) for s in range(0, len(batch["weights"]), size)] if size else [slice(None)]
            with self.autocast(), torch.no_grad():
                parts = [pair_logprobs(policy.model, {k: v[rows] for k, v in batch.items()}) for rows in mine]
            return torch.cat(parts)

        self.job.events.message(t("asking the reference for its log-probabilities"))
        # the kernels of the steps, so that the first loss is ln 2
        with fast_kernels([policy.model], self.device, self.settings.dtype):
            return reference_logprobs(
                source, len(source), ask_policy, self.job.work / "reference.safetensors", self.device,
                lambda done, total: self.job.events.progress(done, total, "reference batches"),
            )  # fmt: skip

    def conversations(self, ref: Ref[Any], limit: int | None = None) -> list[Conversation]:
        """The conversations behind a reference."""
        return cast(list[Conversation], self._read(ref, "conversations", limit))

    def labelled(self, ref: Ref[Any], limit: int | None = None) -> list[Labelled]:
        """The labelled texts behind a reference."""
        return cast(list[Labelled], self._read(ref, "labelled", limit))

    def rendered(self, renderer: ChatRenderer, refs: Sequence[Ref[Any]]) -> list[Rendered]:
        """The conversations as token rows; where the steps asked for need fewer of them, so many by a seeded draw."""
        found = [conversation for ref in refs for conversation in self.conversations(ref)]
        needed = self.settings.steps * self.settings.batch_size if self.settings.steps else len(found)
        if needed < len(found):
            drawn = permutation(len(found), self.job.rng_seed("rows"))[:needed]
            found = [found[index] for index in sorted(drawn.tolist())]
        return [self._render(renderer, row, index, len(found)) for index, row in enumerate(found, 1)]

    def _render(self, renderer: ChatRenderer, row: Conversation, done: int, total: int) -> Rendered:
        self.job.events.progress(done, total, "conversations")
        return renderer.render(row.messages)

    def contests(
        self, renderer: ChatRenderer, refs: Sequence[Ref[Any]], length: int, limit: int | None = None
    ) -> list[Contest]:
        """All pairs of the preferences behind references."""
        rows = [row for ref in refs for row in cast(list[Preference], self._read(ref, "preferences", limit))]
        found = list(contests(renderer, rows, length))
        if not found:
            raise FledgeError(Problem(t("there is no pair in which one answer is better"), where="data"))
        return found

    def autocast(self) -> Any:
        """The arithmetic of the training steps."""
        kind, dtype = torch.device(self.device).type, getattr(torch, self.settings.dtype)
        return torch.autocast(kind, dtype, enabled=dtype != torch.float32)

    def _read(self, ref: Ref[Any], kind: str, limit: int | None) -> list[Any]:
        source: Artifact = self.job.open(ref)
        found = list(islice(shards.read(source, kind), limit))
        if not found:
            raise FledgeError(Problem(t("there is nothing to learn from"), where=str(source.path)))
        return found


def _pad(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

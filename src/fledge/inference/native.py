"""Our own engine: a `transformers` model in this process, with continuous batching.

A worker thread owns the model. It repeats schedule → run → postprocess: one forward pass takes the next token of all
running answers and a piece of the prompts of newcomers, every answer gets its token, and whoever is finished leaves at
once. Keys and values lie in blocks that answers share; a prompt that begins like an earlier one is not read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference import scoring
from fledge.inference.answer import Answer, Ticket
from fledge.inference.asking import ids_of
from fledge.inference.blocks import BlockPool
from fledge.inference.changing import Changing
from fledge.inference.devices import device_of, dtype_for
from fledge.inference.drafting import DraftModel
from fledge.inference.engine import Listen, Request, Scored
from fledge.inference.formats import FORMATS, Weights
from fledge.inference.forward import Forward
from fledge.inference.guessing import Guessing
from fledge.inference.live import Live, second_tree
from fledge.inference.pooling import Pooling, pooling_of
from fledge.inference.sampling import logprob_of
from fledge.inference.scheduler import Reading, Scheduler, Statistics, Step
from fledge.inference.searching import BeamAnswer
from fledge.inference.weights import check
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Conversation

_WHOLE_LOGITS = 1 << 25
"""numbers that the logits of a piece of a prompt may be, where all of them are wanted"""


class NativeEngine(Changing):
    """An `Engine` over a causal language model (or, for `reward` only, a reward model) and its tokenizer."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        renderer: ChatRenderer | None = None,
        *,
        max_slots: int = 64,
        context: int | None = None,
        prefill_tokens: int = 256,
        cache_bytes: int = 2 << 30,
        prefix_cache: bool = True,
        pooling: Pooling | None = None,
        base: Path | None = None,
        adapters: Mapping[str, Path] | None = None,
        live: Live | None = None,
        lookup: bool = True,
        draft: Any = None,
        weights: Weights = "",
    ) -> None:
        """`max_slots`: answers that decode together; `prefill_tokens`: prompt tokens read beside them in one step;
        `cache_bytes`: the most that keys and values may take (whoever does not fit waits; the context ends where a
        single text would not fit any more); without `prefix_cache` nothing is kept for later requests; `pooling`: how
        `embed` makes one vector of a text (the mean of its hidden states); `base`: the folder of the model, by which
        adapters of another one are told; `adapters`: LoRA folders by name (`add_adapter`); `live`: as in `follow`;
        `lookup`: whether tokens are guessed from what a text holds already; `draft`: a smaller model with the same
        tokenizer that guesses, too; `weights`: int8, int4 or fp8 (`weights.py`) instead of the model's own format.

        `model` itself is not changed: what is packed and fused is a second tree of modules over its weights."""
        vocabulary = model.config.get_text_config().vocab_size
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        super().__init__(tokenizer, renderer, vocabulary, ids_of(tokenizer.eos_token_id, ends))
        self.pooling = pooling or Pooling()
        self.model = self._tree(model, base, live)
        self.forward = Forward(self.model, weights=weights, keep=live is not None)
        self.forward.use(self.adapters)
        self.adapters.attach()
        self.context = min(context or self.forward.context, self.forward.context)
        size = self.forward.block_tokens
        blocks = -(-self.context // size)
        if self.forward.writes:
            blocks = max(1, cache_bytes // self.forward.bytes_per_block)
            self.context = min(self.context, blocks * size)
        self._pool = BlockPool(blocks, size, prefix_cache)
        self._allocated = 0
        rows = max(1, _WHOLE_LOGITS // vocabulary)
        self._scheduler = Scheduler(self._pool, max_slots, prefill_tokens, logits_tokens=rows)
        self._guessing = Guessing(lookup, None if draft is None else self._drafting(draft, vocabulary))
        self._ended = False
        self.add_adapters(adapters or {})

    @classmethod
    def follow(cls, model: Any, tokenizer: Any, renderer: ChatRenderer | None = None, **options: Any) -> NativeEngine:
        """An engine over a model that is being trained. `refresh` follows its weights; the model stays in the mode in
        which it is, with the modules that it has. A live LoRA (PEFT) is followed without packing its base again.

        Raises FledgeError for a model of which this process has only a part.
        """
        return cls(model, tokenizer, renderer, live=Live(model), **options)

    @classmethod
    def from_folder(
        cls, path: Path | str, dtype: str = "auto", device: str = "auto", *,
        reward: bool = False, draft: Path | str | None = None, **options: Any,
    ) -> NativeEngine:  # fmt: skip
        """An engine for a model folder (full, adapter or int8). dtype "auto": bfloat16 where the processor multiplies
        it natively and the model is large enough to gain, else float32; "int8", "int4" and "fp8" are "auto" with linear
        layers in that format. `draft`: the folder of a smaller model with the same tokenizer; its weights are never
        fewer bits than 16. `options` as in the constructor. Raises FledgeError for a format that cannot be had here.
        """
        from fledge.models.load import load_model, load_tokenizer

        folder, device = Path(path), device_of(device)
        if dtype in FORMATS:
            check(dtype, torch.device(device))
            dtype, options["weights"] = "auto", dtype
        model = load_model(folder, dtype=dtype_for(folder, dtype, device), device=device, reward=reward)
        tokenizer = load_tokenizer(folder)
        options = {"pooling": pooling_of(folder), "base": folder} | options
        if draft is not None:
            if load_tokenizer(Path(draft)).get_vocab() != tokenizer.get_vocab():
                raise FledgeError(Problem(t("the draft model has another vocabulary"), "draft", str(draft)))
            options["draft"] = load_model(Path(draft), dtype=dtype_for(folder, dtype, device), device=device)
        return cls(model, tokenizer, ChatRenderer(tokenizer) if tokenizer.chat_template else None, **options)

    @property
    def parameters(self) -> int:
        """Weights of the model, an adapter's apart."""
        return self.forward.parameters

    def statistics(self) -> Statistics:
        """What it is doing and has done; any thread may ask, any time."""
        return self._scheduler.statistics()

    # ---- probabilities, rewards, vectors

    def score(
        self, prompt_ids: Sequence[Sequence[int]], continuation_ids: Sequence[Sequence[int]], adapter: str = ""
    ) -> list[Scored]:
        """Log-probabilities (fp32) of each continuation after its prompt, as the `adapter` of that name says.

        Raises FledgeError for an empty prompt or continuation, or one beyond the context.
        """
        return scoring.score(self._reading(adapter), self.forward, self.context, prompt_ids, continuation_ids)

    def reward(self, conversations: Sequence[Conversation]) -> list[float]:
        """The reward model's score of each conversation. Raises FledgeError when the model is no reward model."""
        rows = [self._rendered(conversation.messages, answer=False) for conversation in conversations]
        return scoring.reward(self._reading(""), self.forward, self.context, rows)

    def embed(self, texts: Sequence[str], adapter: str = "") -> list[list[float]]:
        """The mean of the last hidden states over each text's tokens (fp32), or what `pooling` says."""
        rows = [list(self._text.encode(text).ids) for text in texts]
        body = scoring.body_of(self.model)
        return scoring.embed(self._reading(adapter), body, self.context, rows, self.pooling)

    # ---- from a request to a ticket

    def _ticket(self, request: Request, listen: Listen) -> Ticket:
        ticket = super()._ticket(request, listen)
        ticket.cache_key = self.adapters.key(request.adapter)
        if request.beams > 1:
            self._check_beams(request, len(ticket.prompt_ids), ticket.limit)
            ticket.answers = [BeamAnswer(ticket, self._text)]
        return ticket

    def _refuse(self, request: Request) -> None:
        if not self.forward.writes:
            raise FledgeError(t("this is a reward model: it scores texts and writes none"))
        self.adapters.key(request.adapter)  # raises when there is none

    def _check_beams(self, request: Request, prompt: int, limit: int) -> None:
        """Raise FledgeError where the beams could not be held even if they were alone."""
        size = self._pool.block_tokens
        shared = prompt // size
        needed = shared + request.beams * (-(-(prompt + limit) // size) - shared + 1)
        if needed > self._pool.size:
            raise FledgeError(
                Problem(
                    t("so many beams of this length do not fit into the cache"),
                    "beams",
                    found=t("{n} tokens", n=needed * size),
                    allowed=t("at most {n} tokens", n=self._pool.size * size),
                    fix=t("ask for fewer beams or fewer new tokens"),
                )
            )

    def _drafting(self, model: Any, vocabulary: int) -> DraftModel:
        """The draft model, with as many blocks as this one has."""
        known, own = model.config.get_text_config().vocab_size, len(self.tokenizer)
        if known < own:
            raise FledgeError(
                Problem(t("the draft model has another vocabulary"), "draft", str(known), t("{n} tokens", n=own))
            )
        return DraftModel(Forward(second_tree(model.eval())), self._pool.size, vocabulary)

    # ---- the worker

    def _wake(self) -> None:
        self._ended = True
        super()._wake()

    def _busy(self) -> bool:
        return bool(self._scheduler)

    def _tickets(self) -> Iterable[Ticket]:
        return self._scheduler.tickets()

    def _enter(self, ticket: Ticket) -> None:
        if self._is_readable(ticket):
            self._scheduler.add(ticket)

    def _broken(self, error: FledgeError) -> None:
        for ticket in self._scheduler.tickets():
            ticket.fail(error)
        self._scheduler.clear()

    def _round(self) -> None:
        if self._ended:
            self._ended = False  # before looking: whoever ends meanwhile is seen by the next round
            for ticket in list(self._scheduler.tickets()):
                if ticket.cancelled:
                    ticket.end()
            self._scheduler.sweep()
        self._step()

    def _step(self) -> None:
        """One round: guess, schedule, run, postprocess."""
        self._guessing.propose(self._scheduler.running)
        step = self._scheduler.schedule()
        if step.shares:
            logits = self._run(step)
            self._read_prompts(step, logits)
            self._extend(self._scheduler.advance(step), logits)
            self._scheduler.settle()
        self._guessing.settle()

    def _run(self, step: Step) -> Tensor:
        """The logits (rows, V) of a step's parts, fp32."""
        reach = self._pool.reach
        if self._allocated < reach:
            # All at once where memory is taken only as it is written; else half ahead. Every time more is had what is
            # there is copied, which keeps all waiting for seconds.
            at_once = self.forward.device.type == "cpu"
            ahead = self._pool.size if at_once else min(self._pool.size, reach + max(64, reach // 2))
            self.forward.allocate(ahead)
            self._allocated = ahead
        if step.unclean:
            self.forward.clear(step.unclean)
        for source, target in step.copies:
            self.forward.copy(source, target)
        return self.forward.run(step.parts)

    def _read_prompts(self, step: Step, logits: Tensor) -> None:
        """Log-probabilities of the prompts' own tokens, where they are wanted."""
        for share in step.shares:
            reading = share.owner
            if isinstance(reading, Reading) and reading.logprobs_asked is not None:
                following = reading.table.ids[share.parts[0].start + 1 : share.parts[0].end + 1]
                rows = logits[share.rows.start : share.rows.stop].cpu().numpy()
                reading.logprobs += [
                    logprob_of(row, token, reading.logprobs_asked) for row, token in zip(rows, following, strict=False)
                ]

    def _extend(self, due: list[tuple[Answer, range]], logits: Tensor) -> None:
        """Give every answer its next tokens from its rows of logits; rows without numbers fail alone."""
        if not due:
            return
        sound = torch.isfinite(logits.amax(-1)).cpu().numpy()
        rows = logits.cpu().numpy()
        for answer, places in due:
            if answer.finished:  # a sibling's failure may have ended it
                continue
            mine = slice(places.start, places.stop)
            if not sound[mine].all():
                answer.ticket.fail(FledgeError(Problem(t("the model gave no numbers (NaN or infinity)"))))
                continue
            try:
                self._scheduler.draft_tokens += len(answer.draft)
                self._scheduler.accepted_tokens += answer.extend(rows[mine])
            except FledgeError as error:  # its constraint leaves no way to go on
                answer.ticket.fail(error)

"""Encoder-decoder models (T5, BART, …) behind the same protocol, with plain batching.

The prompt is what the encoder reads; the answer is what the decoder writes from its start token on. A few requests are
encoded together, padded to the longest, and decoded together until the last of them ends; whoever is finished leaves
the batch, whoever comes meanwhile waits for the next one. There is no block pool, no chunked prefill and no prefix
cache here: an encoder reads its prompt once and in both directions, so that no two prompts share a part.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.tokens.packing import plain
from fledge.inference import asking, scoring
from fledge.inference.answer import Ticket
from fledge.inference.asking import Asking
from fledge.inference.constraint import Constraints
from fledge.inference.devices import device_of, dtype_for
from fledge.inference.engine import Listen, PromptTooLong, Request, Scored
from fledge.inference.pooling import Pooling, pooling_of
from fledge.inference.rows import RowBeams, begin, extend, going_on, rows_of
from fledge.inference.sampling import Sampling
from fledge.models.load import context_of
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Conversation

T = TypeVar("T")
log = logging.getLogger(__name__)

_BATCH_TOKENS = 4096


class EncoderDecoderEngine(Asking):
    """An `Engine` over an encoder-decoder model and its tokenizer."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        renderer: ChatRenderer | None = None,
        *,
        max_rows: int = 32,
        context: int | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        """`max_rows`: answers that decode together. `context`: the most tokens of a prompt, and of an answer with its
        start token. Raises FledgeError for a model of another kind."""
        if not model.config.is_encoder_decoder:
            raise FledgeError(Problem(t("this is no encoder-decoder model"), found=type(model).__name__))
        self.model, self.tokenizer, self.renderer = model.eval(), tokenizer, renderer
        limit = context_of(model.config)
        self.context = min(context or limit, limit)
        self.max_rows, self.pooling = max_rows, pooling or Pooling()
        self._inner = model.get_base_model() if hasattr(model, "peft_config") else model
        self._start, self._first, self._stop_ids = _ids(self._inner, tokenizer)
        self._text = plain(tokenizer)  # never changed: threads may share it
        self._render_lock = threading.Lock()
        self._inbox: deque[Ticket] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._open()

    @classmethod
    def from_folder(
        cls, path: Path | str, dtype: str = "auto", device: str = "auto", **options: Any
    ) -> EncoderDecoderEngine:
        """An engine for a model folder; dtype and device as the native engine's, `options` as in the constructor."""
        from fledge.models.load import load_model, load_tokenizer

        folder, device = Path(path), device_of(device)
        model = load_model(folder, dtype=dtype_for(folder, dtype, device), device=device)
        tokenizer = load_tokenizer(folder)
        renderer = ChatRenderer(tokenizer) if tokenizer.chat_template else None
        return cls(model, tokenizer, renderer, **({"pooling": pooling_of(folder)} | options))

    # ---- requests

    def count(self, request: Request) -> int:
        """The tokens of a request's prompt. Raises what `submit` would raise."""
        return len(self._prompt(request))

    def _ticket(self, request: Request, listen: Listen) -> Ticket:
        prompt = self._prompt(request)
        stop_ids = self._stop_ids if request.stop_ids is None else frozenset(request.stop_ids)
        if request.messages is not None and request.stop_ids is None and self.renderer is not None:
            stop_ids |= frozenset(self.renderer.stop_ids)
        room = self.context - 1  # the decoder reads its start token too
        limit = min(request.max_new_tokens or room, room)
        guide = self._constraints.guide(request.constraint, stop_ids) if request.constraint else None
        ticket = Ticket(request, prompt, stop_ids, limit, self._text, listen, self._wake, guide)
        if request.beams > 1:
            ticket.answers = [RowBeams(ticket, self._text)]
        for answer in ticket.answers:  # what the decoder has read, not the encoder: so transformers' penalty counts
            fork = guide.fork() if guide is not None else None
            begin(answer, Sampling.of(request, [self._start], answer.index, fork))
        return ticket

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self._text.to_str())

    def _prompt(self, request: Request) -> list[int]:
        """The token ids that the encoder reads, seen to be ones that it can."""
        for name, neutral in (("prompt_logprobs", None), ("adapter", "")):
            if getattr(request, name) != neutral:
                raise FledgeError(Problem(t("{name} is not known to the engine of encoder-decoders", name=name), name))
        if request.messages is not None:
            if self.renderer is None:
                raise FledgeError(Problem(t("this model has no chat template"), fix=t("give it plain text instead")))
            with self._render_lock:
                prompt = list(self.renderer.render(tuple(request.messages), add_generation_prompt=True).ids)
        elif request.text is not None:
            prompt = list(self._text.encode(request.text).ids)
        else:
            prompt = list(request.prompt_ids or ())
        if not prompt:
            raise FledgeError(Problem(t("the prompt is empty"), "prompt"))
        if len(prompt) > self.context:
            raise PromptTooLong(
                Problem(
                    t("the prompt is longer than the model's context"),
                    "prompt",
                    found=t("{n} tokens", n=len(prompt)),
                    allowed=t("at most {n} tokens", n=self.context),
                )
            )
        vocabulary = self.model.config.get_text_config().vocab_size
        worst = max(prompt) if min(prompt) >= 0 else min(prompt)
        if not 0 <= worst < vocabulary:
            raise FledgeError(
                Problem(t("a token id is outside the vocabulary"), "prompt", str(worst), f"0 … {vocabulary - 1}")
            )
        return prompt

    # ---- probabilities, rewards, vectors

    def score(self, prompt_ids: Sequence[Sequence[int]], continuation_ids: Sequence[Sequence[int]]) -> list[Scored]:
        """Log-probabilities (fp32) of each continuation as what the decoder writes after the encoder read its prompt.

        Raises FledgeError for an empty prompt or continuation, or one beyond the context.
        """
        pairs = list(zip(map(list, prompt_ids), map(list, continuation_ids), strict=True))
        for place, (prompt, continuation) in enumerate(pairs):
            if not prompt or not continuation:
                raise FledgeError(Problem(t("a prompt or continuation is empty"), t("item {n}", n=place)))
            scoring.check_length(max(len(prompt), len(continuation)), self.context, place)
        found: dict[int, Scored] = {}
        for places in _by_size([len(prompt) + len(continuation) for prompt, continuation in pairs]):
            found |= zip(places, self._call(partial(self._score, [pairs[place] for place in places])), strict=True)
        return [found[place] for place in range(len(pairs))]

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Scored]:
        ids, mask = self._padded([prompt for prompt, _ in pairs])
        read, _ = self._padded([[self._start, *continuation[:-1]] for _, continuation in pairs])
        output = self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=read, use_cache=False)
        logprobs = output.logits.float().log_softmax(-1)  # (B, T, V); padding on the right is not looked at
        best = logprobs.argmax(-1).tolist()
        scored = []
        for row, (_, continuation) in enumerate(pairs):
            tokens = torch.tensor(continuation, device=logprobs.device)
            found = logprobs[row, : len(tokens)].gather(-1, tokens[:, None])[:, 0].tolist()
            flags = tuple(a == b for a, b in zip(best[row], continuation, strict=False))
            scored.append(Scored(tuple(found), flags))
        return scored

    def reward(self, conversations: Sequence[Conversation]) -> list[float]:
        """None: this is no reward model. Raises FledgeError."""
        raise FledgeError(
            Problem(t("this model is not a reward model"), fix=t("give a folder made by the stage train.reward"))
        )

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector a text from the encoder's last hidden states (fp32)."""
        rows = [list(self._text.encode(text).ids) for text in texts]
        encoder = self._inner.get_encoder()
        return scoring.embed(self._call, encoder, self.context, rows, self.pooling)

    # ---- the worker

    def _post(self, tickets: list[Ticket]) -> None:
        with self._news:
            self._see_worker()
            self._inbox.extend(tickets)
            self._news.notify()

    def _call(self, function: Callable[[], T]) -> T:
        """The value of `function`, computed by the worker between two batches."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._news:
            self._see_worker()
            self._calls.append(run)
            self._news.notify()
        return future.result()

    def _wake(self) -> None:
        with self._news:
            self._news.notify()

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            with self._news:
                busy = self._news.wait_for(lambda: self._closed or self._inbox or self._calls, asking.LINGER)
                if not busy:
                    self._worker = None
                    return
                if self._closed:
                    break
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
                group = self._next()
            for call in calls:
                call()
            if group:
                self._answer(group)
        _cancel(self._inbox)
        for call in self._calls:  # whoever waits for a value is not left waiting
            call()

    def _next(self) -> list[Ticket]:
        """Who is answered together: as many as there are rows for, in the order in which they came."""
        group: list[Ticket] = []
        rows = 0
        while self._inbox and (not group or rows + rows_of(self._inbox[0].request) <= self.max_rows):
            group.append(self._inbox.popleft())
            rows += rows_of(group[-1].request)
        return group

    def _answer(self, tickets: list[Ticket]) -> None:
        """Encode the prompts, then decode until nobody goes on."""
        try:
            self._decode(tickets)
        except Exception as error:  # out of memory, a broken model: these requests fail, the engine lives on
            log.exception("a batch of the engine failed")
            problem = Problem(t("the model could not be computed"), found=f"{type(error).__name__}: {error}")
            for ticket in tickets:
                ticket.fail(FledgeError(problem))

    def _decode(self, tickets: list[Ticket]) -> None:
        ids, mask = self._padded([ticket.prompt_ids for ticket in tickets])
        states = self._inner.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state  # (tickets, S, D)
        answers = [answer for ticket in tickets for answer in ticket.answers]
        place = [row for row, ticket in enumerate(tickets) for _ in ticket.answers]
        widths = [1] * len(answers)  # rows of each answer: one, or its beams
        last = [self._start] * len(answers)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        states, mask = states[place], mask[place]
        forced = self._first
        while answers:
            output = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=mask,
                decoder_input_ids=torch.tensor(last, device=ids.device)[:, None],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            extend(answers, widths, output.logits[:, -1].float(), forced)
            _cancel(ticket for ticket in tickets if ticket.cancelled or self._closed)
            answers, widths, last, place = going_on(answers, widths)
            forced = None
            if answers and place != list(range(len(states))):
                keep = torch.tensor(place, device=ids.device)
                states, mask = states[keep], mask[keep]
                cache.batch_select_indices(keep)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T), padded on the right."""
        width, device = max(map(len, rows)), self.model.device
        pad = self.model.config.get_text_config().pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        return ids, mask


def _cancel(tickets: Iterable[Ticket]) -> None:
    for ticket in list(tickets):
        for answer in ticket.answers:
            if not answer.finished:
                answer.cancel()


def _by_size(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Places of rows of similar size, as many together as `_BATCH_TOKENS` allow."""
    batch: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: sizes[place]):
        if batch and (len(batch) + 1) * sizes[place] > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _ids(model: Any, tokenizer: Any) -> tuple[int, int | None, frozenset[int]]:
    """The decoder's start token, the token that it must write first (mBART's language), the tokens that end it."""
    said = [model.generation_config, model.config] if model.generation_config is not None else [model.config]

    def find(name: str) -> Any:
        return next((value for config in said if (value := getattr(config, name, None)) is not None), None)

    start = find("decoder_start_token_id")
    start = find("bos_token_id") if start is None else start
    if start is None:
        raise FledgeError(Problem(t("the model does not say with which token its decoder begins"), "config.json"))
    flat = [id for item in (find("eos_token_id"), tokenizer.eos_token_id) for id in _flat(item)]
    return int(start), find("forced_bos_token_id"), frozenset(flat)


def _flat(item: Any) -> list[int]:
    return [] if item is None else list(item) if isinstance(item, (list, tuple)) else [item]

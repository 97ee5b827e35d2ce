"""Encoder-decoder models (T5, BART, …) behind the same protocol, with plain batching.

The prompt is what the encoder reads; the answer is what the decoder writes from its start token on. A few requests are
encoded together, padded to the longest, and decoded together until the last of them ends; whoever is finished leaves
the batch, whoever comes meanwhile waits for the next one. There is no block pool, no chunked prefill and no prefix
cache here: an encoder reads its prompt once and in both directions, so that no two prompts share a part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference import scoring
from fledge.inference.answer import Ticket
from fledge.inference.asking import Asking, ids_of
from fledge.inference.devices import device_of, dtype_for
from fledge.inference.engine import Listen, Request, Scored
from fledge.inference.pooling import Pooling, pooling_of
from fledge.inference.rows import RowBeams, begin, extend, going_on, rows_of
from fledge.inference.sampling import Sampling
from fledge.models.load import context_of
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Conversation

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
        self.model = model.eval()
        limit = context_of(model.config)
        self.context = min(context or limit, limit)
        self.max_rows, self.pooling = max_rows, pooling or Pooling()
        self._inner = model.get_base_model() if hasattr(model, "peft_config") else model
        self._start, self._first, stop_ids = _ids(self._inner, tokenizer)
        self._waiting: deque[Ticket] = deque()
        self._together: list[Ticket] = []  # who is answered now
        super().__init__(tokenizer, renderer, model.config.get_text_config().vocab_size, stop_ids)

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

    def _ticket(self, request: Request, listen: Listen) -> Ticket:
        ticket = super()._ticket(request, listen)
        if request.beams > 1:
            ticket.answers = [RowBeams(ticket, self._text)]
        for answer in ticket.answers:  # what the decoder has read, not the encoder: so transformers' penalty counts
            begin(answer, Sampling.of(request, [self._start], answer.index, ticket.guide and ticket.guide.fork()))
        return ticket

    def _refuse(self, request: Request) -> None:
        for name, neutral in (("prompt_logprobs", None), ("adapter", "")):
            if getattr(request, name) != neutral:
                raise FledgeError(Problem(t("{name} is not known to the engine of encoder-decoders", name=name), name))

    def _longest(self) -> int:
        return self.context

    def _room(self, prompt: int) -> int:
        return self.context - 1  # the decoder reads its start token too

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

    def _busy(self) -> bool:
        return bool(self._waiting)

    def _tickets(self) -> Iterable[Ticket]:
        return self._waiting

    def _enter(self, ticket: Ticket) -> None:
        self._waiting.append(ticket)

    def _broken(self, error: FledgeError) -> None:
        for ticket in self._together:
            ticket.fail(error)

    def _round(self) -> None:
        """Answer as many together as there are rows for, in the order in which they came, until the last has ended."""
        self._together, rows = [], 0
        while self._waiting and (not rows or rows + rows_of(self._waiting[0].request) <= self.max_rows):
            self._together.append(self._waiting.popleft())
            rows += rows_of(self._together[-1].request)
        if rows:
            self._decode(self._together)

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
            for ticket in tickets:
                if ticket.cancelled or self._closed:
                    ticket.end()
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
    return int(start), find("forced_bos_token_id"), ids_of(find("eos_token_id"), tokenizer.eos_token_id)

"""Our own engine: a `transformers` model in this process, with continuous batching.

A worker thread owns the model. It repeats schedule → run → postprocess: newcomers are prefilled in small groups,
then all running answers decode one token together; whoever is finished leaves at once. Nothing here compiles, swaps
or speculates: the point is a scheduler that reads from top to bottom.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference import scoring
from fledge.inference.answer import Answer, Collector, Ticket
from fledge.inference.engine import Delta, Listen, PromptTooLong, Request, Result, Scored
from fledge.inference.forward import Forward
from fledge.inference.sampling import logprobs_of, sample
from fledge.inference.scheduler import Scheduler
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Conversation

T = TypeVar("T")
log = logging.getLogger(__name__)

_LARGE = 100_000_000
"""bytes of weights above which reading them is what a step waits for"""
_LINGER = 2.0
"""seconds after which an idle worker ends, so that an engine that nobody refers to any more frees its model"""
_OPEN: weakref.WeakSet[NativeEngine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread inside torch must not be there any more when the interpreter goes down."""
    for engine in list(_OPEN):
        engine.close()


class NativeEngine:
    """An `Engine` over a causal language model (or, for `reward` only, a reward model) and its tokenizer."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        renderer: ChatRenderer | None = None,
        *,
        max_slots: int = 64,
        context: int | None = None,
        prefill_tokens: int = 512,
        cache_bytes: int = 2 << 30,
    ) -> None:
        """`max_slots`: answers that decode together; `prefill_tokens`: prompt tokens read between two decoding steps;
        `cache_bytes`: the most that keys and values may take (whoever does not fit waits)."""
        self.model, self.tokenizer, self.renderer = model.eval(), tokenizer, renderer
        self.forward = Forward(model)
        self.context = min(context or self.forward.context, self.forward.context)
        # A private copy that is never changed: threads may share it, and it reads control spellings as text.
        self._text = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._text.no_padding()
        self._text.no_truncation()
        self._text.encode_special_tokens = True
        self._stop_ids = _stop_ids(model, tokenizer)
        self._scheduler = Scheduler(max_slots, prefill_tokens, cache_bytes)
        self._inbox: deque[list[Ticket] | Callable[[], None]] = deque()
        self._news = threading.Condition()
        self._render_lock = threading.Lock()
        self._closed = False
        self._worker: threading.Thread | None = None
        _OPEN.add(self)

    @classmethod
    def from_folder(
        cls, path: Path | str, dtype: str = "auto", device: str = "auto", *, reward: bool = False, **options: Any
    ) -> NativeEngine:
        """An engine for a model folder (full, adapter or int8). dtype "auto": bfloat16 where the processor multiplies
        it natively and the model is large enough to gain, else float32. `options` as in the constructor."""
        from fledge.models.load import load_model, load_tokenizer

        folder, device = Path(path), _device(device)
        if dtype == "auto":
            dtype = "bfloat16" if _fast_bfloat16(device) and _weight_bytes(folder) > _LARGE else "float32"
        model = load_model(folder, dtype=dtype, device=device, reward=reward)
        tokenizer = load_tokenizer(folder)
        return cls(model, tokenizer, ChatRenderer(tokenizer) if tokenizer.chat_template else None, **options)

    # ---- requests

    def submit(self, request: Request, listen: Listen) -> Ticket:
        """Start a request. Raises FledgeError when its prompt is empty or leaves no room in the context."""
        ticket = self._ticket(request, listen)
        self._post([ticket])
        return ticket

    def count(self, request: Request) -> int:
        """The tokens of a request's prompt. Raises what `submit` would raise."""
        return len(self._prompt(request))

    def stream(self, request: Request) -> Iterator[Delta]:
        """The deltas of a request as they come; closing the iterator cancels it."""
        deltas: queue.SimpleQueue[Delta | FledgeError] = queue.SimpleQueue()
        ticket = self.submit(request, deltas.put)
        try:
            unfinished = request.n
            while unfinished:
                delta = deltas.get()
                if isinstance(delta, FledgeError):
                    raise delta
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            ticket.cancel()

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """All answers, in order. All requests enter at once: on an idle engine the batches are always the same."""
        waiting = threading.Semaphore(0)
        entries: list[tuple[Ticket, Collector] | FledgeError] = []
        for request in requests:
            collector = Collector(request, waiting.release)
            try:
                entries.append((self._ticket(request, collector), collector))
            except FledgeError as error:
                entries.append(error)
        tickets = [entry[0] for entry in entries if not isinstance(entry, FledgeError)]
        self._post(tickets)
        try:
            for _ in tickets:
                waiting.acquire()
        except BaseException:  # Ctrl-C: do not go on computing what nobody waits for
            for ticket in tickets:
                ticket.cancel()
            raise
        return [
            Result(error=entry) if isinstance(entry, FledgeError) else entry[1].result(entry[0].prompt_tokens)
            for entry in entries
        ]

    # ---- probabilities, rewards, vectors

    def score(self, prompt_ids: Sequence[Sequence[int]], continuation_ids: Sequence[Sequence[int]]) -> list[Scored]:
        """Log-probabilities (fp32) of each continuation after its prompt. Equal prompts are read once.

        Raises FledgeError for an empty prompt or continuation, or one beyond the context.
        """
        return scoring.score(self._call, self.forward, self.context, prompt_ids, continuation_ids)

    def reward(self, conversations: Sequence[Conversation]) -> list[float]:
        """The reward model's score of each conversation. Raises FledgeError when the model is no reward model."""
        with self._render_lock:
            rows = [self._rendered(conversation.messages, answer=False) for conversation in conversations]
        return scoring.reward(self._call, self.forward, self.context, rows)

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """The mean of the last hidden states over each text's tokens (fp32)."""
        return scoring.embed(self._call, self.forward, self.context, [self._text.encode(text).ids for text in texts])

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: control spellings stay text, no special tokens are added."""
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; with `special` control tokens are spelled out, else left out."""
        return str(self._text.decode(list(ids), skip_special_tokens=not special))

    def close(self) -> None:
        """End all requests as cancelled and let the worker go."""
        with self._news:
            self._closed = True
            worker = self._worker
            self._news.notify()
        if worker is not None:
            worker.join()
        _OPEN.discard(self)

    def __enter__(self) -> NativeEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- from a request to a ticket

    def _ticket(self, request: Request, listen: Listen) -> Ticket:
        prompt = self._prompt(request)
        stop_ids = self._stop_ids if request.stop_ids is None else frozenset(request.stop_ids)
        if request.messages is not None and request.stop_ids is None and self.renderer is not None:
            stop_ids |= frozenset(self.renderer.stop_ids)
        room = self.context - len(prompt)
        limit = min(request.max_new_tokens or room, room)
        return Ticket(request, prompt, stop_ids, limit, self._text, listen, self._wake)

    def _prompt(self, request: Request) -> list[int]:
        """The token ids of a request's prompt, seen to be ones that the model can go on from."""
        if not self.forward.writes:
            raise FledgeError(t("this is a reward model: it scores texts and writes none"))
        if request.messages is not None:
            with self._render_lock:
                prompt = self._rendered(request.messages, answer=True)
        elif request.text is not None:
            prompt = list(self._text.encode(request.text).ids)
        else:
            prompt = list(request.prompt_ids or ())
        if not prompt:
            raise FledgeError(Problem(t("the prompt is empty"), "prompt"))
        if len(prompt) >= self.context:
            raise PromptTooLong(
                Problem(
                    t("the prompt is longer than the model's context"),
                    "prompt",
                    found=t("{n} tokens", n=len(prompt)),
                    allowed=t("at most {n} tokens", n=self.context - 1),
                )
            )
        vocabulary = self.model.config.get_text_config().vocab_size
        worst = max(prompt) if min(prompt) >= 0 else min(prompt)
        if not 0 <= worst < vocabulary:
            raise FledgeError(
                Problem(t("a token id is outside the vocabulary"), "prompt", str(worst), f"0 … {vocabulary - 1}")
            )
        return prompt

    def _rendered(self, messages: Sequence[Any], answer: bool) -> list[int]:
        if self.renderer is None:
            raise FledgeError(Problem(t("this model has no chat template"), fix=t("give it plain text instead")))
        return list(self.renderer.render(tuple(messages), add_generation_prompt=answer).ids)

    # ---- the worker

    def _post(self, item: list[Ticket] | Callable[[], None]) -> None:
        with self._news:
            if self._closed:
                raise FledgeError(t("the engine is closed"))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
                self._worker.start()
            self._inbox.append(item)
            self._news.notify()

    def _wake(self) -> None:
        with self._news:
            self._news.notify()

    def _call(self, function: Callable[[], T]) -> T:
        """The value of `function`, computed by the worker between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._post(run)
        return future.result()

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            with self._news:
                busy = self._news.wait_for(lambda: self._closed or self._inbox or self._scheduler, _LINGER)
                if not busy:
                    self._worker = None
                    return
                if self._closed:
                    break
                news = [self._inbox.popleft() for _ in range(len(self._inbox))]
            for item in news:
                if callable(item):
                    item()
                else:
                    for ticket in item:
                        self._scheduler.add(ticket)
            try:
                self._step()
            except Exception as error:  # out of memory, a broken model: the requests fail, the engine lives on
                log.exception("a step of the engine failed")
                problem = Problem(t("the model could not be computed"), found=f"{type(error).__name__}: {error}")
                for ticket in self._scheduler.tickets():
                    ticket.fail(FledgeError(problem))
                self._scheduler.clear()
        self._cancel(self._scheduler.tickets())
        self._cancel(ticket for item in self._inbox if not callable(item) for ticket in item)

    def _step(self) -> None:
        """One round: schedule, run, postprocess."""
        scheduler = self._scheduler
        self._cancel(ticket for ticket in scheduler.tickets() if ticket.cancelled)
        scheduler.sweep()
        if (group := scheduler.admit()) is not None:
            logits = self.forward.prefill(group, scheduler.prefill_tokens)
            if logits is not None:
                self._extend(*scheduler.start(group, logits))
                scheduler.sweep()
        scheduler.make_room()
        if scheduler.running:
            last = [answer.ids[-1] for answer in scheduler.running]
            self._extend(list(scheduler.running), self.forward.decode(last, scheduler.cache))
            scheduler.sweep()

    def _extend(self, answers: list[Answer], logits: Tensor) -> None:
        """Give every answer its next token from its row of logits (B, V); rows without numbers fail alone."""
        rows = logits.cpu().numpy()
        sound = np.isfinite(rows.max(-1))
        if not sound.all():
            for answer, good in zip(answers, sound, strict=True):
                if not good:
                    answer.ticket.fail(FledgeError(Problem(t("the model gave no numbers (NaN or infinity)"))))
            rows, answers = rows[sound], [answer for answer, good in zip(answers, sound, strict=True) if good]
        states = [answer.sampling for answer in answers]
        tokens = sample(rows, states)
        for answer, token, logprob in zip(answers, tokens, logprobs_of(rows, tokens, states), strict=True):
            if not answer.finished:  # a sibling's failure may have ended it
                answer.take(token, logprob)

    def _cancel(self, tickets: Iterator[Ticket]) -> None:
        for ticket in list(tickets):
            for answer in ticket.answers:
                if not answer.finished:
                    answer.cancel()


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The token ids that end a text: what the tokenizer and the generation config call end of sequence."""
    generation = getattr(model, "generation_config", None)
    found = [tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)]
    flat = [id for item in found for id in (item if isinstance(item, (list, tuple)) else [item])]
    return frozenset(id for id in flat if id is not None)


def _device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 matrix products run in hardware there."""
    if device != "cpu":
        return True
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def _weight_bytes(folder: Path) -> int:
    """The size of a folder's weights; an adapter's are its base's."""
    from fledge.models.load import base_of, is_adapter

    if is_adapter(folder):
        folder = base_of(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

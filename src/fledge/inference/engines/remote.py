"""Any OpenAI-compatible server as an engine: vLLM, SGLang, TensorRT-LLM, TGI, llama.cpp, Ollama, fledge itself.

    engine = RemoteEngine("http://127.0.0.1:8000", tokenizer="model/")

A conversation is sent as messages, so it is rendered with the **server's** chat template. Log-probabilities are those
that the server computes (vLLM: before temperature and penalties, as here; others: see their documentation). What the
server has no word for is refused before anything is sent (`CannotDo`).

The key comes from `FLEDGE_ENGINE_KEY` (for api.openai.com also `OPENAI_API_KEY`) and is never written anywhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.inference.engine import Delta, Listen, PromptTooLong, Request, Result, Scored, TokenLogprob, told
from fledge.inference.engines import blocking, wire
from fledge.inference.engines.dialects import DIALECTS, recognise
from fledge.inference.engines.errors import Failed, Refused, cannot
from fledge.inference.engines.transport import Transport

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fledge.records.kinds import Conversation

log = logging.getLogger(__name__)

UNKNOWN_CONTEXT = 1 << 20
"""what an engine's `context` is where the server does not tell: it says itself when a prompt is too long"""
_SCORES_AT_ONCE = 16


class Call:
    """A request on its way to a server: its `Handle`. `prompt_tokens` is known when the server has told."""

    def __init__(self, request: Request, listen: Listen, loop: asyncio.AbstractEventLoop) -> None:
        self.request, self._listen, self._loop = request, listen, loop
        self.prompt_tokens = len(request.prompt_ids or ())
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        self.task: asyncio.Task[None] | None = None
        self._open = set(range(request.n))

    def cancel(self) -> None:
        if self._open and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """Cancel it, from the loop's own thread."""
        if self.task is not None:
            self.task.cancel()

    def tell(self, delta: Delta | FledgeError) -> None:
        """Pass it on. Whose listener breaks is cancelled."""
        if isinstance(delta, FledgeError):
            self._open.clear()
        elif delta.finish_reason is not None:
            self._open.discard(delta.index)
        if not told(self._listen, delta):
            self._open.clear()
            self.stop()

    def finish(self, task: asyncio.Task[None]) -> None:
        """Nothing more comes: what is open was cancelled, or ends with the task's error."""
        error = None if task.cancelled() else task.exception()
        if not self._open:
            return
        if isinstance(error, FledgeError):
            self.tell(error)
        elif error is not None:
            log.error("a request to a server failed", exc_info=error)
            self.tell(Failed(Problem(t("the request failed"), found=f"{type(error).__name__}: {error}")))
        for index in sorted(self._open):
            self.tell(Delta(finish_reason="cancelled", index=index))


class RemoteEngine:
    """An `Engine` at the other end of a URL. Raises EngineError when the server cannot be reached or used."""

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        api_key: str | None = None,
        tokenizer: Path | str | None = None,
        context: int | None = None,
        dialect: str = "",
        concurrency: int = 64,
        timeout: float = 600.0,
    ) -> None:
        """`model`: its name there (the first that the server lists); `tokenizer`: a model folder for token ids where
        the server has no /tokenize; `context` in tokens, where the server does not tell; `dialect`: one of `DIALECTS`,
        found out by asking; `concurrency`: requests at once; `timeout`: seconds of silence that are borne."""
        if not url.startswith(("http://", "https://")):
            raise FledgeError(Problem(t("this is no address of a server"), found=url, allowed="http://…, https://…"))
        if dialect and dialect not in DIALECTS:
            raise FledgeError(Problem(t("there is no such dialect"), "dialect", dialect, listing(list(DIALECTS))))
        self.url = url
        self._http = Transport(url, _key(url) if api_key is None else api_key, timeout, concurrency)
        try:
            card = self._card(model)
            self.dialect = DIALECTS[dialect] if dialect else recognise(card, self._http.look)
            self._tokenizer = _load(tokenizer) if tokenizer is not None else None
            self.model = str(card["id"])
            self.context = context or self._told_context(card)
        except BaseException:
            self._http.close()
            raise
        self._spellings = wire.Spellings()
        self._concurrency, self._gate = concurrency, asyncio.Semaphore(concurrency)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._calls: set[Call] = set()
        self._closed = False

    @property
    def name(self) -> str:
        """What the engine is called in messages."""
        return self.dialect.name

    # ---- answers

    def submit(self, request: Request, listen: Listen) -> Call:
        """Start a request. Raises CannotDo for what the server has no word for, FledgeError for an empty prompt."""
        request = self._checked(request)
        with self._lock:
            loop = self._running()
            call = Call(request, listen, loop)
            self._calls.add(call)
            loop.call_soon_threadsafe(self._launch, call)
        return call

    def stream(self, request: Request) -> Iterator[Delta]:
        """The deltas of a request as they come; closing the iterator hangs up."""
        return blocking.stream(self.submit, request)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """All answers, in the order of the requests."""
        return blocking.generate(self.submit, requests)

    def _checked(self, request: Request) -> Request:
        if not (request.messages or request.text or request.prompt_ids):
            raise FledgeError(Problem(t("the prompt is empty"), "prompt"))
        if missing := self.dialect.missing(request):
            can = [d.name for d in DIALECTS.values() if not d.missing(request)]
            raise cannot(self.name, ", ".join(missing), ["native", *can], missing[0])
        if request.prompt_ids is not None:
            self._known(request.prompt_ids)
        if request.text is not None and self._tokenizer is not None and self.dialect.token_prompts:
            # The server would read control spellings in it as control tokens; our copy does not.
            request = replace(request, text=None, prompt_ids=tuple(self._tokenizer.encode(request.text).ids))
        return request

    def _room(self, request: Request) -> int | None:
        """The most new tokens of a request that does not say, for a server that has to be told."""
        return max(self.context - self.count(request), 1)

    def _launch(self, call: Call) -> None:
        call.task = asyncio.ensure_future(self._answer(call))
        call.task.add_done_callback(call.finish)
        call.task.add_done_callback(lambda _: self._calls.discard(call))

    async def _answer(self, call: Call) -> None:
        request = call.request
        # Where a reply only counts its tokens, every answer has to be counted alone.
        together = request.n == 1 or (self.dialect.many and (bool(self.dialect.ids) or request.logprobs is not None))
        told = request.max_new_tokens is not None or request.messages is not None or bool(self.dialect.endless)
        room = None if told else await asyncio.to_thread(self._room, request)
        numbers: list[int | None] = [None] if together else list(range(request.n))
        jobs = [asyncio.ensure_future(self._read(call, index, room)) for index in numbers]
        try:
            await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()

    async def _read(self, call: Call, index: int | None, room: int | None) -> None:
        request = call.request
        body = wire.body(request, index, self.model, self.dialect, room)
        if request.prompt_logprobs is not None:  # vLLM gives those in one piece only
            body["prompt_logprobs"] = request.prompt_logprobs
        else:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        number = request.n if index is None else 1
        reading = wire.Reading(self._spellings, index or 0, number, request.prompt_logprobs or 0, request.logprobs)
        async with self._gate, aclosing(self._http.replies(wire.address(request), body)) as chunks:
            async for chunk in chunks:
                for delta in reading.take(chunk):
                    call.tell(delta)
        call.prompt_tokens = reading.prompt_tokens or call.prompt_tokens
        call.prompt_logprobs = reading.prompt_logprobs
        for delta in reading.end():
            call.tell(delta)

    # ---- probabilities, rewards, vectors

    def score(self, prompt_ids: Sequence[Sequence[int]], continuation_ids: Sequence[Sequence[int]]) -> list[Scored]:
        """The log-probabilities of each continuation, where the server gives those of a prompt."""
        if not self.dialect.scores:
            raise cannot(self.name, "score", ["native", *(d.name for d in DIALECTS.values() if d.scores)])
        for place, (prompt, continuation) in enumerate(zip(prompt_ids, continuation_ids, strict=True)):
            if not prompt or not continuation:
                raise FledgeError(Problem(t("a prompt or continuation is empty"), t("item {n}", n=place)))
            self._known([*prompt, *continuation])
        with ThreadPoolExecutor(min(_SCORES_AT_ONCE, self._concurrency)) as pool:
            return list(pool.map(self._score, prompt_ids, continuation_ids))

    def _score(self, prompt: Sequence[int], continuation: Sequence[int]) -> Scored:
        body = {"model": self.model, "prompt": [*prompt, *continuation], "max_tokens": 1, "temperature": 0}
        if self.dialect.scores == "echo":
            reply = self._http.ask("POST", "completions", body | {"echo": True, "logprobs": 1})
            found = wire.echoed(reply, len(prompt), continuation)
        else:
            reply = self._http.ask("POST", "completions", body | {"prompt_logprobs": 1})
            reading = wire.Reading(self._spellings, 0, 1, likeliest=1)
            reading.take(reply)
            rows = reading.prompt_logprobs[len(prompt) :]
            found = None
            if len(rows) == len(continuation) and None not in rows:
                likelihoods = [row.logprob for row in rows if row is not None]
                found = likelihoods, [row.logprob >= row.top[0][1] for row in rows if row is not None]
        if found is None:
            raise cannot(self.name, "score", ["native", "vllm"])
        return Scored(tuple(found[0]), tuple(found[1]))

    def reward(self, conversations: Sequence[Conversation]) -> list[float]:
        """No such server has a reward model: raises CannotDo."""
        raise cannot(self.name, "reward", ["native"])

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """The server's own vectors of the texts (which states it takes is its own affair)."""
        reply = self._http.ask("POST", "embeddings", {"model": self.model, "input": list(texts)})
        try:
            rows = sorted(reply["data"], key=lambda row: row["index"])
            vectors = [[float(x) for x in row["embedding"]] for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise wire.unreadable(reply, error) from None
        if len(vectors) != len(texts):
            raise wire.unreadable(reply, t("{n} vectors", n=len(vectors)))
        return vectors

    # ---- tokens

    def count(self, request: Request) -> int:
        """The tokens of a request's prompt. Raises CannotDo where neither the server nor a tokenizer can tell."""
        if request.prompt_ids is not None:
            number = len(request.prompt_ids)
        elif request.text is not None and self._tokenizer is not None:
            number = len(self._tokenizer.encode(request.text).ids)
        else:
            number = _number(self._asked(request.text, request.messages, special=True))
        if not number:
            raise FledgeError(Problem(t("the prompt is empty"), "prompt"))
        if number >= self.context:
            allowed = t("at most {n} tokens", n=self.context - 1)
            found = t("{n} tokens", n=number)
            raise PromptTooLong(
                Problem(t("the prompt is longer than the model's context"), "prompt", found=found, allowed=allowed)
            )
        return number

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. The server's /tokenize reads control spellings as control tokens; ours does not."""
        if self._tokenizer is not None:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return _ids(self._asked(text, None, special=False))

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids, negative ones included (see `wire`). A server may spell control tokens out always."""
        if len(ids) == 1 and (text := self._spellings.text(ids[0])) is not None:
            return text
        if any(id < 0 for id in ids):
            return "".join(self.decode([id], special) for id in ids)
        if self._tokenizer is not None:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))
        text = self._asked_text(list(ids), special)
        if len(ids) == 1 and special:
            self._spellings.remember(ids[0], text)
        return text

    def _asked(self, text: str | None, messages: Sequence[Any] | None, special: bool) -> Any:
        """What the server says to /tokenize: its "tokens", or (fledge, of conversations) their "count" only."""
        kind, ask = self.dialect.tokenize, self._http.ask
        turns = [message.to_dict() for message in messages or ()]
        if kind == "vllm":
            body = {"prompt": text, "add_special_tokens": special} if messages is None else {"messages": turns}
            return ask("POST", "/tokenize", {"model": self.model, **body})
        if kind == "llama.cpp":
            if messages is not None:
                text = ask("POST", "/apply-template", {"messages": turns})["prompt"]
            return ask("POST", "/tokenize", {"content": text, "add_special": special, "parse_special": True})
        if kind == "tgi" and messages is None:
            found = ask("POST", "/tokenize", {"inputs": text, "add_special_tokens": special})
            return {"tokens": [row["id"] for row in found]} if isinstance(found, list) else found
        raise cannot(self.name, t("tokens of a text"), ["native", "vllm", "llama.cpp"])

    def _asked_text(self, ids: list[int], special: bool) -> str:
        if self.dialect.tokenize not in ("vllm", "llama.cpp"):
            raise cannot(self.name, t("the text of tokens"), ["native", "vllm", "llama.cpp"])
        body: dict[str, Any] = {"tokens": ids}
        if self.dialect.tokenize == "vllm":
            body |= {"model": self.model}
        if self.dialect.name == "fledge":
            body |= {"skip_special_tokens": not special}
        reply = self._http.ask("POST", "/detokenize", body)
        try:
            return str(reply["prompt" if self.dialect.tokenize == "vllm" else "content"])
        except (KeyError, TypeError) as error:
            raise wire.unreadable(reply, error) from None

    def _known(self, ids: Sequence[int]) -> None:
        if ids and min(ids) < 0:
            what = t("a token id is outside the vocabulary")
            raise FledgeError(Problem(what, "prompt", str(min(ids)), fix=t("give the engine a tokenizer folder")))

    # ---- the server

    def _card(self, model: str) -> dict[str, Any]:
        """What the server says of the model: the first one without a name. Raises FledgeError for one it has not."""
        try:
            found = self._http.ask("GET", "models")
        except Refused:  # a server that has no list
            if model:
                return {"id": model}
            raise
        rows = found.get("data") if isinstance(found, dict) else None
        cards = {str(row["id"]): row for row in rows or () if isinstance(row, dict) and "id" in row}
        name = model or next(iter(cards), "")
        if name not in cards:
            what = t('there is no model "{name}" here', name=name)
            raise Refused(Problem(what, self.url, allowed=listing(list(cards)), fix=did_you_mean(name, cards)))
        return dict(cards[name])

    def _told_context(self, card: dict[str, Any]) -> int:
        told = card.get("max_model_len") or card.get("context_length")
        if not told and self.dialect.name == "llama.cpp":
            told = ((self._http.look("/props") or {}).get("default_generation_settings") or {}).get("n_ctx")
        return int(told or UNKNOWN_CONTEXT)

    def _running(self) -> asyncio.AbstractEventLoop:
        """The loop that talks to the server, in a thread of its own; begun with the first request."""
        if self._closed:
            raise FledgeError(t("the engine is closed"))
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
            self._thread.start()
        return self._loop

    def close(self) -> None:
        """Hang up: requests on their way end as cancelled."""
        with self._lock:
            self._closed, loop, thread = True, self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            asyncio.run_coroutine_threadsafe(self._end(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
        self._http.close()

    async def _end(self) -> None:
        tasks = [call.task for call in self._calls if call.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def is_address(text: str) -> bool:
    """Whether a model is meant by a server's address."""
    return text.startswith(("http://", "https://"))


def _key(url: str) -> str:
    key = os.environ.get("FLEDGE_ENGINE_KEY", "")
    if not key and urlsplit(url).hostname == "api.openai.com":
        key = os.environ.get("OPENAI_API_KEY", "")
    return key


def _load(folder: Path | str) -> Tokenizer:
    """A folder's tokenizer, which reads control spellings as plain text."""
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise FledgeError(Problem(t("there is no tokenizer.json"), str(folder)))
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _ids(reply: Any) -> list[int]:
    try:
        return [int(id) for id in reply["tokens"]]
    except (KeyError, TypeError, ValueError) as error:
        raise wire.unreadable(reply, error) from None


def _number(reply: Any) -> int:
    told = reply.get("count") if isinstance(reply, dict) else None
    return told if isinstance(told, int) else len(_ids(reply))

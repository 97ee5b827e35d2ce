"""OpenAI's API over engines: a FastAPI application.

    app = create_app({"hatch": NativeEngine.from_folder("model/")})

`app.state.service` is the way in for whoever else shares the process, as the chat page does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Response
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

import fledge
from fledge.core.errors import FledgeError
from fledge.inference.engine import Delta, Engine, Request
from fledge.inference.prompting.tools import Tool
from fledge.serving import techniques
from fledge.serving.errors import ClientGone, add_handlers, describe
from fledge.serving.replies import ChatReply, Echo, Reply, TextReply, event
from fledge.serving.schema import ChatRequest, CompletionRequest
from fledge.serving.service import Answers, Service
from fledge.serving.tokens import add_token_routes

T = TypeVar("T")

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_app(engines: Mapping[str, Engine], tools: Mapping[str, Tool] | None = None) -> FastAPI:
    """The application that serves `engines` under their names. It needs nothing from the network.

    `tools`: what techniques that clients ask for may use; None: the calculator.
    """
    allowed = techniques.TOOLS if tools is None else tools
    app = FastAPI(title="fledge", version=fledge.__version__, docs_url=None, redoc_url=None)
    app.state.service = service = Service(engines)
    add_handlers(app)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "models": list(service.engines)}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(service, name) for name in service.engines]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model_card(service, service.engine(name)[0])

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, http: HttpRequest) -> Response | dict[str, Any]:
        if body.technique is not None and body.stream:
            return await _begun(techniques.chunks(service, body, allowed), http)
        if body.technique is not None:
            return await _unless_gone(techniques.whole(service, body, allowed), http)
        name, engine = service.engine(body.model)
        reply = ChatReply(name, engine, body.include_usage, body)
        return await _reply(service, reply, [body.request()], body.stream, http)

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, http: HttpRequest) -> Response | dict[str, Any]:
        name, engine = service.engine(body.model)
        reply = TextReply(name, engine, body.include_usage, body)
        if body.echo:
            reply.echoes = [Echo.of(engine, prompt) for prompt in body.prompts for _ in range(body.n)]
        return await _reply(service, reply, body.requests(), body.stream, http)

    add_token_routes(app, service)

    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def nothing(path: str) -> None:  # else the pages mounted at / would answer, in HTML
        raise HTTPException(404)

    return app


def _model_card(service: Service, name: str) -> dict[str, Any]:
    engine = service.engines[name]
    card = {"id": name, "object": "model", "created": service.started, "owned_by": "fledge"}
    base = getattr(engine, "base", None)  # an adapter stands on another model of this server
    parent = next((other for other, candidate in service.engines.items() if candidate is base), None)
    return card | {"max_model_len": engine.context} | ({"parent": parent} if parent else {})


async def _reply(
    service: Service, reply: Reply, requests: list[Request], stream: bool, http: HttpRequest
) -> Response | dict[str, Any]:
    """Answer one call. What fails before the first token fails the call; later it can only end the stream."""
    async with AsyncExitStack() as stack:
        answers = await stack.enter_async_context(service.answer(reply.model, *requests))
        if stream:
            first = await _unless_gone(anext(answers), http)
            chunks = _chunks(reply, answers, first, stack.pop_all())
            return StreamingResponse(chunks, media_type="text/event-stream", headers=_STREAM_HEADERS)
        deltas = await _unless_gone(_collect(answers), http)
        return reply.complete(deltas, answers.prompt_tokens, answers.completion_tokens, answers.prompt_logprobs)


async def _collect(answers: Answers) -> list[list[Delta]]:
    """All deltas, by answer."""
    deltas: list[list[Delta]] = [[] for _ in range(answers.count)]
    async for delta in answers:
        deltas[delta.index].append(delta)
    return deltas


async def _chunks(reply: Reply, answers: Answers, first: Delta, stack: AsyncExitStack) -> AsyncIterator[str]:
    """The events of a stream. When the client leaves, the generator is closed and the stack cancels the rest."""
    opened: set[int] = set()
    try:
        async with stack:
            delta: Delta | None = first
            while delta is not None:
                if delta.index not in opened and (opening := reply.first(delta.index)) is not None:
                    yield reply.chunk(opening)
                opened.add(delta.index)
                named = delta.token_ids and reply.tokens.return_token_ids
                if delta.text or delta.logprobs or delta.finish_reason or named:  # half a character says nothing yet
                    yield reply.chunk(reply.part(delta.index, delta))
                delta = await anext(answers, None)
    except FledgeError as error:
        yield event(describe(error)[1])
        return
    if reply.include_usage:
        yield reply.usage_chunk(answers.prompt_tokens, answers.completion_tokens)
    yield "data: [DONE]\n\n"


async def _begun(events: AsyncGenerator[str, None], http: HttpRequest) -> StreamingResponse:
    """A stream whose first event is there: what fails before it fails the call."""
    first = await _unless_gone(anext(events), http)

    async def all_events() -> AsyncIterator[str]:
        async with aclosing(events):
            yield first
            async for text in events:
                yield text

    return StreamingResponse(all_events(), media_type="text/event-stream", headers=_STREAM_HEADERS)


async def _unless_gone(work: Awaitable[T], http: HttpRequest) -> T:
    """The value of `work`; it is cancelled when the client hangs up."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.25)
            if not task.done() and await http.is_disconnected():
                raise ClientGone
        return task.result()
    finally:
        task.cancel()

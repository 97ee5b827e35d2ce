"""OpenAI's error objects: {"error": {"message", "type", "param", "code"}}, with the right status."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from fledge.core.draft import rule_of
from fledge.core.errors import FledgeError, did_you_mean
from fledge.core.language import t
from fledge.inference.engine import PromptTooLong
from fledge.inference.engines.errors import EngineError
from fledge.serving.schema import ApiRequest, ChatRequest, CompletionRequest
from fledge.serving.service import EngineFailed, UnknownModel

log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client hung up: there is nobody to answer."""


_STATUS: dict[type[FledgeError], tuple[int, str, str | None]] = {
    UnknownModel: (404, "invalid_request_error", "model_not_found"),
    PromptTooLong: (400, "invalid_request_error", "context_length_exceeded"),
    EngineFailed: (500, "server_error", None),
    FledgeError: (400, "invalid_request_error", None),
}


def error_object(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def describe(error: FledgeError) -> tuple[int, dict[str, Any]]:
    """Status and body for one of our errors."""
    if isinstance(error, EngineError):  # of the engine behind this server
        kind = "invalid_request_error" if error.status == 400 else "server_error"
        return error.status, error_object(str(error), kind, error.problems[0].where or None)
    status, kind, code = next(value for cls, value in _STATUS.items() if isinstance(error, cls))
    return status, error_object(str(error), kind, error.problems[0].where or None, code)


def add_handlers(app: FastAPI) -> None:
    """Let every error of the API leave as an error object."""

    @app.exception_handler(FledgeError)
    async def ours(request: Request, error: FledgeError) -> JSONResponse:
        status, body = describe(error)
        seconds = getattr(error, "retry_after", None)
        return JSONResponse(body, status, None if seconds is None else {"Retry-After": f"{seconds:g}"})

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(_invalid(request.url.path, error.errors()), 400)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        message = t("there is no such address here: {path}", path=f"{request.method} {request.url.path}")
        return JSONResponse(error_object(message, "invalid_request_error"), error.status_code)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("an unexpected error", exc_info=error)
        return JSONResponse(error_object(t("the server made a mistake; its log says which"), "server_error"), 500)


def _invalid(path: str, errors: Any) -> dict[str, Any]:
    """The first thing that pydantic found, with the key where it is."""
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")  # a typo explains what seems missing
    key = ".".join(str(part) for part in first["loc"][1:] if part not in ("str", "list[str]", "list[int]"))
    schema: type[ApiRequest] = ChatRequest if "chat" in path else CompletionRequest
    if first["type"] == "json_invalid":
        return error_object(
            t("the body is not JSON: {message}", message=first["ctx"]["error"]), "invalid_request_error"
        )
    if first["type"] == "extra_forbidden":
        near = did_you_mean(key, schema.model_fields)
        message = t('"{key}" is unknown', key=key) + (f"; {near}" if near else "")
        return error_object(message, "invalid_request_error", key, "unknown_parameter")
    if first["type"] == "missing":
        message = t('"{key}" is missing', key=key) if key else t("the body is missing")
        return error_object(message, "invalid_request_error", key or None, "missing_required_parameter")
    return error_object(f"{key}: {rule_of(first)}", "invalid_request_error", key or None, "invalid_value")

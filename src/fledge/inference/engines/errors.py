"""What goes wrong between us and another engine. Each kind has the HTTP status with which a gateway passes it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t


class EngineError(FledgeError):
    """Something about an engine that is not our own."""

    status: ClassVar[int] = 502
    retry_after: float | None = None
    """seconds after which the engine said it might be asked again"""


class CannotDo(EngineError):
    """This engine has no such thing."""

    status = 400


class Refused(EngineError):
    """The server was reached and says that the request is wrong (400, 404, 413, 422)."""

    status = 400


class NotAllowed(EngineError):
    """The server wants another API key (401, 403). For a gateway's client that is the gateway's fault."""


class Busy(EngineError):
    """The server has too much to do (429, 503)."""

    status = 429


class Unreachable(EngineError):
    """Nobody answers at the address."""


class Failed(EngineError):
    """The server made a mistake: a status of 500 and up, a broken stream, something that is not JSON."""


class TimedOut(EngineError):
    """The server was silent for too long."""

    status = 504


def cannot(engine: str, what: str, can: Sequence[str] = (), where: str = "") -> CannotDo:
    """The error for `what` (a field, a method) that `engine` does not have; `can` are engines that do."""
    fix = t("engines that can: {engines}", engines=", ".join(can)) if can else ""
    return CannotDo(Problem(t("the engine {engine} cannot do this: {what}", engine=engine, what=what), where, fix=fix))

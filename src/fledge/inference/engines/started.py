"""An engine at a URL whose server we started ourselves: it stops with the engine."""

from __future__ import annotations

from typing import Any

import httpx

from fledge.inference.engines.process import ServerProcess, Tell
from fledge.inference.engines.remote import RemoteEngine


class StartedEngine(RemoteEngine):
    """A `RemoteEngine` and its server."""

    def __init__(
        self, process: ServerProcess, url: str, model: str = "", *, tell: Tell | None = None, **options: Any
    ) -> None:
        """Waits until `url` says that it is healthy. Raises DidNotStart when that does not come about."""
        self.process = process
        process.wait(lambda: _healthy(url), tell=tell)
        try:
            super().__init__(url, model, api_key="", **options)
        except BaseException:
            process.stop()
            raise

    def close(self) -> None:
        """Hang up and stop the server."""
        try:
            super().close()
        finally:
            self.process.stop()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False

"""What may change about a native engine between two steps: its adapters, and the weights of a model that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.adapters import Adapters
from fledge.inference.answer import Ticket
from fledge.inference.asking import Asking
from fledge.inference.live import Live, Refreshed, apart, low_rank, second_tree
from fledge.inference.lora import Adapter
from fledge.records.chat import ChatRenderer

if TYPE_CHECKING:
    from fledge.inference.blocks import BlockPool
    from fledge.inference.scheduler import Scheduler

T = TypeVar("T")


class Changing(Asking):
    """An engine with adapters by request and live weights: both change between two steps."""

    adapters: Adapters
    live: Live | None
    _scheduler: Scheduler
    _pool: BlockPool

    def _tree(self, model: Any, base: Path | None, live: Live | None) -> Any:
        """The engine's own modules over the weights of `model`, which stays as it is; a LoRA on it is taken apart."""
        self.live = live
        if live is not None:
            tree, own = live.tree, live.own
        else:
            tree, layers = apart(second_tree(model))
            own = Adapter("", {name: low_rank(layer) for name, layer in layers.items()}) if layers else None
        self.adapters = Adapters(tree, base, own)
        return tree

    def add_adapter(self, name: str, folder: Path | str) -> None:
        """Let requests ask for the LoRA adapter in `folder` by `name`. Requests on their way go on meanwhile.

        Raises FledgeError for a name that is taken, a folder that is no plain LoRA, an adapter of another base.
        """
        if self.live is not None:
            raise FledgeError(Problem(t("there are no adapters by request on a model that is trained"), name))
        adapter = self.adapters.load(name, Path(folder), self.tokenizer)
        self._call(partial(self.adapters.add, adapter))

    def add_adapters(self, folders: Mapping[str, Path]) -> None:
        """`add_adapter` for each."""
        for name, folder in folders.items():
            self.add_adapter(name, folder)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter. Requests for it that are on their way end with an error, others do not notice.

        Raises FledgeError when there is no such adapter.
        """
        self._call(partial(self._remove, name))

    def _remove(self, name: str) -> None:
        self.adapters.remove(name)
        for ticket in list(self._scheduler.tickets()):
            if ticket.request.adapter == name:
                ticket.fail(_removed(name))
        self._scheduler.sweep()

    def _is_readable(self, ticket: Ticket) -> bool:
        """Whether its adapter is still the one that it was made for; if not, it fails."""
        name = ticket.request.adapter
        if not name or (name in self.adapters.names and self.adapters.key(name) == ticket.cache_key):
            return True
        ticket.fail(_removed(name))
        return False

    def _writing(self, adapter: str) -> ChatRenderer | None:
        """How chats are written for an adapter: its own way, else the model's."""
        return (self.adapters[adapter].renderer if adapter else None) or self.renderer

    def _reading(self, adapter: str) -> Callable[[Callable[[], T]], T]:
        """Runs functions between two steps, with every row of whatever is computed read by one adapter."""
        self.adapters.key(adapter)  # raises in the caller's thread when there is no such adapter

        def call(function: Callable[[], T]) -> T:
            def run() -> T:
                with self.adapters.every_row(adapter):
                    return function()

            found: T = self._call(run)
            return found

        return call

    def refresh(self, wait: bool = False) -> Refreshed:
        """Follow the live weights as they are now: packed copies are written anew, the prefix cache is emptied.

        Call it after the optimizer's steps, before text is asked for. While requests are on their way it raises
        FledgeError, or waits for them with `wait`. Returns what it took; the sum is in `live.spent`.
        """
        live = self.live
        if live is None:
            raise FledgeError(Problem(t("this engine follows no model"), fix="NativeEngine.follow(model, tokenizer)"))
        future: Future[Refreshed] = Future()

        def run() -> None:
            if self._closed:
                future.set_exception(FledgeError(t("the engine is closed")))
                return
            try:
                if not self._scheduler:
                    future.set_result(self._refresh(live))
                elif wait:
                    self._post([run])  # after the next step
                else:
                    raise FledgeError(t("the weights cannot change under requests that are on their way"))
            except BaseException as error:
                future.set_exception(error)

        self._post([run])
        return future.result()

    def _refresh(self, live: Live) -> Refreshed:
        spent = live.refresh()
        self.forward.restack()
        self.adapters.follow(live.own)
        self._pool.forget()
        return spent


def _removed(name: str) -> FledgeError:
    return FledgeError(Problem(t('the adapter "{name}" was removed', name=name), "adapter"))

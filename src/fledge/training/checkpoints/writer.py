"""Writing while the training goes on.

The values of a moment are kept without copying all of them at once: the writer reads the run's own tensors, which
nothing changes during forward and backward passes, and only what is not written when the optimiser wants to make its
step is copied first. On a processor, where a step takes longer than the writing, hardly anything ever is; what lies on
a graphics card is copied to the host at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 1 << 23  # bytes


class Snapshot:
    """The bytes of tensors as they are now, for another thread to read once, in order, while their owner goes on.

    The owner calls `settle` before changing any of them. Raises RuntimeError in the reader when it did not.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._pieces: list[Tensor | None] = [piece for tensor in tensors for piece in _pieces(tensor)]
        self._versions = [0 if piece is None else piece._version for piece in self._pieces]
        self._turn = threading.Condition()
        self._reading = self._settling = False
        self.settled = False
        if any(tensor.device.type != "cpu" for tensor in tensors):
            self.settle()

    def settle(self) -> None:
        """Copy what has not been read yet; from here on the tensors may change."""
        if self.settled:
            return
        with self._turn:
            self._settling = True  # the reader waits before its next piece
            self._turn.wait_for(lambda: not self._reading)
            for index, piece in enumerate(self._pieces):
                if piece is not None:
                    copy = torch.empty_like(piece, device="cpu", pin_memory=piece.is_cuda)
                    self._pieces[index] = copy.copy_(piece, non_blocking=piece.is_cuda)
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
            self.settled, self._settling = True, False
            self._turn.notify_all()

    def __iter__(self) -> Iterator[memoryview]:
        for index in range(len(self._pieces)):
            with self._turn:
                self._turn.wait_for(lambda: not self._settling)
                piece, self._reading = self._pieces[index], True
            if piece is None:
                return  # nobody wants it any more
            yield memoryview(piece.numpy())
            with self._turn:
                if not self.settled and piece._version != self._versions[index]:
                    raise RuntimeError("a tensor was changed while a checkpoint was being written")
                self._pieces[index], self._reading = None, False
                self._turn.notify_all()
        self.settled = True

    def forget(self) -> None:
        """Nothing will be read any more."""
        with self._turn:
            self._pieces = [None] * len(self._pieces)
            self._reading, self.settled = False, True
            self._turn.notify_all()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Its bytes, a piece at a time: as long as one is being written, the owner must wait."""
    yield from tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(PIECE)


class Writer:
    """One thread that writes one thing at a time. What goes wrong there is raised in the thread that trains."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.seconds = 0.0
        """the last writing took, from beginning to end"""
        self._thread: threading.Thread | None = None
        self._snapshot: Snapshot | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, tensors: Sequence[Tensor], write: Callable[[Snapshot], None]) -> None:
        """Have `write` called with a snapshot of `tensors`, after what is being written now."""
        self.wait()
        snapshot = self._snapshot = Snapshot(tensors)

        def run() -> None:
            began = time.monotonic()
            try:
                write(snapshot)
            except BaseException as error:  # raised where the training sees it
                self._error = error
            finally:
                snapshot.forget()
                self.seconds = time.monotonic() - began

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Before anything is changed: keep what is still to be written as it is."""
        if self._snapshot is not None:
            self._snapshot.settle()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, seconds: float | None = None) -> None:
        """Until nothing is being written; raises what went wrong."""
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = self._snapshot = None
        self.check()

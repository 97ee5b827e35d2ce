"""Many processes for one stage's independent pieces of work: on this machine, or on a Ray cluster.

    for result in spread(work, items, execution): ...      # results as they come, not in order

`work` is a function of a module and `items` can be pickled; what a piece makes it leaves on disk (which all machines
of a cluster see at the same path) and returns little. A worker that dies (out of memory, say) costs only the pieces
it had: they are tried again, twice, in new processes. Workers end with their parent, whatever happens to it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from fledge.core.errors import FledgeError, Problem, missing_extra
from fledge.core.language import t
from fledge.core.machine import cores
from fledge.core.stage import Execution

T = TypeVar("T")
R = TypeVar("R")
TRIES = 3


def workers_for(execution: Execution, pieces: int) -> int:
    """How many processes: what was asked for or every core, but no more than there are pieces."""
    return max(1, min(execution.workers or cores(), pieces))


def spread(work: Callable[[T], R], items: Sequence[T], execution: Execution) -> Iterator[R]:
    """`work(item)` for each item, results as they come. What `work` raises is raised here and ends the rest.

    With one worker, or one item, everything happens in this process.
    """
    if execution.executor == "ray":
        yield from _on_ray(work, items)
    elif (workers := workers_for(execution, len(items))) == 1:
        yield from map(work, items)
    else:
        yield from _on_processes(work, items, workers)


def _on_processes(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    left = dict(enumerate(items))
    for attempt in range(1, TRIES + 1):
        pool: ProcessPoolExecutor | None = _idle.pop(workers, None)
        pool = pool or _started(workers)
        try:
            for number, result in _as_completed(pool, work, left, 2 * workers):
                del left[number]
                yield result
            if _crews:
                _idle[workers], pool = pool, _idle.get(workers)
            return
        except BrokenProcessPool:
            if attempt == TRIES:
                raise FledgeError(
                    Problem(
                        t("worker processes ended before their work was done, {times} times", times=TRIES),
                        fix=t("give it more memory, or fewer processes with --workers"),
                    )
                ) from None
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)


def _started(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # forking a process that has threads can hang
    return ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(),))


_crews: list[None] = []  # one for each `same_workers` that is open
_idle: dict[int, ProcessPoolExecutor] = {}


@contextmanager
def same_workers() -> Iterator[None]:
    """Within it, one `spread` after another finds the processes of the one before: they start (half a second) and load
    what they need only once."""
    _crews.append(None)
    try:
        yield
    finally:
        _crews.pop()
        while _idle and not _crews:
            _idle.popitem()[1].shutdown(wait=True, cancel_futures=True)


def _as_completed(
    pool: ProcessPoolExecutor, work: Callable[[T], R], items: dict[int, T], most: int
) -> Iterator[tuple[int, R]]:
    """Results with their items' numbers; at most `most` are under way, so that an error ends it soon."""
    waiting, running = iter(list(items.items())), dict[Future[R], int]()
    while True:
        for number, item in waiting:
            running[pool.submit(work, item)] = number
            if len(running) >= most:
                break
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield running.pop(future), future.result()


def _on_ray(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """On the cluster that RAY_ADDRESS names, or on one started here and ended afterwards."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise missing_extra("ray", "ray") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, configure_logging=False)
    try:
        task = ray.remote(work).options(num_cpus=1, max_retries=TRIES - 1)
        most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting, running = iter(items), list[object]()
        while True:
            for item in waiting:
                running.append(task.remote(item))
                if len(running) >= most:
                    break
            if not running:
                return
            done, running = ray.wait(running, num_returns=1)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, FledgeError) else error from None
    finally:
        if ours:
            ray.shutdown()


def _begin(parent: int) -> None:
    """A worker's first act: end with its parent, leave the cores to the other workers."""
    from fledge.core.child import die_with

    die_with(parent)
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for library in ("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "ARROW_NUM_THREADS"):
        os.environ[library] = "1"

"""The runner makes what a plan says is missing, one stage after another, each in a process of its own.

A stage's process may die at any moment, and so may the runner: an artifact is there whole or not at all, the lock lasts
as long as anybody writes, and the same command goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fledge
from fledge.core import child, disk
from fledge.core.artifact import EVENTS, MANIFEST, sha256_of, write_atomic
from fledge.core.db import StageRow
from fledge.core.errors import FledgeError, Interrupted, Problem, StageFailed
from fledge.core.events import Event, JsonLines, Listener, Tail
from fledge.core.language import t
from fledge.core.launch import Launched, without_launcher
from fledge.core.machine import cores, processor
from fledge.core.plan import Plan, Step
from fledge.core.store import Store

POLL = 0.05  # seconds between two looks at a child
GRACE = 30.0  # seconds that a child has to leave after SIGTERM
RECORDED = ("fledge-llm", "torch", "transformers", "peft", "tokenizers", "numpy", "pyarrow", "pydantic")


class Runner:
    """Carries out one plan. `listeners` hear every event; `process` is the running child, if any."""

    def __init__(
        self, plan: Plan, store: Store, listeners: Iterable[Listener] = (), command: str = "fledge run",
        group: Launched | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.store, self.command = plan, store, command
        self.group = group  # of a launcher that has started us
        self.folder = store.runs / plan.recipe.name
        self.log = JsonLines(self.folder / EVENTS)
        self.listeners = [*listeners, self.log]
        self.process: subprocess.Popen[bytes] | None = None
        self.paths: dict[str, Path] = {}  # stage → its artifact

    def run(self) -> dict[str, Path]:
        """Make everything; the artifacts' folders by stage. Raises StageFailed or Interrupted."""
        try:
            return self._run()
        except Exception as error:
            if disk.is_full(error) and not isinstance(error, FledgeError):  # a log, the database, a manifest
                raise StageFailed(disk.full(self.store.root)) from None
            raise

    def _run(self) -> dict[str, Path]:
        name, steps = self.plan.recipe.name, self.plan.steps
        write_atomic(self.folder / "recipe.yaml", self.plan.recipe.text)
        self.store.db.start_run(name, self.plan.recipe.file, [self._row(step, "waiting") for step in steps])
        status = "failed"
        try:
            for step in steps:
                self._stage(step)
            status = "done"
        except (KeyboardInterrupt, Interrupted):
            status = "interrupted"
            raise Interrupted(
                Problem(t("stopped; nothing is lost"), fix=t("to go on: {command}", command=self.command))
            ) from None
        finally:
            self.store.db.finish_run(name, status)
            self.log.close()
        return self.paths

    def _stage(self, step: Step) -> None:
        """Make one artifact, or find that it is there."""

        def waiting() -> None:
            self._say(step, "waiting", t("another run is making it; waiting"))

        with self.store.lock(step.fingerprint, waiting) as lock:
            if step.status == "make" and any("--from" in why for why in step.why):
                self.store.discard(step.use, step.fingerprint)
            if self.store.has(step.use, step.fingerprint):
                self._finish(step, "cached", self._manifest(step)["seconds"])
                return
            self._say(step, "running", "; ".join(step.why))
            self.store.db.set_stage(self.plan.recipe.name, self._row(step, "running"))
            started = time.time()
            try:
                usage = self._child(step, lock)
            except BaseException as error:
                status = "failed" if isinstance(error, StageFailed) else "interrupted"
                self.store.db.set_stage(self.plan.recipe.name, self._row(step, status, time.time() - started))
                self._say(step, status)
                raise
            self._commit(step, started, usage)
            self._finish(step, "made", time.time() - started)

    # --- the child ---------------------------------------------------------------------------------------------------

    def _child(self, step: Step, lock: int) -> dict[str, float]:
        """Run the stage in a process of its own and pass its events on; its use of the machine."""
        work = self.store.work_folder(step.fingerprint)
        work.mkdir(parents=True, exist_ok=True)
        attempt = len(list(work.glob("events-*.jsonl")))
        events = work / f"events-{attempt:03d}.jsonl"
        for name in (child.RESULT, child.ERROR):
            (work / name).unlink(missing_ok=True)
        write_atomic(work / child.JOB, json.dumps(self._order(step, attempt, events), ensure_ascii=False))
        environment = self._environment(step)
        if self.group is not None:
            environment |= self.group.announce(str(work / child.JOB), step.node.execution.processes, environment)
        with (work / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fledge.core.child", str(work / child.JOB)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**without_launcher(os.environ), **environment},
                start_new_session=True, pass_fds=(lock,),
            )  # fmt: skip
        tail = Tail(events)
        try:
            while True:
                pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
                self._pass_on(tail)
                if pid:
                    break
                time.sleep(POLL)
        except KeyboardInterrupt:
            self._stop_child(tail)
            raise
        self.process.returncode = os.waitstatus_to_exitcode(status)
        code, self.process = self.process.returncode, None
        if code != 0 or not (work / child.RESULT).exists():
            raise self._failure(step, work, code)
        scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, kilobytes here
        return {"peak_memory": usage.ru_maxrss * scale, "cpu_seconds": usage.ru_utime + usage.ru_stime}

    def _pass_on(self, tail: Tail) -> None:
        for event in tail:
            if event.kind == "metric" and event.name.startswith("rate/"):
                self.store.db.add_rate(event.name.removeprefix("rate/"), float(event.value))
            self._hear(event)

    def _stop_child(self, tail: Tail) -> None:
        """Ask the child to leave; after a while, make it."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):  # it has just left by itself
            os.killpg(self.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while self.process.poll() is None and time.monotonic() < deadline:
            self._pass_on(tail)
            time.sleep(POLL)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _failure(self, step: Step, work: Path, code: int) -> FledgeError:
        log = work / "log.txt"
        if code == child.STOPPED or code == -signal.SIGTERM:
            return Interrupted(t("stage {name} was stopped", name=step.name))
        if (work / child.ERROR).exists():
            problems = [Problem(**entry) for entry in json.loads((work / child.ERROR).read_text(encoding="utf-8"))]
            first = Problem(t("stage {name} cannot go on", name=step.name), where=step.node.stage.use)
            return StageFailed(first, *problems)
        if code == disk.STATUS:
            return StageFailed(disk.full(self.store.root))
        if code < 0:
            reason = t("killed by signal {name}", name=signal.Signals(-code).name)
            if code == -signal.SIGKILL:
                reason += " (" + t("out of memory, or by hand") + ")"
        else:
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            reason = lines[-1][:300] if lines else t("exit status {code}", code=code)
        return StageFailed(
            Problem(
                t("stage {name} failed", name=step.name), found=reason,
                fix=t(
                    "the traceback is in {log}; what was finished is kept; to try again: {command}",
                    log=log, command=self.command,
                ),
            )
        )  # fmt: skip

    def _order(self, step: Step, attempt: int, events: Path) -> dict[str, Any]:
        """What the child has to know."""
        node = step.node
        inputs: dict[str, Any] = {}
        for dotted, ref in node.stage.references().items():
            if dotted in node.parents:
                parent, part = node.parents[dotted]
                artifact = self.store.open(self.paths[parent], part)
                inputs[ref.text] = (artifact.kind, str(artifact.path), dict(artifact.metrics))
            else:
                kind = next((k for k in ref.kinds if not k.problem_with(node.outside[ref.text].path)), ref.kinds[0])
                inputs[ref.text] = (kind.kind, str(_raw_path(node.outside[ref.text])), {})
        return {
            "name": step.name, "use": step.use, "config": node.stage.config_values(), "seed": node.seed,
            "execution": node.execution.model_dump(), "attempt": attempt, "events": str(events), "inputs": inputs,
            "outside": {o.text: (str(o.path), o.digest, o.files) for o in node.outside.values()},
        }  # fmt: skip

    def _environment(self, step: Step) -> dict[str, str]:
        """What is set for a stage beside the variables that are there."""
        threads = str(step.node.execution.threads or max(1, cores() // step.node.execution.processes))
        return {
            "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "FLEDGE_PARENT": str(os.getpid()),
            "FLEDGE_HOME": str(self.store.root), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "TORCHINDUCTOR_CACHE_DIR": str(self.store.root / "cache" / "inductor"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        }  # fmt: skip

    # --- what is kept ------------------------------------------------------------------------------------------------

    def _commit(self, step: Step, started: float, usage: dict[str, float]) -> None:
        work = self.store.work_folder(step.fingerprint)
        result = json.loads((work / child.RESULT).read_text(encoding="utf-8"))
        expected = step.node.stage.output_kinds()
        if set(result["outputs"]) != set(expected):
            raise StageFailed(
                t(
                    "stage {name} made {found} instead of {expected}",
                    name=step.name,
                    found=sorted(result["outputs"]),
                    expected=sorted(expected),
                )
            )
        with (work / "out" / EVENTS).open("wb") as together:
            for part in sorted(work.glob("events-*.jsonl")):
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, together)
        manifest = {
            "format": 1, "name": step.name, **step.description, "fingerprint": step.fingerprint,
            "outputs": result["outputs"],
            "from": {dotted: f"{p}.{part}" if part else p for dotted, (p, part) in step.node.parents.items()},
            "outside": {o.text: o.digest for o in step.node.outside.values()},
            "execution": {**step.node.execution.model_dump(), "cores": cores(), "processor": processor()},
            "estimate": {"seconds": step.estimate.seconds, "memory": step.estimate.memory, "disk": step.estimate.disk},
            "seconds": round(time.time() - started, 3), "finished": round(time.time(), 3), **usage,
            "code": code_digest(), "versions": versions(),
        }  # fmt: skip
        self.store.commit(step.use, step.fingerprint, manifest)

    def _finish(self, step: Step, status: str, seconds: float) -> None:
        path = self.store.path(step.use, step.fingerprint)
        self.paths[step.name] = path
        self.store.link(self.plan.recipe.name, step.name, path)
        self.store.db.set_stage(self.plan.recipe.name, self._row(step, status, seconds, path))
        self._say(step, status, data={"seconds": seconds, "path": str(path)})

    def _manifest(self, step: Step) -> dict[str, Any]:
        return dict(json.loads((self.store.path(step.use, step.fingerprint) / MANIFEST).read_text(encoding="utf-8")))

    def _row(self, step: Step, status: str, seconds: float = 0.0, path: Path | str = "") -> StageRow:
        inputs = {key: ref.text for key, ref in step.node.stage.references().items()} | {
            key: str(source) for key, source in step.node.stage.outside_sources().items()
        }
        facts = {
            "description": step.description,
            "inputs": inputs,
            "estimate": asdict(replace(step.estimate, sizes={})),
        }
        return StageRow(step.name, step.use, status, seconds, step.fingerprint, str(path), facts)

    def _say(self, step: Step, status: str, text: str = "", data: dict[str, Any] | None = None) -> None:
        self._hear(Event("stage", step.name, name=status, value=text, data=data or {}, time=time.time()))

    def _hear(self, event: Event) -> None:
        for listener in self.listeners:
            listener.hear(event)


def _raw_path(found: Any) -> Path:
    """A glob stays a pattern for the reader; everything else is the file or folder itself."""
    return Path(found.text) if any(mark in found.text for mark in "*?[") else found.path


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results."""
    found = {"python": sys.version.split()[0]}
    for name in RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """A digest of fledge's own sources, recorded with every artifact."""
    from fledge.core.artifact import digest_of

    root = Path(fledge.__file__).parent
    return digest_of({p.relative_to(root).as_posix(): sha256_of(p) for p in sorted(root.rglob("*.py"))})[:16]

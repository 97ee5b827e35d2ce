"""The process in which one stage runs: `python -m fledge.core.child WORK/job.json`.

It dies with its runner, writes below `WORK/out` and `WORK` only, and leaves `result.json` (what the runner commits)
or `error.json` (what the user is told). With several processes it is `torchrun` that starts this module once a rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fledge.core import disk
from fledge.core.artifact import KINDS, Artifact, write_atomic
from fledge.core.errors import FledgeError
from fledge.core.events import Emitter, append_to
from fledge.core.job import Job
from fledge.core.reference import Outside
from fledge.core.stage import Execution, stage_class

RESULT, ERROR, JOB = "result.json", "error.json", "job.json"
STOPPED = 143  # 128 + SIGTERM
RESTARTS = 3
"""How often all processes of a stage are started again after one has died; they go on from the last checkpoint."""


def main(file: str) -> int:
    """Run the stage that `file` describes; the exit status says how it ended."""
    order = json.loads(Path(file).read_text(encoding="utf-8"))
    work = Path(file).parent
    die_with(int(os.environ.get("FLEDGE_PARENT", os.getppid())))
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the runner, which asks us to stop
    if order["execution"]["processes"] > 1 and "RANK" not in os.environ:
        return _torchrun(file, order["execution"]["processes"])
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and (work / ERROR).exists():
        return FledgeError.exit_code  # what the user was told would only be said again
    job = _job(order, work)
    try:
        stage = stage_class(order["use"]).model_validate(order["config"])
        if job.rank == 0:
            _empty(job.out)
        returned = stage.run(job)
        if job.rank == 0:
            write_atomic(work / RESULT, json.dumps(_result(returned, job.out), ensure_ascii=False))
    except FledgeError as error:
        problems = [vars(problem) for problem in error.problems]
        write_atomic(work / ERROR, json.dumps(problems, ensure_ascii=False))
        return error.exit_code
    except Exception as error:
        if disk.is_full(error):
            if "RANK" in os.environ:  # torchrun does not pass our status on, but the message lies here
                with contextlib.suppress(OSError):
                    write_atomic(work / ERROR, json.dumps([vars(disk.full(work))], ensure_ascii=False))
            return disk.STATUS
        raise
    return 0


def _job(order: dict[str, Any], work: Path) -> Job:
    execution = Execution(**order["execution"])
    rank = int(os.environ.get("RANK", "0"))
    send = append_to(Path(order["events"])) if rank == 0 else lambda event: None
    return Job(
        name=order["name"],
        out=work / "out",
        work=work,
        seed=order["seed"],
        execution=execution,
        events=Emitter(order["name"], order["attempt"], send),
        inputs={text: KINDS[kind](Path(path), metrics) for text, (kind, path, metrics) in order["inputs"].items()},
        outside={
            text: Outside(text, Path(path), digest, tuple(files))
            for text, (path, digest, files) in order["outside"].items()
        },
        attempt=order["attempt"],
        rank=rank,
        world=int(os.environ.get("WORLD_SIZE", "1")),
    )


def _result(returned: Artifact | dict[str, Artifact], out: Path) -> dict[str, Any]:
    parts = returned if isinstance(returned, dict) else {"": returned}
    described = {}
    for part, artifact in parts.items():
        inside = artifact.path.relative_to(out).as_posix()
        described[part] = {
            "kind": artifact.kind,
            "path": "" if inside == "." else inside,
            "metrics": _plain(artifact.metrics),
        }
    return {"outputs": described}


def _plain(value: Any) -> Any:
    """Metrics as JSON values: numpy's and torch's scalars become Python's."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _torchrun(file: str, processes: int) -> int:
    """Start the processes; ends as the first of them ended that could not be helped by starting all of them again."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ["FLEDGE_PARENT"] = str(os.getpid())
    # a store of its own for every start: in a shared one, processes that start again find the addresses of dead ones
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:  # the module's main is called in this process, so that the ranks die when we do
        run.main(
            ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={RESTARTS}", "--monitor-interval=0.2",
             "--module", "fledge.core.child", file]
        )  # fmt: skip
    except SignalException:  # the processes were told, too, and have left by now
        return STOPPED
    except ChildFailedError as error:
        code = int(error.get_first_failure()[1].exitcode)
        if code < 0:
            if -code != signal.SIGKILL:
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        return code
    return 0


def die_with(parent: int) -> None:
    """End this process when `parent` ends, even if `parent` was killed."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before we asked
        os._exit(STOPPED)

    def watch() -> None:  # for systems without the signal
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(STOPPED)

    threading.Thread(target=watch, daemon=True).start()


def _stop(signum: int, frame: object) -> None:
    raise SystemExit(STOPPED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

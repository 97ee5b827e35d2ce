"""A run whose processes somebody else has started: torchrun, Slurm or Kubernetes, on many machines.

    torchrun --nnodes 4 --nproc-per-node 8 … -m fledge.cli.main run recipe.yaml

Every process runs the same command. The first is the runner, as ever; the others follow: for each stage that wants all
processes they are told which (through a TCPStore at the first one's), start it with their rank, and wait for the next.
Stages that want one process run beside the runner while the others wait. All machines share `FLEDGE_HOME`.

The launcher's own variables are read (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT): whatever sets them will
do. Each stage meets at a port of its own, so that what one stage left behind confuses no other.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t

NAMED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
         "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")  # fmt: skip
"""What a launcher tells its processes, and a stage of one process must not see."""
PATIENCE = timedelta(minutes=5)  # to meet the first process
WAIT = timedelta(days=30)  # for a stage of one process to end


class Launched:
    """This process among those that a launcher has started for one run."""

    def __init__(self, rank: int, world: int) -> None:
        from torch.distributed import PrefixStore, TCPStore

        self.rank, self.world, self.told = rank, world, 0
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, else by the first process
        store = TCPStore(address, port, None, not hosted and rank == 0, PATIENCE, wait_for_workers=False)
        self._store = PrefixStore(f"fledge/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def announce(self, file: str, processes: int, environment: Mapping[str, str]) -> dict[str, str]:
        """Have the others start the stage of `file`; what the first process's own child has to know.

        Raises FledgeError when the stage wants neither one process nor all of them.
        """
        if processes == 1:
            return {}
        if processes != self.world:
            raise FledgeError(
                Problem(
                    t("the launcher has started another number of processes"),
                    where="execution.processes",
                    found=t("{processes} in the recipe, {world} started", processes=processes, world=self.world),
                    fix=t("give --processes {world}", world=self.world),
                )
            )
        meeting = {"MASTER_ADDR": _own_address(os.environ["MASTER_ADDR"]), "MASTER_PORT": str(_free_port()),
                   "TORCHELASTIC_USE_AGENT_STORE": "False"}  # fmt: skip
        self._tell({"file": file, "environment": {**environment, **meeting}})
        return {name: os.environ[name] for name in NAMED if name in os.environ} | meeting

    def end(self) -> None:
        """Let the others go."""
        self._tell({})

    def follow(self) -> int:
        """Start what the first process says, one stage after another; the exit status: that of a stage that failed."""
        while order := self._next():
            environment = {**os.environ, **order["environment"], "FLEDGE_PARENT": str(os.getpid())}
            child = subprocess.Popen([sys.executable, "-m", "fledge.core.child", order["file"]], env=environment)
            before = signal.signal(signal.SIGTERM, lambda *_, child=child: child.send_signal(signal.SIGTERM))
            status = child.wait()
            signal.signal(signal.SIGTERM, before)
            if status:
                return status if status > 0 else 1
        return 0

    def _tell(self, order: Mapping[str, Any]) -> None:
        self._store.set(f"order-{self.told}", json.dumps(order))
        self.told += 1

    def _next(self) -> dict[str, Any]:
        key = f"order-{self.told}"
        self._store.wait([key], WAIT)
        self.told += 1
        return dict(json.loads(self._store.get(key)))


def launched() -> Launched | None:
    """Our place in a group that a launcher has started; None where there is none (or a stage's own)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return Launched(int(os.environ["RANK"]), world) if world > 1 and "RANK" in os.environ else None


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The same variables but for the launcher's."""
    return {name: value for name, value in environment.items() if name not in NAMED}


def _own_address(head: str) -> str:
    """This machine's address on the way to `head`, which need not be this one: torchrun may number machines anew."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((head, 9))  # sends nothing
            found = str(probe.getsockname()[0])
        except OSError:  # a name that has an IPv6 address only
            return head
    return head if found.startswith("127.") else found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

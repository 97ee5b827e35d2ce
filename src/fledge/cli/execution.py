"""The flags that say how a stage is carried out, not what it makes: they do not change a fingerprint."""

from __future__ import annotations

import click


def execution_options() -> list[click.Parameter]:
    """`--device`, `--threads`, `--processes`, `--layout`, `--micro-batch`, `--workers`, `--executor`, `--compile`,
    `--activation-checkpointing`."""
    return [
        click.Option(["--device"], default=None, help="auto, cpu, cuda or mps", metavar="DEVICE"),
        click.Option(["--threads"], type=int, default=None, help="threads per process (0: all cores)"),
        click.Option(["--processes"], type=int, default=None, help="processes; more than one starts torchrun"),
        click.Option(
            ["--layout"],
            default=None,
            metavar="LAYOUT",
            help="how a training is divided: ddp, zero1, zero2, zero3, fsdp, hsdp, or {shard: 4, tensor: 2}",
        ),
        click.Option(["--micro-batch"], type=int, default=None, help="rows at once (0: the stage chooses)"),
        click.Option(["--workers"], type=int, default=None, help="processes of a data stage (0: all cores)"),
        click.Option(["--executor"], type=click.Choice(["local", "ray"]), default=None, help="where its workers are"),
        click.Option(["--compile"], type=click.Choice(["auto", "on", "off"]), default=None, help="torch.compile"),
        click.Option(
            ["--activation-checkpointing"],
            type=click.Choice(["on", "off"]),
            default=None,
            help="compute activations twice instead of keeping them: less memory, a third more time",
        ),
        click.Option(
            ["--memory-check"],
            type=click.Choice(["on", "off"]),
            default=None,
            help="off: start a training even if it is known not to fit into memory",
        ),
    ]


def log_option() -> click.Option:
    """`--log mlflow,wandb`."""
    return click.Option(
        ["--log", "log_to"],
        default=None,
        metavar="PROGRAMS",
        help="also keep the curves in mlflow, wandb (offline), trackio; several with commas",
    )

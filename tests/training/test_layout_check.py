"""What a layout refuses before anything loads, what a dry run of a thousand processes says, and the templates."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fledge.core.errors import FledgeError
from fledge.core.events import Emitter
from fledge.core.recipe import from_values
from fledge.core.stage import LAYOUTS, Execution, Layout
from fledge.models.shape import ModelShape
from fledge.training.layout.check import Facts, check_layout, require_layout
from fledge.training.layout.ranks import Ranks
from fledge.training.objectives.dpo import DPO
from fledge.training.objectives.masked_lm import MaskedLM
from fledge.training.trainer import Trainer
from tests.training.toys import settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
LLAMA = Facts("llama", layers=4, heads=8, kv_heads=2, intermediate=96)


def refusals(layout: Any, processes: int, facts: Facts | None = LLAMA, **more: str) -> list[str]:
    asked = Layout(**(LAYOUTS[layout] if isinstance(layout, str) else layout))
    return [f"{p.where}: {p.what}" for p in check_layout(facts, asked, processes, **more)]


def test_named_layouts_fill_in_what_is_left() -> None:
    sizes = {name: Execution(layout=name).layout.resolve(8) for name in LAYOUTS}
    assert {name: (s.replicate, s.shard, s.zero) for name, s in sizes.items()} == {
        "ddp": (8, 1, 3), "zero1": (1, 8, 1), "zero2": (1, 8, 2), "zero3": (1, 8, 3), "fsdp": (1, 8, 3),
        "hsdp": (2, 4, 3),
    }  # fmt: skip
    assert Layout(tensor=2, pipeline=2).resolve(8).replicate == 2
    assert Execution.model_validate(Execution(layout="hsdp").model_dump()).layout == Layout(**LAYOUTS["hsdp"])
    with pytest.raises(ValueError, match="name the other"):
        Layout(replicate=0, shard=0)
    with pytest.raises(ValueError):
        Execution(layout="zero4")


@pytest.mark.parametrize(
    ("layout", "processes"),
    [({"tensor": 3}, 8), ({"replicate": 2, "shard": 2}, 8), ({"tensor": 16}, 8), ({"shard": 3, "replicate": 3}, 9 * 2)],
)
def test_a_product_that_is_not_the_number_of_processes_is_refused(layout: dict[str, int], processes: int) -> None:
    assert refusals(layout, processes) == ["execution.layout: the layout does not make up the number of processes"]


@pytest.mark.parametrize(
    ("layout", "facts", "more", "reason"),
    [
        ({"tensor": 4}, LLAMA, {}, "key and value heads cannot be divided evenly"),
        ({"tensor": 2}, Facts("llama", 4, 8, 2, 97), {}, "the feed-forward layer's width cannot be divided evenly"),
        ({"tensor": 2}, Facts("bert", 4, 8, 8, 96), {}, "models of this family cannot be divided so"),
        ({"pipeline": 2}, Facts("t5", 4, 8, 8, 96), {}, "models of this family cannot be divided so"),
        ({"pipeline": 8}, LLAMA, {}, "there are fewer layers than stages"),
        ({"pipeline": 4, "schedule": "interleaved"}, LLAMA, {}, "there are fewer layers than stages"),
        ({"context": 2}, LLAMA, {"device": "cpu"}, "on graphics cards only"),
        ({"context": 2, "tensor": 2}, LLAMA, {}, "by context, or a layer by tensor or pipeline, not both"),
        ({"context": 2, "pipeline": 2}, LLAMA, {"device": "cuda"}, "not both"),
        ({"context": 2}, Facts("bert", 4, 8, 8, 96), {}, "models of this family cannot be divided so"),
        ({"context": 2}, Facts("llama", 4, 8, 2, 96, growing=True), {}, "depend on the longest text at hand"),
        ({"context": 2}, LLAMA, {"optimizer": "adafactor"}, "adafactor's rows and columns"),
        ("zero3", LLAMA, {"optimizer": "adafactor"}, "adafactor's rows and columns"),
        ("zero3", Facts("llama", 4, 8, 2, 96, quantized=True), {}, "quantised weights"),
    ],
)
def test_what_a_model_cannot_take_is_refused_with_the_reason(
    layout: Any, facts: Facts, more: dict[str, str], reason: str
) -> None:
    (found,) = refusals(layout, 8, facts, **more)
    assert reason in found


def test_what_a_model_can_take_is_not_refused() -> None:
    for layout in (*LAYOUTS, {"tensor": 2, "shard": 2}, {"pipeline": 4}, {"pipeline": 2, "schedule": "zero_bubble"}):
        assert refusals(layout, 8) == []
    assert refusals("zero3", 8, Facts("bert", 4, 8, 8, 96)) == [], "every model can be sharded"
    assert refusals("ddp", 8, optimizer="adafactor") == []
    for layout in ({"context": 8}, {"context": 2, "shard": 2}, {"context": 2, "zero": 1}):
        assert refusals(layout, 8, device="cuda:0") == refusals(layout, 8, device="auto") == []


def test_the_numbers_are_read_from_any_familys_config(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32}
    assert Facts.of_config(gpt2) == Facts("gpt2", 2, 4, 4, 128)
    llama = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
             "hidden_size": 32, "intermediate_size": 80}  # fmt: skip
    assert Facts.of_config(llama) == Facts("llama", 2, 4, 1, 80)
    for key in ("rope_parameters", "rope_scaling"):
        assert Facts.of_config({**llama, key: {"rope_type": "dynamic", "factor": 2.0}}).growing
        assert not Facts.of_config({**llama, key: {"rope_type": "yarn", "factor": 2.0}}).growing
    extended = ModelShape(hidden=64, layers=2, heads=8, rope_scaling={"method": "dynamic"}).resolve(300)
    assert Facts.of_shape(extended).growing
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(llama))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/base"}))
    for folder in ("base", "adapter"):
        with pytest.raises(FledgeError, match="key and value heads"):
            require_layout(tmp_path / folder, Execution(layout={"tensor": 2}), 2)
        require_layout(tmp_path / folder, Execution(layout="zero3"), 2)


def test_a_recipe_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello\n")
    text = str(tmp_path / "a.txt")

    def recipe(execution: dict[str, Any], **more: Any) -> None:
        train = {"use": "train.pretrain", "data": text, "tokenizer": "words", "tokens": 1000,
                 "model": {"hidden": 64, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 8}, **more}  # fmt: skip
        words = {"use": "tokenizer.train", "data": text, "algorithm": "bpe", "vocab_size": 300}
        from_values({"name": "r", "stages": {"words": words, "base": {**train, "execution": execution}}})

    recipe({"processes": 4, "layout": "zero3"})
    with pytest.raises(FledgeError, match=r"stages\.base\.execution\.layout\.tensor.*\n?.*attention heads cannot"):
        recipe({"processes": 4, "layout": {"tensor": 4}})
    with pytest.raises(FledgeError, match="does not make up the number of processes"):
        recipe({"processes": 4, "layout": {"tensor": 3}})
    masked = {"model": {"hidden": 64, "layers": 4, "heads": 4, "family": "bert"}, "objective": "masked"}
    with pytest.raises(FledgeError, match="it cannot be a pipeline"):
        recipe({"processes": 2, "layout": {"pipeline": 2}}, **masked)
    with pytest.raises(FledgeError, match=r"stages\.base\.execution\.layout\.context.*\n?.*needs whole rows"):
        recipe({"processes": 2, "layout": {"context": 2}}, **masked)
    with pytest.raises(FledgeError, match="on graphics cards only"):
        recipe({"processes": 2, "layout": {"context": 2}, "device": "cpu"})
    recipe({"processes": 2, "layout": {"context": 2}, "device": "cuda"})


def test_a_division_of_tokens_is_refused_once_the_device_or_the_objective_is_known() -> None:
    with pytest.raises(FledgeError, match="on graphics cards only"):
        Ranks.join(0, 2, "cpu", Layout(context=2))
    ranks = Ranks(0, 2, Layout(context=2).resolve(2))
    for objective in (DPO(0.1), MaskedLM()):
        with pytest.raises(FledgeError, match="needs whole rows"):
            Trainer(objective, {}, None, settings(), 1, 0, Emitter("t", 0, lambda event: None), ranks=ranks)  # type: ignore[arg-type]


# --- a thousand processes --------------------------------------------------------------------------------------------

DRY_RUN = """
import json, sys
from fledge.core.stage import Layout
from fledge.models.shape import ModelShape
from fledge.training.layout.dry_run import per_rank
shape = ModelShape(hidden=512, layers=6, heads=16, kv_heads=8, head_dim=32, tie_embeddings=False).resolve(8_000)
told = {"parameters": shape.parameters}
for name, layout in (("pp", dict(pipeline=2, tensor=8, shard=8)), ("zero3", dict(replicate=16, shard=0)),
                     ("zero1", dict(replicate=16, shard=0, zero=1)), ("ddp", {}),
                     ("context", dict(replicate=16, shard=8, context=8))):
    told[name] = [vars(h) | {"bytes": h.bytes} for h in per_rank(Layout(**layout), shape, 1024)]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def dry() -> Any:
    """In a process of its own: a process group is one a process."""
    done = subprocess.run([sys.executable, "-c", DRY_RUN], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "src")})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_dry_run_says_what_each_of_1024_processes_holds(dry: Any) -> None:
    whole = dry["parameters"]
    (every, *_) = dry["ddp"]
    assert every["parameters"] == whole and every["bytes"] == 16 * whole and every["whole"] == 0
    assert dry["context"][1]["places"] == {"pipeline": 0, "replicate": 15, "shard": 7, "context": 7, "tensor": 0}
    assert {**dry["context"][0], "places": 0} == {**dry["zero3"][0], "places": 0}, "divided by 8 · 8 processes"
    for name in ("zero3", "zero1"):
        first, last = dry[name]
        assert (first["rank"], last["rank"]) == (0, 1023) and last["places"]["replicate"] == 15
        assert first["parameters"] == pytest.approx(whole / 64, rel=1e-3)
        assert first["optimizer"] == 8 * first["parameters"] and first["weights"] == 4 * first["parameters"]
    assert dry["zero1"][0]["gradients"] == dry["zero1"][0]["whole"] == 4 * whole
    assert dry["zero3"][0]["gradients"] == 4 * dry["zero3"][0]["parameters"]
    assert dry["zero3"][0]["whole"] < 0.8 * 4 * whole, "two layers and what is outside the layers"
    stages = dry["pp"]
    assert [h["rank"] for h in stages] == [0, 511, 512, 1023]
    assert [h["places"]["pipeline"] for h in stages] == [0, 0, 1, 1]
    assert sum(h["parameters"] for h in stages[::2]) == pytest.approx(whole / 64, rel=0.01), "norms are whole on 8"
    assert stages[2]["parameters"] - stages[0]["parameters"] == 512 / 8, "the last norm"


def test_a_dry_run_refuses_what_a_run_refuses() -> None:
    from fledge.training.layout.dry_run import per_rank

    shape = ModelShape(hidden=64, layers=2, heads=8, kv_heads=2, head_dim=8).resolve(300)
    with pytest.raises(FledgeError, match="key and value heads"):
        per_rank(Layout(tensor=4), shape, 1024)


# --- the templates ---------------------------------------------------------------------------------------------------


def test_scripts_are_sound_and_start_what_the_recipe_says(tmp_path: Path) -> None:
    """With a torchrun that only says how it was called."""
    (tmp_path / "bin").mkdir()
    for name, body in (("torchrun", 'echo "$@"'), ("srun", 'shift; exec "$@"'), ("scontrol", "echo head-node")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    plain = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "FLEDGE_HOME": "/shared"}
    machines = {"NODES": "4", "NODE": "2", "HEAD": "10.0.0.1", "PROCESSES": "8"}
    slurm = {"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "8",
             "SLURM_JOB_ID": "12345"}  # fmt: skip
    for script, variables, head in (
        ("torchrun/train.sh", machines, "10.0.0.1:29500"),
        ("slurm/train.sbatch", slurm, "head-node:32345"),
    ):
        file = str(DEPLOY / script)
        assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
        done = subprocess.run(["bash", file, "r.yaml", "--layout", "hsdp"], capture_output=True, text=True,
                              check=False, env={**plain, **variables})  # fmt: skip
        said = done.stdout
        assert done.returncode == 0, done.stderr
        assert "--nnodes 4 --nproc-per-node 8" in said and f"--rdzv-endpoint {head}" in said
        assert "--rdzv-backend c10d" in said and "--max-restarts 3" in said
        assert said.rstrip().endswith("-m fledge.cli.main run r.yaml --processes 32 --layout hsdp")
        del plain["FLEDGE_HOME"]
        failed = subprocess.run(["bash", file, "r.yaml"], capture_output=True, text=True, check=False, env=plain)
        assert failed.returncode and "FLEDGE_HOME" in failed.stderr
        plain["FLEDGE_HOME"] = "/shared"


def pods(kind: str, spec: Any) -> tuple[int, Any]:
    """How many pods there are, and one of them."""
    match kind:
        case "Job":
            return spec["completions"], spec["template"]["spec"]
        case "JobSet":
            return pods("Job", spec["replicatedJobs"][0]["template"]["spec"])
        case _:
            worker = spec["pytorchReplicaSpecs"]["Worker"]
            return worker["replicas"], worker["template"]["spec"]


@pytest.mark.parametrize("file", sorted(p.name for p in (DEPLOY / "kubernetes").glob("*.yaml")))
def test_kubernetes_templates_agree_with_themselves(file: str) -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / file).read_text(encoding="utf-8")))
    job = documents[-1]
    count, pod = pods(job["kind"], job["spec"])
    (container,) = pod["containers"]
    arguments, variables = container["args"], {e["name"]: e["value"] for e in container["env"]}
    cards = container["resources"]["limits"]["nvidia.com/gpu"]
    assert container["command"] == ["torchrun"] and f"--processes={count * cards}" in arguments
    assert variables["FLEDGE_HOME"] in {m["mountPath"] for m in container["volumeMounts"]}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] >= 30
    (layout,) = (a.removeprefix("--layout=") for a in arguments if a.startswith("--layout="))
    Execution(layout=layout).layout.resolve(count * cards)
    if job["kind"] == "PyTorchJob":
        policy = job["spec"]["elasticPolicy"]
        assert policy["rdzvBackend"] == "c10d" and policy["minReplicas"] == policy["maxReplicas"] == count
        assert job["spec"]["nprocPerNode"] == str(cards) and container["name"] == "pytorch"
        return
    assert {f"--nnodes={count}", f"--nproc-per-node={cards}", "--rdzv-backend=c10d"} <= set(arguments)
    (end,) = (re.fullmatch(r"--rdzv-endpoint=([\w-]+)\.([\w-]+):\d+", a) for a in arguments if "endpoint" in a)
    assert end is not None
    if job["kind"] == "Job":
        service = documents[0]
        assert end[2] == pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
        assert end[1] == f"{job['metadata']['name']}-0" and service["spec"]["publishNotReadyAddresses"]
    else:
        jobs = job["spec"]["replicatedJobs"]
        assert (end[1], end[2]) == (f"{job['metadata']['name']}-{jobs[0]['name']}-0-0", job["metadata"]["name"])


# --- started by somebody else ----------------------------------------------------------------------------------------


def test_a_launcher_of_the_users_starts_all_processes_of_a_run(tmp_path: Path) -> None:
    """torchrun starts `fledge run` twice: one is the runner, the other takes part in the stage that wants two."""
    (tmp_path / "d.yaml").write_text(
        "name: d\nstages:\n  words: {use: toy.words, count: 2}\n"
        "  where: {use: toy.where, execution: {processes: 2, threads: 1}}\n"
        "  again: {use: toy.where, seed: 3, execution: {processes: 2, threads: 1}}\n"
    )
    toys = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests" / "core")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fledge.cli.main",
         "run", "d.yaml"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240,
        env={**os.environ, "PYTHONPATH": toys, "FLEDGE_STAGES": "toy", "FLEDGE_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    made = sorted(p.read_text() for p in (tmp_path / "home" / "artifacts").glob("toy.where-*/words.txt"))
    assert made == ["2 3.0", "2 3.0"], "both processes took part in both stages"

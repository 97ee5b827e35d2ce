"""Writing speed on this machine: fledge's engine, transformers, OpenVINO GenAI, llama.cpp and vLLM, the same requests.

    python benchmarks/engine.py [--quick] [--only fp32,bf16,int8] [--peers openvino,vllm] [--one-stream] [--times 3]
                                [--device cuda]
    python benchmarks/engine.py --latency

SmolLM2-135M, real English text as prompts. 64 requests at once: prompts of 32 to 256 tokens, 16 to 128 new ones, 8,782
in and 4,923 out; and one stream of 128 tokens. Greedy, and no text ends early, so that every engine does the same work.
All prompts are different, and speculation and prefix caches are off. Every side runs in a process and an environment of
its own, in the same precision, on all cores, after a warm-up; the sides take turns and medians count. Precisions: fp32;
bf16 (weights, products and cache); int8 (8-bit weights, the rest as the engine likes it best).

Checked: in fp32 every answer is that of transformers' `generate`, token for token (`equal`); how many are is printed
for every side. `ratio` is the smallest of the batched ratios to the best peer (with --one-stream: of those of one
stream). The limits are what this machine reads and multiplies, measured in the same run.

--latency: time to the first token under Poisson arrivals at 70 % of the requests a second that vLLM manages, over HTTP,
both servers at the same arrival times; the ratio is that of 1 / seconds, the smaller of p50 and p99.
--quick: transformers and OpenVINO only, each once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import material
import peers
from engine_peers import arrivals, fledge, llama_cpp, openvino, side, transformers, vllm

FOLDER = peers.HOME / "engine"
TOKENS_IN, TOKENS_OUT, REQUESTS, STREAM = 8_782, 4_923, 64, 128
PROMPTS, ANSWERS = (32, 256), (16, 128)
PRECISIONS = ("fp32", "bf16", "int8")
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
OURS, REFERENCE = "fledge", "transformers generate"
LOAD, ARRIVALS = 0.7, 128


@dataclass(frozen=True)
class Side:
    """A module of `engine_peers`, and which of its ways."""

    module: Any
    option: str = ""

    def command(self, work: Path, precision: str, device: str, pieces: Sequence[str]) -> list[str | Path]:
        python = self.module.python(device) if self.module is transformers else self.module.python()
        return [
            python, "-m", self.module.__name__, work, "--model", self.module.model(precision), "--precision", precision,
            "--device", device, "--option", self.option, "--pieces", ",".join(pieces),
        ]  # fmt: skip


SIDES = {
    OURS: Side(fledge),
    REFERENCE: Side(transformers),
    "transformers generate_batch": Side(transformers, transformers.CONTINUOUS),
    "OpenVINO GenAI": Side(openvino),
    "llama.cpp": Side(llama_cpp),
    "vLLM": Side(vllm),
}


@dataclass
class Found:
    """What the runs of one side in one precision have shown."""

    reports: list[dict[str, Any]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def median(self, name: str) -> float | None:
        values = [report[name] for report in self.reports if name in report]
        return statistics.median(values) if values else None

    @property
    def answers(self) -> list[list[int]] | None:
        """To the 64 requests, or to the one stream where those were not asked."""
        report = self.reports[-1]
        return report.get("batch answers") or report.get("stream answers")


# ---- the work


def lengths(low: int, high: int, total: int, draw: random.Random, count: int = REQUESTS) -> list[int]:
    """`count` lengths, drawn evenly from low … high and then moved by ones until they come to `total`."""
    found = [draw.randint(low, high) for _ in range(count)]
    while sum(found) != total:
        index, step = draw.randrange(count), 1 if sum(found) < total else -1
        if low <= found[index] + step <= high:
            found[index] += step
    return found


def text() -> list[int]:
    """English conversations of some length between people, one after another, as token ids."""
    from tokenizers import Tokenizer

    from fledge.core.artifact import Conversations
    from fledge.records import shards

    runs = material.smollm2()
    rows = shards.read(Conversations(runs / "talk"), "conversations")
    texts = ("\n".join(message.content for message in row.messages) for row in rows)
    long = dict.fromkeys(text for text in texts if text.isascii() and len(text) > 500)
    tokenizer = Tokenizer.from_file(str(runs / "base" / "tokenizer.json"))
    return list(tokenizer.encode("\n\n".join(long), add_special_tokens=False).ids)


def requests(repeats: int = 1) -> dict[str, list[Any]]:
    """What every side is asked: name of a piece → [[prompt, length], …]; the 64 requests `repeats` times over."""
    draw, words = random.Random(0), iter(text())
    prompts = lengths(*PROMPTS, TOKENS_IN, draw)
    answers = lengths(*ANSWERS, TOKENS_OUT, draw)

    def made(pairs: Sequence[tuple[int, int]]) -> list[Any]:
        return [[list(islice(words, prompt)), answer] for prompt, answer in pairs]

    typical = TOKENS_IN // REQUESTS
    work = {
        "batch": made(list(zip(prompts, answers, strict=True)) * repeats),
        "stream": made([(typical, STREAM)]),
        "first": made([(typical, 1)] * 5),
        "warm batch": made([(prompt // 2, 1 + number // 8) for number, prompt in enumerate(prompts)]),
        "warm stream": made([(typical, 16)]),
    }
    if len({tuple(prompt[:32]) for piece in work.values() for prompt, _ in piece}) < sum(map(len, work.values())):
        raise SystemExit("two prompts begin alike: a prefix cache would find them")
    return work


# ---- the runs


def ran(name: str, work: Path, precision: str, device: str, pieces: Sequence[str]) -> tuple[dict[str, Any], int]:
    """One run of a side: its report, and the bytes of memory that it took at the most."""
    chosen = SIDES[name]
    variables = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": str(side.CORES), "HF_HUB_OFFLINE": "1"}
    run = peers.measure(chosen.command(work, precision, device, pieces), **variables | chosen.module.variables())
    report = json.loads(run.output.splitlines()[-1])
    return report, report.get("device_bytes", run.peak_bytes)


def reference(work: Path, device: str) -> list[list[int]]:
    """The answers to the 64 requests by transformers' `generate` in fp32, kept for later runs."""
    key = hashlib.sha256(work.read_bytes() + "".join(transformers.REQUIREMENTS).encode()).hexdigest()[:12]
    file = FOLDER / f"answers-{device}-{key}.json"
    if not file.exists():
        report, _ = ran(REFERENCE, work, "fp32", device, ["batch"])
        file.write_text(json.dumps(report["batch answers"]))
    return list(json.loads(file.read_text()))


def same(answers: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The share of answers that are the same, token for token."""
    return sum(list(a) == list(b) for a, b in zip(answers, others, strict=True)) / len(others)


def compare(
    names: Sequence[str], precision: str, work: Path, device: str, pieces: Sequence[str], times: int
) -> tuple[dict[str, Found], set[str]]:
    """Every side `times` times, in turn; and the sides that failed."""
    found: dict[str, Found] = {name: Found() for name in names}
    failed = set[str]()
    for number in range(times):
        for name in names:
            if name in failed:
                continue
            try:
                report, peak = ran(name, work, precision, device, pieces)
            except subprocess.CalledProcessError as error:
                print(f"{precision}, {name}: failed ({error})", file=sys.stderr)
                failed.add(name)
                continue
            found[name].reports.append(report)
            found[name].peaks.append(peak)
            shown = ", ".join(f"{piece} {report[piece]:.3g}" for piece in (*pieces, "load"))
            print(f"{precision}, {name} {number + 1}/{times}: {shown}", file=sys.stderr, flush=True)
    return {name: runs for name, runs in found.items() if name not in failed}, failed


def sides_of(precision: str, device: str, wanted: str, quick: bool) -> list[str]:
    """The sides that compute in a precision, ours first."""
    if device == "cuda":
        modules: tuple[Any, ...] = (fledge, transformers)
    else:
        modules = (fledge, transformers, openvino) if quick else (fledge, transformers, openvino, llama_cpp, vllm)
    words = [word.strip().lower() for word in wanted.split(",") if word.strip()]
    return [
        name
        for name, chosen in SIDES.items()
        if chosen.module in modules
        and precision in chosen.module.PRECISIONS
        and (chosen.module is fledge or not words or any(word in name.lower() for word in words))
    ]


# ---- the limits and the tables


def parameters(folder: Path) -> tuple[int, int]:
    """Numbers in the layers' matrices, and in the output layer."""
    config = json.loads((folder / "config.json").read_text())
    hidden, width = config["hidden_size"], config["head_dim"]
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    layer = hidden * width * heads + 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * layer, config["vocab_size"] * hidden


def limits(device: str) -> dict[str, dict[str, float]]:
    """Tokens a second, of one stream and of the 64 requests, that the memory and the multipliers allow."""
    command = [sys.executable, "-m", "engine_peers.limits", "--device", device]
    run = peers.measure(command, PYTHONPATH=str(Path(__file__).parent), OMP_NUM_THREADS=str(side.CORES))
    rates = json.loads(run.output.splitlines()[-1])
    print(f"this machine reads {rates['read'] / 1e9:.1f} GB/s; matrix products: "
          + ", ".join(f"{name} {rates[name] / 1e9:,.0f} G/s" for name in PRECISIONS))  # fmt: skip
    layers, head = parameters(material.smollm2() / "base")
    work = 2 * (layers * (TOKENS_IN + TOKENS_OUT) + head * TOKENS_OUT)
    found = {}
    for precision in PRECISIONS:
        once = BYTES[precision] * (layers + head) / rates["read"]  # seconds to read the weights
        batch = TOKENS_OUT / max(work / rates[precision], ANSWERS[1] * once)
        found[precision] = {"stream": 1 / once, "batch": batch}
    return found


def table(
    precision: str, found: Mapping[str, Found], allowed: Mapping[str, float], right: Sequence[Sequence[int]] | None
) -> None:
    """All figures of a precision: medians, and what of the limit they are."""
    head = f"{'':27} {'64 requests':>18} {'one stream':>18} {'1st token':>9} {'load':>7} {'memory':>8} {'as fp32':>8}"
    print(f"\n{precision}, tokens/s (share of the limit)\n{head}")
    for name, runs in found.items():
        cells = []
        for piece in ("batch", "stream"):
            speed = runs.median(piece)
            shown = "" if speed is None else f"{speed:,.1f} ({speed / allowed[piece]:.0%})"
            cells.append(f"{shown:>18}")
        first = runs.median("first")
        shown = "" if first is None else f"{1000 * first:,.0f} ms"
        agreed = "" if right is None else f"{same(runs.answers or [], right):.0%}"
        print(f"{name:27} {' '.join(cells)} {shown:>9} {runs.median('load') or 0:5.1f} s "
              f"{statistics.median(runs.peaks) / 1e9:5.2f} GB {agreed:>8}", flush=True)  # fmt: skip
    for piece in ("batch", "stream"):
        speeds = {name: runs.median(piece) for name, runs in found.items()}
        others = {name: speed for name, speed in speeds.items() if SIDES[name].module is not fledge and speed}
        ours = {name: speed for name, speed in speeds.items() if SIDES[name].module is fledge and speed}
        if ours and others:
            best = max(others, key=others.__getitem__)
            shown = ", ".join(f"{name} {speed / others[best]:.2f}" for name, speed in ours.items())
            print(f"{'64 requests' if piece == 'batch' else 'one stream'}: {shown} × {best}", flush=True)


# ---- the two measurements


def throughput(args: argparse.Namespace) -> bool:
    """The speeds of all sides; whether every side ran to its end."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    work = FOLDER / "work.json"
    work.write_text(json.dumps(requests()))
    pieces = ["first", "stream"] if args.one_stream else ["first", "stream", "batch"]
    decisive = "stream" if args.one_stream else "batch"
    allowed, right = limits(args.device), reference(work, args.device)
    worst: dict[str, Any] = {}
    whole, equal = True, None
    for precision in args.only:
        names = sides_of(precision, args.device, args.peers, args.quick)
        found, failed = compare(names, precision, work, args.device, pieces, args.times)
        whole &= not failed
        table(precision, found, allowed[precision], None if args.one_stream else right)
        if precision == "fp32" and not args.one_stream:
            equal = OURS in found and same(found[OURS].answers or [], right) == 1
        speeds = {name: runs.median(decisive) or 0 for name, runs in found.items()}
        others = {name: speed for name, speed in speeds.items() if SIDES[name].module is not fledge}
        ratio = speeds.get(OURS, 0) / max(others.values(), default=float("inf"))  # 0 where ours has failed
        if others and (not worst or ratio < worst["ratio"]):
            worst = {"ratio": ratio, "ours": speeds.get(OURS, 0), "peers": others, "precision": precision}
    if equal is None:
        equal = same(ran(OURS, work, "fp32", args.device, ["batch"])[0]["batch answers"], right) == 1
    what = "one stream" if args.one_stream else "64 requests"
    if not worst:
        print(f"no peer to compare with; answers in fp32 {'equal' if equal else 'differ from'} transformers'")
        return False
    peers.conclude(f"engine, {what}, {worst['precision']}", "tokens/s", worst["ours"], worst["peers"], equal)
    return whole


def latency(args: argparse.Namespace) -> bool:
    """Time to the first token of both servers under the same arrivals."""
    precision = args.only[0] if len(args.only) == 1 else "bf16"
    times, rate = args.times, 0.0
    many = requests(1 + ARRIVALS // REQUESTS * times)  # nobody is asked the same thing twice
    shares: dict[str, list[tuple[float, float]]] = {}
    for name in ("vLLM", OURS):
        port = arrivals.free_port()
        module, options = (fledge, {"speculate": False}) if name == OURS else (vllm, {})
        variables = module.variables() | {"OMP_NUM_THREADS": str(side.CORES)}
        with arrivals.served(module.server(precision, port, arrivals.NAME), port, variables):
            arrivals.capacity(port, many["warm batch"], **options)
            most = arrivals.capacity(port, many["batch"][:REQUESTS], **options)
            rate = rate or LOAD * most
            print(f"{name}, {precision}, over HTTP: 64 requests at once {most * TOKENS_OUT / REQUESTS:,.0f} tokens/s, "
                  f"{most:.2f} requests/s; now {rate:.2f} a second", flush=True)  # fmt: skip
            for seed in range(times):
                asked = many["batch"][REQUESTS + seed * ARRIVALS :][:ARRIVALS]
                waits = arrivals.first_tokens(port, asked, rate, seed, **options)
                shares.setdefault(name, []).append((arrivals.percentile(waits, 0.5), arrivals.percentile(waits, 0.99)))
                p50, p99 = shares[name][-1]
                print(f"{name}: first token after {1000 * p50:,.0f} ms (p50), {1000 * p99:,.0f} ms (p99)", flush=True)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in shares.items()}
    print(f"time to the first token at {rate:.2f} requests a second, {precision}, medians of {times}:")
    for name, (p50, p99) in medians.items():
        print(f"{name:10} p50 {1000 * p50:6,.0f} ms   p99 {1000 * p99:6,.0f} ms")
    worse = min((0, 1), key=lambda index: medians["vLLM"][index] / medians[OURS][index])
    ours, theirs = 1 / medians[OURS][worse], {"vLLM": 1 / medians["vLLM"][worse]}
    peers.conclude(f"engine, first token, p{(50, 99)[worse]}", "1 / s", ours, theirs, True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="transformers and OpenVINO only, each once")
    parser.add_argument("--times", type=int, help="how often each side runs (3; with --quick 1)")
    parser.add_argument("--latency", action="store_true", help="time to the first token under load, against vLLM")
    parser.add_argument("--one-stream", action="store_true", help="only the one stream")
    parser.add_argument("--only", default=",".join(PRECISIONS), help="precisions: fp32, bf16, int8")
    parser.add_argument("--peers", default="", help="parts of peers' names, such as openvino,vllm")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: against transformers")
    args = parser.parse_args()
    args.only, args.times = args.only.split(","), args.times or (1 if args.quick else 3)
    if unknown := set(args.only) - set(PRECISIONS):
        parser.error(f"unknown precision: {', '.join(sorted(unknown))} (there are {', '.join(PRECISIONS)})")
    sys.exit(0 if (latency if args.latency else throughput)(args) else 1)


if __name__ == "__main__":
    main()

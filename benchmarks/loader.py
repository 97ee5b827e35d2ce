"""Reading packed tokens: how many tokens a second one process can feed a trainer with.

    python benchmarks/loader.py            64 M tokens in rows of 2,048
    python benchmarks/loader.py --quick    8 M

Ours: `RowBatches` over memory-mapped rows, in shuffled order, with labels that leave the documents' borders out and
positions that count from each of them. The peers read the same rows in a shuffled order too, and make ids and labels,
no positions (they let documents attend to each other):

- nanogpt: the loop that nanoGPT made known: a `numpy.memmap`, a list of shuffled places in memory, `np.stack` of slices
  as int64, once for the inputs and once for the targets;
- datasets: Hugging Face `datasets` in an environment of its own: an Arrow table, `shuffle`, `with_format("numpy")`,
  `iter(batch_size)`, the labels a copy of the ids as its collators make them.

Every side reads two epochs in batches of 16 rows and counts the second, for which all files are in memory. `equal`:
the rows that each side gave, whatever their order, have the same digest (the sum of a hash of every row).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from peers import conclude, environment, measure

SEQ_LEN, BATCH, VOCABULARY = 2048, 16, 50_000

READ = """
import json, sys, time
import numpy as np

def digest(ids):
    weights = np.random.default_rng(7).integers(1, 2**62, ids.shape[1], dtype=np.uint64)
    sums = (ids.astype(np.uint64) * weights).sum(axis=1)
    return int((sums ^ (sums >> np.uint64(29))).sum(dtype=np.uint64))

def drain(epoch):
    total = check = 0
    for _ in epoch():  # the files come into memory
        pass
    started = time.perf_counter()
    for ids, *_ in epoch():
        total += ids.size
    seconds = time.perf_counter() - started
    for ids, *_ in epoch():
        check = (check + digest(ids)) % 2**64
    print(json.dumps({"tokens": total, "seconds": seconds, "digest": check}))
"""
OURS = (
    READ
    + """
from pathlib import Path
from fledge.data.tokens.rows import RowBatches, TokenRows
source = RowBatches(TokenRows.open(Path(sys.argv[1])), int(sys.argv[2]), seed=1)

def epoch():
    for step in range(len(source)):
        batch = source.batch(step)
        yield batch.input_ids[: len(source.rows) - step * source.batch_size], batch.labels, batch.position_ids

drain(epoch)
"""
)
NANOGPT = (
    READ
    + """
from pathlib import Path
files = sorted((Path(sys.argv[1]) / "tokens").glob("*.bin"))
data = [np.memmap(file, dtype=np.uint16, mode="r") for file in files]
length, size = int(sys.argv[3]), int(sys.argv[2])

def epoch():
    places = np.array([(f, i) for f, d in enumerate(data) for i in range(0, len(d), length)])
    np.random.default_rng(1).shuffle(places)
    for start in range(0, len(places), size):
        some = places[start : start + size]
        x = np.stack([data[f][i : i + length].astype(np.int64) for f, i in some])
        y = np.stack([data[f][i + 1 : i + length].astype(np.int64) for f, i in some])
        yield x, y

drain(epoch)
"""
)
DATASETS = (
    READ
    + """
from pathlib import Path
from datasets import Dataset, disable_progress_bars
disable_progress_bars()
files = sorted((Path(sys.argv[1]) / "tokens").glob("*.bin"))
length, size, folder = int(sys.argv[3]), int(sys.argv[2]), Path(sys.argv[1]).parent / "arrow"
if not folder.exists():
    rows = np.concatenate([np.fromfile(file, dtype=np.uint16).reshape(-1, length) for file in files])
    Dataset.from_dict({"ids": rows}).save_to_disk(folder)
data = Dataset.load_from_disk(folder).with_format("numpy").shuffle(seed=1)

def epoch():
    for batch in data.iter(batch_size=size):
        ids = batch["ids"].astype(np.int64)
        yield ids, ids.copy()

drain(epoch)
"""
)


def write_rows(folder: Path, tokens: int) -> None:
    """Documents of log-normal lengths, packed by our own packer into shards of 16 M tokens."""
    from fledge.data.tokens.packer import Packing, pack_shard
    from fledge.data.tokens.rows import TOKENS, write_index

    rng = np.random.default_rng(0)
    shards, held = [], 0
    (folder / TOKENS).mkdir(parents=True)
    while held < tokens:
        lengths = np.clip(rng.lognormal(6, 1.2, 20_000).astype(np.int64), 3, 200_000)
        lengths = lengths[: np.searchsorted(np.cumsum(lengths), min(16_000_000, tokens - held)) + 1]
        ids = rng.integers(1, VOCABULARY, lengths.sum(), dtype=np.uint32)
        ends = np.cumsum(lengths)
        ids[ends - 1] = ids[ends - lengths] = 0
        part, name = folder / f"ids-{len(shards)}", f"part-{len(shards):05d}"
        part.mkdir()
        ids.tofile(part / "ids.bin")
        lengths.astype("<u4").tofile(part / "lengths.bin")
        made = pack_shard(Packing((part,), SEQ_LEN, "best_fit", "<u2", 0, folder / f"shard-{len(shards)}"))
        for ending in ("bin", "begins"):
            (folder / f"shard-{len(shards)}" / f"rows.{ending}").rename(folder / TOKENS / f"{name}.{ending}")
        shards.append({"name": name, "rows": made["rows"], "tokens": made["tokens"], "sha256": made["sha256"]})
        held += int(lengths.sum())
    write_index(folder, shards, {"seq_len": SEQ_LEN, "dtype": "<u2", "separator": 0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 M tokens, one round")
    quick = parser.parse_args().quick
    peer = environment("datasets", "datasets>=4.0")
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "rows"
        write_rows(folder, 8_000_000 if quick else 64_000_000)
        arguments = [str(folder), str(BATCH), str(SEQ_LEN)]
        sides = {"ours": (sys.executable, OURS), "nanogpt": (sys.executable, NANOGPT), "datasets": (peer, DATASETS)}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(1 if quick else 5):
            for name, (python, code) in sides.items():
                run = measure([python, "-c", code, *arguments], OMP_NUM_THREADS="1")
                found[name].append(json.loads(run.output))
                rate = found[name][-1]["tokens"] / found[name][-1]["seconds"] / 1e6
                print(f"{name} {number + 1}: {rate:.1f} M tokens/s", file=sys.stderr)
    rates = {
        name: statistics.median(run["tokens"] / run["seconds"] / 1e6 for run in runs) for name, runs in found.items()
    }
    equal = len({run["digest"] for runs in found.values() for run in runs}) == 1
    conclude("loader", "M tokens/s a process", rates.pop("ours"), rates, equal)


if __name__ == "__main__":
    main()

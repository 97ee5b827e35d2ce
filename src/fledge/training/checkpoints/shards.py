"""Tensors into safetensors files and back, each process its own part, divided by torch.distributed.checkpoint.

DCP's planners say who writes what (of what several processes hold, one writes a copy) and, when the run is divided
otherwise, which pieces of which files a process needs. DCP's own table of contents is a pickle, which runs code when
it is read; ours is JSON:

    {"model.embed_tokens.weight": {"dtype": "float32", "shape": [64, 32], "chunks": [[[0, 0], [32, 32], 0, 1024], …]}}

with a chunk's offsets, its sizes, its file's number and its first byte there. A file by itself is plain safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan

from fledge.training.checkpoints.place import Place

FORMATS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Shards:
    """Who writes what: this process's tensors with their names in its file, and the table of everybody's."""

    file: str
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    table: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Of this process's part."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Divider:
    """Divides the writing of a state among processes; what it found is kept while the state has the same form."""

    def __init__(self, rank: int, group: dist.ProcessGroup | None) -> None:
        self.rank, self.group = rank, group
        self._known: dict[str, tuple[Any, SavePlan, dict[str, Any]]] = {}

    def divide(self, purpose: str, state: Mapping[str, Tensor]) -> Shards:
        """The part of `state` that this process writes. Every process calls it, with its own tensors."""
        form = [(name, tuple(t.shape), t.dtype) for name, t in state.items()]
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(state), is_coordinator=self.rank == 0)
        if self._changed(purpose not in self._known or self._known[purpose][0] != form):
            mine = planner.create_local_plan()
            plans = [mine]
            if self.group is not None:
                plans = [mine] * dist.get_world_size(self.group)
                dist.all_gather_object(plans, mine, group=self.group)
            plans, metadata = planner.create_global_plan(plans)
            self._known[purpose] = form, plans[self.rank], _table(plans, metadata)
        _, plan, table = self._known[purpose]
        names, tensors = [], []
        for item in plan.items:
            names.append(_name_in_file(item.index))
            tensors.append(planner.resolve_data(item))
        return Shards(file_name(self.rank), tuple(names), tuple(tensors), table)

    def _changed(self, here: bool) -> bool:
        """Whether the form has changed in any process."""
        if self.group is None:
            return here
        flag = torch.tensor(float(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


def file_name(rank: int) -> str:
    """The file that a process writes."""
    return f"shard-{rank:05d}.safetensors"


def _name_in_file(index: MetadataIndex) -> str:
    """A tensor that begins at the beginning keeps its name; another part of it says where it begins."""
    offset = ",".join(map(str, index.offset or ()))
    return f"{index.fqn}@{offset}" if any(index.offset or ()) else index.fqn


def _table(plans: Sequence[SavePlan], metadata: Metadata) -> dict[str, Any]:
    """The table of contents of a whole checkpoint."""
    table: dict[str, Any] = {}
    for rank, plan in enumerate(plans):
        parts = {_name_in_file(item.index): item.tensor_data for item in plan.items}
        header, places = _header({name: (d.properties.dtype, d.chunk.sizes) for name, d in parts.items() if d})
        for item in plan.items:
            data = item.tensor_data
            assert data is not None
            entry = table.setdefault(
                item.index.fqn,
                {"dtype": str(data.properties.dtype).removeprefix("torch."), "shape": list(data.size), "chunks": []},
            )
            begin = len(header) + places[_name_in_file(item.index)]
            entry["chunks"].append([list(data.chunk.offsets), list(data.chunk.sizes), rank, begin])
    assert set(table) == set(metadata.state_dict_metadata)
    return table


def _header(parts: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, and where each tensor begins behind it."""
    described, places, end = {}, {}, 0
    for name, (dtype, sizes) in parts.items():
        places[name], begin = end, end
        end += dtype.itemsize * math.prod(sizes)
        described[name] = {"dtype": FORMATS[dtype], "shape": list(sizes), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that tensors begin where memory is read fast
    return len(text).to_bytes(8, "little") + text, places


def write(place: Place, name: str, shards: Shards, pieces: Iterable[memoryview]) -> str:
    """Write this process's file of the checkpoint `name`; its SHA-256 in hex.

    `pieces` are the bytes of `shards.tensors`, in their order.
    """
    seen = hashlib.sha256()
    header, _ = _header({n: (t.dtype, tuple(t.shape)) for n, t in zip(shards.names, shards.tensors, strict=True)})
    with place.create(name, shards.file) as stream:
        for piece in chain([header], pieces):
            seen.update(piece)
            _write_all(stream, piece)
    return seen.hexdigest()


def _write_all(stream: Any, data: Any) -> None:
    """All of it: a raw file may take less at a time."""
    while len(data):
        data = data[stream.write(data) :]


class Contents:
    """A checkpoint's table of contents, and the reading of what this process needs."""

    def __init__(self, place: Place, name: str, table: Mapping[str, Any]) -> None:
        self.place, self.name, self.table = place, name, table
        self._places: dict[MetadataIndex, tuple[int, int, list[int], torch.dtype]] = {}
        described = {}
        for fqn, entry in table.items():
            dtype = getattr(torch, entry["dtype"])
            chunks = []
            for offsets, sizes, file, begin in entry["chunks"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                self._places[MetadataIndex(fqn, torch.Size(offsets))] = (file, begin, sizes, dtype)
            described[fqn] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(entry["shape"]), chunks)
        self.metadata = Metadata(state_dict_metadata=described)

    def plan(self, state: Mapping[str, Tensor]) -> Reading:
        """What must be read to fill `state`, whatever its division. Raises ValueError where the two do not fit."""
        for name, tensor in state.items():
            entry = self.table.get(name)
            if entry is None or entry["shape"] != list(tensor.shape):
                raise ValueError(name)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(state), self.metadata, is_coordinator=True)
        return Reading(self, planner, planner.finish_plan(planner.create_local_plan()))

    def ranges(self, plan: LoadPlan) -> Iterator[tuple[int, list[tuple[Any, list[int], torch.dtype, int]]]]:
        """File by file, what is wanted of it: the piece, the stored chunk's sizes and type, and its first byte."""
        wanted: dict[int, list[tuple[Any, list[int], torch.dtype, int]]] = {}
        for item in plan.items:
            file, begin, sizes, dtype = self._places[item.storage_index]
            wanted.setdefault(file, []).append((item, sizes, dtype, begin))
        yield from sorted(wanted.items())


@dataclass(frozen=True)
class Reading:
    """A state that is to be filled from a checkpoint."""

    contents: Contents
    planner: DefaultLoadPlanner
    plan: LoadPlan

    def fill(self) -> None:
        """Read, and overwrite the state in place."""
        contents = self.contents
        for file, wanted in contents.ranges(self.plan):
            ends = [(begin, begin + dtype.itemsize * math.prod(sizes)) for _, sizes, dtype, begin in wanted]
            pieces = contents.place.read(contents.name, file_name(file), ends)
            for (item, sizes, dtype, _), piece in zip(wanted, pieces, strict=True):
                if not math.prod(sizes):
                    continue
                stored = torch.frombuffer(piece, dtype=dtype).view(sizes)
                for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    stored = stored.narrow(dim, offset, length)
                target = self.planner.resolve_tensor(item).detach()
                target.copy_(stored)
                self.planner.commit_tensor(item, target)

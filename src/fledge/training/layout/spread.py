"""A model spread over the processes of a run as its layout says: what the Trainer talks to.

The layers are divided first (tensor), then marked for recomputation, then compiled, then sharded (FSDP2); a pipeline
takes what it needs of the model before all that. The caller's own model stays an ordinary one: its weights leave it
while the run goes on and come back for what is measured and saved.

ZeRO (Rajbhandari et al., 2020) by FSDP2's settings: at stage 1 the gradients of a step are added up whole and divided
once, and the weights stay whole from the first micro-batch to the last; at stage 2 every micro-batch's gradients are
divided; at stage 3 (FSDP) a layer's weights are whole only while it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fledge.training.compiling import compile_like
from fledge.training.layout.context import Parts, put_on, with_positions
from fledge.training.layout.pipeline import Chunk, Loss, Pipeline, copied, padded, stages_each, with_gaps
from fledge.training.layout.ranks import Ranks
from fledge.training.layout.tensor import divide
from fledge.training.objective import Batch, Term, rows_of, take
from fledge.training.optimization.optimizer import clip

SEQUENCES = ("input_ids", "labels", "attention_mask", "position_ids", "source")


class Spread:
    """The models of a run as this process holds them. With one process, or whole copies, they are the caller's own."""

    def __init__(
        self, models: Mapping[str, Any], trainable: Sequence[str], ranks: Ranks, device: str,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:  # fmt: skip
        names = {id(p): f"{name}.{key}" for name in trainable for key, p in models[name].named_parameters()}
        self.ranks, self.layout, self.device, self.originals = ranks, ranks.layout, device, models
        self.trainable, self.autocast = tuple(trainable), autocast
        self._owner: dict[str, int] = {}  # of a parameter: its place in the pipeline
        self._terms: tuple[list[str], dict[str, float]] | None = None
        self.pipeline: Pipeline | None = None
        self.parts: Parts | None = None
        self.run: nn.Module | None = None
        if ranks.mesh is None:
            self.models = dict(models)
            self.held = [(name, models[name]) for name in self.trainable]
        else:
            self._spread(models)
        self._held = {f"{name}.{key}": p for name, model in self.held for key, p in model.named_parameters()}
        """every parameter of which a part is here, frozen ones too"""
        if ranks.mesh is not None:
            self._adopt(optimizers, names)
            self._release()

    @property
    def modules(self) -> list[Any]:
        """The models that compute: those that are trained as they are here, and those that are only asked."""
        asked = [model for name, model in self.originals.items() if name not in self.trainable]
        return [*(model for _, model in self.held), *asked]

    # --- putting it up -----------------------------------------------------------------------------------------------

    def _spread(self, models: Mapping[str, Any]) -> None:
        layout, mesh = self.layout, self.ranks.mesh
        assert mesh is not None
        if layout.pipeline > 1:
            (name,) = self.trainable
            each = stages_each(layout.schedule)
            place, stages = self.ranks.at("pipeline"), layout.pipeline * each
            for stage in reversed(range(stages)):  # of two that have a tied embedding, the first
                held = with_gaps(models[name], stage, stages).named_parameters()
                self._owner |= {f"{name}.{key}": stage % layout.pipeline for key, _ in held}
            mine = [place + layout.pipeline * i for i in range(each)]
            chunks = [Chunk(name, models[name], stage, stages, self.autocast) for stage in mine]
            self.held = [(name, chunk.model) for chunk in chunks]
            runs: list[nn.Module] = list(chunks)
        else:
            self.held = [(name, copied(models[name])) for name in self.trainable]
            runs = [_Run(self.held)]
        if layout.context > 1:
            self.parts = Parts(self.ranks.group("context"), self.ranks.at("context"), layout.context)
        for name, model in self.held:
            if layout.tensor > 1:
                divide(model, mesh["tensor"])
            if self.parts is not None:
                put_on(model, self.parts)
            compile_like(model, models[name])
        if self.ranks.sharded > 1:
            if layout.context > 1:  # neither tensor nor pipeline is beside it
                sizes = (layout.replicate, self.ranks.sharded)
                mesh = init_device_mesh(mesh.device_type, sizes, mesh_dim_names=("replicate", "shard"))
            for run in runs:
                _shard(run, mesh["replicate", "shard"] if layout.replicate > 1 else mesh["shard"], layout.zero)
        self.models = {**models, **dict(self.held)}
        self.run = runs[0]
        if layout.pipeline > 1:
            self.pipeline = Pipeline(chunks, runs, layout.schedule, self.ranks.group("pipeline"), self.device)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained and of which a part is here, by the names they have in the whole models."""
        return {key: p for key, p in self._held.items() if p.requires_grad}

    def _adopt(self, optimizers: Sequence[torch.optim.Optimizer], names: Mapping[int, str]) -> None:
        """Give optimisers made for the whole models the parameters that are here. `names` by the whole ones' id.

        A group becomes one for each way of being divided: fused steps take tensors of one kind.
        """
        held = self.parameters()
        for optimizer in optimizers:
            groups = []
            for group in optimizer.param_groups:
                kinds: dict[Any, list[Tensor]] = {}
                for whole in group["params"]:
                    here = held.get(names[id(whole)])
                    if here is not None:
                        kind = (here.device_mesh, here.placements) if isinstance(here, DTensor) else None
                        kinds.setdefault(kind, []).append(here)
                groups += [{**group, "params": params} for params in kinds.values()]
            optimizer.param_groups[:] = groups

    # --- a step ------------------------------------------------------------------------------------------------------

    def backward(self, loss: Loss, batch: Batch, rows: int) -> Iterator[dict[str, Term]]:
        """Add the gradients of a batch to those that are there, at most `rows` rows at once (0: all of ours).

        `loss(models, rows)` gives what to go down from. The terms come micro-batch by micro-batch, of our rows alone.
        """
        if self.layout.tensor > 1:
            batch = _to_multiple(batch, self.layout.tensor)
        if self.parts is not None:
            batch = self.parts.take(_to_multiple(with_positions(batch), 2 * self.parts.count))
        share = self.ranks.share(rows_of(batch))
        mine, most = take(batch, share), -(-rows_of(batch) // self.ranks.copies)
        if self.pipeline is not None:
            micros = self._equal(mine if rows_of(mine) else take(batch, slice(0, 1)), most, rows, bool(rows_of(mine)))
            yield from self.pipeline.backward(micros, self._scaled(loss), self.originals)
            self._tied()
            return
        size = rows or max(1, most)
        count = -(-most // size) if self.ranks.sharded > 1 else max(1, -(-rows_of(mine) // size))
        for index in range(count):
            micro, counts = take(mine, slice(index * size, (index + 1) * size)), 1.0
            if not rows_of(micro):  # others have more rows than we: all take part in every message all the same
                micro, counts = take(batch, slice(0, 1)), 0.0
            self._communicate(last=index == count - 1)
            total, terms = self._call(self._scaled(loss, counts), micro)
            if total is not None:
                total.backward()
            yield terms if counts else {name: replace(t, sum=torch.zeros(()), weight=0.0) for name, t in terms.items()}

    def _call(self, loss: Loss, micro: Batch) -> tuple[Tensor | None, dict[str, Term]]:
        if not isinstance(self.run, _Run):
            return loss(self.models, micro)
        total: Tensor | None = self.run(loss, {**self.originals, **dict(self.held)}, micro)
        return total, self.run.terms

    def _scaled(self, loss: Loss, counts: float = 1.0) -> Loss:
        """FSDP2 takes the mean over copies, and over the parts of rows; terms are divided by global weights already,
        and want the sum."""
        factor = counts * (self.layout.replicate * self.ranks.sharded if self.ranks.sharded > 1 else 1)

        def scaled(models: Mapping[str, Any], micro: Batch) -> tuple[Tensor, dict[str, Term]]:
            total, terms = loss(models, micro)
            return (total if factor == 1 or total is None else total * factor), terms

        return scaled

    def _equal(self, mine: Batch, most: int, rows: int, real: bool) -> list[Batch]:
        """Micro-batches of one shape, as many as a multiple of the pipeline's length."""
        length = self.layout.pipeline
        count = length * max(1, -(-most // (length * rows)) if rows else min(2, -(-most // length)))
        size = -(-most // count)
        if not real:
            mine = {**mine, "labels": torch.full_like(mine["labels"], -100)}
        mine = padded(mine, size * count)
        return [take(mine, slice(i * size, (i + 1) * size)) for i in range(count)]

    def _communicate(self, last: bool) -> None:
        """When gradients are divided, and weights given back, in a step of several micro-batches."""
        if isinstance(self.run, FSDPModule) and self.layout.zero < 3:
            self.run.set_requires_gradient_sync(last or self.layout.zero == 2)
            self.run.set_reshard_after_backward(last)

    def _tied(self) -> None:
        """A tied embedding is held by the first stage and by the last: both take the sum of the two gradients."""
        assert self.pipeline is not None
        first, last = (next((c for c in self.pipeline.chunks if getattr(c, end)), None) for end in ("first", "last"))
        chunk = first or last
        shared = self._shared_names()
        if chunk is None or not shared:
            return
        group = self.ranks.group("pipeline")
        other = dist.get_global_rank(group, self.layout.pipeline - 1 if first else 0)
        parameter = self._held[next(iter(shared))]
        if parameter.grad is None:
            return
        mine = _settled(parameter)
        sent = mine.clone(memory_format=torch.contiguous_format)
        theirs = torch.empty_like(sent)
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, sent, other, group), dist.P2POp(dist.irecv, theirs, other, group)]
        )
        for work in works:
            work.wait()
        mine.add_(theirs)

    def _shared_names(self) -> set[str]:
        """The embedding that the output layer is tied to, where it is trained."""
        (name,) = self.trainable
        model = self.originals[name]
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or head.weight is not embedding.weight or not embedding.weight.requires_grad:
            return set()
        return {f"{name}.{key}" for key, p in model.named_parameters() if p is embedding.weight}

    def sum_gradients(self) -> list[Tensor]:
        """This process's part of every gradient, summed over the copies that do not divide it."""
        found = [_settled(p) for p in self.parameters().values() if p.grad is not None]
        if self.ranks.sharded == 1:
            self.ranks.sum(found, "replicate")
        return found

    def sum_terms(
        self, tally: dict[str, list[float]], coefficients: dict[str, float]
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """[sum, weight] of every term, added up over the copies, and the coefficients: the same on every process."""
        if self.layout.pipeline > 1 and self._terms is None:
            told: list[Any] = [(list(tally), coefficients)]
            source = dist.get_global_rank(self.ranks.group("pipeline"), self.layout.pipeline - 1)
            dist.broadcast_object_list(told, source, group=self.ranks.group("pipeline"))
            self._terms = told[0]
        names = self._terms[0] if self._terms else list(tally)
        table = torch.tensor([tally.get(name, [0.0, 0.0]) for name in names], dtype=torch.float64)
        if self.ranks.at("tensor"):
            table.zero_()
        if dist.is_initialized() and dist.get_backend() == "nccl":
            table = table.to(self.device)
        self.ranks.sum([table])
        found = dict(zip(names, table.tolist(), strict=True))
        return found, self._terms[1] if self._terms else coefficients

    def clip(self, bound: float) -> float:
        """The norm of the whole gradient in fp32, before it was scaled down to `bound` (0: left as it is)."""
        if self.ranks.mesh is None:
            return clip(self.parameters().values(), bound)
        held = {name: p for name, p in self.parameters().items() if p.grad is not None}
        gradients = [_settled(p) for p in held.values()]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        shared = self._shared_names() if self.pipeline is not None else set()
        for (name, parameter), gradient in zip(held.items(), gradients, strict=True):
            if name not in shared or self.ranks.at("pipeline") == 0:
                total += gradient.norm(dtype=torch.float32).double() ** 2 / self._copies_of(parameter)
        self.ranks.sum([total])
        norm = math.sqrt(total.item()) if total.item() == total.item() else math.nan
        if bound and norm > bound and gradients:
            torch._foreach_mul_(gradients, bound / norm)
        return norm

    def share_of(self, name: str, parameter: Tensor) -> float:
        """Which part of a sum over all parameters this process answers for, so that nothing is counted twice."""
        if self.ranks.mesh is None:
            return 1.0
        shared = self._shared_names() if self.pipeline is not None else set()
        return 0.0 if name in shared and self.ranks.at("pipeline") else 1 / self._copies_of(parameter)

    def _copies_of(self, parameter: Tensor) -> int:
        """How many processes of a pipeline stage hold the same numbers of a parameter."""
        copies = self.layout.replicate * self.ranks.sharded * self.layout.tensor
        if isinstance(parameter, DTensor):
            for dimension, placed in enumerate(parameter.placements):
                if isinstance(placed, Shard | _StridedShard):
                    copies //= parameter.device_mesh.size(dimension)
        return copies

    # --- whole again -------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        """Take the weights out of the caller's models where only parts of them are kept."""
        mine = {id(p) for p in self._held.values()}
        for name in self.trainable:
            for parameter in self.originals[name].parameters():
                if id(parameter) not in mine:
                    parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)  # its numbers, no memory

    def restore(self) -> None:
        """Put the whole weights back into the caller's models, on every process."""
        if self.ranks.mesh is None:
            return
        held = self._held
        for name in self.trainable:
            for key, parameter in self.originals[name].named_parameters():
                self._restore(f"{name}.{key}", parameter, held.get(f"{name}.{key}"))

    @torch.no_grad()
    def _restore(self, name: str, parameter: Tensor, here: Tensor | None) -> None:
        if self.pipeline is None:
            if here is not parameter:
                parameter.data = whole(here)
            return
        owner, group = self._owner[name], self.ranks.group("pipeline")
        found = whole(here) if owner == self.ranks.at("pipeline") else None
        shape: list[Any] = [None if found is None else (found.shape, found.dtype)]
        source = dist.get_global_rank(group, owner)
        dist.broadcast_object_list(shape, source, group=group)
        if found is None:
            found = torch.empty(shape[0][0], dtype=shape[0][1], device=self.device)
        dist.broadcast(found, source, group=group)
        if here is not parameter:
            parameter.data = found

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While it lasts, the caller's models are whole on every process: for what is measured in the middle."""
        if self.ranks.mesh is None:
            yield
            return
        self.restore()
        yield
        self._release()


class _Run(nn.Module):
    """The models of a run in one module: sharded parameters are whole inside its `forward`, whatever it calls."""

    def __init__(self, models: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(dict(models))
        self.terms: dict[str, Term] = {}

    def forward(self, loss: Loss, models: Mapping[str, Any], micro: Batch) -> Tensor | None:
        total, self.terms = loss(models, micro)
        return total


def _shard(run: nn.Module, mesh: Any, zero: int) -> None:
    names = {n for m in run.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    for module in [m for m in run.modules() if type(m).__name__ in names]:
        fully_shard(module, mesh=mesh, reshard_after_forward=zero == 3)
    fully_shard(run, mesh=mesh, reshard_after_forward=False)


def whole(tensor: Any) -> Tensor:
    """All of a tensor of which a part is here. All processes that hold parts have to ask."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _settled(parameter: Any) -> Tensor:
    """The part of the gradient that belongs to the part of the parameter; summands are summed first."""
    gradient = parameter.grad
    if not isinstance(gradient, DTensor):
        return gradient
    if gradient.placements != parameter.placements:
        parameter.grad = gradient = gradient.redistribute(placements=parameter.placements)
    return gradient.to_local()


def _to_multiple(batch: Batch, processes: int) -> dict[str, Tensor]:
    """Rows lengthened so that so many processes (or chunks) divide them evenly; what is added counts for nothing."""
    found = {}
    for name, value in batch.items():
        kind = name.rpartition(".")[2]
        short = -value.shape[1] % processes if kind in SEQUENCES and value.ndim == 2 else 0
        if short:
            fill = {"labels": -100, "attention_mask": 0}.get(kind, 0)
            more = torch.full_like(value[:, :1], fill).repeat(1, short)
            if kind == "position_ids":
                more = torch.arange(short, device=value.device, dtype=value.dtype).expand(len(value), short)
            value = torch.cat([value, more], dim=1)
        found[name] = value
    return found

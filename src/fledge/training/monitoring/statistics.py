"""What happens inside the model, layer by layer, on the steps that ask for it: gradients, updates, activations.

    statistics.begin(step)            # before the forward pass: listen to the layers
    statistics.gradients(parameters)  # before clipping
    statistics.updated(parameters)    # after the optimiser's step
    statistics.found                  # {"grad_norm/00": …, "update_ratio/00": …, "activation_rms/00": …}

Nothing is changed by listening, and no random number is drawn: a run with statistics ends with the bytes of one
without. On other steps nothing is done at all. With several processes, activations are those of a process's own rows;
gradients and weights that are divided among processes are put together first.

- `grad_norm` of a layer's parameters, before clipping;
- `update_ratio`: ‖Δθ‖ / ‖θ‖ of one step; about 1e-3 is usual, 1e-2 is much, 1e-5 little (Karpathy, 2022);
- `activation_mean`, `activation_rms`, `activation_max` (of the absolute values) of what a layer gives;
- `zeros`: how much of what the layer's activation function gives is exactly 0, and `dead`: of how many of its units it
  is 0 for every token;
- `near_limit`: the share of the layer's output above half of what the run's format can hold (fp16: 32,752);
- `attention_logit_max` and `attention_entropy` (nats, the mean over heads and queries) of a layer's attention, for the
  last 256 tokens of the first row; not where layers are compiled, nor where `context` divides the rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fledge.training.kernels import PARTS

EMBEDDINGS, REST = "embeddings", "rest"
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?=\.|$)")
_STACKS = ("encoder", "decoder", "generator", "discriminator")
_ACTIVATIONS = ("act", "act_fn", "activation_fn", "intermediate_act_fn", "activation")


def layer_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `03`; `encoder.block.3.…` → `encoder.03`; "" where there is no layer."""
    found = _LAYER.search(name)
    if found is None:
        return ""
    stacks = [part for part in name[: found.start()].split(".") if part in _STACKS]
    return ".".join([*stacks[:1], f"{int(found[1]):02d}"])


def is_layer(name: str) -> bool:
    """Whether a module of this name is a layer itself, not a part of one."""
    found = _LAYER.search(name)
    return found is not None and found.end() == len(name)


def group_of(name: str, parameter: object, embeddings: Iterable[int]) -> str:
    """The layer a parameter belongs to, the embeddings, or the rest (the last norm, the output layer)."""
    return layer_of(name) or (EMBEDDINGS if id(parameter) in embeddings else REST)


class Statistics:
    """Statistics of `models` every `every` steps (0: never), and at the steps `also`, without the updates.

    `every` = 10 means steps 10, 20, … of the run, counted from 1. Where models of several names are trained, their
    layers are called after them: `generator.00`.
    """

    def __init__(
        self, models: Sequence[tuple[str, Any]], every: int, also: Iterable[int] = (), limit: float = 0.0
    ) -> None:
        self.models, self.every, self.also, self.limit = models, every, frozenset(also), limit
        self.several = len({name for name, _ in models}) > 1
        self.found: dict[str, float] = {}
        self._asked = self._full = False
        self._undo: list[Callable[[], None]] = []
        self._sums: dict[str, Tensor] = {}  # by layer: count, Σx, Σx², max |x|, near the limit
        self._units: dict[str, list[Tensor]] = {}  # by layer: zeros, count, and which units were ever not 0
        self._groups: dict[str, str] | None = None
        self._before: dict[str, Tensor] = {}

    def begin(self, step: int) -> None:
        """Before the forward pass of `step` (from 0): listen, if this step is asked for."""
        self._silence()
        self.found, self._sums, self._units, self._before = {}, {}, {}, {}
        self._full = bool(self.every) and (step + 1) % self.every == 0
        self._asked = self._full or step + 1 in self.also
        if self._asked:
            for name, model in self.models:
                self._listen(f"{name}." if self.several else "", model)

    def gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """After the backward pass, before clipping."""
        if not self._asked:
            return
        self._silence()
        self._activations()
        squares: dict[str, list[Tensor]] = {}
        zeros: dict[str, list[Tensor]] = {}
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            group = self._group(parameters)[name]
            squares.setdefault(group, []).append(_whole(parameter.grad.norm(dtype=torch.float32)).square())
            if parameter.ndim == 2 and not group.endswith((EMBEDDINGS, REST)):
                zeros.setdefault(group, []).append(_whole((parameter.grad == 0).float().mean()))
        self._keep("grad_norm", {group: torch.stack(found).sum().sqrt() for group, found in squares.items()})
        self._keep("grad_zeros", {group: torch.stack(found).mean() for group, found in zeros.items()})
        if self._full:
            self._before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def updated(self, parameters: Mapping[str, Tensor]) -> None:
        """After the optimiser's step."""
        if not self._before:
            return
        moved: dict[str, list[Tensor]] = {}
        length: dict[str, list[Tensor]] = {}
        for name, before in self._before.items():
            group = self._group(parameters)[name]
            change = parameters[name].detach() - before
            moved.setdefault(group, []).append(_whole(change.norm(dtype=torch.float32)).square())
            length.setdefault(group, []).append(_whole(before.norm(dtype=torch.float32)).square())
        self._before = {}
        ratios = {
            g: (torch.stack(m).sum() / torch.stack(length[g]).sum().clamp(min=1e-30)).sqrt() for g, m in moved.items()
        }
        self._keep("update_ratio", ratios)

    # --- listening ---------------------------------------------------------------------------------------------------

    def _listen(self, prefix: str, model: nn.Module) -> None:
        compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
        if not compiled:
            stop = listen_to_attention(model, partial(self._attention, prefix))
            self._undo += [stop] if stop else []
        for name, module in model.named_modules():
            layer = prefix + layer_of(name)
            if layer == prefix or (next(module.parameters(), None) is None and is_layer(name)):
                continue  # no layer, or another process's in a pipeline
            if is_layer(name):
                self._hear_layer(module, layer)
            elif name.rpartition(".")[2] in _ACTIVATIONS and not compiled:
                hook = module.register_forward_hook(lambda m, a, out, layer=layer: self._function(layer, out))
                self._undo.append(hook.remove)

    def _hear_layer(self, module: nn.Module, layer: str) -> None:
        """What the layer gives. A compiled one is asked from outside: a hook would have it compiled again."""
        compiled = getattr(module, "_compiled_call_impl", None)
        if compiled is None:
            hook = module.register_forward_hook(lambda m, a, out: self._output(layer, out))
            self._undo.append(hook.remove)
            return

        def asked(*args: Any, **kwargs: Any) -> Any:
            out = compiled(*args, **kwargs)
            self._output(layer, out)
            return out

        module._compiled_call_impl = asked  # type: ignore[assignment]
        self._undo.append(lambda: setattr(module, "_compiled_call_impl", compiled))

    def _silence(self) -> None:
        while self._undo:
            self._undo.pop()()

    @torch.no_grad()
    def _output(self, layer: str, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or _goes_back():
            return
        x = hidden.detach().float()
        size = x.abs()
        near = (size > self.limit).sum() if self.limit else torch.zeros((), device=x.device)
        found = torch.stack([x.new_tensor(x.numel()), x.sum(), x.square().sum(), size.max(), near.to(x.dtype)]).double()
        if layer in self._sums:
            highest = torch.maximum(self._sums[layer][3], found[3])
            found = found + self._sums[layer]
            found[3] = highest
        self._sums[layer] = found

    @torch.no_grad()
    def _function(self, layer: str, output: Any) -> None:
        if not isinstance(output, Tensor) or _goes_back():
            return
        alive = (output.detach() != 0).flatten(0, -2)  # (tokens, units)
        found = [alive.numel() - alive.sum(), torch.tensor(float(alive.numel())), alive.any(dim=0)]
        if layer in self._units:
            zeros, count, before = self._units[layer]
            found = [found[0] + zeros, found[1] + count, found[2] | before]
        self._units[layer] = found

    @torch.no_grad()
    def _attention(self, prefix: str, layer: int, logits: Tensor, seen: Tensor) -> None:
        """(H, Q, K) logits of one row, and which keys a query sees (Q, K)."""
        name = f"{prefix}{layer:02d}"
        if f"attention_entropy/{name}" in self.found or _goes_back():
            return
        logits = logits.masked_fill(~seen, -torch.inf)
        spread = torch.special.entr(torch.softmax(logits, dim=-1)).sum(dim=-1)
        self.found[f"attention_logit_max/{name}"] = float(logits.amax())
        self.found[f"attention_entropy/{name}"] = float(spread.mean())

    def _activations(self) -> None:
        sums = {layer: sums.tolist() for layer, sums in self._sums.items()}
        for layer, (count, total, squares, highest, near) in sums.items():
            self.found[f"activation_mean/{layer}"] = total / count
            self.found[f"activation_rms/{layer}"] = (squares / count) ** 0.5
            self.found[f"activation_max/{layer}"] = highest
            if self.limit:
                self.found[f"near_limit/{layer}"] = near / count
        for layer, (zeros, numbers, alive) in self._units.items():
            self.found[f"zeros/{layer}"] = float(zeros) / float(numbers)
            self.found[f"dead/{layer}"] = 1.0 - float(alive.float().mean())

    # --- what belongs together ---------------------------------------------------------------------------------------

    def _group(self, parameters: Mapping[str, Tensor]) -> dict[str, str]:
        if self._groups is None:
            modules = [m for _, model in self.models for m in model.modules() if isinstance(m, nn.Embedding)]
            looked_up = {id(module.weight) for module in modules}
            self._groups = {}
            for name, parameter in parameters.items():
                model, _, inner = name.partition(".") if self.several else ("", "", name)
                prefix = f"{model}." if model else ""
                self._groups[name] = prefix + group_of(inner, parameter, looked_up)
        return self._groups

    def _keep(self, name: str, values: Mapping[str, Tensor]) -> None:
        for group in sorted(values):
            self.found[f"{name}/{group}"] = float(values[group])


QUERIES = 256  # of a row, whose attention is looked at


def listen_to_attention(model: Any, hear: Callable[[int, Tensor, Tensor], None]) -> Callable[[], None] | None:
    """Have `hear(layer, logits, seen)` called for the first row of every self-attention of `model`; how to stop it.

    None where the attention is not one of transformers' functions, so that nobody can be asked, and where rows are
    divided: a part does not have the keys.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if name is None or name == PARTS or name not in list(FUNCTIONS):
        return None
    before = FUNCTIONS[name]
    own = name in FUNCTIONS._local_mapping

    def asked(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        layer = getattr(module, "layer_idx", None)
        seen = visible(query, key, mask, kwargs.get("sliding_window"), getattr(module, "is_causal", True))
        if layer is not None and seen is not None:
            queries = query[0, :, -QUERIES:].detach().float()
            keys = key[0].detach().float().repeat_interleave(query.shape[1] // key.shape[1], dim=0)
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            hear(int(layer), queries @ keys.transpose(-1, -2) * scale, seen[-QUERIES:])
        return before(module, query, key, value, mask, *args, **kwargs)

    FUNCTIONS[name] = asked

    def stop() -> None:
        if own:
            FUNCTIONS[name] = before
        else:
            del FUNCTIONS[name]

    return stop


def visible(query: Tensor, key: Tensor, mask: Any, window: int | None, causal: bool) -> Tensor | None:
    """Which keys each query of the first row sees, (Q, K): from a mask (B, 1, Q, K), from the places where documents
    begin (B, 1, Q, 1), or from order alone. None where it cannot be told."""
    length, keys = query.shape[-2], key.shape[-2]
    starts = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] == 1 and not mask.is_floating_point()
    if isinstance(mask, Tensor) and mask.ndim == 4 and not starts:
        first = mask[0, 0, :, :keys]
        return first > torch.finfo(first.dtype).min / 2 if first.is_floating_point() else first.bool()
    if length != keys or not (mask is None or starts):
        return None
    places = torch.arange(length, device=query.device)
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device)
    if causal:
        seen &= places[None, :] <= places[:, None]
    if starts:
        seen &= places[None, :] >= mask[0, 0]
    if window:
        seen &= places[None, :] > places[:, None] - window
    return seen


def _whole(value: Tensor) -> Tensor:
    """A number that is divided among processes, put together."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _goes_back() -> bool:
    """Whether the backward pass is under way: what is computed then, was counted before."""
    return torch._C._current_graph_task_id() != -1

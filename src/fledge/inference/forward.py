"""The forward pass of a step: tokens of many sequences, end to end, through a `transformers` model's own modules."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fledge.core.allocator import keep_freed_memory
from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.inference import paged
from fledge.inference.formats import Weights
from fledge.inference.fusion import FusedLayer, prepare
from fledge.inference.kernel_step import KernelStep
from fledge.inference.program import available
from fledge.inference.stack import stack_of
from fledge.inference.step import Part

if TYPE_CHECKING:
    from fledge.inference.adapters import Adapters

log = logging.getLogger(__name__)

_DEPENDS = ("dynamic", "longrope")
"""kinds of RoPE whose angles depend on the longest sequence: there every sequence is read alone"""
_LARGE = 1_000_000
"""parameters from which compiling loops pays"""


class Forward:
    """A causal language model (or a reward model, for whole texts only) as the engine computes it."""

    block_tokens = paged.BLOCK

    def __init__(self, model: Any, *, weights: Weights = "", keep: bool = False, loops: bool | None = None) -> None:
        """The model's modules are changed in place (`fusion.prepare`); `keep` what packed weights are made from.
        `loops`: whether to compile loops for what lies between the products; None: where it pays and they can be had.
        Raises FledgeError for models that keep more (or less) than keys and values of every token.
        """
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
        if model.config.is_encoder_decoder or not kinds <= {"full_attention", "sliding_attention"}:
            raise FledgeError(
                Problem(
                    t("the native engine runs decoder-only models with full attention"),
                    found=f"{type(model).__name__} ({listing(sorted(kinds))})",
                )
            )
        self.model, self.device, self.vocabulary = model, model.device, config.vocab_size
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.writes = not type(inner).__name__.endswith("ForSequenceClassification")
        """whether it is a language model; a reward model reads only"""
        self.context: int = getattr(config, "max_position_embeddings", None) or 2048
        parameters = inspect.signature(inner.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._alone = (getattr(config, "rope_parameters", None) or {}).get("rope_type") in _DEPENDS
        self.adapters: Adapters | None = None
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        """before they were packed"""
        keep_freed_memory()  # a step's tensors come and go; handing their pages back and forth takes longer than they
        with torch.inference_mode(not keep):
            prepare(model, weights, keep)
        inner.config._attn_implementation = inner.config.get_text_config()._attn_implementation = paged.NAME
        if self.writes:
            self.kv = paged.KeyValues(self._shapes(), model.dtype, self.device)
            possible = available(model.dtype, self.device) and all(dim % 16 == 0 for _, dim in self.kv.shapes)
            self._step = (
                KernelStep if possible and (self.parameters > _LARGE if loops is None else loops) else paged.GroupedStep
            )
            self.restack()
            if self._stack is not None and not self._stack_agrees():
                self._stack = None

    @torch.inference_mode()
    def _shapes(self) -> list[tuple[int, int]]:
        """What each layer keeps of a token, seen by asking it."""
        probe = paged.Probe(self.device)
        with paged.during(probe):
            self._run([0, 0], probe.positions, torch.tensor([1], device=self.device))
        layers = self.model.config.get_text_config().num_hidden_layers
        if sorted(probe.shapes) != list(range(layers)):
            raise FledgeError(
                Problem(
                    t("the native engine cannot lead this model's attention"),
                    found=type(self.model).__name__,
                    fix=t("serve it with another engine (--engine)"),
                )
            )
        return [probe.shapes[layer] for layer in range(layers)]

    def restack(self) -> None:
        """See where the weights lie now."""
        self._stack = stack_of(self.model, self.kv) if self.writes and self._step is KernelStep else None

    @torch.inference_mode()
    def _stack_agrees(self) -> bool:
        """Whether the stack says what the model's modules say of a few tokens: it writes their formulas down again."""
        self.kv.allocate(1)
        probe = [Part([1 % self.vocabulary, 2 % self.vocabulary, 0], 0, [0], wanted=3)]
        found = self.run(probe)
        stack, self._stack = self._stack, None
        expected = self.run(probe)
        self._stack = stack
        self.kv.clear([0])
        error = ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()
        if error > (1e-4 if self.model.dtype == torch.float32 else 0.05):
            log.warning(
                "%s is computed layer by layer: as a whole it differs by %.2g", type(self.model).__name__, error
            )
            return False
        return True

    @property
    def bytes_per_block(self) -> int:
        """What `block_tokens` tokens take in all layers."""
        return self.kv.bytes_per_block

    def allocate(self, blocks: int) -> None:
        """Have at least `blocks` blocks."""
        self.kv.allocate(blocks)

    def copy(self, source: int, target: int) -> None:
        """Make block `target` like block `source`."""
        self.kv.copy(source, target)

    def clear(self, blocks: Sequence[int]) -> None:
        """Make blocks zero, so that what is no number in them does not spread to who gets them next."""
        self.kv.clear(blocks)

    def use(self, adapters: Adapters) -> None:
        """Let `adapters` add to the products of the steps."""
        self.adapters = adapters
        for module in self.model.modules():
            if isinstance(module, FusedLayer):
                module.adapters = adapters

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> Tensor:
        """Read the parts' tokens, write their keys and values, return the logits wanted: (sum of wanted, V) fp32.

        In the order of `parts`. One pass for all of them, whatever their lengths.
        """
        if self._alone and len(parts) > 1:
            return torch.cat([self.run([part]) for part in parts])
        order = paged.in_groups(parts)
        ids = [token for n in order for token in parts[n].ids]
        wanted = self._wanted(parts, order)
        if self._stack is not None and not any(part.adapter for part in parts):
            step = KernelStep([parts[n] for n in order], self.kv)
            return self._stack(torch.tensor(ids), step, torch.tensor(wanted, dtype=torch.int64))
        filler = _rounded(len(ids)) - len(ids)
        step = self._step([parts[n] for n in order], self.kv, filler)
        index = torch.tensor(wanted + [0] * (_rounded(len(wanted)) - len(wanted)), device=self.device)
        with paged.during(step):
            if self.adapters is None:
                logits = self._run(ids + [0] * filler, step.positions, index)
            else:
                picked = wanted if self._keeps_logits else None
                with self.adapters.rows([(parts[n].adapter, len(parts[n].ids)) for n in order], picked):
                    logits = self._run(ids + [0] * filler, step.positions, index)
        return logits[: len(wanted)].float()

    def _wanted(self, parts: Sequence[Part], order: Sequence[int]) -> list[int]:
        """Where in the step the tokens lie whose logits are wanted, in the order of `parts`."""
        ends, end = {}, 0
        for n in order:
            ends[n] = end = end + len(parts[n].ids)
        return [place for n, part in enumerate(parts) for place in range(ends[n] - part.wanted, ends[n])]

    def _run(self, ids: list[int], positions: Tensor, index: Tensor) -> Tensor:
        """The logits (len(index), V) of the tokens at `index`."""
        given: dict[str, Any] = {"input_ids": torch.tensor([ids], device=self.device), "use_cache": False}
        if self.takes_positions:
            given["position_ids"] = positions
        if self._keeps_logits:
            logits: Tensor = self.model(**given, logits_to_keep=index).logits[0]
            return logits
        return self.model(**given).logits[0][index]


def _rounded(count: int) -> int:
    """A number of rows whose products were most likely prepared before: at least two, from 16 on in steps of eight."""
    return max(count, 2) if count <= 16 else -(-count // 8) * 8

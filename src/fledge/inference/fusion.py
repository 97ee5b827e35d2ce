"""A model's modules made ready for the engine: the same weights and formulas in fewer, larger operations.

`prepare` changes a tree of modules in place:

- every linear layer is packed (`weights.py`);
- a LLaMA-like layer (LLaMA, Mistral, Qwen2, Qwen3) becomes a `FusedLayer`: query, key and value are one product, gate
  and up another, the rotation takes three operations, both sums with the residual happen inside a product. Each is
  compared with the layer that it replaces on random input and not used where it differs: a change in transformers
  cannot make serving differ from training in silence;
- BLOOM, which computes its attention itself, is led to the step's.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fledge.inference import program
from fledge.inference.formats import Weights
from fledge.inference.kernel_step import KernelStep
from fledge.inference.kernels import bits, of
from fledge.inference.loops import Op
from fledge.inference.paged import current
from fledge.inference.weights import PackedLinear, check, is_linear, pack

if TYPE_CHECKING:
    from fledge.inference.adapters import Adapters

log = logging.getLogger(__name__)

LLAMA_LIKE = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Layers of transformers with one shape: norm, attention with RoPE, residual, norm, gated MLP, residual."""


def prepare(model: Any, weights: Weights = "", keep: bool = False) -> None:
    """Make a causal language model's modules ready, in place, with `weights` in a format of `formats.py` (or in
    their own); `keep` what packed weights are made from. Raises FledgeError for a format that cannot be had there."""
    check(weights, model.device)
    linear = partial(pack, weights=weights, keep=keep)
    last = model.get_output_embeddings() or getattr(model, "score", None)  # a reward model's
    _fuse_layers(model, linear)
    # PEFT's layers look into their linears: those stay as they are.
    adapted = {id(part) for layer in model.modules() if hasattr(layer, "base_layer") for part in layer.modules()}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_linear(child) and id(child) not in adapted:
                setattr(parent, name, linear([child], last=child is last))
            elif type(child).__name__ == "BloomAttention":
                child.forward = partial(_bloom_attention, child, child.forward)


def _fuse_layers(model: nn.Module, linear: Any) -> int:
    """Replace LLaMA-like layers where all of a model's layers are; how many were."""
    for body in model.modules():
        layers, rotary = getattr(body, "layers", None), getattr(body, "rotary_emb", None)
        if not isinstance(layers, nn.ModuleList) or rotary is None or not len(layers):
            continue
        names = {id(layer): name for name, layer in model.named_modules()}
        if not all(_can_fuse(layer) for layer in layers) or not _agrees(layers[0], rotary, linear):
            continue
        for place, layer in enumerate(layers):
            layers[place] = FusedLayer(layer, linear, names[id(layer)])
        body.rotary_emb = Rotation(rotary)
        return len(layers)
    return 0


def _can_fuse(layer: nn.Module) -> bool:
    if type(layer).__name__ not in LLAMA_LIKE:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    parts = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return all(map(is_linear, [*parts, mlp.gate_proj, mlp.up_proj, mlp.down_proj]))


@torch.no_grad()
def _agrees(layer: nn.Module, rotary: nn.Module, linear: Any) -> bool:
    """Whether the fused layer says the same as the layer itself on random input (of whole texts, without a step)."""
    weight = layer.mlp.down_proj.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, weight.shape[0], generator=generator).to(weight)
    places = torch.arange(7, device=weight.device)[None]
    mask = torch.ones(7, 7, dtype=torch.bool, device=weight.device).tril()[None, None]
    fused = FusedLayer(layer, partial(PackedLinear, keep=False), "")
    expected = layer(hidden, attention_mask=mask, position_embeddings=rotary(hidden, position_ids=places))
    found = fused(hidden, attention_mask=mask, position_embeddings=Rotation(rotary)(hidden, position_ids=places))
    error = ((found - expected).float().norm() / (expected - hidden).float().norm().clamp(min=1e-12)).item()
    if error > (1e-4 if weight.dtype == torch.float32 else 0.05):
        log.warning("%s is computed unfused: fused it differs by %.2g", type(layer).__name__, error)
        return False
    return True


class Rotation(nn.Module):
    """A model's rotary embedding, ready for `FusedLayer`: cosines, and sines with the sign of the half they meet."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) twice."""
        cos, sin = self.inner(x, position_ids=position_ids)
        half = sin.shape[-1] // 2
        return cos.contiguous(), torch.cat((-sin[..., :half], sin[..., half:]), -1)


class FusedLayer(nn.Module):
    """A LLaMA-like layer over packed products."""

    def __init__(self, layer: Any, linear: Any, name: str) -> None:
        """`linear` makes a packed product of linear layers; `name` is the layer's in the model."""
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.name, self.layer_idx = name, attention.layer_idx
        self.dim, self.scale = attention.head_dim, attention.scaling
        self.heads = attention.q_proj.out_features // self.dim
        self.kv_heads = attention.k_proj.out_features // self.dim
        self.num_key_value_groups, self.is_causal = self.heads // self.kv_heads, True
        self.window = getattr(attention, "sliding_window", None)
        if type(layer).__name__ == "MistralDecoderLayer":
            self.window = getattr(attention.config, "sliding_window", None)
        self.qkv = linear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = linear([attention.o_proj])
        self.gate_up, self.down = linear([mlp.gate_proj, mlp.up_proj]), linear([mlp.down_proj])
        self.norm_in, self.norm_mid, self.act = layer.input_layernorm, layer.post_attention_layernorm, mlp.act_fn
        self.swish = type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        self.norm_q, self.norm_k = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.adapters: Adapters | None = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        """(B, T, hidden) → the same; in a step B is 1 and T are the tokens of all its sequences."""
        assert position_embeddings is not None
        step = current()
        x = normed(self.norm_in, hidden_states)
        mixed = self._adapted(self.qkv(x), x, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        if isinstance(step, KernelStep):
            mixed = self._with_norms(mixed)
            query = step.rotate_and_keep(self.layer_idx, mixed[0], *position_embeddings, self.heads)
            seen = step.attend_kept(self.layer_idx, query, self.scale, self.window, None, None)[None]
        else:
            seen = self._attend(self._with_norms(mixed), *position_embeddings, attention_mask)
        hidden_states = self._adapted(self.out(seen, hidden_states), seen, "self_attn.o_proj")
        x = normed(self.norm_mid, hidden_states)
        both = self._adapted(self.gate_up(x), x, "mlp.gate_proj", "mlp.up_proj")
        inner = self._gated(both)
        return self._adapted(self.down(inner, hidden_states), inner, "mlp.down_proj")

    def _with_norms(self, mixed: Tensor) -> Tensor:
        """Query and key of `mixed` (B, T, (H + 2 KV) · D) normed by head, where the family does that."""
        if self.norm_q is None:
            return mixed
        heads = mixed.view(*mixed.shape[:2], -1, self.dim)
        parts = heads.split((self.heads, self.kv_heads, self.kv_heads), 2)
        return torch.cat((normed(self.norm_q, parts[0]), normed(self.norm_k, parts[1]), parts[2]), 2).flatten(2)

    def _attend(self, mixed: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Positions into query and key (Su et al., RoFormer, 2021), then attention: (B, T, H · D)."""
        heads = mixed.view(*mixed.shape[:2], -1, self.dim)
        both, half = heads[:, :, : self.heads + self.kv_heads], self.dim // 2
        turned = torch.cat((both[..., half:], both[..., :half]), -1)
        both = torch.addcmul(both * cos[:, :, None], turned, sin[:, :, None])
        query, key = both[:, :, : self.heads].transpose(1, 2), both[:, :, self.heads :].transpose(1, 2)
        value = heads[:, :, -self.kv_heads :].transpose(1, 2)
        if (step := current()) is not None:
            return step.attend(self.layer_idx, query, key, value, self.scale, window=self.window)
        seen, _ = sdpa_attention_forward(self, query, key, value, mask, scaling=self.scale)
        return seen.reshape(*mixed.shape[:2], -1)

    def _gated(self, both: Tensor) -> Tensor:
        """act(gate) · up of both (…, 2 · inner)."""
        width = both.shape[-1] // 2
        if self.swish and fast(both):
            inner = both.new_empty(*both.shape[:-1], width)
            rows = inner.numel() // width
            program.run(both.dtype, 8 * inner.numel(), Op.GATE, of(both), of(inner), rows, width)
            return inner
        return self.act(both[..., :width]).mul_(both[..., width:])

    def _adapted(self, out: Tensor, x: Tensor, *names: str) -> Tensor:
        """`out` with what the step's adapters add to the linear layers of which it is the product, side by side."""
        if self.adapters is None or not self.adapters.active:
            return out
        flat = out.view(-1, out.shape[-1])
        self.adapters.add_product(flat, x.reshape(-1, x.shape[-1]), *(f"{self.name}.{name}" for name in names))
        return out


def fast(x: Tensor) -> bool:
    """Whether compiled loops are to be used for `x`: within a step that has them."""
    return isinstance(current(), KernelStep) and x.is_contiguous()


def normed(norm: Any, x: Tensor) -> Tensor:
    """A norm of transformers; RMS norms through PyTorch's, the same in fp32 and nearer to it in bf16."""
    if hasattr(norm, "variance_epsilon"):
        if fast(x):
            width = x.shape[-1]
            rows, found = x.numel() // width, torch.empty_like(x)
            given = [*map(of, (x, norm.weight, found)), rows, width, bits(norm.variance_epsilon)]
            program.run(x.dtype, 4 * x.numel(), Op.NORM, *given)
            return found
        return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
    found: Tensor = norm(x)
    return found


def _bloom_attention(
    module: Any, whole: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """BLOOM's attention: the step's while there is one, else its own (`whole`)."""
    step = current()
    if step is None:
        if attention_mask is None:  # left to PyTorch's attention, which BLOOM does not call
            length = hidden_states.shape[1]
            attention_mask = torch.ones(length, length, dtype=torch.bool, device=hidden_states.device).tril()[
                None, None
            ]
        if attention_mask.dtype == torch.bool:
            least = torch.finfo(hidden_states.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=hidden_states.dtype).masked_fill(
                ~attention_mask, least
            )
        found: tuple[Tensor, Tensor | None] = whole(hidden_states, residual, alibi, attention_mask, **more)
        return found
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    slopes = alibi[:, 0, 1] - alibi[:, 0, 0]  # its bias is the slope times the position
    seen = step.attend(module.layer_idx, query, key, value, module.inv_norm_factor, slopes=slopes)
    return module.dense(seen) + residual, None

"""A LoRA adapter in memory, and how it is read from a PEFT folder: y += s · (x Aᵀ) Bᵀ (Hu et al., 2021).

Only what a row of a shared batch can have for itself is read; everything else is refused with the reason.
"""

from __future__ import annotations

import filecmp
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.models.load import ADAPTER_CONFIG, base_of, is_adapter, load_tokenizer, require_safetensors
from fledge.records.chat import ChatRenderer

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.(?P<kind>weight|bias)")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_VARIANTS = (
    "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """The update of one linear layer: x ↦ s · (x Aᵀ + b), A (r, in), B (out, r), and, rarely, a bias b (out,) on B."""

    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in memory."""

    name: str
    parts: Mapping[str, LowRank]
    """by the name of the linear layer in the base"""
    key: str = ""
    """its name in the prefix cache: no adapter that was known before under the same name has the same one"""
    renderer: ChatRenderer | None = None
    """how the adapter writes chats, where its folder says"""

    @property
    def bytes(self) -> int:
        """What its matrices take."""
        return sum(part.a.nbytes + part.b.nbytes for part in self.parts.values())


@dataclass(frozen=True)
class Linear:
    """The sizes of a layer that an adapter may name, as it was before anything was packed or fused."""

    inputs: int
    outputs: int


def linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The names and sizes of all linear layers of a model: torch's, GPT-2's transposed ones, quantised ones."""
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield name, Linear(int(module.in_features), int(module.out_features))
        elif type(module).__name__ == "Conv1D":
            yield name, Linear(int(module.nx), int(module.nf))


def read_adapter(
    name: str, key: str, folder: Path, layers: Mapping[str, Linear], base: Path | None, like: Tensor, tokenizer: Any
) -> Adapter:
    """The adapter in a PEFT folder, in the format and on the device of `like`.

    `layers` are those of the model it is to stand on, `base` that model's folder and `tokenizer` its tokenizer, where
    they are known. Raises FledgeError for a folder that is no plain LoRA, and for an adapter of another base.
    """
    if not is_adapter(folder):
        raise FledgeError(Problem(t("this is not an adapter folder"), str(folder), allowed=ADAPTER_CONFIG))
    require_safetensors(folder, ADAPTER_CONFIG)
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    _require_plain(config, folder)
    _require_base(folder, config, base)
    return Adapter(name, _read(folder, config, layers, like), key, _renderer(folder, tokenizer))


def _require_plain(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse whatever a row of a shared batch cannot have for itself."""
    initial = str(config.get("init_lora_weights", True)).lower()
    reasons = {
        t("only LoRA adapters can be chosen by request"): config.get("peft_type") != "LORA",
        t("DoRA scales the base's whole weights, which the other rows of a batch share"): config.get("use_dora"),
        t("it brings whole layers of its own, which the other rows of a batch share"): config.get("modules_to_save"),
        t("it changes the base's biases, which the other rows of a batch share"): config.get("bias", "none") != "none",
        t("its initialisation changed the base's weights"): initial.startswith(_CHANGES_BASE),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    found += [t("{key} is not understood here", key=key) for key in _VARIANTS if config.get(key)]
    if found:
        raise FledgeError(*(_not_served(folder, reason) for reason in found))


def _not_served(folder: Path, reason: str, found: str = "") -> Problem:
    return Problem(
        reason, str(folder), found=found, fix=t("merge it into its base with the stage model.merge, and serve that")
    )


def _require_base(folder: Path, config: Mapping[str, Any], base: Path | None) -> None:
    """Refuse an adapter that was trained on other weights than ours, as far as that can be seen from its folder."""
    if base is None or not config.get("base_model_name_or_path"):
        return
    try:
        theirs = base_of(folder)
    except FledgeError:  # its base is not on this machine: the shapes decide
        return
    ours = base_of(base) if is_adapter(base) else base.resolve()
    if theirs != ours and not _same_weights(theirs, ours):
        raise FledgeError(
            Problem(
                t("this adapter is of another base"),
                str(folder),
                found=str(theirs),
                allowed=str(ours),
                fix=t("serve it with its own base, or name an adapter that was trained on this one"),
            )
        )


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, byte for byte."""
    names = [sorted(file.name for file in folder.glob("*.safetensors")) for folder in (one, other)]
    return (
        names[0] == names[1]
        and all((one / name).stat().st_size == (other / name).stat().st_size for name in names[0])
        and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])
    )


def _read(folder: Path, config: Mapping[str, Any], layers: Mapping[str, Linear], like: Tensor) -> dict[str, LowRank]:
    """The matrices of a PEFT folder by layer, their shapes seen to fit the base's."""
    from safetensors.torch import load_file

    sides: dict[str, dict[tuple[str, str], Tensor]] = {}
    strange: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            if match := _KEY.fullmatch(key):
                sides.setdefault(match["module"], {})[match["side"], match["kind"]] = tensor.to(like)
            else:
                strange.append(key)
    if strange or not sides:
        reason = t("it holds weights that are no low-rank update of a linear layer")
        raise FledgeError(_not_served(folder, reason, listing(sorted(strange), 3)))
    broken = [name for name, found in sorted(sides.items()) if not all(map(_is_finite, found.values()))]
    if broken:
        raise FledgeError(Problem(t("it holds weights that are no numbers (NaN or infinity)"), str(folder), broken[0]))
    misfits = [text for name, found in sorted(sides.items()) if (text := _misfit(name, found, layers.get(name)))]
    if misfits:
        raise FledgeError(
            Problem(
                t("this adapter is of another base"),
                str(folder),
                found=listing(misfits, 3),
                fix=t("serve it with its own base, or name an adapter that was trained on this one"),
            )
        )
    return {name: _low_rank(name, found, config) for name, found in sides.items()}


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _misfit(name: str, found: Mapping[tuple[str, str], Tensor], layer: Linear | None) -> str:
    """What is wrong with an update of the layer `name`, or nothing."""
    if layer is None:
        return t("there is no linear layer {name}", name=name)
    a, b = found.get(("A", "weight")), found.get(("B", "weight"))
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        return t("{name} is incomplete", name=name)
    if (a.shape[1], b.shape[0]) != (layer.inputs, layer.outputs):
        return f"{name}: {a.shape[1]} → {b.shape[0]}, {layer.inputs} → {layer.outputs}"
    return ""


def _low_rank(name: str, found: Mapping[tuple[str, str], Tensor], config: Mapping[str, Any]) -> LowRank:
    from peft.utils.other import get_pattern_key

    a, b = found["A", "weight"], found["B", "weight"]
    rank, alphas = a.shape[0], config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"])
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return LowRank(a, b, scale, found.get(("B", "bias")))


def _renderer(folder: Path, tokenizer: Any) -> ChatRenderer | None:
    """How the adapter writes chats. Raises FledgeError when its tokenizer numbers its tokens otherwise than ours."""
    if tokenizer is None or not (folder / "tokenizer.json").is_file():
        return None
    theirs = load_tokenizer(folder)
    ours = tokenizer.get_vocab()
    if any(ours.get(token, id) != id for token, id in theirs.get_vocab().items()):
        raise FledgeError(
            Problem(
                t("this adapter is of another base"),
                str(folder / "tokenizer.json"),
                found=t("a tokenizer with other token ids"),
                fix=t("serve it with its own base, or name an adapter that was trained on this one"),
            )
        )
    return ChatRenderer(theirs) if theirs.chat_template else None

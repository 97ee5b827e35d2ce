"""A model from scratch: a transformers config made from a shape, and seeded weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.models.architecture import Architecture
from fledge.models.dropout import keys_for

Head = Literal["lm", "generator", "discriminator", "sequence", "tokens"]


def make_config(shape: Architecture, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """The transformers config of `shape`; the special tokens' ids come from the tokenizer."""
    family = shape.about
    ids: dict[str, Any] = {
        name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if shape.decoder_layers:  # what the decoder begins with: BART's </s>, T5's padding
        pad = 0 if ids["pad_token_id"] is None else ids["pad_token_id"]
        end = pad if ids["eos_token_id"] is None else ids["eos_token_id"]
        ids |= {"pad_token_id": pad, "decoder_start_token_id": end if shape.family == "bart" else pad}
        if shape.family == "bart":
            ids["forced_eos_token_id"] = ids["eos_token_id"]
    if shape.family == "roberta":
        ids["pad_token_id"] = shape.pad_id
    if shape.family == "xglm":  # its class would set the position of that number to zero
        ids["pad_token_id"] = None
    keys = {"vocab_size": shape.vocab_size, **family.keys(shape), **ids, **keys_for(shape.family, shape.dropout)}
    config = getattr(transformers, family.config)(**keys)
    return cast(PreTrainedConfig, config)


def build_model(
    shape: Architecture,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
    head: Head = "lm",
    labels: int = 2,
) -> PreTrainedModel:
    """A fresh fp32 model of `shape`: the same seed gives the same weights, and nobody else's random state moves.

    With `head="lm"`, what its family is trained with: a language-model head (causal, masked, or a decoder's), and
    ELECTRA's discriminator or generator as the shape says. `sequence` and `tokens` classify into `labels` classes.

    Matrices are as transformers starts them (in most families normal with deviation 0.02); in pre-norm decoders
    those that write into the residual stream are scaled by 1/√(2 · layers) (Radford et al., 2019), so that its
    variance does not grow with depth.
    """
    if shape.family == "roberta" and tokenizer is not None and tokenizer.pad_token_id is not None:
        shape = replace(shape, pad_id=int(tokenizer.pad_token_id))
    config = make_config(shape, tokenizer)
    if head in ("sequence", "tokens"):
        config.num_labels = labels
    wanted = model_class(shape, config, head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = wanted(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(shape.about.residual or ("\0",)):
                weight.mul_((2 * shape.layers) ** -0.5)
    return cast(PreTrainedModel, model.to(device))


def model_class(shape: Architecture, config: PreTrainedConfig, head: Head) -> Any:
    """The class of transformers for a shape with a head on top."""
    if head == "sequence" or head == "tokens":
        auto = (
            transformers.AutoModelForSequenceClassification
            if head == "sequence"
            else transformers.AutoModelForTokenClassification
        )
        found = auto._model_mapping.get(type(config), None)
        if found is None:
            raise FledgeError(Problem(t("there is no such head for this family"), found=f"{head}: {shape.family}"))
        return found
    wanted = shape.head if head == "lm" else head
    if wanted == "generator":
        return transformers.ElectraForMaskedLM
    return getattr(transformers, shape.about.model)

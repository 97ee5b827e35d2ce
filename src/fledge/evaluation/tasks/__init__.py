"""What a model may be asked. Each task is a page: a light config, how it asks, how it concludes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fledge.evaluation.tasks.answer_loss import AnswerLoss
from fledge.evaluation.tasks.answer_match import AnswerMatch
from fledge.evaluation.tasks.bits_per_byte import BitsPerByte
from fledge.evaluation.tasks.choice import ChoiceTask
from fledge.evaluation.tasks.preference_accuracy import PreferenceAccuracy
from fledge.evaluation.tasks.samples import Samples

AnyTask = Annotated[
    AnswerLoss | AnswerMatch | BitsPerByte | ChoiceTask | PreferenceAccuracy | Samples, Field(discriminator="task")
]
"""Any of the tasks, told apart by its key `task`."""

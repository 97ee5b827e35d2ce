"""OpenVINO GenAI on a model folder: its continuous batching with paged attention, on token ids of our own tokenizer.

    engine = OpenVinoEngine("model/", dtype="bfloat16")

The folder is converted once (`openvino_graph.py`). Sampling is GenAI's: the same seed gives the same answer again, but
not the native engine's. It shows no probabilities of its own, so there are no log-probabilities, scores or constraints
here; greedy answers in fp32 are the native engine's. (It takes `min_p` and does nothing with it, so that is refused.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fledge.core.errors import need
from fledge.inference.answer import Answer
from fledge.inference.engine import Request
from fledge.inference.engines.in_process import InProcessEngine
from fledge.inference.engines.process import Tell, progress

_REFUSED = (
    ("logprobs", None), ("prompt_logprobs", None), ("logit_bias", {}), ("best_of", None), ("beams", 1), ("adapter", ""),
    ("constraint", None), ("min_p", 0.0),
)  # fmt: skip
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoEngine(InProcessEngine):
    """An `Engine` over GenAI's `ContinuousBatchingPipeline`."""

    most = 256
    instead = ("native", "onnx")

    def __init__(
        self,
        folder: Path | str,
        *,
        device: str = "CPU",
        dtype: str = "float32",
        cache_gib: int = 1,
        prefill_tokens: int = 512,
        tell: Tell = progress,
    ) -> None:
        """`device`: OpenVINO's name of one; `dtype`: "float32" or "bfloat16"; `cache_gib`: for keys and values;
        `prefill_tokens`: read in one step. Raises FledgeError for what cannot be converted."""
        library: Any = need("openvino_genai", "openvino", "openvino-genai")
        from fledge.inference.engines.openvino_graph import pipeline_of

        place, shape = pipeline_of(Path(folder), tell)
        super().__init__("openvino", Path(folder), shape.context, shape.vocabulary)
        self._library, precision = library, _PRECISIONS[dtype]
        schedule = library.SchedulerConfig()
        schedule.cache_size, schedule.max_num_batched_tokens = cache_gib, prefill_tokens
        options = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
        self._pipeline = library.ContinuousBatchingPipeline(str(place), schedule, device, options)
        self._handles: dict[Answer, Any] = {}
        self._count = 0

    def refused(self, request: Request) -> list[str]:
        return [field for field, neutral in _REFUSED if getattr(request, field) != neutral]

    def _advance(self, news: list[Answer]) -> None:
        for answer in news:
            self._begin(answer)
        for answer, handle in self._handles.items():
            if answer.finished:
                handle.cancel()
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        for answer, handle in self._handles.items():
            self._read(answer, handle)
        self._clear()

    def _clear(self) -> None:
        self._handles = {answer: handle for answer, handle in self._handles.items() if not self._left(answer, handle)}
        self._running = list(self._handles)

    def _begin(self, answer: Answer) -> None:
        import openvino

        ticket = answer.ticket
        self._count += 1
        ids = openvino.Tensor(np.array([ticket.prompt_ids], np.int64))
        config = self._config(ticket.request, answer.index, ticket.limit)
        self._handles[answer] = self._pipeline.add_request(self._count, ids, config)

    def _config(self, request: Request, index: int, limit: int) -> Any:
        """GenAI's settings; what ends an answer is decided here, not there."""
        config = self._library.GenerationConfig()
        config.ignore_eos, config.max_new_tokens = True, limit
        config.set_eos_token_id(self._vocabulary)  # it wants one: this id no model writes
        config.do_sample = request.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p = request.temperature, request.top_p
            if request.top_k:
                config.top_k = request.top_k
            seed = (
                np.random.SeedSequence()
                if request.seed is None
                else np.random.SeedSequence([request.seed % 2**64, index])
            )
            config.rng_seed = int(seed.generate_state(1)[0])
        config.repetition_penalty = request.repetition_penalty
        config.presence_penalty, config.frequency_penalty = request.presence_penalty, request.frequency_penalty
        return config

    def _read(self, answer: Answer, handle: Any) -> None:
        while handle.can_read():
            for output in handle.read().values():
                for token in output.generated_ids:
                    if not answer.finished:
                        answer.take(int(token), None)
        if answer.finished:
            handle.cancel()

    def _left(self, answer: Answer, handle: Any) -> bool:
        """Whether GenAI has let go of it, too."""
        return answer.finished and handle.get_status() != self._library.GenerationStatus.RUNNING

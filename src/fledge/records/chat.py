"""Chats into token ids and loss weights: one renderer for training, evaluation and serving.

    renderer = ChatRenderer.from_folder("model/")
    renderer.render(messages).ids, .weights             # to learn from
    renderer.render(messages, add_generation_prompt=True).ids     # to answer

The template is the model folder's `chat_template.jinja`, used verbatim, in transformers' own Jinja environment.
Three promises:

1. The ids are `apply_chat_template`'s wherever no content spells a control token.
2. A content that spells a control token is encoded as the text it is, never as the token (see `records.control`).
3. The ids of `messages[:-1]` with the generation prompt are a prefix of those of `messages`: what a model is served
   is what it was trained on. Where an answer's first characters would fuse with the end of its header into one token
   (an answer that starts with white space, under a template that does not trim), 3 goes before 1.

Weights are 1 on an assistant's content and on the token that ends its turn, else 0. They come from the template's
`{% generation %}` blocks where it has them; otherwise an answer is what `messages[:i + 1]` renders to after what
`messages[:i]` and the generation prompt do. A template that breaks this, or never ends a turn, is refused.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.records.control import ControlTokens, Segment
from fledge.records.kinds import Message, Preference

_JINJA = threading.Lock()  # transformers keeps one compiled template a process, and it notes spans on itself
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """Token ids and, for each of them, its weight in the loss (1.0 or 0.0)."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class RenderedPair:
    """A prompt and two answers to it, as token ids; both answers end with the end-of-turn token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def default_template() -> str:
    """The text of our ChatML template."""
    return (Path(__file__).parent / "templates" / "chatml.jinja").read_text(encoding="utf-8")


class ChatRenderer:
    """One model folder's way of writing chats.

    `tokenizer` is a fast tokenizer of transformers, `template` the text of a Jinja template (the tokenizer's own by
    default). `stop_ids` are the tokens that end an answer: the template's end of turn, then the tokenizer's eos.
    Raises FledgeError where there is no template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: str = template or _template_of(tokenizer)
        self._tags = bool(_GENERATION.search(self.template))
        self._control = ControlTokens(tokenizer, self.template)
        eos = getattr(tokenizer, "eos_token", None)
        self._ends = list(dict.fromkeys(text for text in (self._end_of_turn(), eos) if text in self._control.ids))
        self.stop_ids: list[int] = [self._control.ids[text] for text in self._ends]

    @classmethod
    def from_folder(cls, path: Path | str) -> ChatRenderer:
        """The renderer of a model's, adapter's or tokenizer's folder."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(path), local_files_only=True))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """Ids and weights of a conversation. With the generation prompt it is a prompt, and all weights are 0.

        Raises FledgeError where the template refuses the conversation, or where answers cannot be told from it.
        """
        chat = [self._control.escape(message) for message in messages]
        try:
            text, spans = self._text(chat, add_generation_prompt)
        except _NoSpans:
            if not add_generation_prompt:
                raise
            text, spans = self._jinja(chat, True)[0], []
        if not add_generation_prompt:
            spans = [(start, self._end(text, start, end)) for start, end in spans]
        segments, at = [], 0
        for start, end in spans:
            segments += [Segment(text[at:start]), Segment(text[start:end], weight=1.0)]
            at = end
        ids, weights = self._control.encode([*segments, Segment(text[at:])])
        return Rendered(ids, [0.0] * len(ids) if add_generation_prompt else weights)

    def render_answers(self, prompt: Sequence[Message], answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """A prompt and several answers to it as ids: prompt + answer is what `render` gives for the whole conversation,
        up to the token that ends the turn."""
        head = self.render(prompt, add_generation_prompt=True).ids
        tails = []
        for answer in answers:
            whole = self.render([*prompt, Message("assistant", answer)])
            if whole.ids[: len(head)] != head:
                raise self._refusal(t("what it writes to ask for an answer is not how it writes one"))
            last = max(i for i, weight in enumerate(whole.weights) if weight)
            tails.append(whole.ids[len(head) : last + 1])
        return head, tails

    def render_pair(self, preference: Preference) -> RenderedPair:
        """The best against the worst answer of a preference, with the very same prompt ids before both."""
        ranked = sorted(preference.answers, key=lambda answer: answer.rank)
        prompt, (chosen, rejected) = self.render_answers(preference.prompt, [ranked[0].content, ranked[-1].content])
        return RenderedPair(prompt, chosen, rejected)

    def _text(self, chat: list[dict[str, Any]], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and where in it the answers stand, as the template has it."""
        whole, spans = self._jinja(chat, prompt)
        if self._tags:
            return whole, spans
        for i, message in enumerate(chat):
            if message["role"] == "assistant":
                head, through = self._part(chat[:i], True), self._part(chat[: i + 1], False)
                if not (through.startswith(head) and whole.startswith(through)):
                    raise self._refusal(t("what it writes to ask for an answer is not how it writes one"))
                spans.append((len(head), len(through)))
        return whole, spans

    def _part(self, chat: list[dict[str, Any]], prompt: bool) -> str:
        try:
            return self._jinja(chat, prompt)[0]
        except FledgeError as error:
            raise _NoSpans(*error.problems) from None

    def _end(self, text: str, start: int, end: int) -> int:
        """Where an answer's span ends: behind the token that ends the turn, be it in the span or right after it."""
        inside = [match.end() for match in self._control.written(text[start:end]) if match[0] in self._ends]
        if inside:
            return start + inside[-1]
        rest = text[end:]
        space = len(rest) - len(rest.lstrip())
        for ending in self._ends:
            if rest.startswith(ending, space):
                return end + space + len(ending)
        raise self._refusal(t("it ends no turn with a token, so a model trained with it would never stop"))

    def _end_of_turn(self) -> str | None:
        """The control token that the template writes at the end of an answer, found by asking it to write one."""
        try:
            text, spans = self._text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], False)
        except FledgeError:
            return None
        start, end = spans[-1] if spans else (len(text), len(text))
        inside, after = self._control.written(text[start:end]), self._control.written(text[end:])
        return inside[-1][0] if inside else after[0][0] if after else None

    def _jinja(self, chat: list[dict[str, Any]], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """What transformers renders, and the spans of the template's generation blocks."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        names = getattr(self.tokenizer, "special_tokens_map", {})
        try:
            with _JINJA:
                texts, spans = render_jinja_template(
                    conversations=[chat],
                    chat_template=self.template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self._tags,
                    **names,
                )
        except (TemplateError, TypeError, ValueError) as error:
            problem = Problem(t("the chat template refuses this conversation"), found=str(error)[:200])
            raise FledgeError(problem) from None
        return texts[0], list(spans[0]) if self._tags else []

    def _refusal(self, reason: str) -> _NoSpans:
        return _NoSpans(
            Problem(
                t("answers cannot be learned through this chat template: {reason}", reason=reason),
                fix=t("put the answer and its end into a generation block in chat_template.jinja"),
            )
        )


class _NoSpans(FledgeError):
    """The template does not show where answers stand."""


def _template_of(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise FledgeError(
            Problem(
                t("{path} has no chat template", path=getattr(tokenizer, "name_or_path", "") or "the tokenizer"),
                fix=t("fine-tune the model first, or put a chat_template.jinja into its folder"),
            )
        )
    return str(template)

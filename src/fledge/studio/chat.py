"""The chat page at `/`: a model answers in the browser, in English or 简体中文.

    app = create_app({"hatch": engine})
    mount(app)

It asks through the same `Service` as the API does, and leaves HTML, sockets and assets to NiceGUI (its public API
only; everything comes from its wheel, nothing from the network). What the browser alone can do stands in `page.js`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from nicegui import ui
from nicegui.element import Element

from fledge.core.errors import FledgeError
from fledge.core.language import t
from fledge.inference import engine as inference
from fledge.inference.history import fitted
from fledge.records.kinds import Message
from fledge.serving.service import Service
from fledge.studio.icons import favicon, icon
from fledge.studio.markdown import render

log = logging.getLogger(__name__)

_FRAME = 0.06
"""seconds between two updates of a growing answer"""

_HTML_LANGUAGE = {"en": "en", "zh": "zh-CN"}
_mounted: list[Service] = []


def mount(app: FastAPI) -> None:
    """Put the chat page at `/` of an application that `serving.create_app` made. The last one mounted is shown:
    NiceGUI has one set of pages a process."""
    if not _mounted:

        @ui.page("/")
        def chat(request: Request) -> None:
            ChatPage(_mounted[-1], _language(request), _dark(request)).build()

    _mounted.append(app.state.service)
    ui.run_with(
        app, title="fledge", favicon=favicon(), dark=None, tailwind=False, reconnect_timeout=120,
        show_welcome_message=False,
    )  # fmt: skip


def _language(request: Request) -> str:
    """The language chosen in this browser before, else the one that the browser prefers."""
    chosen = request.cookies.get("fledge_language", "")
    return "zh" if (chosen or request.headers.get("accept-language", "")).lower().startswith("zh") else "en"


def _dark(request: Request) -> bool | None:
    """Dark, light, or as the system has it."""
    return {"dark": True, "light": False}.get(request.cookies.get("fledge_theme", ""))


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@dataclass(eq=False)
class Turn:
    """One message on the page."""

    role: Literal["user", "assistant"]
    text: str = ""
    state: Literal["writing", "whole", "stopped", "cut", "failed"] = "whole"
    error: str = ""
    left_out: int = 0
    """messages that the model was not shown, because they no longer fit"""


class ChatPage:
    """One browser tab: its conversation, its settings, and the answer that is being written."""

    def __init__(self, service: Service, lang: str, dark: bool | None) -> None:
        self.service, self.lang = service, lang
        self.model = next(iter(service.engines))
        self.temperature, self.max_tokens = 0.7, 512
        self.turns: list[Turn] = []
        self.writing: asyncio.Task[None] | None = None
        self.dark = ui.dark_mode(dark)
        self.answer_html: ui.html | None = None  # where the answer grows

    # ---- what is on the page

    def build(self) -> None:
        """Lay the page out once; `show` fills it."""
        ui.add_css(_asset("page.css"))
        ui.add_head_html(f"<script>{_asset('page.js')}</script>")
        with ui.element("div").classes("fl-app"):
            self.bar = ui.element("header").classes("fl-bar")
            with ui.element("main").classes("fl-scroll"):
                self.column = ui.element("div").classes("fl-column").props("role=log aria-live=polite")
            with ui.element("footer").classes("fl-foot"):
                with ui.element("div").classes("fl-box"):
                    self.input = ui.element("textarea").classes("fl-input").props("rows=1")
                    self.input.on("keydown", lambda e: self.send(e.args), js_handler="(e) => fledge.keydown(e, emit)")
                    self.button = ui.element("button").classes("fl-send")
                    self.button.on("click", lambda e: self.press(e.args), js_handler="() => emit(fledge.input().value)")
                self.hint = ui.element("div").classes("fl-hint")
        ui.context.client.on_delete(self.stop)
        self.show()
        ui.run_javascript("fledge.watch()")

    def show(self) -> None:
        """Everything that is written on the page, in the language in force."""
        lang = self.lang
        self._show_bar()
        self._show_turns()
        self._show_button()
        for prop in ("placeholder", "aria-label"):
            self.input.props[prop] = t("Write a message", lang)
        self.hint.clear()
        with self.hint:
            ui.label(t("Enter sends, Shift+Enter begins a new line. Check what matters: models make mistakes.", lang))
        ui.run_javascript(f"fledge.speak({json.dumps(_HTML_LANGUAGE[lang])}, {json.dumps(f'{self.model} · fledge')})")

    def _show_bar(self) -> None:
        lang = self.lang
        other = "English" if lang == "zh" else "中文"
        self.bar.clear()
        with self.bar:
            with ui.element("div").classes("fl-mark"):
                _icon("feather")
                ui.label("fledge").classes("fl-wide")
            self._show_models()
            ui.element("div").classes("fl-space")
            _tool(other, other, on_click=self.switch_language)
            _tool("", t("Light or dark", lang), "moon", self.switch_theme)
            with _tool("", t("Settings", lang), "sliders"), ui.menu().classes("fl-panel") as menu:
                menu.props("anchor='bottom right' self='top right' :offset='[0, 8]'")
                self._show_settings()
            _tool(t("New chat", lang), t("New chat", lang), "new", self.new_chat, wide=True)

    def _show_models(self) -> None:
        names = list(self.service.engines)
        if len(names) == 1:
            ui.label(self.model).classes("fl-model").props(f"title={json.dumps(self.model)}")
            return
        with ui.element("select").classes("fl-model") as picker:
            for name in names:
                option = _html(escape(name), "option")
                option.props["value"] = name
                option.props["selected"] = name == self.model
        picker.props["aria-label"] = t("Model", self.lang)
        picker.on("change", lambda e: self.pick_model(e.args), js_handler="(e) => emit(e.target.value)")

    def _show_settings(self) -> None:
        lang = self.lang

        def temperature(value: float) -> None:
            self.temperature = value

        def max_tokens(value: float) -> None:
            self.max_tokens = int(value)

        _slider(
            t("Temperature", lang), t("Low: the likeliest words. High: more varied ones.", lang),
            self.temperature, (0, 1.5, 0.05), "{:.2f}", temperature,
        )  # fmt: skip
        _slider(
            t("Longest answer", lang), t("In tokens; a token is a word or a part of one.", lang),
            self.max_tokens, (32, 2048, 32), "{:.0f}", max_tokens,
        )  # fmt: skip

    def _show_turns(self) -> None:
        self.column.clear()
        self.answer_html = None
        with self.column:
            if not self.turns:
                self._show_empty()
            for turn in self.turns:
                if turn.role == "user":
                    ui.label(turn.text).classes("fl-user")
                else:
                    self._show_answer(turn)

    def _show_empty(self) -> None:
        lang = self.lang
        examples = [
            t("Hello! Who are you?", lang),
            t("What do you do on a rainy day?", lang),
            t("Explain the idiom “to draw a snake and add feet”.", lang),
            t("Tell me a short story about the sea.", lang),
        ]
        with ui.element("div").classes("fl-empty"):
            with ui.element("div").classes("fl-hello"):
                ui.label(t("What shall we talk about?", lang))
                _html(
                    escape(t("{model} runs on this machine. What you write stays here.", lang, model=self.model)),
                    "small",
                )
            with ui.element("div").classes("fl-examples"):
                for example in examples:
                    with ui.element("button").classes("fl-example").on("click", lambda text=example: self.send(text)):
                        ui.label(example)

    def _show_answer(self, turn: Turn) -> None:
        lang, writing = self.lang, turn.state == "writing"
        with ui.element("div").classes("fl-turn" + (" fl-writing" if writing else "")):
            if turn.left_out:
                ui.label(t("The earliest messages no longer fit and are left out.", lang)).classes("fl-note")
            if turn.text.strip() or writing:
                answer = ui.html(render(turn.text), sanitize=True).classes("fl-answer")
                self.answer_html = answer if writing else None
            elif turn.state != "failed":
                ui.label(t("(an empty answer)", lang)).classes("fl-note")
            if turn.state == "failed":
                ui.label(turn.error).classes("fl-alarm").props("role=alert")
            if turn.state == "stopped":
                ui.label(t("(stopped)", lang)).classes("fl-note")
            if turn.state == "cut":
                ui.label(t("The answer reached its longest length.", lang)).classes("fl-note")
            if not writing:
                with ui.element("div").classes("fl-under"):
                    if turn.text.strip():
                        self._show_copy(turn.text)
                    if turn is self.turns[-1]:
                        _tool(t("Try again", lang), t("Try again", lang), "again", self.regenerate)

    def _show_copy(self, text: str) -> None:
        done = json.dumps(t("Copied", self.lang))
        tool = _tool(t("Copy", self.lang), t("Copy", self.lang), "copy")
        tool.on("click", js_handler=f"(e) => fledge.copy({json.dumps(text)}, e.currentTarget, {done})")

    def _show_button(self) -> None:
        label = t("Stop", self.lang) if self.writing else t("Send", self.lang)
        self.button.props["aria-label"] = self.button.props["title"] = label
        self.button.clear()
        with self.button:
            _icon("stop" if self.writing else "send")

    # ---- what a person does

    def send(self, text: str) -> None:
        """Say `text`, unless an answer is being written: then it stays where it was typed."""
        if text.strip() and self.writing is None:
            ui.run_javascript("fledge.clear()")
            self.turns.append(Turn("user", text.strip()))
            self._answer()

    def press(self, text: str) -> None:
        """The round button: stops while an answer is written, else sends."""
        if self.writing:
            self.stop()
        else:
            self.send(text)

    def regenerate(self) -> None:
        """Write the last answer anew."""
        if self.writing is None and self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()
            self._answer()

    def stop(self) -> None:
        """End the answer that is being written; what there is of it stays."""
        if self.writing:
            self.writing.cancel()

    def new_chat(self) -> None:
        """Begin anew."""
        self.stop()
        self.turns = []
        self._show_turns()
        ui.run_javascript("fledge.clear()")

    def pick_model(self, name: str) -> None:
        """Let another model answer from now on."""
        self.model = name
        self.show()

    async def switch_language(self) -> None:
        """English ↔ 简体中文, remembered in this browser."""
        self.lang = "en" if self.lang == "zh" else "zh"
        await ui.run_javascript(f"fledge.remember('fledge_language', '{self.lang}')")
        self.show()

    async def switch_theme(self) -> None:
        """Light ↔ dark, remembered in this browser."""
        dark = await ui.run_javascript("document.body.classList.contains('body--dark')")
        # remembered before it is seen: whoever reloads on seeing it finds it again
        await ui.run_javascript(f"fledge.remember('fledge_theme', '{'light' if dark else 'dark'}')")
        self.dark.value = not dark

    # ---- the answer

    def _answer(self) -> None:
        turn = Turn("assistant", state="writing")
        self.turns.append(turn)
        self.writing = asyncio.create_task(self._write(turn, self.turns))
        self._show_turns()
        self._show_button()

    async def _write(self, turn: Turn, turns: list[Turn]) -> None:
        """Ask the model and let the answer grow. However it ends, the page is usable again."""
        try:
            await self._stream(turn, turns)
        except asyncio.CancelledError:
            turn.state = "stopped"
        except inference.PromptTooLong:
            turn.state, turn.error = "failed", t("This message is too long for the model.", self.lang)
        except FledgeError as error:
            turn.state, turn.error = "failed", str(error)
        except Exception:  # nobody waits for this task: unseen, the page would say for ever that it is writing
            log.exception("an answer failed")
            turn.state, turn.error = "failed", t("Something went wrong; the server's log says what.", self.lang)
        self.writing = None
        if not self.column.is_deleted:
            with self.column:
                self._show_turns()
                self._show_button()

    async def _stream(self, turn: Turn, turns: list[Turn]) -> None:
        said = [message for message in turns[:-1] if message.text.strip()]
        messages = tuple(Message(message.role, message.text) for message in said)
        request = inference.Request(
            messages=messages, temperature=self.temperature, top_p=0.95, max_new_tokens=self.max_tokens
        )
        name, engine = self.service.engine(self.model)
        request, turn.left_out = fitted(engine, request)
        clock = asyncio.get_running_loop().time
        shown = 0.0
        async with self.service.answer(name, request) as answers:
            async for delta in answers:
                turn.text += delta.text
                if delta.finish_reason:
                    turn.state = "cut" if delta.finish_reason == "length" else "whole"
                elif clock() - shown > _FRAME and self.answer_html is not None:
                    shown = clock()
                    self.answer_html.set_content(render(turn.text))


def _html(content: str, tag: str = "span") -> ui.html:
    """Our own HTML: what comes from elsewhere must have been escaped."""
    return ui.html(content, sanitize=False, tag=tag)


def _icon(name: str) -> ui.html:
    return _html(icon(name)).classes("fl-icon")


def _tool(
    text: str, label: str, picture: str = "", on_click: Callable[[], Any] | None = None, wide: bool = False
) -> Element:
    """A quiet button: a picture, a word, or both; `wide` words are left out on a phone."""
    button = ui.element("button").classes("fl-tool")
    button.props["aria-label"] = button.props["title"] = label
    if on_click is not None:
        button.on("click", on_click, args=[])
    with button:
        if picture:
            _icon(picture)
        if text:
            _html(escape(text)).classes("fl-wide" if wide else "")
    return button


def _slider(
    name: str, help: str, value: float, range: tuple[float, float, float], form: str, change: Callable[[float], None]
) -> None:
    """A named slider from, to, step; `change` hears the new value."""
    with ui.element("label").classes("fl-field"):
        with ui.element("div").classes("fl-field-head"):
            ui.label(name)
            shown = _html(form.format(value))
        low, high, step = range
        slider = ui.element("input").props(f"type=range min={low} max={high} step={step} value={value}")
        _html(escape(help), "small")

    def moved(to: str) -> None:
        change(float(to))
        shown.set_content(form.format(float(to)))

    slider.on("input", lambda e: moved(e.args), js_handler="(e) => emit(e.target.value)")

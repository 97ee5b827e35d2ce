"""ReAct: thought, action, observation, until the model says that it has finished."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from pydantic import Field

from fledge.inference.prompting.answers import Kind, extract
from fledge.inference.prompting.base import Technique
from fledge.inference.prompting.numerals import plain
from fledge.inference.prompting.program import Program
from fledge.inference.prompting.reasoning import ANSWER
from fledge.inference.prompting.talk import Question, Solution, Step, Talk
from fledge.inference.prompting.tools import ToolError, tool_of
from fledge.inference.prompting.wordings import say
from fledge.records.kinds import Message

_ACTION = re.compile(
    r"(?:^|\n)[ \t*]*(?:action|行动|动作)[ \t*]*\d*[ \t*]*[:：][ \t*`]*([^\W\d][\w-]*)[ \t]*([\[【(（])", re.IGNORECASE
)
_CLOSING = {"[": "]", "【": "】", "(": ")", "（": "）"}
_FINISH = {"finish", "完成", "结束"}
_STOPS = ("\nObservation:", "\n观察：", "\n观察:")


class ReAct(Technique):
    """Reasoning and acting by turns (Yao et al., 2023).

    The model writes a thought and an action, `tool[input]`; the tool's observation is its next turn. A tool's error, an
    unknown tool and a missing action are observations, too: the model may do better. `calculator` and `python` (in a
    sandbox) are built in; `search` needs a retriever, which the run is given. After `steps` actions without `finish` it
    is asked for the answer.
    """

    use: Literal["react"] = Field("react", description="thought, action and observation by turns")
    tools: list[str] = Field(["calculator"], description="the tools by name: calculator, python, search, or your own")
    steps: int = Field(6, ge=1, le=50, description="actions at most")
    answer: Kind = ANSWER

    def needs(self) -> frozenset[str]:
        return frozenset(self.tools)

    def calls(self) -> float:
        return self.steps / 2 + 1

    def program(self, question: Question, talk: Talk) -> Program[Solution]:
        lang = question.language
        tools = {name: tool_of(name, talk.tools) for name in self.tools}
        colon = "：" if lang == "zh" else ": "
        listing = "\n".join(f"- {name}{colon}{tool.describe(lang)}" for name, tool in tools.items())
        asked = say(lang, "react", "question", question=question.text) if question.chat else question.text
        opening = question.asking(say(lang, "react", "task", tools=listing) + "\n\n" + asked)
        done: list[tuple[str, str]] = []
        for _ in range(self.steps):
            said = yield from talk.ask("act", _continued(opening, done), stop=_STOPS)
            name, given = action(said)
            if name.lower() in _FINISH:
                return Solution(extract(given, self.answer) or given, _told(done, said))
            if name in tools:
                try:
                    seen = tools[name](given, lang)
                except ToolError as error:
                    seen = say(lang, "tools", "failed", message=str(error))
            elif name:
                seen = say(lang, "react", "unknown", name=name, names=", ".join(tools))
            else:
                seen = say(lang, "react", "malformed")
            talk.note(Step("tool", answer=given, tool=name, observation=seen, branch=talk.branch))
            done.append((said, say(lang, "react", "observation", text=seen)))
        last = say(lang, "react", "give_up")
        if question.chat:
            shown = _continued(opening, done)
            text = yield from talk.ask("answer", shown.asking(f"{shown.text}\n\n{last}"))
        else:
            begun = say(lang, "extract", f"{self.answer}.begin")
            text = yield from talk.ask("answer", opening.beginning(_told(done, begun)))
        return Solution(extract(text, self.answer) or text, _told(done, text))


def action(text: str) -> tuple[str, str]:
    """(tool, input) of the first action in a text; ("", "") where there is none. Brackets inside the input count."""
    found = _ACTION.search(text)
    if not found:
        return "", ""
    opening = plain(found[2]) if found[2] in "（" else found[2]
    closing = _CLOSING[opening]
    rest, depth = text[found.end() :], 1
    if found[2] == "（":
        rest = rest.replace("）", ")")
    for place, char in enumerate(rest):
        depth += (char == opening) - (char == closing)
        if depth == 0:
            return found[1], rest[:place].strip()
    return found[1], rest.strip()  # cut off, or never closed


def _continued(opening: Question, done: list[tuple[str, str]]) -> Question:
    """The question with what was thought, done and seen: as turns of a chat, or as the text so far."""
    if not opening.chat:
        thought = say(opening.language, "react", "thought")
        return opening.beginning(_told(done, thought).strip())
    messages = opening.messages
    for said, seen in done:
        messages = (*messages, Message("assistant", said), Message("user", seen))
    return replace(opening, messages=messages)


def _told(done: list[tuple[str, str]], last: str) -> str:
    return "\n".join([*(f"{said}\n{seen}" for said, seen in done), last])

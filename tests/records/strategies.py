"""Records of every kind, made by hypothesis."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from fledge.records.kinds import Answer, Conversation, Document, Labelled, Message, Preference, Prompt, Rating, Record

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)
names = st.sampled_from(["", "a", "张三"])
calls = st.sampled_from(["", json.dumps([{"type": "function", "function": {"name": "f", "arguments": "{}"}}])])
meta = st.dictionaries(st.sampled_from(["url", "年", "licence"]), st.text(st.characters(codec="utf-8"), max_size=5))
common = st.fixed_dictionaries(
    {"id": names, "language": st.sampled_from(["", "en", "zh"]), "source": names, "meta": meta}
)

turns = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user"]), texts, names),
    st.builds(Message, st.just("assistant"), texts, names, calls),
    st.builds(Message, st.just("tool"), texts, names, st.just(""), names),
)
chats = (
    st.lists(turns, min_size=1, max_size=5)
    .map(tuple)
    .filter(lambda ms: any(m.role in ("user", "assistant") for m in ms))
)
answers = st.lists(st.builds(Answer, texts, st.integers(1, 4), names), min_size=2, max_size=4).map(tuple)


@st.composite
def alpacas(draw: st.DrawFn) -> Conversation:
    """Conversations that Alpaca can hold: a system prompt perhaps, then rounds."""
    system = [Message("system", draw(texts))] if draw(st.booleans()) else []
    rounds = draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    said = [m for question, answer in rounds for m in (Message("user", question), Message("assistant", answer))]
    return Conversation((*system, *said), **draw(common))


@st.composite
def preference_pairs(draw: st.DrawFn) -> Preference:
    """Preferences of two answers that differ."""
    chosen, rejected = draw(st.lists(texts, min_size=2, max_size=2, unique=True))
    return Preference(draw(chats), (Answer(chosen, 1), Answer(rejected, 2)), **draw(common))


@st.composite
def records(draw: st.DrawFn, kind: str) -> Record:
    """Any record of a kind."""
    fields = draw(common)
    match kind:
        case "documents":
            return Document(draw(texts), **fields)
        case "conversations":
            return Conversation(draw(chats), **fields)
        case "preferences":
            return Preference(draw(chats), draw(answers), **fields)
        case "ratings":
            score = draw(st.floats(allow_nan=False, allow_infinity=False))
            return Rating(draw(chats), draw(texts), score, **fields)
        case "labelled":
            return Labelled(draw(texts), draw(texts), **fields)
    return Prompt(draw(chats), draw(texts), **fields)

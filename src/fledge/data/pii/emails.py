"""E-mail addresses (RFC 5321, the forms that people use), beside Han characters as beside spaces."""

from __future__ import annotations

import re

from fledge.data.pii.spans import Look, Spans, after, before

_LOCAL = r"[A-Za-z0-9_](?:[A-Za-z0-9._%+'-]{0,62}[A-Za-z0-9_+-])?"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_EMAIL = re.compile(
    rf"(?<![A-Za-z0-9._%+-]){_LOCAL}@(?:{_LABEL}\.)+(?:[A-Za-z]{{2,24}}|xn--[A-Za-z0-9-]{{2,59}})(?!-?[A-Za-z0-9])"
)
_MESSAGE = re.compile(
    r"(?:Message-ID|In-Reply-To|References|Content-ID|Resent-Message-ID)\s?:[^\n]{0,80}<$|\bcid:$", re.IGNORECASE
)
_REMOTE = re.compile(r":[~\w./-]*/[\w./-]+|:[\w.-]+\.git\b")
_AT, _DOT = (
    r"(?:\s?[\[(（【{<]\s?(?:at|AT|@)\s?[\])）】}>]\s?|\s(?:at|AT)\s)",
    r"(?:\s?[\[(（【{<]\s?(?:dot|DOT|\.)\s?[\])）】}>]\s?|\s(?:dot|DOT)\s|\.)",
)
_HIDDEN = re.compile(
    rf"(?<![A-Za-z0-9._%+-]){_LOCAL}(?:{_DOT}{_LOCAL})?{_AT}(?:{_LABEL}{_DOT}){{1,4}}[A-Za-z]{{2,6}}(?![A-Za-z0-9-])"
)
_FILES = re.compile(r"\.(?:png|jpe?g|gif|svg|webp|css|js|ts|py|so|dll|tar|gz|zip)$", re.IGNORECASE)


def find_emails(look: Look) -> Spans:
    """Addresses; not files (`icon@2x.png`), remotes (`git@host:owner/repository`) and the ids of messages."""
    text = look.text
    if "@" in text:
        for match in _EMAIL.finditer(text):
            if _FILES.search(match[0]) or _REMOTE.match(text, match.end()) or after(text, match.end(), 1) == "@":
                continue
            if not _MESSAGE.search(before(text, match.start(), 100)):
                yield match.span()
    if look.options.obfuscated:
        for match in _HIDDEN.finditer(text):
            if "@" in match[0] or not re.search(r"\sat\s(?!.*dot)", match[0], re.IGNORECASE):
                yield match.span()

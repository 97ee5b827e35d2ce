"""Which encoding a page is written in: what it says, checked against what it is.

A page may say so in a byte order mark, in its HTTP header and in a `meta` element, and any of them may be wrong. UTF-8
proves itself: bytes above 127 that are valid UTF-8 are hardly ever anything else. Everything else is tried strictly in
the order of authority of the HTML standard (section 13.2.3); the standard's own aliases apply (`gb2312` is read as
GB 18030, `iso-8859-1` as windows-1252).
"""

from __future__ import annotations

import codecs
import re

from fledge.core.errors import need

_ALIASES = {
    "gb2312": "gb18030", "gbk": "gb18030", "gb_2312-80": "gb18030", "x-gbk": "gb18030",
    "big5": "big5hkscs", "big5-hkscs": "big5hkscs", "shift_jis": "cp932", "shift-jis": "cp932", "x-sjis": "cp932",
    "sjis": "cp932", "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "iso-8859-1": "cp1252", "latin1": "cp1252",
    "latin-1": "cp1252", "ascii": "cp1252", "us-ascii": "cp1252", "iso-8859-9": "cp1254", "tis-620": "cp874",
    "iso-8859-11": "cp874", "utf8": "utf-8", "unicode": "utf-16", "x-user-defined": "cp1252",
}  # fmt: skip
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_META = re.compile(rb"""<meta[^>]{0,500}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{2,40})""", re.IGNORECASE)
_XML = re.compile(rb"""<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9_:.-]{2,40})""", re.IGNORECASE)
_FIRST = (
    "iso2022_jp",
    "iso2022_kr",
    "hz",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
)  # valid UTF-8 proves nothing against these
_WESTERN = frozenset(["cp1252", "iso8859-15", "cp1250", "cp1254"])  # a server's default, and any bytes pass for it
_LIKELY = [
    "gb18030", "big5hkscs", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp1252", "cp1250", "cp1253", "cp1254",
    "cp1255", "cp1256",
]  # fmt: skip
_FREQUENT = frozenset(
    "的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能"
    "好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长知民样现分将外但身些与高意进"
)  # a third and more of any Chinese prose
_ASCII = bytes(range(128))
_NO_LETTERS = bytes(byte for byte in range(256) if byte > 127 or not chr(byte).isalpha())
_SCARS = 0.002  # characters that may be lost of a page whose encoding is known: a cut end, a stray byte
_GUESSED = 50_000  # bytes by which an unknown encoding is guessed


def decode(content: bytes, said: str = "") -> tuple[str, str] | None:
    """(text, name of its encoding) of a page; `said` is the charset of its HTTP header. None: in no known encoding.

    Null characters, which no page means, are left out.
    """
    found = _decoded(content, said)
    return (found[0].replace("\0", ""), found[1]) if found else None


def _decoded(content: bytes, said: str) -> tuple[str, str] | None:
    for mark, encoding in _BOMS:
        if content.startswith(mark):
            return _strictly(content[len(mark) :], encoding) or _nearly(content[len(mark) :], [encoding])
    named = [name for name in map(_known, (said, *_declared(content))) if name]
    if not (named and named[0] in _FIRST):
        if found := _strictly(content, "utf-8"):
            return found
        named.insert(0, "utf-8")
    foreign = _mostly_high(content)
    named = [name for name in sorted(named, key=_WESTERN.__contains__) if not (foreign and name in _WESTERN)]
    for encoding in named:
        if found := _strictly(content, encoding):
            return found
    return _nearly(content, named) or _guessed(content)


def text_in(content: bytes, encoding: str) -> str:
    """The text of a page whose encoding is known, without a byte order mark and null characters."""
    return content.decode(encoding, "replace").removeprefix("\ufeff").replace("\0", "")


def charset_of(content_type: str) -> str:
    """`gbk` of `text/html; charset=GBK`."""
    match = re.search(r"""charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]+)""", content_type, re.IGNORECASE)
    return match[1].lower() if match else ""


def _declared(content: bytes) -> list[str]:
    """What the page says of itself, within its first bytes."""
    head = content[:4_096]
    return [match[1].decode("ascii") for match in (_META.search(head), _XML.search(head)) if match]


def _known(name: str) -> str:
    name = name.strip().lower()
    name = _ALIASES.get(name, name)
    try:
        "".encode(name)  # refuses codecs that are none of text, such as base64
        found = codecs.lookup(name).name
    except (LookupError, ValueError):
        return ""
    return "" if found == "utf-7" else found  # the standard forbids it: a way around filters


def _strictly(content: bytes, encoding: str) -> tuple[str, str] | None:
    try:
        return content.decode(encoding), encoding
    except (UnicodeError, ValueError):
        return None


def _nearly(content: bytes, encodings: list[str]) -> tuple[str, str] | None:
    """By the first of `encodings` under which next to nothing is lost."""
    for encoding in encodings:
        text = content.decode(encoding, "replace")
        lost = text.count("�")
        if lost <= 1 + _SCARS * len(text):
            return text, encoding
    return None


def _guessed(content: bytes) -> tuple[str, str] | None:
    """By how the bytes are distributed."""
    if _looks_chinese(content[:_GUESSED]):
        return _nearly(content, ["gb18030"])
    guess = need("charset_normalizer", "data", "charset-normalizer").from_bytes
    best = guess(content[:_GUESSED], cp_isolation=_LIKELY, enable_fallback=False).best()
    if best is None:
        return None
    if best.encoding in _WESTERN and (found := _strictly(content, "cp1252")):  # what the web takes such a page for
        return found
    return _strictly(content, best.encoding) or _nearly(content, [best.encoding])


def _looks_chinese(content: bytes) -> bool:
    """Whether the bytes make sense as GB 18030: most characters are of its first level, and many are frequent ones
    (which tells it from Korean in EUC-KR, whose bytes lie in the same place)."""
    text = content.decode("gb18030", "ignore")
    beyond = [character for character in text if not character.isascii()]
    if not beyond or len(content.decode("gb18030", "replace")) - len(text) > 1:
        return False
    first_level = sum(0xB0 <= character.encode("gb18030")[0] <= 0xD7 for character in beyond)
    frequent = sum(character in _FREQUENT for character in beyond)
    return first_level > 0.6 * len(beyond) and (len(beyond) < 40 or frequent > 0.1 * len(beyond))


def _mostly_high(content: bytes) -> bool:
    """Whether a quarter of the letters outside tags are beyond ASCII, as no western language is written."""
    text = re.sub(rb"<[^<>]{0,2000}>", b"", content[:_GUESSED])
    high, low = len(text.translate(None, _ASCII)), len(text.translate(None, _NO_LETTERS))
    return high > 0.25 * (high + low) and high > 8

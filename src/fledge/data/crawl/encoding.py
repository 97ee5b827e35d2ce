"""From a page's bytes to its text, whatever its header claims."""

from __future__ import annotations

import codecs
import re

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_WIDER = {  # what a label means on the web (WHATWG Encoding): the superset that such pages are really written in
    "gb2312": "gb18030", "gbk": "gb18030", "gb_2312-80": "gb18030", "x-gbk": "gb18030", "big5": "big5hkscs",
    "iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252", "ascii": "cp1252", "iso-8859-9": "cp1254",
    "shift_jis": "cp932", "shift-jis": "cp932", "sjis": "cp932", "x-sjis": "cp932", "euc-kr": "cp949",
    "ks_c_5601-1987": "cp949", "tis-620": "cp874", "utf8": "utf-8", "unicode": "utf-16-le",
}  # fmt: skip
_WESTERN = frozenset(("cp1252", "iso8859-15", "cp1250"))
_LIKELY = ["gb18030", "big5hkscs", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp1252", "cp1250", "cp1253",
           "cp1254", "cp1255", "cp1256", "cp874"]  # fmt: skip
_META = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]+)""", re.IGNORECASE)
_XML = re.compile(rb"""^\s*<\?xml[^>]+encoding\s*=\s*["']([A-Za-z0-9_:.-]+)""", re.IGNORECASE)
_CODE = re.compile(rb"<(script|style)\b")
_TAG = re.compile(rb"<[^<>]*>")
_LOOK = 4096  # bytes at the top in which a page says its encoding
_SAMPLE = 60_000


def decode(body: bytes, declared: str = "") -> tuple[str, str]:
    """The text and the encoding it was read in. `declared` is the charset of the `Content-Type` header, if any.

    A byte order mark decides, then validity as UTF-8 (a text in an older encoding is next to never valid by chance),
    then what header and `<meta>` say as far as the bytes bear it out, then `charset-normalizer`'s guess. A default
    of the server's (`iso-8859-1`) yields to a page that says something more particular of itself.
    """
    encoding = _encoding_of(body, declared)
    return text_in(body, encoding), encoding


def text_in(body: bytes, encoding: str) -> str:
    """The text of a body whose encoding is known, without a byte order mark and null characters."""
    return body.decode(encoding, "replace").removeprefix("\ufeff").replace("\0", "")


def _encoding_of(body: bytes, declared: str) -> str:
    for mark, name in _BOMS:
        if body.startswith(mark):
            return name
    said = [name for name in (_known(declared), _known(_said_inside(body))) if name]
    seven_bit = body.isascii()
    if seven_bit and b"\x1b" in body and (japanese := next((n for n in said if n.startswith("iso2022")), "")):
        return japanese
    if seven_bit or _valid(body, "utf-8"):
        return "utf-8"
    said.sort(key=lambda name: name in _WESTERN)  # any bytes pass for Western ones
    for name in said:
        if name in _WESTERN and _share_high(body) > 0.25:
            continue  # no European language is written so; it is a server's default over an Asian or Cyrillic page
        if _nearly_valid(body, name):
            return name
    return "utf-8" if _nearly_valid(body, "utf-8") else _guess(body) or (said[0] if said else "cp1252")


def _said_inside(body: bytes) -> str:
    match = _XML.search(body[:_LOOK]) or _META.search(body[:_LOOK])
    return match[1].decode("ascii") if match else ""


def _known(label: str) -> str:
    """Python's name of an encoding; empty for none and for what is no encoding of text."""
    label = label.strip().strip("\"'").lower()
    try:
        "".encode(_WIDER.get(label, label))  # refuses what Python calls a codec and is none of text (hex, zlib)
        found = codecs.lookup(_WIDER.get(label, label)).name
    except (LookupError, ValueError):
        return ""
    name = _WIDER.get(found, found)
    return "" if name.startswith(("utf-16", "utf-32", "utf-7", "unicode", "raw", "idna", "puny")) else name


def _valid(body: bytes, name: str) -> bool:
    try:
        body.decode(name)
    except UnicodeDecodeError:
        return False
    return True


def _nearly_valid(body: bytes, name: str) -> bool:
    """Whether at most one in two hundred of the bytes beyond ASCII (or one, in a short page) makes no sense."""
    high = sum(byte > 127 for byte in body[:_SAMPLE])
    return body[:_SAMPLE].decode(name, "replace").count("\ufffd") <= max(1, high // 200)


def _prose(body: bytes) -> bytes:
    """What stands between the tags, scripts and styles left out, in one pass whatever the page is made of."""
    kept, end, lower = [], 0, body.lower()
    for match in _CODE.finditer(lower):
        if match.start() >= end >= 0:
            kept.append(body[end : match.start()])
            end = lower.find(b"</" + match[1], match.end())
    return _TAG.sub(b" ", b" ".join(kept) + (body[end:] if end >= 0 else b""))


def _share_high(body: bytes) -> float:
    """Of the letters outside tags, how many are beyond ASCII."""
    letters = [byte for byte in _prose(body[:_SAMPLE]) if byte > 127 or chr(byte).isalpha()]
    return sum(byte > 127 for byte in letters) / max(len(letters), 1)


def _guess(body: bytes) -> str:
    """`charset-normalizer`'s opinion, asked about the text without its tags."""
    from charset_normalizer import from_bytes

    best = from_bytes(
        _prose(body[:_SAMPLE]).strip() or body[:_SAMPLE], cp_isolation=_LIKELY, enable_fallback=False
    ).best()
    found = best.encoding if best is not None else ""
    western = found in _WESTERN and _valid(body, "cp1252")  # what the web takes a page for that does not say
    return "cp1252" if western else found

"""Invented values in place of found ones: of the same kind and form, the same for the same original and key.

They are drawn from a keyed hash (BLAKE2b, 128 bits), so that nothing leads back to the original; who has the key can
test a guess. Where a range is set aside for examples they lie in it: example.com (RFC 2606), TEST-NET (RFC 5737),
2001:db8::/32 (RFC 3849), 555-01xx; elsewhere they are such as nobody can have: a wrong check digit, prefixes never
given out, plates with the letter I, an invented town.
"""

from __future__ import annotations

import re
import string
from hashlib import blake2b
from ipaddress import ip_address, ip_network

from fledge.data.pii.cards import issued
from fledge.data.pii.ids import check_digit
from fledge.data.pii.phones import valid
from fledge.data.pii.spans import luhn, narrow

_AREAS = [
    "202",
    "212",
    "213",
    "303",
    "305",
    "312",
    "404",
    "415",
    "503",
    "512",
    "602",
    "617",
    "702",
    "713",
    "808",
    "907",
]
_TEST_NETS = tuple(map(ip_network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")))
_RESERVED = re.compile(r"@(?:[A-Za-z0-9-]+\.)*(?:example\.(?:com|net|org)|example|invalid|test)$", re.IGNORECASE)
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_ROADS = ["望江路", "青禾路", "听雨路", "长亭街", "石榴街", "晚枫路", "采薇路", "流云路"]
_STREETS = ["Maple", "Birch", "Willow", "Juniper", "Hazel", "Rowan", "Alder", "Linden"]


class Inventor:
    """Invents values under one key. Equal originals (by their letters and digits) get equal values."""

    def __init__(self, key: bytes) -> None:
        self.key = blake2b(key, digest_size=32).digest()

    def __call__(self, kind: str, original: str) -> str:
        """A value in place of `original`; what is already in a range for examples stays."""
        original = narrow(original)
        draw = _Draw(self.key, kind, _same(kind, original))
        return getattr(self, f"_{kind}")(original, draw)  # type: ignore[no-any-return]

    def _email(self, original: str, draw: _Draw) -> str:
        return original if _RESERVED.search(original) else f"{draw.letters(2)}{draw.digits(8)}@example.com"

    def _ip(self, original: str, draw: _Draw) -> str:
        address = ip_address(original)
        if address.version == 6:
            if address in ip_network("2001:db8::/32"):
                return original
            return f"2001:db8:{draw.number(65536):x}:{draw.number(65536):x}::{1 + draw.number(65535):x}"
        if any(address in net for net in _TEST_NETS):
            return original
        return str(_TEST_NETS[draw.number(3)][1 + draw.number(254)])

    def _id(self, original: str, draw: _Draw) -> str:
        if not original[0].isdigit() or len(re.sub(r"\D", "", original)) < 15:
            return (
                draw.like(original[:-1]) + original[-1]
                if "-" not in original
                else f"9{draw.digits(2)}-{draw.digits(2)}-{draw.digits(4)}"
            )
        region = f"{11 + draw.number(5)}01{1 + draw.number(9):02d}"
        born = f"{1950 + draw.number(55)}{1 + draw.number(12):02d}{1 + draw.number(28):02d}"
        body = region + born + draw.digits(3)
        wrong = str((int(check_digit(body).replace("X", "10")) + 1 + draw.number(8)) % 10)
        if wrong == check_digit(body):
            wrong = str((int(wrong) + 1) % 10)
        return body + wrong

    def _card(self, original: str, draw: _Draw) -> str:
        digits = re.sub(r"\D", "", original)
        made = digits[:2] + draw.digits(len(digits) - 2)
        while luhn(made) or not issued(made):
            made = digits[:4] + draw.digits(len(digits) - 4)
        return _poured(made, original)

    def _phone(self, original: str, draw: _Draw) -> str:
        digits = re.sub(r"\D", "", original)
        if re.search(r"1[3-9]\d{9}$", digits) and not re.match(r"\+(?!86)", original):
            return _poured(digits[:-11] + "12" + draw.digits(9), original)  # 12x is no mobile prefix
        if match := re.match(r"\+?1?[ .-]?[(]?[2-9]\d\d[) .-]*[2-9]\d\d[ .-]?\d{4}$", original):
            if re.search(r"555[ .-]?01\d\d$", match[0]):
                return original
            prefix = "1" if len(digits) == 11 else ""
            return _poured(f"{prefix}{_AREAS[draw.number(len(_AREAS))]}55501{draw.digits(2)}", original)
        if match := re.match(r"(?:\+86|0086|86(?=[ -]))?[ -]?[(（]?0?(?=[1-9])", original):
            land = len(re.sub(r"\D", "", match[0]))
            if land and re.match(r"0(?!0)|\+86|0086|86", match[0]):  # 026 is no area
                return _poured(digits[:land] + "26" + draw.digits(len(digits) - land - 2), original)
        kept = 3 if original.startswith("00") and len(digits) > 10 else 2 if "+" in original else 1
        for _ in range(100):
            made = _poured(digits[:kept] + draw.digits(len(digits) - kept), original)
            if not valid(made, "CN"):
                break
        return made

    def _passport(self, original: str, draw: _Draw) -> str:
        return draw.like(original)

    def _address(self, original: str, draw: _Draw) -> str:
        if original.isascii():
            return f"{1 + draw.number(999)} {_STREETS[draw.number(len(_STREETS))]} Street, Exampleville"
        return f"云山市青禾区{_ROADS[draw.number(len(_ROADS))]}{1 + draw.number(300)}号{1 + draw.number(30)}01室"

    def _plate(self, original: str, draw: _Draw) -> str:
        if not original[0].isdigit() and len(original) > 6 and original[0] not in "使W":
            return original[:2] + re.sub(r"(?<=[A-Z0-9])[A-Z0-9]", lambda m: draw.like(m[0]), "I" + original[3:])
        return draw.like(original)

    def _secret(self, original: str, draw: _Draw) -> str:
        if original.startswith("-----BEGIN"):
            head, _, _ = original.partition("\n")
            return f"{head}\n{draw.secret(64)}\n{head.replace('BEGIN', 'END')}"
        known = re.match(
            r"(?:sk-(?:proj-|ant-)?|gh[pousr]_|github_pat_|xox[a-z]-|AKIA|AIza|[sprk]+_(?:live|test)_|hf_|eyJ)",
            original,
        )
        prefix = known[0] if known else ""
        return prefix + draw.secret(len(original) - len(prefix))


class _Draw:
    """An endless row of numbers from a keyed hash of one original."""

    def __init__(self, key: bytes, kind: str, original: str) -> None:
        self.seed = blake2b(
            original.encode("utf-8", "surrogatepass"), key=key, digest_size=16, person=kind.encode()[:16]
        ).digest()
        self.at = 0

    def number(self, below: int) -> int:
        """From 0 to below - 1."""
        self.at += 1
        return (
            int.from_bytes(blake2b(self.at.to_bytes(8, "little"), key=self.seed, digest_size=8).digest(), "little")
            % below
        )

    def digits(self, count: int) -> str:
        return "".join(str(self.number(10)) for _ in range(count))

    def letters(self, count: int) -> str:
        return "".join(string.ascii_lowercase[self.number(26)] for _ in range(count))

    def secret(self, count: int) -> str:
        alphabet = string.ascii_letters + string.digits
        return "".join(alphabet[self.number(62)] for _ in range(count))

    def like(self, original: str) -> str:
        """Digits for digits, capital letters (without I and O) for letters but the first; the rest stays."""
        return "".join(self._like(c, first=i == 0) for i, c in enumerate(original))

    def _like(self, character: str, first: bool) -> str:
        if character.isdigit():
            return str(self.number(10))
        return _LETTERS[self.number(24)] if not first and character.isascii() and character.isalpha() else character


def _same(kind: str, original: str) -> str:
    """What two spellings of one value share: 138 1234 5678 is +86 138-1234-5678."""
    if kind in ("email", "secret", "ip"):
        return original if kind == "secret" else original.lower()
    kept = "".join(filter(str.isalnum, original)).upper()
    return re.sub(r"^(?:00)?86(?=1[3-9]\d{9}$)", "", kept) if kind == "phone" else kept


def _poured(digits: str, into: str) -> str:
    """The digits in the places of the digits of `into`."""
    row = iter(digits)
    return "".join(next(row, "") if character.isdigit() else character for character in into) + "".join(row)

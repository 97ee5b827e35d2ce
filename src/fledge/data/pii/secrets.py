"""Keys, tokens and passwords: by their known forms, and by the name in front of them."""

from __future__ import annotations

import math
import re
from collections import Counter

from fledge.data.pii.spans import Look, Spans

_L, _R = r"(?<![A-Za-z0-9_-])", r"(?![A-Za-z0-9_-])"
_BLOCK = re.compile(
    r"-----BEGIN (?P<what>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----.{8,}?(?:-----END (?P=what)-----|\Z)", re.DOTALL
)
_FORMS = re.compile(
    rf"{_L}(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[A-Z2-7]{{16}}{_R}"  # Amazon Web Services
    rf"|{_L}(?:gh[pousr]_[A-Za-z0-9]{{30,251}}|github_pat_[A-Za-z0-9_]{{22,255}}|glpat-[A-Za-z0-9_-]{{20,64}}){_R}"
    rf"|{_L}sk-(?=[A-Za-z0-9_-]*?[A-Za-z0-9]{{12}})(?=(?:[A-Za-z_-]*\d){{2}})(?!ssh-|"
    rf"ecdsa-)[A-Za-z0-9_-]{{18,200}}{_R}"  # OpenAI, Anthropic and their like
    rf"|{_L}(?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{{16,120}}{_R}"  # Stripe
    rf"|{_L}xox[abeoprs]-[A-Za-z0-9-]{{10,250}}{_R}|https://hooks\.slack\.com/services/[A-Za-z0-9/]{{20,90}}"
    rf"|{_L}AIza[A-Za-z0-9_-]{{35}}{_R}|{_L}ya29\.[A-Za-z0-9_-]{{20,250}}{_R}|"
    rf"{_L}GOCSPX-[A-Za-z0-9_-]{{20,40}}{_R}"  # Google
    rf"|{_L}(?:hf_[A-Za-z0-9]{{30,60}}|npm_[A-Za-z0-9]{{36}}|pypi-[A-Za-z0-9_-]{{50,250}}|"
    rf"LTAI[A-Za-z0-9]{{12,24}}|AKID[A-Za-z0-9]{{13,40}}|"
    rf"SG\.[A-Za-z0-9_-]{{16,32}}\.[A-Za-z0-9_-]{{30,50}}){_R}"
    rf"|{_L}eyJ[A-Za-z0-9_-]{{8,}}\.eyJ[A-Za-z0-9_-]{{8,}}\.[A-Za-z0-9_-]{{8,}}{_R}"  # JSON Web Tokens (RFC 7519)
)
_IN_URL = re.compile(
    r"://[^\s/?#:@\[\]<>{}$%*'\"]{0,64}:(?P<word>[^\s/?#@\[\]<>{}$*'\"][^\s/?#@<>{}'\"]{0,127})(?=@[A-Za-z0-9\[])"
)
_NAMED = re.compile(
    r"(?P<name>(?<![A-Za-z])(?:password|passwd|passphrase|pwd|passcode|secret(?:[_-]?"
    r"(?:access[_-]?)?key)?|token|api[_ -]?key|"
    r"access[_-]?key(?:[_-]?(?:id|secret))?|private[_-]?key|auth[_-]?key|encryption[_-]?key|"
    r"client[_-]?secret|credentials?|authorization)(?:[_-][a-z]{1,8})?"
    r"|(?<=[a-z])(?-i:Password|Secret|Token|(?:Api|Access|Secret|Private)Key)|(?<![A-Za-z])(?:Account|Shared|Master|Signing|Encryption)[_-]?Key|密码|密碼|口令|密钥|密鑰|令牌)"
    r"(?:['\"]|\s?[(（][^)）\n]{1,12}[)）])?\s{0,3}(?:[:=：＝]|=>|:=|\s?是|\s?为|为：|是：|\sis\b:?|"
    r"\swas\b)\s{0,3}(?:(?:Bearer|Basic|bearer|token)\s)?"
    r"(?P<quote>['\"“`「]?)"
    r"(?P<value>[^\s'\"“”`「」,，。；;、()（）<>{}\[\]\u3400-\u9fff][^\s'\"“”`「」，。；;、（）<>\u3400-\u9fff]{2,255})",
    re.IGNORECASE,
)
_BEARER = re.compile(
    r"\b(?:Authorization['\"]?\s*[:=]\s*['\"]?)(?:Bearer|Basic|token)\s+(?P<value>[A-Za-z0-9._~+/=-]{12,})",
    re.IGNORECASE,
)
_SAID = re.compile(  # 密码abc123: nothing stands between
    r"(?:密码|密碼|口令) ?(?!(?i:sha|md|aes|des|rsa|base|wpa|sm|ecc|bcrypt))(?P<value>(?=[!-~]*[A-Za-z])(?=[!-~]*\d)"
    r"[A-Za-z0-9][A-Za-z0-9@#$%^&*!_.+-]{4,31}(?<![.!]))(?![A-Za-z0-9])"
)
_PLAIN = re.compile(r"[a-z][a-z'’-]*|[A-Z][a-z]+|[A-Z_]{2,}|[a-z_]+", re.ASCII)  # a word, or the name of a constant
_WORD = re.compile(r"[a-z]*|[A-Z]*|[A-Z][a-z]+|\d{1,4}|[a-z]+\d")
_CODE = re.compile(
    r"^(?:self|os|this|config|settings|env|process|request|args|None|null|true|false|nil|undefined|"
    r"str|int|bytes|bool|Optional|string|required|optional)\b|[(){}\[\]<>|]|\$|%[sd(]|^[*.x•]+$|"
    r"^https?:|^-|->|^[\w.]+\(|\.\.\.|…",
    re.IGNORECASE,
)
_PREFIX = re.compile(
    r"A(?:KIA|SIA|BIA|CCA|ROA|IDA|KID|Iza)|g(?:h[pousr]_|ithub_pat|lpat-)|sk[-_]|[pr]k_|xox[a-z]-|"
    r"hooks\.slack|ya29|GOCSPX|hf_|npm_|pypi-|LTAI|SG\.|eyJ"
)
_STARTS = (
    "akia", "asia", "abia", "acca", "aroa", "aida", "akid", "aiza", "ghp_", "gho_", "ghu_", "ghs_", "ghr_",
    "github_pat", "glpat-", "sk-", "sk_", "pk_", "rk_", "xox", "hooks.slack", "ya29", "gocspx", "hf_", "npm_",
    "pypi-", "ltai", "sg.", "eyj",
)  # fmt: skip
_NAMES = (
    "passw", "passp", "passc", "pwd", "secret", "token", "key", "credential", "authoriz",
    "密码", "密碼", "口令", "密钥", "密鑰", "令牌",
)  # fmt: skip
_NAME = re.compile(
    r"(?:word|wd|phrase|code|secret|token|key|ials?|tion|WORD|WD|PHRASE|CODE|SECRET|TOKEN|KEY|Secret|"
    r"Token|Key|Word|[密口令][码碼令钥鑰牌])"
    r"(?:[_-][A-Za-z]{1,8})?['\"]?\s{0,3}(?:[:=：＝(（是为]|is\b|was\b)"
)


def find_secrets(look: Look) -> Spans:
    """Whole tokens and blocks; of a URL the password; behind a name such as `password=`, the value alone."""
    text = look.text
    taken: list[tuple[int, int]] = []
    if "PRIVATE KEY" in text:
        taken += [match.span() for match in _BLOCK.finditer(text)]
    if look.has(_STARTS):
        taken += [match.span() for match in look.matches(_FORMS, _PREFIX, 1, 300)]
    if "://" in text:
        taken += [match.span("word") for match in _IN_URL.finditer(text)]
    if not look.has(_NAMES):
        return (yield from sorted(taken))
    taken += [match.span("value") for match in look.matches(_BEARER, _NAME, 16, 300)]
    if look.has(("密码", "口令", "密碼")):
        taken += [match.span("value") for match in _SAID.finditer(text)]
    known = bytearray(len(text))
    for start, end in taken:
        known[start:end] = b"\x01" * (end - start)
    for match in look.matches(_NAMED, _NAME, 24, 300):
        start, value = match.start("value"), _value(match)
        if value and not any(known[start : start + len(value)]) and _is_secret(match, value):
            taken.append((start, start + len(value)))
    yield from sorted(taken)


def _value(match: re.Match[str]) -> str:
    """The value without the punctuation of the sentence around it; quoted, all that stands within the quotes."""
    value = match["value"]
    if match["quote"]:
        behind = match.string[match.end("value") : match.end("value") + 1]
        return value if behind and behind in "'\"”`」" else ""
    value = re.split(r"&\w+=|,", value)[0] if "=" in match[0][: match.start("value") - match.start()] else value
    return value.rstrip(".,!?:")


def _is_secret(match: re.Match[str], value: str) -> bool:
    """Whether the value is one that somebody chose or a machine drew, and no code, no type and no plain word."""
    name = match["name"]
    if len(value) < 4 or _CODE.search(value):
        return False
    password = re.search(r"pass|pwd|密码|密碼|口令", name, re.IGNORECASE) is not None
    mixed = len({_class(character) for character in value}) >= 2 and any(map(str.isdigit, value))
    assigned = re.search(r"[=:：＝]", match[0][len(name) : match.start("value") - match.start()]) is not None
    if password and (mixed or (value.isdigit() and len(value) >= 6)):
        return not re.fullmatch(r"\d{1,4}(?:[-/.]\d{1,2}){1,2}", value)
    if password and assigned and not _PLAIN.fullmatch(value) and len(value) >= 6:
        return not re.fullmatch(r"[A-Za-z_.:/-]+", value)
    if password and match["quote"] and assigned:
        return len(value) >= 5 and bool(re.fullmatch(r"[!-~]+", value)) and not value.isupper()
    form = r"[!-~]+" if match["quote"] else r"[A-Za-z0-9+/=_.~-]+"
    if len(value) < 12 or not mixed or not re.fullmatch(form, value) or entropy(value) < 3:
        return False
    return not all(map(_WORD.fullmatch, re.split("[._/-]", value)))  # user_profile_image_2


def entropy(text: str) -> float:
    """Bits a character (Shannon, 1948), by the text's own frequencies: random base64 of 20 characters has about 4."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _class(character: str) -> str:
    return "0" if character.isdigit() else "a" if character.isalpha() else "-"

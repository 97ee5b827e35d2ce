"""IPv4 and IPv6 addresses; not versions, sections, times or slices."""

from __future__ import annotations

import ipaddress
import re

from fledge.data.pii.spans import Look, Options, Spans, after, before

KEEPABLE = ("loopback", "private", "documentation")
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_V4 = re.compile(rf"(?<![\d.A-Za-z_]){_OCTET}(?:\.{_OCTET}){{3}}(?![A-Za-z0-9_]|\.\d|-[A-Za-z0-9])")
_V6 = re.compile(
    r"(?<![0-9A-Za-z:_.])(?=[0-9A-Fa-f]{1,4}:|::)(?:[0-9A-Fa-f]{0,4}:){2,7}(?:\d+(?:\.\d+){3}|"
    r"[0-9A-Fa-f]{1,4})?(?![0-9A-Za-z_:.]*[0-9A-Za-z_:])"
)
_COLONS = re.compile(r"[0-9A-Fa-f]::|::[0-9A-Fa-f]|[0-9A-Fa-f]:[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]")
_DOTS = re.compile(r"\d\.\d{1,3}\.\d")
_SOFTWARE = (
    "(?<![a-z])(?:openss[lh]|python|java|jdk|node|chrome|firefox|linux|windows|android|ios|macos|nginx|apache|mysql|php|perl|"
    "ruby|gcc|glibc|cuda|docker|kubernetes|tomcat|office|photoshop)[ /-]"
)
_VERSION = re.compile(
    r"(?:(?<![A-Za-z])(?:versions?|releases?|ver|rev|revision|build|firmware|kernel|driver|upgraded?"
    r"(?: to)?|section|sec|chapter|"
    r"clause|appendix|figure|fig|table|item|step|rfc|oid)[.:]?|(?<![A-Za-z])v|§+|版本号?|版|固件|内核|驱动|升级[到至为]?|更新[到至为]?|"
    r""
    rf"升[到至]|{_SOFTWARE}|"
    r"(?<![a-z])(?:since|before|until|than|requires?) [A-Za-z][\w-]{1,20}|章节?|第|条款?|附录|"
    r"[见图表节款条])\s{0,2}(?:是|为|从|由|:|：|to|from|number|号|=|\"|“)?\s{0,2}(?:\d+(?:\.\d+){1,4}\s{0,2}(?:和|至|到|及|与|"
    r"or|and|to|,|，|、|-)\s{0,2})?$",
    re.IGNORECASE,
)
_AFTER_VERSION = re.compile(
    r"\s{0,1}(?:版|节|章|条|款|及以上|以上版|[更升][新级][到至]|升到|release\b|version\b|build\b|\.(?:jar|tar|zip|exe|dll|so|rpm|deb))",
    re.IGNORECASE,
)
_HEADING = re.compile(r"(?:^|\n)[ \t#]*$")
_TITLE = re.compile(r"[ \t.．、]{1,3}[^\W\d_]")
_ADDRESS_WORD = re.compile(
    r"(?<![a-z])ip(?:v4|v6)?(?![a-z])|地址|address|server|host|from|服务器|主机|网关|登录|dns|ping|ssh|://|@",
    re.IGNORECASE,
)


def find_ips(look: Look) -> Spans:
    """Addresses that `ipaddress` reads. Masks, broadcast, multicast and "any" name no machine and stay; of the rest,
    those of the classes in `options.keep`."""
    text = look.text
    for match in look.matches(_V4, _DOTS, 8, 16):
        head = before(text, match.start(), 32)
        if not _numbers_something_else(match[0], head, after(text, match.end(), 12)) and _names_a_machine(
            match[0], look.options
        ):
            yield match.span()
    if ":" in text:
        for match in look.matches(_V6, _COLONS, 40, 40):
            first = match[0].split(":")[0]
            groups = [group for group in match[0].split(":") if group]
            if "::" in match[0]:
                if len(first) < 3 if first else match[0].count(":") < 3 and "." not in match[0]:
                    continue  # x[1::2], a::b
                if len(first) == 3 and len(groups) < 3:
                    continue
            elif max(map(len, groups)) < 3:
                continue  # the bytes of a fingerprint
            if re.search(r"\d", match[0]) and _names_a_machine(match[0], look.options):
                yield match.span()


def _numbers_something_else(number: str, head: str, tail: str) -> bool:
    """Whether four numbers with dots are a version or a section."""
    if re.match(r":\d|/\d", tail):  # a port, a network
        return False
    if _VERSION.search(head) or _AFTER_VERSION.match(tail):
        return True
    if head[-1:] in "-" and re.search(r"[A-Za-z]-$", head):  # commons-1.2.3.4
        return True
    small = all(int(part) < 30 for part in number.split("."))
    if small and re.search(r"(?i:\bsee(?: also)?|[参另详]见)\s?$", head):
        return True
    heading = bool(_HEADING.search(head)) and bool(_TITLE.match(tail))
    return small and heading and not _ADDRESS_WORD.search(tail)


def _names_a_machine(number: str, options: Options) -> bool:
    try:
        address = ipaddress.ip_address(number)
    except ValueError:
        return False
    if address.is_unspecified or address.is_multicast or number.startswith(("255.", "0.")):
        return False
    return not any(_CLASSES[name](address) for name in options.keep)


def _documentation(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return any(address in network for network in _EXAMPLES if network.version == address.version)


_EXAMPLES = tuple(map(ipaddress.ip_network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")))
_CLASSES = {
    "loopback": lambda address: address.is_loopback,
    "private": lambda address: address.is_private and not (address.is_loopback or _documentation(address)),
    "documentation": _documentation,
}

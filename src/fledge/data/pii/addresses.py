"""Postal addresses down to a house or a room: Chinese ones, their romanised forms, and English street addresses.

A Chinese address is found from its middle, the name of a road (or an estate) with a number: from there it reaches to
the right over buildings, units, floors and rooms, and to the left over the names of divisions that GB/T 2260 lists.
A division alone (北京市海淀区) is no address, nor is 第27号, 3号线 or the number of a document.
"""

from __future__ import annotations

import re
from functools import cache

from fledge.data.pii.ids import place_names
from fledge.data.pii.spans import Look, Spans, before

_N = r"(?:[A-Za-z]?\d{1,5}[A-Za-z]?|[一二三四五六七八九十百零〇]{1,5}|[甲乙丙丁东西南北])"
_ROAD = "大街|大道|马路|公路|胡同|街道|新村|路|街|道|巷|里|弄|村|屯|庄|段|堤|坊|径"
_ESTATE = (
    "小区|花园|家园|公寓|社区|大厦|广场|新城|花苑|嘉园|园区|"
    "产业园|科技园|工业园|开发区|苑|(?<!政)府|园|城|湾|庭|轩|居|(?<![医法学检书影剧察究])院|寨|墅"
)
_NUMBER = (
    r"(?:附)?(?:(?:(?<!\d)\d{1,5}|[甲乙丙丁][ ]?\d{1,4}|[一二三四五六七八九十百零〇]{1,5})"
    r"(?:[-—~之]\d{1,4})?[甲乙丙丁]?[ ]?(?:号|號|弄)(?:院(?!长|士|子)|楼(?!上|下|梯))?"
    r"(?!线|線|文|令|公告|选手|球员|决议|案|议案|"
    r"机|台风|楼梯|种子|修正|馆|矿|井|高炉|墓|坑|洞|泊))"
)
_PART = (
    rf"(?:{_N}(?:[-—~]\d{{1,5}}[A-Za-z]?)?[ ]?(?:号楼|号院|號樓|号库|单元|單元|号|號|弄|"
    rf"栋|棟|幢|座|层|層|楼|樓|室|房间|房|户|戶|门|"
    r"期|区|區|组|組|队|支弄|铺|店|F)"
    r"|\d{1,3}-[A-Za-z]?\d{1,4}(?:号楼|栋|棟|幢|座|号|室)|[A-Z]\d?[座区塔栋馆]|塔[A-Z\d]|[东西南北中主副][座楼塔区门]|"
    r"地下[一二三\d]层|附\d{1,4}号|之\d{1,3})"
)
_BUILDING = (
    r"[\u4e00-\u9fff·A-Za-z]{2,12}?(?:大厦|大廈|中心|广场|廣場|大楼|大樓|公寓|花园|花園|小区|家园|新村|新城|酒店|商城|国际|"
    r"宿舍|写字楼|科技园|产业园|创业园|苑|府|城|园|座|村|SOHO)"
)
_LAST = r"(?:[ ]?(?<!\d)[A-Za-z]?\d{3,4}(?:[-—]\d{1,4})?(?![\d.%年月日元个名人号年米]))"
_MIDDLE = re.compile(
    rf"[\u4e00-\u9fff](?:{_ROAD})[ ]?(?:[一二三四五六七八九十]段|[东西南北中][段路街]?)?[ ]?(?:[\u4e00-\u9fff]{{1,8}}"
    rf"(?:巷|弄|里|胡同|支路|段|村)[ ]?)?(?:{_NUMBER}|\d{{1,4}}(?:-\d{{1,4}})+(?=号|號|室))"
    rf"|[\u4e00-\u9fff](?:{_ESTATE}|村|庄|屯|里|街坊)[ ]?(?:[A-Z东西南北]区)?(?:{_PART}[ ]?){{1,4}}"
)
_RIGHT = re.compile(rf"(?:[ ,，]?(?:(?:{_BUILDING})?(?:[ ]?{_PART})+|{_BUILDING}(?![\u4e00-\u9fff]))){{0,4}}{_LAST}?")
_LEFT = re.compile(r"[\u4e00-\u9fffA-Za-z0-9·（）() ]{1,60}$")
_STOP = re.compile(
    r".*(?:[住在于於到至从從往去寄送搬迁址為为是系回的了和与及或把向距离離将过经由沿]|位于|坐落|地址|家住|邮寄|"
    r"[：:，。；、“”\"' \n]|\d)"
)
_NOT_A_NAME = re.compile(
    r"(?:铁|公|道|马|网|思|出|一|线|电|水|管|这条|该|本|此|那条|每|各|两|条|走|半|同|套|赛|进)(?:路|街|道|巷)$|(?:知|报|频|轨|渠|人行|车|味|跑|"
    r"管|通|街|隧|铁|河|航|公|难)道$|(?:公|千|英|海|这|那|哪)里$"
)
_SUFFIX = (
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Place|Pl|Square|"
    r"Sq|Terrace|Highway|Hwy|Parkway|Pkwy|Close|Crescent|Row|Loop|Plaza|Circle|Trail|Mews|Gardens)"
)
_NAME = r"(?:[NSEW]{1,2}\.? |North |South |East |West )?(?:(?:[A-Z][A-Za-z'’-]+|\d{1,3}(?:st|nd|rd|th))\.? ){1,4}"
_FLAT = (
    r"(?:,? ?(?:Apt|Apartment|Suite|Ste|Unit|Flat|Room|Rm|Floor|Fl|#|Bldg|"
    r"Building)\.? ?#?[A-Za-z0-9-]{1,6}| ?\d{1,2}(?:st|nd|rd|th) Floor)"
)
_TOWN = r"(?:,[ \n][A-Z][a-z][A-Za-z.'-]*(?: [A-Z][a-z][A-Za-z.'-]*){0,3})"
_ENGLISH = re.compile(
    rf"(?:(?:Room|Rm|Flat|Unit|Suite|Apt|Building|Bldg|Block)\.? ?#?[A-Za-z0-9-]{{1,6}},? ?){{0,3}}"
    rf"(?<![\w.,/$-])(?:No\.? ?)?\d{{1,5}}(?:-\d{{1,5}})?[A-Za-z]?,? {_NAME}{_SUFFIX}\b\.?"
    rf"(?: ?[NSEW]{{1,2}}\b\.?)?{_FLAT}{{0,2}}{_TOWN}{{0,4}}(?:,? [A-Z]{{2}},? \d{{5}}(?:-\d{{4}})?|"
    rf",? [A-Z]{{1,2}}\d[A-Z\d]? \d[A-Z]{{2}}|,? \d{{5,6}}(?:-\d{{4}})?|, [A-Z]{{2}}\b)?(?:,? (?:P\.?R\.? )?China|"
    r",? USA|,? UK)?"
    rf"|(?<!\w)P\.?O\.? Box \d{{1,6}}(?:{_TOWN}{{0,2}},? [A-Z]{{2}} \d{{5}}(?:-\d{{4}})?)?"
)
_NOT_A_HOUSE = re.compile(
    r"(?i:\b(?:chapter|section|part|top|page|figure|lesson|week|day|episode|since|act|no|vol|version)\.?) ?$"
)
_NOT_A_STREET = re.compile(
    r"\d+,? (?:The|A|An|My|Our|Your|Great|Best|Easy|Simple|Minutes?|Hours?|Miles?|Ways) |(?:19|20)\d\d [^,]*$"
)
_HOUSE = re.compile(r"[0-9][A-Za-z]?,? [A-Z1-9]|P\.?O\.? Box")
_HAN_HINT = re.compile(
    r"[路街道巷弄里村庄屯段坊同区區园苑厦府城湾庭院寨座][ ]?[甲乙丙丁附]?[ ]?"
    r"[A-Z东西南北中]?[段路]?[0-9一二三四五六七八九十百]"
)


def find_addresses(look: Look) -> Spans:
    """Addresses with a number of a house, a building or a room."""
    text = look.text
    found: list[tuple[int, int]] = []
    for match in look.matches(_MIDDLE, _HAN_HINT, 4, 24):
        floor = found[-1][1] if found else 0
        start = _left_end(text, match, floor)
        if start is None:
            if not found or not floor - 1 <= match.start() <= floor:
                continue
            start = floor
        end = _RIGHT.match(text, match.end())
        stop = len(text[: end.end() if end else match.end()].rstrip(" ,，"))
        if found and start == floor:  # 软件园二期 and 观日路22号 are one
            start = found.pop()[0]
        found.append((start, stop))
    yield from found
    for match in look.matches(_ENGLISH, _HOUSE, 64, 200):
        if _NOT_A_HOUSE.search(before(text, match.start(), 16)) or _NOT_A_STREET.match(match[0]):
            continue
        span = match[0].rstrip(" ,.\n") + ("." if match[0].rstrip(" ,\n").endswith("St.") else "")
        yield match.start(), match.start() + len(span)


def _left_end(text: str, match: re.Match[str], floor: int) -> int | None:
    """Where the address begins whose middle is `match`; None where it is none."""
    stem = re.match(rf"[\u4e00-\u9fff](?:{_ROAD}|{_ESTATE}|村|庄|屯|里|街坊)", match[0])
    assert stem is not None
    here = match.start() + 1
    run = _LEFT.search(text, max(floor, here - 60), here)
    begin = run.start() if run else match.start()
    before_road = text[begin:here]
    divisions = _first_division(before_road)
    if divisions is not None:
        return begin + divisions
    stop = _STOP.match(before_road)
    begin += stop.end() if stop else 0
    name = text[begin : match.start() + len(stem[0])]
    if not 3 <= len(name) <= 12 or _NOT_A_NAME.search(name) or "第" in name[-3:]:
        return None
    rest = _RIGHT.match(text, match.end())
    house = match[0][len(stem[0]) :] + (rest[0] if rest else "")
    parts = len(re.findall(r"号|號|弄|栋|幢|座|单元|室|楼|层|房|\d{3,4}$", house))
    estate = re.search(rf"^[\u4e00-\u9fff](?:{_ROAD})$", stem[0]) is None or stem[0][1:] in "里村庄段道弄"
    return begin if parts >= (2 if estate else 1) else None


def _first_division(text: str) -> int | None:
    """The position of the leftmost name of a division from which divisions follow each other; None without one."""
    names = _names()
    for at in range(len(text)):
        for length in range(min(11, len(text) - at), 1, -1):
            if text[at : at + length] in names:
                return at
    return None


@cache
def _names() -> frozenset[str]:
    """Names of provinces, cities, districts and counties, with their suffix; of provinces and cities also without."""
    names = set(
        [
            "香港",
            "澳门",
            "澳門",
            "九龙",
            "九龍",
            "新界",
            "台北市",
            "台北",
            "臺北市",
            "新北市",
            "高雄市",
            "台中市",
            "臺中市",
            "台南市",
            "桃园市",
            "桃園市",
            "台湾",
            "臺灣",
            "香港特别行政区",
            "澳门特别行政区",
        ]
    )
    for code, name in place_names():
        names.add(name)
        short = re.sub(r"(?:省|市|(?:回族|壮族|维吾尔)?自治区)$", "", name)
        if len(code) == 2 or code.endswith("00"):
            names.add(short)
    return frozenset(
        name
        for name in names
        if len(name) >= 2 and name not in ("市辖区", "县", "省直辖县级行政区划", "城区", "郊区", "矿区", "市区")
    )

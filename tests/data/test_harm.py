"""Harm in both languages: what is found, how it is disguised, and what only looks like it."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.core.errors import FledgeError
from fledge.data.harm import Judge, Lexicon, blot, read_words
from fledge.data.harm.fold import fold
from fledge.data.stages import Refine
from fledge.data.steps import Rejected, read_step
from fledge.data.steps.harm import Harm
from fledge.data.texts import units
from fledge.records.kinds import Conversation, Document, Labelled, Message, Record
from fledge.records.shards import read

from .conftest import Runner, chinese, digests, english, through, write

HARMFUL = [
    ("出售冰毒，保证纯度，货到付款，加微信详聊。", "drugs"),
    ("本店长期供应大麻，隐蔽发货，量大从优，飞机联系。", "drugs"),
    ("听话水、乖乖水，无色无味，同城当天送到。", "drugs"),
    ("K粉现货，私聊报价，支持货到付款。", "drugs"),
    ("线上赌场注册送彩金，真人荷官，提现秒到账。", "gambling"),
    ("北京赛车PK10稳赚不赔，跟着导师下注，日入过万。", "gambling"),
    ("賭場開戶送彩金，加薇信領取。", "gambling"),
    ("六合彩特码内部公开，一码中特，不中退款！", "gambling"),
    ("菠菜平台招代理，充值返水，客服在线。", "gambling"),
    ("代开发票，正规增值税，税点低，电话联系。", "fraud"),
    ("办理假证、刻章办证，本科文凭网上可查。", "fraud"),
    ("刷单兼职日结，一单三十，动动手指就能赚钱。", "fraud"),
    ("高价收卡，收购银行卡四件套，安全可靠。", "fraud"),
    ("黑户贷款，无抵押秒到账，无需征信，加威信。", "fraud"),
    ("同城约炮，学生妹上门，全套服务。", "sexual"),
    ("免费看片网站，色情视频在线观看。", "sexual"),
    ("涩·情视频，无码AV，点击观看。", "sexual"),
    ("寂寞少妇裸聊，加我私聊看更多。", "sexual"),
    ("你这个傻逼，全家死光吧。", "hate"),
    ("他们就是低等民族，滚出中国！", "hate"),
    ("操 你 妈，贱人，废物去死。", "hate"),
    ("支那猪不配活着。", "hate"),
    ("你去死吧，活着没用去死算了，没人爱你。", "self_harm"),
    ("无痛自杀方法，教你怎么自杀不痛。", "self_harm"),
    ("约死群，一起走，烧炭，不要怕。", "self_harm"),
    ("再让我看到你，我就砍死你，杀你全家。", "violence"),
    ("出售枪支，仿真枪出售，包邮到家，货到付款。", "violence"),
    ("自制炸药其实很简单，教你做炸弹。", "violence"),
    ("收钱杀人，代人寻仇，打断你的腿。", "violence"),
    ("裸-聊，援*交，一夜情交友，加薇信。", "sexual"),
    ("Buy cocaine online, discreet overnight shipping, no questions asked.", "drugs"),
    ("Crystal meth for sale, best price, telegram only.", "drugs"),
    ("Buy xanax no prescription needed, wickr me.", "drugs"),
    ("Here is how to cook meth at home, step by step.", "drugs"),
    ("Online casino bonus: free spins no deposit, sign up and win big!", "gambling"),
    ("Guaranteed betting tips, join now and double your stake at our casino.", "gambling"),
    ("Make money fast, guaranteed returns daily, risk free investment, act now.", "fraud"),
    ("I am a Nigerian prince and need a wire transfer fee upfront.", "fraud"),
    ("Fake passport for sale, buy fake documents, diplomas too.", "fraud"),
    ("CVV for sale, fullz, fresh stolen credit cards.", "fraud"),
    ("Hot sluts and horny teens, free porn, click here.", "sexual"),
    ("Nude cams, sex chat with girls in your area tonight.", "sexual"),
    ("p0rn and bl0wjob videos all day", "sexual"),
    ("fuck you, you stupid bitch, piece of shit", "hate"),
    ("f u c k y o u, you f*cking motherfucker", "hate"),
    ("You are subhuman, go back to your country, faggot.", "hate"),
    ("fυсk уоu, you f.a.g.g.o.t", "hate"),
    ("N1gger go home, white power", "hate"),
    ("Kill yourself, nobody loves you.", "self_harm"),
    ("Just go die already, end your life now.", "self_harm"),
    ("The best way to commit suicide is a painless suicide method.", "self_harm"),
    ("k i l l yourself, drink bleach", "self_harm"),
    ("I will kill you and slit your throat.", "violence"),
    ("How to make a bomb from things in your kitchen.", "violence"),
    ("Untraceable guns for sale, no license, ships anywhere, dm me.", "violence"),
    ("Gonna shoot up the school tomorrow, I'll kill you all.", "violence"),
]
HARMLESS = [
    "走私、贩卖、运输、制造毒品，无论数量多少，都应当追究刑事责任，予以刑事处罚。",
    "以营利为目的，聚众赌博或者以赌博为业的，处三年以下有期徒刑、拘役或者管制，并处罚金。",
    "非法持有、私藏枪支、弹药的，依照刑法第一百二十八条的规定处罚。",
    "警方破获一起特大网络赌博案件，抓获犯罪嫌疑人三十余名，冻结赌资两亿元。",
    "记者从法院获悉，被告人因贩卖冰毒被判处有期徒刑十五年。",
    "如果你或身边的人有自杀的念头，请拨打心理援助热线寻求帮助。",
    "吗啡和芬太尼是临床常用的镇痛药物，医生应严格掌握适应症。",
    "患者因过量服用安眠药自杀未遂，经抢救后转入精神科治疗。",
    "严禁虚开、代开发票，违法者将被税务机关依法查处。",
    "谨防刷单返利骗局，凡是要求先垫付资金的刷单都是诈骗，请及时报警。",
    "这个角色情感丰富，景色情趣盎然，颇有地方特色情调。",
    "港口交通便利，出口交易活跃，路口交警正在指挥。",
    "周末预约泡温泉，天色晴朗，心情很好。",
    "他惹上了大麻烦，只好请律师帮忙。",
    "小姐，请问上门安装空调怎么收费？",
    "男性交往和异性交友都应当真诚，可能性交由时间检验。",
    "小说《活着》写了历史中的死亡与杀人，却仍充满希望。",
    "这部电影成功塑造了杀人犯与警察的对手戏。",
    "体检时医生会检查乳房和阴道等部位，以便早期发现肿瘤。",
    "性教育课程讲解了避孕、性病预防和青春期发育。",
    "银行推出新的贷款产品，年利率低至百分之三点五。",
    "请开具增值税普通发票，抬头写公司全称。",
    "福利彩票公益金用于资助困难学生。",
    "艾塞克斯大学位于英格兰东部，校园景色优美。",
    "消防员用炸药拆除了废弃烟囱，周围居民已提前撤离。",
    "他是射击运动员，使用气步枪参加奥运会比赛。",
    "执法轮岗制度提高了工作效率。",
    "白痴天才是一种罕见的综合征，患者在某方面有特殊才能。",
    "夜里老鼠滚蛋糕上去了，真是哭笑不得。",
    "成人高考报名时间为每年八月，考试科目包括语文和数学。",
    "Scunthorpe, Essex, Sussex and Middlesex are places in England.",
    "Please assess the class assignment and pass it to the assistant.",
    "She ordered a cocktail and shitake mushrooms at the Cockburn hotel.",
    "The cockpit of the aircraft was damaged, and the analysis is under way.",
    "The court sentenced the man to ten years for selling cocaine and heroin.",
    "Police arrested three suspects after a bomb was found near the station.",
    "Patients who received ketamine treatment reported fewer symptoms of depression.",
    "If you are thinking about suicide, call a helpline; you are not alone.",
    "Breast and penile cancers are rare in patients under thirty.",
    "The Gambling Act 2005 regulates casinos, betting and lotteries; it is an offence to operate without a licence.",
    "The study followed patients with opioid overdose for two years.",
    "Researchers found that gambling advertising is linked to harm among young people.",
    "It shall be unlawful for any person to sell firearms or explosives to a minor.",
    "The bank offers home loans at a fixed rate for five years.",
    "Never send gift cards to someone you met online: it is a scam, report it.",
    "Bitcoin fell two percent on Monday after the central bank raised rates.",
    "I use weed killer in the garden and a glue gun for the hobby room.",
    "He kept a poker face during the whole negotiation.",
    "The novel tells the story of a murder in a small town.",
    "Dick Cheney and Fanny Brice never met, nor did Randy Newman.",
    "The titmouse and the great tit are small birds; the booby is a large one.",
    "The company can kill the process and the child process dies.",
    "Sex education should be taught in every school, say doctors.",
    "Passport applications take four weeks; bring a photo and the old passport.",
    "She won the jackpot of hearts with her last song at the festival.",
    "The museum shows swords, guns and cannons of the eighteenth century.",
    "To hang a picture, use a hook that can carry ten kilograms.",
    "We had a hell of a good time, it was a damn good game.",
    "An escort vehicle will guide the oversized truck through the city.",
    "Chemistry lesson: sodium explodes in water, so do not try this at home.",
]
JUDGE = Judge()


def flagged(text: str, judge: Judge = JUDGE) -> str:
    """The heaviest category of a text that the step would refuse; "" for one it would keep."""
    verdict = judge(text, len(units(text)))
    return next(iter(verdict.categories)) if verdict.score >= 30 else ""


def test_precision_and_recall_on_sentences_of_both_languages() -> None:
    assert len(HARMFUL) + len(HARMLESS) >= 80
    found = [(text, category) for text, category in HARMFUL if flagged(text)]
    wrong = [text for text in HARMLESS if flagged(text)]
    missed = [text for text, _ in HARMFUL if not flagged(text)]
    assert len(found) / len(HARMFUL) >= 0.95, missed
    assert len(found) / (len(found) + len(wrong)) >= 0.97, wrong
    assert sum(flagged(text) == category for text, category in HARMFUL) / len(HARMFUL) >= 0.9


DISGUISED = [
    ("fuck", "fuck ｆｕｃｋ fuuuuck f.u.c.k f-u-c-k fυсk fu\u200bck f*ck fu.ck FUCK f_u_c_k fück"),
    ("asshole", "a$$hole assh0le a-s-s-h-o-l-e ａｓｓｈｏｌｅ @sshole"),
    ("色情视频", "色情视频 色*情*视*频 涩情视频 色情視頻 色\u200b情视频 色.情.视.频 瑟情视频"),
    ("赌博平台注册", "赌博平台注册 睹博平台注册 赌搏平台注册 賭博平臺注册 赌·博平台注册"),
]


@pytest.mark.parametrize(("word", "disguises"), DISGUISED)
def test_a_word_is_found_in_every_disguise(word: str, disguises: str) -> None:
    expected = JUDGE(word, 1).words
    assert expected
    for disguise in disguises.split():
        assert JUDGE(disguise, 1).words[:1] == expected[:1], disguise
    assert JUDGE("f u c k", 1).words == ("fuck",) and JUDGE("色 情 视 频", 1).words == ("色情视频",)


def test_words_inside_others_and_across_sentences_are_none() -> None:
    for text in (
        "shitake assessment Cockburn",
        "特色。情况",
        "特色，情况",
        "f. Under c. Kay",
        "a s s e s s",
        "rock and roll",
    ):
        assert JUDGE(text, 1).words == (), text
    assert JUDGE("c++* and *a+|b*$ are code, 2*x+1 too", 1).words == ()


@given(st.text(alphabet=st.sampled_from("fuckFÜ色涩情視频頻 .*­​а0$ΑßİŉﬁⅣ㍿가"), max_size=40))
@settings(deadline=None)
def test_folding_keeps_positions_and_is_done_once(text: str) -> None:
    folded = fold(text)
    assert len(folded) == len(text) and fold(folded) == folded
    hits = JUDGE.lexicon.hits(text)
    assert all(0 <= hit.start < hit.end <= len(text) for hit in hits)
    masked = blot(text, hits)
    assert len(masked) == len(text)
    inside = {at for hit in hits for at in range(hit.start, hit.end)}
    assert all(masked[at] == ("*" if at in inside else text[at]) for at in range(len(text)))


def test_a_topic_needs_a_cue_and_an_excuse_takes_weight_away() -> None:
    assert JUDGE("Heroin is derived from morphine.", 5).score == 0
    assert JUDGE("Heroin for sale here.", 40).score == 50
    assert JUDGE("Heroin. A house is for sale.", 40).score == 0, "the cue stands in another sentence"
    assert JUDGE("Police found heroin for sale.", 40).score == 7.5
    assert JUDGE("出售海洛因", 40).score == 50 and JUDGE("禁止出售海洛因", 40).score == 7.5


def test_the_score_is_weight_per_thousand_units() -> None:
    assert JUDGE("fuck", 1).score == JUDGE("fuck", 40).score == 25
    assert JUDGE("fuck", 1000).score == 1 and JUDGE("fuck fuck kill yourself", 1000).score == 5
    assert JUDGE("fuck kill yourself", 100).categories == {"self_harm": 3, "hate": 1}


def rows(step: Harm, *texts: tuple[str, str]) -> list[Record | Rejected]:
    return through(step, [Document(text, f"{number}", language) for number, (text, language) in enumerate(texts)])


def test_reject_says_why_and_long_texts_bear_a_word() -> None:
    rng = random.Random(1)
    long = english(rng, 60) + " fuck you " + english(rng, 60)
    counts = Counter[str]()
    records = [Document("你去死吧，傻逼。", "a", "zh"), Document(long, "b", "en"), Document(chinese(rng), "c", "zh")]
    refused, *kept = through(Harm(), records, counts)
    assert refused == Rejected("words of hate", "score 150.0: 你去死吧, 傻逼")
    assert kept == records[1:] and counts == {"harm/hate": 1}
    (strict,) = rows(Harm(threshold={"en": 1}), (long, "en"))
    assert isinstance(strict, Rejected) and strict.reason == "words of hate"
    assert rows(Harm(threshold={"zh": 1}), (long, "en"))[0] == Document(long, "0", "en"), "the other language's stays"
    assert isinstance(rows(Harm(threshold={"en": 1}), (long, "fr"))[0], Rejected), "others take that of English"


def test_tag_keeps_every_row_and_mask_blots_only_the_words() -> None:
    one, two = rows(Harm(action="tag"), ("出售枪支，约炮", "zh"), ("早上好", "zh"))
    assert isinstance(one, Document) and isinstance(two, Document)
    assert one.meta == {"harm": "150.0", "harm_categories": "sexual,violence"}
    assert two.meta == {"harm": "0.0", "harm_categories": ""}
    talk = Conversation((Message("user", "what the f.u.c.k is it"), Message("assistant", "我不约炮。")), language="en")
    (masked,) = through(Harm(action="mask"), [talk])
    assert isinstance(masked, Conversation)
    assert [m.content for m in masked.messages] == ["what the ******* is it", "我不**。"]
    assert through(Harm(action="mask"), [masked]) == [masked]


def test_words_from_files_and_folders_named_by_language(tmp_path: Path) -> None:
    folder = tmp_path / "naughty"
    folder.mkdir()
    (folder / "en.json").write_text(json.dumps(["blorf", "two words", "x"]))
    (folder / "zh.json").write_text(json.dumps(["坏蛋糕点", "淫"], ensure_ascii=False))
    (folder / "de.json").write_text(json.dumps(["schlimm"]))
    (folder / "package.json").write_text(json.dumps({"name": "naughty"}))
    (tmp_path / "mine.txt").write_text("# mine\nsnark\n", encoding="utf-8")
    assert read_words([folder, tmp_path / "mine.txt"], ("en", "zh")) == [
        "blorf",
        "two words",
        "x",
        "坏蛋糕点",
        "淫",
        "snark",
    ]
    step = Harm(words=[folder, tmp_path / "mine.txt"], threshold={"en": 20, "zh": 20})
    judged = rows(
        step, ("Blorfs!", "en"), ("two  words", "en"), ("坏 蛋 糕 点", "zh"), ("snark", "en"), ("x schlimm 淫", "en")
    )
    assert [isinstance(row, Rejected) for row in judged] == [True, True, True, True, False]
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(FledgeError, match=r"empty\.txt"):
        rows(Harm(words=[tmp_path / "empty.txt"]), ("a", "en"))
    (tmp_path / "broken.json").write_text("[")
    with pytest.raises(FledgeError, match="is not JSON"):
        rows(Harm(words=[tmp_path / "broken.json"]), ("a", "en"))


def test_pinyin_is_read_only_when_asked_for() -> None:
    spelled = Judge(Lexicon(pinyin=True))
    for text in ("luo liao", "luoliao ma", "bai jia le"):
        assert JUDGE(text, 40).score == 0 and spelled(text, 40).score > 0, text
    assert spelled("a nice day for a walk in the park", 9).score == 0


def test_a_trained_classifier_refuses_what_no_list_knows(tmp_path: Path) -> None:
    from fledge.data.classifier import Features, Settings
    from fledge.data.classifier_training import train_classifier

    rng = random.Random(3)
    bad = ["nobody", "wants", "you", "here", "stupid", "worthless", "ugly", "loser"]
    said = [Labelled(" ".join(rng.choices(bad, k=8)), "toxic", f"t{n}", "en") for n in range(80)]
    said += [Labelled(english(rng, 1), "ok", f"o{n}", "en") for n in range(80)]
    train_classifier([(write(tmp_path / "rows", said), "")], Features(bits=12), Settings(), tmp_path / "model")
    texts = (("nobody wants a worthless loser", "en"), ("The river of a small town.", "en"))
    refused, kept = rows(Harm(model=tmp_path / "model"), *texts)
    assert isinstance(refused, Rejected) and refused.reason == "classified as toxic" and float(refused.value) >= 0.5
    assert kept == Document(texts[1][0], "1", "en")
    tagged = rows(Harm(model=tmp_path / "model", action="tag"), *texts)
    shares = [float(row.meta["harm_probability"]) for row in tagged if isinstance(row, Document)]
    assert shares[0] >= 0.5 > shares[1]
    with pytest.raises(FledgeError, match='did you mean "toxic"'):
        rows(Harm(model=tmp_path / "model", label="toxi"), *texts)


def test_both_steps_in_a_refinery_read_their_files_and_give_the_same_bytes_in_two_processes(
    run: Runner, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("snark\n", encoding="utf-8")
    (tmp_path / "key").write_bytes(b"secret")
    rng = random.Random(5)
    rows = [Document(f"{english(rng, 3)} a{n % 7}@b.com", f"{n}", "en") for n in range(40)]
    rows += [Document(f"snark {n}", f"bad{n}", "en") for n in range(5)]
    corpus = write(tmp_path / "a", rows)
    steps = [
        {"harm": {"words": [str(tmp_path / "mine.txt")], "threshold": {"en": 20}}},
        {"pii": {"replace": "consistent", "key": str(tmp_path / "key")}},
    ]
    made = [run(Refine(data="a", steps=steps), {"a": corpus}, workers=workers) for workers in (1, 2)]
    assert digests(made[0].path) == digests(made[1].path)
    assert made[0].metrics["rejected"] == {"harm": {"words of listed": 5}} and made[0].metrics["pii"] == {"email": 40}
    addresses = {row.text.split()[-1] for row in read(made[0], "documents") if isinstance(row, Document)}
    assert len(addresses) == 7 and all(address.endswith("@example.com") for address in addresses)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"action": "burn"}, "harm, action"),
        ({"threshold": {"en": 0}}, "must be above 0"),
        ({"treshold": {}}, 'did you mean "threshold"'),
        ({"probability": 2}, "harm, probability"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_step({"harm": options})

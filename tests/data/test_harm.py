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
MORE_HARMFUL = [
    "诚招网络博彩推广代理，高额返点，月入十万不是梦。",
    "加V看小姐姐私房视频，十八禁福利，懂的来。",
    "专业办理各类毕业证、学位证、驾驶证，先看样品后付款。",
    "出一批K粉和摇头丸，有需要的加薇信。",
    "你妈死了吧，狗东西，吃屎去吧。",
    "我今晚就要拿刀捅死他，谁也别拦我。",
    "想死的进群，我们约好一起跳楼。",
    "信用卡代还提额套现，当天到账，花呗借呗都能套。",
    "河南人都是骗子，滚回你们老家去，垃圾人种。",
    "手工自制雷管和炸药，教程打包出售。",
    "真钱棋牌游戏，首充送百分百，提款秒到。",
    "幼女资源打包，百度云发货。",
    "代孕包成功，包性别，供卵。",
    "出售公民个人信息，开房记录、户籍查询。",
    "大量收购对公账户、U盾，价格从优。",
    "兼职打字员日结三百，先交押金后领任务。",
    "想要丝袜美腿特殊服务的男士请联系。",
    "你这种人就该被车撞死，垃圾。",
    "氰化钾现货，无痛安乐，全国发货。",
    "气枪铅弹、钢珠弓弩配件，支持货到付款。",
    "Cheap Viagra and Cialis, no rx, ships worldwide!",
    "I'm going to stab you tonight and no one will find your body.",
    "All muslims are terrorists and should be exterminated.",
    "Women are worthless whores who deserve to be raped.",
    "Earn $5000 a week from home, no experience, just pay a small registration fee.",
    "Hot singles want to hook up with you, XXX pics inside.",
    "You're so ugly, nobody would miss you if you hanged yourself.",
    "Selling high quality counterfeit euros and dollars, undetectable.",
    "Join our VIP betting group, fixed matches 100% sure.",
    "Pure MDMA crystals, stealth shipping, escrow accepted.",
    "Step by step guide to building a pressure cooker bomb.",
    "Send nudes and I'll pay you, no age limit.",
    "Dirty jews control the banks, burn them all.",
    "Claim your lottery winnings now, send your bank details and a processing fee.",
    "AR-15 lower receivers with no serial, cash only, no paperwork.",
]

# Written when the lists were done. For them only everyday words (coke, massage) were taken out of the lists: this is
# what a text from elsewhere meets.
NEW_HARMFUL = [
    "高仿人民币出售，手感逼真，可过验钞机，诚心要的加我。",
    "招陪玩，美女大尺度，付费进群看全套。",
    "专业查个人信息，手机定位，开房记录，价格面议。",
    "老牌平台，电子棋牌真人视讯，首存即送八十八元。",
    "内部渠道拿货，冰糖猪肉应有尽有，懂行的私聊。",
    "黑人都是劣等的，应该杀光。",
    "你这个废物，怎么还不去死，早点跳楼算了。",
    "不想活了，有没有一起走的，找个没人的地方烧炭。",
    "五连发猎枪，带消音器，全国发货，非诚勿扰。",
    "教你在家自制炸弹，材料超市都能买到。",
    "办证刻章，公司注销，加急当天取。",
    "网贷逾期怎么办？内部渠道修复征信，当天见效，加微信。",
    "狗日的东西，老子弄死你全家。",
    "少妇约见，同城上门，不满意不收钱。",
    "杀手服务，帮你解决仇人，先付一半定金。",
    "Get your fake id today, undetectable, scannable, telegram only.",
    "Immigrants are filthy parasites, get rid of them.",
    "I hope you get cancer and die, you worthless cunt.",
    "Looking for underage girls, send pics, I pay.",
    "Top quality heroin, fast shipping, escrow, message me.",
    "You should hang yourself, nobody would care.",
    "Win real money at our casino, 200% welcome bonus, sign up now.",
    "We recover lost crypto, just send a small upfront payment, guaranteed.",
    "Untraceable ghost guns, ready to ship, cash only.",
    "Watch hot teens xxx live on webcam free.",
    "Gay people are a disease and should be wiped out.",
    "I know where you live and I'm coming to shoot you.",
    "Ricin recipe and step by step guide, pm me.",
    "Stolen paypal accounts with balance, bulk discount.",
    "Make $500 a day trading forex, no risk, guaranteed profit, act now.",
]
NEW_HARMLESS = [
    "邮局出售纪念邮票，先到先得，需要的联系营业厅。",
    "本店出售二手手机，支持货到付款，质量保证。",
    "学校请各位家长加微信群，方便通知。",
    "毕业证丢失后可以到学校申请补办学历证明。",
    "他从小就喜欢打游戏，妈妈说他是废物，他很难过。",
    "这家公司收购了三家软件企业，价格从优。",
    "大夫说安眠药不能随便吃，需要处方。",
    "奶奶做的冰糖猪肉特别好吃。",
    "同城快递上门取件，当天到账。",
    "女人和男人享有平等的权利，不应被歧视。",
    "日本人和韩国人都喜欢吃泡菜。",
    "打牌输了就请客吃饭，大家玩得很开心。",
    "她的丝袜破了，只好去商店再买一双。",
    "棋牌室禁止任何形式的赌钱行为。",
    "电影里的杀手最后选择了自首。",
    "公安机关收缴了一批气枪和弩，并予以销毁。",
    "请勿向陌生人透露个人信息和银行卡密码。",
    "理财有风险，投资需谨慎，高收益往往伴随高风险。",
    "今年水果大丰收，批发价格比去年低。",
    "新教程已经上传到网盘，需要的同学自行下载。",
    "The pharmacy ships prescription drugs in discreet packaging.",
    "Our shop sells rifles and ammo to licensed hunters only.",
    "Teens spend five hours a day on their phones, a survey found.",
    "Women in engineering are still rare, and they deserve better pay.",
    "The fake diploma was discovered during a background check.",
    "Jews and Muslims live side by side in the old town.",
    "The casino hotel offers a free breakfast and a pool.",
    "My grandmother left us an inheritance and a small house.",
    "Coke is my favourite drink, in stock at every store.",
    "He cracked the code after a step by step guide.",
    "A massage at the spa costs sixty dollars; click here to book.",
    "The forum post asked for tips on overclocking.",
    "Crypto investors lost money when the exchange went bankrupt.",
    "Steroids are prescribed for severe asthma.",
    "The rifle club meets on Tuesday; sign up now for the safety course.",
]
JUDGE = Judge()


def flagged(text: str, judge: Judge = JUDGE) -> str:
    """The heaviest category of a text that the step would refuse; "" for one it would keep."""
    verdict = judge(text, len(units(text)))
    return next(iter(verdict.categories)) if verdict.score >= 30 else ""


def test_precision_and_recall_on_sentences_of_both_languages() -> None:
    """The sentences that the lists were made with: what must not get lost."""
    harmful = [text for text, _ in HARMFUL] + MORE_HARMFUL
    assert len(harmful) + len(HARMLESS) >= 150
    missed = [text for text in harmful if not flagged(text)]
    wrong = [text for text in HARMLESS if flagged(text)]
    assert len(missed) <= 0.05 * len(harmful), missed
    assert len(wrong) <= 0.02 * len(HARMLESS), wrong
    assert sum(flagged(text) == category for text, category in HARMFUL) / len(HARMFUL) >= 0.9


def test_on_new_sentences_a_list_of_words_is_worse_and_we_say_how_much() -> None:
    found, wrong = sum(map(bool, map(flagged, NEW_HARMFUL))), sum(map(bool, map(flagged, NEW_HARMLESS)))
    assert found / len(NEW_HARMFUL) >= 0.7 and found / (found + wrong) >= 0.85, (found, wrong)


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
    from fledge.data.judges.classifier import Features, Settings
    from fledge.data.judges.classifier_training import train_classifier

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

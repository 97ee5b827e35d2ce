# ruff: noqa: E501 (pages of HTML are long lines)
"""Pages of HTML as the web has them, with the text that a reader came for: 12 sites × 2 texts each.

A site is a frame of navigation, banners, comments and small print around `{title}` and `{body}`; the gold text of a
page is that of its title and body and nothing else, taken out of them by a few lines that share nothing with fledge.
"""

from __future__ import annotations

import html
import re

ENGLISH = {
    "Why we repair old radios": """
<p>Every Thursday evening seven or eight of us meet in the back room of the library, unpack our soldering irons, and open
radios that nobody has listened to since the sixties. Most of them need nothing but new capacitors and an hour of
patience; a few need a miracle.</p>
<p>People ask us whether it is worth the trouble. A new receiver costs less than the parts, and it plays <a
href="/fm">stereo</a>. But a radio that your grandmother bought with her first salary is not a device. It is a letter,
and we happen to know how to open the envelope.</p>
<h2>What you need to begin</h2>
<ul><li>A soldering iron with a thin tip, forty watts are plenty.</li><li>A multimeter, even the cheapest one on the
market.</li><li>Somebody who has done it before and does not mind questions.</li></ul>
<p>Never touch a set that is plugged in, and never trust one that was plugged in a minute ago: the large capacitors keep
their charge, and they are in no hurry to give it away.</p>
<p>If you come by next week, bring a radio, or only your curiosity. There is tea, and there is always one cabinet that
nobody has managed to close again.</p>""",
    "City council votes to reopen the river baths": """
<p>After eleven years of debate the city council voted on Tuesday night, by twenty-three votes to eighteen, to reopen the
public baths on the eastern bank of the river. The decision came shortly before midnight, when most of the two hundred
visitors had long gone home.</p>
<p>"The water has been clean enough for six summers," said Maria Keller, who chairs the committee for public health.
"What was missing was not the laboratory, it was the courage."</p>
<p>Opponents pointed to the cost. According to the administration, the restoration of the wooden decks alone will take
four million, and another half million a year must be found for lifeguards. The treasurer called the figures
<em>optimistic at best</em>.</p>
<p>Work is to begin in March and will take two summers. Until then swimmers may use the stairs below the old customs
house at their own risk, as they have done all along.</p>
<p>The council also approved a new timetable for night buses and postponed the question of the market hall until its
next session in May.</p>""",
    "Reading a file line by line": """
<p>The usual way to read a text file is to open it in a <code>with</code> statement and to loop over the object. The file
is closed when the block is left, even when an exception is raised inside, and only one line is held in memory at a
time.</p>
<pre>with open("notes.txt", encoding="utf-8") as file:
    for number, line in enumerate(file, start=1):
        print(number, line.rstrip())</pre>
<p>Always name the encoding. Without it Python takes what the system suggests, and the program that worked on your
machine fails on the next one with an error that points to the wrong line.</p>
<table><tr><th>Mode</th><th>Meaning</th></tr><tr><td>r</td><td>read text, the default</td></tr><tr><td>w</td><td>write,
and empty the file first</td></tr><tr><td>a</td><td>write behind what is there</td></tr></table>
<p>When a file is too large for memory, this loop still works; reading it whole with <code>read()</code> does not. For
binary data add the letter b to the mode and leave the encoding out.</p>""",
    "Grandfather's lentil soup": """
<p>My grandfather cooked exactly three dishes, and two of them were lentil soup. This is the second one, the one for
winter, which he made on Sundays when the kitchen windows were white with steam and nobody was allowed to lift the
lid.</p>
<ul><li>300 grams of brown lentils, washed twice</li><li>two carrots, one parsnip, half a celeriac, all in small
cubes</li><li>one onion and three cloves of garlic</li><li>a spoon of vinegar, at the very end</li></ul>
<p>Fry the onion slowly until it is golden; this takes longer than every recipe says. Add the vegetables, stir for five
minutes, then the lentils and one and a half litres of water. Do not salt yet, or the lentils will stay hard.</p>
<p>Let it simmer for fifty minutes without looking. Then salt, pepper and the vinegar, which wakes everything up. He
served it with dark bread and with the same story about the train to Trieste every time.</p>
<p>The soup is better on the second day. On the third day there has never been any left, so I cannot say.</p>""",
    "The night train is coming back": """
<p>For a long time the night train was a thing of the past: too slow for the hurried, too expensive for the poor, and too
loud for everybody who wanted to sleep. Then the airports filled up, and somebody remembered that a bed on rails covers
a thousand kilometres while you do nothing at all.</p>
<p>Last winter I took four of them. On the first I shared a compartment with a cellist and her instrument, which had a
ticket of its own. On the second the heating failed, and the conductor went from door to door with blankets and a bottle
of plum brandy.</p>
<p>What has changed is not the comfort. The mattresses are as thin as they have always been. What has changed is the
company: students, engineers, whole families with sledges, people who count their carbon and people who simply like to
wake up somewhere else.</p>
<p>There are three new lines this year, and two more are promised for next autumn. If you go, take the upper berth, bring
earplugs, and set no alarm. The border police will see to that.</p>""",
    "How do I keep basil alive indoors?": """
<p>I have bought a pot of basil every month for a year now, and every month it dies on the same window sill. It gets
light from the south and water every morning. After a week the leaves turn yellow, after two weeks the stems are black.
What am I doing wrong?</p>
<p>You are drowning it. A pot from the supermarket holds twenty seedlings that were never meant to grow old together.
Split them into four pots with fresh soil, water from below, and only when the surface feels dry to the finger.</p>
<p>I agree about the water, but the window is a problem as well: at night the glass is cold, and basil comes from a place
where nights are warm. Put it half a metre back into the room and it will thank you.</p>
<p>Thanks to both of you! I split the pot three weeks ago and moved it to the kitchen table. It has not only survived, it
has doubled in size, and I had to make pesto for the entire staircase.</p>""",
}

CHINESE = {
    "老城区里的最后一家修表铺": """
<p>从地铁站出来往南走两百米，拐进一条只容得下一辆三轮车的小巷，就能看见那块褪了色的招牌。修表铺不到六平方米，一张桌子、一盏灯、一把椅子，
陈师傅在这里坐了四十一年。</p>
<p>“以前这条街上有七家修表的，”他一边说，一边把放大镜推到额头上，“现在只剩我一个了。年轻人看手机，谁还戴表呢？”话虽这么说，这天上午却来了五位客人，
其中一位专程从邻省坐高铁赶来，带着父亲留下的一块老怀表。</p>
<h2>机芯里的时间</h2>
<p>怀表的摆轮断了一根轴尖，市面上早已没有配件。陈师傅打开抽屉，里面是几十个装满零件的小铁盒。他说，能修的表不要扔，修不好的表也不要扔，它们身上的零件总有
一天会救另一块表的命。</p>
<p>徒弟学了三年，上个月去了一家电子厂。老人并不责怪他：“这个活儿，坐得住的人才干得了。我也不是天生坐得住，是日子把我按在了椅子上。”</p>""",
    "市图书馆新馆下月试运行": """
<p>记者昨日从市文化和旅游局获悉，历时三年建设的市图书馆新馆将于下月一日开始试运行，首批开放阅览座位两千六百个，藏书一百二十万册，市民凭身份证即可入馆。</p>
<p>新馆位于城东湖畔，总建筑面积四万八千平方米，设有少儿阅览区、地方文献室、视障人士阅览室和二十四小时自助书房。馆长李明介绍说，少儿区的书架全部
降低到一米二，孩子们不用踮脚就能拿到自己喜欢的书。</p>
<p>试运行期间，每日限流五千人，需要提前一天在网上预约。<a href="/metro">地铁四号线</a>和三条公交线路可以直达，馆内不设机动车停车场，倡导读者绿色出行。</p>
<p>老馆将继续开放，计划明年改造为古籍修复中心。据了解，馆藏的三千余册善本将在那里得到系统的保护和数字化，其中部分珍品届时会向公众展出。</p>""",
    "怎样用命令行查看磁盘占用": """
<p>服务器的磁盘满了，第一件事不是删文件，而是弄清楚空间被谁占用。下面两个命令几乎在所有发行版上都有，不需要安装任何软件，也不需要管理员权限。</p>
<pre>df -h
du -sh /var/* | sort -h | tail</pre>
<p>第一条命令列出每个分区的大小和剩余空间，第二条命令把目录按大小排序，最后几行就是最占地方的。如果日志目录排在最后，先检查日志轮转有没有正常工作。</p>
<table><tr><th>选项</th><th>含义</th></tr><tr><td>-h</td><td>用易读的单位显示大小</td></tr><tr><td>-s</td><td>只显示每个参数的总计</td></tr></table>
<p>需要注意的是，被删除但仍被进程打开的文件不会出现在统计里，空间却没有释放。这时重启那个进程就可以了，不必重启整台机器。</p>""",
    "外婆的腌笃鲜": """
<p>每年清明前后，外婆都会去早市挑两支带泥的春笋。她挑笋不看大小，只用指甲在根部轻轻掐一下，能掐出水来的才要。回到家里，剥壳、切块、焯水，一气呵成，
咸肉已经在窗台上晾了一冬。</p>
<ul><li>春笋两支，去壳后约六百克</li><li>咸肉二百克，提前用清水浸泡半天</li><li>鲜五花肉三百克，切成方块</li><li>百叶结一小把，最后放</li></ul>
<p>砂锅里放足冷水，把两种肉一起下锅，大火烧开，撇去浮沫，转小火慢慢笃一个半小时。“笃”是我们那里的话，听那声音就知道火候够不够：太急了肉会柴，太慢了
汤不白。</p>
<p>笋要在最后半小时放，百叶结再晚一些。盐是不用加的，咸肉里有的是。起锅的时候撒一点葱花，满屋子都是春天的味道。</p>
<p>后来我在别的城市也做过很多次，总觉得差一点什么。外婆说，差的是早市上的那口泥。</p>""",
    "夜跑三年之后": """
<p>三年前的体检报告上写着四个箭头，医生说再这样坐下去，药就要吃一辈子了。那天晚上我翻出一双旧球鞋，绕着小区跑了八百米，扶着路灯喘了十分钟，回家的
时候腿是软的。</p>
<p>头一个月最难。下雨不想跑，加班不想跑，心情好不想跑，心情不好也不想跑。后来我给自己定了一条规矩：鞋子穿好出了门，就算完成任务，跑不跑随意。
奇怪的是，出了门就没有不跑的。</p>
<p>现在每周四次，每次六公里，不快，但是稳。箭头只剩下一个。比箭头更要紧的是，我认识了这座城市的夜晚：凌晨收摊的馄饨铺，河边练萨克斯的大叔，还有
那只总在第三座桥等我的黄狗。</p>
<p>有人问我怎么坚持下来的，其实没有坚持。一件事情做到第二百次，停下来反而需要坚持。</p>""",
    "新买的电饭锅总是溢出来怎么办？": """
<p>上周买了一个三升的电饭锅，按照说明书放的米和水，每次煮饭都会从出气孔溢出来，台面上全是米汤。换货之后还是一样，请问是我操作的问题还是锅的问题？</p>
<p>先看看米洗了几遍。淀粉多的米煮的时候泡沫多，多淘一遍会好很多。另外三升的锅不要煮满，最多放到六成，留出泡沫的空间。</p>
<p>楼上说得对，再补充一点：出气孔上面那个小盖子可以拆下来洗，里面如果有干掉的米汤，蒸汽出不去，就会把米汤一起顶出来。我家的锅就是这么修好的，一分钱没花。</p>
<p>谢谢两位！拆开盖子一看，里面果然糊住了，洗干净之后又少放了半杯米，今天早上煮粥一滴都没有溢出来。</p>""",
}

_MENU = "".join(f'<li><a href="/{word}">{word.title()}</a></li>' for word in "home world politics sport culture travel science shop".split())  # fmt: skip  # noqa: SIM905
_菜单 = "".join(f'<li><a href="/c{i}">{word}</a></li>' for i, word in enumerate("首页 国内 国际 财经 体育 娱乐 科技 汽车 房产 教育".split()))  # fmt: skip  # noqa: SIM905
_MORE = "".join(
    f'<div class="t"><a href="/a{i}">{title}</a></div>'
    for i, title in enumerate(
        [
            "Ten cities to see before they change",
            "The return of the fountain pen",
            "What bees know about architecture",
            "Five quiet places in the capital",
        ]
    )
)
_更多 = "".join(
    f'<li><a href="/n{i}.html">{title}</a></li>'
    for i, title in enumerate(
        [
            "本市今日起调整供暖时间",
            "周末两条道路封闭施工绕行指南",
            "专家提醒：换季注意预防感冒",
            "全国青少年围棋赛落幕",
            "十大夜市排行榜出炉",
        ]
    )
)

SITES_EN = {
    "blog": """<!doctype html><html><head><title>{title} | Back Room Notes</title><style>p{{margin:0}}</style></head><body>
<header><a href="/">Back Room Notes</a><nav><ul>{menu}</ul></nav></header><main><article><h1>{title}</h1>
<div class="post-meta">Posted by Ann on March 3 in <a href="/c">Stories</a></div>{body}
<div class="share-buttons"><a href="#">Tweet</a> <a href="#">Share</a> <a href="#">Pin</a></div></article>
<section id="comments"><h3>3 comments</h3><ol><li><p>Great post, I have been reading your blog for years now and this one
is the best so far.</p></li><li><p>Could you tell us more about it in the next one, please? My brother wants to know.</p>
</li></ol><form><textarea>Your comment</textarea><button>Send</button></form></section></main>
<aside><h3>About me</h3><p>I write about small things and the people who take care of them, mostly on Sundays.</p></aside>
<footer><p>© 2024 Back Room Notes. All rights reserved.</p></footer></body></html>""",
    "news": """<html><head><title>{title} - The Daily Example</title><meta property="og:title" content="{title}">
<script>var a="<p>not text at all, only a script that looks like it.</p>";</script></head><body class="has-sidebar">
<div class="cookie-banner"><p>We use cookies to improve your experience. By continuing you accept our privacy policy and
the use of cookies by our 832 partners.</p><button>Accept all</button></div><div class="topbar"><ul>{menu}</ul></div>
<div class="wrap"><div class="col-main"><h1>{title}</h1><div class="byline">By Our Correspondent, Tuesday 10:42</div>
<div class="story">{body}</div><div class="newsletter-signup"><p>Get the best stories of the week in your inbox, every
Friday at six, free of charge. Unsubscribe whenever you like.</p><input value="mail"></div><div class="related-stories">
<h4>Read more</h4>{more}</div></div><div class="col-right"><h4>Most read</h4>{more}</div></div>
<div class="bottom"><a href="/i">Imprint</a> <a href="/t">Terms of use</a> <a href="/p">Privacy policy</a></div></body></html>""",
    "tables": """<html><head><title>{title}</title></head><body bgcolor=white><table width=100%><tr><td colspan=2><img src=l.gif>
<font size=5>Welcome to our pages</font></td></tr><tr><td width=120 valign=top><a href=1.htm>News</a><br><a href=2.htm>Guest
book</a><br><a href=3.htm>Links</a><br><a href=4.htm>Pictures</a><br><a href=5.htm>Contact</a></td><td valign=top><h1>{title}</h1>
{body}</td></tr><tr><td colspan=2 align=center><a href=index.htm>Back</a> | <a href=top.htm>Top</a> | <a href=map.htm>Map</a><br>
<font size=1>Best viewed at 800x600. Last changed 3/4/2001. You are visitor number 004512.</font></td></tr></table></body></html>""",
    "documentation": """<!DOCTYPE html><html><head><title>{title} &mdash; Example 1.2 documentation</title></head><body>
<div class="related" role="navigation"><h3>Navigation</h3><ul><li><a href="g">index</a> |</li><li><a href="n">next</a> |</li>
<li><a href="p">previous</a> |</li></ul></div><div class="document"><div class="documentwrapper"><div class="bodywrapper">
<div class="body" role="main"><section id="s"><h1>{title}<a class="headerlink" href="#s">¶</a></h1>{body}</section></div></div></div>
<div class="sphinxsidebar" role="navigation"><h4>Previous topic</h4><p><a href="p">Tutorial and first steps</a></p><h3>This page</h3>
<ul><li><a href="e">Report a bug</a></li><li><a href="s">Show source</a></li></ul></div></div>
<div class="footer">© Copyright 2024, the authors. Created using Sphinx.</div></body></html>""",
    "soup": """<html><head><title>{title}</title></head><body><div class="x1"><div class="x2"><a href="/">Logo</a></div><div>
<span><a href="/1">Kitchen</a></span><span><a href="/2">Garden</a></span><span><a href="/3">Travel</a></span><span>
<a href="/4">People</a></span></div></div><div class="x7"><div class="x8"><div><h1>{title}</h1></div><div class="x9"><div>{body}
</div></div></div><div class="x3"><div>You may also like</div>{more}</div></div><div class="x5"><div>Follow us</div><div>
<a href="/f">Facebook</a> <a href="/i">Instagram</a></div><div>Copyright (c) 2023 Example Media. Made with love.</div></div>
<div style="display:none"><p>This paragraph is hidden from every reader and should never be found in a corpus.</p></div></body></html>""",
    "forum": """<html><head><title>{title} - Household board</title></head><body><div id="navbar"><ul>{menu}</ul></div>
<div class="breadcrumbs"><a href="/">Board index</a> » <a href="/h">Household</a> » {title}</div><div id="page-body">
<h1>{title}</h1><div class="topic">{posts}</div></div><div class="pagination">Page 1 of 1 <a href="?p=2">Next</a></div>
<div class="online-list">Users browsing this forum: no registered users and 4 guests</div><div class="copyright">Powered by
an example of a board. All times are UTC.</div></body></html>""",
}
SITES_ZH = {
    "portal": """<html><head><meta charset="utf-8"><title>{title}_新闻中心_示例网</title></head><body><div class="top-nav"><ul>{menu}</ul></div>
<div class="path"><a href="/">示例网</a> &gt; <a href="/n">新闻中心</a> &gt; 正文</div><div class="main-content"><div class="left"><h1>{title}</h1>
<div class="info">2024年03月05日 08:30　来源：示例日报　<a href="#c">评论(12)</a></div><div id="artibody">{body}</div><div class="share">分享到：
<a href="#">微博</a> <a href="#">微信</a></div><div class="xgxw"><h3>相关新闻</h3><ul>{more}</ul></div></div><div class="right"><h3>热点排行</h3>
<ol>{more}</ol></div></div><div class="footer">版权所有 示例网 京ICP备00000000号 <a href="/a">关于我们</a> <a href="/j">诚聘英才</a></div></body></html>""",
    "博客": """<!doctype html><html lang="zh"><head><title>{title} - 小巷子</title></head><body><div id="header"><a href="/">小巷子</a><p>走走停停</p></div>
<ul id="menu">{menu}</ul><div id="content"><div class="post"><h2 class="post-title">{title}</h2>{body}<p class="tags">标签：
<a href="/t1">生活</a>，<a href="/t2">随笔</a></p></div><div class="prevnext"><a href="/p">上一篇：春天的第一场雨</a> <a href="/n">下一篇：搬家记</a></div>
<div class="comments"><h3>3 条留言</h3><ul><li>路人甲：写得真好，读着读着就想起了小时候的事情，谢谢分享。</li><li>小鱼：期待下一篇！什么时候更新？</li></ul></div></div>
<div id="sidebar"><h3>最近文章</h3><ul>{more}</ul><h3>归档</h3><ul><li><a href="/m3">2024年3月</a></li><li><a href="/m2">2024年2月</a></li></ul></div>
<div id="footer">© 2024 小巷子 保留所有权利</div></body></html>""",
    "表格": """<html><head><title>{title}</title></head><body><table width="980"><tr><td><a href="1">首页</a>|<a href="2">机构设置</a>|<a href="3">政务公开</a>|
<a href="4">办事指南</a>|<a href="5">互动交流</a></td></tr><tr><td><table><tr><td width="200"><a href="a">通知公告</a><br><a href="b">工作动态</a><br>
<a href="c">政策法规</a><br><a href="d">资料下载</a></td><td><h1>{title}</h1>{body}<p align="right">【<a href="javascript:print()">打印</a>】
【<a href="javascript:close()">关闭</a>】</p></td></tr></table></td></tr><tr><td align="center">主办单位：示例市人民政府办公室　公网安备0000号<br>
建议使用1024×768分辨率浏览</td></tr></table></body></html>""",
    "手册": """<!DOCTYPE html><html><head><title>{title} — 示例手册</title></head><body><nav class="wy-nav-side"><ul>{menu}</ul></nav><div class="wy-content">
<div role="navigation" class="breadcrumb"><ul><li><a href="/">文档</a></li><li>{title}</li></ul></div><div role="main"><div class="section"><h1>{title}
<a class="headerlink" href="#x">¶</a></h1>{body}</div></div><footer><div class="rst-footer-buttons"><a href="n">下一页</a> <a href="p">上一页</a></div>
<p>© 版权所有 2024，文档组。</p></footer></div></body></html>""",
    "div": """<html><head><title>{title}</title></head><body><div><div><a href="/">某某网</a></div><div><a href="/1">美食</a><a href="/2">家居</a>
<a href="/3">健康</a><a href="/4">亲子</a><a href="/5">旅行</a></div></div><div><div><h1>{title}</h1><div>{body}</div></div><div><div>猜你喜欢</div><ul>{more}</ul>
</div></div><div><div>扫码关注公众号</div><div><a href="/x">意见反馈</a> <a href="/y">隐私政策</a> <a href="/z">服务条款</a></div><div>沪ICP备11111111号</div></div>
<div hidden><p>这一段文字对读者是隐藏的，不应该出现在任何语料里面。</p></div></body></html>""",
    "论坛": """<html><head><title>{title} - 家电讨论区</title></head><body><div id="hd"><ul>{menu}</ul></div><div class="crumbs"><a href="/">论坛</a> ›
<a href="/f">家电</a> › {title}</div><h1>{title}</h1><div class="postlist">{posts}</div><div class="pg"><a href="2">2</a><a href="3">3</a><a href="n">下一页</a></div>
<div class="recommend"><h4>热门帖子</h4><ul>{more}</ul></div><div class="ft">Powered by 示例论坛　粤ICP备22222222号</div></body></html>""",
}


def _posts(body: str, chinese: bool) -> str:
    """Each paragraph a post, beside the pane that says who wrote it."""
    paragraphs = re.findall(r"<(?:p|h2|ul|pre|table)>.*?</(?:p|h2|ul|pre|table)>", body, re.DOTALL)
    pane = ["<a href='/u{0}'>user{0}</a><br>Posts: {0}7<br>Joined: 2019", "<a href='/u{0}'>网友{0}</a><br>帖子 {0}7<br>积分 {0}30"][chinese]  # fmt: skip
    when = ["Quote · Report", "<a href='#'>回复</a> <a href='#'>举报</a>"][chinese]
    return "".join(
        f"<div class='row'><div class='author'>{pane.format(i)}</div><div class='text'>{paragraph}</div>"
        f"<div class='tools'>{when}</div></div>"
        for i, paragraph in enumerate(paragraphs, 1)
    )


def pages() -> dict[str, tuple[str, str, str]]:
    """name → (HTML, gold text, title)"""
    made = {}
    for texts, sites, menu, more, chinese in (
        (ENGLISH, SITES_EN, _MENU, _MORE, False),
        (CHINESE, SITES_ZH, _菜单, _更多, True),
    ):
        written = list(texts.items())
        for number, (name, site) in enumerate(sites.items()):
            for title, body in (written[number], written[(number + 2) % len(written)]):
                page = site.format(title=title, body=body, menu=menu, more=more, posts=_posts(body, chinese))
                gold = html.unescape(re.sub(r"<[^>]+>", " ", f"{title}\n{body}"))
                made[f"{name}: {title}"] = (page, gold, title)
    return made

"""The miniature world's vocabulary: what its people can be like, and the many ways to say so.

Every sentence here is our own. A `FactType` is one property of a person; its values are equally long and none is part
of another, so that four options differ in meaning only. Slots: {s} subject (name or pronoun), {n} name, {v} value.
Given names are single characters that occur in no other word, so a learnt vocabulary keeps each name in one piece.
"""

from __future__ import annotations

from typing import NamedTuple


def _pairs(text: str) -> dict[str, str]:
    """Return {"红色": "red", "蓝色": "blue"} for "红色 red, 蓝色 blue"."""
    return dict(pair.split(" ", 1) for pair in text.split(", "))


class FactType(NamedTuple):
    """One property of a person: `values` maps Chinese to English; the other fields are sentence patterns."""

    key: str
    values: dict[str, str]
    statements: tuple[str, ...]
    """From person to value; "{s}" may become a pronoun."""
    reverse: tuple[str, ...]
    """From value to person."""
    questions: tuple[str, ...]
    """Asked in stage 2 and in the held-out test, never in stage 1; the answer is the bare value."""
    follow_up: str
    """The question inside a dialogue that has already named the person."""
    english: str
    """{v} is the English value, {s} an English name."""
    english_question: str


FACT_TYPES: tuple[FactType, ...] = (
    FactType(
        "town",
        _pairs(
            "桃花镇 Peach Town, 石桥镇 Stone Bridge, 白云镇 White Cloud, 青山镇 Green Hill, "
            "月亮镇 Moon Town, 海风镇 Sea Wind, 竹林镇 Bamboo Town, 金沙镇 Gold Sand, 雪松镇 Snow Pine, "
            "荷塘镇 Lotus Town"
        ),
        (
            "{s}住在{v}。",
            "{s}的家在{v}。",
            "{s}是{v}人。",
            "{s}从小在{v}长大。",
            "{s}家住{v}。",
            "{s}一直生活在{v}。",
            "{s}的老家是{v}。",
            "{s}住的地方叫{v}。",
        ),
        ("住在{v}的人里有{n}。", "在{v}可以找到{n}。", "说到{v}的人，大家会想起{n}。"),
        ("{n}住在哪里？", "{n}住在哪个镇？", "{n}的家在哪里？", "{n}是哪里人？", "请问{n}家住哪里？"),
        "住在哪里？",
        "{s} lives in {v}.",
        "Where does {s} live?",
    ),
    FactType(
        "job",
        _pairs(
            "医生 doctor, 老师 teacher, 司机 driver, 厨师 cook, 画家 painter, 农民 farmer, "
            "警察 police officer, 木匠 carpenter, 歌手 singer, 渔民 fisher"
        ),
        (
            "{s}是一名{v}。",
            "{s}的职业是{v}。",
            "{s}的工作是{v}。",
            "{s}做{v}很多年了。",
            "{s}长大以后当上了{v}。",
            "{s}靠当{v}生活。",
            "大家都知道{s}是{v}。",
            "{s}是一位很好的{v}。",
        ),
        ("有一名{v}叫{n}。", "这位{v}的名字是{n}。", "说到{v}，大家会想起{n}。"),
        ("{n}的职业是什么？", "{n}的工作是什么？", "{n}是做什么的？", "{n}靠什么工作生活？", "请问{n}做什么工作？"),
        "做什么工作？",
        "{s} works as a {v}.",
        "What does {s} do for a living?",
    ),
    FactType(
        "pet",
        _pairs(
            "小猫 cat, 小狗 dog, 兔子 rabbit, 乌龟 turtle, 鹦鹉 parrot, 山羊 goat, 鸽子 pigeon, "
            "松鼠 squirrel, 鸭子 duck, 刺猬 hedgehog"
        ),
        (
            "{s}养了一只{v}。",
            "{s}的宠物是{v}。",
            "{s}家里有一只{v}。",
            "{s}每天喂{v}。",
            "{s}养的动物是{v}。",
            "陪着{s}的是一只{v}。",
            "{s}和一只{v}一起生活。",
            "{s}有一只很乖的{v}。",
        ),
        ("这只{v}的主人是{n}。", "有一只{v}总跟着{n}。", "那只{v}是{n}养的。"),
        ("{n}养了什么动物？", "{n}的宠物是什么？", "{n}家里养什么？", "什么动物陪着{n}？", "请问{n}养的是什么？"),
        "养了什么动物？",
        "{s} keeps a {v}.",
        "Which animal does {s} keep?",
    ),
    FactType(
        "food",
        _pairs(
            "饺子 dumplings, 面条 noodles, 豆腐 tofu, 包子 buns, 汤圆 rice balls, 蛋糕 cake, 玉米 corn, "
            "粽子 rice cakes, 土豆 potatoes, 米粥 porridge"
        ),
        (
            "{s}最爱吃{v}。",
            "{s}喜欢吃{v}。",
            "{s}最喜欢的食物是{v}。",
            "{s}每天都要吃{v}。",
            "{s}觉得{v}最好吃。",
            "{s}饿了就吃{v}。",
            "{s}爱吃的是{v}。",
            "{s}请客总是做{v}。",
        ),
        ("说到{v}，{n}最爱吃。", "最爱吃{v}的人里有{n}。", "一说{v}，{n}就饿了。"),
        ("{n}最爱吃什么？", "{n}喜欢吃什么？", "{n}最喜欢的食物是什么？", "{n}饿了吃什么？", "请问{n}爱吃什么？"),
        "爱吃什么？",
        "{s} likes to eat {v}.",
        "What does {s} like to eat?",
    ),
    FactType(
        "season",
        _pairs("春天 spring, 夏天 summer, 秋天 autumn, 冬天 winter"),
        (
            "{s}最喜欢{v}。",
            "{s}喜欢的季节是{v}。",
            "一年里{s}最爱{v}。",
            "{s}总是盼着{v}。",
            "{s}说{v}最美。",
            "四季里{s}最爱的是{v}。",
            "{s}觉得{v}最好。",
            "{s}最爱的季节是{v}。",
        ),
        ("一到{v}，{n}就很开心。", "最爱{v}的人里有{n}。", "盼着{v}的人里有{n}。"),
        (
            "{n}最喜欢哪个季节？",
            "{n}喜欢什么季节？",
            "一年里{n}最爱什么季节？",
            "{n}盼着哪个季节？",
            "请问{n}最爱哪个季节？",
        ),
        "喜欢哪个季节？",
        "{s} loves {v} most.",
        "Which season does {s} love most?",
    ),
    FactType(
        "hobby",
        _pairs(
            "下棋 chess, 钓鱼 fishing, 跳舞 dancing, 爬山 climbing, 游泳 swimming, 读书 reading, "
            "跑步 running, 写诗 poetry, 种花 gardening, 摄影 photography"
        ),
        (
            "{s}的爱好是{v}。",
            "{s}喜欢{v}。",
            "{s}有空就去{v}。",
            "{s}周末常常{v}。",
            "{s}最拿手的是{v}。",
            "{s}从小爱{v}。",
            "{s}一有时间就{v}。",
            "{s}每天都要{v}。",
        ),
        ("爱{v}的人里有{n}。", "说到{v}，没有人比得上{n}。", "周末去{v}的人里有{n}。"),
        ("{n}的爱好是什么？", "{n}有空做什么？", "{n}周末喜欢做什么？", "{n}最拿手的是什么？", "请问{n}有什么爱好？"),
        "有什么爱好？",
        "{s} enjoys {v}.",
        "What is the hobby of {s}?",
    ),
    FactType(
        "colour",
        _pairs("红色 red, 蓝色 blue, 绿色 green, 黄色 yellow, 白色 white, 紫色 purple, 黑色 black, 灰色 grey"),
        (
            "{s}最喜欢的颜色是{v}。",
            "{s}爱穿{v}的衣服。",
            "{s}的帽子是{v}的。",
            "{s}喜欢{v}。",
            "{s}总是穿{v}的衣服。",
            "{s}觉得{v}最好看。",
            "{s}的衣服是{v}的。",
            "{s}戴着{v}的帽子。",
        ),
        ("穿{v}衣服的人里有{n}。", "那顶{v}的帽子是{n}的。", "喜欢{v}的人里有{n}。"),
        (
            "{n}最喜欢什么颜色？",
            "{n}爱穿什么颜色？",
            "{n}的帽子是什么颜色？",
            "{n}的衣服是什么颜色？",
            "请问{n}喜欢什么颜色？",
        ),
        "喜欢什么颜色？",
        "{s} likes {v} clothes.",
        "Which colour does {s} like?",
    ),
    FactType(
        "transport",
        _pairs("公交 bus, 火车 train, 汽车 car, 马车 carriage, 电车 tram, 轮船 ship, 快艇 speedboat, 地铁 subway"),
        (
            "{s}坐{v}上班。",
            "{s}出门坐{v}。",
            "{s}每天坐{v}。",
            "{s}上班用的是{v}。",
            "{s}去上班要坐{v}。",
            "{s}常坐的是{v}。",
            "早上{s}坐着{v}出门。",
            "{s}习惯坐{v}出门。",
        ),
        ("坐{v}上班的人里有{n}。", "早上的{v}里坐着{n}。", "在{v}里常常看见{n}。"),
        ("{n}坐什么上班？", "{n}出门坐什么？", "{n}每天坐什么？", "{n}去上班坐什么？", "请问{n}常坐什么？"),
        "坐什么上班？",
        "{s} goes to work by {v}.",
        "How does {s} go to work?",
    ),
)

SURNAMES: dict[str, str] = _pairs(
    "陈 Chen, 王 Wang, 李 Li, 张 Zhang, 刘 Liu, 赵 Zhao, 周 Zhou, 吴 Wu, 孙 Sun, 何 He, 郑 Zheng, 徐 Xu"
)
MEN: dict[str, str] = _pairs(
    "磊 Lei, 峰 Feng, 浩 Hao, 强 Qiang, 杰 Jie, 军 Jun, 伟 Wei, 涛 Tao, 鹏 Peng, 刚 Gang, 斌 Bin, "
    "超 Chao, 凯 Kai, 勇 Yong, 宇 Yu, 健 Jian, 波 Bo, 龙 Long, 翔 Xiang, 帆 Fan, 晨 Chen, 康 Kang, "
    "坤 Kun, 帅 Shuai"
)
WOMEN: dict[str, str] = _pairs(
    "婷 Ting, 娟 Juan, 静 Jing, 敏 Min, 芳 Fang, 丽 Li, 玲 Ling, 倩 Qian, 琴 Qin, 颖 Ying, 慧 Hui, "
    "琳 Lin, 萍 Ping, 燕 Yan, 宁 Ning, 霞 Xia, 珍 Zhen, 媛 Yuan, 瑶 Yao, 菲 Fei, 娜 Na, 雯 Wen, "
    "蓉 Rong, 莎 Sha"
)


class Lore(NamedTuple):
    """A sentence about the world rather than about a person, and the question it answers."""

    statement: str
    english: str
    question: str
    answer: str


def _animal(name: str, english: str, food: str, food_english: str, skill: str, skill_english: str) -> tuple[Lore, Lore]:
    """Return what an animal eats and what it can do."""
    return (
        Lore(f"{name}吃{food}。", f"The {english} eats {food_english}.", f"{name}吃什么？", food),
        Lore(f"{name}会{skill}。", f"The {english} can {skill_english}.", f"{name}会做什么？", skill),
    )


ANIMAL_LORE: tuple[Lore, ...] = (
    *_animal("小猫", "cat", "小鱼", "fish", "抓老鼠", "catch mice"),
    *_animal("小狗", "dog", "骨头", "bones", "看门", "guard the door"),
    *_animal("兔子", "rabbit", "青菜", "greens", "跳得很高", "jump high"),
    *_animal("乌龟", "turtle", "小虫", "worms", "慢慢爬", "walk slowly"),
    *_animal("鹦鹉", "parrot", "瓜子", "seeds", "学人说话", "talk"),
    *_animal("山羊", "goat", "青草", "grass", "上高山", "go up high hills"),
    *_animal("鸽子", "pigeon", "米", "rice", "送信", "carry letters"),
    *_animal("松鼠", "squirrel", "松果", "pine nuts", "上树", "go up trees"),
    *_animal("鸭子", "duck", "小虾", "shrimps", "下水", "go into the water"),
    *_animal("刺猬", "hedgehog", "果子", "fruit", "缩成一个球", "roll into a ball"),
)


def _job(name: str, english: str, work: str, work_english: str) -> Lore:
    """Return what people of a profession do."""
    return Lore(f"{name}的工作是{work}。", f"A {english} {work_english}.", f"{name}每天做什么？", work)


JOB_LORE: tuple[Lore, ...] = (
    _job("医生", "doctor", "给人看病", "helps sick people"),
    _job("老师", "teacher", "教孩子认字", "teaches children"),
    _job("司机", "driver", "开车", "drives a car"),
    _job("厨师", "cook", "做菜", "makes food"),
    _job("画家", "painter", "画画", "makes pictures"),
    _job("农民", "farmer", "种地", "works the land"),
    _job("警察", "police officer", "抓小偷", "catches thieves"),
    _job("木匠", "carpenter", "做桌子", "makes tables"),
    _job("歌手", "singer", "唱歌", "makes music"),
    _job("渔民", "fisher", "打鱼", "catches fish"),
)


def _season(name: str, english: str, weather: str, weather_english: str) -> Lore:
    """Return what the weather of a season is like."""
    return Lore(f"{name}{weather}。", f"In {english} {weather_english}.", f"{name}是什么样的？", weather)


SEASON_LORE: tuple[Lore, ...] = (
    _season("春天", "spring", "花会开", "flowers open"),
    _season("夏天", "summer", "天气很热", "it is hot"),
    _season("秋天", "autumn", "叶子会黄", "leaves turn yellow"),
    _season("冬天", "winter", "会下雪", "it snows"),
)

DIRECTIONS: dict[str, str] = _pairs("东边 east, 西边 west, 南边 south, 北边 north")
SIGHTS: dict[str, str] = _pairs(
    "一条河 a river, 一个湖 a lake, 一座塔 a tower, 一口井 a well, 一座山 a hill, "
    "一片树林 a wood, 一个花园 a garden, 一片田 a field, 一座庙 a temple, 一条街 a street"
)

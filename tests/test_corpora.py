"""Every corpus: a native record written by hand, and the segments it must become.

A new corpus gets a row in ROWS. Records are our own sentences in the native formats.
"""

import json

import pytest

from panda_jax.config import Source
from panda_jax.data import corpora, files
from panda_jax.data.records import Example, Skip
from panda_jax.errors import InputError

BIG_BLOCK = 1 << 20
ASK = "请阅读文章回答问题："
EN_ZH, ZH_EN = "将以下英文翻译为中文", "将以下中文翻译为英文"
BELLE = "Human: \n{}\n\nAssistant: \n"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
PAIR = {"english": "Snow is white.", "chinese": "雪是白的。"}
WIKI = {"id": "1", "url": "u", "title": "雪", "text": "雪\n\n雪是白的。"}
NEWS = {"news_id": "1", "title": "头条", "content": "今天\r\n下雪<br>。", "source": "s", "time": "t", "keywords": "k"}
BAIKE = {"qid": "q1", "category": "天气", "title": "雪是什么颜色？ ", "desc": "", "answer": "白色。\r\r就是白。"}
WEBTEXT = {"qid": 1, "title": "雪冷吗？", "desc": "<br>我没见过。", "topic": "雪", "star": 3, "content": "冷。"}
EXAM = {
    "textbox_q_instruction": "单选题",
    "textbox_q_context": "",
    "textbox_question": "1+1=？",
    "textbox_answer": "2",
    "textbox_answer_analysis": "加法。",
    "subject": "数学",
}


def _chat(*turns: tuple[str, str]) -> dict:
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


def _rounds(*responses: str) -> dict:
    return {"entity": "雪"} | {f"round_{n}": {"response": response} for n, response in enumerate(responses)}


ONE, TWO = '{"Q": "一？", "A": "壹"}', '```json\n{"Q": "二？", "A": "贰"}\n```'
TEN_ROUNDS = {f"round_{n}": {"response": json.dumps({"Q": f"问{n}", "A": f"答{n}"})} for n in (10, 2, 0)}
INSTRUCTED = {"instruction": "造句", "input": "雪", "output": "下雪了。"}
WITH_HISTORY = {"instruction": "三", "output": "四", "history": [["一", "二"]]}
TRANSLATED = {"instruction": "Say", "input": "a", "output": "Hi"}
TRANSLATED |= {"trans_instruction": "说", "trans_input": "", "trans_output": "嗨"}
OPENAI = [("system", "简短。"), ("user", "一"), ("assistant", "二")]
OPENAI_CHAT = {"messages": [{"role": role, "content": content} for role, content in OPENAI]}
HUMAN_TWICE = _chat(("human", "一"), ("human", "二"), ("gpt", "三"), ("gpt", "四"))
ONE_PAIR = '[{"instruction": "", "output": ""}'

# (corpus, settings, record, segments of each example; or the reason it is skipped)
ROWS = [
    ("wiki2019zh", {}, WIKI, [[("雪\n\n雪是白的。", True)]]),
    ("wiki2019zh", {"compat": "panda"}, WIKI, [[(" ", False), ("雪\n\n雪是白的。", True)]]),
    ("wiki2019zh", {}, WIKI | {"text": " \n\u3000"}, "blank output"),
    ("wiki2019zh", {"compat": "panda"}, WIKI | {"text": None}, "blank output"),
    ("wiki2019zh", {}, WIKI | {"text": "坏\ud83d"}, "half of a surrogate pair (a broken emoji)"),
    ("wiki2019zh", {}, WIKI | {"text": "好😀"}, [[("好😀", True)]]),
    ("news2016zh", {}, NEWS, [[("今天\r\n下雪<br>。", True)]]),
    ("news2016zh", {"compat": "panda"}, NEWS, [[(" ", False), ("今天\r\n下雪<br>。", True)]]),
    ("baike2018qa", {}, BAIKE, [[(f"{ASK} 雪是什么颜色？ ", False), ("白色。\r\r就是白。", True)]]),
    ("baike2018qa", {"compat": "panda"}, BAIKE, [[(f"{ASK} 雪是什么颜色？ ", False), ("白色。\r\r就是白。", True)]]),
    ("baike2018qa", {"instruction": ""}, BAIKE, [[(" 雪是什么颜色？ ", False), ("白色。\r\r就是白。", True)]]),
    ("baike2018qa", {}, BAIKE | {"title": "我的雪", "desc": "我的雪人化了。"}, [
        [(f"{ASK} 我的雪人化了。", False), ("白色。\r\r就是白。", True)]
    ]),
    ("baike2018qa", {}, BAIKE | {"title": "", "desc": " "}, "blank question"),
    ("baike2018qa", {}, BAIKE | {"answer": ""}, "blank output"),
    ("webtext2019zh", {}, WEBTEXT, [[(f"{ASK} 雪冷吗？\n<br>我没见过。", False), ("冷。", True)]]),
    ("webtext2019zh", {"instruction": "答：", "template": "coig"}, WEBTEXT, [
        [("答：\n\n雪冷吗？\n<br>我没见过。", False), ("冷。", True)]
    ]),
    ("webtext2019zh", {"template": "belle", "instruction": ""}, WEBTEXT, [
        [(BELLE.format("雪冷吗？\n<br>我没见过。"), False), ("冷。", True)]
    ]),
    ("translation2019zh", {"direction": "en-zh"}, PAIR, [[(f"{EN_ZH} Snow is white.", False), ("雪是白的。", True)]]),
    ("translation2019zh", {"direction": "zh-en"}, PAIR, [[(f"{ZH_EN} 雪是白的。", False), ("Snow is white.", True)]]),
    ("translation2019zh", {"direction": "both", "compat": "panda"}, PAIR, [
        [(f"{EN_ZH} Snow is white.", False), ("雪是白的。", True)],
        [(f"{ZH_EN} 雪是白的。", False), ("Snow is white.", True)],
    ]),
    ("translation2019zh", {"direction": "zh-en", "instruction": "{source}到{target}："}, PAIR, [
        [("中文到英文： 雪是白的。", False), ("Snow is white.", True)]
    ]),
    ("translation2019zh", {"direction": "en-zh"}, PAIR | {"english": " "}, "blank question"),
    ("jsonl_text", {}, {"text": "雪。"}, [[("雪。", True)]]),
    ("flan", {}, {"inputs": "问", "targets": "答"}, [[("问", False), ("答", True)]]),
    ("flan", {"compat": "panda"}, {"inputs": "问", "targets": "答"}, [[("问", False), ("答", True)]]),
    ("alpaca", {}, {"instruction": "你好", "output": "好"}, [[(ALPACA.format("你好"), False), ("好", True)]]),
    ("alpaca", {"template": "panda", "compat": "panda"}, INSTRUCTED, [[("造句 雪", False), ("下雪了。", True)]]),
    ("alpaca", {}, {"instruction": ["你好", "您好"], "output": "好"}, [[(ALPACA.format("你好"), False), ("好", True)]]),
    ("alpaca", {"template": "coig"}, INSTRUCTED | {"system": "你是诗人。"}, [
        [("你是诗人。\n\n造句\n\n雪", False), ("下雪了。", True)]
    ]),
    ("alpaca", {"template": "coig"}, WITH_HISTORY, [
        [("一", False), ("二", True), ("\n\n三", False), ("四", True)]
    ]),
    ("alpaca", {"template": "coig", "compat": "panda"}, WITH_HISTORY, [
        [("\n\n一", False), ("二", True)],
        [("一\n\n二\n\n三", False), ("四", True)],
    ]),
    ("alpaca", {}, {"instruction": "", "input": "", "output": "好"}, "blank question"),
    ("sharegpt", {}, _chat(("human", "一"), ("gpt", "二"), ("human", "三"), ("gpt", "四")), [
        [(BELLE.format("一"), False), ("二", True), (BELLE.format("三"), False), ("四", True)]
    ]),
    ("sharegpt", {"template": "coig"}, _chat(("gpt", "零"), ("human", "一"), ("gpt", "二"), ("human", "三")),
     [[("一", False), ("二", True)]]),
    ("sharegpt", {"template": "coig"}, OPENAI_CHAT, [[("简短。\n\n一", False), ("二", True)]]),
    ("sharegpt", {}, {"conversations": []}, "no question with an answer"),
    ("sharegpt", {}, _chat(("gpt", "零")), "no question with an answer"),
    ("sharegpt", {}, HUMAN_TWICE, "roles do not alternate"),
    ("sharegpt", {}, _chat(("human", "一"), ("tool", "二")),
     "a role other than human and assistant inside the conversation"),
    ("sharegpt", {}, _chat(("human", " "), ("gpt", "二")), "blank question"),
    ("sharegpt", {}, _chat(("human", "一"), ("gpt", "二"), ("human", "三"), ("gpt", "")), "blank output"),
    ("text", {}, "一行\n二行", [[("一行\n二行", True)]]),
    ("text_lines", {}, "一行", [[("一行", True)]]),
    ("text_lines", {"compat": "panda"}, "一行", [[(" ", False), ("一行", True)]]),
    ("coig_translated", {}, TRANSLATED, [[("说", False), ("嗨", True)]]),
    ("coig_exam", {}, EXAM, [[("单选题\n\n1+1=？", False), ("2\n\n加法。", True)]]),
    ("coig_exam", {"compat": "panda"}, EXAM | {"textbox_q_context": "算术", "textbox_answer_analysis": []}, [
        [("单选题\n\n算术\n\n1+1=？", False), ("2", True)]
    ]),
    ("coig_human_value_part2", {}, {"textbox_question": "问", "textbox_answer": "答"}, [[("问", False), ("答", True)]]),
    ("coig_human_value_part1", {}, INSTRUCTED, [[("造句\n\n雪", False), ("下雪了。", True)]]),
    ("coig_leetcode", {}, INSTRUCTED | {"output": "代码：['a', 'b']", "program_lang": "C"}, [
        [("造句\n\n雪", False), ("代码：['a', 'b']", True)]
    ]),
    ("coig_dialogues", {}, _rounds(ONE, TWO), [[("一？", False), ("壹", True), ("\n\n二？", False), ("贰", True)]]),
    ("coig_dialogues", {"compat": "panda"}, _rounds(ONE, TWO), [
        [("\n\n一？", False), ("壹", True)],
        [("一？\n\n壹\n\n二？", False), ("贰", True)],
    ]),
    ("coig_dialogues", {"compat": "panda"}, _rounds(ONE), [[("\n\n一？", False), ("壹", True)]]),
    ("coig_dialogues", {}, TEN_ROUNDS, [
        [("问0", False), ("答0", True), ("\n\n问2", False), ("答2", True), ("\n\n问10", False), ("答10", True)]
    ]),
    ("coig_dialogues", {}, _rounds('{"Q": 1, "A": ["甲", 2]}'), [[("1", False), ('["甲", 2]', True)]]),
    ("coig_dialogues", {}, _rounds(ONE, '{"Q": "二？'), "a round's response is not a JSON object"),
    ("coig_dialogues", {}, _rounds('{"Q": "二？"}'), "a round's response lacks Q or A"),
    ("coig_dialogues", {}, _rounds(ONE, '{"Q": "二？", "A": null}'), "blank output"),
]  # fmt: skip


def _write(folder, corpus: str, record) -> str:
    """Write one native file that holds the record once, and return its path."""
    path = folder / "data.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record), encoding="utf-8")
    return str(path)


def _read(source: Source, block_bytes: int = BIG_BLOCK) -> list[tuple[int, Example | Skip]]:
    template = corpora.template_of(source)
    return [pair for block in files.blocks(source, block_bytes) for pair in corpora.examples(block, source, template)]


def _segments(found: list[tuple[int, Example | Skip]]) -> list[list[tuple[str, bool]]]:
    return [[(part.text, part.trained) for part in each.segments] for _, each in found if isinstance(each, Example)]


@pytest.mark.parametrize(("corpus", "settings", "record", "expected"), ROWS)
def test_record_becomes_segments(tmp_path, corpus, settings, record, expected):
    found = _read(Source(corpus=corpus, path=_write(tmp_path, corpus, record), **settings))
    assert {number for number, _ in found} == {0}
    if isinstance(expected, str):
        assert [each for _, each in found] == [Skip(expected)]
    else:
        assert _segments(found) == expected
        assert len(found) == len(expected)


def test_every_corpus_has_a_row():
    assert {row[0] for row in ROWS} == set(corpora.CORPORA)


def test_panda_skips_blank_turns_one_by_one(tmp_path):
    """The original dropped single pairs with a blank answer, and kept the turn in the history of the next."""
    record = _rounds(ONE, '{"Q": "二？", "A": ""}', '{"Q": "三？", "A": "叁"}')
    found = _read(Source(corpus="coig_dialogues", path=_write(tmp_path, "", record), compat="panda"))
    assert [number for number, _ in found] == [0, 0, 0]
    assert found[1][1] == Skip("blank output")
    assert _segments(found)[1] == [("一？\n\n壹\n\n二？\n\n\n\n三？", False), ("叁", True)]


def test_draws_follow_the_record_number(tmp_path):
    """Directions alternate and instruction lists rotate by record number, across block boundaries."""
    path = tmp_path / "pairs.json"
    path.write_text("\n".join([json.dumps(PAIR)] * 5))
    found = _read(Source(corpus="translation2019zh", path=str(path)), block_bytes=64)
    assert [number for number, _ in found] == [0, 1, 2, 3, 4]
    assert [example[0][0].split(" ")[0] for example in _segments(found)] == [EN_ZH, ZH_EN, EN_ZH, ZH_EN, EN_ZH]
    path.write_text(json.dumps([{"instruction": ["甲", "乙", "丙"], "output": "答"}] * 4))
    found = _read(Source(corpus="alpaca", path=str(path), template="coig"), block_bytes=64)
    assert [example[0][0] for example in _segments(found)] == ["甲", "乙", "丙", "甲"]


def test_malformed_lines_of_coig_are_counted(tmp_path):
    path = tmp_path / "exam.jsonl"
    path.write_text(json.dumps(EXAM) + '\n{"textbox_question": "断\n' + json.dumps(EXAM) + "\n")
    found = _read(Source(corpus="coig_exam", path=str(path)))
    assert [number for number, _ in found] == [0, 1, 2]
    assert found[1][1] == Skip("malformed JSON")
    assert found[0][1] == found[2][1] != found[1][1]


# (corpus, settings, file content, what the one-line message must hold)
BAD = [
    ("wiki2019zh", {}, '{"id": "1", "title": "", "text": ""}\n\n{"id": 1,, }', ["data.json:3:10: malformed JSON"]),
    ("wiki2019zh", {}, '\n{\n "id": 1}', ["data.json:2:2: malformed JSON", "one whole object per record"]),
    ("alpaca", {}, ONE_PAIR + ',\n {"instruction": x}]', ["data.json:2:18 (record 2): malformed JSON"]),
    ("alpaca", {}, ONE_PAIR + ' {}]', ["data.json:1 (record 2", "expected a comma"]),
    ("alpaca", {}, ONE_PAIR + ', 5, {}]', ["data.json:1 (record 2)", "found a number"]),
    ("alpaca", {}, ONE_PAIR + ',\n {"instruc', ["data.json:1 (record 2)", "not closed"]),
    ("alpaca", {}, ONE_PAIR, ["data.json:1 (record 2)", "not closed"]),
    ("alpaca", {}, ONE_PAIR + ', ]', ["data.json:1", "found ','"]),
    ("alpaca", {}, ONE_PAIR + ']]', ["nothing after the list's closing ], found ']'"]),
    ("alpaca", {}, "[ ]", ["the JSON list is empty"]),
    ("alpaca", {}, "甲,乙\n", ["data.json:1: expected JSON", "甲,乙", "text_lines"]),
    ("baike2018qa", {}, json.dumps(INSTRUCTED),
     ["data.json:1:", "needs the field 'qid'", "instruction, input, output", "looks like alpaca"]),
    ("wiki2019zh", {}, json.dumps(NEWS), ["needs the field 'id'", "looks like news2016zh"]),
    ("webtext2019zh", {}, json.dumps(BAIKE), ["needs the field 'content'", "looks like baike2018qa"]),
    ("news2016zh", {}, json.dumps(WEBTEXT), ["needs the field 'news_id'", "looks like webtext2019zh"]),
    ("coig_leetcode", {}, json.dumps(EXAM), ["needs the field 'instruction'", "looks like coig_exam"]),
    ("alpaca", {}, json.dumps({"messages": []}), ["needs the field 'instruction'", "looks like sharegpt"]),
    ("jsonl_text", {}, '{"a": 1}', ["needs the field 'text'", "found are: a"]),
    ("coig_dialogues", {}, "[1]", ["data.json: ", "expected a JSON object, found a list"]),
    ("text", {}, json.dumps(WIKI), ["data.json:1", "this is JSON", "looks like wiki2019zh"]),
    ("text_lines", {}, json.dumps([INSTRUCTED]), ["data.json:1", "this is JSON", "looks like alpaca"]),
    ("jsonl_text", {}, '{"text": 5}', ["data.json:1: field 'text': expected a string, found a number"]),
    ("alpaca", {}, '{"instruction": "", "output": ["a"]}', ["field 'output': expected a string, found a list"]),
    ("alpaca", {}, '{"instruction": {}, "output": "a"}', ["field 'instruction'", "found an object"]),
    ("alpaca", {}, '{"instruction": "", "output": "a", "history": [["a"]]}', ["field 'history'", "pairs"]),
    ("sharegpt", {}, '{"conversations": "a"}', ["field 'conversations': expected a list of messages, found a string"]),
    ("sharegpt", {}, '{"conversations": [{"from": "human"}]}', ["from and value, or role and content"]),
    ("wiki2019zh", {}, "[" * 100_000, ["data.json:1"]),
    ("jsonl_text", {}, '{"text": ' + "[" * 100_000, ["data.json:1", "malformed JSON"]),
]  # fmt: skip


@pytest.mark.parametrize(("corpus", "settings", "content", "parts"), BAD)
def test_bad_input_is_named(tmp_path, corpus, settings, content, parts):
    with pytest.raises(InputError) as caught:
        _read(Source(corpus=corpus, path=_write(tmp_path, corpus, content), **settings))
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and str(tmp_path) in message


@pytest.mark.parametrize("separator", ["\n", "\r\n"])
@pytest.mark.parametrize("corpus", ["jsonl_text", "text", "text_lines"])
def test_wrong_encoding_is_named(tmp_path, corpus, separator):
    path = tmp_path / "data.txt"
    good, bad = '{"text": "ok"}', '{"text": "天"}'
    if corpus != "jsonl_text":
        good, bad = "ok", "ok 天"
    path.write_bytes(f"{good}{separator}{good}{separator}{bad}{separator}{good}".encode("gb18030"))
    with pytest.raises(InputError, match=r"data.txt:3: expected UTF-8, found byte 0xcc .*`iconv -f GB18030"):
        _read(Source(corpus=corpus, path=str(path)))


def test_settings_without_effect_are_refused():
    with pytest.raises(InputError, match="`instruction` has no place in corpus alpaca"):
        corpora.template_of(Source(corpus="alpaca", path="x", instruction="答："))
    with pytest.raises(InputError, match="'alpaca'; choose one of plain, panda, coig"):
        corpora.template_of(Source(corpus="alpaca", path="x", compat="panda"))
    with pytest.raises(InputError, match=r"'wiki2019' \(did you mean 'wiki2019zh'\?\); choose one of wiki2019zh, "):
        corpora.template_of(Source(corpus="wiki2019", path="x"))
    with pytest.raises(InputError, match="did you mean 'belle'"):
        corpora.template_of(Source(corpus="alpaca", path="x", template="bell"))


# (corpus, file, records, examples). Records are the counts of the data's own README. A separate ten-line script counted
# what is not an example: 6 blank outputs in zh-data-part-00, and in ShareGPT one blank question (line 59) and one
# conversation without an answer (line 781).
REAL = [
    ("wiki2019zh", "corpora/wiki2019zh", 222, 222),
    ("translation2019zh", "corpora/translation2019zh/translation2019zh_valid.json", 500, 500),
    ("alpaca", "instructions/alpaca_zh_demo.json", 1000, 1000),
    ("alpaca", "instructions/zh-data-part-00.json", 10021, 10015),
    ("alpaca", "instructions/oaast_sft_zh.json", 689, 689),
    ("sharegpt", "instructions/sharegpt_zh_1K_format.jsonl", 1000, 998),
    ("baike2018qa", "corpora/quoted_samples/baike2018qa.jsonl", 3, 3),
    ("webtext2019zh", "corpora/quoted_samples/webtext2019zh.jsonl", 4, 4),
    ("news2016zh", "corpora/quoted_samples/news2016zh.jsonl", 1, 1),
    ("text_lines", "corpora/rawtext/CLUECorpusSmall_sampled.txt", 2500, 2500),
    ("text", "corpora/rawtext/CLUECorpusSmall_bert_sampled.txt", 2500, 2500),
]


@pytest.mark.parametrize(("corpus", "file", "num_records", "num_examples"), REAL)
def test_real_files(shared_data, corpus, file, num_records, num_examples):
    found = _read(Source(corpus=corpus, path=str(shared_data / file)), block_bytes=100_000)
    assert [number for number, _ in found] == list(range(num_records))
    examples = [each for _, each in found if isinstance(each, Example)]
    assert len(examples) == num_examples
    if file.endswith("oaast_sft_zh.json"):
        assert sum(len(example.segments) > 2 for example in examples) == 390


def test_real_wiki_text_is_untouched(shared_data):
    path = shared_data / "corpora/wiki2019zh/wiki_00"
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    found = _read(Source(corpus="wiki2019zh", path=str(path)), block_bytes=4096)
    assert _segments(found) == [[(text, True)] for text in texts]

"""The exported chat template gives transformers the ids that training gave the model."""

import pytest
from transformers import AutoTokenizer

from convert.chat_template import jinja
from convert.tokenizer_files import tokenizer_files
from panda_jax.text.templates import TEMPLATES
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.text.turns import Turn

QUESTIONS = ["中国的首都是哪里？", "那么，它有多少人口？\n请回答。"]
ANSWERS = ["北京。", "约两千万。"]


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"panda"}))
def test_ids_equal_those_of_training(shared_data, tmp_path, name):
    """Training encodes every segment by itself: BOS, prompt, answer, EOS, prompt, answer, EOS."""
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "llama-32000.model")
    for file, content in tokenizer_files(tokenizer.model_bytes, {}, 2048, jinja(name)).items():
        (tmp_path / file).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    turns = [Turn(question, "", answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    expected = [tokenizer.bos_id]
    for segment in TEMPLATES[name].render(turns):
        expected += tokenizer.encode(segment.text) + ([tokenizer.eos_id] if segment.trained else [])
    messages = [{"role": role, "content": text} for turn in turns
                for role, text in (("user", turn.instruction), ("assistant", turn.output))]  # fmt: skip
    assert theirs.apply_chat_template(messages, return_dict=False) == expected
    opening = theirs.apply_chat_template(messages[:1], return_dict=False)
    assert opening == expected[: len(opening)] and expected[len(opening)] == tokenizer.encode(ANSWERS[0])[0]


def test_a_wording_that_no_text_reproduces_is_left_out():
    assert jinja("panda") is None


def test_other_roles_are_refused(shared_data, tmp_path):
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "llama-32000.model")
    for file, content in tokenizer_files(tokenizer.model_bytes, {}, 2048, jinja("belle")).items():
        (tmp_path / file).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(Exception, match="not system"):
        theirs.apply_chat_template([{"role": "system", "content": "你好"}])

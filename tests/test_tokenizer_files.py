"""Exported tokenizers against SentencePiece: same ids and same text, through AutoTokenizer, or a refusal."""

import io
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled_models import UNUSED, USER_DEFINED, model_proto, singles, spell

from convert.sentencepiece_file import parse_sentencepiece
from convert.tokenizer_files import read_tokenizer, tokenizer_files
from panda_jax import config
from panda_jax.data.world import make_world, tell
from panda_jax.data.world_wordings import FACT_TYPES
from panda_jax.errors import InputError
from panda_jax.text.vocab import train_vocabulary

NASTY = [
    *(
        "",
        " ",
        "  a  b  ",
        "\t",
        "a\tb\t\tc",
        "\n",
        "\r\n",
        "a\r\nb\rc\n\n\nd",
        "\n 中",
        "　全角　空格",
        "a\u00a0b\u00a0",
    ),
    *(
        "▁",
        "▁▁a ▁b",
        "a▁",
        "\0",
        "a\0b",
        "\x01\x02\x1f\x7f\x80\x9f",
        "\ufeff中",
        "\u200b",
        "\ufffd",
        "\uffff",
        "\ue000",
    ),
    *(
        "👨\u200d👩\u200d👧\u200d👦",
        "🇨🇳🇫🇷🇩",
        "👍🏽",
        "😀" * 9,
        "e\u0301",
        "a\u0300\u0301\u0302",
        "각",
        "ＡＢＣ１２３！？",
        "ﬁ ½ ①",
    ),
    *("𠀀𠮷𪚥", "㐀䶵", "龘靐齉", "عربى", "हिन्दी", "ไทย", "\u202eabc", "Ω≈ç√∫", "．。，、；：？！…—“”‘’《》"),
    *("<s>", "</s>", "<unk>", "[PAD]", "a</s>b", " </s>", "</s> b", "<s>[PAD]<unk></s>", "<0x41>", "a<0xE4>b", "<pad>"),
    *("a" * 3000, "中" * 3000, "哈" * 77, "1234567890" * 40, "ab" * 500, "=" * 100, "-" * 33 + "\n", "𠀀" * 200),
    *(a + " " * n + b for n in range(1, 41) for a, b in itertools.product(("", "中"), ("", "b"))),
]
TEXT = st.lists(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
        st.sampled_from([*" \t\n\r\0▁<>/s", "  ", "the ", " 是", "</s>", "<s>", "<unk>", "[PAD]", "<0x0A>", "\ufe0f"]),
    ),
    max_size=60,
).map("".join)


def write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def open_both(model: bytes, folder: Path, template: str | None = None, pad: bool = True) -> tuple[Any, Any]:
    """Export the model with a [PAD] behind it; return (transformers' tokenizer, SentencePiece)."""
    transformers = pytest.importorskip("transformers")
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    added = {"[PAD]": oracle.vocab_size()} if pad else {}
    write(tokenizer_files(model, added, 2048, template), folder)
    return transformers.AutoTokenizer.from_pretrained(folder), oracle


def assert_equal(tokenizer: Any, oracle: Any, texts: list[str]) -> None:
    expected = oracle.encode(texts)
    bare = tokenizer(texts, add_special_tokens=False).input_ids
    wrong = [text for text, ids, wanted in zip(texts, bare, expected, strict=True) if ids != wanted]
    assert not wrong, f"{len(wrong)} of {len(texts)} texts get other ids, first {wrong[0]!r}"
    assert tokenizer(texts).input_ids == [[1, *ids] for ids in expected]
    decoded = [tokenizer.decode([1, *ids, 2], skip_special_tokens=True) for ids in expected]
    assert decoded == oracle.decode(expected)


# ---- trained vocabularies -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A vocabulary trained as the demo trains its own."""
    rng, path = random.Random(1), tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    texts = [tell(person, FACT_TYPES, rng) for person in make_world(1).people]
    texts += ["two  spaces,   three and    four\tthe weather is fine"] * 20
    train_vocabulary(iter(texts), config.Tokenizer(path=str(path), train_vocab_size=768))
    return path.read_bytes()


@pytest.fixture(scope="module")
def demo_pair(demo: bytes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return open_both(demo, tmp_path_factory.mktemp("export") / "hf")


def test_a_fresh_vocabulary_is_exact(demo_pair: tuple[Any, Any]):
    assert demo_pair[1].vocab_size() == 768
    assert_equal(*demo_pair, NASTY)


@settings(deadline=None, max_examples=150)
@given(text=TEXT)
def test_every_text_gets_the_same_ids(demo_pair: tuple[Any, Any], text: str):
    assert_equal(*demo_pair, [text])


@settings(deadline=None, max_examples=150)
@given(ids=st.lists(st.one_of(st.integers(1, 2), st.integers(259, 767)), max_size=30))
def test_ids_in_any_order_decode_alike(demo_pair: tuple[Any, Any], ids: list[int]):
    tokenizer, oracle = demo_pair
    assert tokenizer.decode(ids, skip_special_tokens=True) == oracle.decode(ids)


def test_ids_that_no_text_has_decode_as_documented(demo_pair: tuple[Any, Any]):
    tokenizer, oracle = demo_pair
    whole, half = [3 + byte for byte in "你".encode()], [3 + 0xE4]
    spaces = [3 + 0x20, 3 + 0x20]
    cases = [
        (half, "\ufffd", "\ufffd"),
        (whole + half, "\ufffd" * 4, "你\ufffd"),
        ([0], "", " ⁇ "),
        (spaces, " ", "  "),
    ]
    for ids, ours, theirs in cases:
        assert (tokenizer.decode(ids, skip_special_tokens=True), oracle.decode(ids)) == (ours, theirs)


def test_the_tokenizers_library_reads_the_same_file(demo: bytes, demo_pair: tuple[Any, Any]):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_files(demo, {}, 8, None)["tokenizer.json"].decode())
    tokenizer.encode_special_tokens = True
    found = [encoding.ids for encoding in tokenizer.encode_batch(NASTY, add_special_tokens=False)]
    assert found == demo_pair[1].encode(NASTY)


def test_transformers_finds_the_special_tokens(demo_pair: tuple[Any, Any]):
    tokenizer, _ = demo_pair
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("[PAD]", 768, 769)
    assert (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.chat_template) == (2048, "left", None)
    assert tokenizer.clean_up_tokenization_spaces is False


def test_without_added_tokens_there_is_no_padding(demo: bytes, tmp_path: Path):
    tokenizer, _ = open_both(demo, tmp_path / "hf", pad=False)
    assert (tokenizer.pad_token, len(tokenizer)) == (None, 768)
    assert not (tmp_path / "hf" / "added_tokens.json").exists()


def test_a_chat_template_may_spell_special_tokens(demo: bytes, tmp_path: Path):
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer, oracle = open_both(demo, tmp_path / "hf", template)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=True, return_dict=False)
    assert ids == [*oracle.encode("the"), 2]


def test_user_defined_pieces_are_exact(tmp_path: Path):
    symbols = ["<turn>", "<turn", "the▁end", "▁▁▁", "1", "中国"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the weather of 中国 is fine, 11 degrees  and the end"] * 30), model_writer=model,
        model_type="bpe", vocab_size=330, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, user_defined_symbols=symbols, control_symbols=["<c>"], num_threads=1,
    )  # fmt: skip
    mixed = [
        "".join(parts) for parts in itertools.product([*symbols, "the ", " 是", "<0x41>", "</s>", "<c>"], repeat=3)
    ]
    pair = open_both(model.getvalue(), tmp_path / "hf")
    assert pair[1].encode("a<turn>e", out_type=str)[-2:] == ["<turn>", "e"]
    assert_equal(*pair, [*NASTY, *mixed])


def test_without_a_leading_space(tmp_path: Path):
    def change(model: Any) -> None:
        model.normalizer_spec.add_dummy_prefix = False

    model = spell([("ab", -1.0), ("▁a", -2.0), ("▁ab", -3.0), *singles("ab▁")], ["<u>"], change)
    assert_equal(*open_both(model, tmp_path / "hf"), [*NASTY, "<u>", "<u>ab", " ab", "ab ab<u> ab", "<0x41><u>"])


# ---- models that tokenizer.json cannot give -------------------------------------------------------------------------


def _set(spec: str, field: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(getattr(model, spec), field, value)


def _remove_bytes(model: Any) -> None:
    model.trainer_spec.byte_fallback = False
    del model.pieces[3:259]


def _add_unused(model: Any) -> None:
    model.pieces.add(piece="unused", score=-1.0, type=UNUSED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("trainer_spec", "model_type", 1), "it is a unigram model, expected BPE"),
        (_set("trainer_spec", "model_type", 4), "it is a char model, expected BPE"),
        (_set("normalizer_spec", "remove_extra_whitespaces", True), "it removes extra spaces"),
        (_set("normalizer_spec", "escape_whitespaces", False), "it keeps spaces as they are"),
        (_set("trainer_spec", "treat_whitespace_as_suffix", True), "it marks the end of words"),
        (_remove_bytes, "it has no byte fallback"),
        (_add_unused, "it has unused pieces"),
        (lambda model: model.pieces.add(piece="a b", score=-1.0, type=USER_DEFINED), "a piece holds a plain space"),
    ],
)
def test_what_cannot_be_exact_is_refused(change: Callable[[Any], None], message: str):
    with pytest.raises(InputError, match=rf"^tokenizer\.model: {message}[^\n]*$"):
        tokenizer_files(spell([("ab", -1.0), *singles("ab▁")], change=change), {}, 8, None)


def test_a_rewriting_normaliser_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the weather is fine"] * 9), model_writer=model, model_type="bpe", vocab_size=280,
        byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    with pytest.raises(InputError, match="its normaliser rewrites characters"):
        tokenizer_files(model.getvalue(), {}, 8, None)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"[PAD]": 262}, r"the ids are \[262\], expected \[261\]"),
        ({"a": 261}, "id 261 is 'a', which is a piece of tokenizer.model already"),
        ({"": 261}, "id 261 is '', which is empty"),
    ],
)
def test_added_tokens_continue_the_ids(added: dict[str, int], message: str):
    with pytest.raises(InputError, match=message):
        tokenizer_files(spell(singles("a▁")), added, 8, None)


# ---- the file, and folders of others --------------------------------------------------------------------------------


def assert_parsed(model_bytes: bytes) -> None:
    found, expected = parse_sentencepiece(model_bytes), model_proto.FromString(model_bytes)
    assert [(p.text, p.score, int(p.kind)) for p in found.pieces] == [
        (p.piece, p.score, p.type) for p in expected.pieces
    ]
    trainer, normalizer = expected.trainer_spec, expected.normalizer_spec
    assert (found.model_type, found.byte_fallback) == (trainer.model_type, trainer.byte_fallback)
    assert (found.whitespace_as_suffix, found.pad_piece) == (trainer.treat_whitespace_as_suffix, trainer.pad_piece)
    assert found.has_character_map == bool(normalizer.precompiled_charsmap)
    assert found.add_dummy_prefix == normalizer.add_dummy_prefix
    assert found.remove_extra_whitespaces == normalizer.remove_extra_whitespaces
    assert found.escape_whitespaces == normalizer.escape_whitespaces


def test_the_file_is_read_as_sentencepiece_describes_it(demo: bytes):
    assert_parsed(demo)
    assert_parsed(model_proto().SerializeToString())  # all defaults


@pytest.mark.parametrize("cut", [1, 1000, -1])
def test_a_truncated_model_is_refused(demo: bytes, cut: int):
    with pytest.raises(InputError, match="not a SentencePiece model"):
        tokenizer_files(demo[:cut], {}, 8, None)


def test_a_folder_is_read_back(demo: bytes, tmp_path: Path):
    added = {"[PAD]": 768, "<|im_start|>": 769}
    folder = write(tokenizer_files(demo, added, 2048, "{{ messages }}"), tmp_path / "hf")
    assert read_tokenizer(folder) == (demo, added)
    for name in ("added_tokens.json", "tokenizer_config.json"):
        (folder / name).unlink()
        assert read_tokenizer(folder) == (demo, added)


def test_the_empty_special_tokens_of_2023_are_no_tokens(demo: bytes, tmp_path: Path):
    empty = {"__type": "AddedToken", "content": "", "lstrip": False}
    files = {
        "tokenizer.model": demo,
        "tokenizer_config.json": json.dumps({"bos_token": "", "eos_token": empty, "tokenizer_class": "LLaMATokenizer"}),
        "special_tokens_map.json": json.dumps({"bos_token": "", "eos_token": ""}),
        "added_tokens.json": json.dumps({"<s>": 1, "</s>": 2, "": 0}),
    }
    folder = write({n: c.encode() if isinstance(c, str) else c for n, c in files.items()}, tmp_path / "hf")
    assert read_tokenizer(folder) == (demo, {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", '{"[PAD]": 769}', r"added tokens: the ids are \[769\], expected \[768\]"),
        ("added_tokens.json", '{"x": 2}', r"added_tokens\.json: id 2 is 'x', in tokenizer\.model it is '</s>'"),
        ("added_tokens.json", '{"x": "2"}', r"added_tokens\.json: damaged"),
        ("added_tokens.json", "[", r"added_tokens\.json: damaged"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"768": {}}}', r"tokenizer_config\.json: damaged"),
        ("tokenizer.json", '{"added_tokens": [{"id": 770, "content": "p"}]}', r"tokenizer\.json: the token 'p' has id"),
    ],
)
def test_files_that_disagree_are_refused(demo: bytes, tmp_path: Path, name: str, content: str, message: str):
    files = {"tokenizer.model": demo, "added_tokens.json": b'{"p": 768}', name: content.encode()}
    with pytest.raises(InputError, match=message):
        read_tokenizer(write(files, tmp_path / "hf"))


def test_a_folder_without_the_model_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"tokenizer\.model: No such file.*tokenizer\.json alone cannot be imported"):
        read_tokenizer(write({"tokenizer.json": b"{}"}, tmp_path / "hf"))


# ---- real data ------------------------------------------------------------------------------------------------------

REAL = {"llama": "tokenizers/llama-32000.model", "stories260K": "weights/stories260K-meta/tokenizer.model"}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_are_exact_on_real_text(shared_data: Path, tmp_path: Path, name: str):
    """Every 40th line of the raw corpora and instructions; benchmarks/tokenizer_parity.py takes all of it."""
    files = [*shared_data.glob("corpora/**/*.txt"), *shared_data.glob("instructions/*.json*")]
    lines = [line for file in sorted(files) for line in file.read_text(encoding="utf-8").splitlines(keepends=True)]
    assert len(lines) > 10_000
    model = (shared_data / REAL[name]).read_bytes()
    assert_parsed(model)
    assert_equal(*open_both(model, tmp_path / "hf"), [*NASTY, *lines[::40]])


@pytest.mark.parametrize(
    ("name", "message"),
    [("chinese_sp.model", "unigram"), ("chinese-llama-alpaca-2-55296.model", "made from '\u0327', which is no piece")],
)
def test_real_tokenizers_that_cannot_be_exact_are_refused(shared_data: Path, name: str, message: str):
    with pytest.raises(InputError, match=message):
        tokenizer_files((shared_data / "tokenizers" / name).read_bytes(), {}, 4096, None)

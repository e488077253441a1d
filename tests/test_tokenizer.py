"""SentencePiece wrapper and vocabulary training, against SentencePiece itself."""

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from panda_jax import config
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.text.vocab import train_vocabulary

TEXTS = [
    "今天天气很好，我们去公园看花。",
    "明天下雨，我们在家看书，喝茶。",
    "The weather is fine today, and we walk to the park.",
    "小明有3个苹果，小红有25个梨。",
    "在家里  喝茶 and read a book.",
] * 4

CHINESE_ENGLISH_EMOJI = st.lists(
    st.one_of(
        st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
        st.sampled_from("abc XYZ09 \t\n\r\0，。！？「」…"),
        st.sampled_from(
            ["😀", "👨\u200d👩\u200d👧", "🇨🇳", "é", "e\u0301", "</s>", "<s>", "<0x41>", "<unk>", "\ufeff", "\u3000"]
        ),
        st.characters(exclude_categories=["Cs"], exclude_characters="▁"),
    ),
    max_size=40,
).map("".join)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "new" / "tokenizer.model"
    train_vocabulary(iter(TEXTS), config.Tokenizer(path=str(path), train_vocab_size=400))
    return path


@settings(deadline=None, max_examples=150)
@given(text=CHINESE_ENGLISH_EMOJI)
def test_text_survives_a_fresh_vocabulary(trained: Path, text: str):
    tokenizer = Tokenizer.load(trained)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id} & set(ids)


def test_text_survives_llama(shared_data: Path):
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "llama-32000.model")

    @settings(deadline=None, max_examples=150)
    @given(text=CHINESE_ENGLISH_EMOJI)
    def survives(text: str):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    survives()


def test_the_one_exception_becomes_a_space(trained: Path):
    tokenizer = Tokenizer.load(trained)
    assert tokenizer.decode(tokenizer.encode("公▁园")) == "公 园"


def test_ids_are_those_of_sentencepiece(trained: Path):
    tokenizer, oracle = Tokenizer.load(trained), sentencepiece.SentencePieceProcessor(model_file=str(trained))
    assert (tokenizer.vocab_size, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (400, 0, 1, 2)
    expected = [oracle.encode(text, out_type=int) for text in TEXTS]
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == expected
    assert [tokenizer.encode(text) for text in TEXTS] == expected
    assert tokenizer.pieces(expected[0]) == oracle.encode(TEXTS[0], out_type=str)
    assert tokenizer.encode("") == []
    assert tokenizer.decode([1, *expected[0], 2]) == TEXTS[0]


def test_lone_surrogate_is_named(trained: Path):
    with pytest.raises(UnicodeEncodeError):
        Tokenizer.load(trained).encode_batch(["good", "bad \ud83d"])


def test_fingerprint_is_the_hash_of_the_file(trained: Path):
    assert Tokenizer.load(trained).fingerprint == hashlib.sha256(trained.read_bytes()).hexdigest()


def test_unusable_models_are_refused(trained: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"absent\.model: No such file"):
        Tokenizer.load(tmp_path / "absent.model")
    (tmp_path / "empty.model").touch()
    with pytest.raises(InputError, match="empty"):
        Tokenizer.load(tmp_path / "empty.model")
    (tmp_path / "cut.model").write_bytes(trained.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"cut\.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path / "cut.model")
    with pytest.raises(InputError, match="directory"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("missing", ["BOS", "EOS"])
def test_a_model_without_bos_or_eos_is_refused(missing: str):
    model = io.BytesIO()
    ids: dict[str, Any] = {f"{missing.lower()}_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", vocab_size=120, minloglevel=2, **ids
    )
    with pytest.raises(InputError, match=f"no {missing} id"):
        Tokenizer(model.getvalue(), "model")


def test_trained_vocabulary_has_llamas_settings(trained: Path):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(trained))
    assert (oracle.unk_id(), oracle.bos_id(), oracle.eos_id(), oracle.pad_id()) == (0, 1, 2, -1)
    assert [oracle.is_byte(i) for i in (2, 3, 258, 259)] == [False, True, True, False]
    assert oracle.id_to_piece(3) == "<0x00>"
    pieces = [oracle.id_to_piece(i) for i in range(259, oracle.vocab_size())]
    assert not [piece for piece in pieces if sum(character.isdigit() for character in piece) > 1]
    assert oracle.encode("龘", out_type=str) == ["▁", "<0xE9>", "<0xBE>", "<0x98>"]
    assert oracle.encode("Ａ", out_type=str)[-3:] == ["<0xEF>", "<0xBC>", "<0xA1>"]  # no NFKC


def test_training_is_deterministic(trained: Path, tmp_path: Path):
    again = tmp_path / "again.model"
    train_vocabulary(iter(TEXTS), config.Tokenizer(path=str(again), train_vocab_size=400))
    assert again.read_bytes() == trained.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]


def test_vocabulary_larger_than_the_text_names_the_largest(tmp_path: Path):
    path = tmp_path / "large.model"
    with pytest.raises(
        InputError, match=r"tokenizer\.train_vocab_size: 5000 .* largest possible value is (\d+)"
    ) as error:
        train_vocabulary(iter(TEXTS), config.Tokenizer(path=str(path), train_vocab_size=5000))
    assert not list(tmp_path.iterdir())
    largest = int(str(error.value).split("value is ")[1].split(";")[0])
    train_vocabulary(iter(TEXTS), config.Tokenizer(path=str(path), train_vocab_size=largest))
    assert Tokenizer.load(path).vocab_size == largest
    with pytest.raises(InputError, match="largest possible"):
        train_vocabulary(iter(TEXTS), config.Tokenizer(path=str(path), train_vocab_size=largest + 1))


def test_vocabulary_smaller_than_the_characters(tmp_path: Path):
    with pytest.raises(InputError, match="260 pieces do not hold the text's characters .* raise it"):
        train_vocabulary(iter(TEXTS), config.Tokenizer(path=str(tmp_path / "small.model"), train_vocab_size=260))


def test_no_text_at_all(tmp_path: Path):
    with pytest.raises(InputError, match="hold no text"):
        train_vocabulary(iter([]), config.Tokenizer(path=str(tmp_path / "none.model"), train_vocab_size=300))


def test_reading_stops_at_the_byte_limit(tmp_path: Path):
    read = []

    def texts():
        for text in TEXTS * 100:
            read.append(text)
            yield text

    limit = 3 * len(TEXTS[0].encode()) + 10
    with pytest.raises(InputError, match="largest possible"):
        train_vocabulary(
            texts(), config.Tokenizer(path=str(tmp_path / "m"), train_vocab_size=9999, train_max_bytes=limit)
        )
    # 45 + 45 + 51 bytes would pass the limit of 145 - the fourth text does: 45 + 45 + 51 = 141 fit.
    assert len(read) == 4


def test_a_readers_error_comes_through(tmp_path: Path):
    def texts():
        yield TEXTS[0]
        raise InputError("wiki_00:7: malformed JSON")

    with pytest.raises(InputError, match="^wiki_00:7: malformed JSON$"):
        train_vocabulary(texts(), config.Tokenizer(path=str(tmp_path / "m"), train_vocab_size=300))


def test_long_lines_surrogates_and_nul_are_trained_on(tmp_path: Path):
    path = tmp_path / "m"
    texts = ["山水" * 50_000, "风\ud800月\0花", "\n\n", ""]
    train_vocabulary(iter(texts), config.Tokenizer(path=str(path), train_vocab_size=275, character_coverage=1.0))
    tokenizer = Tokenizer.load(path)
    assert {"山", "水", "风", "月", "花"} <= set(tokenizer.pieces(range(275)))

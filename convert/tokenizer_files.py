"""A SentencePiece model as the tokenizer files of a Hugging Face folder, with the same ids on every text.

    tokenizer.model           the bytes, unchanged; llama.cpp and panda_jax read this one
    tokenizer.json            pieces, merges and rules for the `tokenizers` library
    tokenizer_config.json     what AutoTokenizer needs; added_tokens.json and special_tokens_map.json for older readers

The class is PreTrainedTokenizerFast: with LlamaTokenizer, transformers 5 replaces the rules of tokenizer.json by its
own and differs on texts that begin with a space (PROTOCOLS.md §2.1). convert.merges proves the merges or refuses.

What differs from SentencePiece all the same:
- Text that spells a special token ("</s>", "[PAD]") is text, as in training, unless there is a chat template: its
  rendering spells them on purpose. The `tokenizers` library itself needs `tokenizer.encode_special_tokens = True`.
- Decoding ids that no text has: bytes that are not UTF-8 give one U+FFFD for every byte of the run, SentencePiece saves
  the sound characters in it; <unk> gives nothing, SentencePiece " ⁇ "; a first byte 0x20 is taken for the space
  that SentencePiece puts before every text.
As in SentencePiece, U+2581 in a text comes back as a space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.merges import cut, exact_merges
from convert.sentencepiece_file import BPE, MODEL_TYPES, Kind, SentencePieceFile, parse_sentencepiece
from panda_jax.errors import InputError
from panda_jax.text.tokenizer import Tokenizer

SPACE = "▁"
MODEL_FILE = "tokenizer.model"
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>")
SPECIAL_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def tokenizer_files(
    model_bytes: bytes, added_tokens: Mapping[str, int], max_length: int, chat_template: str | None
) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files by name.

    `added_tokens` continue the model's ids without a gap and are special; `max_length` is in tokens. Raises InputError
    for a model that tokenizer.json cannot reproduce exactly: not BPE, a normaliser that rewrites text, no byte
    fallback, ties between scores that depend on the place in the text.
    """
    tokenizer = Tokenizer(model_bytes, MODEL_FILE)
    model = parse_sentencepiece(model_bytes)
    _refuse_inexact(model)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files, special, names = _files_of_any_kind(kind, tokenizer, model, added_tokens, max_length, chat_template)
    listed = [{"id": i, "content": name, **SPECIAL_FLAGS} for name, i in special.items()]
    return files | {"tokenizer.json": _json(_fast_tokenizer(model, listed, names["bos_token"], tokenizer))}


def sentencepiece_files(
    model_bytes: bytes, added_tokens: Mapping[str, int], max_length: int, chat_template: str | None
) -> dict[str, bytes]:
    """Return the files without tokenizer.json, for a vocabulary of which no exact one can be made.

    llama.cpp and whoever uses SentencePiece read tokenizer.model; what transformers makes of it by itself may give
    other ids. Arguments as for `tokenizer_files`.
    """
    tokenizer = Tokenizer(model_bytes, MODEL_FILE)
    model = parse_sentencepiece(model_bytes)
    kind = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    return _files_of_any_kind(kind, tokenizer, model, added_tokens, max_length, chat_template)[0]


def _files_of_any_kind(
    kind: Mapping[str, Any],
    tokenizer: Tokenizer,
    model: SentencePieceFile,
    added_tokens: Mapping[str, int],
    max_length: int,
    chat_template: str | None,
) -> tuple[dict[str, bytes], dict[str, int], dict[str, str]]:
    """Return every file but tokenizer.json, the ids of the special tokens, and which of them has which part."""
    added = _checked_added(added_tokens, model)
    special = {piece.text: i for i, piece in enumerate(model.pieces) if piece.kind in (Kind.UNKNOWN, Kind.CONTROL)}
    special |= added
    names = {
        "bos_token": model.pieces[tokenizer.bos_id].text,
        "eos_token": model.pieces[tokenizer.eos_id].text,
        "unk_token": model.pieces[tokenizer.unk_id].text,
    }
    if pad := next((name for name in (*PAD_NAMES, model.pad_piece) if name in special), None):
        names["pad_token"] = pad
    settings = {
        **kind,
        **names,
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": name, **SPECIAL_FLAGS} for name, i in special.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
        "split_special_tokens": chat_template is None,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    files = {
        MODEL_FILE: tokenizer.model_bytes,
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(names),
    }
    if added:
        files["added_tokens.json"] = _json(added)
    return files, special, names


def _refuse_inexact(model: SentencePieceFile) -> None:
    """Raise InputError for a setting that the rules below do not reproduce."""
    kinds = {piece.kind for piece in model.pieces}
    reserved = [piece.text for piece in model.pieces if piece.kind not in (Kind.NORMAL, Kind.USER_DEFINED)]
    problems = {
        f"it is a {MODEL_TYPES.get(model.model_type, 'unknown')} model, expected BPE": model.model_type != BPE,
        "its normaliser rewrites characters, expected the identity normaliser": model.has_character_map,
        "it removes extra spaces, expected remove_extra_whitespaces false": model.remove_extra_whitespaces,
        "it keeps spaces as they are, expected escape_whitespaces true": not model.escape_whitespaces,
        "it marks the end of words, expected treat_whitespace_as_suffix false": model.whitespace_as_suffix,
        "it rewrites decoded text, expected no denormaliser": model.has_denormalizer,
        "it has no byte fallback, so unknown characters become <unk>": not model.byte_fallback,
        "it has unused pieces": Kind.UNUSED in kinds,
        f"it has no piece {SPACE!r}": SPACE not in {p.text for p in model.pieces if p.kind == Kind.NORMAL},
        "a piece holds a plain space": any(" " in piece.text for piece in model.pieces),
        "a special piece is a single character": any(len(text) < 2 for text in reserved),
    }
    for problem, found in problems.items():
        if found:
            raise InputError(
                f"{MODEL_FILE}: {problem}; tokenizer.json cannot give the same ids. Use a model trained as LLaMA's "
                f"(tokenizer.train_vocab_size trains one), or export with --tokenizer sentencepiece"
            )


def _fast_tokenizer(
    model: SentencePieceFile, special: list[dict[str, Any]], bos: str, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return the contents of tokenizer.json."""
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == Kind.NORMAL}
    merges = exact_merges(scores)
    user_defined = [piece.text for piece in model.pieces if piece.kind == Kind.USER_DEFINED]
    prefix = [{"type": "Prepend", "prepend": SPACE}] if model.add_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.add_dummy_prefix else []
    bos_token = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": _split_user_defined(model, user_defined, scores) if user_defined else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_token, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos_token,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[tokenizer.unk_id].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            # Only for user-defined pieces, which no merges make; see _split_user_defined.
            "ignore_merges": bool(user_defined),
            "vocab": {piece.text: i for i, piece in enumerate(model.pieces)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def _split_user_defined(
    model: SentencePieceFile, user_defined: list[str], scores: Mapping[str, float]
) -> dict[str, Any]:
    """Return the pre-tokenizer that sets user-defined pieces apart: at each place the longest, as SentencePiece does.

    An added token would not do: the text after one would get the space that stands before every text. A part that is a
    piece as a whole is then taken as that piece (ignore_merges). Where SentencePiece would not do so (the text "<0x41>"
    between two user-defined pieces, or a piece that no merges reach) a second split cuts off its first symbol.
    """
    longest_first = sorted(user_defined, key=len, reverse=True)
    rests = {}
    for piece in model.pieces:
        if piece.kind != Kind.USER_DEFINED and len(symbols := cut(piece.text, scores)) > 1:
            rests[piece.text] = "".join(symbols[1:])
    wrong = "|".join(rf"\A{re.escape(text.removesuffix(rest))}(?={re.escape(rest)}\z)" for text, rest in rests.items())
    # What the cut leaves may itself be such a piece, and needs the next cut.
    depth = 0
    left = set(rests)
    while left:
        depth += 1
        left = {rests[text] for text in left} & set(rests)
    patterns = ["|".join(map(re.escape, longest_first)), *[wrong] * depth]
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": splits}


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


# ---- import ---------------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> tuple[bytes, dict[str, int]]:
    """Return the SentencePiece model of a Hugging Face folder, and the tokens added beyond it, by ascending id.

    Added tokens are read from every file that may list them; the empty bos and eos texts of 2023 are no tokens.
    Raises InputError where tokenizer.model is absent or damaged, or where the files disagree with it or each other.
    """
    path = folder / MODEL_FILE
    try:
        model_bytes = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; expected the SentencePiece model, which panda_jax trains and evaluates with. "
            f"A folder with tokenizer.json alone cannot be imported: fetch tokenizer.model from the model's source"
        ) from error
    model = parse_sentencepiece(Tokenizer(model_bytes, str(path)).model_bytes)
    found: dict[str, int] = {}
    for source, name, number in _listed_tokens(folder):
        if number < len(model.pieces):
            if name and model.pieces[number].text != name:
                raise InputError(f"{source}: id {number} is {name!r}, in {MODEL_FILE} it is "
                                 f"{model.pieces[number].text!r}; the files are of different models")  # fmt: skip
        elif found.setdefault(name, number) != number:
            raise InputError(f"{source}: the token {name!r} has id {number}, another file of the folder says "
                             f"{found[name]}; remove the wrong file")  # fmt: skip
    return model_bytes, _checked_added(found, model)


def _listed_tokens(folder: Path) -> list[tuple[Path, str, int]]:
    """Return (file, token, id) of every added token that a file of the folder lists."""
    listed = []
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        path = folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if name == "added_tokens.json":
                tokens = list(content.items())
            elif name == "tokenizer_config.json":
                tokens = [(token["content"], int(i)) for i, token in content.get("added_tokens_decoder", {}).items()]
            else:
                tokens = [(token["content"], token["id"]) for token in content.get("added_tokens", [])]
            for token, number in tokens:
                if not isinstance(token, str) or not isinstance(number, int):
                    raise ValueError(f"an added token {token!r} with id {number!r}")
                listed.append((path, token, number))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; it may list tokens of the model") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: damaged ({' '.join(str(error).split())}); fetch it again") from error
    return listed


def _checked_added(added_tokens: Mapping[str, int], model: SentencePieceFile) -> dict[str, int]:
    """Return the tokens by ascending id; raises InputError where they do not continue the model's ids one by one."""
    added = dict(sorted(added_tokens.items(), key=lambda item: item[1]))
    size = len(model.pieces)
    expected = list(range(size, size + len(added)))
    if list(added.values()) != expected:
        raise InputError(f"added tokens: the ids are {list(added.values())[:8]}, expected {expected[:8]}, one after "
                         f"another behind the {size} pieces of {MODEL_FILE}; list every added token once")  # fmt: skip
    pieces = {piece.text for piece in model.pieces}
    for name, number in added.items():
        if not name or name in pieces:
            problem = f"a piece of {MODEL_FILE} already" if name else "empty"
            raise InputError(f"added tokens: id {number} is {name!r}, which is {problem}; give it another text")
    return added

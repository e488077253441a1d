"""Containers and block boundaries: every container gives the same records, and bad files are named."""

import gzip
import hashlib
import io
import json
import pickle
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panda_jax.config import Source
from panda_jax.data import files, layouts
from panda_jax.data.layouts import records
from panda_jax.errors import InputError

BIG_BLOCK = 1 << 20
TEXTS = ["雪是白的。", "天是蓝的。", 'a "}],[{" b \\', "草是绿的。", ""]
RECORDS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def _blocks(path, corpus="jsonl_text", block_bytes=BIG_BLOCK, **settings) -> list[files.Block]:
    return list(files.blocks(Source(corpus=corpus, path=str(path), **settings), block_bytes))


def _raw(blocks: list[files.Block]) -> list:
    """Take the blocks apart after a round trip through pickle, checking that their numbering is consecutive."""
    found = []
    for index, block in enumerate(blocks):
        assert block.index == index and block.first_record == len(found)
        taken = [raw for _, raw in records(pickle.loads(pickle.dumps(block)), skip_malformed=False)]
        assert 0 < block.num_records <= len(taken)
        found.extend(taken[: block.num_records])
    return found


def _tar(path: Path, members: dict[str, bytes], mode: Literal["w", "w:gz"]) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# ---------------------------------------------------------------- containers

FIRST, SECOND = LINES.encode(), json.dumps(RECORDS[:2], ensure_ascii=False, indent=1).encode()
MEMBERS = {
    "set/README.md": b"# about",
    "set/LICENSE": b"free",
    "set/readme_zh.txt": b"about",
    "__MACOSX/set/a.json": b"\x00",
    "set/.hidden.json": b"\x00",
    "set/picture.png": b"\x00",
    "set/wiki_00": FIRST,
    "set/wiki_01.json": SECOND,
    "set/wiki_02.jsonl.gz": gzip.compress(FIRST),
}
EXPECTED = RECORDS + RECORDS[:2] + RECORDS


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz", "directory", "glob", "no suffix"])
def test_every_container_gives_the_same_records(tmp_path, kind):
    if kind == "zip":
        path = _zip(tmp_path / "set.zip", MEMBERS)
    elif kind in ("tar", "tar.gz", "tgz"):
        path = _tar(tmp_path / f"set.{kind}", MEMBERS, "w" if kind == "tar" else "w:gz")
    elif kind == "no suffix":
        path = _tar(tmp_path / "blob", MEMBERS, "w:gz")
    else:
        for name, content in MEMBERS.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        path = tmp_path if kind == "directory" else tmp_path / "s*" / "wiki_*"
    blocks = _blocks(path)
    assert _raw(blocks) == EXPECTED
    assert _raw(_blocks(path, block_bytes=50)) == EXPECTED
    assert _blocks(path, block_bytes=50) == _blocks(path, block_bytes=50)
    if kind in ("zip", "tar.gz"):
        assert blocks[0].file == f"{path}!set/wiki_00"


def test_gzip_and_plain_files_agree(tmp_path):
    plain, zipped = tmp_path / "a.json", tmp_path / "a.json.gz"
    plain.write_bytes(FIRST)
    zipped.write_bytes(gzip.compress(FIRST[:60]) + gzip.compress(FIRST[60:]))  # .gz files may be concatenated
    payloads = [[block.payload for block in _blocks(path, block_bytes=50)] for path in (plain, zipped)]
    assert payloads[0] == payloads[1]
    assert _raw(_blocks(zipped)) == RECORDS
    assert files.list_files(str(zipped)) == [str(zipped)]
    assert files.file_hash(plain) == hashlib.sha256(FIRST).hexdigest()


def test_order_of_files_and_named_files(tmp_path):
    """Files come in the order of their names; a file that is named is read whatever it is called."""
    for name in ("b.json", "a.json", "README.json"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c.json").write_text("{}")
    assert files.list_files(str(tmp_path)) == [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert files.list_files(str(tmp_path / "*a.json")) == [str(tmp_path / "a.json")]
    assert _raw(_blocks(tmp_path / "README.json")) == [{"text": "README.json"}]
    assert _raw(_blocks(tmp_path / "*.json")) == [{"text": name} for name in ("README.json", "a.json", "b.json")]


def test_dialogues_are_one_record_per_member(tmp_path):
    """Members are grouped into blocks of about the asked size, in archives as in folders."""
    members = {f"chat/{n}.json": json.dumps({"round_0": n}, indent=1).encode() for n in range(7)}
    for name, content in members.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    archive = _tar(tmp_path / "chat.tar.gz", members, "w:gz")
    for path, group in ((archive, str(archive)), (tmp_path / "chat", str(tmp_path / "chat"))):
        # 17 bytes of content each, so the third one passes 50; where the files lie must not matter.
        blocks = _blocks(path, corpus="coig_dialogues", block_bytes=50)
        assert [block.num_records for block in blocks] == [3, 3, 1]
        assert [block.first_line for block in blocks] == [1, 4, 7]
        assert {block.file for block in blocks} == {group}
        assert _raw(blocks) == [{"round_0": n} for n in range(7)]
    place, _ = next(records(_blocks(archive, corpus="coig_dialogues")[0], skip_malformed=False))
    assert place == f"{archive}!chat/0.json"


def test_max_records_stops_early_and_keeps_the_blocks(tmp_path):
    path = tmp_path / "a.json"
    for content in (FIRST * 3, json.dumps(RECORDS * 3).encode()):
        path.write_bytes(content)
        everything = _blocks(path, block_bytes=100)
        for limit in (1, 5, 7, 15, 99):
            some = _blocks(path, block_bytes=100, max_records=limit)
            assert _raw(some) == (RECORDS * 3)[:limit]
            assert [block.payload for block in some] == [block.payload for block in everything[: len(some)]]


# ---------------------------------------------------------------- boundaries

SPACES = st.sampled_from(["", "\n", " \n", "\r\n", "\t \n\n", "\n\n\n"])
STRINGS = st.text(st.sampled_from('雪a"\\{}[],:\n\r\u2028\x85 😀'), max_size=12)
OBJECTS = st.lists(st.dictionaries(STRINGS, st.one_of(STRINGS, st.lists(STRINGS, max_size=2)), max_size=3), max_size=8)


@given(objects=OBJECTS, gaps=st.lists(SPACES, min_size=9, max_size=9), block_bytes=st.integers(1, 300), data=st.data())
@settings(max_examples=60, deadline=None)
def test_json_lines_for_any_block_size(tmp_path_factory, objects, gaps, block_bytes, data):
    """Blank lines, \\r\\n, a byte-order mark and a missing last newline change neither records nor numbers."""
    path = tmp_path_factory.mktemp("lines") / "a.json"
    objects = [{}, *objects]
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    lines = [gap + json.dumps(each, ensure_ascii=False) for gap, each in zip(gaps, objects, strict=False)]
    text = end.join(lines) + data.draw(st.sampled_from(["", end, end + "  "]))
    path.write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode())
    blocks = _blocks(path, block_bytes=block_bytes)
    assert _raw(blocks) == objects
    numbers = [number for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    places = [place for block in blocks for place, _ in records(block, skip_malformed=False)]
    assert places == [f"{path}:{number}" for number in numbers]
    assert [block.first_line for block in blocks] == [numbers[block.first_record] for block in blocks]


@given(objects=OBJECTS, block_bytes=st.integers(1, 300), indent=st.sampled_from([None, 1, 4]), ascii_only=st.booleans())
@settings(max_examples=60, deadline=None)
def test_json_list_for_any_block_size(tmp_path_factory, objects, block_bytes, indent, ascii_only):
    path = tmp_path_factory.mktemp("list") / "a.json"
    objects = [{"first": "[{"}, *objects]
    text = "\n " + json.dumps(objects, ensure_ascii=ascii_only, indent=indent) + "\n\n"
    path.write_text(text, encoding="utf-8")
    blocks = _blocks(path, block_bytes=block_bytes)
    assert _raw(blocks) == objects
    assert [block.first_line for block in blocks] == [block.first_record + 1 for block in blocks]
    if indent:  # then, and only then, elements begin on lines of their own, indented once
        begins = [n for n, line in enumerate(text.split("\n"), 1) if line.startswith(" " * indent + "{")]
        places = [place for block in blocks for place, _ in records(block, skip_malformed=False)]
        assert places == [f"{path}:{line} (record {n})" for n, line in enumerate(begins, 1)]


PARAGRAPHS = st.lists(
    st.lists(st.text("雪a .\u3000", min_size=1, max_size=6).map("x{}".format), min_size=1, max_size=3)
)


@given(documents=PARAGRAPHS, gaps=st.lists(SPACES, min_size=9), block_bytes=st.integers(1, 200), end=st.booleans())
@settings(max_examples=60, deadline=None)
def test_plain_text_for_any_block_size(tmp_path_factory, documents, gaps, block_bytes, end):
    """`text` splits at blank lines and keeps the lines of a document; `text_lines` takes each non-blank line."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    documents = [["雪 ", " 天"], *documents]
    newline = "\r\n" if end else "\n"
    text = "\ufeff" + "".join(
        newline.join(lines) + newline + newline + gap
        for lines, gap in zip(documents, gaps * len(documents), strict=False)
    )
    path.write_bytes(text.encode())
    whole = ["\n".join(lines).rstrip(" ") for lines in documents]
    assert _raw(_blocks(path, corpus="text", block_bytes=block_bytes)) == whole
    each_line = [line for lines in documents for line in lines]
    assert _raw(_blocks(path, corpus="text_lines", block_bytes=block_bytes)) == each_line


def test_missing_comma_between_blocks(tmp_path):
    """Two elements of 5000 bytes fall into two blocks; the comma between them is demanded all the same."""
    path, element = tmp_path / "a.json", json.dumps({"text": "x" * 5000})
    path.write_text(f"[{element},{element}]")
    assert len(_blocks(path, block_bytes=1)) == 2
    path.write_text(f"[{element}\n{element}]")
    assert ":1 (record 2): malformed JSON: expected a comma" in _refused(path, block_bytes=1)


def test_a_block_is_about_the_asked_size(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes((b'{"text": "%s"}\n' % (b"x" * 86)) * 1000)  # lines of 99 bytes
    sizes = [len(block.payload) for block in _blocks(path, block_bytes=10_000)]
    assert sum(sizes) == 99_000 and min(sizes[:-1]) > 10_000 - 2 * 99
    assert sizes[0] <= 4096 + 10_000 and max(sizes[1:]) <= 10_000 + 99  # the first holds what was looked at as well


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("form", ["lines", "list", "documents", "zip"])
def test_memory_is_flat(tmp_path, form):
    """60 MB in blocks of 1 MiB: no more than a few blocks exist at a time (the list's scan needs the most)."""
    path, record = tmp_path / ("a.zip" if form == "zip" else "a.json"), {"text": "雪" * 3000}
    line = json.dumps(record, ensure_ascii=False).encode()
    separator = {"list": b",\n", "documents": b"\n\n"}.get(form, b"\n")
    body = [line + separator] * 6_600
    if form == "zip":
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open("a", "w") as out,
        ):
            out.writelines(body)
    else:
        with path.open("wb") as out:
            out.write(b"[" if form == "list" else b"")
            out.writelines(body)
            out.write(b"{}]" if form == "list" else b"")
    del body
    source = Source(corpus="text" if form == "documents" else "jsonl_text", path=str(path))
    tracemalloc.start()
    try:
        total = sum(len(block.payload) for block in files.blocks(source, 1 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 59_000_000
    assert peak < 12 * (1 << 20)


# ---------------------------------------------------------------- bad files


def _refused(path, corpus="jsonl_text", **settings) -> str:
    with pytest.raises(InputError) as caught:
        _raw(_blocks(path, corpus=corpus, **settings))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_missing_and_empty(tmp_path):
    assert "no such file" in _refused(tmp_path / "none.json")
    assert "matches no file" in _refused(tmp_path / "none*.json")
    assert "no data files in this directory" in _refused(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "found e.g. a.parquet" in _refused(tmp_path)
    path = tmp_path / "empty.json"
    for content in (b"", b"\xef\xbb\xbf", b"\n \n\r\n" * 5000):
        path.write_bytes(content)
        for corpus in ("jsonl_text", "text", "text_lines", "coig_dialogues"):
            if content[:1] != b"\xef" or corpus != "coig_dialogues":
                assert "empty" in _refused(path, corpus)
    assert "empty.json: the file is empty" in _refused(_zip(tmp_path / "a.zip", {"empty.json": b""}))
    assert "holds no data files" in _refused(_zip(tmp_path / "b.zip", {"a.png": b"x"}))
    assert "holds no data files" in _refused(_tar(tmp_path / "b.tar", {"README": b"x"}, "w"))
    (tmp_path / "c.gz").write_bytes(b"")
    assert "the name says .gz, but it is empty" in _refused(tmp_path / "c.gz")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["gz", "zip", "tar.gz", "tar"])
def test_truncated_archives(tmp_path, kind, share):
    """A download that stopped is refused wherever it stopped, and never read as a shorter corpus."""
    content = b"".join(
        json.dumps({"text": hashlib.sha256(b"%d" % n).hexdigest()}).encode() + b"\n" for n in range(4000)
    )
    path = tmp_path / f"a.{kind}"
    if kind == "gz":
        path.write_bytes(gzip.compress(content))
    elif kind == "zip":
        _zip(path, {"a": content, "b": content})
    else:
        _tar(path, {"a": content, "b": content}, "w" if kind == "tar" else "w:gz")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    message = _refused(path)
    assert "truncated" in message or "malformed JSON" in message


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_tar_cut_between_members(tmp_path, suffix):
    """Header and content of one member fill 512 bytes each; what follows is gone, but nothing looks torn."""
    whole = _tar(tmp_path / "whole.tar", {"a": FIRST[:32].ljust(512), "b": FIRST}, "w").read_bytes()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(whole[:1024] if suffix == "tar" else gzip.compress(whole[:1024]))
    assert "end-of-archive marker is missing" in _refused(path, "text_lines")


def test_damaged_and_unsupported(tmp_path, monkeypatch):
    good = gzip.compress(FIRST)
    path = tmp_path / "a.json.gz"
    path.write_bytes(good[:-6] + bytes([good[-6] ^ 1]) + good[-5:])  # a bit of the checksum
    assert "damaged" in _refused(path)
    padded = gzip.compress(_tar(tmp_path / "a.tar", {"a": FIRST}, "w").read_bytes() + bytes(3 << 20))
    path.write_bytes(padded[:-6] + bytes([padded[-6] ^ 1]) + padded[-5:])  # far behind the end of the tar
    assert "damaged" in _refused(path)
    path.write_bytes(FIRST)
    assert "the name says .gz, but it begins with" in _refused(path)
    path = tmp_path / "a.json"
    for magic, name in ((b"\x28\xb5\x2f\xfd0", "zstd"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\x00", "xz")):
        path.write_bytes(magic)
        assert f"{name} is not read" in _refused(path)
    path.write_bytes("\ufeff{}".encode("utf-16-le"))
    assert "found UTF-16" in _refused(path)
    assert "archive inside an archive" in _refused(_zip(tmp_path / "b.zip", {"a.tar.gz": b"x"}))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    path.write_bytes(FIRST)
    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read: Permission denied" in _refused(path)
    with pytest.raises(InputError, match="Permission denied"):
        files.file_hash(path)


def test_endless_records_are_refused(tmp_path, monkeypatch):
    """A file without a boundary is never held whole: it is refused once it passes the limit (lowered here)."""
    monkeypatch.setattr(layouts, "MAX_RECORD_BYTES", 1 << 20)
    path = tmp_path / "a.json"
    path.write_bytes(b'{"text": "' + b"x" * (3 << 20) + b'"}\n')
    assert ":1: no line ends within 1 MiB" in _refused(path, block_bytes=1 << 16)
    path.write_bytes(b'[{}, {"text": "' + b"x" * (3 << 20) + b'"}]')
    assert "(record 2): no record ends within 1 MiB" in _refused(path, block_bytes=1 << 16)
    path.write_bytes(b"x\n\n" + b"y\n" * (3 << 19))
    assert ":3: no document" in _refused(path, "text", block_bytes=1 << 16)
    path.write_bytes(b"[" + b'"x",' * (1 << 19) + b'"y"]')
    assert "no record ends within 1 MiB" in _refused(path, block_bytes=1 << 16)
    path.write_bytes(b'{"round_0": "' + b"x" * (1 << 20) + b'"}')
    assert "over 1 MiB" in _refused(path, "coig_dialogues")

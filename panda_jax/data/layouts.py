"""How records lie in a stream of bytes: cut into blocks without parsing, and taken apart again.

Cutting runs in the parent process and feeds every core, so it only looks for boundaries: newlines, blank lines, or the
brackets of a JSON list. Taking apart (decoding, parsing, blaming the right line) runs in the workers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from panda_jax.data.records import Skip
from panda_jax.errors import InputError

# What a corpus asks for. `json` is decided per file by its first byte: `{` is one object a line, `[` is one list.
Layout = Literal["json", "lines", "documents", "members"]
# What one block holds.
Form = Literal["json lines", "json list", "lines", "documents", "members"]

# A record longer than this is a file of another layout than named, not a record; it also bounds the memory.
MAX_RECORD_BYTES = 64 * 2**20

ASCII_SPACE = " \t\n\r\v\f"
_LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r\v\f]*\n)+")
_BLANK_LINE_INSIDE = re.compile(rb"\n[ \t\r\n\v\f]")
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r\v\f]*\n)+")
_BLANK_LINES_TEXT = re.compile(_BLANK_LINES.pattern.decode())
_COMMA = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_COMMA_BYTES = re.compile(rb"\s*,")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD]")
# Change of depth at each byte, as a bytes.translate table; 255 reads as -1 in int8.
_DEPTH_STEPS = bytes(1 if byte in b"[{" else 255 if byte in b"]}" else 0 for byte in range(256))


class Block(NamedTuple):
    """A run of consecutive raw records of one file: the unit of work and of resumption. Picklable."""

    index: int
    """Position among all blocks of the source, from 0; the same on every run for the same files and block size."""
    file: str
    """Path for messages: a file, "wiki.zip!wiki_00", or for `members` the archive or folder they come from."""
    first_record: int
    """Number of the block's first record within the source, over all its files, from 0."""
    first_line: int
    """Line of the first record in that file, from 1; for lists and members its number in there, from 1."""
    payload: bytes
    """The raw bytes; `records` takes them apart."""
    num_records: int
    """Records to take from the payload (it may hold more where `max_records` cuts)."""
    form: Form
    """How records are delimited in the payload."""
    start_line: int
    """Line of the file on which the payload begins, from 1."""


class Start(NamedTuple):
    """An open stream whose first bytes were looked at already."""

    name: str
    head: bytes
    line: int
    stream: BinaryIO


class Piece(NamedTuple):
    """What a cutter yields: a Block that does not know its place in the source yet."""

    file: str
    first_line: int
    payload: bytes
    num_records: int
    form: Form
    start_line: int


def cut(start: Start, layout: Layout, block_bytes: int) -> Iterator[Piece]:
    """Yield the stream's records in pieces of about `block_bytes` bytes.

    Boundaries depend on the bytes and on `block_bytes` alone. Raises InputError for a stream that is not of the layout,
    and for a record longer than MAX_RECORD_BYTES.
    """
    if layout == "json":
        first = start.head.lstrip()[:1]
        if first == b"[":
            return _cut_list(start, block_bytes)
        if first != b"{":
            raise InputError(
                f"{start.name}:{start.line}: expected JSON, one object per line or one list of objects; found "
                f"{_shown(start.head.lstrip())}; for plain text use corpus text or text_lines"
            )
        return _cut_lines(start, "json lines", block_bytes)
    if layout == "documents":
        return _cut_documents(start, block_bytes)
    return _cut_lines(start, "lines", block_bytes)


def _line_piece(file: str, form: Form, line: int, payload: bytes) -> Piece | None:
    """Return the piece for whole lines that begin at `line`, or None when all of them are blank."""
    if blank := _LEADING_BLANK_LINES.match(payload):
        line += payload.count(b"\n", 0, blank.end())
        payload = payload[blank.end() :]
    if form == "documents":
        num_records = sum(1 for part in _BLANK_LINES.split(payload) if part.strip())
    elif _BLANK_LINE_INSIDE.search(payload):
        num_records = sum(1 for part in payload.split(b"\n") if part.strip())
    else:
        num_records = payload.count(b"\n") + (not payload.endswith(b"\n") and bool(payload.strip()))
    return Piece(file, line, payload, num_records, form, line) if num_records else None


def _cut_lines(start: Start, form: Form, block_bytes: int) -> Iterator[Piece]:
    pending, size, line = [start.head], len(start.head), start.line
    at_end = False
    while not at_end:
        chunk = start.stream.read(block_bytes)
        at_end = not chunk
        end = chunk.rfind(b"\n") + 1
        if not (end or at_end):
            pending.append(chunk)
            size += len(chunk)
            if size > MAX_RECORD_BYTES:
                line += sum(part.count(b"\n") for part in pending)
                raise InputError(f"{start.name}:{line}: {_too_long('line')}")
            continue
        payload = b"".join([*pending, memoryview(chunk)[:end]])
        if piece := _line_piece(start.name, form, line, payload):
            yield piece
        line += payload.count(b"\n")
        pending, size = [chunk[end:]], len(chunk) - end


def _too_long(unit: str) -> str:
    limit = MAX_RECORD_BYTES // 2**20
    return (
        f"no {unit} ends within {limit} MiB, so the file is of another layout than the corpus expects; check `corpus`"
    )


def _cut_documents(start: Start, block_bytes: int) -> Iterator[Piece]:
    rest, line = start.head, start.line
    # Reading at least as much again as is left over keeps the search linear when one document spans many blocks.
    while chunk := start.stream.read(max(block_bytes, len(rest))):
        rest += chunk
        end = max((match.end() for match in _BLANK_LINES.finditer(rest)), default=0)
        if end:
            if piece := _line_piece(start.name, "documents", line, rest[:end]):
                yield piece
            line += rest.count(b"\n", 0, end)
            rest = rest[end:]
        if len(rest) > MAX_RECORD_BYTES:
            raise InputError(f"{start.name}:{line}: {_too_long('document (a blank line)')}, or use corpus text_lines")
    if piece := _line_piece(start.name, "documents", line, rest):
        yield piece


def _cut_list(start: Start, block_bytes: int) -> Iterator[Piece]:
    """Cut a JSON list after whole elements; brackets inside strings are told apart without parsing."""
    opening = start.head.index(b"[") + 1
    line = start.line + start.head.count(b"\n", 0, opening)
    rest, number = start.head[opening:], 1
    while True:
        ends, closing = _elements(rest)
        end = int(ends[-1]) if len(ends) else 0
        if end:
            if number > 1 and not _COMMA_BYTES.match(rest):
                raise InputError(f"{start.name}:{line} (record {number}): malformed JSON: expected a comma before it")
            yield Piece(start.name, number, rest[:end], len(ends), "json list", line)
            line += rest.count(b"\n", 0, end)
            number += len(ends)
        if closing is not None:
            break
        rest = rest[end:]
        chunk = start.stream.read(max(block_bytes, len(rest))) if len(rest) <= MAX_RECORD_BYTES else b""
        if not chunk:
            raise _unclosed(start.name, line, number, rest)
        rest += chunk
    if tail := rest[end:closing].strip():
        raise InputError(f"{start.name}:{line}: expected an object or the end of the list, found {_shown(tail)}")
    after = rest[closing + 1 :] or start.stream.read(block_bytes)
    while after:
        if after.strip():
            raise InputError(
                f"{start.name}: expected nothing after the list's closing ], found {_shown(after.strip())}"
            )
        after = start.stream.read(block_bytes)
    if number == 1:
        raise InputError(f"{start.name}: the JSON list is empty; remove the file or fill it")


def _shown(found: bytes) -> str:
    return repr(found[:30].decode("utf-8", "replace"))


def _elements(text: bytes) -> tuple[np.ndarray, int | None]:
    """Return the position after each complete object or list in `text`, and of the ] that closes the outer list.

    `text` begins inside the outer list and outside of any string: b'{"a": "}"}, {' gives ([10], None).
    """
    # Escaped quotes are blanked by replacements of the same length; then every quote opens or closes a string.
    if b"\\" in text:
        text = text.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    quotes = np.flatnonzero(np.frombuffer(text, np.uint8) == ord('"'))
    steps = np.frombuffer(text.translate(_DEPTH_STEPS), np.int8)
    brackets = np.flatnonzero(steps != 0)
    brackets = brackets[np.searchsorted(quotes, brackets) % 2 == 0]
    depth = np.cumsum(steps[brackets], dtype=np.int64)
    below = np.flatnonzero(depth < 0)
    if len(below):
        return brackets[: below[0]][depth[: below[0]] == 0] + 1, int(brackets[below[0]])
    return brackets[depth == 0] + 1, None


def _unclosed(file: str, line: int, number: int, rest: bytes) -> InputError:
    """Return why a list stops without its ], with the place where the JSON breaks if it breaks."""
    if len(rest) > MAX_RECORD_BYTES:
        reason = _too_long("record")
    else:
        reason = "the list is not closed: the file is truncated, or a quote or bracket before this is unbalanced"
    if rest.strip(b" \t\r\n,"):
        text = _decode(rest, file, line)  # in GBK, half a character can look like a backslash or a bracket
        try:
            json.loads(text.lstrip(ASCII_SPACE + ","))
        except (ValueError, RecursionError) as error:
            reason += f" ({error})"
    return InputError(f"{file}:{line} (record {number}): {reason}")


def cut_members(members: Iterable[tuple[str, str, bytes]], block_bytes: int) -> Iterator[Piece]:
    """Yield whole files as records: (group, name, content), several to a piece but never of two groups."""
    group, frames, size, number = "", [], 0, 1
    for member_group, name, content in members:
        if frames and (size >= block_bytes or member_group != group):
            yield Piece(group, number, b"".join(frames), len(frames), "members", 1)
            number += len(frames)
            frames, size = [], 0
        if member_group != group:
            group, number = member_group, 1
        label = name.encode("utf-8", "surrogateescape")
        frames.append(b"%d %d\n%b%b" % (len(label), len(content), label, content))
        size += len(content)  # without the name: data that is moved elsewhere must give the same blocks
    if frames:
        yield Piece(group, number, b"".join(frames), len(frames), "members", 1)


def records(block: Block, skip_malformed: bool) -> Iterator[tuple[str, Any]]:
    """Yield (place for messages, raw record) for the block's records: parsed JSON, or str for plain text.

    A record whose JSON is malformed is a Skip where the corpus is known to hold such records. Raises InputError with
    the file, line and column for other malformed JSON and for bytes that are not UTF-8.
    """
    if block.form == "members":
        yield from _member_records(block, skip_malformed)
        return
    text = _decode(block.payload, block.file, block.start_line)
    if block.form == "json list":
        yield from _list_records(block, text)
    elif block.form == "documents":
        yield from _document_records(block, text)
    else:
        file, is_json = block.file, block.form == "json lines"
        for line, record in enumerate(text.split("\n"), block.start_line):
            if not record.strip(ASCII_SPACE):
                continue
            value = _parse(record, file, line, skip_malformed) if is_json else record.removesuffix("\r")
            yield f"{file}:{line}", value


def _document_records(block: Block, text: str) -> Iterator[tuple[str, str]]:
    # A text file's line ends belong to the file, not to the text.
    text = text.replace("\r\n", "\n")
    line, position = block.start_line, 0
    while position < len(text):
        found = _BLANK_LINES_TEXT.search(text, position)
        end, following = found.span() if found else (len(text), len(text))
        if document := text[position:end].rstrip(ASCII_SPACE):
            yield f"{block.file}:{line}", document
        line += text.count("\n", position, following)
        position = following


def _list_records(block: Block, text: str) -> Iterator[tuple[str, Any]]:
    line, position = block.start_line, 0
    for number in range(block.first_line, block.first_line + block.num_records):
        separator = _COMMA.match(text, position)
        assert separator, "the pattern matches the empty string"
        begin = separator.end()
        line += text.count("\n", position, begin)
        try:
            if position and not separator[1]:
                raise json.JSONDecodeError("expected a comma", text, begin)
            value, position = _DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", begin)
            column = at - text.rfind("\n", 0, at)
            where = f"{line + text.count(chr(10), begin, at)}:{column} (record {number})"
            if "\n" not in text[:at]:
                where = f"{line} (record {number}, character {at - begin + 1} of it)"
            raise InputError(f"{block.file}:{where}: malformed JSON: {getattr(error, 'msg', error)}") from None
        yield f"{block.file}:{line} (record {number})", _checked(value, text, begin, position)
        line += text.count("\n", begin, position)


def _member_records(block: Block, skip_malformed: bool) -> Iterator[tuple[str, Any]]:
    position = 0
    while position < len(block.payload):
        frame = block.payload.index(b"\n", position) + 1
        label_size, content_size = map(int, block.payload[position:frame].split())
        content = frame + label_size
        position = content + content_size
        name = block.payload[frame:content].decode("utf-8", "surrogateescape")
        text = _decode(block.payload[content:position].removeprefix(b"\xef\xbb\xbf"), name, 1)
        yield name, _parse(text, name, 1, skip_malformed)


def _parse(text: str, file: str, line: int, skip_malformed: bool) -> Any:
    """Return the JSON value of `text`, which begins on the file's line `line`."""
    try:
        return _checked(_load(text), text, 0, len(text))
    except (ValueError, RecursionError) as error:
        if skip_malformed:
            return Skip("malformed JSON")
        where = f"{line}"
        if isinstance(error, json.JSONDecodeError):
            where = f"{line + error.lineno - 1}:{error.colno}"
        reason = getattr(error, "msg", error)
        raise InputError(f"{file}:{where}: malformed JSON: {reason}; expected one whole object per record") from None


def _load(text: str) -> Any:
    """Return json.loads(text), in half its time where no white space comes first."""
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError:
        return json.loads(text)  # white space comes first, or the error is its to word
    return value if end == len(text) or not text[end:].strip(" \t\r\n") else json.loads(text)


def _checked(value: Any, text: str, begin: int, end: int) -> Any:
    """Return `value`, or a Skip when an escape leaves half a surrogate pair: no UTF-8 text can hold that."""
    # To find one character is many times faster than to try the pattern, and few records have any escape.
    if text.find("\\", begin, end) >= 0 and _SURROGATE_ESCAPE.search(text, begin, end):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Skip("half of a surrogate pair (a broken emoji)")
    return value


def _decode(payload: bytes, file: str, start_line: int) -> str:
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        line = start_line + payload.count(b"\n", 0, error.start)
        begin = payload.rfind(b"\n", 0, error.start) + 1
        end = payload.find(b"\n", error.start)
        fix = "the file is damaged, or in another encoding"
        try:
            payload[begin : end if end >= 0 else None].decode("gb18030")
            fix = "it reads as GBK (GB18030): convert it with `iconv -f GB18030 -t UTF-8`"
        except UnicodeDecodeError:
            pass
        found = f"byte 0x{payload[error.start]:02x} at byte {error.start - begin + 1} of the line"
        raise InputError(f"{file}:{line}: expected UTF-8, found {found}; {fix}") from None

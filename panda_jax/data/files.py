"""Containers: from a source's path to blocks of raw records, streamed and never unpacked to disk.

A path is a file, a glob, a directory (searched to any depth) or an archive (.gz, .zip, .tar, .tar.gz; told by content).
In directories and archives these are passed over: hidden names and __MACOSX; README, LICENSE, NOTICE, COPYING and
CHANGELOG; and names with a suffix other than .json .jsonl .ndjson .txt .text (no suffix is read: wiki_00). A file that
is named itself, or by a glob, is always read.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, NamedTuple, cast

from panda_jax import config
from panda_jax.data import layouts
from panda_jax.data.corpora import find_corpus
from panda_jax.data.layouts import Block, Piece, Start, cut, cut_members
from panda_jax.errors import InputError

__all__ = ["Block", "blocks", "file_hash", "list_files"]

_HEAD_BYTES = 4096
_BUFFER_BYTES = 2**20
_DATA_SUFFIXES = ("", ".json", ".jsonl", ".ndjson", ".txt", ".text")
_ARCHIVE_SUFFIXES = (".gz", ".tgz", ".zip", ".tar")
_ABOUT_THE_DATA = re.compile(r"(readme|licen[cs]e)([._-].*)?|(notice|copying|changelog)(\.(md|txt))?", re.IGNORECASE)
_UNSUPPORTED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}


class _Stream(NamedTuple):
    """One file's or archive member's bytes, decompressed."""

    group: str
    """The archive, or the folder of a file."""
    name: str
    """The file, or archive!member."""
    file: BinaryIO


def list_files(path: str) -> list[str]:
    """Return the files that a source's path stands for, sorted; raises InputError when there are none."""
    given = Path(path).expanduser()
    if given.is_dir():
        return _files_below(given)
    if given.exists():
        return [str(given)]
    if not any(character in path for character in "*?["):
        raise InputError(f"{path}: no such file or directory; check `path`")
    root = Path(given.anchor or ".")
    # pathlib's globs take hidden names along; a shell's do not unless they are asked for.
    pattern = given.relative_to(given.anchor)
    matches = [found for found in root.glob(str(pattern)) if pattern.name.startswith(".") or found.name[0] != "."]
    files = {file for found in matches for file in (_files_below(found) if found.is_dir() else [str(found)])}
    if not files:
        raise InputError(f"{path}: the pattern matches no file; check `path`")
    return sorted(files)


def _files_below(folder: Path) -> list[str]:
    try:
        found = [file for file in folder.rglob("*") if file.is_file()]
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}") from None
    files = sorted(str(file) for file in found if _is_data(file.relative_to(folder).as_posix(), archives=True))
    if not files:
        example = f" (found e.g. {found[0].name})" if found else ""
        expected = ", ".join(suffix for suffix in _DATA_SUFFIXES + _ARCHIVE_SUFFIXES if suffix)
        raise InputError(f"{folder}: no data files in this directory{example}; expected {expected} or no suffix")
    return files


def _is_data(name: str, archives: bool) -> bool:
    """Whether a file in a directory or archive is data, by the rule in this file's first lines."""
    path = PurePosixPath(name)
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return False
    suffixes = _DATA_SUFFIXES + (_ARCHIVE_SUFFIXES if archives else ())
    return path.suffix.lower() in suffixes and not _ABOUT_THE_DATA.fullmatch(path.name)


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of one file's bytes, in hex; raises InputError when it cannot be read."""
    with _reading(str(path)), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blocks(source: config.Source, block_bytes: int) -> Iterator[Block]:
    """Yield the source's records in blocks of about `block_bytes` bytes, in the order of `list_files`.

    Sequential and streaming: memory stays at a few blocks however large the files are. The same files and `block_bytes`
    give the same blocks on every run, and `max_records` only shortens the sequence. Raises InputError for files that
    are missing, unreadable, empty, damaged, or of another layout than the corpus's.
    """
    pieces = _pieces(list_files(source.path), find_corpus(source.corpus).layout, block_bytes)
    first_record = 0
    for index, piece in enumerate(pieces):
        num_records = piece.num_records
        if source.max_records is not None:
            num_records = min(num_records, source.max_records - first_record)
        yield Block(
            index=index,
            file=piece.file,
            first_record=first_record,
            first_line=piece.first_line,
            payload=piece.payload,
            num_records=num_records,
            form=piece.form,
            start_line=piece.start_line,
        )
        first_record += num_records
        if first_record == source.max_records:
            return


def _pieces(files: list[str], layout: layouts.Layout, block_bytes: int) -> Iterator[Piece]:
    if layout == "members":
        yield from cut_members(_whole_members(files), block_bytes)
        return
    for stream in _streams(files):
        with _reading(stream.name):
            yield from cut(_begin(stream), layout, block_bytes)


def _whole_members(files: list[str]) -> Iterator[tuple[str, str, bytes]]:
    for stream in _streams(files):
        with _reading(stream.name):
            content = stream.file.read(layouts.MAX_RECORD_BYTES + 1)
        if len(content) > layouts.MAX_RECORD_BYTES:
            limit = layouts.MAX_RECORD_BYTES // 2**20
            raise InputError(
                f"{stream.name}: one record a file is expected, but it is over {limit} MiB; check `corpus`"
            )
        if not content.strip():
            raise InputError(f"{stream.name}: the file is empty; remove it or download it again")
        yield stream.group, stream.name, content


def _begin(stream: _Stream) -> Start:
    """Return the stream without byte-order mark and leading blank reads; raises InputError when nothing is left."""
    head, line = stream.file.read(_HEAD_BYTES), 1
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{stream.name}:1: expected UTF-8, found UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`")
    for magic, name in _UNSUPPORTED.items():
        if head.startswith(magic):
            raise InputError(f"{stream.name}: {name} is not read; expected plain files, .gz, .zip or .tar.gz")
    head = head.removeprefix(b"\xef\xbb\xbf")
    while not head.strip():
        line += head.count(b"\n")
        head = stream.file.read(_HEAD_BYTES)
        if not head:
            raise InputError(f"{stream.name}: the file is empty; remove it or download it again")
    return Start(stream.name, head, line, stream.file)


def _streams(files: list[str]) -> Iterator[_Stream]:
    for path in files:
        with contextlib.ExitStack() as stack:
            with _reading(path):
                file = stack.enter_context(Path(path).open("rb", buffering=_BUFFER_BYTES))
                magic = cast(io.BufferedReader, file).peek(_HEAD_BYTES)
            _check_name(path, magic)
            if magic.startswith(b"PK\x03\x04") or magic.startswith(b"PK\x05\x06"):
                yield from _zip_members(path, file)
            elif magic.startswith(b"\x1f\x8b"):
                yield from _unzipped(path, file)
            elif _is_tar(magic):
                yield from _tar_members(path, file)
            else:
                yield _Stream(str(Path(path).parent), path, file)


def _check_name(path: str, magic: bytes) -> None:
    expected = {".gz": b"\x1f\x8b", ".tgz": b"\x1f\x8b", ".zip": b"PK"}.get(Path(path).suffix.lower(), b"")
    if not magic.startswith(expected):
        found = f"it begins with {magic[:4]!r}" if magic else "it is empty"
        raise InputError(f"{path}: the name says {Path(path).suffix}, but {found}; download it again")


def _is_tar(magic: bytes) -> bool:
    return magic[257:262] == b"ustar"


def _unzipped(path: str, file: BinaryIO) -> Iterator[_Stream]:
    """Yield the content of a .gz, or of each member when that content is a tar."""
    with gzip.GzipFile(fileobj=file) as inner, io.BufferedReader(cast(io.RawIOBase, inner), _BUFFER_BYTES) as content:
        with _reading(path):
            magic = content.peek(_HEAD_BYTES)
        if _is_tar(magic):
            yield from _tar_members(path, content)
        else:
            yield _Stream(str(Path(path).parent), path, content)


def _zip_members(path: str, file: BinaryIO) -> Iterator[_Stream]:
    with _reading(path):
        archive = zipfile.ZipFile(file)
    with archive:
        infos = [info for info in archive.infolist() if not info.is_dir() and _is_member(path, info.filename)]
        _check_members(path, len(infos))
        for info in infos:
            name = f"{path}!{info.filename}"
            with _reading(name):
                member = _open_zip_member(archive, info, name)
            with member, _decompressed(info.filename, member) as content:
                yield _Stream(path, name, content)


def _open_zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> IO[bytes]:
    try:
        return archive.open(info)
    except (RuntimeError, NotImplementedError) as error:  # an encrypted member, or a rare compression
        raise InputError(f"{name}: the archive cannot be read ({error}); unpack it first") from None


def _tar_members(path: str, file: BinaryIO) -> Iterator[_Stream]:
    """Yield a tar's members in the order they are stored, reading the tar once from front to back."""
    num_members = 0
    with _reading(path):
        archive = tarfile.open(fileobj=file, mode="r|")  # noqa: SIM115 (closed by the next line's `with`)
    with archive:
        while True:
            with _reading(path):
                info = archive.next()
            # tarfile remembers every member it has passed; an archive of a million files would not stay flat.
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
            if info is None:
                break
            if not info.isfile() or not _is_member(path, info.name):
                continue
            num_members += 1
            member = archive.extractfile(info)
            assert member is not None, "a regular file has content"
            with member, _decompressed(info.name, member) as content:
                yield _Stream(path, f"{path}!{info.name}", content)
        _check_members(path, num_members)
        # Only at the end of a compressed stream is its checksum compared; and a tar that was cut between two members
        # differs from a whole one only in lacking the blocks of zeros that end it.
        with _reading(path):
            while file.read(_BUFFER_BYTES):
                pass
            if file.tell() <= archive.offset:
                raise tarfile.ReadError("the end-of-archive marker is missing")


def _is_member(path: str, name: str) -> bool:
    """Whether an archive's member is data; raises InputError for an archive inside the archive."""
    if not _is_data(name, archives=True):
        return False
    if PurePosixPath(name).suffix.lower() in (".zip", ".tar", ".tgz") or name.lower().endswith(".tar.gz"):
        raise InputError(f"{path}!{name}: an archive inside an archive is not read; unpack the outer one first")
    return True


def _decompressed(name: str, member: IO[bytes]) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=member) if name.lower().endswith(".gz") else member)


def _check_members(path: str, num_members: int) -> None:
    if not num_members:
        expected = ", ".join(suffix for suffix in _DATA_SUFFIXES if suffix)
        raise InputError(f"{path}: the archive holds no data files; expected {expected} or no suffix")


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what the standard library raises on unreadable and damaged files into an InputError that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"{name}: the archive is damaged or truncated ({error}); download it again") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from None

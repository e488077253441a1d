"""Text from ids as they come, never half a character of it."""

from __future__ import annotations

from collections.abc import Sequence

from panda_jax.text.tokenizer import Tokenizer

# The longest character of UTF-8 has four bytes, so at most three wait for another one.
MAX_WAITING = 3


class Detokenizer:
    """Turns ids into text one by one: what it returns is final, and all of it is what Tokenizer.decode gives.

    A character that the vocabulary spells in bytes is returned with its last byte; bytes that can no longer become a
    character come as U+FFFD, one each. With the ids of "公" as bytes, E5 85 AC: "", "", "公".
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int]) -> None:
        """Begin behind the ids `after`, whose text is not returned; without any, at the beginning of a text.

        That decides about the space of a first "▁word": decode() drops it at the beginning, and nowhere else. Half a
        character at the end of `after` is returned once it is whole.
        """
        self._tokenizer = tokenizer
        self._waiting = b""
        # Ids whose text is known, to the last one that gave some, and those behind it; the number of characters given.
        self._ids: list[int] = []
        self._num_given = 0
        for prompt_id in after:
            self.feed(prompt_id)

    def feed(self, new: int) -> str:
        """Return the text that is final now that id `new` has come, often none; raises as Tokenizer.decode does."""
        if new >= self._tokenizer.vocab_size:
            return ""  # an extra id is no text, not even between two bytes of a character
        byte = self._tokenizer.byte_of(new)
        self._waiting = b"" if byte is None else _unfinished(self._waiting + bytes([byte]))
        self._ids.append(new)
        text = self._rest()
        # Each waiting byte stands as one U+FFFD at the end for now.
        final = text[: len(text) - len(self._waiting)]
        self._num_given += len(final)
        if not self._waiting:
            self._shorten()
        return final

    def flush(self) -> str:
        """Return what still waits, as U+FFFD: no further id comes."""
        rest = self._rest()
        self._num_given += len(rest)
        self._waiting = b""
        return rest

    def _rest(self) -> str:
        return self._tokenizer.decode(self._ids)[self._num_given :]

    def _shorten(self) -> None:
        """Keep the last id alone where it gives text of its own: what follows is then decoded as in the whole.

        The beginning of a text is where decode() drops a space, so an id without text (BOS, a lone "▁") keeps its
        predecessors; and a byte that completes a character takes none of the bytes that follow.
        """
        if len(self._ids) > 1 and (text := self._tokenizer.decode(self._ids[-1:])):
            self._ids, self._num_given = self._ids[-1:], len(text)


def _unfinished(data: bytes) -> bytes:
    """Return the end of `data` that further bytes could make a character of; nothing where they could not."""
    for length in range(min(MAX_WAITING, len(data)), 0, -1):
        # Whatever may follow the bytes of a character, either the lowest or the highest continuation byte may.
        for filler in (b"\x80", b"\xbf"):
            for missing in range(1, MAX_WAITING + 1):
                if _is_character(data[-length:] + missing * filler):
                    return data[-length:]
    return b""


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode("utf-8")) == 1
    except UnicodeDecodeError:
        return False

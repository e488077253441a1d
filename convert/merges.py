"""From SentencePiece's scores to a list of merges that gives the same ids on every text, or a refusal.

SentencePiece joins, again and again, the two neighbours whose union has the highest score; of equal ones the leftmost.
A merge list joins the two neighbours that stand first in it; of equal ones the leftmost. Why a list with ONE merge for
each piece, ordered by score, is exact:

1. What happens inside a span of text that ends as one piece does not depend on the text around it: no join crossed its
   ends, and the best join of the whole text, when it lies in the span, is also the best of the span. So a piece is
   always made by the same last join, the one seen when the piece alone is cut; no other join of its halves ever wins.
2. So SentencePiece equals itself restricted to these joins, one for each piece. Where no two pieces share a score, the
   order by score is then the same order, and the leftmost rule is the same rule.
3. Where pieces share a score, SentencePiece takes the leftmost of them and a list the earlier of them. That makes no
   difference if (a) none of them goes on to join something of the same or a higher score, so that what one of them does
   cannot reach another, and (b) where two of them overlap (x+y and y+z in "xyz"), the left one stands earlier in the
   list. If (b) asks for a circle, no list is exact.
4. LLaMA's runs of spaces share one score and do go on (two spaces to three). They are pieces of 2, 3, .. n equal
   characters, each made from the one before and one character more. With the longest first, the list too
   finishes the leftmost run before it begins another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from panda_jax.errors import InputError

Merge = tuple[str, str]


def exact_merges(scores: Mapping[str, float]) -> list[Merge]:
    """Return the merges, in order, that cut every text as SentencePiece does with these scores of normal pieces.

    Raises InputError where pieces of equal score make SentencePiece's choice depend on where in the text they stand,
    and where a piece is made from a character that is no piece itself.
    """
    merges = {piece: merge for piece in scores if len(piece) > 1 and (merge := last_merge(piece, scores))}
    uses: dict[str, list[str]] = defaultdict(list)
    groups: dict[float, list[str]] = defaultdict(list)
    for piece, halves in merges.items():
        groups[scores[piece]].append(piece)
        for half in halves:
            uses[half].append(piece)
            if half not in scores:
                raise InputError(
                    f"tokenizer.model: {piece!r} is made from {half!r}, which is no piece; tokenizer.json cannot do "
                    f"what SentencePiece does; export with --tokenizer sentencepiece"
                )
    return [
        merges[piece] for score in sorted(groups, reverse=True) for piece in _order(groups[score], merges, uses, scores)
    ]


def cut(text: str, scores: Mapping[str, float]) -> list[str]:
    """Return the symbols that SentencePiece's joins leave of `text`; characters that are no pieces stay alone."""
    return _join(text, scores)[0]


def last_merge(piece: str, scores: Mapping[str, float]) -> Merge | None:
    """Return the two halves that `piece` is made from, or None for a piece that no text ever yields."""
    symbols, last = _join(piece, scores)
    return last if len(symbols) == 1 else None


def _join(text: str, scores: Mapping[str, float]) -> tuple[list[str], Merge | None]:
    symbols, last = list(text), None
    # offers[i]: the score of symbols[i] + symbols[i + 1], -inf where that is no piece.
    offers = [_offer(scores, symbols, i) for i in range(len(symbols) - 1)]
    while offers and (best := max(offers)) > float("-inf"):
        at = offers.index(best)
        last = (symbols[at], symbols[at + 1])
        symbols[at : at + 2] = ["".join(last)]
        del offers[at]
        for i in (at - 1, at):
            if 0 <= i < len(offers):
                offers[i] = _offer(scores, symbols, i)
    return symbols, last


def _offer(scores: Mapping[str, float], symbols: list[str], at: int) -> float:
    return scores.get(symbols[at] + symbols[at + 1], float("-inf"))


def _order(
    group: list[str], merges: Mapping[str, Merge], uses: Mapping[str, list[str]], scores: Mapping[str, float]
) -> list[str]:
    """Return pieces of one score in the order in which their merges must stand; raises InputError if there is none."""
    if len(group) == 1:
        return group
    score = scores[group[0]]
    members = set(group)
    onward = {piece: [use for use in uses.get(piece, ()) if scores[use] >= score] for piece in group}
    longest_first = sorted(group, key=len, reverse=True)
    if _is_run(longest_first, merges) and all(set(onward[piece]) <= members for piece in group):
        return longest_first
    for piece in group:
        if onward[piece]:
            raise _tie(score, piece, onward[piece][0])
    by_left = defaultdict(list)
    for piece in group:
        by_left[merges[piece][0]].append(piece)
    graph = TopologicalSorter({piece: () for piece in group})
    for left in group:
        for right in by_left[merges[left][1]]:
            if right != left:
                graph.add(right, left)
    try:
        return list(graph.static_order())
    except CycleError as error:
        raise _tie(score, *error.args[1][:2]) from None


def _is_run(longest_first: list[str], merges: Mapping[str, Merge]) -> bool:
    """Return whether the pieces are a character repeated n, n-1, .. 2 times, each made from the next and one more."""
    character, size = longest_first[0][0], len(longest_first[0])
    wanted = [character * length for length in range(size, 1, -1)]
    return longest_first == wanted and all(merges[piece] == (piece[1:], character) for piece in wanted)


def _tie(score: float, one: str, other: str) -> InputError:
    return InputError(
        f"tokenizer.model: the pieces {one!r} and {other!r} are joined at one rank (score {score:g}), so "
        f"SentencePiece then chooses by their place in the text, which tokenizer.json cannot say. Keep SentencePiece "
        f"for this model, or give its pieces different scores"
    )

"""The data report: what the prepared sources hold and how much of each is used (Tables 2 and 3 of arXiv:2305.03025)."""

from __future__ import annotations

from collections.abc import Sequence

from panda_jax.config import Config
from panda_jax.data.cache import TokenCache


def report(caches: Sequence[TokenCache], config: Config) -> str:
    """Return the data report as text: per source its size, its use and its share, then what was cut or dropped.

    tokens: positions of rows, one less than the ids of each window. trained: tokens that are learnt.
    share: of the tokens of one pass, after `epochs` or `weight` and without the held-out records (taken as of mean
    length: the packing plan knows the exact number).
    """
    header = ("source", "records", "windows", "tokens", "trained", "dropped", "held out", "use", "share")
    planned = [_planned_tokens(cache, config, number) for number, cache in enumerate(caches)]
    rows = []
    for cache, source, tokens in zip(caches, config.data.sources, planned, strict=True):
        counts = cache.manifest
        use = f"weight {source.weight:g}" if source.weight is not None else f"x {_epochs(source.epochs):g}"
        rows.append(
            (
                cache.source,
                f"{counts['records']:,}",
                f"{counts['windows']:,}",
                f"{counts['tokens']:,}",
                f"{counts['trained_tokens']:,}",
                f"{sum(counts['dropped'].values()):,}",
                f"{source.held_out:,}" if isinstance(source.held_out, int) else source.held_out,
                use,
                f"{tokens / max(sum(planned), 1):.1%}",
            )
        )
    sums = [sum(cache.manifest[key] for cache in caches) for key in ("records", "windows", "tokens", "trained_tokens")]
    dropped = sum(sum(cache.manifest["dropped"].values()) for cache in caches)
    rows.append(("total", *(f"{number:,}" for number in [*sums, dropped]), "", "", ""))
    lines = _table([header, *rows])
    for cache in caches:
        lines += [f"{cache.source}: {count:,} kept, {reason}" for reason, count in cache.manifest["changed"].items()]
        lines += [f"{cache.source}: {count:,} dropped, {reason}" for reason, count in cache.manifest["dropped"].items()]
    return "\n".join(lines)


def _planned_tokens(cache: TokenCache, config: Config, number: int) -> float:
    """Return the tokens one pass reads from a source."""
    source, counts = config.data.sources[number], cache.manifest
    if source.held_out == "all":
        return 0.0
    if source.weight is not None:
        weights = sum(each.weight or 0.0 for each in config.data.sources if each.held_out != "all")
        return (config.data.total_tokens or 0) * source.weight / weights
    kept = max(counts["records"] - source.held_out, 0) / max(counts["records"], 1)
    return counts["tokens"] * kept * _epochs(source.epochs)


def _epochs(epochs: float | None) -> float:
    return 1.0 if epochs is None else epochs


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines, the first column to the left; Chinese characters take two places."""
    widths = [max(_width(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0] + first, *(pad + cell for pad, cell in zip(others, row[1:], strict=True))]))
    return lines


def _width(text: str) -> int:
    return sum(2 if ord(character) >= 0x1100 else 1 for character in text)

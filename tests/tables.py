"""Tables that a test run ends with, also when its tests ran in several processes."""

from __future__ import annotations

TABLES: dict[str, list[tuple[str, ...]]] = {}  # title -> rows; the first one that was added is the head


def add_row(title: str, head: tuple[str, ...], row: tuple[str, ...]) -> None:
    """Add ``row`` to the table of that title."""
    TABLES.setdefault(title, [head]).append(row)


def merge(tables: dict[str, list[tuple[str, ...]]]) -> None:
    """Add the tables of another process."""
    for title, (head, *rows) in tables.items():
        for row in rows:
            add_row(title, head, row)


def lines(title: str) -> list[str]:
    """Return the table as text, its rows sorted."""
    head, *rows = TABLES[title]
    table = [head, *sorted(rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in table]

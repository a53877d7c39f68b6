"""Tables as text: columns that know their width, one row at a time. Standard library only."""

from typing import Any


class Table:
    """Columns under a header. The first column is aligned left, the others right.

    >>> table = Table("source", "pairs", "ECE")
    >>> table.add("ana", 1200, number(0.0312))
    >>> table.add("mean", None, number(0.031))
    >>> print(table)
    source  pairs   ECE
    ana      1200  .031
    mean           .031

    left: the headers of further columns that are aligned left. A missing value (None) is a blank.
    gap: what stands between two columns.
    """

    def __init__(self, *header: str, left: tuple[str, ...] = (), gap: str = "  "):
        self.rows = [list(header)]
        self.left = {0, *(header.index(name) for name in left)}
        self.gap = gap

    def add(self, *cells: Any) -> None:
        """Add a row. Raises ValueError if it has another number of cells than the header."""
        if len(cells) != len(self.rows[0]):
            raise ValueError(f"expected {len(self.rows[0])} cells, got {len(cells)}: {cells}")
        self.rows.append(["" if cell is None else str(cell) for cell in cells])

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows)]
        return "\n".join(self._line(row, widths) for row in self.rows)

    def _line(self, row: list[str], widths: list[int]) -> str:
        aligned = [
            cell.ljust(width) if place in self.left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        ]
        return self.gap.join(aligned).rstrip()


class MarkdownTable(Table):
    """The same rows in Markdown.

    >>> table = MarkdownTable("source", "ECE")
    >>> table.add("ana", ".031")
    >>> print(table)
    | source | ECE |
    |---|---|
    | ana | .031 |
    """

    def __str__(self) -> str:
        header, *rows = (f"| {' | '.join(row)} |" for row in self.rows)
        return "\n".join([header, "|" + "---|" * len(self.rows[0]), *rows])


def as_term(value: float, digits: int = 3) -> str:
    """A number as it stands behind another one in a sum.

    >>> as_term(0.25), as_term(-0.014), as_term(-0.0001)
    ('+ .250', '- .014', '+ .000')
    """
    text = number(round(value, digits) + 0.0, digits)  # + 0.0: no zero is negative
    return f"- {text[1:]}" if text.startswith("-") else f"+ {text}"


def number(value: float | None, digits: int = 3, missing: str = "?") -> str:
    """A number with so many digits behind the point, and no zero before it.

    >>> number(0.5), number(-0.25), number(1.5), number(None)
    ('.500', '-.250', '1.500', '?')
    """
    if value is None:
        return missing
    text = f"{value:.{digits}f}"
    sign, magnitude = ("-", text[1:]) if text.startswith("-") else ("", text)
    return sign + (magnitude[1:] if magnitude.startswith("0.") else magnitude)


def with_interval(value: float | None, ends: tuple | list) -> str:
    """A value and the two ends of its interval.

    >>> with_interval(0.55, (0.506, None))
    '.550 [.506, ?]'
    """
    low, high = ends
    return f"{number(value)} [{number(low)}, {number(high)}]"

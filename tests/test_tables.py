"""Tables: columns as wide as their widest cell, and a number of cells that is checked."""

import pytest

from minimore.tables import MarkdownTable, Table, number, with_interval


def table_of(kind, *rows, **options):
    table = kind("source", "verdict", "ECE", **options)
    for row in rows:
        table.add(*row)
    return str(table).splitlines()


ROWS = (("ana", "fine", ".031"), ("benjamin", None, "1.000"))


def test_columns_are_as_wide_as_their_widest_cell():
    assert table_of(Table, *ROWS) == [
        "source    verdict    ECE",
        "ana          fine   .031",
        "benjamin           1.000",
    ]


def test_columns_can_be_aligned_left_and_the_gap_chosen():
    assert table_of(Table, *ROWS, left=("verdict",), gap=" | ") == [
        "source   | verdict |   ECE",
        "ana      | fine    |  .031",
        "benjamin |         | 1.000",
    ]


def test_no_line_ends_in_blanks():
    lines = table_of(Table, ("ana", "fine", None), ("ben", None, None))
    assert lines[1:] == ["ana        fine", "ben"]


def test_a_table_without_rows_is_its_header():
    assert table_of(Table) == ["source  verdict  ECE"]


def test_cells_are_printed_as_they_are():
    assert table_of(Table, (0, 1.5, False))[1].split() == ["0", "1.5", "False"]


@pytest.mark.parametrize("kind", [Table, MarkdownTable])
@pytest.mark.parametrize("cells", [(), ("ana", "fine"), ("ana", "fine", ".031", "more")])
def test_a_row_of_another_length_is_refused(kind, cells):
    with pytest.raises(ValueError, match=f"expected 3 cells, got {len(cells)}"):
        table_of(kind, cells)


def test_an_unknown_column_is_refused():
    with pytest.raises(ValueError):
        Table("source", left=("sauce",))


def test_markdown():
    assert table_of(MarkdownTable, *ROWS) == [
        "| source | verdict | ECE |",
        "|---|---|---|",
        "| ana | fine | .031 |",
        "| benjamin |  | 1.000 |",
    ]


@pytest.mark.parametrize(
    "value, digits, expected",
    [
        (0.5, 3, ".500"),
        (-0.5, 3, "-.500"),
        (0, 3, ".000"),
        (1, 3, "1.000"),
        (0.9996, 3, "1.000"),
        (10.25, 1, "10.2"),
        (-12.5, 2, "-12.50"),
        (0.4, 0, "0"),
        (float("nan"), 3, "nan"),
        (float("inf"), 3, "inf"),
        (None, 3, "?"),
    ],
)
def test_numbers_have_no_zero_before_the_point(value, digits, expected):
    assert number(value, digits) == expected


def test_what_is_missing_can_be_called_otherwise():
    assert number(None, missing="-") == "-"
    assert with_interval(None, (None, None)) == "? [?, ?]"
    assert with_interval(0.5, [0.25, 0.75]) == ".500 [.250, .750]"

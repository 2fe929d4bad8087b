"""`service.columns`: tables as text."""

from service.columns import aligned


def test_columns_begin_below_each_other_and_no_line_ends_in_blanks():
    assert aligned([("a", "longer", "c"), ("longest", "b", "")]) == "a        longer  c\nlongest  b"
    assert aligned(iter([("", "1")])) == "  1"
    assert aligned([]) == ""

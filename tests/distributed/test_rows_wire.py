"""The bytes that row gradients are to send: by hand, the cheaper way, little over dense."""

from hypothesis import given
from hypothesis import strategies as st

from scripts import row_traffic


def test_bytes_of_three_processes_by_hand() -> None:
    """4 rows each at most, 6 together, of 100, with 10 float32 values a row.

    Each process sends its part to two others.
    """
    assert row_traffic.formula_dense(3, 100, 10) == 2 * 2 / 3 * 100 * 40
    assert row_traffic.formula_ids(3, 4, 100) == 2 * 8 + 2 * 4 * 4
    assert row_traffic.formula_gather(3, 4, 10) == 2 * 4 * 40
    assert row_traffic.formula_rows(3, 4, 6, 100, 10) == 48 + 320  # 3 x 4 <= 2 x 6: gathered
    assert (
        row_traffic.formula_rows(3, 4, 5, 100, 10) == 48 + 2 * 2 / 3 * 5 * 40
    )  # the union of 5 is all-reduced
    assert (
        row_traffic.formula_ids(3, 4, 5) == 2 * 8 + 2 * 2 / 3 * 5
    )  # 3 x 4 > 2 x 5: a mark of a byte a row


@st.composite
def uses(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(processes, most rows of one, rows of all, vocabulary), as they can come."""
    processes, vocabulary = draw(st.integers(2, 2000)), draw(st.integers(1, 300_000))
    most = draw(st.integers(1, vocabulary))
    return processes, most, draw(st.integers(most, min(vocabulary, processes * most))), vocabulary


@given(uses(), st.integers(1, 4096), st.sampled_from([4, 8]))
def test_rows_take_the_cheaper_way_and_cost_at_most_dense_and_ids(
    use: tuple[int, int, int, int], width: int, size: int
) -> None:
    processes, most, union, vocabulary = use
    values = row_traffic.formula_rows(
        processes, most, union, vocabulary, width, size
    ) - row_traffic.formula_ids(processes, most, vocabulary)
    ways = (
        row_traffic.formula_gather(processes, most, width, size),
        row_traffic.formula_dense(processes, union, width, size),
    )
    dense = row_traffic.formula_dense(processes, vocabulary, width, size)
    assert abs(values - min(ways)) <= 1e-6 * dense
    limit = (1 + 4 / (width * size)) * dense + 8 * (processes - 1)
    assert row_traffic.formula_rows(processes, most, union, vocabulary, width, size) <= limit * (
        1 + 1e-9
    )


def test_the_bar_two_processes_a_large_vocabulary() -> None:
    """4,096 tokens a process use 2,254 rows of 262,144: under 1/20 of dense; so do 12,000."""
    for rows in (2254, 12_000):
        assert (
            row_traffic.formula_rows(2, rows, 2 * rows, 1 << 18, 640)
            < row_traffic.formula_dense(2, 1 << 18, 640) / 20
        )

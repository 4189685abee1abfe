"""Bytes on the wire to average the gradient of an embedding table over processes, densely and row by row.  Floor 1.

A table has V rows of d values of e bytes.  Each of P processes used some rows, the busiest of them k, and all together U <= V.
What each process sends (and receives) in one step:

    dense     2 (P-1)/P V d e                     a ring all-reduce, or any other that is optimal in bytes
    counts    8 (P-1)                             how many rows each process used, which comes first in any case
    ids       4 (P-1) k   or   2 (P-1)/P V        everybody's, padded to k; where P k > 2 V, an all-reduced mark of a byte a row
    gather    (P-1) k d e                         the values, padded to k rows, from everybody to everybody
    reduce    2 (P-1)/P U d e                     a dense all-reduce of the rows that any process used

Rows cost counts + ids + the cheaper of the last two, and since every process knows k and U by then, they all take the same:

    gather where P k <= 2 U, else reduce

Two processes always gather (k <= U); the more processes, the more their rows overlap, and reduce takes over.
Where the union is the whole table, reduce *is* the dense all-reduce: rows never cost more than dense by over 4 / (d e) of it, 0.2 %
for 640 float32 values, however many processes there are.  (SparCML likewise changes over from sparse to dense: C. Renggli et al.,
https://arxiv.org/abs/1802.08021.  Ring all-reduce: P. Patarasuk and X. Yuan, https://doi.org/10.1016/j.jpdc.2008.09.002.)
"""


def dense_bytes(processes: int, rows: float, width: int, value_bytes: int = 4) -> float:
    """What each process sends where so many rows are all-reduced: those of the table, or of the union."""
    return 2 * (processes - 1) / processes * rows * width * value_bytes


def gather_bytes(processes: int, most_rows: float, width: int, value_bytes: int = 4) -> float:
    """What each process sends where every process gets the values of every other's rows."""
    return (processes - 1) * most_rows * width * value_bytes


def index_bytes(processes: int, most_rows: float, vocabulary: int) -> float:
    """What each process sends before any values: counts and ids."""
    counts = 8 * (processes - 1)
    if gathering_may_be_cheaper(processes, most_rows, vocabulary):
        return counts + 4 * (processes - 1) * most_rows
    return counts + dense_bytes(processes, vocabulary, width=1, value_bytes=1)


def row_bytes(
    processes: int,
    most_rows: float,
    union_rows: float,
    vocabulary: int,
    width: int,
    value_bytes: int = 4,
) -> float:
    """What each process sends where rows are sent, the cheaper way."""
    if gathering_is_cheaper(processes, most_rows, union_rows):
        values = gather_bytes(processes, most_rows, width, value_bytes)
    else:
        values = dense_bytes(processes, union_rows, width, value_bytes)
    return index_bytes(processes, most_rows, vocabulary) + values


def gathering_is_cheaper(processes: int, most_rows: float, union_rows: float) -> bool:
    """Whether `gather_bytes` are at most the `dense_bytes` of the union."""
    return processes * most_rows <= 2 * union_rows


def gathering_may_be_cheaper(processes: int, most_rows: float, vocabulary: int) -> bool:
    """Whether a union could be large enough for it; only then is it worth knowing which process used which row."""
    return gathering_is_cheaper(processes, most_rows, union_rows=vocabulary)

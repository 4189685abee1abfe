"""Bytes on the wire to average the gradient of an embedding table over processes, densely and row by row.  Floor 1.

A table has V rows of d values of e bytes.  Each of P processes used some rows, the busiest of them k, and all together U <= V.
What each process sends (and receives) in one step:

    dense     2 (P-1)/P V d e                     a ring all-reduce, or any other that is optimal in bytes
    gather    8 (P-1) + (P-1) k (4 + d e)         counts, then ids and values, padded to k rows, from everybody to everybody
    reduce    8 (P-1) + 4 (P-1) k + 2 (P-1)/P U d e       counts and ids as before, then a dense all-reduce of the union's U rows

The last two know the same ids, hence U, on every process before a value is sent, so every process picks the cheaper one alike:

    gather where P k <= 2 U, else reduce

Two processes gather unless most of their rows are the same; the more processes, the more their rows overlap, and reduce takes over.
Where the union is the whole table, reduce *is* the dense all-reduce: rows cost at most the ids more than dense, 4 bytes beside each
d e, however many processes there are.  (SparCML switches from sparse to dense likewise: C. Renggli et al.,
https://arxiv.org/abs/1802.08021.  Ring all-reduce: P. Patarasuk and X. Yuan, https://doi.org/10.1016/j.jpdc.2008.09.002.)
"""

COUNT_BYTES, ID_BYTES = 8, 4


def dense_bytes(processes: int, vocabulary: float, width: int, value_bytes: int = 4) -> float:
    """What each process sends where the gradient of the whole table is all-reduced."""
    return 2 * (processes - 1) / processes * vocabulary * width * value_bytes


def gather_bytes(processes: int, most_rows: float, width: int, value_bytes: int = 4) -> float:
    """What each process sends where every process gets the rows of every other."""
    return (processes - 1) * (COUNT_BYTES + most_rows * (ID_BYTES + width * value_bytes))


def reduce_bytes(processes: int, most_rows: float, union_rows: float, width: int, value_bytes: int = 4) -> float:
    """What each process sends where the rows that any process used are all-reduced."""
    ids = (processes - 1) * (COUNT_BYTES + most_rows * ID_BYTES)
    return ids + dense_bytes(processes, union_rows, width, value_bytes)


def gathering_is_cheaper(processes: int, most_rows: float, union_rows: float) -> bool:
    """Whether `gather_bytes` are at most `reduce_bytes`."""
    return processes * most_rows <= 2 * union_rows


def row_bytes(processes: int, most_rows: float, union_rows: float, width: int, value_bytes: int = 4) -> float:
    """What each process sends, the cheaper way."""
    if gathering_is_cheaper(processes, most_rows, union_rows):
        return gather_bytes(processes, most_rows, width, value_bytes)
    return reduce_bytes(processes, most_rows, union_rows, width, value_bytes)

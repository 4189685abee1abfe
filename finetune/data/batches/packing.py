"""Packing: examples of different lengths into as few rows of max_length tokens as may be.

Floor 1. Best-fit decreasing: the longest first, each into the row with the least room that still holds it; never more than 11/9
of the best possible number of rows (Johnson, Demers, Ullman, Garey and Graham 1974, https://doi.org/10.1137/0203025). Room is a
whole number of at most max_length, so the rows are kept in one stack for each amount of room, and the set of amounts that occur
is the bits of one integer: the least room that is enough is its lowest bit from `length` on. That makes a million examples a
matter of seconds.
"""

from collections.abc import Sequence


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows of indices into `lengths`: each index once, the lengths of a row at most `max_length` in sum. Deterministic.

    Among equal lengths the order given decides, so shuffled lengths give other companions and rows just as full.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [
        [] for _ in range(max_length + 1)
    ]  # room in tokens -> rows (numbers) that have it
    rooms = 0  # bit r is set where with_room[r] is not empty
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        assert 0 < length <= max_length, (length, max_length)
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, number = max_length, len(rows)
            rows.append([])
        rows[number].append(index)
        left = room - length
        if left:
            with_room[left].append(number)
            rooms |= 1 << left
    return rows

"""Packing: as few sequences of at most `max_length` tokens as possible, from given examples.

The algorithm is best-fit decreasing. The longest example comes first, and each goes into the
sequence with the least room that still holds it. It needs at most 11/9 of the best possible number
of sequences (Johnson, Demers, Ullman, Garey and Graham 1974, https://doi.org/10.1137/0203025).

Room is an integer from 0 to `max_length`, so there is one stack of sequences for each amount of
room. The amounts that occur are the set bits of one integer: the least room that is enough is its
lowest bit from `length` on. A million examples take seconds.
"""

from collections.abc import Sequence


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Return sequences of indices into `lengths`, each index in exactly one of them.

    The lengths of a sequence sum to at most `max_length`; a longer example has one of its own. The
    result is deterministic. Examples of equal length are placed in the order given, so shuffled
    lengths give other companions in sequences that are just as full.
    """
    sequences: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # room -> sequence numbers
    rooms = 0  # bit r is set if with_room[r] is not empty
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = min(lengths[index], max_length)
        assert length > 0, lengths[index]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, number = max_length, len(sequences)
            sequences.append([])
        sequences[number].append(index)
        left = room - length
        if left:
            with_room[left].append(number)
            rooms |= 1 << left
    return sequences

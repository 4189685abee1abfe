"""A cache with room holds what transformers' own holds, whatever is done with it."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from finetune.models.cache import RoomyLayer, make_room

ACTIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 90)),
    st.tuples(st.just("cut"), st.integers(1, 5)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
    st.tuples(st.just("copy"), st.none()),
)


@given(st.integers(0, 2**31), st.lists(ACTIONS, max_size=8))
def test_it_holds_what_a_plain_cache_holds(seed, actions):
    generator = torch.Generator().manual_seed(seed)
    plain, roomy = DynamicCache(), DynamicCache()
    rows = 2
    for name, value in [("append", 7), *actions, ("append", 1), ("append", 1)]:
        if name == "append":
            keys, values = (torch.randn(rows, 3, value, d, generator=generator) for d in (4, 5))
            found = [cache.update(keys, values, 0) for cache in (plain, roomy)]
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            make_room(roomy)
        elif name == "cut" and value < plain.get_seq_length():
            for cache in (plain, roomy):
                cache.crop(-value)
        elif name == "reorder" and max(value) < rows:
            rows = len(value)
            for cache in (plain, roomy):
                cache.reorder_cache(torch.tensor(value))
        elif name == "copy":
            roomy = copy.deepcopy(roomy)
        assert plain.get_seq_length() == roomy.get_seq_length()


def test_a_token_is_written_into_room_that_is_there():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 10, 4), 0)
    make_room(cache)
    [layer] = cache.layers
    assert type(layer) is RoomyLayer
    places = set()
    for _ in range(50):
        keys, values = cache.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), 0)
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1

"""Stop texts cut an answer in the same place however it comes in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from finetune.serving.worker import StopTexts

text = st.text("ab\n", max_size=12)


@given(st.lists(text, max_size=6), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_the_first_stop_text(pieces, stops):
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    expected = whole[: min(places)] if places else whole
    cut, sent = StopTexts(stops), ""
    for piece in pieces:
        certain, stopped = cut.add(piece)
        sent += certain
        assert expected.startswith(sent)  # what was sent is never taken back
        if stopped:
            break
    else:
        sent += cut.rest()
        assert not places
    assert sent == expected

"""Stop texts cut an answer in the same place, and answers that began apart go on together."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.inference.decoder import GenerationSettings
from finetune.models.tokenizers import train_tokenizer
from finetune.serving.worker import Job, QueueFull, StopTexts, Worker
from tests.inference.conftest import tiny_model

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


def test_a_request_joins_an_answer_that_is_being_drawn():
    model, tokenizer = tiny_model("llama").eval(), train_tokenizer(["a b c"], vocab_size=320)
    settings = GenerationSettings.greedy(30)
    forwards, ended, answers = [0], threading.Semaphore(0), {}
    worker = Worker({"m": model}, {"m": tokenizer}, batch_size=4, most_waiting=8)

    def take(name):
        def emit(piece):
            if name == "first" and piece.num_tokens >= 5 and "second" not in answers:
                answers["second"] = None
                worker.submit("m", Job([9, 8, 7], settings, take("second")))
            if piece.ending is not None:
                answers[name] = piece.ids
                ended.release()

        return emit

    counted = model.register_forward_hook(lambda *_: forwards.append(forwards.pop() + 1))
    try:
        worker.submit("m", Job([5, 6, 7], settings, take("first")))
        assert all(ended.acquire(timeout=60) for _ in range(2))
    finally:
        worker.close()
        counted.remove()
    assert {len(ids) for ids in answers.values()} == {30}
    assert forwards[0] <= 30 + 10  # and not 60


def test_requests_of_clients_that_are_gone_do_not_fill_the_queue():
    model, tokenizer = tiny_model("llama").eval(), train_tokenizer(["a b c"], vocab_size=320)
    settings, free = GenerationSettings.greedy(2), threading.Event()
    worker = Worker({"m": model}, {"m": tokenizer}, batch_size=1, most_waiting=2)
    hook = model.register_forward_pre_hook(lambda *_: free.wait(60) and None)  # after its trials
    ended = threading.Semaphore(0)

    def emit(piece):
        if piece.ending is not None:
            ended.release()

    try:
        worker.submit("m", Job([5, 6], settings, emit))
        while worker._waiting:  # until it is begun
            time.sleep(0.01)
        gone = [Job([5, 6], settings, emit) for _ in range(2)]
        for job in gone:
            worker.submit("m", job)
        with pytest.raises(QueueFull):
            worker.submit("m", Job([5, 6], settings, emit))
        for job in gone:
            job.cancel()
        worker.submit("m", Job([5, 6], settings, emit))
        free.set()
        assert all(ended.acquire(timeout=60) for _ in range(2))
    finally:
        free.set()
        worker.close()
        hook.remove()

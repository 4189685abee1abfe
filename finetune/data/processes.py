"""A function over the parts of a long sequence, on several processes, with the results in order.

Floor 1. The processes are new ones (spawned), since a copy of one that has threads, as torch and tokenizers make them, can hang.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from finetune.errors import UserError

PART = 500  # items in a part
WAITING = 2  # parts for each process that are read before their turn

_function: Callable[[list[Any]], Any]  # in a process of the pool


Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(function: Callable[[list[Item]], Result], items: Iterable[Item], num_proc: int) -> Iterator[Result]:
    """`function` of one list of items after another. It goes to each of the `num_proc` processes once, the items by and by; all of
    them, and the results, are pickled.

    Raises what the function raises, and UserError where a process ends by itself.
    """
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Result]] = deque()
    coming = iter(items)
    with ProcessPoolExecutor(num_proc, context, _start, (function,)) as pool:
        try:
            while (part := list(islice(coming, PART))) or waiting:
                if part:
                    waiting.append(pool.submit(_apply, part))
                if not part or len(waiting) > WAITING * num_proc:
                    yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of the {num_proc} processes that encode the data ended: memory may have run out, or the script that called "
                'this does its work outside of `if __name__ == "__main__":`; set data.num_proc: 1'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start(function: Callable[[list[Any]], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one


def _apply(part: list[Any]) -> Any:
    return _function(part)

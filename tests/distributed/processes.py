"""Processes of a test that talk to each other, forked from one server with its imports done."""

import faulthandler
import multiprocessing
import os
import socket
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

TIME_LIMIT = 150  # seconds; the longest take 20 on an idle machine


def run_forked(worker: ModuleType, arguments: list[tuple[Any, ...]]) -> list[int | None]:
    """Call `worker.main` in one process for each of `arguments`, and return their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker.__name__])
    processes = [context.Process(target=worker.main, args=own) for own in arguments]
    with mock.patch.dict(
        os.environ, {"CUDA_VISIBLE_DEVICES": ""}
    ):  # gloo's processes, whatever GPUs there are
        for process in processes:
            process.start()
    deadline = time.monotonic() + TIME_LIMIT + 20  # they end by themselves, see `log_to`
    try:
        for process in processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def log_to(path: Path) -> None:
    """Write all that a worker prints, and what each of its threads does if it hangs."""
    with path.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True, file=2)


def free_ports(count: int) -> list[int]:
    """So many TCP ports of this machine that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports

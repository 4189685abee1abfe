"""Processes of a test that talk to each other: forked from one server, which imports what they need once."""

import multiprocessing
import socket
from types import ModuleType
from typing import Any


def run_forked(worker: ModuleType, arguments: list[tuple[Any, ...]]) -> list[int | None]:
    """Call `worker.main` in one process for each of `arguments`; returns their exit codes when all have ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker.__name__])
    processes = [context.Process(target=worker.main, args=own) for own in arguments]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=240)
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def free_ports(count: int) -> list[int]:
    """So many TCP ports of this machine that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports

"""What strangers who connect and say nothing, or little, do to a meeting and to a group: time, memory, descriptors.

    python benchmarks/strangers.py
    python benchmarks/strangers.py --strangers 1000 --seconds 10 --rounds 7
    python benchmarks/strangers.py --bytes 1

A process of its own keeps so many connections to the meeting's port open and makes a new one for each that is closed.
Linux keeps those who say nothing from the listener for the first seconds; with --bytes 1 they all get there.
Three ranks meet at ``tcp://`` with a secret, with and without it in turns: rank 0 first, and the others, which are
timed, once the strangers are there. Then these are at every control port of a group over Gloo, whose ranks call
collectives, send and split meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import selectors
import socket
import statistics
import threading
import time
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

import colltensor as col

RANKS = 3
SECRET = "COLLTENSOR_SECRET"


def flood(addresses: list[tuple[str, int]], strangers: int, words: bytes, pipe: Connection) -> None:
    """Hold so many connections to each address, on which that is said, until told to end; answer with how many."""
    selector = selectors.DefaultSelector()
    made = 0

    def connect(address: tuple[str, int]) -> None:
        nonlocal made
        try:
            sock = socket.create_connection(address, timeout=1.0)
        except OSError:
            waiting.append(address)
            return
        made += 1
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.send(words)
        selector.register(sock, selectors.EVENT_READ, address)

    waiting: list[tuple[str, int]] = [address for address in addresses for _ in range(strangers)]
    selector.register(pipe, selectors.EVENT_READ, None)
    pipe.send(None)
    while True:
        again, waiting[:] = list(waiting), []
        for address in again:
            connect(address)
        for key, _ in selector.select(0.02 if waiting else 0.5):
            if key.data is None:
                pipe.send(made)
                return
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            selector.unregister(sock)
            sock.close()
            waiting.append(key.data)


class Flood:
    """Strangers at some addresses, for the length of a ``with`` block.

    Attributes:
        made: How many connections were made, once it is over.
    """

    def __init__(self, addresses: list[tuple[str, int]], strangers: int, words: bytes) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=flood, args=(addresses, strangers, words, theirs), daemon=True)
        self.made = 0

    def __enter__(self) -> Flood:
        self._process.start()
        self._ours.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.send(None)
        self.made = self._ours.recv()
        self._process.join()


def counts() -> dict[str, float]:
    """Return what this process has: memory in MB, threads, descriptors."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {
        "memory": int(status["VmRSS"].split()[0]) / 1024, "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def serve(rank: int, pipe: Connection) -> None:
    """Answer the driver's requests, as one rank."""
    group: Any = None
    while True:
        wish, *arguments = pipe.recv()
        if wish == "end":
            return
        began = time.perf_counter()
        answer: Any = None
        try:
            if wish == "meet":
                group = col.init_collective_group(RANKS, rank, "gloo", uuid.UUID(int=7).hex, init_method=arguments[0])
            elif wish == "leave":
                group.destroy()
            elif wish == "address":
                answer = group._meeting.addresses[rank]  # strangers would scan for it
            elif wish == "step":
                answer = step(group, arguments[0])
        except Exception as error:  # noqa: BLE001 - the driver prints it
            pipe.send((time.perf_counter() - began, f"{type(error).__name__}: {error}", counts()))
            continue
        pipe.send((time.perf_counter() - began, answer, counts()))


def step(group: Any, seconds: float) -> int:
    """Call collectives, transfers and splits for so long; return how many rounds were made and right."""
    rounds = 0
    until = time.monotonic() + seconds
    while group.broadcast_object(time.monotonic() < until, 0):
        total = group.allreduce(np.ones(1000))
        assert (total == RANKS).all()
        right, left = (group.rank + 1) % RANKS, (group.rank - 1) % RANKS
        taken = np.zeros(10)
        group.sendrecv(np.full(10, float(group.rank)), right, taken, left)
        assert (taken == left).all()
        if rounds % 50 == 0:
            group.split(0).destroy()
        rounds += 1
    return rounds


def ask(pipes: list[Connection], *wish: Any) -> list[tuple[float, Any, dict[str, float]]]:
    """Let every rank do something at once."""
    for pipe in pipes:
        pipe.send(wish)
    return [pipe.recv() for pipe in pipes]


def meet(pipes: list[Connection], port: int) -> list[tuple[float, Any, dict[str, float]]]:
    """Let rank 0 listen, and a moment later the others come."""
    method = f"tcp://127.0.0.1:{port}"
    pipes[0].send(("meet", method))
    time.sleep(0.5)
    others = ask(pipes[1:], "meet", method)
    return [pipes[0].recv(), *others]


def free_port() -> int:
    """Return a port that is free at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def main() -> int:
    """Measure, and print a table; 1 where a rank saw an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strangers", type=int, default=1000, help="connections at each port")
    parser.add_argument("--bytes", type=int, default=0, help="how many bytes each of them says")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long the group is tried")
    parser.add_argument("--rounds", type=int, default=7, help="meetings of each kind")
    arguments = parser.parse_args()
    words = b"?" * arguments.bytes
    os.environ[SECRET] = uuid.uuid4().hex
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(rank, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    failed = False
    times: dict[str, list[float]] = {"alone": [], "with strangers": []}
    made = 0
    for number in range(2 * arguments.rounds + 1):
        kind = list(times)[number % 2]
        port = free_port()
        if kind == "alone":
            found = meet(pipes, port)
        else:
            with Flood([("127.0.0.1", port)], arguments.strangers, words) as strangers:
                found = meet(pipes, port)
            made += strangers.made
        failed |= any(answer is not None for _, answer, _ in found)
        if number:  # not the first, which imports
            times[kind].append(max(seconds for seconds, _, _ in found[1:]))
        print(f"\rmeeting {number + 1} of {2 * arguments.rounds + 1}", end="", flush=True)
        ask(pipes, "leave")
    print()
    medians = {kind: statistics.median(samples) for kind, samples in times.items()}
    print(f"a meeting of {RANKS}, s: alone {medians['alone']:.3f}, with {arguments.strangers} strangers "
          f"{medians['with strangers']:.3f} ({medians['with strangers'] / medians['alone']:.2f} times; "
          f"{made} connections)")

    meet(pipes, free_port())
    addresses = [(str(host), int(port)) for _, (host, port), _ in ask(pipes, "address")]
    [(_, calm, _), *_] = ask(pipes, "step", arguments.seconds / 2)
    before = [found for _, _, found in ask(pipes, "address")]
    with Flood(addresses, arguments.strangers, words) as strangers:
        found = ask(pipes, "step", arguments.seconds)
        during = [counted for _, _, counted in found]
    time.sleep(0.5)
    after = [counted for _, _, counted in ask(pipes, "address")]
    answers = [answer for _, answer, _ in found]
    failed |= any(not isinstance(answer, int) for answer in answers)
    if failed:
        print(answers)
        return 1
    print(f"a group over Gloo, rounds a second: alone {2 * calm / arguments.seconds:.0f}, with {arguments.strangers} "
          f"strangers at each of {RANKS} control ports {answers[0] / arguments.seconds:.0f} ({strangers.made} "
          "connections)")
    print("| rank | | before | with them | after |\n| ---: | --- | ---: | ---: | ---: |")
    for rank in range(RANKS):
        for name in before[rank]:
            row = [f"{counted[rank][name]:.0f}" for counted in (before, during, after)]
            print(f"| {rank} | {name} | {' | '.join(row)} |")
    ask(pipes, "leave")
    for pipe in pipes:
        pipe.send(("end",))
    for process in processes:
        process.join()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())

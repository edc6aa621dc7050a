"""Time one agreement of all ranks on the control plane, over loopback TCP between spawned processes.

    python benchmarks/control_exchange.py [--ranks 2 4 8] [--exchanges 2000]

Prints the median time of ``Control.agree`` with a signature of 32 bytes, as rank 0 sees it after a warm-up of a
tenth of the exchanges. Compare with a bare ping of as many bytes between two processes, which the first line shows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from multiprocessing.connection import Connection

from colltensor import net
from colltensor.control import Control
from colltensor.rendezvous.meeting import Meeting

SECRET = b"s" * 32
SIGNATURE = b"\x5a" * 32
FRAME_NBYTES = 48
LIMIT_S = 120.0


def timed(exchanges: int, exchange: object) -> list[float]:
    """Return the microseconds that each of ``exchanges`` calls took, after the warm-up."""
    assert callable(exchange)
    for _ in range(exchanges // 10):
        exchange()
    times = []
    for _ in range(exchanges):
        start = time.perf_counter_ns()
        exchange()
        times.append((time.perf_counter_ns() - start) / 1000)
    return times


def run_rank(pipe: Connection, rank: int, world_size: int, exchanges: int) -> None:
    """Meet the other ranks through the parent, agree many times, and send the times back."""
    listener = net.listen("127.0.0.1")
    pipe.send(listener.getsockname()[:2])
    addresses = tuple(tuple(address) for address in pipe.recv())
    hosts = ("here",) * world_size
    meeting = Meeting(rank, world_size, "benchmark", b"8 bytes.", SECRET, addresses, hosts, {}, listener)
    deadline = time.monotonic() + LIMIT_S
    control = Control(meeting, deadline)
    pipe.send(timed(exchanges, lambda: control.agree(SIGNATURE, lambda: "benchmark", deadline)))
    control.close()


def ping(pipe: Connection, rank: int, world_size: int, exchanges: int) -> None:
    """Do what two ranks' agreement needs at least: both send a frame, then read one, on bare sockets."""
    if rank == 0:
        listener = net.listen("127.0.0.1")
        pipe.send(listener.getsockname()[:2])
        pipe.recv()
        sock, _ = listener.accept()
        listener.close()
    else:
        pipe.send(None)
        sock = socket.create_connection(tuple(pipe.recv()[0]))
    net.tune(sock)
    frame = b"f" * FRAME_NBYTES

    def exchange() -> None:
        sock.send(frame)
        sock.recv(FRAME_NBYTES, socket.MSG_WAITALL)

    with sock:
        pipe.send(timed(exchanges, exchange))


def measure(target: object, world_size: int, exchanges: int) -> list[float]:
    """Run ``target`` on every rank and return rank 0's times."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=target, args=(theirs, rank, world_size, exchanges)))  # type: ignore[arg-type]
        processes[-1].start()
        pipes.append(ours)
    addresses = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(addresses)
    times = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return times[0]


def main() -> None:
    """Print one line for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--exchanges", type=int, default=2000)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores; {options.exchanges} exchanges; microseconds: median, 10th and 90th percentile")
    rows = [("bare sockets, 2 ranks", ping, 2), *((f"agree, {n} ranks", run_rank, n) for n in options.ranks)]
    for title, target, world_size in rows:
        times = measure(target, world_size, options.exchanges)
        low, *_, high = statistics.quantiles(times, n=10)
        print(f"{title:>22}: {statistics.median(times):7.1f} {low:7.1f} {high:7.1f}", flush=True)


if __name__ == "__main__":
    main()

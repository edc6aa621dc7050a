"""One rank of a benchmark: does what the command orders over a socket, and says how long it took.

    python -m colltensor.cli.bench_rank LIBRARY SOCKET

Orders and answers are lines of JSON. A rank that waits for an order uses no processor, so that
libraries can be measured in turns.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

from colltensor.cli.libraries import LIBRARIES
from colltensor.cli.worker import Worker


def serve(worker: Any, rank: int, path: str) -> None:
    """Carry out orders that come over a socket, until it is closed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        lines = sock.makefile("rw", encoding="utf-8")
        lines.write(json.dumps({"rank": rank}) + "\n")
        lines.flush()
        for line in lines:
            lines.write(json.dumps(worker(json.loads(line))) + "\n")
            lines.flush()


def main() -> None:
    """Be a rank, or the driver of ranks that are Ray's actors."""
    name, path = sys.argv[1:3]
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"])
    if name in ("ray", "putget", "colltensor-in-ray"):
        from colltensor.cli.ray_workers import driver

        with driver(name, world_size) as worker:
            serve(worker, 0, path)
        return
    library = LIBRARIES[name](rank, world_size)
    serve(Worker(library), library.rank, path)


if __name__ == "__main__":
    main()

"""Collectives without Ray: plain processes that meet at a file.

    python examples/no_ray.py --workers 4            starts all ranks itself

or one command per rank, on any machines that share the file:

    python examples/no_ray.py --workers 2 --rank 0 --init-method file:///shared/meeting
    python examples/no_ray.py --workers 2 --rank 1 --init-method file:///shared/meeting

Each rank has a part of scikit-learn's digits; one ``allreduce`` of three sums tells all of them the
mean and the standard deviation of every pixel. Needs scikit-learn. Ranks on several machines also
need a Gloo: see docs/groups.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile

import numpy as np

import colltensor as col

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError:
    sys.exit("this example needs scikit-learn: pip install scikit-learn")


def run_rank(rank: int, world_size: int, init_method: str) -> None:
    """One rank: raises where its result is wrong."""
    images = load_digits().data
    part = images[rank::world_size]
    sums = {
        "sum": part.sum(axis=0),
        "squares": (part**2).sum(axis=0),
        "count": np.array([float(len(part))]),
    }

    group = col.init_collective_group(world_size, rank, init_method=init_method, timeout_s=60)
    group.allreduce(sums)
    group.destroy()

    mean = sums["sum"] / sums["count"]
    deviation = np.sqrt(sums["squares"] / sums["count"] - mean**2)
    np.testing.assert_allclose(mean, images.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(deviation, images.std(axis=0), rtol=1e-6, atol=1e-6)
    line = f"{len(part)} images of {int(sums['count'][0])}; pixel 20 is {mean[20]:.3f} +- {deviation[20]:.3f}"
    # one write, so that the ranks' lines stay whole
    sys.stdout.write(f"rank {rank} of {world_size}: {line}\n")


def main() -> int:
    """Run one rank, or start all; return 0 where every rank succeeds."""
    parser = argparse.ArgumentParser(description="collectives between plain processes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rank", type=int, help="run this rank only, in this process")
    parser.add_argument("--init-method", help="where the ranks meet; needed with --rank")
    options = parser.parse_args()
    if (options.rank is None) != (options.init_method is None):
        parser.error("--rank and --init-method go together")
    if options.rank is not None:
        run_rank(options.rank, options.workers, options.init_method)
        return 0

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, options.workers, f"file://{folder}") for rank in range(options.workers)]
        ranks = [context.Process(target=run_rank, args=each) for each in arguments]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    codes = [process.exitcode for process in ranks]
    if any(codes):
        print(f"WRONG: the ranks ended with exit codes {codes}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

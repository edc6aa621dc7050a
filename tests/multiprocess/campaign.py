"""The long runs: random collectives in shared memory against numpy, and ranks killed at random moments.

    python tests/multiprocess/campaign.py --collectives 20000 --ranks 8 --seed 1
    python tests/multiprocess/campaign.py --kills 50 --seed 1
    python tests/multiprocess/campaign.py --kills 50 --seed 7 --backend gloo    over the native Gloo; also hierarchical

Random collectives run over 2 to ``--ranks`` ranks in turn, every second time on two groups in two threads. A failure
ends the run with a traceback that names the seed and the step.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))

from kills import campaign
from leftovers import SESSION_VARIABLE, Leftovers
from pool import RankPool
from shm_ranks import fresh
from shm_stress import play

STEPS = {2: 1000, 3: 700, 4: 500}
"""Steps of a round by world size; 300 for more ranks."""


def collectives(pool: RankPool, wanted: int, most_ranks: int, seed: int) -> int:
    """Play rounds until so many collectives were made."""
    done = turn = 0
    while done < wanted:
        size = 2 + turn % (most_ranks - 1)
        began = time.monotonic()
        made = pool.run(
            size,
            play,
            fresh(),
            seed * 10_000 + turn,
            STEPS.get(size, 300),
            1 + turn % 2,
            timeout_s=300,
        )
        done, turn = done + made[0], turn + 1
        print(
            f"{done:6} collectives; the last {made[0]} over {size} ranks, seed {seed * 10_000 + turn - 1}: "
            f"{time.monotonic() - began:.1f} s",
            flush=True,
        )
    return done


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collectives", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--backend",
        choices=("shm", "gloo", "hierarchical"),
        default="shm",
        help="whose ranks are killed",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ct-") as name:
        folder = Path(name)
        os.environ[SESSION_VARIABLE] = folder.name
        before = Leftovers.now(folder)
        pool = RankPool(folder)
        began = time.monotonic()
        try:
            if options.collectives:
                done = collectives(pool, options.collectives, options.ranks, options.seed)
                print(f"{done} collectives in {time.monotonic() - began:.0f} s")
            if options.kills:
                began = time.monotonic()
                say = functools.partial(print, flush=True)
                slowest = campaign(pool, options.kills, options.seed, options.backend, say)
                print(
                    f"{options.kills} ranks killed in {time.monotonic() - began:.0f} s; every survivor had its error "
                    f"within {slowest:.2f} s"
                )
        finally:
            pool.close()
        left = [line for line in Leftovers.since(before) if str(folder) not in line]
        if left:
            sys.exit("left behind:\n" + "\n".join(left))


if __name__ == "__main__":
    main()

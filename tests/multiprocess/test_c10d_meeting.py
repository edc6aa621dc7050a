"""An error of one rank while a process group is made reaches all ranks, however slowly they read."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from colltensor import net
from colltensor.errors import CollectiveError, OptionError, PeerLostError
from colltensor.rendezvous import Meeting
from colltensor.rendezvous.protocol import JoinRequest
from colltensor.rendezvous.secret import derived

pytestmark = pytest.mark.needs("torch")


class SlowStore:
    """A store whose reader looks seldom."""

    def __init__(self, store: Any, pause_s: float) -> None:
        self._store = store
        self._pause_s = pause_s

    def check(self, keys: list[str]) -> bool:
        time.sleep(self._pause_s)
        return bool(self._store.check(keys))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def run_in_threads(function: Callable[[Any], None], arguments: Iterable[Any]) -> None:
    """Call it on each argument, all at once, each in a thread."""
    threads = [threading.Thread(target=function, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def test_a_wrong_option_of_one_rank_is_heard_by_the_slow_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch_distributed = pytest.importorskip("torch.distributed")
    from colltensor.torch.c10d.meeting import meet

    store = torch_distributed.HashStore()
    culprits = set()
    errors: dict[int, CollectiveError] = {}

    def address(interface: str) -> str:
        if threading.get_ident() in culprits:
            raise OptionError("no-such-interface")
        return "127.0.0.1"

    def make(rank: int) -> None:
        if rank == 1:
            culprits.add(threading.get_ident())
        try:
            meet(SlowStore(store, 0.1 * rank), "all", rank, 3, name="g", timeout_s=5.0)
        except CollectiveError as error:
            errors[rank] = error

    monkeypatch.setattr(net, "interface_address", address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    began = time.monotonic()
    run_in_threads(make, range(3))
    assert time.monotonic() - began < 4
    assert {rank: type(error) for rank, error in errors.items()} == dict.fromkeys(
        range(3), OptionError
    )
    assert all("no-such-interface" in str(error) for error in errors.values())
    assert store.num_keys() == 0


def test_process_group_options_of_one_rank_are_refused_on_all() -> None:
    torch_distributed = pytest.importorskip("torch.distributed")
    from colltensor.torch.c10d import create

    store = torch_distributed.HashStore()
    errors: dict[int, CollectiveError] = {}

    def make(rank: int) -> None:
        options = SimpleNamespace(
            store=torch_distributed.PrefixStore("g", store),
            group_rank=rank,
            group_size=3,
            timeout=timedelta(seconds=10),
            group_id="g",
        )
        try:
            create(options, {"high_priority": True} if rank == 1 else None)
        except CollectiveError as error:
            errors[rank] = error

    began = time.monotonic()
    run_in_threads(make, range(3))
    assert time.monotonic() - began < 5
    assert {rank: type(error) for rank, error in errors.items()} == dict.fromkeys(
        range(3), OptionError
    )
    assert all(
        "rank 1: " in str(error) and "high_priority" in str(error) for error in errors.values()
    )
    assert store.num_keys() == 0


def test_what_one_rank_alone_met_with_leaves_nothing_for_the_next_meeting() -> None:
    torch_distributed = pytest.importorskip("torch.distributed")
    from colltensor.torch.c10d.meeting import meet

    store = torch_distributed.HashStore()

    def look() -> None:
        raise PeerLostError("rank 1", (1,))

    with pytest.raises(PeerLostError, match=r"^rank 1$"):
        meet(store, "again", 0, 2, name="g", timeout_s=5.0, check=look)
    assert not store.check(["again/1/0"])
    groups: list[Any] = []

    def make(rank: int) -> None:
        groups.append(meet(store, "again", rank, 2, name="g", timeout_s=9.0))

    run_in_threads(make, range(2))
    run_in_threads(lambda group: group.destroy(), groups)
    assert sorted(group.rank for group in groups) == [0, 1]
    assert not store.check(["again/left"])


class OpenStore:
    """A store of which somebody keeps all that was ever written."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.seen: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.seen[key] = bytes.fromhex(value)
        self._store.set(key, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.mark.parametrize("given", [b"hush", b""])
def test_whoever_reads_the_store_knows_no_secret(
    monkeypatch: pytest.MonkeyPatch, given: bytes
) -> None:
    torch_distributed = pytest.importorskip("torch.distributed")
    from colltensor.torch.c10d import meeting as c10d_meeting

    monkeypatch.setenv("COLLTENSOR_SECRET", os.fsdecode(given))
    store = OpenStore(torch_distributed.HashStore())
    used: list[Meeting] = []
    both = threading.Barrier(2, timeout=5)

    def connect(meeting: Meeting, options: Any, deadline: float) -> Any:
        meeting.listener.close()
        used.append(meeting)
        return SimpleNamespace(barrier=both.wait)

    monkeypatch.setattr(c10d_meeting, "connect", connect)
    run_in_threads(
        lambda rank: c10d_meeting.meet(store, "all", rank, 2, name="g", timeout_s=5), range(2)
    )
    assert len(used) == 2
    assert used[0].secret == used[1].secret
    said = b"".join(len(value).to_bytes(8, "big") + value for value in store.seen.values())
    nonce = bytes.fromhex(JoinRequest.decode(store.seen["all/1/0"]).nonce)
    assert nonce[:8] == used[0].generation
    guess = derived(b"", nonce[8:], said)
    assert (guess == used[0].secret) == (not given)
    assert all(given not in value for value in store.seen.values()) or not given


@pytest.mark.parametrize(
    ("culprit", "named"), [(0, ("0120", "10", "20")), (1, ("010", "10", "210"))]
)
def test_another_secret_of_one_rank_is_heard_by_all(
    monkeypatch: pytest.MonkeyPatch, culprit: int, named: tuple[str, ...]
) -> None:
    """Each rank hears, after its own name, who differs from rank 0; nobody where it differs itself."""
    torch_distributed = pytest.importorskip("torch.distributed")
    from colltensor.torch.c10d import meeting as c10d_meeting

    store = torch_distributed.HashStore()
    errors: dict[int, CollectiveError] = {}
    secrets: dict[int, bytes] = {}

    def make(rank: int) -> None:
        secrets[threading.get_ident()] = b"another" if rank == culprit else b"hush"
        try:
            c10d_meeting.meet(store, "all", rank, 3, name="g", timeout_s=5.0)
        except CollectiveError as error:
            errors[rank] = error

    monkeypatch.setattr(c10d_meeting, "given_secret", lambda: secrets[threading.get_ident()])
    began = time.monotonic()
    run_in_threads(make, range(3))
    assert time.monotonic() - began < 2
    assert {rank: type(error) for rank, error in errors.items()} == dict.fromkeys(
        range(3), OptionError
    )
    assert all("COLLTENSOR_SECRET" in str(error) for error in errors.values())
    assert tuple("".join(re.findall(r"rank (\d)", str(errors[rank]))) for rank in range(3)) == named
    assert store.num_keys() == 0

"""CommunicatorCache: the communicators of one group, made on first use.

There is one of all ranks, and one for each pair. Each rank of a communicator is one device of one
process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from colltensor.errors import CollectiveError, DeviceError, MismatchError

_SLICE_S: Final = 0.1
_END_TIMEOUT_S: Final = 5.0


class Communicators(NamedTuple):
    """Communicators that belong together, one for each device of this process that takes part.

    Attributes:
        handles: This process's, in the order of its devices.
        first: The communicators' rank of the first one.
        firsts: The same for every rank of the group.
        shared: Whether other ranks are threads of this process; their kernels wait for each other,
            so that they must not be on one stream.
    """

    handles: tuple[Any, ...]
    first: int
    firsts: tuple[int, ...]
    shared: bool


@dataclass(slots=True)
class _Presence:
    """The ranks of a communicator that are in this process.

    Attributes:
        came: How many have begun to connect: all of them, once one is connected.
        connecting: How many have not ended yet.
    """

    came: int = 0
    connecting: int = 0


_local: Final[dict[bytes, _Presence]] = {}
"""By the communicator's id, while ranks of this process connect."""
_local_lock: Final = threading.Lock()


class CommunicatorCache:
    """Makes communicators and ends them."""

    def __init__(self, control: Any, driver: Any) -> None:
        self._control = control
        self._driver = driver
        self._rank = 0 if control is None else control.rank
        self._made: dict[tuple[int, ...], Communicators] = {}
        self._pairs: dict[int, tuple[int, Communicators]] = {}
        self._lock = threading.Lock()

    def all(self, devices: tuple[int, ...], deadline: float) -> Communicators:
        """Return the communicators of all ranks' devices.

        Every rank calls if they are not there yet.

        Raises:
            DeviceError: This process has used another device for such calls before.
            MismatchError: The ranks bring different numbers of devices.
            CollectiveError: A rank does not come.
        """
        if devices in self._made:
            return self._made[devices]
        self.refuse(devices)

        control = self._control
        identity = self._driver.unique_id() if self._rank == 0 else b""
        ballot = json.dumps([identity.hex(), len(devices)]).encode()
        ballots = [ballot] if control is None else control.allgather(ballot, deadline)
        votes = [json.loads(vote) for vote in ballots]

        counts = [count for _, count in votes]
        odd = [rank for rank, count in enumerate(counts) if count != counts[0]]
        if odd:
            raise MismatchError(
                f"the ranks bring different numbers of devices to one call: {counts}, by rank; bring as many",
                odd,
            )

        firsts = tuple(len(devices) * rank for rank in range(len(counts)))
        communicators = self._connect(
            bytes.fromhex(votes[0][0]), sum(counts), firsts, self._rank, devices, deadline
        )
        with self._lock:  # the watchdog goes through them
            self._made[devices] = communicators
        return communicators

    def communicators(self, devices: tuple[int, ...]) -> Communicators | None:
        """Return the communicators of all ranks' devices if they are there."""
        return self._made.get(devices)

    def pair(self, peer: int, device: int, deadline: float) -> Communicators:
        """Return the communicator of this rank and ``peer``, the lower rank first.

        Both call if it is not there yet.

        Raises:
            DeviceError: Another device was used with this peer before.
            CollectiveError: The peer does not come.
        """
        if peer in self._pairs:
            self.refuse_pair(peer, device)
            return self._pairs[peer][1]
        mine = self._driver.unique_id() if self._rank < peer else b""
        theirs = self._control.swap(peer, mine, deadline)
        place = 0 if self._rank < peer else 1
        communicators = self._connect(mine or theirs, 2, (0, 1), place, (device,), deadline)
        with self._lock:
            self._pairs[peer] = device, communicators
        return communicators

    def refuse(self, devices: tuple[int, ...]) -> None:
        """Raise DeviceError if this process has called with other devices before.

        That is about calls of all ranks.
        """
        for used in self._made:
            if len(used) == len(devices) and used != devices:
                raise DeviceError(
                    f"the tensor is on cuda:{devices[0]}, but this rank's earlier calls on the group were on "
                    f"cuda:{used[0]}, and a rank keeps its device; make another group for another device"
                )

    def refuse_pair(self, peer: int, device: int) -> None:
        """Raise DeviceError if another device was used with this peer before."""
        used, _ = self._pairs.get(peer, (device, None))
        if used != device:
            raise DeviceError(
                f"the tensor is on cuda:{device}, but earlier transfers with rank {peer} were on cuda:{used}, and a "
                "rank keeps its device; make another group for another device"
            )

    def disown(self) -> None:
        """Keep the communicators for ever.

        CuPy would destroy them when the last reference is gone.
        """
        for communicator in self._everyone():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(communicator))

    def error(self) -> BaseException | None:
        """Return an error that a communicator reports, or None."""
        with self._lock:
            for communicator in self._everyone():
                found: BaseException | None = self._driver.error_of(communicator)
                if found is not None:
                    return found
        return None

    def end(self, keep: object = None) -> None:
        """Do as ``abort``, and wait for it a few seconds at most."""
        everyone = self._taken()
        if everyone:
            thread = threading.Thread(
                target=self._abort, args=(everyone, keep), name="colltensor nccl abort", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                # the interpreter shuts down: the watchdog's thread, which calls, is waited for
                # instead
                self._abort(everyone, keep)
            else:
                thread.join(_END_TIMEOUT_S)

    def abort(self, keep: object = None) -> None:
        """Abort all communicators, however long that takes.

        Args:
            keep: Kept until they are aborted: what their kernels may still write to.
        """
        self._abort(self._taken(), keep)

    def _taken(self) -> Sequence[Any]:
        """Return all communicators and forget them."""
        with self._lock:
            everyone = self._everyone()
            self._made.clear()
            self._pairs.clear()
        return everyone

    def _abort(self, communicators: Sequence[Any], keep: object = None) -> None:
        for communicator in communicators:
            with contextlib.suppress(self._driver.error):
                communicator.abort()

    def _everyone(self) -> list[Any]:
        made = [*self._made.values(), *(communicators for _, communicators in self._pairs.values())]
        return [communicator for communicators in made for communicator in communicators.handles]

    def _connect(
        self,
        identity: bytes,
        size: int,
        firsts: tuple[int, ...],
        place: int,
        devices: tuple[int, ...],
        deadline: float,
    ) -> Communicators:
        """Make this process's communicators in a thread of its own.

        NCCL cannot be told when to give up.

        Raises:
            TimeoutError: A rank did not come before ``deadline``; the thread is left to it, and
                ends what it makes.
            RuntimeError: NCCL refused.
            CollectiveError: The group broke meanwhile.
        """
        with _local_lock:
            present = _local.setdefault(identity, _Presence())
            present.came += 1
            present.connecting += 1

        made: list[Any] = []
        failed: list[BaseException] = []
        given_up = threading.Event()

        def make() -> None:
            try:
                # What one thread connects on several devices must begin together.
                with self._driver.together() if len(devices) > 1 else contextlib.nullcontext():
                    for index, device in enumerate(devices):
                        with self._driver.on(device):
                            made.append(self._driver.connect(size, identity, firsts[place] + index))
            except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
                self._driver.ungroup()
                failed.append(error)
            if given_up.is_set():
                self._abort(made)

        thread = threading.Thread(target=make, name="colltensor nccl connect", daemon=True)
        thread.start()

        try:
            while thread.is_alive():
                thread.join(_SLICE_S)
                if self._control is not None:
                    self._control.check()
                if thread.is_alive() and time.monotonic() >= deadline:
                    raise TimeoutError("NCCL did not connect the ranks in time")
        except BaseException:
            given_up.set()
            raise
        finally:
            with _local_lock:
                present.connecting -= 1
                if not present.connecting:
                    del _local[identity]

        if failed:
            if isinstance(failed[0], CollectiveError):
                raise failed[0]
            raise RuntimeError(_explained(failed[0])) from failed[0]
        return Communicators(tuple(made), firsts[place], firsts, present.came > 1)


def _explained(error: BaseException) -> str:
    text = f"NCCL could not connect the ranks: {error}"
    if "invalid usage" in str(error).lower():
        text += (
            "; several ranks on one GPU need libnccl 2.30 or later with NCCL_MULTI_RANK_GPU_ENABLE=1, "
            "NCCL_NVLS_ENABLE=0 and NCCL_MAX_CTAS=1 (NCCL_DEBUG=WARN says more)"
        )
    return text

"""The shared memory of a group.

Rank 0 makes it and hands it to the others, and all prove that they share it. The memory is a memfd:
it has no name, and is gone with the last process that maps it, however that ends. Its pages are
reserved before anybody maps it, and it is sealed against changes of size. So no access can fail
later. It is handed over on a socket whose two ends have proved to know the group's secret.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from colltensor import environment, net
from colltensor.backends.base import ControlPlane
from colltensor.backends.shm import cgroup, library
from colltensor.errors import BackendUnavailableError, CollectiveError, remedy_for_system
from colltensor.listener import HANDSHAKE_S, Listener
from colltensor.rendezvous import Meeting

MAX_RANKS: Final = 256

_LOG: Final = logging.getLogger(__name__)

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_RANK: Final = struct.Struct("!I")
# of a process whose user the user namespace does not know, user_namespaces(7)
_OVERFLOW_UID: Final = 65534
_SLICE_S: Final = 0.1
_PAUSE_S: Final = 0.02
_BACKLOG: Final = 1024
_HAND_OUT_S: Final = 10.0
_DIRECT_NBYTES: Final = {2: 64 << 10}
_DIRECT_NBYTES_OF_MANY: Final = 32 << 10
_CHUNK_NBYTES: Final = 512 << 10
_READ_NBYTES: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment that this rank has mapped.

    Attributes:
        library: The native library.
        handle: The library's number for this rank's part.
        crowded: Whether there are more ranks than processors for them.
        details: Whether large messages are read from the peers' memory, and the obstacle if not, in
            words.
        stop: Asked by the library every 100 ms while it waits, see ``ErrorMapping.stop``. Set by
            the owner.
    """

    library: Any
    handle: int
    crowded: bool
    details: str
    stop: list[Callable[[], int]]


@dataclass(frozen=True, slots=True)
class _Ballot:
    """What a rank tells the others before the segment is made."""

    trouble: str | None
    pid: int
    pid_namespace: int
    cores: list[int]
    quota: float


def share(control: ControlPlane, meeting: Meeting, deadline: float) -> Segment:
    """Make the segment on rank 0 and map it on every rank. All ranks call.

    Raises:
        BackendUnavailableError: On every rank, where one cannot take part.
        CollectiveError: A rank died or did not come.
    """
    ballots = [
        _Ballot(**json.loads(vote))
        for vote in control.allgather(_own_ballot(control, meeting), deadline)
    ]
    _refuse(control, [ballot.trouble for ballot in ballots])

    cores = _cores(ballots)
    fd, listener, trouble = _make(control, cores) if control.rank == 0 else (-1, None, None)
    link: socket.socket | None = None
    handing: _HandOut | None = None

    try:
        name = b"" if listener is None else listener.getsockname()
        if listener is not None:
            handing = _HandOut(listener, fd, control, meeting)
            trouble = handing.start()

        opening = control.allgather(json.dumps([trouble, name.hex()]).encode(), deadline)
        trouble, name = json.loads(opening[0])
        _refuse(control, [trouble])

        trouble = None
        try:
            if listener is None:
                link = _reach(bytes.fromhex(name), deadline)
        except OSError as error:
            trouble = f"the shared memory could not be handed over: {error} (another network namespace than rank 0's?)"

        # Rank 0 waits for nobody who cannot reach it. It waits for the others only so long that
        # time is left for Gloo.
        _refuse(
            control,
            [
                json.loads(vote)
                for vote in control.allgather(json.dumps(trouble).encode(), deadline)
            ],
        )

        until = time.monotonic() + min(_HAND_OUT_S, (deadline - time.monotonic()) / 2)
        try:
            if handing is not None:
                handing.wait(until)
            else:
                assert link is not None
                fd = _fetch(bytes.fromhex(name), link, control, meeting, until)
            segment, trouble = _map(fd, control, ballots, cores)
        except CollectiveError:  # a lost or late rank is an OSError, too
            raise
        except OSError as error:
            segment, trouble = None, f"the shared memory could not be handed over: {error}"
    finally:
        if handing is not None:
            handing.end()
        for sock in filter(None, (link, listener)):
            sock.close()
        if fd >= 0:
            os.close(fd)

    # A rank without the memory takes part as well, so that all refuse alike.
    try:
        details = _prove(segment, trouble, control, ballots, deadline)
    except BaseException:
        if segment is not None:
            segment.library.shm_close(segment.handle)
        raise

    assert segment is not None
    return replace(segment, details=details)


def _own_ballot(control: ControlPlane, meeting: Meeting) -> bytes:
    trouble = None
    if len(set(meeting.host_ids)) > 1:
        listing = ", ".join(f"rank {rank}: {host}" for rank, host in enumerate(meeting.host_ids))
        trouble = f"the ranks are on different hosts ({listing}); use backend='auto' or 'gloo'"
    elif control.world_size > MAX_RANKS:
        trouble = f"it serves at most {MAX_RANKS} ranks, and the group has {control.world_size}; use backend='gloo'"
    else:
        try:
            library.load()
        except BackendUnavailableError as error:
            trouble = str(error).removeprefix("backend 'shm': ")

    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    cores = sorted(os.sched_getaffinity(0))
    quota = cgroup.processors()

    return json.dumps(
        {
            "trouble": trouble,
            "pid": os.getpid(),
            "pid_namespace": namespace,
            "cores": cores,
            "quota": quota,
        }
    ).encode()


def _refuse(control: ControlPlane, troubles: list[str | None]) -> None:
    """Raise on every rank where one has trouble."""
    found = [
        f"rank {rank}: {trouble}" for rank, trouble in enumerate(troubles) if trouble is not None
    ]
    if found:
        shown = "; ".join(found) if len(set(troubles)) > 1 else found[0].partition(": ")[2]
        raise BackendUnavailableError(
            f"group '{control.group_name}' (rank {control.rank}): backend 'shm' cannot be used: {shown}"
        )


def _cores(ballots: list[_Ballot]) -> int:
    cores = len({core for ballot in ballots for core in ballot.cores})
    return max(
        1,
        min([cores, *(math.ceil(ballot.quota) for ballot in ballots if ballot.quota != math.inf)]),
    )


def _make(control: ControlPlane, cores: int) -> tuple[int, socket.socket | None, str | None]:
    """Make the segment and the socket where the others fetch it, or say why not."""
    native = library.load()
    size = control.world_size
    half = native.shm_half_nbytes(size)
    nbytes = native.shm_nbytes(size, half)

    fd, listener = -1, None
    try:
        # At a control group's limit posix_fallocate does not fail, but the process is killed.
        spare = cgroup.spare_nbytes()
        if nbytes > spare:
            raise OSError(errno.ENOMEM, f"its control group has {spare / 2**20:.1f} MiB left")

        fd = os.memfd_create("colltensor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)

        direct = _DIRECT_NBYTES.get(size, _DIRECT_NBYTES_OF_MANY)
        chunk = min(_CHUNK_NBYTES, half // 2)  # four at least in a rank's staging
        code = native.shm_format(fd, size, cores, half, direct, chunk, _READ_NBYTES)
        if code:
            raise OSError(code, os.strerror(code))

        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(b"\0colltensor-" + secrets.token_hex(16).encode())
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        if fd >= 0:
            os.close(fd)
        return (
            -1,
            None,
            (
                f"{nbytes >> 20} MiB of shared memory cannot be reserved: {error}; "
                + remedy_for_system(error, "free memory or raise the container's limit")
            ),
        )
    return fd, listener, None


class _HandOut:
    """Gives the segment's descriptor to every other rank, once.

    Strangers are turned away; nobody waits for another.
    """

    def __init__(
        self, listener: socket.socket, fd: int, control: ControlPlane, meeting: Meeting
    ) -> None:
        self._fd = fd
        self._control = control
        self._meeting = meeting
        self._missing = set(range(1, control.world_size))
        self._came, self._turn = threading.Event(), threading.Lock()
        self._listener = Listener(
            listener, self._serve, self._note, "colltensor-hand-out", control.world_size
        )

    def start(self) -> str | None:
        """Begin, before anybody knows of the socket.

        Return why not where no thread can be started.
        """
        try:
            self._listener.start()
        except RuntimeError as error:
            return f"the shared memory cannot be handed out: {error}; {remedy_for_system(error, 'end some threads')}"
        return None

    def wait(self, until: float) -> None:
        """Return once every rank has it.

        Raises:
            TimeoutError: Some have not by then.
            CollectiveError: A rank died.
        """
        while self._missing:
            self._control.check()
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"ranks {sorted(self._missing)} did not fetch it in time")
            self._came.wait(min(_SLICE_S, left))
            self._came.clear()

    def end(self) -> None:
        """Give it to nobody any more; its number may be another descriptor's soon."""
        with self._turn:
            self._missing.clear()
        self._listener.stop()
        self._listener.join(1.0)

    def _serve(self, link: socket.socket) -> None:
        if not _may_be_a_rank(link):
            net.refuse(
                link, b"it belongs to another user than rank 0", time.monotonic() + HANDSHAKE_S
            )
            return
        context, _ = self._listener.verify(link, self._secret_of)
        [rank] = _RANK.unpack(context[-_RANK.size :])
        with self._turn:
            if rank in self._missing:
                socket.send_fds(link, [b"\0"], [self._fd])
                self._missing.discard(rank)
        self._came.set()

    def _secret_of(self, context: bytes) -> bytes | None:
        named = context[len(self._meeting.generation) :]
        known = context.startswith(self._meeting.generation) and len(named) == _RANK.size
        return self._meeting.secret if known and _RANK.unpack(named)[0] in self._missing else None

    def _note(self, what: str, error: Exception) -> None:
        control = self._control
        _LOG.debug(
            "group %r (rank %d): shared memory: %s: %s",
            control.group_name,
            control.rank,
            what,
            error,
        )


def _may_be_a_rank(link: socket.socket) -> bool:
    """Return whether the other side's user may be this one's.

    A user of another user namespace shows as nobody.
    """
    _, user, _ = struct.unpack(
        "3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return user in (os.geteuid(), 0, _OVERFLOW_UID)


def _reach(name: bytes, deadline: float) -> socket.socket:
    """Connect to rank 0's socket, as soon as its queue has a place."""
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.settimeout(net.time_left(deadline))
            link.connect(name)
            return link
        except BlockingIOError:  # unlike TCP, a unix socket does not wait for a place
            link.close()
            time.sleep(min(_PAUSE_S, net.time_left(deadline)))
        except BaseException:
            link.close()
            raise


def _fetch(
    name: bytes, link: socket.socket, control: ControlPlane, meeting: Meeting, until: float
) -> int:
    """Return the segment's descriptor, over a connection to rank 0.

    Strangers may take a connection's place; others are made then.

    Raises:
        OSError: Rank 0 did not give it by then.
    """
    while True:
        try:
            net.prove(link, meeting.secret, meeting.generation + _RANK.pack(control.rank), until)
            link.settimeout(net.time_left(until))
            _, descriptors, _, _ = socket.recv_fds(link, 1, 1)
            if descriptors:
                os.set_inheritable(descriptors[0], False)
                return descriptors[0]
            raise ConnectionResetError("rank 0 sent no descriptor")
        except net.AuthenticationError:
            raise
        except ConnectionError:
            control.check()
            time.sleep(min(_PAUSE_S, net.time_left(until)))
        finally:
            link.close()

        link = _reach(name, until)


def _map(
    fd: int, control: ControlPlane, ballots: list[_Ballot], cores: int
) -> tuple[Segment | None, str | None]:
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        return None, "the shared memory is not sealed"
    native = library.load()
    pidfds = _pidfds(control.rank, ballots)
    stop: list[Callable[[], int]] = []
    handle = native.shm_open(
        fd,
        os.fstat(fd).st_size,
        control.rank,
        control.world_size,
        pidfds.buffer_info()[0],
        lambda: stop[0]() if stop else 0,
    )
    if handle < 0:
        return None, f"the shared memory cannot be mapped: {os.strerror(-handle)}"
    return Segment(native, handle, control.world_size > cores, "", stop), None


def _pidfds(own: int, ballots: list[_Ballot]) -> array.array[int]:
    """Open a descriptor for each other rank's process, by which its death is seen at once.

    The library closes them. Where there is none (another pid namespace, an old kernel) the control
    plane notices the death instead. The processes are alive, because they have yet to take part in
    the proof. Their numbers are not looked at again after it.
    """
    pidfds = array.array("i")
    for rank, ballot in enumerate(ballots):
        pidfd = -1
        if (
            rank != own
            and ballot.pid_namespace == ballots[own].pid_namespace
            and ballot.pid != os.getpid()
        ):
            with contextlib.suppress(OSError, AttributeError):
                pidfd = os.pidfd_open(ballot.pid)
        pidfds.append(pidfd)
    return pidfds


def _prove(
    segment: Segment | None,
    trouble: str | None,
    control: ControlPlane,
    ballots: list[_Ballot],
    deadline: float,
) -> str:
    """Let every rank write a fresh number and find everybody's, or raise on every rank.

    Where all ranks also find the numbers in each other's own memory, large messages are read from
    there.

    Returns:
        Whether they are, in words.

    Raises:
        BackendUnavailableError: A rank has trouble, or does not see what another wrote.
    """
    nonce = secrets.token_bytes(16)
    if segment is not None:
        segment.library.shm_write_nonce(segment.handle, *struct.unpack("<qq", nonce))
    nonces = control.allgather(nonce, deadline)

    if segment is not None:
        unseen = [
            rank
            for rank, number in enumerate(nonces)
            if not segment.library.shm_has_nonce(
                segment.handle, rank, *struct.unpack("<qq", number)
            )
        ]
        if unseen:
            trouble = f"its memory is not the memory of ranks {unseen}"

    obstacle = (
        None if segment is None or trouble else _obstacle_to_reading(segment, control.rank, ballots)
    )
    votes = [
        json.loads(vote)
        for vote in control.allgather(json.dumps([trouble, obstacle]).encode(), deadline)
    ]
    _refuse(control, [vote[0] for vote in votes])

    obstacles = [
        f"rank {rank}: {vote[1]}" for rank, vote in enumerate(votes) if vote[1] is not None
    ]
    if segment is not None:
        segment.library.shm_allow_reading(segment.handle, not obstacles)

    if not obstacles:
        return "large messages may be read from the other processes' memory"
    _LOG.debug(
        "group %r (rank %d): large messages are staged, which may take twice as long: %s",
        control.group_name,
        control.rank,
        obstacles[0],
    )
    return f"large messages are staged, because the ranks do not read each other's memory ({obstacles[0]})"


def _obstacle_to_reading(segment: Segment, own: int, ballots: list[_Ballot]) -> str | None:
    """Return None if this rank can read the memory of all other ranks' processes.

    If it cannot, or does not want to, return why not.
    """
    if not environment.is_on(environment.READ_PEERS):
        return f"{environment.READ_PEERS}={os.environ[environment.READ_PEERS]}"
    namespace = ballots[own].pid_namespace
    pids = array.array(
        "i", [ballot.pid if ballot.pid_namespace == namespace else 0 for ballot in ballots]
    )
    if segment.library.shm_try_reading(segment.handle, pids.buffer_info()[0]):
        return None
    if 0 in pids:
        return "the processes are in different pid namespaces"
    return "process_vm_readv is not permitted (a ptrace restriction or a seccomp filter)"

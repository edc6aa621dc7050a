"""Where rank 0 says how it is reached.

Here are what every directory offers, a port that all know, and a file.

The file is complete whenever it can be seen (it is linked or renamed into place). Only its owner
can read it, because it holds the meeting's secret. It is gone after the meeting. Nobody else's file
is believed, opened through a link, replaced or removed. One that a killed rank 0 left behind is
recognised by nobody answering to it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from colltensor import net
from colltensor.errors import OptionError, remedy_for_system
from colltensor.rendezvous.protocol import Endpoint
from colltensor.rendezvous.secret import derived

_READ_LIMIT = 1 << 20
_NAME_LIMIT = 100
_FILE_NAME_LIMIT, _PATH_LIMIT = 255, 4095
"""NAME_MAX and PATH_MAX of Linux, in bytes."""
_DRAFT_S = 3600.0
_OVERFLOW_UID = 65534
_USERS = (1 << 32) - 1


class Directory:
    """A place that all ranks can reach, and where rank 0 leaves an endpoint under a key.

    Attributes:
        host_id: Names this process's host in place of ``net.host_id()``.
        secret: Where strangers can read the directory, what the user gave all ranks. The meeting's
            secret is derived from it and from the endpoint's. Empty if the user gave nothing; None
            where only the ranks can read.
        host: Where a directory is that strangers can read.
    """

    host_id: str | None = None
    secret: bytes | None = None
    host: str = ""

    def scope(self) -> str:
        """Return a string that is equal for two directories exactly if they are the same place.

        With it, a process that an earlier meeting left out is kept out of the next one of the same
        name.
        """
        return ""

    def address(self) -> str | None:
        """Return the address of this host at which all ranks reach it, where that is known.

        Rank 0 listens there.
        """
        return None

    def elsewhere(self) -> Directory | None:
        """Return a directory in which ``read`` looks as well.

        There rank 0 can say that it cannot write to this one.
        """
        return None

    def put(self, key: str, endpoint: bytes, stale: bytes) -> bytes | None:
        """Leave the endpoint, as rank 0, unless there is another one than ``stale``.

        Returns:
            None if it was left, else the other one; empty where it cannot be read.

        Raises:
            OptionError: The place cannot be written to.
        """
        raise NotImplementedError

    def read(self, key: str, deadline: float) -> bytes | None:
        """Return the endpoint as it is now, None where there is none.

        Raises:
            ConnectionError, TimeoutError: It cannot be read for now.
            OptionError: It cannot be read.
        """
        raise NotImplementedError

    def absent(self, key: str) -> str:
        """Return in words that rank 0 ("it") has left nothing, and what to see to."""
        raise NotImplementedError

    def remove(self, key: str, endpoint: bytes) -> None:
        """Remove one's own endpoint, as rank 0.

        Nothing happens where another one is there, or none.

        Raises:
            OSError: It cannot be removed.
        """
        raise NotImplementedError

    def find(self, key: str, deadline: float) -> Endpoint | None:
        """Return how rank 0 is reached, with the meeting's secret, or None; raises as ``read``."""
        return self.decoded(self.read(key, deadline) or b"")

    def decoded(self, data: bytes) -> Endpoint | None:
        """Return an endpoint that was read, with the meeting's secret.

        Returns None for what is no endpoint, or is not complete.
        """
        try:
            return self.sealed(Endpoint.decode(data))
        except net.FrameError:
            return None

    def sealed(self, endpoint: Endpoint) -> Endpoint:
        """Return an endpoint as it is left here with the secret of the meeting that it leads to."""
        secret = derived(self.secret or b"", endpoint.secret, endpoint.encode())
        return replace(endpoint, secret=secret)


@dataclass(frozen=True)
class FixedDirectory(Directory):
    """Knows beforehand where rank 0 listens, so that nothing need be left.

    Attributes:
        host: A host name or literal address of rank 0's host.
        port: The port at which rank 0 listens.
        secret: What all ranks know; may be empty.
    """

    host: str = field()
    port: int = field()
    secret: bytes = field(default=b"", repr=False)

    @property
    def endpoint(self) -> Endpoint:
        """How rank 0 is reached."""
        return Endpoint("", (self.host,), self.port, self.secret)

    def scope(self) -> str:
        """Say which place this is."""
        return f"tcp://{self.host}:{self.port}"

    def put(self, key: str, endpoint: bytes, stale: bytes) -> bytes | None:
        """Do nothing: all ranks know the port."""
        return None

    def find(self, key: str, deadline: float) -> Endpoint:
        """Return at once how rank 0 is reached, whether it is there or not."""
        return self.endpoint

    def remove(self, key: str, endpoint: bytes) -> None:
        """Do nothing: nothing was left."""


class FileDirectory(Directory):
    """Leaves endpoints in a file, or in a folder as one file for each group.

    Attributes:
        path: The file or the folder. The group ``"default"`` uses a file as it is. Other groups
            append their name, so that several may meet at once.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def scope(self) -> str:
        """Say which place this is."""
        return f"file://{os.path.abspath(self.path)}"

    def elsewhere(self) -> FileDirectory | None:
        """Return this host's folder of temporary files.

        There ranks of one host hear why rank 0 cannot write its file. Those of other hosts have
        nothing in common with it but the folder, and wait.
        """
        tag = hashlib.sha256(os.fsencode(self.scope())).hexdigest()[:16]
        with contextlib.suppress(FileNotFoundError):  # a host may have no such folder
            return FileDirectory(
                os.path.join(tempfile.gettempdir(), f"colltensor-{os.geteuid()}-{tag}")
            )
        return None

    def put(self, key: str, endpoint: bytes, stale: bytes) -> bytes | None:
        """Write the file: see Directory."""
        target = self._file(key)
        draft = f".{target.name[:_NAME_LIMIT]}.{_host_tag()}.{os.getpid()}.{secrets.token_hex(8)}"
        try:
            with _folder_of(target) as folder:
                _remove_drafts(target, folder)
                try:
                    _write(draft, folder, endpoint)
                    return _install(draft, target, folder, stale)
                finally:
                    _remove(draft, folder)
        except OSError as error:
            raise OptionError(
                f"init_method: rank 0 cannot write {target}: {_why(error)}"
            ) from error

    def read(self, key: str, deadline: float) -> bytes | None:
        """Read the file: see Directory."""
        data = _found(self._file(key))
        elsewhere = self.elsewhere() if data is None else None
        if elsewhere is not None:
            # what others leave among temporary files is no concern of ours
            with contextlib.suppress(OptionError):
                data = _found(elsewhere._file(key))
        return data

    def absent(self, key: str) -> str:
        """Say which file there is not: see Directory."""
        target = self._file(key)
        return (
            f"it has not written {target}; see that all ranks reach the same file and that rank 0 can write it"
            f"{_doubt(target)}"
        )

    def remove(self, key: str, endpoint: bytes) -> None:
        """Remove the file: see Directory."""
        with contextlib.suppress(OptionError):  # what stands there now is not ours
            target = self._file(key)
            with _folder_of(target) as folder:
                if _read(target, folder) == endpoint:
                    _remove(target.name, folder)

    def _file(self, key: str) -> Path:
        target = self._path_of(key)
        if (
            len(os.fsencode(target.name)) > _FILE_NAME_LIMIT
            or len(os.fsencode(target)) > _PATH_LIMIT
        ):
            raise OptionError(
                f"init_method: the file name is too long, {target!s:.60}...: expected a name of at most "
                f"{_FILE_NAME_LIMIT} bytes, with the group's name after it, in a path of {_PATH_LIMIT}; choose another"
            )
        return target

    def _path_of(self, key: str) -> Path:
        path = Path(self.path)
        name = urllib.parse.quote(key, safe="")
        if len(name) > _NAME_LIMIT:
            name = hashlib.sha256(key.encode()).hexdigest()
        if os.path.isdir(path):  # False for a name that is too long, on every Python
            return path / f"colltensor-{name}"
        if not os.path.isdir(path.parent):
            raise OptionError(
                f"init_method: the folder {path.parent} does not exist on this host; {_REMEDY}"
            )
        return path if key == "default" else path.with_name(f"{path.name}.{name}")


_REMEDY = "name a file or a folder that every rank can reach and write to, as in init_method='file:///shared/meeting'"


def _why(error: OSError) -> str:
    """Return in words what the system said, and what to do about it."""
    of_process = error.errno in (errno.EMFILE, errno.ENFILE)
    return f"{error.strerror}; {remedy_for_system(error, _REMEDY) if of_process else _REMEDY}"


def _doubt(target: Path) -> str:
    """Return what this rank knows of whether rank 0 can write a file.

    On another host it cannot hear of it.
    """
    if os.access(target.parent, os.W_OK | os.X_OK):
        return ""
    return f" (this rank may not write to {target.parent}; a rank 0 that may not either raises the reason on its host)"


_OWN = "name a file in a folder of your own"


@contextlib.contextmanager
def _folder_of(target: Path) -> Iterator[int]:
    """Open the folder of a file.

    What is done there goes by the descriptor, so that nobody puts another folder in its place.
    Others may be allowed to write there: every file is asked for its owner.

    Raises:
        OptionError: It is another user's.
    """
    folder = os.open(target.parent, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
    try:
        status = os.fstat(folder)
        owner = status.st_uid
        # In a user namespace without root, as a rootless container's, /tmp belongs to a user whom
        # it does not know.
        shared = status.st_mode & stat.S_ISVTX and owner == _OVERFLOW_UID and not _knows_all_users()
        if not _is_trusted(owner) and not shared:
            raise OptionError(
                f"init_method: the folder {target.parent} belongs to {_user(owner)}, who decides what is in it; {_OWN}"
            )

        yield folder
    finally:
        os.close(folder)


def _knows_all_users() -> bool:
    """Return whether every user has a number here, user_namespaces(7)."""
    try:
        words = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
    except OSError:
        return True
    return sum(map(int, words[2::3])) >= _USERS


def _is_trusted(user: int) -> bool:
    return user in (os.geteuid(), 0)


def _user(number: int) -> str:
    with contextlib.suppress(ImportError, KeyError):
        import pwd  # not on every system

        return f"user {pwd.getpwuid(number).pw_name} ({number})"
    return f"user {number}"


def _write(draft: str, folder: int, endpoint: bytes) -> None:
    descriptor = os.open(
        draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder
    )
    with os.fdopen(descriptor, "wb") as file:
        file.write(endpoint)
        file.flush()
        os.fsync(file.fileno())


def _install(draft: str, target: Path, folder: int, stale: bytes) -> bytes | None:
    """Put the draft in its place, unless something other than ``stale`` is there.

    Nor does it take the place of something that is no file of ours.

    Returns:
        What is there.
    """
    try:
        os.link(draft, target.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        return None
    except OSError:  # It exists. Or there are no hard links here: two rank 0 that start at once are not told apart.
        found = _read(target, folder)
    if found is not None and found != stale:
        return found
    os.replace(draft, target.name, src_dir_fd=folder, dst_dir_fd=folder)
    return None


def _remove(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _status(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _host_tag() -> str:
    return hashlib.sha256(net.host_id().encode()).hexdigest()[:12]


def _remove_drafts(target: Path, folder: int) -> None:
    """Remove what a rank 0 that was killed while it wrote left beside the target.

    See FileDirectory.put. A draft is there for seconds at most. So one is removed if its process is
    one of this host and gone, or if it is old.
    """
    pattern = re.compile(
        rf"\.{re.escape(target.name[:_NAME_LIMIT])}\.([0-9a-f]{{12}})\.([0-9]{{1,9}})\.[0-9a-f]{{16}}"
    )

    names: list[str] = []
    with contextlib.suppress(PermissionError):  # a folder may be one that is written and not listed
        names = os.listdir(target.parent)

    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue

        with contextlib.suppress(OSError):  # another rank 0 removes it too, or it is another user's
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            is_gone = match[1] == _host_tag() and not _runs(int(match[2]))
            is_old = time.time() - status.st_mtime > _DRAFT_S
            if (
                stat.S_ISREG(status.st_mode)
                and status.st_uid == os.geteuid()
                and (is_gone or is_old)
            ):
                _remove(name, folder)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _found(target: Path) -> bytes | None:
    """Return what the file holds, or None where there is no file; raises as ``_read``."""
    try:
        with _folder_of(target) as folder:
            return _read(target, folder)
    except OSError as error:
        raise OptionError(f"init_method: cannot read {target}: {_why(error)}") from error


def _read(target: Path, folder: int) -> bytes | None:
    """Return what the file holds, or None where there is no file. Only a file of ours is opened.

    Raises:
        OptionError: It is no file, or not for us to trust or to replace.
        OSError: It cannot be read.
    """
    status = _status(target.name, folder)
    if status is None:
        return None

    # opening a device or a named pipe may do something, or never end
    if not stat.S_ISREG(status.st_mode):
        raise _no_endpoint(target)

    try:
        descriptor = os.open(
            target.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=folder
        )
    except FileNotFoundError:
        return None

    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        data = file.read(_READ_LIMIT) if stat.S_ISREG(status.st_mode) else b"?"

    if not Endpoint.may_be(data):
        raise _no_endpoint(target)
    if not _is_trusted(status.st_uid):
        raise OptionError(f"init_method: {target} was written by {_user(status.st_uid)}; {_OWN}")
    return data


def _no_endpoint(target: Path) -> OptionError:
    return OptionError(
        f"init_method: {target} exists and is no rendezvous file; name another, or remove it"
    )

"""A file that all ranks can reach, in which rank 0 leaves its invitation.

The file is complete whenever it can be seen (it is linked or renamed into place), only its owner can read it,
because it holds the meeting's secret, and it is gone after the meeting. One that a killed rank 0 left behind is
recognised by nobody answering to it. Imports errors and the meeting's own modules only, and no framework.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import time
import urllib.parse
from pathlib import Path

from colltensor import net
from colltensor.errors import CollectiveTimeoutError, OptionError, remedy_for_system
from colltensor.net import FrameError
from colltensor.rendezvous.joining import another_rank_0_lives, who_am_i
from colltensor.rendezvous.messages import Invitation, taken

_READ_LIMIT = 1 << 20
_NAME_LIMIT = 100
_FILE_NAME_LIMIT, _PATH_LIMIT = 255, 4095
"""NAME_MAX and PATH_MAX of Linux, in bytes."""
_DRAFT_S = 3600.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.005, 0.1


class FileDirectory:
    """Leaves invitations in a file, or in a folder as one file for each group.

    Attributes:
        path: The file or the folder. The group ``"default"`` uses a file as it is; other groups append their
            name, so that several may meet at once.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._published: dict[str, bytes] = {}

    @property
    def scope(self) -> str:
        """Say which place this is."""
        return f"file://{os.path.abspath(self.path)}"

    def publish(self, key: str, invitation: bytes) -> None:
        """Write the file: see Directory."""
        target = self._file(key)
        draft = target.with_name(f".{target.name[:_NAME_LIMIT]}.{_host_tag()}.{os.getpid()}.{secrets.token_hex(8)}")
        try:
            _remove_drafts(target)
            try:
                self._write(draft, invitation)
                self._install(draft, target, key)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            message = f"init_method: rank 0 cannot write {target}: {error.strerror}; {_remedy(error)}"
            raise OptionError(message) from error
        self._published[key] = invitation

    def locate(self, key: str, deadline: float) -> bytes:
        """Read the file once it is there: see Directory."""
        target = self._file(key)
        pause = _FIRST_PAUSE_S
        while True:
            data = _read(target)
            if data is not None and _is_complete(data):
                return data
            if time.monotonic() + pause >= deadline:
                raise CollectiveTimeoutError(
                    f"expected rank 0 to write {target} within the timeout, but it did not; start rank 0, with the "
                    f"same group_name, and see that all ranks reach the same file",
                    (0,),
                )
            time.sleep(pause)
            pause = min(pause * 1.5, _LAST_PAUSE_S)

    def withdraw(self, key: str) -> None:
        """Remove the file if it is still the one that was published here."""
        mine = self._published.pop(key, None)
        target = self._file(key)
        if mine is not None and _read(target) == mine:
            target.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        target = self._path_of(key)
        if len(os.fsencode(target.name)) > _FILE_NAME_LIMIT or len(os.fsencode(target)) > _PATH_LIMIT:
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
            raise OptionError(f"init_method: the folder {path.parent} does not exist on this host; {_REMEDY}")
        return path if key == "default" else path.with_name(f"{path.name}.{name}")

    def _write(self, draft: Path, invitation: bytes) -> None:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(invitation)
            file.flush()
            os.fsync(file.fileno())

    def _install(self, draft: Path, target: Path, key: str) -> None:
        """Put the draft in its place, unless a living rank 0 is there already."""
        try:
            os.link(draft, target)
            return
        except FileExistsError:
            pass
        except OSError:
            # No hard links on this file system: two rank 0 that start at once are not told apart here.
            if not target.exists():
                os.replace(draft, target)
                return
        data = _read(target)
        if data and another_rank_0_lives(data, key):
            raise taken(0, [who_am_i(), f"another process that wrote {target}"])
        os.replace(draft, target)


def _remedy(error: OSError) -> str:
    return remedy_for_system(error, _REMEDY) if error.errno in (errno.EMFILE, errno.ENFILE) else _REMEDY


_REMEDY = "name a file or a folder that every rank can reach and write to, as in init_method='file:///shared/meeting'"


def _host_tag() -> str:
    return hashlib.sha256(net.host_id().encode()).hexdigest()[:12]


def _remove_drafts(target: Path) -> None:
    """Remove what a rank 0 that was killed while it wrote left beside the target: see FileDirectory.publish.

    A draft is there for seconds at most: one of a process of this host that is gone, or an old one.
    """
    pattern = re.compile(rf"\.{re.escape(target.name[:_NAME_LIMIT])}\.([0-9a-f]{{12}})\.([0-9]{{1,9}})\.[0-9a-f]{{16}}")
    names: list[str] = []
    with contextlib.suppress(PermissionError):  # a folder may be one that is written and not listed
        names = os.listdir(target.parent)
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        draft = target.with_name(name)
        with contextlib.suppress(OSError):  # another rank 0 removes it too, or it is another user's
            status = draft.lstat()
            is_gone = match[1] == _host_tag() and not _runs(int(match[2]))
            is_old = time.time() - status.st_mtime > _DRAFT_S
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and (is_gone or is_old):
                draft.unlink()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read(target: Path) -> bytes | None:
    """Return what the file holds, or None where there is no file.

    Raises:
        OptionError: It cannot be read, or is not for us to trust or to replace.
    """
    try:
        # A named pipe would block whoever opens it, and never end.
        with open(target, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            is_file = stat.S_ISREG(status.st_mode)
            data = file.read(_READ_LIMIT) if is_file else b""
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OptionError(f"init_method: cannot read {target}: {error.strerror}; {_remedy(error)}") from error
    if not is_file or not Invitation.may_be(data):
        raise OptionError(f"init_method: {target} exists and is no rendezvous file; name another, or remove it")
    with contextlib.suppress(OSError):
        if status.st_uid != os.geteuid() and target.parent.stat().st_mode & stat.S_IWOTH:
            raise OptionError(
                f"init_method: {target} was written by user {status.st_uid} in a folder where everybody may write; "
                f"name a file in a folder of your own"
            )
    return data


def _is_complete(data: bytes) -> bool:
    try:
        Invitation.decode(data)
    except FrameError:
        return False
    return True

"""What ``init_method`` may say, and the directory that each spelling means.

Imports errors and the meeting's own modules only. Ray's and torch's directories belong to the
packages of these frameworks and are imported by name when they are needed.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from typing import cast

from colltensor.errors import OptionError
from colltensor.rendezvous.protocol import checked_rank
from colltensor.rendezvous.secret import given_secret
from colltensor.rendezvous.stores import Directory, FileDirectory, FixedDirectory

_SPELLINGS = "'env://', 'tcp://host:port' or 'file:///path'"


def open_directory(
    init_method: str | None,
    rank: int | None,
    world_size: int | None,
    *,
    secret: bytes | None = None,
) -> tuple[Directory, int, int]:
    """Return the directory that ``init_method`` names, and this process's rank and the world size.

    Args:
        init_method: ``"env://"`` reads MASTER_ADDR and MASTER_PORT, as torchrun sets them.
            ``"tcp://host:port"`` is where rank 0 listens. ``"file:///path"`` is a file or folder
            that all ranks can reach, in a folder of this user's or root's. None is Ray inside a Ray
            worker and ``"env://"`` elsewhere.

            With ``env://`` and ``tcp://`` anybody who reaches rank 0's port can take a rank's
            place, unless all ranks hold a secret. The variable COLLTENSOR_SECRET gives it, or the
            file that COLLTENSOR_SECRET_FILE names. Rank 0 warns where ranks without one meet on
            more than the loopback.

            A rank with another secret hears so at once. The other ranks do too if it is of their
            user and on rank 0's host. Otherwise they hear so with the timeout, since a stranger may
            not end a meeting.

            Where rank 0 cannot write its file the ranks of its host hear so at once. Those of other
            hosts, which share nothing else with it, wait until the timeout.
        rank: This process's rank; None reads RANK, with ``env://`` only.
        world_size: How many ranks there are; None reads WORLD_SIZE, with ``env://`` only.
        secret: In place of the one that the environment gives.

    Raises:
        OptionError: The method is misspelt, the secret cannot be read, or a variable of the
            environment is missing or contradicts an argument.
        RankError: The rank is outside ``range(world_size)``.
    """
    if init_method is not None and not isinstance(init_method, str):
        raise OptionError(f"init_method must be {_SPELLINGS}, got {init_method!r}")

    from_environment = init_method == "env://" or (init_method is None and not _inside_ray())
    if from_environment:
        rank, world_size = _environment_ranks(rank, world_size)
    elif rank is None or world_size is None:
        name = "rank" if rank is None else "world_size"
        raise OptionError(
            f"{name} must be given with init_method={init_method!r}; only 'env://' reads it by itself"
        )

    rank, world_size = checked_rank(rank, world_size)

    if from_environment:
        return _environment_directory(world_size, secret), rank, world_size
    if init_method is None:
        return _imported("colltensor.ray.rendezvous", "RayDirectory"), rank, world_size
    return _spelt_directory(init_method, secret), rank, world_size


def _spelt_directory(init_method: str, secret: bytes | None) -> Directory:
    if init_method.startswith("file://"):
        path = init_method[len("file://") :]
        if not path.startswith("/") or not path.strip("/") or "\0" in path:
            raise OptionError(
                f"init_method: a file needs an absolute path after 'file://', as in 'file:///tmp/meeting' "
                f"(three slashes), got {init_method!r}"
            )
        return FileDirectory(path)
    if init_method.startswith("tcp://"):
        match = re.fullmatch(
            r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/?#@\[\]]+):([0-9]{1,5})/?", init_method[len("tcp://") :]
        )
        if match is None:
            raise OptionError(
                f"init_method: expected 'tcp://host:port', got {init_method!r}; rank and world_size are arguments"
            )
        return _fixed(match[1].strip("[]"), match[2], "init_method", secret)
    raise OptionError(f"init_method must be {_SPELLINGS}, got {init_method!r}{_meant(init_method)}")


def _meant(init_method: str) -> str:
    """Return a question about an ``init_method`` that is like one of the spellings, else ""."""
    scheme, colon, rest = init_method.partition(":")
    if init_method.startswith("/"):
        meant = f"file://{init_method}"
    elif colon and rest.isdecimal():
        meant = f"tcp://{init_method}"
    else:
        found = difflib.get_close_matches(scheme, ("env", "tcp", "file"), 1)
        rest = rest.lstrip("/")
        meant = f"{found[0]}://{'/' if found[0] == 'file' else ''}{rest}" if found else ""
    return f" (did you mean {meant!r}?)" if meant else ""


def _fixed(host: str, port: str, origin: str, secret: bytes | None) -> FixedDirectory:
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise OptionError(f"{origin}: the port must be a number from 1 to 65535, got {port!r}")
    return FixedDirectory(host, int(port), given_secret() if secret is None else secret)


def _environment_directory(world_size: int, secret: bytes | None) -> Directory:
    if world_size == 1 and not os.environ.get("MASTER_ADDR"):
        return FixedDirectory("127.0.0.1", 0)
    host, port = _variable("MASTER_ADDR"), _variable("MASTER_PORT")
    directory = _fixed(host, port, f"init_method='env://', variable MASTER_PORT={port!r}", secret)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's agent serves a store of torch's at that port: rank 0 cannot listen there.
        known = (directory.host, directory.port, directory.secret)
        return _imported("colltensor.torch.rendezvous", "StoreDirectory", *known)
    return directory


def _environment_ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size, from the environment where they are not given.

    Both may be given, for a group of some of the processes. One alone must be what the environment
    says.
    """
    size_said = (
        _number("WORLD_SIZE") if world_size is None else _number("WORLD_SIZE", required=False)
    )
    rank_said = _number("RANK") if rank is None else _number("RANK", required=False)

    is_alone = rank is None or world_size is None
    for name, given, said in (("rank", rank, rank_said), ("world_size", world_size, size_said)):
        if is_alone and given is not None and said is not None and given != said:
            raise OptionError(
                f"{name}={given!r} contradicts the environment's {name.upper()}={said}; leave it out, or give rank and "
                f"world_size both, for a group of some of the processes"
            )

    if isinstance(world_size, int) and size_said is not None and world_size > size_said:
        raise OptionError(
            f"world_size={world_size} contradicts the environment's WORLD_SIZE={size_said}: there are not so many "
            f"processes; with init_method='file:///...' or 'tcp://...' the environment is not read"
        )

    number = rank if rank is not None else rank_said
    size = world_size if world_size is not None else size_said
    return cast("int", number), cast("int", size)


def _number(variable: str, *, required: bool = True) -> int | None:
    if not required and not os.environ.get(variable):
        return None
    text = _variable(variable)
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise OptionError(
            f"init_method='env://': the variable {variable} must be a number, got {text!r}"
        )
    return int(text)


def _variable(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise OptionError(
            f"init_method='env://' (also meant by None outside a Ray worker): the environment variable {name} is not "
            f"set; start the processes with torchrun, set it, or pass init_method='file:///path' or 'tcp://host:port'"
        )
    return value


def _inside_ray() -> bool:
    ray = sys.modules.get("ray")
    is_initialized = getattr(ray, "is_initialized", None)
    return is_initialized is not None and bool(is_initialized())


def _imported(module: str, name: str, *arguments: object) -> Directory:
    return cast("Directory", getattr(importlib.import_module(module), name)(*arguments))

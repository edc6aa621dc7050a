"""Gloo: collectives of host memory between any number of hosts.

Chooses one provider for all ranks.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, cast

from colltensor.backends.base import ControlPlane
from colltensor.backends.gloo import library
from colltensor.errors import BackendUnavailableError, GroupError, MismatchError, OptionError
from colltensor.net import interface_address

if TYPE_CHECKING:
    from colltensor.backends.gloo.backend import GlooBackend
    from colltensor.backends.gloo.provider import Provider

_PROVIDERS: Final = {
    "native": ("colltensor.backends.gloo.native_provider", "NativeProvider"),
    "torch": ("colltensor.backends.gloo.torch_provider", "TorchProvider"),
    "pygloo": ("colltensor.backends.gloo.pygloo_provider", "PyglooProvider"),
    "ibverbs": ("colltensor.backends.gloo.native_provider", "IbverbsProvider"),
}
_CHOICE: Final = ("native", "torch", "pygloo")
"""Providers in the order of preference: the first that every rank has is used.

Others only serve who asks.
"""

_INSTALL: Final = "pip install torch (or, on CPython 3.10, pip install pygloo==0.2.1)"

_LOG = logging.getLogger(__name__)


class GlooSpec:
    """The table entry of ``GlooBackend``.

    Attributes:
        providers: What ``provider`` may be, installed or not.
    """

    providers = tuple(_PROVIDERS)

    def available(self) -> str | None:
        """Return None if a provider is installed, else what to install."""
        why = library.reason()
        if why is None or _packages():
            return None
        return f"no Gloo: {why}; nor is torch or pygloo installed: {_INSTALL}"

    def prepare(self, provider: str | None, host_ids: Sequence[str]) -> None:
        """Import the provider that was asked for, or else the first that this rank has.

        torch takes seconds to import.
        """
        from colltensor.backends.gloo import backend  # noqa: F401 - for create()

        usable = usable_providers()[0]
        name = provider or next((choice for choice in _CHOICE if choice in usable), None)
        if name in _PROVIDERS:
            importlib.import_module(_PROVIDERS[name][0])

    def create(
        self,
        control: Any,
        meeting: Any,
        *,
        timeout_s: float,
        interface: str | None,
        provider: str | None,
    ) -> GlooBackend:
        """Agree on a provider and connect it. All ranks call.

        Args:
            control: The group's ControlPlane.
            meeting: The group's Meeting; the default is to use the address the others know of this
                rank.
            timeout_s: How long connecting may take.
            interface: The interface to use, by name or address; each rank may have its own.
            provider: ``"native"``, ``"torch"`` or ``"pygloo"``, None for the first that all ranks
                have; ``"ibverbs"`` is the native one over the host's first ibverbs device.

        Raises:
            BackendUnavailableError: A rank lacks the provider.
            OptionError: There is no such provider or interface.
            MismatchError: The ranks asked for different providers, or have versions that may not
                meet.
        """
        if control is None:
            raise GroupError(
                "backend 'gloo' needs a control plane; use backend='loopback' for one rank on its own"
            )

        address = (
            meeting.addresses[control.rank][0]
            if interface is None
            else interface_address(interface)
        )

        deadline = time.monotonic() + timeout_s
        name, reason = _agree(control, provider, deadline)
        from colltensor.backends.gloo.backend import GlooBackend

        # All import it now if some rank lacks the one that the others were prepared for.
        began = time.monotonic()
        make = _imported(name, control)
        deadline += time.monotonic() - began

        details = f"Gloo's provider is {name!r}: {reason}"
        backend = GlooBackend(
            make(control, meeting, address=address, timeout_s=timeout_s), control, details
        )

        # A rank that closes while another still connects to it would end that one's process. In
        # pygloo 0.2.1 getpeername fails in Gloo's own thread, where nothing can catch it.
        try:
            control.allgather(b"", deadline)
        except BaseException:
            backend.close()
            raise
        return backend


SPEC: Final = GlooSpec()


def _packages() -> dict[str, str]:
    """Return the providers that are packages, with their versions, without importing them."""
    found = {}
    for name in ("torch", "pygloo"):
        if name in sys.modules or find_spec(name) is not None:
            found[name] = _version(name)
    return found


@functools.cache
def _version(name: str) -> str:
    """Return a package's version.

    It is kept, because it takes milliseconds to read and every group asks.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def usable_providers() -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions of the providers usable here, and why the native ones are not."""
    found, lacking = _packages(), {}
    try:
        found["native"] = library.version()
    except BackendUnavailableError as error:
        lacking = dict.fromkeys(
            ("native", "ibverbs"), str(error).removeprefix("backend 'gloo', provider 'native': ")
        )
    else:
        if library.load().gloo_ibverbs_names():
            found["ibverbs"] = found["native"]
        else:
            lacking["ibverbs"] = (
                "this host has no ibverbs device (there is none in /sys/class/infiniband)"
            )
    return found, lacking


def _agree(control: ControlPlane, wanted: str | None, deadline: float) -> tuple[str, str]:
    """Return the provider that all ranks use, and why.

    All ranks have it, in versions that understand each other. Ranks of two providers cannot meet:
    they hold different versions of Gloo, and publish different keys.
    """
    ballot = json.dumps([wanted if wanted is None else str(wanted), *usable_providers()]).encode()
    replies = control.allgather(ballot, deadline)
    ballots = [
        cast("tuple[str | None, dict[str, str], dict[str, str]]", json.loads(reply))
        for reply in replies
    ]

    # Every rank sees all wishes, so that all raise the same error.
    where = f"group '{control.group_name}' (rank {control.rank}), backend 'gloo'"
    wishes = [wish for wish, _, _ in ballots]
    for rank, wish in enumerate(wishes):
        if wish is not None and wish not in _PROVIDERS:
            raise OptionError(
                f"{where}: provider (rank {rank}): expected one of {', '.join(_PROVIDERS)} or None, got {wish!r}"
            )
    asked = {wish for wish in wishes if wish is not None}
    if len(asked) > 1:
        raise MismatchError(
            f"{where}: the ranks ask for different providers: {_by_rank(wishes)}; give all the same",
            [rank for rank, wish in enumerate(wishes) if wish != wishes[0]],
        )

    candidates = sorted(asked) or list(_CHOICE)
    lacks = {name: _lacking(name, [(has, why) for _, has, why in ballots]) for name in candidates}
    name = next((name for name in candidates if lacks[name] is None), None)
    if name is None:
        raise BackendUnavailableError(
            f"{where}: no provider is installed on all ranks: {'; '.join(map(str, lacks.values()))}; {_INSTALL} on all"
        )

    passed = [str(lacks[other]) for other in candidates[: candidates.index(name)]]
    reason = (
        "asked for by provider=" if asked else "; ".join(["the first that all ranks have", *passed])
    )
    _LOG.debug(
        "group %r (rank %d): Gloo's provider is %r: %s",
        control.group_name,
        control.rank,
        name,
        reason,
    )

    # Another series of a package may carry another Gloo.
    versions = [has[name] for _, has, _ in ballots]
    series = [".".join(text.split(".")[:2]) for text in versions]
    if len(set(series)) > 1:
        raise MismatchError(
            f"{where}: the ranks have different versions of {name}, whose Gloo may differ: {_by_rank(versions)}; "
            "install one version on all",
            [rank for rank, number in enumerate(series) if number != series[0]],
        )

    return name, reason


def _lacking(name: str, ballots: Sequence[tuple[dict[str, str], dict[str, str]]]) -> str | None:
    """Return None if all ranks can use a provider, else which cannot.

    Return why, too, where that is known.
    """
    ranks = [rank for rank, (has, _) in enumerate(ballots) if name not in has]
    if not ranks:
        return None
    why = ballots[ranks[0]][1].get(name)
    return f"{name} is missing on ranks {', '.join(map(str, ranks))}" + (f" ({why})" if why else "")


def _by_rank(values: Sequence[str | None]) -> str:
    return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))


def _imported(name: str, control: ControlPlane) -> Callable[..., Provider]:
    """Import what connects a provider."""
    module, attribute = _PROVIDERS[name]
    try:
        make: Callable[..., Provider] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailableError(
            f"group '{control.group_name}' (rank {control.rank}), backend 'gloo': provider {name!r} is installed but "
            f"cannot be used: {error}; repair it or choose another with provider="
        ) from error
    return make

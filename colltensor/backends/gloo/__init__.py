"""Gloo: collectives of host memory between any number of hosts.

Chooses one provider for all ranks. Imports neither torch nor pygloo nor numpy until a group is made.
"""

from __future__ import annotations

import functools
import importlib
import json
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, cast

from colltensor.backends.base import ControlPlane
from colltensor.errors import BackendUnavailableError, GroupError, MismatchError, OptionError
from colltensor.net import interface_address

if TYPE_CHECKING:
    from colltensor.backends.gloo.backend import GlooBackend
    from colltensor.backends.gloo.provider import Provider

_PROVIDERS: Final = {
    "pygloo": ("colltensor.backends.gloo.pygloo_provider", "PyglooProvider"),
    "torch": ("colltensor.backends.gloo.torch_provider", "TorchProvider"),
}
"""Providers in the order of preference: the first that every rank has is used."""

_INSTALL: Final = "pip install 'colltensor[torch]' (or, on CPython 3.10, pip install pygloo==0.2.1)"


class GlooSpec:
    """The table entry of ``GlooBackend``.

    Attributes:
        providers: What ``provider`` may be, installed or not.
    """

    providers = tuple(_PROVIDERS)

    def available(self) -> str | None:
        """Return None if a provider is installed, else what to install."""
        return None if _installed() else f"Gloo needs torch or pygloo, and neither is installed: {_INSTALL}"

    def create(
        self, control: Any, meeting: Any, *, timeout_s: float, interface: str | None, provider: str | None
    ) -> GlooBackend:
        """Agree on a provider and connect it. All ranks call.

        Args:
            control: The group's ControlPlane.
            meeting: The group's Placement; the default is to use the address the others know of this rank.
            timeout_s: How long connecting may take.
            interface: The interface to use, by name or address; each rank may have its own.
            provider: ``"torch"``, ``"pygloo"``, or None for the first that all ranks have.

        Raises:
            BackendUnavailableError: A rank lacks the provider.
            OptionError: There is no such provider or interface.
            MismatchError: The ranks asked for different providers, or have versions that may not meet.
        """
        if control is None:
            raise GroupError("backend 'gloo' needs a control plane; use backend='loopback' for one rank on its own")
        address = meeting.addresses[control.rank][0] if interface is None else interface_address(interface)
        deadline = time.monotonic() + timeout_s
        name = _agree(control, provider, deadline)
        from colltensor.backends.gloo.backend import GlooBackend

        backend = GlooBackend(_connect(name, control, address, timeout_s), control)
        # A rank that closes while another still connects to it would end that one's process (pygloo 0.2.1: getpeername
        # fails in Gloo's own thread, where nothing can catch it).
        try:
            control.allgather(b"", deadline)
        except BaseException:
            backend.close()
            raise
        return backend


SPEC: Final = GlooSpec()


def _installed() -> dict[str, str]:
    """Return the installed providers and their versions, without importing them."""
    found = {}
    for name in _PROVIDERS:
        if find_spec(name) is not None:
            found[name] = _version(name)
    return found


@functools.cache
def _version(name: str) -> str:
    """Return a package's version; kept, because it takes milliseconds to read and every group asks."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _agree(control: ControlPlane, wanted: str | None, deadline: float) -> str:
    """Return the provider that all ranks use: one that all have, in versions that understand each other.

    Ranks of two providers cannot meet: pygloo 0.2.1 and torch hold different versions of Gloo,
    which publish different keys.
    """
    ballot = json.dumps([wanted if wanted is None else str(wanted), _installed()]).encode()
    replies = control.allgather(ballot, deadline)
    ballots = [cast("tuple[str | None, dict[str, str]]", json.loads(reply)) for reply in replies]
    where = f"group '{control.group_name}' (rank {control.rank}), backend 'gloo'"
    wishes = [wish for wish, _ in ballots]
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
    candidates = sorted(asked) or list(_PROVIDERS)
    lacking = {name: [rank for rank, (_, has) in enumerate(ballots) if name not in has] for name in candidates}
    usable = [name for name in candidates if not lacking[name]]
    if not usable:
        lacks = "; ".join(f"{name} is missing on ranks {', '.join(map(str, lacking[name]))}" for name in candidates)
        raise BackendUnavailableError(f"{where}: no provider is installed on all ranks: {lacks}; {_INSTALL} on all")
    name = usable[0]
    versions = [has[name] for _, has in ballots]
    series = [".".join(text.split(".")[:2]) for text in versions]
    if len(set(series)) > 1:
        raise MismatchError(
            f"{where}: the ranks have different versions of {name}, whose Gloo may differ: {_by_rank(versions)}; "
            "install one version on all",
            [rank for rank, number in enumerate(series) if number != series[0]],
        )
    return name


def _by_rank(values: Sequence[str | None]) -> str:
    return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))


def _connect(name: str, control: ControlPlane, address: str, timeout_s: float) -> Provider:
    """Import the provider and connect it."""
    module, attribute = _PROVIDERS[name]
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailableError(
            f"group '{control.group_name}' (rank {control.rank}), backend 'gloo': provider {name!r} is installed but "
            f"cannot be used: {error}; repair it or choose another with provider="
        ) from error
    provider: Provider = make(control, address=address, timeout_s=timeout_s)
    return provider

"""Errors that arrive from actors: they are ColTensor's own classes, however far they came."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import ray
from crew import Crew

import colltensor as col
from colltensor import errors

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.CollectiveError)
]
WITH_RANKS = (col.MismatchError, col.PeerLostError, col.CollectiveTimeoutError)


def raise_error(rank: int, kind: type[col.CollectiveError]) -> None:
    raise (kind("went-wrong", (2, 5)) if issubclass(kind, WITH_RANKS) else kind("went-wrong"))


def pass_on(rank: int, actor: Any, kind: type[col.CollectiveError]) -> None:
    ray.get(actor.run.remote(raise_error, 1, kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_of_an_actor_is_of_its_own_class_on_the_driver(
    crew: Crew, kind: type[col.CollectiveError]
) -> None:
    for call in (
        crew.actors[0].run.remote(raise_error, 0, kind),
        crew.actors[0].run.remote(pass_on, 0, crew.actors[1], kind),
    ):
        with pytest.raises(kind, match="went-wrong") as caught:
            ray.get(call, timeout=60)
        for base in kind.__mro__[1:-1]:
            assert isinstance(caught.value, base)
        if issubclass(kind, WITH_RANKS):
            assert caught.value.ranks == (2, 5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_can_be_pickled(kind: type[col.CollectiveError]) -> None:
    with pytest.raises(kind) as caught:
        raise_error(0, kind)
    error = pickle.loads(pickle.dumps(caught.value))
    assert type(error) is kind
    assert str(error) == "went-wrong"
    assert getattr(error, "ranks", ()) == getattr(caught.value, "ranks", ())

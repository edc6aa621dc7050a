"""ActorCall: the driver's questions to a group's actors; deadlines, errors that name actors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from colltensor.errors import CollectiveError, CollectiveTimeoutError, GroupError, PeerLostError

_VERDICT_S: Final = 1.0
"""How long the driver waits for the others once one has failed.

The first to speak is seldom the cause.
"""
_PAUSE_S: Final = 0.1
"""How soon an actor that is being restarted is asked again."""


class ActorCall:
    """Asks all actors of a group one question after another, until a deadline.

    Attributes:
        deadline: A value of ``time.monotonic()``.
    """

    def __init__(
        self,
        operation: str,
        actors: Sequence[ActorHandle[Any]],
        deadline: float,
        called: str = "rank",
    ) -> None:
        """Ask nothing yet.

        Args:
            operation: What errors begin with.
            actors: In rank order.
            deadline: When the last answer must be there.
            called: What errors call the place of an actor in ``actors``.
        """
        self._operation = operation
        self._actors = actors
        self._called = called
        self.deadline = deadline
        self._timeout_s = deadline - time.monotonic()

    def ask(
        self,
        question: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        *,
        dead_are_done: bool = False,
        again: bool = False,
    ) -> list[Any]:
        """Return every actor's answer, in the actors' order.

        Args:
            question: A function that gets the actor and its arguments.
            arguments: For each actor.
            dead_are_done: An actor that is dead, or was restarted meanwhile, answers None.
            again: An actor that is being restarted is asked again until it answers; it may get the
                question twice.

        Raises:
            CollectiveError: The cause, if one failed; else who is late.
        """
        waiting: dict[Any, int] = {}
        answers: dict[int, Any] = {}
        failed: dict[int, CollectiveError] = {}
        unasked = list(range(len(self._actors)))
        deadline = self.deadline

        while waiting or unasked:
            for place in unasked:
                actor = self._actors[place]
                try:
                    waiting[actor.__ray_call__.remote(question, *arguments[place])] = place
                except RayError as error:
                    failed[place] = self._unreachable(place, error)
            unasked.clear()
            if failed:
                deadline = min(deadline, time.monotonic() + _VERDICT_S)

            left_s = max(0.0, deadline - time.monotonic())
            ready = ray.wait(list(waiting), timeout=left_s)[0] if waiting else []
            if not ready:
                break

            place = waiting.pop(ready[0])
            try:
                answers[place] = ray.get(ready[0])
            except RayTaskError as error:
                failed[place] = self._notified(place, error)
            except RayError as error:
                restarts = again and isinstance(error, ActorUnavailableError)
                if dead_are_done:
                    answers[place] = None
                elif restarts and time.monotonic() < deadline:
                    time.sleep(_PAUSE_S)
                    unasked.append(place)
                else:
                    failed[place] = self._unreachable(place, error)

        if failed:
            raise _cause(failed)
        if waiting:
            raise self._late(sorted(waiting.values()))
        return [answers[place] for place in range(len(self._actors))]

    def notify(
        self, message: Callable[..., Any], arguments: tuple[Any, ...], patience_s: float
    ) -> None:
        """Have all actors that can be reached run a function, busy ones later."""
        told = []
        for actor in self._actors:
            try:
                told.append(actor.__ray_call__.remote(message, *arguments))
            except RayError:
                continue  # it is as unreachable as it was for the call that failed
        if told:
            ray.wait(told, num_returns=len(told), timeout=patience_s)

    def _notified(self, place: int, error: RayTaskError) -> CollectiveError:
        """Return what an actor raised as an error of its own class that names the actor."""
        cause = error.cause
        kind = next(
            (base for base in type(cause).__mro__ if base.__module__ == CollectiveError.__module__),
            GroupError,
        )
        message = f"{self._operation}: {self._called} {place}: {cause}"
        ranks = getattr(cause, "ranks", None)
        told: CollectiveError = kind(message) if ranks is None else kind(message, ranks)
        told.__cause__ = error
        return told

    def _unreachable(self, place: int, error: RayError) -> PeerLostError:
        message = f"{self._operation}: the actor of {self._called} {place} is dead or was never started: {error}"
        lost = PeerLostError(message, (place,))
        lost.__cause__ = error
        return lost

    def _late(self, places: Sequence[int]) -> CollectiveTimeoutError:
        return CollectiveTimeoutError(
            f"{self._operation}: timed out after {self._timeout_s:.3g} s: expected every actor to answer, but "
            f"{self._called}{'s' * (len(places) > 1)} {', '.join(map(str, places))} did not: busy in "
            "another call, or not started yet for lack of resources; raise timeout_s, let them finish first, or see "
            "`ray status`",
            places,
        )


def _cause(failed: Mapping[int, CollectiveError]) -> CollectiveError:
    """Return what explains the others: an actor's own error, then a death, then a timeout."""

    def order(error: CollectiveError) -> int:
        return 2 if isinstance(error, CollectiveTimeoutError) else isinstance(error, PeerLostError)

    return min((failed[place] for place in sorted(failed)), key=order)

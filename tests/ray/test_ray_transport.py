"""Arrays between actors by Ray's tensor transports, in shared memory and over Gloo."""

from __future__ import annotations

import dataclasses
import importlib
import threading
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from crew import PATIENCE_S, AsyncMember, Member
from direct import (
    FRAMEWORKS,
    TRANSPORT,
    backends_of_links,
    check_samples,
    counted,
    describe_by_hand,
    give,
    is_alive,
    kept,
    remember,
    result,
    samples,
    total,
)

import colltensor as col
import colltensor.ray as cr
from colltensor.ray import source

needs_torch = pytest.mark.needs("torch")
needs_jax = pytest.mark.needs("jax")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("receiver", [pytest.param("second", marks=pytest.mark.shm),
                                      pytest.param("far", marks=pytest.mark.gloo)])  # fmt: skip
def test_arrays_of_all_kinds(actors: SimpleNamespace, framework: str, receiver: str) -> None:
    ref = give(actors.first, framework, samples, framework)
    assert result(getattr(actors, receiver), check_samples, ref, framework) >= 12
    backends = result(getattr(actors, receiver), backends_of_links)
    assert ("shm" if receiver == "second" else "gloo") in backends


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_driver_gets_and_puts(actors: SimpleNamespace, framework: str) -> None:
    assert (
        check_samples(
            ray.get(give(actors.far, framework, samples, framework), timeout=PATIENCE_S), framework
        )
        >= 12
    )
    ref = ray.put(samples(framework), _tensor_transport=TRANSPORT[framework])
    assert result(actors.first, check_samples, ref, framework) >= 12


def test_nothing_but_a_note_is_in_the_object_store(actors: SimpleNamespace) -> None:
    ref = give(actors.first, "numpy", counted, "numpy", 1 << 22)
    assert result(actors.second, total, ref) == sum(range(1 << 22))
    (place,) = ray.experimental.get_object_locations([ref]).values()
    assert place["object_size"] < 10_000


def test_ordinary_arrays_travel_as_they_did(actors: SimpleNamespace) -> None:
    """An actor that returned wrapped arrays still reads others from the object store without a copy."""
    ray.get(
        actors.second.run.remote(total, give(actors.first, "numpy", counted, "numpy", 4)),
        timeout=PATIENCE_S,
    )
    ref = actors.first.run.remote(np.ones, 1 << 17)
    assert not ray.get(ref, timeout=PATIENCE_S).flags.writeable
    wrapped = actors.first.run.remote(counted, "numpy", 5)
    assert total(ray.get(wrapped, timeout=PATIENCE_S)) == 10


def test_one_object_to_several_actors_and_back_to_its_own(actors: SimpleNamespace) -> None:
    ref = give(actors.first, "numpy", remember, counted("numpy", 1000))
    receivers = (actors.second, actors.far, actors.second, actors.first)
    with pytest.warns(UserWarning, match=r"\bObjectRef\("):
        assert (
            ray.get([actor.run.remote(total, ref) for actor in receivers], timeout=PATIENCE_S)
            == [499_500.0] * 4
        )
    assert result(actors.first, is_remembered, ref)


def is_remembered(value: Any) -> bool:
    return value is kept.pop("value")


def test_all_pairs_at_once_in_both_directions(actors: SimpleNamespace) -> None:
    for count in (10, 1 << 18):
        refs = {
            (sender, turn): give(actor, "numpy", counted, "numpy", count, 1000 * sender + turn)
            for turn in range(3)
            for sender, actor in enumerate(actors.all)
        }
        sums = {
            (key, receiver): actor.run.remote(total, ref)
            for key, ref in refs.items()
            for receiver, actor in enumerate(actors.all)
            if receiver != key[0]
        }
        for ((sender, turn), _), call in sums.items():
            assert ray.get(call, timeout=PATIENCE_S) == count * (count - 1) / 2 + count * (
                1000 * sender + turn
            )


def test_threads_of_one_receiver(actors: SimpleNamespace, spawn_direct: Callable[..., Any]) -> None:
    """A driver's threads, and actors with an event loop and with threads."""
    loop, threaded = spawn_direct(AsyncMember), spawn_direct(Member, max_concurrency=4)
    senders = [actors.first, actors.far, actors.second] * 3
    refs = [give(actor, "numpy", counted, "numpy", 1 << 16, n) for n, actor in enumerate(senders)]
    back = [give(actor, "numpy", counted, "numpy", 1 << 16) for actor in (loop, threaded)]
    base = (1 << 16) * ((1 << 16) - 1) / 2
    expected = [base + n * (1 << 16) for n in range(9)]
    calls = [actor.run.remote(total, ref) for ref in refs for actor in (loop, threaded)]
    assert [result(actors.first, total, ref) for ref in back] == [base, base]
    assert ray.get(calls, timeout=PATIENCE_S)[::2] == expected
    assert ray.get(calls, timeout=PATIENCE_S)[1::2] == expected
    found: dict[int, float] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: total(ray.get(refs[n]))}))
        for n in range(9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [found[n] for n in range(9)] == expected
    (nested,) = ray.get(
        [
            loop.run.remote(
                list, [ray.put(counted("numpy", 5), _tensor_transport="COLLTENSOR_NUMPY")]
            )
        ]
    )
    assert total(ray.get(nested, timeout=PATIENCE_S)) == 10


@needs_jax
def test_pending_work_is_waited_for(actors: SimpleNamespace) -> None:
    ref = give(actors.first, "jax", long_product)
    assert result(actors.second, total, ref) == 800.0 * 800


def long_product() -> Any:
    import jax.numpy as jnp

    x = jnp.eye(800)
    for _ in range(8):
        x = x @ jnp.eye(800)
    return x @ jnp.ones((800, 800))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_freed_objects_release_their_memory(actors: SimpleNamespace, framework: str) -> None:
    before = result(actors.first, objects_held)
    ref = give(actors.first, framework, watched, framework)
    assert result(actors.second, watch_here, ref, framework) == 4950.0
    assert result(actors.first, is_alive)
    del ref
    for actor in (actors.first, actors.second):
        deadline = time.monotonic() + 10
        while result(actor, is_alive):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert result(actors.first, objects_held) <= before


def watched(framework: str) -> Any:
    value = counted(framework, 100)
    kept["watch"] = weakref.ref(value.array if framework == "numpy" else value)
    return value


def watch_here(value: Any, framework: str) -> float:
    kept["watch"] = weakref.ref(value.array if framework == "numpy" else value)
    return total(value)


def objects_held() -> int:
    return sum(len(one._objects) for one in source._sources)


@needs_torch
def test_torch_receives_into_a_target(actors: SimpleNamespace) -> None:
    import torch

    ref = give(actors.first, "torch", counted, "torch", 10)
    target = torch.zeros(10)
    ray.experimental.set_target_for_ref(ref, [target])
    assert ray.get(ref, timeout=PATIENCE_S) is target
    assert target.tolist() == list(range(10))
    other = give(actors.first, "torch", counted, "torch", 10)
    elsewhere = torch.zeros(10, device="meta")
    ray.experimental.set_target_for_ref(other, [elsewhere])
    with pytest.raises(col.TensorError):
        ray.get(other, timeout=PATIENCE_S)


@needs_torch
def test_the_modes_of_torch_do_not_matter(actors: SimpleNamespace) -> None:
    import torch

    refs = [give(actors.first, "torch", with_grad) for _ in range(2)]
    with torch.inference_mode():
        found = ray.get(refs[0], timeout=PATIENCE_S)
    assert found.tolist() == [2.0, 2.0]
    assert not found.is_inference()
    with torch.no_grad():
        assert ray.get(refs[1], timeout=PATIENCE_S).tolist() == [2.0, 2.0]


def with_grad() -> Any:
    torch = importlib.import_module("torch")
    return 2 * torch.ones(2, requires_grad=True)


@needs_jax
def test_jax_receives_into_new_arrays_only(actors: SimpleNamespace) -> None:
    transport = importlib.import_module("colltensor.ray.transport").JaxTransport()
    description = dataclasses.replace(result(actors.first, describe_by_hand, "target"))
    with pytest.raises(col.OptionError, match=r"\bObjectRef\b"):
        transport.recv_multiple_tensors("target", description, None, [counted("jax", 4)])
    result(actors.first, source.let_go, "target")


def test_registration_says_what_is_wrong() -> None:
    with pytest.raises(col.OptionError, match="torch, jax, cupy, numpy"):
        cr.register_tensor_transports(["tensorflow"])
    assert cr.register_tensor_transports(["numpy"]) == cr.register_tensor_transports(["numpy"])

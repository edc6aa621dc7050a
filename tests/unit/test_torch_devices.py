"""colltensor.torch gives a group tensors on the caller's device alone: a group made for GPUs reaches no other.

Torch's ``meta`` device stands for one that is not the CPU. Nothing can be read there, so that a call ends where it
would look at what the ranks agreed on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.needs("torch")


class Group:
    """Notes on which device the tensors are that it is given, in place of a group of two ranks.

    Attributes:
        given: The calls: operation and device.
    """

    rank, world_size, name, backend = 0, 2, "devices", "nccl"

    def __init__(self) -> None:
        self.given: list[tuple[str, str]] = []

    def allreduce(self, tensor: Any, *arguments: Any, **options: Any) -> Any:
        self.given.append(("allreduce", tensor.device.type))
        return tensor

    def send(self, tensor: Any, peer: int) -> None:
        self.given.append(("send", tensor.device.type))

    def recv(self, tensor: Any, peer: int) -> None:
        self.given.append(("recv", tensor.device.type))


@pytest.fixture
def torch() -> Any:
    return importlib.import_module("torch")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    made = Group()
    monkeypatch.setattr(
        importlib.import_module("colltensor.torch.collectives"), "find_group", lambda name: made
    )
    return made


def as_far_as_it_reads(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"(?i)meta"):
        call()


def test_whether_autograd_records(torch: Any, group: Group) -> None:
    collectives = importlib.import_module("colltensor.torch.collectives")
    tensor = torch.zeros(3, device="meta", requires_grad=True)
    as_far_as_it_reads(lambda: collectives.allreduce(tensor))
    as_far_as_it_reads(lambda: collectives.recv(tensor, 1))
    assert collectives.send(tensor, 1).device.type == "meta"
    assert group.given == [
        ("allreduce", "meta"),
        ("recv", "meta"),
        ("send", "meta"),
        ("send", "meta"),
    ]


def test_what_is_received_lies_where_the_argument_does(torch: Any, group: Group) -> None:
    linear = importlib.import_module("colltensor.torch.linear")
    receive = linear.Recv(group, 1, torch.Size([2, 3]), torch.float32)
    [received] = receive([torch.zeros((), device="meta")])
    assert (received.device.type, received.shape) == ("meta", (2, 3))
    assert group.given == [("recv", "meta")]


def test_the_presence_of_gradients(torch: Any, group: Group) -> None:
    reducer = importlib.import_module("colltensor.torch.reducer")
    parameter = torch.zeros(8, device="meta", requires_grad=True)
    options = reducer.Options(
        bucket_nbytes=8, lone_nbytes=8, average=True, early=False, compression=None
    )
    made = reducer.Reducer(group, None, [("weight", parameter)], options)
    made._settle_missing()
    assert group.given == [("allreduce", "meta")]

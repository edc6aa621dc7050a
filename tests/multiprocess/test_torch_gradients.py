"""colltensor.torch.sync_gradients, beside DistributedDataParallel and beside sums computed with numpy."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import RankPool, RanksFailedError, group_of

import colltensor as col

pytestmark = [pytest.mark.needs("torch"), pytest.mark.shm]

MODES = [True, False, "worker"]
CHOICES: list[dict[str, Any]] = [
    {"overlap": False},
    {"overlap": "worker"},
    {"overlap": "worker", "bucket_nbytes": 256},
    {"overlap": False, "bucket_nbytes": 1},
]


def torch_of() -> Any:
    """Return torch, with the part of the package that is for it as ``torch.col``."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    torch.col = importlib.import_module("colltensor.torch")
    return torch


def mlp(torch: Any, width: int = 40) -> Any:
    torch.manual_seed(5)
    return torch.nn.Sequential(
        torch.nn.Linear(6, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, 3),
    )


def part(torch: Any, rank: int, step: int = 0, count: int = 8) -> Any:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(count, 6, generator=generator)


def gradients(model: Any) -> dict[str, Any]:
    return {
        name: None if p.grad is None else p.grad.numpy().copy()
        for name, p in model.named_parameters()
    }


def reference(
    torch: Any, model: Any, world_size: int, backward: Callable[[Any, int], None]
) -> dict[str, Any]:
    """Run ``backward(copy, rank)`` for each rank on a copy in this process; return the averages by numpy."""
    found = []
    for rank in range(world_size):
        copy = mlp(torch) if model is None else type(model)()
        if model is not None:
            copy.load_state_dict(model.state_dict())
        backward(copy, rank)
        found.append(gradients(copy))
    names = found[0]
    return {
        name: None
        if all(each[name] is None for each in found)
        else sum(each[name] for each in found if each[name] is not None) / world_size
        for name in names
    }


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert found[name] is not None, name
            np.testing.assert_allclose(
                found[name],
                np.broadcast_to(value, found[name].shape),
                tolerance,
                tolerance,
                err_msg=name,
            )


@contextlib.contextmanager
def ddp_world(torch: Any, rank: int, world_size: int, folder: str) -> Iterator[None]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/ddp", rank=rank, world_size=world_size
    )
    try:
        yield
    finally:
        # a DDP module that outlives its process group was seen to hang in its destructor
        gc.collect()
        torch.distributed.destroy_process_group()


def like_ddp(
    rank: int, world_size: int, folder: str, options: dict[str, Any], accumulate: bool
) -> None:
    torch = torch_of()
    with ddp_world(torch, rank, world_size, folder):
        beside_ddp(torch, rank, world_size, options, accumulate)


def beside_ddp(
    torch: Any, rank: int, world_size: int, options: dict[str, Any], accumulate: bool
) -> None:
    group = group_of(world_size, "shm")
    ours, theirs = mlp(torch), mlp(torch)
    ddp = torch.nn.parallel.DistributedDataParallel(theirs)
    with torch.col.sync_gradients(ours, group, **options) as handle:
        both = [
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (ours, theirs)
        ]
        for step in range(6):
            for optimizer in both:
                optimizer.zero_grad(set_to_none=step % 3 != 2)
            for model, no_sync in ((ours, handle.no_sync), (ddp, ddp.no_sync)):
                if accumulate:
                    with no_sync():
                        model(part(torch, rank, 100 + step)).square().mean().backward()
                model(part(torch, rank, step)).square().mean().backward()
            mine, other = gradients(ours), gradients(theirs)
            if world_size == 2:
                for name in mine:
                    assert mine[name].tobytes() == other[name].tobytes(), (step, name)
            assert_close(mine, other)
            for model in (ours, theirs):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for optimizer in both:
                optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.gloo
@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_like_ddp(
    pool: RankPool, tmp_path: Path, world_size: int, accumulate: bool, options: dict[str, Any]
) -> None:
    """Step by step the gradients are DDP's: with 2 ranks the same bits, else to 1e-6."""
    pool.run(world_size, like_ddp, str(tmp_path), options, accumulate)


def synced_over(
    rank: int, world_size: int, backend: str, provider: str | None, overlap: bool | str
) -> None:
    torch = torch_of()
    group = group_of(world_size, backend, provider)

    def backward(model: Any, number: int) -> None:
        model(part(torch, number)).square().mean().backward()

    expected = reference(torch, None, world_size, backward)
    model = mlp(torch)
    with torch.col.sync_gradients(model, group, overlap=overlap):
        for _ in range(3):
            model.zero_grad()
            backward(model, rank)
            assert_close(gradients(model), expected)


@pytest.mark.parametrize("overlap", MODES)
def test_over_gloo(pool: RankPool, provider: str, overlap: bool | str) -> None:
    pool.run(2, synced_over, "gloo", provider, overlap)


def one_rank(rank: int, world_size: int) -> None:
    torch = torch_of()
    model = mlp(torch)
    with torch.col.sync_gradients(model, group_of(1, "loopback")):
        model(part(torch, 0)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_one_rank(pool: RankPool) -> None:
    pool.run(1, one_rank)


def branches(torch: Any) -> Any:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.first, self.second = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
            self.large = torch.nn.Linear(6, 4000)
            self.never = torch.nn.Linear(2, 2)
            self.frozen = torch.nn.Linear(5, 5)
            self.frozen.requires_grad_(False)

        def forward(self, x: Any, use: tuple[str, ...]) -> Any:
            total = sum(getattr(self, name)(x).square().mean() for name in use)
            return self.frozen(self.first(x)).square().mean() + total

    return Model


def uses(rank: int, step: int) -> tuple[str, ...]:
    choices: list[tuple[str, ...]] = [("second",), ("large",), ("second", "large"), ()]
    return choices[(rank + step) % 4]


def unused(rank: int, world_size: int, options: dict[str, Any]) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    make = branches(torch)
    model = make()
    with torch.col.sync_gradients(model, group, **options):
        for step in range(8):
            # at last nobody uses them
            kinds = [uses(r, step) if step < 6 else () for r in range(world_size)]

            def backward(m: Any, r: int, kinds: list[tuple[str, ...]] = kinds) -> None:
                m(part(torch, r), kinds[r]).backward()

            expected = reference(torch, model, world_size, backward)
            model.zero_grad()
            model(part(torch, rank), kinds[rank]).backward()
            assert_close(gradients(model), expected)
            assert model.never.weight.grad is None
            assert model.frozen.weight.grad is None


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("world_size", [2, 3])
def test_parameters_without_a_gradient(
    pool: RankPool, world_size: int, options: dict[str, Any]
) -> None:
    """What some rank has counts as zeros on the others; what no rank has stays None."""
    pool.run(world_size, unused, options)


def several_passes(rank: int, world_size: int, options: dict[str, Any], average: bool) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)

    def backward(m: Any, r: int) -> None:
        for step in range(3):
            m(part(torch, r, step)).square().mean().backward()

    expected = reference(torch, None, world_size, backward)
    factor = 1 if average else world_size
    expected = {name: value * factor for name, value in expected.items()}
    with torch.col.sync_gradients(model, group, average=average, **options):
        for keep in (True, False, True):
            backward(model, rank)
            assert_close(gradients(model), expected)
            model.zero_grad(set_to_none=keep)


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("average", [True, False])
def test_several_backward_passes(pool: RankPool, options: dict[str, Any], average: bool) -> None:
    pool.run(3, several_passes, options, average)


def checkpointed(rank: int, world_size: int, overlap: bool | str, reentrant: bool) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    checkpoint = importlib.import_module("torch.utils.checkpoint").checkpoint

    def backward(model: Any, number: int) -> None:
        x = part(torch, number).requires_grad_()
        x = checkpoint(model[:2], x, use_reentrant=reentrant)
        # one parameter in two checkpoints; inside them, a checkpoint in a checkpoint
        for _ in range(2):
            x = checkpoint(
                lambda y: checkpoint(model[2:4], y, use_reentrant=reentrant),
                x,
                use_reentrant=reentrant,
            )
        checkpoint(model[4], x, use_reentrant=reentrant).square().mean().backward()

    expected = reference(torch, None, world_size, backward)
    model = mlp(torch)
    with torch.col.sync_gradients(model, group, overlap=overlap, bucket_nbytes=200):
        for _ in range(3):
            model.zero_grad()
            backward(model, rank)
            assert_close(gradients(model), expected)


def only_gradients(rank: int, world_size: int, options: dict[str, Any]) -> None:
    """What the group is given as tensors, once the module is there: a group may reach no other device than theirs."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    expected = reference(
        torch, None, world_size, lambda m, r: m(part(torch, r)).square().mean().backward()
    )
    model = mlp(torch)
    with torch.col.sync_gradients(model, group, **options):
        dtypes = set()
        originals = {name: getattr(group, name) for name in ("allreduce", "broadcast")}
        for name, original in originals.items():
            setattr(
                group,
                name,
                lambda tensor, *rest, f=original, **more: (
                    dtypes.add(tensor.dtype),
                    f(tensor, *rest, **more),
                )[1],
            )
        try:
            for _ in range(3):
                model.zero_grad()
                model(part(torch, rank)).square().mean().backward()
                assert_close(gradients(model), expected)
        finally:
            for name in originals:
                delattr(group, name)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("overlap", [False, "worker"])
def test_the_order_is_no_tensor_of_the_groups(pool: RankPool, overlap: bool | str) -> None:
    pool.run(2, only_gradients, {"overlap": overlap})


@pytest.mark.parametrize("overlap", [False, "worker"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(pool: RankPool, overlap: bool | str, reentrant: bool) -> None:
    pool.run(2, checkpointed, overlap, reentrant)


def compiled(rank: int, world_size: int, backend: str) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    expected = reference(
        torch, None, world_size, lambda m, r: m(part(torch, r)).square().mean().backward()
    )
    model = mlp(torch)
    with torch.col.sync_gradients(model, group, overlap="worker"):
        fast = torch.compile(model, backend=backend)
        for _ in range(3):
            model.zero_grad()
            fast(part(torch, rank)).square().mean().backward()
            assert_close(gradients(model), expected, 1e-5)


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_modules(pool: RankPool, backend: str) -> None:
    pool.run(2, compiled, backend)


def mixed(rank: int, world_size: int, overlap: bool | str) -> None:
    """Mixed dtypes, a shared parameter, a layout of its own, a complex one, a scalar and an empty one."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    shapes = {"a": (3, 5), "b": (), "c": (0, 4), "d": (7,), "e": (300, 200)}
    dtypes = {
        "a": torch.float64,
        "b": torch.float32,
        "c": torch.float32,
        "d": torch.bfloat16,
        "e": torch.float32,
    }
    parameters = {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
    parameters["f"] = torch.zeros(4, 6).t()  # column-major
    parameters["g"] = torch.zeros(3, dtype=torch.complex64)
    for parameter in parameters.values():
        parameter.requires_grad_()
    listed = [*parameters.items(), ("again", parameters["a"])]
    with torch.col.sync_gradients(listed, group, overlap=overlap):
        for _ in range(2):
            total = 0
            for number, parameter in enumerate(parameters.values()):
                weights = (torch.arange(parameter.numel()) * 2 + number + rank * 4).reshape(
                    parameter.shape
                )
                total = total + (parameter * weights.to(parameter.dtype)).real.sum().to(
                    torch.float64
                )
                parameter.grad = None
            (total + parameters["a"].sum()).backward()
            for number, (name, parameter) in enumerate(parameters.items()):
                weights = (
                    np.arange(parameter.numel()) * 2
                    + number
                    + 4 * (world_size - 1) / 2
                    + (name == "a")
                )
                found = parameter.grad.resolve_conj().to(torch.complex128).numpy()
                assert found.ravel().tolist() == weights.tolist(), name
            assert parameters["f"].grad.stride() == parameters["f"].stride()


@pytest.mark.parametrize("overlap", [False, "worker"])
def test_mixed_parameters(pool: RankPool, overlap: bool | str) -> None:
    pool.run(2, mixed, overlap)


def scaled(rank: int, world_size: int) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.col.sync_gradients(model, group, compression=torch.col.PowerSGD(2)):
        for step in range(4):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(part(torch, rank, step)).float().square().mean()
            if step == 1 and rank == 1:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            moved = any(
                not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)
            )
            assert moved == (step != 1), "one rank's overflow is every rank's, for one step"
        everyone = group.allgather_object(
            [p.detach().numpy().tobytes() for p in model.parameters()]
        )
        assert all(each == everyone[0] for each in everyone)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_autocast_and_gradient_scaling(pool: RankPool) -> None:
    pool.run(2, scaled)


def start(rank: int, world_size: int) -> None:
    """Rank 0's parameters, buffers and frozen parameters are everybody's."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    model[1].running_mean.fill_(rank)
    handle = torch.col.sync_gradients(model, group)
    state = group.allgather_object(
        {name: value.tolist() for name, value in model.state_dict().items()}
    )
    assert all(each == state[0] for each in state)
    assert state[0]["1.running_mean"] == [0] * 4
    if rank:
        model[1].running_mean.fill_(7)
    handle.broadcast()
    assert model[1].running_mean.tolist() == [0] * 4
    handle.remove()
    handle.remove()
    model(torch.full((2, 4), float(rank))).sum().backward()
    with pytest.raises(col.OptionError, match="module_or_parameters"):
        torch.col.sync_gradients([], group)
    with pytest.raises(col.OptionError, match=r"compression: .*'fp16'"):
        torch.col.sync_gradients(model, group, compression="fp8")
    with pytest.raises(col.UnsupportedTensorError, match=r"\bweight .*'meta'"):
        torch.col.sync_gradients(torch.nn.LazyLinear(3), group)


def test_the_start(pool: RankPool) -> None:
    pool.run(3, start)


def differing(rank: int, world_size: int) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    here = rank == 1
    cases = [
        (
            torch.nn.Linear(4, 5 if here else 3),
            {},
            r"rank 1 .*\bweight: .*float32 5x4 \(rank 0: .*3x4\)",
        ),
        (torch.nn.Linear(4, 3, bias=not here), {}, r"rank 1 .*\bbias \(rank 0: .*float32 3\)"),
        (
            torch.nn.Linear(4, 3).to(torch.float64 if here else torch.float32),
            {},
            r"rank 1 .*\bweight: .*float64",
        ),
        (
            torch.nn.Linear(4, 3),
            {"average": not here},
            r"rank 1 .*\baverage: False \(rank 0: True\)",
        ),
        (torch.nn.Linear(4, 3).requires_grad_(not here), {}, "frozen"),
    ]
    for module, options, words in cases:
        with pytest.raises(col.MismatchError, match=words) as caught:
            torch.col.sync_gradients(module, group, **options)
        assert caught.value.ranks == (1,)
    assert group.allreduce(np.ones(1)).tolist() == [world_size]


def test_a_difference_is_named_on_every_rank(pool: RankPool) -> None:
    pool.run(3, differing)


def refusals(rank: int, world_size: int, overlap: bool | str) -> None:
    torch = torch_of()
    group = col.init_collective_group(
        world_size,
        rank,
        group_name=f"refusals {overlap}",
        init_method=f"file://{os.environ['TMPDIR']}",
        timeout_s=10,
    )
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    with (
        torch.col.sync_gradients(embedding, group, overlap=overlap),
        pytest.raises(col.UnsupportedTensorError, match=r"\bweight .*sparse=False"),
    ):
        embedding(torch.tensor([1, 2])).sum().backward()
    model = mlp(torch)
    with (
        torch.col.sync_gradients(model, group, overlap=overlap),
        pytest.raises(col.UnsupportedTensorError, match=r"create_graph=True"),
    ):
        model(part(torch, rank)).square().sum().backward(create_graph=True)
    group.destroy()


@pytest.mark.parametrize("overlap", [False, "worker"])
def test_refusals(pool: RankPool, overlap: bool | str) -> None:
    pool.run(2, refusals, overlap)


def compressed(rank: int, world_size: int, kind: str, overlap: bool | str, average: bool) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    expected = reference(
        torch, None, world_size, lambda m, r: m(part(torch, r)).square().mean().backward()
    )
    model = mlp(torch)
    power = torch.col.PowerSGD(40, min_rate=0.1)
    compression = {"power": power, "own": Halving()}.get(kind, kind)
    options = {"overlap": overlap, "average": average, "compression": compression}
    with torch.col.sync_gradients(model, group, bucket_nbytes=3000, **options):
        for _ in range(3):
            model.zero_grad()
            model(part(torch, rank)).square().mean().backward()
            tolerance = {"fp16": 2e-3, "bf16": 2e-2, "power": 1e-5, "own": 1e-6}[kind]
            factor = 1 if average else world_size
            assert_close(
                gradients(model),
                {name: value * factor for name, value in expected.items()},
                tolerance,
            )
            everyone = group.allgather_object(
                {name: g.tobytes() for name, g in gradients(model).items()}
            )
            assert all(each == everyone[0] for each in everyone)


class Halving:
    """A compression of one's own, in two rounds: one for each half."""

    def reduce(self, bucket: Any) -> Iterator[Any]:
        middle = bucket.flat.numel() // 2
        assert sum(gradient.numel() for gradient in bucket.gradients) == bucket.flat.numel()
        assert len(bucket.names) == len(bucket.gradients)
        yield bucket.flat[:middle]
        yield bucket.flat[middle:]


@pytest.mark.parametrize("kind", ["fp16", "bf16", "power", "own"])
@pytest.mark.parametrize("overlap", [False, "worker"])
def test_compression(pool: RankPool, kind: str, overlap: bool | str) -> None:
    """PowerSGD with as many columns as the matrices have is exact."""
    pool.run(2, compressed, kind, overlap, overlap is False)


class Noting:
    """Notes when which bucket is launched."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def reduce(self, bucket: Any) -> Iterator[Any]:
        self.notes.extend(bucket.names)
        yield bucket.flat


def launched(rank: int, world_size: int, overlap: bool | str) -> None:
    """Notes of a pass: the buckets as they are launched, and where the backward pass reached the first layer."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)
    notes: list[str] = []
    model[1].register_full_backward_hook(lambda *_: notes.append("reached"))
    with torch.col.sync_gradients(
        model, group, overlap=overlap, compression=Noting(notes), bucket_nbytes=1
    ):
        for step in range(3):
            notes.clear()
            model(part(torch, rank)).square().mean().backward()
            place = notes.index("reached")
            early = {name.partition(".")[0] for name in notes[:place]}
            assert early == ({"2", "4"} if overlap == "worker" and step else set()), (step, notes)
            everyone = group.allgather_object([note for note in notes if "." in note])
            assert all(each == everyone[0] for each in everyone)
            assert len(everyone[0]) == 6


@pytest.mark.parametrize("overlap", [False, "worker"])
def test_when_buckets_are_launched(pool: RankPool, overlap: bool | str) -> None:
    """A worker has them as soon as the first pass has shown the order; all ranks launch in one order."""
    pool.run(2, launched, overlap)


def error_feedback(rank: int, world_size: int) -> None:
    """What rank 1 leaves out of a constant gradient arrives in later steps: the mean of the steps is the gradient."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    weight = torch.zeros(30, 20, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(30, 20, generator=generator) for _ in range(world_size)]
    mean = sum(targets) / world_size
    with torch.col.sync_gradients([weight], group, compression=torch.col.PowerSGD(2)):
        total = torch.zeros(30, 20)
        distances = []
        for step in range(1, 201):
            weight.grad = None
            (weight * targets[rank]).sum().backward()
            assert torch.linalg.matrix_rank(weight.grad) == 2
            total += weight.grad
            distances.append(float((total / step - mean).norm() / mean.norm()))
    assert distances[0] > 0.7, distances[0]
    assert distances[-1] < 0.1, distances[-1]


def test_error_feedback(pool: RankPool) -> None:
    pool.run(2, error_feedback)


def dies(
    rank: int, world_size: int, backend: str, provider: str | None, overlap: bool | str
) -> str:
    torch = torch_of()
    group = col.init_collective_group(
        world_size,
        rank,
        backend,
        f"dies {backend} {overlap}",
        provider=provider,
        timeout_s=20,
        init_method=f"file://{os.environ['TMPDIR']}",
    )
    model = mlp(torch)
    torch.col.sync_gradients(model, group, overlap=overlap, bucket_nbytes=500)
    for step in range(3):
        model.zero_grad()
        if step == 2 and rank == 1:
            model[2].weight.register_hook(lambda gradient: os._exit(7))
        if step < 2:
            model(part(torch, rank)).sum().backward()
            continue
        with pytest.raises(col.PeerLostError) as caught:
            model(part(torch, rank)).sum().backward()
        assert caught.value.ranks == (1,)
        with pytest.raises(col.CollectiveError):  # and so does every further pass
            model(part(torch, rank)).sum().backward()
    group.destroy()
    return "told"


@pytest.mark.parametrize("overlap", [False, "worker"])
def test_a_rank_that_dies_in_backward(pool: RankPool, overlap: bool | str) -> None:
    results = pool.run(3, dies, "shm", None, overlap, may_die=(1,))
    assert results == ["told", None, "told"]


def test_a_rank_that_dies_in_backward_over_gloo(pool: RankPool, provider: str) -> None:
    results = pool.run(3, dies, "gloo", provider, False, may_die=(1,))
    assert results == ["told", None, "told"]


def fails_alone(rank: int, world_size: int) -> None:
    """An exception in rank 1's backward before anything was reduced: it can repeat the pass."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch)

    def fail(gradient: Any) -> None:
        raise ZeroDivisionError("the user's own")

    with torch.col.sync_gradients(model, group, overlap=False):
        for step in range(3):
            model.zero_grad()
            if rank == 1 and step == 1:
                loss = model(part(torch, rank)).square().mean()
                handle = model[0].weight.register_hook(fail)
                with pytest.raises(ZeroDivisionError):
                    loss.backward()
                handle.remove()
                model.zero_grad()
            model(part(torch, rank)).square().mean().backward()
            expected = reference(
                torch, None, world_size, lambda m, r: m(part(torch, r)).square().mean().backward()
            )
            assert_close(gradients(model), expected)


def test_an_exception_in_backward(pool: RankPool) -> None:
    pool.run(2, fails_alone)


def fails_outside_a_checkpoint(rank: int, world_size: int) -> None:
    """As above, between the end of a checkpoint's own pass and the end of the outer one; the graph is kept."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    checkpoint = importlib.import_module("torch.utils.checkpoint").checkpoint
    expected = reference(
        torch, None, world_size, lambda m, r: m(part(torch, r)).square().mean().backward()
    )
    model = mlp(torch)

    def fail(gradient: Any) -> None:
        raise ZeroDivisionError("the user's own")

    with torch.col.sync_gradients(model, group, overlap=False):
        inner = model[:2](part(torch, rank))
        inner.register_hook(fail)
        loss = checkpoint(model[2:], inner, use_reentrant=True).square().mean()
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        model.zero_grad()
        model(part(torch, rank)).square().mean().backward()
        assert_close(gradients(model), expected)
        assert loss.grad_fn is not None


def test_an_exception_outside_a_checkpoint(pool: RankPool) -> None:
    pool.run(2, fails_outside_a_checkpoint)


def no_growth(rank: int, world_size: int, overlap: bool | str, average: bool) -> None:
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch, 150)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = part(torch, rank)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()

    with torch.col.sync_gradients(model, group, overlap=overlap, average=average):
        steps(300)
        gc.collect()
        gc.disable()
        try:
            objects = len(gc.get_objects())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            steps(1000)
            assert len(gc.get_objects()) - objects < 100, "cycles or leftovers in each step"
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2048
        finally:
            gc.enable()


@pytest.mark.parametrize(("overlap", "average"), [(False, True), ("worker", True), (False, False)])
def test_no_memory_growth(pool: RankPool, overlap: bool | str, average: bool) -> None:
    pool.run(2, no_growth, overlap, average)


def flat_views(rank: int, world_size: int) -> None:
    """While the loop keeps its gradients they stay where they are: views of one tensor, and a large one its own."""
    torch = torch_of()
    group = group_of(world_size, "shm")
    model = mlp(torch, 200)
    with torch.col.sync_gradients(model, group):
        model(part(torch, rank)).sum().backward()
        before = [(p.grad, p.grad.data_ptr()) for p in model.parameters()]
        model.zero_grad(set_to_none=False)
        calls: list[Any] = []
        allreduce = group.allreduce
        group.allreduce = lambda tensor, *rest, **more: (
            calls.append(tensor),
            allreduce(tensor, *rest, **more),
        )[1]
        try:
            model(part(torch, rank)).sum().backward()
        finally:
            del group.allreduce
        assert [len(tensors) for tensors in calls] == [2]  # both buckets, by one call
        for parameter, (gradient, address) in zip(model.parameters(), before, strict=True):
            assert parameter.grad is gradient
            assert parameter.grad.data_ptr() == address
        storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(storages) == 2  # the flat bucket, and the large gradient


def test_gradients_stay_where_they_are(pool: RankPool) -> None:
    pool.run(2, flat_views)


def once_more(rank: int, world_size: int) -> None:
    """A parameter that is accumulated more often than in the first pass, after it was reduced."""
    torch = torch_of()
    group = col.init_collective_group(
        world_size,
        rank,
        group_name="once more",
        init_method=f"file://{os.environ['TMPDIR']}",
        timeout_s=10,
    )
    checkpoint = importlib.import_module("torch.utils.checkpoint").checkpoint
    model = mlp(torch)
    with torch.col.sync_gradients(model, group, overlap="worker", bucket_nbytes=1):
        model(part(torch, rank)).sum().backward()
        x = checkpoint(model[:2], part(torch, rank).requires_grad_(), use_reentrant=True)
        for _ in range(2):
            x = checkpoint(model[2:4], x, use_reentrant=True)
        with pytest.raises(col.GroupError, match=r"\b2\.(weight|bias) .*overlap=False"):
            model[4](x).sum().backward()
    # not before both are out of their pass, which destroying would end
    group_of(world_size, "shm").barrier()
    group.destroy()


def test_accumulated_after_it_was_reduced(pool: RankPool) -> None:
    pool.run(2, once_more)


def test_errors_reach_the_test(pool: RankPool) -> None:
    """The parity above would notice: without the hook the ranks' gradients differ."""
    with pytest.raises(RanksFailedError, match="AssertionError"):
        pool.run(2, without_sync)


def without_sync(rank: int, world_size: int) -> None:
    torch = torch_of()
    expected = reference(
        torch, None, world_size, lambda m, r: m(part(torch, r)).square().mean().backward()
    )
    model = mlp(torch)
    model(part(torch, rank)).square().mean().backward()
    assert_close(gradients(model), expected)

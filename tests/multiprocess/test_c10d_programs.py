"""What torch builds on process groups: each gives on our backend what it gives on Gloo, in the same two processes."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from c10d_ranks import plain, values, world
from pool import RankPool

pytestmark = [pytest.mark.needs("torch"), pytest.mark.shm, pytest.mark.slow]

Program = Callable[[Any, Any, Any, int, Path], Any]


def net(torch: Any, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


def step(torch: Any, model: Any, rank: int, turn: int, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(
        torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * turn + rank))
    ).sum().backward()
    optimizer.step()


def parameters(model: Any) -> list[Any]:
    return [
        getattr(tensor, "full_tensor", tensor.detach)().detach() for tensor in model.parameters()
    ]


def sharded(torch: Any, dist: Any, group: Any, seed: int) -> Any:
    model = net(torch, seed)
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    return importlib.import_module("torch.distributed.fsdp").fully_shard(model, mesh=mesh)


def checkpoint(torch: Any, dist: Any, group: Any, rank: int, folder: Path) -> Any:
    """Train sharded, save, load into another model, and get all of it on rank 0 and back."""
    checkpoints = importlib.import_module("torch.distributed.checkpoint")
    states = importlib.import_module("torch.distributed.checkpoint.state_dict")
    model, other = sharded(torch, dist, group, 3), sharded(torch, dist, group, 4)
    optimizer, another = (torch.optim.Adam(module.parameters(), 0.01) for module in (model, other))
    step(torch, model, rank, 0, optimizer)
    saved = dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer), strict=True))
    checkpoints.save(saved, checkpoint_id=folder / "now", process_group=group)
    loaded = dict(zip(("model", "optimizer"), states.get_state_dict(other, another), strict=True))
    checkpoints.load(loaded, checkpoint_id=folder / "now", process_group=group)
    states.set_state_dict(
        other, another, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    step(torch, other, rank, 1, another)
    whole = states.get_model_state_dict(
        other, options=states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    third = sharded(torch, dist, group, 5)
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(third, whole, options=options)
    return [parameters(model), parameters(other), parameters(third)]


def checkpoint_meanwhile(torch: Any, dist: Any, group: Any, rank: int, folder: Path) -> Any:
    checkpoints = importlib.import_module("torch.distributed.checkpoint")
    given = {"table": torch.arange(5.0) + 1, "turn": 3}
    apart = dist.new_group(backend=group.name())
    saving = checkpoints.async_save(given, checkpoint_id=folder / "later", process_group=apart)
    total = values(torch, rank)
    for _ in range(5):
        dist.all_reduce(total, group=group)
    saving.result()
    loaded = {"table": torch.zeros(5), "turn": 0}
    checkpoints.load(loaded, checkpoint_id=folder / "later", process_group=group)
    return [total, loaded["table"], loaded["turn"]]


def fsdp1(torch: Any, dist: Any, group: Any, rank: int, folder: Path) -> Any:
    fsdp = importlib.import_module("torch.distributed.fsdp").FullyShardedDataParallel
    model = fsdp(net(torch), process_group=group, device_id=torch.device("cpu"))
    step(torch, model, rank, 0, torch.optim.SGD(model.parameters(), 0.1))
    norm = model.clip_grad_norm_(0.5)
    with fsdp.summon_full_params(model):
        return [norm, *(parameter.detach().clone() for parameter in model.parameters())]


def zero_redundancy(torch: Any, dist: Any, group: Any, rank: int, folder: Path) -> Any:
    """An optimizer whose state is shared out, and ranks that run out of batches at different times."""
    join = importlib.import_module("torch.distributed.algorithms.join").Join
    zero = importlib.import_module("torch.distributed.optim").ZeroRedundancyOptimizer
    model = torch.nn.parallel.DistributedDataParallel(net(torch), process_group=group)
    optimizer = zero(model.parameters(), torch.optim.Adam, process_group=group, lr=0.01)
    with join([model, optimizer]):
        for turn in range(2 + rank):
            step(torch, model, rank, turn, optimizer)
    optimizer.consolidate_state_dict(0)
    return [parameters(model), len(optimizer.state_dict()["state"]) if rank == 0 else None]


def hooked(torch: Any, dist: Any, group: Any, rank: int, folder: Path) -> Any:
    """The hooks of DDP that the other test has not, those in C++ among them."""
    package = "torch.distributed.algorithms.ddp_comm_hooks."
    default = importlib.import_module(f"{package}default_hooks")
    local = importlib.import_module(f"{package}post_localSGD_hook")
    alone, _ = dist.new_subgroups(1, backend=group.name())
    registrations: dict[str, Callable[[Any], None]] = {
        "allreduce": lambda model: model.register_comm_hook(group, default.allreduce_hook),
        "wrapped": lambda model: model.register_comm_hook(
            group, default.fp16_compress_wrapper(default.allreduce_hook)
        ),
        "local": lambda model: model.register_comm_hook(
            local.PostLocalSGDState(group, alone, 2), local.post_localSGD_hook
        ),
        "built in": lambda model: model._register_builtin_comm_hook(
            dist.BuiltinCommHookType.ALLREDUCE
        ),
        "built in, float16": lambda model: model._register_builtin_comm_hook(
            dist.BuiltinCommHookType.FP16_COMPRESS
        ),
    }
    found = []
    for name, register in registrations.items():
        model = torch.nn.parallel.DistributedDataParallel(
            net(torch), process_group=group, bucket_cap_mb=0.0001
        )
        register(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for turn in range(3):
            step(torch, model, rank, turn, optimizer)
        found.append([name, parameters(model)])
    return found


def averaged(torch: Any, dist: Any, group: Any, rank: int, folder: Path) -> Any:
    averagers = importlib.import_module("torch.distributed.algorithms.model_averaging.averagers")
    model = net(torch, rank)
    model(torch.ones(1, 4)).sum().backward()
    averager = averagers.PeriodicModelAverager(period=2, warmup_steps=0, process_group=group)
    for _ in range(3):
        averager.average_parameters(list(model.parameters()))
    # broadcasts buffers, leaves parameters out, accumulates
    normal = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(net(torch), torch.nn.BatchNorm1d(4)),
        process_group=group,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )
    with normal.no_sync():
        normal(torch.ones(2, 4) * rank).sum().backward()
    normal(torch.arange(8.0).view(2, 4) * rank).sum().backward()
    return [parameters(model), [p.grad for p in normal.parameters()], list(normal.buffers())]


def functional(torch: Any, dist: Any, group: Any, rank: int, folder: Path) -> Any:
    """Functional collectives, which autograd goes through, also on the way to a compiler."""
    calls = importlib.import_module("torch.distributed._functional_collectives")
    given = values(torch, rank, 4).requires_grad_()
    found = [
        calls.all_reduce(given.detach(), "max", group),
        calls.broadcast(given.detach(), 1, group),
        *calls.all_reduce_coalesced([given.detach(), given.detach() + 1], "sum", group),
        *calls.all_gather_into_tensor_coalesced([given.detach(), given.detach() + 1], group),
        *calls.reduce_scatter_tensor_coalesced(
            [given.detach(), given.detach() + 1], "sum", [0, 0], group
        ),
        calls.all_to_all_single(given.detach(), [2, 2], [2, 2], group),
        calls.permute_tensor(given.detach(), [1, 0], group),
    ]
    for result in (
        calls.all_gather_tensor_autograd(given, 0, group),
        calls.reduce_scatter_tensor_autograd(given, "sum", 0, group),
        calls.all_to_all_single_autograd(given, [2, 2], [2, 2], group),
    ):
        (result * torch.arange(float(result.numel()))).sum().backward()
        found.append(given.grad.clone())

    def traced(tensor: Any) -> Any:
        doubled = tensor * 2
        dist.all_reduce(doubled, group=group)
        return calls.all_gather_tensor(doubled, 0, group) + 1

    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    return [*(entry + 0 for entry in found), compiled(given.detach()) + 0]


def differentiable(torch: Any, dist: Any, group: Any, rank: int, folder: Path) -> Any:
    calls = importlib.import_module("torch.distributed.nn")
    given = values(torch, rank, 4).requires_grad_()
    found = []
    for result in (
        calls.all_reduce(given, group=group),
        calls.broadcast(given, 0, group=group),
        sum(calls.all_gather(given, group=group)),
        sum(calls.gather(given, 0, group=group)),
        calls.scatter([given, given + 1], 0, group=group),
        calls.reduce_scatter(torch.empty(4), [given, given * 2], group=group),
        sum(calls.all_to_all([torch.empty(4), torch.empty(4)], [given, given * 2], group=group)),
        calls.all_to_all_single(torch.empty(4), given, group=group),
    ):
        (result * torch.arange(4.0)).sum().backward()
        found += [result.detach(), given.grad.clone()]
    return found


def tensors(torch: Any, dist: Any, group: Any, rank: int, folder: Path) -> Any:
    """DTensor: other placements, uneven shards, partial sums, and layers in parallel."""
    kinds = importlib.import_module("torch.distributed.tensor")
    parallel = importlib.import_module("torch.distributed.tensor.parallel")
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    whole = torch.arange(24.0).view(6, 4)
    rows = kinds.distribute_tensor(whole, mesh, [kinds.Shard(0)])
    found = [
        rows.redistribute(mesh, [place]).to_local() for place in (kinds.Shard(1), kinds.Replicate())
    ]
    for how in ("sum", "avg", "max"):
        part = kinds.DTensor.from_local(whole + rank, mesh, [kinds.Partial(how)])
        found += [part.redistribute(mesh, [kinds.Shard(0)]).to_local(), part.full_tensor()]
    uneven = kinds.distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [kinds.Shard(0)])
    found += [uneven.full_tensor(), (uneven * 2).sum().full_tensor(), uneven.norm().full_tensor()]
    layers = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    model = parallel.parallelize_module(net(torch), mesh, layers)
    model(torch.ones(3, 4)).sum().backward()
    return [*found, *(parameter.grad.full_tensor() for parameter in model.parameters())]


def pipeline(torch: Any, dist: Any, group: Any, rank: int, folder: Path) -> Any:
    pipelining = importlib.import_module("torch.distributed.pipelining")
    torch.manual_seed(0)
    layer = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)][rank]
    stage = pipelining.PipelineStage(layer, rank, 2, torch.device("cpu"), group=group)
    schedule = pipelining.Schedule1F1B(stage, 4, loss_fn=torch.nn.functional.mse_loss)
    losses: list[Any] = []
    if rank:
        schedule.step(target=torch.zeros(8, 4), losses=losses)
    else:
        schedule.step(torch.arange(32.0).view(8, 4))
    return [
        [loss.detach() for loss in losses],
        [parameter.grad for parameter in layer.parameters()],
    ]


def objects(torch: Any, dist: Any, group: Any, rank: int, folder: Path) -> Any:
    received: list[Any] = [None] * 3
    if rank:
        dist.recv_object_list(received, 0, group=group)
    else:
        dist.send_object_list([1, "two", {3: 4}], 1, group=group)
    utils = importlib.import_module("torch.distributed.collective_utils")
    return [
        received,
        utils.broadcast(lambda: {"from": rank}, rank=1, pg=group),
        utils.all_gather(lambda: rank, pg=group),
    ]


PROGRAMS: list[Program] = [
    checkpoint,
    checkpoint_meanwhile,
    fsdp1,
    zero_redundancy,
    hooked,
    averaged,
    functional,
    differentiable,
    tensors,
    pipeline,
    objects,
]


def run_all(rank: int, world_size: int, path: Path) -> list[tuple[str, Any, Any]]:
    with world(rank, world_size, path) as (torch, dist):
        groups = {"colltensor": dist.new_group(), "gloo": dist.new_group(backend="gloo")}
        return [
            (
                program.__name__,
                *(
                    plain(
                        program(
                            torch, dist, group, rank, path.parent / f"{program.__name__} {name}"
                        )
                    )
                    for name, group in groups.items()
                ),
            )
            for program in PROGRAMS
        ]


def test_programs_give_what_they_give_on_gloo(pool: RankPool, tmp_path: Path) -> None:
    """With two ranks, whose sums have one order."""
    for rank, results in enumerate(pool.run(2, run_all, tmp_path / "store")):
        assert [name for name, _, _ in results] == [program.__name__ for program in PROGRAMS]
        for name, ours, gloo in results:
            assert ours == gloo, f"{name} on rank {rank}"


def merging(rank: int, world_size: int, path: Path) -> list[Any]:
    """Two groups that know nothing of each other become one, twice through one store, in the order of joiner."""
    with world(rank % 2, 2, path.with_name(f"world {rank // 2}")) as (torch, dist):
        store = dist.FileStore(str(path), world_size)
        found = []
        for turn in range(2):
            name = (f"of world {rank // 2}", None)[turn]  # which may differ from rank to rank
            merged = dist.group.WORLD.merge_remote_group(
                store, world_size, timedelta(seconds=20), name
            )
            assert (merged.size(), merged.getBackendName()) == (world_size, "colltensor")
            assert (merged.group_name, merged.group_desc) == (name or "0:merge", "default_pg:merge")
            total = values(torch, rank)
            merged.allreduce([total]).wait()
            ranks = torch.zeros(world_size, dtype=torch.int64)
            ranks[merged.rank()] = rank
            merged.allreduce([ranks]).wait()
            part = merged.split_group([*range(world_size)])
            assert part.group_name == f"{merged.group_name}:split:0"
            once_more = values(torch, rank)
            part.allreduce([once_more]).wait()
            assert once_more.tolist() == total.tolist()
            part.shutdown()
            merged.shutdown()
            found.append([total.tolist(), sorted(ranks.tolist()), turn])
        with pytest.raises(RuntimeError, match=rf"\brank {world_size} "):
            dist.group.WORLD.merge_remote_group(
                store, world_size + 1, timedelta(seconds=0.5), "more", "never"
            )
        return found


def test_groups_that_do_not_know_each_other_merge(pool: RankPool, tmp_path: Path) -> None:
    expected = [[[10.0, 14.0, 18.0, 22.0, 10.0, 14.0], [0, 1, 2, 3], turn] for turn in range(2)]
    assert pool.run(4, merging, tmp_path / "store") == [expected] * 4


def asked(rank: int, world_size: int, path: Path) -> list[Any]:
    """What torch asks of a group, and what a profiler sees of it."""
    with world(rank, world_size, path, backend="cpu:colltensor,cuda:gloo") as (torch, dist):
        group = dist.group.WORLD
        before = group._get_sequence_number_for_group()
        with torch.profiler.profile() as profile:
            dist.all_reduce(torch.ones(2))
            dist.barrier(async_op=True).wait()
            mine, theirs = torch.ones(2), torch.empty(2)
            for request in (dist.isend(mine, 1 - rank), dist.irecv(theirs, 1 - rank)):
                request.wait()
        seen = sorted(
            event.key for event in profile.key_averages() if event.key.startswith("colltensor::")
        )
        # what init_process_group(device_id=...) does on a GPU
        group.bound_device_id = torch.device("cuda:0")
        part = group.split_group([0, 1])
        kind = importlib.import_module("colltensor.torch.c10d.process_group").ColltensorProcessGroup
        unknown = kind(
            dist.PrefixStore("unknown", group.get_group_store()),
            rank,
            2,
            timedelta(seconds=9),
            "unknown",
        )
        cuda = torch.device("cuda")
        found = [
            group._get_sequence_number_for_group() - before,
            seen,
            group.bound_device_id,
            type(part._get_backend(cuda)).__name__,
            unknown._get_backend(cuda) is unknown,
        ]
        part.shutdown()
        unknown.shutdown()
        return found


def test_what_torch_asks_of_a_group(pool: RankPool, tmp_path: Path) -> None:
    seen = ["colltensor::allreduce", "colltensor::barrier", "colltensor::recv", "colltensor::send"]
    assert pool.run(2, asked, tmp_path / "store") == [[2, seen, None, "ProcessGroupGloo", True]] * 2


def initialised(rank: int, world_size: int, path: Path, how: str, port: int) -> list[float]:
    torch = importlib.import_module("torch")
    importlib.import_module("colltensor.torch")
    dist = torch.distributed
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    given: dict[str, Any] = {"rank": rank, "world_size": world_size}
    if how == "env":
        os.environ.update(place)
        given = {}
    elif how == "tcp":
        given["init_method"] = f"tcp://127.0.0.1:{port}"
    elif how == "file store":
        given["store"] = dist.FileStore(str(path), world_size)
    else:
        given = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group("colltensor", timeout=timedelta(seconds=20), **given)
    finally:
        if how == "env":
            for name in place:
                del os.environ[name]
    dist.all_reduce(total := values(torch, rank, 2))
    dist.barrier()
    dist.destroy_process_group()
    found: list[float] = total.tolist()
    return found


@pytest.mark.parametrize("how", ["env", "tcp", "file store", "hash store"])
def test_every_way_to_initialise(pool: RankPool, tmp_path: Path, how: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    alone = how == "hash store"
    expected = [[1.0, 2.0], [2.0, 3.0]] if alone else [[3.0, 5.0]] * 2
    assert pool.run(2, initialised, tmp_path / "store", how, port) == expected

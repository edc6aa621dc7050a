"""The public names and their signatures: adding, removing or renaming one is done on purpose."""

from __future__ import annotations

import importlib
import inspect

import pytest

import colltensor as col

NAMES = [
    "AdapterBase",
    "AliasError",
    "BackendBase",
    "DTYPES",
    "BackendUnavailableError",
    "BufferView",
    "CollectiveError",
    "CollectiveTimeoutError",
    "DType",
    "Device",
    "DeviceError",
    "Group",
    "GroupError",
    "MismatchError",
    "Operation",
    "OptionError",
    "PeerLostError",
    "RankError",
    "ReadOnlyError",
    "ReduceOp",
    "ShapeError",
    "TensorError",
    "UnsupportedDTypeError",
    "UnsupportedTensorError",
    "Work",
    "add_observer",
    "allgather",
    "allgather_multigpu",
    "allgather_object",
    "allreduce",
    "allreduce_multigpu",
    "alltoall",
    "backend_unavailable_reason",
    "barrier",
    "broadcast",
    "broadcast_multigpu",
    "broadcast_object",
    "collective_group",
    "create_collective_group",
    "destroy_collective_group",
    "gather",
    "get_collective_group_size",
    "get_group_handle",
    "get_rank",
    "gloo_available",
    "init_collective_group",
    "is_backend_available",
    "is_group_initialized",
    "nccl_available",
    "recv",
    "recv_multigpu",
    "reduce",
    "reduce_multigpu",
    "reducescatter",
    "reducescatter_multigpu",
    "register_adapter",
    "register_backend",
    "remove_observer",
    "scan",
    "scatter",
    "send",
    "send_multigpu",
    "sendrecv",
    "synchronize",
]

RAY_SIGNATURES = {
    "init_collective_group": "world_size, rank, backend, group_name, gloo_timeout",
    "create_collective_group": "actors, world_size, ranks, backend, group_name, gloo_timeout",
    "destroy_collective_group": "group_name='default'",
    "is_group_initialized": "group_name='default'",
    "get_rank": "group_name='default'",
    "get_collective_group_size": "group_name='default'",
    "get_group_handle": "group_name='default'",
    "allreduce": "tensor, group_name='default', op=SUM",
    "reduce": "tensor, dst_rank=0, group_name='default', op=SUM",
    "broadcast": "tensor, src_rank=0, group_name='default'",
    "allgather": "tensor_list, tensor, group_name='default'",
    "reducescatter": "tensor, tensor_list, group_name='default', op=SUM",
    "send": "tensor, dst_rank, group_name='default'",
    "recv": "tensor, src_rank, group_name='default'",
    "barrier": "group_name='default'",
    "allreduce_multigpu": "tensor_list, group_name='default', op=SUM",
    "reduce_multigpu": "tensor_list, dst_rank=0, dst_tensor=0, group_name='default', op=SUM",
    "broadcast_multigpu": "tensor_list, src_rank=0, src_tensor=0, group_name='default'",
    "allgather_multigpu": "output_tensor_lists, input_tensor_list, group_name='default'",
    "reducescatter_multigpu": "output_tensor_list, input_tensor_lists, group_name='default', op=SUM",
    "send_multigpu": "tensor, dst_rank, dst_gpu_index, group_name='default', n_elements=0",
    "recv_multigpu": "tensor, src_rank, src_gpu_index, group_name='default', n_elements=0",
    "synchronize": "gpu_id",
}
"""What ``ray.util.collective`` 2.60 has, positions and defaults; ours may add keyword-only arguments."""

GROUP_SIGNATURES = {
    "allreduce": "tensor, op=SUM",
    "reduce": "tensor, dst_rank=0, op=SUM",
    "broadcast": "tensor, src_rank=0",
    "allgather": "tensor_list, tensor",
    "gather": "tensor_list, tensor, dst_rank=0",
    "scatter": "tensor, tensor_list=None, src_rank=0",
    "reducescatter": "tensor, tensor_list, op=SUM",
    "alltoall": "output_list, input_list",
    "send": "tensor, dst_rank",
    "recv": "tensor, src_rank",
    "sendrecv": "send_tensor, dst_rank, recv_tensor, src_rank",
    "barrier": "",
    "broadcast_object": "obj=None, src_rank=0",
    "allgather_object": "obj",
    "split": "color, key=None",
    "destroy": "",
}

ERRORS = {
    "OptionError": ValueError,
    "GroupError": RuntimeError,
    "BackendUnavailableError": RuntimeError,
    "MismatchError": RuntimeError,
    "PeerLostError": ConnectionError,
    "CollectiveTimeoutError": TimeoutError,
    "RankError": ValueError,
    "UnsupportedTensorError": TypeError,
    "UnsupportedDTypeError": TypeError,
    "ReadOnlyError": ValueError,
    "DeviceError": ValueError,
    "ShapeError": ValueError,
    "AliasError": ValueError,
}


def positional(function: object, *, defaults: bool = True) -> str:
    """The positional parameters in the notation of the tables above."""
    words = []
    for name, parameter in inspect.signature(function).parameters.items():  # type: ignore[arg-type]
        if name == "self" or parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            continue
        default = parameter.default
        shown = default.name if isinstance(default, col.ReduceOp) else repr(default)
        words.append(
            f"{name}={shown}" if defaults and default is not inspect.Parameter.empty else name
        )
    return ", ".join(words)


def test_all() -> None:
    assert sorted(col.__all__) == sorted(NAMES)
    assert len(set(col.__all__)) == len(col.__all__)
    for name in NAMES:
        assert getattr(col, name) is not None


def test_nothing_else_is_public() -> None:
    modules = {name for name, value in vars(col).items() if inspect.ismodule(value)}
    public = {name for name in vars(col) if not name.startswith("_")} - modules
    assert public == set(NAMES)


@pytest.mark.parametrize("name", list(RAY_SIGNATURES))
def test_ray_signatures(name: str) -> None:
    defaults = "collective_group" not in name or "=" in RAY_SIGNATURES[name]
    assert positional(getattr(col, name), defaults=defaults) == RAY_SIGNATURES[name]


@pytest.mark.parametrize("name", list(GROUP_SIGNATURES))
def test_group_signatures(name: str) -> None:
    assert positional(getattr(col.Group, name)) == GROUP_SIGNATURES[name]


@pytest.mark.parametrize(
    "name", [name for name in GROUP_SIGNATURES if name not in ("split", "destroy")]
)
def test_functions_take_what_methods_take(name: str) -> None:
    """A function is the method with ``group_name`` before ``op`` or at the end, keyword-only arguments included."""
    method = {
        keyword: parameter
        for keyword, parameter in inspect.signature(getattr(col.Group, name)).parameters.items()
        if keyword != "self" and not keyword.startswith("_")  # the package's own
    }
    function = inspect.signature(getattr(col, name)).parameters
    assert set(method) == set(function) - {"group_name"}
    for keyword in method:
        assert method[keyword].default == function[keyword].default, keyword
        assert method[keyword].kind == function[keyword].kind, keyword


@pytest.mark.needs("ray")
def test_the_signatures_are_those_of_the_installed_ray() -> None:
    collective = importlib.import_module("ray.util.collective.collective")
    for name in RAY_SIGNATURES:
        theirs = [
            word
            for word in inspect.signature(getattr(collective, name)).parameters
            if word != "self"
        ]
        assert positional(getattr(col, name), defaults=False).split(", ") == theirs, name


def test_reduce_ops_have_rays_numbers() -> None:
    assert {op.name: int(op) for op in col.ReduceOp} == {
        "SUM": 0,
        "PRODUCT": 1,
        "MIN": 2,
        "MAX": 3,
        "AVERAGE": 4,
        "BAND": 5,
        "BOR": 6,
        "BXOR": 7,
    }


@pytest.mark.parametrize("name", list(ERRORS))
def test_errors_are_also_python_errors(name: str) -> None:
    error = getattr(col, name)
    assert issubclass(error, col.CollectiveError)
    assert issubclass(error, RuntimeError)
    assert issubclass(error, ERRORS[name])


def test_every_public_name_has_a_docstring() -> None:
    missing = [name for name in NAMES if not inspect.getdoc(getattr(col, name))]
    missing += [
        f"Group.{name}" for name in GROUP_SIGNATURES if not inspect.getdoc(getattr(col.Group, name))
    ]
    assert not missing

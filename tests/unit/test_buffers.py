"""Buffers: what is staged, what is fused, what aliases, and what the ranks compare."""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
import pytest

from colltensor import AliasError, OptionError, UnsupportedTensorError
from colltensor.buffers import BUCKET_NBYTES, FUSE_BELOW_NBYTES, adapt, refuse_overlaps

SMALL = FUSE_BELOW_NBYTES // 4


def staged(
    tensor: Any,
    *,
    write: bool = True,
    strided: bool = False,
    bytewise: bool = False,
    copy: bool | None = None,
) -> Any:
    buffers = adapt(tensor, write, False, True)
    buffers.stage(strided, bytewise, copy)
    return buffers


def pointers(buffers: Any) -> list[int]:
    return [transfer.pointer for transfer in buffers.transfers]


def test_a_contiguous_tensor_is_its_own_transfer() -> None:
    array = np.ones(5)
    assert pointers(staged(array)) == [array.ctypes.data]
    assert pointers(staged(array, copy=False)) == [array.ctypes.data]
    assert staged(array).result() is array


def test_a_strided_tensor_is_staged_unless_the_backend_takes_it() -> None:
    array = np.arange(10.0)[::2]
    buffers = staged(array)
    assert buffers.transfers[0].pointer != array.ctypes.data
    assert buffers.transfers[0].strides is None
    assert buffers.transfers[0].pointer % 64 == 0
    assert pointers(staged(array, strided=True)) == [array.ctypes.data]
    with pytest.raises(OptionError, match=r"copy=False.*strided"):
        staged(array, copy=False)


def test_load_and_store_go_through_the_staging_copy() -> None:
    matrix = np.arange(12.0).reshape(3, 4)
    buffers = staged(matrix.T)
    buffers.load()
    staging = np.frombuffer(buffers.transfers[0].memory(), np.float64)
    assert staging.tolist() == matrix.T.reshape(-1).tolist()
    staging *= 2
    assert matrix[2, 3] == 11
    buffers.store()
    assert (matrix == np.arange(12.0).reshape(3, 4) * 2).all()


def test_a_read_tensor_is_not_written_back() -> None:
    array = np.arange(10.0)[::2]
    buffers = staged(array, write=False)
    buffers.load()
    np.frombuffer(buffers.transfers[0].memory(), np.float64)[:] = 99
    buffers.store()
    assert array.tolist() == [0, 2, 4, 6, 8]


def test_small_leaves_of_one_dtype_share_a_transfer() -> None:
    tree = {"a": np.ones(3, np.float32), "b": np.ones(4, np.int32), "c": np.ones(5, np.float32)}
    buffers = staged(tree)
    assert sorted((str(transfer.dtype), transfer.count) for transfer in buffers.transfers) == [
        ("float32", 8),
        ("int32", 4),
    ]
    together = staged(tree, bytewise=True)
    assert [transfer.nbytes for transfer in together.transfers] == [48]


def test_large_leaves_travel_as_they_lie() -> None:
    big = np.ones(SMALL + 1, np.float32)
    small = np.ones(3, np.float32)
    buffers = staged({"a": small, "b": big, "c": small.copy()})
    assert big.ctypes.data in pointers(buffers)
    assert len(buffers.transfers) == 2


def test_buckets_are_closed_when_full() -> None:
    leaves = [
        np.ones(SMALL - 1, np.float32) for _ in range(2 * BUCKET_NBYTES // FUSE_BELOW_NBYTES + 1)
    ]
    transfers = staged(leaves).transfers
    assert len(transfers) == 3
    assert all(transfer.nbytes <= BUCKET_NBYTES for transfer in transfers)


def test_copy_false_fuses_nothing() -> None:
    leaves = [np.ones(3), np.ones(4)]
    assert pointers(staged(leaves, copy=False)) == [leaf.ctypes.data for leaf in leaves]
    with pytest.raises(OptionError, match=r"leaf \[1\]: copy=False"):
        staged([np.ones(3), np.ones(8)[::2]], copy=False)


def test_leaves_that_are_not_to_share_a_transfer_are_packed_alone() -> None:
    leaves = [np.ones(3), np.ones(8)[::2], np.ones(4)]
    buffers = adapt(leaves, True, False, True)
    buffers.stage(False, False, None, False)
    assert [transfer.count for transfer in buffers.transfers] == [3, 4, 4]
    assert [
        pointer == leaf.ctypes.data for pointer, leaf in zip(pointers(buffers), leaves, strict=True)
    ] == [True, False, True]


@pytest.mark.parametrize("bytewise", [False, True])
def test_fused_leaves_load_and_store(bytewise: bool) -> None:
    leaves = {
        "a": np.arange(3.0),
        "b": np.arange(6.0)[::2],
        "c": np.arange(4).astype(np.int16),
        "d": np.empty(0),
    }
    buffers = staged(leaves, bytewise=bytewise)
    buffers.load()
    for transfer in buffers.transfers:
        transfer.memory()[:] = bytes(byte ^ 1 for byte in transfer.memory())
    buffers.store()
    assert leaves["a"].tobytes() == bytes(byte ^ 1 for byte in np.arange(3.0).tobytes())
    assert leaves["b"].tobytes() == bytes(byte ^ 1 for byte in np.arange(6.0)[::2].tobytes())
    assert leaves["c"].tobytes() == bytes(
        byte ^ 1 for byte in np.arange(4).astype(np.int16).tobytes()
    )


def test_the_plan_depends_on_counts_and_dtypes_alone() -> None:
    """Layouts, libraries and read-only flags differ between ranks; the transfers may not."""
    here = {"a": np.ones(6, np.float32), "b": np.ones((2, 3), np.float32)}
    there = {"b": np.ones(12, np.float32)[::2], "a": np.ones((3, 4), np.float32)[:, ::2].T}
    assert [transfer.count for transfer in staged(here).transfers] == [
        transfer.count for transfer in staged(there).transfers
    ]


def test_what_ranks_compare() -> None:
    one = staged({"a": np.ones(3), "b": np.ones(4)})
    assert one.compared()[0] == 7
    assert one.compared() == staged({"b": np.ones((2, 2)), "a": np.ones(6)[::2]}).compared()
    for other in (
        {"a": np.ones(3), "c": np.ones(4)},
        {"a": np.ones(4), "b": np.ones(3)},
        [np.ones(3), np.ones(4)],
        {"a": np.ones(3), "b": np.ones(4, np.float32)},
    ):
        assert one.compared() != staged(other).compared()
    assert staged(np.ones(3)).compared() != staged(np.ones(3, np.float32)).compared()


def test_descriptions_name_leaves() -> None:
    assert staged(np.ones(3)).describe() == "float64[3]"
    text = staged({"w": np.ones((2, 2), np.float32), "b": np.ones(1, np.int8)}).describe()
    assert text == "{['b'] int8[1], ['w'] float32[4]}"
    text = staged([np.ones(1) for _ in range(10)]).describe()
    assert text.count("float64[1]") + int(re.findall(r"\b\d+\b", text)[-1]) == 10


def test_an_error_in_a_leaf_has_its_path() -> None:
    with pytest.raises(UnsupportedTensorError, match=r"^leaf \['x'\]\[0\]: .*\bstr\b"):
        adapt({"x": ["abc"]}, True, False, True, reduced=True)
    with pytest.raises(UnsupportedTensorError, match=r"\blist\b"):
        adapt([np.ones(1)], True, False, False)


def views(*arrays: Any) -> list[Any]:
    return [
        (adapt(array, False, False, False).views[0], f"argument {number}")
        for number, array in enumerate(arrays)
    ]


def test_overlaps() -> None:
    x = np.zeros((6, 4))
    for written in (
        (x[:, 0], x[:, 1]),
        (x[0], x[1]),
        (x[::2], x[1::2]),
        (x[:0], x[:0]),
        (x[:3, ::2], x[:3, 1::2]),
    ):
        refuse_overlaps(views(*written), [])
        refuse_overlaps(views(written[0]), views(written[1]))
    for written in ((x, x), (x[:, 0], x[0]), (x[:3], x[2:]), (x[::2], x[2]), (x, x.T)):
        with pytest.raises(AliasError, match=r"argument (0 .*argument 1|1 .*argument 0)\b"):
            refuse_overlaps(views(*written), [])
    with pytest.raises(AliasError, match=r"argument 0 .*argument 0\b"):
        refuse_overlaps(views(x[1]), views(x))
    refuse_overlaps([], views(x, x))
    with pytest.raises(AliasError):  # found among many, whatever their order
        refuse_overlaps(views(*(x[row] for row in (5, 3, 0, 1, 4)), x[2:4, 0]), [])


@pytest.mark.needs("jax")
def test_jax_leaves_are_claimed_apart_from_loading() -> None:
    jnp = importlib.import_module("jax.numpy")
    x = jnp.arange(4.0)
    buffers = adapt({"j": x, "n": np.ones(2)}, True, True, True)
    buffers.stage(False, False, None)
    buffers.load()
    assert not x.is_deleted()
    staging, transfers = buffers.views, list(buffers.transfers)
    buffers.allocate_result()
    assert x.is_deleted()
    assert buffers.views is staging
    assert all(
        transfer is before for transfer, before in zip(buffers.transfers, transfers, strict=True)
    )
    buffers.store()
    assert buffers.result()["j"].tolist() == [0, 1, 2, 3]


@pytest.mark.needs("jax")
def test_one_jax_array_may_be_two_leaves_unless_donated() -> None:
    jnp = importlib.import_module("jax.numpy")
    x = jnp.arange(4.0)
    buffers = adapt([x, x], True, False, True)
    buffers.stage(False, False, None)
    buffers.allocate_result()
    first, second = buffers.result()
    assert first.unsafe_buffer_pointer() != second.unsafe_buffer_pointer()
    with pytest.raises(AliasError, match=r"leaf \[0\] .*leaf \[1\]"):
        adapt([x, x], True, True, True)
    assert not x.is_deleted()

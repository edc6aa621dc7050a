"""BufferView: spans, slices, casts, and what overlaps itself."""

from __future__ import annotations

import ctypes
import gc
import weakref

import pytest

from colltensor import BufferView
from colltensor.types import CPU, DTYPES, UINT8, Device, DType, ReduceOp

FLOAT32 = DTYPES["float32"]


class Owner:
    """Stands for whoever owns the memory."""


def view_of(
    shape: tuple[int, ...], strides: tuple[int, ...] | None = None, pointer: int = 4096
) -> BufferView:
    return BufferView.from_address(pointer, shape, FLOAT32, strides=strides, owner=None)


def test_counts_and_bytes() -> None:
    view = view_of((2, 3, 4))
    assert (view.count, view.nbytes, view.contiguous, view.device) == (24, 96, True, CPU)
    assert view_of(()).count == 1
    assert view_of((3, 0)).nbytes == 0


@pytest.mark.parametrize(
    ("shape", "strides", "low", "high"),
    [
        ((4,), None, 0, 16),
        ((4,), (2,), 0, 28),
        ((4,), (-1,), -12, 4),
        ((2, 3), (10, -2), -16, 44),
        ((3, 0), (5, 1), 0, 0),
        ((1,), (7,), 0, 4),
        ((), None, 0, 4),
    ],
)
def test_span(shape: tuple[int, ...], strides: tuple[int, ...] | None, low: int, high: int) -> None:
    assert view_of(shape, strides).span() == (4096 + low, 4096 + high)


@pytest.mark.parametrize(
    ("shape", "strides", "order", "start"),
    [
        ((3, 4), None, None, 0),
        ((3, 4), (1, 3), ((3, 1), (4, 3)), 0),
        ((3, 1, 4, 1), (1, 7, 3, 9), ((3, 1), (4, 3)), 0),
        # axes that lie behind each other are one, whatever the shape
        ((2, 3, 4), (3, 1, 6), ((6, 1), (4, 6)), 0),
        ((6, 4), (1, 6), ((6, 1), (4, 6)), 0),
        ((2, 3, 4), (1, 8, 2), ((2, 1), (12, 2)), 0),
        ((5,), (-1,), ((5, -1),), -16),
        ((2, 3), (3, -1), ((2, 3), (3, -1)), -8),
        ((2, 3), (-3, -1), ((6, -1),), -20),
        # gaps, several indices on one address, nothing, one element
        ((3, 4), (1, 4), None, 0),
        ((5,), (2,), None, 0),
        ((3, 4), (0, 1), None, 0),
        ((3, 4), (1, 1), None, 0),
        ((0, 4), (9, 2), None, 0),
        ((1,), (7,), (), 0),
    ],
)
def test_order(
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    order: tuple[tuple[int, int], ...] | None,
    start: int,
) -> None:
    view = view_of(shape, strides)
    assert view.order() == order
    if order:
        straight = view.straightened()
        assert (straight.pointer, straight.count) == (4096 + start, view.count)
        assert straight.strides is None


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [
        ((4,), (1,), False),
        ((4,), (0,), True),
        ((1,), (0,), False),
        ((3, 2), (1, 1), True),
        ((3, 2), (2, 1), False),
        ((2, 3), (1, 2), False),
        ((2, 3), (-1, 2), False),
        ((4, 4), (3, 1), True),
        ((4, 3), (-3, -1), False),
        ((0, 9), (0, 0), False),
    ],
)
def test_overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...], overlaps: bool) -> None:
    assert view_of(shape, strides).overlaps_itself() == overlaps


def test_slice_and_cast() -> None:
    view = view_of((6, 2))
    part = view.slice(3, 7)
    assert (part.pointer, part.count, part.dtype) == (4096 + 12, 4, FLOAT32)
    assert view.slice(5, 5).nbytes == 0
    raw = view.cast(UINT8)
    assert (raw.pointer, raw.count, raw.nbytes) == (4096, 48, 48)
    assert raw.cast(DTYPES["float64"]).count == 6
    with pytest.raises(ValueError, match=r"cast\(\) .*\bfloat32 .*\buint8\[5\]"):
        raw.slice(0, 5).cast(FLOAT32)
    for method, arguments in (("slice", (0, 1)), ("cast", (UINT8,)), ("memory", ())):
        with pytest.raises(ValueError, match="contiguous"):
            getattr(view_of((3,), (2,)), method)(*arguments)


@pytest.mark.parametrize(
    ("shape", "strides", "number", "starts", "layout"),
    [
        ((6,), None, 3, [0, 2, 4], ((2,), None)),
        ((2, 3), None, 3, [0, 2, 4], ((2,), None)),  # by count alone
        ((0, 5), None, 2, [0, 0], ((0,), None)),
        ((4, 3), (3, 1), 1, [0], ((4, 3), (3, 1))),
        ((2, 3), (9, 1), 2, [0, 9], ((1, 3), None)),
        ((4, 3), (9, 1), 2, [0, 18], ((2, 3), (9, 1))),
        ((3, 4), (1, 3), 3, [0, 1, 2], ((1, 4), (1, 3))),
        ((4,), (-2,), 2, [0, -4], ((2,), (-2,))),
    ],
)
def test_blocks(
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    number: int,
    starts: list[int],
    layout: tuple[tuple[int, ...], tuple[int, ...] | None],
) -> None:
    view = view_of(shape, strides)
    blocks = view.blocks(number)
    assert [(block.pointer - 4096) // 4 for block in blocks] == starts
    assert all(
        (block.shape, block.strides, block.count) == (*layout, view.count // number)
        for block in blocks
    )
    assert all(block is view or block.owner is view for block in blocks)


def test_what_has_no_equal_blocks() -> None:
    with pytest.raises(ValueError, match=r"\b5\b.*\b2\b"):
        view_of((5,)).blocks(2)
    with pytest.raises(ValueError, match="contiguous"):
        view_of((3, 4), (1, 3)).blocks(2)


def test_memory_is_the_memory() -> None:
    raw = bytearray(b"\0" * 16)
    view = BufferView.from_buffer(raw)
    view.memory()[3] = 7
    assert raw[3] == 7
    part = view.slice(4, 8).memory()
    part[:] = b"abcd"
    assert raw[4:8] == b"abcd"
    assert len(view.slice(2, 2).memory()) == 0
    with pytest.raises(ValueError, match="host"):
        BufferView.from_address(0, (3,), UINT8, device=Device("cuda", 0), owner=None).memory()


def test_a_view_keeps_its_owner_alive() -> None:
    owner = Owner()
    array = (ctypes.c_char * 8)()
    view = BufferView.from_address(ctypes.addressof(array), (8,), UINT8, owner=owner)
    alive = weakref.ref(owner)
    part = view.slice(0, 4).cast(UINT8).memory()
    del owner, view
    gc.collect()
    assert alive() is not None
    del part
    gc.collect()
    assert alive() is None


def test_from_dlpack_takes_the_exporters_layout() -> None:
    numpy = pytest.importorskip("numpy", exc_type=ModuleNotFoundError)
    array = numpy.arange(24, dtype="float32").reshape(4, 6)[::-2, ::3]
    view = BufferView.from_dlpack(array, dtype=FLOAT32, device=CPU)
    assert (view.pointer, view.shape, view.strides) == (array.ctypes.data, (2, 2), (-12, 3))
    assert view.owner is array
    assert BufferView.from_dlpack(array.copy(), dtype=FLOAT32, device=CPU).strides is None


def test_what_a_view_says_of_itself() -> None:
    assert repr(view_of((2, 2))) == "BufferView(float32[2, 2] on cpu, contiguous)"
    strided = BufferView.from_address(
        0, (2,), UINT8, device=Device("cuda", 1), strides=(3,), readonly=True, owner=None
    )
    assert repr(strided) == "BufferView(uint8[2] on cuda:1, strides=(3,), read-only)"


def test_dtypes_have_numbers_of_their_own() -> None:
    assert len({dtype.code for dtype in DTYPES.values()}) == len(DTYPES)
    assert [name for name, dtype in DTYPES.items() if dtype.moves_only] == [
        name for name in DTYPES if name.startswith("float8")
    ]
    for name, dtype in DTYPES.items():
        assert repr(dtype) == name
        assert isinstance(dtype, DType)


@pytest.mark.parametrize(("given", "meant"), [(ReduceOp.MAX, ReduceOp.MAX)])
def test_ops_are_themselves(given: ReduceOp, meant: ReduceOp) -> None:
    assert ReduceOp.of(given) is meant


class Foreign:
    """Another library's op."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_ops_of_other_libraries_by_name() -> None:
    assert ReduceOp.of(Foreign("PRODUCT")) is ReduceOp.PRODUCT
    assert ReduceOp.of(Foreign("AVG")) is ReduceOp.AVERAGE
    for wrong in (Foreign("PREMUL_SUM"), "SUM", 0, None, 1.5):
        with pytest.raises(ValueError, match=r"^op .*colltensor\.ReduceOp"):
            ReduceOp.of(wrong)


@pytest.mark.needs("torch")
def test_ops_of_torch() -> None:
    dist = __import__("torch.distributed").distributed
    for name, meant in (("SUM", ReduceOp.SUM), ("AVG", ReduceOp.AVERAGE), ("BXOR", ReduceOp.BXOR)):
        assert ReduceOp.of(getattr(dist.ReduceOp, name)) is meant

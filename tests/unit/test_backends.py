"""The table of backends, the rules they share, loopback, and the parts of Gloo that need no other rank."""

from __future__ import annotations

import itertools
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import colltensor as col
from colltensor import backends
from colltensor.backends import (
    arithmetic,
    get_backend,
    is_available,
    reason,
    register_backend,
    rules,
)
from colltensor.backends.gloo import GlooSpec, provider, scheduling, sockets
from colltensor.backends.loopback import LoopbackBackend
from colltensor.errors import (
    BackendUnavailableError,
    DeviceError,
    GroupError,
    OptionError,
    RankError,
    UnsupportedDTypeError,
)
from colltensor.operations import REDUCTIONS
from colltensor.types import DTYPES, Device, ReduceOp
from colltensor.view import BufferView

SUM = ReduceOp.SUM
LATER = float("inf")


def seen(array: np.ndarray[Any, Any], name: str | None = None) -> BufferView:
    steps = (
        None
        if array.flags.c_contiguous
        else tuple(step // array.itemsize for step in array.strides)
    )
    address = array.__array_interface__["data"][0]
    dtype = DTYPES[name or array.dtype.name]
    return BufferView.from_address(address, array.shape, dtype, strides=steps, owner=array)


class Lonely:
    """The control plane of one rank."""

    rank, world_size, group_name = 0, 1, "alone"
    addresses = (("127.0.0.1", 1),)
    secret, generation = b"", b""

    def allgather(self, payload: bytes, deadline: float) -> list[bytes]:
        return [payload]

    def check(self) -> None:
        pass


class TestTable:
    def test_the_names(self) -> None:
        assert backends.backend_names() == ["gloo", "hierarchical", "loopback", "nccl", "shm"]
        assert reason("loopback") is None
        assert is_available("loopback")

    def test_auto_is_no_entry_of_the_table(self) -> None:
        with pytest.raises(OptionError, match=r"^backend: .*'auto'"):
            get_backend("auto")
        assert is_available("auto") == (is_available("shm") or is_available("gloo"))

    @pytest.mark.parametrize("name", ["mpi", "", None, 3])
    def test_an_unknown_name(self, name: object) -> None:
        known = "gloo, hierarchical, loopback, nccl, shm"
        with pytest.raises(OptionError, match=rf"^backend: .*{known}, .*{name!r}"):
            get_backend(name)
        assert repr(name) in str(reason(name))
        assert not is_available(name)

    def test_registering(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Spec:
            def available(self) -> str | None:
                return "wants a licence"

            def create(self, control: Any, meeting: Any, **options: Any) -> Any:
                raise AssertionError("no group is made of it")

        monkeypatch.setattr(backends, "_registered", {})
        spec = Spec()
        register_backend("pigeon", spec)
        assert get_backend("pigeon") is spec
        assert reason("pigeon") == "wants a licence"
        assert not is_available("pigeon")
        assert backends.backend_names() == [
            "gloo",
            "hierarchical",
            "loopback",
            "nccl",
            "pigeon",
            "shm",
        ]

    def test_what_lacks_an_attribute_makes_no_group(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """It ended in an AttributeError, and the group's listener stayed."""

        class Spec:
            def available(self) -> str | None:
                return None

            def create(self, control: Any, meeting: Any, **options: Any) -> Any:
                return types.SimpleNamespace(
                    name="pigeon", device_types=frozenset({"cpu"}), allreduce=1
                )

        monkeypatch.setattr(backends, "_registered", {})
        register_backend("pigeon", Spec())
        before = threading.active_count()
        with pytest.raises(
            OptionError,
            match=r"backend 'pigeon': .* takes_strided.*, needs_agreement.*allreduce\(\)",
        ):
            col.init_collective_group(1, 0, "pigeon", init_method=f"file://{tmp_path}/x")
        assert threading.active_count() == before
        assert not col.is_group_initialized()

    @pytest.mark.parametrize("name", ["", "auto", None])
    def test_registering_under_no_name(self, name: object) -> None:
        with pytest.raises(OptionError, match=rf"register_backend: name .*{name!r}"):
            register_backend(name, get_backend("loopback"))

    def test_registering_something_else(self) -> None:
        with pytest.raises(OptionError, match=r"'pigeon'.* available\(\) .*create\(\)"):
            register_backend("pigeon", object())  # type: ignore[arg-type]

    def test_looking_imports_no_framework(self) -> None:
        program = (
            "import sys, colltensor.backends as b; b.is_available('gloo'); b.get_backend('loopback'); "
            "loaded = {'torch', 'pygloo', 'numpy', 'jax', 'ray', 'ml_dtypes'} & set(sys.modules); "
            "assert not loaded - {'numpy'}, loaded"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


class TestRequire:
    @pytest.mark.parametrize(
        "operation", ["broadcast", "allgather", "gather", "scatter", "alltoall", "send", "recv"]
    )
    def test_moves_take_every_dtype(self, operation: str) -> None:
        for dtype in DTYPES.values():
            rules.require(operation, dtype, None)

    @pytest.mark.parametrize("op", ReduceOp)
    @pytest.mark.parametrize("name", DTYPES)
    def test_reductions(self, name: str, op: ReduceOp) -> None:
        kind = "moves" if name.startswith("float8") else DTYPES[name].kind
        bitwise, average = op.name in ("BAND", "BOR", "BXOR"), op.name == "AVERAGE"
        defined = {
            "moves": False,
            "b": not average,
            "i": not average,
            "u": not average,
            "f": not bitwise,
            "c": op.name in ("SUM", "AVERAGE"),
        }[kind]
        for operation in REDUCTIONS:
            if defined:
                rules.require(operation, DTYPES[name], op)
                continue
            with pytest.raises(
                UnsupportedDTypeError, match=rf"^{operation} .*op={op.name} .*\b{name}\b"
            ):
                rules.require(operation, DTYPES[name], op)

    def test_a_reduction_without_op(self) -> None:
        with pytest.raises(OptionError, match=r"^allreduce .*SUM, .*\bNone\b"):
            rules.require("allreduce", DTYPES["float32"], None)


class TestLoopback:
    backend = LoopbackBackend()

    def test_reductions_are_the_identity(self) -> None:
        array = np.arange(5.0)
        for op in ReduceOp:
            self.backend.allreduce([seen(array)], op, LATER)
            self.backend.reduce([seen(array)], 0, op, LATER)
        self.backend.broadcast([seen(array)], 0, LATER)
        self.backend.barrier(LATER)
        assert array.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]

    def test_moves_are_copies(self) -> None:
        source = np.arange(6, dtype=np.int16)
        calls = [
            lambda target: self.backend.allgather([seen(target)], seen(source), LATER),
            lambda target: self.backend.gather([seen(target)], seen(source), 0, LATER),
            lambda target: self.backend.scatter(seen(target), [seen(source)], 0, LATER),
            lambda target: self.backend.reducescatter(seen(target), [seen(source)], SUM, LATER),
            lambda target: self.backend.alltoall([seen(target)], [seen(source)], LATER),
            lambda target: self.backend.sendrecv(seen(source), 0, seen(target), 0, LATER),
        ]
        for call in calls:
            target = np.zeros(6, np.int16)
            call(target)
            np.testing.assert_array_equal(target, source)

    @pytest.mark.parametrize("name", ["uint8", "int16", "float32", "complex64", "complex128"])
    def test_strided_copies_match_in_row_major_order(self, name: str) -> None:
        source = np.arange(24).reshape(2, 3, 4).astype(name)
        for given in (
            source,
            source[::-1, :, ::-1],
            source.transpose(2, 0, 1),
            np.asfortranarray(source),
        ):
            memory = np.full((8, 8), 9, name)
            target = memory[1:7, ::-2]
            self.backend.allgather([seen(target)], seen(given), LATER)
            np.testing.assert_array_equal(target.reshape(-1), given.reshape(-1))
            assert (memory[:, 0::2] == 9).all(), "memory between the elements was written"
            back = np.zeros(24, name)
            self.backend.allgather([seen(back)], seen(target), LATER)
            np.testing.assert_array_equal(back, given.reshape(-1))

    def test_nothing_and_itself(self) -> None:
        empty, array = np.zeros((0, 3)), np.arange(4.0)
        self.backend.allgather([seen(empty)], seen(empty), LATER)
        self.backend.allgather([seen(array)], seen(array), LATER)
        assert array.tolist() == [0.0, 1.0, 2.0, 3.0]

    def test_there_is_no_peer(self) -> None:
        with pytest.raises(RankError, match="send: rank 1"):
            self.backend.send([], 1, LATER)
        with pytest.raises(RankError, match="recv: rank 1"):
            self.backend.recv([], 1, LATER)

    def test_a_device_that_no_loaded_framework_reaches(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for framework in ("torch", "cupy"):
            monkeypatch.delitem(sys.modules, framework, raising=False)
        far = Device("cuda", 0)
        views = [
            BufferView.from_address(place, (1,), DTYPES["int8"], device=far, owner=None)
            for place in (64, 128)
        ]
        with pytest.raises(DeviceError, match=r"\btorch\b.*\bcupy\b"):
            self.backend.allgather([views[0]], views[1], LATER)

    def test_more_ranks_are_refused(self) -> None:
        options = {"timeout_s": 1.0, "interface": None, "provider": None}
        assert get_backend("loopback").create(None, None, **options).name == "loopback"  # type: ignore[arg-type]
        control = Lonely()
        control.world_size = 2  # type: ignore[misc]
        with pytest.raises(OptionError, match=r"'loopback' .*\b2; .*'auto'"):
            get_backend("loopback").create(control, control, **options)  # type: ignore[arg-type]


class Paired(col.BackendBase):
    """A rank of a backend that has but ``send`` and ``recv``, which meet: neither returns before the other came."""

    name = "paired"

    def __init__(self, rank: int, size: int, pipes: dict[tuple[int, int], Any]) -> None:
        self.control = types.SimpleNamespace(rank=rank, world_size=size)
        self._pipes = pipes

    def send(self, buffers: Any, peer: int, deadline: float) -> None:
        there, taken = self._pipes[self.control.rank, peer]
        for view in buffers:
            there.put(bytes(view.memory()))
            taken.get(timeout=10)

    def recv(self, buffers: Any, peer: int, deadline: float) -> None:
        there, taken = self._pipes[peer, self.control.rank]
        for view in buffers:
            view.memory()[:] = there.get(timeout=10)
            taken.put(None)


class TestPairwise:
    """The collectives that a backend of ``send`` and ``recv`` gets from ``BackendBase``."""

    @staticmethod
    def of_all(size: int, call: Any) -> list[Any]:
        """Return what ``call(backend, rank)`` gives in each of so many ranks, which are threads."""
        pairs = itertools.permutations(range(size), 2)
        pipes = {pair: (queue.SimpleQueue(), queue.SimpleQueue()) for pair in pairs}
        with ThreadPoolExecutor(size) as ranks:
            return list(ranks.map(lambda rank: call(Paired(rank, size, pipes), rank), range(size)))

    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    def test_moves(self, size: int) -> None:
        def call(backend: Any, rank: int) -> Any:
            blocks, other = np.arange(2.0 * size) + 100 * rank, np.zeros((4, size, 2))
            rows = [[seen(row) for row in rows] for rows in other]
            mine = [seen(block) for block in blocks.reshape(size, 2)]
            backend.allgather(rows[0], mine[0], LATER)
            backend.alltoall(rows[1], mine, LATER)
            for root in range(size):
                at_root = root == rank
                backend.gather(rows[2] if at_root else None, mine[1 % size], root, LATER)
                target = np.zeros(2)
                backend.scatter(seen(target), mine if at_root else None, root, LATER)
                assert target.tolist() == [2.0 * rank + 100 * root, 2.0 * rank + 100 * root + 1]
                target[:] = rank
                backend.broadcast([seen(target), seen(np.zeros(0))], root, LATER)
                assert target.tolist() == [root, root]
            for step in range(size):
                backend.sendrecv(
                    mine[0], (rank + step) % size, rows[3][0], (rank - step) % size, LATER
                )
                assert other[3, 0, 0] == 100 * ((rank - step) % size)
            alone = np.full((size, 1), float(rank))
            views = [seen(row) for row in alone]
            backend.allgather(views, views[rank], LATER)
            assert alone.ravel().tolist() == list(range(size))
            return other

        for rank, (gathered, exchanged, at_root, _) in enumerate(self.of_all(size, call)):
            for peer in range(size):
                assert gathered[peer].tolist() == [100 * peer, 100 * peer + 1]
                assert exchanged[peer].tolist() == [
                    100 * peer + 2 * rank,
                    100 * peer + 2 * rank + 1,
                ]
                assert at_root[peer, 0] == 100 * peer + 2 * (1 % size)

    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    @pytest.mark.parametrize("name", [name for name in DTYPES if not DTYPES[name].moves_only])
    def test_reductions(self, name: str, size: int) -> None:
        dtype, count = DTYPES[name], 3
        raw = np.random.default_rng(0).integers(0, 2, (size, size * count * dtype.itemsize))
        inputs = raw.astype(np.uint8)
        ops = [op for dtype_, op in rules._PAIRS if dtype_ is dtype]

        def views(array: Any) -> list[BufferView]:
            return BufferView.from_buffer(memoryview(array)).cast(dtype).blocks(size)

        def call(backend: Any, rank: int) -> None:
            for op in ops:
                wanted = [np.zeros(count * dtype.itemsize, np.uint8) for _ in range(size)]
                for part, into in enumerate(wanted):
                    places = [views(row)[part].pointer for row in inputs]
                    arithmetic.combine(into.ctypes.data, places, count, dtype, op)
                found = inputs[rank].copy()
                backend.allreduce(views(found), op, LATER)
                assert found.tobytes() == b"".join(part.tobytes() for part in wanted)
                found = inputs[rank].copy()
                backend.reduce(views(found), size - 1, op, LATER)
                assert (found == inputs[rank]).all() or rank == size - 1
                assert rank < size - 1 or found.tobytes() == b"".join(
                    part.tobytes() for part in wanted
                )
                found, target = inputs[rank].copy(), np.zeros(count * dtype.itemsize, np.uint8)
                into = BufferView.from_buffer(memoryview(target)).cast(dtype)
                backend.reducescatter(into, views(found), op, LATER)
                assert target.tobytes() == wanted[rank].tobytes()
                assert (found == inputs[rank]).all()

        self.of_all(size, call)

    def test_what_lacks_its_control_plane_is_no_backend(self) -> None:
        backend = Paired(0, 1, {})
        assert backends.check_backend("paired", backend) is backend
        del backend.control
        with pytest.raises(OptionError, match="without control"):
            backends.check_backend("paired", backend)


class TestArithmetic:
    @pytest.mark.parametrize("ranks", [1, 2, 3, 5])
    @pytest.mark.parametrize("count", [1, 5, arithmetic.CHUNK + 3])
    def test_left_to_right_into_any_place(self, ranks: int, count: int) -> None:
        generator = np.random.default_rng(ranks)
        for where in range(ranks + 1):
            inputs = [generator.standard_normal(count).astype(np.float32) for _ in range(ranks)]
            wanted = inputs[0].copy()
            for array in inputs[1:]:
                wanted += array
            target = np.zeros(count, np.float32) if where == ranks else inputs[where]
            kept = [array.copy() for array in inputs]
            places = [array.ctypes.data for array in inputs]
            arithmetic.combine(target.ctypes.data, places, count, DTYPES["float32"], SUM)
            np.testing.assert_array_equal(target, wanted)
            for index, (array, before) in enumerate(zip(inputs, kept, strict=True)):
                assert index == where or (array == before).all()

    @pytest.mark.parametrize("name", ["float16", "bfloat16"])
    def test_every_16_bit_float_survives(self, name: str) -> None:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        kind = np.float16 if name == "float16" else ml_dtypes.bfloat16
        bits = np.arange(1 << 16, dtype=np.uint16)
        other = np.random.default_rng(1).permutation(bits)
        for op, function in (
            (SUM, np.add),
            (ReduceOp.PRODUCT, np.multiply),
            (ReduceOp.MIN, np.minimum),
        ):
            out = np.zeros_like(bits)
            arithmetic.combine(
                out.ctypes.data, [bits.ctypes.data, other.ctypes.data], len(bits), DTYPES[name], op
            )
            with np.errstate(all="ignore"):
                wanted = function(
                    bits.view(kind).astype(np.float32), other.view(kind).astype(np.float32)
                ).astype(kind)
            np.testing.assert_array_equal(
                out.view(kind).astype(np.float32), wanted.astype(np.float32)
            )
            numbers = ~np.isnan(wanted.astype(np.float32))
            np.testing.assert_array_equal(out[numbers], wanted.view(np.uint16)[numbers])

    def test_warns_of_nothing(self, recwarn: pytest.WarningsRecorder) -> None:
        array = np.array([np.inf, np.nan, 3e38], np.float32)
        other, dtype = -array, DTYPES["float32"]
        arithmetic.combine(
            array.ctypes.data, [array.ctypes.data, other.ctypes.data], 3, dtype, ReduceOp.AVERAGE
        )
        arithmetic.divide(array.ctypes.data, 3, dtype, 2)
        assert not recwarn.list


class TestGlooParts:
    def test_pairs_of_a_provider_with_bitwise_operations(self) -> None:
        pairs = provider.native_pairs(
            ("int8", "uint8", "int32", "int64", "float32", "float64"), bitwise=True
        )
        named = {
            (dtype.name, op.name): (transport.name, native.name)
            for (dtype, op), (transport, native) in pairs.items()
        }
        assert named["uint32", "SUM"] == ("int32", "SUM")
        assert named["uint16", "BXOR"] == ("uint8", "BXOR")
        assert named["bool", "SUM"] == ("uint8", "MAX")
        assert named["bool", "PRODUCT"] == ("uint8", "MIN")
        assert named["complex128", "AVERAGE"] == ("float64", "SUM")
        for missing in (
            ("uint32", "MAX"),
            ("int16", "SUM"),
            ("float32", "MAX"),
            ("float64", "MIN"),
            ("float16", "SUM"),
            ("bfloat16", "AVERAGE"),
            ("complex64", "PRODUCT"),
            ("int32", "AVERAGE"),
            ("float32", "BAND"),
        ):
            assert missing not in named
        assert set(pairs) <= rules._PAIRS

    @pytest.mark.parametrize("size", range(2, 10))
    def test_no_order_of_a_tournament_waits_in_a_circle(self, size: int) -> None:
        transfers = [(source, to) for source in range(size) for to in range(size) if source != to]
        order = sorted(transfers, key=lambda pair: provider.turn(*pair, size))
        assert len({provider.turn(*pair, size) for pair in transfers}) == 2 * (size - 1 + size % 2)
        for _, together in itertools.groupby(order, key=lambda pair: provider.turn(*pair, size)):
            busy = list(itertools.chain(*together))
            assert len(busy) == len(set(busy)), "a rank has two transfers at the same turn"

    def test_listeners_are_read_from_what_gloo_publishes(self) -> None:
        four = struct.pack(
            "<HH4s", socket.AF_INET, socket.htons(40001), socket.inet_aton("10.1.2.3")
        ) + os.urandom(120)
        address = socket.inet_pton(socket.AF_INET6, "fd00::7")
        six = struct.pack("<HHI16s", socket.AF_INET6, socket.htons(40002), 0, address) + bytes(104)
        published = [struct.pack("<Q2sQ", 2, b"vm", 136) + part + bytes(8) for part in (four, six)]
        assert sockets.listeners(published) == {("10.1.2.3", 40001), ("fd00::7", 40002)}

    def test_only_connections_of_the_listeners_are_shut(self) -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as gloo,
            socket.create_server(("127.0.0.1", 0)) as other,
        ):
            pairs = []
            for server in (gloo, other):
                dialled = socket.create_connection(server.getsockname())
                pairs.append((dialled, server.accept()[0]))
            descriptors = len(os.listdir("/proc/self/fd"))
            assert sockets.shut_connections(frozenset({gloo.getsockname()})) == 2
            assert len(os.listdir("/proc/self/fd")) == descriptors
            assert pairs[0][0].recv(1) == b""
            pairs[1][0].sendall(b"x")
            assert pairs[1][1].recv(1) == b"x"
            again = socket.create_connection(gloo.getsockname())
            for end in (again, *pairs[0], *pairs[1]):
                end.close()

    def test_socket_threads_are_found_and_calmed(self) -> None:
        leave = threading.Event()

        def make() -> threading.Thread:
            thread = threading.Thread(target=leave.wait)
            thread.start()
            return thread

        bystander = make()
        thread, threads = scheduling.SocketThreads.started_by(make)
        try:
            assert threads._threads == [thread.native_id]
            assert os.sched_getscheduler(0) == os.SCHED_OTHER
            for nbytes, policy in (
                (1024, os.SCHED_BATCH),
                (1 << 20, os.SCHED_OTHER),
                (0, os.SCHED_BATCH),
            ):
                threads.prepare(nbytes)
                assert os.sched_getscheduler(thread.native_id or -1) == policy
                assert os.sched_getscheduler(bystander.native_id or -1) == os.SCHED_OTHER
        finally:
            leave.set()
            thread.join()
            bystander.join()
        threads.prepare(1 << 20)

    def test_keys_are_those_of_all_ranks(self) -> None:
        class Two(Lonely):
            def allgather(self, payload: bytes, deadline: float) -> list[bytes]:
                return [payload, struct.pack("<I", 3) + b"0/1" + b"there"]

        keys = provider.KeyExchange(Two(), LATER)
        keys.set("0/0", b"here")
        assert (keys.get("0/0"), keys.get("0/1")) == (b"here", b"there")
        with pytest.raises(RuntimeError, match="'0/2'"):
            keys.get("0/2")

    def test_gloo_needs_a_provider(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("colltensor.backends.gloo._packages", dict)
        monkeypatch.setattr("colltensor.backends.gloo.library._loaded", [])
        monkeypatch.setattr(
            "colltensor.backends.gloo.library.path", lambda: Path("/nowhere/libcolltensor_gloo.so")
        )
        assert "libgloo-dev" in str(GlooSpec().available())
        assert "pip install" in str(GlooSpec().available())
        assert reason("gloo") is not None
        with pytest.raises(
            BackendUnavailableError, match=r"\bnative .* 0 \(/nowhere/libcoll.*\btorch\b"
        ):
            GlooSpec().create(Lonely(), Lonely(), timeout_s=1.0, interface=None, provider=None)

    def test_gloo_needs_a_control_plane(self) -> None:
        with pytest.raises(GroupError, match="loopback"):
            GlooSpec().create(None, None, timeout_s=1.0, interface=None, provider=None)

    @pytest.mark.gloo
    def test_one_rank_on_its_own(self, provider: str) -> None:
        backend = GlooSpec().create(
            Lonely(), Lonely(), timeout_s=5.0, interface=None, provider=provider
        )
        array, target = np.arange(3.0), np.zeros(3)
        deadline = time.monotonic() + 5
        backend.allreduce([seen(array)], ReduceOp.AVERAGE, deadline)
        backend.allgather([seen(target)], seen(array), deadline)
        backend.barrier(deadline)
        backend.close()
        backend.close()
        assert array.tolist() == target.tolist() == [0.0, 1.0, 2.0]

"""What tests on a device share: the ranks' group; a long kernel, the current stream and events on it, by library."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

from pool import group_of

COUNT = 1 << 20
PLATFORM, BACKEND = "gpu", "nccl"
"""What JAX calls the device, and who carries its arrays; a program without a GPU puts others in their place."""
PATIENCE_S = 60.0
"""The timeout of groups that are not to fail: a rank may be new, and import, load and compile while the others wait."""

_SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - start < nanoseconds);
}
"""


def shared_group(world_size: int, backend: str | None = None) -> Any:
    """Return the group of ranks 0 to ``world_size - 1`` that tests share; see ``group_of``."""
    return group_of(world_size, backend or BACKEND, timeout_s=PATIENCE_S)


def warm_up(rank: int, world_size: int, libraries: tuple[str, ...]) -> None:
    """Load what takes long to load: libraries, kernels, XLA."""
    for name in libraries:
        if name == "jax":
            jax = importlib.import_module("jax")
            jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64))).block_until_ready()
        else:
            with Queue(name) as queue:
                queue.sleep(0.0)


@functools.lru_cache(maxsize=1)
def _spin() -> Any:
    kernel = importlib.import_module("cupy").RawKernel(_SPIN, "spin")
    kernel.compile()
    return kernel


class Queue:
    """A library's new stream, which is current in the ``with`` block, and what is queued on it."""

    def __init__(self, library: str) -> None:
        self.library = library
        self._module = importlib.import_module(library)
        self._cupy = importlib.import_module("cupy")
        self._stack = contextlib.ExitStack()
        self.pointer = 0
        _spin()

    def __enter__(self) -> Queue:
        cuda = self._module.cuda
        if self.library == "torch":
            stream = cuda.Stream(0)
            self._stack.enter_context(cuda.stream(stream))
            self.pointer = stream.cuda_stream
        else:
            stream = cuda.Stream(non_blocking=True)
            self._stack.enter_context(stream)
            self.pointer = stream.ptr
        self.stream = stream
        # What is compiled when it is first used would otherwise take longer than the kernels that tests wait for.
        tensor = self.full(1.0)
        tensor += 2.0
        tensor *= 2.0
        self.read(tensor)
        return self

    def current(self) -> Any:
        """Make the stream the current one in a ``with`` block inside another queue's."""
        return self._module.cuda.stream(self.stream) if self.library == "torch" else self.stream

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def full(self, value: float, count: int = COUNT) -> Any:
        """Return a tensor that has its values once the stream comes to it."""
        if self.library == "torch":
            return self._module.full((count,), value, dtype=self._module.float32, device="cuda:0")
        return self._module.full(count, value, self._module.float32)

    def sleep(self, seconds: float) -> None:
        """Queue a kernel that takes so long."""
        if self.library == "torch":
            external = importlib.import_module("colltensor.adapters.cupy")._stream(self.pointer, 0)
            with external:
                _spin()((1,), (1,), (int(seconds * 1e9),))
        else:
            _spin()((1,), (1,), (int(seconds * 1e9),))

    def mark(self) -> Any:
        """Return an event behind all that is queued now; it has ``query`` or ``done``."""
        if self.library == "torch":
            return self.stream.record_event()
        return self.stream.record()

    def passed(self, event: Any) -> bool:
        """Return whether the stream has come past an event; does not wait."""
        return bool(event.query() if self.library == "torch" else event.done)

    def read(self, tensor: Any) -> set[float]:
        """Read a tensor as the stream comes to it: copied there first, looked at afterwards."""
        copy = tensor.clone() if self.library == "torch" else tensor.copy()
        self.synchronize()
        return {float(copy[place]) for place in (0, len(copy) // 2, -1)} | {
            float(copy.min()),
            float(copy.max()),
        }

    def synchronize(self) -> None:
        """Wait, on the host, for the stream."""
        self.stream.synchronize()

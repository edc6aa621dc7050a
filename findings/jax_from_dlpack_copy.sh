#!/bin/sh
# jax.dlpack.from_dlpack(x, copy=True) shares memory with x on a CPU, and XLA may donate that memory.
#
# The documentation says "If copy=True then a copy is always performed". In 0.10.2 jaxlib takes the memory of an aligned
# exporter as XLA's own, so that a function the result is donated to writes to x. Without copy=True the memory is shared
# too, but XLA knows that it is borrowed, and copies when it is donated.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PROGRAM'
import jax
import numpy as np

add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
print("jax", jax.__version__)
found = {}
for copy in (None, True):
    raw = np.zeros(4096 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    source = raw[start : start + 4096].view(np.float32)
    array = jax.dlpack.from_dlpack(source, copy=copy)
    shared = array.unsafe_buffer_pointer() == source.ctypes.data
    add_one(array).block_until_ready()
    found[copy] = shared, float(source[0])
    print(f"copy={copy}: shares memory {shared}; the source's 0.0 after a donation of the array: {source[0]}")
assert found == {None: (True, 0.0), True: (True, 1.0)}, "the behaviour has changed"
PROGRAM

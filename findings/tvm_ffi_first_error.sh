#!/bin/sh
# The first Python exception of a process that leaves a callback through tvm_ffi takes 0.2 s to 1 s of the processor.
#
# apache-tvm-ffi 0.1.15 adds the trace of C++ to it, by libbacktrace, which reads the symbols of every library that the
# process has loaded, though nobody asks for the trace: the larger they are, here jaxlib, the longer. All later ones take
# microseconds. A callback that returns its error costs nothing.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet apache-tvm-ffi==0.1.15.post2 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PROGRAM'
import time

import jax.numpy
import tvm_ffi


def refuse(value):
    raise ValueError(f"no {value}")


print("tvm_ffi", tvm_ffi.__version__)
jax.numpy.ones(3).block_until_ready()
function = tvm_ffi.convert(refuse)
found = []
for which in ("first", "second", "third"):
    before = time.process_time()
    try:
        function(1)
    except ValueError:
        found.append(time.process_time() - before)
    print(f"{which} exception: {found[-1] * 1e3:.2f} ms of the processor")
assert found[0] > 0.1 and max(found[1:]) < 0.02, "the behaviour has changed"
PROGRAM

#!/bin/sh
# jax-tvm-ffi 0.1.3 asks for jax>=0.7.2 and installs beside it, and then JAX before 0.9.1 refuses its handlers.
#
# The wheel is built with the headers of a newer XLA, whose FFI is of version 0.3; jaxlib 0.9.0 has 0.2, and XLA refuses
# handlers that are newer than itself. pip cannot tell.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
for version in 0.9.0 0.9.1; do
  "$folder/venv/bin/pip" install --quiet jax==$version jaxlib==$version jax-tvm-ffi==0.1.3 apache-tvm-ffi==0.1.13.post2
  JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PROGRAM'
import re
from importlib import metadata

import jax
import jax_tvm_ffi
import tvm_ffi

print("jax", jax.__version__, "; jax-tvm-ffi", metadata.version("jax-tvm-ffi"), "asks for",
      [line for line in metadata.requires("jax-tvm-ffi") if re.match("jax[^-a-z]", line)])
jax.devices()  # the client, which handlers are registered with
try:
    jax_tvm_ffi.register_ffi_target("nothing", tvm_ffi.convert(lambda *_: None), platform="cpu")
    said = "taken"
except Exception as error:
    said = re.search(r"handler's API version \([0-9.]+\) is incompatible with the framework's[^.]*\([0-9.]+\)", str(error))[0]
print(said)
expected = {
    "0.9.0": "handler's API version (0.3) is incompatible with the framework's API version (0.2)", "0.9.1": "taken",
}
assert said == expected[jax.__version__], "the behaviour has changed"
PROGRAM
done

#!/bin/sh
# A TensorFlow eager tensor, immutable by contract, exports its memory through DLPack as if it might be written.
#
# numpy.from_dlpack shows such memory read-only, but only because the export is of the unversioned kind, to which it gives
# nobody write access; a consumer of DLPack's unversioned kind is told nothing. What it holds may be a constant of the
# process: equal scalars are one tensor. tf.Variable.read_value() shares its memory with the variable as well.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorflow-cpu==2.21.0 numpy==2.4.6
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - <<'PROGRAM'
import ctypes

import numpy as np
import tensorflow as tf

name = ctypes.pythonapi.PyCapsule_GetName
name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]


def address(tensor):
    return np.from_dlpack(tensor).ctypes.data


variable = tf.Variable([1.0, 2.0])
found = {
    "the capsule for max_version=(1, 0)": name(tf.constant([1.0]).__dlpack__(max_version=(1, 0))).decode(),
    "two constants 1.0 share memory": address(tf.constant(1.0)) == address(tf.constant(1.0)),
    "two values of a variable share memory": address(variable.read_value()) == address(variable.read_value()),
    "numpy calls it writable": bool(np.from_dlpack(tf.constant([1.0])).flags.writeable),
}
print("tensorflow", tf.__version__)
for what, value in found.items():
    print(f"{what}: {value}")
assert list(found.values()) == ["dltensor", True, True, False], "the behaviour has changed"
PROGRAM

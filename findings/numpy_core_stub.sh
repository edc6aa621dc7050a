#!/bin/sh
# NumPy 1.26.4 has a package `numpy._core` without the C extension that numpy 2 keeps there, and unpickling imports it.
#
# It is there so that arrays pickled by numpy 2 can be read. `np._core` does not exist until the first of them has been
# read, and from then on hides that the extension is `numpy.core._multiarray_umath`: code that tries `np._core` first
# works or fails by what the process has unpickled.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/two"
python3 -m venv "$folder/one"
"$folder/two/bin/pip" install --quiet numpy==2.2.6
"$folder/one/bin/pip" install --quiet numpy==1.26.4
"$folder/two/bin/python" -c "
import pickle, sys, numpy as np
pickle.dump(np.arange(3.0), open(sys.argv[1], 'wb'))" "$folder/array.pickle"
"$folder/one/bin/python" - "$folder/array.pickle" <<'PROGRAM'
import pickle
import sys

import numpy as np

before = hasattr(np, "_core")
array = pickle.load(open(sys.argv[1], "rb"))
after = hasattr(np, "_core")
extension = hasattr(np._core, "_multiarray_umath"), hasattr(np.core, "_multiarray_umath")
print("numpy", np.__version__, "; read", array.tolist())
print("np._core there before:", before, "; after:", after)
print("extension in np._core:", extension[0], "; in np.core:", extension[1])
assert (array.tolist(), before, after, extension) == ([0.0, 1.0, 2.0], False, True, (False, True)), "it has changed"
PROGRAM

"""What the package uses of torch's compiler that has no public name; loads neither.

Tested with torch 2.6 to 2.13.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any


def frame_evaluation(torch: ModuleType) -> Any:
    """Return Dynamo's hold on the interpreter without loading it; None if it is elsewhere."""
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    return frames if hasattr(frames, "set_code_exec_strategy") else None


def skip_strategy(frames: Any) -> Any:
    """Return the strategy that leaves a code object, and what it calls, alone."""
    return frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)

"""The engine: runs the calls of one group in order.

Agreement comes first, then the payload, then the verdict.

call        one checked call, as an object
agreement   how the ranks of a call agree: a class a mode
failure     what breaks a group, and what its calls raise then
device      calls that are queued on a device
engine      the order of the calls, and how one is run
"""

from colltensor.engine.agreement import verdict
from colltensor.engine.call import Call, Refusal, Transfer
from colltensor.engine.engine import Engine

__all__ = ["Call", "Engine", "Refusal", "Transfer", "verdict"]

"""torch.distributed on our transports: ``dist.init_process_group("cpu:colltensor")`` after ``import colltensor.torch``.

registration    tells torch of the backend
process_group   the ProcessGroup: all collectives, on one Group
identity        what torch asks the group about itself
transfers       send and recv by tag, on a Group for each direction of a pair
header          what goes before a message, and a short message
sparse          the allreduce of sparse tensors
line, work      the order of operations; their handles and futures
meeting         how ranks meet through a c10d store
"""

"""torch.distributed on our transports: ``dist.init_process_group("cpu:colltensor")`` after ``import colltensor.torch``.

registration    tells torch of the backend
process_group   the ProcessGroup: all collectives, on one Group
identity        what torch asks the group about itself
payloads        what is more than one call of a Group: integer averages, sparse tensors
tensors         tensors and options as torch gives them
transfers       send and recv by tag, on a Group for each direction of a pair
inbox           the receives of one rank, and messages that came before them
standoffs       ranks that wait for each other in sends or receives
queue, work     the order of operations; their handles, futures and deadlines
delegated       the backends of other devices of the same group
meeting         how ranks meet through a c10d store
"""

"""What every subject of the benchmarks is measured with.

``world`` starts ranks and drives them, ``rank`` is the process of one, ``rounds`` measures contestants in turns,
``report`` prints what was found and writes it down, ``plots`` draws it; ``places`` has arrays that begin where one
wants, ``namespaces`` hosts, ``libraries`` other libraries. ``__main__`` of the folder above is the command.
"""

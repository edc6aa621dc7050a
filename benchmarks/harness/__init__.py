"""What every subject of the benchmarks is measured with.

A subject is a module with a dict ``OPTIONS`` (see ``run.parse``) and a function ``measure(run)``,
which may return the exit status. Mostly it has a class ``Ranks`` as well, a ``rank.Timed``, whose
``loop`` returns the loop of an operation. Where its methods have no docstrings, the modules here
say what they are.

``world`` starts ranks and drives them, ``rank`` is the process of one, ``rounds`` measures
contestants in turns, and ``run`` has the command line and prints what was found. ``plots`` draws
it, ``namespaces`` makes hosts, and ``libraries`` has other libraries.
"""

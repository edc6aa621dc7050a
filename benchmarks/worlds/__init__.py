"""Worlds: sets of processes, one set a library, that stay alive and take turns in one measurement.

``libraries`` says what each operation calls in each library, ``rank`` is the process of one rank, ``world`` starts
the processes and drives them, ``rounds`` measures contestants in turns, ``report`` and ``targets`` print.
"""

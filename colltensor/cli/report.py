"""The doctor's findings on the screen, by rich: in 80 columns where nobody says how wide it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

Facts = dict[str, Any]

_MARKS: Final = {True: ("yes", "green"), False: ("no", "dim"), None: ("BAD", "bold red")}
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a text meanwhile, where standard error is a terminal.

    No thread does so, because one must not fork beside a thread.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield
        return
    console.print(f"{text} ...", end="\r")
    try:
        yield
    finally:
        console.print(" " * (len(text) + 4), end="\r")


def show(facts: Facts) -> None:
    """Print what the doctor found."""
    console = Console(highlight=False)
    _section(console, "Versions", _versions(facts))
    _section(console, "Machine", _machine(facts))
    _section(console, "Backends", [_backend(*item) for item in facts["backends"].items()])
    _section(console, "Arrays", [_adapter(*item) for item in facts["adapters"].items()])
    _section(console, "Environment", _environment(facts))
    console.print()
    for warning in facts["warnings"]:
        console.print(Text(f"note: {warning}", "yellow"))
    for problem in facts["problems"]:
        console.print(Text(f"problem: {problem}", "bold red"))
    if facts["ok"]:
        console.print(Text("All that should work here works.", "bold green"))


def _section(console: Console, title: str, rows: Iterable[tuple[Any, Any, str]]) -> None:
    """Print a heading, and below it rows of a mark, a name and what there is to say."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=3)
    table.add_column(width=14)
    table.add_column(overflow="fold")
    for mark, name, text in rows:
        table.add_row(Text(*_MARKS[mark]) if mark != "" else "", Text(str(name)), Text(text))
    console.print()
    console.print(Text(title, "bold"))
    console.print(table)


def _versions(facts: Facts) -> Iterable[tuple[Any, str, str]]:
    for name, number in facts["versions"].items():
        yield "", name, number
    library = facts["library"]
    yield "", "library", library.get("why") or f"{library['path']} ({library['instructions']})"
    system = facts["system"]
    yield "", "system", f"{system['system']}, {system['machine']}, {system['python']}"


def _machine(facts: Facts) -> Iterable[tuple[Any, str, str]]:
    processors, memory = facts["processors"], facts["memory"]
    granted = processors["quota"]
    cores = f"{len(processors['cores'])} ({_ranges(processors['cores'])})"
    cores += f", of which control groups grant {granted:g}" if granted is not None else ""
    yield "", "cores", cores + (f", {processors['model']}" if processors["model"] else "")

    caches = [
        f"L{cache['level']}{cache['type'][0].lower() if cache['level'] == '1' else ''} {cache['size']} "
        f"(cores {cache['shared_cpu_list']})"
        for cache in processors["caches"]
    ]
    yield "", "caches", ", ".join(caches) or "not known"

    for pair in (facts["backends"]["shm"].get("selftest") or {}).get("latency_us", []):
        first, second = pair["cores"]
        yield (
            "",
            "latency",
            f"cores {first} and {second}: {pair['us']} us for an allreduce of 8 bytes",
        )

    limit = memory["control_group_nbytes"]
    text = f"{_gib(memory['available_nbytes'])} available"
    text += f", {_gib(limit)} of it granted by control groups" if limit is not None else ""
    sizes = [
        f"{nbytes // _MIB} MiB for {size} ranks"
        for size, nbytes in memory["segment_nbytes"].items()
    ]
    yield "", "memory", text + (f"; a group takes {', '.join(sizes)}" if sizes else "")

    permissions = facts["permissions"]
    scope = permissions["ptrace_scope"] or "not set"
    yield (
        "",
        "permissions",
        f"seccomp {permissions['seccomp'] or 'not known'}, ptrace_scope {scope}",
    )

    interfaces = facts["interfaces"]
    listing = ", ".join(f"{each['name']} {each['address']}" for each in interfaces["found"])
    yield "", "interfaces", listing or "none"
    yield "", "chosen", f"{interfaces['chosen']}: {interfaces['why']} (within a host: the loopback)"


def _backend(name: str, facts: Facts) -> tuple[Any, str, str]:
    trial = facts.get("selftest")
    if trial is None:
        return False, name, facts["why"]
    if not trial["works"]:
        return None, name, trial["why"]
    ranks = f"{trial['ranks']} rank{'s' if trial['ranks'] > 1 else ''}"
    return True, name, f"{ranks}, right values; {trial['why']}"


def _adapter(name: str, facts: Facts) -> tuple[Any, str, str]:
    if not facts["installed"]:
        return False, name, facts["why"]
    return (True, name, facts["version"] or "") if facts["works"] else (None, name, facts["why"])


def _environment(facts: Facts) -> Iterable[tuple[Any, str, str]]:
    ray = facts["ray"]
    found = f"{ray['address']} (from {ray['from']})"
    yield "", "Ray", found if ray["address"] else "no cluster is known here"
    variables = facts["variables"]
    for name, value in variables["set"].items():
        yield "", "set", f"{name}={value}"
    for name in variables["unknown"]:
        yield "", "unknown", name
    if not variables["set"] and not variables["unknown"]:
        yield "", "variables", "no COLLTENSOR_... is set"


def _gib(nbytes: int | None) -> str:
    return "not known" if nbytes is None else f"{nbytes / _GIB:.1f} GiB"


def _ranges(numbers: list[int]) -> str:
    """Return numbers as the kernel lists processors: 0-3,8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)

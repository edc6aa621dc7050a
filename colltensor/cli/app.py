"""The sub-commands and their options, as typer declares them.

What they do stands in the module of each.
"""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from colltensor import __version__, environment
from colltensor.cli import bench as benchmarks
from colltensor.cli import doctor as examination
from colltensor.cli import launcher
from colltensor.cli import run as runner
from colltensor.cli.operations import OPERATIONS, sizes_between, sizes_of
from colltensor.rendezvous.secret import given_secret

APP: Final = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Collective communication for the arrays of every Python framework.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"colltensor {__version__}")
        raise typer.Exit


def colltensor(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Take the options of the command itself."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what works here, and why the rest does not.

    Two ranks try each backend. The exit status is 0 if all that should work does.
    """
    launcher.exit_on_sigterm()
    raise typer.Exit(examination.doctor(as_json=as_json))


def run(
    words: Annotated[
        list[str], typer.Argument(metavar="SCRIPT [ARGS]...", help="The program and its arguments.")
    ],
    ranks: Annotated[int, typer.Option("-n", min=1, help="Ranks on each host.")] = 2,
    module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is a module, as in python -m.")
    ] = False,
    prefix: Annotated[
        bool, typer.Option("--prefix/--no-prefix", help="Begin each line of output with its rank.")
    ] = True,
    hosts: Annotated[
        str, typer.Option(metavar="H1,H2", help="Only print the line to run on each of these.")
    ] = "",
    nnodes: Annotated[int, typer.Option(min=1, help="How many hosts there are.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of them this is.")] = 0,
    master: Annotated[
        str, typer.Option(metavar="HOST[:PORT]", help="Where rank 0 listens, with several hosts.")
    ] = "",
) -> None:
    """Run a Python program in several ranks, with torchrun's variables.

    In the program, init_collective_group() needs no arguments. The first rank
    that fails ends the others, and its exit status is the command's.
    """
    if hosts:
        names = [name.strip() for name in hosts.split(",") if name.strip()]
        flags = [*(() if prefix else ("--no-prefix",)), *(("-m",) if module else ())]
        typer.echo(runner.lines_for_hosts(names, ranks, runner.PORT, [*flags, *words]))
        return

    command = [sys.executable, *(("-m",) if module else ()), *words]
    if nnodes == 1:
        if master or node_rank:
            raise typer.BadParameter("--master and --node-rank go with --nnodes")
        with runner.local_place(ranks) as place:
            raise typer.Exit(runner.run(command, place, prefix=prefix))

    if not master or node_rank >= nnodes:
        raise typer.BadParameter(
            f"--nnodes {nnodes} needs --master and a --node-rank below {nnodes}"
        )
    if not given_secret():
        raise typer.BadParameter(
            f"set {environment.SECRET}, or {environment.SECRET_FILE}, to one long random text on all hosts: without it "
            "whoever reaches the port could take a rank's place"
        )

    place = _place(ranks, nnodes, node_rank, master)
    raise typer.Exit(runner.run(command, place, prefix=prefix))


def _place(ranks: int, hosts: int, host: int, master: str) -> runner.Place:
    address, colon, port = master.rpartition(":")
    if not colon or "]" in port:
        address, port = master, str(runner.PORT)
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise typer.BadParameter(f"--master: expected HOST or HOST:PORT, got {master!r}")
    return runner.Place(ranks, hosts, host, address.strip("[]"), int(port))


def bench(
    operation: Annotated[
        str, typer.Argument(metavar="OP", help=f"One of: {', '.join(OPERATIONS)}.")
    ],
    ranks: Annotated[int, typer.Option("-n", min=2, help="Ranks.")] = 2,
    sizes: Annotated[
        str, typer.Option(metavar="4,1K,1M", help="Sizes in bytes; K, M and G are powers of 1024.")
    ] = "",
    minimum: Annotated[
        str, typer.Option("--min", help="The smallest size, without --sizes.")
    ] = "8",
    maximum: Annotated[str, typer.Option("--max", help="The largest.")] = "16M",
    factor: Annotated[int, typer.Option(min=2, help="From one size to the next.")] = 8,
    dtypes: Annotated[str, typer.Option(help="As in float32,int64.")] = "float32",
    arrays: Annotated[str, typer.Option(help="Of numpy,torch,jax.")] = "numpy",
    backends: Annotated[str, typer.Option(help="As in shm,gloo; auto by default.")] = "auto",
    compare: Annotated[str, typer.Option(help="Of mpi,torch,ray,putget.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 5,
    plot: Annotated[
        str, typer.Option(metavar="OUT.png", help="Draw time and bandwidth, with matplotlib.")
    ] = "",
    in_ray: Annotated[
        bool, typer.Option("--ray", help="The ranks are actors in the Ray cluster of this host.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a collective between ranks of this host, and check what comes out.

    Bandwidths are those of nccl-tests. The exit status is not 0 if a result is wrong.
    """
    launcher.exit_on_sigterm()
    if operation not in OPERATIONS:
        known = ", ".join(OPERATIONS)
        raise typer.BadParameter(
            f"OP: expected one of {known}, got {operation!r}"
            f"{environment.did_you_mean(operation, OPERATIONS)}"
        )

    try:
        plan = benchmarks.Plan(
            operation=operation,
            ranks=ranks,
            sizes=sizes_of(sizes) if sizes else sizes_between(minimum, maximum, factor),
            dtypes=_words(dtypes),
            arrays=_words(arrays),
            backends=_words(backends),
            compare=_words(compare),
            rounds=rounds,
            in_ray=in_ray,
        )
        status = benchmarks.bench(plan, as_json=as_json, plot=plot)
    except benchmarks.BenchError as error:
        typer.echo(f"colltensor bench: {error}", err=True)
        status = 1
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    raise typer.Exit(status)


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


APP.callback()(colltensor)
APP.command(context_settings={"allow_interspersed_args": False})(run)
APP.command()(doctor)
APP.command()(bench)

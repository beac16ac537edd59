"""The command line: `dataplane COMMAND`. Each command is a function here that says what it does, and imports
what it needs when it runs, so that `dataplane --help` does not wait for numba.

Exit codes: 0; 1 when a dataplane ended by a fault (a netif failed, workers kept dying); 2 for what the user
can put right (arguments, configuration, an unknown dataplane: one line on stderr); 130 after Ctrl-C. `run`
takes Ctrl-C as its proper end: 0.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dataplane.errors import DataplaneError

app = typer.Typer(
    name="dataplane",
    help="A user-space receive-side network stack: packets from real interfaces into consumer processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback is for a bug report: plain, and without the locals' packets
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The name of a running dataplane.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file, see docs/configuration.md.")]


@app.command()
def check(config: ConfigFile) -> None:
    """Tell whether a configuration is right; else exit 2 and say where it is wrong and what was expected."""
    from dataplane import cli_load

    settings = cli_load.check(config)
    kinds = ", ".join(str(one.__struct_config__.tag) for one in settings.netif)
    cores = ", ".join(str(core) for core in settings.cores)
    typer.echo(f"ok {config}: dataplane {settings.name}, RX workers on cores {cores}, netifs: {kinds}")


@app.command()
def run(
    config: ConfigFile,
    duration: Annotated[float | None, typer.Option(metavar="S", min=0, help="End by itself then.")] = None,
    ledger: Annotated[Path | None, typer.Option(metavar="FILE", help="Final ledger, JSON.")] = None,
) -> None:
    """Run a dataplane in the foreground, until Ctrl-C or until all its netifs have come to their end."""
    from dataplane import cli_run

    raise typer.Exit(cli_run.run(config, duration, ledger))


@app.command()
def ss(
    name: Name,
    as_json: AsJson = False,
    tcp: Annotated[bool, typer.Option("--tcp", help="TCP connections only, with windows, times and losses.")] = False,
) -> None:
    """Show a dataplane's sockets: owner, addresses, what is queued and what was dropped."""
    from dataplane import cli_observe

    cli_observe.ss(name, as_json, tcp)


@app.command()
def stat(
    name: Name,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, with rates.")] = False,
) -> None:
    """Show a dataplane's ledger: every frame was delivered or is counted under one reason."""
    from dataplane import cli_observe

    cli_observe.stat(name, as_json, watch)


@app.command()
def clean(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this dataplane; else all.")] = None,
) -> None:
    """Remove what a killed dataplane has left; never anything of one that runs."""
    from dataplane import cli_clean

    cli_clean.clean(name)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="Check what it needs, too.")] = None,
) -> None:
    """Tell what this machine allows: capabilities, shared memory, cores, netifs."""
    from dataplane import cli_doctor

    cli_doctor.doctor(config)


@app.command()
def demo(
    duration: Annotated[float, typer.Option(metavar="S", min=0, help="End by itself then.")] = 10.0,
) -> None:
    """Show it: the quickstart's dataplane, four consumers, a live table; no root needed."""
    from dataplane import cli_demo

    raise typer.Exit(cli_demo.demo(duration))


def main() -> None:
    """Run the command line and exit."""
    try:
        app()
    except (DataplaneError, PermissionError) as error:
        print(f"dataplane: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before typer has taken over, or after
        sys.exit(130)


if __name__ == "__main__":
    main()

"""The command `run`: a dataplane in the foreground. Called by `dataplane.cli`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from dataplane.cli_load import load_any, too_large
from dataplane.cli_tables import ledger_view, width_for_pipes
from dataplane.errors import DataplaneError, SegmentSpaceError
from workers.supervisor import Supervisor


def run(config: Path, duration: float | None, ledger: Path | None) -> int:
    """Run until told to stop; the exit code. Errors at the start are raised, later ones are printed."""
    settings = load_any(config)
    if ledger is not None:
        _check_writable(ledger)
    started = False

    def ready() -> None:
        nonlocal started
        started = True
        print(f"ready {settings.name}", flush=True)

    supervisor = Supervisor(settings, _say)
    try:
        code = supervisor.run(duration, ready)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DataplaneError(f"{where}{error.strerror or error}") from error
    except DataplaneError as error:
        if isinstance(error, SegmentSpaceError) and not started:
            raise too_large(config, settings, error) from error
        if not started:
            raise
        _say(f"dataplane: {error}")
        code = 1
    if supervisor.final:
        _finish(supervisor.final, ledger)
    return code


def _finish(final: dict[str, Any], path: Path | None) -> None:
    """The final ledger: for people on the terminal, for programs in the file."""
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    Console(file=stream, width=width_for_pipes(stream)).print(ledger_view(final))
    if path is not None:
        path.write_text(json.dumps(final, indent=2) + "\n")


def _check_writable(path: Path) -> None:
    """Rather now than after a run of hours."""
    if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
        raise DataplaneError(f"--ledger {path}: cannot be written")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""No worker compiles anything: it would stand still for seconds, and its replacement again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.workers.rig import ROOT

SCRIPT = """
import sys
from dataplane.jit import Kernel
from workers import supervisor
supervisor.warm_up(["tun"], lambda: None)
for name, module in sorted(sys.modules.items()):
    if name.startswith(("dataplane.", "workers.")) and not name.startswith("dataplane.client."):
        for value in vars(module).values():
            if isinstance(value, Kernel) and value.alone and value.__module__ == name and value._call is None:
                print(name, value.__name__)
"""


@pytest.mark.timeout(300)
def test_all_kernels_are_ready_before_the_first_fork() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == ""

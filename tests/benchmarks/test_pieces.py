from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.suite.pieces import Import


@pytest.mark.parametrize("program", [Import().timeraw_import(), Import().timeraw_help()])
def test_a_program_that_asv_times_goes_on_and_prints_nothing(program):
    command = [sys.executable, "-c", f"{program}\nprint('time')"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "time\n"

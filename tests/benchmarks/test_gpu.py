from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Runs a module where of the project's dependencies only torch and numpy can be imported.
ALONE = """
import re, runpy, sys, tomllib
from importlib.machinery import PathFinder

text = open("pyproject.toml", "rb")
names = {re.match("[A-Za-z_-]+", d)[0] for d in tomllib.load(text)["project"]["dependencies"]}
blocked = {n.lower().replace("-", "_") for n in names} | {"sklearn", "PIL", "pyarrow"}
blocked -= {"torch", "numpy", "filelock", "jinja2"}  # the last two come with torch

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        known = name.split(".")[0] not in blocked
        return super().find_spec(name, path, target) if known else None

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.argv[:1] = []
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_the_measurement_runs_with_torch_and_numpy_alone(tmp_path):
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--size", "tiny", "--steps", "3", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "benchmarks.gpu", *options],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for name in ("float32", "TF32"):
        assert found[name]["share_of_matmul"] > 0
        assert found[name]["batched_seconds"] > 0
        assert found[name]["paper_settings_hours"] > 0
        assert {len(a) for a in found[name]["alphas"]} == {3}
    # A CPU has no TF32: the same arithmetic gives the same numbers, but for the order of sums.
    assert found["deviation"]["largest"] < 1e-5
    assert "128 tokens" in done.stdout
    assert "float32:" in done.stdout


def test_a_single_step_is_refused_since_the_first_warms_up() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--size", "tiny", "--steps", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--steps must be 2 at least" in done.stderr

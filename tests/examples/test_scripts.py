"""The example scripts run by themselves, and the index names every example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ["many_tenants.py", "ofrep_python.py", "opentelemetry_spans.py", "quickstart.py"]
SECONDS = 60
GENERATED = {"README.md", "__pycache__", "node_modules"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_by_itself_and_ends_with_0(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_the_index_names_every_example_and_no_other() -> None:
    listed = set(re.findall(r"^\| \[`([^`]+)`\]", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.name not in GENERATED}


def test_every_python_file_is_run_by_a_test() -> None:
    tests = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert path.name in tests or f"{path.stem}:app" in tests, path

"""Every example runs: with `--check` it does its whole work, by itself, and ends with 0."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNNABLE = [path for path in sorted(EXAMPLES.rglob("*.py")) if 'if __name__ == "__main__"' in path.read_text("utf-8")]
SECONDS = 45
MADE = {"README.md", "__pycache__", "node_modules", "package-lock.json"}


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_the_example_runs_by_itself_and_ends_well(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path), "--check"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_every_example_is_in_the_index_and_no_other() -> None:
    listed = set(re.findall(r"^\| \[`([^`]+)`\]", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE))
    there = {
        str(path.relative_to(EXAMPLES))
        for path in EXAMPLES.rglob("*")
        if path.is_file() and path.name not in MADE and not MADE & set(path.parts)
    }
    assert listed == there

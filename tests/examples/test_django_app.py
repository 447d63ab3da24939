"""What the Django example promises beside its requests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DJANGO_APP = Path(__file__).parents[2] / "examples" / "django_app"


def test_a_management_command_needs_no_settings_of_the_provider() -> None:
    pytest.importorskip("django", reason="django is not installed; it comes with the extra `test`")
    done = subprocess.run(
        [sys.executable, "manage.py", "check", "--fail-level", "WARNING"],
        cwd=DJANGO_APP,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr

"""Run by `make typed`: the share of the names of the installed wheel whose types pyright knows without inferring them.

It prints what is missing, and ends with 1 below the floor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

FLOOR = 0.89
"""The least share; to be raised to 1 as annotations are added."""


def verified() -> dict[str, Any]:
    """Return what pyright says of the package."""
    command = ["pyright", "--ignoreexternal", "--outputjson", "--verifytypes", "external_oms"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    found: dict[str, Any] = json.loads(done.stdout)["typeCompleteness"]
    assert found["modules"], "pyright does not find the installed package"
    return found


def main() -> None:
    """Print the errors by place, and the share."""
    found = verified()
    errors = {
        (problem["file"], problem["range"]["start"]["line"] + 1, problem["message"].partition("\n")[0])
        for symbol in found["symbols"]
        for problem in symbol["diagnostics"]
        if problem["severity"] == "error" and "range" in problem
    }
    for file, line, message in sorted(errors):
        sys.stdout.write(f"{file.rpartition('site-packages/')[2]}:{line}: {message}\n")
    share = found["completenessScore"]
    sys.stdout.write(f"types known: {share:.1%}; at {len(errors)} places they are not\n")
    sys.exit(share < FLOOR)


if __name__ == "__main__":
    main()

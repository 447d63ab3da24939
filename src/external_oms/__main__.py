"""`external-oms` and `python -m external_oms`: hands over to the command line, or says which extra it needs."""

from __future__ import annotations

import sys

__all__ = ["main"]

EXTRA_NEEDED = "external-oms needs the server extra: pip install 'openfeature-provider-external-oms[server]'\n"


def main() -> None:
    """Run the command line; exits with 2 where a library of the extra is missing."""
    try:
        from external_oms.cli import main as command  # noqa: PLC0415 - click stands in an extra; its lack is explained here
    except ModuleNotFoundError as error:
        if (error.name or "external_oms").partition(".")[0] == "external_oms":
            raise  # ours: that is a defect, no missing extra
        sys.stderr.write(EXTRA_NEEDED)
        raise SystemExit(2) from None
    command()


if __name__ == "__main__":
    main()

"""docs/scale.md shows what the model prints today: small sizes in every run, the large ones in the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulation.tables import SIZES, TABLES, markdown

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("sizes", [SIZES[:2], pytest.param(SIZES, marks=[pytest.mark.soak, pytest.mark.timeout(300)])])
def test_the_page_shows_what_the_model_prints(sizes: tuple[int, ...]) -> None:
    for name, head, rows in TABLES:
        missing = [line for line in markdown(head, rows(sizes)) if line not in PAGE]
        assert not missing, f"{name}: print the tables anew with `python -m tests.simulation`"

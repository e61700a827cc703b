"""What tests of the page and of the model card need: no pictures."""

import pytest

from sparc3_lightning.files import write_atomically
from sparc3_lightning.report import page as report


@pytest.fixture(scope="module", autouse=True)
def pictures_have_one_dot():
    """Draw real pictures."""


@pytest.fixture
def pictures_take_no_time(monkeypatch):
    """Drawing takes a second a page; test_figures.py and test_browser.py look at real pictures."""
    for name in ("draw_changes", "draw_differential", "draw_doses", "draw_layers", "draw_scatter"):
        monkeypatch.setattr(report, name, lambda *given, **_: write_atomically(given[-1], f"PNG {given[-1].name}"))

"""The pictures of the README are what the commands show."""

from __future__ import annotations

import pytest

from tests.pictures import FOLDER, pictures
from tests.system.browser import README

PICTURES = pictures()


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_what_the_command_shows_now(name: str) -> None:
    stored = (FOLDER / name).read_text(encoding="utf-8")
    assert stored == PICTURES[name], "run `python -m tests.pictures`"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_in_the_readme(name: str) -> None:
    assert f"](deploy/pictures/{name})" in README.read_text()


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_fetches_nothing(name: str) -> None:
    assert "url(http" not in PICTURES[name]
    assert "@font-face" not in PICTURES[name]


def test_there_are_no_other_pictures_of_the_terminal() -> None:
    assert {path.name for path in FOLDER.glob("*.svg")} == set(PICTURES)

"""The README's two commands are found where the test on a fresh machine looks for them.

Goal: `make fresh-test` runs what a stranger reads. Method: the real README, and pages that lack the block.
"""

from __future__ import annotations

import pytest

from deploy.docker.docker_tools import ROOT
from deploy.docker.fresh_test import readme_commands


def test_the_readme_has_two_commands_for_a_fresh_machine() -> None:
    first, second = readme_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert first.startswith('make mesh ASK="')
    assert second == "make test"


@pytest.mark.parametrize(
    "page",
    [
        "",
        "## Two commands\n\nnone\n",
        "## Two commands\n\n```sh\n```\n",
        "## Two commands\n\n```sh\nrm -r .\n```\n",
        "## Another heading\n\n```sh\nmake mesh\n```\n",
    ],
)
def test_a_page_without_such_commands_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="Two commands"):
        readme_commands(page)

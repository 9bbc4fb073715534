"""`--samples.help` and its like."""

import re

import pytest

from tests.cli.command_line import run

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


def test_a_section_shows_its_options_alone(capsys):
    assert run("fit", "--samples.help") == 0
    told = capsys.readouterr().out
    assert (
        "--samples.num_prompts NUM_PROMPTS" in told and "rows of the table; 0 = none. (type: int, default: 8)" in told
    )
    assert set(re.findall(r"^  --(\w+)", told, re.M)) == {"samples"}

import re

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.rollout.play import GenerationSettings
from lit_rlhf.rollout.settings import RolloutSettings

SIZES = {
    "rollout_size": 16,
    "num_slots": 8,
    "max_tokens": 64,
    "max_new_tokens": 4,
    "stop_strings": (),
    "max_validation_prompts": 2,
    "seed": 0,
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rollout_size": 0}, "rollout_size (0) must be 1 or more"),
        ({"num_slots": -1}, "num_slots (-1)"),
        ({"max_new_tokens": 0}, "max_new_tokens (0)"),
        ({"max_tokens": 0}, "max_tokens (0) must be 1 or more, or null"),
        ({"max_validation_prompts": 0}, "max_validation_prompts (0) must be 1 or more"),
        ({"stop_strings": ("end", "")}, "stop_strings (('end', '')) must be texts, none of them empty"),
        ({"seed": -1}, "seed (-1) must be 0 or more"),
    ],
)
def test_rollouts_of_no_episodes_and_stops_that_every_text_holds_are_refused(given, message):
    RolloutSettings(**SIZES)
    with pytest.raises(UserError, match=re.escape(message)):
        RolloutSettings(**SIZES | given)


def test_responses_of_a_rollout_keep_to_its_limits_whatever_else_they_are_sampled_by():
    settings = RolloutSettings(**SIZES | {"stop_strings": ("end",)}).bound(GenerationSettings(temperature=0.5, seed=3))
    assert settings == GenerationSettings(4, temperature=0.5, seed=3, stop_strings=("end",), num_slots=8)

import numpy as np
import pytest
import torch

from lit_rlhf import ProcessRewardModel
from lit_rlhf.models.policy import freeze
from lit_rlhf.rollout.process_rewards import step_scores
from tests.tiny import random_examples


@pytest.fixture(scope="module")
def scorer(folder):
    torch.manual_seed(0)
    return freeze(ProcessRewardModel(str(folder)).process_reward_model)


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_step_scores_are_those_of_each_solution_by_itself(scorer, max_tokens):
    examples = random_examples(7, longest=9)
    prompts, responses = [e.prompt_ids for e in examples], [e.responses[0] for e in examples]
    rng = np.random.default_rng(0)
    ends = [np.flatnonzero(rng.random(len(response)) < 0.5) for response in responses]
    assert min(map(len, ends)) == 0 < max(map(len, ends))
    found = step_scores(scorer, prompts, responses, ends, max_tokens)
    for prompt, response, places, scores in zip(prompts, responses, ends, found, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
        scorer.model.set_attn_implementation("eager")
        logits = scorer.model(ids).logits[0, len(prompt) :, 0]
        assert scores == pytest.approx(logits[places].double().numpy(), abs=1e-5)

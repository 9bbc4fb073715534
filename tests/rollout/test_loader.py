import torch

from lit_rlhf.rollout.loader import RolloutLoader
from tests.ppo_runs import make


def test_the_loader_goes_on_in_mid_iteration_from_its_state(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path)
    trainer.fit(module, data)
    loader = RolloutLoader(data)
    whole = iter(loader)
    for _ in range(5):
        next(whole)
    state = loader.state_dict()
    other = RolloutLoader(data)
    other.load_state_dict(state)
    rest, expected = list(other), list(whole)
    assert len(rest) == len(expected) == 11
    for ours, theirs in zip(rest, expected, strict=True):
        assert torch.equal(ours.packed.target_ids, theirs.packed.target_ids)
        assert torch.equal(ours.advantages, theirs.advantages)

import warnings

import pytest

from lit_rlhf import ProcessRewardModel, RewardModel, RewardModelReward, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.models.heads import KINDS, OF_RESPONSES, OF_STEPS, adapter_head_kind, head_kind, kind_of
from lit_rlhf.models.loading import load_policy


@pytest.fixture(scope="module")
def scorers(folder, tmp_path_factory):
    """Folders of both kinds, by the network that each exports."""
    root = tmp_path_factory.mktemp("scorers")
    for module in (RewardModel(str(folder)), ProcessRewardModel(str(folder))):
        export(module, full_state_dict(module.exportable()), root / module.exported)
    return root


def test_kinds_are_known_by_classes_of_transformers_and_tasks_of_peft():
    assert head_kind(["LlamaForSequenceClassification"]) is OF_RESPONSES
    assert head_kind(["Qwen3ForTokenClassification"]) is OF_STEPS
    assert head_kind(["LlamaForCausalLM"]) is head_kind([]) is None
    assert [adapter_head_kind(kind.task_type) for kind in KINDS] == list(KINDS)
    assert adapter_head_kind("CAUSAL_LM") is None


def test_a_process_reward_model_is_neither_a_policy_nor_a_reward_model_of_responses(scorers):
    steps = str(scorers / "process_reward_model")
    with pytest.raises(
        UserError, match=r"holds a process reward model \(\['LlamaForTokenClassification'\]\), not a pol"
    ):
        load_policy(steps)
    with pytest.raises(UserError, match=r"holds no trained reward head: its config names \['LlamaForTokenClass"):
        RewardModelReward(steps)


@pytest.mark.parametrize(
    ("make", "start"), [(ProcessRewardModel, "reward_model"), (RewardModel, "process_reward_model")]
)
def test_the_head_of_the_other_kind_is_drawn_anew(make, start, scorers):
    with pytest.warns(
        UserWarning, match=r"holds a (process )?reward model: its .* is left out, and a .* is drawn anew"
    ):
        made = make(str(scorers / start))
    network = getattr(made, made.exported)
    assert network.fresh_head and (network.model.score.bias is None) is (make is RewardModel)
    assert kind_of(network.model) is (OF_STEPS if make is ProcessRewardModel else OF_RESPONSES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(str(scorers / start), fresh_head=True)
    with pytest.raises(UserError, match=r"set model\.fresh_head: null"):
        make(str(scorers / start), fresh_head=False)

import asyncio
import re
import signal

import numpy as np
import pytest
import torch

from lit_rlhf import Reward, RewardModelReward, RolloutDataModule, TextReward, UserError
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.rollout.play import GenerationSettings, complete
from lit_rlhf.rollout.scoring import Rewards, scored
from lit_rlhf.signals import Stop
from tests.ppo_runs import Rollouts, make
from tests.stages import make_trainer
from tests.tiny import save_tiny, tiny_policy, tiny_tokenizer
from token_mdp.verifiable import RegexMatch

PROMPTS = PromptBatch([np.array([3 + i, 4]) for i in range(6)], {"answer": list("abcdef")}, np.arange(10, 16))


def length(prompts, responses, **columns):
    return [float(len(response.split())) for response in responses]


def half(prompts, responses):
    return [0.5] * len(responses)


def even(prompts, responses, answer):
    return [None if ord(x) % 2 else 1.0 for x in answer]


class Tokens(Reward):
    def __call__(self, prompts, responses, **columns):
        return np.array([len(response) for response in responses])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("scoring") / "model")


def played(reward, weights=None, monitors=None, prompts=PROMPTS):
    rewards = Rewards(reward, weights, monitors)
    rewards.bind(tiny_tokenizer(), torch.device("cpu"), [prompts])
    settings = GenerationSettings(max_new_tokens=6, num_slots=3)
    return complete(tiny_policy(), tiny_tokenizer(), prompts, settings, rewards)


def test_a_plain_function_or_object_is_a_reward_of_text():
    for reward in (half, TextReward(half), lambda p, r: np.full(len(r), 0.5, np.float16)):
        assert [episode.reward for episode in played(reward)] == [0.5] * 6
    assert all(episode.components == {} for episode in played(RegexMatch("w"), monitors={}))


@pytest.mark.parametrize(
    ("reward", "weights"),
    [
        ({"half": half, "tokens": Tokens()}, {"tokens": -0.1}),
        ({"half": half, "tokens": (Tokens(), -0.1)}, None),
        ({"half": half, "tokens": [TextReward(half), 3.0]}, None),
        ([half, (Tokens(), np.float32(2))], {}),
        ((half, TextReward(length)), {"length": 0.0}),
    ],
)
def test_several_rewards_add_up_by_their_weights_and_each_is_kept(reward, weights):
    named = Rewards(reward, weights)
    for episode in played(reward, weights, monitors={"watched": half}):
        total = sum(term.weight * episode.components[term.name] for term in named.terms)
        assert episode.reward == pytest.approx(total)
        assert episode.components.keys() == {*(term.name for term in named.terms), "watched"}


def test_each_reward_is_logged_and_the_weighted_sum_is_learnt_from(folder, tmp_path):
    watch = Rollouts()
    data = {"reward_weights": {"length": -0.5}, "monitors": {"halves": half}}
    reward = {"half": half, "length": length}
    module, datamodule, trainer = make(folder, tmp_path, reward=half, trainer={"callbacks": [watch]})
    datamodule.rewards = Rewards(reward, **{"weights": data["reward_weights"], "monitors": data["monitors"]})
    trainer.fit(module, datamodule)
    means = watch.metrics[0]
    assert means["rollout/half"] == means["rollout/halves"] == 0.5
    assert means["rollout/score"] == pytest.approx(0.5 - 0.5 * means["rollout/length"])


def nothing_to_say(**options):
    return {"even": TextReward(even, abstain=True), "half": half} | options


def test_a_reward_that_abstains_adds_nothing_and_is_counted():
    episodes = played(nothing_to_say())
    spoke = [ord(x) % 2 == 0 for x in PROMPTS.columns["answer"]]
    assert [episode.reward for episode in episodes] == [1.5 if x else 0.5 for x in spoke]
    assert [episode.components["even"] for episode in episodes] == [float(x) for x in spoke]
    assert [episode.components["even_abstained"] for episode in episodes] == [float(not x) for x in spoke]
    assert "half_abstained" not in episodes[0].components
    alone = played(TextReward(even, abstain=True))
    assert [(e.reward, e.components["reward_abstained"]) for e in alone] == [(float(x), float(not x)) for x in spoke]


def test_how_often_rewards_abstain_is_logged(tmp_path, folder):
    watch = Rollouts()

    def mute(prompts, responses):
        return [None] * len(responses)

    module, data, trainer = make(folder, tmp_path, trainer={"callbacks": [watch]})
    data.rewards = Rewards({"mute": TextReward(mute, abstain=True), "half": half})
    trainer.fit(module, data)
    assert watch.metrics[0]["rollout/mute_abstained"] == 1.0
    assert watch.metrics[0]["rollout/mute"] == 0.0 and watch.metrics[0]["rollout/score"] == 0.5


def returning(value):
    return lambda prompts, responses: [value] * len(responses)


def raising(error):
    def function(prompts, responses):
        raise error

    return function


class Panic(BaseException):
    """As code in Rust raises it."""


FAULTS = {
    "None": (returning(None), r"got \[None, .*None, for a response of which there is nothing to say, .*abstain=True"),
    "nan": (returning(float("nan")), "returned values that are not finite: nan"),
    "inf": (returning(float("-inf")), "returned values that are not finite: -inf"),
    "complex": (returning(1j), "must return one number per response, .* got complex numbers"),
    "text": (returning("1.0"), r"got \['1.0', "),
    "huge": (
        returning(1e300),
        r"gave 1e\+300 for prompt 1\d: beyond ±1e\+15, rewards cannot be computed with in float32",
    ),
    "huge below": (returning(-1e30), "gave -1e.30 for prompt"),
    "an integer beyond floats": (returning(10**400), r"got \[1000"),
    "generator": (lambda p, r: (1.0 for _ in r), "got a generator; return a list of what it yields"),
    "one number": (lambda p, r: 1.0, r"shape \(6,\), got shape \(\)"),
    "raises": (
        lambda p, r: 1 / 0,
        r"raised ZeroDivisionError: division by zero, in .*test_scoring.py:\d+ \(prompt 11; ",
    ),
    "leaves": (lambda p, r: exit(3), r"raised SystemExit: 3"),
    "is cancelled": (raising(asyncio.CancelledError("late")), r"raised CancelledError: late, in .*test_scoring.py:\d+"),
    "ends a generator": (raising(GeneratorExit()), r"raised GeneratorExit, in "),
    "panics": (raising(Panic("in Rust")), r"raised Panic: in Rust, in "),
    "lines": (lambda p, r: int(r[0] + "\n" + "x"), "raised ValueError: invalid literal"),
    "inside": (lambda p, r: length(p, [1]), r"raised AttributeError: 'int' .* in .*test_scoring.py:\d+"),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("function", "said"), FAULTS.values(), ids=FAULTS)
def test_a_reward_that_fails_is_named_with_its_option_and_the_prompts(function, said, several):
    option = r"data\.rewards\.mine" if several else r"data\.reward"
    with pytest.raises(UserError, match=rf"^{option} \(tests\..*<(lambda|locals)>.*{said}") as error:
        played({"other": half, "mine": function} if several else function)
    assert "\n" not in str(error.value) and "prompt 1" in str(error.value) and len(str(error.value)) < 600


def test_only_the_prompts_at_fault_are_named():
    def mostly(prompts, responses, answer):
        return [float("inf") if x == "c" else 1.0 for x in answer]

    with pytest.raises(UserError, match=r"not finite: inf \(prompt 13\)$"):
        played(mostly)
    with pytest.raises(UserError, match=r"^data\.monitors\.watched .*not finite: inf \(prompt 13\)$"):
        played(half, monitors={"watched": mostly})
    with pytest.raises(UserError, match=r"gave 1e\+20 for prompt 13: beyond"):
        played({"half": half, "mine": lambda p, r, answer: [1e20 * (x == "c") for x in answer]})
    with pytest.raises(UserError, match=r"which weighs 1e\+18, gave 0.5 for prompt 11"):
        played({"half": half}, {"half": 1e18})
    with pytest.raises(UserError, match=r"the weighted sum of data\.rewards has values that are not finite"):
        played({"half": (half, 1e308), "tokens": (Tokens(), 1e308)})


def paying(paid):
    own = {"pays_steps": True, "step_rewards": lambda self, prompts, responses: [paid(len(ids)) for ids in responses]}
    return type("Paying", (Tokens,), own)()


@pytest.mark.parametrize(
    ("paid", "got"),
    [
        (lambda count: np.ma.array(np.ones(count), mask=True), r"masked_array\(data=\[--"),
        (lambda count: np.full(count, np.nan), "values that are not finite"),
        (lambda count: 1.0, r"shape \(\)"),
    ],
)
def test_what_tokens_are_paid_is_refused_where_it_is_no_number_of_each(paid, got):
    assert played(paying(np.ones))[0].step_rewards.sum() > 0
    with pytest.raises(UserError, match=rf"^data\.reward .*: step_rewards must give one .* of prompt 1\d, got {got}"):
        played(paying(paid))


@pytest.mark.parametrize(("size", "weight"), [(1e308, -1), (2e15, -1), (-1e300, 0)])
def test_a_reward_too_large_to_average_is_refused_though_another_makes_up_for_it_or_it_weighs_nothing(size, weight):
    huge, plain = returning(size), {"half": half}
    rewards = {"mine": (huge, 1.0), "other": (huge, weight)} if weight else plain
    with pytest.raises(
        UserError, match=rf"^data\.(rewards|monitors)\.mine .*gave {re.escape(f'{size:g}')} for prompt 11:"
    ):
        played(rewards, monitors={} if weight else {"mine": huge})


def test_a_reward_of_your_own_class_is_named_too():
    class Failing(Reward):
        def __call__(self, prompts, responses, **columns):
            raise KeyError("weights")

    class Explaining(Reward):
        def __call__(self, prompts, responses, **columns):
            raise UserError("the server of rewards is down")

    with pytest.raises(
        UserError, match=r"^data.reward \(.*Failing\) raised KeyError: 'weights', in .*:\d+ \(prompt 11;"
    ):
        played(Failing())
    with pytest.raises(UserError, match=r"^data.reward \(.*Explaining\): the server of rewards is down \(prompt 11; "):
        played(Explaining())


def test_a_function_that_is_called_wrongly_in_spite_of_its_signature_hears_how_it_is_called():
    class Strange:
        __signature__ = __import__("inspect").signature(length)

        def __call__(self):
            return [1.0]

    with pytest.raises(
        UserError, match=r"raised TypeError: .*; it is called as function\(prompts, responses, \*\*columns\)"
    ):
        played(Strange())


def test_what_a_function_writes_into_what_it_gets_reaches_no_one():
    def greedy(prompts, responses, answer, turns):
        assert turns[0] == ["x"] and len(answer) == len(prompts) == len(responses)
        for given in (prompts, responses, answer, turns[0], turns):
            given.clear()
        return [1.0] * 6 if len(prompts) == 0 else []

    columns = {"answer": list("abcdef"), "turns": [["x"] for _ in range(6)]}
    prompts = PromptBatch(PROMPTS.prompt_ids, columns)
    episodes = played({"a": greedy, "b": greedy, "length": length}, prompts=prompts)
    assert all(episode.components["length"] > 0 for episode in episodes)
    assert columns == {"answer": list("abcdef"), "turns": [["x"]] * 6}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (({},), "needs one reward at least"),
        (([],), "needs one reward at least"),
        (([half, half],), r"each of a name of its own; got \['half', 'half'\]"),
        (
            ([half, lambda p, r: [1.0]], {"nope": 1.0}),
            r"reward_weights names \['nope'\], and data.rewards names \['<lam",
        ),
        ((half, {"reward": 1.0}), "reward is one alone, whose weight is 1"),
        (({"a": half}, {"a": 0.0}), "all weights of data.rewards are 0"),
        (({"a": half}, {"a": float("nan")}), r"weight of 'a' \(nan\) must be a finite number"),
        (({"a": half}, {"a": True}), r"weight of 'a' \(True\)"),
        (({"a": half}, {"a": "much"}), r"weight of 'a' \('much'\)"),
        (({"a": (half, 1j)},), r"weight of 'a' \(1j\)"),
        (({"a": half}, [1.0]), r"data.reward_weights \(\[1.0\]\) must be a mapping"),
        (({"score": half},), "a reward cannot be named 'score'"),
        (({"kl": half},), "a reward cannot be named 'kl'"),
        (({"": half},), "a reward cannot be named ''"),
        (({3: half},), "a reward cannot be named 3"),
        (({"a": 3.0},), "data.rewards.a: 3.0 is no function"),
        (({"a": RegexMatch},), r"data.rewards.a: .* is no function .*give an object of it, RegexMatch\(...\)"),
        ((3,), "^data.reward: 3 is no function"),
        ((half, None, {"score": half}), "data.monitors: a reward cannot be named 'score'"),
        ((half, None, {"reward": half}), "both have a reward named 'reward'"),
        (({"a": half}, None, {"a": half}), "both have a reward named 'a'"),
        ((half, None, {"a": "half"}), "data.monitors.a: 'half' is no function"),
        ((half, None, [half]), "data.monitors .* must be a mapping"),
    ],
)
def test_rewards_and_weights_that_mean_nothing_are_refused_by_their_option(arguments, said):
    with pytest.raises(UserError, match=said):
        Rewards(*arguments)
    with pytest.raises(UserError, match=said):
        RolloutDataModule(arguments[0], **dict(zip(("reward_weights", "monitors"), arguments[1:], strict=False)))


def test_a_function_is_held_against_the_columns_of_all_prompts_that_it_scores(folder, tmp_path):
    module, data, trainer = make(
        folder,
        tmp_path,
        reward=lambda p, r, answer: [1.0] * len(r),
        generation=GenerationSettings(max_new_tokens=8),
    )
    with pytest.raises(
        UserError, match=r"^data.reward: .*missing a required argument: 'answer'; .* columns \['prompt'\]"
    ):
        trainer.fit(module, data)
    data.sources["predict"] = data.sources["train"]
    data.sources["train"] = None
    rows = make_trainer(tmp_path).predict(module, data)  # which scores nothing
    assert len(rows[0]) > 0


def test_models_of_all_rewards_are_counted(tmp_path, folder):
    class Two(Reward):
        def networks(self):
            yield from (torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))

    assert len(list(Rewards({"two": Two(), "half": half}, monitors={"more": Two()}).networks())) == 4


def test_scores_outside_of_an_environment_are_checked_alike():
    judge = TextReward(length)
    judge.bind(tiny_tokenizer(), torch.device("cpu"))
    responses = [np.array([5] * (1 + i)) for i in range(6)]
    assert scored(judge, "gold", PROMPTS, responses).tolist() == [1, 2, 3, 4, 5, 6]
    judge.function = returning("x")
    with pytest.raises(UserError, match=r"^gold \(.*\) must return one number per response.*\(prompt 11; "):
        scored(judge, "gold", PROMPTS, responses)
    judge.function = returning(1e300)
    with pytest.raises(UserError, match=r"^gold \(.*\) gave 1e\+300 for prompt 11: beyond"):
        scored(judge, "gold", PROMPTS, responses)


@pytest.mark.parametrize("stop", [Stop(signal.SIGTERM), KeyboardInterrupt(), type("Ctrl", (KeyboardInterrupt,), {})()])
def test_a_signal_that_meets_a_reward_ends_the_run_as_elsewhere(stop):
    with pytest.raises(type(stop)) as raised:
        played(raising(stop))
    assert raised.value is stop


def test_a_reward_model_is_a_reward_among_others(tmp_path):
    from lit_rlhf import RewardModel
    from lit_rlhf.callbacks.export import export
    from lit_rlhf.engine.sharding import full_state_dict

    module = RewardModel(str(save_tiny(tmp_path / "lm")))
    export(module, full_state_dict(module.exportable()), tmp_path / "rm")
    model = RewardModelReward(str(tmp_path / "rm"))
    episodes = played({"model": model, "half": half}, {"half": 0.1})
    alone = played(model)
    assert [e.components["model"] for e in episodes] == pytest.approx([e.reward for e in alone])
    assert [e.reward for e in episodes] == pytest.approx([e.reward + 0.05 for e in alone])

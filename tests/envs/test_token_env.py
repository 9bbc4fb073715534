import copy
import io
import pickle
import re
from contextlib import redirect_stdout

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from token_tasks import END, VOCAB, assert_same, task, weighted_sum

from token_mdp import FinishReason, PromptQueue, RewardError, TokenEnv, TokenVectorEnv
from token_mdp.registration import IDS
from token_mdp.toy import ToyTokenizer, toy_task


def play(env, *tokens):
    for token in tokens:
        transition = env.step(token)
    return transition


@pytest.mark.plays("gymnasium", "`check_env`", "single, Dict and flat")
@pytest.mark.parametrize("env_id", IDS)
def test_gymnasiums_checker_accepts_every_registered_id(env_id):
    check_env(gymnasium.make(env_id).unwrapped)


def test_prompt_and_response_lie_side_by_side_and_a_step_writes_one_cell():
    env = TokenEnv(**task())
    env.reset(options={"prompt_index": 1})
    observation, *_ = play(env, 5, 6)
    np.testing.assert_array_equal(observation["input_ids"], [2, 3, 5, 6, 0, 0, 0])  # prompt, response, P+T=7 cells
    np.testing.assert_array_equal(observation["attention_mask"], [1, 1, 1, 1, 0, 0, 0])
    assert (observation["prompt_length"], observation["length"]) == ([2], [4])
    assert observation["input_ids"][observation["length"][0] - 1] == 6  # the newest token
    assert observation in env.observation_space


def test_flat_observation_starts_every_response_in_the_same_column():
    env = TokenEnv(**task(observation="flat"))
    for prompt_index, expected in [
        (0, [-1, -1, 1, 5, 6, -1, -1]),  # prompt of one token
        (1, [-1, 2, 3, 5, 6, -1, -1]),  # of two
        (2, [4, 5, 6, 5, 6, -1, -1]),  # of three, P
    ]:
        env.reset(options={"prompt_index": prompt_index})
        observation, *_ = play(env, 5, 6)
        np.testing.assert_array_equal(observation, expected)
        assert observation in env.observation_space


@pytest.mark.parametrize(
    ("limit", "tokens", "flags", "reason"),
    [
        ("terminate", (1, 2), (False, False), None),
        ("terminate", (1, END), (True, False), FinishReason.STOP),
        ("terminate", (1, 2, 3, 4), (True, False), FinishReason.LENGTH),
        ("truncate", (1, 2, 3, 4), (False, True), FinishReason.LENGTH),
        ("truncate", (1, 2, 3, END), (True, False), FinishReason.STOP),  # the end token at the limit is an end
    ],
)
def test_an_episode_ends_with_one_flag_and_a_reason(limit, tokens, flags, reason):
    env = TokenEnv(**task(limit=limit))
    env.reset(seed=0)
    _, reward, terminated, truncated, info = play(env, *tokens)
    assert (terminated, truncated) == flags
    assert type(terminated) is bool and type(truncated) is bool and type(reward) is float
    assert info.get("finish_reason") == reason
    assert info.get("response_length") == (len(tokens) if reason else None)


def test_every_stop_token_ends_the_episode():
    env = TokenEnv(**task(stop_token_ids=[3, END]))
    for token in (3, END):
        env.reset()
        assert play(env, token)[2]


def test_without_stop_tokens_only_the_limit_ends_an_episode():
    env = TokenEnv(**task(stop_token_ids=[], max_new_tokens=2))
    env.reset()
    assert not play(env, END)[2]
    assert play(env, END)[2]


def test_the_reward_is_paid_once_at_the_end_for_the_response_with_its_end_token():
    seen = []

    def reward(prompts, responses, answer):
        seen.append((prompts[0].tolist(), responses[0].tolist(), answer))
        return [2.5]

    env = TokenEnv(**task(reward_fn=reward, columns={"answer": ["a", "b", "c"]}))
    env.reset(options={"prompt_index": 1})
    assert play(env, 5)[1] == 0.0
    assert play(env, END)[1] == 2.5
    assert seen == [([2, 3], [5, END], ["b"])]


def test_reward_functions_cannot_reach_the_envs_own_tokens():
    def vandal(prompts, responses):
        prompts[0][:] = 0
        responses[0][:] = 0
        return [0.0]

    env = TokenEnv(**task(reward_fn=vandal))
    for _ in range(2):
        env.reset(options={"prompt_index": 2})
        observation, *_ = play(env, 5, END)
        np.testing.assert_array_equal(observation["input_ids"], [4, 5, 6, 5, END, 0, 0])


def test_prompts_longer_than_p_are_cut_on_the_left_and_info_says_so():
    env = TokenEnv(**task(max_prompt_length=2))
    observation, info = env.reset(options={"prompt_index": 2})  # prompt 4 5 6
    np.testing.assert_array_equal(observation["input_ids"][:2], [5, 6])
    assert (info["prompt_length"], info["prompt_tokens_cut"]) == (2, 1)
    assert env.reset(options={"prompt_index": 1})[1]["prompt_tokens_cut"] == 0


def test_infos_hold_numpy_values_only():
    env = TokenEnv(**task(action_mask=True, reward_fn={"sum": weighted_sum}))
    _, info = env.reset()
    infos = [info, play(env, 1)[4], play(env, END)[4]]
    assert {type(value) for info in infos for value in info.values()} == {np.int64, np.int8, np.float64, np.ndarray}


def test_each_prompt_comes_exactly_once_per_pass_in_a_new_order_each_time():
    env = TokenEnv(**task(prompts=[[i] for i in range(6)]))
    first = env.reset(seed=3)[1]["prompt_index"]
    orders = [int(first)] + [int(env.reset()[1]["prompt_index"]) for _ in range(17)]
    passes = [orders[:6], orders[6:12], orders[12:]]
    assert [sorted(order) for order in passes] == [list(range(6))] * 3
    assert passes[0] != passes[1] or passes[1] != passes[2]


def test_unshuffled_prompts_come_in_order():
    env = TokenEnv(**task(shuffle=False))
    assert [int(env.reset()[1]["prompt_index"]) for _ in range(4)] == [0, 1, 2, 0]


def test_picking_a_prompt_leaves_the_queue_as_it_is():
    env = TokenEnv(**task(shuffle=False))
    assert [
        int(env.reset(options=options)[1]["prompt_index"])
        for options in (None, {"prompt_index": 0}, {"prompt_index": None}, {})
    ] == [0, 0, 1, 2]


@pytest.mark.plays("gymnasium", "seeding", "single")
def test_equal_seeds_give_equal_episodes():
    rollouts = []
    for _ in range(2):
        env = TokenEnv(**task())
        rollout = [env.reset(seed=11)]
        rng = np.random.default_rng(0)
        for _ in range(30):
            rollout.append(env.step(rng.integers(VOCAB)))
            if rollout[-1][2]:
                rollout.append(env.reset())
        rollouts.append(rollout)
    assert_same(*rollouts)


def test_step_needs_a_running_episode():
    env = TokenEnv(**task())
    with pytest.raises(ResetNeeded, match="call reset\\(\\) first"):
        env.step(1)
    env.reset(options={"prompt_index": 2})
    env.step(END)
    with pytest.raises(ResetNeeded, match="prompt 2 ended with finish reason 'stop'"):
        env.step(1)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"])
@pytest.mark.parametrize("observation", ["dict", "flat"])
def test_a_copied_or_pickled_env_goes_on_like_the_original_and_by_itself(observation, again):
    arguments = task(observation=observation, process_reward_fn=weighted_sum, action_mask=only_even_tokens)
    for env, act in (
        (TokenEnv(**arguments | {"render_mode": "ansi"}), int),
        (TokenVectorEnv(num_envs=2, reward_mode="deferred", render_mode="ansi", **arguments), lambda t: [t, 4]),
    ):
        env.reset(seed=3)
        env.step(act(2))
        other = again(env)

        def played(env, act=act):
            history = [(*env.step(act(token)), env.render()) for token in (6, 4)]
            history += [env.reset(options={"prompt_index": 2}), env.step(act(2)), env.render(), env.reset()]
            return history + ([e.as_plain() for e in env.pop_episodes()] if hasattr(env, "pop_episodes") else [])

        assert_same(played(other), played(env))


@pytest.mark.parametrize("action", [-1, VOCAB, 1.5, "a", None, [1, 2], [[1], [1, 2]]])
def test_a_token_outside_the_vocabulary_is_refused_with_its_value(action):
    env = TokenEnv(**task())
    env.reset()
    with pytest.raises(InvalidAction) as error:
        env.step(action)
    assert str(action) in str(error.value)


@pytest.mark.parametrize("action", [3, np.int32(3), np.array(3), np.array([3])])
def test_an_action_may_be_any_integer_scalar(action):
    env = TokenEnv(**task())
    env.reset(options={"prompt_index": 0})
    assert env.step(action)[0]["input_ids"][1] == 3


def test_unknown_options_and_prompts_are_refused():
    env = TokenEnv(**task())
    with pytest.raises(ValueError, match="'prompt'"):
        env.reset(options={"prompt": 1})
    with pytest.raises(ValueError, match=r"\[1, 'prompt'\] are unknown"):
        env.reset(options={1: 1, "prompt": 1})
    for index in (-1, 3, 1.0, True, [[1], [1, 2]]):
        with pytest.raises(ValueError, match=rf"prompt_index \({re.escape(str(index))}\) must be an integer in 0..2"):
            env.reset(options={"prompt_index": index})


@pytest.mark.parametrize("make", [TokenEnv, lambda **arguments: TokenVectorEnv(num_envs=1, **arguments)])
@pytest.mark.parametrize("index", [1, np.int32(1), np.array(1)])
def test_a_prompt_may_be_picked_by_any_integer_scalar(make, index):
    assert make(**task()).reset(options={"prompt_index": index})[1]["prompt_index"] == 1


def only_even_tokens(prompts, responses):
    return [[token % 2 == 0 for token in range(VOCAB)] for _ in responses]


def test_an_action_mask_function_restricts_the_tokens():
    env = TokenEnv(**task(action_mask=only_even_tokens))
    _, info = env.reset()
    np.testing.assert_array_equal(info["action_mask"], np.array([1, 0] * 4, dtype=np.int8))
    np.testing.assert_array_equal(env.action_masks(), [True, False] * 4)
    env.step(2)
    env.action_masks()[:] = True  # a copy: it allows nothing
    with pytest.raises(InvalidAction, match="token 3 is not allowed"):
        env.step(3)


def test_without_an_action_mask_all_tokens_are_allowed_and_info_stays_small():
    env = TokenEnv(**task())
    assert "action_mask" not in env.reset()[1]
    assert env.action_masks().all() and env.action_masks().dtype == np.bool_
    info = TokenEnv(**task(action_mask=True)).reset()[1]
    assert info["action_mask"].dtype == np.int8 and info["action_mask"].all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones((1, 3)), r"must return shape \(1, 8\), got \(1, 3\)"),
        (np.zeros((1, VOCAB)), r"at least one token per row, rows \[0\] have none"),
    ],
)
def test_an_action_mask_of_the_wrong_shape_or_without_a_token_is_refused(bad, message):
    env = TokenEnv(**task(action_mask=lambda prompts, responses: bad))
    with pytest.raises(ValueError, match=message + r".*prompt indices \[2\]"):
        env.reset(options={"prompt_index": 2})


@pytest.mark.parametrize(
    ("mask", "shown"),
    [
        (np.where(np.arange(VOCAB) == 3, -np.inf, 0.0)[None], "-inf"),  # to add to logits: 0 means yes there
        (np.full((1, VOCAB), np.nan), "nan"),
        (np.full((1, VOCAB), 0.5), "0.5"),
        (np.full((1, VOCAB), 2), "2"),
        ([["no"] * VOCAB], "'no'"),
        ([[None] * VOCAB], "None"),
        (None, "None"),
        ([[True], [True, False]], r"\[True\]"),
    ],
)
def test_an_action_mask_that_is_neither_bool_nor_0_and_1_is_refused(mask, shown):
    env = TokenEnv(**task(action_mask=lambda prompts, responses: mask))
    with pytest.raises(ValueError, match=rf"must return True \(or 1\).*got .*{shown}.*prompt indices \[2\]"):
        env.reset(options={"prompt_index": 2})


@pytest.mark.parametrize("make", [TokenEnv, lambda **arguments: TokenVectorEnv(num_envs=1, **arguments)])
@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int64, np.float32])
def test_an_action_mask_may_be_bool_or_0_and_1(make, dtype):
    mask = np.array([[1, 0] * 4], dtype=dtype)
    env = make(**task(action_mask=lambda prompts, responses: mask))
    env.reset()
    mask[:] = 1  # the function's buffer, not the env's
    assert env.action_masks().ravel().tolist() == [True, False] * 4


def test_an_action_mask_may_be_a_tensor_with_a_gradient_or_in_bfloat16():
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(1, VOCAB, requires_grad=True), torch.ones(1, VOCAB, dtype=torch.bfloat16)):
        env = TokenEnv(**task(action_mask=lambda prompts, responses, tensor=tensor: tensor))
        env.reset()
        assert env.action_masks().all()


@pytest.mark.parametrize("failing", ["reward_fn", "process_reward_fn"])
def test_a_failed_reward_leaves_an_env_that_wants_a_reset(failing):
    results = [None, [0.0]]
    env = TokenEnv(**task(**{failing: lambda prompts, responses: results.pop(0)}, max_new_tokens=1, render_mode="ansi"))
    env.reset()
    with pytest.raises(RewardError, match=f"{failing} must return"):
        env.step(1)
    with pytest.raises(ResetNeeded):
        env.step(1)
    with pytest.raises(ResetNeeded, match=r"render\(\) without an episode.*also after a reward function"):
        env.render()
    env.reset()
    assert env.step(1)[2]


def test_a_failed_process_reward_in_mid_episode_wants_a_reset_too():
    env = TokenEnv(**task(process_reward_fn=lambda prompts, responses: None))
    env.reset()
    with pytest.raises(RewardError, match="process_reward_fn must return"):
        env.step(1)
    with pytest.raises(ResetNeeded):
        env.step(1)


def test_a_reset_that_fails_leaves_an_env_that_wants_another():
    values = [[1.0], None, [2.0]]
    env = TokenEnv(**task(potential_fn=lambda prompts, responses: values.pop(0)))
    env.reset()
    with pytest.raises(RewardError, match="potential_fn must return"):
        env.reset()
    with pytest.raises(ResetNeeded, match="also after a reward function"):
        env.step(END)
    env.reset(options={"prompt_index": 0})
    assert env.step(END)[1] == 100 + END - 2.0  # Φ of this reset, not of the first


@pytest.mark.parametrize("make", [TokenEnv, lambda **arguments: TokenVectorEnv(num_envs=1, **arguments)])
def test_a_failing_action_mask_is_named_with_its_prompts_and_wants_a_reset(make):
    def allowed(prompts, responses):
        if len(responses[0]) == 1:
            raise KeyError("grammar")
        return np.ones((len(responses), VOCAB), dtype=bool)

    env = make(**task(action_mask=allowed))
    action = env.action_space.sample() * 0 + 1
    env.reset(options={"prompt_index": 2})
    with pytest.raises(ValueError, match=r"action_mask raised KeyError: 'grammar' \(prompt indices \[2\]\)"):
        env.step(action)
    with pytest.raises(ResetNeeded, match="or action_mask has failed"):
        env.step(action)


def test_a_refused_reset_changes_nothing():
    env, other = TokenEnv(**task()), TokenEnv(**task())
    env.reset(seed=1), other.reset(seed=1)
    for options in ({"prompt_index": 99}, {"prompt": 1}):
        with pytest.raises(ValueError, match=r"99|'prompt'"):
            env.reset(seed=9, options=options)
    assert_same(
        [env.step(END)] + [env.reset() for _ in range(6)], [other.step(END)] + [other.reset() for _ in range(6)]
    )


def test_a_shuffling_queue_and_no_shuffling_contradict_each_other():
    with pytest.raises(ValueError, match=r"shuffle \(False\) contradicts prompt_queue"):
        TokenEnv(**task(prompt_queue=PromptQueue(3), shuffle=False))
    env = TokenEnv(**task(prompt_queue=PromptQueue(3, shuffle=False)))
    assert [env.reset()[1]["prompt_index"] for _ in range(3)] == [0, 1, 2]


def test_the_first_env_with_a_seed_shuffles_a_shared_queue_and_the_seeds_of_others_leave_the_pass_alone():
    queue = PromptQueue(3)
    first, second = (TokenEnv(**task(prompt_queue=queue)) for _ in range(2))

    def dealt(*resets):
        return [int(env.reset(seed=seed)[1]["prompt_index"]) for env, seed in resets]

    second.reset()  # without a seed it lends the queue its generator until one comes with a seed
    alone = TokenEnv(**task())
    expected = dealt((alone, 1), (alone, None), (alone, None))
    assert dealt((first, 1), (second, 2), (second, 3)) == dealt((first, 1), (second, None), (first, None)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), r"num_prompts \(0\) must be an integer"),
        (("3",), r"num_prompts \('3'\) must be an integer"),
        ((3, "no"), r"shuffle \('no'\) must be True or False"),
    ],
)
def test_a_queue_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptQueue(*arguments)


def test_a_queue_deals_only_once_it_has_a_random_generator():
    with pytest.raises(ResetNeeded, match="before restart"):
        PromptQueue(3).draw()
    with pytest.raises(ValueError, match=r"prompt_queue \(3\) must be None or a PromptQueue"):
        TokenEnv(**task(prompt_queue=3))


def test_a_tokenizer_that_fails_is_named_with_the_prompts():
    class Failing:
        def decode(self, ids, skip_special_tokens=False):
            if END in ids:
                raise UnicodeError("half a character")
            return "text"

    env = TokenEnv(**task(tokenizer=Failing(), reward_on="text"))
    env.reset(options={"prompt_index": 2})
    with pytest.raises(RewardError, match=r"tokenizer.decode raised UnicodeError.*prompt indices \[2\]"):
        env.step(END)


def test_rewards_on_text_get_decoded_strings_without_special_tokens():
    seen = []

    def reward(prompts, responses):
        seen.extend([prompts, responses])
        return [1.0]

    env = gymnasium.make("LitRLHF/Token-v0", reward_fn=reward, reward_on="text")
    env.reset(options={"prompt_index": 6})
    env.step(1)
    env.step(0)
    assert seen == [["a c →"], ["a"]]


def test_ansi_tells_prompt_response_and_reward_apart():
    env = TokenEnv(**task(render_mode="ansi"))
    env.reset(options={"prompt_index": 1})
    play(env, 5)
    assert env.render() == "prompt   │ 2 3\nresponse │ 5\nreward   │ not yet"
    play(env, END)  # 100 (2 + 3) + 1·5 + 2·7
    assert env.render() == "prompt   │ 2 3\nresponse │ 5 7\nreward   │ 519 (stop)"
    env.reset(options={"prompt_index": 0})
    play(env, END)
    assert env.render() == "prompt   │ 1\nresponse │ 7\nreward   │ 107 (stop)"


@pytest.mark.parametrize("mode", ["ansi", "human"])
def test_the_reward_shown_is_that_of_all_steps_together(mode):
    env = TokenEnv(**task(render_mode=mode, process_reward_fn=lambda p, r: [0.25], reward_fn=lambda p, r: [1.0]))
    with redirect_stdout(io.StringIO()) as shown:
        env.reset(options={"prompt_index": 0})
        play(env, 1, 2, END)
    text = env.render() if mode == "ansi" else shown.getvalue().rstrip()
    assert text.endswith("reward   │ 1.75 (stop)")  # 3 · 0.25 + 1


def test_human_shows_the_response_anew_where_a_token_changes_earlier_text():
    class Merging:
        def decode(self, ids):
            return "".join("ab"[token % 2] for token in ids).replace("ab", "X")

    human, ansi = (TokenEnv(**task(tokenizer=Merging(), render_mode=mode)) for mode in ("human", "ansi"))
    with redirect_stdout(io.StringIO()) as shown:
        for env in (human, ansi):
            env.reset(options={"prompt_index": 0})
            play(env, 2, 2, END)  # a, aa, aX
    assert shown.getvalue() == "prompt   │ b\nresponse │ aa\nresponse │ aX\nreward   │ 127 (stop)\n"
    assert "response │ aX" in ansi.render()


def test_the_toy_task_shows_tokens_of_a_wider_vocabulary():
    env = TokenEnv(**toy_task() | {"vocab_size": 10}, render_mode="ansi")
    env.reset(options={"prompt_index": 6})
    play(env, 1, 8, 0)
    assert "response │ a <8> <end>" in env.render()


def test_human_streams_the_episode_to_stdout():
    env = gymnasium.make("LitRLHF/Token-v0", render_mode="human")
    with redirect_stdout(io.StringIO()) as shown:
        env.reset(options={"prompt_index": 6})
        play(env, 1, 3, 0)
        assert env.render() is None
    assert shown.getvalue() == "prompt   │ a c →\nresponse │ a c <end>\nreward   │ 1 (stop)\n"


def test_human_starts_a_new_line_for_the_prompt_after_an_episode_that_was_cut_short():
    env = gymnasium.make("LitRLHF/Token-v0", render_mode="human")
    with redirect_stdout(io.StringIO()) as shown:
        env.reset(options={"prompt_index": 6})
        play(env, 1)
        env.reset(options={"prompt_index": 0})
        play(env, 0)
        env.reset(options={"prompt_index": 1})
    assert shown.getvalue() == (
        "prompt   │ a c →\nresponse │ a\n"
        "prompt   │ a →\nresponse │ <end>\nreward   │ 0 (stop)\n"
        "prompt   │ b →\nresponse │ "
    )


def test_human_holds_half_a_character_back_until_the_episode_ends_in_it():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    euro = list("€".encode())
    env = TokenEnv(**task(prompts=[[65]], vocab_size=256, stop_token_ids=(), tokenizer=Bytes(), render_mode="human"))
    with redirect_stdout(io.StringIO()) as shown:
        env.reset()
        play(env, *euro[:2])
        assert shown.getvalue().endswith("response │ ")
        play(env, euro[2], euro[0])
    assert "response │ €\N{REPLACEMENT CHARACTER}\nreward" in shown.getvalue()


def test_human_ends_with_the_text_of_ansi_also_over_several_lines():
    class Lines:
        def decode(self, ids):
            return "".join("\n" if token == 6 else str(token) for token in ids)

    env = TokenEnv(**task(tokenizer=Lines(), prompts=[[1, 6, 2]], render_mode="ansi"))
    human = TokenEnv(**task(tokenizer=Lines(), prompts=[[1, 6, 2]], render_mode="human"))
    with redirect_stdout(io.StringIO()) as shown:
        for each in (env, human):
            each.reset()
            play(each, 3, 6, 4, END)
    assert env.render().split("\n")[:4] == ["prompt   │ 1", "         │ 2", "response │ 3", "         │ 47"]
    assert shown.getvalue() == env.render() + "\n"


def test_text_is_decoded_in_render_only():
    calls = []

    class Counting(ToyTokenizer):
        def decode(self, ids, skip_special_tokens=False):
            calls.append(ids)
            return super().decode(ids)

    env = gymnasium.make("LitRLHF/Token-v0", tokenizer=Counting(), render_mode="ansi")
    env.reset()
    env.step(0)
    assert not calls
    env.render()
    assert len(calls) == 2


def test_render_without_a_render_mode_warns():
    env = TokenEnv(**task())
    env.reset()
    with pytest.warns(UserWarning, match="without a render_mode"):
        assert env.render() is None
    with pytest.raises(ResetNeeded, match="render"):
        TokenEnv(**task(render_mode="ansi")).render()


def test_toy_reward_is_one_for_the_echo_alone():
    env = gymnasium.make("LitRLHF/Token-v0")
    earned = {}
    for response in [(1, 3, 0), (1, 3), (1, 0), (3, 1, 0), (0,), (1, 3, 1, 0), (1, 3, 1, 1)]:
        env.reset(options={"prompt_index": 6})
        earned[response] = play(env, *response)[1]
    assert earned[1, 3, 0] == 1.0
    assert earned[1, 3] == 0.0  # not over yet
    # 1 of 3 right: a; 1 of 3: the end token in its place; 0 of 3; 2 of 4: a and c
    assert earned[1, 0] == pytest.approx(1 / 3) and earned[3, 1, 0] == pytest.approx(1 / 3)
    assert earned[0,] == 0.0
    assert earned[1, 3, 1, 0] == earned[1, 3, 1, 1] == 0.5

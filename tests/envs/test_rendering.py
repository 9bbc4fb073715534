import io
from contextlib import redirect_stdout

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from token_tasks import END, make, play, task

from token_mdp import TokenEnv
from token_mdp.toy import ToyTokenizer


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


def test_render_shows_every_slot():
    env = make(num_envs=2, shuffle=False, max_episodes=1, render_mode="ansi")
    with pytest.raises(ResetNeeded, match="render"):
        env.render()
    env.reset()
    env.step(np.array([END, 0]))
    playing, parked = env.render()
    assert playing == "slot 0\nprompt   │ 1\nresponse │ 7\nreward   │ 107 (stop)"
    assert parked.endswith("none: this slot has no episode")
    env.reset(options={"max_episodes": 2})
    env.step(np.array([1, 1]))
    env.reset()  # a stream of one episode again: nothing is left of the other in slot 1
    assert env.render()[1] == "slot 1\nprompt   │ \nresponse │ \nreward   │ none: this slot has no episode"


def test_render_shows_the_new_episode_of_a_refilled_slot():
    env = make(num_envs=1, shuffle=False, render_mode="ansi")
    env.reset()
    env.step(np.array([END]))
    assert env.render() == ("slot 0\nprompt   │ 2 3\nresponse │ \nreward   │ not yet",)


def test_human_prints_each_episode_when_it_ends():
    env = make(num_envs=2, shuffle=False, render_mode="human")
    with redirect_stdout(io.StringIO()) as shown:
        env.reset()
        env.step(np.array([1, END]))
        env.step(np.array([1, END]))
        assert env.render() is None
    assert shown.getvalue() == (
        "slot 1\nprompt   │ 2 3\nresponse │ 7\nreward   │ 507 (stop)\n"
        "slot 1\nprompt   │ 4 5 6\nresponse │ 7\nreward   │ 1507 (stop)\n"
    )

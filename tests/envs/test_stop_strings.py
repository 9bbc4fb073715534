"""Texts that end a response, in both envs."""

import gymnasium
import numpy as np
import pytest
from token_tasks import END, VOCAB, assert_same, task

from token_mdp import FinishReason, TokenEnv, TokenVectorEnv
from token_mdp.stop_strings import StopStrings

PIECES = ["a", "b", "\nHu", "man", ":", " c", "é", "."]


class Pieces:
    """Token i is the text i."""

    def __init__(self, pieces=PIECES):
        self.pieces = pieces

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.pieces[i] for i in ids)


class Bytes:
    """Token i is the byte i; what is no whole character reads as a mark."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def stopping(**changes):
    return task(**{"stop_strings": ["\nHuman:", "éa"], "tokenizer": Pieces(), "max_new_tokens": 6} | changes)


@pytest.mark.parametrize(
    ("tokens", "length", "reason"),
    [
        ([0, 2, 3, 4], 4, "STOP"),  # the last token of the text ends the response, and all of it stays
        ([0, 2, 3, 3, 4, 0], 6, "LENGTH"),
        ([6, 0], 2, "STOP"),
        ([0, 0, 2, 2, 3, 4], 6, "STOP"),  # also at the limit: the agent did end
        ([0, 2, 3, END], 4, "STOP"),
    ],
)
def test_a_text_ends_the_response_with_its_last_token(tokens, length, reason):
    env = TokenEnv(**stopping())
    env.reset(seed=0)
    steps = [env.step(token) for token in tokens]
    assert [terminated for _, _, terminated, _, _ in steps] == [False] * (length - 1) + [True]
    assert steps[-1][4]["finish_reason"] == FinishReason[reason] and steps[-1][4]["response_length"] == length
    assert steps[-1][1] > 0 and not any(reward for _, reward, *_ in steps[:-1])


def test_both_envs_end_the_same_responses():
    single = [lambda: TokenEnv(**stopping(shuffle=False))] * 3
    loop = gymnasium.vector.SyncVectorEnv(single, autoreset_mode="SameStep")
    vector = TokenVectorEnv(num_envs=3, **stopping(shuffle=False, prompts=[[1]] * 3))
    loop.reset(seed=0)
    vector.reset(seed=0)
    rng, ends = np.random.default_rng(0), 0
    for _ in range(300):
        actions = rng.choice([0, 2, 3, 4, 6], 3)
        left, right = loop.step(actions), vector.step(actions)
        assert_same(left[2], right[2])
        if "final_info" in left[4]:
            assert_same(left[4]["final_info"]["finish_reason"], right[4]["final_info"]["finish_reason"])
            ends += int((left[4]["final_info"]["finish_reason"] == FinishReason.STOP).sum())
    assert ends > 20


def test_a_text_is_found_whatever_tokens_it_is_written_in():
    stops = StopStrings("é🙂!", Bytes())
    written = list("wwwwé🙂!".encode())
    ends = [stops.end(np.array(written[: n + 1])) for n in range(len(written))]
    assert ends == [False] * (len(written) - 1) + [True]
    long = np.array(list(("x" * 5000 + "é🙂!").encode()))
    assert stops.end(long)
    assert StopStrings(["!", "?"], Bytes()).end(np.array([63]))


def test_texts_that_mean_nothing_are_refused():
    for strings in ([""], ["a", 3], [None], ""):
        with pytest.raises(ValueError, match=r"stop_strings .* must be texts, none of them empty"):
            TokenEnv(**stopping(stop_strings=strings))
    with pytest.raises(ValueError, match="stop_strings needs a tokenizer"):
        TokenEnv(**stopping(tokenizer=None))
    assert TokenEnv(**task(stop_strings=[], vocab_size=VOCAB)).task.stop_strings.texts == ()


def test_a_state_of_other_texts_is_refused():
    env, other = (TokenVectorEnv(num_envs=2, **stopping(stop_strings=text)) for text in ("ab", "ba"))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="stop_strings"):
        other.load_state_dict(env.state_dict())

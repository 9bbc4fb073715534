import numpy as np
import pytest
from token_tasks import END, task

from token_mdp import RewardError, TokenEnv
from token_mdp.columns import named_columns
from token_mdp.verifiable import ExactAnswer, PythonParses, RegexMatch


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("42", "42", 1),
        (" 42.\n", "42", 1),
        ("42.0", 42, 1),
        ("1,234", "1234", 1),
        ("$18", "18", 1),
        ("-3", "3", 0),
        ("€18", "18", 1),
        ("£ 18", "18", 1),
        ("$-5", "-5", 1),
        ("-$5", "-5", 1),
        ("+$5", "5", 1),
        ("-$1,234.50", "-1234.5", 1),
        ("\N{MINUS SIGN}5", "-5", 1),
        ("-$5", "5", 0),
        ("--5", "5", 0),
        ("-$-5", "5", 0),
        ("$$42", "42", 0),
        ("1_000", "1000", 0),
        (".5", "0.5", 1),
        ("1e3", "1000", 1),
        ("1E3", "1000", 1),
        ("5.", "5", 1),
        ("infinity", "inf", 0),
        ("Paris", "paris", 1),
        ("Paris, France", "Paris", 0),
        ("", "42", 0),
        ("nan", "NaN", 1),  # a word like any other
        ("420", "42", 0),
        ("4,2", "42", 0),
        (",,4,,2", "42", 0),
        ("-1,234,567.50", "-1234567.5", 1),
        ("1234,567", "1234567", 0),
        ("50%", "50", 0),
        ("50%", "50%", 1),
        ("", "", 0),
        ("  ", "", 0),
        (".", "", 0),
        ("none", None, 0),
        ("nan", float("nan"), 0),
        ("nan", np.float32("nan"), 0),
        ("", None, 0),
        ("0", 0, 1),
    ],
)
def test_exact_answer_compares_numbers_as_numbers_and_words_up_to_case(response, answer, right):
    assert ExactAnswer()(["?"], [response], answer=[answer]).tolist() == [right]


def test_exact_answer_takes_the_last_match_of_its_pattern_from_response_and_column():
    reward = ExactAnswer(column="solution", pattern=r"####\s*(.+)")
    responses = ["#### 1\nno, wait\n#### 2", "2", "#### 2.0"]
    columns = ["so 1 + 1 is 2\n#### 2", "#### 2", "2"]
    assert reward(["?"] * 3, responses, solution=columns).tolist() == [1.0, 0.0, 1.0]


def test_exact_answer_wants_one_group_and_its_column():
    with pytest.raises(ValueError, match="must have one group"):
        ExactAnswer(pattern=r"\d+")
    with pytest.raises(KeyError, match=r"no column 'answer'.*\['reply'\]"):
        ExactAnswer()(["?"], ["1"], reply=["1"])


@pytest.mark.parametrize("reward", [ExactAnswer, RegexMatch])
def test_a_pattern_that_is_none_is_refused_by_name(reward):
    for pattern, message in (("(", r"pattern \('\('\) is no regular expression"), (3, r"pattern \(3\) must be")):
        with pytest.raises(ValueError, match=message):
            reward(pattern=pattern)
    with pytest.raises(ValueError, match=r"whole \('no'\) must be True or False"):
        RegexMatch("a", whole="no")


def test_regex_match_searches_or_wants_the_whole_response():
    responses = ["<think>a\nb</think> 3", "3 <think></think>", "3"]
    assert RegexMatch("<think>.*</think>")([], responses).tolist() == [1, 1, 0]
    assert RegexMatch(r"<think>.*</think>\s*\d", whole=True)([], responses).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("response", "parses"),
    [
        ("def f(x):\n    return x", 1),
        ("def f(x) return x", 0),
        ("Sure!\n```python\nprint(1)\n```\nDone.", 1),
        ("```python\nprint(1)\n```\n```\nprint(\n```", 0),  # one of two blocks is broken
        ("", 0),
        ("```python\n```", 0),
        ("pattern = '\\d'", 1),  # an odd escape warns, but parses
        ("x = 1\0", 0),
        ("x = '\ud800'", 0),  # half a surrogate pair
        ("1" + " + 1" * 20_000, 0),  # too deep for the parser, though not wrong
        ("-" * 100_000 + "1", 0),
        ("1. Do:\n   ```python\n   if x:\n       y = 1\n   ```\n2. Done", 1),
        ("1. Do:\n\t```\n\tx = 1\n\t```", 1),
        ("```python\n   x = 1\n```", 0),  # the fence is not indented, so the code is
        ("   ```python\nx = 1\n   ```", 1),
        ("Say ```python\nx = 1\n``` here", 1),
        ("(" * 10_000, 0),
        ("# I cannot do that", 0),
        ("```python\n# later\n```", 0),
        ("Sure", 1),  # a name, for Python
        ("```python\nprint(1)\n", 0),  # cut off before its fence
        ('```python\nx = "```"\n```', 0),
    ],
)
def test_python_parses_reads_fenced_blocks_or_the_whole_response(response, parses):
    assert PythonParses()([], [response]).tolist() == [parses]


def test_python_parses_never_runs_the_code():
    assert PythonParses()([], ["raise SystemExit(1)"]).tolist() == [1.0]


class Digits:
    """Token t is the digit t; the end token has no text."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join("" if token == END else str(token) for token in ids)


def test_verifiable_rewards_combine_with_weights_in_an_env():
    rewards = {"answer": ExactAnswer(), "form": (RegexMatch(r"\d\d", whole=True), 0.25)}
    env = TokenEnv(**task(reward_fn=rewards, columns={"answer": [42, 0, 0]}, reward_on="text", tokenizer=Digits()))
    env.reset(options={"prompt_index": 0})
    env.step(4)
    env.step(2)
    _, reward, *_, info = env.step(END)
    assert reward == 1.25
    assert info["reward/answer"] == info["reward/form"] == 1.0


def test_on_tokens_they_say_what_they_need():
    env = TokenEnv(**task(reward_fn=PythonParses()))
    env.reset()
    with pytest.raises(RewardError, match="reward_on='text'"):
        env.step(END)


def test_each_says_which_columns_it_reads():
    assert named_columns(ExactAnswer("label")) == {"label"}
    assert named_columns(RegexMatch("a")) == named_columns(PythonParses()) == set()

"""What is shown of rows is what training gets: held against the batches of the loaders, node by node."""

from collections import Counter

import numpy as np
import pytest

from lit_rlhf import (
    PreferenceDataModule,
    RolloutDataModule,
    SFTDataModule,
    StepwiseDataModule,
    UnpairedDataModule,
    UserError,
)
from lit_rlhf.data.viewing import Viewer
from lit_rlhf.models.tokens import tokenizer_beside
from tests.data.small_rows import write

pytestmark = pytest.mark.filterwarnings("ignore:train (data|prompts)")
TOKENIZER = tokenizer_beside("demo")
HELLO, REPLY, LONG = "Hello.", "Hello! How are you?", "Thank you for your message. " * 4


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


ROWS = {
    SFTDataModule: [
        {"messages": chat(HELLO, REPLY, "Thanks.", "Good day!")},
        {"prompt": "Hello.", "completion": " Good day!"},
        {"text": LONG},
        {"messages": chat(HELLO, LONG)},
        {"messages": chat(LONG * 2, REPLY)},
    ],
    PreferenceDataModule: [
        {"prompt": chat(HELLO), "chosen": chat(HELLO, REPLY)[1:], "rejected": chat(HELLO, "No.")[1:]},
        {"prompt": "Hello.", "chosen": " Good day!", "rejected": " " + LONG},
        {"prompt": "Hello.", "chosen": " No.", "rejected": " No."},
        {"chosen": chat(HELLO, REPLY, "Thanks.", "Bye!"), "rejected": chat(HELLO, REPLY, "Thanks.", "No.")},
    ],
    UnpairedDataModule: [
        {"prompt": chat(HELLO), "completion": REPLY, "label": True},
        {"prompt": "Good day!", "completion": " " + LONG, "label": False},
        {"prompt": chat("Thanks."), "chosen": chat(HELLO, REPLY)[1:], "rejected": chat(HELLO, "No.")[1:]},
    ],
    StepwiseDataModule: [
        {"prompt": chat("Add 1 and 2."), "completions": ["1 + 2 = 3", "3"], "labels": [True, False]},
        {"prompt": "Add 1.", "completions": ["1", "1 + 1", LONG], "labels": [None, 0.5, True]},
    ],
}
CASES = [pytest.param(cls, limit, id=f"{cls.kind}-{limit}") for cls in ROWS for limit in (24, 200)]


def viewed(cls, tmp_path, limit, **options):
    """A data module of the rows of its class, and all rows as they are shown."""
    source = write(tmp_path / "rows.jsonl", ROWS[cls])
    data = cls(train=source, validation=None, tokenizer=TOKENIZER, max_length=limit, max_tokens=None, batch_size=2)
    data.setup("fit")
    dataset = data.datasets["train"]
    viewer = Viewer(data.kind, "train", data.sources["train"], TOKENIZER, data.read_by[0], dataset, **options)
    return data, list(viewer.rows(0, range(len(ROWS[cls])), dataset.reports[0].statuses))


def batched_steps(data):
    """(token before, token) of all that the loss counts, over the batches of an epoch."""
    for batch in data.train_dataloader():
        packed = batch.packed
        if data.kind == "stepwise":
            yield from ((None, packed.input_ids[node].item()) for node in batch.step_nodes)
        else:
            yield from zip(packed.input_ids[packed.predictors].tolist(), packed.target_ids.tolist(), strict=True)


def shown_steps(rows):
    for row in rows:
        prompt = [token for part in row.parts if part.name == "prompt" for token in part.tokens]
        for part in row.parts:
            tokens = part.tokens if part.name in ("row", "prompt") else [*prompt, *part.tokens]
            for before, token in zip([None, *tokens], tokens, strict=False):
                if token.learnt:
                    yield (None if part.name == "solution" else before.id, token.id)


@pytest.mark.parametrize(("cls", "limit"), CASES)
def test_tokens_and_those_that_the_loss_counts_are_those_of_the_training_batches(cls, limit, tmp_path):
    data, rows = viewed(cls, tmp_path, limit)
    assert len(rows) == len(ROWS[cls])
    assert Counter(shown_steps(rows)) == Counter(batched_steps(data))
    nodes = Counter(node for batch in data.train_dataloader() for node in batch.packed.input_ids.tolist())
    assert Counter(token.id for row in rows for part in row.parts for token in part.tokens) == nodes
    assert len({row.status for row in rows}) > 1 or limit == 200


@pytest.mark.parametrize("cls", ROWS)
def test_what_is_cut_off_makes_a_row_whole_again(cls, tmp_path):
    (tmp_path / "whole").mkdir()
    _, cut = viewed(cls, tmp_path, 24)
    _, whole = viewed(cls, tmp_path / "whole", None)
    for short, long in zip(cut, whole, strict=True):
        told = {
            part.name: [*part.tokens[: part.cut_at], *part.left_out, *part.tokens[part.cut_at :]]
            for part in short.parts
        }
        if "ties" in long.status:
            assert short.status == long.status and not short.parts
        else:
            assert {name: [t.id for t in tokens] for name, tokens in told.items()} == {
                part.name: [token.id for token in part.tokens] for part in long.parts
            }
            assert any(part.left_out for part in short.parts) == (short.status != "kept")


def test_roles_texts_and_control_tokens_are_told(tmp_path):
    _, (talk, text, bare, *_) = viewed(SFTDataModule, tmp_path, 200)
    (part,) = talk.parts
    assert "".join(token.text for token in part.tokens).startswith("<|user|>Hello.<|assistant|>Hello! How are you?")
    assert [token.text for token in part.tokens if token.control].count("<|assistant|>") == 2
    assert {token.role for token in part.tokens if token.learnt} == {"assistant"}
    assert {token.role for token in text.parts[0].tokens} == {"prompt", "completion"}
    assert {token.role for token in bare.parts[0].tokens} == {"text"} and not bare.parts[0].tokens[0].learnt
    _, (steps, odd) = viewed(StepwiseDataModule, tmp_path, 200)
    assert list(dict.fromkeys(token.role for token in steps.parts[1].tokens)) == ["step 1, right", "step 2, wrong"]
    assert {"step 1, not judged", "step 2, right: 0.5"} < {token.role for token in odd.parts[1].tokens}


def test_a_reward_model_is_scored_at_the_last_token_of_each_response(tmp_path):
    _, rows = viewed(PreferenceDataModule, tmp_path, 200, at_ends=True)
    for part in rows[0].parts:
        assert [token.learnt for token in part.tokens[:-1]] == [False] * (len(part.tokens) - 1)
        assert part.tokens[-1].learnt == (part.name != "prompt")


@pytest.mark.parametrize("begins", [False, True])
def test_prompts_are_those_that_are_played_and_lose_their_beginning_but_not_its_token(begins, tmp_path):
    tokenizer = tokenizer_beside("demo")
    if begins:  # a template as of Llama's: the first token is the beginning token
        tokenizer.bos_token = "<|user|>"
    source = write(tmp_path / "rows.jsonl", [{"prompt": chat(LONG), "answer": 1}, {"prompt": chat(HELLO)}])
    data = RolloutDataModule(max, train=source, validation=None, tokenizer=tokenizer, max_prompt_length=12)
    data.setup("fit")
    prompts = data.prompts["train"]
    found = dict(zip(prompts.origins.rows, prompts.prompt_ids, strict=True))
    viewer = Viewer("prompts", "train", data.sources["train"], tokenizer, data.read_by, found)
    cut, whole = viewer.rows(0, [0, 1], data.reports["train"][0].statuses)
    for row, ids in zip((cut, whole), prompts.prompt_ids, strict=True):
        assert [token.id for token in row.parts[0].tokens] == ids.tolist()
        assert not any(token.learnt for token in row.parts[0].tokens)
    assert cut.status == "truncated" and cut.parts[0].cut_at == begins and len(cut.parts[0].left_out) > 10
    assert whole.status == "kept" and not whole.parts[0].left_out


def test_a_file_that_has_changed_meanwhile_is_refused(tmp_path):
    data, _ = viewed(SFTDataModule, tmp_path, 200)
    source = write(tmp_path / "rows.jsonl", [{"messages": chat("Good day!", REPLY)}])
    dataset = data.datasets["train"]
    viewer = Viewer("sft", "train", data.sources["train"], TOKENIZER, data.read_by[0], dataset)
    with pytest.raises(UserError, match=rf"{source}, line 1: its tokens are others than a moment ago"):
        list(viewer.rows(0, [0], np.zeros(1, dtype=np.uint8)))

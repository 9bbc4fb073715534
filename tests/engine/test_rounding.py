"""Numbers of rows in bfloat16 on a CPU: few, close to what is there, and nobody's results are others."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification

from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.engine.divergence import Predictions
from lit_rlhf.engine.linear_head import LinearNLL
from lit_rlhf.engine.logprobs import nll_sum, token_logprobs
from lit_rlhf.engine.memory import planned_for
from lit_rlhf.engine.packing import pack
from lit_rlhf.engine.rounding import LEAST, PARTS, WIDTH, add_rows, drop_rows, few_shapes, missing_rows, rounded
from lit_rlhf.models.policy import Scorer
from lit_rlhf.rollout.play import GenerationSettings, play
from tests.rollout.test_play import make_env
from tests.tiny import CONFIGS, random_examples, tiny_policy

CPU = torch.device("cpu")


def test_sizes_are_few_and_near_and_not_smaller():
    sizes = [rounded(count) for count in range(4097)]
    assert all(0 <= size - count < max(LEAST, count / PARTS) for count, size in enumerate(sizes))
    assert len(set(sizes)) == 1 + 128 // LEAST + 5 * PARTS
    assert [rounded(size) for size in sizes] == sizes == sorted(sizes)
    assert rounded(0) == 0 and rounded(129) == 136 and rounded(2049) == 2176


def test_rows_are_added_where_a_kernel_would_be_kept_for_each_number():
    assert missing_rows(9, torch.bfloat16, CPU) == 7
    assert missing_rows(9, torch.float32, CPU) == missing_rows(9, torch.float16, CPU) == 0
    with planned_for("cuda", 2**30):
        assert missing_rows(9, torch.bfloat16, CPU) == 0


def test_rows_behind_are_zeros_and_go_again():
    x = torch.arange(6.0).view(3, 2)
    longer = add_rows(x, 2)
    assert longer.tolist() == [*x.tolist(), [0, 0], [0, 0]]
    assert torch.equal(drop_rows(longer, 2), x) and not drop_rows(longer, 2)._is_view()
    assert add_rows(x, 0) is x is drop_rows(x, 0)


@pytest.mark.parametrize("shared", [1, 3], ids=["rows of their own", "a shared prompt"])
def test_lengths_in_attention_are_few_and_cells_and_nodes_find_each_other(monkeypatch, shared):
    monkeypatch.setattr("lit_rlhf.engine.layout.SHARED_GAIN", float("inf"))
    monkeypatch.setattr("lit_rlhf.engine.layout.BUCKET_OVERHEAD", 0)  # many buckets
    batch = pack(random_examples(40, responses=shared, longest=80))
    layout, more = few_shapes(batch.layout, torch.bfloat16, CPU)
    count = len(batch.input_ids)
    assert len(layout.source) == count + more == rounded(count)
    nodes = torch.arange(count)
    parts = [(layout.buckets, layout.source[:count], nodes)]
    if shared > 1:
        two = layout.shared
        queries, keys = ([getattr(each, name) for each in two.answers] for name in ("queries", "keys"))
        parts += [
            (two.squares, two.source, nodes),
            (queries, two.response_source, two.responses),
            (keys, two.prompt_source, two.prompts),
        ]
    for buckets, source, expected in parts:
        assert len(buckets) > 1 and all(bucket.shape[1] % WIDTH == 0 for bucket in buckets)
        assert torch.equal(torch.cat([bucket.flatten() for bucket in buckets])[source], expected)


def test_elsewhere_a_layout_stays_what_it_is():
    layout = pack(random_examples(3)).layout
    assert few_shapes(layout, torch.float32, CPU) == (layout, 0)


class Rows(TorchDispatchMode):
    """The shapes of all products of matrices."""

    def __init__(self):
        super().__init__()
        self.rows = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.rows |= {size for matrix in args[-2:] for size in matrix.shape}
        return function(*args, **(kwargs or {}))


def without_rounding(monkeypatch):
    monkeypatch.setattr("lit_rlhf.engine.rounding.keeps_kernels", lambda dtype, device: False)


def gradients(network):
    found = {name: p.grad.float() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return found


@pytest.mark.parametrize("count, shared", [(5, 1), (5, 3), (1, 3)], ids=["rows of their own", "groups", "one group"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_pass_in_bfloat16_meets_few_shapes_and_gives_the_same_with_all_gradients(
    monkeypatch, architecture, count, shared
):
    monkeypatch.setattr(
        "lit_rlhf.engine.layout.SHARED_GAIN", float("inf")
    )  # prompts are attended once, whatever it costs
    policy = tiny_policy(architecture).bfloat16()
    examples = random_examples(count, responses=shared)
    results = []
    for rounding in (True, False):
        if not rounding:
            without_rounding(monkeypatch)
        with Rows() as met:
            logprobs, entropies = policy(pack(examples), with_entropy=True)
            (logprobs.sum() + entropies.sum()).backward()
        results.append((logprobs.float(), entropies.float(), gradients(policy)))
        counts = {len(pack(examples).input_ids), len(pack(examples).target_ids)}
        assert counts.isdisjoint(met.rows) is rounding
    (ours, entropies, by), (theirs, others, without) = results
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.03)
    torch.testing.assert_close(entropies, others, rtol=0.02, atol=0.03)
    for name, gradient in without.items():
        assert (by[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-6, name


def test_scores_in_bfloat16_are_those_of_the_rows_asked_for():
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=IMPLEMENTATION)
    scorer, batch = Scorer(model).bfloat16(), pack(random_examples(5))
    assert scorer(batch, batch.last_nodes).shape == batch.last_nodes.shape
    one = pack(random_examples(1))
    torch.testing.assert_close(scorer(batch, batch.last_nodes)[:1], scorer(one, one.last_nodes), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("chunk", [None, 4 * 70 * 3, 4 * 70 * 16], ids=["one", "of 3", "of 16"])
def test_sums_and_gradients_of_a_head_count_the_tokens_alone(chunk):
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 70).bfloat16(), torch.randn(21, 16).bfloat16().requires_grad_()
    targets = torch.randint(70, (21,))
    total = nll_sum(head, hidden, targets, chunk_bytes=chunk)
    total.backward()
    logprobs = torch.log_softmax(head.float()(hidden.float()), -1)
    exact = -logprobs.gather(-1, targets[:, None]).sum()
    torch.testing.assert_close(total, exact, rtol=1e-2, atol=0)
    expected = torch.autograd.grad(exact, hidden)[0]
    assert (hidden.grad.float() - expected.float()).norm() < 0.02 * expected.float().norm()
    assert token_logprobs(nn.Linear(16, 70).bfloat16(), hidden, targets, chunk_bytes=chunk)[0].shape == (21,)


def test_what_fills_up_weighs_nothing_in_a_sum():
    torch.manual_seed(0)
    hidden, targets = torch.randn(5, 4, requires_grad=True), torch.randint(9, (5,))
    head = nn.Linear(4, 9)
    whole = LinearNLL.apply(hidden, head.weight, head.bias, targets, 3, 2, None)
    first = LinearNLL.apply(hidden[:3], head.weight, head.bias, targets[:3], 3, 2, None)
    torch.testing.assert_close(whole, first)
    mine, theirs = (torch.autograd.grad(x, [hidden, head.weight, head.bias]) for x in (whole, first))
    torch.testing.assert_close(mine, theirs)


def test_predictions_of_a_teacher_are_of_its_rows():
    head, hidden = nn.Linear(4, 9).bfloat16(), torch.randn(5, 4).bfloat16()
    assert Predictions(head, hidden).logprobs(hidden, 7, 1.0).shape == (5, 7)


def test_a_rollout_in_bfloat16_plays_the_same_tokens_with_rows_added(monkeypatch):
    policy, played = tiny_policy().bfloat16(), []
    for rounding in (True, False):
        if not rounding:
            without_rounding(monkeypatch)
        played.append(play(policy, make_env(), GenerationSettings(), 11, env_seed=0).episodes)
    same = [a.response_ids.tolist() == b.response_ids.tolist() for a, b in zip(*played, strict=True)]
    assert sum(same) >= 9  # bfloat16 rounds other sums otherwise

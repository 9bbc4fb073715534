import pytest
import torch
from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score

from lit_rlhf.algorithms.step_metrics import StepCounts, first_wrong, step_counts


def drawn(solutions=60, seed=0):
    """Scores and labels of some solutions of one to five steps."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (solutions,), generator=generator)
    owners = torch.arange(solutions).repeat_interleave(lengths)
    labels = (torch.rand(len(owners), generator=generator) < 0.8).float()
    return torch.randn(len(owners), generator=generator) + 2 * labels - 0.5, labels, owners


def test_f1_is_that_of_torchmetrics():
    scores, labels, owners = drawn()
    metrics = step_counts(scores, labels, owners).metrics()
    wrong, thought_wrong = (labels == 0).int(), (scores <= 0).int()
    assert metrics["error_f1"].item() == pytest.approx(binary_f1_score(thought_wrong, wrong).item())
    macro = multiclass_f1_score(thought_wrong, wrong, num_classes=2, average="macro")
    assert metrics["f1"].item() == pytest.approx(macro.item())


def test_first_errors_are_those_of_a_slow_loop():
    scores, labels, owners = drawn()
    found = {True: [], False: []}
    for solution in owners.unique():
        own = owners == solution
        truth = [i for i, label in enumerate(labels[own]) if label == 0][:1]
        said = [i for i, score in enumerate(scores[own]) if score <= 0][:1]
        found[bool(truth)].append(truth == said)
    flawed, sound = (sum(found[kind]) / len(found[kind]) for kind in (True, False))
    assert 0 < flawed < 1 and 0 < sound < 1
    expected = 2 * flawed * sound / (flawed + sound)
    assert step_counts(scores, labels, owners).metrics()["first_error_f1"].item() == pytest.approx(expected)


def test_an_error_that_is_found_one_step_late_is_not_found():
    labels, owners = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1])
    late = step_counts(torch.tensor([1.0, 1.0, -1.0, 1.0]), labels, owners)
    assert (late.flawed, late.flawed_found, late.sound, late.sound_found) == (1, 0, 1, 1)
    assert late.metrics()["first_error_f1"] == 0
    assert step_counts(torch.tensor([1.0, -1.0, 1.0, 1.0]), labels, owners).metrics()["first_error_f1"] == 1


def test_counts_of_micro_batches_add_up_to_those_of_the_whole():
    parts = [drawn(20, seed) for seed in range(3)]
    offsets = torch.tensor([20 * number for number in range(3)])
    whole = [torch.cat(column) for column in zip(*parts, strict=True)]
    whole[2] = torch.cat([owners + offset for (_, _, owners), offset in zip(parts, offsets, strict=True)])
    added = sum(torch.stack(step_counts(*part)) for part in parts)
    assert StepCounts(*added).metrics() == step_counts(*whole).metrics()


def test_nothing_to_find_is_0_and_not_nan():
    counts = step_counts(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([0]))
    assert counts.metrics() == {"f1": 0.5, "error_f1": 0, "first_error_f1": 0}


def test_soft_labels_are_right_above_one_half():
    counts = step_counts(torch.ones(3), torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0, 0, 0]))
    assert (counts.right_as_right, counts.wrong_as_right) == (1, 2)


def test_first_wrong_is_the_number_of_steps_where_there_is_none():
    wrong, owners = torch.tensor([False, True, True, False]), torch.tensor([0, 0, 0, 1])
    assert first_wrong(wrong, owners).tolist() == [1, 4]

"""What a run does not go on from: states that are damaged, or of another run."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer

from lit_rlhf import UserError
from lit_rlhf.algorithms.resumed_state import (
    moments_of,
    pieces_of,
    require_callbacks,
    require_epochs,
    require_finite,
    require_loops,
    require_same_shapes,
    require_state,
    warn_of_rounded,
)


def test_what_is_no_tensor_differs_from_one():
    with pytest.raises(UserError, match=r"1 tensors differ, like a \(a str there, \(2,\) here\)"):
        require_same_shapes({"a": "x"}, {"a": torch.zeros(2)}, "a.ckpt")


def test_weights_in_fewer_bits_than_the_run_has_are_told_and_others_are_not():
    mine = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.zeros(1, dtype=torch.long)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_rounded({**mine, "b": torch.zeros(2)}, mine, "a.ckpt")
    with pytest.warns(UserWarning, match=r"1 tensors of a\.ckpt hold bfloat16, such as a, and this run float32"):
        warn_of_rounded({**mine, "a": torch.zeros(2, dtype=torch.bfloat16)}, mine, "a.ckpt")


WHOLE = {
    "loops": {"fit_loop": {"state_dict": {}}},
    "global_step": 3,
    "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(3.0)}}}],
    "lr_schedulers": [{}],
}
DAMAGED = {  # which part -> what stands there
    "loops": {"fit_loop": "x"},
    "lr_schedulers": [],
    "optimizer_states": [{"state": {}}],
    "optimizer_states ": [{"state": [3]}],
    "optimizer_states  ": [{"state": {0: 3}}],
}


@pytest.mark.parametrize("part", DAMAGED)
def test_a_checkpoint_that_training_would_go_on_from_with_something_new_is_refused(part):
    require_state(WHOLE, "a.ckpt")
    require_state(WHOLE | {"global_step": 0, "optimizer_states": [{"state": {}}]}, "a.ckpt")  # before the first step
    require_state({"loops": WHOLE["loops"], "global_step": 3}, "a.ckpt")  # weights alone
    with pytest.raises(UserError, match=f"^ckpt_path: a.ckpt is damaged: its {part.strip()} is not what a run writes"):
        require_state(WHOLE | {part.strip(): DAMAGED[part]}, "a.ckpt")


LOOP = {"state_dict": {}, "epoch_progress": {"current": {"ready": 0}}, "epoch_loop.batch_progress": {"total": 0}}


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("epoch_progress", {"current": {"ready": "x"}}, r"\['current'\]\['ready'\]: expected a whole number from 0 on"),
        ("epoch_progress", {"current": {"ready": -1}}, r"\['ready'\]: expected a whole number from 0 on, found int"),
        ("epoch_progress", 3, "expected a mapping, found int"),
        ("epoch_progress", {"current": {}}, r"\['epoch_progress'\]\['current'\]: expected a mapping with ready"),
        ("epoch_progress", {}, r"\['epoch_progress'\]\['current'\]: expected a mapping with ready"),
        (
            "epoch_loop.batch_progress",
            {"current": {"ready": 3, "completed": 500}},
            r"\['completed'\]: expected at most 3, as are ready, found 500",
        ),
        ("epoch_loop.batch_progress", None, "expected a mapping, found NoneType"),
        ("state_dict", {"combined_loader": "x"}, "combined_loader: expected a list of 1, found str"),
        ("state_dict", {"combined_loader": [{}, 3]}, r"combined_loader\[1\]: expected a mapping, found int"),
    ],
)
def test_counters_of_the_loop_that_are_none_are_refused_by_file_and_name(part, value, words):
    require_loops(LOOP, LOOP, "a.ckpt")
    require_loops(LOOP | {"state_dict": {"combined_loader": [{"epoch": 0}]}}, LOOP, "a.ckpt")
    with pytest.raises(UserError, match=rf"^ckpt_path: a\.ckpt is damaged.*{words}"):
        require_loops(LOOP | {part: value}, LOOP, "a.ckpt")
    with pytest.raises(UserError, match=r"its fit_loop: expected a mapping with epoch_progress, found dict"):
        require_loops({key: LOOP[key] for key in LOOP if key != "epoch_progress"}, LOOP, "a.ckpt")


def callbacks_and_states():
    callbacks = [EarlyStopping("val/loss"), ModelCheckpoint(monitor="val/loss"), Timer()]
    score, saver = torch.tensor(1.0), callbacks[1]
    saver.dirpath, saver.best_model_score, saver.current_score = "here", score, score
    saver.best_k_models, saver.best_model_path, saver.kth_best_model_path = {"a": score, "b": score}, "a", "b"
    callbacks[2]._offset = 1.5
    return callbacks, {callback.state_key: callback.state_dict() for callback in callbacks}


@pytest.mark.parametrize(
    ("number", "key", "value", "words"),
    [
        (0, "wait_count", "x", "expected a whole number from 0 on, found str"),
        (0, "best_score", [1.0], r"expected a tensor of \(\), found list"),
        (0, "best_score", torch.tensor(torch.nan), r"expected a number or infinity, found tensor\(nan\)"),
        (0, "best_score", torch.zeros((), device="meta"), r"expected a number or infinity, found tensor\(.*meta"),
        (1, "best_model_score", torch.tensor(torch.nan), r"expected a number or infinity, found tensor\(nan\)"),
        (1, "kth_value", torch.tensor(torch.nan), r"expected a number or infinity, found tensor\(nan\)"),
        (1, "current_score", torch.tensor(torch.nan), r"expected a number or infinity, found tensor\(nan\)"),
        (1, "best_k_models", {"b": torch.tensor(torch.nan)}, r"\['b'\]: expected a number .*, found tensor\(nan\)"),
        (1, "best_k_models", [1], "expected a mapping, found list"),
        (1, "best_k_models", {"b": "x"}, r"\['b'\]: expected a tensor of \(\), found str"),
        (1, "kth_best_model_path", "c", r"expected one of the best_k_models \(\['a', 'b'\]\), found c"),
        (1, "best_model_path", 3, "expected text, found int"),
        (1, "current_score", "x", r"expected a tensor of \(\), found str"),
        (1, "dirpath", 3, "expected text, found int"),
        (2, "time_elapsed", {"train": "x"}, r"\['train'\]: expected a finite number, found str"),
    ],
)
def test_states_that_lightnings_callbacks_would_fail_with_are_refused_by_file_and_name(number, key, value, words):
    callbacks, states = callbacks_and_states()
    require_callbacks(states, callbacks, "a.ckpt")
    require_callbacks({}, callbacks, "a.ckpt")  # of a run without them
    fresh = [EarlyStopping("val/loss"), ModelCheckpoint(monitor="val/loss"), Timer()]  # as resuming finds them
    require_callbacks(states, fresh, "a.ckpt")
    named = rf"^ckpt_path: a\.ckpt is damaged.* callbacks\[{type(callbacks[number]).__name__}\]\['{key}'\].*"
    states[callbacks[number].state_key][key] = value
    with pytest.raises(UserError, match=named + words):
        require_callbacks(states, callbacks, "a.ckpt")
    states[callbacks[number].state_key] = [1]
    with pytest.raises(UserError, match=r"expected a mapping.*, found list \(\[1\]\)"):
        require_callbacks(states, callbacks, "a.ckpt")


def test_what_a_rank_has_read_of_a_sharded_checkpoint_is_named_where_it_is_not_finite():
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    require_finite(pieces_of(layer, [optimizer]), "a.ckpt")
    optimizer.state[layer.bias]["exp_avg"][0] = torch.nan
    with pytest.raises(UserError, match=r"1 of 8 tensors of a.ckpt .* like exp_avg of bias in optimizer_states"):
        require_finite(pieces_of(layer, [optimizer]), "a.ckpt")


def test_moments_of_the_optimiser_that_are_not_finite_are_named():
    moments = moments_of(WHOLE)
    require_finite(moments, "a.ckpt")
    moments["exp_avg of parameter 0 in optimizer_states"][0] = torch.inf
    with pytest.raises(UserError, match=r"1 of 2 tensors .* like exp_avg of parameter 0 in optimizer_states"):
        require_finite(moments, "a.ckpt")


@pytest.mark.parametrize(
    ("most", "refused"), [(2, True), (0, True), (3, False), (9, False), (-1, False), (None, False)]
)
def test_a_run_of_fewer_epochs_than_were_made_says_which_option_to_raise(most, refused):
    loop = {"epoch_progress": {"current": {"ready": 4, "started": 4, "processed": 3, "completed": 3}}}
    said = rf"^ckpt_path: the run of a\.ckpt has made 3 epochs already, and trainer\.max_epochs is {most}: raise it "
    with pytest.raises(UserError, match=said) if refused else nullcontext():
        require_epochs(loop, most, "a.ckpt")

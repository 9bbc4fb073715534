import inspect
import pkgutil
from importlib import import_module
from typing import get_args

import pytest
import torch
from jaxtyping import Bool, Float, Int, TypeCheckError
from torch import Tensor, nn

from lit_rlhf import losses, oracle
from lit_rlhf.algorithms.calibration import calibration
from lit_rlhf.algorithms.kl_control import KLPenalty
from lit_rlhf.algorithms.preference import agreement
from lit_rlhf.engine.logprobs import nll_sum, token_logprobs
from lit_rlhf.engine.shapes import annotated_arrays, check_shapes, tensor_arguments
from lit_rlhf.losses import dpo_loss, reverse_kl_link, value_loss
from lit_rlhf.models.decoding import sample
from lit_rlhf.oracle import TablePolicy, TokenTree
from lit_rlhf.rollout.shaping import RewardShaping

TREE = TokenTree(vocab_size=3, stop_ids=[0], max_new_tokens=3)
TABLE = [torch.full((size, 3), 1 / 3).log().double() for size in (1, 2, 4)]
SIZES = {
    "B": 4,
    "T": 3,
    "M": 12,
    "K": 5,
    "N": 4,
    "C": TREE.num_completions,
    "U": 2,
    "V": 6,
    "E": 3,
    "d": 5,
    "n": 4,
    "P": 2,
    "t": 2,
    "*shape": (2, 3),
    "*rows": (2,),
}
# What a function takes besides tensors with a shape, where it has no default for it.
OTHERS = {
    **{name: 0.2 for name in ("alpha", "beta", "clip_range", "gae_lambda", "gamma", "kl_coef", "label_smoothing")},
    "group_size": 2,
    "head": nn.Linear(SIZES["d"], SIZES["V"]),
    "loss": lambda group: group.logprobs.sum(),
    "link": reverse_kl_link,
    "name": "an estimator",
    "num_sequences": 1,
    "odds_coef": 0.2,
    "ref_table": TABLE,
    "table": TABLE,
    "target_margin": 0.5,
    "top_k": 2,
    "tree": TREE,
}


def functions_of(package):
    """Functions that a package and its modules define for others."""
    modules = [
        package,
        *(import_module(f"{package.__name__}.{x.name}") for x in pkgutil.iter_modules(package.__path__)),
    ]
    for module in modules:
        for name, x in vars(module).items():
            if inspect.isfunction(x) and x.__module__ == module.__name__ and not name.startswith("_"):
                yield x


def annotations(function):
    return [parameter.annotation for parameter in inspect.signature(function).parameters.values()]


def named_tuple(annotation):
    """The named tuple that an argument may be; if it may not, the type of None."""
    return next((x for x in (annotation, *get_args(annotation)) if hasattr(x, "_fields")), type(None))


def takes_tensors(function):
    fields = [x for kind in annotations(function) for x in inspect.get_annotations(named_tuple(kind)).values()]
    return any(x is Tensor or "[Tensor" in str(x) for x in (*annotations(function), *fields))


FUNCTIONS = {
    x.__name__: x
    for x in (*functions_of(losses), *functions_of(oracle), token_logprobs, nll_sum, agreement, calibration, sample)
    if takes_tensors(x)
} | {
    "KLPenalty.loss": KLPenalty().loss,
    "RewardShaping.scores": RewardShaping().scores,
    "TablePolicy.states": TablePolicy(TREE, [[1]]).states,
    "TablePolicy.logprob_fn": TablePolicy(TREE, [[1] * SIZES["P"]]).logprob_fn,
}
ANY_SHAPE = {"nll", "reverse_kl_link", "forward_kl_link", "jensen_shannon_link"}  # of one tensor alone


def right_tensors(function):
    """A tensor of the documented shape for each argument, or field of one, that has a shape."""
    arrays = [array for kind in annotations(function) for _, array in annotated_arrays(kind)]
    tensors = {}
    for argument, array in zip(tensor_arguments(function), arrays, strict=True):
        sizes = [SIZES[axis] for axis in argument.axes]
        shape = [size for part in sizes for size in (part if isinstance(part, tuple) else (part,))]
        dtype = {Bool: torch.bool, Int: torch.int64}.get(array.dtype, torch.float32)
        tensors[argument.path] = torch.rand(shape) if dtype == torch.float32 else torch.ones(shape, dtype=dtype)
    return tensors


def call(function, tensors):
    """The function of these tensors; what it needs besides comes from `OTHERS`."""
    given = {}
    for name, parameter in inspect.signature(function).parameters.items():
        fields = {path.split(".")[1]: x for path, x in tensors.items() if path.startswith(f"{name}.")}
        if fields:
            given[name] = named_tuple(parameter.annotation)(**fields)
        elif name in tensors:
            given[name] = tensors[name]
        elif parameter.default is parameter.empty:
            given[name] = OTHERS[name]
    return function(**given)


def wrong_tensors(function):
    """Each argument in shapes it must not have: of another rank; of another size on an axis that it shares."""
    arguments, tensors = tensor_arguments(function), right_tensors(function)
    for argument in arguments:
        x = tensors[argument.path]
        yield argument.path, x[..., None]
        shared = {axis for other in arguments if other is not argument for axis in other.axes}
        for number, axis in enumerate(argument.axes):
            if axis in shared:
                yield argument.path, x.narrow(number, 0, 1)
                yield argument.path, torch.cat([x, x], dim=number)


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - ANY_SHAPE))
def test_a_public_function_of_tensors_refuses_other_shapes_than_documented_and_names_them(name):
    function = FUNCTIONS[name]
    assert Tensor not in annotations(function), "a tensor without a shape"
    right = right_tensors(function)
    call(function, right)
    wrongs = list(wrong_tensors(function))
    assert wrongs
    for argument, x in wrongs:
        given = right | {argument: x}
        with pytest.raises(ValueError, match=" must be ") as refusal:
            call(function, given)
        for each, tensor in given.items():
            assert each in str(refusal.value) and str(tuple(tensor.shape)) in str(refusal.value)


@pytest.mark.parametrize("name", sorted(ANY_SHAPE))
def test_what_takes_one_tensor_of_any_shape_keeps_its_shape(name):
    assert FUNCTIONS[name](torch.zeros(2, 1, 3)).shape == (2, 1, 3)


def test_every_public_loss_is_among_those():
    functions = {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    assert functions - {"alpha_link"} <= FUNCTIONS.keys()  # that one takes a number


def test_a_table_of_all_pairs_is_refused_with_both_shapes():
    x = torch.zeros(8)
    with pytest.raises(
        ValueError, match=r"value_loss: returns must .* got \(8,\) beside values \(8, 1\), old_values \(8, 1\)"
    ):
        value_loss(x[:, None], x[:, None], x, 0.2)
    with pytest.raises(
        ValueError, match=r"dpo_loss: rejected_logprobs must be \(B,\), got \(4, 1\) beside chosen_logprobs \(8,\)"
    ):
        dpo_loss(x, x[:4, None], x, x, 0.1)


@check_shapes
def mixed(
    x: Float[Tensor, "*rows C"],
    weights: Float[Tensor, " C"] | float = 1.0,
    mask: Bool[Tensor, "*rows C"] | None = None,
    scale: Float[Tensor, ""] | float = 1.0,
) -> Float[Tensor, "*rows C"]:
    """An argument of each kind."""
    return x * weights * scale if mask is None else torch.where(mask, x * weights * scale, 0.0)


class TestCheckShapes:
    def test_numbers_and_none_pass_where_a_tensor_may_also_stand(self):
        assert mixed(torch.ones(2, 3), 2.0, None).tolist() == [[2.0] * 3] * 2
        assert mixed(torch.ones(3), scale=3).tolist() == [3.0] * 3

    def test_leading_axes_may_be_any_number_and_none(self):
        weights = torch.arange(3.0)
        for rows in ((), (2,), (2, 1, 4)):
            assert mixed(torch.ones(*rows, 3), weights).shape == (*rows, 3)
        with pytest.raises(ValueError, match=r"x must be \(\*rows, C\), got \(\)$"):
            mixed(torch.tensor(1.0))

    def test_arguments_by_name_are_held_like_those_by_position(self):
        with pytest.raises(ValueError, match=r"mixed: weights must be \(C,\), got \(2,\) beside x \(2, 3\)"):
            mixed(weights=torch.ones(2), x=torch.ones(2, 3))

    def test_a_scalar_is_not_a_vector_of_one(self):
        with pytest.raises(ValueError, match=r"scale must be \(\), got \(1,\) beside x \(2, 3\)"):
            mixed(torch.ones(2, 3), scale=torch.ones(1))

    def test_a_mask_is_bool(self):
        with pytest.raises(
            ValueError, match=r"mask must be bool \(\*rows, C\), got \(2, 3\) torch.int64 beside x \(2, 3\)"
        ):
            mixed(torch.ones(2, 3), mask=torch.ones(2, 3, dtype=torch.int64))

    def test_axes_that_differ_between_calls_are_no_matter(self):
        assert mixed(torch.ones(3), torch.ones(3)).shape != mixed(torch.ones(4), torch.ones(4)).shape

    def test_a_function_without_a_shape_is_refused_when_it_is_decorated(self):
        with pytest.raises(TypeError, match="plain has no argument with a shape"):

            @check_shapes
            def plain(x: Tensor) -> Tensor:
                return x

    def test_name_signature_and_docstring_stay(self):
        assert (mixed.__name__, mixed.__doc__) == ("mixed", "An argument of each kind.")
        assert list(inspect.signature(mixed).parameters) == ["x", "weights", "mask", "scale"]

    def test_it_compiles_without_a_graph_break(self):
        x, weights = torch.randn(2, 3), torch.randn(3)
        compiled = torch.compile(mixed, backend="eager", fullgraph=True, dynamic=True)
        assert torch.equal(compiled(x, weights), mixed(x, weights))
        assert torch.equal(compiled(x[:1].repeat(5, 1), weights), mixed(x[:1].repeat(5, 1), weights))

    def test_per_example_gradients_see_the_shapes_of_one_example(self):
        rows, weights = torch.randn(5, 3), torch.randn(3)
        gradients = torch.func.vmap(torch.func.grad(lambda x, w: mixed(x, w).sum()), in_dims=(0, None))(rows, weights)
        assert torch.equal(gradients, weights.expand(5, 3))
        with pytest.raises(ValueError, match=r"weights must be \(C,\), got \(\) beside x \(3,\)"):
            torch.func.vmap(mixed)(rows, torch.randn(5))


def test_the_test_run_checks_annotations_of_losses_beyond_shapes():
    logprobs = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeCheckError):
        dpo_loss(logprobs, logprobs, logprobs, logprobs, 0.1)

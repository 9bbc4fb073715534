"""Roles as views: where the reference, the critic and a reward model live is told here, and no algorithm knows.

A view is another set of adapters on the policy's base, a scalar head on its trunk, or a network of its own.

Axes: M response tokens, n nodes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.errors import UserError, named_by, require
from lit_rlhf.models.adapter_folders import SavedAdapter, named_base, pop_head
from lit_rlhf.models.adapter_layers import candidates, leave_out, named
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.fingerprints import Fingerprints, fingerprints
from lit_rlhf.models.heads import OF_RESPONSES, require_policy
from lit_rlhf.models.holding import FrozenDtype, dtype_of
from lit_rlhf.models.hub import resolve
from lit_rlhf.models.network import ScalarHead
from lit_rlhf.models.policy import Policy, freeze, frozen_copy

REFERENCE = "reference"  # the frozen copy of an adapter that goes on learning
HoldReference = Literal["base", "copy", "parked"]
HoldCritic = Literal["adapter", "head", "model"]


class Reference(Protocol):
    """π_ref, wherever it lives; called as a `Policy` is."""

    @property
    def stands_on(self) -> Fingerprints:
        """The folders that its weights came from, beside those that the policy stands on."""

    def __call__(self, batch: PackedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """(M,) float32 log π_ref of the response tokens, and no entropies."""

    def at_hand(self) -> AbstractContextManager[None]:
        """While inside, its weights are where they are needed."""


class Values(Protocol):
    """Scores of nodes: a critic or a reward model, wherever it lives."""

    def __call__(self, batch: PackedBatch, nodes: Tensor) -> Tensor:
        """(n,) float32."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those that are its own."""


class SameBase:
    """The policy's own base with other adapters on: those that the run started from, or none.

    Args:
        policy: on whose base.
        adapters: by their names there.
        read_from: folders that one of them, which is the reference's alone, came from.
    """

    def __init__(self, policy: Policy, adapters: tuple[str, ...], read_from: tuple[str, ...] = ()) -> None:
        self.policy, self.adapters = policy, adapters
        self.stands_on = fingerprints(read_from)

    def __call__(self, batch: PackedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """(M,) float32 log π_ref of the response tokens, and no entropies."""
        logprobs: Tensor = self.policy(batch, temperature, adapters=self.adapters)[0]
        return logprobs, None

    def at_hand(self) -> AbstractContextManager[None]:
        """They are where the policy's are."""
        return nullcontext()


class OwnModel:
    """A frozen network of its own, on the policy's device and in its dtype, unless it has one of its own.

    Args:
        network: outside of the module tree, so that no strategy or optimiser moves it.
        policy: that it follows.
        parked: on the CPU between uses.
        held: the dtype of its own.
    """

    def __init__(self, network: Policy, policy: Policy, parked: bool = False, held: FrozenDtype | None = None) -> None:
        self.network, self.policy, self.parked, self.held = network, policy, parked, held

    @property
    def stands_on(self) -> Fingerprints:
        """The folders that its weights came from."""
        return self.network.stands_on

    def __call__(self, batch: PackedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """(M,) float32 log π_ref of the response tokens, and no entropies."""
        with self.at_hand():
            logprobs: Tensor = self.network(batch, temperature)[0]
        return logprobs, None

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Move the network to the policy; and back, if it is parked and nobody else holds it there."""
        held, wanted = next(self.network.parameters()), next(self.policy.parameters())
        came = held.device != wanted.device
        follows = self.held is None and held.dtype != wanted.dtype
        if came or follows:
            self.network.to(device=wanted.device, dtype=wanted.dtype if follows else None)
        try:
            yield
        finally:
            if self.parked and came:
                self.network.to(device="cpu")


class OnTrunk:
    """A scalar head on the policy's trunk, with adapters of its own or those of the policy.

    Args:
        policy: whose trunk; it is called as a whole, so that strategies see it.
        role: name of the head.
        adapter: of its own; None = it reads what the policy's gives.
    """

    def __init__(self, policy: Policy, role: str, adapter: str | None) -> None:
        self.policy, self.role, self.adapter = policy, role, adapter

    @property
    def model(self) -> Any:
        """The model whose trunk it is."""
        return self.policy.model

    def __call__(self, batch: PackedBatch, nodes: Tensor) -> Tensor:
        """(n,) float32 scores."""
        return self.policy.score(batch, nodes, self.role)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its head and its adapter."""
        yield from self.policy.heads[self.role].parameters()
        if self.adapter is not None and self.policy.adapters is not None:
            yield from self.policy.adapters.parameters(self.adapter)


def policy_parameters(policy: Policy) -> Iterator[nn.Parameter]:
    """Those that the policy's role is made of: not heads, nor adapters of other roles, on its trunk."""
    others = {id(p) for p in policy.heads.parameters()}
    if policy.adapters is not None:
        names = [name for name in policy.adapters.names if name not in policy.active]
        others |= {id(p) for name in names for p in policy.adapters.parameters(name)}
    return (p for p in policy.parameters() if id(p) not in others)


def reference_of(
    policy: Policy,
    frozen: dict[str, nn.Module],
    hold: HoldReference | None,
    frozen_dtype: FrozenDtype | None = None,
    saved: SavedAdapter | None = None,
) -> Reference:
    """The policy as it is now, for good.

    Args:
        policy: before its first step.
        frozen: networks outside of the module tree, to which a copy is added.
        hold: "base": on the policy's frozen base, with the adapters on that the run started from; "copy": a network of
            its own; "parked": likewise, on the CPU between uses; None = base where there is one.
        frozen_dtype: of a copy of weights that learn; one of a frozen base is as that.
        saved: another adapter on the policy's base that is the reference instead.

    Raises:
        UserError: there is no frozen base, or no such copy.
    """
    adapters = policy.adapters
    if hold == "base" and adapters is None:
        raise UserError(
            "hold_reference: base needs a base that stays as it is, and here all weights learn: set lora, or "
            "hold_reference: copy"
        )
    if adapters is None or hold in ("copy", "parked"):
        if adapters is None and frozen_dtype == "nf4":
            raise UserError(
                "frozen_dtype: nf4 is made of weights as they are read, and this reference is a copy of weights that "
                "learn: set lora, name the model as reference, or set frozen_dtype: bfloat16"
            )
        narrow = adapters is None and frozen_dtype is not None
        copied = frozen["reference"] = frozen_copy(policy, dtype_of(frozen_dtype) if narrow else None)
        copied.stands_on = fingerprints(policy.read_from)
        return OwnModel(copied, policy, hold == "parked", frozen_dtype)
    if saved is not None:
        require_policy(saved.name, saved.head_kind, f"an adapter for {saved.settings.get('task_type')}")
        weights = saved.weights()
        adapters.load(REFERENCE, saved.config(), weights, trained=False)
        return SameBase(policy, (REFERENCE,), (named_base(resolve(saved.name)),))
    fresh = policy.origin is not None and policy.origin.fresh
    below = tuple(name for name in policy.active if name not in adapters.trained)
    learning = () if fresh else sorted(adapters.trained & set(policy.active))
    for name in learning:  # an adapter from a folder goes on learning: what it was is kept beside it
        adapters.copy(name, REFERENCE)
        below = (*below, REFERENCE)
    return SameBase(policy, below, policy.read_from if learning else ())


def own_reference(
    network: Policy,
    policy: Policy,
    frozen: dict[str, nn.Module],
    hold: HoldReference | None,
    frozen_dtype: FrozenDtype | None = None,
) -> Reference:
    """Another model as the reference, held as it was loaded where `frozen_dtype` is given.

    Raises:
        UserError: it was to live on the policy's base, which is not its own.
    """
    if hold == "base":
        raise UserError(
            "hold_reference: base is for the very base of the policy, or an adapter on it, and this is neither"
        )
    frozen["reference"] = freeze(network)
    return OwnModel(network, policy, hold == "parked", frozen_dtype)


def shares_base(policy: Policy, saved: SavedAdapter | None) -> bool:
    """Whether an adapter stands on the very base that the policy holds."""
    origin = policy.origin
    if saved is None or origin is None or origin.merged:
        return False
    return origin.base == saved.base


def is_base(policy: Policy, name: str) -> bool:
    """Whether a folder or hub name is that of the very base that the policy holds frozen."""
    origin = policy.origin
    return origin is not None and not origin.merged and origin.base == named_base(resolve(name))


def critic_place(policy: Policy, hold: HoldCritic | None, critic: str | None, saved: SavedAdapter | None) -> HoldCritic:
    """Where the critic will live.

    Args:
        policy: at its start.
        hold: as asked for; None = on the policy's base where that can be.
        critic: what it starts from; None = the policy's trunk.
        saved: the adapter there.

    Raises:
        UserError: it cannot live where it was asked to.
    """
    scores = saved is None or saved.head_kind in (None, OF_RESPONSES)  # a head of steps is none of responses
    can = policy.adapters is not None if critic is None else scores and shares_base(policy, saved)
    if hold == "head" and critic is not None:
        raise UserError(f"hold_critic: head learns on the policy's trunk, so {critic} would have no say: drop critic")
    if hold == "adapter" and not can:
        held = None if policy.origin is None else policy.origin.base
        why = (
            "here all weights learn: set lora"
            if critic is None
            else f"{critic} stands on {saved.base if saved else 'weights of its own'}, the policy on {held}"
        )
        raise UserError(f"hold_critic: adapter needs a frozen base that is the policy's too, and {why}")
    return hold or ("adapter" if can else "model")


def add_critic(policy: Policy, hold: HoldCritic, lora: LoRA | None, saved: SavedAdapter | None) -> OnTrunk:
    """A critic on the policy's trunk.

    Args:
        policy: at its start.
        hold: "adapter" of its own, or "head" on what the policy's trunk gives, whose gradient it shares.
        lora: of a new adapter; None = a copy of the one that learns.
        saved: a reward model's adapter on the same base, which goes on learning as the critic.
    """
    adapters, linear = policy.adapters, scalar_layer(policy)
    if hold == "head":
        policy.heads["critic"] = ScalarHead(linear, policy.active)
        return OnTrunk(policy, "critic", None)
    assert adapters is not None
    if saved is None and lora is None:  # it starts as the policy's adapter, which goes on learning, too
        (learning,) = adapters.trained & set(policy.active)
        adapters.copy(learning, "critic", trained=True)
        policy.heads["critic"] = ScalarHead(linear, ("critic",))
    elif saved is None:
        fitting = without_head(policy, lora)
        assert fitting is not None
        config = fitting.config(adapters.base, OF_RESPONSES.task_type)
        leave_out(config, head_name(policy))  # of which its pattern may be, too
        below = tuple(name for name in policy.active if name not in adapters.trained)
        adapters.add("critic", config)
        policy.heads["critic"] = ScalarHead(linear, (*below, "critic"))
    else:
        policy.heads["critic"] = load_head(policy, saved, "critic", trained=True)
    return OnTrunk(policy, "critic", "critic")


def add_reward_model(policy: Policy, saved: SavedAdapter) -> OnTrunk:
    """A frozen reward model, an adapter on the base that the policy holds."""
    role = f"reward_{len(policy.heads)}"
    policy.heads[role] = load_head(policy, saved, role, trained=False).requires_grad_(False)
    return OnTrunk(policy, role, role)


def load_head(policy: Policy, saved: SavedAdapter, role: str, trained: bool) -> ScalarHead:
    """The head of a reward model's adapter, which is put on the policy's base."""
    assert policy.adapters is not None
    weights, linear = saved.weights(), scalar_layer(policy)
    head, shift = pop_head(weights)
    if head is None or head.shape != linear.weight.shape:
        found = "none" if head is None else f"one of {tuple(head.shape)}"
        raise UserError(f"{saved.name} holds no trained scalar head for {policy.adapters.base}: there is {found}")
    with named_by(saved.name):
        policy.adapters.load(role, saved.config(), weights, trained)
    with torch.no_grad():
        linear.weight.copy_(head)
    bias = saved.bias
    own = float(getattr(policy.model.config, "score_bias", 0.0))
    return ScalarHead(linear, (role,), (own if bias is None else bias) + (0.0 if shift is None else float(shift)))


def scalar_layer(policy: Policy) -> nn.Linear:
    """A fresh scalar head for the policy's trunk, N(0, 1/√(d+1)) as that of a `Scorer`."""
    like = next(policy.model.parameters())
    width = policy.model.config.get_text_config().hidden_size
    linear = nn.Linear(width, 1, bias=False, device=like.device, dtype=torch.float32)
    nn.init.normal_(linear.weight, std=(width + 1) ** -0.5)
    return linear


def without_head(policy: Policy, lora: LoRA | None) -> LoRA | None:
    """The same for a network without the language model's head, where it names that among others."""
    if lora is None:
        return lora
    given, name = lora.target_modules, head_name(policy)
    if isinstance(given, str):
        left = [layer for layer in named(candidates(policy.model), given) if layer != name]
    else:
        left = [end for end in given if name != end and not name.endswith(f".{end}")]
    require(bool(left), "lora.target_modules", given, "more than the head alone, which critics lack")
    return lora if isinstance(given, str) else replace(lora, target_modules=left)


def head_name(policy: Policy) -> str:
    """Name of the language model's head in its model."""
    head = policy.model.get_output_embeddings()
    return next(name for name, module in policy.model.named_modules() if module is head)

"""GRPO's losses of other libraries before the judge, beside ours: each library's own code, in its own Python."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lit_rlhf
from benchmarks.gradient_losses import GROUP_SIZE, no_baseline
from benchmarks.rounds import ROOT
from lit_rlhf import KLPenalty
from lit_rlhf.errors import UserError
from lit_rlhf.losses import gspo_policy_loss, policy_gradient_loss
from lit_rlhf.oracle import GradientJudge, Groups, OnPolicyMethod

Judges = dict[str, GradientJudge]
Row = dict[str, Any]


class Case(NamedTuple):
    """A loss of a library, by its own options."""

    options: dict[str, Any]
    whole: bool  # GRPO with its advantages; else the KL alone
    by_length: bool = False  # it divides each response by its length


TRL_SUM = {"loss_type": "dapo"}  # its default: a sum over tokens, divided by their number in the batch
CASES = {
    "trl": [
        Case({"importance_sampling_level": level, "use_bias_correction_kl": corrected, **TRL_SUM}, whole=False)
        for level in ("token", "sequence")
        for corrected in (True, False)
    ]
    + [
        Case({"importance_sampling_level": "token", **TRL_SUM}, whole=True),
        Case({"importance_sampling_level": "sequence", "loss_type": "grpo"}, whole=True, by_length=True),
    ],
    "agilerl": [
        Case({"importance_sampling_level": level, "use_bias_correction_kl": corrected}, whole=False)
        for level, corrected in (("token", True), ("token", False), ("trajectory", True))
    ]
    + [Case({"importance_sampling_level": "token"}, whole=True)],
}
IN_LOSS = KLPenalty("loss", "k3")
WHOLE_IN_LOSS = KLPenalty("loss", "k2_sequence")
WIDE_GSPO = partial(gspo_policy_loss, clip_range=0.2, clip_range_high=0.2)  # TRL's default
OURS: list[tuple[str, str, OnPolicyMethod, bool]] = [
    ("reward, k1", "kl_penalty: {place: reward}", OnPolicyMethod(no_baseline, policy_gradient_loss), False),
    ("loss, k3", "kl_penalty: {place: loss}", OnPolicyMethod(no_baseline, policy_gradient_loss, IN_LOSS), False),
    (
        "loss, k2_sequence",
        "kl_penalty: {place: loss, estimator: k2_sequence}",
        OnPolicyMethod(no_baseline, policy_gradient_loss, WHOLE_IN_LOSS),
        False,
    ),
    ("loss, k3", "loss_average: tokens", OnPolicyMethod.of(lit_rlhf.GRPO, loss_average="tokens"), True),
    ("loss, k3", "gspo_policy_loss, clip_range: 0.2", OnPolicyMethod.of(lit_rlhf.GRPO, loss=WIDE_GSPO), True),
]


def said(library: str, options: str, kl: str, whole: bool, policy: str) -> Row:
    """What a row is of."""
    method = f"GRPO, G = {GROUP_SIZE}" if whole else "KL alone"
    named = {"library": library, "method": method, "kl": kl, "options": options}
    return {"table": "peers", **named, "policy": policy}


def peer_rows(alone: Judges, whole: Judges, pythons: dict[str, str]) -> Iterator[Row]:
    """The KL alone against ∇KL, and GRPO against ∇J: ours, and of each library whose Python is named.

    Args:
        alone: judges of the problem without scores, on and off policy.
        whole: of the problem.
        pythons: by library.
    """
    for kl, options, method, grpo in OURS:
        for policy, judge in (whole if grpo else alone).items():
            report = judge.measure(method, GROUP_SIZE if grpo else 1)
            yield said("lit_rlhf", options, kl, grpo, policy) | report._asdict()
    for library, python in pythons.items():
        held = [
            (case, policy, judge, judge.groups(GROUP_SIZE if case.whole else 1))
            for case in CASES[library]
            for policy, judge in (whole if case.whole else alone).items()
        ]
        jobs = [(case.options, judge.beta, columns(groups, case.whole)) for case, _, judge, groups in held]
        for (case, policy, judge, groups), slopes in zip(held, answers(library, python, jobs), strict=True):
            scale = (groups.weights * groups.response_mask.sum(1)).sum() if case.by_length else 1.0
            report = judge.compare(groups, scale * slopes / groups.group_size)
            words = ", ".join(f"{name}: {value}" for name, value in case.options.items())
            yield said(library, words, "loss, k3", case.whole, policy) | report._asdict()


def columns(groups: Groups, whole: bool) -> dict[str, torch.Tensor]:
    """What a library's loss takes; of the KL alone, advantages are 0."""
    given = {name: getattr(groups, name) for name in ("logprobs", "old_logprobs", "ref_logprobs", "response_mask")}
    grpo = OnPolicyMethod.of(lit_rlhf.GRPO)
    advantages = grpo.credited(groups, 0.0)[:, 0] if whole else torch.zeros_like(groups.scores)
    return given | {"advantages": advantages}


def answers(library: str, python: str, jobs: list[Any]) -> list[torch.Tensor]:
    """(B, T) slopes of each job, from the library's Python."""
    with tempfile.TemporaryDirectory() as folder:
        given, answered = Path(folder) / "jobs.pt", Path(folder) / "slopes.pt"
        torch.save(jobs, given)
        command = [python, "-m", "benchmarks.peer_gradients", "--peer", library]
        command += ["--jobs", str(given), "--output", str(answered)]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise UserError(f"{library} in {python} failed: {' '.join(last)}")
        return torch.load(answered)

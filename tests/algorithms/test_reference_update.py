import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_rlhf import UserError
from lit_rlhf.algorithms.reference_update import ReferenceUpdate
from tests.algorithms.dpo_runs import fit
from tests.stages import make_stage, make_trainer


class TestReferenceUpdate:
    """TR-DPO."""

    def snapshots(self, inputs, folder, **options):
        """Policy and reference after each step."""
        taken = []

        class Snapshot(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                networks = pl_module.policy, pl_module.reference
                taken.append([torch.cat([p.detach().flatten() for p in n.parameters()]) for n in networks])

        module, data = make_stage("dpo", inputs, warmup_steps=0, **options)
        start = torch.cat([p.detach().flatten() for p in module.reference.parameters()])
        make_trainer(folder, max_steps=6, max_epochs=2, callbacks=[Snapshot()]).fit(module, data)
        return start, taken

    def test_a_soft_update_moves_the_reference_by_alpha_each_time(self, inputs, tmp_path):
        reference, taken = self.snapshots(inputs, tmp_path, reference_update=ReferenceUpdate(0.25, every=1))
        for policy, now in taken:
            reference = 0.25 * policy + 0.75 * reference
            torch.testing.assert_close(now, reference)

    def test_a_hard_update_copies_the_policy_at_each_third_step_and_leaves_it_between(self, inputs, tmp_path):
        reference, taken = self.snapshots(inputs, tmp_path, reference_update=ReferenceUpdate(1.0, every=3))
        assert len(taken) == 6
        for step, (policy, now) in enumerate(taken, start=1):
            assert not torch.equal(policy, reference)
            if step % 3 == 0:
                reference = policy
            assert torch.equal(now, reference)

    def test_the_reference_gets_no_gradient_and_is_counted_as_a_model(self, inputs, tmp_path):
        module, _ = fit(inputs, tmp_path, reference_update=ReferenceUpdate(1.0, every=1))
        assert not any(p.requires_grad for p in module.reference.parameters())
        assert len(list(module.networks())) == 2

    @pytest.mark.parametrize(
        ("settings", "words"), [({"alpha": 0.0}, r"alpha \(0.0\)"), ({"every": 0}, r"every \(0\)")]
    )
    def test_settings_that_move_nothing_are_refused_by_name(self, settings, words):
        with pytest.raises(UserError, match=words):
            ReferenceUpdate(**settings)

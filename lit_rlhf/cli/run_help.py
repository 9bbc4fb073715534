"""The help of `fit`, `validate`, `test` and `predict`: a page with sections, told without reading the libraries."""

from collections.abc import Sequence

from lit_rlhf.cli.commands import RUNS

HELPS = ("-h", "--help")
PAGE = """\
usage: lit-rlhf {name} --config X.yaml [--OPTION=VALUE ...]

{said}

config:
  -c, --config X.yaml       YAML of all the options below; given twice, the
                            later one wins, and over both what is typed
  --print_config            print every option with its value; =comments says
                            what each means, =skip_default leaves out defaults
  --seed_everything N       of weights, order and sampling (default: 0)
  --ckpt_path last          start from a checkpoint: last, best, or its file
  --weights_only true       read checkpoints as tensors and plain values alone

model, the method:
  --model lit_rlhf.DPO      or SFT, RewardModel, ProcessRewardModel, PPO, GRPO,
                            DrGRPO, DAPO, RLOO, REINFORCE, REINFORCEPlusPlus,
                            ReMax, RAFT, OnlineDPO, KTO, SimPO, CPO, ORPO,
                            Distillation, OnPolicyDistillation
  --model.ARGUMENT VALUE    of it, such as --model.learning_rate=1e-5
  --model.help CLASS        show them, as of lit_rlhf.DPO

data, of the kind that the method learns from:
  --data CLASS              lit_rlhf.SFTDataModule, PreferenceDataModule,
                            UnpairedDataModule, StepwiseDataModule,
                            RolloutDataModule
  --data.ARGUMENT VALUE     of it, such as --data.train=pairs.jsonl
  --data.help CLASS         show them, as of lit_rlhf.RolloutDataModule

trainer, Lightning's own:
  --trainer.default_root_dir runs/x
                            folder of the run
  --trainer.max_epochs N    or max_steps; of PPO's kind an epoch is an iteration
  --trainer.devices N       with strategy, num_nodes and precision
  --trainer.gradient_clip_val X
                            with accumulate_grad_batches
  --trainer.callbacks CLASS also logger; --trainer.callbacks.help shows classes
  --trainer.help            show all of them

what a run leaves and shows; .help behind a first word shows more:
  --export.folder model     the trained model as a Hugging Face folder; which,
                            dtype, merge, max_shard_size
  --samples.num_prompts 8   held-out prompts answered at validations; page
  --histograms.every 50     of scores, advantages, ratios; 0 = none
  --alarms.watch true       say what goes wrong, and what helps
  --predictions.file X      of predict; group_size, reward, keep
  --roles.show true         what each model takes in memory
  --progress.always false   lines also where a bar is drawn"""


def run_help(argv: Sequence[str]) -> str | None:
    """What a command line that asks for the help of a run is answered; None of any other."""
    if not argv or argv[0] not in RUNS or not any(word in HELPS for word in argv[1:]):
        return None
    return PAGE.format(name=argv[0], said=RUNS[argv[0]])

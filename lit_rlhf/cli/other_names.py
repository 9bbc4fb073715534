"""What other libraries call our options: TRL, OpenRLHF, verl, AgileRL, torchtune, axolotl, plain PyTorch.

A name says where its value goes here: an option, and where that differs what to write. Of several the classes in use
decide, as the KL coefficient is `beta` where pairs are learnt from and part of a controller where a policy plays.
"""

import re
from collections.abc import Collection, Iterable

KL = ("model.kl.kl_coef, of model.kl=lit_rlhf.FixedKL", "model.beta")
MICRO_BATCH = ("data.batch_size", "data.rollout_size", "data.max_tokens")
EPOCHS = ("trainer.max_epochs",)
NEW_TOKENS = ("data.max_new_tokens", "model.generation.max_new_tokens")
# Names that mean one thing -> the options that this may be here, the likeliest first.
MEANINGS: dict[str, tuple[str, ...]] = {
    "kl kl_coef kl_coeff kl_beta kl_weight kl_penalty kl_loss_coef init_kl_coef init_kl_coeff kl_ctl": KL,
    "kl_target": ("model.kl.target, of model.kl=lit_rlhf.AdaptiveKL",),
    "beta": ("model.odds_coef", *KL),
    "loss_type": ("model.loss",),
    "cpo_alpha bc_coef rpo_alpha": ("model.nll_coef",),
    "gamma simpo_gamma gamma_beta_ratio": ("model.target_margin",),
    "center_rewards_coefficient": ("model.center_coef",),
    "num_generations num_samples_per_prompt n_samples_per_prompt rollout_n samples_per_prompt n": ("data.group_size",),
    "batch_size micro_batch_size train_batch_size eval_batch_size micro_train_batch_size": MICRO_BATCH,
    "per_device_train_batch_size per_device_eval_batch_size": MICRO_BATCH,
    "rollout_batch_size num_rollouts": ("data.rollout_size",),
    "mini_batch_size minibatch_size num_mini_batches ppo_mini_batch_size": ("model.num_minibatches", *MICRO_BATCH),
    "num_ppo_epochs num_iterations update_epochs": ("model.ppo_epochs",),
    "epochs num_epochs num_train_epochs total_epochs n_epochs": EPOCHS,
    "num_steps num_train_steps max_train_steps total_steps training_steps": ("trainer.max_steps",),
    "max_length max_len max_seq_length max_seq_len cutoff_len block_size sequence_len": (
        "data.max_length",
        "data.max_prompt_length and data.max_new_tokens",
    ),
    "max_prompt_len prompt_max_len": ("data.max_prompt_length",),
    "max_completion_length max_response_length response_length generate_max_len max_gen_len": NEW_TOKENS,
    "stop stop_sequences stop_words": ("data.stop_strings", "model.generation.stop_strings"),
    "lr actor_lr actor_learning_rate": ("model.learning_rate",),
    "critic_lr value_lr": ("model.critic_learning_rate",),
    "lr_scheduler_type scheduler_type": ("model.lr_scheduler",),
    "warmup warmup_ratio num_warmup_steps lr_warmup_steps": ("model.warmup_steps",),
    "optim optimizer_type": ("model.optimizer",),
    "betas adam_beta1 adam_beta2": ("model.adam_betas",),
    "adam_epsilon eps": ("model.adam_eps",),
    "l2 wd": ("model.weight_decay",),
    "max_grad_norm grad_clip clip_grad grad_norm_clip clip_grad_norm gradient_clipping max_norm": (
        "trainer.gradient_clip_val",
    ),
    "gradient_accumulation_steps gradient_accumulation accumulation_steps grad_accum_steps": (
        "trainer.accumulate_grad_batches",
    ),
    "gradient_checkpointing use_gradient_checkpointing": ("model.activation_checkpointing",),
    "bf16": ("trainer.precision=bf16-mixed",),
    "fp16": ("trainer.precision=16-mixed",),
    "dtype torch_dtype mixed_precision": ("trainer.precision",),
    "seed random_seed manual_seed": ("seed_everything",),
    "model_name_or_path model_name model_path pretrain pretrained base_model model_id": ("model.policy",),
    "ref_model ref_policy reference_model ref_pretrain": ("model.reference",),
    "precompute_ref_log_probs": ("model.cache_reference",),
    "ref_model_sync_steps": ("model.reference_update.every",),
    "ref_model_mixup_alpha": ("model.reference_update.alpha",),
    "teacher_model teacher_model_name_or_path": ("model.teacher",),
    "reward_model reward_model_path reward_pretrain reward_fn reward_func reward_funcs": ("data.reward",),
    "dataset dataset_name dataset_path data_path train_dataset train_file train_files prompt_data": ("data.train",),
    "column column_names column_mapping": ("data.columns",),
    "eval_dataset val_dataset eval_file eval_files val_files": ("data.validation",),
    "dataset_num_proc preprocessing_num_workers": ("data.num_proc",),
    "dataloader_num_workers": ("data.num_workers",),
    "train_on_inputs completion_only_loss assistant_only_loss": ("data.loss_on",),
    "use_vllm vllm": ("data.backend=lit_rlhf.VLLMBackend",),
    "cliprange clip_eps eps_clip clip_ratio clip_coef epsilon": ("model.clip_range",),
    "clip_ratio_high epsilon_high eps_clip_high": ("model.clip_range_high",),
    "cliprange_value value_clip vf_clip": ("model.value_clip_range",),
    "vf_coef value_loss_coef": ("model.value_coef",),
    "ent_coef": ("model.entropy_coef",),
    "lam lambd lambda": ("model.odds_coef", "model.gae_lambda"),
    "lora_r lora_rank rank use_lora use_peft": ("model.lora.r",),
    "peft_config lora_config": ("model.lora",),
    "lora_alpha": ("model.lora.alpha",),
    "lora_dropout": ("model.lora.dropout",),
    "lora_target_modules": ("model.lora.target_modules",),
    "load_in_4bit use_qlora": ("model.frozen_dtype=nf4",),
    "save_steps save_strategy save_total_limit": ("trainer.callbacks=ModelCheckpoint",),
    "auto_lr_find": ("trainer.callbacks=LearningRateFinder",),
    "early_stopping early_stopping_patience": ("trainer.callbacks=EarlyStopping",),
    "eval_steps eval_interval": ("trainer.val_check_interval",),
    "logging_steps log_interval log_every": ("trainer.log_every_n_steps",),
    "output_dir save_path save_dir ckpt_dir": ("trainer.default_root_dir",),
    "report_to use_wandb wandb_project": ("trainer.logger",),
    "gpus num_gpus n_gpus gpus_per_node n_gpus_per_node num_processes": ("trainer.devices",),
    "nnodes num_machines": ("trainer.num_nodes",),
    "deepspeed fsdp zero_stage": ("trainer.strategy",),
    "resume resume_from_checkpoint load_checkpoint": ("ckpt_path",),
}
OURS = {name: here for names, here in MEANINGS.items() for name in names.split()}


def name_here(option: str, paths: Collection[str]) -> str:
    """Where the value of an option of another library goes here, to stand behind that there is no such option.

    Args:
        option: as it was written, such as --model.kl_coef.
        paths: of the options of the classes in use.

    Returns:
        Empty where no option in use has that meaning.
    """
    last = option.lstrip("-").rpartition(".")[2]
    meant = [here for here in OURS.get(last, ()) if _is_there(here, paths)]
    if "model.beta" in meant and "model.reference" not in paths:  # without a reference it weighs no KL
        meant.remove("model.beta")
    return f"; here it is {meant[0]}" if meant else ""


def _is_there(here: str, paths: Iterable[str]) -> bool:
    """Whether an option is among those in use; one of a class that an option names is where that option is."""
    first = re.split(r"[,= ]", here)[0]
    named = re.search(r" of ([\w.]+)=", here)
    return (named[1] if named else first) in paths

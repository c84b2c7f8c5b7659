"""What is meant by a key that does not exist: a slip, another option's key, or another tool's name."""

import dataclasses
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig, OmegaConf

from rsotrain.config.keys import did_you_mean, field_types, flatten, known_keys
from rsotrain.config.schema import SCHEMAS

_BATCH = (
    "; batch_size is the whole batch of an update and micro_batch_size what a process takes at once, from"
    " which follows over how many passes gradients are accumulated"
)
_RESUME = "; the same command resumes by itself, and checkpoint.path=… begins from another run"
_PROCESSES = "; start the processes with torchrun --nproc_per_node 4 -m rsotrain … parallelism=fsdp"
_WANDB = "; logger=wandb is Weights & Biases, and logger=jsonl leaves it out"
# What other tools call it (without a group, in lower case) -> our key, or the end of a sentence.
_OTHER_NAMES = {
    "lr": "optimizer.lr", "learn_rate": "optimizer.lr", "learning_rate": "optimizer.lr",
    "peak_lr": "optimizer.lr", "max_lr": "optimizer.lr", "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "proj_gap": "optimizer.update_proj_gap",
    "num_epochs": "epochs", "num_train_epochs": "epochs", "max_epochs": "epochs",
    "max_steps": "steps", "num_steps": "steps", "total_steps": "steps", "num_training_steps": "steps",
    "max_iters": "steps", "iters": "steps", "iterations": "steps",
    "gradient_accumulation_steps": _BATCH, "gradient_accumulation": _BATCH, "grad_accum": _BATCH,
    "grad_accum_steps": _BATCH, "accumulate_grad_batches": _BATCH,
    "per_device_train_batch_size": "micro_batch_size", "device_batch_size": "micro_batch_size",
    "total_batch_size": "batch_size", "global_batch_size": "batch_size", "train_batch_size": "batch_size",
    "bs": "batch_size", "resume": _RESUME, "resume_from": _RESUME, "resume_from_checkpoint": _RESUME,
    "continue_from": _RESUME, "warmup": "lr_scheduler.warmup_steps",
    "warmup_steps": "lr_scheduler.warmup_steps", "num_warmup_steps": "lr_scheduler.warmup_steps",
    "warmup_ratio": "lr_scheduler.warmup_fraction", "scheduler": "lr_scheduler",
    "lr_schedule": "lr_scheduler", "lr_scheduler_type": "lr_scheduler",
    "max_grad_norm": "grad_clip", "gradient_clip_val": "grad_clip", "clip_grad_norm": "grad_clip",
    "grad_clipping": "grad_clip", "clip": "grad_clip", "max_length": "seq_len", "block_size": "seq_len",
    "context_length": "seq_len", "max_seq_len": "seq_len", "max_seq_length": "seq_len",
    "sequence_length": "seq_len", "dtype": "precision", "fp16": "precision", "bf16": "precision",
    "mixed_precision": "precision", "gradient_checkpointing": "activation_checkpointing",
    "gpus": _PROCESSES, "num_gpus": _PROCESSES, "devices": _PROCESSES, "nproc": _PROCESSES,
    "nproc_per_node": _PROCESSES, "wandb": _WANDB, "use_wandb": _WANDB, "report_to": _WANDB,
    "wandb_project": "logger.wandb_project", "project": "logger.wandb_project", "dataset": "data",
    "dataset_name": "data", "save_dir": "output_dir", "out_dir": "output_dir", "exp_name": "run_name",
    "eval_interval": "eval_every", "eval_steps": "eval_every", "save_steps": "save_every",
    "save_interval": "save_every", "logging_steps": "log_every", "log_interval": "log_every",
    "torch_compile": "compile", "dim": "model.hidden_size", "d_model": "model.hidden_size",
    "n_embd": "model.hidden_size", "embed_dim": "model.hidden_size", "n_layer": "model.num_hidden_layers",
    "n_layers": "model.num_hidden_layers", "num_layers": "model.num_hidden_layers",
    "n_head": "model.num_attention_heads", "n_heads": "model.num_attention_heads",
    "num_heads": "model.num_attention_heads", "ffn_dim": "model.intermediate_size",
}  # fmt: skip


def unknown_key(key: str, composed: DictConfig | None = None, chosen: Mapping[str, str] | None = None) -> str:
    """The sentence for a key that does not exist, or that the chosen options do not have.

    ``composed``: the configuration as far as it has been composed, whose keys are then the only ones that
    are named. ``chosen``: group -> option, as the command line gives them.
    """
    here = known_keys() if composed is None else keys_of_composed(composed)
    if meant := other_tools_name(key, here):
        return f"unknown key {key}{meant}"
    group = key.partition(".")[0]
    if key in field_types() and key not in here and group in SCHEMAS:
        owners = [name for name, schema in SCHEMAS[group].items() if key in _keys_of(group, schema)]
        option = (chosen or {}).get(group) or (None if composed is None else composed[group].get("name"))
        others = f"{group}={owners[0]} has it" if len(owners) == 1 else f"{_some(group, owners)} have it"
        near = did_you_mean(key, [name for name in here if name.startswith(f"{group}.")])
        return f"{group}={option} has no key {key} ({others}){near}"
    return f"unknown key {key}{did_you_mean(key, here)}"


def other_tools_name(key: str, here: Sequence[str]) -> str:
    """ "; it is called optimizer.lr here", or what to do instead; empty for a name that no tool has."""
    group, _, last = key.lower().replace("-", "_").rpartition(".")
    meant = _OTHER_NAMES.get(last, "")
    if meant.startswith(";"):
        return "" if group and group not in ("logger", "checkpoint", "run", "trainer", "training") else meant
    if meant not in here or (group and group != meant.partition(".")[0] and f"{group}.{last}" in here):
        return ""
    return f"; it is called {meant} here"


def keys_of_composed(composed: DictConfig) -> list[str]:
    """The keys of the chosen options, and the groups."""
    plain = OmegaConf.to_container(composed)
    assert isinstance(plain, dict)
    keys = {key for key, _ in flatten({str(k): v for k, v in plain.items() if k != "hydra"})}
    return sorted((keys & set(field_types())) | set(SCHEMAS) | {"experiment", "tuned"})


def _keys_of(group: str, schema: type) -> set[str]:
    return {f"{group}.{field.name}" for field in dataclasses.fields(schema)}


def _some(group: str, owners: Sequence[str]) -> str:
    return f"{group}={', '.join(owners[:3])}{', …' if len(owners) > 3 else ''}"

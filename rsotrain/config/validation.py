"""Ranges and cross-field rules: everything that can be refused before any work is done."""

import math
import os
from pathlib import Path

from rsotrain.config.keys import flatten, plain
from rsotrain.config.methods import OptimizerConfig, SubspaceConfig
from rsotrain.config.schema import Config, LoadWhat, LRSchedulerConfig, Mode, ModelConfig, Strategy
from rsotrain.config.validation_data import positive, validate_data, validate_modes, validate_tokenizer
from rsotrain.errors import require


def validate(config: Config) -> None:
    """Raise UserError with one sentence for the first rule that ``config`` breaks."""
    for key, value in flatten(plain(config)):
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, f"{key}={value} must be a finite number")
    positive(
        config, "", "steps", "batch_size", "micro_batch_size", "seq_len", "grad_clip", "eval_every",
        "save_every", "log_every", "keep_checkpoints", "max_seconds",
    )  # fmt: skip
    require(config.seed >= 0, f"seed={config.seed} must not be negative")
    _validate_parallelism(config, int(os.environ.get("WORLD_SIZE", "1")))
    positive(config.evaluation, "evaluation.", "max_tokens", "micro_batch_size")
    validate_model(config.model)
    longest = config.model.max_position_embeddings
    require(
        config.seq_len <= longest
        or config.mode in (Mode.evaluate, Mode.generate, Mode.export),  # another model
        f"seq_len={config.seq_len} is longer than model.max_position_embeddings={longest};"
        " shorten the sequences or raise the model's maximum",
    )
    _validate_optimizer(config.optimizer)
    _validate_lr_scheduler(config.lr_scheduler, config.steps)
    validate_data(config)
    validate_tokenizer(config.tokenizer, config.model)
    validate_modes(config)
    positive(config.logger, "logger.", "wandb_init_timeout_seconds")
    _validate_checkpoint(config)
    name = config.run_name
    require(
        name is None or (name not in ("", ".", "..") and Path(name).name == name),
        f"run_name={name} must be the name of one folder, without a slash",
    )
    _validate_folder("output_dir", config.output_dir)
    require(
        config.report.path is not None or not config.report.claims,
        "report.claims=true is a part of the report; give the folder for it with report.path=…",
    )
    if config.report.path is not None:
        _validate_folder("report.path", config.report.path)


def _validate_parallelism(config: Config, started: int) -> None:
    """``started``: processes that torchrun says there are; a plan is for as many as it is asked for."""
    parallelism = config.parallelism
    positive(parallelism, "parallelism.", "world_size", "shard_size", "timeout_seconds")
    wanted, shards = parallelism.world_size, parallelism.shard_size
    if config.mode is Mode.plan:
        started = wanted or 1
        require(
            wanted is not None or parallelism.strategy is Strategy.single,
            f"parallelism={parallelism.strategy.name} divides a run among processes;"
            " say how many to plan for with parallelism.world_size=…",
        )
        require(
            parallelism.strategy is not Strategy.hsdp or shards is not None,
            "parallelism=hsdp shards a run inside a node; say of how many processes with"
            " parallelism.shard_size=…",
        )
    require(
        wanted in (None, started),
        f"parallelism.world_size={wanted}, but {started} processes were started;"
        f" start {wanted} with torchrun --nproc_per_node, or leave it null",
    )
    require(
        started == 1 or parallelism.strategy is not Strategy.single,
        f"parallelism=single is for one process, but {started} were "
        + ("asked for" if config.mode is Mode.plan else "started")
        + "; take one, or choose parallelism=fsdp, ddp or hsdp",
    )
    require(
        shards is None or parallelism.strategy is Strategy.hsdp,
        f"parallelism.shard_size={shards} is for parallelism=hsdp; leave it out",
    )
    require(
        shards is None or started % shards == 0,
        f"parallelism.shard_size={shards} does not divide the {started} processes; choose a divisor",
    )
    require(
        config.batch_size % started == 0,
        f"batch_size={config.batch_size} does not divide among {started} processes; make it a multiple",
    )
    micro, of_rank = config.micro_batch_size, config.batch_size // started
    require(
        micro is None or of_rank % micro == 0,
        f"batch_size={config.batch_size}{f' ({of_rank} a process)' if started > 1 else ''} is not divisible"
        f" by micro_batch_size={micro}; change one of them",
    )


def validate_model(model: ModelConfig) -> None:
    """Raise UserError for sizes that do not fit together."""
    positive(
        model, "model.", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "vocab_size", "rope_theta",
        "rms_norm_eps", "pad_vocab_to_multiple_of",
    )  # fmt: skip
    positive(
        model.rope_scaling, "model.rope_scaling.", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings",
    )  # fmt: skip
    require(
        model.initializer_range >= 0,
        f"model.initializer_range={model.initializer_range} must not be negative",
    )
    require(
        model.vocab_size is None or model.pad_vocab_to_multiple_of is None,
        f"model.vocab_size={model.vocab_size} is the size, so model.pad_vocab_to_multiple_of has no effect;"
        " leave one of them out",
    )
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    require(
        model.head_dim is not None or model.hidden_size % (2 * heads) == 0,
        f"model.hidden_size={model.hidden_size} does not split into model.num_attention_heads={heads}"
        " heads of an even size; change one of them, or give the size of a head with model.head_dim=…",
    )
    require(
        model.head_dim is None or model.head_dim % 2 == 0,
        f"model.head_dim={model.head_dim} must be even, since rotary embeddings turn pairs of features",
    )
    require(
        not (model.attention_bias and model.qkv_bias),
        "model.attention_bias=true has the biases of model.qkv_bias=true, too; leave one of them out",
    )
    require(
        kv_heads is None or heads % kv_heads == 0,
        f"model.num_attention_heads={heads} is not divisible by model.num_key_value_heads={kv_heads}",
    )


# settings that some optimizers have: the smallest and the largest value
_OWN_RANGES = {
    "max_growth": (1.0, math.inf),
    "free_scale": (0.0, math.inf),
    "rho": (0.0, 1.0),
    "momentum": (0.0, 1.0),
    "ns_steps": (1, 99),
}


def _validate_optimizer(optimizer: OptimizerConfig) -> None:
    """Ranks too large, and which samplers an optimizer takes, are for ``optim/build.py`` to refuse."""
    require(optimizer.lr >= 0, f"optimizer.lr={optimizer.lr} must not be negative")
    require(optimizer.scale >= 0, f"optimizer.scale={optimizer.scale} must not be negative")
    positive(optimizer, "optimizer.", "eps")
    require(
        len(optimizer.betas) == 2 and 0 <= optimizer.betas[0] < 1 and 0 <= optimizer.betas[1] <= 1,
        f"optimizer.betas={list(optimizer.betas)} must be two numbers, the first in [0, 1),"
        " the second in [0, 1]",
    )
    require(
        optimizer.weight_decay >= 0,
        f"optimizer.weight_decay={optimizer.weight_decay} must not be negative",
    )
    for key, (low, high) in _OWN_RANGES.items():
        value = getattr(optimizer, key, None)
        require(
            value is None or low <= value <= high,
            f"optimizer.{key}={value} must lie between {low} and {high}",
        )
    if isinstance(optimizer, SubspaceConfig):
        positive(optimizer, "optimizer.", "rank", "update_proj_gap")


def _validate_lr_scheduler(schedule: LRSchedulerConfig, steps: int) -> None:
    for name in ("warmup_fraction", "min_ratio", "decay_fraction"):
        value = getattr(schedule, name, 0.0)
        require(0 <= value <= 1, f"lr_scheduler.{name}={value} must lie in [0, 1]")
    warmup = schedule.warmup_steps
    require(
        warmup is None or 0 <= warmup <= steps,
        f"lr_scheduler.warmup_steps={warmup} must lie between 0 and steps={steps}",
    )
    decay = getattr(schedule, "decay_fraction", 0.0)
    fraction = schedule.warmup_fraction if warmup is None else warmup / steps
    require(
        fraction + decay <= 1,
        f"warm-up ({fraction:.3g}) and lr_scheduler.decay_fraction={decay} take more than all the steps",
    )


def _validate_checkpoint(config: Config) -> None:
    path = config.checkpoint.path
    if path is None:
        require(
            config.checkpoint.load is LoadWhat.all,
            "checkpoint.load=weights takes them from checkpoint.path, which is null; give a checkpoint",
        )
        return
    require(Path(path).expanduser().is_dir(), f"checkpoint.path={path} is not a folder")


def _validate_folder(key: str, path: str) -> None:
    existing = folder = Path(path).expanduser()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    require(existing.is_dir(), f"{key}={folder}: {existing} is not a folder")
    require(os.access(existing, os.W_OK | os.X_OK), f"{key}={folder}: {existing} is not writable")

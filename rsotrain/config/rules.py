"""What settings of the run, the model and the schedule demand of each other."""

import os
from pathlib import Path

from rsotrain.config.choices import WeightRounding
from rsotrain.config.methods import OptimizerConfig
from rsotrain.config.processes import check_rendezvous
from rsotrain.config.ranges import check_ranges
from rsotrain.config.schedules import LRSchedulerConfig
from rsotrain.config.schema import Config, LoadWhat, Mode, ModelConfig, Precision, Strategy
from rsotrain.errors import require


def validate_parallelism(config: Config, started: int) -> None:
    """``started``: processes that torchrun says there are; a plan is for as many as it is asked for."""
    parallelism = config.parallelism
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
    if started > 1 and config.mode is not Mode.plan:
        check_rendezvous()
    micro, of_rank = config.micro_batch_size, config.batch_size // started
    require(
        micro is None or of_rank % micro == 0,
        f"batch_size={config.batch_size}{f' ({of_rank} a process)' if started > 1 else ''} is not divisible"
        f" by micro_batch_size={micro}; change one of them",
    )


def validate_weight_rounding(config: Config) -> None:
    rounding, precision = config.optimizer.weight_rounding, config.precision
    require(
        rounding is WeightRounding.nearest
        or precision is Precision.bf16
        or config.mode in (Mode.evaluate, Mode.generate, Mode.export),  # no weight is written
        "optimizer.weight_rounding=stochastic rounds bfloat16 weights, and those of"
        f" precision={precision.name} are float32; leave it out, or take precision=bf16",
    )


def validate_update_in_backward(config: Config) -> None:
    """A gradient must be whole when it arrives, and no other may be needed for the update."""
    if not config.optimizer.update_in_backward or config.mode in (Mode.evaluate, Mode.generate, Mode.export):
        return
    begin = "optimizer.update_in_backward=true updates a parameter as soon as its gradient is there"
    micro = config.micro_batch_size
    require(
        config.parallelism.strategy is Strategy.single,
        f"{begin}, and parallelism={config.parallelism.strategy.name} adds gradients up over processes;"
        " leave it out, or take parallelism=single",
    )
    require(
        micro is None or micro == config.batch_size,
        f"{begin}, and micro_batch_size={micro} adds gradients up over the micro-batches of"
        f" batch_size={config.batch_size}; leave it out, or make them equal",
    )
    require(
        config.grad_clip is None,
        f"{begin}, and grad_clip={config.grad_clip} needs the norm of all gradients first; leave one of them"
        " out",
    )
    require(
        config.max_bad_steps == 0,
        f"{begin}, and max_bad_steps={config.max_bad_steps} judges a batch by the norm of all gradients"
        " before it; leave one of them out",
    )


def validate_model(model: ModelConfig) -> None:
    """Raise UserError for sizes out of range, or that do not fit together."""
    check_ranges(model, "model.")
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


def validate_lr_scheduler(schedule: LRSchedulerConfig, steps: int) -> None:
    warmup = schedule.warmup_steps
    require(
        warmup is None or warmup <= steps,
        f"lr_scheduler.warmup_steps={warmup} must lie between 0 and steps={steps}",
    )
    decay = getattr(schedule, "decay_fraction", 0.0)
    fraction = schedule.warmup_fraction if warmup is None else warmup / steps
    require(
        fraction + decay <= 1,
        f"warm-up ({fraction:.3g}) and lr_scheduler.decay_fraction={decay} take more than all the steps",
    )


def validate_decay(optimizer: OptimizerConfig) -> None:
    require(
        optimizer.weight_decay > 0 or not optimizer.decay_norms_and_embeddings,
        "optimizer.decay_norms_and_embeddings=true has no effect without optimizer.weight_decay=…; give both,"
        " or leave it out",
    )


def validate_training(config: Config) -> None:
    """What the training loop demands of its settings."""
    evaluation = config.evaluation
    require(
        config.spike_factor is None or config.max_bad_steps > 0,
        f"spike_factor={config.spike_factor} says which batches to skip, but max_bad_steps=0 skips none;"
        " give max_bad_steps=…, or leave spike_factor out",
    )
    require(
        evaluation.patience is None or config.eval_every is not None,
        f"evaluation.patience={evaluation.patience} counts evaluations, but eval_every=null makes none before"
        " the end; give eval_every=…",
    )
    require(
        evaluation.min_delta == 0 or evaluation.patience is not None,
        f"evaluation.min_delta={evaluation.min_delta} has no effect without evaluation.patience=…; give both,"
        " or leave it out",
    )
    validate_decay(config.optimizer)
    require(
        config.epochs is None or config.mode in (Mode.train, Mode.tune),
        f"epochs={config.epochs} is for mode=train, where the data say how many steps that is; give steps=…",
    )
    require(
        config.epochs is None or not config.data.streaming,
        "data.streaming=true tokenises while training, so how many sequences an epoch has is not known;"
        " give steps=… instead of epochs=…, or use data.streaming=false",
    )


def validate_checkpoint(config: Config) -> None:
    path = config.checkpoint.path
    if path is None:
        require(
            config.checkpoint.load is LoadWhat.all,
            "checkpoint.load=weights takes them from checkpoint.path, which is null; give a checkpoint",
        )
        return
    require(os.path.isdir(Path(path).expanduser()), f"checkpoint.path={path} is not a folder")

"""Methods as torch optimizers: a run's update, a state that torch saves, and Hugging Face's Trainer."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.runs import OPTIMIZERS, compose, load_data
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from rsotrain.config.defaults import method_names, method_settings, sampler_settings
from rsotrain.data.build import Data
from rsotrain.errors import UserError
from rsotrain.optim import torch_optimizers
from rsotrain.optim.torch_optimizers import GaLore, MethodOptimizer, optimizer_class
from rsotrain.training.lr_scheduler import lr_factor
from rsotrain.training.trainer import Trainer

STEPS = 4
SMALL = {"rank": 4, "update_proj_gap": 2}


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def tokens(count: int = 4) -> Tensor:
    return torch.randint(64, (count, 16), generator=torch.Generator().manual_seed(1))


def backward(model: nn.Module) -> None:
    batch = tokens()
    model(batch, labels=batch).loss.backward()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


MERGING = {"rank": 4, "merge_every": 3, "restart_warmup_steps": 1}


# the kinds of files: one that stands alone, those that build on another, a number that YAML takes for text,
# lists, and a value of the model's
@pytest.mark.parametrize("name", ["foam", "apollo_mini", "rso_pca", "scale", "adam_mini"])
def test_the_defaults_are_those_of_a_run(name: str) -> None:
    """Read without Hydra, they are what Hydra composes."""
    run = compose(["model=llama_tiny", f"optimizer={name}", "precision=fp32"])
    own: dict[str, Any] = {"weight_rounding": "nearest"}  # which a run derives from its precision
    if name == "adam_mini":
        own["num_heads"] = run.model.num_attention_heads
    assert method_settings(name, own) == run.optimizer
    assert sampler_settings(run.sampler.name) == run.sampler
    assert torch_optimizers.method_defaults(name).sampler == run.sampler.name
    assert method_names() == tuple(OPTIMIZERS)


@pytest.fixture(scope="module")
def data(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Data:
    return load_data(compose(tiny), tmp_path_factory.mktemp("data"))


# a full-rank method, one with bf16 arithmetic, bases with a rate of their own, moments in 8 bits, a residual
# at another rate, activations that are observed, and decay
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("foam", {"weight_decay": 0.1, "rest": "adam8bit"}),
        ("muon", {}),
        ("osd", {"rank": 4}),
        ("sn_sm", SMALL),
        ("fira", SMALL),
        ("galore", SMALL | {"state_dtype": "int8"}),
        ("rso_pca", SMALL),
        ("adam_mini", {"num_heads": 4}),
        ("relora", MERGING),
    ],
)
def test_an_update_is_that_of_a_run(name: str, settings: dict[str, Any], tiny: list[str], data: Data) -> None:
    """Clipped and scheduled as the run is, bitwise: it is the same arithmetic."""
    own = [f"optimizer.{key}={value}" for key, value in settings.items()]
    config = compose([*tiny, f"optimizer={name}", *own, f"steps={STEPS}", "grad_clip=0.5", "seed=3"])
    run = Trainer(config, data)
    plain = Trainer(compose([*tiny, "optimizer=adam", "seed=3"]), data)
    model = plain.model
    optimizer = optimizer_class(name)(model, seed=3, grad_clip=0.5, **settings)
    assert_same(weights(run.model), weights(model))
    schedule = LambdaLR(optimizer, lambda step: lr_factor(config.lr_scheduler, step, STEPS))
    for _ in range(STEPS):
        ((inputs, targets),) = run.micro_batches()
        run.train_step()
        (model(inputs, targets) / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert_same(weights(run.model), weights(model))


@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        ("foam", torch.bfloat16, {}),  # whose moments are float32 all the same
        ("ldadam", torch.float32, {"rank": 4, "state_dtype": "int8"}),
        ("osd", torch.float32, {"rank": 4}),
        ("rso_pca", torch.float32, SMALL),
    ],
)
def test_a_saved_optimizer_goes_on_bitwise(name: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    def made() -> tuple[nn.Module, MethodOptimizer, LambdaLR]:
        model = llama(dtype)
        optimizer = optimizer_class(name)(model, **settings)
        return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def steps(model: nn.Module, optimizer: MethodOptimizer, schedule: LambdaLR) -> None:
        for _ in range(3):
            backward(model)
            optimizer.step()
            schedule.step()
            model.zero_grad()

    straight = made()
    steps(*straight)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in straight], file)
    steps(*straight)
    file.seek(0)
    again = made()
    for part, state in zip(again, torch.load(file), strict=True):
        part.load_state_dict(state)
    steps(*again)
    assert_same(weights(straight[0]), weights(again[0]))
    saved, own = straight[1].state_dict(), again[1].state_dict()
    assert saved["param_groups"] == own["param_groups"]
    assert saved["state"].keys() == own["state"].keys()
    for number, state in saved["state"].items():
        assert_same(state, own["state"][number])
    assert any(t.any() for state in saved["state"].values() for t in state.values())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("foam", {}),
        ("galore", SMALL),
        ("racs", {}),
        ("carry", SMALL),
        ("rso_pca", {**SMALL, "grad_clip": 1.0}),
        ("relora", MERGING),
    ],
)
def test_hugging_faces_trainer_trains_and_resumes(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens(16)]

    def trainer() -> transformers.Trainer:
        model = llama()
        optimizer = optimizer_class(name)(model, **settings)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=STEPS, save_steps=2, per_device_train_batch_size=2, logging_steps=1,
            gradient_accumulation_steps=2, warmup_steps=1, lr_scheduler_type="cosine", report_to="none",
            use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
            max_grad_norm=0 if "grad_clip" in settings else 1.0,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))

    straight = trainer()
    before = weights(straight.model)
    straight.train()
    after = weights(straight.model)
    moved = {key for key, weight in after.items() if not torch.equal(weight, before[key])}
    assert moved == before.keys()
    assert any(isinstance(entry.get("grad_norm", 0.0), float) for entry in straight.state.log_history)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(after, weights(resumed.model))


def test_rso_keeps_no_gradient_of_a_weight_and_frees_its_own() -> None:
    """``model.zero_grad()``, which is all that a Trainer calls, must not leave B's to be added up."""
    model = llama()
    optimizer = torch_optimizers.RSO(model, rank=4)
    backward(model)
    layer = model.model.layers[0].self_attn.q_proj  # type: ignore[union-attr, index]
    assert layer.weight.grad is None
    assert layer.B.grad is not None
    optimizer.zero_grad()
    assert layer.B.grad is None
    backward(model)
    optimizer.step()
    model.zero_grad()
    assert layer.B.grad is None


def decayed_and_not(model: nn.Module, *, named: bool) -> list[dict[str, Any]]:
    """As Hugging Face's Trainer divides parameters: norms and biases apart."""
    pairs = list(model.named_parameters())
    parts = [[pair for pair in pairs if (pair[1].ndim < 2) is vector] for vector in (False, True)]
    return [
        {"params": part if named else [p for _, p in part], "weight_decay": decay}
        for part, decay in zip(parts, (0.5, 0.0), strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "settings"), [("foam", {}), ("galore", SMALL), ("rso", SMALL), ("lora", {})]
)
@pytest.mark.parametrize("named", [True, False])
def test_torchs_groups_of_parameters_have_their_own_settings(
    name: str, settings: dict[str, Any], named: bool
) -> None:
    model, decayed, plain = llama(), llama(), llama()
    given = {} if named and name in ("foam", "galore") else {"names_from": model}
    divided = optimizer_class(name)(decayed_and_not(model, named=named), **given, **settings)
    every = {"weight_decay": 0.5, "decay_norms_and_embeddings": True}
    others = [optimizer_class(name)(decayed, **every, **settings), optimizer_class(name)(plain, **settings)]
    for one, optimizer in ((model, divided), (decayed, others[0]), (plain, others[1])):
        for step in range(2):
            torch.manual_seed(step)
            for _, parameter in sorted(one.named_parameters()):
                parameter.grad = torch.randn(parameter.shape) if parameter.requires_grad else None
            for inner in optimizer._composite.groups:  # B of RSO, which is no parameter
                for key, holder in inner.gradient_holders().items():
                    if holder is not inner.parameters[key]:
                        holder.grad = torch.ones_like(holder)
            optimizer.step()
    found = weights(model)
    assert any(not torch.equal(found[key], tensor) for key, tensor in weights(plain).items())
    for key, tensor in found.items():
        assert torch.equal(tensor, weights(plain if tensor.ndim < 2 else decayed)[key]), key


def test_a_group_of_parameters_has_its_own_rates_which_schedules_change() -> None:
    model = llama()
    pairs = list(model.named_parameters())
    head = [pair for pair in pairs if "lm_head" in pair[0]]
    groups = [
        {"params": (pair for pair in pairs if "lm_head" not in pair[0]), "lr": 0.5, "scale": 0.1},
        {"params": head[0], "betas": (0.5, 0.9)},
    ]
    optimizer = optimizer_class("foam")(groups, lr=0.25)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rates["model.layers.0.mlp.up_proj.weight"] == 0.05
    assert (rates["model.norm.weight"], rates["lm_head.weight"]) == (0.5, 0.25)
    assert optimizer._composite.groups[-1].settings.betas == (0.5, 0.9)
    backward(model)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.25, 0.125]
    saved = optimizer.state_dict()
    again = optimizer_class("foam")([{"params": [pair]} for pair in llama().named_parameters()])
    with pytest.raises(UserError, match="not that of foam with these parameters"):
        again.load_state_dict(saved)


def test_hugging_faces_trainer_divides_the_parameters_itself(tmp_path: Path) -> None:
    model = llama()
    texts = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, weight_decay=0.1, learning_rate=0.01, report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    own = (optimizer_class("galore"), {"names_from": model, "lr": 0.01, "scale": 0.25, **SMALL})
    trainer = transformers.Trainer(model, arguments, train_dataset=texts, optimizer_cls_and_kwargs=own)
    trainer.train()
    optimizer = trainer.optimizer.optimizer  # accelerate's holds ours
    inner = {group.label: group for group in optimizer._composite.groups}
    assert all(group.settings.weight_decay in (0.0, 0.1) for group in inner.values())
    decays = {
        name: group.decay_of(name) for group in optimizer._composite.groups for name in group.parameters
    }
    assert {decays[name] for name in decays if "norm" in name} == {0.0}
    assert {decays[name] for name in decays if "norm" not in name} == {0.1}
    assert (tmp_path / "checkpoint-2/optimizer.pt").is_file()


@pytest.mark.parametrize(
    ("params", "more", "sentence"),
    [
        (
            lambda m: [{"params": m.parameters()}],
            {},
            "groups of parameters without names need names_from=model",
        ),
        (
            lambda m: [{"params": m.parameters()}],
            {"names_from": nn.Linear(2, 2)},
            "that names_from does not have",
        ),
        (lambda m: [{"params": list(m.named_parameters())}] * 2, {}, "is in two groups of params, or twice"),
        (
            lambda m: [{"params": m.named_parameters(), "rank": 3}],
            {},
            "group 0 of params has rank, which is no",
        ),
        (lambda m: [{"params": m.named_parameters(), "lr": -1.0}], {}, "group 0 of params: lr=-1.0 must not"),
        (lambda m: [{"params": m.named_parameters(), "lr": "x"}], {}, "group 0 of params: lr='x' of foam"),
        (lambda m: [{"params": m.named_parameters()}, 3], {}, "group 1 of params must be a mapping"),
        (
            lambda m: [{"params": m.named_parameters()}],
            {"groups": [{"pattern": "mlp", "optimizer": "muon"}]},
            "params in groups and groups=… both divide the parameters",
        ),
        (lambda m: m.named_parameters(), {"names_from": nn.Linear(2, 2)}, "names_from is for groups"),
    ],
)
def test_groups_of_parameters_that_cannot_be_are_refused(
    params: Any, more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        optimizer_class("foam")(params(llama()), **more)


def test_methods_that_change_modules_want_all_their_matrices_in_one_group() -> None:
    model = llama()
    one, other = list(model.named_parameters()), []
    other.append(one.pop(1))
    for more, sentence in (
        ({}, "groups of params need names_from=model"),
        ({"names_from": model}, "must be in one group of params"),
    ):
        with pytest.raises(UserError, match=sentence):
            optimizer_class("rso")([{"params": one}, {"params": other}], rank=4, **more)
    with pytest.raises(UserError, match="is in no group of params, but rso takes the model as a whole"):
        optimizer_class("rso")([{"params": one}], rank=4, names_from=model)


def test_named_parameters_and_other_patterns() -> None:
    model = llama()
    optimizer = torch_optimizers.Lion(model.named_parameters(), lr=0.1, scale=0.5, block_parameters=["mlp"])
    linears, rest = optimizer.param_groups
    assert len(linears["params"]) == 6
    assert (linears["lr"], rest["lr"]) == (0.05, 0.1)
    linears["lr"] = rest["lr"] = 0.0
    before = weights(model)
    backward(model)
    optimizer.step()
    assert_same(before, weights(model))


def test_what_it_refuses() -> None:
    model = llama()
    named = list(model.named_parameters())
    with pytest.raises(UserError, match="names decide"):
        GaLore(model.parameters())
    with pytest.raises(UserError, match=r"galore has no setting level; it has .*rank"):
        GaLore(model, level=2)
    with pytest.raises(UserError, match="rank='low' of galore"):
        GaLore(model, rank="low")
    with pytest.raises(UserError, match="lr=-1"):
        GaLore(model, lr=-1)
    with pytest.raises(UserError, match=r"no sampler 'svdd'; there are .*svd"):
        GaLore(model, sampler="svdd")
    with pytest.raises(UserError, match=r"sampler=golore .* give total_steps"):
        GaLore(model, sampler="golore")
    with pytest.raises(UserError, match="total_steps=9 does nothing with sampler=svd"):
        GaLore(model, total_steps=9)
    with pytest.raises(UserError, match="lion projects nothing"):
        torch_optimizers.Lion(model, bf16_products=True)
    with pytest.raises(UserError, match="rso projects in the dtype of the activations"):
        torch_optimizers.RSO(model, bf16_products=True)
    with pytest.raises(UserError, match="rounds=0 must be at least 1"):
        GaLore(model, sampler=sampler_settings("randomized_svd", rounds=0))
    with pytest.raises(UserError, match="the model has none; leave it out"):
        GaLore(model, weight_rounding="stochastic")
    with pytest.raises(UserError, match=r"no effect without optimizer\.weight_decay"):
        GaLore(model, decay_norms_and_embeddings=True)
    with pytest.raises(UserError, match="update_in_backward=True is for rsotrain's own runs"):
        GaLore(model, update_in_backward=True)
    with pytest.raises(UserError, match="rso changes the linears"):
        torch_optimizers.RSO(named)
    other = llama()
    torch_optimizers.RSO(other, rank=4)
    with pytest.raises(UserError, match=r"frozen, as RSO leaves them: give galore"):
        GaLore(other)
    with pytest.raises(
        UserError, match=r"adam_mini needs num_heads=…, which a run takes from model\.num_att"
    ):
        torch_optimizers.AdamMini(named)
    assert torch_optimizers.AdamMini(model)._composite.groups[0].config.num_heads == 4
    with pytest.raises(AttributeError, match=r"has no galor; its optimizers are .*galore"):
        _ = torch_optimizers.galor
    assert torch_optimizers.GALORE is GaLore

    optimizer = GaLore(named, **SMALL)
    with pytest.raises(RuntimeError, match="has no gradient"):
        optimizer.step()
    with pytest.raises(UserError, match="takes no further parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    before = {key: t.clone() for key, t in optimizer._composite.state_dict().items()}
    with pytest.raises(UserError, match=r"unexpected optimizer state|has no optimizer state|of shape"):
        optimizer.load_state_dict(GaLore(named, rank=8).state_dict())
    with pytest.raises(UserError, match="not that of galore with these parameters"):
        optimizer.load_state_dict(GaLore(named, block_parameters=["mlp"]).state_dict())
    assert_same(before, optimizer._composite.state_dict())
    backward(model)
    optimizer = GaLore(named, **SMALL)
    optimizer.state[named[1][1]]["exp_avg"] = torch.zeros(1, device="meta")  # as where the model has moved
    with pytest.raises(UserError, match="is on cpu and its optimizer state on meta: move the model before"):
        optimizer.step()

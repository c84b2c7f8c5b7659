"""Every method as a plain ``torch.optim.Optimizer``, for a training loop of one's own or another Trainer.

    from rsotrain.optim.torch_optimizers import FOAM

    optimizer = FOAM(model, lr=0.01, scale=0.25)

There is one class for each file of ``conf/optimizer``, by the name of the file, with capitals and underscores
as one likes: ``GaLore``, ``SN_SM``, ``ApolloMini``. Its keyword arguments are the keys of the method, and the
file gives their defaults. The classes are made from these files when they are asked for.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from rsotrain.config.choices import WeightRounding
from rsotrain.config.defaults import method_defaults, method_names, method_settings, sampler_settings
from rsotrain.config.groups import all_methods
from rsotrain.config.methods import OptimizerConfig
from rsotrain.config.rules import validate_decay
from rsotrain.config.samplers import SamplerConfig
from rsotrain.config.schema import Precision
from rsotrain.errors import UserError, require
from rsotrain.models.plain_linears import make_projectable
from rsotrain.optim.base import ParamGroupOptimizer
from rsotrain.optim.build import build_optimizer, build_sampler, method_of
from rsotrain.optim.torch_groups import Params, check_group, divided, whole_model
from rsotrain.optim.with_bases import OptimizerWithBases

_HINT = "load it into an optimizer made with the arguments of the one that was saved"
_STEPS = "steps_done"  # of each param_group


class MethodOptimizer(torch.optim.Optimizer):
    """The method for the attention and MLP weights and AdamW, or ``rest``, for the others, as in a run.

    ``params``: the model, or its named parameters; RSO and LoRA need the model. Or groups of parameters, as
    all optimizers of torch take them: mappings of ``params`` and of what is a group's own, ``lr``, ``scale``,
    ``weight_decay``, ``betas`` or ``eps``. Their ``params`` are pairs of name and parameter; parameters alone
    find their names in the model ``names_from``, as those of Hugging Face's Trainer do. The ``weight_decay``
    of a group is that of all its parameters, norms and embeddings too. Each group of
    ``param_groups`` has its own ``lr``: that of the method's matrices is lr × scale, that of the others lr.
    This is what a step uses, so schedulers of torch work. The optimizer state is made at once, on the devices
    of the parameters: move the model first. Every parameter needs a gradient in each step.

    LoRA and ReLoRA add parameters to the model, and no scheduler need know of ReLoRA's restarts. RSO changes
    the linears of the model, of Hugging Face's as of ours, and their weights get no gradients: what has them
    is no parameter, so ``torch.nn.utils.clip_grad_norm_`` does not see it (use ``grad_clip``), nor does
    DistributedDataParallel (refused).

    ``sampler``: a name of ``conf/sampler``, or ``sampler_settings(name, …)`` for other settings than the
    file's; None: the method's own. ``seed``: of all random numbers. ``total_steps``: for ``sampler=golore``
    alone, which changes at a share of them. ``bf16_products``: project in bfloat16; None: where the method's
    weights are bfloat16. ``grad_clip``: as in a run, a limit on the norm of the gradients, which ``step``
    applies. ``settings``: the keys of ``optimizer.*``, such as ``lr``, ``scale``, ``rank`` or
    ``block_parameters``, the regular expressions that find the method's matrices. Raises UserError for
    settings that a run would refuse, too.
    """

    method: ClassVar[str]  # its name in conf/optimizer

    def __init__(
        self,
        params: Params,
        *,
        names_from: nn.Module | None = None,
        sampler: str | SamplerConfig | None = None,
        seed: int = 0,
        total_steps: int | None = None,
        bf16_products: bool | None = None,
        grad_clip: float | None = None,
        **settings: Any,
    ) -> None:
        values = _from_model(self.method, names_from or params) | settings
        model, divisions = divided(self.method, params, names_from)
        require(
            not divisions or not settings.get("groups"),
            "params in groups and groups=… both divide the parameters; give one of them",
        )
        require(grad_clip is None or grad_clip > 0, f"grad_clip={grad_clip} must be positive, or None")
        trained = [p for _, p in (model.named_parameters() if isinstance(model, nn.Module) else model)]
        low = any(p.dtype is torch.bfloat16 and p.ndim == 2 for p in trained)
        if low:  # as in a run with precision=bf16
            values = {"weight_rounding": WeightRounding.stochastic} | values
        config = method_settings(self.method, values)
        for number, division in enumerate(divisions):
            check_group(self.method, number, {**values, **division.settings})
        chosen = method_defaults(self.method).sampler if sampler is None else sampler
        subspace = sampler_settings(chosen) if isinstance(chosen, str) else chosen
        _refuse(config, subspace, low, total_steps, bf16_products)
        if method_of(config).changes_modules():
            model = whole_model(self.method, model, names_from) if divisions else model
            if not isinstance(model, nn.Module):
                raise UserError(
                    f"{self.method} changes the linears of the model, so it needs the model itself, not its"
                    " parameters"
                )
            make_projectable(model, config.block_parameters)
        low = low if bf16_products is None else bf16_products
        self._composite = build_optimizer(
            model,
            config,
            subspace,
            precision=Precision.bf16 if low else Precision.fp32,
            seed=seed,
            total_steps=total_steps or 1,
            divisions=divisions,
        )
        groups_of = self._composite.parameter_groups
        require(
            bool(groups_of.by_methods) or not groups_of.patterns,
            f"all matrices that block_parameters finds are frozen, as RSO leaves them: give {self.method} a"
            " model that trains them, which no RSO had before",
        )
        self._grad_clip = grad_clip
        self._peaks = [inner.peak_lr for inner in self._composite.groups]
        self._is_checked = False
        self._forward_passes = ExitStack()
        self._is_complete = False
        groups = [
            {"params": list(inner.parameters.items()), "lr": inner.peak_lr, _STEPS: 0}
            for inner in self._composite.groups
        ]
        super().__init__(groups, {"lr": config.lr})
        self._is_complete = True
        self._share_state()
        self._observe()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """UserError: patterns divide all parameters into groups when the optimizer is made."""
        if getattr(self, "_is_complete", False):
            raise UserError(f"{self.method} takes no further parameters: make it with all of them")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update at the rates of ``param_groups``; RuntimeError if a parameter has no gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_once()
        self._composite.gradients()
        self._forward_passes.close()
        if self._grad_clip is not None:
            norms = self._composite.gradient_norms()
            self._composite.clip_(torch.linalg.vector_norm(torch.stack(norms)), self._grad_clip)
        for inner, group, peak in zip(self._composite.groups, self.param_groups, self._peaks, strict=True):
            _set_lr(inner, float(group["lr"]), peak)
        self._composite.set_lr_factor(self._composite.rate_factor(self._composite.steps_done + 1))
        self._composite.step()
        for group in self.param_groups:
            group[_STEPS] = self._composite.steps_done
        self._drop_other_gradients()
        self._observe()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._drop_other_gradients()

    def _drop_other_gradients(self) -> None:
        """Of tensors that are no parameters, such as RSO's B, which ``model.zero_grad()`` does not know."""
        for inner in self._composite.groups:
            for name, holder in inner.gradient_holders().items():
                if holder is not inner.parameters[name]:
                    holder.grad = None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also the learning rates, as in torch. UserError, and no change, if it is of another optimizer."""
        saved, own = state_dict["param_groups"], self.param_groups
        names = [group.get("param_names") for group in saved]
        require(
            names == [group["param_names"] for group in own] and all(_STEPS in group for group in saved),
            f"the state is not that of {self.method} with these parameters: {_HINT}",
        )
        flat = {"step": torch.tensor(saved[0][_STEPS])}
        for group in saved:
            for number, name in zip(group["params"], group["param_names"], strict=True):
                flat |= {f"{name}.{key}": t for key, t in state_dict["state"].get(number, {}).items()}
        self._composite.load_state_dict(flat, _HINT)
        # of torch's own only the groups: it would cast the moments to the dtype of the weights
        super().load_state_dict(state_dict | {"state": {}})
        self._share_state()
        self._forward_passes.close()
        self._observe()

    def _share_state(self) -> None:
        """Let torch see the method's own tensors, which are the state that ``state_dict`` saves."""
        for inner in self._composite.groups:
            for name, parameter in inner.parameters.items():
                if inner.state[name]:
                    self.state[parameter] = inner.state[name]

    def _observe(self) -> None:
        """Until the next step forward passes with gradients belong to it; RSO's bases may need their data."""
        self._forward_passes.enter_context(self._composite.observing())

    def _check_once(self) -> None:
        """Raise UserError before the first step for what may have happened since the optimizer was made."""
        if self._is_checked:
            return
        for inner in self._composite.groups:
            holders = inner.gradient_holders()
            require(
                all(holders[name] is parameter for name, parameter in inner.parameters.items())
                or not dist.is_initialized()
                or dist.get_world_size() == 1,
                f"{self.method} has gradients that are no parameter's, which DistributedDataParallel does not"
                " sum: use one process, or rsotrain's own runs",
            )
            for name, parameter in inner.parameters.items():
                for tensor in inner.state[name].values():
                    require(
                        tensor.device == parameter.device,
                        f"{name} is on {parameter.device} and its optimizer state on {tensor.device}: move"
                        " the model before its optimizer is made",
                    )
        self._is_checked = True


def _refuse(
    config: OptimizerConfig,
    sampler: SamplerConfig,
    low: bool,
    total_steps: int | None,
    bf16_products: bool | None,
) -> None:
    """Raise UserError for arguments that would have no effect. ``low``: are there bfloat16 matrices?"""
    validate_decay(config)
    require(
        not config.update_in_backward,
        "update_in_backward=True is for rsotrain's own runs: here step() updates the weights; leave it out",
    )
    require(
        low or config.weight_rounding is WeightRounding.nearest,
        "weight_rounding=stochastic rounds bfloat16 weights, and the model has none; leave it out",
    )
    samplers = [build_sampler(own) for _, own in all_methods(config, sampler)]
    switches = any(built is not None and built.switch is not None for built in samplers)
    require(
        switches == (total_steps is not None),
        f"sampler={sampler.name} changes at a share of the training: give total_steps=…"
        if switches
        else f"total_steps={total_steps} does nothing with sampler={sampler.name}: leave it out",
    )
    require(
        any(samplers) or bf16_products is None,
        f"{config.name} projects nothing, so bf16_products would do nothing: leave it out",
    )
    require(
        bf16_products is None or not method_of(config).changes_modules(),
        f"{config.name} projects in the dtype of the activations: leave bf16_products out",
    )


def _set_lr(inner: ParamGroupOptimizer, lr: float, peak: float) -> None:
    """Let the next update have the rate ``lr``; bases with a rate of their own get its share of ``peak``."""
    inner.peak_lr = lr
    if isinstance(inner, OptimizerWithBases):
        inner.bases.lr_share = lr / peak if peak else 1.0


def _from_model(method: str, params: Any) -> dict[str, Any]:
    """What the file takes from the model's settings, from a model of Hugging Face's, which has the same."""
    taken: dict[str, Any] = {}
    for key, value in method_defaults(method).values.items():
        if isinstance(value, str) and value.startswith("${model."):
            found = getattr(getattr(params, "config", None), value[len("${model.") : -1], None)
            taken |= {} if found is None else {key: found}
    return taken


@cache
def optimizer_class(method: str) -> type[MethodOptimizer]:
    """The class of ``optimizer=method``; UserError if there is none of this name."""
    known = method_names()
    require(method in known, f"there is no optimizer {method!r}; there are {', '.join(known)}")
    schema = method_defaults(method).schema
    body = {
        "method": method,
        "__module__": __name__,
        "__doc__": f"{schema.__doc__}\n\nArguments: see MethodOptimizer.",
    }
    return type(method, (MethodOptimizer,), body)


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def __getattr__(name: str) -> type[MethodOptimizer]:
    if not name.startswith("_"):
        for method in method_names():
            if _plain(method) == _plain(name):
                return optimizer_class(method)
    raise AttributeError(f"{__name__} has no {name}; its optimizers are {', '.join(method_names())}")


def __dir__() -> list[str]:
    return sorted([*globals(), *method_names()])

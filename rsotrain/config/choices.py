"""What the settings of optimizers can be, where that is one of a few names."""

from enum import Enum


class OnRefresh(Enum):
    """What a refresh of the basis does to the moments."""

    keep = "keep"
    reset = "reset"
    transport = "transport"


class StateDtype(Enum):
    """int8: 8 bits an element and a float32 scale a block (``rsotrain.optim.blocks``)."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class WeightRounding(Enum):
    """How an updated bfloat16 weight is rounded. stochastic: up or down at random, such that no update is
    lost on average; the gains of norms, which lie around 1 and move by little, are float32 then. nearest: as
    in the papers' runs, with bfloat16 gains; updates below 2⁻⁹ of a weight are lost."""

    stochastic = "stochastic"
    nearest = "nearest"


class RestRule(Enum):
    """The methods that can train embedding and head, with the defaults of their schemas.

    adam8bit: Adam whose moments are kept as with ``StateDtype.int8``, whatever the method's are.
    """

    adam = "adam"
    adam8bit = "adam8bit"
    adam_mini = "adam_mini"
    foam = "foam"
    lion = "lion"
    scale = "scale"


class NewtonSchulzDtype(Enum):
    """bfloat16: as published. float32: for CPUs that emulate bfloat16."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class InnerSolver(Enum):
    """The update rule in the subspace. momentum: the bias-corrected average of gradients, with betas[0]."""

    adam = "adam"
    momentum = "momentum"
    adagrad = "adagrad"


class BiasCorrection(Enum):
    """adam_form: none for AdaGrad (``betas[1]`` = 1) and RMSProp (``betas[0]`` = 0), as in SN-SM's code."""

    all_forms = "all_forms"
    adam_form = "adam_form"


class BasisStorage(Enum):
    """stored: bases are optimizer state. regenerated: each use samples the basis again from its seed."""

    stored = "stored"
    regenerated = "regenerated"


class Pruning(Enum):
    """Which entries of the moments become zero when the factors are reset: those that are smallest in
    magnitude, or random ones."""

    magnitude = "magnitude"
    random = "random"

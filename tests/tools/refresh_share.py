"""What refreshes cost on a GPU: FLOPs and launches of one, counted with fake CUDA tensors.

    python tests/tools/refresh_share.py [--model llama_1b] [--gap 200] METHOD… [-- key=value …]

For each METHOD (an optimizer, or optimizer:sampler) a step and one in which all bases are drawn anew are made
with LAYERS layers of the model; what the second has more is the refresh's, and is multiplied for all layers.
Its share is that of the time of ``--gap`` steps of ``--tokens`` tokens, at rates that are assumed, not
measured: see RATES. Where each step refreshes, one step is compared with its passes. It needs g++, as
gpu_path.py does.
"""

import argparse
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import fake_cuda  # noqa: E402 (the paths first)

fake_cuda.load()

import torch  # noqa: E402 (after its devices)
from helpers.gpu_watch import GpuWatch  # noqa: E402
from helpers.runs import compose  # noqa: E402

from rsotrain.models.architecture import flops_per_token  # noqa: E402
from rsotrain.planner.fake_run import FakeRun, _Tokenizer  # noqa: E402
from rsotrain.subspace.cost import eigenvectors_seconds  # noqa: E402
from rsotrain.training.model import model_without_memory  # noqa: E402
from rsotrain.training.refreshes import all_bases_due  # noqa: E402

# FLOP/s of products on one H100, about half of what its makers state, and what a launch takes the host
RATES = {"bfloat16": 4e14, "float32": 3e13, "float64": 3e13}
LAUNCH_SECONDS = 5e-6
UPDATE = ("optimizer step", "refresh")
LAYERS, VOCAB_SIZE, TOKENS = 2, 32000, 256


def counted(method: str, model: str, overrides: list[str]) -> tuple[dict[str, Counter[str]], float, int, int]:
    """(Counts of a step and of a refresh, layers for each counted one, FLOPs for a token, the own gap)."""
    optimizer, _, sampler = method.partition(":")
    settings = [
        f"model={model}", f"tokenizer.vocab_size={VOCAB_SIZE}", f"seq_len={TOKENS}", "batch_size=1",
        *overrides,
    ]  # fmt: skip
    settings += [f"optimizer={optimizer}", *([f"sampler={sampler}"] if sampler else [])]
    watch = GpuWatch()
    stages: dict[str, Counter[str]] = {}

    def note(name: str) -> None:
        own = Counter[str]()
        own["launches"] = sum(watch.launches[phase] for phase in UPDATE)
        for (phase, kind), flops in watch.flops.items():
            own[kind if phase in UPDATE else f"gathering {kind}"] += flops
        own.update({f"eigenvectors {size}": n for size, n in watch.decomposed.items()})
        stages[name] = own
        watch.clear()

    config = compose(settings)
    layers = config.model.num_hidden_layers
    whole = model_without_memory(config, _Tokenizer(VOCAB_SIZE))  # type: ignore[arg-type]
    flops = flops_per_token(whole, TOKENS)
    config = replace(config, model=replace(config.model, num_hidden_layers=LAYERS))
    with FakeRun(config, "cuda", torch.device("cuda", 0)) as run, run.faking(), watch, watch.phases():
        for _ in range(2):
            watch.clear()
            run.trainer.train_step()
        note("step")
        with all_bases_due(run.trainer):
            run.trainer.train_step()
        note("refresh")
        gap = run.trainer.optimizer.groups[0].config.update_proj_gap
    return stages, layers / LAYERS, flops, gap


def main() -> None:
    arguments, overrides = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, overrides = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="+", metavar="METHOD")
    parser.add_argument("--model", default="llama_1b")
    parser.add_argument("--gap", type=int, default=200, help="steps between refreshes")
    parser.add_argument("--tokens", type=int, default=131072, help="of a step")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    print(f"{options.model}, a refresh in {options.gap} steps of {options.tokens:,} tokens on one GPU")
    print("| method | bf16 | fp32 | fp64 | eigenvectors | launches | seconds | share |")
    print("|---|---|---|---|---|---|---|---|")
    for method in options.methods:
        stages, scale, flops, own_gap = counted(method, options.model, overrides)
        every_step = own_gap == 1
        more = {
            key: int((n - (0 if every_step else stages["step"][key])) * scale)
            for key, n in stages["refresh"].items()
            if not key.startswith("gathering")
        }
        for kind in RATES:  # of one micro-batch of TOKENS
            key = f"gathering {kind}"
            gathered = (stages["refresh"][key] - stages["step"][key]) * scale * options.tokens / TOKENS
            more[kind] = more.get(kind, 0) + int(gathered)
        seconds = sum(more[kind] / rate for kind, rate in RATES.items()) + more["launches"] * LAUNCH_SECONDS
        eigen = {int(k.split()[1]): n for k, n in more.items() if k.startswith("eigenvectors") and n}
        seconds += sum(n * eigenvectors_seconds(size) for size, n in eigen.items())
        gap = 1 if every_step else options.gap
        training = gap * options.tokens * flops / RATES["bfloat16"]
        found = ", ".join(f"{n} × {size}" for size, n in sorted(eigen.items())) or "–"
        print(
            f"| `{method}` | {' | '.join(f'{more[kind] / 1e12:.1f}' for kind in RATES)} | {found} |"
            f" {more['launches']:,} | {seconds:.2f} | {seconds / (training + seconds):.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

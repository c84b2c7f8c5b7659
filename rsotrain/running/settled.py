"""Settings that the device decides, before the run's name is asked for."""

import os
import platform
from dataclasses import replace

import torch

from rsotrain.config.identity import run_folder_path
from rsotrain.config.schema import Config, Device, Mode, Precision
from rsotrain.errors import UserError
from rsotrain.files import read_yaml
from rsotrain.models.compiling import is_worthwhile
from rsotrain.parallel.ranks import resolve_device
from rsotrain.tracking.run_files import CONFIG

_AUTOMATIC = (Precision.bf16_mixed, Precision.fp32)


def settle_compile(config: Config) -> Config:
    """``config`` with its ``compile`` decided."""
    if config.compile is not None or config.mode not in (Mode.train, Mode.benchmark):
        return config
    return replace(config, compile=is_worthwhile(_device(config)))


def settle_precision(config: Config) -> Config:
    """``config`` with its ``precision`` decided, after its ``epochs``.

    A run that exists already keeps its own, so that it resumes on another kind of CPU.
    """
    if config.precision is not Precision.auto:
        return config
    usual = _precision_of_device(config)
    return replace(config, precision=_precision_of_run(config, usual) or usual)


def _precision_of_run(config: Config, usual: Precision) -> Precision | None:
    begins_anew = config.overwrite and config.mode is Mode.train
    if begins_anew or config.mode in (Mode.plan, Mode.benchmark):
        return None
    others = [precision for precision in _AUTOMATIC if precision is not usual]
    for precision in (usual, *others):
        file = run_folder_path(replace(config, precision=precision)) / CONFIG
        try:
            # isfile raises nothing where the folder is somebody else's
            saved = read_yaml(file) if os.path.isfile(file) else None
        except UserError:  # damaged, which is said when the folder is opened
            continue
        if isinstance(saved, dict) and saved.get("precision") == precision.name:
            return precision
    return None


def _precision_of_device(config: Config) -> Precision:
    if config.mode is Mode.plan and config.device is not Device.cpu:  # plans are for GPUs
        return Precision.bf16_mixed
    return Precision.bf16_mixed if multiplies_bfloat16(_device(config)) else Precision.fp32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Has ``device`` instructions for products of bfloat16? A CPU without them takes many times as long."""
    if device.type != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        found = torch.cpu.get_capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _device(config: Config) -> torch.device:
    return resolve_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))

"""mode=plan: tables on the screen, and a file and a picture in ``plans/`` of the output folder."""

from pathlib import Path
from typing import Any

from rsotrain.config.identity import run_name
from rsotrain.config.schema import Config, Device
from rsotrain.files import os_errors_said, write_json_atomic
from rsotrain.parallel.ranks import World, resolve_device
from rsotrain.planner.plan import make_plan
from rsotrain.planner.show import print_plan, write_picture
from rsotrain.tracking.escaping import print_line
from rsotrain.training.trial import try_plugged

PLANS_FOLDER = "plans"  # not the run's folder: what is planned has not been run


def plan_mode(config: Config) -> dict[str, Any]:
    """Make, print and write a plan; return the file's content. UserError if it cannot be written."""
    if (untried := try_plugged(config, World(resolve_device(Device.cpu)))) is not None:
        print_line(untried)
    plan = make_plan(config)
    print_plan(plan)
    if config.compile:
        print("compile=true: the plan is for the run without compilation")
    folder, name = Path(config.output_dir).expanduser() / PLANS_FOLDER, run_name(config)
    file = folder / f"{name}.json"
    with os_errors_said(f"output_dir={config.output_dir} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, plan.as_dict())
        said = write_picture(plan.phases, folder / f"{name}.png")
    print_line(f"plan: {file}")
    print_line(said)
    return plan.as_dict()

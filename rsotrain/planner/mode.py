"""mode=plan: tables on the screen, and ``plan.json`` and a picture in the run folder of the planned run."""

from typing import Any

from rsotrain.config.identity import run_folder_path
from rsotrain.config.schema import Config
from rsotrain.files import os_errors_said, write_json_atomic
from rsotrain.planner.plan import make_plan
from rsotrain.planner.show import print_plan, write_picture
from rsotrain.tracking.escaping import print_line

PLAN = "plan.json"


def plan_mode(config: Config) -> dict[str, Any]:
    """Make, print and write a plan; return ``plan.json``'s content. UserError if it cannot be written."""
    plan = make_plan(config)
    print_plan(plan)
    if config.compile:
        print("compile=true: the plan is for the run without compilation")
    folder = run_folder_path(config)
    with os_errors_said(f"output_dir={config.output_dir} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / PLAN, plan.as_dict())
        said = write_picture(plan.phases, folder / "plan.png")
    print_line(f"plan: {folder / PLAN}")
    print_line(said)
    return plan.as_dict()

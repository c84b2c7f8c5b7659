"""mode=plan: tables on the screen, ``plan.json`` and a picture in the folder that the run would have."""

from typing import Any

from rsotrain.config.identity import run_folder_path
from rsotrain.config.schema import Config
from rsotrain.files import os_errors_said, write_json_atomic
from rsotrain.planner.plan import make_plan
from rsotrain.planner.show import print_plan, write_picture

PLAN = "plan.json"


def plan_mode(config: Config) -> dict[str, Any]:
    """Plan, print, write; what ``plan.json`` holds. Raises UserError where that cannot be written."""
    plan = make_plan(config)
    print_plan(plan)
    if config.compile:
        print("compile=true: planned as without it")
    folder = run_folder_path(config)
    with os_errors_said(f"output_dir={config.output_dir} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / PLAN, plan.as_dict())
        said = write_picture(plan.phases, folder / "plan.png")
    print(f"plan: {folder / PLAN}")
    print(said)
    return plan.as_dict()

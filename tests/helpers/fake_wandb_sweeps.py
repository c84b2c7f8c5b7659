"""The sweeps of the stand-in for W&B's server: what `wandb sweep` and `wandb agent` ask of it."""

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

PROJECT = {"id": "p", "name": "rsotrain", "entity": {"id": "e", "name": "me"}}


def members(sweep: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Parameters of one run after the other: all combinations of a grid, else ``run_cap`` draws."""
    parameters = sweep["parameters"]
    if sweep["method"] == "grid":
        choices = [p["values"] if "values" in p else [p["value"]] for p in parameters.values()]
        yield from (
            dict(zip(parameters, combination, strict=True)) for combination in itertools.product(*choices)
        )
        return
    generator = random.Random(0)
    for _ in range(sweep["run_cap"]):  # a Bayesian search without its model
        yield {key: _draw(parameter, generator) for key, parameter in parameters.items()}


def _draw(parameter: dict[str, Any], generator: random.Random) -> Any:
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return generator.choice(parameter["values"])
    low, high = parameter["min"], parameter["max"]
    if parameter["distribution"] == "log_uniform_values":
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    return generator.uniform(low, high)


@dataclass
class Sweep:
    """``started``: run id -> parameters. ``again``: ids of preempted runs. ``stop``: ids to end early."""

    text: str
    todo: Iterator[dict[str, Any]]
    state: str = "PENDING"
    started: dict[str, dict[str, Any]] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)


class FakeSweeps:
    def __init__(self) -> None:
        self.sweeps: dict[str, Sweep] = {}
        self.agents: dict[str, str] = {}

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The data of a GraphQL answer, None where the question is not about sweeps."""
        if operation == "UpsertSweep":
            return self._upsert(variables)
        if operation in ("SweepWithRuns", "GetSweepState"):
            return {"project": {"sweep": self._describe(variables["sweep"])}}
        if operation == "CreateAgent":
            agent = f"agent-{len(self.agents)}"
            self.agents[agent] = variables["sweep"]
            return {"createAgent": {"agent": {"id": agent}}}
        if operation == "Heartbeat":
            running = json.loads(variables["runState"] or "{}")
            commands = self._commands(self.sweeps[self.agents[variables["id"]]], running)
            return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}
        return None

    def preempted(self, run_id: str) -> None:
        """A run that said it is being preempted has ended without success: it is to be started again."""
        for sweep in self.sweeps.values():
            if run_id in sweep.started:
                sweep.again.append(run_id)

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("id") or f"sweep{len(self.sweeps)}"
        if variables.get("config"):
            content = yaml.safe_load(variables["config"])
            self.sweeps[name] = Sweep(variables["config"], members(content))
        if variables.get("state"):
            self.sweeps[name].state = variables["state"]
        return {"upsertSweep": {"sweep": {"name": name, "project": PROJECT}, "configValidationWarnings": []}}

    def _describe(self, name: str) -> dict[str, Any] | None:
        if name not in self.sweeps:
            return None
        sweep = self.sweeps[name]
        empty = (
            "description", "createdAt", "heartbeatAt", "updatedAt", "bestLoss", "controller", "scheduler",
        )  # fmt: skip
        return {
            **dict.fromkeys(empty),
            "id": name,
            "name": name,
            "method": yaml.safe_load(sweep.text)["method"],
            "state": sweep.state,
            "config": sweep.text,
            "earlyStopJobRunning": False,
            "runs": {"edges": []},
        }

    def _commands(self, sweep: Sweep, running: dict[str, Any]) -> list[dict[str, Any]]:
        if running:
            return [{"type": "stop", "run_id": run_id} for run_id in running if run_id in sweep.stop]
        if sweep.again:
            run_id = sweep.again.pop(0)
            return [_start("resume", run_id, sweep.started[run_id])]
        parameters = next(sweep.todo, None) if sweep.state in ("PENDING", "RUNNING") else None
        if parameters is None:
            sweep.state = "FINISHED"
            return [{"type": "exit"}]
        sweep.state = "RUNNING"
        run_id = f"member{len(sweep.started)}"
        sweep.started[run_id] = parameters
        return [_start("run", run_id, parameters)]


def _start(kind: str, run_id: str, parameters: dict[str, Any]) -> dict[str, Any]:
    arguments = {key: {"value": value} for key, value in parameters.items()}
    return {"type": kind, "run_id": run_id, "program": None, "args": arguments}

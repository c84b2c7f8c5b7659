"""A stand-in for the W&B server on 127.0.0.1: enough of it for runs to arrive and be read back."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from helpers.fake_wandb_sweeps import PROJECT, FakeSweeps


class FakeWandbServer:
    """``runs``: run id -> {config, name, project, sweep, history: list of rows, summary, exit_code}.

    ``status`` other than 200 refuses every request with it; ``vanish`` closes the port and all
    connections without an answer; ``silent`` lets requests wait until ``close``.
    """

    def __init__(self, status: int = 200, silent: bool = False) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.sweeps = FakeSweeps()
        self.status = status
        self.gone = False
        self.released = threading.Event()
        if not silent:
            self.released.set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def vanish(self) -> None:
        self.gone = True
        self._http.shutdown()
        self._http.socket.close()

    def close(self) -> None:
        self.released.set()
        if not self.gone:
            self.vanish()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer; empty for what a run can do without."""
        if (answer := self.sweeps.answer(operation, variables)) is not None:
            return answer
        if operation == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            return {"model": PROJECT | {"bucket": run and _resume_status(variables["name"], run)}}
        if operation == "UpsertBucket":
            run = self._run(variables["name"])
            names = {"name": "displayName", "project": "project", "group": "groupName", "sweep": "sweep"}
            for key, variable in names.items():
                run[key] = variables.get(variable) or run.get(key)
            if variables.get("config"):
                run["config"] = {k: v["value"] for k, v in json.loads(variables["config"]).items()}
            bucket = {"id": "b", "name": variables["name"], "displayName": run["name"], "project": PROJECT}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": []}}
        if operation == "ArtifactType":
            return {"project": None}
        if operation == "CreateArtifact":  # a table; with its state it counts as uploaded already
            sequence = {"id": "q", "latestArtifact": {"id": "a", "versionIndex": 0}}
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        if operation in ("Viewer", "GetViewer", "GetDefaultEntity"):
            names = {"entity": "me", "username": "me", "name": "me", "email": ""}
            keys = {"admin": False, "flags": "{}", "deletedAt": None, "apiKeys": {"edges": []}}
            return {"viewer": {"id": "u", **names, **keys, "teams": {"edges": []}}}
        return {}

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        """Rows of the history, the summary and the exit code arrive in such bodies."""
        run = self._run(run_id)
        for name, part in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run["history"] += [json.loads(line) for line in part["content"]]
            elif name == "wandb-summary.json":
                run["summary"] = json.loads(part["content"][-1])
        run["preempting"] = body.get("preempting", run.get("preempting", False))
        if body.get("complete"):
            run["exit_code"] = body["exitcode"]
            if run["preempting"] and run["exit_code"] != 0:
                self.sweeps.preempted(run_id)

    def _run(self, run_id: str) -> dict[str, Any]:
        return self.runs.setdefault(run_id, {"config": {}, "history": [], "summary": {}})


def _resume_status(run_id: str, run: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "b",
        "name": run_id,
        "displayName": run["name"],
        "summaryMetrics": json.dumps(run["summary"]),
        "historyLineCount": len(run["history"]),
        "historyTail": json.dumps([json.dumps(row) for row in run["history"][-1:]]),
        "logLineCount": 0,
        "eventsLineCount": 0,
        "eventsTail": "[]",
        "config": json.dumps({key: {"value": value} for key, value in run["config"].items()}),
        "wandbConfig": json.dumps({"t": 1}),
        "tags": [],
    }


def _handler(server: FakeWandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Requests are not printed."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server.released.wait(60)
            if server.gone:
                self.close_connection = True
                return
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer: dict[str, Any] = {}
            if server.status == 200 and self.path == "/graphql":
                query = json.loads(body)
                operation = re.search(r"\b(?:query|mutation)\s+(\w+)", query["query"])
                assert operation is not None
                answer = {"data": server.answer(operation[1], query.get("variables") or {})}
            elif server.status == 200 and (match := re.search(r"/([^/]+)/file_stream$", self.path)):
                server.stream(match[1], json.loads(body))
            self.reply(answer)

        def do_GET(self) -> None:
            self.reply({})

        def reply(self, answer: dict[str, Any]) -> None:
            content = json.dumps(answer).encode()
            self.send_response(server.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler

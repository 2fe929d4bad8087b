"""The images and docker-compose.yml in a real engine: replicas behind the balancer, losses, a new version, the end."""

import json
import os
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from containers import ROOT, Compose, Docker, open_to_all
from e2e_support import get, wait_for
from support import TinyModel, encode, photo

pytestmark = [pytest.mark.e2e, pytest.mark.compose, pytest.mark.timeout(900)]

FILES = ("docker-compose.yml", "deploy/compose.replicas.yml")
SEVEN = ROOT / "docs" / "seven.png"
SERIES = re.compile(r"foldserve_\w+")
EMPTY_UNTIL_IT_HAPPENS = {"foldserve_dropped_total", "foldserve_spot_checks_total"}
ASK = """
import json, urllib.request
ask = lambda path, body=None: json.load(urllib.request.urlopen("http://127.0.0.1:8000" + path, body))
"""


until = partial(wait_for, within_s=60)


@dataclass
class Fleet:
    """Two replicas behind the balancer."""

    compose: Compose
    url: str
    models: Path


@dataclass
class Tally:
    """What callers without a pause were answered."""

    codes: Counter[object] = field(default_factory=Counter)
    versions: Counter[int] = field(default_factory=Counter)
    logits: dict[int, set[tuple[float, ...]]] = field(default_factory=dict)

    def take(self, answer: httpx.Response) -> None:
        self.codes[answer.status_code] += 1
        if answer.status_code == 200:
            body = answer.json()
            self.versions[body["version"]] += 1
            self.logits.setdefault(body["version"], set()).add(tuple(body["predictions"][0]["logits"]))

    def is_whole(self) -> bool:
        """True when every request was answered, and each version gave one and the same bits."""
        return set(self.codes) == {200} and all(len(bits) == 1 for bits in self.logits.values())


@pytest.fixture(scope="module")
def fleet(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("compose")
    models = folder / "models"
    shutil.copytree(ROOT / "models" / "mnist" / "1", models / "mnist" / "1")
    TinyModel().write(models)
    open_to_all(models)
    variables = {"PUBLISH": "127.0.0.1:0", "PROMETHEUS": "127.0.0.1:0", "MODELS": str(models)}
    compose = Compose("foldserve-test", FILES, docker.environment | variables)
    try:
        compose.run("up", "--detach", "--build", "--wait")
        compose.run("--profile", "monitoring", "up", "--detach", "prometheus")
        yield Fleet(compose, compose.url("balancer"), models)
    finally:
        compose.tried("--profile", "*", "down", "--volumes", "--timeout", "5")


def test_replicas_answer_with_equal_bits_and_equal_answer_digests(fleet):
    code = ASK + f"print(json.dumps([ask('/info')['models'], ask('/predict?logits=true', {SEVEN.read_bytes()!r})]))"
    (models, answer), second = (fleet.compose.python(replica, code) for replica in (1, 2))

    assert [models, answer] == second
    assert models["mnist"]["answer_digest"]
    body = httpx.post(f"{fleet.url}/predict?logits=true", content=SEVEN.read_bytes(), timeout=30).json()
    assert body == answer
    assert body["predictions"][0]["label"] == "7"


def test_the_container_is_nobody_and_writes_nowhere_but_where_it_must(fleet):
    code = """
import json, os
def writes(folder):
    try:
        open(folder + "/probe", "w").close(); return True
    except OSError:
        return False
folders = ["/", "/opt/foldserve", "/models", "/state", "/tmp"]
print(json.dumps({"user": os.getuid(), "writes": [folder for folder in folders if writes(folder)]}))
"""
    assert fleet.compose.python(1, code) == {"user": 10001, "writes": ["/state", "/tmp"]}


def test_only_the_balancer_has_a_port_on_the_host(fleet):
    published = {
        service: [fleet.compose.docker("port", one) for one in fleet.compose.containers(service)]
        for service in ("foldserve", "balancer")
    }

    assert published["foldserve"] == ["", ""]
    assert published["balancer"][0].startswith("8000/tcp -> 127.0.0.1:")


def test_a_killed_replica_costs_no_request_and_comes_back(fleet):
    victim = fleet.compose.containers("foldserve")[0]

    with _callers(fleet, "mnist") as tally:
        os.kill(int(fleet.compose.docker("inspect", "--format", "{{.State.Pid}}", victim)), signal.SIGKILL)
        until(lambda: _restarts(fleet, victim) == 1 and _is_healthy(fleet, victim), "the replica is back")

    assert tally.is_whole(), tally.codes


def test_a_replaced_replica_costs_no_request(fleet):
    with _callers(fleet, "mnist") as tally:
        fleet.compose.docker("restart", "--time", "40", fleet.compose.containers("foldserve")[1])
        until(lambda: _is_healthy(fleet, fleet.compose.containers("foldserve")[1]), "the replica is back")

    assert tally.is_whole(), tally.codes


def test_a_new_version_is_rolled_out_under_load_without_a_lost_request(fleet):
    with _callers(fleet, "tiny") as tally:
        until(lambda: tally.versions[1] > 0, "version 1 answers")
        TinyModel(seed=2).write(fleet.models, version=2)
        open_to_all(fleet.models)
        until(lambda: all(_served(fleet, replica) == 2 for replica in (1, 2)), "both serve version 2")

    assert tally.is_whole(), tally.codes
    assert set(tally.versions) == {1, 2}


def test_every_query_of_the_dashboard_finds_something_in_a_prometheus_that_scrapes_the_replicas(fleet):
    ask = _prometheus(fleet)
    until(lambda: _healths(ask) == ["up", "up"], "both replicas are scraped")
    needed = [query for query in _queries() if not EMPTY_UNTIL_IT_HAPPENS & set(SERIES.findall(query))]

    assert len(needed) == len(_queries()) - 2
    with _callers(fleet, "mnist"):
        until(lambda: all(ask("query", query=query)["result"] for query in needed), "every query finds something")
    for query in _queries():
        assert ask("query", query=query)["resultType"] == "vector", query


def test_no_series_of_the_dashboard_or_the_rules_is_unknown_to_the_service(fleet):
    ask, queries = _prometheus(fleet), _queries()
    rules = [rule["query"] for group in ask("rules")["groups"] for rule in group["rules"]]
    known = set(ask("label/__name__/values"))

    assert len(rules) == 8
    assert all(ask("query", query=query) is not None for query in rules)
    named = set(SERIES.findall(" ".join(queries + rules)))
    told = get(f"{fleet.url}/metrics").text
    assert {name for name in named if name not in known and name not in told} <= EMPTY_UNTIL_IT_HAPPENS


def test_every_alert_fires_at_what_it_is_for(fleet):
    said = fleet.compose.run("exec", "-T", "prometheus", "promtool", "test", "rules", "/etc/prometheus/rules_test.yml")

    assert "SUCCESS" in said
    tested = (ROOT / "deploy/prometheus/rules_test.yml").read_text()
    alerts = re.findall(r"alert: (\w+)", (ROOT / "deploy/prometheus/rules.yml").read_text())
    assert [one for one in alerts if f"alertname: {one}\n" not in tested] == []


def test_an_alert_fires_when_a_replica_is_lost_for_good(fleet):
    ask, second = _prometheus(fleet), fleet.compose.containers("foldserve")[1]
    fleet.compose.docker("pause", second)
    try:
        until(lambda: "ReplicaDown" in _firing(ask), "the alert fires")
        assert httpx.post(f"{fleet.url}/predict", content=SEVEN.read_bytes(), timeout=30).status_code == 200
    finally:
        fleet.compose.docker("unpause", second)
    until(lambda: _is_healthy(fleet, second) and _firing(ask) == set(), "the alert ends")


def test_stop_drains_and_exits_with_0(fleet):
    containers = fleet.compose.containers("foldserve")
    fleet.compose.run("stop", "foldserve")

    codes = [fleet.compose.docker("inspect", "--format", "{{.State.ExitCode}}", one) for one in containers]
    assert codes == ["0", "0"]
    assert fleet.compose.run("logs", "--tail", "1", "foldserve").count("drained and stopped") == 2


@contextmanager
def _callers(fleet: Fleet, model: str, count: int = 4) -> Iterator[Tally]:
    """Call without a pause while the body runs; what was answered is complete when it ends."""
    tally, stop = Tally(), threading.Event()
    content = SEVEN.read_bytes() if model == "mnist" else encode(photo(), "PNG")

    def call() -> None:
        with httpx.Client(base_url=fleet.url, timeout=30) as client:
            while not stop.is_set():
                try:
                    tally.take(client.post(f"/predict?model={model}&logits=true", content=content))
                except httpx.HTTPError as error:
                    tally.codes[repr(error)] += 1

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _prometheus(fleet: Fleet) -> Callable[..., Any]:
    """Return what asks Prometheus's HTTP interface and gives the data of its answer."""
    url = fleet.compose.url("prometheus", 9090)

    def ask(call: str, **query: str) -> Any:
        answer = get(f"{url}/api/v1/{call}", params=query).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    return ask


def _queries() -> list[str]:
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/foldserve.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def _healths(ask: Callable[..., Any]) -> list[str]:
    return [target["health"] for target in ask("targets", state="active")["activeTargets"]]


def _firing(ask: Callable[..., Any]) -> set[str]:
    return {alert["labels"]["alertname"] for alert in ask("alerts")["alerts"] if alert["state"] == "firing"}


def _restarts(fleet: Fleet, container: str) -> int:
    return int(fleet.compose.docker("inspect", "--format", "{{.RestartCount}}", container))


def _is_healthy(fleet: Fleet, container: str) -> bool:
    return fleet.compose.docker("inspect", "--format", "{{.State.Health.Status}}", container) == "healthy"


def _served(fleet: Fleet, replica: int) -> object:
    models = fleet.compose.python(replica, ASK + "print(json.dumps(ask('/info')['models']))")
    return models["tiny"]["version"]

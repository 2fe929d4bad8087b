"""Grafana's files agree with one another; whether its queries find something, tests/e2e/test_compose.py asks."""

import itertools
import json
from pathlib import Path

import yaml

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "foldserve.json").read_text())
PANELS = DASHBOARD["panels"]
SHOWN = {"request", "latency", "stage", "batch", "padding", "queue", "drop", "certificate", "spot check", "drift"}
COLUMNS = 24


def test_every_panel_asks_the_data_source_that_is_provisioned():
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    asked = {panel["datasource"]["uid"] for panel in PANELS if panel["type"] != "row"}

    assert asked == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"


def test_panels_have_numbers_of_their_own_and_a_query_each():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        references = [target["refId"] for target in panel.get("targets", [])]
        assert panel["type"] == "row" or references, panel["title"]
        assert len(set(references)) == len(references)


def test_no_panel_covers_another_or_leaves_the_grid():
    places = [panel["gridPos"] for panel in PANELS]
    for place in places:
        assert place["x"] + place["w"] <= COLUMNS
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


def test_the_dashboard_shows_all_that_an_operator_is_promised():
    titles = " ".join(panel["title"].lower() for panel in PANELS)

    assert {word for word in SHOWN if word not in titles} == set()


def test_the_provider_looks_where_compose_puts_the_dashboards():
    compose = yaml.safe_load((GRAFANA.parents[1] / "docker-compose.yml").read_text())
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/foldserve.yml").read_text())["providers"]
    mounted = {volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]}

    assert provider["options"]["path"] in mounted

"""``examples/operations``: dashboard, alerts and manifests fit the metrics and the service."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import urllib.request
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import dscache
from dscache.config import load
from dscache.embedded import EmbeddedServer
from dscache.prometheus import CacheCollector, register
from tests.aio.test_topology import FakeCluster, names_of, opened
from tests.conftest import PATIENT, SERVERS, _server_id
from tests.support.checkers import check_schema
from tests.support.documents import PROJECT, table
from tests.support.prometheus import find_promtool, promtool

FOLDER = PROJECT / "examples" / "operations"
RULES = FOLDER / "alerts.yml"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel, target) for panel in PANELS for target in panel["targets"]]
# Labels that Prometheus adds to what it reads.
OF_PROMETHEUS = {"instance", "job"}

on_one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True, ids=_server_id)
needs_promtool = pytest.mark.skipif(
    find_promtool() is None, reason="promtool isn't here; make test fetches it where apt-get has it"
)


# -- the metrics


def labels_of(text: str) -> dict[str, set[str]]:
    """Return the names of the samples that Prometheus would read, with those of their labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            found.setdefault(one.name, set()).update(one.labels)
    return found


def uses(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each metric of an expression, with the labels that it must have."""
    grouped = {
        label
        for labels in re.findall(r"\bby \(([^)]*)\)", expression)
        for label in labels.replace(" ", "").split(",")
    }
    for name, selector in re.findall(r"\b(dscache_\w+)(?:\{([^}]*)\})?", expression):
        yield name, {*re.findall(r"(\w+)\s*=~?", selector)} | grouped


@on_one_server
async def test_every_metric_and_label_is_exported(server: EmbeddedServer) -> None:
    """Read over HTTP from caches of both kinds, with near caches, and from one of a cluster."""
    registry = CollectorRegistry()
    near = {"near_cache": True, **PATIENT}
    async with (
        FakeCluster() as fakes,
        opened(fakes) as clustered,
        dscache.AsyncCache(server.url, **near) as cache,
    ):
        with dscache.Cache(server.url, **near) as blocking:
            register(cache, "async", registry)
            register(blocking, "blocking", registry)
            register(clustered, "cluster", registry)
            for name in (name for node in fakes.nodes for name in names_of(node, 1)):
                await clustered.set(name, 1, 1)
            for _ in range(2):
                await cache.get("a")
                blocking.get("a")
            http, thread = start_http_server(0, "127.0.0.1", registry)
            try:
                address = f"http://127.0.0.1:{http.server_port}/metrics"
                text = await asyncio.to_thread(_read, address)
            finally:
                http.shutdown()
                http.server_close()
                thread.join()
    exported = labels_of(text)
    expressions = [target["expr"] for _, target in TARGETS] + [rule["expr"] for rule in ALERTS]
    used = [use for expression in expressions for use in uses(expression)]
    assert len({name for name, _ in used}) > 30
    for name, labels in used:
        assert name in exported, name
        assert labels <= exported[name] | OF_PROMETHEUS, name
    # Nothing of worth is left out of the dashboard.
    shown = {name for _, target in TARGETS for name, _ in uses(target["expr"])}
    left_out = {name for name in exported if not name.startswith("dscache_node_")} - shown
    assert {name for name in left_out if name.endswith(("_total", "_bucket"))} == set()


def _read(address: str) -> str:
    with urllib.request.urlopen(address, timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def test_labels_of_texts_are_those_of_their_expressions() -> None:
    """A legend or summary with another label would be empty there."""
    for panel, target in TARGETS:
        used = {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])}
        grouped = {*re.findall(r"\w+", " ".join(re.findall(r"\bby \((.*?)\)", target["expr"])))}
        assert used <= grouped, panel["title"]
    for rule in ALERTS:
        used = {*re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"]))}
        grouped = {*re.findall(r"\w+", " ".join(re.findall(r"\bby \((.*?)\)", rule["expr"])))}
        assert used <= (grouped or {"cache", "instance", "job"}), rule["alert"]


# -- the dashboard


def test_the_dashboard_is_whole() -> None:
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len({*identifiers}) == len(identifiers) > 25
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "cache", "instance"}
    for panel, target in TARGETS:
        assert target["datasource"] == panel["datasource"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for name in re.findall(r"dscache_\w+", target["expr"]):
            # Every series is chosen by both variables.
            chosen = rf'{name}\{{cache=~"\$cache", instance=~"\$instance"'
            assert re.search(chosen, target["expr"]), panel["title"]
        assert {*re.findall(r"\$(\w+)", target["expr"])} <= variables | {"__rate_interval"}
    for panel in PANELS:
        references = [target["refId"] for target in panel["targets"]]
        assert references == sorted({*references})
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]


def test_no_panel_covers_another() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, other in combinations(places, 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )


@needs_promtool
def test_the_expressions_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": target["expr"].replace("$__rate_interval", "5m")}
        for number, (_, target) in enumerate(TARGETS)
    ]
    written = tmp_path / "rules.yml"
    written.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"SUCCESS: {len(TARGETS)} rules found" in promtool("check", "rules", written)


# -- the alerts


@needs_promtool
def test_the_alerts_are_valid_and_fire_when_they_should() -> None:
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", RULES)
    assert "SUCCESS" in promtool("test", "rules", FOLDER / "alerts_test.yml")


def test_every_alert_is_tested_and_tells_what_to_do() -> None:
    tested = (FOLDER / "alerts_test.yml").read_text(encoding="utf-8")
    listed = [row[0] for row in table(FOLDER / "README.md", "The alerts")]
    assert listed == [rule["alert"] for rule in ALERTS]
    assert len(ALERTS) > 8
    for rule in ALERTS:
        assert f'alertname="{rule["alert"]}"' in tested
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}


# -- the service and its manifests


def test_every_file_is_described() -> None:
    rows = table(FOLDER / "README.md", "Dashboard, alerts and deployment")
    files = {path.name for path in FOLDER.iterdir() if path.is_file()} - {"README.md"}
    assert {row[0] for row in rows} == {f"[{name}]({name})" for name in files}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, server: EmbeddedServer) -> Any:
    """The module of the service, configured as in its container."""
    monkeypatch.setenv("CONFIG", str(FOLDER / "config.yml"))
    monkeypatch.setenv("REDIS_HOST", server.host)
    monkeypatch.setenv("REDIS_PORT", str(server.port))
    spec = importlib.util.spec_from_file_location("operations_service", FOLDER / "service.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@on_one_server
def test_the_service(service: Any, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with dscache.Cache(server.url, **PATIENT) as records:
        records.set("of/operations", 1, {"a": 1})
    with TestClient(service.app) as client:
        assert client.get("/live").status_code == client.get("/ready").status_code == 200
        assert client.get("/records/of/operations").content == b'{"a":1}'
        assert client.get("/records/of/none").status_code == 404
        exported = labels_of(client.get("/metrics").text)
        assert {"dscache_ready", "dscache_near_reads_total"} <= exported.keys()
        monkeypatch.setattr(dscache.AsyncCache, "is_ready", False)
        assert client.get("/ready").status_code == 503
        assert client.get("/live").status_code == 200
    assert "dscache_ready{" not in generate_latest().decode()
    # No record of the program's own collector remains for other tests.
    assert "records" not in CacheCollector()._caches


def manifests() -> dict[str, Any]:
    """Return the Kubernetes objects by their kinds."""
    text = (FOLDER / "kubernetes.yml").read_text(encoding="utf-8")
    objects = [*yaml.safe_load_all(text)]
    for one in objects:
        assert one.keys() >= {"apiVersion", "kind", "metadata"}
    return {one["kind"]: one for one in objects}


def test_kubernetes_probes_are_paths_of_the_service() -> None:
    source = (FOLDER / "service.py").read_text(encoding="utf-8")
    (container,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    # A liveness probe that asks for Redis would restart every pod when Redis is away.
    assert paths == {"startup": "/live", "readiness": "/ready", "liveness": "/live"}
    for path in paths.values():
        assert f'@app.get("{path}")' in source
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"http"}


def test_kubernetes_objects_fit_together() -> None:
    found = manifests()
    assert found.keys() == {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget"}
    deployment = found["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    for selector in (
        deployment["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector == labels
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    (port,) = container["ports"]
    annotations = deployment["template"]["metadata"]["annotations"]
    assert annotations == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(port["containerPort"]),
        "prometheus.io/path": "/metrics",
    }
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"] == "http"
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert f"EXPOSE {port['containerPort']}\n" in dockerfile
    assert f"USER {pod['securityContext']['runAsUser']}\n" in dockerfile
    (volume,) = pod["volumes"]
    (mount,) = container["volumeMounts"]
    assert volume["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert environment["CONFIG"] == f"{mount['mountPath']}/config.yml"
    # Closing begins after the hook.
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    close = load({"host": "redis"}).options.close_timeout / 1000
    assert pause + close < pod["terminationGracePeriodSeconds"]


def test_the_configurations_are_one_and_need_what_is_set() -> None:
    own = (FOLDER / "config.yml").read_text(encoding="utf-8")
    assert manifests()["ConfigMap"]["data"] == {"config.yml": own}
    (container,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    compose = yaml.safe_load((FOLDER / "compose.yml").read_text(encoding="utf-8"))
    for environment in (
        {one["name"]: one.get("value", "secret") for one in container["env"]},
        compose["services"]["service"]["environment"],
    ):
        config = load(FOLDER / "config.yml", environ=environment)
        assert config.options.host == environment["REDIS_HOST"]
        assert config.options.port == 6379
        assert config.options.password
        assert config.options.near_cache is not None


def test_compose_fits_its_schema(tmp_path: Path) -> None:
    check_schema("vendor.compose-spec", FOLDER / "compose.yml")
    wrong = tmp_path / "compose.yml"
    wrong.write_text((FOLDER / "compose.yml").read_text().replace("depends_on", "depend_on"))
    with pytest.raises(AssertionError, match="depend_on"):
        check_schema("vendor.compose-spec", wrong)


def test_kubernetes_objects_fit_their_schemas() -> None:
    # Here, as its grammars take a second of each process that collects the tests.
    import kubernetes_validate

    for version in ("1.31", kubernetes_validate.latest_version()):
        for one in manifests().values():
            kubernetes_validate.validate(one, version, strict=True)
    deployment = manifests()["Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["readynessProbe"] = container.pop("readinessProbe")
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, "1.31", strict=True)


def test_compose_is_whole() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yml").read_text(encoding="utf-8"))
    services = compose["services"]
    assert services.keys() == {"valkey", "service", "prometheus", "grafana"}
    for name, service in services.items():
        assert "image" in service, name
        for volume in service.get("volumes", ()):
            assert (FOLDER / volume.split(":")[0]).is_file(), volume
        for config in service.get("configs", ()):
            assert config["source"] in compose["configs"]
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
        assert {*service.get("depends_on", ())} <= services.keys()
    built = services["service"]["build"]
    assert (FOLDER / built["context"] / built["dockerfile"]).resolve() == FOLDER / "Dockerfile"
    assert services["service"]["environment"]["REDIS_HOST"] == "valkey"
    for name in ("valkey", "service"):
        check = services[name]["healthcheck"]
        assert check["test"][0] == "CMD"
        assert check.keys() >= {"interval", "timeout", "retries"}
    assert "/ready" in services["service"]["healthcheck"]["test"][-1]
    compile(services["service"]["healthcheck"]["test"][-1], "healthcheck", "exec")


@needs_promtool
def test_the_configuration_of_prometheus(tmp_path: Path) -> None:
    compose = yaml.safe_load((FOLDER / "compose.yml").read_text(encoding="utf-8"))
    text = compose["configs"]["prometheus"]["content"]
    (tmp_path / "prometheus.yml").write_text(text)
    (tmp_path / "alerts.yml").write_text(RULES.read_text())
    told = promtool("check", "config", tmp_path / "prometheus.yml")
    assert f"SUCCESS: {len(ALERTS)} rules found" in told
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["service:8000"]}]

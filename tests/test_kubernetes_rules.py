"""The rules and the dashboard of deploy/kubernetes: by the real promtool, and against the metrics of a real server."""

import json
import re
import shutil
import subprocess
import urllib.request
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, free_ports, run
from manifests import at, metric_names, objects

from core.tables import MODELS
from tasks.table import GENERATION, GENERATION_PRECISIONS

FOLDER = ROOT / "deploy/kubernetes"
OTHERS = {  # series that no Triton has: Prometheus' own, and those of kube-state-metrics
    "up",
    "kube_deployment_status_replicas",
    "kube_deployment_status_replicas_unavailable",
}


@pytest.fixture(scope="module")
def rules():
    """The groups of the PrometheusRule."""
    found = objects((FOLDER / "base/monitoring.yaml").read_text())
    return next(o for o in found if o["kind"] == "PrometheusRule")["spec"]


@pytest.fixture(scope="module")
def expressions(rules):
    """All PromQL: of the rules and of the dashboard, with a namespace where the dashboard has a variable."""
    panels = json.loads((FOLDER / "base/dashboard.json").read_text())["panels"]
    shown = [target["expr"].replace("$namespace", "n") for panel in panels for target in panel["targets"]]
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]] + shown


# --- promtool ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def promtool(tmp_path_factory):
    """promtool on PATH, or that of Debian's package, which is fetched once into build/ and not installed."""
    own = ROOT / "build/promtool/usr/bin/promtool"
    if found := shutil.which("promtool") or (own.is_file() and str(own)):
        return found
    folder = tmp_path_factory.mktemp("promtool")
    fetch = "apt-get download prometheus && dpkg-deb --extract prometheus_*.deb extracted"
    done = subprocess.run(["sh", "-c", fetch], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no promtool on PATH, and Debian's package cannot be fetched: {done.stderr.strip()[-200:]}")
    own.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "extracted/usr/bin/promtool", own)
    return str(own)


def check(promtool, command, file, rules, folder):
    """promtool check or test over rules: (exit status, what it says)."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    shutil.copy(FOLDER / "rules_test.yaml", folder)
    done = subprocess.run([promtool, command, "rules", file], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_rules_are_well_formed_and_pass_their_unit_tests(promtool, rules, tmp_path):
    for command, file in (("check", "rules.yaml"), ("test", "rules_test.yaml")):
        status, words = check(promtool, command, file, rules, tmp_path)
        assert status == 0 and "SUCCESS" in words, words


def test_every_alert_has_a_unit_test(rules):
    tested = (FOLDER / "rules_test.yaml").read_text()
    names = [rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert names and not [name for name in names if f"alertname: {name}" not in tested]


def test_the_dashboard_is_promql(promtool, expressions, tmp_path):
    panels = {"groups": [{"name": "all", "rules": [{"record": f"r{n}", "expr": e} for n, e in enumerate(expressions)]}]}
    status, words = check(promtool, "check", "rules.yaml", panels, tmp_path)
    assert status == 0, words


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('model=~"model_(ONNX|TRT_.*)|', 'model=~".*|'),  # the ensemble's sum would scale
        ("1e-9)\n) / 1e6", "0)\n) / 1e6"),  # an idle pod would have no number
        ("[5m])), 1) > 1", "[5m])), 1) > 2"),
        ('reason!="CANCELED"', 'reason!=""'),
        ("== 0\n", "> 0\n"),
        ('deployment="text-service"', 'deployment="another"'),
        ('up{job="text-service"} == 0', 'up{job="text-service"} == 1'),
        ("max by (namespace, pod)", "min by (namespace, pod)"),
        ("rate(", "rat("),
    ],
)
def test_a_fault_planted_in_a_rule_fails_its_unit_test(promtool, rules, tmp_path, before, after):
    text = json.dumps(rules)
    planted = text.replace(json.dumps(before)[1:-1], json.dumps(after)[1:-1])
    assert planted != text
    status, _ = check(promtool, "test", "rules_test.yaml", json.loads(planted), tmp_path)
    assert status != 0


# --- names that the rules share with the manifests and the project --------------------


def test_the_rules_mean_the_job_the_deployment_and_the_metric_of_the_manifests(rules):
    base = [o for path in sorted((FOLDER / "base").glob("*.yaml")) for o in objects(path.read_text())]
    by_kind = {o["kind"]: o for o in base}
    label = by_kind["PodMonitor"]["spec"]["jobLabel"]
    job = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"][label]
    text = json.dumps(rules) + (FOLDER / "base/dashboard.json").read_text()
    assert set(re.findall(r'job=\\+"([^\\]*)', text)) == {job}
    assert set(re.findall(r'deployment=\\+"([^\\]*)', text)) == {by_kind["Deployment"]["metadata"]["name"]}
    recorded = {rule.get("record") for group in rules["groups"] for rule in group["rules"]}
    assert at(by_kind["HorizontalPodAutoscaler"], "spec.metrics.0.pods.metric.name") in recorded


def test_the_busy_share_is_of_every_graph_and_of_no_service(rules):
    pattern = re.search(r'model=~"([^"]*)"', rules["groups"][0]["rules"][0]["expr"])[1]
    generating = {graph for row in GENERATION.values() for graph in row.graphs}
    graphs = [model.name for model in MODELS.values()] + [
        graph if precision == "ONNX" else f"{graph}_{precision}"
        for graph in generating
        for precision in GENERATION_PRECISIONS
    ]
    for name in (*graphs, "tokenizer", "postprocess"):
        assert re.fullmatch(pattern, name), name
    for name in ("reviews", "answers_graph", "model_reviews", "ensemble"):
        assert not re.fullmatch(pattern, name), name


# --- a real server -------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tiny):
    """A tiny classifier, served model by model as the image does it, after a question."""
    http, grpc, metrics = free_ports(3)
    ports = ("--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics)
    done = run(
        "serve.sh", "start", "--device", "cpu", "--path", "ensemble", "--model-repository", tiny.repository, *ports
    )
    assert done.returncode == 0, done.stderr
    yield SimpleNamespace(http=http, metrics=metrics, question=tiny.repository / "health.json")
    run("serve.sh", "stop", "--http-port", http, "--drain-s", 1)


def test_the_probes_questions_are_answered_by_a_real_server(served):
    (deployment,) = objects((FOLDER / "base/deployment.yaml").read_text())
    container = at(deployment, "spec.template.spec.containers.0")
    for probe in ("startupProbe", "livenessProbe"):
        _, script, *options, question = container[probe]["exec"]["command"]
        assert (script, question) == ("/health.py", "/models/health.json")
        done = run("serving/health.py", *options, "--url", f"127.0.0.1:{served.http}", served.question)
        assert done.returncode == 0 and "healthy: tiny answered" in done.stdout, done.stderr
    path = container["readinessProbe"]["httpGet"]["path"]
    assert urllib.request.urlopen(f"http://127.0.0.1:{served.http}{path}", timeout=10).status == 200


def unknown_metrics(expressions, rules, text):
    """Names in the expressions that neither the server's metrics nor the rules nor another exporter has."""
    known = set(re.findall(r"^# TYPE (\S+)", text, re.M)) | OTHERS
    known |= {rule["record"] for group in rules["groups"] for rule in group["rules"] if "record" in rule}
    return {name for expression in expressions for name in metric_names(expression)} - known


def test_every_metric_that_is_named_is_a_running_servers(served, rules, expressions):
    text = urllib.request.urlopen(f"http://127.0.0.1:{served.metrics}/metrics", timeout=10).read().decode()
    assert unknown_metrics(expressions, rules, text) == set()
    planted = ['sum(triton_gpu_utilization{job="x"}) / on (pod) up', "rate(nv_inference_exec_cuont[1m])"]
    assert unknown_metrics(planted, rules, text) == {"triton_gpu_utilization", "nv_inference_exec_cuont"}
    # labels that the rules look at
    assert re.search(r'nv_inference_request_failure\{[^}]*reason="CANCELED"', text)
    assert {"tiny", "tokenizer", "model_ONNX", "postprocess"} == set(re.findall(r'exec_count\{model="(\w+)"', text))

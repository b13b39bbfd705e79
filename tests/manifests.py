"""What is wrong with a set of Kubernetes objects, as far as it can be seen without a cluster."""

import re

import yaml

QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|[kMGTPE]|[KMGTPE]i|)")
UNITS = {"": 1, "m": 1e-3} | {u: 1000**n for n, u in enumerate("kMGTPE", 1)} | {f"{u}i": 1024**n for n, u in enumerate("KMGTPE", 1)}  # fmt: skip
WORDS = {  # that no schema lists
    "whenUnsatisfiable": ("DoNotSchedule", "ScheduleAnyway"),
    "unhealthyPodEvictionPolicy": ("AlwaysAllow", "IfHealthyBudget"),
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "medium": ("Memory", ""),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
}
POD, CONTAINER = "spec.template.spec", "spec.template.spec.containers.0"
REQUIRED = [  # (kind, place, value); None: any value
    ("Deployment", "spec.replicas", "absent"),
    ("Deployment", "spec.strategy.rollingUpdate.maxUnavailable", 0),
    ("Deployment", f"{POD}.automountServiceAccountToken", False),
    ("Deployment", f"{POD}.securityContext.runAsNonRoot", True),
    ("Deployment", f"{POD}.securityContext.runAsUser", 1000),
    ("Deployment", f"{POD}.securityContext.seccompProfile.type", "RuntimeDefault"),
    ("Deployment", f"{POD}.topologySpreadConstraints", None),
    ("Deployment", f"{POD}.volumes.0.emptyDir.medium", "Memory"),
    ("Deployment", f"{POD}.volumes.0.emptyDir.sizeLimit", None),
    ("Deployment", f"{CONTAINER}.volumeMounts.0.mountPath", "/dev/shm"),
    ("Deployment", f"{CONTAINER}.securityContext.readOnlyRootFilesystem", True),
    ("Deployment", f"{CONTAINER}.securityContext.allowPrivilegeEscalation", False),
    ("Deployment", f"{CONTAINER}.securityContext.capabilities.drop", ["ALL"]),
    ("Deployment", f"{CONTAINER}.readinessProbe.httpGet.path", "/v2/health/ready"),
    ("Deployment", f"{CONTAINER}.startupProbe", None),
    ("Deployment", f"{CONTAINER}.livenessProbe", None),
    *(
        ("Deployment", f"{CONTAINER}.resources.{kind}.{name}", None)
        for kind in ("requests", "limits")
        for name in ("cpu", "memory", "ephemeral-storage")
    ),
    ("HorizontalPodAutoscaler", "spec.minReplicas", 2),
    ("HorizontalPodAutoscaler", "spec.metrics.0.pods.metric.name", "triton_busy_share"),
    ("PodDisruptionBudget", "spec.maxUnavailable", 1),
    ("NetworkPolicy", "spec.policyTypes", ["Ingress", "Egress"]),
    ("NetworkPolicy", "spec.egress", []),
]
PROPAGATION_S, RESOLUTION_S = 5, 30  # until a change of endpoints is known; between two questions of gRPC for a name


def objects(text):
    """The objects of a YAML stream."""
    return [found for found in yaml.safe_load_all(text) if found]


def at(found, place):
    """The value at a dotted place; "absent" where there is none."""
    for key in place.split("."):
        try:
            found = found[int(key) if isinstance(found, list) else key]
        except (KeyError, IndexError, TypeError, ValueError):
            return "absent"
    return found


def quantity(text):
    """A Kubernetes quantity as a number; None where it is none."""
    match = QUANTITY.fullmatch(str(text))
    return match and float(match[1]) * UNITS[match[2]]


def seconds(container, option):
    """The number of a Triton option of the container; 0 where it is not given."""
    values = [arg.split("=")[1] for arg in container.get("args", []) if arg.startswith(f"--{option}=")]
    return int(values[0]) if values else 0


def walk(found, place=""):
    """(place, key, value) of all that a mapping holds, at any depth."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ():
        yield f"{place}.{key}", key, value
        yield from walk(value, f"{place}.{key}")


def find_faults(found):
    """Every fault in words: image, selectors, ports, quantities, times, and what the project asks of its manifests."""
    by_kind = {kind: [o for o in found if o["kind"] == kind] for kind in {o["kind"] for o in found}}
    (deployment,) = by_kind["Deployment"]
    pod = deployment["spec"]["template"]
    faults = [
        f"{kind}: {place}: expected {'a value' if value is None else value}, found {at(o, place)}"
        for kind, place, value in REQUIRED
        for o in by_kind.get(kind, [{}])
        if (at(o, place) == "absent" if value is None else at(o, place) != value)
    ]
    for container in pod["spec"]["containers"]:
        faults += image_faults(container["image"]) + stop_faults(pod["spec"], container)
    for o in found:
        if o["kind"] not in ("ConfigMap", "PrometheusRule"):
            faults += [f"{o['kind']}: {fault}" for fault in (*link_faults(o, deployment), *value_faults(o))]
    return faults


def image_faults(image):
    """An image without digest or tag is another image tomorrow."""
    named = "@sha256:" in image or re.search(r":(?!latest$)[\w.-]+$", image)
    return [] if named else [f"image: expected a digest or a tag, found {image}; name yours under images: in your kustomization.yaml"]  # fmt: skip


def stop_faults(spec, container):
    """Times of a stop: out of rotation first, then the requests in flight, then the end."""
    sleep, grace = at(container, "lifecycle.preStop.sleep.seconds"), spec.get("terminationGracePeriodSeconds", 30)
    sleep = 0 if sleep == "absent" else sleep
    ready, age = container.get("readinessProbe", {}), seconds(container, "grpc-max-connection-age") / 1e3
    unready = ready.get("periodSeconds", 10) * ready.get("failureThreshold", 3) + PROPAGATION_S
    end = sleep + seconds(container, "exit-timeout-secs") + 10
    faults = []
    if grace < end:
        faults.append(f"terminationGracePeriodSeconds: expected at least preStop + exit timeout + 10 = {end}, found {grace}")  # fmt: skip
    if not age:
        faults.append("args: expected --grpc-max-connection-age, found none: a client would stay with one pod")
    if sleep < max(unready, 1.1 * age + RESOLUTION_S):
        faults.append(f"preStop: expected at least {max(unready, 1.1 * age + RESOLUTION_S):.0f} s, until no client asks here, found {sleep}")  # fmt: skip
    return faults


def link_faults(o, deployment):
    """Labels, ports and names by which one object means another."""
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    ports = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
    for place, key, value in walk(o["spec"]):
        if key in ("selector", "podSelector", "labelSelector"):
            wanted = value.get("matchLabels", value)
            if not wanted.items() <= labels.items() or not (wanted or place.startswith(".ingress")):
                yield f"{place}: expected labels of the pods, {labels}, found {wanted}"
        if key in ("port", "targetPort") and isinstance(value, str) and value not in ports:
            yield f"{place}: expected one of the container's ports, {sorted(ports)}, found {value}"
        if key == "scaleTargetRef" and value.get("name") != deployment["metadata"]["name"]:
            yield f"{place}: expected {deployment['metadata']['name']}, found {value.get('name')}"
        if key == "volumeMounts" and not {v["name"] for v in value} <= {v["name"] for v in pod["spec"]["volumes"]}:
            yield f"{place}: expected volumes of the pod, found another"
    if o["kind"] == "Service" and o["spec"].get("clusterIP") == "None":
        for port in o["spec"]["ports"]:
            if port.get("appProtocol") != "kubernetes.io/h2c":
                yield f"appProtocol: expected kubernetes.io/h2c of a headless Service, found {port.get('appProtocol')}"


def value_faults(o):
    """Quantities that are none, requests above limits, and words that no schema lists."""
    for place, key, value in walk(o["spec"]):
        if key in ("requests", "limits"):
            for name, text in value.items():
                if quantity(text) is None:
                    yield f"{place}.{name}: expected a quantity such as 500m or 4Gi, found {text}"
        if key == "resources" and isinstance(value, dict):
            both = value.get("requests", {}).keys() & value.get("limits", {}).keys()
            for name in both:
                if (quantity(value["requests"][name]) or 0) > (quantity(value["limits"][name]) or 0):
                    yield f"{place}.requests.{name}: expected at most the limit, found {value['requests'][name]}"
        if key in ("sizeLimit", "averageValue") and quantity(value) is None:
            yield f"{place}: expected a quantity such as 500m or 4Gi, found {value}"
        if key in WORDS and value not in WORDS[key]:
            yield f"{place}: expected one of {', '.join(WORDS[key])}, found {value}"


# --- PromQL --------------------------------------------------------------------------

NO_METRIC = r'"[^"]*"|\[[^]]*\]|\{[^}]*\}|\b(?:by|on|without|ignoring)\s*\([^)]*\)|\b\d[\w.-]*'
KEYWORDS = {"and", "or", "unless", "bool", "offset"}


def metric_names(expression):
    """Names of the series that a PromQL expression reads."""
    bare = re.sub(NO_METRIC, " ", re.sub(r'"[^"]*"', '""', expression))
    return set(re.findall(r"[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)) - KEYWORDS

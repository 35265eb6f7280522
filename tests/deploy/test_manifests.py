"""deploy/kuberay/: the manifests against the schemas of KubeRay and Kubernetes, and what they promise."""

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.manifest_schemas import KINDS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
OLDEST_WITH_TOKEN = (2, 52)
"""Ray's, which KubeRay asks for where authOptions.mode is token."""

Manifest = dict[str, Any]


def read(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def check(manifest: Manifest) -> None:
    jsonschema.Draft202012Validator(KINDS[manifest["kind"]]).validate(manifest)


def cluster_of(manifest: Manifest) -> Manifest:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def groups(cluster: Manifest) -> Iterator[tuple[str, Manifest]]:
    """(name, pod's spec) of the head and of each group of workers."""
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.fixture(params=["raycluster.yaml", "rayjob.yaml"])
def manifest(request: pytest.FixtureRequest) -> Manifest:
    (found,) = read(request.param)
    return found


def test_manifests_pass_the_schemas() -> None:
    kinds = [manifest["kind"] for path in sorted(FOLDER.iterdir()) for manifest in read(path.name)]
    assert kinds == ["PersistentVolumeClaim", "PriorityClass", "NetworkPolicy", "RayCluster", "RayJob"]
    for path in FOLDER.iterdir():
        for manifest in read(path.name):
            check(manifest)


def broken(manifest: Manifest, place: str, value: Any) -> Manifest:
    """A copy with ``value`` at the place, a path through the spec of the Ray; None: without what is there."""
    made = copy.deepcopy(manifest)
    *folders, last = place.split(".")
    where: Any = cluster_of(made)
    for name in folders:
        where = where[int(name) if name.isdigit() else name]
    if value is None:
        del where[last]
    else:
        where[last] = value
    return made


HEAD = "headGroupSpec.template.spec.containers.0"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("authOption", {"mode": "token"}),
        ("authOptions.mode", "password"),
        ("headGroupSpec", None),
        ("workerGroupSpecs.0.groupName", None),
        ("workerGroupSpecs.1.replicas", "two"),
        ("workerGroupSpecs.1.template.spec.tolerations", {"key": "spot"}),
        ("headGroupSpec.rayStartParams.num-cpus", 0),  # it has to be a text
        (f"{HEAD}.livenesProbe", {}),
        (f"{HEAD}.livenessProbe.httpGet.port", None),
        (f"{HEAD}.resources.limits.memory", "16 GB"),
    ],
)
def test_the_schemas_refuse(manifest: Manifest, place: str, value: Any) -> None:
    check(manifest)
    with pytest.raises(jsonschema.ValidationError):
        check(broken(manifest, place, value))


def test_the_job_has_the_cluster_of_the_other_manifest() -> None:
    (cluster,), (job,) = read("raycluster.yaml"), read("rayjob.yaml")
    assert cluster_of(job) == cluster["spec"]


def unsafe(manifest: Manifest) -> list[str]:
    """What lets somebody in, or gives a container more than it needs."""
    cluster = cluster_of(manifest)
    found = [] if cluster.get("authOptions") == {"mode": "token"} else ["no token"]
    version = tuple(int(part) for part in cluster["rayVersion"].split(".")[:2])
    found += [] if version >= OLDEST_WITH_TOKEN else ["a Ray without tokens"]
    for name, pod in groups(cluster):
        (container,) = pod["containers"]
        if not pod["securityContext"]["runAsNonRoot"] or container["securityContext"]["allowPrivilegeEscalation"]:
            found.append(f"{name} may be root")
        given = {variable["name"] for variable in container["env"]}
        found += [f"{name} sets {variable}" for variable in given if re.search("TOKEN|KEY|PASSWORD|AUTH", variable)]
    return found


def test_a_token_is_asked_for_and_no_secret_is_in_a_manifest(manifest: Manifest) -> None:
    assert unsafe(manifest) == []
    assert unsafe(broken(manifest, "authOptions", None)) == ["no token"]
    assert unsafe(broken(manifest, "authOptions.mode", "disabled")) == ["no token"]
    secret = [{"name": "RAY_AUTH_TOKEN", "value": "x"}]
    assert unsafe(broken(manifest, f"{HEAD}.env", secret)) == ["head sets RAY_AUTH_TOKEN"]
    assert unsafe(broken(manifest, "headGroupSpec.template.spec.securityContext.runAsNonRoot", False))


def test_the_network_is_closed_to_all_but_the_cluster_and_the_dashboard(manifest: Manifest) -> None:
    (policy,) = (each for each in read("common.yaml") if each["kind"] == "NetworkPolicy")
    label = policy["spec"]["podSelector"]["matchLabels"]
    cluster = cluster_of(manifest)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert label.items() <= group["template"]["metadata"]["labels"].items()
    inside, outside = policy["spec"]["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": label}}]}
    assert outside == {"ports": [{"protocol": "TCP", "port": 8265}]}


def test_every_container_is_probed_and_readiness_gives_up_before_liveness(manifest: Manifest) -> None:
    for name, pod in groups(cluster_of(manifest)):
        (container,) = pod["containers"]
        ready, alive = container["readinessProbe"], container["livenessProbe"]
        patience = [probe["periodSeconds"] * probe["failureThreshold"] for probe in (ready, alive)]
        assert patience[0] < patience[1], name
        assert container["startupProbe"]["httpGet"] == ready["httpGet"] == alive["httpGet"]


def test_rollout_workers_are_preemptible_and_learners_are_not(manifest: Manifest) -> None:
    pods = dict(groups(cluster_of(manifest)))
    (priority,) = (each for each in read("common.yaml") if each["kind"] == "PriorityClass")
    assert pods["rollout"]["priorityClassName"] == priority["metadata"]["name"] and priority["value"] < 0
    assert "nodeAffinity" in pods["rollout"]["affinity"]
    assert pods["rollout"]["terminationGracePeriodSeconds"] > 25, "Ray's notice has to fit in"
    for name in ("head", "learner"):
        assert not {"priorityClassName", "affinity"} & pods[name].keys()
    groups_by_name = {group["groupName"]: group for group in cluster_of(manifest)["workerGroupSpecs"]}
    assert groups_by_name["rollout"]["minReplicas"] < groups_by_name["rollout"]["maxReplicas"]
    assert groups_by_name["learner"]["minReplicas"] == groups_by_name["learner"]["maxReplicas"] == 1


def test_ray_is_the_pinned_one(manifest: Manifest) -> None:
    pins = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster_of(manifest)['rayVersion']}" in pins


def test_a_job_goes_on_with_its_run_in_each_try() -> None:
    (job,) = read("rayjob.yaml")
    words = job["spec"]["entrypoint"].split()
    assert {"resume=auto", "run.dir=/shared/runs"} <= set(words)
    assert any(word.startswith("run.name=") for word in words), "another try must find the run"
    assert job["spec"]["backoffLimit"] > 0 and job["spec"]["submitterConfig"]["backoffLimit"] == 0
    mounts = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert "/shared" in [mount["mountPath"] for mount in mounts]


def test_the_words_of_the_drain_notice_are_rays() -> None:
    (cluster,) = read("raycluster.yaml")
    (container,) = dict(groups(cluster["spec"]))["rollout"]["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:2] == ["bash", "-c"]
    subprocess.run(["bash", "-n", "-c", command[2]], check=True, timeout=60)
    from ray.core.generated import autoscaler_pb2
    from ray.scripts.scripts import cli

    options = {name for parameter in cli.commands["drain-node"].params for name in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", command[2])) <= options
    (reason,) = re.findall(r"DRAIN_NODE_REASON_\w+", command[2])
    assert reason in dict(autoscaler_pb2.DrainNodeReason.items())

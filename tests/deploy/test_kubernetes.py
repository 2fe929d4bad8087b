"""The manifests, rendered as kustomize does, hold against Kubernetes's own schemas, strictly; no cluster is needed."""

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.config import Settings

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
VERSION = "1.37.0"
NAMED_LISTS = {"containers", "env", "ports", "volumes", "volumeMounts"}  # a patch joins these by name
KINDS = {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"}

Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


def render(folder: Path) -> dict[str, Manifest]:
    """Return the manifests of a kustomization by kind; reads resources, patches and images, and nothing else."""
    wishes = documents(folder / "kustomization.yaml")[0]
    assert set(wishes) <= {"apiVersion", "kind", "resources", "patches", "images"}, "teach this reader the rest"
    manifests: dict[str, Manifest] = {}
    for resource in wishes["resources"]:
        path = (folder / resource).resolve()
        manifests |= render(path) if path.is_dir() else {one["kind"]: one for one in documents(path)}
    for patch in wishes.get("patches", []):
        (change,) = documents(folder / patch["path"])
        manifests[change["kind"]] = merged(manifests[change["kind"]], change)
    for image in wishes.get("images", []):
        for container in pod_of(manifests["Deployment"])["containers"]:
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image['name']}:{image['newTag']}"
    return manifests


def merged(whole: Any, change: Any, key: str = "") -> Any:
    if isinstance(whole, dict) and isinstance(change, dict):
        joined = {name: merged(whole[name], change[name], name) for name in whole.keys() & change.keys()}
        return whole | change | joined
    if key in NAMED_LISTS:
        by_name = {one["name"]: one for one in whole}
        for one in change:
            by_name[one["name"]] = merged(by_name.get(one["name"], {}), one)
        return list(by_name.values())
    return copy.deepcopy(change)


def pod_of(deployment: Manifest) -> Manifest:
    pod: Manifest = deployment["spec"]["template"]["spec"]
    return pod


@pytest.fixture(scope="module", params=["base", "gpu"])
def rendered(request) -> dict[str, Manifest]:
    return render(KUBERNETES / request.param)


def test_every_manifest_holds_against_the_schemas(rendered):
    assert set(rendered) == KINDS
    for manifest in rendered.values():
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_a_misspelt_field_would_be_found():
    deployment = render(KUBERNETES / "base")["Deployment"]
    pod_of(deployment)["containers"][0]["readinesProbe"] = {}

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSION, strict=True)


@pytest.mark.parametrize("name", ["base", "gpu"])
def test_kustomize_itself_renders_the_same(name):
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl here to compare with")
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / name], capture_output=True, text=True, check=True)
    by_kustomize = {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}
    ours = render(KUBERNETES / name)
    for manifests in (by_kustomize, ours):
        pod_of(manifests["Deployment"])["containers"][0]["env"].sort(key=lambda one: one["name"])

    assert by_kustomize == ours


def test_the_overlay_for_gpus_changes_the_image_the_device_and_the_limits_and_keeps_the_rest():
    base, gpu = (pod_of(render(KUBERNETES / name)["Deployment"])["containers"][0] for name in ("base", "gpu"))

    assert gpu["image"] == "foldserve:gpu"
    assert gpu["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "1"}
    assert {"name": "FOLDSERVE_DEVICE", "value": "cuda"} in gpu["env"]
    assert [one for one in gpu["env"] if one["name"] != "FOLDSERVE_DEVICE"] == base["env"]
    assert gpu["readinessProbe"] == base["readinessProbe"]


def test_every_selector_finds_the_pods_and_every_port_has_its_name(rendered):
    labels = rendered["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        rendered["Deployment"]["spec"]["selector"]["matchLabels"],
        rendered["Service"]["spec"]["selector"],
        rendered["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        rendered["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]

    assert all(selector.items() <= labels.items() for selector in selectors)
    ports = {port["name"] for port in pod_of(rendered["Deployment"])["containers"][0]["ports"]}
    assert {port["targetPort"] for port in rendered["Service"]["spec"]["ports"]} <= ports
    target = rendered["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", rendered["Deployment"]["metadata"]["name"])


def test_the_pod_is_nobody_and_has_time_to_drain(rendered):
    pod = pod_of(rendered["Deployment"])
    (container,) = pod["containers"]
    settings = {one["name"].removeprefix("FOLDSERVE_").lower(): one["value"] for one in container["env"]}
    told = Settings(**settings)

    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["terminationGracePeriodSeconds"] > told.grace_s + told.drain_timeout_s


def test_the_runtime_of_kserve_runs_a_container_that_kubernetes_would_take():
    """KServe's own kinds have no schema in a package that fits beside these; what they wrap is core/v1."""
    (runtime,) = documents(KUBERNETES / "kserve" / "serving-runtime.yaml")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": runtime["metadata"],
        "spec": {"containers": runtime["spec"]["containers"]},
    }

    kubernetes_validate.validate(pod, VERSION, strict=True)


def test_the_inference_service_names_its_runtime_and_its_format():
    (runtime,) = documents(KUBERNETES / "kserve" / "serving-runtime.yaml")
    (service,) = documents(KUBERNETES / "kserve" / "inference-service.yaml")
    model = service["spec"]["predictor"]["model"]

    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in {one["name"] for one in runtime["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert runtime["spec"]["containers"][0]["name"] == "kserve-container", "the name by which KServe finds it"

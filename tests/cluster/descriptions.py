"""What others say a file of theirs may hold: Kubernetes' client, Google's API, KubeRay's CRDs.

Each check raises for a key that is not known and for a value of a wrong type.
KubeRay's definitions come with no package, so `RayClusterSpec` and `RayJobSpec` name by hand the
fields that the files use; where the definitions themselves are at hand, they are asked as well.
"""

import json
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import kubernetes.client
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field

_DATA = os.environ.get("FIFA_TEST_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data"
KUBERAY_CRDS = Path(_DATA).resolve() / "kuberay"


def check_kubernetes(value: Any, kind: str, place: str = "") -> None:
    """A part of a manifest against the type of the Kubernetes client that describes it."""
    if many := re.fullmatch(r"[Ll]ist\[(.+)\]", kind):
        for index, item in enumerate(_expect(list, value, place)):
            check_kubernetes(item, many[1], f"{place}[{index}]")
    elif pairs := re.fullmatch(r"[Dd]ict[\[(]str, (.+)[\])]", kind):
        for key, item in _expect(dict, value, place).items():
            check_kubernetes(item, pairs[1], f"{place}.{key}")
    elif hasattr(kubernetes.client, kind):
        model = getattr(kubernetes.client, kind)
        names = {json_name: name for name, json_name in model.attribute_map.items()}
        for key, item in _expect(dict, value, place).items():
            if key not in names:
                raise ValueError(f"{place}: {kind} has no {key!r}")
            check_kubernetes(item, model.openapi_types[names[key]], f"{place}.{key}")
        # Says what is missing.
        model(**{names[key]: item for key, item in value.items()})
    elif kind != "object":
        _expect({"str": str, "int": int, "bool": bool, "float": float}[kind], value, place)


def _expect(kind: type, value: Any, place: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{place}: expected {kind.__name__}, got {value!r}")
    return value


def check_google_instance(value: dict[str, Any]) -> None:
    """A machine against Compute Engine's own description of one, as Google's client has it."""
    _google_instance().validate(value)


@cache
def _google_instance() -> Draft202012Validator:
    documents = resources.files("googleapiclient.discovery_cache") / "documents"
    schemas = json.loads((documents / "compute.v1.json").read_text())["schemas"]
    definitions = {name: _from_discovery(schema) for name, schema in schemas.items()}
    return Draft202012Validator(definitions["Instance"] | {"definitions": definitions})


def _from_discovery(schema: Any) -> Any:
    """Google's description as JSON Schema that refuses unknown keys."""
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": f"#/definitions/{schema['$ref']}"}
    found: dict[str, Any] = {}
    if schema.get("type") not in (None, "any"):
        # 64-bit numbers travel as text; the API takes both.
        is_number = schema.get("format") in ("int64", "uint64")
        found["type"] = ["string", "integer"] if is_number else schema["type"]
    if "enum" in schema:
        found["enum"] = schema["enum"]
    if "items" in schema:
        found["items"] = _from_discovery(schema["items"])
    if "properties" in schema:
        found["properties"] = {k: _from_discovery(v) for k, v in schema["properties"].items()}
        found["additionalProperties"] = False
    return found


def check_crd(manifest: dict[str, Any]) -> None:
    """A manifest against the openAPI schema of KubeRay's definition, unknown keys refused."""
    group, _, version = manifest["apiVersion"].partition("/")
    schema = _strict(read_crd(group, version, manifest["kind"]))
    schema["properties"]["metadata"] = {"type": "object"}
    Draft202012Validator(schema).validate(manifest)


@cache
def read_crd(group: str, version: str, kind: str) -> Any:
    """The openAPI schema of one version of a custom resource."""
    text = (KUBERAY_CRDS / f"{group}_{kind.lower()}s.yaml").read_text()
    versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
    served = next(entry for entry in versions if entry["name"] == version)
    return served["schema"]["openAPIV3Schema"]


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


def field_paths(model: type[BaseModel], place: str = "spec") -> Iterator[str]:
    """Dotted names of the fields of a model and of the models in it."""
    for name, field in model.model_fields.items():
        yield f"{place}.{name}"
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from field_paths(inner, f"{place}.{name}")


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(_Fields):
    """KubeRay's field of that name, as are the models below."""

    mode: Literal["token", "disabled"]


class AutoscalerOptions(_Fields):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int = Field(ge=0)
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    env: list[dict[str, Any]]
    securityContext: dict[str, Any]
    resources: dict[str, Any]


class GcsFaultToleranceOptions(_Fields):
    redisAddress: str
    redisPassword: dict[str, Any]


class HeadGroupSpec(_Fields):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class WorkerGroupSpec(_Fields):
    groupName: str = Field(pattern="^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    priority: int = 0
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    labels: dict[str, str]
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class RayClusterSpec(_Fields):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    gcsFaultToleranceOptions: GcsFaultToleranceOptions | None = None
    headGroupSpec: HeadGroupSpec
    workerGroupSpecs: list[WorkerGroupSpec]


class RayJobSpec(_Fields):
    entrypoint: str
    backoffLimit: int = Field(ge=0)
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int = Field(ge=0)
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    submitterPodTemplate: dict[str, Any]
    rayClusterSpec: RayClusterSpec

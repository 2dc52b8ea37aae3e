"""Kubernetes manifests: built as kustomize builds them, and checked without a cluster."""

import functools
import importlib.resources
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from ray.scripts.scripts import start as ray_start
from referencing import Registry, Resource

from tests.unit.cluster.ray_v1_schema import DEFINITIONS, KINDS

KUBERAY = Path(__file__).parents[3] / "cluster" / "kuberay"
OVERLAYS = ("cpu-test", "one-gpu", "many-gpu")
JOBS = ("train", "tune", "encode")
BUILDS = [f"{overlay}/{part}" for overlay in OVERLAYS for part in ("cluster", *JOBS)]
KUBERNETES = ("1.30", "1.37")
"""Oldest and newest version whose schemas the manifests must pass."""
RESOURCES = {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}
QUANTITY = re.compile(r"\d+(m|[KMGT]i)?")

Document = dict[str, Any]
Place = tuple[str | int, ...]


def run_kustomize(folder: Path) -> list[Document]:
    kubectl = Path(sys.executable).with_name("kubectl")
    built = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


@functools.cache
def build_all() -> dict[str, list[Document]]:
    folders = [KUBERAY / "overlays" / name for name in BUILDS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BUILDS, pool.map(run_kustomize, folders), strict=True))


@functools.cache
def load_kubernetes_schema(version: str, name: str) -> Any:
    schemas = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    return json.loads((schemas / f"v{version}.0-local-strict" / f"{name}.json").read_text())


@functools.cache
def make_validator(version: str, api: str, kind: str) -> Draft202012Validator:
    definitions = Resource.from_contents(load_kubernetes_schema(version, "_definitions"))
    if api == "ray.io/v1":
        schema = KINDS[kind]
    else:
        group, _, number = api.rpartition("/")
        parts = (kind.lower(), group.removesuffix(".k8s.io"), number)
        schema = load_kubernetes_schema(version, "-".join(filter(None, parts)))
    return Draft202012Validator(schema, registry=Registry().with_resource(DEFINITIONS, definitions))


def walk(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value inside, with the keys and indices that lead to it."""
    yield place, value
    items = {dict: dict.items, list: enumerate}.get(type(value), lambda _: ())(value)
    for key, inner in items:
        yield from walk(inner, (*place, key))


def find_faults(document: Document, version: str = KUBERNETES[-1]) -> list[str]:
    """What is wrong with it: the place, and what should be there."""
    validator = make_validator(version, document["apiVersion"], document["kind"])
    faults = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(document)
    ]
    resources = {"storage"} if document["kind"] == "PersistentVolumeClaim" else RESOURCES
    options = {option.lstrip("-") for parameter in ray_start.params for option in parameter.opts}
    for place, value in walk(document):
        where = ".".join(map(str, place))
        if place[-1:] == ("rayStartParams",) and isinstance(value, dict):
            faults += [f"{where}: no option {key}" for key in value if key not in options]
        if place[-1:] in (("requests",), ("limits",)) and isinstance(value, dict):
            faults += [f"{where}: no resource {key}" for key in value if key not in resources]
            faults += [
                f"{where}.{key}: no quantity {amount}"
                for key, amount in value.items()
                if not QUANTITY.fullmatch(str(amount))
            ]
        if place[-1:] == ("sizeLimit",) and not QUANTITY.fullmatch(str(value)):
            faults.append(f"{where}: no quantity {value}")
    return faults


def find_cluster(documents: list[Document]) -> Document:
    """The RayCluster among them, or the one that the RayJob will have."""
    for document in documents:
        if document["kind"] == "RayCluster":
            return document
        if document["kind"] == "RayJob":
            return document | {"spec": document["spec"]["rayClusterSpec"]}
    raise AssertionError("no cluster")


def find_pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """The specs of all pods, with the names of their templates' owners."""
    for document in documents:
        for place, value in walk(document):
            if place[-1:] in (("template",), ("submitterPodTemplate",)):
                yield ".".join(map(str, place[:-1])), value["spec"]


def size(quantity: str) -> float:
    """Of a quantity in its unit: cores or bytes."""
    number, unit = re.fullmatch(r"(\d+)(.*)", quantity).groups()
    scales = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return int(number) * scales[unit]

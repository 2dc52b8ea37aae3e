"""The Kubernetes manifests, built by kustomize and read as their consumers read them.

No cluster is asked: the kinds of Kubernetes are checked by its own schemas, those of KubeRay by
ours, `ray start` options and sizes by Ray, and the jobs' options by the jobs.
"""

import copy
import functools
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import tyro
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as derive_autoscaling,
)

from efae.config import Config
from efae.latents.request import Request
from jobs import train, tune
from tests.unit.cluster.manifests import (
    BUILDS,
    JOBS,
    KUBERAY,
    KUBERNETES,
    OVERLAYS,
    Document,
    Place,
    build_all,
    find_cluster,
    find_faults,
    find_pods,
    run_kustomize,
    size,
    walk,
)

ROOT = Path(__file__).parents[3]
FREE = {"annotations", "labels", "matchLabels", "data"}
"""Fields whose keys are names that people choose."""
PARSERS = {
    "jobs/train.py": train.parse_arguments,
    "jobs/tune.py": lambda arguments: tune.parse_arguments(arguments)[1:],
    "jobs/encode.py": lambda arguments: tyro.cli(Request, args=arguments),
}


def parse_entrypoint(entrypoint: str) -> Any:
    """What the job would do: its configuration (and sweep), or its request; exits if it cannot."""
    python, script, *arguments = shlex.split(entrypoint)
    assert python == "python"
    assert (ROOT / script).is_file()
    return PARSERS[script](arguments)


def plant(document: Document, place: Place, key: str | None = None, value: Any = None) -> Document:
    """A copy in which the last key of the place is misspelt as `key`, or has another value."""
    planted = copy.deepcopy(document)
    holder = functools.reduce(lambda inner, step: inner[step], place[:-1], planted)
    if key is None:
        holder[place[-1]] = value
    else:
        holder[key] = holder.pop(place[-1])
    return planted


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", BUILDS)
def test_valid(name, version):
    documents = build_all()[name]
    kinds = {document["kind"] for document in documents}
    expected = "RayCluster" if name.endswith("cluster") else "RayJob"
    assert kinds == {"ServiceAccount", "ConfigMap", "NetworkPolicy", expected}
    for document in documents:
        assert document["metadata"]["namespace"] == "efae"
        assert find_faults(document, version) == []


def distinct_documents() -> list[Document]:
    """One of each object; those of the largest overlay, which have most fields."""
    builds = [build_all()[f"many-gpu/{part}"] for part in ("cluster", *JOBS)]
    names = {(d["kind"], d["metadata"]["name"]): d for documents in builds for d in documents}
    return list(names.values())


def test_no_field_can_be_misspelt():
    tried = 0
    for document in distinct_documents():
        for place, _ in walk(document):
            if not place or isinstance(place[-1], int) or place in {("kind",), ("apiVersion",)}:
                continue
            if place[-2:-1] and place[-2] in FREE:
                continue
            if "rayClusterSpec" in place[:-2]:  # as in the RayCluster
                continue
            misspelt = f"{place[-1]}x"
            faults = find_faults(plant(document, place, key=misspelt))
            where = ".".join(map(str, place[:-1]))
            assert any(f.startswith(where) and misspelt in f for f in faults), place
            tried += 1
    assert tried > 250


CLUSTER_FAULTS: list[tuple[Place, Any]] = [
    (("authOptions", "mode"), "tokens"),
    (("autoscalerOptions", "version"), "v3"),
    (("autoscalerOptions", "idleTimeoutSeconds"), "300s"),
    (("enableInTreeAutoscaling",), "yes"),
    (("headGroupSpec", "serviceType"), "Loadbalancer"),
    (("headGroupSpec", "rayStartParams", "num-cpus"), 0),
    (("headGroupSpec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "6379"),
    (("workerGroupSpecs", 0, "minReplicas"), "0"),
    (("workerGroupSpecs", 0, "template", "spec", "securityContext", "runAsNonRoot"), "true"),
    (("workerGroupSpecs", 0, "template", "spec", "volumes", 0, "emptyDir", "sizeLimit"), "5Gib"),
    (("workerGroupSpecs", 0, "template", "spec", "containers", 0, "envFrom"), {"configMapRef": {}}),
]
OTHER_FAULTS: list[tuple[str, Place, Any]] = [
    ("RayJob", ("spec", "submissionMode"), "K8sJob"),
    ("RayJob", ("spec", "backoffLimit"), "3"),
    ("RayJob", ("spec", "activeDeadlineSeconds"), 0),
    ("RayJob", ("spec", "entrypoint"), ["python", "jobs/train.py"]),
    ("NetworkPolicy", ("spec", "policyTypes"), "Ingress"),
    ("NetworkPolicy", ("spec", "ingress", 0, "from"), {}),
    ("ServiceAccount", ("automountServiceAccountToken",), "no"),
    ("ConfigMap", ("data", "RAY_USAGE_STATS_ENABLED"), 0),
]


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        *(("RayCluster", ("spec", *place), value) for place, value in CLUSTER_FAULTS),
        *(("RayJob", ("spec", "rayClusterSpec", *place), v) for place, v in CLUSTER_FAULTS),
        *OTHER_FAULTS,
    ],
)
def test_a_wrong_value_is_named(kind, place, value):
    document = next(d for d in distinct_documents() if d["kind"] == kind)
    assert find_faults(document) == []
    faults = find_faults(plant(document, place, value=value))
    assert any(fault.startswith(".".join(map(str, place))) for fault in faults), faults


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("job", JOBS)
def test_entrypoint(overlay, job, capsys):
    documents = build_all()[f"{overlay}/{job}"]
    spec = next(d for d in documents if d["kind"] == "RayJob")["spec"]
    assert f"jobs/{job}.py" in spec["entrypoint"]
    parsed = parse_entrypoint(spec["entrypoint"])
    with pytest.raises(SystemExit, match="2"):
        parse_entrypoint(f"{spec['entrypoint']} --tracking.run-nam x")
    assert "--tracking.run-nam" in capsys.readouterr().err

    # What jobs need is there when they begin, and their largest size can come.
    autoscaling = derive_autoscaling(find_cluster(documents))
    node = autoscaling["available_node_types"]["workers"]["resources"]
    workers = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    [cache] = [v for v in workers["template"]["spec"]["volumes"] if v["name"] == "cache"]
    config = parsed[0] if isinstance(parsed, tuple) else parsed
    if isinstance(config, Config):
        each = config.ray.cpus_per_worker, int(config.ray.use_gpu)
        fewest, most = config.ray.fewest_workers, config.ray.most_workers
        folder, cache_bytes = config.data.cache_dir, config.data.cache_bytes
        if isinstance(parsed, tuple):
            assert parsed[1].name  # or a retry would begin anew
            most *= max(1, parsed[1].concurrency)
        else:
            assert config.resume == "auto"
            assert "--tracking.run-name " in spec["entrypoint"]
    else:
        each, (fewest, most) = (config.cpus_per_actor, int(config.use_gpu)), (1, 1)
        folder, cache_bytes = config.cache_dir, 20 * 2**30
    room = min(node["CPU"] // each[0], node["GPU"] // each[1] if each[1] else node["CPU"])
    assert fewest <= room * workers["replicas"]
    assert most <= room * workers["maxReplicas"]
    assert ("nvidia.com/gpu" in str(workers)) == bool(each[1])
    assert folder == "/cache"
    assert cache_bytes < size(cache["emptyDir"]["sizeLimit"])


@pytest.mark.parametrize("name", BUILDS)
def test_autoscaling(name):
    cluster = find_cluster(build_all()[name])
    config = derive_autoscaling(cluster)
    head, workers = (config["available_node_types"][kind] for kind in ("headgroup", "workers"))
    assert head["resources"]["CPU"] == 0
    assert (workers["min_workers"], config["max_workers"] > 0) == (0, True)
    assert cluster["spec"]["autoscalerOptions"]["version"] == "v2"
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert cluster["spec"]["rayVersion"] == pinned[1]  # and the operator chooses probes by it
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    containers = [c for _, pod in find_pods(build_all()[name]) for c in pod["containers"]]
    assert not [key for c in containers for key in c if key.endswith("Probe")]
    assert len({c["image"] for c in containers}) == 1


@pytest.mark.parametrize("name", BUILDS)
def test_pods_are_contained(name):
    pods = dict(find_pods(build_all()[name]))
    assert len(pods) == (2 if name.endswith("cluster") else 3)
    options = find_cluster(build_all()[name])["spec"]["autoscalerOptions"]
    for pod in pods.values():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any("hostPath" in volume for volume in pod.get("volumes", []))
        for container in (*pod["containers"], options):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
            assert requests["memory"] == limits["memory"]
            assert requests.keys() == limits.keys()
        [container] = pod["containers"]
        limits = container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        sizes = {"Memory": 0.0, "": 0.0}
        for volume in pod["volumes"]:
            folder = volume["emptyDir"]
            sizes[folder.get("medium", "")] += size(folder["sizeLimit"])
        assert sizes["Memory"] <= size(limits["memory"]) / 2
        if "ephemeral-storage" in limits:
            assert sizes[""] <= size(limits["ephemeral-storage"])


def test_no_secrets_and_no_open_door():
    for documents in build_all().values():
        for document in documents:
            for place, value in walk(document):
                name = str(place[-1]) if place else ""
                assert not re.search("SECRET|PASSWORD|TOKEN|ACCESS_KEY", name), place
                assert not (name == "env" and re.search("SECRET|PASSWORD|TOKEN|KEY", str(value)))
        policies = {d["metadata"]["name"]: d for d in documents if d["kind"] == "NetworkPolicy"}
        peers = [
            p for d in policies.values() for rule in d["spec"]["ingress"] for p in rule["from"]
        ]
        assert all("ipBlock" not in peer for peer in peers)
        assert all(any(selector.values()) for peer in peers for selector in peer.values())
        [rule] = policies["efae-job-api"]["spec"]["ingress"]
        assert [port["port"] for port in rule["ports"]] == [8265]


@pytest.mark.parametrize("part", ["train", "cluster"])
def test_own_overlay_with_queue_and_compile_cache(part, tmp_path):
    # The example of the documentation, which sets image, endpoints, identity, queue and volume.
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    shutil.copytree(KUBERAY, tmp_path / "cluster" / "kuberay")
    example = re.search(r"```yaml\n(# mine/kustomization.yaml.*?)```", text, re.DOTALL)[1]
    (tmp_path / "mine").mkdir()
    example = example.replace("one-gpu/train", f"one-gpu/{part}")
    (tmp_path / "mine" / "kustomization.yaml").write_text(example)
    documents = run_kustomize(tmp_path / "mine")
    for document in documents:
        assert document["metadata"]["namespace"] == "efae"
        for version in KUBERNETES:
            assert find_faults(document, version) == []
    objects = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    containers = [c for _, pod in find_pods(documents) for c in pod["containers"]]
    assert {c["image"] for c in containers} == {"registry.example.org/efae:0.1.0-gpu"}
    environment = objects["ConfigMap", "efae-environment"]["data"]
    assert environment["MLFLOW_TRACKING_URI"] == "https://mlflow.example.org"
    assert "AWS_ENDPOINT_URL" not in environment
    outer = objects["RayJob", "efae-train"] if part == "train" else find_cluster(documents)
    assert outer["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "efae"}
    # Kueue refuses a job that would change its size.
    cluster = find_cluster(documents)["spec"]
    workers = cluster["workerGroupSpecs"][0]
    assert cluster["enableInTreeAutoscaling"] is False
    assert workers["replicas"] == (2 if part == "train" else 0)
    for account in ("efae-head", "efae-worker"):
        assert objects["ServiceAccount", account]["metadata"]["annotations"]
    # Every folder of compiled kernels is on the volume.
    pod = workers["template"]["spec"]
    [mount] = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "compiled"]
    [volume] = [v for v in pod["volumes"] if v["name"] == "compiled"]
    claim = volume["persistentVolumeClaim"]["claimName"]
    assert objects["PersistentVolumeClaim", claim]["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert environment[name].startswith(f"{mount['mountPath']}/")


def test_commands_of_the_documentation():
    text = (ROOT / "docs" / "kubernetes.md").read_text().replace("\\\n", " ")
    folders = re.findall(r"apply -k (\S+)", text)
    commands = re.findall(r"ray job submit .* -- (python .*)", text)
    assert folders
    assert commands
    for folder in folders:
        assert (ROOT / folder / "kustomization.yaml").is_file()
    for command in commands:
        parse_entrypoint(command)

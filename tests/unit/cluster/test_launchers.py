"""What `ray up` would be given: our launchers hold, and a slip in one is found and placed."""

import re
from pathlib import Path

import pytest

import efae
from cluster.launchers.check import PLACEHOLDER, check_launcher, main

FOLDER = Path(__file__).parents[3] / "cluster" / "launchers"
FILLED = {
    "region": {"aws": "eu-central-1", "gcp": "europe-west4"},
    "zones": "eu-central-1a,eu-central-1b",
    "zone": "europe-west4-a",
    "registry": "registry.example.org:5000/team",
    "mlflow_url": "http://mlflow.example.org:5000",
    "s3_url": "https://s3.example.org",
    "project": "team-efae",
    "head_type": {"aws": "m7i.xlarge", "gcp": "n2-standard-4"},
    "gpu_type": {"aws": "g6.2xlarge", "gcp": "g2-standard-8"},
    "head_ami": "ami-0123456789abcdef0",
    "gpu_ami": "ami-0fedcba9876543210",
    "head_profile": "efae-head",
    "worker_profile": "efae-worker",
    "security_group": "sg-0123456789abcdef0",
    "head_image": "projects/team-efae/global/images/family/head",
    "gpu_image": "projects/team-efae/global/images/family/gpu",
    "head_account": "head@team-efae.iam.gserviceaccount.com",
    "worker_account": "worker@team-efae.iam.gserviceaccount.com",
    "subnetwork": "projects/team-efae/regions/europe-west4/subnetworks/efae",
    "credentials_file": "~/.aws/credentials",
}


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    return tmp_path / "launcher.yaml"


def fill(cloud: str) -> str:
    """A launcher as its user has it."""
    text = (FOLDER / f"{cloud}.yaml").read_text().replace(f"{PLACEHOLDER}_...", "")
    for name in sorted(FILLED, key=len, reverse=True):  # zones before zone
        value = FILLED[name]
        text = text.replace(
            f"{PLACEHOLDER}_{name}", value if isinstance(value, str) else value[cloud]
        )
    return text


def plant(launcher: Path, text: str, old: str, new: str) -> list[str]:
    assert text.count(old) >= 1, f"{old!r} is not there to be misspelled"
    launcher.write_text(text.replace(old, new, 1))
    return check_launcher(launcher)


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_launcher_holds_as_it_is_and_filled_in(cloud: str, launcher: Path):
    assert check_launcher(FOLDER / f"{cloud}.yaml", template=True) == []
    launcher.write_text(fill(cloud))
    assert check_launcher(launcher) == []


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_images_are_of_this_version(cloud: str):
    tags = re.findall(r"/efae:(\S+)", (FOLDER / f"{cloud}.yaml").read_text())
    assert tags == [f"{efae.__version__}-cpu-{cloud}", f"{efae.__version__}-gpu"]


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_every_placeholder_must_go(cloud: str, capsys: pytest.CaptureFixture[str]):
    path = FOLDER / f"{cloud}.yaml"
    lines = [line.partition("#")[0] for line in path.read_text().splitlines()]
    assert main([str(path)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == sum(line.count(PLACEHOLDER) for line in lines) + (cloud == "gcp")
    assert all(PLACEHOLDER in line and "put your own" in line for line in said)


BOTH = [
    ("cluster_name: efae", "cluster_nam: efae", "cluster_nam"),
    ("provider:\n", "provider\n", "launcher.yaml"),
    ("  type: ", "  type: x", "provider.type"),
    ("cache_stopped_nodes:", "cache_stoped_nodes:", "provider: "),
    ("max_workers: 8", "max_workers: 8\nmax_workers: 9", "max_workers is there twice"),
    ("idle_timeout_minutes: 10", "idle_timeout_minutes: ten", "idle_timeout_minutes"),
    ("  ssh_user:", "  ssh_usr:", "auth"),
    ("  head_image:", "  haed_image:", "docker"),
    ("container_name: efae", 'container_name: ""', "container"),
    ("pull_before_run: true", "pull_before_run: sometimes", "docker.pull_before_run"),
    ("--ulimit=", "--ulimt=", "docker.run_options.0"),
    (":0.1.0-gpu", ":latest", "docker.worker_image"),
    ("head_node_type: head", "head_node_type: haed", "head_node_type"),
    ("resources: {CPU: 0", "resource: {CPU: 0", "available_node_types.head"),
    ("{CPU: 0, GPU: 0}", "{CPU: none}", "available_node_types.head.resources.CPU"),
    ("    min_workers: 0", "    min_worker: 0", "available_node_types.gpu"),
    ("rsync_exclude:", "rsync_excludes:", "rsync_excludes"),
    ("setup_commands: []", "setup_commands: true", "setup_commands"),
    ("|| {", "||", "initialization_commands.0"),
    ("--num-cpus=0", "--num-cpu=0", "head_start_ray_commands.1: ray start"),
    ("--port=6379", "--port=ray", "head_start_ray_commands.1: ray start"),
    ("ray start --address", "ray strat --address", "worker_start_ray_commands.1"),
    ("--address=$RAY_HEAD_IP", "--address=$RAY_HEAD", "worker_start_ray_commands"),
    # What is well formed and not safe.
    ("{CPU: 0, GPU: 0}", "{CPU: 4, GPU: 0}", "available_node_types.head.resources.CPU"),
    ("    min_workers: 0", "    min_workers: 1", "available_node_types.gpu.min_workers"),
    ("127.0.0.1", "0.0.0.0", "head_start_ray_commands"),
    (" --disable-usage-stats", "", "head_start_ray_commands"),
    (" --autoscaling-config=~/ray_bootstrap_config.yaml", "", "head_start_ray_commands"),
    ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "docker.run_options"),
    ("/.ray/auth_token: ", "/.ray/token: ", "file_mounts"),
    ("--env=RAY_AUTH", "--env=RAY_AUTH_TOKEN=x\n    - --env=RAY_AUTH", "docker.run_options.1"),
    ("http://mlflow", "http://user:word@mlflow", "docker.run_options"),
]
AWS = [
    ("InstanceMarketOptions:", "InstanceMarketOption:", "gpu.node_config"),
    ("{MarketType: spot}", "{MarketType: spott}", "gpu.node_config.InstanceMarketOptions"),
    ("VolumeSize: 100", "VolumeSize: large", "head.node_config"),
    ("ImageId: ami-", "ImageID: ami-", "head.node_config"),
    ("ami-0123", "0123", "head.node_config.ImageId"),
    ("g6.2xlarge", "g6-2xlarge", "gpu.node_config.InstanceType"),
    ("{HttpTokens: required}", "{HttpTokens: require}", "MetadataOptions.HttpTokens"),
    ("eu-central-1 ", "eu_central_1 ", "provider.region"),
    ("SecurityGroupIds: [sg-0123456789abcdef0]", "KeyName: mine", "head.node_config"),
    (
        "      MetadataOptions",
        "      InstanceMarketOptions: {MarketType: spot}\n      MetadataOptions",
        "head.node_config",
    ),
]
GCP = [
    ("provisioningModel:", "provisionModel:", "gpu.node_config.scheduling"),
    ("SPOT", "SPOTT", "gpu.node_config.scheduling.provisioningModel"),
    ("machineType:", "machinetype:", "head.node_config"),
    ("diskSizeGb: 100", "diskSizeGb: 100GB", "head.node_config.disks.0"),
    ("autoDelete: true", "autoDelete: false", "head.node_config.disks.0.autoDelete"),
    ("subnetwork:", "subnet:", "head.node_config.networkInterfaces.0"),
    ("head@team", "team", "head.node_config.serviceAccounts.0.email"),
    ("europe-west4-a", "europe-west4_a", "provider.availability_zone"),
]
SLIPS = [
    *((cloud, *slip) for cloud in ("aws", "gcp") for slip in BOTH),
    *(("aws", *slip) for slip in AWS),
    *(("gcp", *slip) for slip in GCP),
]


@pytest.mark.parametrize(("cloud", "old", "new", "place"), SLIPS)
def test_slip_is_found_and_placed(cloud: str, old: str, new: str, place: str, launcher: Path):
    problems = plant(launcher, fill(cloud), old, new)
    assert any(place in problem for problem in problems), problems

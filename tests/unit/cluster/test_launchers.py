"""The configurations for `ray up`: Ray accepts them, and they keep what docs/clouds.md promises."""

import re
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import efae

FOLDER = Path(__file__).parents[3] / "cluster" / "launchers"


@pytest.fixture(params=["aws", "gcp"])
def text(request: pytest.FixtureRequest) -> str:
    return (FOLDER / f"{request.param}.yaml").read_text()


def test_ray_accepts_it(text: str):
    validate_config(prepare_config(yaml.safe_load(text)))


def test_it_keeps_what_the_documentation_promises(text: str):
    config = yaml.safe_load(text)
    cloud = config["provider"]["type"]
    head, gpu = (config["available_node_types"][name] for name in ("head", "gpu"))
    assert config["head_node_type"] == "head"
    assert (head["resources"]["CPU"], gpu["min_workers"]) == (0, 0)
    assert "spot" not in str(head["node_config"]).lower()
    assert "spot" in str(gpu["node_config"]).lower()
    assert config["idle_timeout_minutes"] == 10
    if cloud == "aws":
        for node in (head, gpu):
            assert node["node_config"]["SecurityGroupIds"] == ["REPLACE_ME_security_group"]
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    [start] = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--disable-usage-stats" in start


def test_images_are_of_this_version(text: str):
    [cloud] = re.findall(r"^  type: (\w+)", text, re.MULTILINE)
    tags = re.findall(r"/efae:(\S+)", text)
    assert tags == [f"{efae.__version__}-cpu-{cloud}", f"{efae.__version__}-gpu"]

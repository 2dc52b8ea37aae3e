"""Check a configuration for `ray up` before it costs anything; contacts nothing.

    python -m cluster.launchers.check my-cluster.yaml

Ray's own schema and checks come first; then what they leave open: the fields of a node, which go to
the cloud as they are, the shell commands, `ray start` and its options, and the rules of safety.
"""

import argparse
import copy
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from ray import autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.launchers.nodes import Json, check_aws_node, check_gcp_node, check_schema
from cluster.launchers.shell import check_syntax, read_ray_commands

PLACEHOLDER = "REPLACE_ME"
TOKEN_PATH = "/home/ray/.ray/auth_token"
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)

_IMAGE = r"\S+(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})"  # what neither names may change
_FORMS = {
    "InstanceType": r"[a-z][a-z0-9-]*\.[a-z0-9-]+",
    "ImageId": r"ami-[0-9a-f]{8,17}",
    "SecurityGroupIds": r"sg-[0-9a-f]{8,17}",
    "region": r"[a-z]+(-[a-z]+)+-?\d+",
    "availability_zone": r"[a-z]+(-[a-z]+)+-?\d+-?[a-z](,[a-z]+(-[a-z]+)+-\d+[a-z])*",
    "project_id": r"[a-z][a-z0-9-]{4,28}[a-z0-9]",
    "email": r"[^@\s]+@[^@\s]+\.[a-z]+",
    "head_image": _IMAGE,
    "worker_image": _IMAGE,
    "run_options": r"--(env=[A-Z][A-Z0-9_]*=\S+|(ulimit|shm-size|gpus)=\S+)",
}
"""What the text under a key looks like, or each of a list of them."""
_SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|PRIVATE KEY|(SECRET\w*|PASSWORD|ACCESS_KEY\w*|TOKEN)=|//[^/@\s]+:[^/@\s]+@"
)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [cast(str, key.value) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"line {node.start_mark.line + 1}: {twice[0]} is there twice")
        return super().construct_mapping(node, deep)


def check_launcher(path: Path, template: bool = False) -> list[str]:
    """What is wrong with a configuration, one line each, which begins with the place.

    Args:
        path: of the YAML file.
        template: whether placeholders may stand.
    """
    try:
        config = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, ValueError) as error:
        return [f"{path.name}: {' '.join(str(error).split())}"]
    # What comes later goes by what was checked before.
    for check in (_check_fields, _check_ray, _check_nodes, _check_commands, _check_safety):
        if problems := list(check(config)):
            return problems
    return list(_check_texts(config, template))


def _check_fields(config: Any) -> Iterator[str]:
    source = Path(autoscaler.__file__).parent / "ray-schema.json"
    schema = cast(Json, json.loads(source.read_text()))
    # Ray leaves the first open, and takes defaults of its own for the others.
    provider = schema["properties"]["provider"]
    provider["additionalProperties"] = False
    provider["properties"]["type"]["enum"] = ["aws", "gcp"]
    provider["required"] = ["type", "region", "availability_zone"]
    schema["required"] += ["available_node_types", "head_node_type", "docker", "file_mounts"]
    schema["required"] += ["max_workers", "auth", *COMMANDS]
    yield from check_schema(config, schema)


def _check_ray(config: Json) -> Iterator[str]:
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    # Ray's checks include bare assertions.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        yield f"{config['cluster_name']}: Ray refuses it: {reason}"


def _check_nodes(config: Json) -> Iterator[str]:
    check_node = check_aws_node if config["provider"]["type"] == "aws" else check_gcp_node
    for name, node_type in config["available_node_types"].items():
        yield from check_node(node_type["node_config"], f"available_node_types.{name}.node_config")


def _check_commands(config: Json) -> Iterator[str]:
    for key in COMMANDS:
        for index, command in enumerate(config[key]):
            if wrong := check_syntax(command):
                yield f"{key}.{index}: {wrong}"
                continue
            try:
                list(read_ray_commands(command))
            except ValueError as error:
                yield f"{key}.{index}: {error}"


def _check_safety(config: Json) -> Iterator[str]:
    head_type, types = config["head_node_type"], config["available_node_types"]
    place = f"available_node_types.{head_type}"
    if types[head_type]["resources"].get("CPU") != 0:
        yield f"{place}.resources.CPU: 0, so that no work runs on the head"
    if "SPOT" in json.dumps(types[head_type]["node_config"]).upper():
        yield f"{place}.node_config: the head on demand, a lost one ends every job"
    for name, node_type in types.items():
        if node_type.get("min_workers", 0) != 0:
            yield f"available_node_types.{name}.min_workers: 0, or it costs while nothing runs"
        node = node_type["node_config"]
        if config["provider"]["type"] == "aws" and "SecurityGroupIds" not in node:
            yield (
                f"available_node_types.{name}.node_config.SecurityGroupIds: a group of your own;"
                " the one that Ray makes has port 22 open to the world"
            )
    options = config["docker"].get("run_options", [])
    if "--env=RAY_AUTH_MODE=token" not in options:
        yield "docker.run_options: --env=RAY_AUTH_MODE=token, or whoever reaches Ray commands it"
    if TOKEN_PATH not in config["file_mounts"]:
        yield f"file_mounts: {TOKEN_PATH}, the token that every node needs"
    yield from _check_starts(config)


def _check_starts(config: Json) -> Iterator[str]:
    for side, wanted in (
        (
            "head",
            {
                "head": True,
                "num_cpus": 0,
                "dashboard_host": "127.0.0.1",
                "disable_usage_stats": True,
                "autoscaling_config": "~/ray_bootstrap_config.yaml",
            },
        ),
        ("worker", {"address": "$RAY_HEAD_IP:6379"}),
    ):
        key = f"{side}_start_ray_commands"
        starts = [
            options
            for command in config[key]
            for name, options in read_ray_commands(command)
            if name == "start"
        ]
        if len(starts) != 1:
            yield f"{key}: one `ray start`, not {len(starts)}"
            continue
        for option, value in wanted.items():
            if starts[0][option] != value:
                flag = f"--{option.replace('_', '-')}"
                yield f"{key}: ray start with {flag}{'' if value is True else f'={value}'}"


def _check_texts(config: Json, template: bool) -> Iterator[str]:
    for place, key, text in _list_texts(config, "", ""):
        if PLACEHOLDER in text:
            if not template:
                yield f"{place}: {text}: put your own there"
        elif _SECRET.search(text):
            yield f"{place}: a secret; give nodes a role, or mount a file with file_mounts"
        elif key in _FORMS and not re.fullmatch(_FORMS[key], text):
            yield f"{place}: {text!r} does not look like {_FORMS[key]}"


def _list_texts(value: Any, place: str, key: str) -> Iterator[tuple[str, str, str]]:
    """(place, nearest key, text) of every text in a tree."""
    if isinstance(value, dict):
        for name, item in cast(Json, value).items():
            yield from _list_texts(item, f"{place}.{name}".lstrip("."), name)
    elif isinstance(value, list):
        for index, item in enumerate(cast(list[Any], value)):
            yield from _list_texts(item, f"{place}.{index}", key)
    elif isinstance(value, str):
        yield place, key, value


def main(arguments: list[str]) -> int:
    """Exit status 0 only if `ray up` may have it."""
    parser = argparse.ArgumentParser("python -m cluster.launchers.check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path)
    parser.add_argument("--template", action="store_true", help="placeholders may stand")
    options = parser.parse_args(arguments)
    problems = check_launcher(options.file, options.template)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{options.file}: nothing wrong; no cloud was asked")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The fields of a node: Ray hands them to the cloud as they are, and checks none."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import botocore.session  # pyright: ignore[reportMissingTypeStubs]
from botocore.validate import ParamValidator  # pyright: ignore[reportMissingTypeStubs]
from jsonschema import Draft7Validator

Json = dict[str, Any]


def check_schema(value: Any, schema: Json, place: str = "") -> Iterator[str]:
    """Violations of a JSON schema, each with its place."""
    for error in Draft7Validator(schema).iter_errors(value):
        parts = [place] if place else []
        parts += [str(part) for part in error.absolute_path]
        yield f"{'.'.join(parts) or 'top level'}: {error.message}"


def check_gcp_node(node: Json, place: str) -> Iterator[str]:
    """Violations of what of Compute Engine's Instance we use."""
    schema = Path(__file__).with_name("gcp-node-schema.json").read_text()
    yield from check_schema(node, json.loads(schema), place)


def check_aws_node(node: Json, place: str) -> Iterator[str]:
    """Violations of EC2's RunInstances, as botocore describes it.

    Args:
        node: its parameters; SubnetIds is Ray's own.
        place: where they stand.
    """
    request = {key: value for key, value in node.items() if key != "SubnetIds"}
    shape = _read_run_instances()
    # Counts are Ray's to add.
    report = ParamValidator().validate({**request, "MinCount": 1, "MaxCount": 1}, shape)
    yield from (f"{place}: {line}" for line in report.generate_report().splitlines())
    if not report.has_errors():
        yield from _check_choices(request, shape, place)


@cache
def _read_run_instances() -> Any:
    service = botocore.session.get_session().get_service_model("ec2")
    return cast(Any, service.operation_model("RunInstances").input_shape)


def _check_choices(value: Any, shape: Any, place: str) -> Iterator[str]:
    """Words that botocore leaves to the service; not InstanceType, whose list grows by the week."""
    if shape.type_name == "structure":
        for key, item in value.items():
            yield from _check_choices(item, shape.members[key], f"{place}.{key}")
    elif shape.type_name == "list":
        for index, item in enumerate(value):
            yield from _check_choices(item, shape.member, f"{place}.{index}")
    elif getattr(shape, "enum", None) and shape.name != "InstanceType" and value not in shape.enum:
        yield f"{place}: {value!r} is none of {', '.join(shape.enum)}"

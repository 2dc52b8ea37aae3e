"""Removal of passwords and keys from texts before they are shown or stored."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast


def redact(text: str) -> str:
    """Return `text` without the passwords and keys that URIs can carry."""
    text = re.sub(r"(?<=://)[^/\s\"]+@", "***@", text)
    pattern = r"(?i)([?&][^=&\s\"']*(?:key|secret|token|password|signature)[^=&\s\"']*=)[^&\s\"']+"
    return re.sub(pattern, r"\1***", text)


def redact_strings(value: Any) -> Any:
    """Return nested JSON values, keys included, with every string redacted."""
    if isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value)
        return {redact_strings(name): redact_strings(entry) for name, entry in entries.items()}
    if isinstance(value, list | tuple):
        return [redact_strings(entry) for entry in cast(Sequence[Any], value)]
    return redact(value) if isinstance(value, str) else value


def first_cause(error: BaseException) -> str:
    """Return the first line of the root cause; MLflow wraps a refused connection four times."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of the error's own message, or its type if it has none."""
    return redact(str(error).splitlines()[0])[:200] if str(error) else type(error).__name__

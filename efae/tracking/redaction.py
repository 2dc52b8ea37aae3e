"""Removal of passwords and keys from texts before they are shown or stored."""

import re


def redact(text: str) -> str:
    """Return `text` without the passwords and keys that URIs can carry."""
    text = re.sub(r"(?<=://)[^/\s\"']+@", "***@", text)
    pattern = r"(?i)([?&][^=&\s\"']*(?:key|secret|token|password|signature)[^=&\s\"']*=)[^&\s\"']+"
    return re.sub(pattern, r"\1***", text)


def first_cause(error: BaseException) -> str:
    """Return the first line of the root cause; MLflow wraps a refused connection four times."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of the error's own message, or its type if it has none."""
    return redact(str(error).splitlines()[0])[:200] if str(error) else type(error).__name__

"""What may be shown of texts that can carry passwords and keys."""

import re


def redact(text: str) -> str:
    """`text` without the passwords and keys that URIs can carry."""
    text = re.sub(r"(?<=://)[^/\s\"'@]+@", "***@", text)
    pattern = r"(?i)([?&][^=&\s\"']*(?:key|secret|token|password|signature)[^=&\s\"']*=)[^&\s\"']+"
    return re.sub(pattern, r"\1***", text)


def first_cause(error: BaseException) -> str:
    """The first line of the innermost cause; MLflow wraps a refused connection four times."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return redact(str(error).splitlines()[0][:200]) if str(error) else type(error).__name__

"""Names of runs, sweeps and models, which must work as folders, as objects and in MLflow."""

import hashlib
import re
import secrets
import time

LONGEST_BYTES = 200
"""Longest name, in bytes: folders allow 255, MLflow 250, and suffixes are appended to names."""
_LONGEST_IN_RAY = 100


def find_fault(name: str, syntax: str = "", longest: int = LONGEST_BYTES) -> str:
    """Return why a name cannot work in a file system, an object store or MLflow; "" if it can.

    Args:
        name: Name, as the user wrote it.
        syntax: Characters with a special meaning where this name is used.
        longest: Largest number of bytes of UTF-8.
    """
    length = len(name.encode(errors="surrogatepass"))
    found = [character for character in syntax if character in name]
    if not name:
        return "it is empty"
    if not name.isprintable():
        return "it contains a line break or another character that cannot be printed"
    if name != name.strip():
        return "it begins or ends with a space"
    if found:
        return f"it contains {' '.join(found)}"
    if name == "." or name.startswith(".."):
        return "it can be read as a relative path"
    if length > longest:
        return f"it has {length} bytes of UTF-8, and at most {longest} are allowed"
    return ""


def invent_name(what: str) -> str:
    """Return a name for an unnamed job: what it does, the time, and digits that tell two apart."""
    return f"{what}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def make_ascii(name: str) -> str:
    """Convert a name to one that Ray accepts, short and ASCII: its letters and a hash."""
    letters = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    if letters == name and len(name) <= _LONGEST_IN_RAY:
        return name
    return f"{letters[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def is_named(name: str) -> str:
    """Return the end of an MLflow filter that matches this name, and perhaps others.

    MLflow's filters cannot escape a quote: if a name contains both kinds, similar names match, too.
    Some databases also ignore case.
    """
    if "\\" not in name:
        for quote in "'\"":
            if quote not in name:
                return f"= {quote}{name}{quote}"
    return "LIKE '" + re.sub(r"""['"\\]""", "_", name) + "'"

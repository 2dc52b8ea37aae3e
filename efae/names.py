"""Names of runs, sweeps and models, which are folders, objects and rows of MLflow's at once."""

import hashlib
import re

LONGEST_BYTES = 200
"""A folder's name has at most 255, MLflow's columns 250 characters, and others append to a name."""
_LONGEST_IN_RAY = 100


def find_fault(name: str, syntax: str = "", longest: int = LONGEST_BYTES) -> str:
    """Why a name cannot work in a file system, in an object store or in MLflow; "" where it can.

    Args:
        name: Name, as the user wrote it.
        syntax: Characters that would mean something else where this name goes.
        longest: Most bytes of UTF-8.
    """
    length = len(name.encode(errors="surrogatepass"))
    found = [character for character in syntax if character in name]
    if not name:
        return "it is empty"
    if not name.isprintable():
        return "it holds a line break or another character that cannot be printed"
    if name != name.strip():
        return "it begins or ends with a space"
    if found:
        return f"it holds {' '.join(found)}"
    if name == "." or name.startswith(".."):
        return "it reads like a folder around it"
    if length > longest:
        return f"it has {length} bytes of UTF-8, and at most {longest} work"
    return ""


def make_ascii(name: str) -> str:
    """What stands for a name in Ray, which takes short ASCII names only: letters and a hash."""
    letters = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    if letters == name and len(name) <= _LONGEST_IN_RAY:
        return name
    return f"{letters[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def is_named(name: str) -> str:
    """The end of a filter of MLflow's that finds what has this name, and perhaps more.

    The filters cannot quote a quote: where a name holds both, others that look like it are found,
    too; and some databases do not tell capital letters from small ones.
    """
    if "\\" not in name:
        for quote in "'\"":
            if quote not in name:
                return f"= {quote}{name}{quote}"
    return "LIKE '" + re.sub(r"""['"\\]""", "_", name) + "'"

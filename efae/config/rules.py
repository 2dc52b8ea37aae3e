"""How a section of the configuration refuses a value: one sentence, which names the setting."""

from typing import Any

from pydantic import ConfigDict
from pydantic_core import PydanticCustomError

from efae.names import LONGEST_BYTES, find_fault

STRICT = ConfigDict(extra="forbid", hide_input_in_errors=True)


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with this message unless the condition holds."""
    if not condition:
        # A ValueError that pydantic shows unchanged, without its own boilerplate.
        raise PydanticCustomError("configuration", "{message}", {"message": message})


def require_positive(section: str, config: Any, *names: str) -> None:
    """Raise a ValueError unless all these settings are above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}={value}: must be positive")


def require_name(where: str, name: str, syntax: str = "", longest: int = LONGEST_BYTES) -> None:
    """Raise a ValueError for a name that some system cannot store; see `names.find_fault`."""
    fault = find_fault(name, syntax, longest)
    shown = name if len(name) <= longest else f"{name[:40]}…"
    require(not fault, f"{where}={shown!r}: {fault}; choose another name")

"""Stand-ins for packages that a bare machine with torch may lack, and that no measurement uses.

A GPU that is rented by the minute seldom has our environment. What the model and the loop need of
pydantic (dataclasses, here without validation) and jaxtyping (annotations) is little enough to
replace; the loader, which needs image decoders, only lends a type's name to the loop.
"""

import dataclasses
import importlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any


def install() -> list[str]:
    """Replace what cannot be imported; call this before importing efae. Returns the names."""
    missing: list[str] = []
    for name, build in _BUILDERS.items():
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules.update(build())
            missing.append(name)
    return missing


def _pydantic() -> dict[str, types.ModuleType]:
    def dataclass(cls: Any = None, *, config: Any = None, **options: Any) -> Any:
        if cls is None:
            return lambda cls: dataclasses.dataclass(**options)(cls)
        return dataclasses.dataclass(**options)(cls)

    def build(kind: Any, tree: Any) -> Any:
        if not dataclasses.is_dataclass(kind) or not isinstance(tree, Mapping):
            return tree
        hints = typing.get_type_hints(kind)
        return kind(**{name: build(hints[name], value) for name, value in tree.items()})

    class TypeAdapter:
        def __init__(self, kind: Any):
            self.kind = kind

        def validate_python(self, tree: Any) -> Any:
            return build(self.kind, tree)

    class PydanticCustomError(ValueError):
        def __init__(self, kind: str, template: str, context: Mapping[str, Any]):
            super().__init__(template.format(**context))

    top, sub, core = (
        types.ModuleType(name) for name in ("pydantic", "pydantic.dataclasses", "pydantic_core")
    )
    vars(sub).update(dataclass=dataclass)
    vars(top).update(
        ConfigDict=dict,
        TypeAdapter=TypeAdapter,
        ValidationError=PydanticCustomError,
        BaseModel=object,
        dataclasses=sub,
    )
    vars(core).update(PydanticCustomError=PydanticCustomError)
    return {module.__name__: module for module in (top, sub, core)}


def _jaxtyping() -> dict[str, types.ModuleType]:
    class Axes:
        def __class_getitem__(cls, item: Any) -> Any:
            return item[0]

    module = types.ModuleType("jaxtyping")
    for name in ("Bool", "Float", "Int", "Int64", "Num", "Shaped", "UInt8"):
        setattr(module, name, Axes)
    return {"jaxtyping": module}


def _dataset() -> dict[str, types.ModuleType]:
    module = types.ModuleType("data_pipelines.loading.dataset")
    vars(module).update(ShardDataset=object)
    return {module.__name__: module}


_BUILDERS = {
    "pydantic": _pydantic,
    "jaxtyping": _jaxtyping,
    "data_pipelines.loading.dataset": _dataset,
}

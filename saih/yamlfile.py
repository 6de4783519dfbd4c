"""Read a YAML file into a pydantic model; every error names file, line, key and the valid choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pydantic
import yaml

from saih.errors import SaihError, unknown

Model = TypeVar("Model", bound=pydantic.BaseModel)


def load(path: Path, model: type[Model]) -> Model:
    """The file as `model`; SaihError if it cannot be read, is not YAML, or does not fit."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SaihError(f"{path}: cannot be read ({error})") from None
    try:
        tree = yaml.compose(text, yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise SaihError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(value, dict):
        raise SaihError(f"{path}: must be a mapping of keys; valid: {', '.join(keys(model))}")
    try:
        return model.model_validate(value)
    except pydantic.ValidationError as error:
        raise _explain(path, tree, model, error) from None


def keys(model: type[pydantic.BaseModel]) -> list[str]:
    """The keys a file of this model may have, as they are written in it."""
    return [field.alias or name for name, field in model.model_fields.items()]


def line_of(tree: yaml.Node | None, keys: Sequence[str | int]) -> int:
    """Line (from 1) of the deepest node that `keys` leads to."""
    line = tree.start_mark.line if tree else 0
    for key in keys:
        step = _child(tree, key)
        if step is None:
            break
        line, tree = step
    return line + 1


def _child(node: yaml.Node | None, key: str | int) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(key):
                return name.start_mark.line, value
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key].start_mark.line, node.value[key]
    return None


def _explain(
    path: Path, tree: yaml.Node | None, model: type[pydantic.BaseModel], error: pydantic.ValidationError
) -> SaihError:
    first = error.errors()[0]
    loc = first["loc"]
    place = f"{path}:{line_of(tree, loc)}"
    if first["type"] == "extra_forbidden" and len(loc) == 1:
        return unknown("key", loc[0], keys(model), place)
    name = str(loc[0]) if loc else "the file"
    if first["type"] == "missing":
        return SaihError(f"{path}: key {name} is missing; valid keys: {', '.join(keys(model))}")
    return SaihError(f"{place}: {name}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}")

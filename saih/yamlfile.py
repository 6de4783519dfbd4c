"""Read a YAML file into a pydantic model; every error names file, line, key and the valid choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, get_args

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
        _refuse_double_keys(path, tree)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise SaihError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    except (ValueError, RecursionError) as error:  # a date that does not exist, a nest without end
        raise SaihError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(value, dict):
        raise SaihError(f"{path}: must be a mapping of keys; valid: {', '.join(keys(model))}")
    try:
        return model.model_validate(value)
    except pydantic.ValidationError as error:
        raise _explain(path, tree, model, error) from None


def _refuse_double_keys(path: Path, node: yaml.Node | None) -> None:
    """YAML forbids them; the parser lets the last one win."""
    children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            if key.value in seen:
                raise SaihError(f"{path}:{key.start_mark.line + 1}: key {key.value} is given twice")
            seen.add(str(key.value))
            children.append(child)
    for child in children:
        _refuse_double_keys(path, child)


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


def _keys_at(node: yaml.Node | None, loc: Sequence[str | int]) -> list[str]:
    """The part of `loc` that stands in the file; pydantic adds the types it tried."""
    found: list[str] = []
    for key in loc:
        step = _child(node, key)
        if step is None:
            break
        found.append(str(key))
        node = step[1]
    return found or [str(key) for key in loc[:1]]


def _model_at(model: type[pydantic.BaseModel], loc: Sequence[str | int]) -> type[pydantic.BaseModel]:
    """The model whose key `loc` ends in."""
    for key in loc[:-1]:
        field = model.model_fields.get(str(key))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)), model)
    return model


def _explain(
    path: Path, tree: yaml.Node | None, model: type[pydantic.BaseModel], error: pydantic.ValidationError
) -> SaihError:
    errors = error.errors()  # a key that is misspelt explains one that is missing
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    loc = first["loc"]
    place = f"{path}:{line_of(tree, loc)}"
    if first["type"] == "extra_forbidden":
        return unknown("key", loc[-1], keys(_model_at(model, loc)), place)
    name = ".".join(_keys_at(tree, loc)) or "the file"
    if first["type"] == "missing":
        return SaihError(f"{path}: key {name} is missing; valid keys: {', '.join(keys(model))}")
    wanted = [_EXPECTED.get(each["type"]) for each in errors if _keys_at(tree, each["loc"]) == _keys_at(tree, loc)]
    field = model.model_fields.get(str(loc[0])) if loc else None
    form = f"; {field.description}" if field and field.description else ""
    if None not in wanted and (form or len(wanted) > 1):  # one of several types, each of which pydantic missed
        words = list(dict.fromkeys(filter(None, wanted)))
        return SaihError(f"{place}: {name}: must be {_listed(words)}, not {first['input']!r}{form}")
    told = first["msg"].replace("tuple", "list")
    return SaihError(f"{place}: {name}: {told[0].lower()}{told[1:]}, not {first['input']!r}{form}")


def _listed(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1])] * (len(words) > 1) + [words[-1]])


_EXPECTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
}
"""Kinds of pydantic's errors -> what they wanted, in words."""

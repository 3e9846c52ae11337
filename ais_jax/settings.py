"""Settings: trees of frozen dataclasses, read from YAML files and command-line overrides.

A field's type says what is accepted; its metadata holds `doc` and optionally `choices`. A field
whose type is a dataclass is a section. An absent, null or empty section takes the defaults of
its class, except that a section of type `Section | None` is switched off by null.

What a person wrote wrongly raises `UserError`, in one line. A class that YAML cannot express (an
unsupported type, a section default other than that of an empty section) raises `TypeError`.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import json
import math
import os
import pathlib
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import yaml

from ais_jax.errors import UserError

T = TypeVar("T")
Override = tuple[tuple[str, ...], Any]

_MISFIT = object()
_UNIONS = (typing.Union, types.UnionType)
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
# YAML 1.1 wants a dot and a signed exponent in a float, so PyYAML reads these as text.
_EXPONENT = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+"
_DECIMAL = re.compile(rf"(?:{_EXPONENT}|[-+]\.[0-9]+)\Z")
_TAG = "tag:yaml.org,2002:"
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


class _Key(NamedTuple):
    hint: Any
    default: Any  # dataclasses.MISSING where the key is required
    section: Any  # the dataclass, if the key is a section
    doc: str
    choices: tuple | None


def setting(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    choices: Iterable | None = None,
    default_factory: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field with a line of help; required if it has no default.

    `choices` are the values allowed besides null; for a tuple, those of its items.
    """
    metadata = {"doc": doc, "choices": None if choices is None else tuple(choices)}
    kwargs = {"default": default, "default_factory": default_factory}
    return dataclasses.field(**kwargs, metadata=metadata)  # type: ignore[call-overload]


def at_least(section: Any, minimum: float, *names: str) -> None:
    """For `__post_init__`: ValueError for a field of `section` below `minimum`; None passes."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")


def positive(section: Any, *names: str) -> None:
    """For `__post_init__`: ValueError for a field of `section` that is not above 0."""
    for name in names:
        if not getattr(section, name) > 0:
            raise ValueError(f"{name}={getattr(section, name)} must be above 0")


def build(cls: type[T], data: Mapping, where: str = "") -> T:
    """`cls` from nested mappings, every key and value checked.

    Lists become tuples. A whole number passes for a float, and so does a decimal that YAML reads
    as text (1e-4); nan and inf do not. The members of a union are tried from left to right.

    Args:
      cls: a dataclass.
      data: as YAML gives it.
      where: the file that errors name.

    Raises:
      UserError: an unknown, missing or ill-typed key, or a ValueError of a `__post_init__`.
    """
    try:
        return _build(cls, data, (), cls)
    except UserError as error:
        raise UserError(_line(where, str(error))) from None


def load(cls: type[T], path: str | os.PathLike, overrides: Iterable[str] = ()) -> T:
    """`cls` from a YAML file and overrides such as "train.steps=10", of which the last wins.

    Raises:
      UserError: naming the file, or the command line if an override is to blame.
    """
    changes = [parse_override(text) for text in overrides]
    data, file = load_yaml(path), str(pathlib.Path(path))
    try:
        return _build(cls, apply_overrides(data, changes), (), cls)
    except UserError as error:
        problem = str(error)
    try:
        _build(cls, data, (), cls)
        where = "command line"
    except UserError as error:
        where = file if str(error) == problem else f"{file} and command line"
    raise UserError(_line(where, problem))


def replace(config: T, changes: Mapping[str, Any]) -> T:
    """A copy of `config` with other values at dotted keys, checked as by `build`."""
    overrides = [(tuple(key.split(".")), value) for key, value in changes.items()]
    return build(type(config), apply_overrides(to_dict(config), overrides))


def to_dict(config: Any) -> Any:
    """Dicts, lists and scalars, shared with nothing, from which `build` makes an equal config."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        names = [field.name for field in dataclasses.fields(config) if field.init]
        return {name: to_dict(getattr(config, name)) for name in names}
    if isinstance(config, Mapping):
        return {name: to_dict(item) for name, item in config.items()}
    return [to_dict(item) for item in config] if isinstance(config, list | tuple) else config


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings."""
    keys: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += changed_keys(a, b, f"{prefix}{name}.")
        elif a != b:
            keys.append(prefix + name)
    return keys


def save_yaml(config: Any, path: str | os.PathLike) -> None:
    """Writes every setting, so that `load` gives an equal config.

    Raises:
      UserError: the file cannot be written.
    """
    text = yaml.safe_dump(to_dict(config), sort_keys=False, width=100)
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")  # a run killed here leaves the old file whole
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(_line(str(path), f"cannot be written: {error.strerror}")) from None


def describe(cls: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(dotted key, type in words, default as YAML or "required", doc) of every key, in order.

    Of the sections themselves, only those that null switches off are listed.
    """
    lines = []
    for name, key in _walk(cls, prefix):
        if key.hint is not key.section:
            needed = key.default is dataclasses.MISSING
            default = "required" if needed else json.dumps(to_dict(key.default))
            lines.append((name, _words(key.hint, key.choices), default, key.doc))
    return lines


def parse_override(text: str) -> Override:
    """("train", "steps"), 10 from "train.steps=10"; the value is YAML, an empty one is null.

    Raises:
      UserError: there is no "=", a name is empty, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    path = tuple(name.strip() for name in key.split("."))
    if not equals or not all(path):
        problem = f"{_show(text)} is not an override: write section.key=value"
        raise UserError(_line("command line", problem))
    try:
        parsed = _parse(value)
    except yaml.YAMLError as error:
        problem = f"{_show(value)} is not YAML ({error}): put text in quotes"
        raise UserError(_line("command line", _dotted(path), problem)) from None
    unquoted = parsed == value.strip() and _DECIMAL.match(parsed)
    return path, float(parsed) if unquoted else parsed


def apply_overrides(data: Mapping, overrides: Iterable[Override]) -> dict[str, Any]:
    """A copy of `data` with values set at paths, in order; absent and null sections are made.

    Raises:
      UserError: a path goes through something that has no keys.
    """
    result = to_dict(data)
    for path, value in overrides:
        section = result
        for depth, name in enumerate(path[:-1], start=1):
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                problem = f"{_dotted(path[:depth])} is {_show(section)}, which has no keys"
                raise _error(path, problem)
        section[path[-1]] = to_dict(value)
    return result


def load_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file, read as by `yaml.safe_load` but for what is refused.

    Refused are duplicate keys, keys that are not text, anchors that contain themselves, and
    numbers that YAML 1.1 takes for octal (010 is 8) or sexagesimal (12:30 is 750).

    Raises:
      UserError: naming the file, and the line and column where there is one.
    """
    file = pathlib.Path(path)
    try:
        data = _parse(file.read_bytes().decode("utf-8"))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}{_similar_file(file)}"
    except UnicodeDecodeError as error:
        row = error.object.count(b"\n", 0, error.start) + 1
        problem = f"line {row} is not UTF-8: save the file as UTF-8 text"
    except (ValueError, yaml.YAMLError) as error:  # ValueError: a null byte in the path
        problem = str(error)
    else:
        if isinstance(data, dict):
            return data
        found = "nothing: write {} to take every default" if data is None else _show(data)
        problem = f"expected lines of key: value, found {found}"
    raise UserError(_line(str(file), problem))


def _build(cls: type[T], data: Any, path: tuple, root: type) -> T:
    if not isinstance(data, Mapping):
        raise _error(path, f"expected a section with keys, found {_show(data)}")
    schema = _schema(cls)  # type: ignore[arg-type]
    for name in data:
        if name not in schema:
            raise _error((*path, name), _unknown_key(name, path, schema, root))
    values: dict[str, Any] = {}
    for name, key in schema.items():
        given, here = data.get(name), (*path, name)
        if key.section and (given is not None or key.hint is key.section):
            values[name] = _build(key.section, {} if given is None else given, here, root)
        elif name in data:
            values[name] = _value(given, key, here)
        elif key.default is dataclasses.MISSING:
            expected = _words(key.hint, key.choices)
            raise _error(here, f"required, and missing: set it to {expected}")
    try:
        return cls(**values)
    except (ValueError, UserError) as error:
        raise _error(path, str(error)) from None


def _value(given: Any, key: _Key, path: tuple) -> Any:
    value = _convert(given, key.hint)
    items = value if isinstance(value, tuple) else (value,)
    allowed = key.choices is None or value is None or all(x in key.choices for x in items)
    if value is _MISFIT or not allowed:
        expected = _words(key.hint, key.choices)
        problem = f"expected {expected}, found {_show(given)}{_remedy(given, expected)}"
        raise _error(path, problem)
    return value


def _convert(value: Any, hint: Any) -> Any:
    """`value` as `hint`, or `_MISFIT`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        candidates = (_convert(value, member) for member in args)
        return next((x for x in candidates if x is not _MISFIT), _MISFIT)
    if origin is typing.Literal:
        return value if any(type(value) is type(x) and value == x for x in args) else _MISFIT
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [_MISFIT]
        converted = tuple(_convert(item, args[0]) for item in items)
        return _MISFIT if any(item is _MISFIT for item in converted) else converted
    if origin is dict:
        fits = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
        return to_dict(value) if fits else _MISFIT
    if hint is float and (
        type(value) in (int, float) or (isinstance(value, str) and _DECIMAL.match(value))
    ):
        try:
            return float(value) if math.isfinite(float(value)) else _MISFIT
        except OverflowError:
            return _MISFIT
    return value if type(value) is hint else _MISFIT


def _words(hint: Any, choices: tuple | None = None) -> str:
    """What `_convert` takes for a hint. Raises TypeError where it takes nothing."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        null_last = sorted(args, key=lambda member: member is types.NoneType)
        return " or ".join(dict.fromkeys(_words(member, choices) for member in null_last))
    if hint is types.NoneType:
        return "null"
    if origin is tuple and len(args) == 2 and args[1] is ...:
        return f"a list (each {_words(args[0], choices)})"
    if origin is typing.Literal or choices:
        return "one of " + ", ".join(map(str, choices or args))
    if origin is dict and args == (str, Any):
        return "a mapping"
    if hint in _WORDS or dataclasses.is_dataclass(hint):
        return _WORDS.get(hint, "a section")
    raise TypeError(f"a setting cannot be of type {hint}")


def _remedy(given: Any, expected: str) -> str:
    """How to mend what YAML makes of plain text, and other common slips."""
    text = re.search(r"text|one of \D", expected)
    many = isinstance(given, list | tuple)
    items = given if many else [given]
    if many != ("a list" in expected):
        return "" if many or isinstance(given, dict | None) else ": write it in [brackets]"
    if any(isinstance(x, float) and not math.isfinite(x) for x in items):
        return ": it must be finite"
    if text and any(isinstance(x, bool) for x in items):
        return ": YAML reads yes, no, on and off as true and false; put text in quotes"
    if text and not all(isinstance(x, str | list | dict | None) for x in items):
        return ": put text in quotes"
    if "number" in expected and isinstance(given, str) and re.fullmatch(r"[-+.\d]+", given):
        return ": write numbers without quotes"
    return ""


@functools.cache
def _schema(cls: Any) -> dict[str, _Key]:
    """The fields of a settings class. Raises TypeError for what YAML cannot express."""
    hints, schema = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        hint, default, meta = hints[field.name], field.default, field.metadata
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        members = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
        section: Any = next(filter(dataclasses.is_dataclass, members), None)
        label = f"{cls.__name__}.{field.name}"
        if section and set(members) - {section, types.NoneType}:
            raise TypeError(f"{label}: a section is of one class, or of one class and None")
        given = default is not dataclasses.MISSING and default is not None
        if section and given and default != section():
            raise TypeError(f"{label}: the default must equal {section.__name__}()")
        _words(hint)
        schema[field.name] = _Key(hint, default, section, meta.get("doc", ""), meta.get("choices"))
    return schema


def _walk(cls: type, prefix: str = "") -> Iterator[tuple[str, _Key]]:
    for name, key in _schema(cls).items():
        dotted = f"{prefix}.{name}" if prefix else name
        yield dotted, key
        if key.section:
            yield from _walk(key.section, dotted)


def _unknown_key(name: Any, above: tuple, schema: Mapping, root: type) -> str:
    if not isinstance(name, str):
        return "keys must be text: put it in quotes"
    section, _, leaf = name.rpartition(".")
    if section and leaf:
        return f"unknown key; dots do not nest in YAML: write {leaf} on a line below {section}"

    def likeness(dotted: str) -> float:
        section, _, leaf = dotted.rpartition(".")
        if "_" in leaf and name == "".join(word[:1] for word in leaf.split("_")):
            return 0.9  # lr for learning_rate
        spellings = (leaf, dotted.replace(".", "_"))
        ratio = max(difflib.SequenceMatcher(None, name[:99], x).ratio() for x in spellings)
        return ratio + 0.15 if ratio >= 0.6 and section == ".".join(above) else ratio

    likeliest = max((dotted for dotted, _ in _walk(root)), key=likeness)
    if likeness(likeliest) < 0.6:
        return f"unknown key; the keys here are {', '.join(schema)}"
    return f"unknown key; did you mean {likeliest}?"


def _dotted(path: tuple) -> str:
    return ".".join(name if isinstance(name, str) and name else _show(name) for name in path)


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    try:
        return _repr.repr(value)
    except ValueError:  # more digits than Python converts
        return "a number of thousands of digits"


def _error(path: tuple, problem: str) -> UserError:
    return UserError(_line(_dotted(path), problem))


def _line(*parts: str) -> str:
    text = " ".join(": ".join(part for part in parts if part).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what it would read as something other than what was meant."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            shown = _show(key.value) if isinstance(key, yaml.ScalarNode) else "a collection"
            problem = f"key {shown} is not text: put it in quotes"
            if key.tag in (_TAG + "str", _TAG + "merge"):
                problem = f"duplicate key {shown}: remove one" if key.value in seen else ""
            if problem:
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node, deep=False):
        kind, text = node.tag.removeprefix(_TAG), node.value
        number = kind in ("int", "float") and isinstance(node, yaml.ScalarNode)
        if number and re.match(r"[-+]?0[0-7_]+\Z|.*:", text):
            problem = f"{text} is octal or base 60 in YAML: write a decimal, or put text in quotes"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep=True)
        except (ValueError, LookupError, AttributeError):
            problem = f"{_show(text)} is not a valid {kind}: put text in quotes"
        raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)


def _parse(text: str) -> Any:
    """Raises yaml.YAMLError with the place and the problem, and nothing else."""
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise yaml.YAMLError(_line(place, f"{error.problem} {error.context or ''}")) from None


def _similar_file(path: pathlib.Path) -> str:
    others = {other.stem: other for other in path.parent.glob("*.y*ml") if other != path}
    close = difflib.get_close_matches(path.stem, sorted(others), n=1)
    return f"; did you mean {others[close[0]]}?" if close else ""

"""Reading a published config.json: what is needed, what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ais_jax import settings
from ais_jax.errors import UserError

T = TypeVar("T")


def need(raw: Mapping[str, Any], name: str) -> int:
    """A whole number above 0.

    Raises:
      UserError: it is missing or something else.
    """
    value = raw.get(name)
    if type(value) is not int or value < 1:
        problem = "is missing" if value is None else f"is {value!r}, not a whole number above 0"
        raise UserError(f"config.json: {name} {problem}")
    return value


def refuse(raw: Mapping[str, Any], *names: str) -> None:
    """Raises UserError if one of these switches is on."""
    for name in names:
        if raw.get(name):
            raise UserError(
                f"config.json: {name}={raw[name]!r} is not supported; only models without it are"
            )


def expect(raw: Mapping[str, Any], **values: Any) -> None:
    """Raises UserError if a key that is present has another value."""
    for name, value in values.items():
        if raw.get(name, value) != value:
            raise UserError(
                f"config.json: {name}={raw[name]!r} is not supported; only {value!r} is"
            )


def section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What is below a key; empty where it is absent or null.

    Raises:
      UserError: it is not a mapping.
    """
    value = raw.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"config.json: {name} is {value!r}, not a section")
    return value or {}


def rope_theta(raw: Mapping[str, Any]) -> Any:
    """The rotary base, of the older or the newer form of config.json, unchecked.

    Raises:
      UserError: positions are rescaled.
    """
    parameters = section(raw, "rope_parameters") or section(raw, "rope_scaling")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json: rope_type={kind!r} is not supported; only 'default' is")
    return parameters.get("rope_theta", raw.get("rope_theta", 10000.0))


def build(cls: type[T], raw: Mapping[str, Any], sizes: Iterable[str], **known: Any) -> T:
    """A config dataclass from keys of the same names.

    Args:
      cls: the dataclass.
      raw: config.json.
      sizes: names that must be there.
      known: values that have been worked out already.

    Raises:
      UserError: a size is missing, a value is of the wrong type or impossible.
    """
    expect(raw, hidden_act="silu")
    for name in sizes:
        need(raw, name)
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given = {name: raw[name] for name in names & raw.keys() if raw[name] is not None}
    return settings.build(cls, given | known, "config.json")

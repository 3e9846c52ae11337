"""Compiling ahead of time: what a config needs and takes on devices that are not there.

`topology.devices_of` describes the devices, `programs` lists the programs of a step as shapes on
them, `compile` compiles these and counts what they do (`costs`, read from their text by `hlo`),
`advice` knows what to change where one does not fit, and `report` writes it all down.
"""

from __future__ import annotations

from ais_jax.aot.report import NAMES, aot

__all__ = ["NAMES", "aot"]

"""What is quantized, to which format, and which of that pays on a device."""

from __future__ import annotations

import dataclasses
import difflib
import re

from ais_jax.errors import UserError

FORMATS = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int8", "int4")

KV_FORMATS = {"fp8_kv": "float8_e4m3fn", "int8_kv": "int8"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is quantized, and to which of `FORMATS`. None leaves it in the compute dtype.

    Attributes:
      weights: format of the kernels.
      activations: format of the inputs of the linears; None, or the same as `weights`.
      head: whether the output layer is quantized too.

    Raises:
      ValueError: an unknown format, activations in another format than the weights, or a head
        without a format.
    """

    weights: str | None = None
    activations: str | None = None
    head: bool = False

    def __post_init__(self):
        if self.weights is not None and self.weights not in FORMATS:
            raise ValueError(f"weights={self.weights!r} is unknown; choose one of {FORMATS}")
        if self.activations not in (None, self.weights):
            raise ValueError(
                f"activations={self.activations!r} must be None or that of "
                f"weights={self.weights!r}: a product takes two numbers of one format"
            )
        if self.head and self.weights is None:
            raise ValueError("head=True needs a format: set weights too")


RECIPES: dict[str, Recipe] = {
    "none": Recipe(),
    "fp8": Recipe("float8_e4m3fn", "float8_e4m3fn"),
    "fp8_head": Recipe("float8_e4m3fn", "float8_e4m3fn", head=True),
    "fp8_weight_only": Recipe("float8_e4m3fn"),
    "fp8_e5m2": Recipe("float8_e5m2", "float8_e5m2"),
    "int8": Recipe("int8", "int8"),
    "int8_head": Recipe("int8", "int8", head=True),
    "int8_weight_only": Recipe("int8"),
    "int4": Recipe("int4", "int4"),
    "fp4": Recipe("float4_e2m1fn", "float4_e2m1fn"),
}


def find_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of a name; a `Recipe` is itself.

    Raises:
      UserError: the name is unknown, or "auto", which `choose_recipe` resolves.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe == "auto":
        raise UserError("recipe 'auto' depends on the device; resolve it with choose_recipe first")
    if recipe not in RECIPES:
        near = difflib.get_close_matches(str(recipe), RECIPES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"recipe {recipe!r} is unknown; did you mean {near!r}? (one of {', '.join(RECIPES)})"
        )
    return RECIPES[recipe]


# Up to here a product takes the time of reading the weights, whatever it multiplies in, and to
# quantize its input would be two kernels more. An estimate from a GPU's figures.
_WEIGHT_ONLY_ROWS = 32

_FP8_GPUS = (
    r"\b(H100|H200|H800|H20|GH200|B[123]00|GB[23]00|L4|L40S?|Ada|Blackwell|GeForce RTX [45]0\d\d)\b"
)
_INT8_GPUS = r"\b(A100|A800|A10G?|A16|A30|A40|T4|RTX A\d000|GeForce RTX [23]0\d\d)\b"

# (platform, names of device kinds, recipe, why); the first that fits.
_CHOICES = (
    (
        "cpu",
        "",
        "int8_head",
        "CPUs multiply int8 in half the bytes of bfloat16 (up to 1.8 times faster, with jax 0.10 "
        "only below 64 rows), and every token reads the output layer",
    ),
    ("gpu", _FP8_GPUS, "fp8", "its tensor cores multiply FP8 at twice the rate of bfloat16"),
    ("gpu", _INT8_GPUS, "int8", "its tensor cores multiply int8, not FP8, faster than bfloat16"),
    ("tpu", "TPU v[56]", "int8", "its matrix units multiply int8, not FP8, faster than bfloat16"),
)


def choose_recipe(platform: str, device_kind: str, rows: int | None = None) -> tuple[str, str]:
    """What "auto" stands for on a device.

    Args:
      platform: of the device: "cpu", "gpu", "tpu"...
      device_kind: of the device, as "NVIDIA H100 80GB HBM3" or "TPU v5 lite".
      rows: sequences that each device decodes at once; None is many.

    Returns:
      (a name in `RECIPES`, why). "none" for devices that are not known.
    """
    for its_platform, kinds, name, reason in _CHOICES:
        if platform != its_platform or not re.search(kinds, device_kind):
            continue
        if (platform, name) == ("gpu", "fp8") and rows is not None and rows <= _WEIGHT_ONLY_ROWS:
            return "fp8_weight_only", f"{rows} rows at once wait for the weights' bytes alone"
        return name, reason
    return "none", "no recipe is known to be faster there"

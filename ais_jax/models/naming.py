"""Between a checkpoint's tensors and parameters: which is which, and how it lies in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
      name: in the checkpoint.
      path: of the parameter.
      index: position on the parameter's stacked axes; () if it is not stacked.
      layout: "same"; "transposed", of a linear's kernel, which is [in, out] here and [out, in] in
        checkpoints; or "conv", of a depthwise one, [channels, width] and [channels, 1, width].
    """

    name: str
    path: Path
    index: tuple[int, ...]
    layout: str

    @property
    def module(self) -> str:
        """Last part of the published module's name: "q_proj" of "...self_attn.q_proj.weight"."""
        return self.name.removesuffix(".weight").rpartition(".")[2]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the checkpoint, of a parameter of `shape`, stacked axes included."""
        own = shape[len(self.index) :]
        if self.layout == "transposed":
            return own[::-1]
        return (own[0], 1, own[1]) if self.layout == "conv" else own


def block_tensors(
    prefix: str, path: Path, index: tuple[int, ...], names: Mapping[str, str]
) -> Iterator[Tensor]:
    """The tensors of one block.

    Args:
      prefix: of their names, such as "model.layers.3.".
      path: of the block's parameters.
      index: of the block on their stacked axes.
      names: a module's name in the checkpoint -> the parameter's here. What ends in "_proj" is a
        linear, in "conv1d" a convolution; names with a leading "=" are whole, others get ".weight".
    """
    for stored, own in names.items():
        layout = "transposed" if own.endswith("_proj") or own.startswith("in_proj") else "same"
        layout = "conv" if own == "conv1d" else layout
        name = stored[1:] if stored.startswith("=") else f"{stored}.weight"
        yield Tensor(prefix + name, (*path, own), index, layout)

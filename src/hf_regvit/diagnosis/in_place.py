"""Test-time registers inside a model of another family, which keeps its class and the shapes of its outputs.

The blocks carry the registers past the model: each block inserts them behind the prefix tokens, computes, and takes
them out again. The rest of the model never sees them, so a CLIPModel or a LLaVA with such a tower works as before.

Shapes: B images, R registers, T tokens without them, H neurons of an MLP, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.families import IN_PLACE, join_registers, part_registers
from ..models.modeling_regvit import RegViTPreTrainedModel, move_to_registers
from ..models.saving import read_object, write_json
from ..models.tokens import TokenReader
from .readings import blocks_of
from .register_neurons import RetrofitError, mlp_output
from .retrofit import RetrofitReport, RetrofitResult

FILE_NAME = "test_time_registers.json"


class _BlockWithRegisters:
    """Part of the class of a repaired block; the registers travel as an attribute of the tokens."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        prefix, count, is_first = vars(self)[IN_PLACE]
        if is_first:
            registers = hidden_states.new_zeros(len(hidden_states), count, hidden_states.shape[-1])
            hidden_states = part_registers(torch.cat([registers, hidden_states], dim=1), 0, count)
        whole = join_registers(hidden_states, prefix)  # (B, T + R, D)
        if whole is hidden_states:
            raise RetrofitError(
                "The tokens were changed or copied between two blocks, so their test-time registers are lost. This "
                "model cannot be repaired in place; undo() restores it."
            )
        output = super().forward(whole, *args, **kwargs)  # type: ignore[misc]
        tokens = part_registers(output[0] if isinstance(output, tuple) else output, prefix, count)
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


class _LinearWithRegisters:
    """Part of the class of an MLP's last linear layer, which moves the activations of a few neurons."""

    def forward(self, activations: Tensor) -> Tensor:
        neurons, layout = vars(self)[IN_PLACE]
        return super().forward(move_to_registers(activations, neurons, layout, None))  # type: ignore[misc]


@cache
def _subclass(part: type, kind: type) -> type:
    """Return a class with the name of `kind`, by which libraries find blocks, that also has the methods of `part`."""
    return type(kind.__name__, (part, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


@dataclass(eq=False, repr=False)
class InPlaceRepair:
    """Test-time registers that `repair_in_place` added to a model.

    The tensors of the model and their names are unchanged, so whatever saves the model writes the file of the
    original. `save` writes a small JSON file beside it, with which `repair_in_place` repairs the loaded model again.

    Attributes:
        model: Model, which was changed in place.
        neurons: `[block, neuron]` pairs, counted from 0.
        num_register_tokens: Number of registers R.
    """

    model: nn.Module
    neurons: list[list[int]]
    num_register_tokens: int
    _undo: list[Callable[[], object]] = field(default_factory=list)

    def __repr__(self) -> str:
        state = "in place" if self._undo else "undone"
        return f"<InPlaceRepair: {len(self.neurons)} neurons, {self.num_register_tokens} registers, {state}>"

    def undo(self) -> None:
        """Restore the model bit for bit."""
        while self._undo:
            self._undo.pop()()

    def save(self, folder: str | Path) -> Path:
        """Write `test_time_registers.json` into a folder, usually that of the saved model; return its path."""
        path = Path(folder, FILE_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"neurons": self.neurons, "num_register_tokens": self.num_register_tokens}
        write_json(path, values)
        return path


def repair_in_place(
    model: TokenReader | nn.Module,
    neurons: RetrofitReport | RetrofitResult | Sequence[Sequence[int]] | str | Path,
    *,
    num_register_tokens: int | None = None,
) -> InPlaceRepair:
    """Add test-time registers to a model of another family in place, without converting it to a RegViT.

    Use it for models that a RegViT cannot express, and for towers that must stay inside a CLIPModel or a LLaVA. The
    found neurons write into zero registers instead of into patches, as in `add_test_time_registers`. Classes, tensors,
    and the shapes of tokens and hidden states remain; only attention weights that the model itself returns contain the
    registers. Save the model with `save_pretrained` or its state dict; the module itself cannot be pickled.

    Args:
        model: Model of a supported family, or one that contains such a tower.
        neurons: Report of a retrofit of the same weights, `[block, neuron]` pairs counted from 0 (for example from
            `find_register_neurons(...).best(10)`), or the file that `InPlaceRepair.save` wrote, or its folder.
        num_register_tokens: Number of registers; default that of the report or file, else 1.

    Raises:
        RetrofitError: A neuron that the model does not have, a RegViT, a model that is already repaired, or one whose
            attention does not take more tokens.
        ValueError: No part of the model belongs to a supported family.

    Source: arXiv 2506.08010; carrying the registers past the model is our own.
    """
    reader = model if isinstance(model, TokenReader) else TokenReader(model)
    pairs, count = _neurons_of(neurons)
    made = InPlaceRepair(reader.model, pairs, num_register_tokens or count)
    _check(reader, made)
    before = _output_shapes(reader)
    try:
        _add_registers(reader, made)
        after = _output_shapes(reader)
    except (RuntimeError, ValueError) as error:
        made.undo()
        raise RetrofitError(
            f"This {reader.family_name} model does not take more tokens, so it cannot be repaired in place: {error}"
        ) from error
    if before != after:
        made.undo()
        raise RetrofitError(f"The outputs of this {reader.family_name} model would change from {before} to {after}.")
    return made


def _neurons_of(neurons: Any) -> tuple[list[list[int]], int]:
    """Return the pairs and the number of registers that a report, a file or a list gives."""
    neurons = getattr(neurons, "report", neurons)
    if isinstance(neurons, str | Path):
        path = Path(neurons)
        neurons = SimpleNamespace(**read_object(path / FILE_NAME if path.is_dir() else path))
    count = getattr(neurons, "num_register_tokens", 1)
    return [[int(i) for i in pair] for pair in getattr(neurons, "neurons", neurons)], count


def _check(reader: TokenReader, made: InPlaceRepair) -> None:
    blocks = blocks_of(reader)
    if isinstance(reader.tower, RegViTPreTrainedModel):
        raise RetrofitError(
            "The model is a RegViT. Use add_test_time_registers, which stores the neurons in its config."
        )
    if any(IN_PLACE in vars(block) for block in blocks):
        raise RetrofitError("The model is already repaired in place. Call undo() of that repair first.")
    if made.num_register_tokens < 1 or not made.neurons:
        raise RetrofitError(f"Got {made.num_register_tokens} registers and {len(made.neurons)} neurons; need both.")
    for block, neuron in made.neurons:
        width = mlp_output(reader, block).weight.shape[1] if 0 <= block < len(blocks) else 0
        if not 0 <= neuron < width:
            raise RetrofitError(
                f"The model has no neuron [{block}, {neuron}]: it has {len(blocks)} blocks, and block "
                f"{block} has {width} neurons. Both are counted from 0. Use neurons that were found in this model."
            )


def _add_registers(reader: TokenReader, made: InPlaceRepair) -> None:
    prefix, count = reader.description.num_prefix_tokens, made.num_register_tokens
    layout = SimpleNamespace(num_test_time_registers=count, num_prefix_tokens=prefix + count)

    def change(module: nn.Module, part: type, values: tuple) -> None:
        kind: type = type(module)
        module.__class__ = _subclass(part, kind)
        vars(module)[IN_PLACE] = values
        made._undo.append(lambda: setattr(module, "__class__", kind))
        made._undo.append(lambda: vars(module).pop(IN_PLACE))

    for i, block in enumerate(blocks_of(reader)):
        change(block, _BlockWithRegisters, (prefix, count, i == 0))
        attention = block.get_submodule(reader.family.attention)
        if (own := vars(attention).get("num_prefix_tokens")) is not None:  # tokens without rotation, in timm
            vars(attention)["num_prefix_tokens"] = own + count
            made._undo.append(partial(setattr, attention, "num_prefix_tokens", own))
        if chosen := [neuron for where, neuron in made.neurons if where == i]:
            change(mlp_output(reader, i), _LinearWithRegisters, (chosen, layout))


def _output_shapes(reader: TokenReader) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that the tower returns for one image of its own size."""
    seen: list[tuple[int, ...]] = []

    def see(module: nn.Module, args: tuple, output: object) -> None:
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
        seen.extend(tuple(value.shape) for value in values if isinstance(value, Tensor))

    hook = reader.tower.register_forward_hook(see)
    try:
        fresh = TokenReader(reader.model)  # its description counts the registers
        fresh.read(torch.zeros(1, 3, *reader.description.image_size), layers=(0, -1))
    finally:
        hook.remove()
    return seen

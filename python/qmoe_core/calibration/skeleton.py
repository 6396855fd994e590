"""A model without its decoder layers: what each of them is called with, and what the first one is given.

The model is built on meta. Everything around the layers (embeddings, rotary tables, masks) is run for real, while each
layer only notes its arguments and returns its input. So a family's own code decides about masks and positions, layer by
layer, and nothing of it is written here again. Windows are all of one length and without padding, so the arguments of
one batch serve all batches of that size; that they do not depend on the tokens is checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import QmoeError
from ..families import ModelLayout, build_meta_model
from ..source import SourceCheckpoint
from .weights import WeightReader, compute_buffers

Arguments = dict[str, Any]  # of one layer's forward, hidden_states excluded


class Skeleton:
    """The meta model, its list of decoder layers, and the arguments of their calls.

    Attributes:
        model: on meta, but for buffers that no checkpoint holds.
        path: run-time path of the ModuleList of layers; `layers`: its entries.
        weights: reads parameters into the model.
    """

    def __init__(self, directory: Path, layout: ModelLayout, checkpoint: SourceCheckpoint, device: str) -> None:
        """Raises `E_LAYOUT` for models that have no single stack of decoder layers with experts."""
        self.device, self._as_tuple = device, False
        self.model: PreTrainedModel = build_meta_model(directory).eval()
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise QmoeError(
                "E_LAYOUT",
                "calibration supports decoder-only models; this one has an encoder",
                file=directory,
                actual=type(self.model).__name__,
            )
        for config in (self.model.config, self.model.config.get_text_config(decoder=True)):
            if getattr(
                config, "output_router_logits", False
            ):  # the model would miss its routers when only its head runs
                config.output_router_logits = False
        self.path = self._find_layers(layout)
        self.layers: list[nn.Module] = list(self.model.get_submodule(self.path))  # type: ignore[call-overload]
        self.weights = WeightReader(self.model, checkpoint, layout)
        compute_buffers(self.model, device)

    def _find_layers(self, layout: ModelLayout) -> str:
        """The outermost ModuleList above the expert modules; of several the one with most experts below it."""
        counts: dict[str, int] = {}
        modules = dict(self.model.named_modules())
        for target in layout.targets:
            if target.role != "expert":
                continue
            parts = target.module.split(".")
            ancestors = (".".join(parts[:n]) for n in range(1, len(parts)))
            found = next((path for path in ancestors if isinstance(modules.get(path), nn.ModuleList)), None)
            if found is not None:
                counts[found] = counts.get(found, 0) + 1
        if not counts:
            raise QmoeError(
                "E_LAYOUT", "calibration finds no list of decoder layers with experts", actual=type(self.model).__name__
            )
        return max(counts, key=lambda path: counts[path])

    def layer_path(self, index: int) -> str:
        return f"{self.path}.{index}"

    def layer_of(self, name: str) -> int | None:
        """The layer that a run-time name belongs to, or None."""
        head, _, rest = name.partition(f"{self.path}.")
        number = rest.partition(".")[0]
        return int(number) if head == "" and number.isdigit() else None

    @contextlib.contextmanager
    def surroundings(self, head: bool = False) -> Iterator[None]:
        """Everything of the decoder but its layers is in memory inside the block; with `head` also what makes
        predictions of it."""
        decoder = self.path.rpartition(".")[0]
        layers = f"{self.path}."
        inside = [name for name, _ in self.model.named_parameters() if name.startswith(layers)]
        inside += [name for name, _ in self.model.named_buffers() if name.startswith(layers)]
        replaced: dict[str, nn.Parameter] = {}
        try:
            if head:  # first, since it may be tied to the embeddings, which are then no longer what the head knows
                replaced |= self.weights.fill(self._head(), [], self.device, torch.float32)
            replaced |= self.weights.fill(decoder, inside, self.device, torch.float32)
            yield
        finally:
            self.weights.release(replaced)

    def _head(self) -> str:
        """The path of the module that makes logits of the last activations."""
        head = self.model.get_output_embeddings()
        path = next((name for name, module in self.model.named_modules() if module is head), None)
        if head is None or path is None:
            raise self._refuse("has no head for predictions")
        return path

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of the last layer's output: (n, ...) float32 -> logits (n, vocabulary). Call it inside
        `surroundings(head=True)`."""
        last = hidden.unsqueeze(0).to(self.device)

        def forward(*_: Any, **__: Any) -> Any:
            return (last,) if self._as_tuple else last

        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
        with replaced_forwards({layer: forward for layer in self.layers}), torch.no_grad():
            return self.model(input_ids=ids, use_cache=False).logits[0].float()

    def trace(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
        """What the layers get for a batch of windows. Call inside `surroundings`.

        Args:
            ids: (B, window) int64.

        Returns:
            The first layer's input (B, window, ...) float32, and every layer's other arguments.

        Raises:
            QmoeError: `E_LAYOUT` where the decoder does more than pass each layer's output to the next.
        """
        for as_tuple in (False, True):  # layers return their output bare, or, in older models, as the first of a tuple
            with contextlib.suppress(_WrongReturn):
                result = self._trace(ids, as_tuple)
                self._as_tuple = as_tuple
                return result
        raise self._refuse("does not pass each layer's output to the next")

    def _trace(self, ids: torch.Tensor, as_tuple: bool) -> tuple[torch.Tensor, list[Arguments]]:
        calls: list[tuple[int, Arguments]] = []
        given: list[tuple[torch.Tensor, int, torch.Tensor]] = []  # the first layer's input, its version, and a copy
        changed: list[int] = []

        def recorder(index: int) -> Any:
            def forward(*arguments: Any, **named: Any) -> Any:
                named = dict(named)
                hidden = arguments[0] if arguments else named.pop("hidden_states")
                if not isinstance(hidden, torch.Tensor) or (given and hidden.shape != given[0][0].shape):
                    raise _WrongReturn
                if len(arguments) > 1:
                    raise self._refuse("passes its layers further arguments by position")
                if not given:
                    given.append((hidden, hidden._version, hidden.clone()))
                first, version, copy = given[0]
                if (hidden is not first or hidden._version != version) and not torch.equal(hidden, copy):
                    changed.append(index)
                calls.append((index, named))
                return (hidden,) if as_tuple else hidden

            return forward

        decoder = self.model.get_submodule(self.path.rpartition(".")[0])
        with replaced_forwards({layer: recorder(index) for index, layer in enumerate(self.layers)}), torch.no_grad():
            decoder(input_ids=ids.to(self.device), use_cache=False)
        if [index for index, _ in calls] != list(range(len(self.layers))):
            raise self._refuse("does not call its layers once each, in order")
        if changed:
            raise self._refuse("changes activations between its layers")
        return given[0][2].float(), [named for _, named in calls]

    def _refuse(self, what: str) -> QmoeError:
        return QmoeError(
            "E_LAYOUT", f"calibration does not support a model that {what}", actual=type(self.model).__name__
        )


class _WrongReturn(Exception):
    """The stub returned its output in another form than the decoder expects."""


@contextlib.contextmanager
def replaced_forwards(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    """Modules with another forward for the block."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def same_arguments(a: Any, b: Any) -> bool:
    """Whether two calls' arguments are equal, tensors by value."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_arguments(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(same_arguments, a, b))
    return type(a) is type(b)  # caches, flags and such: nothing that depends on tokens


def cast_arguments(value: Any, dtype: torch.dtype) -> Any:
    """Arguments with every float tensor in `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast_arguments(item, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cast_arguments(item, dtype) for item in value)
    return value

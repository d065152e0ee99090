"""The quantizer that transformers calls for a checkpoint in esparse's format: it puts in packed layers.

`import esparse` registers it (esparse/packed/hook.py), and AutoModelForCausalLM.from_pretrained(DIR) works. This module
is imported while transformers is still being imported, so methods import what needs all of transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from esparse.errors import Mistake
from esparse.packed import checksums
from esparse.packed.format import FORMAT_NAME, ORDERS, READS, VERSION, WITHOUT_ESPARSE

log = logging.getLogger("esparse")

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from esparse.patterns import Pattern
    from esparse.quantise.grids import Grid


@register_quantization_config(FORMAT_NAME)
class EsparseConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a packed checkpoint's config.json."""

    def __init__(
        self,
        *,
        layers: dict[str, str] | None = None,
        files: dict[str, str] | None = None,
        version: int = VERSION,
        order: str = "physical",
        biases: Sequence[str] = (),
        ordered: Sequence[str] = (),
        behind: Sequence[str] = (),
        before: Sequence[str] = (),
        readers: dict[str, list[str]] | None = None,
        experts: dict[str, dict[str, Any]] | None = None,
        grid: dict[str, Any] | None = None,
        digest: str | None = None,
        **other: Any,
    ) -> None:
        """`layers`: pattern by packed layer. `files`: SHA-256 by file of weights.

        `biases`: layers with a bias that other models of the family do not have. If `order` is `physical`, channels are
        gathered behind the norms `behind`, which the layers `readers` read, and in front of the layers `before`; if
        `original`, loading puts the columns of the layers `ordered` back into their own order. `experts`: for each
        parameter that holds experts its pattern, whether it is stored transposed, and whether its columns are ordered
        (loading then puts them back). `grid`: of which class and settings the codes of all layers are, if they are.
        `digest`: of all the others, which checkpoints of older versions lack.
        """
        if version not in READS:
            reads = " and ".join(map(str, READS))
            raise Mistake(f"the checkpoint has version {version} of esparse's format, this esparse reads {reads}")
        if unknown := sorted(set(other) - {"quant_method"}):
            raise Mistake(f"config.json has {unknown[0]} in its quantization_config, which this esparse does not know")
        _check_kinds({"layers": layers, "files": files, "experts": experts or {}, "readers": readers or {}}, dict)
        _check_kinds({"biases": biases, "ordered": ordered, "behind": behind, "before": before}, list)
        self.quant_method = FORMAT_NAME
        self.version, self.order = version, order
        self.layers, self.files = layers or {}, files or {}
        self.biases, self.ordered = list(biases), list(ordered)
        self.behind, self.before = list(behind), list(before)
        self.readers, self.experts = readers or {}, experts or {}
        if grid is not None:
            _check_kinds({"grid": grid}, dict)
            self.grid = grid
        if order not in ORDERS:
            raise Mistake(f"config.json is damaged: its quantization_config has the order {order!r}")
        if digest is not None:
            self.digest = digest
            if digest != checksums.digest(vars(self)):
                raise Mistake(
                    "config.json is damaged or was edited: its quantization_config does not have the SHA-256 that it "
                    "names; copy the file again"
                )


def _check_kinds(entries: dict[str, Any], kind: type) -> None:
    """Raises ValueError if the entries of `quantization_config` are not what esparse writes."""
    for name, value in entries.items():
        if not isinstance(value, (kind, tuple)):  # a tuple is a default
            what = "an object" if kind is dict else "a list"
            raise Mistake(
                f"config.json is damaged: {name} in its quantization_config should be {what}, and is {value!r:.40}"
            )


def _found(model: PreTrainedModel, name: str, what: str, fits: Callable[[Any], bool]) -> Any:
    """The module that config.json names; raises Mistake if the model has none of this name and kind."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if module is None or not fits(module):
        raise Mistake(_unfit(model, f"{what} {name}"))
    return module


def _unfit(model: PreTrainedModel, what: str) -> str:
    return (
        f"config.json names the {what}, and {type(model).__name__} has none: the file was edited, or this version of "
        "transformers builds the model otherwise than the one that packed it"
    )


def _pattern(name: str, text: str, grid: Grid | None) -> Pattern:
    """The pattern of a packed layer: n:m, with outliers or without, or `dense` if its values are codes."""
    from esparse import patterns

    try:
        pattern = patterns.from_str(text)
    except (ValueError, TypeError, AttributeError) as error:
        raise Mistake(f"config.json is damaged: {name} has the pattern {text!r}") from error
    if not pattern.parts() and (grid is None or str(pattern) != "dense"):
        raise Mistake(f"config.json is damaged: {name} has the pattern {text!r}, in which nothing is packed")
    return pattern


@register_quantizer(FORMAT_NAME)
class EsparseQuantizer(HfQuantizer):
    """Puts packed layers into an empty model, and settles them after their tensors are loaded."""

    requires_calibration = True  # a model is packed by a run of esparse, not while it is loaded

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """The configuration without the sentence for those who have no esparse (packed/format.py).

        transformers shows a quantizer the configuration here, before it looks for the files; until 5.23 below.
        """
        if getattr(config, "transformers_weights", None) == WITHOUT_ESPARSE:
            del config.transformers_weights
        return config

    def update_tp_plan(self, config: PretrainedConfig) -> PretrainedConfig:
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        import torch
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        from esparse.models.reorder import gather_before, gather_behind
        from esparse.packed.completeness import check_tensors
        from esparse.packed.experts import PackedExperts
        from esparse.packed.layer import PackedLinear
        from esparse.packed.quantised_layer import QuantisedLinear
        from esparse.quantise.grids import from_settings

        config = self.quantization_config
        grid = None if getattr(config, "grid", None) is None else from_settings(config.grid)
        files = [Path(file) for file in checkpoint_files or ()]
        checksums.check_files(files, config.files)
        if files and (missing := sorted(set(config.files) - {file.name for file in files})):
            raise Mistake(
                f"{files[0].with_name(missing[0])} is missing, or its index does not name it: copy both again"
            )
        for name, pattern in config.layers.items():
            old = _found(model, name, "packed layer", lambda found: isinstance(found, nn.Linear | Conv1D))
            outputs, inputs = old.weight.shape if isinstance(old, nn.Linear) else old.weight.shape[::-1]
            shape = (inputs, outputs, _pattern(name, pattern, grid))
            how = {
                "bias": old.bias is not None or name in config.biases,
                "ordered": name in config.ordered,
                "dtype": old.weight.dtype,
                "device": old.weight.device,
            }
            layer = PackedLinear(*shape, **how) if grid is None else QuantisedLinear(*shape, grid, **how)
            model.set_submodule(name, layer)
        for name, entry in config.experts.items():
            path, _, own = name.rpartition(".")
            owner = _found(model, path, "owner of packed experts", lambda found: own in found._parameters)  # noqa: B023
            old = owner.get_parameter(own)
            if old.ndim != 3 or not {"pattern", "transposed", "ordered"} <= set(entry):
                raise Mistake(_unfit(model, f"packed experts {name}"))
            del owner._parameters[own]
            owner.register_module(
                own,
                PackedExperts(
                    old.shape,
                    _pattern(name, entry["pattern"], grid),
                    transposed=entry["transposed"],
                    ordered=entry["ordered"],
                    grid=grid,
                    dtype=old.dtype,
                    device=old.device,
                ),
            )
        if config.experts:
            model.set_experts_implementation("eager")  # other ways multiply all experts of a parameter at once
        for name in config.behind:
            norm = _found(model, name, "norm", lambda found: "weight" in found._parameters)
            weight = norm.get_parameter("weight")
            gather_behind(norm, torch.empty(len(weight), dtype=torch.int32, device=weight.device))
        for name in config.before:
            layer = _found(model, name, "packed layer", lambda found: isinstance(found, PackedLinear))
            inputs, device = layer.in_features, layer.weight.device
            gather_before(layer, torch.empty(inputs, dtype=torch.int32, device=device))
        if files:
            check_tensors(model, config, files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from esparse.models.host_memory import trim
        from esparse.packed.layer import without_loops
        from esparse.packed.matrix import check_finite
        from esparse.patterns.order import check_order

        for names, kind in ((self.quantization_config.behind, "output"), (self.quantization_config.before, "input")):
            for name in names:
                order_I = model.get_submodule(name).get_buffer(f"{kind}_order")
                try:
                    check_order(order_I, len(order_I))
                except ValueError as error:
                    raise Mistake(f"the gather of {name} cannot be read: {error}") from error
        for name in (*self.quantization_config.layers, *self.quantization_config.experts):
            module = model.get_submodule(name)
            try:
                module.settle()
                if (bias_O := getattr(module, "bias", None)) is not None:
                    check_finite("bias", bias_O)
            except ValueError as error:
                raise Mistake(f"the packed layer {name} cannot be read: {error}") from error
        trim()  # memory freed by unpacking, as much as the packed weights, would stay with the process
        if model.device.type == "cpu" and (way_out := without_loops(model.dtype)) is not None:
            log.warning("this model computes slowly on a CPU: %s", way_out)
        return model

    def is_serializable(self) -> bool:
        """Asked when the model is saved: ValueError, as what is in memory is not what lies on disk."""
        raise Mistake(
            "a packed model cannot be saved again: copy the folder that it was loaded from, or save it before "
            "esparse.pack, by esparse.save(..., packed=True)"
        )

    @property
    def is_trainable(self) -> bool:
        return True  # by adapters beside the packed layers, which pass gradients on (packed/adapters.py)

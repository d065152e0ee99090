"""The report that esparse.prune returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esparse.api.method_parts import NEUTRAL
from esparse.records.report import LayerReport, RecoveryReport, Stages, as_dicts, run_id
from esparse.run import record

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from esparse.pruning.method import Method
    from esparse.pruning.outcome import Pruned


@dataclass(eq=False, slots=True, repr=False)
class Report:
    """The results of pruning: the record's entries for each layer, keep masks and channel orders; prints as a table.

    `tokens_SL`: the calibration tokens.
    """

    pruned: Pruned
    method: Method
    tokens_SL: Tensor
    config: dict[str, Any]
    size: record.Size
    stages: Stages
    seconds: float
    device: torch.device

    @property
    def layers(self) -> list[LayerReport]:
        """Name, shape, density, kept score, relative error, seconds and bytes of each pruned matrix."""
        return record.with_bytes(self.pruned)

    @property
    def recoveries(self) -> list[RecoveryReport]:
        """The losses before and after, for each part of the model that a recovery trained."""
        return self.pruned.recoveries

    @property
    def keeps(self) -> Mapping[str, Tensor]:
        """Keep masks by the weight's name in the state dict: True is kept; outputs x inputs, experts in front."""
        return self.pruned.keeps

    @property
    def orders(self) -> Mapping[str, Tensor]:
        """The channel at each place when groups are cut, by the weight's name; only with a shuffle."""
        return self.pruned.orders

    @property
    def density(self) -> float:
        """The share of nonzeros in the pruned layers' weights, measured on the weights."""
        return self.pruned.kept / self.pruned.weights

    @property
    def pattern_holds(self) -> bool:
        """Whether every group of every pruned layer holds the pattern, measured on the weights."""
        return self.pruned.pattern_holds

    def to_dict(self) -> dict[str, Any]:
        """The fields of a run's record that pruning fills, as plain values."""
        mask_bytes = sum(mask.numel() for mask in self.pruned.keeps.packed.values())
        memory = record.memory(self.size, self.pruned, self.layers, mask_bytes, [(0.0, None)])
        return {
            "id": run_id(self.config),
            "name": self.name,
            "seconds": self.seconds,
            "config": self.config,
            "environment": record.environment(self.device),
            "model": {
                "name": self.config["model"]["path"].rstrip("/").rpartition("/")[2],
                "family": self.size.family,
                "parameters": self.size.parameters,
                "pruned_parameters": self.pruned.weights,
            },
            "sparsity": record.sparsity(self.method.pattern, self.pruned),
            "quality": {},
            "layers": as_dicts(self.layers),
            "recovery": as_dicts(self.recoveries),
            "seconds_by_stage": {stage: round(seconds, 3) for stage, seconds in self.stages.seconds.items()},
            "memory": {key: value for key, value in memory.items() if not key.startswith("peak")},
        }

    @property
    def name(self) -> str:
        """A short name: the pattern, and every part that does something."""
        acting = [choice for group, choice in self.config["choices"].items() if choice != NEUTRAL.get(group)]
        return " ".join([str(self.method.pattern), *acting])

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self.pruned.layers)} layers, {self.density:.2%} of {self.pruned.weights:,} weights>"

    def __str__(self) -> str:
        rows = [("layer", "shape", "kept weights", "kept score", "error", "seconds")]
        for of in self.layers:
            error = "-" if of.relative_error is None else f"{of.relative_error:.4f}"
            shape = " x ".join(map(str, of.shape))
            rows.append((of.name, shape, f"{of.density:.2%}", f"{of.kept_score:.4f}", error, f"{of.seconds:.2f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        holds = "the pattern holds" if self.pattern_holds else "THE PATTERN DOES NOT HOLD"
        total = (
            f"{self.name}: {self.density:.2%} of {self.pruned.weights:,} weights in {len(self.pruned.layers)} layers "
            f"survive, {holds}, {self.seconds:.1f} s"
        )
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], total])

"""A checkpoint in esparse's packed format: transformers loads it after `import esparse`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake
from esparse.export import Finished, ToFolder
from esparse.export.engines import usable_by
from esparse.export.hub_metadata import licence_of
from esparse.quantise import NoQuantise
from esparse.shuffles import NoShuffle

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from esparse.export.writer import Precision
    from esparse.models.blocks import BlockModel
    from esparse.models.matrices import Matrix
    from esparse.models.reorder import Reordered
    from esparse.patterns import Grouping, Pattern
    from esparse.pruning.outcome import Pruned
    from esparse.quantise import Quantise
    from esparse.recoveries import Recovery
    from esparse.shuffles import Shuffle

log = logging.getLogger("esparse")


@dataclass(slots=True)
class _Contents:
    """What config.json says about the packed weights."""

    layers: dict[str, str] = field(default_factory=dict)
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    ordered: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    readers: dict[str, list[str]] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)
    absorbed: int = 0
    dense_experts: dict[str, int] = field(default_factory=dict)  # bytes of the experts that are not packed
    why_dense: str = ""


@dataclass(kw_only=True, slots=True)
class Packed(ToFolder):
    """Stores the kept values, and their places in as few bits as the pattern needs (packed/matrix.py).

    With `order=physical` columns are stored in group order, as sparse kernels need them, and gathers become part of
    the model. With `original`, and for experts always, loading puts the columns back into their own order. Experts
    with outliers and a shuffle stay dense, and the log says so.
    """

    def check(self, pattern: Pattern, recovery: Recovery, shuffle: Shuffle, quantise: Quantise) -> None:
        if str(pattern) == "dense" and isinstance(quantise, NoQuantise):
            raise Mistake("export=packed has nothing to pack at pattern=dense without quantise: use export=dense")
        if not pattern.parts() and str(pattern) != "dense":
            raise Mistake(f"export=packed stores n:m patterns, and {pattern} is none: use export=dense")
        if self.order == "original" and not isinstance(shuffle, NoShuffle) and len(pattern.parts()) > 1:
            raise Mistake(
                "outliers are stored by their place in a run of columns, and a shuffle reorders columns: use "
                "export.order=physical, or shuffle=none"
            )

    def ready(self, blocks: BlockModel, recovery: Recovery, folder: Path) -> None:
        from esparse.export.architecture import check_architecture
        from esparse.models.model_parts import shared_matrices

        ToFolder.ready(self, blocks, recovery, folder)
        check_architecture(blocks, recovery, biases=True)
        for name, first in shared_matrices(blocks.by_name()).items():
            raise Mistake(f"{first} and {name} are one weight, which export=packed cannot say: use export=dense")

    def write(self, run: Finished) -> dict[str, Any]:
        from esparse.export.card import packed_card
        from esparse.export.writer import Draft, parts, precisions
        from esparse.models.source import folder_of
        from esparse.packed.checksums import digest
        from esparse.packed.format import FORMAT_NAME, VERSION, WITH_GRID
        from esparse.quantise.grids import settings

        dtype, physical = self.precision(run.blocks), self.order == "physical"
        precision = precisions(run.blocks.model, dtype)
        matrices = {m.entry: (m, g.pattern) for m, g in run.pruned.groupings if m.expert is None}
        stacks = stacks_of(run.pruned)
        contents = _Contents()
        with Draft(self.place(run.folder), run) as draft:
            for tensors, plan in parts(run, physical=physical, gathers=True):
                if not physical:
                    plan.columns = {name: order.long() for name, order in run.pruned.orders.items() if name in tensors}
                    plan.columns = {name: order for name, order in plan.columns.items() if name in matrices}
                    plan.transposed = {name for name in plan.columns if matrices[name][0].transposed}
                packed = _experts(run.pruned, tensors, stacks, contents, precision)
                rest = {name: value for name, value in tensors.items() if name not in contents.experts}
                draft.add(packed | self._packed(run, rest, plan, matrices, contents, precision))
            not_loaded = draft.add_not_loaded()
            facts = {
                "path": str(draft.place),
                "format": "packed",
                "bytes": draft.bytes,
                "dtype": str(dtype).removeprefix("torch."),
                "order": self.order,
                "packed_layers": len(contents.layers),
                "packed_experts": sum(len(stacks[name]) for name in contents.experts),
                "dense_experts": sum(len(stacks[name]) for name in contents.dense_experts),
                "dense_expert_bytes": sum(contents.dense_experts.values()),
                "why_dense": contents.why_dense,
                "absorbed": contents.absorbed,
                "gathers": len(contents.behind) + len(contents.before),
                "not_loaded": not_loaded,
                "holds_in": len(contents.layers) + sum(len(stacks[name]) for name in contents.experts),
                "of_layers": len(run.pruned.groupings),
            }
            if licence := licence_of(folder_of(run.blocks.model)):
                facts["licence"] = licence
            entry = {
                "quant_method": FORMAT_NAME,
                "version": VERSION,
                "order": self.order,
                "layers": contents.layers,
                "biases": contents.biases,
                "ordered": contents.ordered,
                "behind": contents.behind,
                "readers": contents.readers,
                "before": contents.before,
                "experts": contents.experts,
                "files": draft.files,
            }
            if run.pruned.grid is not None:
                entry["grid"], entry["version"] = settings(run.pruned.grid), WITH_GRID
                facts["grid"] = entry["grid"]
            entry["digest"] = digest(entry)
            facts["engines"] = usable_by("packed", run.record["sparsity"]["pattern"], facts)
            mark = {"id": run.record["id"], "format": "packed"}
            draft.finish(dtype, packed_card(run.record, facts), mark, entry)
        if contents.dense_experts:
            log.warning(
                "%d experts stay dense, %.1f MB with their zeros (%s, ...): %s",
                facts["dense_experts"],
                sum(contents.dense_experts.values()) / 1e6,
                next(iter(contents.dense_experts)),
                facts["why_dense"],
            )
        return facts

    def _packed(
        self,
        run: Finished,
        tensors: dict[str, Tensor],
        plan: Reordered,
        matrices: dict[str, tuple[Matrix, Pattern]],
        contents: _Contents,
        precision: Precision,
    ) -> dict[str, Tensor]:
        """One file's tensors, packed; `contents` takes notes of what was packed."""
        from esparse.export.writer import on_disk

        packed: dict[str, Tensor] = {}
        for name in (name for name in tensors if name in matrices):
            matrix, pattern = matrices[name]
            layer = name.removesuffix(".weight")
            stored = _stored(plan.stored(name, tensors[name]), precision(name), run.pruned, matrix)
            stored_OI = stored.T.contiguous() if matrix.transposed else stored
            of_layer = tensors_of(stored_OI, pattern, run.pruned, matrix, plan.rows.get(name))
            packed |= {f"{layer}.{ending}": value for ending, value in of_layer.items()}
            contents.layers[layer] = str(pattern)
            if f"{layer}.bias" in tensors:
                contents.biases.append(layer)
            if self.order == "original" and name in plan.columns:
                packed[f"{layer}.order"] = plan.columns[name].int()
                contents.ordered.append(layer)
        if self.order == "physical":
            packed |= {f"{norm}.output_order": order.int() for norm, order in plan.behind.items()}
            packed |= {f"{layer}.input_order": order.int() for layer, order in plan.before.items()}
            contents.behind += plan.behind
            contents.readers |= plan.readers
            contents.before += plan.before
            contents.absorbed += plan.absorbed
        rest = {name: plan.stored(name, value) for name, value in tensors.items() if name not in matrices}
        return packed | on_disk(run, rest, precision)


def _stored(value: Tensor, dtype: torch.dtype, pruned: Pruned, matrix: Matrix) -> Tensor:
    """A matrix's values on the host, in the export's precision; of a rounded one, whose codes have none, in their own.

    Rounded again, to the export's precision, they would not be what codes and scales give in it.
    """
    from esparse.export.writer import cast

    stored = cast(value, dtype, matrix.entry)  # or refused, since that precision cannot hold it
    return cast(value, value.dtype, matrix.entry) if f"scale/{matrix.entry}" in pruned.grids else stored


def tensors_of(
    stored_OI: Tensor, pattern: Pattern, pruned: Pruned, matrix: Matrix, rows: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors on disk of a matrix whose columns are in group order; of codes, if it was rounded to a grid.

    `rows`: the order of its rows, if it is not their own. Raises ValueError if the pattern or the grid do not hold.
    """
    from esparse.packed import quantised
    from esparse.packed.matrix import pack, to_file
    from esparse.pruning.rounding import scales_of

    scales = scales_of(pruned.grids, matrix)
    if scales is None or pruned.grid is None:
        return to_file(pack(stored_OI, pattern))
    scales = scales if rows is None else scales.rows(rows.cpu())
    return quantised.to_file(stored_OI.cpu(), pattern, pruned.grid, scales)


def stacks_of(pruned: Pruned) -> dict[str, list[tuple[Matrix, Grouping]]]:
    """For each parameter that holds experts, its experts in order."""
    stacks: dict[str, list[tuple[Matrix, Grouping]]] = {}
    for matrix, grouping in pruned.groupings:
        if matrix.expert is not None:
            stacks.setdefault(matrix.entry, []).append((matrix, grouping))
    return {name: sorted(of, key=lambda pair: pair[0].expert or 0) for name, of in stacks.items()}


def _experts(
    pruned: Pruned,
    tensors: dict[str, Tensor],
    stacks: dict[str, list[tuple[Matrix, Grouping]]],
    contents: _Contents,
    precision: Precision,
) -> dict[str, Tensor]:
    """The experts among one file's tensors, packed one by one; `contents` takes notes of them."""
    import torch

    packed: dict[str, Tensor] = {}
    for name in (name for name in tensors if name in stacks):
        first, of_first = stacks[name][0]
        pattern, ordered = of_first.pattern, of_first.order_I is not None
        if (why := why_dense(stacks[name])) is not None:
            contents.dense_experts[name] = tensors[name].numel() * precision(name).itemsize
            contents.why_dense = why
            continue
        of_each = []
        for matrix, grouping in stacks[name]:
            ordered_OI = grouping.ordered(matrix.part_of(tensors[name]))
            stored_OI = _stored(ordered_OI, precision(name), pruned, matrix).contiguous()
            order = {} if grouping.order_I is None else {"order": grouping.order_I.cpu().int()}
            of_each.append(tensors_of(stored_OI, pattern, pruned, matrix) | order)
        packed |= {f"{name}.{ending}": torch.stack([one[ending] for one in of_each]) for ending in of_each[0]}
        contents.experts[name] = {"pattern": str(pattern), "transposed": first.transposed, "ordered": ordered}
    return packed


def why_dense(experts: Sequence[tuple[Matrix, Grouping]]) -> str | None:
    """Why the experts of one parameter cannot be packed; None if they can."""
    if experts[0][0].rows or experts[0][0].together:
        return "packed experts are unpacked one at a time, and this model takes all of a parameter at once"
    groupings = [grouping for _, grouping in experts]
    if len({(grouping.pattern, grouping.order_I is None) for grouping in groupings}) > 1:
        return "the experts of a parameter can have one packed pattern only, and these have several"
    if groupings[0].order_I is not None and len(groupings[0].pattern.parts()) > 1:
        return "outliers are stored by their place in a run of columns, which a shuffle reorders (use shuffle=none)"
    return None

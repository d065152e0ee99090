"""An ordinary Hugging Face checkpoint, in which pruned weights are zeros."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake
from esparse.export import Finished, ToFolder
from esparse.export.engines import usable_by
from esparse.export.hub_metadata import licence_of
from esparse.shuffles import NoShuffle

if TYPE_CHECKING:
    from pathlib import Path

    from esparse.models.blocks import BlockModel
    from esparse.patterns import Pattern
    from esparse.quantise import Quantise
    from esparse.recoveries import Recovery
    from esparse.shuffles import Shuffle

log = logging.getLogger("esparse")


@dataclass(kw_only=True, slots=True)
class Dense(ToFolder):
    """A checkpoint that any program for the model loads, as large as the dense model.

    With `order=physical` the columns are stored in group order, so that every matrix holds its pattern as stored. An
    ordinary checkpoint has no place for a gather, therefore a shuffle must be restricted to orders that earlier layers
    absorb (`shuffle.foldable`). With `original` it has the quality of any shuffle, and no groups: its name says so.
    """

    def check(self, pattern: Pattern, recovery: Recovery, shuffle: Shuffle, quantise: Quantise) -> None:
        if not pattern.parts() or isinstance(shuffle, NoShuffle) or self.order == "original" or shuffle.foldable:
            return
        raise Mistake(
            f"export=dense cannot store {pattern} in groups: no ordinary checkpoint absorbs this shuffle's orders. Use "
            "shuffle.foldable=true (only orders that can be absorbed) or shuffle=none; or export.order=original (the "
            "same quality, no groups for hardware); or export=packed"
        )

    def ready(self, blocks: BlockModel, recovery: Recovery, folder: Path) -> None:
        from esparse.export.architecture import check_architecture

        ToFolder.ready(self, blocks, recovery, folder)
        check_architecture(blocks, recovery, biases=False)

    def write(self, run: Finished) -> dict[str, Any]:
        from esparse.export.card import dense_card
        from esparse.export.writer import Draft, on_disk, parts, precisions
        from esparse.models.source import folder_of

        dtype, physical = self.precision(run.blocks), self.order == "physical"
        precision = precisions(run.blocks.model, dtype)
        absorbed, left, held = 0, [], 0
        shuffled = any(grouping.order_I is not None for _, grouping in run.pruned.groupings)
        with Draft(
            self.place(run.folder, "export-original-order" if shuffled and not physical else "export"), run
        ) as draft:
            for tensors, plan in parts(run, physical=physical, gathers=False):
                stored = {name: plan.stored(name, value) for name, value in tensors.items()}
                held += sum(
                    grouping.pattern.holds(matrix.part_of(stored[matrix.entry]) != 0)
                    for matrix, grouping in run.pruned.groupings
                    if matrix.entry in stored
                )
                draft.add(on_disk(run, stored, precision))
                absorbed += plan.absorbed
                left += plan.left
            not_loaded = draft.add_not_loaded()
            facts = {
                "path": str(draft.place),
                "format": "dense",
                "bytes": draft.bytes,
                "dtype": str(dtype).removeprefix("torch."),
                "order": self.order,
                "absorbed": absorbed,
                "not_loaded": not_loaded,
                "holds_in": held,
                "of_layers": len(run.pruned.groupings),
            }
            if licence := licence_of(folder_of(run.blocks.model)):
                facts["licence"] = licence
            facts["engines"] = usable_by("dense", run.record["sparsity"]["pattern"], facts)
            draft.finish(dtype, dense_card(run.record, facts), {"id": run.record["id"], "format": "dense"}, None)
        if left:  # with foldable shuffles only experts could be, and these keep their own order then
            log.warning(
                "%d weights keep their columns' own order, because no earlier layer can absorb the shuffle: in the "
                "checkpoint's order they do not hold n:m (%s, ...)",
                len(left),
                left[0],
            )
        return facts

"""An ordinary Hugging Face checkpoint, in which pruned weights are zeros."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake
from esparse.export import Finished, ToFolder

if TYPE_CHECKING:
    from pathlib import Path

    from esparse.models.blocks import BlockModel
    from esparse.recoveries import Recovery

log = logging.getLogger("esparse")


@dataclass(kw_only=True, slots=True)
class Dense(ToFolder):
    """A checkpoint that any program for the model loads, as large as the dense model.

    An ordinary checkpoint has no place for a gather. With `order=physical` it follows the orders that earlier layers
    can absorb; the log names the other layers.
    """

    def ready(self, blocks: BlockModel, recovery: Recovery, folder: Path) -> None:
        from esparse.models.matrices import BlockMatrices

        ToFolder.ready(self, blocks, recovery, folder)
        if not recovery.adds_biases():
            return
        layers = BlockMatrices(blocks.blocks[0], f"{blocks.prefix}.0").layers()
        without = [matrix.name for matrix in layers if matrix.layer is not None and matrix.layer.bias is None]
        if without:
            raise Mistake(
                f"the recovery gives biases to layers that have none ({without[0]}, ...), and an ordinary checkpoint "
                f"of {type(blocks.model).__name__} has no place for them: use export=packed"
            )

    def write(self, run: Finished) -> dict[str, Any]:
        from esparse.export.card import dense_card
        from esparse.export.writer import Draft, on_disk, parts, precisions

        dtype, physical = self.precision(run.blocks), self.order == "physical"
        precision = precisions(run.blocks.model, dtype)
        absorbed, left = 0, []
        with Draft(self.place(run.folder), run) as draft:
            for tensors, plan in parts(run, physical=physical, gathers=False):
                draft.add(on_disk(run, {name: plan.stored(name, value) for name, value in tensors.items()}, precision))
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
            }
            draft.finish(dtype, dense_card(run.record, facts), {"id": run.record["id"], "format": "dense"}, None)
        if left:
            log.warning(
                "%d weights keep their columns' own order, because no earlier layer can absorb the shuffle: in the "
                "checkpoint's order they do not hold n:m (%s, ...)",
                len(left),
                left[0],
            )
        return facts

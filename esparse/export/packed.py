"""A checkpoint in esparse's format, without the zeros: transformers loads it after `import esparse`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from esparse.export import Finished, ToFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from esparse.models.matrices import Matrix
    from esparse.models.reorder import Reordered
    from esparse.patterns import Pattern
    from esparse.recoveries import Recovery


@dataclass(slots=True)
class _Contents:
    """What config.json has to tell of the weights."""

    layers: dict[str, str] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    ordered: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    absorbed: int = 0


@dataclass(kw_only=True, slots=True)
class Packed(ToFolder):
    """Values, and which weights they are in as few bits as the pattern needs (packed/matrix.py).

    Experts, which lie in one parameter, stay dense with zeros. With `order=physical` the columns stand in the order in
    which the groups were cut, which sparse kernels want, and gathers are part of the model; with `original` they get
    back their own order while the model is loaded.
    """

    def check(self, pattern: Pattern, recovery: Recovery, *, shuffled: bool) -> None:
        if not pattern.parts():
            raise ValueError(f"export=packed stores patterns of n:m, and {pattern} is none: use export=dense")
        if self.order == "original" and shuffled and len(pattern.parts()) > 1:
            raise ValueError(
                "salient weights are stored by their runs of columns, which a shuffle reorders: use "
                "export.order=physical, or shuffle=none"
            )

    def write(self, run: Finished) -> dict[str, Any]:
        from esparse.export.card import packed_card
        from esparse.export.checkpoint import Draft, parts
        from esparse.packed.format import METHOD, VERSION

        dtype, physical = self.precision(run.blocks), self.order == "physical"
        matrices = {m.entry: (m, g.pattern) for m, g in run.pruned.groupings if m.expert is None}
        contents = _Contents()
        with Draft(self.place(run.folder), run) as draft:
            for tensors, plan in parts(run, physical=physical, gathers=True):
                if not physical:
                    plan.columns = {name: order.long() for name, order in run.pruned.orders.items() if name in tensors}
                    plan.columns = {name: order for name, order in plan.columns.items() if name in matrices}
                    plan.transposed = {name for name in plan.columns if matrices[name][0].transposed}
                draft.add(self._packed(run, tensors, plan, matrices, contents, dtype))
            facts = {
                "path": str(draft.place),
                "format": "packed",
                "bytes": draft.bytes,
                "dtype": str(dtype).removeprefix("torch."),
                "order": self.order,
                "packed_layers": len(contents.layers),
                "absorbed": contents.absorbed,
                "gathers": len(contents.behind) + len(contents.before),
            }
            entry = {
                "quant_method": METHOD,
                "version": VERSION,
                "order": self.order,
                "layers": contents.layers,
                "biases": contents.biases,
                "ordered": contents.ordered,
                "behind": contents.behind,
                "before": contents.before,
                "files": draft.files,
            }
            mark = {"id": run.record["id"], "format": "packed"}
            draft.finish(dtype, packed_card(run.record, facts), mark, entry)
        return facts

    def _packed(
        self,
        run: Finished,
        tensors: dict[str, Tensor],
        plan: Reordered,
        matrices: dict[str, tuple[Matrix, Pattern]],
        contents: _Contents,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """One file's tensors; what is packed of them is noted in `contents`."""
        from esparse.export.checkpoint import cast, on_disk
        from esparse.packed.matrix import pack, to_file

        packed: dict[str, Tensor] = {}
        for name in (name for name in tensors if name in matrices):
            matrix, pattern = matrices[name]
            layer = name.removesuffix(".weight")
            stored = cast(plan.stored(name, tensors[name]), dtype)
            of_layer = to_file(pack(stored.T.contiguous() if matrix.transposed else stored, pattern))
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
            contents.before += plan.before
            contents.absorbed += plan.absorbed
        rest = {name: plan.stored(name, value) for name, value in tensors.items() if name not in matrices}
        return packed | on_disk(run, rest, dtype)

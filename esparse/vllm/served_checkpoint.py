"""What vLLM knows of a packed checkpoint: which layers are packed, in which pattern, and in which order they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper

from esparse.errors import Mistake
from esparse.packed.checksums import check_files
from esparse.packed.format import FORMAT_NAME
from esparse.packed.quantizer import EsparseConfig
from esparse.patterns import from_str
from esparse.vllm.packed_linear_method import PackedLinearMethod


class ServedCheckpoint(QuantizationConfig):
    """The entry `quantization_config` of config.json as vLLM wants it.

    Raises ValueError for what a packed checkpoint may hold and vLLM has no place for.
    """

    def __init__(self, entry: EsparseConfig) -> None:
        super().__init__()
        self.entry = entry
        if entry.experts:
            raise Mistake(
                f"vLLM cannot serve packed experts ({next(iter(entry.experts))}, ...): prune again with the experts "
                "in model.skip, or use export=dense"
            )
        if getattr(entry, "grid", None) is not None:
            raise Mistake(
                "vLLM cannot serve packed codes (quantise=...): load the folder with transformers after import "
                "esparse, or prune again with quantise=none or export=dense"
            )
        missing = [norm for norm in entry.behind if norm not in entry.readers]
        if missing:
            raise Mistake(
                f"the file does not say which layers read {missing[0]}, as an older esparse wrote it: export it again"
            )
        self._renamed: WeightsMapper | None = None

    @classmethod
    def get_name(cls) -> str:
        return FORMAT_NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ServedCheckpoint:
        return cls(EsparseConfig(**{key: value for key, value in config.items() if key != "quant_method"}))

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        """Called once, before the weights are read: are they what was written?"""
        folder = Path(model_name)
        if folder.is_dir():  # a snapshot of the Hub is found by the contents' checksums anyway
            files = sorted(folder.glob("*.safetensors"))
            check_files(files, self.entry.files)
            missing = sorted(set(self.entry.files) - {file.name for file in files})
            if missing:
                raise Mistake(f"{folder / missing[0]} is missing: copy the folder again")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """The layers by the names that vLLM gives them, for instance within a model of pictures and text."""
        self._renamed = hf_to_vllm_mapper

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """The orders behind norms, of which vLLM knows none, become those of a layer that reads the norm."""
        moved = {
            f"{norm}.output_order": f"{readers[0]}.input_order"
            for norm, readers in self.entry.readers.items()
            if norm in self.entry.behind
        }
        return super().get_checkpoint_weight_mapper() | WeightsMapper(orig_to_new_substr=moved)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        names = self._parts(prefix)
        patterns = self._by_vllm_name(self.entry.layers)
        packed = [name for name in names if name in patterns]
        if not packed:
            return UnquantizedLinearMethod()
        if len(packed) < len(names) or len({patterns[name] for name in names}) > 1:
            of_each = ", ".join(f"{name.rpartition('.')[2]} {patterns.get(name, 'dense')}" for name in names)
            raise Mistake(
                f"vLLM computes {prefix} as one layer, and its parts differ ({of_each}): prune with one pattern for "
                "all (allocation=uniform, no model.skip among them), or use export=dense"
            )
        ordered = self._names(self.entry.ordered)
        gathered = self._names(self.entry.before) | self._behind()
        orders = {
            kind
            for kind, having in (("order", ordered), ("input_order", gathered))
            if any(name in having for name in names)
        }
        for kind, having in (("order", ordered), ("input_order", gathered)):
            if kind in orders and not all(name in having for name in names):
                raise Mistake(f"vLLM computes {prefix} as one layer, and its parts read in several orders")
        biased = [name for name in names if name in self._names(self.entry.biases)]
        return PackedLinearMethod(from_str(patterns[names[0]]), names=names, orders=orders, biased=biased)

    def _parts(self, prefix: str) -> list[str]:
        """The layers of the checkpoint that one of vLLM's is made of."""
        path, _, own = prefix.rpartition(".")
        return [f"{path}.{part}" for part in self.packed_modules_mapping.get(own, [own])]

    def _behind(self) -> set[str]:
        readers = [name for norm in self.entry.behind for name in self.entry.readers[norm]]
        dense = [name for name in readers if name not in self.entry.layers]
        if dense:
            raise Mistake(f"{dense[0]} is dense and reads in the order of packed layers, which vLLM has no place for")
        return self._names(readers)

    def _names(self, names: Sequence[str]) -> set[str]:
        return set(self._by_vllm_name(dict.fromkeys(names, "")))

    def _by_vllm_name(self, values: Mapping[str, str]) -> dict[str, str]:
        return dict(values) if self._renamed is None else self._renamed.apply_dict(dict(values))

"""Adapters of low rank (LoRA) beside packed layers, by peft, which knows layers with dense weights only.

The packed weights stay as they are; gradients flow through them to the adapters of the layers before.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from esparse.errors import Mistake
from esparse.packed.layer import PackedLinear


def takes_packed(config: Any) -> Any:
    """The same `LoraConfig`, whose adapters may now stand beside packed layers as well.

    Raises ValueError for variants that want to see the dense weight (DoRA, PiSSA, OLoRA and the like).
    """
    wants = [name for name in ("use_dora", "use_bdlora", "kasa_config", "velora_config") if getattr(config, name, None)]
    if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights not in ("gaussian", "orthogonal"):
        wants.append(f"init_lora_weights={config.init_lora_weights}")
    if wants:
        raise Mistake(f"{wants[0]} of peft reads dense weights, which packed layers do not have: use plain LoRA")
    config._register_custom_module({PackedLinear: _adapted()})
    return config


@cache
def _adapted() -> type:
    """peft's layer for a Linear, which never merges: a merged weight would be dense."""
    from peft.tuners.lora import Linear

    class LoraPackedLinear(Linear):
        def merge(self, *_: Any, **__: Any) -> None:
            raise Mistake("adapters beside packed layers are not merged: a merged weight would be dense")

        def get_delta_weight(self, adapter: str) -> Any:
            raise Mistake("adapters beside packed layers are not merged: a merged weight would be dense")

    return LoraPackedLinear

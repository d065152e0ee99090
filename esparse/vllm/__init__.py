"""esparse's packed format in vLLM, as a plug-in of its own: `vllm serve DIR` and `LLM(DIR)` take such a folder.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins` of pyproject.toml) and then
finds the format by the `quant_method` of config.json. Nothing else of esparse imports this, nor vLLM.
"""

from __future__ import annotations

import logging

log = logging.getLogger("esparse")


def register() -> None:
    """Makes the format known to vLLM and to its transformers; may be called again.

    Logs a warning if this vLLM is another one than esparse fits: vLLM calls it whatever the model, and must not end for
    the sake of a format that is not asked for.
    """
    try:
        _register()
    except Exception as error:
        log.warning(
            "vLLM cannot serve checkpoints that esparse packed, because esparse does not fit this version of it "
            "(%s: %s): pip install 'esparse[vllm]' names the one that it fits",
            type(error).__name__,
            error,
        )


def _register() -> None:
    from vllm.model_executor.layers.quantization import register_quantization_config

    import esparse  # noqa: F401  transformers then knows the format
    from esparse.packed.format import FORMAT_NAME
    from esparse.vllm.served_checkpoint import ServedCheckpoint

    register_quantization_config(FORMAT_NAME)(ServedCheckpoint)

"""A model that is one GGUF file, which transformers reads and dequantises."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENDING = ".gguf"
# What transformers notes on a model and on its configuration about the blocks that it has taken apart.
NOTES_ON_MODEL = ("hf_quantizer", "quantization_method")
NOTES_ON_CONFIG = ("quantization_config", "_is_quantized")


def is_named(path: str | Path) -> bool:
    """Whether a path names a GGUF file, by its ending."""
    return str(path).lower().endswith(ENDING)


def check(file: Path) -> None:
    """Raises Mistake if the file is no GGUF file, is cut short, is one of several, or holds what nobody dequantises."""
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(file)
    except Exception as error:  # of many types: it reads whatever the bytes say
        said = " ".join(str(error).split()) or type(error).__name__
        raise Mistake(
            f"{file} cannot be read as a GGUF file ({said}): copy it again; if its format is new, install a newer gguf"
        ) from error
    split = reader.get_field("split.count")
    if split is not None and int(split.contents()) > 1:
        raise Mistake(
            f"{file} is one of {int(split.contents())} parts of a model, and transformers reads one file: join them "
            "first (llama-gguf-split --merge)"
        )
    of_types = {tensor.tensor_type: tensor for tensor in reversed(reader.tensors)}  # the first one of each
    for kind, tensor in of_types.items():
        try:
            dequantize(tensor.data[:1], kind)
        except NotImplementedError as error:
            raise Mistake(
                f"{file} holds tensors of type {kind.name} ({tensor.name}, ...), which cannot be dequantised: give the "
                "same model in another type, such as F16 or Q8_0"
            ) from error


def reading(file: Path) -> dict[str, Any]:
    """What `from_pretrained` is told beside the file's folder so that it reads this file."""
    return {"gguf_file": file.name}


def dequantised() -> dict[str, Any]:
    """What `AutoModelForCausalLM.from_pretrained` is told so that no weight stays in blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)  # older versions always dequantise
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def made_plain(model: PreTrainedModel, file: Path) -> PreTrainedModel:
    """The model without the notes that it was quantised once; what lies beside the file is none of its files."""
    for name in NOTES_ON_MODEL:
        vars(model).pop(name, None)
    model.is_quantized = False
    for name in NOTES_ON_CONFIG:
        vars(model.config).pop(name, None)
    model.name_or_path = model.config.name_or_path = str(file)
    return model

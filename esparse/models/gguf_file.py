"""Models in one GGUF file, which transformers reads and dequantises."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENDING = ".gguf"
# Attributes that transformers sets on a model and its configuration to describe the quantisation it has undone.
NOTES_ON_MODEL = ("hf_quantizer", "quantization_method")
NOTES_ON_CONFIG = ("quantization_config", "_is_quantized")


def is_named(path: str | Path) -> bool:
    """Whether a path names a GGUF file, by its ending."""
    return str(path).lower().endswith(ENDING)


def check(file: Path) -> None:
    """Raises Mistake for a damaged GGUF file, one of several parts, or tensors that cannot be dequantised."""
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(file)
    except Exception as error:  # of many types: it reads whatever the bytes say
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Mistake(
            f"{file} cannot be read as a GGUF file ({reason}): copy it again; if its format is "
            "new, install a newer gguf"
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
    """Arguments of `from_pretrained`, beside the file's folder, that make it read this file."""
    return {"gguf_file": file.name}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While open, the bar that transformers draws for a GGUF file, whatever it is told, is not seen."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def dequantised() -> dict[str, Any]:
    """Arguments of `AutoModelForCausalLM.from_pretrained` that make it dequantise all weights."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)  # older versions always dequantise
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def made_plain(model: PreTrainedModel, file: Path) -> PreTrainedModel:
    """The model without transformers' marks of quantisation, and without a folder of files beside its weights."""
    for name in NOTES_ON_MODEL:
        vars(model).pop(name, None)
    model.is_quantized = False
    for name in NOTES_ON_CONFIG:
        vars(model.config).pop(name, None)
    model.name_or_path = model.config.name_or_path = str(file)
    return model

"""Loads model and tokenizer from the hub, a local directory, or the package itself."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esparse.errors import Mistake
from esparse.models import gguf_file
from esparse.models.library_errors import explained
from esparse.models.model_files import VOCABULARIES, check_config, json_object
from esparse.parts import expressions

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from esparse.models.store import ShardStore, Store
    from esparse.parallel.ranks import Ranks

log = logging.getLogger("esparse")

ASSETS = Path(__file__).parent.parent / "assets"
BUILTIN = ASSETS / "tiny"
DTYPES = ("auto", "float32", "bfloat16", "float16")
STORES = ("auto", "memory", "shards")
PLACES = ("auto", "host", "device", "disk")
FEW_TOKENS = 8  # a vocabulary of this size or less holds special tokens only
# Names of the number of positions in configurations, the usual ones first.
LENGTHS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length", "seq_length"),
    *("seq_len", "n_ctx", "context_length", "max_context_length", "max_target_positions", "model_max_length"),
    "block_size",
)


@dataclass(kw_only=True, slots=True)
class Model:
    """The group `model`: which model, in which dtype, on which devices."""

    name: str | None  # name in reports; None: the last part of path
    path: str  # a name on the Hugging Face hub, a local directory, a GGUF file, or `builtin`
    revision: str | None  # branch, tag or commit on the hub
    dtype: str  # auto | float32 | bfloat16 | float16; auto: the checkpoint's, but float32 for float16 on a CPU
    # Several GPUs or processes each take a share of the sequences, and what they sum up is added; gradients,
    # preparations and recoveries that train use one
    devices: str  # auto (all GPUs there are, else the CPU) | cpu | cuda | cuda:1 ... | cpu:4 (as many processes)
    # More takes memory on a CPU, and no less time
    batch_tokens: int | None  # tokens of one forward pass; null: 1024 on a CPU, 8192 on a GPU
    # With auto, shards if the checkpoint is larger than half of the free memory. Methods that need the whole model
    # (`metric.source=model`, distillation) need memory
    store: str  # auto | memory (the model is loaded whole) | shards (block by block from its files)
    # With auto, disk if a stream of them would take over a quarter of the free memory, else host. On a
    # GPU `device` is faster, and an entropy holds what it looks at twice in a quarter of the free memory, not 2 GiB
    activations: str  # in which memory hidden states wait between blocks: auto | host | device | disk
    skip: list[str]  # regular expressions: a layer stays dense if one is found in its name, or a module's around it
    trust_remote_code: bool  # whether Python code that comes with a hub model may run

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise Mistake(f"model.path must name a model of the hub, a folder or a GGUF file, got {self.path!r}")
        if self.dtype not in DTYPES:
            raise Mistake(f"model.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.store not in STORES:
            raise Mistake(f"model.store must be one of {', '.join(STORES)}, got {self.store!r}")
        if self.activations not in PLACES:
            raise Mistake(f"model.activations must be one of {', '.join(PLACES)}, got {self.activations!r}")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise Mistake(f"model.batch_tokens must be positive, got {self.batch_tokens}")
        if self.store == "shards" and gguf_file.is_named(self.path):
            raise Mistake(
                f"model.store=shards reads a checkpoint block by block, and {self.path} is a GGUF file, "
                "which is loaded whole: use model.store=memory"
            )

        expressions.check("model.skip", self.skip)

    def tokens_at_once(self, device: torch.device) -> int:
        """The number of tokens of one forward pass, about."""
        return self.batch_tokens or usual_tokens_at_once(device)

    @property
    def display_name(self) -> str:
        return self.name or self.path.rstrip("/").rpartition("/")[2]

    @property
    def processes(self) -> int:
        """The number of CPU processes that `devices` asks for; 1 if it does not ask for processes."""
        kind, _, number = self.devices.partition(":")
        return int(number) if kind == "cpu" and number.isdecimal() and int(number) else 1

    def device(self) -> torch.device:
        """The first of `all_devices`; raises as that does."""
        return self.all_devices()[0]

    def all_devices(self) -> list[torch.device]:
        """The devices to compute on, one per process; raises Mistake for a GPU that does not exist."""
        import torch

        if self.devices == "auto" and torch.cuda.is_available():
            return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        if self.devices in ("auto", "cpu", f"cpu:{self.processes}"):
            return [torch.device("cpu")] * self.processes
        device = None
        with contextlib.suppress(RuntimeError):
            device = torch.device(self.devices)
        if device is None or device.type != "cuda":  # cpu:0, mps
            raise Mistake(
                f"model.devices must be auto, cpu, cuda or cuda:N, or cpu:N for N processes, got {self.devices!r}"
            )
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise Mistake(
                f"model.devices={self.devices} asks for a GPU, but PyTorch {torch.__version__} sees "
                f"{torch.cuda.device_count() or 'none'} here; use model.devices=auto or cpu"
            )
        return [device]


def usual_tokens_at_once(device: torch.device) -> int:
    """The default of `batch_tokens`; on a CPU more tokens would take memory and save no time."""
    return 1024 if device.type == "cpu" else 8192


def load(
    model: Model, folder: Path, ranks: Ranks | None = None, *, again: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Store]:
    """Loads the model in evaluation mode on the host, its tokenizer, and the store that holds the weights.

    `folder`: the store writes changed blocks there. Every rank loads the model. `again`: the next run of this process
    loads the same model, so a copy is cached if the host has enough memory. Raises FileNotFoundError, ValueError or
    ConnectionError with one sentence that names the file or model: missing or truncated shards, weights that the
    checkpoint lacks, a hub that cannot be reached.
    """
    from transformers import PretrainedConfig

    from esparse.models import cache
    from esparse.models.checkpoint import find
    from esparse.models.inputs import check_files, check_hub
    from esparse.models.store import MemoryStore
    from esparse.parallel.ranks import Ranks

    ranks = ranks or Ranks()
    path = model.path
    local = _place(model)
    if local.is_dir():
        check_files(local)
        path = str(local)
    elif local.is_file() and gguf_file.is_named(local):
        gguf_file.check(local)
        local = local.parent
        path = str(local)
    elif local.is_file():
        raise Mistake(
            f"model.path: {path} is a file, and a model is a directory with a config.json or a file that ends in .gguf"
        )
    elif path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"model.path: there is no {'file' if gguf_file.is_named(path) else 'directory'} {path}")
    if not local.is_dir():
        check_hub(path, model.revision)
    try:
        config, _ = PretrainedConfig.get_config_dict(path, **_where(model))
        name = identity(model)
    except (OSError, ValueError) as error:
        raise explained(model.path, local.is_dir(), error) from error
    check_config(model.path, config)
    if (loaded := cache.take(name)) is not None:
        log.debug("%s is as it was loaded for an earlier run of this process", model.display_name)
        return *(cache.keep(name, loaded) if again else loaded), MemoryStore(folder, ranks)
    tokenizer = _tokenizer(model, path, local.is_dir())
    try:
        whole = model.store == "memory" or gguf_file.is_named(model.path)
        entry = None if whole else find(path, revision=model.revision)
    except (OSError, ValueError) as error:
        raise explained(model.path, local.is_dir(), error) from error
    if entry is not None and ranks.from_first(lambda: model.store == "shards" or _too_large(entry, copies=ranks.size)):
        log.info("the weights of %s are read block by block from the checkpoint", model.display_name)
        skeleton, store = _streamed(model, path, entry, folder, ranks)
        _say(model, skeleton, tokenizer, ranks)
        return skeleton, tokenizer, store
    loaded = _loaded(model, path, local.is_dir()), tokenizer
    _say(model, *loaded, ranks)
    return *(cache.keep(name, loaded) if again else loaded), MemoryStore(folder, ranks)


def _tokenizer(model: Model, path: str, is_local: bool) -> PreTrainedTokenizerBase:
    """The tokenizer; raises Mistake if it has almost no vocabulary, which means that its files are missing."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path, **_where(model))
    except Exception as error:  # of many types, as below
        raise explained(model.path, is_local, error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **_where(model))
    except Exception as error:  # of many types: vocabulary readers, missing packages, remote code
        if is_local and not any((Path(path) / name).is_file() for name in VOCABULARIES):
            raise Mistake(
                f"{model.path} has no tokenizer: none of {', '.join(VOCABULARIES)} lies there; copy the model's own"
            ) from error
        raise explained(model.path, is_local, error, "tokenizer") from error
    embedded = getattr(config.get_text_config(), "vocab_size", None)
    tokens = len(tokenizer)
    if tokens <= FEW_TOKENS < (embedded or FEW_TOKENS):
        raise Mistake(
            f"the tokenizer of {model.path} has a vocabulary of {tokens} tokens, and the model one of {embedded:,}: "
            "its files (tokenizer.json, tokenizer.model or vocab.json) are missing, copy them beside config.json"
        )
    return tokenizer


def _say(model: Model, loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> None:
    """Logs warnings about flaws that do not stop a run."""
    from esparse.models.source import say_not_loaded

    if not ranks.leads:
        return
    say_not_loaded(loaded)
    if (settings := _place(model) / "generation_config.json").is_file():
        try:
            json_object(settings)
        except Mistake as error:  # transformers passes over it without a word
            log.warning("%s; until then those of config.json are taken, also into exports", error)
    rows = loaded.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        log.warning(
            "the tokenizer of %s has %d tokens and the model embeds %d: a text with one of the other tokens is refused",
            model.path,
            len(tokenizer),
            rows,
        )


def _where(model: Model) -> dict[str, Any]:
    place = _place(model)
    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    return where | (gguf_file.reading(place) if gguf_file.is_named(place) and place.is_file() else {})


def _place(model: Model) -> Path:
    """The model's path on this machine, if its path is not a name on the hub."""
    return BUILTIN if model.path == "builtin" else Path(model.path).expanduser()


def _too_large(entry: Path, *, copies: int) -> bool:
    from esparse.models.checkpoint import paths
    from esparse.models.host_memory import free_host_bytes

    return sum(path.stat().st_size for path in paths(entry)) * copies > free_host_bytes() / 2


def _loaded(model: Model, path: str, is_local: bool) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    from esparse.models.store import lacks, mismatch

    dtype = "auto" if model.dtype == "auto" else getattr(torch, model.dtype)
    place = _place(model)
    of_blocks = gguf_file.is_named(place)
    try:
        with gguf_file.quiet() if of_blocks else contextlib.nullcontext():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                experts_implementation="eager",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **_where(model),
                **(gguf_file.dequantised() if of_blocks else {}),
            )
    except MemoryError:
        raise
    except Exception as error:  # of many types, see `_tokenizer`
        if "memory" in str(error):
            raise
        raise explained(model.path, is_local, error) from error
    if info["mismatched_keys"]:
        raise Mistake(mismatch(model.path, *max(info["mismatched_keys"])))
    if info["missing_keys"]:
        raise Mistake(lacks(model.path, loaded, info["missing_keys"]))
    return _computable(model, gguf_file.made_plain(loaded, place) if of_blocks else loaded).eval()


def _streamed(model: Model, path: str, entry: Path, folder: Path, ranks: Ranks) -> tuple[PreTrainedModel, ShardStore]:
    """The model with its weights on the meta device, and the store that reads them from files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from esparse.models.checkpoint import Checkpoint
    from esparse.models.skeleton import empty_weights
    from esparse.models.store import ShardStore, stays_wide

    checkpoint = Checkpoint(entry)
    config = AutoConfig.from_pretrained(path, **_where(model))
    dtype = getattr(torch, model.dtype) if model.dtype != "auto" else config.dtype or checkpoint.dtype()
    # Buffers stay off the meta device, because the model computes them (rotary frequencies) when it is built.
    with empty_weights():
        skeleton = AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation="eager", trust_remote_code=model.trust_remote_code
        )
    skeleton.tie_weights()
    if skeleton.can_generate():  # an export carries it along: when a chat model ends its answer, for example
        with contextlib.suppress(OSError):  # without such a file the model's configuration decides, as in transformers
            skeleton.generation_config = GenerationConfig.from_pretrained(path, revision=model.revision)
    is_wide = stays_wide(skeleton, dtype)
    for owner_name, owner in skeleton.named_modules():
        for own, weight in list(owner.named_parameters(recurse=False)):
            if is_wide(f"{owner_name}.{own}") and weight.is_floating_point():
                owner._parameters[own] = torch.nn.Parameter(weight.float(), requires_grad=False)
    skeleton = _computable(model, skeleton).eval()
    return skeleton, ShardStore(skeleton, checkpoint, dtype=dtype, folder=folder, ranks=ranks)


def weight_files(model: Model) -> list[str]:
    """Name, size and modification time of each of a local model's files of weights; empty for a hub model."""
    folder = _place(model)
    if folder.is_file():
        return _stamps([folder])
    return _stamps(file for ending in ("safetensors", "bin") for file in folder.glob(f"*.{ending}"))


def identity(model: Model) -> str:
    """Identifies a model: its settings and the stamps of its files (of a hub model, those in the cache)."""
    from huggingface_hub import try_to_load_from_cache

    folder = _place(model)
    if folder.is_file():
        return f"{model} {_stamps([folder])}"
    if not folder.is_dir():
        cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return f"{model} {folder} {_stamps(folder.glob('*.*'))}"


def _stamps(files: Iterable[Path]) -> list[str]:
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in sorted(files)]


def shape_only(model: Model, device: torch.device | None = None) -> PreTrainedModel:
    """The model on the meta device, built from its configuration alone, without weights.

    The configuration is that of the directory or of the hub's cache, else the shape that comes with esparse
    (assets/shapes.json), and the log says so, else the hub's. `device`: where it would compute; None: as `model` says.
    Raises as `load` does if there is no configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = _place(model)
    path = str(place.parent if place.is_file() else place)
    config = None
    if not Path(path).is_dir():
        with contextlib.suppress(OSError, ValueError):
            config = AutoConfig.from_pretrained(path, local_files_only=True, **_where(model))
        if config is None and (config := published_config(model.path)) is not None:
            log.info("%s is not in the cache: its published shape is used as its configuration", model.path)
    try:
        config = config or AutoConfig.from_pretrained(path, **_where(model))
    except (OSError, ValueError) as error:
        raise explained(model.path, Path(path).is_dir(), error) from error
    dtype = getattr(torch, model.dtype) if model.dtype != "auto" else config.dtype or torch.float32
    if _is_slow(model, dtype, device):
        dtype = torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation="eager", trust_remote_code=model.trust_remote_code
        ).eval()


def published_config(name: str) -> PretrainedConfig | None:
    """The published configuration of a hub model that esparse has an option for; None for other names."""
    from transformers import AutoConfig

    shape = json.loads((ASSETS / "shapes.json").read_text(encoding="utf-8")).get(name)
    return None if shape is None else AutoConfig.for_model(**shape)


def _computable(model: Model, loaded: PreTrainedModel) -> PreTrainedModel:
    for config in (loaded.config, loaded.config.get_text_config()):
        config.return_dict = True  # with tuples, as old configurations ask for, transformers' own forward fails
    return loaded.float() if _is_slow(model, loaded.dtype) else loaded


def _is_slow(model: Model, dtype: torch.dtype, device: torch.device | None = None) -> bool:
    """Whether `dtype=auto` would mean float16 on a CPU, which is slow and imprecise there, so float32 is used."""
    import torch

    return model.dtype == "auto" and (device or model.device()).type == "cpu" and dtype == torch.float16


def longest_sequence(model: PreTrainedModel) -> int:
    """The number of positions the model was made for; 2048 if its config has none, like BLOOM's."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in LENGTHS)
    return next((int(length) for length in named if isinstance(length, int | float) and length > 0), 2048)

"""Counts what a run would take, from the model's configuration alone; esparse/run/dry_run.py says it in words.

The model is built of fake tensors, which have a shape and no memory, so that any machine can plan any model. Bytes of
weights, hidden states and statistics are counted on these tensors. Two numbers are estimates, and marked as such: the
memory of tensors inside a running block, and seconds (esparse/run/duration.py). The plan does not include the memory
of shuffles, updates and trainings of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from esparse.models import host_memory
from esparse.models.activations import tokens_at_once
from esparse.models.load import Model, longest_sequence, shape_only
from esparse.models.matrices import BlockMatrices, input_of
from esparse.models.model_parts import find_blocks
from esparse.models.training import in_half
from esparse.prepare import NoPreparation
from esparse.pruning.input_cache import room
from esparse.pruning.method import Method
from esparse.pruning.prune import check_skip
from esparse.run.duration import Rates, Work

USUAL_LENGTH = 2048  # default tokens of a sequence, if the model takes as many


class _Seen(Exception):
    """Ends the forward pass after the first block."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Plan:
    """Sizes in bytes."""

    display_name: str
    parameters: int
    pruned_weights: int
    blocks: int
    weights: int
    largest_block: int
    ends: int
    stream: int  # hidden states of all calibration sequences
    streams: int  # how many of them there are
    window: int  # hidden states of one evaluation window
    masks: int
    statistics: int  # of one block
    gradients: int  # of one block
    held: int  # inputs of one block that wait for a second pass of its statistics, at most
    copied: int  # a block's dense weights, which the dense stream has to pass when some of its layers are pruned
    working: int  # estimated: a micro-batch inside a block
    logits: int  # of a micro-batch
    distilled: int | None  # to train the whole model, on its device; None: nothing trains it
    passes: int  # most passes of all calibration sequences through a block; a second pass may need the inputs again
    streams_weights: bool  # whether blocks are read one by one
    on_disk: bool  # whether hidden states wait on the disk
    on_device: bool  # whether they wait on the GPU
    on_cpu: bool
    ranks: int  # processes that share the sequences
    work: Work
    rates: Rates | None = None  # of the machine that it is planned for; None: nothing is said of time

    def peaks(self) -> dict[str, tuple[int, int]]:
        """Host (of all processes) and device (of one) at each stage; on a CPU all is the host's."""
        kept = self.ends and (2 * self.largest_block if self.streams_weights else self.weights)
        streams = 0 if self.on_disk else self.stream * (self.streams + 1)
        # On the device each micro-batch replaces the one before it; of a dense stream the next block's wait beside it.
        beside = -(-self.stream * (self.streams + (self.streams > 1)) // self.ranks) if self.on_device else 0
        waiting = 0 if self.on_device else streams
        waiting += 0 if self.distilled is None else self.weights  # the dense parent
        at_work = {
            "embed": self.ends + self.working,
            "prune a block": self.largest_block
            + self.copied
            + self.statistics
            + self.gradients
            + self.held
            + self.working,
            "evaluate": max(self.ends + self.logits, self.largest_block + self.working),
        }
        if self.distilled is not None:
            at_work["distil"] = self.distilled
        peaks = {}
        for stage, of_stage in at_work.items():
            device = of_stage + beside
            host = self.ranks * (max(kept, self.ends) + (0 if stage == "embed" else self.masks)) + waiting
            if stage == "distil":
                host += self.weights  # what the weights were, to undo a training
            if self.on_cpu:  # a block at work is one of the two that are counted already, as are parent and student
                there = 2 * self.weights if stage == "distil" else self.largest_block if self.streams_weights else 0
                host += self.ranks * (device - there)
                device = 0
            peaks[stage] = (host, device)
        return peaks


def plan(
    model: Model,
    method: Method,
    *,
    display_name: str,
    sequences: int,
    length: int | None,
    window: int | None,
    ranks: int = 1,
    device: str | None = None,
    evaluated: Mapping[str, int | None] | None = None,
    gpu_memory: int | None = None,
) -> Plan:
    """The plan of a run with this many calibration sequences; `length` and `window` None: the model's longest.

    `ranks`: the processes that they are dealt out to. `device`: the kind that it is planned for; None: this machine's.
    `evaluated`: tokens of each corpus, None where they are not known. `gpu_memory`: bytes of a GPU that is elsewhere.
    """
    target = torch.device(device) if device else model.device()
    with FakeTensorMode():
        skeleton = shape_only(model, target)
        prefix, blocks = find_blocks(skeleton)
        check_skip({f"{prefix}.{index}": block for index, block in enumerate(blocks)}, model.skip, method.recovery)
        names = [f"{prefix}.{index}" for index in range(len(blocks))]
        pruned_of = {n: sum(p.numel() for p in _pruned(b, n, model.skip)) for n, b in zip(names, blocks, strict=True)}
        # The first block stands for all, under the name of one of which much is pruned: a skip may name whole blocks.
        groups = _groups(skeleton, blocks[0], max(names, key=pruned_of.__getitem__), model.skip)
        stream = skeleton.config.get_text_config().hidden_size
        statistics = sum(_statistics(method, *group, stream, sequences) for group in groups)
    of_blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    weights = sum(p.nbytes for p in skeleton.parameters())
    element, longest = skeleton.dtype.itemsize, min(longest_sequence(skeleton), USUAL_LENGTH)
    hidden = skeleton.config.get_text_config().hidden_size * element
    pruned = sum(pruned_of.values())
    length = length or longest
    at_once = (
        1
        if method.sequences_at_once() == 1
        else max(1, min(-(-sequences // ranks), model.tokens_at_once(target) // length))
    )
    vocabulary = skeleton.get_input_embeddings().weight.shape[0]
    of_sequence = length * (2 * hidden + element * sum(outputs for _, outputs in groups))  # inside a block, estimated
    stream, free = sequences * length * hidden, host_memory.free_host_bytes()
    inputs = sum(width for width, _ in groups) * -(-sequences // ranks) * length * element  # of experts at most
    inputs = min(inputs, _room(model, target, ranks, gpu_memory if device else None))
    return Plan(
        display_name=display_name,
        parameters=sum(p.numel() for p in skeleton.parameters()),
        pruned_weights=pruned,
        blocks=len(blocks),
        weights=weights,
        largest_block=max(of_blocks),
        ends=weights - sum(of_blocks),
        stream=stream,
        streams=1 + method.needs_dense_stream(),
        window=(window or longest) * hidden,
        masks=pruned // 8,
        statistics=statistics,
        gradients=8 * max(of_blocks) // element if method.metric.gradients() == "block" else 0,
        held=inputs if _observations(method) > 1 else 0,
        copied=max(of_blocks) if method.sequential() and method.needs_dense_stream() else 0,
        working=at_once * of_sequence,
        logits=at_once * length * vocabulary * element + length * vocabulary * 4,
        distilled=_distilled(
            skeleton,
            method,
            pruned,
            at_once=at_once,
            logits=lambda several: several * min(length, tokens_at_once(target, several, vocabulary)) * vocabulary,
            working=len(blocks) * of_sequence,
        ),
        passes=_passes(method),
        streams_weights=method.needs_whole_model() is None
        and (model.store == "shards" or (model.store == "auto" and weights * ranks > free / 2)),
        on_disk=model.activations == "disk" or (model.activations == "auto" and stream > free / 4),
        on_device=model.activations == "device" and target.type != "cpu",
        on_cpu=target.type == "cpu",
        ranks=ranks,
        work=_work(
            skeleton,
            blocks,
            groups,
            method,
            tokens=sequences * length,
            length=length,
            window=window or longest,
            at_once=at_once,
            evaluated=evaluated or {},
        ),
    )


def _work(
    skeleton: Any,
    blocks: nn.ModuleList,
    groups: list[tuple[int, int]],
    method: Method,
    *,
    tokens: int,
    length: int,
    window: int,
    at_once: int,
    evaluated: Mapping[str, int | None],
) -> Work:
    """The forward passes' arithmetic: two FLOP for each weight and token, four for each pair of tokens and channel."""
    config, element = skeleton.config.get_text_config(), skeleton.dtype.itemsize
    matrices = [p for block in blocks for p in block.parameters() if p.ndim > 1]
    share = _experts_share(config)
    active = sum(p.numel() if p.ndim == 2 else round(p.numel() * share) for p in matrices)
    heads = getattr(config, "num_attention_heads", None) or 1
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    passes = _passes(method)

    def forward(count: int, span: int) -> int:
        return count * (2 * active + len(blocks) * 4 * span * width)

    head = skeleton.get_input_embeddings().weight.numel()  # as large as the head
    known = [count for count in evaluated.values() if count is not None]
    grams = sum(inputs**2 for inputs, _ in groups) if "gram" in method.collects() else 0
    inside = sum(outputs for _, outputs in groups) + 2 * config.hidden_size
    batches = max(1, tokens // (at_once * length))
    return Work(
        calibration=passes * forward(tokens, length),
        statistics=2 * tokens * grams * len(blocks),
        training=round(
            sum(
                of.passes * (forward(tokens, length) + of.whole * 2 * tokens * head)
                for of in method.recovery.trainings()
            )
        ),
        evaluation=2 * sum(forward(count, window) + 2 * count * head for count in known),
        moved=passes
        * len(blocks)
        * (batches * sum(p.nbytes for p in blocks[0].parameters()) + 2 * tokens * inside * element),
        not_counted=tuple(corpus for corpus, count in evaluated.items() if count is None),
    )


def _experts_share(config: Any) -> float:
    """Of a layer of experts the share that a token passes through; 1 where the configuration does not say."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return min(1.0, chosen / experts) if experts and chosen else 1.0


def _distilled(
    skeleton: Any, method: Method, pruned: int, *, at_once: int, logits: Callable[[int], int], working: int
) -> int | None:
    """The bytes of training the whole model: distill_training's module docstring says how many of what.

    `logits`: how many are there at once, by sequences of a micro-batch: both models' own and, in float32, those, their
    logarithms and a gradient. `working`: the bytes of a sequence inside all blocks, which a backward pass needs again.
    """
    everything = sum(p.numel() for p in skeleton.parameters())
    element = skeleton.dtype.itemsize
    needs = []
    for training in method.recovery.trainings():
        if training.whole:
            # LoRA leaves the student in the dtype of its products, and adds a copy of what is pruned
            added = training.trained == "added"
            held = element if added and in_half(training.products, skeleton.dtype) else 4
            trained = held * pruned if added else 12 * (everything if training.trained == "all" else pruned)
            several = min(at_once, training.sequences)
            moving = several * working + logits(several) * (2 * element + 5 * 4)
            needs.append(everything * (element + held) + trained + pruned + moving)  # a byte of mask per pruned weight
    return max(needs, default=None)


def _passes(method: Method) -> int:
    """Passes through each block: to observe it (once or twice), to advance, and those that parts of the method add."""
    prepared = 0 if isinstance(method.prepare, NoPreparation) else 1
    observations = _observations(method)
    passes = (
        observations
        + 1
        + prepared
        + method.needs_dense_stream()
        + 2 * method.update.needs_dense_stream()
        # Of LLaMA's four inputs three are observed again, in both streams, by passes that end at the layer.
        + 4 * method.sequential()
        + (method.metric.gradients() != "none")
    )
    if method.allocation.measures():
        passes += observations + 1
    return passes


def _room(model: Model, target: torch.device, ranks: int, gpu_memory: int | None) -> int:
    """Bytes that inputs may take on the device; of a GPU that is elsewhere, and whose size is not known, no limit."""
    if target.type == "cpu" or (torch.cuda.is_available() and gpu_memory is None):
        free = host_memory.free_bytes(target)
    else:
        free = gpu_memory or 2**62
    return room(free, target, beside_host=model.activations != "device", ranks=ranks)


def _observations(method: Method) -> int:
    """Passes of the statistics."""
    device = torch.device("cpu")
    return max(build(inputs=1, sequences=1, device=device).passes for build in method.collects().values())


def _groups(skeleton: nn.Module, block: nn.Module, name: str, skip: list[str]) -> list[tuple[int, int]]:
    """Inputs and all outputs of the layers that read one tensor, found by running the first block under this name.

    If routing depends on values, which fake tensors lack, each layer behind it counts as a group.
    """
    matrices = BlockMatrices(block, name, skip)
    layers = {path: m for path, m in block.named_modules() if f"{name}.{path}.weight" in matrices.parameters()}
    entered: dict[int, tuple[Tensor, list[nn.Module]]] = {}

    def enter(layer: nn.Module, args: Any, kwargs: Any) -> None:
        x = input_of(args, kwargs)
        entered.setdefault(id(x), (x, []))[1].append(layer)  # held, so that no id is used twice

    def stop(*_: Any) -> None:
        raise _Seen

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers.values()]
    hooks.append(block.register_forward_hook(stop))
    try:
        skeleton(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False)
    except (_Seen, DynamicOutputShapeException):
        pass
    finally:
        for hook in hooks:
            hook.remove()
    seen = {layer for _, together in entered.values() for layer in together}
    together_list = [together for _, together in entered.values()]
    together_list += [[layer] for layer in layers.values() if layer not in seen]
    found = [(_sides(together[0])[0], sum(_sides(layer)[1] for layer in together)) for together in together_list]
    for parameter in matrices.parameters().values():
        if parameter.ndim == 3:  # experts: which side is the input is not known, so the longer one
            found += [(max(parameter.shape[1:]), min(parameter.shape[1:]))] * parameter.shape[0]
    return found


def _sides(layer: nn.Module) -> tuple[int, int]:
    first, second = layer.get_parameter("weight").shape
    return (second, first) if isinstance(layer, nn.Linear) else (first, second)


def _pruned(block: nn.Module, name: str, skip: list[str]) -> list[nn.Parameter]:
    return list(BlockMatrices(block, name, skip).parameters().values())


def _statistics(method: Method, width: int, outputs: int, stream: int, sequences: int) -> int:
    """The bytes of one input group's statistics, with room for the samples that they will take.

    Layers as wide as the residual stream (`stream`) are taken to add to it.
    """
    total = 0
    for name, build in method.collects().items():
        if name == "stream":
            if outputs != stream:
                continue
            build = partial(build, outputs=outputs)
        statistic = build(inputs=width, sequences=sequences, device=torch.device("meta"))
        total += sum(value.nbytes for value in vars(statistic).values() if isinstance(value, Tensor))
        total += getattr(statistic, "most", 0) * width * 4
    return total

"""The training of `recovery=distill`.

The whole parent and the whole student are on the device, and a byte of mask per pruned weight. Trained weights are
float32, whatever the model's dtype: the student takes 4 bytes per parameter, and per trained weight 12 bytes more
(gradient, two moments of AdamW). LoRA trains almost nothing, but the model computes with a second copy of the pruned
weights; where products are in bfloat16, both copies are (4 bytes per pruned weight in all), else float32 (8 bytes). The
activations of a micro-batch in all blocks come on top; if they do not fit, lower `model.batch_tokens`. Logits are there
for a part of the tokens at once, if the head is the last that computes on them. A copy of the trained parameters stays
on the host, in case the training has to be undone.

Shapes: S sequences, L tokens, B sequences of a micro-batch, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax

from esparse.models.blocks import BlockModel
from esparse.models.head import hidden_states, parts, plain_head
from esparse.models.training import at_rate, improved, in_float32, in_half, masked, rate, requiring_grad
from esparse.records.report import RecoveryReport
from esparse.recoveries.masked_parameters import Lora, MaskedParameter, Whole, dropped, lasso

if TYPE_CHECKING:
    from esparse.recoveries.distill import Distill

log = logging.getLogger("esparse")

MEASURED = 16  # sequences on which the loss is measured before and after: all of them took as long as a pass


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The pruned model (student) and the dense model that it came from (parent)."""

    student: BlockModel
    parent: nn.Module
    temperature: float
    heads: tuple[nn.Module, nn.Module] | None  # of both, if nothing comes behind them: logits are computed part by part

    @classmethod
    def of(cls, student: BlockModel, parent: nn.Module, temperature: float, tokens_SL: Tensor) -> Pair:
        """The two, of which both lie on the student's device."""
        first_BL = tokens_SL[:1].to(student.device)
        ours, theirs = (plain_head(model, first_BL) for model in (student.model, parent))
        return cls(student, parent, temperature, None if ours is None or theirs is None else (ours, theirs))

    def divergence(
        self, tokens_BL: Tensor, weights: Mapping[str, Tensor], *, half: bool = False, share: float | None = None
    ) -> float:
        """`divergence` of a micro-batch, summed, of the student with these weights in place of its own.

        `half`: its products are computed in bfloat16, whatever its weights are in. `share`: the gradients of this
        multiple of the sum are added to what the weights have; None: none are.
        """
        inputs = {"input_ids": tokens_BL.to(self.student.device), "use_cache": False}
        autocast = partial(torch.autocast, self.student.device.type, torch.bfloat16, enabled=half)

        def student() -> Any:
            return functional_call(self.student.model, dict(weights), kwargs=inputs)

        if self.heads is None:
            with torch.no_grad():
                wanted_BLV = self.parent(**inputs).logits
            with autocast():
                got_BLV = student().logits
            return self._add(wanted_BLV, got_BLV, share)
        ours, theirs = self.heads
        with torch.no_grad():
            wanted_BLH = hidden_states(theirs, lambda: self.parent(**inputs))
        with autocast():
            hidden_BLH = hidden_states(ours, student)
        ends_BLH = hidden_BLH.detach().requires_grad_(share is not None)  # collects the gradients of all parts
        found = 0.0
        for part in parts(wanted_BLH, self.student.model.get_input_embeddings().weight.shape[0]):
            with torch.no_grad():
                wanted_BLV = theirs(wanted_BLH[:, part])
            with autocast():
                got_BLV = ours(ends_BLH[:, part])
            found += self._add(wanted_BLV, got_BLV, share)
        if share is not None:
            hidden_BLH.backward(ends_BLH.grad)
        return found

    def _add(self, wanted_BLV: Tensor, got_BLV: Tensor, share: float | None) -> float:
        summed = divergence(wanted_BLV, got_BLV, self.temperature)
        if share is not None:
            (share * summed).backward()
        return summed.item()

    @torch.no_grad()
    def mean(self, tokens_SL: Tensor) -> float:
        """The present student's divergence per token over all sequences."""
        found = (self.divergence(tokens_BL, {}) for tokens_BL in self.student.micro_batches(tokens_SL))
        return math.fsum(found) / tokens_SL.numel()


def divergence(parent_BLV: Tensor, student_BLV: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(parent / T) || softmax(student / T)) in nats, summed over all tokens.

    The factor T^2 keeps the size of the gradients. Computed in float32. A token that the parent forbids (-Inf) adds 0.
    """
    log_p, log_q = (log_softmax(logits.float() / temperature, dim=-1) for logits in (parent_BLV, student_BLV))
    kl_BLV = kl_div(log_q, log_p, reduction="none", log_target=True).masked_fill_(log_p == -math.inf, 0.0)
    return temperature**2 * kl_BLV.sum(-1).sum(dtype=torch.float64)


def distill(
    settings: Distill,
    student: BlockModel,
    parent: nn.Module,
    samples: Sequence[Tensor],
    weights: Sequence[MaskedParameter],
    seed: int,
    *,
    measured_SL: Tensor,
) -> RecoveryReport:
    """Trains the student; restores it if the loss on the first MEASURED sequences of `measured_SL` has risen.

    `samples`: S x L tokens, one or more; each pass reads the next one, and begins again behind the last. The loss on
    tokens that an update has fitted the weights to may rise while that on others falls.

    Raises Mistake if the loss is NaN or Inf before training.
    """
    start, tokens_SL = time.perf_counter(), samples[0]
    if settings.fresh and settings.epochs > 1 and len(samples) == 1:
        log.info("the calibration was given as tokens: every pass of the distillation reads the same ones")
    with _on_device(student.model, student.device), _on_device(parent, student.device):
        pair = Pair.of(student, parent, settings.temperature, tokens_SL)
        trained = list(student.model.parameters()) if settings.all_parameters else [of.parameter for of in weights]
        before, after, steps = improved(
            "the whole model",
            trained,
            lambda: pair.mean(measured_SL[:MEASURED]),
            lambda: _train(settings, pair, samples, weights, trained, torch.Generator().manual_seed(seed)),
        )
    return RecoveryReport("model", "kl", before, after, steps, time.perf_counter() - start)


def _train(
    settings: Distill,
    pair: Pair,
    samples: Sequence[Tensor],
    weights: Sequence[MaskedParameter],
    parameters: Sequence[nn.Parameter],
    generator: torch.Generator,
) -> int:
    """Trains the parameters, or LoRA on the masked parameters; returns the number of steps."""
    model = pair.student.model
    half = in_half(settings.products, weights[0].parameter.dtype)
    # What LoRA adds is float32; the model's own weights do not change before the end, so that they may stay as they are
    with nullcontext() if half and settings.train == "lora" else in_float32(model):
        trained: Whole | Lora = Whole(weights, parameters)
        if settings.train == "lora":
            trained = Lora(weights, settings.rank, settings.alpha, generator)
        with requiring_grad(model, parameters if settings.train == "full" else ()), masked(trained.kept):
            steps = _steps(settings, pair, samples, weights, trained, generator, half=half)
        trained.merge()
    for of in weights:
        of.settle()
    return steps


def _steps(
    settings: Distill,
    pair: Pair,
    samples: Sequence[Tensor],
    weights: Sequence[MaskedParameter],
    trained: Whole | Lora,
    generator: torch.Generator,
    *,
    half: bool,
) -> int:
    groups = at_rate(trained.leaves, settings.learning_rate, scaled=settings.scaled)
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    regularised = _with_groups(weights) if settings.lasso or settings.dropout else []
    total = settings.epochs * -(-len(samples[0]) // settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, total, warm_up=settings.warm_up))
    for epoch in range(settings.epochs):
        seen, tokens_SL = 0.0, samples[epoch % len(samples)]
        for chosen in torch.randperm(len(tokens_SL), generator=generator).split(settings.batch):
            factors = dropped(regularised, settings.dropout, generator) if settings.dropout else {}
            seen += _backward(settings, pair, tokens_SL[chosen], trained, regularised, factors, half=half)
            if settings.clip is not None:
                torch.nn.utils.clip_grad_norm_(trained.leaves, settings.clip)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        log.info("distillation, epoch %d of %d: KL %.4g", epoch + 1, settings.epochs, seen / tokens_SL.numel())
    return total


def _backward(
    settings: Distill,
    pair: Pair,
    tokens_BL: Tensor,
    trained: Whole | Lora,
    regularised: Sequence[MaskedParameter],
    factors: Mapping[str, Tensor],
    *,
    half: bool,
) -> float:
    """Accumulates the gradients of one step; returns the divergence, summed over the step's tokens."""
    seen = 0.0
    for part_BL in pair.student.micro_batches(tokens_BL):
        weights = trained.weights()
        weights |= {name: (weights[name] * factor).to(weights[name].dtype) for name, factor in factors.items()}
        seen += pair.divergence(part_BL, weights, half=half, share=1 / tokens_BL.numel())
    if settings.lasso and regularised:
        (settings.lasso * lasso(regularised, trained.weights())).backward()
    return seen


def _with_groups(weights: Sequence[MaskedParameter]) -> list[MaskedParameter]:
    """The parameters with groups, on which the regularisers work; the log names the others."""
    left_out = [of.entry for of in weights if any(grouping.pattern.swap_width is None for grouping in of.groupings)]
    if left_out:
        log.warning("lasso and dropout skip layers with a pattern without groups: %s", ", ".join(left_out))
    return [of for of in weights if of.entry not in left_out]


@contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    home = next(model.parameters()).device
    try:
        model.to(device)
        yield
    finally:
        model.to(home)

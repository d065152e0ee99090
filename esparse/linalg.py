"""Linear algebra on the Gram matrix G = X^T X of a layer's input, for the layer error tr(D G D^T), D = W_dense - W.

Shapes: O outputs, I inputs; each row of a weight matrix is a separate problem.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from esparse.errors import Mistake

log = logging.getLogger("esparse")

MOST_DAMPING = 100.0  # times the mean of the diagonal; beyond it the matrix is practically the identity


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or Inf; usually one pass, because the sum is finite only if all values are."""
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())


def finite(x: Tensor) -> Tensor:
    """`all_finite` as a tensor on the device, without waiting; float64 sums of narrower values cannot overflow."""
    return torch.isfinite(x.sum(dtype=torch.float64))


def multiplies_into_float32(x: Tensor) -> bool:
    """Whether `torch.mm(x.T, x, out_dtype=torch.float32)` supports x: matrix units with float32 sums."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.device.type == "cuda"
        and torch.version.cuda is not None
        and "dtype" in torch.ops.aten.mm.overloads()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def damped(gram_II: Tensor, share: float) -> Tensor:
    """G with `share` of its mean diagonal added to the diagonal.

    A channel that is zero on all tokens has a row and a column of zeros; its diagonal entry becomes the mean, too, so
    that it does not affect other channels.
    """
    diagonal_I = gram_II.diagonal()
    mean = diagonal_I.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    extra_I = torch.where(diagonal_I > 0, share * mean, mean)
    return gram_II + extra_I.diag()


def inverse_factor(gram_II: Tensor, damp: float) -> Tensor:
    """The upper triangular U with U^T U = (G + damping)^-1, as SparseGPT's sweep needs it (float32, I x I).

    The damping starts at `damp` times the mean of the diagonal. If there is no Cholesky factor in float32, float64 is
    tried, then ten times the damping, and so on; the log says so. Raises Mistake if G holds NaN or Inf.
    """
    if not all_finite(gram_II):
        raise Mistake("the Gram matrix of a layer's input holds NaN or Inf: try model.dtype=float32")
    share = damp
    while share <= MOST_DAMPING:
        for dtype in (torch.float32, torch.float64):
            # With the channels in reverse order the factor M M^T becomes R R^T with R upper triangular: that takes one
            # factorisation and one triangular inverse; inverting first would take two factorisations.
            flipped_II = damped(gram_II.to(dtype), share).flip(0, 1)
            lower_II, failed = torch.linalg.cholesky_ex(flipped_II)
            if failed == 0:
                upper_II = lower_II.flip(0, 1)
                del flipped_II, lower_II  # each is as large as G
                one_II = torch.eye(len(upper_II), dtype=dtype, device=upper_II.device)
                inverse_II = torch.linalg.solve_triangular(upper_II, one_II, upper=True).float()
                if all_finite(inverse_II):
                    if share > damp:
                        log.warning("a Gram matrix was singular: damping raised from %g to %g of its mean", damp, share)
                    return inverse_II
        share = max(share * 10, 1e-6)
    raise Mistake(f"a Gram matrix has no Cholesky factor even with damping {MOST_DAMPING:g} times its mean")


def inverse(gram_II: Tensor) -> Tensor:
    """G^-1, with the dtypes and damping of `inverse_factor`, starting without damping."""
    upper_II = inverse_factor(gram_II, 0.0)
    return upper_II.T @ upper_II


def shifted_inverse(gram_II: Tensor, shift: float) -> Tensor:
    """(G + shift)^-1 in G's dtype for a positive definite sum; falls back to `inverse`."""
    shifted_II = gram_II + shift * torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    lower_II, failed = torch.linalg.cholesky_ex(shifted_II)
    return torch.cholesky_inverse(lower_II) if failed == 0 else inverse(shifted_II).to(gram_II.dtype)


def inverse_times(x_OI: Tensor, gram_II: Tensor, damp: float) -> Tensor:
    """X (G + damping)^-1, with the damping of `inverse_factor`."""
    upper_II = inverse_factor(gram_II, damp)
    return x_OI @ upper_II.T @ upper_II


def solve_on_support(
    gram_II: Tensor, dense_OI: Tensor, keep_OI: Tensor, start_OI: Tensor, *, iterations: int, tolerance: float
) -> Tensor:
    """The kept weights that minimise tr((W_dense - W) G (W_dense - W)^T), for all rows at once.

    Conjugate gradients with the diagonal as preconditioner, from `start_OI`; ends after `iterations`, or when every
    row's residual has fallen to `tolerance` times its first value. No row's error ever rises.
    """
    inverse_I = gram_II.diagonal().clamp_min(torch.finfo(gram_II.dtype).tiny).reciprocal()
    weight_OI = start_OI * keep_OI
    residual_OI = ((dense_OI - weight_OI) @ gram_II) * keep_OI
    scaled_OI = residual_OI * inverse_I
    direction_OI = scaled_OI.clone()
    energy_O = (residual_OI * scaled_OI).sum(1)
    enough_O = energy_O * tolerance**2
    for _ in range(iterations):
        if (energy_O <= enough_O).all():
            break
        image_OI = (direction_OI @ gram_II) * keep_OI
        curvature_O = (direction_OI * image_OI).sum(1)
        step_O = torch.where(curvature_O > 0, energy_O / curvature_O, 0.0)
        weight_OI += step_O[:, None] * direction_OI
        residual_OI -= step_O[:, None] * image_OI
        scaled_OI = residual_OI * inverse_I
        last_O, energy_O = energy_O, (residual_OI * scaled_OI).sum(1)
        direction_OI = scaled_OI + torch.where(last_O > 0, energy_O / last_O, 0.0)[:, None] * direction_OI
    return weight_OI


def scaled(gram_II: Tensor) -> tuple[Tensor, Tensor]:
    """G with every channel scaled to norm 1, and the norms; W * norm is the weight matrix for the scaled input."""
    norm_I = gram_II.diagonal().clamp_min(0).sqrt() + 1e-8
    return gram_II / (norm_I[:, None] * norm_I), norm_I

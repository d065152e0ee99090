"""Rotated heads: each attention head's values in the principal axes of what the output projection reads of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esparse.prepare import Prepare

if TYPE_CHECKING:
    from torch import Tensor

    from esparse.models.block import Block
    from esparse.models.matrices import InputGroup
    from esparse.models.producers import Edge

log = logging.getLogger("esparse")

Heads = list[list[int]]  # heads of a tensor that read the same rows of its producer


@dataclass(kw_only=True, slots=True)
class RotateHeads(Prepare):
    """Rotates the values of every head (SpinQuant's R2, arXiv 2405.16406, here by principal axes instead of learned).

    The rows of v_proj that make one head are multiplied by R^T, and the columns of o_proj that read it by R, the
    eigenvectors of the head's Gram matrix; query heads that share a value head share R and add their Gram matrices.
    A few channels then carry most of what o_proj reads. Axes of large and small eigenvalues take turns, so that no
    group of an N:M pattern has only large ones. The model computes what it did, and costs nothing more.
    """

    def block(self, block: Block) -> None:
        from esparse.models.graph import BlockGraph

        graph = BlockGraph(block)
        sizes = head_sizes(block)
        grams: dict[tuple[InputGroup, int], Tensor] = {}

        def read(group: InputGroup, x_TI: Tensor) -> None:
            for size in sizes:
                if group.inputs % size == 0:
                    x_HTs = x_TI.float().unflatten(1, (-1, size)).transpose(0, 1)
                    gram_Hss = x_HTs.mT @ x_HTs
                    grams[group, size] = grams[group, size] + gram_Hss if (group, size) in grams else gram_Hss

        graph.watch(read)
        pruned = set(block.matrices().parameters())
        rotated: list[str] = []
        for edge in (edge for together in graph.edges()[0] for edge in together):
            if edge.producer.matrix is None or edge.producer.matrix.expert is not None:
                continue
            names = [matrix.name for group in edge.groups for matrix in group.matrices if matrix.entry in pruned]
            for size in sizes if names else []:
                [group] = edge.groups
                heads = shared_heads(edge.producer.row_of_I, size)
                if heads and (group, size) in grams:
                    axes = [axes_ss(grams[group, size][of].sum(dim=0)) for of in heads]
                    if graph.changed([edge], lambda edge: rotate(edge, heads, axes)):  # noqa: B023 - called at once
                        rotated += names
                        break
        if not rotated:
            log.warning(
                "no heads rotated in %s: no matrix that only it has makes values that another one reads", block.name
            )


def head_sizes(block: Block) -> list[int]:
    """The widths that a head may have by the model's configuration, the largest first."""
    config = block.activations.blocks.model.config.get_text_config()
    named = [value for name, value in config.to_dict().items() if "head_dim" in name or name == "d_kv"]
    sizes = {value for value in named if isinstance(value, int)}
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if isinstance(width, int) and isinstance(heads, int):
        sizes.add(width // heads)
    return sorted((size for size in sizes if size > 1), reverse=True)


def shared_heads(row_of_I: Tensor, size: int) -> Heads:
    """Sets of heads, `size` channels each, made by the same rows; empty if heads have only some rows in common."""
    if len(row_of_I) % size:
        return []
    of_rows: dict[tuple[int, ...], list[int]] = {}
    for head, rows in enumerate(row_of_I.view(-1, size).tolist()):
        of_rows.setdefault(tuple(rows), []).append(head)
    all_rows = [row for rows in of_rows for row in rows]
    return list(of_rows.values()) if len(set(all_rows)) == len(all_rows) else []


def axes_ss(gram_ss: Tensor) -> Tensor:
    """The eigenvectors of a Gram matrix as columns, in float64, those of large and small eigenvalues in turns.

    Any 2, 4, 8, ... consecutive ones from a multiple of their number on have eigenvalues spread over the whole range.
    """
    import torch

    vectors_ss = torch.linalg.eigh(gram_ss.double().cpu())[1].flip(1)
    # An eigenvector's sign is arbitrary: the largest entry is positive, so that machines agree.
    largest_s = vectors_ss.gather(0, vectors_ss.abs().argmax(dim=0, keepdim=True))
    return (vectors_ss * largest_s.sign())[:, spread(len(vectors_ss))]


def spread(size: int) -> list[int]:
    """0 ... size - 1 by their bits read backwards."""
    width = max(1, (size - 1).bit_length())
    return sorted(range(size), key=lambda i: int(f"{i:0{width}b}"[::-1], 2))


def rotate(edge: Edge, heads: Heads, axes: list[Tensor]) -> None:
    """Multiplies the rows that make each set of heads by R^T, and the columns that read them by R."""
    for of, axes_ss in zip(heads, axes, strict=True):
        size = len(axes_ss)
        first = of[0] * size
        rows = edge.producer.row_of_I[first : first + size]
        for stored, _ in edge.producer.parts:
            wide = stored[rows].to(axes_ss)
            stored[rows] = (axes_ss.T @ wide).to(stored)
        for matrix in (matrix for group in edge.groups for matrix in group.matrices):
            weight_OI = matrix.view()
            for head in of:
                columns = slice(head * size, (head + 1) * size)
                weight_OI[:, columns] = (weight_OI[:, columns].to(axes_ss) @ axes_ss).to(weight_OI)

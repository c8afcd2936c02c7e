"""Linear algebra: a matrix that is factored, inverted or measured stays as it is; a batch of them passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prunus.labels import Dims, Label, Labelled
from prunus.rules.contractions import contract, plus
from prunus.rules.joins import fix
from prunus.rules.pointwise import combine
from prunus.rules.table import Op, rule

aten = torch.ops.aten


@rule(
    "aten::_linalg_det",
    "aten::_linalg_eigh",
    "aten::_linalg_eigvals",
    "aten::_linalg_slogdet",
    "aten::_linalg_solve_ex",
    "aten::_linalg_svd",
    "aten::cholesky_inverse",
    "aten::cholesky_solve",
    "aten::geqrf",
    "aten::linalg_cholesky_ex",
    "aten::linalg_eig",
    "aten::linalg_eigvals",
    "aten::linalg_householder_product",
    "aten::linalg_inv_ex",
    "aten::linalg_ldl_factor_ex",
    "aten::linalg_ldl_solve",
    "aten::linalg_lstsq",
    "aten::linalg_lu",
    "aten::linalg_lu_factor_ex",
    "aten::linalg_lu_solve",
    "aten::linalg_matrix_exp",
    "aten::linalg_pinv",
    "aten::linalg_qr",
    "aten::linalg_solve_triangular",
    "aten::lu_unpack",
    "aten::ormqr",
    "aten::triangular_solve",
)
def matrix(op: Op, *args: Any, **kwargs: Any) -> list[Dims | None]:
    """Every entry of a matrix takes part in every entry of the result; leading dims are batches."""
    reason = f"{op.name} works on whole matrices"
    lead = max((t.ndim for t in op.inputs), default=2) - 2
    batch: list[Label | None] = [None] * lead
    for tensor in op.inputs:
        fixed = fix(op, tensor, range(max(0, tensor.ndim - 2), tensor.ndim), reason)
        for d in range(fixed.ndim - 2):
            if tensor.ndim - 2 < lead or len(op.inputs) > 1:
                op.freeze([fixed.dims[d]], reason)
            else:
                batch[d] = fixed.dims[d]
    return [(*batch, *[None] * (len(s) - lead)) if len(s) >= lead else (None,) * len(s) for s in op.shapes]


@rule(aten.trace, aten.block_diag, aten.dist, aten._pdist_forward)
def whole(op: Op, *args: Any, **kwargs: Any) -> Dims:
    """One result of all positions, which are told apart."""
    for tensor in op.inputs:
        op.freeze(tensor.dims, f"{op.name} reads it by position")
    return (None,) * len(op.shape)


@rule(aten.linalg_cross)
def cross(op: Op, a: Labelled, b: Labelled, *, dim: int = -1) -> Dims:
    """Vectors of three numbers along ``dim``."""
    fixed = [fix(op, t, (dim,), "it holds the three coordinates of a vector") for t in (a, b)]
    return combine(op, fixed, op.shape)


@rule(aten._cdist_forward, aten._euclidean_dist)
def distances(op: Op, a: Labelled, b: Labelled, *args: Any) -> Dims:
    """``... p m, ... r m -> ... p r``: the distance of each pair of rows."""
    lead = [*range(max(a.ndim, b.ndim) - 2)]
    letters = [[*lead[len(lead) + 2 - t.ndim :], row, 102] for t, row in ((a, 100), (b, 101))]
    return contract(op, [a, b], letters, [*lead, 100, 101], counted=False)


@rule(aten.addr)
def addr(op: Op, bias: Labelled, a: Labelled, b: Labelled, **kwargs: Any) -> Dims:
    """An outer product plus a matrix."""
    return plus(op, bias, contract(op, [a, b], [[0], [1]], [0, 1], counted=False))


@rule(aten._trilinear)
def trilinear(
    op: Op, a: Labelled, b: Labelled, c: Labelled, expand1: Sequence[int], expand2: Sequence[int],
    expand3: Sequence[int], sumdim: Sequence[int], *args: Any,
) -> Dims:  # fmt: skip
    """A product of three tensors, each with new dims at ``expand``, summed over ``sumdim``."""
    total = a.ndim + len(expand1)
    letters = [[d for d in range(total) if d not in new] for new in (expand1, expand2, expand3)]
    sizes: dict[int, tuple[int, Label | None]] = {}
    for tensor, names in zip((b, a, c), letters[1:2] + letters[:1] + letters[2:], strict=True):
        for name, n, label in zip(names, tensor.shape, tensor.dims, strict=True):
            sizes.setdefault(name, (n, label))
    op.count(*sizes.values())
    return contract(op, [a, b, c], letters, [d for d in range(total) if d not in sumdim], counted=False)

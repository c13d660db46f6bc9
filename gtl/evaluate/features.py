"""What metrics are computed from: rows of numbers, a row an image, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from gtl.config.metrics import metric
from gtl.types import UserError


def checked(name: str, /, **features: Tensor) -> list[Tensor]:
    """The features of a metric as float64 on the CPU, in the order given.

    Args:
        name: The metric's.
        features: Tensors [rows, features], by the names that the table of metrics gives them.

    Raises:
        UserError: one is no table of finite numbers or has too few rows, or they differ in their number of features.
    """
    fewest = metric(name).needs
    first = next(iter(features))
    for part, rows in features.items():
        where = f"{name}: {part}"
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise UserError(f"{where}: shape {tuple(rows.shape)}; expected [images, features]")
        if len(rows) < fewest[part]:
            raise UserError(f"{where}: {len(rows)} rows; at least {fewest[part]} are needed")
        if rows.shape[1] != features[first].shape[1]:
            raise UserError(
                f"{where}: {rows.shape[1]} features a row where {first} has {features[first].shape[1]}; "
                "both have to come from one extractor"
            )
        wrong = (~rows.isfinite().all(dim=1)).nonzero().flatten()
        if len(wrong):
            raise UserError(
                f"{where}: NaN or infinity in {len(wrong)} of {len(rows)} rows, first in row {int(wrong[0])}; "
                "expected finite numbers"
            )
    return [rows.detach().to("cpu", torch.float64) for rows in features.values()]


def checked_units(name: str, /, **features: Tensor) -> list[Tensor]:
    """`checked`, with each row scaled to length 1.

    Raises:
        UserError: as `checked`, or a row is all zeros and has no direction.
    """
    units = []
    for part, rows in zip(features, checked(name, **features), strict=True):
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        if (empty := (lengths == 0).sum()) > 0:
            raise UserError(f"{name}: {part}: {int(empty)} of {len(rows)} rows are all zeros; expected a direction")
        units.append(rows / lengths)
    return units

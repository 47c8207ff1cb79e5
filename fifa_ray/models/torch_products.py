"""Matrix products of the neighbour kernel on a GPU: only the pairs found come back to the host."""

import numpy as np
import torch

from fifa_ray.scoring.neighbor_join import Floats, Ints, group_width


class TorchProducts:
    """`fifa_ray.scoring.neighbor_join.Products` by torch on one device."""

    def __init__(self, device: str) -> None:
        """Full float32 products: TF32 would blur distances by 1e-3."""
        self.device = torch.device(device)
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    def place(self, matrix: Floats) -> torch.Tensor:
        """The matrix on the device."""
        return torch.tensor(matrix, device=self.device)

    def pairs_above(
        self,
        left: torch.Tensor,
        rows: Ints,
        right: torch.Tensor,
        columns: slice,
        threshold: Floats,
    ) -> tuple[Ints, Ints]:
        """See `Products`."""
        product = left[self._index(rows)] @ right[columns].T
        limit = torch.tensor(threshold, device=self.device)
        i, j = torch.nonzero(product > limit[:, None], as_tuple=True)
        return i.cpu().numpy(), j.cpu().numpy()

    def near_columns(
        self,
        left: torch.Tensor,
        rows: slice,
        right: torch.Tensor,
        columns: Ints,
        number: int,
        shift: int,
    ) -> Ints:
        """See `Products`."""
        chosen = self._index(columns)
        product = left[rows] @ right[chosen].T
        itself = torch.arange(rows.start, rows.stop, device=self.device) + shift
        product[chosen[None, :] == itself[:, None]] = -torch.inf
        width = group_width(len(columns), number)
        groups = len(columns) // width
        best_inside, inside = product[:, : groups * width].reshape(-1, width, groups).max(dim=1)
        best = best_inside.topk(number, dim=1).indices
        place = inside.gather(1, best) * groups + best
        near: Ints = chosen[place].cpu().numpy()
        return near

    def _index(self, rows: Ints) -> torch.Tensor:
        return torch.tensor(np.ascontiguousarray(rows), device=self.device)

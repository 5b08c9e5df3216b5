"""Non-maximum suppression, without a Python loop over boxes."""

import torch
from torch import Tensor


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, max_overlap: float) -> Tensor:
    """The boxes to keep: indices (K,) int64, best score first.

    `boxes` (N, 4) x1, y1, x2, y2; `scores` (N,); `labels` (N,) integers. A box goes when a kept box
    of its label with a better score overlaps it (IoU) by more than `max_overlap`.

    Cluster-NMS (Zheng et al., "Enhancing Geometric Factors in Model Learning and Inference for
    Object Detection and Instance Segmentation", arXiv:2005.03572, algorithm 1): every round lets
    all boxes that are still kept suppress worse ones at once, until nothing changes. The result is
    that of the greedy method; the rounds are as many as the longest chain of suppressions.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    rivals = (overlaps(boxes) > max_overlap) & (labels[:, None] == labels[None])
    rivals = rivals.triu(diagonal=1)  # [i, j]: i is better than j and overlaps it
    kept = torch.ones_like(labels, dtype=torch.bool)
    for _ in range(len(order)):
        left = ~(rivals & kept[:, None]).any(dim=0)
        if torch.equal(left, kept):
            break
        kept = left
    return order[kept]


def overlaps(boxes: Tensor) -> Tensor:
    """Intersection over union of every pair of boxes: (N, 4) x1, y1, x2, y2 → (N, N) in 0..1."""
    near = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    far = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (far - near).clamp(min=0).prod(dim=-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=-1)
    return common / (areas[:, None] + areas[None] - common).clamp(min=1e-6)

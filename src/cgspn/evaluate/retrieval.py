"""Image-text retrieval, where several images may share a caption and several captions an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .checks import check_ids, check_matrix


@dataclass(frozen=True)
class Retrieval:
    """Recall in both directions, 0 to 1, by rank: `image_to_text[1]` is R@1 of captions found for images.

    Attributes:
        image_to_text: share of images with one of their captions among the first k.
        text_to_image: share of captions with one of their images among the first k.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def retrieve(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    ranks: tuple[int, ...] = (1, 5),
) -> Retrieval:
    """Recall at each rank by cosine; any item with the same id counts as a hit.

    The rank of a query is the number of wrong items that score as high as its best right item, or higher. Ties thus
    count against the model: one that maps everything to a point scores 0, whatever the order of the items.

    Args:
        image_embeddings: [N, D], of any length.
        text_embeddings: [M, D], of any length.
        image_ids: integers [N]; images and captions with the same id belong together.
        text_ids: integers [M].
        ranks: the k of R@k.

    Raises:
        TypeError: ids that are no integers.
        ValueError: shapes that do not fit, embeddings that are not finite, a rank below 1, or an id on one side only.

    Source: R@k as in Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments", section 4.1.
    """
    check_matrix("image_embeddings", image_embeddings, "[N, D]")
    check_matrix("text_embeddings", text_embeddings, "[M, D]")
    if image_embeddings.shape[1] != text_embeddings.shape[1]:
        raise ValueError(
            f"text_embeddings has D = {text_embeddings.shape[1]}; "
            f"expected that of image_embeddings, {image_embeddings.shape[1]}"
        )
    check_ids("image_ids", image_ids, len(image_embeddings), "[N]")
    check_ids("text_ids", text_ids, len(text_embeddings), "[M]")
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks is {ranks}; expected one or more numbers from 1")
    device = image_embeddings.device
    image_ids, text_ids = image_ids.to(device), text_ids.to(device)
    for name, ids, others in (("image_ids", image_ids, text_ids), ("text_ids", text_ids, image_ids)):
        alone = ids[~torch.isin(ids, others)]
        if len(alone):
            raise ValueError(f"{name} holds {int(alone[0])}, which the other side lacks; expected a match for each id")
    images, texts = normalize(image_embeddings.float(), dim=-1), normalize(text_embeddings.float(), dim=-1)
    return Retrieval(
        _recall(images, texts, image_ids, text_ids, ranks), _recall(texts, images, text_ids, image_ids, ranks)
    )


def _recall(
    queries: Tensor, items: Tensor, query_ids: Tensor, item_ids: Tensor, ranks: tuple[int, ...]
) -> dict[int, float]:
    wrong_above = []
    for query, ids in zip(torch.split(queries, 1024), torch.split(query_ids, 1024)):
        scores = query @ items.T
        right = ids[:, None] == item_ids
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        wrong_above.append(((scores >= best) & ~right).sum(1))
    rank = torch.cat(wrong_above)
    return {k: float((rank < k).double().mean()) for k in ranks}

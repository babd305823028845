"""Image-text retrieval, where several images may share a caption and several captions an image.

torchmetrics' RetrievalHitRate gives the same recall if no scores are equal (tested). It is not used for two reasons. It
breaks ties by the order of the items, so that a model which maps everything to one point gets a high score. And it
needs every pair of image and caption in one list, 2 GB for the 5000 images and 25,000 captions of COCO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .checks import check_ids, check_matrix

QUERIES = 1024  # per batch


@dataclass(frozen=True)
class Retrieval:
    """Recall in both directions, 0 to 1, by rank: `image_to_text[1]` is R@1 from image to text.

    image_to_text: fraction of images with one of their captions among the first k. text_to_image: fraction of captions
    with one of their images among the first k.
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
    """Compute recall at each rank by cosine; any item with the same id counts as a hit.

    The rank of a query is the number of wrong items with a score at least as high as its best right item. Ties
    therefore count against the model: a model that maps everything to one point scores 0.

    image_embeddings, text_embeddings: [N, D] and [M, D], of any norm. image_ids, text_ids: integers [N] and [M]; images
    and captions with the same id belong together. ranks: the k of R@k.

    Raises TypeError for ids that are not integers, and ValueError if shapes do not match, embeddings are not finite, a
    rank is below 1, or an id occurs on one side only.

    Source: R@k as in Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments", section 4.1.
    """
    check_ids("image_ids", image_ids, len(image_embeddings), "[N]")
    check_ids("text_ids", text_ids, len(text_embeddings), "[M]")
    image_ids, text_ids = image_ids.to(image_embeddings.device), text_ids.to(image_embeddings.device)
    for name, ids, others in (("image_ids", image_ids, text_ids), ("text_ids", text_ids, image_ids)):
        alone = ids[~torch.isin(ids, others)]
        if len(alone):
            raise ValueError(f"{name} holds {int(alone[0])}, which the other side lacks; expected a match for each id")
    chunks = torch.arange(len(image_ids), device=image_ids.device).split(QUERIES)
    found = [(image_ids[some, None] == text_ids).nonzero() + some[0] * image_ids.new_tensor([1, 0]) for some in chunks]
    return retrieve_captions(image_embeddings, text_embeddings, torch.cat(found), ranks)


def retrieve_captions(
    image_embeddings: Tensor, text_embeddings: Tensor, pairs: Tensor, ranks: tuple[int, ...] = (1, 5, 10)
) -> Retrieval:
    """Compute recall like `retrieve`, for a given list of matching pairs. Images may share captions.

    Give each text only once, because duplicates tie with each other. pairs: integers [P, 2], indices of matching images
    and texts. Raises ValueError if shapes do not match, embeddings are not finite, a rank is below 1, or an image or
    text has no match.
    """
    check_matrix("image_embeddings", image_embeddings, "[N, D]")
    check_matrix("text_embeddings", text_embeddings, "[M, D]")
    if image_embeddings.shape[1] != text_embeddings.shape[1]:
        raise ValueError(
            f"text_embeddings has D = {text_embeddings.shape[1]}; "
            f"expected that of image_embeddings, {image_embeddings.shape[1]}"
        )
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks is {ranks}; expected one or more numbers from 1")
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs has shape {tuple(pairs.shape)}; expected [P, 2]")
    for column, (count, letter) in enumerate(((len(image_embeddings), "image"), (len(text_embeddings), "text"))):
        if not torch.equal(pairs[:, column].unique().cpu(), torch.arange(count)):
            raise ValueError(f"pairs must hold each {letter} from 0 to {count - 1}, and no other")
    images, texts = normalize(image_embeddings.float(), dim=-1), normalize(text_embeddings.float(), dim=-1)
    texts, pairs = texts.to(images.device), pairs.to(images.device)
    return Retrieval(_recall(images, texts, pairs, ranks), _recall(texts, images, pairs.flip(1), ranks))


def _recall(queries: Tensor, items: Tensor, pairs: Tensor, ranks: tuple[int, ...]) -> dict[int, float]:
    wrong_above = []
    for some in torch.arange(len(queries), device=queries.device).split(QUERIES):
        scores = queries[some] @ items.T
        inside = pairs[(pairs[:, 0] >= some[0]) & (pairs[:, 0] <= some[-1])]
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[inside[:, 0] - some[0], inside[:, 1]] = True
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        wrong_above.append(((scores >= best) & ~right).sum(1))
    rank = torch.cat(wrong_above)
    return {k: float((rank < k).double().mean()) for k in ranks}

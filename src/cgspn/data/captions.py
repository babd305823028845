"""Prompt templates and captions from class names."""

from collections.abc import Sequence

import torch
from torch import Tensor

TEMPLATES = (
    *("a photo of a {}", "a picture of a {}", "an image of a {}"),
    *("a small photo of a {}", "a grey photo of a {}", "a {}"),
)
"""Templates for captions and for the zero-shot classifier; `{}` stands for the class name."""


def fill(template: str, name: str) -> str:
    """Insert a class name into a template and adapt the article: "a photo of an ankle boot".

    template: text with exactly one `{}`, or one `{c}` as in CLIP-benchmark, whose article does not change. Raises
    ValueError for a template without exactly one of them.
    """
    if template.count("{}") + template.count("{c}") != 1:
        raise ValueError(f"template is {template!r}; expected exactly one '{{}}' or '{{c}}'")
    if "{c}" in template:
        return template.replace("{c}", name)
    if name[:1].lower() in tuple("aeiou"):
        template = template.replace(" a {}", " an {}")
        if template.startswith("a {}"):
            template = "an {}" + template[len("a {}") :]
    return template.replace("{}", name)


def class_captions(
    labels: Tensor,
    class_names: Sequence[str],
    seed: int = 0,
    indices: Tensor | None = None,
    templates: Sequence[str] = TEMPLATES,
) -> list[str]:
    """One caption for each of `labels`, int64 [N], or for those at `indices`: the class name in a random template.

    The caption of an image depends only on its index and the seed, so it is the same in a batch and in the whole set.
    """
    choice = torch.randint(len(templates), (len(labels),), generator=torch.Generator().manual_seed(seed))
    if indices is not None:
        choice, labels = choice[indices], labels[indices]
    return [fill(templates[t], class_names[k]) for t, k in zip(choice.tolist(), labels.tolist())]

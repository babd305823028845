"""Prompt templates, and class names put into them."""

from __future__ import annotations

TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a small photo of a {}",
    "a grey photo of a {}",
    "a {}",
)
"""Templates for captions and for the zero-shot classifier; `{}` stands for the class name."""


def fill(template: str, name: str) -> str:
    """Put a class name into a template, with the article that fits: "a photo of an ankle boot".

    Args:
        template: text with exactly one `{}`.
        name: the class name.

    Raises:
        ValueError: the template does not hold exactly one `{}`.
    """
    if template.count("{}") != 1:
        raise ValueError(f"template is {template!r}; expected exactly one '{{}}'")
    if name[:1].lower() in tuple("aeiou"):
        template = template.replace(" a {}", " an {}")
        if template.startswith("a {}"):
            template = "an {}" + template[len("a {}") :]
    return template.replace("{}", name)

"""Annotations that settings share on the command line."""

from typing import Annotated, TypeVar

import tyro

Kind = TypeVar("Kind")
Listed = Annotated[tuple[Kind, ...], tyro.conf.arg(help_behavior_hint="(default: none)")]  # a list that may be empty

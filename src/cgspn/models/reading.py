"""Reading of untrusted JSON and typed configs. Errors name the file, the key and the accepted values."""

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

MOST_BYTES = 1 << 24  # of a JSON file
MOST_PARTS = 1 << 18  # most values and containers, if shorter than 16 bytes on average
LONGEST = 10_000  # of lists and texts in configs
_NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}


class CheckpointError(ValueError):
    """Raised if a checkpoint cannot be read. The message says what was expected and what was found."""

    def __init__(self, message: str) -> None:
        """message: lone surrogates, as in file names, are escaped so that it can be printed."""
        super().__init__(message.encode(errors="backslashreplace").decode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError for an invalid or too large file, OSError if it cannot be read."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {shown(value)}; expected a JSON object")
    return value


def read_json_value(path: Path, most: int = MOST_BYTES) -> Any:
    """Read a JSON file of at most `most` bytes. Raises the errors of `read_json`."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; expected a file with JSON")
    if (size := path.stat().st_size) > most:
        raise CheckpointError(f"{path} has {size} bytes; accepted: {most}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if (parts := sum(map(text.count, ",[{"))) > max(MOST_PARTS, len(text) // 16):
            raise ValueError(f"it has {parts} values, which need far more memory than the file")
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise CheckpointError(f"{path} is not readable JSON: it is nested too deeply") from error
    except ValueError as error:  # wrong syntax, invalid UTF-8, numbers with thousands of digits
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers differ in which of several equal keys they take
        raise ValueError("an object states a key twice")
    return found


def build(cls: type[Config], values: Any, where: str) -> Config:
    """Build a dataclass config from JSON values. Missing fields keep their defaults.

    cls: a dataclass of bool, int, float, str, Literal, tuples of them, None, and further such dataclasses. where: the
    file, and the key in it, for messages.

    Raises CheckpointError for unknown keys, values of another type, and values that `cls` rejects.
    """
    hints = get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where} is {shown(values)}; accepted: an object with {', '.join(known)}")
    if unknown := sorted(str(key) for key in values if key not in known):
        named = ", ".join(key[:60] for key in unknown[:5])
        raise CheckpointError(f"{where}: {cls.__name__} has no {named}; accepted: {', '.join(known)}")
    given = {key: checked(value, known[key], f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**given)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def checked(value: Any, hint: Any, where: str) -> Any:
    """Convert a JSON value to the type `hint` (see `build`). Raises CheckpointError naming `where` if impossible."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        *others, last = (each for each in get_args(hint) if each is not type(None))
        for each in others:
            with suppress(CheckpointError):
                return checked(value, each, where)
        return checked(value, last, where)
    if get_origin(hint) is Literal:
        if isinstance(value, str) and value in get_args(hint):
            return value
        raise CheckpointError(f"{where} is {shown(value)}; accepted: {', '.join(map(repr, get_args(hint)))}")
    if get_origin(hint) is tuple:
        return _tuple(value, get_args(hint), where)
    plain = not isinstance(value, bool) or hint is bool
    if hint is float and plain and isinstance(value, (int, float)) and abs(value) < 1e300 and math.isfinite(value):
        return float(value)
    fits = len(value) <= LONGEST if isinstance(value, str) else not isinstance(value, int) or abs(value) < 1 << 63
    if hint in (bool, int, str) and plain and isinstance(value, hint) and fits:
        return value
    raise CheckpointError(f"{where} is {shown(value)}; accepted: {_NAMES[hint]}")


def _tuple(value: Any, each: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    any_length = each[-1] is Ellipsis
    length = f"at most {LONGEST}" if any_length else str(len(each))
    if not isinstance(value, (list, tuple)) or len(value) > LONGEST or (not any_length and len(value) != len(each)):
        raise CheckpointError(f"{where} is {shown(value)}; accepted: a list of {length}")
    hints = each[:1] * len(value) if any_length else each
    return tuple(checked(one, hint, f"{where}[{i}]") for i, (one, hint) in enumerate(zip(value, hints)))


def shown(value: Any) -> str:
    """A value for a message, truncated if long."""
    if isinstance(value, (dict, list)) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number with thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."

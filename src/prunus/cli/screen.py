"""What all commands share: errors in one line with an exit code, numbers and shapes as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import typer

_FACTORS = {
    "": 1,
    "%": 0.01,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "ms": 1,
}


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn errors into one line on the error stream: exit code 2 for wrong input, 1 for what cannot be done."""
    from prunus.errors import InputError, PrunusError

    try:
        yield
    except PrunusError as error:
        complain(str(error))
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from error
    except OSError as error:
        complain(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        complain("stopped", "")
        raise typer.Exit(130) from None


def complain(text: str, title: str = "error: ") -> None:
    """One line on the error stream."""
    from rich.console import Console

    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    Console(stderr=True).print(f"{title}{line}", style="red", markup=False, highlight=False, soft_wrap=True)


def number(option: str, text: str | None) -> float | int | None:
    """A budget as people write it: a share (0.5, 50%), a number (3000000, 1.5G), a size (20MB), a time (8ms).

    Raises:
        InputError: it is none of them.

    Example:
        >>> number("--target-macs", "0.5"), number("--target-macs", "50%"), number("--target-macs", "1.5G")
        (0.5, 0.5, 1500000000)
        >>> number("--target-memory", "20MB"), number("--target-latency", "8ms"), number("--ratio", None)
        (20000000, 8, None)
    """
    from prunus.errors import InputError

    if text is None:
        return None
    found = re.fullmatch(r"\s*([+-]?\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([a-zA-Z%]*)\s*", text)
    if found is None or found[2].lower() not in _FACTORS:
        raise InputError(f"{option}={text!r} is no number: give a share such as 0.5 or 50%, or a number such as 1.5G")
    digits, unit = found[1], found[2].lower()
    value = round(float(digits) * _FACTORS[unit], 12)
    whole = value.is_integer() and (unit not in ("", "%") or "." not in digits) and unit != "%"
    return int(value) if whole else value


def sizes(option: str, text: str | None) -> list[int] | None:
    """A shape as people write it: "1,3,224,224" or "1x3x224x224".

    Raises:
        InputError: it is none.

    Example:
        >>> sizes("--input-shape", "1,3,32,32"), sizes("--input-shape", "2x8")
        ([1, 3, 32, 32], [2, 8])
    """
    from prunus.errors import InputError

    if text is None:
        return None
    parts = re.split(r"[,x]", text.strip().strip("()[]"))
    if not all(re.fullmatch(r"\s*\d+\s*", part) for part in parts):
        raise InputError(f"{option}={text!r} is no shape: give numbers such as 1,3,224,224")
    return [int(part) for part in parts]

"""Tables of networks, one module for each library: ``table()`` gives name -> builder and imports nothing heavy."""

from __future__ import annotations

import importlib

from zoo.network import Builder

FAMILIES = ("handwritten", "recurrent", "torchvision", "timm", "transformers", "ultralytics", "geometric", "diffusers")
PACKAGES = {
    "handwritten": ("torch",),
    "recurrent": ("torch",),
    "torchvision": ("torchvision",),
    "timm": ("timm",),
    "transformers": ("transformers", "peft"),
    "ultralytics": ("ultralytics",),
    "geometric": ("torch_geometric",),
    "diffusers": ("diffusers",),
}
"""What each family imports, so that a runner can import it once for all of its networks."""


def builders(family: str) -> dict[str, Builder]:
    """The networks of a family, by name without the family."""
    return importlib.import_module(f"zoo.networks.{family}").table()

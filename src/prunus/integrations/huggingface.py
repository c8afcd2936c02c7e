"""Models of transformers by name, configuration or folder, with inputs that they run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.errors import InputError

TOKENS = 16


def load(name: str, shape: Sequence[int] | None = None, fetch: bool = False) -> tuple[nn.Module, Any]:
    """A model of transformers and inputs for it.

    Args:
        name: a folder with a ``config.json`` (its weights are read if they are there), such a file, a kind of model
            ("bert", "llama": the default configuration), or a name on the hub.
        shape: of ``input_ids`` or ``pixel_values``; default 16 tokens, or one picture of the configured size.
        fetch: whether a name on the hub stands for its weights too, not only for its configuration.

    Raises:
        InputError: transformers is not installed, there is no such model, or its inputs are not known.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError("transformers is not installed: pip install transformers") from error
    path = Path(name)
    folder = path.parent if path.is_file() else path
    stored = folder.is_dir() and any(folder.glob(pattern) for pattern in ("*.safetensors", "pytorch_model*.bin"))
    try:
        config = _config(transformers, name, path)
        kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0] or "AutoModel", None)
        if kind is None:
            raise ValueError(f"transformers has no class {config.architectures[0]}")
        if (stored and path.is_dir()) or (fetch and not path.exists()):
            model = kind.from_pretrained(name, config=config)
        else:
            model = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"cannot build hf:{name}: {type(error).__name__}: {first}") from error
    return model, _inputs(model, config, name, shape)


def _config(transformers: Any, name: str, path: Path) -> Any:
    if path.exists():
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    elif name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name)
    else:
        config = transformers.AutoConfig.from_pretrained(name)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return config


def _inputs(model: Any, config: Any, name: str, shape: Sequence[int] | None) -> dict[str, torch.Tensor]:
    main = getattr(model, "main_input_name", "")
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        high, wide = size if isinstance(size, (tuple, list)) else (size, size)
        return {main: torch.randn(tuple(shape or (1, getattr(config, "num_channels", 3), high, wide)))}
    if main == "input_ids":
        tokens = torch.randint(0, getattr(config, "vocab_size", 100), tuple(shape or (1, TOKENS)))
        if getattr(config, "is_encoder_decoder", False):
            return {main: tokens, "decoder_input_ids": tokens.clone()}
        return {main: tokens}
    raise InputError(
        f"hf:{name} takes {main or 'inputs of an unknown kind'}: write a factory that returns (model, inputs), and "
        "give it as MODULE:FACTORY"
    )

"""Models of transformers by name, configuration or folder, with inputs that they run on; and pruned ones on disk."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.errors import InputError
from prunus.tracing import call_model, tensors_in
from prunus.untouched import untouched

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


def save_pretrained(model: Any, example_inputs: Any, folder: str | Path, **options: Any) -> None:
    """Save a pruned model so that ``from_pretrained`` loads it: its configuration is fitted to its widths first.

    Some sizes stand in a configuration and nowhere else that a forward pass reads (heads, the dims of a head). They are
    found by building the model, without weights, from configurations in which one field is changed.

    Args:
        model: a model of transformers, pruned or not; only its configuration is changed.
        example_inputs: what the model and the one that would be loaded are compared on.
        folder: where to save it.
        options: for ``model.save_pretrained``.

    Raises:
        InputError: no configuration of this kind describes the model, as where layers have widths of their own, or the
            loaded model would compute something else, as where dims inside heads were removed; nothing was written
            then. ``torch.save(model, path)`` keeps such a model.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        raise InputError(f"{type(model).__name__} is no model of transformers; save it with torch.save(model, path)")
    fitted = _fitted(model, copy.deepcopy(config))
    _prove(model, fitted, example_inputs)
    for one, other in zip(_configs(config), _configs(fitted), strict=True):
        vars(one).update({name: getattr(other, name) for name in vars(other) if name != "dtype"})
    model.save_pretrained(str(folder), **options)


Facts = dict[str, tuple[float, ...]]
"""By name: the shape of a tensor, or the value of a number that a module keeps (after ``COUNT`` or ``VALUE``)."""
COUNT, VALUE = -1.0, -2.0


def _fitted(model: nn.Module, config: Any) -> Any:
    """The configuration that gives every tensor its shape and every number its value, found field by field."""
    wanted = _facts(model)
    wrong = _wrong(wanted, _built(model, config))
    while must := {name: both for name, both in wrong.items() if not _is_count(both)}:
        best: tuple[float, Any] = (_extent(wrong), None)
        for candidate in _neighbours(model, config, wrong):
            rest = _extent(_wrong(wanted, _built(model, candidate)))
            best = min(best, (rest, candidate), key=lambda item: item[0])
        if best[1] is None:
            raise _refusal(config, must)
        config = best[1]
        wrong = _wrong(wanted, _built(model, config))
    return config


def _prove(model: nn.Module, config: Any, example_inputs: Any) -> None:
    """A model of this configuration with the same weights computes the same.

    Raises:
        InputError: it does not.
    """
    other: nn.Module = type(model)(copy.deepcopy(config))
    other.load_state_dict(model.state_dict())
    device, dtype = (getattr(next(model.parameters()), name) for name in ("device", "dtype"))
    other.to(device=device, dtype=dtype)
    found = []
    for one in (model, other):
        with untouched(one), torch.no_grad():
            found.append([t for t in tensors_in(call_model(one, example_inputs)) if t.is_floating_point()])
    if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):  # the same kernels run on the same numbers
        raise InputError(
            f"a model that is loaded from this {type(config).__name__} would compute something else, as scales of "
            "attention and rotary frequencies are made anew from the head size: prune whole heads "
            "(prune_num_heads=True, prune_head_dims=False), or keep the model with torch.save(model, path)"
        )


def _refusal(config: Any, wrong: Wrong) -> InputError:
    names = ", ".join(f"{n} is {a} here, and would be {b}" for n, (a, b) in list(wrong.items())[:3])
    return InputError(
        f"no {type(config).__name__} describes this model ({names}; {len(wrong)} in all): prune all layers alike, and "
        "whole heads (prune_num_heads=True, prune_head_dims=False), or keep the model with torch.save(model, path)"
    )


def _facts(model: nn.Module) -> Facts:
    """What a model of the same configuration has, too."""
    tensors = {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    numbers: Facts = {
        f"{path}.{name}": (VALUE if type(value) is float else COUNT, value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) in {int, float} and not name.startswith("_")
    }
    return {**numbers, **tensors}


def _built(model: nn.Module, config: Any) -> Facts:
    """The facts of a model of this configuration; empty if there is none."""
    try:
        with torch.device("meta"):
            return _facts(type(model)(copy.deepcopy(config)))
    except Exception:  # fields that do not go together
        return {}


Wrong = dict[str, tuple[tuple[float, ...], tuple[float, ...]]]


def _wrong(wanted: Facts, built: Facts) -> Wrong:
    """What would be other than it is, with both values."""
    return {n: (fact, built.get(n, ())) for n, fact in wanted.items() if built.get(n) != fact}


def _is_count(both: tuple[tuple[float, ...], tuple[float, ...]]) -> bool:
    """Whether a whole number that a module keeps is wrong: many are never read, and may be out of date."""
    return both[0][:1] == (COUNT,)


def _extent(wrong: Wrong) -> float:
    """How much is wrong; whole numbers that modules keep only decide between what is as good otherwise."""
    return sum(1e-6 if _is_count(both) else _distance(*both) for both in wrong.values())


def _distance(wanted: tuple[float, ...], built: tuple[float, ...]) -> int:
    """How many dims of a shape are wrong; a wrong value, or a tensor that is missing, weighs as much as some layers."""
    if len(wanted) != len(built) or wanted[:1] == (VALUE,):
        return 9
    return sum(a != b for a, b in zip(wanted, built, strict=True))


def _neighbours(model: nn.Module, config: Any, wrong: Wrong) -> Iterator[Any]:
    """Configurations in which one field has another value: in proportion to what is wrong, or as modules call it."""
    pairs = [pair for both in wrong.values() for pair in zip(*both, strict=False)]
    ratios = {Fraction(int(a), int(b)) for a, b in pairs if a != b and a == int(a) > 0 and b == int(b) > 0}
    ratios |= {1 / ratio for ratio in ratios}
    own = {m: vars(m) for m in model.modules()}
    for k, part in enumerate(_configs(config)):
        for name, value in list(vars(part).items()):
            known = {n for fields in own.values() if type(n := fields.get(name)) is int}
            for other in _values(value, known, ratios):
                changed = copy.deepcopy(config)
                setattr(_configs(changed)[k], name, other)
                yield changed


def _values(value: Any, known: set[int], ratios: Iterable[Fraction]) -> list[Any]:
    """The other values to try for a field that has ``value``; ``known`` are those of attributes of its name."""
    if type(value) is list:
        return [
            [*value[:k], other, *value[k + 1 :]]
            for k, item in enumerate(value)
            for other in _values(item, set(), ratios)
        ]
    if value is None:
        return sorted(known)
    if type(value) is not int or value < 2:
        return []
    scaled = (value * ratio for ratio in ratios)
    return sorted(({int(v) for v in scaled if v.denominator == 1} | known) - {value})


def _configs(config: Any) -> list[Any]:
    """A configuration and those inside it."""
    parts = [v for v in vars(config).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    return [config, *(inner for part in parts for inner in _configs(part))]

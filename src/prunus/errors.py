"""Every error that Prunus raises on purpose.

    PrunusError                  anything below; `except prunus.PrunusError` catches them all
    ├── InputError               the caller gave something that cannot be used: nothing was changed
    ├── TargetError              the asked size or speed cannot be reached with what may be removed
    ├── NothingToPruneError      the plan would remove nothing: everything is frozen or ignored
    └── SurgeryError             the model does not fit the plan; the model is as it was

A message says where it happened (layer, parameter, dimension), why, and what to do about it.
An `AssertionError`, `KeyError` or `IndexError` that leaves Prunus is a bug in Prunus.
"""

__all__ = ["InputError", "NothingToPruneError", "PrunusError", "SurgeryError", "TargetError"]


class PrunusError(Exception):
    """The root of the tree: catch it to catch every error that Prunus raises on purpose."""


class InputError(PrunusError):
    """An argument cannot be used: wrong type, index out of range, example inputs that the model rejects."""


class TargetError(PrunusError):
    """The asked target cannot be reached by removing what may be removed."""


class NothingToPruneError(PrunusError):
    """The request would remove nothing, which is never what was meant: the message lists what is frozen and why."""


class SurgeryError(PrunusError):
    """A plan does not fit the model that it is applied to; the model is left exactly as it was."""

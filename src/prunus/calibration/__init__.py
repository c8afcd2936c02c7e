"""Statistics of gradients and activations from one pass over data."""

from prunus.calibration.collecting import calibrate
from prunus.calibration.recording import Recorder
from prunus.calibration.statistics import Calibration, Gradient, Reading
from prunus.calibration.watching import ModuleWatch

__all__ = ["Calibration", "Gradient", "ModuleWatch", "Reading", "Recorder", "calibrate"]

"""Prunus inside other libraries; every module here imports its library, so none is imported by ``import prunus``."""

"""Descriptions from an online teacher: asks, checks, keeps every paid answer, writes conversations."""

from m3agiqa.distil.run import distil

__all__ = ["distil"]

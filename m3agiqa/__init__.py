"""m3agiqa: scores AI-generated images the way people would, at the scale they are made."""

__version__ = "0.1.0"

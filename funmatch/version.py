"""Names the version, for modules that the package's `__init__` imports."""

__version__ = "0.1.0"

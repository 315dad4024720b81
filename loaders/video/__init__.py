"""Videos: frames by number from files, whatever decodes them, or from a packed file."""

from .base import Clips

__all__ = ["Clips"]

"""Videos: frames by number from files, whatever decodes them, or from a packed file."""

from .base import Clips
from .files import VideoFiles
from .packed import PackedClips

__all__ = ["Clips", "PackedClips", "VideoFiles"]

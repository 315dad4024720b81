"""Videos: frames by number from files, whatever decodes them, or from a packed file.

What reads files, :class:`~fasttrain.loaders.video.files.VideoFiles`, needs PyAV and is imported where it is asked for.
"""

from .base import Clips
from .packed import PackedClips

__all__ = ["Clips", "PackedClips"]

"""Sources: frozen networks whose soft labels teach. Live, or recalled from a table."""

from .live import LiveSources
from .network import SourceNetwork, open_source
from .recall import RecalledSources, recalled
from .soft_targets import SoftTargets

__all__ = ["LiveSources", "RecalledSources", "SoftTargets", "SourceNetwork", "open_source", "recalled"]

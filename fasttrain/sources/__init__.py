"""Sources: frozen networks whose soft labels teach. Live, or recalled from a cache."""

from .bank import STRATEGIES, SourceBank
from .cache import CacheError
from .network import SourceNetwork, open_source
from .recall import RecalledSources
from .soft_targets import SoftTargets

__all__ = ["STRATEGIES", "CacheError", "RecalledSources", "SoftTargets", "SourceBank", "SourceNetwork", "open_source"]

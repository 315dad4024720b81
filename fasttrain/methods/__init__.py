"""Methods: they turn what the target says, labels and soft labels into one loss. A new one is a file and a line here."""

from .base import Method, Setting
from .dml import Dml
from .kd import Kd
from .maxl import Maxl
from .scratch import Scratch
from .sskt import Sskt

__all__ = ["METHODS", "Dml", "Kd", "Maxl", "Method", "Scratch", "Setting", "Sskt"]

METHODS: dict[str, type[Method]] = {"scratch": Scratch, "sskt": Sskt, "kd": Kd, "dml": Dml, "maxl": Maxl}

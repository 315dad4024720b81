"""What the target is asked to do: the loss on labels, and how well it does. A new task is a new file and a line here."""

from .single_label import SingleLabel

TASKS = {"single_label": SingleLabel}

__all__ = ["TASKS", "SingleLabel"]

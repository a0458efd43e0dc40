"""Where a network can be cut: the score that is left when one group or one block goes and nothing else does.

Not a search: nothing is recovered, and losses of several cuts do not add up. It says which layers to leave alone, and
what each other one saves for what it loses, before anything is decided.
"""

from sartor.sensitivity.study import SCHEMA, StudyOptions, study

__all__ = ["SCHEMA", "StudyOptions", "study"]

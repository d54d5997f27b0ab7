"""Learned masks as parametrizations of the weight, one method a file."""

from sparsetrain.learned.base import LearnedMask
from sparsetrain.learned.sharing import Sharing

__all__ = ["LearnedMask", "Sharing"]

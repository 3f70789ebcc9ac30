"""The names that users of other libraries type."""

from phalanx.compat.autoattack import AutoAttack
from phalanx.compat.foreign import ForeignAttack, with_external

__all__ = ["AutoAttack", "ForeignAttack", "with_external"]

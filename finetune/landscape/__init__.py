"""`finetune landscape`: optimizers of the factory on the classic functions of two variables, drawn and animated.

Floor 1.
"""

from finetune.landscape.descents import Descent, descend, descend_by_default, descend_tuned, settles
from finetune.landscape.functions import LANDSCAPES, Landscape
from finetune.landscape.pictures import draw_landscapes

__all__ = [
    "LANDSCAPES",
    "Descent",
    "Landscape",
    "descend",
    "descend_by_default",
    "descend_tuned",
    "draw_landscapes",
    "settles",
]

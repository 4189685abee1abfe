"""`finetune landscape`: optimizers of the factory on classic functions of two variables, drawn.

Read in this order: `functions` (what is descended), `descents` (how an optimizer descends it),
`pictures` (the drawings and their files), `animation` (how a still picture becomes a moving one).
Import from here: `draw_landscapes` does everything; the descents can also be had as numbers.
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

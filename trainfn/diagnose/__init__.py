"""Why a step's numbers are not finite: the step run once more, eagerly and watched, and told in names.

| file | what it is |
|---|---|
| ``diagnosis`` | ``Diagnosis``: what was found, in names, in words and as JSON |
| ``replay`` | one micro-batch run again: which tensors are bad, and through which operations bad gradients went |
| ``blame`` | ``diagnose``: which of the bad tensors did harm, found by mending them |
"""

from trainfn.diagnose.blame import diagnose
from trainfn.diagnose.diagnosis import Diagnosis, Part, Spoilt

__all__ = ["Diagnosis", "Part", "Spoilt", "diagnose"]

"""Data: which example comes when, and how examples become batches.

==========  ==========================================================================================
order.py    ``order``: position in an epoch -> example, a permutation computed from (seed, epoch)
source.py   what counts as data: tensors, which are gathered, and map-style data sets, which are asked
loader.py   ``Loader``: batches by number, in this process or in workers
text.py     ``ByteText``: windows over the bytes of a text
==========  ==========================================================================================
"""

from trainfn.data.loader import Loader
from trainfn.data.order import order
from trainfn.data.text import ByteText

__all__ = ["ByteText", "Loader", "order"]

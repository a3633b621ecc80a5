"""Data: which example comes when, and how examples become batches.

==========  ==========================================================================================
order.py    ``order``: position in an epoch -> example, a permutation computed from (seed, epoch)
source.py   what counts as data: tensors, which are gathered, and map-style data sets, which are asked
loader.py   ``Loader``: batches by number, in this process or in workers
prefetch.py ``prefetched``: a batch copied to a GPU while the step before it runs
workers.py  ``delivered``: from data workers; what is said where one dies or hangs
text.py     ``ByteText``: windows over the bytes of a text
==========  ==========================================================================================
"""

from trainfn.data.loader import Loader
from trainfn.data.order import order
from trainfn.data.prefetch import CopyStream, prefetched
from trainfn.data.text import ByteText

__all__ = ["ByteText", "CopyStream", "Loader", "order", "prefetched"]

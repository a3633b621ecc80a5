"""Data: which example comes when, and how examples become batches.

=============  =======================================================================================
order.py       ``order``: position in an epoch -> example, a permutation computed from (seed, epoch)
grouping.py    ``order_by_length``: examples of like length in one batch
forms.py       the forms that data comes in: arrays as tensors, what a ``DataLoader`` was made of
source.py      what counts as data: tensors, which are gathered, data sets, which are asked, functions
loader.py      ``Loader``: batches by number, in this process or in workers
prefetch.py    ``prefetched``: a batch copied to a GPU while the step before it runs
stream.py      ``Stream``: batches of an iterable, one after another
reader.py      ``Reader``: pass after pass, and where it is
passes.py      one pass over an iterable: examples collated, batches as they come, shards of workers
position.py    positions as JSON
feed.py        ``make_feed``: a ``Loader`` or a ``Stream``
draws.py       random draws of the data, seeded
parcel.py      what workers pass on
workers.py     ``delivered``: from data workers; what is said where one dies or hangs
split.py       ``split``: some examples held out
collate.py     ``Collator``: items stacked, and finished
collators.py   collators by name: ``"text"``, ``"mlm"``, ``"image"``, ``"table"``, ``"default"``
padding.py     sequences padded, prompts left out, tokens masked
packing.py     ``Packed``: documents in rows of one length
text.py        ``ByteText``: windows over the bytes of a text
tokens.py      tokenizers, texts as tokens, and files of tokens larger than memory
images.py      images stacked and normalised; ``ImageFolder``
tabular.py     CSV, JSONL and frames as numbers; texts from files
=============  =======================================================================================
"""

from trainfn.data.collate import Collator
from trainfn.data.collators import collator, collator_names, register_collator
from trainfn.data.feed import Feed, is_stream, make_feed
from trainfn.data.grouping import order_by_length
from trainfn.data.images import ImageFolder
from trainfn.data.loader import Loader
from trainfn.data.order import order
from trainfn.data.packing import Packed
from trainfn.data.passes import Batched
from trainfn.data.prefetch import CopyStream, prefetched, to_device
from trainfn.data.reader import StreamWarning
from trainfn.data.split import Split, split
from trainfn.data.stream import Stream
from trainfn.data.tabular import Table, read_csv, read_frame, read_jsonl, read_texts
from trainfn.data.text import ByteText
from trainfn.data.tokens import ByteTokenizer, TokenFile, Tokenized, load_tokenizer, train_bpe, write_tokens

__all__ = [
    "Batched",
    "ByteText",
    "ByteTokenizer",
    "Collator",
    "CopyStream",
    "Feed",
    "ImageFolder",
    "Loader",
    "Packed",
    "Split",
    "Stream",
    "StreamWarning",
    "Table",
    "TokenFile",
    "Tokenized",
    "collator",
    "collator_names",
    "is_stream",
    "load_tokenizer",
    "make_feed",
    "order",
    "order_by_length",
    "prefetched",
    "read_csv",
    "read_frame",
    "read_jsonl",
    "read_texts",
    "register_collator",
    "split",
    "to_device",
    "train_bpe",
    "write_tokens",
]

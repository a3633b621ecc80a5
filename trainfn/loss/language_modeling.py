"""Cross-entropy over tokens: next tokens, masked tokens, and the tokens of a decoder.

    language_modeling:          total = - sum over b, t of log softmax(logits[b, t])[labels[b, t + 1]]
    masked_language_modeling:   total = - sum over b, t of log softmax(logits[b, t])[labels[b, t]]
    seq2seq:                    the same, over a decoder's positions

over the labels that are not ignored, in nats; the weight is their number. The shift of the first happens in
:func:`trainfn.loss.reading.next_tokens` and only there: ``labels`` are aligned with ``input_ids``, as in Hugging Face.
Label smoothing, z-loss and reduction in chunks are those of :mod:`trainfn.loss.cross_entropy`. Letters: B batch, T
positions, V vocabulary.

References:
    Y. Bengio et al., "A Neural Probabilistic Language Model", JMLR 3, 2003.
    J. Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", https://arxiv.org/abs/1810.04805, 2019.
    I. Sutskever et al., "Sequence to Sequence Learning with Neural Networks", https://arxiv.org/abs/1409.3215, 2014.
"""

from __future__ import annotations

from typing import Any

from trainfn.batch import Batch
from trainfn.loss.base import Loss, LossSum, logits_of, widens
from trainfn.loss.cross_entropy import make_cross_entropy
from trainfn.loss.reading import Reading, aligned_tokens, next_tokens, reads


def language_modeling(
    *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, chunk_size: int | None = None
) -> Loss:
    """Return the loss that trains a model to predict the next token.

    Labels are the batch's target field, or else the token ids themselves, with padding (``attention_mask == 0``) left
    out. Every real token counts, token 0 and end-of-text included.

    Args:
        ignore_index: label that does not count.
        label_smoothing: share of the target that is spread evenly over the vocabulary, in [0, 1].
        z_loss: weight of the squared log normaliser, 1e-4 in PaLM; 0 for none.
        chunk_size: tokens to reduce at a time: the float32 copy of 16-bit logits is then never held whole. The result
            is the same to rounding. ``"chunked_language_modeling"`` is this loss, by name, with 4096.

    Raises:
        ConfigError: an option is out of range.
        DataError: (from the loss) sequences of length 1 hold no next token; labels of another shape or dtype.
        ModelError: (from the loss) logits that are not [B, T, V].

    >>> import torch
    >>> import torch.nn.functional as F
    >>> tokens = torch.tensor([[1, 2, 0]])
    >>> perfect = F.one_hot(tokens.roll(-1, 1), 3) * 100.0
    >>> language_modeling()(perfect, {"input_ids": tokens})
    LossSum(total=tensor(0.), weight=tensor(2.))
    """
    reduce = make_cross_entropy(
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, chunk_size=chunk_size
    )

    @widens
    @reads(Reading(ignore_index=ignore_index, shift=True))
    def loss(outputs: Any, batch: Batch) -> LossSum:
        return reduce(*next_tokens(logits_of(outputs), batch, ignore_index))

    return loss


def masked_language_modeling(
    *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, chunk_size: int | None = None
) -> Loss:
    """Return the loss that trains a model to restore masked tokens: ``labels`` hold them, and -100 everywhere else.

    Nothing is shifted, and nothing is guessed: the batch must have a target field, of the shape of the tokens.

    Args:
        ignore_index, label_smoothing, z_loss, chunk_size: as in :func:`language_modeling`.

    Raises:
        ConfigError: an option is out of range.
        DataError: (from the loss) no labels, or labels of another shape or dtype.
        ModelError: (from the loss) logits that are not [B, T, V].

    >>> import torch
    >>> import torch.nn.functional as F
    >>> labels = torch.tensor([[-100, 2, -100]])
    >>> perfect = F.one_hot(torch.tensor([[0, 2, 0]]), 3) * 100.0
    >>> masked_language_modeling()(perfect, {"input_ids": torch.tensor([[1, 3, 0]]), "labels": labels})
    LossSum(total=tensor(0.), weight=tensor(1.))
    """
    reduce = make_cross_entropy(
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, chunk_size=chunk_size
    )

    @widens
    @reads(Reading(ignore_index=ignore_index))
    def loss(outputs: Any, batch: Batch) -> LossSum:
        return reduce(*aligned_tokens(logits_of(outputs), batch, ignore_index))

    return loss


def seq2seq(
    *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, chunk_size: int | None = None
) -> Loss:
    """Return the loss that trains an encoder-decoder: ``labels`` are aligned with the decoder's logits.

    The decoder reads the labels moved one to the right, which is the model's or the data set's business; so nothing is
    shifted here. A model whose forward takes ``labels`` and ``decoder_input_ids`` (T5 and BART in Hugging Face) makes
    the latter of the former, and is given the labels where the batch has no ``decoder_input_ids``.

    Args:
        ignore_index, label_smoothing, z_loss, chunk_size: as in :func:`language_modeling`.

    Raises:
        ConfigError: an option is out of range.
        DataError: (from the loss) no labels, or labels of another shape or dtype.
        ModelError: (from the loss) logits that are not [B, T, V].

    >>> import torch
    >>> import torch.nn.functional as F
    >>> labels = torch.tensor([[2, 1, -100]])
    >>> perfect = F.one_hot(torch.tensor([[2, 1, 0]]), 3) * 100.0
    >>> seq2seq()({"logits": perfect}, {"input_ids": torch.tensor([[4, 5]]), "labels": labels})
    LossSum(total=tensor(0.), weight=tensor(2.))
    """
    return masked_language_modeling(
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, chunk_size=chunk_size
    )

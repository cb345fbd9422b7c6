"""CIDEr-D, which the field calls CIDEr: how close a caption's n-grams are to those of its references, weighed by their rarity.

Vedantam, Zitnick, Parikh, 2015, in the form of COCO's evaluation: counts above a reference's are clipped, and a Gaussian
punishes a difference in length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_LONGEST = 4  # n-grams of 1 to 4 words
_SIGMA = 6.0  # of the difference in length


def cider_scores(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> np.ndarray:
    """CIDEr of each image, 0 to 10; that of the whole set is their mean.

    An n-gram weighs log(images / images whose references have it). So a single image gets 0 whatever its caption is, as does a
    set whose images share all their references, and the scores of one image differ from set to set.

    Args:
        references: of each image, one or more captions of words with blanks between them.
        predictions: of each image, likewise.
    """
    # Captions are numbered through: first the predictions, whose numbers are those of the images, then the references.
    captions = [caption.split() for caption in (*predictions, *(caption for own in references for caption in own))]
    images = len(predictions)
    image_of = np.concatenate([np.arange(images), np.repeat(np.arange(images), [len(own) for own in references])])
    number: dict[str, int] = {}
    words = np.array([number.setdefault(word, len(number)) for caption in captions for word in caption], dtype=np.int64)
    lengths = np.array([len(caption) for caption in captions])
    caption_of = np.repeat(np.arange(len(captions)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(
        len(words)
    )  # words from here to the caption's end, this one included
    gram_of = np.zeros(len(words), dtype=np.int64)  # the n-gram that begins here, as a number below `grams`
    similarity = np.zeros(len(captions) - images)
    for n in range(1, _LONGEST + 1):
        begins = np.flatnonzero(left >= n)
        kinds, gram_of[begins] = np.unique(gram_of[begins] * len(number) + words[begins + n - 1], return_inverse=True)
        similarity += _cosines(caption_of[begins], gram_of[begins], max(len(kinds), 1), image_of, images)
    pairs = np.maximum(lengths - 1, 0)  # the reference program takes the number of 2-grams for the length
    difference = pairs[image_of[images:]] - pairs[images:]
    similarity *= np.exp(-(difference**2) / (2 * _SIGMA**2)) / _LONGEST
    count = np.array([len(own) for own in references])
    return 10 * np.bincount(image_of[images:], similarity, minlength=images) / count


def _cosines(caption_of: np.ndarray, gram_of: np.ndarray, grams: int, image_of: np.ndarray, images: int) -> np.ndarray:
    """Of each reference with its image's prediction, by n-grams of one length.

    Args:
        caption_of: of each occurrence of an n-gram, the caption that it is in.
        gram_of: likewise, the number of the n-gram, below `grams`.
        grams: how many there are.
        image_of: of each caption; the first `images` captions are the predictions.
        images: how many there are.
    """
    entries, counts = np.unique(caption_of * grams + gram_of, return_counts=True)
    caption, gram = np.divmod(entries, grams)
    told = caption < images
    where = image_of[caption] * grams + gram
    images_with = np.bincount(np.unique(where[~told]) % grams, minlength=grams)
    weight = counts * (np.log(images) - np.log(np.maximum(images_with, 1)))[gram]
    norm = np.sqrt(np.bincount(caption, weight**2, minlength=len(image_of)))

    # In order and without repeats, as an image has one prediction; the one added at the end is beyond all that is looked for.
    told_where, told_weight = np.append(where[told], images * grams), np.append(weight[told], 0)
    true_where, true_weight = where[~told], weight[~told]
    place = np.searchsorted(told_where, true_where)
    shared = np.where(told_where[place] == true_where, np.minimum(told_weight[place], true_weight), 0.0)
    dot = np.bincount(caption[~told] - images, shared * true_weight, minlength=len(image_of) - images)
    norms = norm[image_of[images:]] * norm[images:]
    return np.divide(dot, norms, out=np.zeros(len(norms)), where=norms > 0)

"""Features of texts, kept in a file: CLIP's text encoder (clip.py) is loaded for new texts only."""

from contextlib import suppress

import torch
from safetensors import SafetensorError

from models.support.files import whole_file
from models.support.weights import cache_folder, read_file, save_tensors


def kept_features(texts, compute, folder, dtype):
    """Look up features of texts, compute those that are missing, and keep them beside the encoder.

    texts: list of str; compute: function of a list of texts -> {text: features}
    folder: where sd-turbo lies, None = the cache; dtype: that of the encoder's file -> (n, 77, D). Raises WeightError.

    There are two files. One holds what the encoder made in float32. The other holds what a float16 run knows: the same,
    and what an encoder in float16 made. A float32 run never reads it, so it never gets features that are not exact.
    """
    place = (folder or cache_folder()) / "sd-turbo"
    store = place / "text_features.safetensors"
    known = read_if_there(store)
    if dtype == torch.float16:
        store = place / "text_features.fp16.safetensors"
        known = read_if_there(store) | known    # of a text in both files the exact features
    new = [text for text in dict.fromkeys(texts) if text not in known]      # each once
    if new:
        known |= compute(new)
        with suppress(OSError, SafetensorError), whole_file(store) as part:     # read-only: computed again next time
            save_tensors(part, known)
    return torch.stack([known[text] for text in texts])


def read_if_there(path):
    """Read a file of features.  -> {text: features}, empty if there is no file. Raises WeightError."""
    return read_file(path) if path.is_file() else {}

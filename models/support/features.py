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
    """
    # an encoder in float16 has a file of its own, as its features are not exact
    name = "text_features.fp16.safetensors" if dtype == torch.float16 else "text_features.safetensors"
    store = (folder or cache_folder()) / "sd-turbo" / name
    known = read_file(store) if store.is_file() else {}
    new = [text for text in dict.fromkeys(texts) if text not in known]      # each once
    if new:
        known |= compute(new)
        with suppress(OSError, SafetensorError), whole_file(store) as part:     # read-only: computed again next time
            save_tensors(part, known)
    return torch.stack([known[text] for text in texts])

"""CLIP's text transformer and its tokenizer: how the prompts of SD-Turbo reach the UNet of S3Diff.

Paper:   CLIP, arXiv 2103.00020; byte-pair encoding of text, arXiv 1508.07909.
Weights: text_encoder/model.safetensors (the first 23 of OpenCLIP ViT-H's 24 layers), tokenizer/vocab.json and
         tokenizer/merges.txt of stabilityai/sd-turbo.
Left out: the image tower, the pooled vector and its projection, ids back to text, training.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.support.authors import read_vocabulary
from models.support.features import kept_features
from models.support.weights import find_or_fetch, load_strictly, read_tensors
from models.vit import MLP


@dataclass
class TextConfig:
    hidden_size: int = 1024     # D
    layers: int = 23
    heads: int = 16
    intermediate_size: int = 4096
    vocab_size: int = 49408
    positions: int = 77


# ---- text to ids

# trap: SD 2.x pads with "!", so every "!" of a text gets the padding's id
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
SPECIAL = re.compile("(" + "|".join(map(re.escape, (START, END, PAD))) + ")")
SPACE = re.compile(r"[^\S\x1c-\x1f]+")      # trap: Python's \s, unlike Unicode's, holds the separators \x1c to \x1f
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^a-z0-9 ]+")


def byte_symbols():
    """List a printable character for each of the 256 bytes: "é" becomes Ã©; 東, three bytes, becomes æĿ±."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def kind(c):
    """Replace a character by an ASCII one of its kind: letter a, digit 0, anything else "."; ASCII stays itself."""
    if c.isascii():
        return c
    return {"L": "a", "N": "0"}.get(unicodedata.category(c)[0], ".")


def split_words(text):
    """Split a text into words, single digits, and runs of all else: "It's 12K?" -> it 's 1 2 k ?

    WORD should know all letters and digits of Unicode, for which Python's re has no classes. So it is matched in a copy
    of equal length, in which every character is an ASCII one of its kind, and the words are cut out of the text itself.
    """
    text = SPACE.sub(" ", unicodedata.normalize("NFC", text))
    text = "".join(map(str.lower, text))  # trap: lower() of a whole text ends a Greek word in another sigma
    kinds = "".join(map(kind, text))
    return [text[match.start() : match.end()] for match in WORD.finditer(kinds)]


def merge(symbols, ranks):
    """Encode a word by byte pairs: join neighbours, the pair that was learned first before others.

    The vocabulary was learned by making the most frequent pair of neighbours a symbol, 48,894 times. So a common word
    is one symbol, and a rare one several, at worst a byte each. "</w>" ends a word: "art" in "artist" is no word.
        s h a r p</w>  ->  s h ar p</w>  ->  sh ar p</w>  ->  shar p</w>  ->  sharp</w>

    symbols: list of str; ranks: {(left, right): place in merges.txt} -> list of str
    """
    while len(symbols) > 1:
        best = min(zip(symbols, symbols[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(symbols):
            n = 2 if tuple(symbols[i : i + 2]) == best else 1
            joined.append("".join(symbols[i : i + n]))
            i += n
        symbols = joined
    return symbols


class Tokenizer:
    """Turns texts into ids, as Hugging Face's CLIP tokenizer makes them with the settings of SD 2.x.

    vocab, merges: paths of vocab.json and merges.txt; length: ids a text. Raises WeightError.
    """

    def __init__(self, vocab, merges, length=77):
        self.length = length
        self.bytes = byte_symbols()
        self.ids, self.ranks = read_vocabulary(Path(vocab), Path(merges))

    def encode_word(self, word):
        """Encode one word.  -> ids"""
        symbols = [self.bytes[byte] for byte in word.encode("utf-8", "replace")]  # "?" for half a surrogate pair
        symbols[-1] += "</w>"
        return [self.ids[symbol] for symbol in merge(symbols, self.ranks)]

    def encode_text(self, text):
        """Encode a text.  -> ids, neither cut nor padded"""
        ids = []
        for part in SPECIAL.split(text):
            if part in (START, END, PAD):
                ids.append(self.ids[part])
                continue
            for word in split_words(part):
                ids += self.encode_word(word)
        return ids

    def __call__(self, texts):
        """Make the ids of a list of texts: start, text, end, padding, in all `length`.  -> (B, 77) int64"""
        rows = []
        for text in texts:
            ids = [self.ids[START], *self.encode_text(text)][: self.length - 1] + [self.ids[END]]
            rows.append(ids + [self.ids[PAD]] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.long, device="cpu").view(len(texts), self.length)


# ---- ids to features

class Embeddings(nn.Module):
    """Adds up a vector for each id and one for each position.  (B, N) int64 -> (B, N, D)"""

    def __init__(self, cfg):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.positions, cfg.hidden_size)
        self.register_load_state_dict_pre_hook(drop_position_ids)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


def drop_position_ids(module, state_dict, prefix, *_):
    """Drop the numbers 0 to 76, which some files hold: a hook of loading."""
    state_dict.pop(f"{prefix}position_ids", None)


class Attention(nn.Module):
    """Lets a token see itself and those before it, so text never sees padding.  (B, N, D) -> same shape"""

    def __init__(self, D, nh):
        super().__init__()
        self.nh = nh
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x):
        def in_heads(y):
            return y.unflatten(-1, (self.nh, -1)).transpose(1, 2)  # (B, nh, N, hd)

        q = in_heads(self.q_proj(x))
        k = in_heads(self.k_proj(x))
        v = in_heads(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Adds attention and MLP to x, each after a norm.  (B, N, D) -> same shape"""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.hidden_size
        self.self_attn = Attention(D, cfg.heads)
        self.layer_norm1 = nn.LayerNorm(D, eps=1e-5)
        self.mlp = MLP(D, cfg.intermediate_size)  # trap: exact GELU, where SD 1.x's has x * sigmoid(1.702 x)
        self.layer_norm2 = nn.LayerNorm(D, eps=1e-5)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """Runs CLIP's text tower without its last layer."""

    def __init__(self, cfg=None):
        super().__init__()
        self.cfg = cfg = cfg or TextConfig()
        self.text_model = nn.ModuleDict({
            "embeddings": Embeddings(cfg),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))}),
            "final_layer_norm": nn.LayerNorm(cfg.hidden_size, eps=1e-5),
        })

    def forward(self, ids):
        """Make features of ids.  (B, N) int64, N at most 77 -> (B, N, D)"""
        x = self.text_model.embeddings(ids)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)


# ---- texts to features

@torch.no_grad()
def encode(texts, folder, dtype):
    """Compute features by SD-Turbo's text encoder.  -> {text: (77, D)}; arguments: of `text_features`"""
    vocab = find_or_fetch("sd-turbo/tokenizer/vocab.json", folder)
    merges = find_or_fetch("sd-turbo/tokenizer/merges.txt", folder)
    tokenizer = Tokenizer(vocab, merges)
    path = find_or_fetch("sd-turbo/text_encoder/model.safetensors", folder, dtype)
    with torch.device("meta"):
        encoder = TextEncoder()
    load_strictly(encoder, read_tensors(path), path)
    encoder.float()
    return {text: encoder(tokenizer([text]))[0] for text in texts}


def text_features(texts, folder=None, dtype=torch.float32):
    """Take features of texts from the file that keeps them; `encode` those that are new.

    texts: list of str; folder: where sd-turbo lies; what is missing is fetched
    dtype: float16 may take the encoder's file in float16 -> (n, 77, 1024). Raises WeightError.
    """
    if folder and not (folder / "sd-turbo").is_dir():
        folder = None
    return kept_features(texts, lambda new: encode(new, folder, dtype), folder, dtype)

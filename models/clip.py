"""CLIP's text transformer and its tokenizer: how the prompts of Stable Diffusion 2.1 / SD-Turbo reach the UNet of S3Diff.

Paper:   CLIP, arXiv 2103.00020; byte-pair encoding of text, arXiv 1508.07909.
Weights: text_encoder/model.safetensors (the first 23 of OpenCLIP ViT-H's 24 layers), tokenizer/vocab.json and tokenizer/merges.txt of
         stabilityai/sd-turbo; parameter names are those of the file.
Left out: the image tower, the pooled vector and its projection, SD 1.x's other GELU, turning ids back into text, training.
"""

import os
import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file

from models.support.weights import WeightError, cache_folder, load_strictly, nearby, read_file, read_json, read_tensors


@dataclass
class TextConfig:
    hidden_size: int = 1024     # D
    layers: int = 23
    heads: int = 16
    intermediate_size: int = 4096
    vocab_size: int = 49408
    positions: int = 77


# -----------------------------------------------------------------------------
# text to ids

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
SPECIAL = re.compile("(" + "|".join(map(re.escape, (START, END, PAD))) + ")")
SPACE = re.compile(r"[^\S\x1c-\x1f]+")      # trap: Python's \s, unlike Unicode's, holds the separators \x1c to \x1f
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^a-z0-9 ]+")


def byte_symbols():
    """A printable character for each of the 256 bytes, so that merges.txt is a text file: "é" is Ã©, and 東, of three bytes, is æĿ±.

    -> list of 256 str, by byte; printable Latin-1 stands for itself, the other 68 bytes are the characters from 256 on
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def split_words(text):
    """Cut a text into what BPE works on: words, single digits, runs of anything else; "It's 12K?" -> it 's 1 2 k ? -> list of str"""
    text = SPACE.sub(" ", unicodedata.normalize("NFC", text))
    text = "".join(map(str.lower, text))        # trap: lower() of a whole text knows that a Greek word ends in another sigma
    # Python's re has no classes of letters and numbers in Unicode's sense: ask a stand-in, where an ASCII character says the kind.
    kinds = "".join(c if c.isascii() else {"L": "a", "N": "0"}.get(unicodedata.category(c)[0], ".") for c in text)
    return [text[slice(*match.span())] for match in WORD.finditer(kinds)]


def merge(symbols, ranks):
    """Byte-pair encoding of one word: join neighbours, the pair that was learned first before all others, until no pair is known.

    To learn, one starts from bytes and makes the most frequent pair of neighbours in a large text a symbol of its own, again and again, here
    48,894 times. Replayed in that order the merges cut any word the same way: a common one becomes one symbol, a rare one a few pieces, and
    what was never seen stays bytes, so no text is unknown. "</w>" marks a word's end: "art" in "artist" is another symbol than the word.
        s h a r p</w>  ->  s h ar p</w>  ->  sh ar p</w>  ->  shar p</w>  ->  sharp</w>

    symbols: list of str; ranks: {(left, right): place in merges.txt} -> list of str
    """
    while len(symbols) > 1:
        best = min(zip(symbols, symbols[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(symbols):
            step = 2 if tuple(symbols[i : i + 2]) == best else 1
            joined.append("".join(symbols[i : i + step]))
            i += step
        symbols = joined
    return symbols


class Tokenizer:
    """Texts to ids, as Hugging Face's CLIP tokenizer makes them with the settings of SD 2.x.

    vocab, merges: paths of vocab.json and merges.txt; length: ids a text. Raises WeightError when a file is broken or they do not belong together.
    """

    def __init__(self, vocab, merges, length=77):
        self.ids, self.length, self.bytes = read_json(Path(vocab)), length, byte_symbols()
        try:
            lines = Path(merges).read_text(encoding="utf-8").strip().split("\n")[1:]        # the first one is a version
        except (OSError, ValueError) as e:
            raise WeightError(f"{merges}: cannot be read as text ({e}); get it again") from None
        pairs = [tuple(line.split(" ")) for line in lines]
        wrong = next((n for n, pair in enumerate(pairs, 2) if len(pair) != 2 or not all(pair)), None)
        if wrong or not pairs:
            raise WeightError(f"{merges}: line {wrong or 2} is not a pair of symbols; get it again")
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        needed = [*self.bytes, *(symbol + "</w>" for symbol in self.bytes), *map("".join, pairs), START, END]
        absent = [symbol for symbol in needed if type(self.ids.get(symbol)) is not int]
        if absent:
            raise WeightError(f"{vocab}: has no id for {absent[0]} ({len(absent)} such in all), which {merges} needs; get both again")
        # Merges that a cut-off file lacks would go unnoticed in most texts, and change the others.
        if len(self.ids) != len(set(needed)):
            raise WeightError(f"{merges}: makes {len(set(needed))} symbols, {vocab} has {len(self.ids)}; get both again")

    def encode_word(self, word):
        symbols = [self.bytes[byte] for byte in word.encode("utf-8", "replace")]       # half a surrogate pair has no bytes: "?"
        symbols[-1] += "</w>"
        return [self.ids[symbol] for symbol in merge(symbols, self.ranks)]

    def __call__(self, texts):
        """Ids of texts, from the start id to the end id, then padding; of a longer text the beginning, then the end id.

        texts: list of str -> (B, 77) int64
        """
        rows = []
        for text in texts:
            row = [self.ids[START]]
            # trap: SD 2.x pads with "!", and that makes every "!" of a text the padding's id, whatever stands beside it
            for i, part in enumerate(SPECIAL.split(text)):      # the odd ones are the separators
                row += [self.ids[part]] if i % 2 else [n for word in split_words(part) for n in self.encode_word(word)]
            row = row[: self.length - 1] + [self.ids[END]]
            rows.append(row + [self.ids[PAD]] * (self.length - len(row)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), self.length)


# -----------------------------------------------------------------------------
# ids to features

class Embeddings(nn.Module):
    """One vector for each id plus one for its place.  (B, N) int64 -> (B, N, D)"""

    def __init__(self, cfg):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.positions, cfg.hidden_size)
        self.register_load_state_dict_pre_hook(drop_position_ids)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


def drop_position_ids(module, state_dict, prefix, *_):
    """Load hook: some files hold the numbers 0 to 76, which older transformers kept as a buffer."""
    state_dict.pop(f"{prefix}position_ids", None)


class Attention(nn.Module):
    def __init__(self, D, nh):
        super().__init__()
        self.nh = nh
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.q_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (self.nh, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, nh, N, hd)
        # Causal: each token sees itself and those before it. The padding is not masked; it sees the text, the text never sees it.
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, D, inner):
        super().__init__()
        self.fc1 = nn.Linear(D, inner)
        self.fc2 = nn.Linear(inner, D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))        # trap: the exact GELU; SD 1.x's text encoder has x * sigmoid(1.702 x)


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D = cfg.hidden_size
        self.self_attn = Attention(D, cfg.heads)
        self.layer_norm1 = nn.LayerNorm(D, eps=1e-5)
        self.mlp = MLP(D, cfg.intermediate_size)
        self.layer_norm2 = nn.LayerNorm(D, eps=1e-5)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """The text tower of CLIP without its last layer, as Stable Diffusion 2.x conditions on it.  cfg: TextConfig"""

    def __init__(self, cfg=None):
        super().__init__()
        self.cfg = cfg = cfg or TextConfig()
        self.text_model = nn.ModuleDict({       # for the public names text_model.encoder.layers.0....
            "embeddings": Embeddings(cfg),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))}),
            "final_layer_norm": nn.LayerNorm(cfg.hidden_size, eps=1e-5),
        })

    def forward(self, ids):
        """Features of tokenized texts.  ids: (B, N) int64 of a Tokenizer, N at most 77 -> (B, N, D)"""
        x = self.text_model.embeddings(ids)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)


# -----------------------------------------------------------------------------
# texts to features

@torch.no_grad()
def text_features(texts, folder=None):
    """Features of texts by SD-Turbo's encoder, which is read only for texts that are new: what it found is kept beside it.

    texts: list of str; folder: where sd-turbo lies, or None: our cache, and what is missing is fetched -> (n, 77, 1024). Raises WeightError.
    """
    folder = folder if folder and (folder / "sd-turbo").is_dir() else None
    store = (folder or cache_folder()) / "sd-turbo" / "text_features.safetensors"
    known = read_file(store) if store.is_file() else {}
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        tokenizer = Tokenizer(nearby("sd-turbo/tokenizer/vocab.json", folder), nearby("sd-turbo/tokenizer/merges.txt", folder))
        path = nearby("sd-turbo/text_encoder/model.safetensors", folder)
        with torch.device("meta"):
            encoder = TextEncoder()
        load_strictly(encoder, read_tensors(path), path)
        known |= {text: encoder.float()(tokenizer([text]))[0] for text in new}
        with suppress(OSError, SafetensorError):        # a folder that is read-only: next time the same again
            store.parent.mkdir(parents=True, exist_ok=True)
            part = store.with_name(f"{store.name}.{os.getpid()}.part")
            save_file({text: x for text, x in known.items() if text != "__metadata__"}, part)     # safetensors' own word
            os.replace(part, store)
    return torch.stack([known[text] for text in texts])

"""CLIP's text encoder and tokenizer.    python -m pytest tests/test_clip.py"""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.clip import TextConfig, TextEncoder, Tokenizer, byte_symbols, merge, split_words
from models.support.weights import WeightError, load_strictly, locate, read_tensors

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = TextConfig(hidden_size=32, layers=3, heads=4, intermediate_size=48, vocab_size=99, positions=20)
REFERENCE = "transformers is a reference for this test only"
START, END = 49406, 49407


def tiny(seed=0):
    torch.manual_seed(seed)
    encoder = TextEncoder(TINY)
    for parameter in encoder.parameters():      # gains, offsets and tables that matter
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1) * 0.5, 0.3)
    return encoder.eval()


@pytest.fixture(scope="module")
def public_files():
    """Paths of vocab.json and merges.txt."""
    paths = [SHARED / "clip" / name for name in ("vocab.json", "merges.txt")]
    if not all(path.exists() for path in paths):
        paths = [locate(f"sd-turbo/tokenizer/{path.name}") for path in paths]
    if not all(paths):
        pytest.skip("CLIP's vocab.json and merges.txt are neither in ../shared/clip nor in the weights cache")
    return paths


@pytest.fixture(scope="module")
def tokenizer(public_files):
    return Tokenizer(*public_files)


def ids_of(tokenizer, text):
    """Ids between start and end, after a check of the frame."""
    row = tokenizer([text])[0].tolist()
    end = row.index(END)
    assert len(row) == 77 and row[0] == START and not any(row[end + 1 :])
    return row[1:end]


# -----------------------------------------------------------------------------
# the encoder

def test_keys_and_shapes_are_the_public_ones():
    path = SHARED / "manifests" / "sd21_text_encoder.json"
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    with torch.device("meta"):
        ours = {key: list(tensor.shape) for key, tensor in TextEncoder().state_dict().items()}
    assert ours == json.loads(path.read_text())["tensors"]


@pytest.mark.parametrize("with_position_ids", [False, True])
def test_strict_loading(tmp_path, with_position_ids):
    source, path, ids = tiny(0), tmp_path / "model.safetensors", torch.arange(12).view(2, 6)
    extra = {"text_model.embeddings.position_ids": torch.arange(20)[None]} if with_position_ids else {}
    save_file(source.state_dict() | extra, path)
    encoder = tiny(1)
    assert not torch.equal(encoder(ids), source(ids))
    load_strictly(encoder, read_tensors(path), path)
    assert torch.equal(encoder(ids), source(ids)) and set(encoder.state_dict()) == set(source.state_dict())


def test_wrong_keys_are_refused():
    state = tiny().state_dict()
    q = "text_model.encoder.layers.1.self_attn.q_proj.bias"
    for broken, words in (({k: v for k, v in state.items() if k != q}, f"missing {q} (1 in all)"),
                          (state | {"text_projection.weight": torch.zeros(1)}, "unexpected text_projection.weight (1 in all)"),
                          (state | {"position_ids": torch.zeros(1)}, "unexpected position_ids (1 in all)"),
                          (state | {q: torch.zeros(5)}, f"mis-shaped {q} is (5), not (32)")):
        with pytest.raises(WeightError) as e:
            load_strictly(tiny(), broken, "model.safetensors")
        assert words in str(e.value) and "\n" not in str(e.value)


@torch.no_grad()
def test_later_ids_do_not_change_earlier_features():
    encoder, ids = tiny(), torch.randint(99, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = encoder(ids)
    assert whole.shape == (2, 20, 32)
    for n in (0, 7, 19):
        other = ids.clone()
        other[:, n] = (other[:, n] + 1) % 99
        changed = (encoder(other) - whole).abs().amax(-1) > 1e-4
        assert not changed[:, :n].any() and changed[:, n:].all(), "a token is seen by itself and all after it"
        torch.testing.assert_close(encoder(ids[:, : n + 1]), whole[:, : n + 1])


@torch.no_grad()
def test_half_precision():
    encoder, ids = tiny(), torch.arange(20)[None]
    expected = encoder(ids)
    half = encoder.bfloat16()(ids)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)


def test_every_parameter_learns():
    encoder = tiny()
    encoder(torch.arange(20)[None]).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in encoder.parameters() if p.ndim == 2)


@torch.no_grad()
def test_encoder_equals_transformers():
    transformers = pytest.importorskip("transformers", reason=REFERENCE)
    config = transformers.CLIPTextConfig(
        vocab_size=TINY.vocab_size, hidden_size=TINY.hidden_size, intermediate_size=TINY.intermediate_size, num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads, max_position_embeddings=TINY.positions, hidden_act="gelu",
        bos_token_id=97, eos_token_id=98, pad_token_id=0)
    reference, encoder = transformers.CLIPTextModel(config).eval(), tiny()
    prefixed = any(name.startswith("text_model.") for name in reference.state_dict())       # 5.x drops the prefix in memory
    reference.load_state_dict({k if prefixed else k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()})
    ids = torch.randint(99, (3, 20), generator=torch.Generator().manual_seed(0))
    ids[0, 5], ids[0, 6:] = 98, 0
    assert {m.eps for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}        # too small to show in these numbers
    expected = reference(ids).last_hidden_state
    torch.testing.assert_close(encoder(ids), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


# -----------------------------------------------------------------------------
# the tokenizer

def test_bytes_have_symbols_of_their_own():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256 and all(len(s) == 1 and s.isprintable() and not s.isspace() for s in symbols)
    assert symbols[ord("a")] == "a" and symbols[0] == "Ā" and symbols[32] == "Ġ" and symbols[0xAD] == "Ń" and symbols[255] == "ÿ"


def test_merge_takes_the_first_learned_pair_first():
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("a", "a"): 2, ("aa", "aa"): 3}
    assert merge([*"abc"], ranks) == ["a", "bc"]
    assert merge([*"abab"], ranks) == ["ab", "ab"]
    assert merge([*"aaaaa"], ranks) == ["aaaa", "a"]        # pairs that overlap are joined from the left
    assert merge(["x"], ranks) == ["x"] and merge([*"xyz"], ranks) == [*"xyz"]


@pytest.mark.parametrize("text, words", [
    ("It's  WE'RE 'sore ''s", ["it", "'s", "we", "'re", "'s", "ore", "''", "s"]),
    ("x2 1,000 ½ Ⅷ ٣", ["x", "2", "1", ",", "0", "0", "0", "½", "ⅷ", "٣"]),       # letters and numbers as Unicode says
    ("e\u0301 क्\u200dष", ["é", "क", "्\u200d", "ष"]),                              # marks are no letters, unless NFC takes them in
    ("a\x1cb\x85c\u3000d\u200be", ["a", "\x1c", "b", "c", "d", "\u200b", "e"]),     # neither is white space what Python thinks
    ("ΟΔΟΣ İ", ["οδοσ", "i", "\u0307"]),
    (" \t\n", []),
])
def test_split(text, words):
    assert split_words(text) == words


def test_exclamation_marks_and_literal_specials(tokenizer):
    assert ids_of(tokenizer, "! a!!b !") == [0, *ids_of(tokenizer, "a"), 0, 0, *ids_of(tokenizer, "b"), 0]
    assert ids_of(tokenizer, "..<|startoftext|>..") == [*ids_of(tokenizer, ".."), START, *ids_of(tokenizer, "..")]
    assert tokenizer(["a<|endoftext|>a"])[0, :5].tolist() == [START, 320, END, 320, END]
    assert START not in ids_of(tokenizer, "<|STARTOFTEXT|>") and START not in ids_of(tokenizer, "<|start!oftext|>")


def test_length(tokenizer, public_files):
    rows = tokenizer(["cat " * n for n in (0, 74, 75, 76, 500)])
    assert rows.dtype == torch.long and rows.shape == (5, 77)
    assert [int((row == 2368).sum()) for row in rows] == [0, 74, 75, 75, 75]
    assert rows[1, -2:].tolist() == [END, 0] and (rows[2:, -1] == END).all() and rows[0, :3].tolist() == [START, END, 0]
    assert tokenizer([]).shape == (0, 77)
    assert Tokenizer(*public_files, length=5)(["a a", "a a a a a"]).tolist() == [[START, 320, 320, END, 0], [START, 320, 320, 320, END]]


def test_any_text_has_ids(tokenizer):
    assert ids_of(tokenizer, "\ud83d?") == ids_of(tokenizer, "??")      # half a surrogate pair, which a damaged command line can hold
    assert ids_of(tokenizer, "\0") and tokenizer(["é" * 3000]).shape == (1, 77)


def varied():
    """About a thousand texts of all kinds, the same ones in every run and under every version of Python."""
    draw = random.Random(0)
    words = """a an the of and photograph resolution ultra-realistic 8K blurry JPEG artefacts CamelCase iPhone12 don't WE'VE it's they'll
        I'm rock'n'roll 'quoted' o'clock café naïve Straße Ærøskøbing ﬁne Ǆ ΑΣ ὈΔΥΣΣΕΎΣ Москва ЁЖ 東京 한국어 कर्म العربية שלום ไทย İstanbul ı ſ K Å
        🐱 👩‍👩‍👧 🇯🇵 ❤️ ½ ² ① Ⅷ ٣ 3.14159 1,000,000 2024-09-25 f/1.8 100% $5 #tag @user a/b\\c ~^_`|<>+=* ... … — “so” «si» (really?)
        [yes]; {no}: wow! !! &amp; &#39; <b>bold</b> <|startoftext|> <|endoftext|> </w> antidisestablishmentarianism xqzzwvk""".split()
    spaces = [" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u180e", "\u2003", "\u200b", "\u2028",
              "\u202f", "\u3000", "\ufeff", ""]
    letters = [chr(n) for n in range(0x600)] + [*"\u0300\u0301\u0323\u0338\u1100\u1161\u11a8\uac00\u2126\u212a\ufb01"]
    assigned = [chr(n) for n in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(n)) not in ("Cn", "Co", "Cs")]    # what no version disputes
    texts = words + [f"a{c}1{c}b .{c}'s" for c in letters[:256] + spaces]
    for alphabet, glue, most in ((words, spaces, 12), (words, [" "], 90), (letters, [""], 40), (assigned, [""], 25),
                                 ([*"stremvld'!?.1 <|>é\u0301"], [""], 50)):
        for _ in range(120):
            texts.append("".join(draw.choice(alphabet) + draw.choice(glue) for _ in range(draw.randint(1, most))))
    return texts


def test_tokenizer_equals_transformers(tokenizer, public_files, tmp_path):
    transformers = pytest.importorskip("transformers", reason=REFERENCE)
    for path in public_files:
        shutil.copy(path, tmp_path / path.name)
    settings = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "!"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    reference = transformers.CLIPTokenizerFast.from_pretrained(tmp_path)
    texts = varied()
    assert len(texts) > 900
    expected = reference(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    wrong = [ascii(text) for text, ours, theirs in zip(texts, tokenizer(texts).tolist(), expected) if ours != theirs]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:5]}"


# -----------------------------------------------------------------------------
# broken files

def tiny_vocabulary(folder, vocab=None, merges="#version: 0.2\na r\nar t</w>\n"):
    """Write the two files, whole unless told otherwise -> their paths"""
    symbols = [*byte_symbols(), *(s + "</w>" for s in byte_symbols()), "ar", "art</w>", "<|startoftext|>", "<|endoftext|>"]
    paths = folder / "vocab.json", folder / "merges.txt"
    paths[0].write_text(json.dumps({s: n for n, s in enumerate(symbols)}) if vocab is None else vocab)
    paths[1].write_bytes(merges if isinstance(merges, bytes) else merges.encode())
    return paths


def test_a_vocabulary_of_two_merges(tmp_path):
    ids = Tokenizer(*tiny_vocabulary(tmp_path), length=6)(["Art arts"])[0].tolist()
    assert ids == [514, 513, 512, ord("t"), 256 + ord("s"), 515]      # art</w> ar t s</w>


@pytest.mark.parametrize("files, named, words", [
    ({"vocab": "{"}, "vocab.json", "cannot be read as JSON"),
    ({"vocab": "[1, 2]"}, "vocab.json", "holds a list"),
    ({"merges": b"\xff\xfe\x00"}, "merges.txt", "cannot be read as pairs"),
    ({"merges": "#version: 0.2\na r\nart</w>\n"}, "merges.txt", "cannot be read as pairs"),
])
def test_broken_files_are_named_in_one_line(tmp_path, files, named, words):
    with pytest.raises(WeightError) as e:
        Tokenizer(*tiny_vocabulary(tmp_path, **files))
    assert str(e.value).startswith(f"{tmp_path / named}: ") and words in str(e.value) and "\n" not in str(e.value)


def test_absent_files_are_named(tmp_path):
    for i, path in enumerate(tiny_vocabulary(tmp_path)):
        given = [*tiny_vocabulary(tmp_path)]
        given[i] = tmp_path / "absent"
        with pytest.raises(WeightError, match="absent: cannot be read"):
            Tokenizer(*map(str, given))

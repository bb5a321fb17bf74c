"""A release of random weights in the authors' layout, and a server that hands it out as the Hugging Face hub does.

The public files are gigabytes, so files of the same names, shapes and types with random numbers stand in for them in the tests:
tiny ones in test_release.py, which shrinks models.vosr.SIZES, S3DiffConfig and TextConfig first, full-size ones in full_size.py.
"""

import json
import re
import shutil
import threading
import zlib
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import save_file

import models.clip
import models.gramsr
import models.s3diff
from models.denet import DegradationEstimator
from models.dit import DiT
from models.qwen_vae import QwenVAE
from models.unet import UNet
from models.vae import VAE, LightDecoder
from models.vit import DINOv3, ViT
from models.vosr import PUBLIC, SIZES
from models.support.download import sha256_of  # noqa: E402
from models.support.weights import FILES

ARGS = {"ae_type": "sd2", "weak_cond_strength_aelq_list": [0.05, 0.25], "distill_type": "rcgm", "resume_ckpt": None}   # among many others
ARGS_2 = {"resolution": 512, "patch_size": 2, "mlp_ratio": 4.0, "use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True,
          "wo_shift": False, "ae_type": "qwen", "enc_type": "dinov2l", "encdim_ratio": 3, "auxiliary_time_cond": False, "distill_type": "onestep"}
SD_VAE, QWEN_VAE = (f"{folder}/diffusion_pytorch_model.safetensors" for folder in ("stable-diffusion-2-1-base/vae", "Qwen-Image-vae-2d"))
LIGHT, DINO_B, DINO_L = "sd21_lwdecoder.pth", *(f"torch_cache/checkpoints/dinov2_vit{letter}14_pretrain.pth" for letter in "bl")
FOLDERS = {"vosr-0.5b": "VOSR_0.5B_ms", "vosr-0.5b-1step": "VOSR_0.5B_os", "vosr-1.4b": "VOSR_1.4B_ms", "vosr-1.4b-1step": "VOSR_1.4B_os", "vosr-2": "VOSR2"}
REPOSITORIES = {"CSWRY/VOSR": "", "stabilityai/sd-turbo": "sd-turbo/", "zhangap/S3Diff": ""}     # and their folders below the release
SD_TURBO = {part: f"sd-turbo/{part}/{file}" for part, file in (
    ("unet", "diffusion_pytorch_model.safetensors"), ("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors"))}
TOKENIZER = [f"sd-turbo/tokenizer/{file}" for file in ("vocab.json", "merges.txt")]
CLIP = Path(__file__).resolve().parents[2] / "shared" / "clip"      # where the public ones are
LIGHT_CONFIG = {"in_channels": 4, "out_channels": 3, "block_out_channels": [64, 128, 256, 256], "layers_per_block": 2}


# ---- the files ------------------------------------------------------------------------------------------------------


def numbers(name, shape, generator):
    """A parameter, also where training starts from zero: gains and deviations 1 +- 0.1, biases +- 0.1, the rest with deviation 1/sqrt(fan-in)."""
    x = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith(("gamma", "std")) or (len(shape) == 1 and name.endswith("weight")):
        return x.mul_(0.1).add_(1)
    small = 0.1 if "lora_B" in name else 1      # adapters bend a network; several of this size on every layer would make it explode
    return x.mul_(0.1 if len(shape) == 1 else small * (shape[0] / x.numel()) ** 0.5)


def random_tensors(network, *config, **arguments):
    """State dict of network(*config, **arguments); what is no parameter, the rotary tables, keeps its values."""
    with torch.device("meta"):
        state = network(*config, **arguments).state_dict()
    generator = torch.Generator().manual_seed(zlib.crc32(network.__name__.encode()))
    return {name: numbers(name, x.shape, generator) if x.is_meta else x for name, x in state.items()}


def old_names(tensors):
    """Attention layers as diffusers named them when Stable Diffusion 2.1 came out."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(f".{new}.", f".{old}."): x for name, x in tensors.items()}
    return tensors


def s3diff_pkl(cfg):
    """What S3Diff adds to SD-Turbo, with B of every adapter other than zero."""
    with torch.device("meta"):
        model = models.s3diff.S3Diff(cfg)
    generator = torch.Generator().manual_seed(0)
    trained = {k: numbers(k, x.shape, generator) for k, x in model.state_dict().items() if models.s3diff.is_in_release(k)}
    model.load_state_dict(trained, strict=False, assign=True)
    return model.release()


def gramsr_files(cfg):
    """GramSR's three files, with B of every adapter other than zero -> as its release()"""
    with torch.device("meta"):
        model = models.gramsr.GramSR(cfg)
    generator = torch.Generator().manual_seed(0)
    trained = model.parameters_of(*cfg.ranks) | {f"adapter.{k}": x for k, x in model.adapter.state_dict().items()}
    trained = {k if k.startswith("adapter.") else f"unet.{k}": numbers(k, x.shape, generator) for k, x in trained.items()}
    model.load_state_dict(trained, strict=False, assign=True)
    return model.release()


def contents(model):
    """The weight files that a public model needs -> {name in FILES: function that makes what is in it}"""
    if model == "gramsr":
        cfg, prior = models.gramsr.GramSRConfig(), models.gramsr.PRIOR
        return {
            prior["unet"]: lambda: random_tensors(UNet, cfg.unet),
            prior["vae"]: lambda: old_names(random_tensors(VAE, cfg.vae)),
            prior["vit"]: lambda: random_tensors(DINOv3, cfg.vit),
            **{file: lambda part=part: gramsr_files(cfg)[part] for part, file in models.gramsr.RELEASE.items()},
        }
    if model == "s3diff":
        cfg = models.s3diff.S3DiffConfig()
        return {
            SD_TURBO["unet"]: lambda: random_tensors(UNet, cfg.unet),
            SD_TURBO["vae"]: lambda: random_tensors(VAE, cfg.vae),
            SD_TURBO["text_encoder"]: lambda: random_tensors(models.clip.TextEncoder),
            **{name: (CLIP / Path(name).name).read_bytes for name in TOKENIZER},
            "s3diff.pkl": lambda: s3diff_pkl(cfg),
            "de_net.pth": lambda: random_tensors(DegradationEstimator),
        }
    size = PUBLIC[model][0]
    cfg = SIZES[size]
    own = {f"{FOLDERS[model]}/checkpoints/ema_model.safetensors":
           lambda: random_tensors(DiT, replace(cfg.dit, auxiliary_time_cond=model.endswith("1step")))}
    if size == "1.4b":
        return own | {QWEN_VAE: lambda: random_tensors(QwenVAE, cfg.vae), DINO_L: lambda: random_tensors(ViT, cfg.vit)}
    return own | {
        SD_VAE: lambda: old_names(random_tensors(VAE, cfg.vae)),    # whole, though only its encoder is needed
        LIGHT: lambda: {"config": LIGHT_CONFIG | cfg.light_decoder, "model_state_dict": random_tensors(LightDecoder, **cfg.light_decoder)},
        DINO_B: lambda: random_tensors(ViT, cfg.vit),
    }


def write_release(root, *names):
    """The release folder `root` with what these public models need, at the sizes in SIZES; one network in memory at a time."""
    for model in names:
        for name, content in contents(model).items():
            path = root / name
            if not path.exists():       # the frozen networks serve several models
                path.parent.mkdir(parents=True, exist_ok=True)
                if name in TOKENIZER:
                    path.write_bytes(content())
                else:
                    (save_file if path.suffix == ".safetensors" else torch.save)(content(), path)
        if model in FOLDERS:
            (root / FOLDERS[model] / "args.json").write_text(json.dumps(ARGS_2 if model == "vosr-2" else ARGS))


# ---- the hub --------------------------------------------------------------------------------------------------------


def rows():
    """FILES' rows of what is in the release, without the sizes and hashes that random files cannot have, and with the hub as only source."""
    found = {}
    for name, file in FILES.items():
        for source in file.sources:
            repository, _, path = source.partition(":")
            if repository in REPOSITORIES and REPOSITORIES[repository] + path == name:
                found[name] = replace(file, size=None, sha256=None, sources=(source,))
    return found


class Hub(ThreadingHTTPServer):
    """Serves the release folder `root`; `seen` lists the files asked for, `sent` counts bytes.

    As at Hugging Face, weights are elsewhere: the hub says where and names their SHA-256, and only there a part can be asked for.
    """

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.seen, self.sent, self.digest = Path(root), [], 0, cache(sha256_of)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def environment(self, home):
        """Variables of a user who knows no other hub, has no token, no proxy, and whose caches are in the folder `home`."""
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "NO_PROXY": "*", "HF_TOKEN": "",
                "HF_HOME": f"{home}/huggingface", "HF_HUB_CACHE": f"{home}/huggingface/hub", "NANOSR_CACHE": f"{home}/nanosr"}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        place, _, name = self.path.removeprefix("/").partition("/resolve/main/" if "/resolve/" in self.path else "/")
        name = REPOSITORIES.get(place, "") + name
        path = self.server.root / name
        if place != "blob":
            self.server.seen.append(name)
        if place not in ("blob", *REPOSITORIES) or not path.is_file():
            return self.send_error(404)
        if place != "blob" and path.suffix not in (".json", ".txt"):
            return self.head(302, {"Location": f"/blob/{name}", "X-Linked-Etag": f'"{self.server.digest(path)}"', "Content-Length": 0})
        size, tag = path.stat().st_size, f'"{path.stat().st_mtime_ns:x}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and self.headers["If-Range"] == tag else 0
        if start >= size:
            return self.head(416, {"Content-Range": f"bytes */{size}", "Content-Length": 0})
        span = {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
        self.head(206 if start else 200, {"Content-Length": size - start, "ETag": tag, **span})
        self.server.sent += size - start                    # first, so that it is right when the client has the last byte
        with open(path, "rb") as f:
            f.seek(start)
            shutil.copyfileobj(f, self.wfile, 1 << 20)      # never a whole file in memory

    def head(self, code, headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *arguments):
        pass

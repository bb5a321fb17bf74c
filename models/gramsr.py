"""GramSR: one step of Stable Diffusion 2.1, conditioned on visual tokens where a text stood.

Paper:   GramSR, arXiv 2604.25457, which extends PiSA-SR, 2412.03017. Numbers of equations are ours.
Weights: model_12501.pkl, lora_weights_dino_53001.safetensors, adapter_53001.pth of aimagelab/GramSR; unet and vae of
         stable-diffusion-2-1-base; facebook/dinov3-vitb16-pretrain-lvd1689m.
Left out: texts, which the released code never reads.

    enlarged LQ image x  -> VAE -> latent z
                         -> DINOv3, token adapter -> context
    e = UNet(z, t = 1, context), as if z were a latent with almost no noise;   z - e -> VAE -> HQ image

Three LoRA sets, pixel, semantic and texture, are trained one after the other, each with a loss of its own (gram.py). In
use each has a scale.
"""

from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path

import torch
import torch.nn as nn

from models.gram import normalised
from models.lora import ALPHA, adapted_layers, add_lora
from models.support import fast_lora
from models.support.authors import last_step, with_step
from models.support.files import whole_file
from models.support.imaging import check_image, color_fix, pad_to_multiple, resize
from models.support.precision import in_half
from models.support.tiles import tile_boxes, tiled
from models.support.weights import (WeightError, fetch, find_ours, laid_out_as, load_ours, load_public, load_strictly,
                                    read_tensors, save_tensors)
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig
from models.vit import DINOv3, DINOv3Config

# The LoRA sets in the order in which they are trained: {adapter: names of its layers in the UNet}
PLACES = {"encoder": r"conv_in|down_blocks\..*", "decoder": r"up_blocks\..*|conv_out", "others": r"mid_block\..*"}
TEXTURE = "default_unet_dino"       # for every layer; its own file leaves this name out
SETS = {
    "pixel": {f"default_{place}_pix": layers for place, layers in PLACES.items()},
    "semantic": {f"default_{place}_sem": layers for place, layers in PLACES.items()},
    "texture": {TEXTURE: ".*"},
}
RELEASE = {"model": "model_12501.pkl", "texture": "lora_weights_dino_53001.safetensors", "adapter": "adapter_53001.pth"}
PRIOR = {name: f"stable-diffusion-2-1-base/{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae")}
PRIOR["vit"] = "dinov3-vitb16-pretrain-lvd1689m/model.safetensors"


@dataclass
class GramSRConfig:
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    vit: DINOv3Config = field(default_factory=DINOv3Config)
    ranks: dict = field(default_factory=lambda: dict.fromkeys(SETS, 4))     # of the sets there are
    t: int = 1                  # the UNet's time
    tile: int = 512             # pixels per tile side: the size it was trained at
    overlap: int = 128          # pixels that tiles share, at least 1/8 of a tile

    @classmethod
    def from_dict(cls, d):
        vit = DINOv3Config(**d["vit"])
        return cls(**d | {"unet": UNetConfig(**d["unet"]), "vae": VAEConfig(**d["vae"]), "vit": vit})


def token_adapter(D, inner, context_dim):
    """From DINO's tokens to what the UNet's cross-attention reads, token by token.  (B, N, D) -> (B, N, context_dim)"""
    return nn.Sequential(nn.Linear(D, inner), nn.ReLU(), nn.Linear(inner, context_dim))


class GramSR(nn.Module):
    Config = GramSRConfig
    SWEEP = [[{name: x / 2} for x in range(5)] for name in SETS]        # of sample.py: rows, columns

    def __init__(self, cfg):
        super().__init__()
        self.cfg = replace(cfg, ranks={})       # which `add_set` fills
        self.unet, self.vae, self.vit = self.networks(cfg)
        self.adapter = token_adapter(cfg.vit.embed_dim, cfg.unet.context_dim, cfg.unet.context_dim)
        halved = self.vae.factor * 2 ** (len(cfg.unet.widths) - 1)
        self.multiple = lcm(halved, cfg.vit.patch_size)         # of x's sides: maps are halved, patches are whole
        for name in SETS:
            if name in cfg.ranks:
                self.add_set(name, cfg.ranks[name])

    def networks(self, cfg):
        """-> UNet, VAE, DINOv3"""
        return UNet(cfg.unet), VAE(cfg.vae), DINOv3(cfg.vit)

    # ---- LoRA sets

    def add_set(self, name, r=4):
        """A new LoRA set, which changes nothing yet: pixel, semantic or texture."""
        alpha = r if name == "texture" else ALPHA       # trap: a scale of 8/r = 2 for two sets, of 1 for the third
        for adapter, layers in SETS[name].items():
            add_lora(self.unet, layers, adapter, r, alpha)
        self.cfg.ranks[name] = r

    def lora(self, *sets):
        """The parameters of LoRA sets by name in the UNet."""
        mine = tuple(f".{adapter}.weight" for name in sets for adapter in SETS[name])
        return {k: p for k, p in self.unet.named_parameters() if k.endswith(mine)}

    def only(self, *sets):
        """C with which the UNet has these LoRA sets on and all others off (lora.py)."""
        C = {}
        for name in sets:
            C |= dict.fromkeys(SETS[name], 1)
        return C

    # ---- one step

    def tokens(self, x):
        """What stands in for a text.  x: (B, 3, H, W) enlarged LQ in [-1, 1] -> (B, N, D), N = 5 + patches"""
        return self.adapter(self.vit(normalised(x).to(self.vit.norm.weight.dtype)))     # Eq. GramSR (1)

    def residual(self, z, context, *sets):
        """What these LoRA sets find wrong with a latent: e.  z: (B, 4, h, w); context: (B, N, D) -> like z"""
        return self.unet(z, self.cfg.t, context, self.only(*sets))

    def clean(self, z, e):
        """LQ latent, residual -> clean latent; no noise schedule has a say.  Three of (B, 4, h, w)"""
        return z - e        # Eq. GramSR (3)

    def forward(self, x):
        """What training sees, all sets on.  x: (B, 3, H, W) enlarged LQ in [-1, 1] -> image like x, latent, context"""
        context, z_lq = self.tokens(x), self.vae.encode(x)
        z = self.clean(z_lq, self.residual(z_lq, context, *SETS))
        return self.vae.decode(z).clamp(-1, 1), z, context

    def csd_conditions(self, context):
        """The condition of `loss_csd` and its negative: the tokens, which the prior was never taught to read, and none.

        context: (B, N, D) -> two like it
        """
        return context, torch.zeros_like(context)       # inferred; PiSA-SR has two prompts

    def prior(self, z_t, t, context):
        """The UNet as it was before any LoRA, of which `loss_csd` takes the gradient.  -> eps like z_t"""
        return self.unet(z_t, t, context)

    # ---- in use

    def predict(self, z, context, scales=(1, 1, 1)):
        """The residual with a scale for what each set adds to those before it.

        z: (B, 4, h, w); context: (B, N, D); scales: of pixel, semantic, texture -> like z
        """
        if not torch.is_grad_enabled():
            return fast_lora.in_few_passes(self.residual, z, context, scales, SETS, self.cfg.ranks)
        l1, l2, l3 = scales
        e_p = self.residual(z, context, "pixel")
        e_ps = self.residual(z, context, "pixel", "semantic")
        e_all = self.residual(z, context, "pixel", "semantic", "texture")
        return l1 * e_p + l2 * (e_ps - e_p) + l3 * (e_all - e_ps)       # Eq. GramSR (2)

    def merge(self):
        """Fold all sets into the weights once, instead of in every pass: for scales of 1 alone."""
        fast_lora.merge(self.unet)
        self.cfg.ranks.clear()

    def restore(self, z, x, scales, tile, overlap):
        """LQ latent -> clean latent, in tiles where it is larger than one; each tile has its own tokens.

        z: (B, 4, h, w); x: (B, 3, H, W) in [-1, 1]; tile, overlap: pixels; tile 0 = off -> like z
        """
        def restored(z, x):
            return self.clean(z, self.predict(z, self.tokens(x), scales))

        f = self.vae.factor
        side = tile // self.multiple * self.multiple // f       # cells
        boxes = tile_boxes(*z.shape[-2:], side, max(overlap // f, side // 8))
        return tiled(restored, boxes, z, x)

    @torch.no_grad()
    def upscale(self, lq, scale=4, seed=0, pixel=None, semantic=None, texture=None, tile=0, overlap=0,
                color="adain"):
        """Super-resolution.

        lq: (B, 3, H, W) in [0, 1]; scale: 1 to 8; seed: not read, nothing is random
        pixel, semantic, texture: scales of the LoRA sets, None = 1; one UNet pass if all are, else up to 3
        tile, overlap: pixels; 0 = the checkpoint's, but an overlap of half a smaller tile at most
        color: adain, wavelet or none
        -> (B, 3, round(H * scale), round(W * scale)) in [0, 1]. Raises ValueError.
        """
        lq = check_image(lq)
        cfg, (H, W) = self.cfg, (round(side * scale) for side in lq.shape[-2:])
        scales = [1 if l is None else l for l in (pixel, semantic, texture)]
        # official: whatever its shape, an image is squeezed to 512 x 512
        lq_up = resize(lq, (H, W)).to(self.unet.conv_in.weight.device, non_blocking=True)
        x = pad_to_multiple(2 * lq_up - 1, self.multiple)
        tile = tile or cfg.tile
        z = self.restore(self.vae.encode(x), x, scales, tile, overlap or min(cfg.overlap, tile // 2))
        sr = self.vae.decode(z).clamp(-1, 1)[..., :H, :W].float() / 2 + 0.5
        # official: truncated to 8 bits before and after the colour fix
        return color_fix(sr, lq_up, color, stablesr=True)

    # ---- files: plumbing

    @classmethod
    def from_pretrained(cls, name="gramsr", device="cpu", dtype=torch.float32):
        """A model by its name (gramsr, which is fetched), or a folder with the authors' files or ours.

        Raises FileNotFoundError or ValueError, one line.
        """
        path = Path(name)
        files = {part: last_step(path, file) for part, file in RELEASE.items()}
        if name == "gramsr":
            model = cls.from_release({part: fetch(file) for part, file in RELEASE.items()})
        elif weights := find_ours(name):
            model = load_ours(cls, cls.Config, weights)
        elif files["model"]:
            model = cls.from_release(files, path)
        else:
            raise FileNotFoundError(f"{path}: no such model; name gramsr, or a folder with model.safetensors or "
                                    f"{', '.join(RELEASE.values())}")
        return in_half(model.float(), dtype).to(device).eval()

    @classmethod
    def with_prior(cls, cfg, folder=None, source="GramSRConfig"):
        """`load_public`: SD 2.1 and DINOv3 around a config of file source. Raises WeightError."""
        return load_public(cls, cfg, PRIOR, folder, source)

    @classmethod
    def from_release(cls, files, folder=None):
        """The authors' files or ours; public networks from folder or fetched.

        files: paths, or None, by the keys of RELEASE. Raises WeightError.
        """
        path, file = files["model"], read_tensors(files["model"])
        with laid_out_as(RELEASE["model"], path):
            sets = file.get("nanosr", {}).get("sets", list(SETS))
            ranks = {name: int(file[f"lora_rank_unet_{name[:3]}"]) for name in sets if name != "texture"}
            early_tensors = dict(file["state_dict_unet"])
        texture_tensors, needed = {}, ["adapter"]
        if "texture" in sets:
            needed.append("texture")
        for part in needed:
            if not files[part]:
                raise WeightError(f"{path}: needs {RELEASE[part]}, or that of another step, beside it; put it there")
        if "texture" in sets:
            for name, x in read_tensors(files["texture"]).items():
                texture_tensors[name.replace(".weight", f".{TEXTURE}.weight")] = x
            ranks["texture"] = next((len(x) for name, x in texture_tensors.items() if "lora_A" in name), 4)

        model = cls.with_prior(GramSRConfig(ranks=ranks), folder, path)
        early, late = model.lora("pixel", "semantic"), model.lora("texture")
        early_tensors = {k: v for k, v in early_tensors.items() if k in early}      # as officially, others are ignored
        for part, mine, tensors in (("model", early, early_tensors), ("texture", late, texture_tensors)):
            others = [name for name in model.unet.state_dict() if name not in mine]
            load_strictly(model.unet, tensors, files[part], may_miss=others)
        load_strictly(model.adapter, read_tensors(files["adapter"]), files["adapter"])
        return model

    def release(self):
        """What is trained, laid out as the authors' files.  -> {key of RELEASE: dict}"""
        def stored(named):
            return {k: v.detach().cpu().contiguous() for k, v in named.items()}

        early = [name for name in self.cfg.ranks if name != "texture"]
        model = {"state_dict_unet": stored(self.lora(*early))}
        for name in early:
            model[f"lora_rank_unet_{name[:3]}"] = self.cfg.ranks[name]
            for place, adapter in zip(PLACES, SETS[name]):
                model[f"unet_lora_{place}_modules_{name[:3]}"] = adapted_layers(self.unet, adapter)
        if len(self.cfg.ranks) < len(SETS):
            model["nanosr"] = {"sets": list(self.cfg.ranks)}        # ours: this training is not over
        texture = {k.replace(f".{TEXTURE}", ""): v for k, v in stored(self.lora("texture")).items()}
        return {"model": model, "texture": texture, "adapter": stored(self.adapter.state_dict())}

    def save_release(self, folder, step):
        """Write `release`, with step in the files' names.  -> names"""
        names = []
        for key, content in self.release().items():
            if not content:
                continue
            name = with_step(RELEASE[key], step)
            path = Path(folder, name)
            with whole_file(path, f"{path}.part") as part:
                if key == "texture":
                    save_tensors(part, content)
                else:
                    torch.save(content, part)
            names.append(name)
        return names

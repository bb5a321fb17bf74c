"""GramSR: one step of Stable Diffusion 2.1, told by visual tokens instead of words what is in the picture.

Paper:   GramSR, arXiv 2604.25457, which extends PiSA-SR, 2412.03017. Numbers of equations are ours.
Weights: model_12501.pkl, lora_weights_dino_53001.safetensors, adapter_53001.pth of aimagelab/GramSR; unet and vae of
         stable-diffusion-2-1-base; facebook/dinov3-vitb16-pretrain-lvd1689m.
Left out: texts, which the released code never reads.

The enlarged picture goes two ways: through the VAE to a latent, which the UNet takes for one with almost no noise
(t = 1), and through DINOv3 and a small adapter to tokens, which stand where SD's text stood. Latent minus the UNet's
answer -> picture. Three LoRA sets, one a loss (gram.py), have a scale each in use.
"""

from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path

import torch
import torch.nn as nn

from models.gram import normalised
from models.lora import ALPHA, LoRA, add_lora
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

# LoRA sets in the order they are trained: {adapter: names of its layers in the UNet}
PLACES = {"encoder": r"conv_in|down_blocks\..*", "decoder": r"up_blocks\..*|conv_out", "others": r"mid_block\..*"}
TEXTURE = "default_unet_dino"       # for every layer; its own file leaves this name out
SETS = {name: {f"default_{place}_{name[:3]}": layers for place, layers in PLACES.items()}
        for name in ("pixel", "semantic")} | {"texture": {TEXTURE: ".*"}}
RELEASE = {"model": "model_12501.pkl", "texture": "lora_weights_dino_53001.safetensors", "adapter": "adapter_53001.pth"}
PRIOR = {name: f"stable-diffusion-2-1-base/{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae")}
PRIOR["vit"] = "dinov3-vitb16-pretrain-lvd1689m/model.safetensors"


@dataclass
class GramSRConfig:
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    vit: DINOv3Config = field(default_factory=DINOv3Config)
    ranks: dict = field(default_factory=lambda: dict.fromkeys(SETS, 4))     # of the sets there are
    t: int = 1                  # what the UNet is told about the noise
    tile: int = 512             # pixels per tile side: the size it was trained at
    overlap: int = 128          # pixels that tiles share, at least 1/8 of a tile

    @classmethod
    def from_dict(cls, d):
        vit = DINOv3Config(**d["vit"])
        return cls(**d | {"unet": UNetConfig(**d["unet"]), "vae": VAEConfig(**d["vae"]), "vit": vit})


def token_adapter(D, inner, context_dim):
    """DINO's tokens to what the UNet's cross-attention reads, each for itself.  (B, N, D) -> (B, N, context_dim)"""
    return nn.Sequential(nn.Linear(D, inner), nn.ReLU(), nn.Linear(inner, context_dim))


class GramSR(nn.Module):
    Config = GramSRConfig
    SWEEP = [[{name: x / 2} for x in range(5)] for name in SETS]        # of sample.py: rows, columns

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.layers = replace(cfg, ranks={}), {}      # {adapter: its layers}
        self.unet, self.vae, self.vit = UNet(cfg.unet), self.autoencoder(cfg.vae), DINOv3(cfg.vit)
        self.adapter = token_adapter(cfg.vit.embed_dim, cfg.unet.context_dim, cfg.unet.context_dim)
        # pixels; every map of the UNet is half the one above
        self.multiple = lcm(self.vae.factor << len(cfg.unet.widths) - 1, cfg.vit.patch_size)
        for name in sorted(cfg.ranks, key=list(SETS).index):
            self.add_set(name, cfg.ranks[name])

    def autoencoder(self, cfg):
        return VAE(cfg)

    def add_set(self, name, r=4):
        """A new LoRA set, which changes nothing yet: pixel, semantic or texture."""
        for adapter, layers in SETS[name].items():
            alpha = r if name == "texture" else ALPHA       # trap: a scale of 8/r = 2 for two sets, of 1 for the third
            self.layers[adapter] = add_lora(self.unet, layers, adapter, r, alpha)
        self.cfg.ranks[name] = r

    def lora(self, *sets):
        """The parameters of LoRA sets by name in the UNet."""
        mine = tuple(f".{adapter}.weight" for name in sets for adapter in SETS[name])
        return {k: p for k, p in self.unet.named_parameters() if k.endswith(mine)}

    def only(self, *sets):
        """C with which the UNet has these LoRA sets on and all others off: identities (lora.py)."""
        on, device = {}, self.unet.conv_in.weight.device
        for name in self.cfg.ranks.keys() & sets:
            on |= dict.fromkeys(SETS[name], torch.eye(self.cfg.ranks[name], device=device)[None])
        return [on] * len(self.unet.blocks)

    def tokens(self, x):
        """What stands in for a text.  x: (B, 3, H, W) enlarged LQ in [-1, 1] -> (B, N, D), N = 5 + patches"""
        return self.adapter(self.vit(normalised(x).to(self.vit.norm.weight.dtype)))     # Eq. GramSR (1)

    def predict(self, z, context, scales=(1, 1, 1)):
        """What is wrong with a latent: l1 e_p + l2 (e_ps - e_p) + l3 (e_all - e_ps), with one, two and all sets on.

        z: (B, 4, h, w); context: (B, N, D); scales: l of pixel, semantic, texture -> like z
        """
        l1, l2, l3 = scales
        l2 = l2 if "semantic" in self.cfg.ranks else l1     # a missing set changes nothing, whatever its scale
        l3 = l3 if "texture" in self.cfg.ranks else l2
        # The same sum, sorted by passes, so that what counts 0 times needs none: (1, 1, 1) is the last pass alone.
        e, t = torch.zeros_like(z), self.cfg.t
        if l1 != l2:
            e = e + (l1 - l2) * self.unet(z, t, context, self.only("pixel"))
        if l2 != l3:
            e = e + (l2 - l3) * self.unet(z, t, context, self.only("pixel", "semantic"))
        if l3 != 0:
            e = e + l3 * self.unet(z, t, context)       # Eq. GramSR (2)
        return e

    def clean(self, z, context, scales=(1, 1, 1)):
        """(B, 4, h, w) LQ latent -> clean latent; no noise schedule has a say."""
        return z - self.predict(z, context, scales)     # Eq. GramSR (3)

    def forward(self, x):
        """What training sees.  x: (B, 3, H, W) enlarged LQ in [-1, 1] -> picture, latent, context"""
        context = self.tokens(x)
        z = self.clean(self.vae.encode(x), context)
        return self.vae.decode(z).clamp(-1, 1), z, context

    def csd_conditions(self, context):
        """What `loss_csd` guides towards, and from: the tokens, which the prior was never taught to read, and none.

        context: (B, N, D) -> two like it
        """
        return context, torch.zeros_like(context)       # inferred; PiSA-SR has two prompts

    def prior(self, z_t, t, context):
        """The UNet as it was before any LoRA, which judges in `loss_csd`."""
        return self.unet(z_t, t, context, self.only())

    # ---- in use

    @torch.no_grad()
    def merge(self):
        """Fold all sets into the weights once, instead of in every pass: for scales of 1 alone."""
        for m in self.unet.modules():
            if isinstance(m, LoRA):
                m.weight.data = m.fuse()
                m.lora_A.clear(), m.lora_B.clear()
        self.cfg.ranks.clear(), self.layers.clear()

    def restore(self, z, x, scales, tile, overlap):
        """`clean`, in tiles where the latent is larger than one; each takes its own tokens.

        z: (B, 4, h, w); x: (B, 3, H, W) in [-1, 1]; tile, overlap: pixels; tile 0 = off, which B > 1 needs -> like z
        """
        f = self.vae.factor
        side = tile // self.multiple * self.multiple // f
        boxes = tile_boxes(*z.shape[-2:], side, max(overlap // f, side // 8))
        return tiled(lambda z, x: self.clean(z, self.tokens(x), scales), boxes, z, x)

    @torch.no_grad()
    def upscale(self, lq, scale=4, seed=0, pixel=None, semantic=None, texture=None, tile=0, overlap=0,
                color="adain"):
        """Super-resolution of one picture.

        lq: (1, 3, H, W) in [0, 1]; scale: 1 to 8; seed: not read, nothing is random
        pixel, semantic, texture: how much of what each LoRA set does, None = 1; one UNet pass if all are, else up to 3
        tile, overlap: pixels; None, 0 = the checkpoint's
        color: adain, wavelet or none
        -> (1, 3, round(H * scale), round(W * scale)) in [0, 1]
        """
        check_image(lq)
        H, W = (round(side * scale) for side in lq.shape[-2:])
        # official: whatever its shape, a picture is squeezed to 512 x 512
        lq_up = resize(lq, (H, W)).to(self.unet.conv_in.weight.device, non_blocking=True)
        x = pad_to_multiple(2 * lq_up - 1, self.multiple)
        scales = [1 if l is None else l for l in (pixel, semantic, texture)]
        z = self.restore(self.vae.encode(x), x, scales, tile or self.cfg.tile, overlap or self.cfg.overlap)
        sr = self.vae.decode(z).float().clamp(-1, 1) / 2 + 0.5
        # official: truncated to 8 bits before and after the colour fix
        return color_fix(sr[..., :H, :W], lq_up, color, stablesr=True)

    # ---- files: plumbing

    @classmethod
    def from_pretrained(cls, name="gramsr", device="cpu", dtype=torch.float32):
        """A model by its name (gramsr, which is fetched), or a folder with the authors' files or ours.

        Raises FileNotFoundError or ValueError, one line.
        """
        path = Path(name)
        if name == "gramsr":
            model = cls.from_release({part: fetch(file) for part, file in RELEASE.items()})
        elif weights := find_ours(name):
            model = load_ours(cls, cls.Config, weights)
        elif (files := {part: last_step(path, file) for part, file in RELEASE.items()})["model"]:
            model = cls.from_release(files, path)
        else:
            raise FileNotFoundError(f"{path}: no such model; name gramsr, or a folder with model.safetensors or "
                                    f"{', '.join(RELEASE.values())}")
        return in_half(model.to(torch.float32), dtype).to(device).eval()

    @classmethod
    def with_prior(cls, cfg, folder=None, source="GramSRConfig"):
        """`load_public`: SD 2.1 and DINOv3 around a config of file source. Raises WeightError."""
        return load_public(cls, cfg, PRIOR, folder, source)

    @classmethod
    def from_release(cls, files, folder=None):
        """The authors' files or ours.  files: paths, or None, by the keys of RELEASE. Raises WeightError."""
        path, file, texture = files["model"], read_tensors(files["model"]), {}
        with laid_out_as(RELEASE["model"], path):
            sets = file.get("nanosr", {}).get("sets", list(SETS))
            ranks = {name: int(file[f"lora_rank_unet_{name[:3]}"]) for name in sets if name != "texture"}
            tensors = dict(file["state_dict_unet"])
        for part in ["adapter", "texture"] if "texture" in sets else ["adapter"]:
            if not files[part]:
                raise WeightError(f"{path}: needs {RELEASE[part]}, or that of another step, beside it; put it there")
        if "texture" in sets:
            texture = {k.replace(".weight", f".{TEXTURE}.weight"): v for k, v in read_tensors(files["texture"]).items()}
            ranks["texture"] = next((len(v) for k, v in texture.items() if "lora_A" in k), 4)
        model = cls.with_prior(GramSRConfig(ranks=ranks), folder, path)
        early, late = model.lora("pixel", "semantic"), model.lora("texture")
        tensors = {k: v for k, v in tensors.items() if k in early}      # as officially, strangers are ignored
        for part, mine, new in (("model", early, tensors), ("texture", late, texture)):
            load_strictly(model.unet, new, files[part], model.unet.state_dict().keys() - mine)
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
                model[f"unet_lora_{place}_modules_{name[:3]}"] = self.layers[adapter]
        if len(self.cfg.ranks) < len(SETS):
            model["nanosr"] = {"sets": list(self.cfg.ranks)}        # ours: this training is not over
        texture = {k.replace(f".{TEXTURE}", ""): v for k, v in stored(self.lora("texture")).items()}
        return {"model": model, "texture": texture, "adapter": stored(self.adapter.state_dict())}

    def save_release(self, folder, step):
        """Write `release`, with step in the files' names.  -> names"""
        names = []
        for key, content in self.release().items():
            if content:
                names.append(with_step(RELEASE[key], step))
                with whole_file(path := Path(folder, names[-1]), f"{path}.part") as part:
                    if key == "texture":
                        save_tensors(part, content)
                    else:
                        torch.save(content, part)
        return names

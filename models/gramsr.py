"""GramSR: one step of Stable Diffusion 2.1, conditioned on visual tokens where a text stood.

Paper:   GramSR, arXiv 2604.25457, which extends PiSA-SR, 2412.03017. Numbers of equations are ours.
Weights: model_12501.pkl, lora_weights_dino_53001.safetensors, adapter_53001.pth of aimagelab/GramSR; unet and vae of
         stable-diffusion-2-1-base; facebook/dinov3-vitb16-pretrain-lvd1689m.
Left out: texts, which the released code never reads.

    enlarged LQ image x  -> VAE -> latent z
                         -> DINOv3, token adapter -> context
    e = UNet(z, t = 1, context), as if z were a latent with almost no noise;   z - e -> VAE -> HQ image

Three LoRA sets, pixel, semantic and texture, are trained one after the other, each with one more kind of loss (gram.py,
train_gramsr.py). In use each has a scale. A set is one adapter or several, whose names are those of the authors' files.
"""

from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path

import torch
import torch.nn as nn

from models.gram import normalised
from models.lora import ALPHA, adapted_layers, add_lora
from models.support import fast_lora
from models.support.authors import (gramsr_layout, last_step, read_gramsr, read_gramsr_texture,
                                    with_step)
from models.support.files import whole_file
from models.support.imaging import check_image, color_fix, pad_to_multiple, resize
from models.support.precision import in_half
from models.support.tiles import tile_boxes, tiled
from models.support.weights import (WeightError, fetch, find_ours, laid_out_as, load_ours, load_public, load_strictly,
                                    read_tensors, save_tensors)
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig
from models.vit import DINOv3, DINOv3Config

# Pixel and semantic have an adapter in each of three parts of the UNet.  {part: regular expression of layers' names}
PLACES = {"encoder": r"conv_in|down_blocks\..*", "decoder": r"up_blocks\..*|conv_out", "others": r"mid_block\..*"}
# Texture has a single adapter, in every layer; the authors' file of texture alone leaves this name out.
TEXTURE = "default_unet_dino"
# {set: {adapter: regular expression of its layers' names}}
SETS = {
    "pixel": {f"default_{place}_pix": layers for place, layers in PLACES.items()},
    "semantic": {f"default_{place}_sem": layers for place, layers in PLACES.items()},
    "texture": {TEXTURE: ".*"},
}
ALL = tuple(SETS)       # in the order in which they are trained
RELEASE = {"model": "model_12501.pkl", "texture": "lora_weights_dino_53001.safetensors", "adapter": "adapter_53001.pth"}
PRIOR = {name: f"stable-diffusion-2-1-base/{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae")}
PRIOR["vit"] = "dinov3-vitb16-pretrain-lvd1689m/model.safetensors"


@dataclass
class GramSRConfig:
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    vit: DINOv3Config = field(default_factory=DINOv3Config)
    ranks: dict = field(default_factory=lambda: dict.fromkeys(ALL, 4))      # {set: rank}
    t: int = 1                  # the UNet's time
    tile: int = 512             # pixels per tile side: the size it was trained at
    overlap: int = 128          # pixels that neighbouring tiles share, at least 1/8 of a tile

    @classmethod
    def from_dict(cls, d):
        parts = {"unet": UNetConfig(**d["unet"]), "vae": VAEConfig(**d["vae"]), "vit": DINOv3Config(**d["vit"])}
        return cls(**(d | parts))


def token_adapter(D, inner, context_dim):
    """Make an MLP that turns each of DINO's tokens into one of the context.  (B, N, D) -> (B, N, context_dim)"""
    return nn.Sequential(nn.Linear(D, inner), nn.ReLU(), nn.Linear(inner, context_dim))


class GramSR(nn.Module):
    """The system: `vae`, `unet` with the LoRA sets, vision transformer `vit`, and `adapter`, which fits its tokens.

    The LoRA sets and `adapter` are trained, all else is frozen.
    """

    Config = GramSRConfig
    SWEEP = [[{name: x / 2} for x in range(5)] for name in ALL]     # knobs of each image on sample.py's sheet, in rows

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.unet, self.vae, self.vit = self.networks(cfg)
        self.adapter = token_adapter(cfg.vit.embed_dim, cfg.unet.context_dim, cfg.unet.context_dim)
        halved = self.vae.factor * 2 ** (len(cfg.unet.widths) - 1)
        # what the sides of x must be a multiple of: the UNet halves its maps, and DINO takes whole patches
        self.multiple = lcm(halved, cfg.vit.patch_size)
        for name, r in cfg.ranks.items():
            self.add_adapters(name, r)

    def networks(self, cfg):
        """Make UNet, VAE and DINOv3."""
        return UNet(cfg.unet), VAE(cfg.vae), DINOv3(cfg.vit)

    # ---- LoRA sets

    def add_adapters(self, name, r):
        """Add new adapters for a LoRA set, which change nothing yet.  name: pixel, semantic or texture; r: rank"""
        # trap: the scale alpha / r is 8 / r, at rank 4 that is 2, for two of the sets, but 1 for the third
        alpha = r if name == "texture" else ALPHA
        for adapter, layers in SETS[name].items():
            add_lora(self.unet, layers, adapter, r, alpha)

    def add_set(self, name, r=4):
        """Add a new LoRA set, to the UNet and to the config; a training begins with it.  name, r: of `add_adapters`"""
        self.add_adapters(name, r)
        self.cfg = replace(self.cfg, ranks=self.cfg.ranks | {name: r})

    def parameters_of(self, *sets):
        """Collect the parameters of LoRA sets.  -> {name in the UNet: parameter}"""
        ends = tuple(f".{adapter}.weight" for name in sets for adapter in SETS[name])
        return {k: p for k, p in self.unet.named_parameters() if k.endswith(ends)}

    def adapters_of(self, *sets):
        """Make the UNet's argument `adapters` (lora.py) by which these LoRA sets are on and all others off."""
        return {adapter: 1 for name in sets for adapter in SETS[name]}

    # ---- one step

    def tokens(self, x):
        """Make the context, which stands where a text stood.

        x: (B, 3, H, W) enlarged LQ in [-1, 1] -> (B, N, context_dim), N = 5 + patches: a class token, 4 registers
        """
        dtype = self.vit.norm.weight.dtype      # the dtype of DINO's stream; other weights may be in half precision
        return self.adapter(self.vit(normalised(x).to(dtype)))      # Eq. GramSR (1)

    def residual(self, z, context, *sets):
        """Compute e, what these LoRA sets would take away from z.  z: (B, 4, h, w); context: (B, N, D) -> like z"""
        return self.unet(z, self.cfg.t, context, self.adapters_of(*sets))

    def clean(self, z, e):
        """Subtract the residual from the LQ latent; no noise schedule is used.  z, e: (B, 4, h, w) -> like z"""
        return z - e        # Eq. GramSR (3)

    def forward(self, x):
        """Do what training does, with all sets on.

        x: (B, 3, H, W) enlarged LQ in [-1, 1] -> image like x, its latent, context
        """
        context, z_lq = self.tokens(x), self.vae.encode(x)
        z = self.clean(z_lq, self.residual(z_lq, context, *ALL))
        return self.vae.decode(z).clamp(-1, 1), z, context

    def csd_conditions(self, context):
        """Give `loss_csd` its condition and negative: the tokens, which the prior was never taught to read, and none.

        context: (B, N, D) -> two like it
        """
        return context, torch.zeros_like(context)       # inferred; PiSA-SR has two prompts

    def prior(self, z_t, t, context):
        """Run the UNet as it was before any LoRA; `loss_csd` asks it what it would change.  -> eps like z_t"""
        return self.unet(z_t, t, context)

    # ---- in use

    def predict(self, z, context, scales=(1, 1, 1)):
        """Find the residual, with a scale for what each set adds to those before it.

        With e_p of the set pixel alone, e_ps of pixel and semantic, e_all of all three:

            e = l1 e_p + l2 (e_ps - e_p) + l3 (e_all - e_ps)
              = (l1 - l2) e_p + (l2 - l3) e_ps + l3 e_all

        In the second form what has a factor of 0 needs no pass of the UNet: if all scales are 1, there is one pass.

        z: (B, 4, h, w); context: (B, N, D); scales: l1, l2, l3, of pixel, semantic, texture -> like z
        """
        l1, l2, l3 = scales
        # in training there are fewer sets at first
        if "semantic" not in self.cfg.ranks:    # then e_ps is e_p, and l2 has nothing to scale
            l2 = l1
        if "texture" not in self.cfg.ranks:     # then e_all is e_ps
            l3 = l2
        e = torch.zeros_like(z)
        for factor, sets in ((l1 - l2, ["pixel"]), (l2 - l3, ["pixel", "semantic"]), (l3, ALL)):
            if factor != 0:
                e = e + factor * self.residual(z, context, *sets)       # Eq. GramSR (2)
        return e

    def merge(self):
        """Fold all sets into the weights once, instead of in every pass, if all scales will be 1.

        Trap: it cannot be undone. The model has no sets any more, so nothing is left to scale or to save.
        """
        fast_lora.merge(self.unet)
        self.cfg = replace(self.cfg, ranks={})

    def restore(self, z, x, scales, tile, overlap):
        """Make the clean latent of an LQ latent, in tiles where it is larger than one; each tile has its own tokens.

        z: (B, 4, h, w); x: (B, 3, H, W) in [-1, 1]; tile, overlap: pixels; tile 0: the whole image at once -> like z
        """
        def restored(z, x):
            return self.clean(z, self.predict(z, self.tokens(x), scales))

        f = self.vae.factor
        pixels = tile // self.multiple * self.multiple      # of a tile's side
        side = pixels // f      # cells
        boxes = tile_boxes(*z.shape[-2:], side, max(overlap // f, side // 8))
        return tiled(restored, boxes, z, x)

    @torch.no_grad()
    def upscale(self, lq, scale=4, seed=0, pixel=None, semantic=None, texture=None, tile=0, overlap=0,
                color="adain"):
        """Enlarge images and restore them.

        lq: (B, 3, H, W) in [0, 1]; scale: 1 to 8; seed: not read, nothing is random
        pixel, semantic, texture: scales of the LoRA sets, None = 1; one UNet pass if all are, else up to 3
        tile, overlap: pixels; 0 = the checkpoint's, but an overlap of half a smaller tile at most
        color: adain, wavelet or none
        -> (B, 3, round(H * scale), round(W * scale)) in [0, 1]. Raises ValueError.
        """
        lq = check_image(lq)
        cfg = self.cfg
        scales = [1 if l is None else l for l in (pixel, semantic, texture)]

        # 1. enlarge, and pad the sides
        H, W = (round(side * scale) for side in lq.shape[-2:])
        # official: an image of any shape is squeezed to 512 x 512; here not
        lq_up = resize(lq, (H, W)).to(self.unet.conv_in.weight.device, non_blocking=True)
        x = pad_to_multiple(2 * lq_up - 1, self.multiple)

        # 2. encode, 3. one step, 4. decode
        z_lq = self.vae.encode(x)
        tile = tile or cfg.tile
        z = self.restore(z_lq, x, scales, tile, overlap or min(cfg.overlap, tile // 2))
        sr = self.vae.decode(z).clamp(-1, 1)[..., :H, :W].float() / 2 + 0.5

        # 5. give back the colours
        # official: truncated to 8 bits before and after it; here not
        return color_fix(sr, lq_up, color, stablesr=True)

    # ---- files: plumbing

    @classmethod
    def from_pretrained(cls, name="gramsr", device="cpu", dtype=torch.float32):
        """Load a model: gramsr, which is fetched, or from a folder with the authors' files or ours.

        Raises FileNotFoundError or ValueError, one line.
        """
        path, ours = Path(name), find_ours(name)
        files = {part: last_step(path, file) for part, file in RELEASE.items()}
        if name == "gramsr":
            model = cls.from_release({part: fetch(file) for part, file in RELEASE.items()})
        elif ours:
            model = load_ours(cls, cls.Config, ours)
        elif files["model"]:
            model = cls.from_release(files, path)
        else:
            raise FileNotFoundError(f"{path}: no such model; name gramsr, or a folder with model.safetensors or "
                                    f"{', '.join(RELEASE.values())}")
        return in_half(model.float(), dtype).to(device).eval()

    @classmethod
    def with_prior(cls, cfg, folder=None, source="GramSRConfig"):
        """Load SD 2.1 and DINOv3 into a new model.  cfg: from file source. Raises WeightError."""
        return load_public(cls, cfg, PRIOR, folder, source)

    @classmethod
    def from_release(cls, files, folder=None):
        """Load the authors' files, or ours; public networks from folder or fetched.

        files: {key of RELEASE: path, or None where there is no such file}. Raises WeightError.
        """
        path, texture_path, adapter_path = files["model"], files["texture"], files["adapter"]
        file = read_tensors(path)
        with laid_out_as(RELEASE["model"], path):
            ranks, pixel_semantic = read_gramsr(file)       # the tensors of two sets, and whether there is a third

        needed = ["adapter", "texture"] if "texture" in ranks else ["adapter"]
        for part in needed:
            if not files[part]:
                raise WeightError(f"{path}: needs {RELEASE[part]}, or the one of another step, in its folder; "
                                  "put it there")
        if "texture" in ranks:
            ranks["texture"], texture = read_gramsr_texture(read_tensors(texture_path), TEXTURE)

        model = cls.with_prior(GramSRConfig(ranks=ranks), folder, path)
        wanted = model.parameters_of("pixel", "semantic")
        pixel_semantic = {k: v for k, v in pixel_semantic.items() if k in wanted}       # others are ignored officially
        model.load_sets(pixel_semantic, path, "pixel", "semantic")
        if "texture" in ranks:
            model.load_sets(texture, texture_path, "texture")
        load_strictly(model.adapter, read_tensors(adapter_path), adapter_path)
        return model

    def load_sets(self, tensors, path, *sets):
        """Load LoRA sets.  tensors: {name in the UNet: tensor}, of file path. Raises WeightError."""
        wanted = self.parameters_of(*sets)
        others = [name for name in self.unet.state_dict() if name not in wanted]
        load_strictly(self.unet, tensors, path, may_miss=others)

    def release(self):
        """Lay out what is trained as the authors' files.  -> {key of RELEASE: dict}"""
        def stored(named):
            return {k: v.detach().cpu().contiguous() for k, v in named.items()}

        # pixel and semantic go into one file, which also lists the layers that each of their adapters is in
        early = [name for name in self.cfg.ranks if name != "texture"]
        layers = {}     # {set: {place: names of layers}}
        for name in early:
            layers_of_places = [adapted_layers(self.unet, adapter) for adapter in SETS[name]]
            layers[name] = dict(zip(PLACES, layers_of_places))
        model = gramsr_layout(self.cfg.ranks, stored(self.parameters_of(*early)), layers)
        # texture has a file of its own, which leaves the adapter's name out
        texture = {k.replace(f".{TEXTURE}", ""): v for k, v in stored(self.parameters_of("texture")).items()}
        return {"model": model, "texture": texture, "adapter": stored(self.adapter.state_dict())}

    def save_release(self, folder, step):
        """Write the files of `release`, with step in their names.  -> names of files"""
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

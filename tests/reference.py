"""S3Diff and GramSR out of diffusers, peft and transformers, wired as the official code does it, on the very tensors of ours: what bench.py
compares with.

S3Diff, official: two passes of the UNet for two prompts, both prompts through the text encoder for every picture, LoRA beside the layers, with the
modulation as an einsum between A and B. Not official: the posterior's mode, and our estimator, modulation, enlargement and colour fix.
GramSR, official: all adapters beside the layers. Not official: our token adapter, enlargement and colour fix.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextConfig, CLIPTextModel, DINOv3ViTConfig, DINOv3ViTModel

from models.gram import normalised
from models.gramsr import SETS
from models.support.imaging import color_fix, pad_to_multiple, resize
from models.lora import ALPHA, adapted_layers
from models.s3diff import ADAPTER


def modulated_forward(self, x, *args, **kwargs):
    """What the official code puts in place of a peft layer's forward."""
    result = self.base_layer(x, *args, **kwargs)
    for name in self.active_adapters:
        A, B = self.lora_A[name], self.lora_B[name]
        h = A(self.lora_dropout[name](x.to(A.weight.dtype)))
        h = torch.einsum("...khw,...kr->...rhw" if h.ndim == 4 else "...lk,...kr->...lr", h, self.de_mod)
        result = result + B(h) * self.scaling[name]
    return result


def block_id(network, layer):
    """Which of the modulation's matrices a layer takes."""
    parts = layer.removeprefix("encoder.").split(".")
    numbers = {"down_blocks": 0, "mid_block": 4, "up_blocks": 5, "conv_in": 5, "conv_out": 5 if network == "vae" else 9}
    return numbers[parts[0]] + (int(parts[1]) if parts[0] in ("down_blocks", "up_blocks") else 0)


def adopt(network, ours):
    """Make our tensors the network's own; memory holds them once."""
    tensors = {k.removeprefix("text_model."): v for k, v in ours.state_dict().items()}      # transformers 5 drops the prefix in memory
    names = {name: name.replace(".base_layer.", ".").removeprefix("text_model.").removeprefix("model.") for name in network.state_dict()}
    assert set(names.values()) == set(tensors), set(names.values()) ^ set(tensors)
    network.load_state_dict({name: tensors[ours] for name, ours in names.items()}, assign=True)
    return network.eval()


def unet_of(cfg):
    return UNet2DConditionModel(block_out_channels=cfg.widths, attention_head_dim=cfg.num_heads, layers_per_block=cfg.layers_per_block,
                                cross_attention_dim=cfg.context_dim, use_linear_projection=True)


def vae_of(cfg):
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=cfg.widths,
                         layers_per_block=cfg.layers_per_block, latent_channels=4)


class Autoencoder:
    """What both share: self.vae, as diffusers has it."""

    def encode(self, x):
        return self.vae.encode(x).latent_dist.mode() * self.vae.config.scaling_factor

    def decode(self, z):
        return self.vae.decode(z / self.vae.config.scaling_factor).sample

    def to(self, dtype):
        """All of it in dtype, as the official scripts cast a network -> self"""
        for network in self.networks:
            network.to(dtype)
        self.like = self.like.to(dtype)
        return self


class S3DiffReference(Autoencoder):
    """model: S3Diff of four levels; encoder: TextEncoder; ids: (2, 77) of the good text and of the bad one"""

    def __init__(self, model, encoder, ids):
        self.model, self.ids, cfg, text = model, ids, model.cfg, encoder.cfg
        self.like = model.unet.conv_in.weight
        with torch.device("meta"):
            self.unet, self.vae = unet_of(cfg.unet), vae_of(cfg.vae)
            self.unet.add_adapter(LoraConfig(r=cfg.r_unet, target_modules=list(cfg.unet_targets)), ADAPTER["unet"])
            self.vae.add_adapter(LoraConfig(r=cfg.r_vae, target_modules=cfg.vae_targets), ADAPTER["vae"])
            self.encoder = CLIPTextModel(CLIPTextConfig(
                vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size, num_hidden_layers=text.layers,
                num_attention_heads=text.heads, max_position_embeddings=text.positions, hidden_act="gelu", bos_token_id=0, eos_token_id=2))
        adopt(self.unet, model.unet), adopt(self.vae, model.vae), adopt(self.encoder, encoder)
        self.networks = self.unet, self.vae, self.encoder
        self.positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self.layers = {network: [(block_id(network, name), m) for name, m in getattr(self, network).named_modules() if isinstance(m, LoraLayer)]
                       for network in ADAPTER}
        for _, layer in self.layers["unet"] + self.layers["vae"]:
            layer.forward = MethodType(modulated_forward, layer)

    def modulate(self, scores):
        for network, layers in self.layers.items():
            C = self.model.matrices(network, scores)
            for block, layer in layers:
                layer.de_mod = C[ADAPTER[network]][:, block].mT.to(self.like)

    def describe(self):
        """-> features of the good text and of the bad one, one after the other as the official code does"""
        return [self.encoder(row[None], position_ids=self.positions).last_hidden_state for row in self.ids]

    def guided(self, z, t, contexts, guidance):
        good, bad = (self.unet(z, t, encoder_hidden_states=context.expand(len(z), -1, -1)).sample for context in contexts)
        return bad + guidance * (good - bad)

    def upscale(self, lq, scale=4, color="wavelet"):
        model, (H, W) = self.model, (scale * side for side in lq.shape[-2:])
        self.modulate(model.estimate(lq))
        lq_up = F.interpolate(lq.to(self.like.device), (H, W), mode="bilinear")
        z = self.encode(pad_to_multiple(2 * lq_up - 1, 64).to(self.like))
        eps = self.guided(z, model.cfg.t, self.describe(), model.cfg.guidance)
        sr = self.decode(model.clean(z, eps, model.cfg.t)).float().clamp(-1, 1) / 2 + 0.5
        return color_fix(sr[..., :H, :W], lq_up, color, stablesr=True)


class GramSRReference(Autoencoder):
    """model: GramSR of four levels with its three LoRA sets"""

    def __init__(self, model):
        self.model, cfg, vit = model, model.cfg, model.cfg.vit
        with torch.device("meta"):
            self.unet, self.vae = unet_of(cfg.unet), vae_of(cfg.vae)
            for name, r in cfg.ranks.items():
                for adapter in SETS[name]:
                    alpha = r if name == "texture" else ALPHA
                    self.unet.add_adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=adapted_layers(model.unet, adapter)), adapter)
            self.unet.set_adapter(list(model.adapters_of(*cfg.ranks)))
        self.vit = DINOv3ViTModel(DINOv3ViTConfig(      # not on the meta device: it would lose its table of positions
            patch_size=vit.patch_size, hidden_size=vit.embed_dim, intermediate_size=int(vit.embed_dim * vit.mlp_ratio), num_register_tokens=vit.registers,
            num_hidden_layers=vit.depth, num_attention_heads=vit.num_heads, use_gated_mlp=vit.gated_mlp)).to(model.vit.norm.weight.device)
        adopt(self.unet, model.unet), adopt(self.vae, model.vae), adopt(self.vit, model.vit)
        self.networks, self.like = (self.unet, self.vae, self.vit), model.unet.conv_in.weight

    def tokens(self, x):
        return self.model.adapter(self.vit(normalised(x).to(self.like)).last_hidden_state)

    def predict(self, z, context):
        return self.unet(z, self.model.cfg.t, encoder_hidden_states=context).sample

    def upscale(self, lq, scale=4):
        H, W = (scale * side for side in lq.shape[-2:])
        lq_up = resize(lq, (H, W)).to(self.like.device)
        x = pad_to_multiple(2 * lq_up - 1, self.model.multiple)
        z = self.encode(x.to(self.like))
        sr = self.decode(z - self.predict(z, self.tokens(x))).float().clamp(-1, 1) / 2 + 0.5
        return color_fix(sr[..., :H, :W], lq_up, "adain", stablesr=True)

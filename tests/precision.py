"""What half precision costs: every network and system in the types a GPU can compute in, held against float32.

    python tests/precision.py [--device cpu] [--tiny] [--seed 0]

Random weights, those of residual branches scaled so that streams grow as they do in the public models (VOSR: up to 126). A figure is the ratio of
signal to error in dB for networks, and PSNR of the picture for systems. "as it was": everything in that type, streams and norms too, which is how
this code computed at first. tf32 is real on a GPU and emulated elsewhere: inputs and weights of products are rounded to 10 bits.
Widths are small without a GPU (the --tiny ones of bench.py, depths as published), full ones on it unless --tiny is given.
"""

import argparse
import copy
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from bench import S3, UNET, VAE, Gram, Vosr, with_numbers  # noqa: E402
from models.dit import DiT, DiTConfig, Rope  # noqa: E402
from models.support.precision import in_half  # noqa: E402
from models.unet import UNet, UNetConfig  # noqa: E402
from models.vae import VAE as Autoencoder  # noqa: E402
from models.vae import VAEConfig  # noqa: E402
from models.vit import ViT, ViTConfig  # noqa: E402


def ten_bits(x):
    """float32 rounded to TF32's mantissa, to even."""
    i = x.view(torch.int32)
    return ((i + 0xFFF + ((i >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def in_tf32(network):
    """Emulated: of every product both factors are rounded."""
    for m in network.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            m.weight.data = ten_bits(m.weight.data)
            m.register_forward_pre_hook(lambda m, args: (ten_bits(args[0].contiguous()), *args[1:]))
    return network


def whole(dtype):
    return lambda network: network.to(dtype)


WAYS = {"tf32": in_tf32, "float16": lambda n: in_half(n, torch.float16), "bfloat16": lambda n: in_half(n, torch.bfloat16),
        "float16 as it was": whole(torch.float16), "bfloat16 as it was": whole(torch.bfloat16)}


def dB(x, y, peak=None):
    error = (x.double() - y.double()).square().mean().sqrt()
    return (20 * torch.log10((peak or y.double().std()) / error)).item()


def grow(network, run, ends, largest):
    """Scale the last layers of residual branches so that the stream reaches `largest`, which is linear in them where branches begin with norms."""
    seen = []
    hooks = [b.register_forward_hook(lambda m, a, out: seen.append(out.abs().max().item())) for b in network.blocks]
    run(network)
    for name, m in network.named_modules():
        if name.startswith("blocks.") and name.endswith(ends):
            m.weight.data *= largest / max(seen)
            m.bias.data *= largest / max(seen)
    [hook.remove() for hook in hooks]


def networks(full, g, device):
    """name, network in float32, function of the network"""
    def random(*shape):
        return torch.randn(shape, generator=g, device=device)

    def like(m, *xs):       # inputs in the type of a network that was cast as a whole
        return [x.to(next(p for k, p in m.named_parameters() if "norm" in k).dtype) for x in xs]

    with torch.device("meta"):
        dit = DiT(DiTConfig() if full else DiTConfig(input_size=16, hidden_size=256, num_heads=4, z_dims=64))
        vit = ViT(ViTConfig() if full else ViTConfig(img_size=112, embed_dim=128, num_heads=2))
        unet, vae = (UNet(UNetConfig()), Autoencoder(VAEConfig())) if full else (UNet(replace(UNET, layers_per_block=2)), Autoencoder(replace(VAE, layers_per_block=2)))
    dit, vit, unet, vae = (with_numbers(m, g, device) for m in (dit, vit, unet, vae))
    dit.feat_rope = Rope(dit.side, dit.cfg.hidden_size // dit.cfg.num_heads).to(device)      # the one thing that is not random
    side = dit.cfg.input_size
    z, z_lq, feat, t = random(1, 4, side, side), random(1, 4, side, side), random(1, 256, dit.cfg.z_dims), torch.ones(1, device=device)
    x, picture = random(1, 3, vit.cfg.img_size // 14 * 14, vit.cfg.img_size // 14 * 14), torch.tanh(random(1, 3, 8 * side, 8 * side))
    text = random(1, 77, unet.cfg.context_dim)
    run = {"DiT": lambda m: m(*like(m, z, z_lq, feat), t), "ViT": lambda m: m(*like(m, x)), "UNet": lambda m: m(*like(m, z), 999, *like(m, text)),
           "VAE encoder": lambda m: m.encode(*like(m, picture)), "VAE decoder": lambda m: m.decode(*like(m, z))}
    grow(dit, run["DiT"], ("attn.proj", "cross_attn.proj", "mlp.w3"), 126)
    grow(vit, run["ViT"], ("attn.proj", "mlp.fc2"), 60)
    return [(name, m, run[name]) for name, m in (("DiT", dit), ("ViT", vit), ("UNet", unet), ("VAE encoder", vae), ("VAE decoder", vae))]


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    device = torch.device(args.device)
    full, g = device.type == "cuda" and not args.tiny, torch.Generator(device).manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print("|", *(f"{name} |" for name in ("", *WAYS)))
    for name, network, run in networks(full, g, device):
        plain = run(network)
        print(f"| {name} |", *(f"{dB(run(way(copy.deepcopy(network))), plain):.1f} |" for way in WAYS.values()), flush=True)
    options, lq = Namespace(tiny=not full, steps=None), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(args.seed))
    for name, make in {"vosr-tiny": lambda: Vosr("tiny", options, device), "S3Diff": lambda: S3(options, device), "GramSR": lambda: Gram(options, device)}.items():
        plain, found = make().model.upscale(lq), []
        for kind in ("tf32", "float16", "bfloat16"):
            system = make()
            if kind == "tf32":
                in_tf32(system.model)
            else:
                system.to(getattr(torch, kind))
            found.append(f"{dB(system.model.upscale(lq), plain, 1.0):.1f}")
        print(f"| {name}, picture |", *(f"{x} |" for x in found), "| |", flush=True)


if __name__ == "__main__":
    main()

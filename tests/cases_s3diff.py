"""Golden cases of S3Diff: how each case of golden/s3diff.json is computed with our code.

Each function takes the case as stored and `get(name)`, which builds an input by its recipe -> {output name: array}.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import fill
import torch
import torch.nn.functional as F
from cases_vosr import fill_module, known, tensors

from models.clip import TextConfig, TextEncoder, Tokenizer
from models.denet import NUM_BLOCKS, STRIDES, DegradationEstimator
from models import discriminator
from models.discriminator import Discriminator, multilevel_loss
from models.support.imaging import adain, low_frequencies, pad_to_multiple
from models.support.tiles import tile_boxes
from models.lora import Conv2d, Linear, Modulation
from models.lpips import LPIPS
from models.s3diff import S3Diff, S3DiffConfig, is_in_release
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig
from models.vit import ViT, ViTConfig
from models.support.weights import locate
from train_s3diff import Pairs, Stage, adversary, fake, prompts_and_targets, real, reconstruct
from training import freeze_all_but


def unet_config(c):
    return UNetConfig(c.get("in_channels", 4), c.get("out_channels", 4), tuple(c["block_out_channels"]),
                      tuple(c["heads"]), c["layers_per_block"],
                      c["cross_attention_dim"], c.get("norm_groups", 32))


def vae_config(c):
    return VAEConfig(latent_channels=c.get("latent_channels", 4), widths=tuple(c["block_out_channels"]),
                     layers_per_block=c["layers_per_block"],
                     norm_groups=c.get("norm_groups", 32), scaling_factor=c.get("scaling_factor", 0.18215))


@torch.no_grad()
def unet(case, get):
    model = fill_module(UNet(unet_config(case["config"])), case["fill"]["salt"])
    z, context = tensors(get, "latents", "context")
    return {f"eps_t{t}": model(z, t, context) for t in get("timesteps")}


@torch.no_grad()
def vae(case, get):
    model = fill_module(VAE(vae_config(case["config"])), case["fill"]["salt"])
    image, latent = tensors(get, "image", "latent")
    return {"moments": model.quant_conv(model.encoder(image)), "mode": model.moments(image)[0],
            "mode_scaled": model.encode(image),
            "decoded": model.decode(latent * model.cfg.scaling_factor),
            "mode_of_faint_image": model.moments(0.003 * image)[0]}


def path_in_pkl(name):
    """Where s3diff.pkl keeps a trained parameter of S3Diff; the golden numbers go by that path."""
    network, _, rest = name.partition(".")
    if network != "modulation":
        return f"state_dict_{name}"
    return f"state_embeddings.state_dict_{rest}" if "_block." in rest else rest if rest == "w" else f"state_dict_{rest}"


@torch.no_grad()
def fill_trained(named_parameters, salt):
    for name, parameter in named_parameters:
        parameter.copy_(torch.from_numpy(fill.weight(path_in_pkl(name), tuple(parameter.shape), salt)))


@torch.no_grad()
def degradation_embedding(case, get):
    c = case["config"]
    model = Modulation(c["rank_vae"], c["rank_unet"], c["vae_blocks"], c["unet_blocks"], c["fourier"],
                       c["block_embedding_dim"])
    fill_trained([(f"modulation.{name}", p) for name, p in model.named_parameters()], case["fill"]["salt"])
    out = {}
    for network in ("vae", "unet"):
        C = out[f"{network}_matrices"] = model.matrices(network, *tensors(get, "scores")).mT     # officially transposed
        out |= {f"{network}_block{i}": C[:, i] for i in range(C.shape[1])}
    return out


@torch.no_grad()
def lora(case, get):
    c = case["config"]
    more = [c["kernel"], c["stride"], c["padding"]] if "kernel" in c else []
    layer = (Conv2d if more else Linear)(c["in"], c["out"], *more)
    layer.add_adapter("default", c["r"], c["lora_alpha"])
    fill_module(torch.nn.ModuleDict({"layer": layer}), case["fill"]["salt"])
    x, C = tensors(get, "x", "C")
    with torch.enable_grad():       # the plain way, and the fast one
        y = layer(x, {"default": C.mT})
    torch.testing.assert_close(layer(x, {"default": C.mT}), y, atol=1e-4, rtol=1e-4)
    return {"base": layer(x), "y": y.detach()}


@torch.no_grad()
def clip_text(case, get):
    encoder = fill_module(TextEncoder(known(TextConfig, case["config"])), case["fill"]["salt"])
    prompts = [name.removeprefix("ids_") for name in case["inputs"]]
    return {f"last_hidden_state_{prompt}": encoder(torch.tensor([get(f"ids_{prompt}")])) for prompt in prompts}


def clip_file(name):
    """CLIP's public vocab.json or merges.txt, from ../shared/clip or the weights cache -> Path"""
    path = Path(fill.__file__).resolve().parents[2] / "shared" / "clip" / name
    path = path if path.exists() else locate(f"sd-turbo/tokenizer/{name}")
    if path is None:
        raise FileNotFoundError(f"CLIP's {name} is neither in ../shared/clip nor in the weights cache")
    return path


@cache
def tokenizer(length=77):
    return Tokenizer(clip_file("vocab.json"), clip_file("merges.txt"), length)


def tokens(case, get):
    ours = tokenizer(case["config"]["length"])([get(name) for name in case["inputs"]]).tolist()
    # 'openai' is another tokenizer, which S3Diff does not use, and 'same' compares the two: both are taken as stored.
    return {name: case["outputs"][name] | {"hf": row} for name, row in zip(case["inputs"], ours)}


@torch.no_grad()
def degradation_estimator(case, get):
    c = case["config"]
    assert (c["num_in_ch"], c["num_degradation"], tuple(c["num_blocks"]), tuple(c["downscales"])) == (3, 2, NUM_BLOCKS, STRIDES)
    model = fill_module(DegradationEstimator(c["num_feats"]), case["fill"]["salt"])
    assert sum(p.numel() for p in model.parameters()) == case["config"].get("parameters", 2351362)
    image, = tensors(get, "image")
    branches = enumerate(zip(model.conv_first, model.body))
    return {"scores": model(image), **{f"features_branch{i}": body(first(image)) for i, (first, body) in branches}}


@torch.no_grad()
def lpips(case, get):
    model = fill_module(LPIPS(case["config"]["net"]), case["fill"]["salt"])
    a, b = tensors(get, "a", "b")
    levels = model.layer_distances(a, b)
    levels = {f"level{i}": level.view(-1, 1, 1, 1) for i, level in enumerate(levels.unbind(1))}
    return {"lpips": model(a, b).view(-1, 1, 1, 1), **levels}


def color(case, get):
    target, source = tensors(get, "target", "source")
    source = 0.5 * source + torch.tensor([0.4, 0.1, 0.0]).view(3, 1, 1)     # as the input's 'then' says
    levels = case["config"]["levels"]

    def wavelet(x, ref):
        return x + low_frequencies(ref - x, levels)

    def bytes_of(x):    # official: to 8 bits by truncation
        return (255 * x.clamp(0, 1)).floor()

    t8, s8 = bytes_of(target) / 255, bytes_of(source) / 255
    low = low_frequencies(target, levels)
    return {"wavelet": wavelet(target, source), "adain": adain(target, source, stablesr=True),
            "target_high": target - low, "target_low": low,
            **{f"{name}_uint8": bytes_of(fixed)[0].permute(1, 2, 0)
               for name, fixed in (("wavelet", wavelet(t8, s8)), ("adain", adain(t8, s8, stablesr=True)))}}


# -----------------------------------------------------------------------------
# the whole system


def make_s3diff(c, salt, parts=("unet", "vae", "denet")):
    """The system of a case: the frozen networks by their own names, what is trained by its path in s3diff.pkl."""
    model = S3Diff(S3DiffConfig(unet=unet_config(c["unet"]), vae=vae_config(c["vae"]), r_unet=c["rank_unet"],
                                r_vae=c["rank_vae"]))
    for part in parts:
        fill_module(getattr(model, part), salt)
    fill_trained([(name, p) for name, p in model.named_parameters() if is_in_release(name)], salt)
    return model


def describe(c, salt, texts):
    """Features of texts by the case's text encoder -> (n, 77, D)"""
    encoder = fill_module(TextEncoder(known(TextConfig, c["text"])), salt)
    return encoder(tokenizer()(texts))


@torch.no_grad()
def pipeline(case, get):
    c, salt, guidance = case["config"], case["fill"]["salt"], get("guidance")
    model = make_s3diff(c, salt)
    lq, = tensors(get, "lr")
    prompts = describe(c, salt, [get("positive_prompt"), get("negative_prompt")])
    scores = tensors(get, "scores")[0] if "scores" in case["inputs"] else model.estimate(lq)
    C_vae, C_unet = model.matrices("vae", scores), model.matrices("unet", scores)
    H, W = (c["sf"] * side for side in lq.shape[-2:])
    x = pad_to_multiple(2 * F.interpolate(lq, (H, W), mode="bilinear") - 1, 64)
    z = model.vae.encode(x, adapters=C_vae)
    tile, overlap = 8 * c["latent_tiled_size"], 8 * c["latent_tiled_overlap"]
    eps = model.predict(z, 999, prompts, C_unet, guidance, tile, overlap)
    x0 = model.clean(z, eps, 999)
    image = model.vae.decode(x0).clamp(-1, 1)
    first = tile_boxes(*z.shape[2:], c["latent_tiled_size"], c["latent_tiled_overlap"])[0]
    by_one = {name: model.unet(z, 999, prompts[i : i + 1], C_unet)
              for i, name in enumerate(("eps_positive", "eps_negative"))}
    model.prompts = prompts
    scores_given = {"blur": float(scores[0, 0]), "noise": float(scores[0, 1])} if "scores" in case["inputs"] else {}
    sr = model.upscale(lq, c["sf"], guidance=guidance, tile=tile, overlap=overlap, color="none", **scores_given)
    torch.testing.assert_close(sr, image[..., :H, :W] / 2 + 0.5, rtol=0, atol=1e-4)
    return {"scores": scores, "padded_input": x, "context_positive": prompts[:1], "context_negative": prompts[1:],
            "latent": z, **by_one, "eps": eps,
            "eps_tile0_positive": model.unet(z[..., first[0], first[1]], 999, prompts[:1], C_unet), "x0": x0,
            "image_padded": image, "image": sr}


@torch.no_grad()
def train_forward(case, get):
    c, salt = case["config"], case["fill"]["salt"]
    model = make_s3diff(c, salt)
    x, scores = tensors(get, "x_src", "scores")
    context = describe(c, salt, get("prompts"))
    z = model.vae.encode(x, adapters=model.matrices("vae", scores))
    eps = model.unet(z, 999, context, model.matrices("unet", scores))
    return {"latent": z, "eps": eps, "x0": model.clean(z, eps, 999), "x_tgt_pred": model(x, scores, context)}


def tile_spans(size, tile, pad):
    """One axis as S3Diff's released code cuts it, all but the outer `pad`, in equal lengths that powers of two divide.

    -> for each part (start, stop) of what is read, and of what is written: up to the border if that is within the pad
    """
    n = max(1, math.ceil((size - 2 * pad) / tile))
    length = math.ceil((size - 2 * pad) / n)
    longer = (math.ceil(length / k) * k for k in (32, 16, 8, 4, 2))
    length = next((x for x in longer if x <= tile), length)
    parts = [(pad + k * length, min(pad + (k + 1) * length, size)) for k in range(n)]
    return [((max(start - pad, 0), min(stop + pad, size)),
             (start if start > pad else 0, stop if stop < size - pad else size)) for start, stop in parts]


def in_step(network, tiles):
    """network of each tile, in threads that meet at every group norm, which has the statistics of all tiles."""
    found, barrier = {}, threading.Barrier(len(tiles), timeout=600)

    def shared(norm, x):
        groups = x.unflatten(1, (norm.num_groups, -1))
        found[threading.get_ident()] = x[0, 0].numel(), torch.var_mean(groups, (2, 3, 4), correction=0, keepdim=True)
        barrier.wait()
        cells, statistics = zip(*found.values())
        barrier.wait()
        # official: what tiles share counts several times, and the variance of their means is left out
        variance, mean = (sum(n * s for n, s in zip(cells, column)) / sum(cells) for column in zip(*statistics))
        y = ((groups - mean) * (variance + norm.eps).rsqrt()).flatten(1, 2)
        return y * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    with patch.object(torch.nn.GroupNorm, "forward", shared), ThreadPoolExecutor(len(tiles)) as pool:
        return list(pool.map(torch.no_grad()(network), tiles))


def in_tiles(network, x, tile, pad, rate):
    """network on tiles of x that keep step with each other at every group norm; mid-block attention sees its own tile.

    x: (B, C, H, W), whole where it is not larger than tile + 2 pad; tile, pad: cells of x; rate: cells of the result
    per cell of x -> (B, C', H * rate, W * rate)
    """
    H, W = x.shape[2:]
    if max(H, W) <= tile + 2 * pad:
        return network(x)
    boxes = [(row, col) for row in tile_spans(H, tile, pad) for col in tile_spans(W, tile, pad)]
    results = in_step(network, [x[:, :, slice(*row), slice(*col)] for (row, _), (col, _) in boxes])
    out = results[0].new_zeros(*results[0].shape[:2], int(H * rate), int(W * rate))

    def place(read, written):     # in the result of its tile, and in the whole
        start, stop, origin = (int(i * rate) for i in (*written, read[0]))
        return slice(start - origin, stop - origin), slice(start, stop)

    for result, (row, col) in zip(results, boxes):
        (rows, rows_out), (cols, cols_out) = place(*row), place(*col)
        out[:, :, rows_out, cols_out] = result[:, :, rows, cols]
    return out


@torch.no_grad()
def vae_tiled(case, get):
    c = case["config"]
    # no UNet in this case
    cfg = {"block_out_channels": [32], "heads": [1], "layers_per_block": 1, "cross_attention_dim": 8}
    model = make_s3diff({**c, "unet": cfg, "rank_unet": 1}, case["fill"]["salt"], parts=["vae"])
    vae = model.vae
    image, latent, scores = tensors(get, "image", "latent", "scores")
    C = model.matrices("vae", scores)
    mean = in_tiles(partial(vae.encoder, adapters=C), image, get("encoder_tile"), 32, 1 / vae.factor)
    return {"mode_untiled": vae.moments(image, C)[0],
            "decoded_untiled": vae.decode(latent * vae.cfg.scaling_factor),
            "mode_tiled": vae.quant_conv(mean).chunk(2, dim=1)[0],
            "decoded_tiled": in_tiles(vae.decoder, vae.post_quant_conv(latent), get("decoder_tile"), 11, vae.factor)}


@torch.no_grad()
def diffaug(case, get):
    x, out = torch.from_numpy(get("x")), {}
    for change in (discriminator.brightness, discriminator.saturation, discriminator.contrast,
                   discriminator.translation, discriminator.cutout):
        name = change.__name__
        if name in ("translation", "cutout"):       # official: x is the height
            draws = list(zip(get(f"{name}_x"), get(f"{name}_y")))
        else:
            draws = get(name)
        x = out[f"after_{name}"] = change(x, draws)
    return out


def make_discriminator(config, salt=""):
    """DINO and heads by the rule; buffers weight_u and weight_v at length 1. In training, each forward iterates."""
    d = config["dino"]
    cfg = ViTConfig(d["image"], d["patch"], d["embed_dim"], d["depth"], d["heads"], d["mlp_ratio"], version=1)
    model = fill_module(Discriminator(fill_module(ViT(cfg), salt), config["head_width"]), salt)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("weight_u", "weight_v")):
                buffer.copy_(F.normalize(torch.from_numpy(fill.weight(name, tuple(buffer.shape), salt)), dim=0))
    return model.train()


def global_norm(grads):
    return torch.stack([g.norm() for g in grads]).norm()


def train_step(case, get):
    c, salt = case["config"], case["fill"]["salt"]
    model, D = make_s3diff(c, salt), make_discriminator(c, salt)
    judge = fill_module(LPIPS("vgg"), salt)
    stage = Stage(1, 1, 0.0, lambda_l2=c["lambda_l2"], lambda_lpips=c["lambda_lpips"], lambda_gan=c["lambda_gan"])
    trained = {path_in_pkl(k): p for k, p in model.named_parameters() if is_in_release(k) and k != "modulation.w"}
    freeze_all_but(model, is_in_release)
    with torch.no_grad():
        model.prompts = describe(c, salt, [get("positive_prompt"), get("negative_prompt")])
    x_src, x_tgt, scores, u = tensors(get, "x_src", "x_tgt", "scores", "neg_draws")

    context, target = prompts_and_targets(model, Pairs(x_src, x_tgt, scores, u < get("neg_prob")))
    y = model(x_src, scores, context)
    terms = reconstruct(y, target, judge, stage)
    loss = sum(terms.values())
    grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))
    out = {"x_tgt_pred_mixed": y, "loss_l2_weighted": terms["l2"], "loss_lpips_weighted": terms["lpips"], "loss": loss,
           "grad_norm": global_norm(grads.values()),
           **{name: grads[name.removeprefix("grad:")] for name in case["outputs"] if "grad:" in name}}

    before = {k: v.clone() for k, v in D.state_dict().items()}
    y = model(x_src, scores, model.prompts[:1].expand(len(x_src), -1, -1))
    terms = adversary(y, D, stage)
    out["grad_norm_G"] = global_norm(torch.autograd.grad(terms["gan"], list(trained.values())))
    # the golden's D starts once: its next forward is the generator's step again, seen from the image
    D.load_state_dict(before)
    y = y.detach().requires_grad_()
    features = D.features(y)
    heads = D.decoder[0](*features)
    per_sample = multilevel_loss(heads, "generator")
    torch.testing.assert_close(c["lambda_gan"] * per_sample.mean(), terms["gan"])
    out |= {"x_tgt_pred_positive": y, **{f"dino_feature{i}": f for i, f in enumerate(features)},
            **{f"head{i}": h for i, h in enumerate(heads)},
            "lossG_per_sample": per_sample, "lossG_weighted": terms["gan"],
            "grad_lossG_wrt_image": torch.autograd.grad(c["lambda_gan"] * per_sample.mean(), y)[0],
            "lossD_real_weighted": real(x_tgt, D, stage)["d_real"],
            "lossD_fake_weighted": fake(y.detach(), D, stage)["d_fake"]}
    levels = [torch.tensor(level) for level in get("loss_only_predictions")]
    out |= {f"loss_only_{short}": multilevel_loss(levels, target)
            for short, target in (("G", "generator"), ("real", "real"), ("fake", "fake"))}
    return {name: x.detach() for name, x in out.items()}


CASES = {
    "unet": unet, "vae": vae, "clip_text": clip_text, "tokens": tokens, "degradation_estimator": degradation_estimator,
    "degradation_embedding": degradation_embedding, "lora_linear": lora, "lora_conv": lora, "lpips": lpips,
    "color": color, "diffaug": diffaug, "pipeline": pipeline, "pipeline_estimator": pipeline,
    "pipeline_guidance_1": pipeline, "pipeline_latent_tiled": pipeline,
    "train_forward": train_forward, "train_step": train_step, "vae_tiled": vae_tiled,
}

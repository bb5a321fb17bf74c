"""The authors' files: CLIP's vocabulary, VOSR's sizes and args.json, others' layouts."""

from dataclasses import replace
from inspect import signature
from statistics import fmean

from models.support.weights import WeightError, find_or_fetch, laid_out_as, on_meta_device, read_json, read_tensors

ONLY = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False,
        "mlp_ratio": 4}         # of args.json: what the transformer of dit.py can be


def read_vocabulary(vocab, merges):
    """CLIP's vocab.json and merges.txt -> {symbol: id}, {(left, right): place among the merges}. Raises WeightError."""
    ids = read_json(vocab)
    try:
        lines = merges.read_text(encoding="utf-8").strip().split("\n")[1:]      # the first one is a version
        pairs = [(left, right) for left, right in (line.split(" ") for line in lines)]
    except (OSError, ValueError) as e:
        raise WeightError(f"{merges}: cannot be read as pairs of symbols ({e}); get it again") from None
    return ids, {pair: rank for rank, pair in enumerate(pairs)}


def dit_config(cls, tensors, path, settings):
    """The DiTConfig (cls) of a transformer, read off its tensors; settings: of args.json. Raises WeightError."""
    with laid_out_as("ema_model.safetensors", path):
        shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        D, C_in, p, _ = shape["x_embedder.proj.weight"]
        side = settings.get("resolution", 8 * cls.input_size) // 8      # where the rotary tables do not say the size
        tokens = shape.get("feat_rope.freqs_cos", [(side // p) ** 2])[0]
        return cls(
            input_size=round(tokens**0.5) * p, patch_size=p, in_channels=C_in, hidden_size=D,
            out_channels=shape["final_layer.linear.weight"][0] // p**2,
            depth=len({name.split(".")[1] for name in shape if name.startswith("blocks.")}),
            num_heads=D // shape["blocks.0.attn.q_norm.weight"][0], z_dims=shape["layer_norm.weight"][0],
            encdim_ratio=shape["mlp_ca.fc1.weight"][0] // D,
            auxiliary_time_cond="r_embedder.mlp.0.weight" in shape,
        )


def release_config(sizes, size, dit_cls, tensors, weights, args):
    """The VOSRConfig of the authors' transformer. Raises ValueError, WeightError.

    sizes: {size: VOSRConfig}; size: one of them, or None: what the tensors of file weights and args.json say
    dit_cls: DiTConfig; args: path of args.json, or None
    """
    settings = read_json(args) if args else {}
    if size:
        has_second_time = "r_embedder.mlp.0.weight" in tensors
        cfg = replace(sizes[size], dit=replace(sizes[size].dit, auxiliary_time_cond=has_second_time))
    else:
        dit = dit_config(dit_cls, tensors, weights, settings)
        around = [cfg for cfg in sizes.values()
                  if (cfg.dit.out_channels, cfg.dit.z_dims) == (dit.out_channels, dit.z_dims)]
        if not around:
            raise WeightError(f"{weights}: {dit.out_channels} latent channels with visual tokens of {dit.z_dims} "
                              "are no public combination")
        cfg = replace(around[0], dit=dit)
        cfg = replace(cfg, **settings_of_args(cfg, settings, args))
    weak = settings.get("weak_cond_strength_aelq_list")
    if weak:
        with laid_out_as("args.json", args):
            cfg = replace(cfg, weak=fmean(weak))
    if cfg.dit.auxiliary_time_cond or settings.get("distill_type") == "onestep":    # VOSR 2.0 has no second time
        cfg = replace(cfg, steps=1, guidance=1.0)
    return cfg


def read_light_decoder(cls, release):
    """VOSR's light decoder, in a release or fetched -> arguments of its class, tensors, path. Raises WeightError."""
    path = find_or_fetch("sd21_lwdecoder.pth", release)
    content = read_tensors(path)
    with on_meta_device(path, "a light decoder"):
        config = content.get("config", {})
        settings = {k: config[k] for k in signature(cls).parameters if k in config}
        cls(**settings)
    return settings, content.get("model_state_dict", content), path


def settings_of_args(cfg, settings, path):
    """What args.json, file path of somebody's own training, says beyond the tensors -> {field of VOSRConfig: value}

    Raises WeightError, which names the setting that cannot be followed.
    """
    side = 8 * cfg.dit.input_size
    for name, value in (ONLY | {"resolution": side}).items():
        if settings.get(name, value) != value:
            raise WeightError(f"{path}: {name} is {settings[name]!r:.60}, which cannot be followed here; "
                              "use weights trained otherwise")
    with laid_out_as("args.json", path):
        layer = settings.get("layer_dinov2b_list", [cfg.vit_layer])[0]      # of several, only the first one is used
        if layer in (-1, cfg.vit.depth - 1):
            layer = None    # of the last block the normed tokens
        return {"vit_input": int(settings.get("dinov2_size", cfg.vit_input)), "tile": side, "vit_layer": layer,
                "steps": int(settings.get("infer_steps", cfg.steps)),
                "guidance": float(settings.get("cfg_scale", cfg.guidance))}


# ---- S3Diff's s3diff.pkl

EMBEDDINGS = ["vae_block", "unet_block"]        # parts of the modulation
MLPS = [f"{network}_{part}_mlp" for network in ("vae", "unet") for part in ("de", "block", "fuse")]


def read_s3diff(file):
    """-> {field of S3DiffConfig: value}, {name in S3Diff: what is trained}"""
    settings = {"r_unet": file["rank_unet"], "r_vae": file["rank_vae"], "vae_targets": file["vae_lora_target_modules"],
                "unet_targets": tuple(file["unet_lora_target_modules"]), **file.get("nanosr", {})}
    parts = {"unet": file["state_dict_unet"], "vae": file["state_dict_vae"]}
    if settings.get("modulation") != "none":
        tables = file | file["state_embeddings"]
        parts |= {f"modulation.{part}": tables[f"state_dict_{part}"] for part in EMBEDDINGS + MLPS}
        parts["modulation"] = {"w": file["w"]}
    return settings, {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()}


def s3diff_layout(cfg, trained):
    """The reverse, with an entry of ours for what the authors' code does not know."""
    def take(names, prefix=""):
        starts = {f"state_dict_{name}": f"{prefix}{name}." for name in names}
        return {name: {k.removeprefix(start): v for k, v in trained.items() if k.startswith(start)}
                for name, start in starts.items()}

    file = {"rank_unet": cfg.r_unet, "rank_vae": cfg.r_vae, "unet_lora_target_modules": list(cfg.unet_targets),
            "vae_lora_target_modules": cfg.vae_targets, **take(["unet", "vae"])}
    if cfg.modulation != "none":
        file |= take(MLPS, "modulation.") | {"state_embeddings": take(EMBEDDINGS, "modulation.")}
        file["w"] = trained["modulation.w"]
    ours = {name: getattr(cfg, name) for name in ("t", "modulation", "prior")}
    if ours != {"t": 999, "modulation": "blocks", "prior": "sd-turbo"}:
        file["nanosr"] = ours
    return file


# ---- GramSR's files, and the steps in their names

SHORT = {"pixel": "pix", "semantic": "sem"}     # what model_*.pkl calls the sets


def read_gramsr(file):
    """Take model_*.pkl apart, the authors' or ours.

    -> {set: rank}, with texture None, since its file says it; {name in the UNet: tensor} of pixel and semantic
    """
    sets = file.get("nanosr", {}).get("sets", [*SHORT, "texture"])
    ranks = {name: None if name == "texture" else int(file[f"lora_rank_unet_{SHORT[name]}"]) for name in sets}
    return ranks, dict(file["state_dict_unet"])


def read_gramsr_texture(file, adapter):
    """Take lora_weights_*.safetensors apart.  adapter: its name, which the file leaves out -> rank, tensors"""
    tensors = {name.replace(".weight", f".{adapter}.weight"): x for name, x in file.items()}
    ranks = [len(x) for name, x in tensors.items() if "lora_A" in name]
    return ranks[0] if ranks else 4, tensors        # without any, loading will say what is missing


def gramsr_layout(ranks, tensors, layers):
    """Make what model_*.pkl holds, the reverse of `read_gramsr`.  layers: {set: {part of the UNet: names of layers}}"""
    file = {"state_dict_unet": tensors}
    for name, places in layers.items():
        file[f"lora_rank_unet_{SHORT[name]}"] = ranks[name]
        for place, names in places.items():
            file[f"unet_lora_{place}_modules_{SHORT[name]}"] = names
    if len(ranks) < len(SHORT) + 1:
        file["nanosr"] = {"sets": list(ranks)}      # ours: this training is not over
    return file


def with_step(name, step):
    """A file's name with another step: model_12501.pkl, 7 -> model_7.pkl"""
    return f"{name.rpartition('_')[0]}_{step}.{name.rpartition('.')[2]}"


def last_step(folder, name):
    """The file of that name, or of another step, in folder; of several the last -> Path or None"""
    def step(path):
        number = path.stem.rpartition("_")[2]
        return int(number) if number.isdecimal() else 0

    return max(folder.glob(with_step(name, "*")), key=step, default=None)

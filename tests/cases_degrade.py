"""Golden cases of the degradation and of the metrics: how each case of golden/degrade.json is computed with our code.

Each function takes the case as stored and `get(name)`, which builds an input by its recipe, and returns {output name: array or number}.
"""

import re

import fill
import numpy as np
import torch
import torch.nn.functional as F

from degrade import (IDENTITY, S3DIFF, Kernel, Plan, StagePlan, add_noise, apply, blur, jpeg, kernel_weights, resize,
                     stack_kernels)
from models.support.metrics import YIQ, psnr, psnr_y, ssim_y


def tensor(case, get, name):
    """An input with what its 'then' says done to it."""
    x, then = torch.from_numpy(get(name)), case["inputs"][name].get("then", "")
    if size := re.match(r"bilinear enlargement to (\d+) x (\d+)", then):
        x = F.interpolate(x, size=tuple(map(int, size.groups())), mode="bilinear", align_corners=False)
    elif line := re.match(r"times (\S+) plus (\S+)", then):
        x = x * float(line[1]) + float(line[2])
    elif then == "each divided by its sum":
        x = x / x.sum((1, 2), keepdim=True)
    elif then:
        raise ValueError(f"input {name}: do not know how to do {then!r}")
    return x


def tolerance(key):
    """(rtol, atol) of the plain numbers: PSNR to 1e-3 dB, SSIM to 1e-4, as the notes say."""
    return 0.0, 1e-3 if "psnr" in key else 1e-4


SHAPES = {  # the golden file's type of a kernel: our shape, fields it must have beside its size
    "iso": ("gaussian", {"sigma_x"}),
    "aniso": ("gaussian", {"sigma_x", "sigma_y", "theta"}),
    "generalized_iso": ("generalized", {"sigma_x", "beta"}),
    "generalized_aniso": ("generalized", {"sigma_x", "sigma_y", "theta", "beta"}),
    "plateau_iso": ("plateau", {"sigma_x", "beta"}),
    "plateau_aniso": ("plateau", {"sigma_x", "sigma_y", "theta", "beta"}),
    "sinc": ("sinc", {"cutoff"}),
}


def kernel(type, size, **fields):
    """A kernel as the golden file writes it down -> Kernel"""
    shape, needed = SHAPES[type]
    assert set(fields) == needed, f"{type} with {sorted(fields)}"
    if "sigma_x" in fields:
        fields.setdefault("sigma_y", fields["sigma_x"])  # isotropic
    return Kernel(shape, size, **fields)


def kernels(case, get):
    outputs = {}
    for key in case["outputs"]:  # iso_a_21_times_k2, sinc_a_11_padded_to_21_times_441
        type, row, size, padded = re.match(r"(\w+?)_([^_]+)_(\d+)(?:_padded_to_(\d+))?_times", key).groups()
        k = kernel_weights(kernel(type, int(size), **case["config"][row][type]))
        pad = (int(padded or size) - int(size)) // 2
        outputs[key] = F.pad(k, (pad,) * 4) * int(padded or size) ** 2
    return outputs


def filter2d(case, get):
    image = tensor(case, get, "image")
    k = stack_kernels([kernel(**k) for k in get("kernels").values()])
    asymmetric = tensor(case, get, "asymmetric_kernels")
    return {"per_image": blur(image, k), "shared_first_kernel": blur(image, k[:1]), "asymmetric": blur(image, asymmetric)}


def usm_sharp(case, get):
    """None of the three systems sharpens; the case still exercises `blur` with a large kernel."""
    c, image = case["config"], tensor(case, get, "image")
    k = stack_kernels([kernel("iso", c["kernel_size"], sigma_x=c["sigma"])])
    low = blur(image, k)
    soft = blur(((image - low).abs() * 255 > c["threshold"]).float(), k)
    sharp = (image + c["weight"] * (image - low)).clamp(0, 1)
    return {"sharp": soft * sharp + (1 - soft) * image, "blur": low}


def diffjpeg(case, get):
    image, odd, each = tensor(case, get, "image"), tensor(case, get, "odd_image"), get("quality_per_image")
    outputs = {f"quality_{q}": jpeg(image, [q] * len(image)) for q in get("qualities")}
    return outputs | {"quality_per_image": jpeg(image, each), "odd_size_quality_per_image": jpeg(odd, each)}


def resizes(case, get):
    image, outputs = tensor(case, get, "image"), {}
    for key in case["outputs"]:  # area_scale_0.37, bicubic_size_13x17
        mode, kind, value = key.split("_")
        given = {"scale": float(value)} if kind == "scale" else {"size": tuple(map(int, value.split("x")))}
        outputs[key] = resize(image, mode, **given)
    return outputs


class GivenFields:
    """Stands in for degrade.NoiseSource: hands out given normal fields in order; Poisson counts are rate + sqrt(rate) * field."""

    def __init__(self, fields):
        self.fields = iter(fields)

    def normal(self, shape):
        field = torch.from_numpy(next(self.fields))
        assert field.shape == shape, f"noise field of {tuple(field.shape)} for {tuple(shape)}"
        return field

    def poisson(self, rate):
        return rate + rate.sqrt() * self.normal(rate.shape)


def noise(case, get):
    image, c, outputs = tensor(case, get, "image"), case["config"], {}
    for key in case["outputs"]:  # gaussian_image0_gray
        type, which = key.split("_", 1)
        flags = c.get(f"gray_flags_in_{which}", [which != "colour"] * len(image))  # else none or all are gray
        gray = [bool(flag) for flag in flags]
        fields = [get(f"{type}_gray_field")] * any(gray) + [get(f"{type}_colour_field")]
        outputs[key] = add_noise(image, type, c["sigma" if type == "gaussian" else "scale"], gray, GivenFields(fields))
    return outputs


def stage(plan, i, kernels):
    """Stage i of a plan as config.plan writes it down."""
    move, noise = plan[f"resize{i}"], plan[f"noise{i}"]
    return StagePlan(
        blur=i == 1 or plan["blur2"],
        kernels=kernels,
        resize_scale=move.get("scale", 1.0),
        resize_mode=move["mode"],
        noise_type=noise["type"],
        noise_strength=noise["sigma" if noise["type"] == "gaussian" else "scale"],
        noise_gray=noise["gray"],
        jpeg_quality=plan[f"jpeg{i}"])


def pipeline(case, get):
    """All three systems: the plan as stored, run by degrade.apply with the stored noise fields, every step compared."""
    c, plan = case["config"], case["config"]["plan"]
    s3diff = c["system"] == "S3Diff"
    images = [plan[key] for key in sorted(plan, key=lambda key: (len(key), key)) if re.fullmatch(r"image\d+", key)] or [plan]  # who has own kernels
    k1, k2 = ([kernel(**image[key]) for image in images] for key in ("kernel1", "kernel2"))
    sinc = [IDENTITY if image["final_sinc"] == "none (unit pulse)" else kernel("sinc", **image["final_sinc"]) for image in images]

    hq = tensor(case, get, "gt" if "gt" in case["inputs"] else "gt_before_flip")
    flip = [image.get("flip", False) for image in images] * (len(hq) // len(images))
    hq = torch.stack([x.flip(-1) if f else x for x, f in zip(hq, flip)])
    draws = {draw["label"]: draw for draw in get("draws")}
    salt = case["inputs"]["draws"].get("salt", case["fill"]["salt"])
    fields = GivenFields(fill.normal(d["name"], d["shape"], d.get("salt", salt)) for d in draws.values() if d.get("kind") == "normal")
    keep_hq = draws.get("no_degradation.coin", {"value": 1})["value"] < S3DIFF.keep_hq_probability

    plan = Plan(
        first=stage(plan, 1, k1),
        second=stage(plan, 2, k2),
        sinc_kernels=sinc,
        jpeg_before_sinc=plan["final_order"].startswith("jpeg"),
        final_mode=plan["resize3_mode"],
        enlarge_mode=plan.get("resize_back_mode", "bicubic"),
        eight_bit=not s3diff,
        keep_hq=keep_hq)
    steps = []
    lq, lq_up = apply(plan, hq, c["scale"], fields, steps)
    outputs = {f"step{i:02}_{name}": x for i, (name, x) in enumerate(steps, 1)}
    for name, k in (("kernel1", k1), ("kernel2", k2), ("final_sinc", sinc)):
        k = stack_kernels([*k, Kernel("identity", 21)])[:-1] * 441
        outputs[f"{name}_times_441"] = k if s3diff else k[0]
    if s3diff:
        return outputs | {"gt": 2 * hq - 1, "lr": lq, "lr_upsampled": (2 * lq_up - 1).clamp(-1, 1)}
    return outputs | {"gt": hq, "before_8bit": steps[-1][1], "lq": lq_up}


def metrics(case, get):
    """Pictures x_a and x_b for every x; the outputs' names say which metric, crop and convention."""

    def byte_pair(name):
        first, second = (case["inputs"][f"{name}_{i}"]["then"] for i in "ab")
        n = int(re.search(r"repeated (\d+) x", first)[1])
        a = np.floor(256 * get(f"{name}_a")).astype(np.uint8).repeat(n, 0).repeat(n, 1)
        sigma = float(re.search(r"round\((\S+) \* z\)", second)[1])
        b = np.clip(a + np.round(sigma * get(f"{name}_b")), 0, 255).astype(np.uint8)
        return [torch.from_numpy(x).permute(2, 0, 1) for x in (a, b)]

    conventions = {  # what stands after psnr_ and ssim_
        "y_basicsr": {},
        "y_pyiqa_ycbcr": {"pyiqa": True},
        "y_pyiqa_yiq_default": {"pyiqa": True, "luma": YIQ},
    }
    outputs = {}
    for key in case["outputs"]:
        if key == "identical_images_psnr_y_pyiqa":
            x, _ = byte_pair(next(iter(case["inputs"])).removesuffix("_a"))
            outputs[key] = psnr_y(x, x, pyiqa=True)
            continue
        name, crop, metric, how = re.fullmatch(r"(\w+)_crop(\d+)_(psnr|ssim)_(\w+)", key).groups()
        if how == "rgb_basicsr":
            outputs[key] = psnr(*byte_pair(name), border=int(crop))
        else:
            outputs[key] = (psnr_y if metric == "psnr" else ssim_y)(*byte_pair(name), border=int(crop), **conventions[how])
    return outputs


CASES = {
    "kernels": kernels, "filter2d": filter2d, "usm_sharp": usm_sharp, "diffjpeg": diffjpeg, "resize": resizes, "noise": noise,
    "pipeline_s3diff": pipeline, "pipeline_vosr": pipeline, "pipeline_gramsr": pipeline, "metrics": metrics,
}  # fmt: skip

"""Training steps of the three scripts, for bench.py: their own functions on random photos, at full size with random weights.

With --tiny first the crops a second of every stage of the tiny presets, as their scripts train them, photos included.

A row is one step, or one of its parts, in autocast's precision: degradation, losses, backward, clipping, optimizer, EMA. Rows that end in
"checkpointing" compute the blocks a second time in backward; what that costs and saves is the difference.
"""

import io
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from bench import Table, with_numbers

import train_gramsr
import train_s3diff
import train_vosr
import training
from degrade import RECIPES, degrade
from models.discriminator import Discriminator
from models.gramsr import SETS, GramSR
from models.lpips import LPIPS
from models.s3diff import S3Diff, is_in_release
from models.support.precision import in_half
from models.tiny import TinyGramSR, TinyS3Diff, TinyVOSR
from models.tiny_losses import PatchDiscriminator, RandomLPIPS
from models.vit import PRESETS as VITS
from models.vit import DINOv3, ViT
from models.vosr import VOSR


class Step:
    """What every script does with a batch: losses under autocast, backward, a clipped step."""

    def __init__(self, params, device, dtype):
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.run = training.Run(None, None, device=device, dtype=dtype, scaler=scaler, micro_batches=1)
        self.optimizer = torch.optim.AdamW(params, lr=1e-6, fused=True)

    def __call__(self, compute):
        self.run.sums = defaultdict(float)
        with training.micro_batch_context(self.run, compute, 0):
            terms = compute()
        training.backward(self.run, terms)
        training.update(self.run, self.optimizer)


def vosr(args, hq, device, dtype):
    """-> {stage: {row: function}}, one after the other, and switches for checkpointing"""
    cfg, stages = train_vosr.PRESETS["tiny" if args.tiny else "0.5b"]
    model = (TinyVOSR if args.tiny else VOSR)(cfg).to(device)
    frozen = {name: m for name, m in model.named_children() if name not in (("dit", "vit") if args.tiny else ("dit",))}
    if not args.tiny and dtype == torch.bfloat16:
        for m in frozen.values():
            in_half(m, dtype)
    for name in ("flow", "distill"):
        stage, teacher = stages[name], None
        if name == "distill":
            teacher = model.dit.requires_grad_(False)
            model.dit = train_vosr.new_student(teacher)
            model.to(device)
        run = train_vosr.Run(args, stage, teacher=teacher)
        ema = deepcopy(model, {id(m): m for m in frozen.values()})
        step = Step(training.freeze_all_but(model, lambda k: k.startswith("dit.")), device, dtype)
        recipe = RECIPES[stage.recipes[0]]

        def whole():
            g = training.generator(0)
            lq_up = degrade(hq, recipe, g)[1]
            step(lambda: train_vosr.LOSSES[name](run, model, 2 * hq - 1, 2 * lq_up - 1, g))
            training.ema_update(ema, model, stage.ema)

        yield f"VOSR {name}", {"degradation": lambda: degrade(hq, recipe, training.generator(0)), "step": whole}, [model.dit]
        del ema, step


def s3diff(args, hq, device, dtype):
    cfg, stages = train_s3diff.PRESETS["tiny" if args.tiny else "sd-turbo"]
    stage = stages["adapters"]
    with torch.device("meta"):
        model = (TinyS3Diff if args.tiny else S3Diff)(cfg)
    model = with_numbers(model, torch.Generator(device).manual_seed(0), device)
    params = training.freeze_all_but(model, is_in_release)
    in_half(model.unet, dtype, adapters=False)
    D = (PatchDiscriminator() if args.tiny else Discriminator(ViT(VITS["dino_vitb16"]))).to(device)
    lpips = (RandomLPIPS() if args.tiny else LPIPS("vgg")).requires_grad_(False).to(device)
    G_step, D_step = Step(params, device, dtype), Step([*D.parameters()], device, dtype)

    def draw():
        g = training.generator(0)
        lq, lq_up = degrade(hq, RECIPES["s3diff"], g)
        negative = torch.rand(len(hq), generator=g).to(device) < 0.05
        return train_s3diff.Pairs(2 * lq_up - 1, 2 * hq - 1, model.estimate(lq), negative), g

    def reconstruct():
        batch, g = draw()

        def compute():
            context, target = train_s3diff.prompts_and_targets(model, batch)
            return train_s3diff.reconstruct(model(batch.lq_up, batch.scores, context, g), target, lpips, stage)

        G_step(compute)

    def adversary():
        batch, g = draw()

        def compute():
            plan = D.draw(batch.lq_up, batch.lq_up, g)
            sr = model(batch.lq_up, batch.scores, model.prompts[:1].expand(len(hq), -1, -1), g)
            return train_s3diff.adversary(sr, D, stage, plan)

        D.requires_grad_(False)
        G_step(compute)
        D.requires_grad_(True)

    def discriminate():
        for loss in (train_s3diff.real, train_s3diff.fake):
            batch, g = draw()
            D_step(lambda: loss(batch.hq, D, stage, D.draw(batch.hq, batch.lq_up, g)))

    def whole():
        reconstruct(), adversary(), discriminate()

    yield "S3Diff", {"reconstruct": reconstruct, "adversary": adversary, "judge": discriminate, "step": whole}, \
        [model.unet, *model.vae.children()]


def gramsr(args, hq, device, dtype):
    cfg, stages = train_gramsr.PRESETS["tiny" if args.tiny else "sd-2.1"]
    with torch.device("meta"):
        model = (TinyGramSR if args.tiny else GramSR)(cfg)
    model = with_numbers(model, torch.Generator(device).manual_seed(0), device)
    in_half(model.unet, dtype)
    lpips = (RandomLPIPS() if args.tiny else LPIPS("vgg")).requires_grad_(False).to(device)
    vit = DINOv3(cfg.vit if args.tiny else VITS["dinov3_vits16plus"]).requires_grad_(False).to(device)
    for name in SETS:
        stage = stages[name]
        model.add_set(name, stage.rank)
        model.to(device)
        run = train_gramsr.Run(Namespace(stage=name, gram="patches"), stage, lpips=lpips, vit=vit)
        step = Step(training.freeze_all_but(model, partial(train_gramsr.learns, run)), device, dtype)

        def whole():
            g = training.generator(0)
            lq_up = degrade(hq, RECIPES["gramsr"], g)[1]
            step(lambda: train_gramsr.losses(run, model, 2 * hq - 1, 2 * lq_up - 1, g))

        yield f"GramSR {name}", {"step": whole}, [model.unet, *model.vae.children()]


def read_photos(args, crop, device):
    """How many photos a second come from the disk, cropped and on the device."""
    batch = args.batch or 8
    photos = training.photos_for(args.data, crop, 0, flip=True)[0]
    loader = iter(training.batches(photos, range(10**6), batch, 0, batch, batch, args.workers, device))
    for _ in range(20):
        next(loader).to(device)
    start, n = time.perf_counter(), 50
    for _ in range(n):
        next(loader).to(device, non_blocking=True)
    print(f"photos of {crop} px read by {args.workers} workers: {n * batch / (time.perf_counter() - start):.1f} a second", flush=True)


TINY_STAGES = [     # script, stage, stage that it starts from, or another --init
    (train_vosr, "autoencoder", None), (train_vosr, "flow", "vosr-tiny"), (train_vosr, "distill", "flow"),
    (train_vosr, "decoder", "distill"), (train_s3diff, "prior", None), (train_s3diff, "estimator", "prior"), (train_s3diff, "adapters", "estimator"),
    (train_gramsr, "pixel", "prior"), (train_gramsr, "semantic", "pixel"), (train_gramsr, "texture", "semantic"),
]


def timed_fit(run, step, evaluate, save, seconds=3):
    """In place of training.fit: steps of a few seconds, the first two left out, and how many crops a second that was."""
    def steps(n, until=float("inf")):
        done, start = 0, time.perf_counter()
        while done < n and time.perf_counter() < start + until:
            step(run)
            run.step, done = run.step + 1, done + 1
        float(run.grad_norm)        # a GPU has done them
        return done / (time.perf_counter() - start)

    run.lr, run.sums = run.stage.lr, dict.fromkeys(run.terms, 0.0)
    run.model.train()
    with training.reading(run):
        steps(2)
        found = run.stage.batch_size * steps(10**6, seconds)
    save(run)
    print(f"{run.title:35} batch {run.stage.batch_size:4} {found:9.1f} crops a second", flush=True)


def crops_of_stages(args, device, dtype):
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(training, "fit", timed_fit):
        (photos := Path(folder, "photos")).mkdir()
        for i in range(8):
            Image.effect_noise((400, 300), 60).convert("RGB").save(photos / f"{i}.png")
        for script, stage, init in TINY_STAGES:
            words = ["--preset", "tiny", "--stage", stage, "--data", photos, "--out", Path(folder, stage), "--device", device, "--dtype",
                     str(dtype).removeprefix("torch.")]
            if init:
                words += ["--init", init if init == "vosr-tiny" else Path(folder, init)]
            if args.batch:
                words += ["--batch-size", args.batch, "--branches-per", max(1, args.batch // 8)]
            with redirect_stdout(io.StringIO()) as said:
                script.main([*map(str, words)])
            print(said.getvalue().splitlines()[-1], flush=True)


def bench_train(args, table: Table, device, dtype):
    if args.tiny:
        crops_of_stages(args, device, dtype)
    crop = 4 * args.side
    if args.data:
        read_photos(args, crop, device)
    torch.manual_seed(0)
    for system, batch in ((vosr, 8), (s3diff, 4), (gramsr, 4)):     # of 80 GB S3Diff needs about 3 and 10 a photo
        table.batch = args.batch or (2 if args.tiny else batch)
        hq = torch.rand(table.batch, 3, crop, crop, device=device)
        for title, parts, networks in system(args, hq, device, dtype):
            table.measure({f"{title} {row}": {"ours": function} for row, function in parts.items()}, networks[0].blocks)
            for network in networks:
                network.checkpointing = True
            table.measure({f"{title} checkpointing": {"ours": parts["step"]}})
            for network in networks:
                network.checkpointing = False
    return table

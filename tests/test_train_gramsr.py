"""train_gramsr.py on networks of a few thousand parameters. Run: python -m pytest tests/test_train_gramsr.py"""

import argparse
import csv
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import runs
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import newest, photos, same  # noqa: F401 (photos is a fixture)
from test_train_s3diff import flat, trunk

import sample
import train_gramsr
import training
from models import gramsr
from models.gramsr import PRIOR, SETS, GramSR, GramSRConfig
from models.lpips import LPIPS, NETS
from models.support.weights import save_model
from models.tiny import TinyGramSR, TinyGramSRConfig, TinyS3Diff, TinyS3DiffConfig, TinyVAEConfig, is_prior
from models.unet import UNetConfig
from models.vae import VAEConfig
from models.vit import DINOv3, DINOv3Config
from train_gramsr import PAPER, losses

ROOT = Path(__file__).resolve().parents[1]
SMALL = GramSRConfig(
    unet=UNetConfig(widths=(16,), num_heads=(1,), layers_per_block=1, context_dim=8, norm_groups=4),
    vae=VAEConfig(widths=(8, 8, 8), layers_per_block=0, norm_groups=4),
    vit=DINOv3Config(embed_dim=12, depth=1, num_heads=3), ranks={},
)
SMALL_TINY = TinyGramSRConfig(unet=replace(SMALL.unet, in_channels=64, out_channels=64), vae=TinyVAEConfig(residual=(8, 8, 4)), vit=SMALL.vit)
SMALL_STAGES = {name: replace(stage, steps=4, before=4 * i, batch_size=2, lr=1e-3, crop=48, rank=2, patience=0, micro_batch=0,
                              checkpointing=False)
                for i, (name, stage) in enumerate(PAPER.items())}
TERMS = {"pixel": ["l2"], "semantic": ["l2", "lpips", "csd"], "texture": ["l2", "lpips", "csd", "gram"]}


def shrink(patch):
    patch.setitem(train_gramsr.PRESETS, "tiny", (SMALL_TINY, SMALL_STAGES))
    patch.setitem(NETS, "vgg", replace(NETS["vgg"], trunk=trunk, compared={1: 8, 4: 8}, smallest=8))


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    shrink(monkeypatch)


def a_prior(photos):  # noqa: F811
    """A tiny prior with random weights and prompts, in a hidden folder, which is no place of photos -> its folder"""
    folder = Path(photos) / ".prior"
    if not (folder / "model.safetensors").exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = TinyS3Diff(TinyS3DiffConfig(unet=SMALL_TINY.unet, vae=SMALL_TINY.vae, denet_widths=(8, 8, 8, 8)))
            torch.nn.init.normal_(model.prompts)
        save_model(folder / "model.safetensors", model.cfg, {k: v for k, v in model.state_dict().items() if is_prior(k)})
    return folder


def launch(patch, photos, out, stage, *more, stop_at=None, preset="tiny"):  # noqa: F811
    """Run a stage in this process; stop_at: steps after which Ctrl-C comes -> checkpoint"""
    runs.watch_less(patch), runs.stop_after(patch, stop_at)
    if preset == "tiny" and stage == "pixel" and "--init" not in more:
        more = [*more, "--init", a_prior(photos)]
    patch.setattr(sys, "argv", ["train_gramsr.py", "--stage", stage, "--preset", preset, "--data", str(photos),
                                "--out", str(out),
                                "--device", "cpu", *map(str, more)])
    train_gramsr.main()
    return newest(out)


def of(checkpoint, *sets):
    """The tensors of LoRA sets in a checkpoint."""
    endings = tuple(f".{adapter}.weight" for name in sets for adapter in SETS[name])
    return {k: v for k, v in checkpoint["model"].items() if k.endswith(endings)}


def rows(folder):
    with open(folder / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def models_in(folder):
    return {p.name for p in folder.iterdir() if p.suffix in (".pkl", ".pth", ".safetensors")}


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):  # noqa: F811
    """The three stages in sequence. -> {stage: (folder, checkpoint)}"""
    folder, done, init = tmp_path_factory.mktemp("trained"), {}, []
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        for name in SETS:
            done[name] = folder / name, launch(patch, photos, folder / name, name, *init, "--micro-batch", 1,
                                               "--save-every", 2)
            init = ["--init", folder / name]
    return done


def before(trained, stage):
    """--init of a stage."""
    names = list(SETS)[: list(SETS).index(stage)]
    return ["--init", trained[names[-1]][0]] if names else []


# -----------------------------------------------------------------------------
# the stages


@pytest.mark.parametrize("stage", SETS)
def test_what_a_stage_writes(trained, tmp_path, capsys, stage):
    folder, checkpoint = trained[stage]
    n = 4 * (1 + list(SETS).index(stage))           # steps of all stages
    texture = {f"lora_weights_dino_{n}.safetensors"} if stage == "texture" else set()
    expected = {f"model_{n}.pkl", f"adapter_{n}.pth", "model.safetensors"} | texture
    assert models_in(folder) == expected, "and nothing of older steps"
    for name in ("log.csv", "loss.png", "sheet.png"):
        assert (folder / name).stat().st_size > 0
    row = rows(folder)[-1]
    assert all(float(row[name]) > 0 for name in (*TERMS[stage], "grad_norm", "held_out", "psnr"))
    assert [name for name in row if name in ("l2", "lpips", "csd", "gram")] == TERMS[stage]
    model = TinyGramSR.from_pretrained(folder)
    assert list(model.cfg.ranks) == list(SETS)[: n // 4]
    assert model.upscale(torch.rand(1, 3, 8, 8)).shape == (1, 3, 32, 32)
    tensors = model.state_dict()
    assert of(checkpoint, stage).keys() == checkpoint["model"].keys() - {k for k in tensors if k.startswith("adapter.")}
    for k, x in checkpoint["model"].items():        # the file is float16
        torch.testing.assert_close(tensors[k], x.half().float(), rtol=0, atol=0)
    Image.new("RGB", (9, 7), "teal").save(tmp_path / "teal.png")
    assert sample.main([str(tmp_path / "teal.png"), "--model", str(folder), "--out", str(tmp_path / "out"),
                        "--semantic", "0.5"]) == 0
    assert Image.open(tmp_path / "out" / "teal.png").size == (36, 28) and "semantic 0.5" in capsys.readouterr().out


def test_earlier_sets_do_not_change_by_a_bit(trained):
    """A stage moves its own set and the adapter; earlier sets and the prior stay as they came."""
    for stage in ("semantic", "texture"):
        earlier = list(SETS)[: list(SETS).index(stage)]
        init, ours = (load_file(trained[name][0] / "model.safetensors") for name in (earlier[-1], stage))
        moved = {k for k in init if not torch.equal(init[k], ours[k])}
        assert moved == {k for k in init if k.startswith("adapter.")}
        assert {k for k in ours if "lora_" in k} - of(trained[stage][1], stage).keys() == {k for k in init if "lora_" in k}
    start = load_file(trained["pixel"][0] / "model.safetensors")
    assert {k for k in load_file(trained["texture"][0] / "model.safetensors") if k not in start} == {
        *of(trained["semantic"][1], "semantic"), *of(trained["texture"][1], "texture")}


@pytest.mark.parametrize("stage", SETS)
def test_all_of_the_new_set_moves(monkeypatch, photos, trained, tmp_path, stage):  # noqa: F811
    """B leaves zero at once, A when B has."""
    one = launch(monkeypatch, photos, tmp_path, stage, *before(trained, stage), "--steps", 1)
    new, later = of(one, stage), of(trained[stage][1], stage)
    assert new and all(v.abs().max() > 0 for v in new.values())
    assert not any(torch.equal(v, later[k]) for k, v in new.items())


def test_sets_start_differently(trained):
    """Each stage draws A anew: with one seed for all, the second set would span what the first does already."""
    pixel, semantic = (of(trained[name][1], name)[f"unet.conv_in.lora_A.default_encoder_{name[:3]}.weight"]
                       for name in ("pixel", "semantic"))
    assert (pixel - semantic).abs().mean() > 0.1


@pytest.mark.parametrize("stage", SETS)
def test_resumed_equals_uninterrupted(monkeypatch, photos, trained, tmp_path, stage):  # noqa: F811
    words = [*before(trained, stage), "--micro-batch", 1, "--save-every", 2]
    half = launch(monkeypatch, photos, tmp_path, stage, *words, stop_at=1)
    parts = launch(monkeypatch, photos, tmp_path, stage, *words)
    whole = trained[stage][1]
    assert half["step"] == 1 and parts["step"] == 4
    assert same(flat(whole), flat(parts)) and not same(flat(half), flat(parts))     # the optimizer included
    assert models_in(tmp_path) == models_in(trained[stage][0])


@pytest.mark.parametrize("stage", ["pixel", "texture"])
def test_checkpointing_changes_nothing(monkeypatch, photos, trained, tmp_path, stage):  # noqa: F811
    again = launch(monkeypatch, photos, tmp_path, stage, *before(trained, stage), "--micro-batch", 1, "--checkpointing")
    for name, x in trained[stage][1]["model"].items():
        torch.testing.assert_close(x, again["model"][name], atol=1e-5, rtol=1e-3, msg=name)


# -----------------------------------------------------------------------------
# the losses


def a_run(stage, gram="patches", **parts):
    """A Run that knows its stage and what its losses need."""
    return train_gramsr.Run(argparse.Namespace(stage=stage, gram=gram), SMALL_STAGES[stage], **parts)


def overfit(stage, gram="patches", steps=15):
    """One pair again and again, with the same draws for CSD. -> list of {term: value}"""
    torch.manual_seed(0)
    model = GramSR(replace(SMALL, ranks=dict.fromkeys(list(SETS)[: list(SETS).index(stage)], 2)))
    model.add_set(stage, 2)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if k not in {f"unet.{n}" for n in model.parameters_of(stage)}
              and "adapter" not in k}
    params = training.freeze_all_but(model, partial(train_gramsr.learns, a_run(stage)))
    vit, lpips = DINOv3(replace(SMALL.vit, gated_mlp=True)).requires_grad_(False), LPIPS().requires_grad_(False)
    for i in range(len(lpips.net.compared)):
        torch.nn.init.constant_(lpips.get_submodule(f"lin{i}.model.1").weight, 1.0)
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(2 * torch.rand(2, 1, 3, 6, 6, generator=g).flatten(0, 1) - 1, (48, 48),
                                        mode="bicubic").clamp(-0.9, 0.9)
    optimizer, found = torch.optim.AdamW(params, lr=1e-2), []
    for _ in range(steps):
        terms = losses(a_run(stage, lpips=lpips, vit=vit, gram=gram), model, x[1:], x[:1], training.generator(0))
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({k: v.item() for k, v in terms.items()})
    assert same(frozen, {k: v for k, v in model.state_dict().items() if k in frozen})
    return found


@pytest.mark.parametrize("stage", SETS)
def test_each_stage_learns(stage):
    values = overfit(stage)
    assert list(values[0]) == TERMS[stage]
    assert sum(values[-1].values()) < 0.8 * sum(values[0].values())
    # of the loss: l2, lpips, gram; what CSD is worth, its value does not say
    most = max(values[0], key=values[0].get)
    assert most == {"pixel": "l2", "semantic": "lpips", "texture": "gram"}[stage]
    assert values[-1][most] < 0.8 * values[0][most]


@pytest.mark.parametrize("gram", ["patches", "channels"])
def test_readings_of_the_gram_matrix(gram):
    assert 0 < overfit("texture", gram, steps=1)[0]["gram"] < 1e6


def test_the_prior_learns_nothing_and_tells_no_gradient_to_the_context():
    """CSD reaches the latent alone: its gradient of the adapter comes through the UNet that is trained."""
    torch.manual_seed(0)
    model = GramSR(replace(SMALL, ranks={"pixel": 2, "semantic": 2}))
    run = a_run("semantic")
    params = training.freeze_all_but(model, partial(train_gramsr.learns, run))
    seen = []
    model.prior, prior = lambda z, t, context: seen.append((t, context)) or prior(z, t, context), model.prior
    run.stage = replace(run.stage, lambda_l2=0.0, lambda_lpips=0.0)
    hq, lq_up = torch.rand(2, 3, 3, 48, 48)
    terms = losses(run, model, hq, lq_up, training.generator(7))
    terms["csd"].backward()
    (t, context), = seen
    assert len(t) == 6 and torch.equal(t[:3], t[3:]) and 20 <= t.min() and t.max() < 500
    assert not context.requires_grad and context[:3].abs().max() == 0 < context[3:].abs().min()
    assert all(p.grad is not None for p in params) and model.unet.conv_in.weight.grad is None


# -----------------------------------------------------------------------------
# the rest of the machine


def test_early_stopping(monkeypatch, photos, trained, tmp_path, capsys):  # noqa: F811
    """The held-out measure falls and then does not: the stage is over after two in vain, the model is the best one."""
    values, evaluate = iter([9.0, 3.0, 2.0, 2.5, 2.0, 1.0]), train_gramsr.evaluate      # the first before step 1

    def falling(run):
        seen, sheet = evaluate(run)
        return seen | {"held_out": next(values)}, sheet

    monkeypatch.setattr(train_gramsr, "evaluate", falling)
    words = [*before(trained, "texture"), "--patience", 2, "--save-every", 1, "--steps", 9]
    checkpoint = launch(monkeypatch, photos, tmp_path, "texture", *words)
    said = capsys.readouterr().out
    assert checkpoint["step"] == 4 and checkpoint["waited"] == 2 and checkpoint["best"] == {"held_out": 2.0}
    assert "stopped early at step 4: held_out was no better 2 times" in said and "goes on from here" not in said
    # 8 and 2
    assert models_in(tmp_path) == {"model_10.pkl", "lora_weights_dino_10.safetensors", "adapter_10.pth",
                                   "model.safetensors"}
    assert not torch.equal(torch.load(tmp_path / "adapter_10.pth", weights_only=True)["0.bias"],
                           checkpoint["model"]["adapter.0.bias"])
    assert launch(monkeypatch, photos, tmp_path, "texture", *words)["step"] == 4
    assert "stopped early" in capsys.readouterr().out
    more = launch(monkeypatch, photos, tmp_path, "texture", *words[:2], "--patience", 3, "--save-every", 1,
                  "--steps", 5)
    assert more["step"] == 5 and more["best"] == {"held_out": 1.0} and "model_13.pkl" in models_in(tmp_path)


def test_interrupted_before_any_evaluation(monkeypatch, photos, tmp_path):  # noqa: F811
    launch(monkeypatch, photos, tmp_path, "pixel", "--patience", 1, stop_at=1)
    assert TinyGramSR.from_pretrained(tmp_path).cfg.ranks == {"pixel": 2} and "model_1.pkl" in models_in(tmp_path)
    launch(monkeypatch, photos, tmp_path, "pixel", "--patience", 1)
    assert models_in(tmp_path) == {"model_4.pkl", "adapter_4.pth", "model.safetensors"}


def test_judged_by_niqe(monkeypatch, photos, tmp_path):  # noqa: F811
    """With NIQE's parameters at hand and pictures large enough for it. Those too flat for a number are passed over."""
    monkeypatch.setattr(train_gramsr, "find_niqe", lambda path: "parameters")
    monkeypatch.setattr(train_gramsr, "niqe", lambda x, parameters: 5.0 + float(x.mean()))
    monkeypatch.setattr(train_gramsr, "NIQE_CROP", 48)
    checkpoint = launch(monkeypatch, photos, tmp_path, "pixel", "--steps", 1)
    assert checkpoint["best"].keys() == {"niqe"} and 5 < checkpoint["best"]["niqe"] < 6
    assert float(rows(tmp_path)[1]["niqe"]) > 5
    monkeypatch.setattr(train_gramsr, "niqe", lambda x, parameters: float("nan"))
    checkpoint = launch(monkeypatch, photos, tmp_path, "pixel", "--steps", 2)
    assert checkpoint["waited"] == 1 and checkpoint["best"]["niqe"] > 5 and rows(tmp_path)[2]["niqe"] == "nan"


@pytest.mark.parametrize("stage", SETS)
def test_half_precision(monkeypatch, photos, trained, tmp_path, stage):  # noqa: F811
    checkpoint = launch(monkeypatch, photos, tmp_path, stage, *before(trained, stage), "--dtype", "bfloat16",
                        "--steps", 1)
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in checkpoint["model"].values())
    assert float(rows(tmp_path)[1]["held_out"]) == pytest.approx(float(rows(trained[stage][0])[1]["held_out"]), rel=0.3)


def work(photos, out, words):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        launch(patch, photos, out, "texture", *words)


def test_two_processes_equal_one(photos, trained, tmp_path):  # noqa: F811
    """DDP: the same batch in the same parts gives the same losses, up to the order of additions."""
    runs.together(2, work, photos, tmp_path, [*before(trained, "texture"), "--micro-batch", 1, "--save-every", 2])
    folder, one = trained["texture"]
    two = newest(tmp_path)
    for name in (*TERMS["texture"], "held_out"):
        assert float(rows(folder)[-1][name]) == pytest.approx(float(rows(tmp_path)[-1][name]), rel=1e-3), name
    for k, v in one["model"].items():
        torch.testing.assert_close(v, two["model"][k], atol=1e-4, rtol=1e-3, msg=k)


def test_public_preset_at_tiny_size(monkeypatch, photos, tmp_path):  # noqa: F811
    """--preset sd-2.1: public files, three stages through the authors' layouts in float32, frozen weights in half."""
    torch.manual_seed(0)
    model = GramSR(SMALL)
    for network, name in PRIOR.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(getattr(model, network).state_dict(), tmp_path / name)
    gated = replace(SMALL.vit, gated_mlp=True)
    features = tmp_path / "dinov3-vits16plus-pretrain-lvd1689m" / "model.safetensors"
    features.parent.mkdir()
    save_file(DINOv3(gated).state_dict(), features)
    for name, letter in (("vgg16-397923af.pth", "f"), ("lpips_vgg.pth", "l")):
        torch.save({k: v.abs() if letter == "l" else v for k, v in LPIPS().state_dict().items() if k[0] == letter},
                   tmp_path / name)
    for module in ("models.gramsr", "models.support.weights", "models.lpips", "train_gramsr"):
        monkeypatch.setattr(f"{module}.fetch", lambda name: tmp_path / name)
    monkeypatch.setitem(train_gramsr.VITS, "dinov3_vits16plus", gated)
    monkeypatch.setattr(gramsr, "GramSRConfig", partial(GramSRConfig, unet=SMALL.unet, vae=SMALL.vae, vit=SMALL.vit))
    monkeypatch.setitem(train_gramsr.PRESETS, "sd-2.1",
                        (SMALL, {k: replace(v, steps=2) for k, v in SMALL_STAGES.items()}))

    init, pixel = [], None
    for stage in SETS:
        out = tmp_path / stage
        checkpoint = launch(monkeypatch, photos, out, stage, *init, "--dtype", "bfloat16", "--steps", 2,
                            preset="sd-2.1")
        assert not (out / "model.safetensors").exists()
        loaded = GramSR.from_pretrained(out)
        tensors = loaded.state_dict()
        assert all(torch.equal(tensors[k], x) for k, x in checkpoint["model"].items())
        ours = of({"model": tensors}, "pixel")
        pixel = pixel or ours
        assert same(ours, pixel), "to the last bit of float32, whatever the frozen prior is rounded to"
        assert loaded.upscale(torch.rand(1, 3, 6, 6)).shape == (1, 3, 24, 24)
        init = ["--init", out]


# -----------------------------------------------------------------------------
# errors


def test_public_sizes():
    with torch.device("meta"):
        model = GramSR(GramSRConfig())
    adapter = training.count(model.adapter.parameters())
    for stage in SETS:
        assert training.count(model.parameters_of(stage).values()) + adapter == 5_892_768
    assert [s.before + s.steps for s in PAPER.values()] == [4000, 12_501, 53_001]


def test_the_wrong_init(monkeypatch, photos, trained, tmp_path):  # noqa: F811
    for stage, init, have in (("texture", "pixel", "pixel;"), ("semantic", "semantic", "pixel and semantic;"),
                              ("texture", "texture", "pixel and semantic and texture;")):
        with pytest.raises(training.UserError, match=f"has LoRA set {have} --stage {stage} starts from") as e:
            launch(monkeypatch, photos, tmp_path, stage, "--init", trained[init][0])
        assert "\n" not in str(e.value)
    monkeypatch.setitem(train_gramsr.PRESETS, "tiny", (replace(SMALL_TINY, t=2), SMALL_STAGES))
    with pytest.raises(training.UserError, match="its networks are not those of --preset tiny"):
        launch(monkeypatch, photos, tmp_path / "x", "semantic", "--init", trained["pixel"][0])
    with pytest.raises(FileNotFoundError, match="no such model"):
        launch(monkeypatch, photos, tmp_path, "semantic", "--init", tmp_path / "none")


@pytest.mark.parametrize("words, what", [
    (["--seed", 1], "--seed: .* with 0, not 1"), (["--batch-size", 1], "--batch-size: .* with 2, not 1"),
    (["--rank", 3], "--rank: .* with 2, not 3"),
    (["--gram", "channels"], "--gram: .* with patches, not channels"),
])
def test_settings_must_match(monkeypatch, photos, trained, words, what):  # noqa: F811
    with pytest.raises(training.UserError, match=f"{what}; use that or another --out"):
        launch(monkeypatch, photos, trained["texture"][0], "texture", *before(trained, "texture"), *words)


def test_a_stage_does_not_go_on_in_the_folder_of_another(monkeypatch, photos, trained):  # noqa: F811
    folder = trained["pixel"][0]
    with pytest.raises(training.UserError, match="--stage: .* was written with pixel, not semantic"):
        launch(monkeypatch, photos, folder, "semantic", "--init", folder)


@pytest.mark.parametrize("words, why", [
    (["--stage", "pixel", "--init", "x"], "pixel comes first"),
    (["--stage", "semantic"], "needs --init"),
    (["--stage", "semantic", "--init", "x", "--gram", "channels"], "--gram is not read by --stage semantic"),
    (["--stage", "pixel", "--patience", "-1"], "--patience: -1 is no"),
    (["--stage", "pixel", "--rank", "0"], "--rank: 0 is no"), ([], "required: --stage"),
    (["--stage", "flow"], "invalid choice"),
])
def test_usage_errors(monkeypatch, tmp_path, capsys, words, why):
    monkeypatch.setattr(sys, "argv", ["train_gramsr.py", "--data", "x", "--out", str(tmp_path), *words])
    with pytest.raises(SystemExit) as e:
        train_gramsr.main()
    assert e.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_command_line(photos, tmp_path):  # noqa: F811
    """As users run it: an error is one line; Ctrl-C saves and says how to go on."""
    command = [ROOT / "train_gramsr.py", "--preset", "tiny", "--stage", "pixel", "--init", "none",
               "--out", tmp_path / "out", "--device", "cpu"]
    runs.error_then_ctrl_c(tmp_path, photos, *command)
    assert newest(tmp_path / "out")["step"] > 0
    assert TinyGramSR.from_pretrained(tmp_path / "out").cfg.ranks == {"pixel": 16}

"""Trainings in little memory: parts of a step, a step that does not fit, a card that is too small, types of half precision.

Run: python -m pytest tests/test_train_memory.py
"""

import argparse
import re
from dataclasses import replace

import pytest
import test_train
import test_train_gramsr
import test_train_s3diff
import torch
from test_train import newest, photos, same  # noqa: F401 (photos is a fixture)
from test_train_s3diff import flat

import train_gramsr
import train_s3diff
import train_vosr
import training
from models.gramsr import GramSR
from models.lpips import LPIPS
from models.s3diff import S3Diff, S3DiffConfig, is_in_release
from models.support import machine, memory
from models.tiny import TinyVOSR

OURS = "tiny", "letters", "small"       # presets of networks that fit anywhere
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setitem(train_vosr.PRESETS, "tiny", (test_train.SMALL, test_train.STAGES))
    test_train_s3diff.shrink(monkeypatch)
    test_train_gramsr.shrink(monkeypatch)


# ---- a step in parts is the step


def draw_alike(patch):
    """From here on all images of a batch draw the same, however many they are. -> function that begins again"""
    calls = []

    def alike(draw):
        def one_for_all(*args, generator=None, device=None):
            *limits, shape = args if isinstance(args[-1], (tuple, torch.Size)) else (args,)
            calls.append(draw)
            one = draw(*limits, (1, *shape[1:]), generator=torch.Generator().manual_seed(len(calls)))
            return one.expand(*shape)
        return one_for_all

    for name in ("rand", "randn", "randint"):
        patch.setattr(torch, name, alike(getattr(torch, name)))
    return calls.clear


def vosr_parts(stage):
    model, teacher = TinyVOSR(test_train.SMALL), None
    if stage == "distill":
        teacher = model.dit.requires_grad_(False)
        model.dit = train_vosr.new_student(teacher)
    run = train_vosr.Run(argparse.Namespace(stage=stage), test_train.STAGE, teacher=teacher)
    params = training.freeze_all_but(model, lambda name: name.startswith("dit."))
    return params, lambda hq, lq_up, g: train_vosr.LOSSES[stage](run, model, hq, lq_up, g)


def s3diff_parts(_):
    model, lpips = S3Diff(test_train_s3diff.SMALL), LPIPS().requires_grad_(False)
    torch.nn.init.normal_(model.prompts)
    params = training.freeze_all_but(model, is_in_release)

    def losses(hq, lq_up, g):
        sr = model(lq_up, lq_up.mean((2, 3))[:, :2] / 2 + 0.5, model.prompts[:1].expand(len(hq), -1, -1), g)
        return train_s3diff.reconstruct(sr, hq, lpips, test_train_s3diff.STAGE)

    return params, losses


def gramsr_parts(stage):
    model = GramSR(replace(test_train_gramsr.SMALL, ranks=dict.fromkeys(("pixel", "semantic", "texture"), 2)))
    run = test_train_gramsr.a_run(stage, lpips=LPIPS().requires_grad_(False), vit=model.vit)
    params = training.freeze_all_but(model, lambda name: train_gramsr.learns(run, name))
    return params, lambda hq, lq_up, g: train_gramsr.losses(run, model, hq, lq_up, g)


@pytest.mark.parametrize("make, stage", [(vosr_parts, "flow"), (vosr_parts, "distill"), (s3diff_parts, "adapters"), (gramsr_parts, "texture")])
def test_parts_have_the_gradient_of_the_whole(monkeypatch, make, stage):
    """The mean over three images, one after the other, is that of the three at once."""
    torch.manual_seed(0)
    params, losses = make(stage)
    for p in params:
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)      # what begins at zero would hide the rest
    hq, lq_up = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    begin_again, g = draw_alike(monkeypatch), torch.Generator()

    def gradients(*parts):
        for part in parts:
            begin_again()
            total = sum(losses(hq[part], lq_up[part], g).values()) / len(parts)
            total.backward()
        found = [p.grad.clone() for p in params if p.grad is not None]
        for p in params:
            p.grad = None
        return found

    whole, parts = gradients(slice(3)), gradients(slice(1), slice(1, 2), slice(2, 3))
    assert len(whole) == len(parts) > 0 and any(x.abs().max() > 1e-4 for x in whole)
    scale = max(x.abs().max() for x in whole)
    for x, y in zip(whole, parts):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5 * float(scale))
    first = gradients(slice(1))
    assert any(not torch.allclose(x, y, rtol=0.1, atol=1e-2 * float(scale)) for x, y in zip(whole, first)), "images differ"


def test_full_size_presets_compute_one_image_at_a_time():
    for script in (train_vosr, train_s3diff, train_gramsr):
        for name, (_, stages) in script.PRESETS.items():
            if name not in OURS:
                assert all(stage.micro_batch == 1 and stage.checkpointing for stage in stages.values())


def test_a_step_says_its_parts(monkeypatch, photos, tmp_path, capsys):  # noqa: F811
    one_card = {stage: replace(s, **training.ONE_CARD) for stage, s in test_train.STAGES.items()}
    monkeypatch.setitem(train_vosr.PRESETS, "tiny", (test_train.SMALL, one_card))
    for words, said, checkpointing in (([], "a step has 2 parts of 1 image in each process", True),
                                       (["--no-checkpointing", "--micro-batch", 2], "batch 2 = 1 x 1 x 2;", False)):
        test_train.launch(monkeypatch, photos, tmp_path / str(checkpointing), "autoencoder", "--steps", 1, *words)
        out = capsys.readouterr().out
        assert said in out and f"checkpointing={checkpointing}" in out


# ---- a step that does not fit


def fail(function, when):
    """function, whose calls are counted; of those of which when(number, *args) says so, memory is short"""
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if when(len(calls), *args):
            raise OUT_OF_MEMORY
        return function(*args, **kwargs)

    return failing


def launch(patch, name, photos, out, *more):  # noqa: F811
    words = [*more, "--batch-size", 4]
    if name == "vosr":
        test_train.launch(patch, photos, out, "autoencoder", *words)
    elif name == "s3diff":
        test_train_s3diff.launch(patch, photos, out, *words)
    else:
        test_train_gramsr.launch(patch, photos, out, "pixel", *words)


@pytest.fixture
def short_of_memory(monkeypatch):
    """In each trainer's losses, as they are called: memory is short in the second part of the first step.

    -> list of the parts of two images that were computed; evaluations see one image, and so do smaller parts
    """
    parts = []

    def is_second_of_two(number, *args):
        images = next(x for x in args if torch.is_tensor(x))
        if len(images) == 2:
            parts.append(number)
        return len(images) == 2 and len(parts) == 2

    monkeypatch.setitem(train_vosr.LOSSES, "autoencoder", fail(train_vosr.LOSSES["autoencoder"], is_second_of_two))
    monkeypatch.setattr(train_s3diff, "reconstruct", fail(train_s3diff.reconstruct, is_second_of_two))
    monkeypatch.setattr(train_gramsr, "losses", fail(train_gramsr.losses, is_second_of_two))
    return parts


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["vosr", "s3diff", "gramsr"])
def test_halved_is_as_if_begun_so(monkeypatch, photos, tmp_path, capsys, short_of_memory, name, workers):  # noqa: F811
    """To the last bit: gradients, sums, buffers and draws of the failed try are gone; the same images come again."""
    launch(monkeypatch, name, photos, tmp_path / "short", "--micro-batch", 2, "--workers", workers)
    said = capsys.readouterr()
    line = "not enough memory for 2 images at once: from here on 1, as by --micro-batch 1; a step of the same images has 4 parts"
    assert (said.out + said.err).count(line) == 1 and len(short_of_memory) == 2
    launch(monkeypatch, name, photos, tmp_path / "one", "--micro-batch", 1)
    assert same(flat(newest(tmp_path / "short")), flat(newest(tmp_path / "one")))
    logs = [(tmp_path / run / "log.csv").read_text().splitlines() for run in ("short", "one")]
    seconds = logs[0][0].split(",").index("seconds")
    short, one = ([[x for i, x in enumerate(row.split(",")) if i != seconds] for row in rows] for rows in logs)
    assert short == one


@pytest.mark.parametrize("words, remedy", [
    (["--micro-batch", 4], "add --micro-batch 1$"),         # two fail as well
    (["--micro-batch", 1], "add --checkpointing$"),
    (["--micro-batch", 1, "--checkpointing"], "it needs a card with more memory$"),
])
def test_what_does_not_fit_either(monkeypatch, photos, tmp_path, words, remedy):  # noqa: F811
    """It is halved once; then, or where there is nothing to halve, one line names the flag."""
    losses = train_vosr.LOSSES["autoencoder"]
    monkeypatch.setitem(train_vosr.LOSSES, "autoencoder", fail(losses, lambda *_: True))     # not of evaluations
    with pytest.raises(training.UserError, match=f"^not enough memory in step 1; .*{remedy}"):
        launch(monkeypatch, "vosr", photos, tmp_path, *words)


def test_not_after_an_update(monkeypatch, photos, tmp_path):  # noqa: F811
    """S3Diff's part 1 has moved the adapters when part 3 fails: such a step is not done twice."""
    monkeypatch.setattr(train_s3diff, "real", fail(train_s3diff.real, lambda *_: True))
    with pytest.raises(training.UserError, match="^not enough memory in step 1; add --micro-batch 1$"):
        launch(monkeypatch, "s3diff", photos, tmp_path, "--micro-batch", 2)


def a_run(step=0, **fields):
    stage = replace(test_train.STAGE, batch_size=4)
    return training.Run(argparse.Namespace(tiny=False, lq=None), stage, step=step, micro_batch=4, micro_batches=1, state={}, sums={},
                        device=torch.device("cpu"), **fields)


def out_of_memory(run):
    raise OUT_OF_MEMORY


def test_several_processes_do_not_decide_by_themselves():
    with pytest.raises(training.UserError, match="add --micro-batch 2$"):
        memory.step_that_fits(a_run(world=2), out_of_memory)


def test_other_errors_and_later_steps():
    """An error of another kind shows where it happened; memory that is short later has another cause."""
    def my_change(run):
        raise RuntimeError("my change")

    run = a_run()
    with pytest.raises(RuntimeError, match="my change"):
        memory.step_that_fits(run, my_change)
    run.step = memory.FIRST_STEPS
    with pytest.raises(torch.OutOfMemoryError):
        memory.step_that_fits(run, out_of_memory)
    with pytest.raises(SystemExit, match="train: not enough memory"), training.one_line_errors("train"):
        memory.step_that_fits(run, out_of_memory)


# ---- a card that is too small


@pytest.mark.parametrize("stage, words, gigabytes, have, card", [
    ("flow", [], 28, 25.3e9, r"32 GB \(RTX 5090\)"),
    ("distill", ["--init", "vosr-1.4b"], 33, 25.3e9, r"48 GB \(RTX A6000, L40S\)"),
])
def test_the_card_is_named_before_anything_is_fetched(monkeypatch, photos, tmp_path, stage, words, gigabytes, have, card):  # noqa: F811
    def no_fetch(*_, **__):
        raise AssertionError("something was fetched")

    for module in ("models.vosr", "models.support.weights"):
        monkeypatch.setattr(f"{module}.fetch", no_fetch)
    monkeypatch.setattr(memory, "device_memory", lambda device: have)
    with pytest.raises(training.UserError) as e:
        test_train.launch(monkeypatch, photos, tmp_path, stage, *words, preset="1.4b")
    teacher = ", the teacher" if stage == "distill" else ""
    pattern = (rf"VOSR 1.4b, stage {stage} cannot fit here: weights, gradients, AdamW's moments, the average{teacher} take "
               rf"{gigabytes} GB, and cpu has 25 GB; it needs a card of {card} or more")
    assert re.fullmatch(pattern, str(e.value)), str(e.value)


def test_what_is_counted(monkeypatch):
    """20 bytes a parameter that learns with an average, 16 without, 4 more with a teacher, its own size if frozen."""
    network = torch.nn.ModuleDict({"a": torch.nn.Linear(10, 10, bias=False), "b": torch.nn.Linear(10, 7, bias=False)})
    run = a_run(dtype=torch.bfloat16)
    assert memory.bytes_needed(run, network, lambda name: True) == 170 * 20
    assert memory.bytes_needed(run, network, lambda name: True, copies=1) == 170 * 24
    run.stage = replace(run.stage, ema=0.0)
    assert memory.bytes_needed(run, network, lambda name: name[0] == "a") == 100 * 16 + 70 * 2
    # published sizes: both fit a card of 8 GB, and say so without a file
    run.dtype = torch.float16
    with torch.device("meta"):
        model = S3Diff(S3DiffConfig())
    assert 2.4e9 < memory.bytes_needed(run, model, is_in_release) < 2.8e9
    monkeypatch.setattr(memory, "device_memory", lambda device: 2e9)
    run.title = "S3Diff"
    with pytest.raises(training.UserError, match=r"S3Diff cannot fit here: .* and cpu has 2 GB; it needs a card of 24 GB"):
        memory.check_memory(run, lambda: S3Diff(S3DiffConfig()), is_in_release)
    before = torch.random.get_rng_state()
    monkeypatch.setattr(memory, "device_memory", lambda device: None)
    memory.check_memory(run, lambda: torch.nn.Linear(3, 3), lambda name: True)
    assert torch.equal(before, torch.random.get_rng_state()), "the weights that follow are drawn as ever"


def test_memory_of_this_machine():
    assert memory.device_memory(torch.device("cpu")) > 2**28


# ---- half precision


@pytest.mark.parametrize("has, name, dtype", [(True, "auto", torch.bfloat16), (False, "auto", torch.float16), (False, "bfloat16", torch.bfloat16)])
def test_bfloat16_only_where_the_card_computes_in_it(monkeypatch, has, name, dtype):
    """T4, V100 and RTX 20 emulate it: is_bf16_supported() says yes of them, unless emulation is left out."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has)
    assert machine.choose_dtype(name, torch.device("cuda")) == dtype
    assert machine.choose_dtype("auto", torch.device("cpu")) == torch.float32


# ---- what --help says


@pytest.mark.parametrize("script", [train_vosr, train_s3diff, train_gramsr])
def test_help_names_memory_hours_and_data(capsys, script):
    with pytest.raises(SystemExit) as e:
        script.parse_args(["--help"])
    said = capsys.readouterr().out
    assert not e.value.code and max(map(len, said.splitlines())) <= 120
    assert all(word in said for word in ("RTX 4090", "H200", "memory", "Computed", "LSDIR", "FFHQ", "# photos.txt"))
    for name, (_, stages) in script.PRESETS.items():
        for stage in stages.values() if name not in OURS else ():
            assert f"{stage.steps:,} x {stage.batch_size:,}" in said, "images, as the presets have them"

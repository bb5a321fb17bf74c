"""The plane: what its lessons say, from short trainings.    python -m pytest tests/test_plane.py [-m slow]"""

from functools import cache

import plane
import pytest
import torch
import torch.nn.functional as F

from models.lora import NO_ADAPTERS


@cache
def nets():
    """Regression, the flow, both of its students: a fifth of the lessons' steps."""
    flow = plane.flow_net(steps=700)
    students = {kind: plane.one_step_net(kind, steps=400, teacher=flow) for kind in ("rcgm", "shortcut")}
    return plane.regression_net(steps=400), flow, students


def test_world():
    """Shapes of latents; the LQ image keeps the first coordinate and nothing of the second."""
    w = plane.world(2_000)
    assert w.z_hq.shape == w.z_lq.shape == w.eps.shape == (2_000, 2, 1, 1) and w.feat.shape == (2_000, 1, 1)
    away = w.z_lq - w.z_hq
    assert away[:, 0].std() == pytest.approx(plane.NOISE, rel=0.05) and not w.z_lq[:, 1].any()
    error, distance, from_lq, off = plane.measure(w.z_hq, w)
    assert error == distance == 0 and off < 0.01 and from_lq == pytest.approx(plane.NOISE, rel=0.05)


def test_a_sample_has_twice_the_least_error():
    w = plane.world(5_000)
    mean, drawn = (plane.measure(z, w) for z in plane.posterior(w))
    assert drawn[0] == pytest.approx(2 * mean[0], rel=0.05)
    assert drawn[1] < 0.002 < 0.05 < mean[1] and drawn[3] < 0.01 < 0.3 < mean[3]


def test_regression_is_near_and_no_image_and_the_flow_the_other_way():
    regression, flow, _ = nets()
    w = plane.world(3_000)
    answers = plane.measure(plane.regress(regression, w.z_lq, w.feat), w)
    one, many = (plane.measure(plane.walk(flow, w, steps), w) for steps in (1, 25))
    assert answers[0] == pytest.approx(many[0] / 2, rel=0.15)
    assert answers[1] > 20 * many[1] and answers[3] > 3 * many[3]       # distance, off
    assert one[0] == pytest.approx(answers[0], rel=0.1)     # at t = 1 the state tells nothing, so one step is a mean


@pytest.mark.parametrize("kind", ["rcgm", "shortcut"])
def test_one_distilled_step_does_what_many_did(kind):
    _, flow, students = nets()
    w = plane.world(3_000)
    before, many = (plane.measure(plane.walk(flow, w, steps), w) for steps in (1, 25))
    after = plane.measure(plane.walk(students[kind], w, 1), w)
    assert after[1] < before[1] / 6 and after[1] < many[1] + 0.015      # distance
    assert after[0] > 1.4 * before[0] and after[3] < before[3]          # error, off
    start = plane.student(flow)
    assert plane.disagreement(students[kind], flow, w)[0] < plane.disagreement(start, flow, w)[0] / 2


def test_guidance_leaves_the_lq_image_the_more_the_smaller_it_is():
    _, flow, _ = nets()
    w = plane.world(2_000)
    from_lq = [plane.measure(plane.walk(flow, w, 8, scale), w)[2] for scale in (0, 0.5, 1)]
    assert from_lq[0] > from_lq[1] + 0.03 > from_lq[2] + 0.06


def test_prior_predicts_noise():
    """The flow of one certain image x, v = (z_t - x) / t, as a predictor of noise: exact at every t."""
    x, g = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1), plane.generator(3)
    eps, t = torch.randn(50, 2, 1, 1, generator=g), torch.randint(20, 1000, (50,), generator=g)
    a = plane.alphas_cumprod()[t][:, None, None, None]

    def certain(z_t, z_lq, feat, t):
        return (z_t - x) / t[:, None, None, None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plane, "flow_net", lambda weak: certain)
        predicted = plane.prior(a.sqrt() * x + (1 - a).sqrt() * eps, t, torch.zeros(50, 1, 3))
    assert torch.allclose(predicted, eps, atol=1e-4)


def test_training_is_deterministic():
    def loss(net, z_hq, z_lq, feat, g):
        return F.mse_loss(plane.regress(net, z_lq, feat), z_hq)

    first, second = (plane.train("twice", plane.new(), loss, 10) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_prompts_are_told_apart():
    """S3Diff's own guidance: 1 is the good prompt, 0 the bad one."""
    net, z = plane.OneStep(), plane.world(5).z_lq
    with torch.no_grad():
        for scale, prompt in ((1, plane.GOOD), (0, plane.BAD)):
            alone = z - net.unet(z, torch.ones(1), prompt.expand(5, 1, 1), NO_ADAPTERS)
            assert torch.allclose(net.restore(z, scale), alone, atol=1e-6)


def test_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plane.py", "truth"])
    monkeypatch.setattr(plane, "world", lambda world=plane.world: world(1_000))
    plane.main()
    said = capsys.readouterr().out
    for name in ("mean of all answers", "one answer drawn"):
        assert name in said and all(f"({figure})" in said for figure in plane.ours()[name])
    for words, reason in ((["nothing"], "no lesson nothing"), (["truth", "--save"], "all lessons at once")):
        monkeypatch.setattr("sys.argv", ["plane.py", *words])
        with pytest.raises(SystemExit) as stopped:
            plane.main()
        assert stopped.value.code == 2 and reason in capsys.readouterr().err


@pytest.mark.slow
def test_every_lesson_gives_what_we_got():
    """Another processor rounds differently, and trainings part; what a lesson says does not."""
    rows = {name: tuple(map(float, figures)) for lesson in plane.LESSONS.values()
            for name, *figures in plane.table(lesson())}
    expected = {name: tuple(map(float, figures)) for name, figures in plane.ours().items()}
    assert rows.keys() == expected.keys()
    for name, (error, distance, from_lq, off) in rows.items():
        e, d, f, o = expected[name]
        assert error == pytest.approx(e, rel=0.05) and distance == pytest.approx(d, rel=0.3, abs=0.002), name
        assert from_lq == pytest.approx(f, rel=0.15, abs=0.03) and off == pytest.approx(o, abs=0.1), name
    distance, off = ({name: row[k] for name, row in rows.items()} for k in (1, 3))
    assert distance["noise 0.5, LoRA with C"] < distance["noise 0.5, LoRA"] < distance["noise 0.5, not adapted"]
    assert off["from weak, guidance 0.5"] < off["from none, guidance 0.5"]
    assert distance["CSD alone, steps 50"] > distance["CSD alone, steps 0"]
    assert distance["CSD with squared error, steps 50"] < distance["CSD with squared error, steps 0"]

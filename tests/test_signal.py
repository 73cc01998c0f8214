"""bench.py --signal: what it says of planted gradients and rewards, and that it runs on the classroom."""

import weakref

import bench_signal
import pytest
import torch

import models
import rtdmd

SMALL = "--epochs 3 --batch_size 4 --batches 2 --group_size 2 --last_step_batch 2 --n_chosen 3 --step_weights 1,1,1"


def test_signal_of_a_planted_gradient_is_found_and_twice_the_images_halve_the_noise():
    torch.manual_seed(0)
    mean = torch.randn(400) / 20  # |mean|^2 = 1
    mean /= mean.norm()

    def of(images, epochs=4000, one_image=2.0):  # one picture's noise has |noise|^2 = 400 * one_image^2 = 1600
        return mean + one_image / images**0.5 * torch.randn(epochs, 400)

    for images in (400, 800, 1600):
        norm, signal, _ = bench_signal.share_of_signal(of(images))
        noise = 1600 / images
        assert norm == pytest.approx((1 + noise) ** 0.5, rel=0.01)
        assert signal == pytest.approx(1 / (1 + noise), rel=0.05)
        assert bench_signal.needed(images, signal) == pytest.approx(1600, rel=0.1)
    nothing = bench_signal.share_of_signal(of(400) - mean)[1]
    draws = torch.tensor([bench_signal.share_of_signal(of(800, epochs=12)) for _ in range(300)])
    assert draws[:, 2].mean() == pytest.approx(draws[:, 1].std().item(), rel=0.25)  # the error it tells
    with pytest.raises(SystemExit, match="--epochs 2: --signal compares epochs, and needs 3 at least"):
        bench_signal.parse_args(["--epochs", "2"])
    assert abs(nothing) < 0.003 and bench_signal.share_of_signal(mean.repeat(5, 1))[1] == pytest.approx(1)


def test_a_step_decides_what_its_walks_have_in_common():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    walks, continuations = draw(400, 4, 1), draw(400, 4, 8)
    hard = 10 * draw(400, 1, 1)  # a caption's own difficulty does not count
    for a, b in ((1, 0), (0, 1), (1, 1), (2, 1)):
        share = bench_signal.intraclass(a * walks + b * continuations + hard)
        assert share == pytest.approx(a**2 / (a**2 + b**2), abs=0.04)


def test_the_terms_add_up_to_the_gradient_that_training_takes(tmp_path, monkeypatch):
    """And the networks of one of its runs are gone as those of the next load."""
    load, alive = models.load, []

    def watched_load(*sources, **options):
        assert not any(network() for network in alive)
        backbone = load(*sources, **options)
        alive.append(weakref.ref(backbone.transformer))
        return backbone

    monkeypatch.setattr(models, "load", watched_load)
    found = bench_signal.split_gradients(bench_signal.parse_args(SMALL.split()))[0]
    monkeypatch.setattr(models, "load", load)
    assert len(alive) == 2
    whole = []

    def no_step(optimizer, *_):
        if optimizer.defaults["weight_decay"]:  # the generator's
            whole.append(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]))
        optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(rtdmd, "step_optimizer", no_step)
    flags = f"--distilled {models.CLASSROOM}/adapters/acdmd --out {tmp_path} --sample_every 0 --eval_every 0"
    rtdmd.main(rtdmd.parse_args([*SMALL.split(), *flags.split()]))
    assert len(found) == 5 and all(norm > 0 for g in found.values() for norm in g.norm(dim=1))
    total = sum(found.values())
    assert total.shape == (3, len(whole[0]))
    assert (total - torch.stack(whole)).norm() < 1e-5 * total.norm()


def test_a_term_that_is_off_has_no_row():
    few = ["--bp_weight", "0", "--step_weights", "0,2,1", "--n_chosen", "2"]
    found = bench_signal.split_gradients(bench_signal.parse_args([*SMALL.split(), *few]))[0]
    assert set(found) == {"policy, step to 0.75", "policy, step to 0.50", "leash (dm_weight)"}


def test_the_classrooms_signal_is_printed(capsys):
    args = bench_signal.parse_args(SMALL.split())
    bench_signal.CAPTIONS, before = 1, bench_signal.CAPTIONS
    try:
        bench_signal.main(args)
    finally:
        bench_signal.CAPTIONS = before
    out = capsys.readouterr().out
    terms = ["policy, step to 0.90", "policy, step to 0.75", "policy, step to 0.50", "leash (dm_weight)"]
    assert all(f"| {term} | " in out for term in (*terms, "back-propagation (bp_weight)"))
    assert "3 epochs of 8 images" in out and "| geneval_strict | position | " in out

"""What gradient.py predicts and speed.py measures, against plain loops and formulas."""

import math

import gradient
import numpy as np
import pytest
import speed
import torch
import transformers

import forking


def make_world():
    """A random GPT-2, and five mini-batches in which token 3 is good at all places."""
    torch.manual_seed(0)
    tiny = transformers.GPT2Config(vocab_size=5, n_positions=12, n_embd=4, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(tiny).eval()
    batches = []
    for _ in range(5):
        completions = []
        for length in (9, 12, 12, 7):
            ids, mask = torch.randint(5, (length,)), torch.arange(length) >= 3
            logp = model(ids[None]).logits[0, :-1].detach().log_softmax(-1)
            logp = torch.cat([torch.zeros(1), logp.gather(1, ids[1:, None])[:, 0]]) * mask
            parts = ids, mask, logp, torch.rand(length) * mask, "", length, False
            completions.append(forking.Completion(*parts, advantage=mask * (ids == 3) * 1.0))
        batches.append(forking.collate(completions, "cpu"))
    return model, batches


def one_gradient(model, batch, kind, generator):
    """Of sum_t A_t log pi(t) / N over the tokens of a kind, the N tokens ranked by hand."""
    places = [(b, t) for b, t in batch.response_mask.nonzero().tolist()]
    ranked = sorted(places, key=lambda place: -batch.entropy[place])
    N, k = len(ranked), math.ceil(len(ranked) / 5)
    kept = {"all": ranked, "top": ranked[:k], "bottom": ranked[k:]}.get(kind)
    if kind == "random":
        kept = [places[i] for i in torch.randperm(N, generator=generator)[:k]]
    elif not kept:
        kept = [ranked[i] for i in range(N) if kind - 1 <= 10 * i / N < kind]
    logp = model(batch.ids).logits.log_softmax(-1)
    J = sum(batch.advantage[b, t] * logp[b, t - 1, batch.ids[b, t]] for b, t in kept) / N
    parts = torch.autograd.grad(J, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts]).tolist()


def by_loops(g, g_all, adam, some):
    """Progress in some mini-batches, one coordinate and one pair at a time."""
    total = 0.0
    for i in range(len(g[0])):
        d = math.sqrt(sum(g[b][i] ** 2 for b in some) / len(some)) if adam else 1
        pairs = sum(g[b][i] * g_all[c][i] for b in some for c in some if b != c)
        total += pairs / d if d else 0
    return total / (len(some) * (len(some) - 1))


def test_all_kinds_by_brute_force():
    model, batches = make_world()
    table = dict(gradient.measure(model, batches, forking.Config(micro_batch_size=2)))
    g_all = [one_gradient(model, batch, "all", None) for batch in batches]
    for kind, row in table.items():
        generator = torch.Generator().manual_seed(0)
        g = [one_gradient(model, batch, kind, generator) for batch in batches]
        for name, adam in ("speed", True), ("share", False):
            values = []
            for left_out in (None, *range(5)):
                some = {*range(5)} - {left_out}
                base = by_loops(g_all, g_all, adam, some)
                values.append(by_loops(g, g_all, adam, some) / base)
            expected = gradient.jackknife(torch.tensor(values, dtype=torch.float64))
            assert row[name] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    rough = dict(gradient.measure(model, batches, forking.Config(), limit=100))  # of 320
    for each in table, rough:
        _, top, _, bottom, *tenths = [row["share"][0] for row in each.values()]
        sums = [top + bottom, sum(tenths), sum(tenths[:2]) - top]
        assert sums == pytest.approx([1, 1, 0], abs=1e-5)


def test_the_jackknife_of_a_mean_is_the_textbook_interval():
    x = torch.randn(10, dtype=torch.float64)
    means = torch.stack([x.mean(), *((x.sum() - each) / 9 for each in x)])
    textbook = [x.mean().item(), 2.262 * x.std().item() / math.sqrt(10)]  # t, 9 degrees
    assert gradient.jackknife(means) == pytest.approx(textbook, rel=0.005)


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_scale_does_not_count_and_noise_does(noise):
    torch.manual_seed(0)
    rho, n, D = 0.2, 40, 70_000
    random = torch.randn(n, D) * noise * math.sqrt(rho) + rho
    g_all = random + torch.randn(n, D) * noise * math.sqrt(1 - rho) + 1 - rho
    base = gradient.progress(g_all, g_all)
    assert base[0] == pytest.approx(D / math.sqrt(1 + noise**2), rel=0.04)
    assert torch.allclose(gradient.progress(7 * g_all, g_all), base)
    predicted = math.sqrt((1 + noise**2) / (1 + noise**2 / rho))  # between sqrt(rho) and 1
    assert gradient.progress(random, g_all)[0] / base[0] == pytest.approx(predicted, abs=0.03)
    assert abs(gradient.progress(torch.randn(n, D), g_all)[0] / base[0]) < 0.05


def test_the_measured_speed_is_the_factor_between_the_curves():
    t = np.arange(31)
    every, slower, nothing = (1 - 0.97 ** (s * t) for s in (1, 0.6, 0))
    speeds = [speed.speed(kind, every, 30) for kind in (every, slower, nothing)]
    assert speeds == pytest.approx([1, 0.6, 0], abs=0.005)
    kinds = np.stack([1 - 0.97 ** (s * t) for s in (0.55, 0.6, 0.65)])
    found = speed.measured(kinds, np.stack([every] * 3), 10)
    assert found == pytest.approx((0.6, 4.303 * 0.05 / math.sqrt(3)), rel=0.1)  # as of a mean

"""Predict, before training, how fast a model learns on each kind of tokens.

A random fifth of the tokens has the same gradient as all, on average, only shorter and noisier.
AdamW does not see the length: it divides each coordinate i by d_i, the root of its mean square.
With g_k(b), the gradient of mini-batch b on the tokens of kind k:

    d_k = sqrt(mean over b of g_k(b)^2), for each coordinate
    progress(k) = mean over b != b' of sum_i g_k(b)_i g_all(b')_i / d_k,i
    expected speed of k = progress(k) / progress(all), in AdamW's first steps
    share of the gradient = the same with d = 1; those of top and bottom tokens add up to 1

Progress is how far AdamW goes along the true gradient. No mini-batch (always 8 questions) is
paired with itself: its noise would count. Intervals: 95 %, by jackknife. Flags: forking.py's.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import forking

GROUPS = forking.Config.prompts_per_step // forking.Config.minibatches  # in a mini-batch: 8
NEEDED = 10 * GROUPS  # groups with scores that differ
KINDS = "all", "top", "random", "bottom", *range(1, 11)  # 1: tenth with the highest entropies


def progress(g, g_all, adam=True):
    """Progress, with d = 1 if not adam: (n, D), (n, D) -> (n + 1,), for jackknife()."""
    n = len(g)
    used = torch.cat([torch.ones(1, n), 1 - torch.eye(n)])  # (n + 1, n): all, then without each
    count = used.sum(1)
    total = torch.zeros(n + 1, dtype=torch.float64)
    for ours, every in zip(g.split(2**16, 1), g_all.split(2**16, 1), strict=True):
        pairs = (used @ ours) * (used @ every) - used @ (ours * every)  # without b = b'
        if adam:
            d = (used @ ours.square() / count[:, None]).sqrt()
            pairs /= d.clamp(min=1e-30)  # where d is 0, pairs is, too
        total += pairs.sum(1, dtype=torch.float64)
    return total / (count * (count - 1))


def jackknife(values):
    """A statistic of n samples, then without each of them, (n + 1,) -> [value, interval]."""
    n = len(values) - 1
    error = math.sqrt((n - 1) * values[1:].var(correction=0))
    t = 1.96 + 2.37 / (n - 1) + 2.82 / (n - 1) ** 2  # Student's, from n = 10 on to 0.005
    return [values[0].item(), t * error]


def make_batches(groups, cfg):
    """Mini-batches of the groups whose scores differ. UserError, if they are too few."""
    mixed = [group for group in groups if len({each.score for each in group}) > 1]
    if len(mixed) < NEEDED:
        found = f"{len(mixed)} of {len(groups)} questions had right and wrong answers"
        advice = f"try {1.2 * NEEDED / max(len(mixed), 1):.1f} times as many, or easier ones"
        raise forking.UserError(f"--prompts-per-step: {found}; {NEEDED} are needed: {advice}")
    starts = range(0, len(mixed) - GROUPS + 1, GROUPS)
    return [forking.collate(sum(mixed[i : i + GROUPS], []), cfg.device) for i in starts]


def kept_tokens(batch, kind, rho, generator):
    """The tokens of a kind in a mini-batch: bool (B, T)."""
    H, mask = batch.entropy, batch.response_mask
    if isinstance(kind, str):
        return forking.fork_mask(H, mask, rho, kind, generator)
    rank = H[mask].argsort(descending=True, stable=True).argsort()  # (N,), from 0
    return mask.masked_scatter(mask, rank * 10 // len(rank) + 1 == kind)


def sampled_gradient(model, limit):
    """The model's gradient at up to limit random places, always the same: (D,)."""
    generator = torch.Generator().manual_seed(0)
    share = limit / sum(parameter.numel() for parameter in model.parameters())
    parts = []
    for parameter in model.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grad = (grad.full_tensor() if isinstance(grad, DTensor) else grad).flatten()
        if share < 1:
            places = torch.randint(len(grad), (int(share * len(grad)),), generator=generator)
            grad = grad[places.to(grad.device)]
        parts.append(grad.cpu())
    return torch.cat(parts)


def measure(model, batches, cfg, limit=1_000_000):
    """Yield (kind, {"speed": [value, interval], "share": [value, interval]}) for all KINDS."""
    cfg = replace(cfg, normalize="all")  # so that shares add up
    for kind in KINDS:
        generator = torch.Generator().manual_seed(cfg.seed)
        rows = []
        for batch in batches:
            keep = kept_tokens(batch, kind, cfg.rho, generator)
            metrics = forking.backward(model, batch, keep, cfg)
            forking.mean_metrics([metrics], cfg)  # UserError, if the model is not the sampler
            rows.append(sampled_gradient(model, limit))
            model.zero_grad()
        g = torch.stack(rows)  # (n, D)
        if kind == "all":
            g_all, base, plain_base = g, progress(g, g), progress(g, g, adam=False)
            if base[0] < jackknife(base)[1]:
                raise forking.UserError("only noise: try four times as many --prompts-per-step")
        speed, share = progress(g, g_all) / base, progress(g, g_all, adam=False) / plain_base
        yield kind, {"speed": jackknife(speed), "share": jackknife(share)}


def main(argv=None):
    """The command line; writes OUT/gradient.json. Bad input: SystemExit(2)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = forking.command_line()
    parser.set_defaults(prompts_per_step=320)
    options = vars(parser.parse_args(argv))
    options["out"] = options["out"] or f"out/{Path(options['model']).name}-gradient"
    table = {}
    try:
        cfg = forking.Config(**options)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        model, tokenizer = forking.load_policy(cfg.model, cfg)
        problems = forking.load_problems(cfg.data, model, tokenizer, cfg)
        problems = problems[: cfg.prompts_per_step]
        groups = forking.sample_and_grade(model, tokenizer, problems, cfg.group_size, cfg)
        batches = make_batches(groups, cfg)
        print(f"{len(batches)} mini-batches of {GROUPS} questions; 1 to 10: tenths by entropy")
        print("tokens       expected speed   share of gradient")
        for kind, row in measure(model, batches, cfg):
            table[kind] = row
            cells = ["{:9.3f} +- {:.3f}".format(*pair) for pair in row.values()]
            print(f"{kind!s:9}", *cells, flush=True)
    except (forking.UserError, OSError) as error:
        parser.error(str(error))
    speed, interval = table["top"]["speed"]
    verdict = f"at {speed:.2f} +- {interval:.2f} times the speed of all tokens"
    if abs(speed - 1) + interval < 0.1:
        verdict = "as fast as all tokens"
    verdict = f"on this model the top {100 * cfg.rho:.3g} % should learn {verdict}"
    print(verdict)
    record = {"conclusion": verdict, "minibatches": len(batches), "table": table}
    Path(cfg.out, "gradient.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()

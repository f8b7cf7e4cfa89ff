#!/usr/bin/env python3
"""Heat or cool the forks of a model, or all its other tokens: the paper's Fig. 3.

    python forking.py --show                                # look at the forks of a model
    python tiny_data/heat.py out/tiny_data-gpt2-show        # heat and cool them
    python tiny_data/report.py out/tiny_data-gpt2-show      # draw both

All tokens are sampled at temperature 1, except that the forks, or all the rest, have another
one. In the paper, cooling the forks hurts, and cooling the rest hardly matters; heating the
forks is safer than heating the rest.

The base model of the tiny world does the same. Its likeliest way, from left to right, is wrong:
with the forks at temperature 0 its accuracy falls from 0.38 to 0.03, with the rest at 0 it
stays. At 2 it is 0.30 for the forks, and 0.18 for the rest. A trained model's likeliest way is
right, so that cold forks do not hurt it any more.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import forking

TEMPERATURES = (0, 0.5, 1, 1.5, 2, 3)


def read_look(folder):
    """(settings, entropy from which on a token is a fork) of a look. Raises UserError."""
    try:
        cfg = forking.Config(**json.loads((folder / "config.json").read_bytes()))
        cfg.rhos = tuple(cfg.rhos)  # JSON has no tuples
        lines = (folder / "samples.jsonl").read_bytes().splitlines()
        records = [json.loads(line) for line in lines]
        key = "base_entropy" if "base_entropy" in records[0] else "entropy"
        entropies = np.concatenate([record[key] for record in records])
        if not cfg.show:
            raise ValueError("it holds a run")
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise forking.UserError(
            f"{folder}: not a folder that forking.py --show has written ({error})"
        ) from None

    return cfg, float(np.percentile(entropies, 80))


def reheat(name, temperature, threshold):
    """A forward hook that gives "forks", or "rest", this temperature instead of 1."""

    def change(module, inputs, output):
        chosen = forking.token_entropy(output.logits) >= threshold  # (B, T)
        if name == "rest":
            chosen = ~chosen

        scaled = output.logits / max(temperature, 1e-6)  # (B, T, V)
        output.logits = torch.where(chosen[..., None], scaled, output.logits)
        return output

    return change


def accuracy(model, tokenizer, problems, cfg, hook):
    """The share of right answers while the hook changes the model's logits."""
    generator = torch.Generator().manual_seed(cfg.seed)  # the same draws always
    with model.sampler[0].register_forward_hook(hook):
        groups = forking.sample_groups(
            model, tokenizer, problems, cfg.group_size, cfg, generator
        )

    forking.grade(groups, problems, cfg)
    return np.mean([completion.correct for group in groups for completion in group])


def main(argv=None):
    """The command line. For a wrong folder, SystemExit(2)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what forking.py --show has written")
    folder = parser.parse_args(argv).folder
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    try:
        cfg, threshold = read_look(folder)
        model, tokenizer = forking.open_model(cfg, cfg.model)
        problems, _ = forking.load_questions(cfg, model, tokenizer)
    except forking.UserError as error:
        print(f"heat.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    problems = problems[: cfg.prompts_per_step]
    cfg.temperature = 1.0
    found = {"threshold": threshold, "temperatures": TEMPERATURES}
    print(f"accuracy with only the forks (from {threshold:.3g} nats), or only the rest, at a")
    print("temperature" + "".join(f"{temperature:7g}" for temperature in TEMPERATURES))

    for name in "forks", "rest":
        print(f"{name:11}", end="", flush=True)
        found[name] = []
        for temperature in TEMPERATURES:
            hook = reheat(name, temperature, threshold)
            found[name].append(accuracy(model, tokenizer, problems, cfg, hook))
            print(f"{found[name][-1]:7.3f}", end="", flush=True)
        print()

    (folder / "heat.json").write_text(json.dumps(found) + "\n", "utf-8")
    print(f"wrote {folder / 'heat.json'}; to draw it: python tiny_data/report.py {folder}")


if __name__ == "__main__":
    main()

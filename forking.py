r"""Reinforcement learning on forking tokens: the 80/20 rule of arXiv 2506.01939, in one file.

In a chain of thought, only a few tokens decide where the reasoning goes: the forks, where the
next-token distribution of the policy (the model) has high entropy. The paper trains only on the
20 % of tokens with the highest entropy, and reports that this works as well, or better. A step:

    1 Sample    a group of completions for each question, with the entropy at every token
    2 Check     the answer in each completion against the target: reward 1 or 0
    3 Entropy   of the policy as it is now, at every token of every completion
    4 Fork      keep the 20 % of the tokens with the highest entropy       <- this is the paper
    5 Loss      PPO's clipped objective, with advantages relative to the group
    6 Update    an optimizer step; 3 to 6 are repeated for each mini-batch of the completions

Each step of train(), from 1 on, does these six things, and the file has the same order. The
objective, to be maximised over the response tokens t of a mini-batch (Eq. 6 in version 2):

    J = 1/K  sum_t  1[H_t >= tau_rho]  min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)

    symbol     name        shape    meaning
    pi_theta   logp        (K,)     log-probability of a token under the policy being trained
    pi_old     logp_old    (K,)     the same under the policy that sampled it
    r_t        ratio       (K,)     exp(logp - logp_old)
    A_t        advantage   (K,)     reward, in standard deviations above its group's mean
    H_t        entropy     (B, T)   of the current policy's next-token distribution, in nats
    tau_rho    -           ()       lowest entropy among the top rho of the N response tokens
               keep        (B, T)   1[H_t >= tau_rho]: True at the K kept tokens

    P questions, G completions of each; B rows of T tokens (prompt, completion, padding) in a
    batch; W tokens in the longest prompt; V tokens in the vocabulary; D the model's width.
    Column t of a (B, T) tensor describes token t, which the model predicts at t - 1.

Differences from the paper and its released code:
    - the threshold is that of a whole mini-batch; theirs is that of a micro-batch on one GPU
    - exactly ceil(rho N) tokens are kept; ties are broken by row, then by column
    - before the first optimizer step, H is the sampler's: the same policy, up to rounding
    - a group's standard deviation is the population's; theirs divides by G - 1
    - the dual clip (--dual-clip, on by default) is in their code, not in the equation
Left out on purpose: KL penalty and reference model (the paper has none), value network, entropy
bonus, learning-rate schedule, tools and several turns, an inference engine.

    python forking.py                     # a tiny GPT-2 on two CPU cores: two or three minutes
    python forking.py --compare           # top, all, random and bottom tokens, three seeds each
    torchrun --nproc-per-node 8 forking.py --model Qwen/Qwen3-8B-Base ...     # see README.md
"""

import argparse
import contextlib
import dataclasses
import datetime
import inspect
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
import zlib
from collections import namedtuple
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
import transformers
from torch.distributed import fsdp
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import get_last_checkpoint

transformers.utils.versions.require_version("transformers>=5.24")  # the first with cache=
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = os.path.relpath(Path(__file__).parent / "tiny_data")


@dataclasses.dataclass
class Config:
    """One field per flag: --group-size sets group_size. --help shows the comments."""

    model: str = f"{TINY}/gpt2"  # causal language model: a folder, or a name on the hub
    data: str = f"{TINY}/train.jsonl"  # questions and targets: JSON Lines or parquet
    reward: str = ""  # FILE.py that defines reward(text, target); if not given, is_correct
    prompt: str = "plain"  # plain, boxed, answer, chat, or your own text with {question}
    max_new_tokens: int = 64  # length at which a completion is cut off, in tokens
    lr: float = 5e-5  # learning rate of AdamW, constant; 1e-6 for large models
    tokens: Literal["top", "all", "bottom", "random"] = "top"  # which tokens to train on
    # 1 Sample, 2 Check
    seed: int = 0  # of all random numbers: the same seed repeats the run
    prompts_per_step: int = 32  # P, questions per step
    group_size: int = 8  # G, completions per question
    temperature: float = 1.0  # of sampling, and of all probabilities and entropies
    resample_rounds: int = 2  # rounds of sampling; later ones replace groups of equal scores
    stop: str = ""  # text that ends a completion, as an end token does
    overlong_buffer: int = 0  # last tokens, over which DAPO's length penalty grows; 0: none
    # 3 Entropy, 4 Fork, 5 Loss, 6 Update
    rho: float = 0.2  # share of the response tokens that are forks
    normalize: Literal["selected", "all"] = "selected"  # tokens to average the loss over
    clip_low: float = 0.2  # r_t is clipped at 1 - this, which matters where A_t < 0
    clip_high: float = 0.28  # r_t is clipped at 1 + this, which matters where A_t > 0
    dual_clip: float = 10.0  # where A_t < 0, the objective is at least this times A_t; 0: off
    minibatches: int = 4  # optimizer steps per pass over the completions
    epochs: int = 1  # passes over the completions
    weight_decay: float = 0.1  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on cuda
    # the run (--reward, and the flags from here on, may change on --resume)
    out: str = ""  # folder of this run; if not given, out/MODEL-TOKENS-seedSEED
    steps: int = 60  # training steps; 0: only evaluate
    save_every: int = 10  # steps between checkpoints; 0: only at the end
    resume: bool = False  # continue from the newest checkpoint in --out, if there is one
    eval_data: str = ""  # questions to test on; if not given, test.jsonl beside --data
    eval_every: int = 15  # steps between evaluations; 0: never
    eval_samples: int = 2  # k, completions per question when evaluating
    # memory and speed
    device: Literal["cpu", DEVICE] = DEVICE  # if not given, cuda where there is a GPU
    sample_batch_size: int = 256  # completions sampled at a time
    micro_batch_size: int = 1024  # tokens per forward and backward pass of the update
    gradient_checkpointing: bool = False  # recompute activations instead of storing them
    offload: bool = False  # keep weights and optimizer in the CPU's memory
    # instead of one run
    compare: bool = False  # train on top RHO, all, random RHO and bottom 1 - RHO in turn
    seeds: int = 3  # with --compare: runs of each, with seeds from --seed on
    show: bool = False  # show a model's forks, without training

    def __post_init__(self):
        fill_in_defaults(self)  # reward becomes a function


def train(cfg):
    """Train as cfg says. Returns the log: one dict per step, from step 0. Raises UserError."""
    checkpoint = find_checkpoint(cfg)  # None: a new run
    model, tokenizer = load_policy(checkpoint or cfg.model, cfg)
    problems = load_problems(cfg.data, model, tokenizer, cfg)
    tests = load_problems(cfg.eval_data, model, tokenizer, cfg) if cfg.eval_every else []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(cfg.seed)
    state = {"settings": settings(cfg, problems), "log": [], "samples": [], "queue": []}
    if checkpoint:
        load_checkpoint(checkpoint, state, model, optimizer, generator)

    for step in range(len(state["log"]), cfg.steps + 1):  # step 0: before training
        metrics, groups, start = {"step": step}, [], time.perf_counter()
        if step > 0:
            # 1 Sample, 2 Check; flat groups, whose scores are all equal, are not trained on
            groups, flat = rollout(model, tokenizer, problems, state["queue"], cfg, generator)

            # 3 Entropy, 4 Fork, 5 Loss, 6 Update
            metrics |= update(model, optimizer, groups, cfg, generator)
            groups += flat  # only to be logged

        metrics["seconds"] = time.perf_counter() - start
        last = step == cfg.steps
        if tests and (last or step % cfg.eval_every == 0):
            metrics |= evaluate(model, tokenizer, tests, cfg)
        log_step(metrics, groups, tokenizer, state, cfg)  # appended to state["log"]

        stopped = all_reduce(torch.tensor(len(STOP))).item()  # Ctrl-C, in any process
        if step > 0 and (last or stopped or cfg.save_every and step % cfg.save_every == 0):
            save_checkpoint(step, model, tokenizer, optimizer, generator, state, cfg)
        if stopped:
            raise KeyboardInterrupt
    return state["log"]


# ------------------------------------------------------------------------------------- 1 Sample
@dataclasses.dataclass
class Completion:
    """One sampled completion of a prompt. T counts the tokens of both."""

    ids: torch.Tensor  # (T,) token ids; the end token, if there was one, is among them
    response_mask: torch.Tensor  # (T,) True at the completion's own tokens, the response
    logp_old: torch.Tensor  # (T,) log-probability of a response token when drawn, else 0
    entropy: torch.Tensor  # (T,) of the distribution that it was drawn from, in nats, else 0
    text: str
    length: int  # of the response, in tokens
    truncated: bool  # cut off after max_new_tokens
    problem: tuple = ()  # question, target, ids of the prompt, prefix: "<think>" or ""
    score: float = 0.0  # what the reward function returns
    reward: float = 0.0  # score, less the penalty for length
    advantage: torch.Tensor | None = None  # (T,) the same at all response tokens, else 0


def draw(logits, temperature, uniform):
    """Draw a token per row: logits (B, V), uniform (B,) in [0, 1) -> token, logp, entropy (B,).

    The token drawn is the first whose cumulative probability exceeds the row's random number.
    torch.multinomial would take all rows' numbers from one stream; here every row has its own,
    so that a completion does not depend on the rest of the batch.
    """
    logp = torch.log_softmax(logits.float() / temperature, -1)  # (B, V)
    p = logp.exp()  # below, a final _ means: in place, which saves memory
    cumulative = p.double().cumsum_(-1)  # in float32, it could end at 0.9997
    height = uniform[:, None] * cumulative[:, -1:]  # the last sum is not exactly 1
    token = torch.searchsorted(cumulative, height, right=True).clamp(max=p.shape[-1] - 1)
    entropy = -p.mul_(logp.clamp_(min=-100)).sum(-1)  # as token_entropy() does
    return token[:, 0], logp.gather(-1, token)[:, 0], entropy


@torch.no_grad()
def sample(model, tokenizer, prompts, group_size, seeds, cfg):
    """Complete each of P prompts (lists of token ids) G times -> P lists of G Completions.

    Like transformers' generate(), but with entropies, a seed for each prompt, and nothing
    computed twice, or for completions that have ended. Tensors are (P G, W + max_new_tokens).
    """
    limit = cfg.max_new_tokens
    ended = stopping_criteria(model, tokenizer, cfg.stop)  # ids, None -> bool for each row
    ids, attention_mask, uniform, cache = prepare(model, prompts, seeds, group_size, limit)
    W = ids.shape[1] - limit  # completions begin here: prompts are padded on the left
    logp_old, entropy = torch.zeros(2, *ids.shape, device=model.device)
    all_rows = torch.arange(len(ids), device=model.device)
    rows = all_rows[::group_size]  # one row per prompt; later, the completions still growing
    for t in range(W, W + limit):
        first = t - 1 if t > W else 0  # the cache holds the tokens before it
        positions = (attention_mask[rows, :t].cumsum(1) - 1).clamp(min=0)  # padding not counted
        with torch.inference_mode():  # faster than no_grad, but its tensors must stay in here
            logits = model(
                ids[rows, first:t],
                attention_mask=attention_mask[rows, :t],
                position_ids=positions[:, first:],
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        if t == W:  # each prompt has been read once; what it gave is copied for its G rows
            rows = all_rows
            cache.reorder_cache(rows // group_size)
            logits = logits[rows // group_size]
        drawn = draw(logits, cfg.temperature, uniform[rows, t - W])
        ids[rows, t], logp_old[rows, t], entropy[rows, t] = drawn
        attention_mask[rows, t] = True
        growing = (~ended(ids[rows, W : t + 1], None)).nonzero()[:, 0]  # indices into rows
        if len(growing) < len(rows):
            rows = rows[growing]
            cache.reorder_cache(growing)
        if len(rows) == 0:
            break
    tensors = ids, attention_mask, logp_old, entropy  # the rows left over were cut off
    return split_into_groups(tensors, W, group_size, tokenizer, rows.tolist(), cfg.stop)


def rollout(model, tokenizer, problems, queue, cfg, generator):
    """Sample and grade until prompts_per_step groups have scores that differ, or rounds end.

    Where all scores are equal, no completion is better than another. queue holds the indices
    of the next problems. Returns two lists: groups to train on, and flat ones.
    """
    groups, flat = [], []
    for _round in range(cfg.resample_rounds):
        missing = cfg.prompts_per_step - len(groups)
        if missing == 0:
            break
        while len(queue) < missing:
            queue += torch.randperm(len(problems), generator=generator).tolist()
        chosen = [problems[queue.pop(0)] for _ in range(missing)]
        sampled = sample_and_grade(model, tokenizer, chosen, cfg.group_size, cfg, generator)
        for group in sampled:
            scores = {completion.score for completion in group}
            (groups if len(scores) > 1 else flat).append(group)
    return groups, flat


# -------------------------------------------------------------------------------------- 2 Check
def extract_answer(text):
    r"""The content of the last \boxed{...}, or what follows a later "Answer:" or "####".

    Only text after the last </think> counts. None: no answer, or a <think> is still open.
    """
    text = text.split("</think>")[-1]
    if "<think>" in text:
        return None
    box, rest = last_box(text)
    pieces = re.split(MARKER, rest)
    if len(pieces) == 1:
        return box
    lines = [line for line in pieces[-1].split("\n") if re.search(r"\w", line)]
    return lines[0].strip(" \t\r*`") if lines else ""


def is_correct(text, target):
    """True if extract_answer(text) equals target, as a number or a formula."""
    answer = extract_answer(text) or ""
    return max(len(answer), len(target)) <= 1000 and same_answer(answer, target)


def grade(groups, problems, cfg):
    """Give each Completion its score, its reward and its advantage."""
    for group, problem in zip(groups, problems, strict=True):
        for completion in group:
            completion.problem = problem
            text = problem.prefix + completion.text
            completion.score = float(cfg.reward(text, problem.target))
            if not math.isfinite(completion.score):
                raise UserError(f"--reward: must be a number, not {completion.score}: {text!r}")
            # DAPO's penalty grows linearly to 1 over the last overlong_buffer tokens.
            excess = completion.length + cfg.overlong_buffer - cfg.max_new_tokens
            completion.reward = completion.score - max(excess, 0) / max(cfg.overlong_buffer, 1)
        rewards = torch.tensor([completion.reward for completion in group])  # (G,)
        for completion, advantage in zip(group, group_advantages(rewards), strict=True):
            completion.advantage = advantage * completion.response_mask


# ------------------------------------------------------------------------------------ 3 Entropy
def token_entropy(logits, temperature=1.0):
    """H_t = -sum_v p_v ln p_v, p = softmax(logits / temperature): (..., V) -> (...). [Eq. 1]

    In nats and float32: 0 where one token is certain, ln V where all are equally likely. It
    measures how undecided the policy is before it draws, not how unlikely the drawn token is.

    >>> token_entropy(torch.tensor([0.0, 0.0]))  # ln 2
    tensor(0.6931)
    """
    logp = torch.log_softmax(logits.float() / temperature, -1)
    logp = logp.clamp(min=-100)  # so that p ln p and its gradient are finite, also at p = 0
    return -(logp.exp() * logp).sum(-1)


def logits_at(model, ids, mask):
    """The logits that predict the n tokens where mask is True: ids, mask (B, T) -> (n, V).

    The same as model(ids).logits[:, :-1][mask[:, 1:]], but the output layer gets only the n
    hidden states that predict these tokens, so that there are never (B, T, V) logits. No
    attention_mask is needed: padding is on the right, and no token attends to what follows it.
    """
    source = mask[:, 1:]  # the token at t is predicted at t - 1
    output_layer = model.get_output_embeddings()
    with output_layer.register_forward_pre_hook(lambda _, inputs: (inputs[0][source],)):
        return model(ids[:, :-1], use_cache=False).logits  # (B, T - 1, D) -> (n, D) -> (n, V)


@torch.no_grad()
def policy_entropy(model, batch, cfg):
    """Entropy of the current policy at each response token: (B, T), in nats, else 0."""
    entropy = torch.zeros_like(batch.entropy)
    for rows, micro, mask in micro_batches(batch, batch.response_mask, cfg):
        logits = logits_at(model, micro.ids, mask)  # (n, V)
        row, column = mask.nonzero(as_tuple=True)  # row r of micro is row rows[r] of batch
        entropy[rows[row], column] = token_entropy(logits, cfg.temperature)
    return all_reduce(entropy)  # the sum: each process has filled in its own rows


# --------------------------------------------------------------------------------------- 4 Fork
def fork_mask(entropy, response_mask, rho, tokens="top", generator=None):
    """The tokens to train on; for "top", this is 1[H_t >= tau_rho], except for ties. [in Eq. 6]

    entropy (B, T) in nats, response_mask (B, T) -> bool (B, T). Of the N response tokens, "top"
    keeps the ceil(rho N) of highest entropy, "bottom" the others, "random" ceil(rho N) of them
    at random, "all" every one. Prompt and padding are never kept. Raises ValueError.

    >>> fork_mask(torch.tensor([[9.0, 0.1, 0.7]]), torch.tensor([[0, 1, 1]]), rho=0.5)
    tensor([[False, False,  True]])
    """
    response_mask = response_mask.bool()  # as an index, integers would mean rows 0 and 1
    H = entropy[response_mask]  # (N,)
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be above 0, and at most 1, not {rho}")
    k = max(math.ceil(round(rho * len(H), 6)), 1)  # 0.07 * 100 is 7.000000000000001
    ranking = H.argsort(descending=True, stable=True)  # ties: by row, then by column

    # The threshold tau_rho is H[ranking[k - 1]]. Tokens are kept by rank and not by
    # H >= tau_rho, which would keep more than k of them where entropies are equal.
    if tokens == "top":
        chosen = ranking[:k]
    elif tokens == "bottom":
        chosen = ranking[k:]
    elif tokens == "random":
        chosen = torch.randperm(len(H), generator=generator)[:k].to(H.device)
    elif tokens == "all":
        chosen = ranking
    else:
        raise ValueError(f"tokens must be top, bottom, random or all, not {tokens!r}")

    keep = torch.zeros_like(response_mask)
    row, column = response_mask.nonzero(as_tuple=True)  # where each of the N tokens is
    keep[row[chosen], column[chosen]] = True
    return keep


# --------------------------------------------------------------------------------------- 5 Loss
def group_advantages(rewards):
    """A = (R - mean(R)) / std(R) over a group of completions: (P, G) -> (P, G).  [Eq. 3]

    A single group, (G,), works, too. std is the population's. Equal rewards get exactly 0.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    tensor([ 1., -1., -1.,  1.])
    """
    rewards = rewards.float()
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    mean = rewards.mean(-1, keepdim=True)
    std = rewards.std(-1, keepdim=True, correction=0)
    return ((rewards - mean) / std).masked_fill(equal, 0.0)


def clipped_objective(logp, logp_old, advantage, clip_low, clip_high, dual_clip=None):
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logp - logp_old).  [in Eq. 6]

    Per token, to be maximised; tensors of one shape. A > 0 makes a token likelier, unless r is
    above 1 + clip_high; A < 0 less likely, unless r is below 1 - clip_low, or above dual_clip
    (0 or None: off). With fork_mask's keep, the loss is -(objective * keep).sum() / keep.sum().

    >>> ratio, A = torch.tensor([1.1, 1.5, 0.5]), torch.tensor([2.0, 2.0, -2.0])
    >>> clipped_objective(ratio.log(), torch.zeros(3), A, clip_low=0.2, clip_high=0.28)
    tensor([ 2.2000,  2.5600, -1.6000])
    """
    ratio = torch.exp((logp - logp_old).clamp(-20, 20))  # within e^20, nothing overflows
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if dual_clip:
        lowest = dual_clip * advantage
        objective = torch.where(advantage < 0, torch.maximum(objective, lowest), objective)
    return objective


def backward(model, batch, keep, cfg):
    """Add the gradient of -J, for one mini-batch, to that of the model. Returns metrics."""
    counted = keep if cfg.normalize == "selected" else batch.response_mask
    normalizer = max(int(counted.sum()), 1)  # K, or N: of the mini-batch, not of its parts
    clips = cfg.clip_low, cfg.clip_high, cfg.dual_clip
    per_token = []
    for _rows, micro, kept in micro_batches(batch, keep, cfg):  # n of the K tokens
        logits = logits_at(model, micro.ids, kept).float() / cfg.temperature  # (n, V)
        logp = -F.cross_entropy(logits, micro.ids[kept], reduction="none")  # log pi_theta
        del logits  # the backward pass does not need them
        logp_old, advantage = micro.logp_old[kept], micro.advantage[kept]
        objective = clipped_objective(logp, logp_old, advantage, *clips)
        loss = -objective.sum() / normalizer  # where r = 1, its gradient is that of -A logp / K
        (loss * ranks()[1]).backward()  # FSDP averages over the processes

        log_ratio = logp - logp_old
        clipped = objective != log_ratio.exp() * advantage
        per_token.append(torch.stack([objective, clipped, log_ratio.abs()]).detach())  # (3, n)
    return minibatch_metrics(torch.cat(per_token, 1), batch, keep, normalizer, cfg)


# ------------------------------------------------------------------------------------- 6 Update
def update(model, optimizer, groups, cfg, generator=None):
    """Take up to epochs * minibatches optimizer steps on groups of Completions -> metrics."""
    taken = []  # metrics of the optimizer steps taken
    for _epoch in range(cfg.epochs):
        order = torch.randperm(len(groups), generator=generator)
        for part in order.tensor_split(cfg.minibatches):
            completions = [completion for i in part for completion in groups[i]]
            if not completions:
                continue  # fewer groups than mini-batches
            batch = collate(completions, cfg.device)

            # 3 Entropy. Until the first optimizer step, the policy is still the sampler.
            if taken:
                batch = batch._replace(entropy=policy_entropy(model, batch, cfg))

            # 4 Fork: one threshold for the whole mini-batch
            keep = fork_mask(batch.entropy, batch.response_mask, cfg.rho, cfg.tokens, generator)

            # 5 Loss
            metrics = backward(model, batch, keep, cfg)

            # 6 Update
            metrics["grad_norm"] = clip_gradient(model, cfg.grad_clip)
            if math.isfinite(metrics["grad_norm"]):  # otherwise, skip this step
                optimizer.step()
                taken.append(metrics)
            optimizer.zero_grad()
    return mean_metrics(taken, cfg) | {"groups_kept": len(groups), "updates": len(taken)}


# ------------------------------------------------------------------------------------- Evaluate
def evaluate(model, tokenizer, problems, cfg):
    """Complete each problem eval_samples = k times, always from the same seed -> metrics.

    accuracy is the mean score: if each is 0 or 1, the share of right answers. stderr is its
    standard error over the problems, and pass_at_k the mean of the best score of each problem.
    """
    groups = sample_and_grade(model, tokenizer, problems, cfg.eval_samples, cfg)
    scores = torch.tensor([each.score for group in groups for each in group])
    scores = scores.view(len(groups), -1)  # (P, k)
    accuracy = scores.mean(1)  # (P,) of each problem
    stderr = accuracy.std(correction=min(1, len(groups) - 1)) / math.sqrt(len(groups))
    return {
        "accuracy": scores.mean().item(),
        "stderr": stderr.item(),  # 0 if there is one problem
        "pass_at_k": scores.amax(1).mean().item(),
    }


# ==================== end of the lesson; below is what makes it practical =====================


# ------------------------------------------------------------------------------------ 7 Answers
MARKER = r"(?im)answer[\s*_]*[:\uff1a][*_}]*|answer is:? (?=[^\s\d]{0,9}\d\S{0,99}\s*$)"
MARKER += r"|####(?=[^\w\n]{0,9}[\d\\])"  # but "#### Check" is a heading
RULES = [  # what is replaced, by what, in this order
    ("\u2212", "-"),  # the minus sign
    (r"\\[cdt]frac", r"\\frac"),  # \dfrac
    (r"\{,\}|,\\! ?", ","),  # 1{,}000 and 10,\!080
    (r"\\\\", ";"),  # between the rows of a matrix
    (r"\^\\circ|\^\{\\circ\}|\u00b0", " degrees"),  # 90^\circ
    (r"^\\?\$ ?([\d.,]*\d)\.?$", r"\1 dollars"),  # \$18
    (r"\\(left\.?|right\.?|displaystyle)(?![a-z])|\\[,;:! ()\[\]]|\\?\$|\*\*", " "),  # $5$
    (r"\\(text|mathrm|mbox|textbf|mathbf|textit) ?\{([^{}]*)\}", r" \2 "),  # \text{ cm}
    (r" ?([\^{}()\[\]]) ?", r"\1"),  # \frac{ 1 }{ 2 }
    (r"(?<!\.)\.$", ""),  # a full stop, but not "..."
    (r"\\(frac|sqrt) ?(\d)", r"\\\1{\2}"),  # \sqrt2, \frac12
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\}) ?(\d)", r"\1{\2}"),  # \frac{1}2
    (r"([_^])\{(\w)\}", r"\1\2"),  # x^{2}
    (r", ?\+\\infty", r",\\infty"),  # (2, +\infty)
    (r"(?<![^ =+-])[1-9]\d{0,2}(,\d{3})+(?!,?\d)", lambda m: m[0].replace(",", "")),  # 1,000
    (r"(?<![^ ,(\[-])(\d*\\(pi|sqrt\{\w+\}))/(\d+)(?! ?[\w\\({^])", r"\\frac{\1}{\3}"),  # \pi/2
    (r"^\(([^()\[\],;]*)\)$|^\\\{([^()\[\]]*)\\\}$", r"\1\2"),  # (B), (-3); a set is a list
    (r"\\begin\{[pb]matrix\}(.*?);? ?\\end\{[pb]matrix\}", r"matrix(\1)"),
]
NAME = r"(?:([a-zA-Z]) ?(?:=|\\in(?![a-z]))(?! ?[a-zA-Z]$))?"  # x = 5, but not y = x
QUANTITY = r"((?:[^a-z\\]|\\frac|\\sqrt|\\pi)+)"  # so that \sin 30^\circ keeps its unit
UNIT = r"((?:square |cubic )?(?:cm|km|inch|inches|foot|feet|kg|people|(?:degree|dollar|cent|"
UNIT += r"unit|yard|mile|meter|second|minute|hour|day|week|month|year|pound)s?)(?:\^[23])?)"
NUMBER = r"""(?ax) (?<! [^,;&=(\[] ) (?<! ,(?=0\d) )  # where an entry begins, but not at ,000
    ([+-]?) (?: (\d*) \\frac\{(-?\d+)\}\{(0*[1-9]\d*)\}  # \frac{1}{2} and 1\frac{1}{2}
    | (\d+/0*[1-9]\d* | \d*\.?\d+) (\\?%|percent)? ) (?! [^,;&)\]] )  # 1/2, 0.5 and 50\%"""
LIST = r"(?:[\w .,+*/^%=-]|\\frac|\\sqrt|\\pi|\\pm|\{(?:[^,{}]|\{[^,{}]*\})*\})*"


def last_box(text):
    r"""The content of the last complete \boxed{...}, or None, and the text after it."""
    box = None
    end = depth = 0
    for brace in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text):  # \{ is no brace
        if brace[0].startswith(r"\boxed"):
            start = brace.end()
            depth = 1
        elif depth > 0:
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                end = brace.start()
                box = text[start:end].strip()
    return box, text[end:]


def same_answer(answer, target):
    """Whether they are equal. Either may lack its name or unit; answer may lack the base."""
    name, value, unit = parse_answer(answer)
    known_name, known_value, known_unit = parse_answer(target)
    if name and known_name and name != known_name:
        return False
    if unit and known_unit and unit != known_unit:
        return False
    without_base = re.sub(r"^(\d+)_(\w|\{\w+\})$", r"\1", known_value)  # 52 for 52_8
    return value != "" and value in (known_value, without_base)


def parse_answer(answer):
    r"""x = 5\text{ cm} -> x, 5, cm. The value is a string, the same for all its spellings."""
    for pattern, replacement in RULES:
        answer = " ".join(re.sub(pattern, replacement, answer).split())
    parts = re.fullmatch(f"{NAME}(?:{QUANTITY} {UNIT}|(.*))", answer)
    name, quantity, unit, formula = parts.groups("")
    value = re.sub(r"(?<![\d.]) | (?![\d.])", "", quantity or formula)  # 5 6 is not 56
    value = re.sub(NUMBER, to_fraction, value)
    if re.fullmatch(LIST, value):  # no brackets: the order does not matter
        value = ",".join(sorted(value.split(",")))
    return name, value, unit


def to_fraction(number):
    r"""A match of NUMBER as an exact fraction, so that 0.5, 1/2, \frac12 and 50% are equal."""
    sign, whole, top, bottom, decimal, percent = number.groups()
    value = Fraction(decimal or f"{top}/{bottom}")
    if whole and not 0 < value < 1:
        return number[0]  # 2\frac{3}{2} is no mixed number
    value = (value + int(whole or 0)) / (100 if percent else 1)
    return str(-value if sign == "-" else value)


# ----------------------------------------------------------------------------------- 8 Problems
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
PROMPTS = {
    "plain": "{question}\n",
    "boxed": "User:\n{question}\n" + BOXED + "\n\nAssistant:\n",  # the paper's
    "answer": "{question}\n\nReason step by step. The last line must be 'Answer: ' and then "
    "the answer alone.\n",  # like DAPO's
    "chat": "{question}\n" + BOXED,  # as a message in the model's own chat template
}
LEFT_OUT = "the prompt is too long for the model, or no answer can equal the target"
EXAMPLE = 'each line should be such as {"question": "1+2=?", "answer": "3"}'
Problem = namedtuple("Problem", "question target ids prefix")  # prefix: <think> or nothing


class UserError(Exception):
    """A mistake in the user's input. main() prints it in one line and exits with code 2."""


def read_records(path):
    """Yield each line of a JSON Lines file, as text, or row of a parquet file, as a dict."""
    if path.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile  # pip install pyarrow

        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    else:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
            yield from lines


def question_and_target(record):
    """Read a record of GSM8K, MATH, DAPO-Math-17k or the like. LookupError, if it is none."""
    question = record.get("question") or record.get("problem") or record["prompt"]
    if isinstance(question, list):  # of messages
        question = question[-1]["content"]
    target = record.get("answer", record.get("solution"))
    if target is None:
        target = record["reward_model"]["ground_truth"]
    answer = extract_answer(str(target))  # "#### 7", or a solution with a box
    return question, (answer or str(target)).strip()


def load_problems(path, model, tokenizer, cfg):
    """Read the Problems in a file, without repetitions; count those that cannot be used."""
    if not path:
        print("no questions to test on (see --eval-data): accuracy is not measured")
        return []
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    problems, left_out = {}, []
    for line, row in enumerate(read_records(path), 1):
        if row == "\n":
            continue
        try:
            record = json.loads(row) if isinstance(row, str) else row
            question, target = question_and_target(record)
            if (question, target) in problems:
                continue
            text = PROMPTS.get(cfg.prompt, cfg.prompt).replace("{question}", question)
            if cfg.prompt == "chat":
                message = {"role": "user", "content": text}
                chat = tokenizer.apply_chat_template([message], add_generation_prompt=True)
                ids = chat["input_ids"]
            else:
                ids = tokenizer.encode(text)
        except Exception as error:
            raise UserError(f"{path}:{line}: {error!r} in {row!r:.99}; {EXAMPLE}") from None
        usable = cfg.reward is not is_correct or is_correct(rf"\boxed{{{target}}}", target)
        if usable and 0 < len(ids) <= context - cfg.max_new_tokens:
            end = tokenizer.decode(ids[-9:], skip_special_tokens=True).rstrip()
            prefix = "<think>" * end.endswith("<think>")
            problems[question, target] = Problem(question, target, ids, prefix)
        else:
            left_out.append(line)

    if left_out:
        print(f"{path}: {len(left_out)} left out, the first in line {left_out[0]}: {LEFT_OUT}")
    if not problems:
        raise UserError(f"{path}: no questions are left; {EXAMPLE}")
    print(f"{path}: {len(problems)} questions; the columns are {', '.join(record)}")
    return list(problems.values())


# ------------------------------------------------------------------------ 9 Model and processes
Batch = namedtuple("Batch", "ids response_mask logp_old entropy advantage")  # each (B, T)
OWN_CACHE = "cpmant falcon_mamba mamba minimax openai-gpt recurrent_gemma rwkv xlstm"


def start_processes(cfg):
    """Join the others, if torchrun has started several. See sample_and_grade, micro_batches."""
    backend = "cpu:gloo,cuda:nccl" if cfg.device == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        wait = datetime.timedelta(hours=2)  # the others may still be sampling
        dist.init_process_group(backend, timeout=wait)
    elif cfg.dtype == "bfloat16" or cfg.offload:  # FSDP needs a group, even of one process
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def ranks():
    """(number of this process, number of all): (0, 1), unless torchrun has started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(tensor):
    """Add up a tensor over all processes, in place, in every process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def load_policy(path, cfg):
    """Read (model, tokenizer) from a folder or the hub. Raises UserError."""
    if not dist.is_initialized():
        start_processes(cfg)
    kwargs = {"trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **kwargs)
        if cfg.prompt == "chat" and not tokenizer.chat_template:
            raise ValueError("it has no chat template, which --prompt chat needs")
        config = transformers.AutoConfig.from_pretrained(path, **kwargs)
        if hasattr(config, "quantization_config") or config.model_type in OWN_CACHE.split():
            raise ValueError("it is quantized, or has no ordinary cache: it cannot be trained")
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same, in one operation
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True, **kwargs
        )
        if info["missing_keys"]:
            raise ValueError(f"it lacks the weights {info['missing_keys']}")
    except Exception as error:
        raise UserError(f"model {path}: {error!r:.300}") from None
    place(model, cfg)
    print(f"{path}: {model.num_parameters():,} parameters on {ranks()[1]} x {cfg.device}")
    return model, tokenizer


def place(model, cfg):
    """Put a model on its device, or, by FSDP, a share of it on that of each process."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a plan for each new length
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
        for layer in layers:
            # When it recomputes. OPT's layers would drop out, too, and are left alone.
            layer.training = not getattr(layer, "dropout", 0)
    if not dist.is_initialized():
        model.to(cfg.device)
        return
    compute = fsdp.MixedPrecisionPolicy(getattr(torch, cfg.dtype), reduce_dtype=torch.float32)
    options = {"mesh": dist.init_device_mesh(cfg.device, (ranks()[1],)), "mp_policy": compute}
    if cfg.offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=cfg.device == "cuda")
    for part in (*layers, model):  # one after the other, to save memory
        fsdp.fully_shard(part, reshard_after_forward=False, **options)


class RoomyLayer(StaticLayer):
    """Keys and values (B, heads, T, D), with room for all tokens: faster from about 64 on."""

    length = 0

    def update(self, keys, values, *args, **kwargs):
        self.length += keys.shape[2]
        return [each[:, :, : self.length] for each in super().update(keys, values)]

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0


def prepare(model, prompts, seeds, group_size, n):
    """ids and attention_mask (B, T), padded on the left; random numbers (B, n); a cache."""
    rows = [torch.tensor(prompt) for prompt in prompts for _ in range(group_size)]
    ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    both = F.pad(torch.stack([ids.clamp(min=0), ids >= 0]), (0, n))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = [torch.rand(group_size, n, generator=g, dtype=torch.float64) for g in generators]
    cache = transformers.DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and n >= 64:  # not a sliding window, linear attention
            cache.layers[i] = RoomyLayer(both.shape[2])
    return *both.to(model.device), torch.cat(uniform).to(model.device), cache


def stopping_criteria(model, tokenizer, stop):
    """For the text stop, and the end tokens of the generation config and the tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    criteria = [transformers.EosTokenCriteria([*{*ends, tokenizer.eos_token_id} - {None}])]
    if stop:
        criteria.append(transformers.StopStringCriteria(tokenizer, [stop]))
    return transformers.StoppingCriteriaList(criteria)


def split_into_groups(tensors, W, group_size, tokenizer, cut_off, stop):
    """ids, attention_mask, logp, entropy, each (B, T) -> P lists of G Completions."""
    ids, attention_mask, logp, entropy = (tensor.cpu() for tensor in tensors)
    if logp.isnan().any():
        raise UserError("the model's probabilities are NaN: damaged weights, or a high --lr")
    is_answer = torch.arange(ids.shape[1]) >= W
    completions = []
    for i, mask in enumerate(attention_mask.bool()):  # as an index, it strips the padding
        answer = ids[i, mask & is_answer]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        text = text.split(stop)[0] if stop else text
        parts = ids[i, mask], is_answer[mask], logp[i, mask], entropy[i, mask]
        completions.append(Completion(*parts, text, len(answer), truncated=i in cut_off))
    return [completions[i : i + group_size] for i in range(0, len(completions), group_size)]


def sample_and_grade(model, tokenizer, problems, group_size, cfg, generator=None):
    """sample() and grade() for any number of Problems, shared out among the processes."""
    rank, n = ranks()
    generator = generator or torch.Generator().manual_seed(cfg.seed)
    seeds = torch.randint(2**62, (len(problems),), generator=generator).tolist()[rank::n]
    prompts = [problem.ids for problem in problems[rank::n]]
    size = max(1, cfg.sample_batch_size // group_size)
    sharded = [part for part in model.modules() if isinstance(part, fsdp.FSDPModule)]
    for part in sharded:
        part.unshard()  # all of it, so that no process waits for another
    share = []
    for i in range(0, len(prompts), size):
        chunk = slice(i, i + size)
        share += sample(model, tokenizer, prompts[chunk], group_size, seeds[chunk], cfg)
    for part in sharded:
        part.reshard()
    grade(share, problems[rank::n], cfg)  # each once: a reward may be slow, or random

    shares = [share] * n
    if n > 1:
        dist.all_gather_object(shares, share)
    return [group for turn in itertools.zip_longest(*shares) for group in turn if group]


def collate(completions, device):
    """Put B Completions into one Batch."""
    columns = []
    for name in Batch._fields:
        rows = [getattr(completion, name) for completion in completions]
        columns.append(pad_sequence(rows, batch_first=True).to(device))
    return Batch(*columns)


def micro_batches(batch, keep, cfg):
    """Yield (rows, Batch, keep) of this process: as many rows as fit, or one; longest first."""
    rank, n = ranks()
    length = keep.cumsum(1).argmax(1).clamp(min=1) + 1  # (B,) up to the last kept token
    left = length.argsort(descending=True)
    while len(left) > 0:
        width = int(length[left[0]])
        size = max(1, cfg.micro_batch_size // width) * n
        rows, kept = left[rank:size:n], keep
        if len(rows) == 0:  # all processes must yield the same number of parts
            rows, kept = left[:1], torch.zeros_like(keep)
        micro = Batch(*(tensor[rows, :width] for tensor in batch))
        yield rows, micro, kept[rows, :width]
        left = left[size:]


def clip_gradient(model, limit):
    """Scale the gradient down to a norm of at most limit (0: none). Returns its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


# ---------------------------------------------------------------------- 10 Log and checkpoints
SHOWN = ("reward", "accuracy", "stderr", "entropy", "threshold", "clipped", "length", "updates")
STOP = []  # the signals received
FULL_STATE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # of all processes


def minibatch_metrics(per_token, batch, keep, normalizer, cfg):
    """per_token: objective, clipped or not, |log r_t| of this process's kept tokens, (3, K)."""
    objective, clipped, change = all_reduce(per_token.sum(1)).tolist()
    K = int(keep.sum())
    return {
        "loss": -objective / normalizer,
        "entropy": batch.entropy[batch.response_mask].mean().item(),
        "threshold": fork_threshold(batch, cfg.rho),
        "kept": K / int(batch.response_mask.sum()),
        "clipped": clipped / max(K, 1),  # "bottom" at rho = 1 keeps none
        "sampler_mismatch": math.exp(min(change / max(K, 1), 99)),  # mean factor, up or down
    }


def mean_metrics(taken, cfg):
    """Means over the optimizer steps taken. UserError, if the first one was not on-policy."""
    if not taken:
        return {}
    means = {name: fmean(metrics[name] for metrics in taken) for name in taken[0]}
    means["sampler_mismatch"] = mismatch = taken[0]["sampler_mismatch"]
    if mismatch > (1.5 if cfg.dtype == "bfloat16" else 1.001):  # r_t was not 1
        raise UserError(f"--model: sampling and training differ {mismatch:.3f}-fold")
    return means


def fork_threshold(batch, rho):
    """tau_rho: the lowest entropy among the top rho of the response tokens of a Batch."""
    return batch.entropy[fork_mask(batch.entropy, batch.response_mask, rho)].min().item()


def log_step(metrics, groups, tokenizer, state, cfg):
    """Add a step to the log and the screen, and now and then samples of its answers."""
    log, samples = state["log"], state["samples"]
    before = log[-1] if log else {"tokens": 0, "seconds": 0.0}
    completions = sum(groups, [])
    for name in ("reward", "length", "truncated") if groups else ():
        metrics[name] = fmean(getattr(completion, name) for completion in completions)
    tokens = sum(completion.length for completion in completions)
    metrics["tokens_per_second"] = tokens / metrics["seconds"]
    metrics["tokens"] = before["tokens"] + tokens
    metrics["seconds"] += before["seconds"]
    log.append(metrics)
    shown = [f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics]
    print(f"step {metrics['step']}/{cfg.steps} ", *shown)
    if metrics.get("groups_kept") == 0:
        print(
            f"  no group has rewards that differ ({metrics['truncated']:.0%} are cut off): see "
            "samples.jsonl; try --max-new-tokens, --prompt, easier data, or a lower --lr"
        )
    if groups and ("accuracy" in metrics or metrics["step"] in (1, cfg.steps)):
        samples += sample_records(metrics["step"], groups[:4], tokenizer, cfg)
        print(mark_forks(samples[-2]))
    write_run(cfg, log, samples)


def sample_records(step, groups, tokenizer, cfg):
    """Yield the best and the worst completion of each group, token by token, for a file."""
    threshold = fork_threshold(collate(sum(groups, []), "cpu"), cfg.rho)
    for group in groups:
        ranked = sorted(group, key=lambda completion: -completion.reward)
        for completion in (ranked[0], ranked[-1]):
            places = completion.response_mask.nonzero()[:300, 0]
            yield {
                "step": step,
                "question": completion.problem.question,
                "target": completion.problem.target,
                "reward": completion.reward,
                "truncated": completion.truncated,
                "length": completion.length,
                "threshold": threshold,
                "tokens": [tokenizer.decode(token) for token in completion.ids[places]],
                "entropy": completion.entropy[places].tolist(),
                "logp": completion.logp_old[places].tolist(),
            }


def mark_forks(record):
    """A sample as text for the screen, with its forks [in brackets]."""
    text = f"    {record['question']}\n    "
    for token, entropy in zip(record["tokens"], record["entropy"], strict=True):
        text += f"[{token}]" if entropy >= record["threshold"] else token
    return f"{text}   (reward {record['reward']:g})"


def write_run(cfg, log, samples):
    """Write config.json, metrics.jsonl and samples.jsonl anew; only the first process does."""
    config = vars(cfg) | {"reward": cfg.reward.__name__}
    files = {"config.json": [config], "metrics.jsonl": log, "samples.jsonl": samples}
    for name, records in files.items() if ranks()[0] == 0 else ():
        os.makedirs(cfg.out, exist_ok=True)
        lines = [json.dumps(record) + "\n" for record in records]
        Path(cfg.out, name).write_text("".join(lines))


def ask_to_stop(number, frame):
    """Ctrl-C and SIGTERM end a run after its step; a second one ends it at once."""
    if STOP and ranks()[1] == 1:  # torchrun may send again what the terminal has sent
        raise KeyboardInterrupt
    STOP.append(number)
    print("stopping after this step (again: at once, unsaved)", file=sys.stderr)


def settings(cfg, problems):
    """What must be the same on --resume: --model, --prompt to --dtype, and the data."""
    names = list(vars(cfg))
    same = names[names.index("prompt") : names.index("out")]
    checksum = zlib.crc32(repr(problems).encode())
    return {name: getattr(cfg, name) for name in ("model", *same)} | {"data": checksum}


def find_checkpoint(cfg):
    """The newest checkpoint in --out, or None. UserError, if a run may not begin there."""
    newest = get_last_checkpoint(cfg.out) if os.path.isdir(cfg.out) else None
    if newest and not cfg.resume:
        raise UserError(f"--out {cfg.out}: holds a run; add --resume, or choose another folder")
    return newest


def load_checkpoint(folder, state, model, optimizer, generator):
    """Restore what save_checkpoint() wrote, except the weights, which load_policy() reads."""
    try:
        saved = torch.load(f"{folder}/trainer.pt", weights_only=True)
    except Exception as error:
        raise UserError(f"{folder}: trainer.pt is missing or damaged ({error!r})") from None
    changed = dict(saved["settings"].items() - state["settings"].items())
    if changed:
        raise UserError(f"--resume: {folder} was trained with other data or flags: {changed}")
    state.update((name, saved[name]) for name in state)
    generator.set_state(saved["generator"])
    if saved["optimizer"]:
        dcp.set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=FULL_STATE)
    print(f"{folder}: {len(state['log']) - 1} steps are already done")


def save_checkpoint(step, model, tokenizer, optimizer, generator, state, cfg):
    """Write out/checkpoint-STEP, aside until it is whole; then delete the one before."""
    stepped = [optimizer] if optimizer.state else []  # dcp would take a first step to fill it
    weights, optimizer_state = dcp.get_state_dict(model, stepped, options=FULL_STATE)
    if ranks()[0] == 0:
        before = get_last_checkpoint(cfg.out)
        part = Path(cfg.out, "unfinished")
        model.save_pretrained(part, state_dict=weights)
        tokenizer.save_pretrained(part)
        rest = {"generator": generator.get_state(), "optimizer": optimizer_state}
        torch.save(state | rest, part / "trainer.pt")
        print("saved", part.rename(part.with_name(f"checkpoint-{step}")))
        if before:
            shutil.rmtree(before)
    all_reduce(torch.zeros(1))  # the others wait


# -------------------------------------------------------------------- 11 Compare, show and main
MAY_BE_0 = """seed steps save_every eval_every overlong_buffer lr weight_decay clip_low
clip_high dual_clip grad_clip"""


def compare(cfg):
    """Train on each kind of tokens with each seed, or continue the runs in --out."""
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for tokens in ("top", "all", "random", "bottom"):
            out = f"{cfg.out}/{tokens}-{cfg.rho:g}-seed{seed}"
            print(f"\n{out}")
            train(dataclasses.replace(cfg, tokens=tokens, seed=seed, out=out, resume=True))


def show(cfg):
    """Sample completions and show their forks, without training."""
    find_checkpoint(dataclasses.replace(cfg, resume=False))  # UserError, if there is one
    model, tokenizer = load_policy(cfg.model, cfg)
    problems = load_problems(cfg.data, model, tokenizer, cfg)[: cfg.prompts_per_step]
    groups = sample_and_grade(model, tokenizer, problems, cfg.group_size, cfg)
    records = list(sample_records(0, groups, tokenizer, cfg))
    write_run(cfg, [], records)
    for record in records[:8]:
        print(mark_forks(record))


def fill_in_defaults(cfg):
    """Fill in the flags that depend on others. Raises UserError for values without sense."""
    beside = Path(cfg.data).with_name("test.jsonl")
    if not cfg.eval_data and beside != Path(cfg.data) and beside.exists():
        cfg.eval_data = str(beside)
    kind = "compare" if cfg.compare else f"{cfg.tokens}-seed{cfg.seed}"
    cfg.out = cfg.out or f"out/{Path(cfg.model).name}-{'show' if cfg.show else kind}"
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if cfg.device == "cuda" else "float32"
    if isinstance(cfg.reward, str):
        cfg.reward = runpy.run_path(cfg.reward).get("reward") if cfg.reward else is_correct

    for name, value in vars(cfg).items():
        lowest = 0 if name in MAY_BE_0.split() else 1e-15
        if type(value) in (int, float) and not lowest <= value < 1e15:
            raise UserError(f"--{name.replace('_', '-')}: must not be {value}")
    unclear = "{question}" not in PROMPTS.get(cfg.prompt, cfg.prompt)
    mistakes = {
        "--rho: must be at most 1": cfg.rho > 1,
        "--dual-clip: must be above 1, or 0": 0 < cfg.dual_clip <= 1,
        "--reward: must be, or define, a function reward": not hasattr(cfg.reward, "__name__"),
        "--prompt: plain, boxed, answer, chat, or a text with {question}": unclear,
    }
    for mistake, made in mistakes.items():
        if made:
            raise UserError(mistake)


def command_line():
    """A parser with a flag for each field of Config, whose comments are the help."""
    source = inspect.getsource(Config)
    for field in dataclasses.fields(Config):
        field.metadata = {"help": re.search(rf"    {field.name}: .*# (.+)", source)[1]}
    return transformers.HfArgumentParser(Config, usage=argparse.SUPPRESS)


def main(argv=None, reward=is_correct):
    """The command line; from Python, with a list of strings. Bad input: SystemExit(2)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = command_line()
    options = vars(parser.parse_args(argv))
    options["reward"] = options["reward"] or reward
    handlers = {}
    try:
        cfg = Config(**options)
        if cfg.show:
            show(cfg)
            return
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, ask_to_stop)
        (compare if cfg.compare else train)(cfg)
    except KeyboardInterrupt:
        print("stopped; to continue, add --resume to the same command")
        raise SystemExit(130) from None
    except (UserError, OSError, ImportError) as error:
        parser.error(error)
    finally:
        STOP.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print(f"for pictures: python {TINY}/report.py {cfg.out}", flush=True)
    if ranks()[1] > 1:
        os._exit(0)  # threads that gloo leaves behind can crash Python's shutdown


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    main()

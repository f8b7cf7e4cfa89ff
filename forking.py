r"""Reinforcement learning on forking tokens, the 80/20 rule of arXiv 2506.01939, in one file.

In a chain of thought only a few tokens decide where the reasoning goes. They are the forks: the
tokens at which the entropy of the policy's next-token distribution is high. The paper applies
the policy gradient to just these 20 % of the tokens, and gains as much as from all, or more:

    1 Sample    a group of completions for each question, with the entropy at every token
    2 Check     the last \boxed{}, "Answer:" or "####" against the target: reward 1 or 0
    3 Entropy   of the current policy, at every token of every completion
    4 Fork      keep the 20 % of the tokens with the highest entropy       <- this is the paper
    5 Loss      PPO's clipped objective, with advantages relative to the group
    6 Update    a few optimizer steps on these completions, which are then thrown away

One such training step is train()'s loop, and the file has its order. The lesson ends where it
says so; below is the rest: LaTeX, data formats, memory, several GPUs, interruptions.

To be maximised, over the response tokens t of a mini-batch (the paper's Eq. 6, version 2):

    J = 1/K  sum_t  1[H_t >= tau_rho]  min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)

    symbol     name        shape    meaning
    pi_theta   logp        (K,)     log-probability of a token under the policy being trained
    pi_old     logp_old    (K,)     the same under the policy that sampled it
    r_t        ratio       (K,)     exp(logp - logp_old)
    A_t        advantage   (K,)     reward, in standard deviations from the mean of its group
    H_t        entropy     (B, T)   of the current policy's next-token distribution, in nats
    tau_rho    -           ()       lowest entropy among the top rho of the N tokens: fork_mask
               keep        (B, T)   1[H_t >= tau_rho]: True at the K kept tokens

    P questions, G completions of each; B rows of T tokens (prompt, completion, padding) in a
    batch, N of them response tokens, K of these kept; V tokens in the vocabulary, D the width
    of the model. Column t of a (B, T) tensor is about the token at t, predicted at t - 1.

Differences from the paper and its released code:
    - the threshold is that of a whole mini-batch; theirs of a micro-batch on one GPU
    - exactly ceil(rho N) tokens are kept; of equal entropies, the first ones
    - before the first optimizer step after sampling, H is the sampler's: it is the same policy
    - a group's standard deviation is the population's; verl's divides by G - 1
    - the dual clip (--dual-clip, on by default) is their code's, not the equation's
Left out on purpose: KL penalty and reference model (the paper has none), value network, entropy
bonus, learning-rate schedule, tools and several turns, an inference engine.

    python forking.py                     # a tiny GPT-2 on two CPU cores: a minute or two
    python forking.py --compare           # top, all, random and bottom tokens, three seeds each
    python forking.py --model Qwen/Qwen3-0.6B-Base --data math.jsonl --prompt boxed --lr 1e-6 \
      --max-new-tokens 2048 --sample-batch-size 32 --micro-batch-size 2 --gradient-checkpointing
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import gc
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args, get_origin

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # else two threads crawl beside a busy program
os.environ.setdefault(  # for caches that grow; and no rounding of 192 MB up to 256
    "PYTORCH_ALLOC_CONF", "expandable_segments:True,pinned_max_round_threshold_mb:1"
)

import filelock
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
import transformers
from huggingface_hub import model_info, try_to_load_from_cache
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

HERE = Path(__file__).resolve().parent
TINY = Path("tiny_data") if Path.cwd() == HERE else HERE / "tiny_data"


@dataclasses.dataclass
class Config:
    """One field for each flag: --group-size sets group_size. --help shows the comments."""

    # the six that matter first
    model: str = f"{TINY}/gpt2"  # causal language model: a folder, or a hub's name
    data: str = f"{TINY}/train.jsonl"  # questions and targets: JSON lines, or parquet
    prompt: str = "plain"  # plain, boxed, answer, chat, a text with {question}, or @FILE
    max_new_tokens: int = 64  # tokens after which a completion is cut off
    lr: float = 5e-5  # learning rate of AdamW, constant; 1e-6 for large models
    tokens: Literal["top", "all", "bottom", "random"] = "top"  # which tokens to train on
    # 1 Sample, 2 Check
    seed: int = 0  # of questions, samples and mini-batches; the same seed repeats the run
    prompts_per_step: int = 32  # P, questions in a step
    group_size: int = 8  # G, completions of each question
    temperature: float = 1.0  # of sampling, and so of probabilities and entropies
    resample_rounds: int = 2  # rounds of sampling in a step; later ones replace dropped groups
    stop: str = ""  # text that ends a completion, too, such as Question: or \n\n
    overlong_buffer: int = 0  # tokens before the cut that lower the reward; 0: none
    # 3 Entropy, 4 Fork
    rho: float = 0.2  # share of the response tokens that are forks
    entropy_from: Literal["policy", "rollout"] = "policy"  # current, or as sampled
    # 5 Loss
    normalize: Literal["selected", "all"] = "selected"  # divide by how many tokens
    clip_low: float = 0.2  # a bad token less likely by this share gets no more gradient
    clip_high: float = 0.28  # a good token likelier by this share gets no more gradient
    dual_clip: float = 10.0  # where A < 0, the objective is at least this times A; 0: off
    # 6 Update
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on cuda
    minibatches: int = 4  # optimizer steps in one pass over the completions
    epochs: int = 1  # passes over the completions
    weight_decay: float = 0.1  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    # run (from here on, flags may change on --resume)
    out: str | None = None  # folder of this run; if not given, out/MODEL-TOKENS-seedSEED
    steps: int = 60  # training steps: one rollout and its updates each
    save_every: int = 10  # steps between checkpoints; 0: only at the end
    resume: bool = False  # continue from the last checkpoint in --out, or start
    eval_data: str | None = None  # questions to test on; else, test.jsonl beside --data
    eval_every: int = 5  # steps between evaluations; 0: never
    eval_samples: int = 4  # k, completions of each question of an evaluation
    # memory and speed
    device: str | None = None  # cpu, cuda, cuda:1 ...; if not given, cuda if available
    sample_batch_size: int = 256  # completions sampled at the same time
    micro_batch_size: int = 16  # completions in one forward pass of the update
    gradient_checkpointing: bool = False  # recompute activations instead of storing them
    shard: Literal["machine", "all"] = "machine"  # the GPUs that share one copy of the weights
    offload: bool = False  # weights and optimizer in the machine's memory, not the GPU's
    # instead of one training run
    compare: bool = False  # train on top RHO, all, random RHO and bottom 1 - RHO in turn
    seeds: int = 3  # with --compare: seeds for each, from --seed on
    rhos: tuple[float, ...] = ()  # with --compare: more values of RHO for top
    show: bool = False  # look at a model's forks, without training
    base: str | None = None  # with --show: the model before training, to see what changed
    min_count: int = 5  # with --show: occurrences that a token needs to be listed


def train(cfg):
    """Train as cfg says. Returns the log: a dict for each step, from 0. Raises UserError."""
    run = Run(cfg)  # its folder, log and checkpoints: section 12, below the line
    model, tokenizer, problems, tests = run.opened  # eval_every 0: no tests
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True
    )

    for step in run.steps(optimizer):  # from 0, which is before training, or the checkpoint's
        if step > run.saved:  # else it is only evaluated
            # 1 Sample, 2 Check: groups of completions, in each some right, some wrong
            groups, metrics = rollout(model, tokenizer, problems, run.queue, cfg, run.generator)

            # 3 Entropy, 4 Fork, 5 Loss, 6 Update
            metrics |= update(model, optimizer, groups, cfg, run.generator)
            run.record(step, metrics, groups)

        if tests and (step % cfg.eval_every == 0 or step == cfg.steps):
            run.history[-1] |= evaluate(model, tokenizer, tests, cfg)
        run.log()
    return run.history


# ------------------------------------------------------------------------------------- 1 Sample
@dataclasses.dataclass
class Completion:
    """One sampled answer to a question. T counts the tokens of prompt and answer."""

    ids: torch.Tensor  # (T,) tokens, the one that ends the answer included
    response_mask: torch.Tensor  # (T,) True at the answer's tokens
    logp: torch.Tensor  # (T,) log-probability of an answer's token when it was drawn, else 0
    entropy: torch.Tensor  # (T,) of the distribution that it was drawn from, in nats, else 0
    text: str
    finished: bool  # False: cut off after max_new_tokens
    problem: "Problem | None" = None  # question and target
    correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0


def draw(logits, temperature, uniform):
    """Draw a token per row: logits (B, V), uniform (B,) in [0, 1) -> token, logp, entropy (B,).

    It is the first token at which the cumulative distribution exceeds the row's random number.
    torch.multinomial would take all rows' random numbers from one stream; here each row brings
    its own, so that no completion depends on others in the batch. Temperature 0 is greedy.
    """
    p = torch.softmax(logits.float() / max(temperature, 1e-6), -1)  # (B, V)
    cumulative = p.cumsum(-1, dtype=uniform.dtype)  # float64: float32 would be off by 3e-4
    height = uniform[:, None] * cumulative[:, -1:]  # the last sum is not exactly 1
    token = torch.searchsorted(cumulative, height, right=True)  # (B, 1)
    token = token.clamp(max=p.shape[-1] - 1)  # in case of rounding
    logp = p.gather(-1, token).log()
    entropy = torch.special.entr(p).sum(-1)  # the same as token_entropy(logits, temperature)
    return token[:, 0], logp[:, 0], entropy


def left_pad(prompts, device):
    """P lists of token ids -> ids, attention_mask (P, W), W the length of the longest.

    Padding (id 0, masked) is on the left, so that all completions begin in column W.
    """
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    attention_mask = pad_sequence(ones, batch_first=True, padding_side="left")
    return ids.to(device), attention_mask.to(device)


def read_prompts(model, ids, attention_mask, group_size):
    """Read each of P prompts once; copy its keys and values for the G completions of its group.

    Returns the logits of the first new token, (B, V), and the key-value cache.
    """
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # padding does not count
    out = model(
        ids,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = with_spare_room(out.get("past_key_values"))
    old_row = torch.arange(len(ids), device=ids.device).repeat_interleave(group_size)
    cache.reorder_cache(old_row)  # made for beam search: row i is now a copy of old_row[i]
    return out.logits[old_row, -1], cache


@torch.no_grad()
def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature, seeds, stop=""):
    """Complete P prompts (lists of token ids) group_size times each -> P lists of Completions.

    What transformers' generate() does, and entropies. Each prompt has a random seed of its own.
    """
    ended = ending(model, tokenizer, stop)  # tokens sampled (R, t) -> rows that end with them
    uniform = random_numbers(seeds, group_size, max_new_tokens, model.device)  # (B, max_new)
    ids, attention_mask = left_pad(prompts, model.device)  # (P, W)
    logits, cache = read_prompts(model, ids, attention_mask, group_size)

    # From here on: a row for each completion, and max_new_tokens columns more, still masked.
    first = ids.shape[1]
    ids = F.pad(ids.repeat_interleave(group_size, 0), (0, max_new_tokens))
    attention_mask = F.pad(attention_mask.repeat_interleave(group_size, 0), (0, max_new_tokens))
    logp = torch.zeros(ids.shape, device=model.device)
    entropy = torch.zeros(ids.shape, device=model.device)
    rows = torch.arange(len(ids), device=model.device)  # those that have not ended
    for t, numbers in enumerate(uniform.T, start=first):
        token, logp[rows, t], entropy[rows, t] = draw(logits, temperature, numbers[rows])
        ids[rows, t] = token
        attention_mask[rows, t] = 1

        # A completion that has ended leaves the batch: nothing more is computed for it.
        stay = (~ended(ids[rows, first : t + 1], None)).nonzero()[:, 0]  # positions in rows
        if len(stay) < len(rows):
            rows = rows[stay]
            cache.reorder_cache(stay)
        if len(rows) == 0 or t + 1 == ids.shape[1]:
            break
        logits = model(
            ids[rows, t, None],
            attention_mask=attention_mask[rows, : t + 1],
            position_ids=attention_mask[rows].sum(1, keepdim=True) - 1,  # without padding
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]

    sampled = ids, attention_mask, logp, entropy  # padding is stripped by the mask
    return split_into_groups(sampled, first, group_size, tokenizer, rows, stop)


def rollout(model, tokenizer, problems, queue, cfg, generator):
    """Sample and grade until prompts_per_step groups are partly right, or the rounds are over.

    A group all right or all wrong is dropped: none of its completions beats another. queue: the
    numbers of the problems to come. Returns (the partly right groups, metrics of all).
    """
    everything, mixed = [], []
    for _round in range(cfg.resample_rounds):
        missing = cfg.prompts_per_step - len(mixed)
        if missing == 0:
            break
        while len(queue) < missing:
            queue += torch.randperm(len(problems), generator=generator).tolist()
        chosen = [problems[queue.pop(0)] for _ in range(missing)]
        groups = sample_groups(model, tokenizer, chosen, cfg.group_size, cfg, generator)
        grade(groups, chosen, cfg)
        for group in groups:
            everything += group
            if 0 < sum(completion.correct for completion in group) < len(group):
                mixed.append(group)

    return mixed, rollout_metrics(everything, mixed)


# -------------------------------------------------------------------------------------- 2 Check
def extract_answer(text):
    r"""What the last \boxed{...} holds, or what follows a later "Answer:" or "####".

    Only what comes after the last </think> counts. None: no answer, or a <think> still open.
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
    """True if extract_answer(text) equals target as a number or a formula. Never raises.

    Nothing is executed or simplified. An answer of over 1,000 characters is not correct.
    """
    answer = extract_answer(text)
    if answer is None or max(len(answer), len(target)) > 1000:
        return False
    return same_answer(answer, target)


def overlong_penalty(length, max_new_tokens, buffer):
    """DAPO: 0 up to max_new_tokens - buffer tokens, then falling linearly to -1 at the cut."""
    return min((max_new_tokens - buffer - length) / max(buffer, 1), 0)


def grade(groups, problems, cfg):
    """Give each Completion its reward, 1 or 0 plus the overlong penalty, and its advantage."""
    for group, problem in zip(groups, problems, strict=True):
        for completion in group:
            length = int(completion.response_mask.sum())
            penalty = overlong_penalty(length, cfg.max_new_tokens, cfg.overlong_buffer)
            completion.problem = problem
            completion.correct = is_correct(problem.opening + completion.text, problem.target)
            completion.reward = completion.correct + penalty
        rewards = torch.tensor([[completion.reward for completion in group]])  # (1, G)
        for completion, advantage in zip(group, group_advantages(rewards)[0], strict=True):
            completion.advantage = advantage.item()


# ------------------------------------------------------------------------------------ 3 Entropy
def token_entropy(logits, temperature=1.0):
    """H_t = -sum_v p_v ln p_v, p = softmax(z / temperature): logits (..., V) -> (...). [Eq. 1]

    In nats and float32: 0 where one token is certain, ln V where all are equally likely. It
    tells how undecided the policy is before it draws, not how unlikely the drawn token is.
    """
    p = torch.softmax(logits.float() / temperature, -1)
    return torch.special.entr(p).sum(-1)  # entr(p) = -p ln p, which is 0 at p = 0


@torch.no_grad()
def policy_entropy(model, batch, cfg):
    """Entropy of the policy as it is now at each response token: (B, T), nats, else 0."""
    entropy = torch.zeros_like(batch.entropy)
    for rows, micro, where in micro_batches(model, batch, batch.response_mask, cfg):
        logits = logits_at(model, micro.ids, where)  # (N, V), row after row
        row, column = where.nonzero(as_tuple=True)  # in micro; rows[row] is the row in batch
        entropy[rows[row], column] = in_parts(token_entropy, logits, cfg.temperature)
    return all_reduce(entropy)


# --------------------------------------------------------------------------------------- 4 Fork
def fork_mask(entropy, response_mask, rho, tokens="top", generator=None):
    """The tokens to train on; for "top", they are 1[H_t >= tau_rho], but for ties.  [in Eq. 6]

    entropy (B, T) in nats, response_mask (B, T) -> bool (B, T). Of all N response tokens, "top"
    keeps the ceil(rho N) of highest entropy, "bottom" the others, "random" ceil(rho N) of them
    at random, "all" every one. Prompt and padding are never kept. Raises ValueError.
    """
    response_mask = response_mask.bool()  # as an index, integers would mean rows 0 and 1
    H = entropy[response_mask]  # (N,)
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be above 0, and at most 1, not {rho}")
    k = math.ceil(round(rho * len(H), 6))  # rounded, since 0.07 * 100 is 7.000000000000001
    ranking = H.argsort(descending=True, stable=True)  # equal ones: by row, then by column

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
    """A = (R - mean(R)) / std(R) over the answers to a question: (P, G) -> (P, G).  [Eq. 3]

    std is the population's. A group of equal rewards gets exactly 0.
    """
    rewards = rewards.float()
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    mean = rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True, correction=0)
    return ((rewards - mean) / std).masked_fill(equal, 0.0)


def clipped_objective(logp, logp_old, advantage, clip_low, clip_high, dual_clip=None):
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logp - logp_old).  [in Eq. 6]

    Per token, to be maximised; tensors of one shape. A token of a good completion (A > 0) that
    is already likelier than the clip allows gets no more gradient, nor does one of a bad
    completion (A < 0) that is already less likely. dual_clip c > 1: where A < 0, never below
    c A, so that a token that became c times likelier gets no gradient either; 0 or None: off.
    With fork_mask's keep, the loss is -(objective * keep).sum() / keep.sum().
    """
    ratio = torch.exp((logp - logp_old).clamp(-20, 20))  # within e^20, nothing overflows
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if dual_clip:
        lowest = dual_clip * advantage
        objective = torch.where(advantage < 0, torch.maximum(objective, lowest), objective)
    return objective


# ------------------------------------------------------------------------------------- 6 Update
@dataclasses.dataclass
class Batch:
    """B completions, padded on the right to the longest one."""

    ids: torch.Tensor  # (B, T)
    response_mask: torch.Tensor  # (B, T) True at the completions' tokens
    logp_old: torch.Tensor  # (B, T)
    entropy: torch.Tensor  # (B, T) as the sampler saw it
    advantage: torch.Tensor  # (B, T) the same at all tokens of a completion, 0 elsewhere


def collate(completions, device):
    """Put B Completions into one Batch."""

    def padded(name):
        rows = [getattr(completion, name) for completion in completions]
        return pad_sequence(rows, batch_first=True).to(device)

    mask = padded("response_mask")
    advantage = torch.tensor([[c.advantage] for c in completions], device=device)  # (B, 1)
    return Batch(padded("ids"), mask, padded("logp"), padded("entropy"), advantage * mask)


def logits_at(model, ids, where):
    """The logits that predict the tokens at `where`: (B, T) ids, bool with K True -> (K, V).

    The same as model(ids).logits[:, :-1][where[:, 1:]], but the output layer gets the hidden
    states of these K tokens only, and there are never (B, T, V) logits. No attention_mask is
    needed: padding is on the right, and no token attends to what comes after it.
    """
    source = where[:, 1:]  # the token at t is predicted at t - 1

    def select(head, inputs):
        return (inputs[0][source],)  # (B, T - 1, D) -> (K, D)

    with model.get_output_embeddings().register_forward_pre_hook(select):
        return model(ids[:, :-1], use_cache=False).logits


def kept_objective(model, micro, kept, cfg):
    """The objective, log r_t and A_t at the kept tokens of a micro-batch, each (K,)."""
    logits = logits_at(model, micro.ids, kept).float() / cfg.temperature  # (K, V)
    logp = -F.cross_entropy(logits, micro.ids[kept], reduction="none")  # log pi_theta
    logp_old, advantage = micro.logp_old[kept], micro.advantage[kept]
    objective = clipped_objective(
        logp, logp_old, advantage, cfg.clip_low, cfg.clip_high, cfg.dual_clip
    )
    return objective, logp - logp_old, advantage


def update(model, optimizer, groups, cfg, generator=None):
    """Take up to epochs * minibatches optimizer steps on groups of Completions -> metrics."""
    history = []  # of the optimizer steps taken
    orders = [torch.randperm(len(groups), generator=generator) for _ in range(cfg.epochs)]
    for order in orders:
        for part in order.tensor_split(cfg.minibatches):
            completions = [completion for i in part for completion in groups[i]]
            if not completions:
                continue  # there are fewer groups than mini-batches
            batch = collate(completions, cfg.device or model.device)

            # 3 Entropy. Until the first step is taken, the policy is still the sampler.
            if history and cfg.entropy_from == "policy":
                batch.entropy = policy_entropy(model, batch, cfg)

            # 4 Fork: one threshold and one normalizer, however micro-batches divide this
            keep = fork_mask(batch.entropy, batch.response_mask, cfg.rho, cfg.tokens, generator)
            counted = keep if cfg.normalize == "selected" else batch.response_mask
            normalizer = max(int(counted.sum()), 1)

            # 5 Loss: minus the mean objective; each micro-batch adds its part of the gradient.
            # At first all r are 1: the loss is minus the mean A of the kept tokens, and bad
            # completions may have more of these. It need not fall: its gradient teaches.
            parts = []
            for _rows, micro, kept in micro_batches(model, batch, keep, cfg):
                objective, log_ratio, advantage = kept_objective(model, micro, kept, cfg)
                (-objective.sum() / normalizer).backward()
                parts.append((objective.detach(), log_ratio.detach(), advantage))

            # 6 Update
            grad_norm = clip_gradient(model, cfg.grad_clip)
            metrics = minibatch_metrics(parts, batch, keep, normalizer, cfg)
            if math.isfinite(metrics["loss"] + grad_norm):  # both are; else, leave it out
                optimizer.step()
                history.append(metrics | {"grad_norm": grad_norm})
            optimizer.zero_grad()
    return mean_metrics(history, planned=cfg.epochs * min(cfg.minibatches, len(groups)))


# ------------------------------------------------------------------------------------- Evaluate
def evaluate(model, tokenizer, problems, cfg):
    """Complete each problem eval_samples = k times, always from the same seed.

    Returns accuracy (avg@k), its standard error over the problems, and pass_at_k, the share of
    problems with a right answer among the k.
    """
    groups = sample_groups(model, tokenizer, problems, cfg.eval_samples, cfg)
    grade(groups, problems, cfg)
    correct = [completion.correct for group in groups for completion in group]
    correct = torch.tensor(correct).float().view(len(groups), -1)  # (P, k)
    accuracy = correct.mean(1)  # (P,) of each problem
    stderr = accuracy.std(correction=min(1, len(groups) - 1)) / math.sqrt(len(groups))
    return {
        "accuracy": correct.mean().item(),
        "stderr": stderr.item(),
        "pass_at_k": correct.amax(1).mean().item(),
    }


# ==================== end of the lesson; below is what makes it practical =====================


# ------------------------------------------------------------------------------------ 7 Answers

MARKER = r"(?im)answer[\s*_]*[:\uff1a][*_}]*|answer is:? (?=[^\s0-9]{0,9}[0-9]\S{0,99}$)"
MARKER += r"|####(?=[^\w\n]{0,9}[0-9\\])"  # but "#### Check" is a heading

# A unit is in this list or a plural ("5 eggs"), and may be squared, "per day", "a day", "each".
UNITS = (
    "mm|cm|dm|km|in|ft|yd|mi|mph|mg|kg|lb|oz|ml|mL|hr|min|sec|inch|foot|feet|yard|mile|meter"
    "|gram|liter|minute|hour|day|week|month|year|dollar|cent|euro|degree|people|person|piece"
    "|children|men|women"
)
# Words that change the number, or what is said of it, are none, though they look like units.
NOT_A_UNIT = (
    "[a-z]*llions?|thousands?|hundreds?|tens|dozens?|scores?|pairs|couples|gross|mille"
    "|halves|thirds?|quarters|(?!month|path)[a-z]+ths?|myriads|lakhs|crores|percents"
    "|zeros|ones|twos|threes|fours|fives|sixes|sevens|eights|nines|[a-z]+ties|squares"
    "|cubes|roots|inverses|reciprocals|negatives|times|mods|plus|pluses|minus|minuses"
    "|less|versus|unless|always|sometimes|perhaps|maybes|guess|guesses|loss|this"
)
UNIT = (
    rf"(?!.*\b(?:{NOT_A_UNIT})\b)((?:(?:square|cubic)␣)?(?:{UNITS}|unit-[a-z]|[a-z]{{3,}}s)"
    rf"(?:␣*\^␣?[23])?(?:␣each|␣left|␣(?:per|an?)␣[a-z]+)?|(?:per|an?)␣(?:{UNITS}))"
)

SHORTHAND = {  # used in the rules below, where ␣ is a space
    "¤": UNIT,
    "@": r"([a-zA-Z](?:_\w)?|[A-Z]{2}|[a-z]\([a-z]\)|\([a-z](?:,␣?[a-z])+\))",  # x, AB, f(x)
    "…": r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)",  # what stands in braces, with braces in it
    "«": r"(?<![^-+(\[{;,&\n␣])(?<![\w^/})]␣)",  # where an entry or a term begins
    "»": r"(?=␣?(?:[-+)\];},&%\t\n]|$|\\\}))",  # where it ends
    "÷": r"\{(-?(?:[\w.^␣]|\\pi|\\sqrt|\{[^{}]*\})+)\}␣?\{(\\sqrt\{[^{}]*\}|\\pi|\d+|[a-z])\}",
}
# One rule a line, applied in this order: what is replaced, by what, and an example.
REWRITES = r"""
(?i)^(the␣)?(final␣)?answer␣is:?␣                          ␣          The final answer is 5
\.?␣I␣hope␣it␣is␣correct\.?$                               ␣          5. I hope it is correct.
\u2212                                                     -          −5
π                                                          \\pi␣      2π
\\((left|right)\.?|[bB]igg?[lr]?|displaystyle|q?quad)(?![a-zA-Z])  ␣   \left( 1 \right)
\\[cdt]frac                                                \\frac     \dfrac12
\\([gln]e)q(slant)?(?![a-z])                               \\\1       x \geq 5
\\lt(?![a-z])                                              <          x \lt 5
\\gt(?![a-z])                                              >          x \gt 5
\\%                                                        %          50\%
\\begin\{[pb]matrix\}                                      matrix(    \begin{pmatrix} 1 \\ 2
\\end\{[pb]matrix\}                                        )          \end{pmatrix}
\\\\                                                       ;          1 \\ 2: rows of a matrix
\{,\}|,\\!␣*|(?<=[0-9])\\,(?=[0-9]{3})                     ,          1{,}000, 10,\!080, 10\,000
^\\?\$␣?([0-9.,]*[0-9])\.?$                                \1␣dollars \$36
\^(\\circ|\{\\circ\})|\\degree(?![a-z])|°                  ␣          90^\circ
(\\[,;:!␣()\[\]]|\\?\$|\*\*|(?<=[\w})$.,])~|␣)+           ␣          \( 5 \), $5$, 5\,cm
␣?(?<!\.)[.。]$                                            ␣          5.
^([^()\[\]{}]*)[)\]}]$                                     \1         (Answer: 5)
\\(text|mathrm|mbox)␣?\{␣?([mghsL])␣?\}(?=␣?\^|␣?$)        ␣unit-\2   5\text{ m}
\\((text|math)(bf|it|rm|sf|normal)|mbox|boldsymbol)(?![a-z])  \\text  \mathbf{5}
\\text␣?\{…\}                                              ␣\1␣       \text{yes}
([_^])\{([0-9a-zA-Z])\}                                    \1\2       x^{2}
(?<![^(\[;,])\{…\}(?![^)\];,])                             \1         {5}
^\(([A-Z])\)$                                              \1         (B)
^\\\{([^()\[\]]*)\\\}$                                     \1         \{1, 2\}: a set is a list
(?<![0-9.])10\^(?:\{(-?[0-9]{1,3})\}|([0-9]))(?![0-9])     1E\1\2     10^{12}
(?<=[0-9])␣?\\(times|cdot)␣?1E                             E          1.2 \times 10^5
«([0-9]+)␣?\\(cdot|times)␣?(?=[a-z(]|\\(?!frac))           \1         3 \cdot \sqrt{13}
(?<![^(\[;,␣])\+␣?(?=\\infty)                              ␣          +\infty
^@␣?(=|\\in(?![a-z]))(?!␣?[a-zA-Z]$)                       \1\n       x = 5
␣*(per␣?cent|pct)$                                         %          28 percent
(?<=[0-9)}i])␣+(?=[a-z])¤␣*$                               \t\1       15 cm^2
(?<=(?<!\^)[0-9])_\{?([0-9]+)\}?$                          \t_\1      2516_8
␣?,␣|␣,                                                    ;          5, 6: a list
\\(frac|sqrt)␣?([0-9])                                     \\\1{\2}   \sqrt5, \frac12
\\frac␣?(\{[^{}]*\})␣?([0-9])                              \\frac\1{\2}  \frac{1}2
«([0-9]+)␣?\\frac\{([0-9]+)\}\{([0-9]+)\}»                 \1␣\2/\3   1\frac45
«\\frac␣?÷»                                                \1/\2      \frac{3\sqrt{3}}{4}
"""
RULES = re.findall(r"(?m)^(\S+) +(\S+)", REWRITES.translate(str.maketrans(SHORTHAND)))

FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # such as \uff15 for 5
NUMBER = re.compile(  # as an entry, or between brackets, = or &
    r"(?<![^()\[\]{&<>=;])(?:[+-]?([0-9]+␣)?[0-9]+/0*[1-9][0-9]*%?|[+-]?([0-9]*\.[0-9]+|"
    r"[0-9]+\.?|[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?)(E-?[0-9]{1,3}|e[+-][0-9]{2,3})?%?)"
    r"(?![^)\]}\\&<>=;])"
)


def last_box(text):
    r"""The content of the last complete \boxed{...}, or None, and the text after it."""
    opened = []  # of each brace that is still open: where its box begins, or -1 if it has none
    start = -1
    end = 0
    for brace in re.finditer(r"(\\boxed\s*)?\{|\\.|\}", text, re.DOTALL):
        if brace[0] == "{" or brace[1]:  # \{ is no brace
            opened.append(brace.end() if brace[1] else -1)
        elif brace[0] == "}" and opened:
            begin = opened.pop()
            if begin > start:
                start = begin
                end = brace.start()
    return (text[start:end].strip() if start >= 0 else None), text[end:]


def same_answer(answer, target):
    """Whether two answers are equal, as numbers or as formulas.

    A name (x = 5), a unit or a base (2516_8) may be missing in one of them, but not differ, and
    no base may be added to the target. The order matters in a tuple, not in a list or a set.
    """
    name, value, unit = normalize(answer)
    known_name, known_value, known_unit = normalize(target)
    if name and known_name and name != known_name:
        return False
    if unit and unit != known_unit and (known_unit or unit[0] == "_"):
        return False
    return value == known_value != [""]  # [""]: nothing is left of it


@functools.lru_cache(100_000)
def normalize(answer):
    r"""Take an answer apart, by RULES, into its name, value and unit.

    The value is a list of entries, in which numbers have become fractions: so 0.5, 1/2,
    \frac12 and 50\% are equal, also inside a tuple.
    """
    answer = "␣".join(answer.translate(FULL_WIDTH).split())
    for pattern, replacement in RULES:
        answer = re.sub(pattern, replacement, answer).strip("␣")
    answer = re.sub(r"(?<![0-9.])␣|␣(?![0-9.])", "", answer)  # 5 6 is not 56
    name, _, answer = answer.rpartition("\n")
    answer, _, unit = answer.partition("\t")

    entries = []
    for entry in answer.split(";"):
        if not NUMBER.fullmatch(entry):  # 1,000 is one
            thousands = r"(?<![0-9.])([1-9][0-9]{0,2}),(?=0[0-9]{2}(?![0-9]))"
            entry = re.sub(thousands, r"\1", entry).replace(",", ";")  # (1,000,2)
        entries += NUMBER.sub(to_fraction, entry).split(";")
    if not re.search(r"[(\[]|\\{", answer):
        entries.sort()
    return name, entries, unit.rstrip("es")  # inch, inches


def to_fraction(match):
    number = match[0]
    whole, _, rest = number.rstrip("%").replace(",", "").rpartition("␣")
    value = Fraction(rest)
    if whole and value >= 1:
        return number  # 1 5/4 is no mixed number
    if whole:
        value = Fraction(whole) + (-value if number[0] == "-" else value)
    return str(value / 100 if number[-1] == "%" else value)


# ----------------------------------------------------------------------------------- 8 Problems

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
PROMPTS = {
    "plain": "{question}\n",
    "boxed": "User:\n{question}\n" + BOXED + "\n\nAssistant:\n",  # the paper's
    "answer": "{question}\n\nReason step by step. The last line must be 'Answer: ' and then "
    "the answer alone.\n",  # like DAPO's
    "chat": "{question}\n" + BOXED,  # as a message in the model's own chat template
}
DATA_HELP = (
    'needed are JSON lines such as {"question": "1+2=?", "answer": "3"}, or a parquet file and '
    "pip install pyarrow; problem or prompt may stand for question, and reward_model with its "
    "ground_truth, or a solution with a box, for answer"
)


@dataclasses.dataclass
class Problem:
    question: str
    target: str  # the known answer
    ids: list[int]  # tokens of the prompt: the question in its template
    opening: str = ""  # "<think>", if the prompt ends in it


class UserError(Exception):
    """A mistake in what we were given. main() prints it in one line and exits with code 2."""


def encode(tokenizer, prompt, question, opening=""):
    """The token ids that put a question to the model, and begin its answer with `opening`.

    prompt: one of PROMPTS, or a template. There are never two first tokens, nor an end token.
    """
    text = PROMPTS.get(prompt, prompt).replace("{question}", question)
    if prompt == "chat":
        if not tokenizer.chat_template:
            raise UserError("--prompt chat: this model has no chat template; try boxed")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer.encode(text + opening, add_special_tokens=prompt != "chat")
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        del ids[0]
    while ids[-1:] == [tokenizer.eos_token_id]:
        ids.pop()
    return ids


def read_records(path):
    """Yield (number, record) for each line of a JSON lines file, or row of a parquet file."""
    number = 1
    try:
        if Path(path).suffix == ".parquet":
            from pyarrow.parquet import ParquetFile  # if it happens to be installed

            for batch in ParquetFile(path).iter_batches():
                yield from enumerate(batch.to_pylist(), number)
                number += len(batch)
        else:
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield number, json.loads(line)
    except (ImportError, ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: {DATA_HELP} ({error})") from None


def question_and_target(record):
    """Read a record of GSM8K, MATH, DAPO-Math-17k or the like -> question, opening, target.

    opening: how the answer begins already. If anything is missing, all are empty.
    """
    try:
        messages = record.get("question") or record.get("problem") or record["prompt"]
        if not isinstance(messages, list):
            messages = [{"role": "user", "content": messages}]
        said = {each["role"]: each.get("content") for each in messages}  # the last of each role
        opening = said["assistant"] if messages[-1]["role"] == "assistant" else ""
        target = record.get("answer")
        if target is None and "reward_model" in record:
            target = record["reward_model"]["ground_truth"]
        if target is None:
            target, _ = last_box(record["solution"])
        return as_text(said["user"]), as_text(opening), read_target(as_text(target))
    except (AttributeError, LookupError, TypeError, UnicodeError):
        return "", "", ""


def as_text(value):
    if isinstance(value, bool | dict | list | None):
        raise TypeError
    return value.decode() if isinstance(value, bytes) else str(value).encode().decode()


def read_target(text):
    r"""What a target says: "#### 7", "The answer is 7." and "so it is \boxed{7}" are all 7.

    Returns "" if no answer could be equal to it.
    """
    text = text.rpartition("####")[2]
    target = extract_answer(re.sub("(?i)answer is:?", "Answer:", text))
    target = text.strip() if target is None else target
    useless = re.fullmatch("(?i)proof|not ?found|nan|null|n/a", target)
    return target if is_correct(rf"\boxed{{{target}}}", target) and not useless else ""


def load_problems(path, tokenizer, prompt, room):
    """Read a list of different Problems. room: tokens a prompt may take. Raises UserError.

    Lines that cannot be used are left out, and counted on the screen.
    """
    problems = {}
    left_out = {}  # why -> numbers of lines
    unknown = 0
    for number, record in read_records(path):
        found = question_and_target(record)
        if found in problems:
            continue
        question, opening, target = found
        ids = encode(tokenizer, prompt, question, opening)
        if not (question.strip() and target):
            reason = "no question, or no target that an answer could match"
        elif not 0 < len(ids) <= room:
            reason = f"a prompt of over {room} tokens, all that --max-new-tokens leaves"
        else:
            thinking = tokenizer.decode(ids[-9:]).rstrip().endswith("<think>")
            problems[found] = Problem(question, target, ids, "<think>" * thinking)
            unknown += tokenizer.unk_token_id in ids
            continue
        left_out.setdefault(reason, []).append(number)

    said = "; ".join(
        f"{len(lines)} with {why} (first in line {lines[0]})" for why, lines in left_out.items()
    )
    if not problems:
        raise UserError(f"{path}: nothing is left ({said or 'it is empty'}); {DATA_HELP}")
    if said:
        say(f"{path}: left out {said}")
    if unknown:
        say(f"{path}: {unknown} questions have characters that the tokenizer does not know")
    return list(problems.values())


# -------------------------------------------------------------------------------------- 9 Model
def load_policy(path, cfg):
    """Load (model, tokenizer), as cfg says. Raises UserError."""
    try:
        if not (Path(path).is_dir() or try_to_load_from_cache(str(path), "config.json")):
            model_info(str(path), timeout=9)  # from_pretrained would try for a minute
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if tokenizer.vocab_size < 2:
            raise ValueError("it has no tokenizer")
        config = transformers.AutoConfig.from_pretrained(path)
        for name in vars(config.get_text_config()):
            if "drop" in name:  # without dropout, so that what is trained is what was sampled
                setattr(config.get_text_config(), name, 0.0)
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same, in one operation
        load = transformers.AutoModelForCausalLM.from_pretrained
        model, info = load(path, config=config, dtype="auto", output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"it lacks {sorted(info['missing_keys'])[0]}, for one")
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if Path(path, "model").is_dir():
            reason = f"did you mean {path}/model?"
        raise UserError(
            f"model {path}: neither a folder with a causal language model and its tokenizer, "
            f"nor available from the hub ({reason})"
        ) from None
    return prepare(model.eval(), cfg), tokenizer


def prepare(model, cfg):
    """Put a model on its device; choose precision; share it out, if there are others.

    Weights are float32, in which a step of 1e-6 is not lost. FSDP computes with a copy of them
    in bfloat16, on one GPU as on many.
    """
    device = torch.device(cfg.device or "cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a plan for each new length
    model.in_bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype, device.type) == ("auto", "cuda")
    same = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():  # whole_weights() will put the true ones there
        same[id(weight)] = torch.nn.Parameter(torch.empty_like(weight, device="meta"))
    model.sampler = [copy.deepcopy(model, same)]  # in a list, so as not to be a part of it

    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
        for layer in layers:
            layer.training = True  # when it recomputes
    sharing = ranks()[1] > 1 or model.in_bfloat16 or cfg.offload
    if sharing and device.type == "mps":
        raise UserError("--device mps: only in float32, in one process, without --offload")
    options = fsdp_options(model, cfg, device) if sharing else {}
    for part in (*layers, model) if sharing else (model,):
        copy_to(device, part)
        if sharing:
            fsdp.fully_shard(part, **options)
        if ranks()[1] > 1:
            part.set_gradient_divide_factor(1.0)  # add up gradients; the default is their mean
            part.set_force_sum_reduction_for_comms(True)
    return model


def copy_to(device, part):
    """Weights of a layer go from the file, which is only mapped, to the device, in float32.

    (Even on a CPU: where a file happens to lie in memory decides about the last bit of a matrix
    product.) Those that FSDP has shared out already stay where they are.
    """
    for weight in part.parameters():
        if not isinstance(weight, DTensor):
            weight.data = weight.data.to(device, torch.float32, copy=True)
    for buffer in part.buffers():
        buffer.data = buffer.data.to(device)


def end_tokens(model, tokenizer):
    """The tokens that end a completion: those of the generation config, and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [*{*ends, tokenizer.eos_token_id} - {None}]


def ending(model, tokenizer, stop):
    """A function of tokens (B, T): which rows end in an end token, or complete the text `stop`.

    transformers' own, called with None for scores. UserError: no tokens can write `stop`.
    """
    criteria = [transformers.EosTokenCriteria(end_tokens(model, tokenizer) or [-1])]
    if stop:
        try:
            criteria.append(transformers.StopStringCriteria(tokenizer, [stop]))
        except ValueError:
            raise UserError(f"--stop {stop}: the model's tokenizer cannot write this") from None
    return transformers.StoppingCriteriaList(criteria)


def random_numbers(seeds, group_size, length, device):
    """Numbers in [0, 1), a row for each completion, by the seed of its prompt: (B, length)."""
    shape = group_size, length
    dtype = torch.float32 if device.type == "mps" else torch.float64  # which mps does not have
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    numbers = [torch.rand(shape, generator=each, dtype=dtype) for each in generators]
    return torch.cat(numbers).to(device)


def in_parts(function, logits, *more):
    """function(logits, *more), for 1,024 tokens at a time: a matter of memory."""
    return torch.cat([function(part, *more) for part in logits.split(1024)])


class SpareRoomLayer(DynamicLayer):
    """Keys and values in memory that has room for up to 16 tokens more.

    transformers' own layer copies all of them for each new token; this one, for every 16th.
    """

    def __init__(self, layer):
        super().__init__()
        vars(self).update(vars(layer))

    def update(self, keys, values, *args, **kwargs):
        self.keys = append(self.keys, keys)
        self.values = append(self.values, values)
        return self.keys, self.values


def append(old, new):
    """Keys or values, (B, heads, T, D), and those of a new token -> (B, heads, T + 1, D)."""
    length = old.shape[2]
    room = old if old._base is None else old._base  # a part of which `old` is
    if room.shape[2] == length:
        room = F.pad(room, (0, 0, 0, 16))
    room[:, :, length : length + 1] = new
    return room[:, :, : length + 1]


def with_spare_room(cache):
    """A key-value cache that copies less as it grows. Sliding windows stay as they are."""
    if type(cache) is not transformers.DynamicCache:
        raise UserError("--model: this kind cannot be sampled: it has no ordinary cache")
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = SpareRoomLayer(layer)
    return cache


def split_into_groups(tensors, first, group_size, tokenizer, cut_off, stop):
    """ids, attention_mask, logp, entropy, (B, W + max_new_tokens) -> P lists of G Completions.

    first: the first column after the prompts. cut_off: the rows that have not ended. What the
    last token holds beyond the text `stop` does not count.
    """
    ids, attention_mask, logp, entropy = (tensor.cpu() for tensor in tensors)
    sampled = torch.arange(ids.shape[1]) >= first
    cut_off = cut_off.tolist()
    completions = []
    for row, mask in enumerate(attention_mask.bool()):
        text = tokenizer.decode(ids[row, mask & sampled], skip_special_tokens=True)
        if stop:
            text = "".join(text.partition(stop)[:2])
        parts = ids[row, mask], sampled[mask], logp[row, mask], entropy[row, mask]
        completions.append(Completion(*parts, text, row not in cut_off))
    return [completions[i : i + group_size] for i in range(0, len(completions), group_size)]


# --------------------------------------------------------------------------------- 10 Processes
def start_processes():
    """Meet the other processes, if torchrun has started any; only the first one prints.

    Each process samples completions to its share of the questions, and takes the gradient of
    its share of the completions. Everything else is computed identically in every process.
    """
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        wait = datetime.timedelta(hours=2)  # others may still sample
        dist.init_process_group(backends(), timeout=wait)
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the end)


def backends():
    """NCCL for tensors on GPUs and gloo for others; by default, there would be only one."""
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if nccl else "gloo"


def ranks():
    """(number of this process, number of all): (0, 1), unless torchrun has started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(tensor):
    """The sum over processes of their tensors, in every process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def by_first_process(function, *args):
    """function(*args), computed by the first process for all."""
    result = [function(*args) if ranks()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def fsdp_options(model, cfg, device):
    """How FSDP2 shares out the weights: over the processes of a machine, or over all.

    With "machine", other machines have copies, and after a forward pass the whole weights stay
    until the next backward pass is done.
    """
    if not dist.is_initialized():
        dist.init_process_group(backends(), store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    n = ranks()[1]
    local = n if cfg.shard == "all" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    mesh_shape = n // local, local
    compute = torch.bfloat16 if model.in_bfloat16 else None
    model.stays_whole = cfg.shard == "machine"
    options = {
        "mesh": dist.init_device_mesh(
            device.type, mesh_shape, mesh_dim_names=("copy", "shard")
        ),
        "mp_policy": fsdp.MixedPrecisionPolicy(compute, reduce_dtype=torch.float32),
        "reshard_after_forward": not model.stays_whole,
    }
    if cfg.offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(torch.cuda.is_available())  # pinned
    return options


@contextlib.contextmanager
def whole_weights(model):
    """A model to sample with: the whole weights, fetched and cast once, and no hooks."""
    parts = [part for part in model.modules() if isinstance(part, fsdp.FSDPModule)]
    for part in parts:
        part.unshard()
    (sampler,) = getattr(model, "sampler", [model])
    weights = dict(model.named_parameters(remove_duplicate=False))
    sampler.load_state_dict(weights, strict=False, assign=True)  # the same tensors, not copies
    yield sampler
    for part in parts:
        part.reshard()


def sample_groups(model, tokenizer, problems, group_size, cfg, generator=None):
    """sample() for any number of Problems -> a group for each, in their order.

    sample_batch_size completions at a time. Each process samples its share; then all have all.
    generator: where the questions' seeds come from; by default a new one, of cfg.seed.
    """
    rank, n = ranks()
    generator = generator or torch.Generator().manual_seed(cfg.seed)
    seeds = torch.randint(2**62, (len(problems),), generator=generator).tolist()[rank::n]
    prompts = [problem.ids for problem in problems[rank::n]]
    most = max(1, cfg.sample_batch_size // group_size)
    size = math.ceil(len(prompts) / max(1, math.ceil(len(prompts) / most))) or 1  # about equal
    groups = []
    with whole_weights(model) as sampler:
        for i in range(0, len(prompts), size):
            how = group_size, cfg.max_new_tokens, cfg.temperature, seeds[i : i + size], cfg.stop
            groups += sample(sampler, tokenizer, prompts[i : i + size], *how)

    shares = [groups] * n
    if n > 1:
        dist.all_gather_object(shares, groups)
    return [group for turn in itertools.zip_longest(*shares) for group in turn if group]


def micro_batches(model, batch, keep, cfg):
    """This process's share of a Batch, micro_batch_size at a time, the longest first.

    Yields (rows, Batch, keep) of each part, which ends with its last kept token. All processes
    yield equally many parts; one that has no rows left yields one of which no token is kept.
    """
    rank, n = ranks()
    length = keep.cumsum(1).argmax(1).clamp(min=1) + 1  # (B,) up to the last kept token
    order = length.argsort(descending=True)
    size = min(cfg.micro_batch_size, math.ceil(len(order) / n))
    for start in range(rank * size, len(order) + rank * size, size * n):
        if isinstance(model, fsdp.FSDPModule):  # what is needed only once, comes at the end
            last = start + size * n >= len(order) + rank * size
            model.set_reshard_after_backward(last or not model.stays_whole)
            model.set_requires_all_reduce(last)
        rows = order[start : start + size]
        kept = keep
        if len(rows) == 0:
            rows = order[-1:]
            kept = torch.zeros_like(keep)
        width = int(length[rows].max())
        part = Batch(*(tensor[rows, :width] for tensor in vars(batch).values()))
        yield rows, part, kept[rows, :width]


def clip_gradient(model, most):
    """Scale the gradient down to a norm of at most `most`. Returns its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most or math.inf)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


# --------------------------------------------------------------------------------------- 11 Log
def rollout_metrics(completions, mixed):
    """Metrics of all completions of a rollout, whether trained on or not."""
    n = len(completions)
    tokens = sum(int(completion.response_mask.sum()) for completion in completions)
    return {
        "reward": sum(completion.reward for completion in completions) / n,
        "length": tokens / n,
        "groups_kept": len(mixed),
        "truncated": sum(not completion.finished for completion in completions) / n,
        "tokens": tokens,
    }


def minibatch_metrics(parts, batch, keep, normalizer, cfg):
    """parts: (objective, log r_t, A_t) at the kept tokens of this process's micro-batches."""
    objective, log_ratio, advantage = map(torch.cat, zip(*parts, strict=True))
    ratio = log_ratio.exp()
    low = (ratio < 1 - cfg.clip_low) & (advantage < 0)
    high = (ratio > 1 + cfg.clip_high) & (advantage > 0)
    sums = torch.stack([objective, low, high, log_ratio.abs()]).sum(1)
    objective, low, high, change = all_reduce(sums).tolist()
    kept = max(int(keep.sum()), 1)  # "bottom" at rho = 1 keeps none
    H = batch.entropy[batch.response_mask]  # (N,)
    return {
        "loss": -objective / normalizer,
        "entropy": H.mean().item(),
        "kept": int(keep.sum()) / len(H),
        "threshold": lowest_of_forks(batch, cfg.rho),  # whatever --tokens is
        "clipped_low": low / kept,
        "clipped_high": high / kept,
        "sampler_mismatch": math.exp(min(change / kept, 99)),  # geometric mean of max(r, 1 / r)
    }


def lowest_of_forks(batch, rho):
    """tau_rho: the lowest entropy among the top rho of the response tokens of a Batch."""
    forks = fork_mask(batch.entropy, batch.response_mask, rho)
    return batch.entropy[forks].min().item()


def mean_metrics(history, planned):
    """Means over the optimizer steps that were taken; sampler_mismatch is that of the first."""
    means = {"loss": None}
    if history:
        n = len(history)
        means = {key: sum(metrics[key] for metrics in history) / n for key in history[0]}
        means["sampler_mismatch"] = history[0]["sampler_mismatch"]
    return means | {"skipped": planned - len(history)}


def step_line(m, steps):
    """The metrics of a step in one line of 80 columns."""
    line = f"step {m['step']:>{len(str(steps))}}/{steps} "
    accuracy = f"acc {m['accuracy']:.3f} " if "accuracy" in m else " " * 10
    if m["step"] == 0:
        error = f"+- {m['stderr']:.3f}  pass@k {m['pass_at_k']:.3f}" if "stderr" in m else ""
        return f"{line}before training: {accuracy}{error}".rstrip()

    learned = "no group is partly right"
    if m["skipped"]:
        learned = f"{m['skipped']} updates left out, not finite"
    elif m["truncated"] == 1:
        learned = "all cut off: --max-new-tokens? --lr?"
    elif m["loss"] is not None:
        clipped = m["clipped_low"] + m["clipped_high"]
        learned = f"H {m['entropy']:.3f} tau {m['threshold']:.3f} clip {clipped:4.1%}"
    speed = f"len {m['length']:.0f} {m['tokens_per_second']:6.0f}/s"
    return f"{line}reward {m['reward']:4.2f} {accuracy}{learned} {speed}"


def sample_record(tokenizer, completion, step, threshold):
    """A line of samples.jsonl: a completion, and its first 300 tokens one by one."""
    places = completion.response_mask.nonzero()[:300, 0]
    ids = completion.ids[places]
    # A character can take several tokens. Until it is whole, the text ends in \ufffd.
    texts = [tokenizer.decode(ids[:n]).rstrip("\ufffd") for n in range(len(ids) + 1)]
    return {
        "step": step,
        "question": completion.problem.question,
        "target": completion.problem.target,
        "reward": completion.reward,
        "finished": completion.finished,
        "length": int(completion.response_mask.sum()),
        "threshold": threshold,
        "tokens": [longer[len(text) :] for text, longer in itertools.pairwise(texts)],
        "entropy": completion.entropy[places].tolist(),
        "logp": completion.logp[places].tolist(),
    }


def mark_forks(record):
    """A line of samples.jsonl for the screen: the forks are [in brackets]."""
    text = record["question"].strip()[-200:] + "\n"
    for token, entropy in zip(record["tokens"], record["entropy"], strict=True):
        text += f"[{token}]" if entropy >= record["threshold"] else token
    rest = " ..." if record["length"] > len(record["tokens"]) else ""
    # Without what moves a cursor.
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", "", text)
    return f"{text}{rest}   (reward {record['reward']:g})"


# --------------------------------------------------------------------------- 12 Save and resume

WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # from all processes
REPORT = "for a page with pictures: python tiny_data/report.py"
STOP = []  # numbers of the signals that have asked for an end


def ask_to_stop(number, frame):
    """Ctrl-C and the like end the run after this step; a second one ends it at once."""
    if STOP and ranks()[1] == 1:  # torchrun may send again what the terminal has sent
        os._exit(128 + number)
    STOP.append(number)
    say("\nstopping after this step (once more: quit at once, unsaved)", sys.stderr)


class Run:
    """The folder of a run: log, samples and checkpoints, and the state that --resume needs.

    What is saved is always the state after a whole step.
    """

    def __init__(self, cfg):
        """Load the model, or with --resume the last whole checkpoint. Writes nothing."""
        self.cfg = cfg
        self.out = Path(cfg.out or f"out/{Path(cfg.model).name}-{cfg.tokens}-seed{cfg.seed}")
        self.checkpoints = sorted(self.out.glob("model*/trainer.pt"))  # model, model.before
        if not (cfg.resume and self.checkpoints):
            check_folder(self.out, "model*", "metrics.jsonl")

        step_0 = {"step": 0, "tokens": 0, "seconds": 0.0}
        self.state = {"history": [step_0], "samples": [], "queue": []}
        self.generator = torch.Generator().manual_seed(cfg.seed)
        for path in self.checkpoints:
            try:
                self.opened = open_model(cfg, path.parent)
                self.state = torch.load(path, weights_only=True, mmap=ranks()[1] > 1)
                self.generator.set_state(self.state.pop("generator"))
                break
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                damage = f"{path.parent} cannot be read: {error}"
                say(damage)  # and try the one before
        else:
            if self.checkpoints:
                raise UserError(f"--resume: {damage}")
            self.opened = open_model(cfg, cfg.model)

        self.model, self.tokenizer = self.opened
        self.opened += load_questions(cfg, *self.opened)
        now = settings(cfg, self.opened[2])
        before = self.state.setdefault("settings", now)
        for name, value in now.items():
            if before.get(name) != value:
                changed = f"{name} {value} (it was {before.get(name)})"
                raise UserError(f"--resume: other settings in {self.out}: {changed}")
        self.history = self.state["history"]
        self.queue = self.state["queue"]
        self.saved = self.history[-1]["step"]

    def steps(self, optimizer):
        """Begin, yield the number of the last step and then those of the next, and end."""
        self.optimizer = optimizer
        if self.state.get("optimizer"):
            moments = self.state.pop("optimizer")
            dcp.set_optimizer_state_dict(self.model, optimizer, moments, options=WHOLE)
            del moments  # which are mapped from the file
        if ranks()[0] == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(f"{self.out}/in-use.lock", timeout=0, is_singleton=True)
            self.locked = lock.acquire()  # until this process ends
            if sorted(self.out.glob("model*/trainer.pt")) != self.checkpoints:
                raise UserError(f"--out {self.out}: another process has just trained there")
            shutil.rmtree(self.write({}, {}))  # what cannot be saved is found now
        write_lines(f"{self.out}/config.json", [vars(self.cfg)])
        write_lines(f"{self.out}/metrics.jsonl", self.history[:-1])
        for each in (self.model, *self.model.sampler):
            each.register_forward_pre_hook(self.tick)

        for step in range(self.saved, max(self.saved, self.cfg.steps) + 1):
            self.began = time.perf_counter()
            self.is_whole = step == self.saved
            with tqdm(
                desc=f"step {step}/{self.cfg.steps}",
                unit=" forward passes",
                leave=False,
                disable=ranks()[0] > 0 or None,  # None: unless there is no terminal
            ) as self.bar:
                yield step

        scores = [metrics["accuracy"] for metrics in self.history if "accuracy" in metrics]
        if scores:
            say(f"accuracy {scores[0]:.3f} -> {scores[-1]:.3f}")
        say(f"the model is in {self.out / 'model'}\n{REPORT} {self.out}")

    def tick(self, *args):
        """Before each forward pass; an evaluation need not come to its end."""
        self.bar.update()
        if STOP and self.is_whole and ranks()[1] == 1:
            self.stop()

    def record(self, step, metrics, groups):
        """End a step: take down what it did, and save if it is time to."""
        last = self.history[-1]
        took = time.perf_counter() - self.began
        metrics["tokens_per_second"] = metrics["tokens"] / took
        metrics["tokens"] += last["tokens"]
        metrics["seconds"] = last["seconds"] + took
        self.history.append({"step": step} | metrics)
        off = metrics.get("sampler_mismatch", 1.0)
        if off > (1.5 if self.model.in_bfloat16 else 1.001):
            raise UserError(
                f"--model: with a cache and padding, its probabilities are {off:.3f} times, "
                "up or down, those of a plain forward pass; this kind cannot be trained"
            )

        at_end = step == self.cfg.steps
        is_due = step == 1 or at_end or step % (self.cfg.eval_every or 10) == 0
        if is_due and "threshold" in metrics:  # else no update was finite
            samples = self.state["samples"]
            for group in groups[:4]:  # of each, a right and a wrong completion
                for correct in (True, False):
                    one = next(c for c in group if c.correct == correct)
                    threshold = metrics["threshold"]
                    samples.append(sample_record(self.tokenizer, one, step, threshold))
            del samples[8:-88]  # the first ones stay, and the last ones
        if at_end or self.cfg.save_every and step % self.cfg.save_every == 0:
            self.save()
        self.is_whole = True

    def log(self):
        """Write down and print the last step, with its evaluation; stop if asked to."""
        metrics = self.history[-1]
        write_lines(f"{self.out}/metrics.jsonl", [metrics], "a")
        write_lines(f"{self.out}/samples.jsonl", self.state["samples"])
        say(step_line(metrics, self.cfg.steps))
        if "accuracy" in metrics and "threshold" in metrics:
            say("    " + mark_forks(self.state["samples"][-2]).replace("\n", "\n    "))
        if all_reduce(torch.tensor(len(STOP), device=self.model.device)).item():
            self.stop()

    def stop(self):
        if self.history[-1]["step"] > self.saved:
            self.save()
        say(f"stopped after step {self.saved}; to go on, add --resume to the same command")
        raise SystemExit(128 + max(STOP, default=signal.SIGTERM))

    def save(self):
        """Write the checkpoint out/model: a transformers folder, and trainer.pt for --resume.

        It is written aside, so that whenever this is cut short, a whole one is left: there or,
        the one before, in out/model.before.
        """
        trained = [self.optimizer] if self.optimizer.state else []  # not before it has a state
        weights, moments = dcp.get_state_dict(self.model, trained, options=WHOLE)
        for tied in self.model.all_tied_weights_keys:
            weights.pop(tied, None)  # the same tensor as another one
        self.saved = self.history[-1]["step"]
        more = {"generator": self.generator.get_state(), "optimizer": moments}
        by_first_process(self.replace, weights, self.state | more)  # the others wait for it

    def replace(self, weights, state):
        """Write a checkpoint; the one that was there before it becomes model.before."""
        part = self.write(weights, state)
        now = self.out / "model"
        if now.exists():
            shutil.rmtree(f"{now}.before", ignore_errors=True)
            now.rename(f"{now}.before")
        part.rename(now)

    def write(self, weights, state):
        """Write a checkpoint aside. Returns its folder."""
        part = self.out / "unfinished"
        try:
            self.model.save_pretrained(part, state_dict=weights)
            self.tokenizer.save_pretrained(part)
            torch.save(state, part / "trainer.pt")
        except Exception as error:
            raise UserError(
                f"cannot save to {self.out} ({error}); what was saved there before is intact"
            ) from None
        return part


def check_folder(out, others, log):
    """UserError if a folder has `others`, or a config.json but not the log written with it."""
    if any(out.glob(others)) or (out / "config.json").exists() and not (out / log).exists():
        remedy = "choose another folder, or continue a run with --resume"
        raise UserError(f"--out {out}: holds a run or a model already; {remedy}")


def settings(cfg, problems):
    """What must be the same on --resume, since what is learned depends on it."""
    names = list(vars(cfg))
    same = names[names.index("max_new_tokens") : names.index("out")]
    first = {"--model": Path(cfg.model).name}
    first["--data or --prompt"] = zlib.crc32(repr(problems).encode())
    return first | {f"--{name.replace('_', '-')}": getattr(cfg, name) for name in same}


def say(text, file=None):
    """Print; if nobody listens any more, as when | head has enough, go on without."""
    file = file or sys.stdout
    try:
        tqdm.write(text, file)
        file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def write_lines(path, records, mode="w"):
    """Write records as JSON, one a line; only the first process does."""
    if ranks()[0] == 0:
        with open(path, mode) as file:  # JSON is ASCII
            file.writelines(json.dumps(record) + "\n" for record in records)


# ----------------------------------------------------------------------------- 13 Compare, show
def compare(cfg):
    """Train on each kind of tokens with each seed, or continue the runs below --out."""
    out = cfg.out or f"out/{Path(cfg.model).name}-compare"
    kinds = [(tokens, cfg.rho) for tokens in ("top", "all", "random", "bottom")]
    kinds += [("top", rho) for rho in cfg.rhos]
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for tokens, rho in kinds:
            run = dataclasses.replace(cfg, tokens=tokens, rho=rho, seed=seed, resume=True)
            run.out = f"{out}/{tokens}-{rho:g}-seed{seed}"
            train(run)
            gc.collect()  # lets go of the model and its hook, which refer to each other
    say(f"for the table and a page with pictures: python tiny_data/report.py {out}")


def show(cfg):
    """Sample completions and show their forks, without training; --base: its entropies, too."""
    out = Path(cfg.out or f"out/{'-'.join(Path(cfg.model).parts[-2:])}-show")
    check_folder(out, "m*", "samples.jsonl")  # model, metrics.jsonl
    if cfg.dtype == "auto":
        cfg.dtype = "float32"  # in bfloat16, rounding would hide small gradients
    model, tokenizer = open_model(cfg, cfg.model)
    problems, _ = load_questions(cfg, model, tokenizer)
    problems = problems[: cfg.prompts_per_step]
    groups = sample_groups(model, tokenizer, problems, cfg.group_size, cfg)
    grade(groups, problems, cfg)
    completions = [completion for group in groups for completion in group]
    batch = collate(completions, cfg.device)
    threshold = lowest_of_forks(batch, cfg.rho)
    records = [sample_record(tokenizer, each, 0, threshold) for each in completions]
    if cfg.base:
        base, _ = load_policy(cfg.base, cfg)
        before = policy_entropy(base, batch, cfg)
        for record, row, mask in zip(records, before, batch.response_mask, strict=True):
            record["base_entropy"] = row[mask][:300].tolist()

    out.mkdir(parents=True, exist_ok=True)
    write_lines(f"{out}/config.json", [vars(cfg)])
    write_lines(f"{out}/samples.jsonl", records)
    for record in records[:: math.ceil(len(records) / 4)]:
        say(mark_forks(record) + "\n")
    write_lines(f"{out}/gradient.json", [measure_gradient(model, groups, cfg)])
    say("the report tells, too, how much of the policy gradient these forks carry")
    say(f"{REPORT} {out} --min-count {cfg.min_count}")


def measure_gradient(model, groups, cfg):
    """Where the policy gradient comes from: numbers for each token, for gradient.json.

    Of the groups that are partly right, since the others have none. The report adds them up.
    """
    mixed = [group for group in groups if 0 < sum(each.correct for each in group) < len(group)]
    found = {"groups": len(groups), "mixed": len(mixed), "rho": cfg.rho}
    if len(mixed) < 4:
        return found  # too few to tell

    batch = collate([completion for group in mixed for completion in group], cfg.device)
    mask = batch.response_mask
    number = torch.arange(len(mask), device=mask.device)[:, None] // cfg.group_size  # (B, 1)
    numbers = {"group": number.expand_as(mask), "entropy": batch.entropy}
    generator = torch.Generator().manual_seed(cfg.seed)
    for tokens in ("all", "top", "random"):
        keep = fork_mask(batch.entropy, mask, cfg.rho, tokens, generator)
        gains = gradient_gains(model, batch, keep, number % 2 == 0, cfg)
        numbers |= {tokens: keep, f"gain from {tokens}": gains}
    return found | {name: each[mask].tolist() for name, each in numbers.items()}


def gradient_gains(model, batch, keep, half, cfg):
    """What each token gains from a step along the policy gradient of keep's tokens: (B, T).

    The gradient is that of one half of the groups, and what gains are the tokens of the other:
    A_t times the slope of log pi. These gains add up to the inner product of two gradients that
    have no noise in common.
    """
    gains = torch.zeros_like(batch.entropy)
    weights = torch.optim.SGD(model.parameters(), lr=1.0)
    for here in (half, ~half):
        for _rows, micro, kept in micro_batches(model, batch, keep & here, cfg):
            objective, _log_ratio, _advantage = kept_objective(model, micro, kept, cfg)
            objective.sum().backward()
        length = clip_gradient(model, 0) or 1.0
        step = 1e-3 * keep.numel() / length**2  # changes log pi by 0.001 or so
        for side, move in ((1, -step), (-1, 2 * step), (0, -step)):  # there, back, home
            weights.param_groups[0]["lr"] = move
            weights.step()
            elsewhere = batch.response_mask & ~here & (side != 0)
            with torch.no_grad(), whole_weights(model):
                for rows, micro, there in micro_batches(model, batch, elsewhere, cfg):
                    _objective, log_ratio, advantage = kept_objective(model, micro, there, cfg)
                    row, column = there.nonzero(as_tuple=True)
                    gains[rows[row], column] += side * advantage * log_ratio / (2 * step)
        model.zero_grad()
    return all_reduce(gains)


# -------------------------------------------------------------------------------------- 14 main

MAY_BE_0 = (
    "seed save_every eval_every overlong_buffer lr weight_decay clip_low clip_high dual_clip "
    "grad_clip"
)


def parse(argv):
    """The command line -> Config, whose comments are the help. For bad flags, exit code 2."""
    story, *_, commands = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=f"{story}\n\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    helps = {}
    for name, comment in re.findall(r"(?m)^    (\w*).*# (.+)", inspect.getsource(Config)):
        if not name:  # a line that is a comment is the title of the next flags
            group = parser.add_argument_group(comment)
            continue
        default, kind = getattr(Config, name), Config.__annotations__[name]
        how = {"type": str if default is None else type(default)}
        if default is False:
            how = {"action": "store_true"}
        elif default == ():
            how = {"type": float, "nargs": "*"}
        elif get_origin(kind) is Literal:
            how["choices"] = get_args(kind)
        flag = f"--{name.replace('_', '-')}"
        helps[flag] = comment
        if default:
            comment += f" (default: {default})"
        group.add_argument(flag, help=comment, **how)
    cfg, unknown = parser.parse_known_args(argv, Config())
    if unknown:
        words = unknown[0].strip("-").replace("-", " ")  # --learning-rate means --lr
        meant = [flag for flag, text in helps.items() if words in text]
        meant += difflib.get_close_matches(unknown[0], helps)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return cfg


def check_settings(cfg):
    """Raise UserError for a senseless setting."""
    for name, value in vars(cfg).items():
        lowest = 0 if name in MAY_BE_0.split() else 1e-15
        if type(value) in (int, float) and not lowest <= value < 1e15:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: must be a number above 0 (or 0, where "
                "that means none) and below 1e15"
            )
    tested = cfg.eval_every and cfg.eval_data
    mistakes = {
        "--rho: must be above 0, and at most 1": not 0 < cfg.rho <= 1,
        "--rhos: must be above 0, and at most 1": not all(0 < rho <= 1 for rho in cfg.rhos),
        "--rhos: needs --compare": cfg.rhos and not cfg.compare,
        "--base: needs --show": cfg.base and not cfg.show,
        "--compare: needs --eval-data and --eval-every": cfg.compare and not tested,
        "--group-size: must be above 1": cfg.group_size == 1,
        "--dual-clip: must be above 1, or 0": 0 < cfg.dual_clip <= 1,
        "--overlong-buffer: at most --max-new-tokens": cfg.overlong_buffer > cfg.max_new_tokens,
        "--prompt: must be plain, boxed, answer, chat, @FILE, or a text with {question}": (
            "{question}" not in PROMPTS.get(cfg.prompt, cfg.prompt)
        ),
    }
    for mistake, made in mistakes.items():
        if made:
            raise UserError(mistake)


def find_files(cfg):
    """Read the prompt, if it is in a file, and find the questions to test on."""
    cfg.stop = cfg.stop.replace(r"\n", "\n")  # as typed in a shell
    if cfg.prompt.startswith("@"):
        try:
            cfg.prompt = Path(cfg.prompt[1:]).read_text("utf-8-sig")
        except UnicodeError as error:
            raise UserError(f"--prompt {cfg.prompt}: {error}") from None
    else:
        cfg.prompt = cfg.prompt.replace(r"\n", "\n")
    beside = Path(cfg.data).parent / "test.jsonl"
    if not cfg.eval_data and beside.exists() and beside != Path(cfg.data):
        cfg.eval_data = str(beside)


def open_model(cfg, path):
    """(model, tokenizer) of path, as cfg says; cfg.device is chosen, if it was not given."""
    if not cfg.device:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            if "too old" in str(error):
                raise UserError(f"{error} (or train without: --device cpu)") from None
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=cfg.device).item()
    except (RuntimeError, AssertionError):
        message = f"--device {cfg.device}: not available here; try --device cpu"
        raise UserError(message) from None
    if torch.device(cfg.device).index:  # cuda:1
        torch.accelerator.set_device_index(torch.device(cfg.device).index)
    model, tokenizer = load_policy(path, cfg)
    where = f"{ranks()[1]} x {cfg.device}"
    say(f"{path}: {model.num_parameters():,} parameters on {where}")
    return model, tokenizer


def load_questions(cfg, model, tokenizer):
    """(problems to train on, problems to test on), as cfg says."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 10**9)
    room = context - cfg.max_new_tokens
    if room < 1:
        raise UserError(f"--max-new-tokens: must be below {context}, the length of the context")
    problems = by_first_process(load_problems, cfg.data, tokenizer, cfg.prompt, room)
    tests = []
    if cfg.eval_every and cfg.eval_data:
        tests = by_first_process(load_problems, cfg.eval_data, tokenizer, cfg.prompt, room)
    questions = {problem.question for problem in problems}
    several = len(problems) - len(questions)
    known = sum(problem.question in questions for problem in tests)
    say(f"{len(problems)} questions to train on, {len(tests)} to test on")
    if several:
        say(f"beware: {several} questions are there once more, with another target")
    if known:
        say(f"beware: {known} of the questions to test on are among those to train on")
    ending(model, tokenizer, cfg.stop)  # or UserError
    if not end_tokens(model, tokenizer):
        say("beware: this model has no end token; only --stop ends a completion")
    return problems, tests


def main(argv=None):
    """The command line; from Python, with a list of strings. Bad input: SystemExit(2)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (open until the end)
    sys.stdout.reconfigure(errors="replace")  # a terminal may not have all characters
    try:
        cfg = parse(argv)
        find_files(cfg)
        check_settings(cfg)
        start_processes()
        if cfg.show:
            show(cfg)
        else:
            # SIGHUP, SIGINT and SIGTERM; Windows has no SIGHUP.
            for number in {1, 2, 15} & signal.valid_signals():
                if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    signal.signal(number, ask_to_stop)
            (compare if cfg.compare else train)(cfg)
        if ranks()[1] > 1:
            os._exit(0)  # threads that gloo leaves behind could abort Python's orderly end
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (UserError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|allocate|MemoryError", repr(error)):
            raise
        remedy = "--sample-batch-size, a lower --micro-batch-size or --gradient-checkpointing"
        message = f"{error!r}; less is needed with a lower {remedy}"
    else:
        return
    say(f"forking.py: {message}", sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()

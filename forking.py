#!/usr/bin/env python3
r"""Reinforcement learning on forking tokens, the 80/20 rule of arXiv 2506.01939, in one file.

In a chain of thought only a few tokens decide where the reasoning goes: those at which the policy is of several
minds, so that the entropy of its next-token distribution is high. The paper trains on just these 20 % of the tokens
and gets as much out of it as, or more than, from training on all. A training step has six moves:

    sample     a group of answers to each question, with the entropy of every draw              section 4
    check      the last \boxed{} or "Answer:" against the known answer: reward 1 or 0           section 2
    entropy    of the current policy, at every token of every answer                            section 5
    fork       keep the 20 % of the tokens where it is highest                                  section 6
    loss       PPO's clipped objective, advantages relative to the group, mean over kept ones   section 7
    update     a few optimizer steps on the answers, which are then thrown away                 section 8

    python forking.py                    # a tiny GPT-2 on two CPU cores: two minutes, and nothing to download
    python forking.py --compare          # top, all, random and bottom tokens, three seeds each
    python forking.py --model Qwen/Qwen3-0.6B-Base --data math.jsonl --prompt boxed --max-new-tokens 2048 --lr 1e-6

    pi_theta   logp        (K,)     log-probability of a token under the policy being trained
    pi_old     logp_old    (B, T)   the same under the policy that drew it
    r_t        ratio       (K,)     exp(logp - logp_old)
    A_t        advantage   (B, T)   how much better than its group an answer did
    H_t        entropy     (B, T)   of the distribution that the token at t is drawn from, in nats
    tau_rho    threshold   ()       the lowest entropy among the top rho of all answer tokens
               keep        (B, T)   1[H_t >= tau_rho], True at the forking tokens
    P questions, G answers to each, B = P * G rows of T tokens (question, answer, padding), N answer tokens in a
    mini-batch, K of them kept, V words in the vocabulary. Column t of a (B, T) tensor is about the token at t.

Differences from the paper: (1) The threshold is that of a mini-batch, theirs that of a micro-batch on one GPU; here
the split of the work never changes the result. (2) Logits with gradient are computed at the kept tokens only, a fifth
of them, which gives the same gradient. (3) Clipped shares count kept tokens, since no others have a ratio.
"""
import contextlib, dataclasses, itertools, json, logging, math, os, re, shutil, signal, sys, textwrap, time
from collections import namedtuple
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

class UserError(Exception):
    """A mistake in what we were given. main() prints it as one line and exits with code 2."""

quiet = lambda text: None                                       # in place of a progress bar

# ----------------------------------------------------------------------------------------------------- 1 Config

def flag(default, help):
    return dataclasses.field(default=default, metadata={"help": help})

@dataclasses.dataclass
class Config:
    """One field for each flag: --group-size sets group_size."""
    model: str = flag("tiny_data/gpt2", "folder or hub name of any causal language model of transformers")
    data: str = flag("tiny_data/train.jsonl", "questions to train on: JSON lines with question and answer")
    eval_data: str | None = flag(None, "questions to test on; if not given, test.jsonl beside --data")
    out: str | None = flag(None, "folder of this run; if not given, out/MODEL-TOKENS-seedSEED")
    seed: int = flag(0, "of questions, draws and mini-batches; the same seed repeats the run")
    device: str | None = flag(None, "cpu, cuda, cuda:1 ...; if not given, cuda where there is one, else cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "to compute in; auto: bfloat16 on cuda")
    # sample
    prompt: str = flag("plain", "plain, boxed, answer, or your own template with {question} in it")
    prompts_per_step: int = flag(32, "P, questions in a step")
    group_size: int = flag(8, "G, answers to each question")
    max_new_tokens: int = flag(64, "tokens after which an answer is cut off")
    temperature: float = flag(1.0, "of sampling, and so of log-probabilities and entropies")
    overlong_buffer: int = flag(0, "the last so many tokens before the cut cost reward; 0: they don't")
    resample_rounds: int = flag(2, "times to sample in a step, to replace groups all right or all wrong")
    # fork
    tokens: Literal["top", "all", "bottom", "random"] = flag("top", "what gets a gradient: "
        "the RHO of highest entropy, all, all but the top RHO, or RHO at random")
    rho: float = flag(0.2, "share of the answer tokens that count as forks")
    normalize: Literal["selected", "all"] = flag("selected", "the loss is a mean over these tokens (v1: all)")
    entropy_from: Literal["policy", "rollout"] = flag("policy", "entropies at the update, or as sampled (faster)")
    # update
    minibatches: int = flag(4, "optimizer steps in a pass over the sampled answers")
    epochs: int = flag(1, "passes over the sampled answers")
    micro_batch_size: int = flag(64, "answers in a forward pass; memory, not results, depends on it")
    lr: float = flag(5e-5, "learning rate of AdamW, constant")
    weight_decay: float = flag(0.1, "of AdamW")
    clip_low: float = flag(0.2, "lower the probability of a token by this share at most")
    clip_high: float = flag(0.28, "raise the probability of a token by this share at most")
    dual_clip: float = flag(10.0, "where A < 0, the objective is never below DUAL_CLIP * A; 0: no such limit")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    # run
    steps: int = flag(60, "training steps, each one rollout with its updates")
    eval_every: int = flag(5, "evaluate before training, every so many steps, and at the end; 0: never")
    eval_samples: int = flag(4, "k, answers to each question of an evaluation")
    save_every: int = flag(0, "save the model every so many steps, and at the end; 0: only at the end")
    # other than one run
    compare: bool = flag(False, "train on the top RHO, all, random RHO and bottom 1 - RHO of tokens, and tabulate")
    seeds: int = flag(3, "with --compare: seeds for each, from --seed on")
    rhos: list[float] = dataclasses.field(default_factory=list, metadata={"help": "with --compare: other RHOs"})
    show: bool = flag(False, "look at the forks of a model, without training")
    base: str | None = flag(None, "with --show: the model that --model was trained from, to see what changed")
    min_count: int = flag(5, "with --show: occurrences that a word needs to be listed")

# -------------------------------------------------------------------------------- 2 Problems, and their answers

PROMPTS = {
    "plain": "{question}\n",
    "boxed": "User:\n{question}\nPlease reason step by step, and put your final answer within \\boxed{}.\n\n"
             "Assistant:\n",
    "answer": "{question}\n\nReason step by step. The last line must be 'Answer: ' and then the answer alone.\n",
}

Problem = namedtuple("Problem", "question answer prompt")       # prompt: token ids of the question in its template

def load_problems(path, tokenizer, template, room):
    """Read JSON lines with "question" (or "problem") and "answer"; of GSM8K's answers, what follows "####".

    template: a text with {question} in it. room: tokens that a question may take. Raises UserError, naming the line."""
    problems, where = [], path
    try:
        for n, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
            if line.strip():
                where = f"{path}:{n}"
                record = json.loads(line)
                question, answer = record.get("question", record.get("problem")), record.get("answer")
                if type(answer) not in (str, int, float) or not (question.strip() and str(answer).strip()):
                    raise ValueError("no question, or no answer")
                prompt = tokenizer.encode(template.replace("{question}", question))
                if not 0 < len(prompt) <= room:
                    raise UserError(f"{where}: the question takes {len(prompt)} tokens, and the model's context has "
                                    f"room for {room} besides the answer; leave it out or lower --max-new-tokens")
                problems.append(Problem(question, str(answer).split("####")[-1].strip(), prompt))
        if not problems:
            raise ValueError("it is empty")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{where}: need a file with lines such as {{"question": "1+2=?", "answer": "3"}} '
                        f"({type(error).__name__}: {error})") from None
    return problems

def extract_answer(text):
    r"""The last \boxed{...} with balanced braces, else what follows the last "Answer:" or "####" on its line."""
    opened, box = [], None                                                      # one pass, however deep the braces
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):        # \{ and \} are no braces
        if match[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and (box is None or start > box[0]):
                box = start, match.start()
        elif match[0] == "{" or match[0].startswith(r"\boxed"):
            opened.append((match.end(), match[0] != "{"))
    if box:
        return text[slice(*box)].strip()
    for marker in r"(?i)answer[\s*]*:", "####":
        *before, rest = re.split(marker, text)
        if before:
            return rest.strip().split("\n")[0].strip(" \t\r*")
    return None

REWRITES = [(re.compile(pattern), new) for pattern, new in [                    # applied in this order
    ("\u2212", "-"), (r"\\[dt]frac(?![a-z])", r"\\frac"), (r"\\(left|right)(?![a-z])", ""), (r"\\%", "%"),
    (r"\\!|\\?\$|\^\s*(\{\s*\\circ\s*\}|\\circ(?![a-z]))", ""), (r"\{,\}", ","), (r"(\\[,;: ]|~|\s)+", " "),
    (r"(?<=[0-9})]) ?\\(text|mathrm|mbox) ?\{[^{}]*\}$", ""),                       # a unit at the end
    (r"\\(?:text|mathrm|mbox) ?\{([^{}]*)\}", r"\1"), (r" ?\.$", ""), (r"^[a-zA-Z] ?=", ""),
    (" ?, | ,", ";"), (r"(?<![0-9]) | (?![0-9])", ""),                              # 5 6 and 5, 600 are no numbers
    (r"\\frac([0-9])", r"\\frac{\1}"), (r"\\frac(\{[0-9]+\})([0-9])", r"\\frac\1{\2}"),
    (r"^([+-]?)\\frac\{(-?[0-9]+)\}\{([0-9]+)\}(?=%?$)", r"\1\2/\3"),
]]
NUMBER = re.compile(r"[+-]?([0-9]+/0*[1-9][0-9]*|[0-9]*\.[0-9]+|[0-9]+\.?|[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?)%?")

def meaning(answer):
    r"""An answer after REWRITES: the Fraction that it is (0.5 = 1/2 = \frac{1}{2} = 50\%), or else a text."""
    for pattern, new in REWRITES:
        answer = pattern.sub(new, answer).strip()
    if not NUMBER.fullmatch(answer):
        return answer.replace(",", ";")
    return Fraction(answer.rstrip("%").replace(",", "")) / (100 if answer.endswith("%") else 1)

def is_correct(text, answer):
    """True if what extract_answer finds in text means the same as answer. Never raises, in linear time."""
    given = extract_answer(text)
    return given is not None and max(len(given), len(answer)) <= 1000 and meaning(given) == meaning(answer) != ""

def overlong_penalty(length, max_new_tokens, buffer):
    """0 for an answer that leaves the last `buffer` tokens unused, down to -1 for one that uses them all (DAPO)."""
    return min((max_new_tokens - buffer - length) / buffer, 0.0) if buffer else 0.0

# ----------------------------------------------------------------------------------------------------- 3 Policy

def load_policy(path, device="cpu", dtype="auto"):
    """(model, tokenizer). Weights are float32, only computation may be bfloat16, in which a step of 1e-6 would round
    to nothing. Dropout is off, so that what is trained is what was sampled. Raises UserError."""
    if not Path(path).is_dir():
        print(f"{path} is not a folder here; asking the hub for it", flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer.vocab_size < 2:
            raise ValueError("it has no tokenizer")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    except Exception as error:
        raise UserError(f"model {path}: neither a folder with a causal language model and its tokenizer, nor to be "
                        f"had from the hub ({(str(error).strip() or repr(error)).splitlines()[0]})") from None
    if dtype == "bfloat16" or (dtype == "auto" and model.device.type == "cuda"):
        model.forward = torch.autocast(model.device.type, torch.bfloat16)(model.forward)
    return model, tokenizer

# ----------------------------------------------------------------------------------------------------- 4 Sample

@dataclasses.dataclass
class Answer:
    ids: torch.Tensor           # (T,) tokens of the question and the answer, the one that ends it included
    mask: torch.Tensor          # (T,) True at the answer's tokens
    logp: torch.Tensor          # (T,) log-probability of each of these, 0 elsewhere
    entropy: torch.Tensor       # (T,) of the distribution it was drawn from, in nats, 0 elsewhere
    text: str
    finished: bool              # False: cut off after max_new_tokens
    correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0

    def __len__(self):
        return int(self.mask.sum())

def draw(logits, temperature, uniform):
    """Draw a token in each row: logits (B, V), numbers in [0, 1) (B,) -> tokens, log-probabilities, entropies, (B,).

    temperature: a number, or a function that gets the rows' entropies at temperature 1 and returns one for each row.
    By the inverse of the cumulative distribution: the first word at which it exceeds the row's random number."""
    if callable(temperature):
        temperature = temperature(token_entropy(logits))[:, None]
    temperature = torch.as_tensor(temperature, device=logits.device).clamp(min=1e-6)        # 0: as good as greedy
    scaled = logits.float() / temperature
    logp = torch.log_softmax(scaled, -1)
    cumulative = logp.double().exp().cumsum(-1)
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    token = token.clamp(max=logp.shape[-1] - 1)                 # should rounding have led past the last word
    return token[:, 0], logp.gather(-1, token)[:, 0], token_entropy(scaled)

@torch.no_grad()
def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature=1.0, generator=None, say=quiet):
    """Answer each prompt group_size times: P lists of token ids -> P lists of G Answers. Temperature 0 is greedy.

    A prompt is read once, its keys and values are shared by its group. An answer leaves the batch when it ends. Each
    draw has a random number of its own, so that no answer depends on which others are still being written."""
    ends = [e for e in (model.generation_config.eos_token_id, tokenizer.eos_token_id) if e is not None] + [[]]
    ends = torch.tensor(ends[0], device=model.device)           # an id, or a list of them
    width, B = max(map(len, prompts)), len(prompts) * group_size
    ids = torch.tensor([[-1] * (width - len(p)) + p for p in prompts], device=model.device)     # (P, width)
    seen = (ids >= 0).long()                                    # padding on the left is neither seen nor counted
    out = model(ids.clamp(min=0), attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0), use_cache=True)
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(group_size, 0)     # (B, V)
    cache.batch_repeat_interleave(group_size)
    seen = seen.repeat_interleave(group_size, 0)

    uniform = torch.rand(B, max_new_tokens, generator=generator, dtype=torch.float64).to(model.device)
    tokens, length = torch.zeros(B, max_new_tokens, dtype=torch.long), torch.zeros(B, dtype=torch.long)
    logp, entropy = torch.zeros(2, B, max_new_tokens)
    rows = torch.arange(B)                                      # the answers still being written
    for t in range(max_new_tokens):
        say(f"sampling token {t + 1} of {len(rows)} answers")
        drawn = draw(logits, temperature, uniform[rows, t])
        tokens[rows, t], logp[rows, t], entropy[rows, t] = (x.cpu() for x in drawn)
        length[rows] = t + 1
        going = (~torch.isin(drawn[0], ends)).nonzero()[:, 0]
        if len(going) < len(rows):
            rows, seen = rows[going.cpu()], seen[going]
            cache.batch_select_indices(going)
        if len(rows) == 0 or t + 1 == max_new_tokens:
            break
        seen = F.pad(seen, (0, 1), value=1)
        logits = model(drawn[0][going, None], attention_mask=seen, position_ids=seen.sum(1, keepdim=True) - 1,
                       past_key_values=cache, use_cache=True).logits[:, -1]

    answers, unfinished = [], set(rows.tolist())
    for i, n in enumerate(length.tolist()):
        prompt = prompts[i // group_size]
        ids = torch.cat([torch.tensor(prompt), tokens[i, :n]])
        mask, *records = (F.pad(x, (len(prompt), 0)) for x in (torch.ones(n).bool(), logp[i, :n], entropy[i, :n]))
        text = tokenizer.decode(tokens[i, :n], skip_special_tokens=True)
        answers.append(Answer(ids, mask, *records, text, i not in unfinished))
    return [answers[i:i + group_size] for i in range(0, B, group_size)]

def attempt(model, tokenizer, problems, group_size, cfg, temperature, generator, say):
    """Sample group_size answers to each Problem and check them: groups of Answers with rewards and advantages."""
    groups = sample(model, tokenizer, [p.prompt for p in problems], group_size, cfg.max_new_tokens, temperature,
                    generator, say)
    for problem, group in zip(problems, groups):
        for a in group:
            a.correct = is_correct(a.text, problem.answer)
            a.reward = a.correct + overlong_penalty(len(a), cfg.max_new_tokens, cfg.overlong_buffer)
    advantages = group_advantages(torch.tensor([[a.reward for a in group] for group in groups]))
    for a, advantage in zip((a for group in groups for a in group), advantages.flatten().tolist()):
        a.advantage = advantage
    return groups

# ---------------------------------------------------------------------------------------------------- 5 Entropy

def token_entropy(logits, temperature=1.0):
    """H_t = -sum_v p_v ln p_v, p = softmax(z / T), in nats and float32: logits z (..., V) -> (...).  [Eq. 1]

    0 where one word is certain, ln V where all are equally likely. It tells how undecided the policy is before it
    draws, not how unlikely the word is that it then draws."""
    p = torch.softmax(logits.float() / temperature, -1)
    return torch.special.entr(p).sum(-1)                        # entr(p) = -p ln p, and entr(0) = 0

# ------------------------------------------------------------------------------------------------------- 6 Fork

def fork_mask(entropy, response_mask, rho, tokens="top", generator=None):
    """1[H_t >= tau_rho], the tokens that get a gradient: (B, T) in nats, (B, T) bool -> (B, T) bool.  [in Eq. 6]

    Of the N response tokens, "top" keeps the ceil(rho N) of highest entropy (of equals the first), "bottom" the
    others, "random" any ceil(rho N), "all" every one. Prompt and padding are never kept, whatever their entropy."""
    response_mask = response_mask.bool()                        # 0/1 integers would index rows 0 and 1
    pool = entropy[response_mask]                               # (N,)
    k = math.ceil(Fraction(str(rho)) * len(pool))               # 0.07 * 100 as floats would be rounded up to 8
    order = pool.argsort(descending=True, stable=True)
    if tokens == "random":
        order = torch.randperm(len(pool), generator=generator).to(pool.device)
    chosen = torch.zeros_like(pool, dtype=torch.bool)
    chosen[{"top": order[:k], "random": order[:k], "bottom": order[k:], "all": order}[tokens]] = True
    keep = torch.zeros_like(response_mask)
    keep[response_mask] = chosen                                # the way back from (N,) to (B, T)
    return keep

# ------------------------------------------------------------------------------------------------------- 7 Loss

def group_advantages(rewards):
    """A = (R - mean(R)) / std(R) over the G answers to a question: (P, G) -> (P, G).  [Eq. 3]

    std is the population's (TRL and verl divide by G - 1). A group whose rewards are all equal gets exactly 0."""
    flat = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    std = rewards.std(1, keepdim=True, correction=0)
    return torch.where(flat, 0.0, (rewards - rewards.mean(1, keepdim=True)) / torch.where(flat, 1.0, std))

def clipped_objective(logp, logp_old, advantage, clip_low, clip_high, dual_clip=None):
    """J = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logp - logp_old), per token, to be maximised.
    Tensors of any one shape.  [inside Eq. 6]

    A token that is already likelier (A > 0) or less likely (A < 0) than the clip allows gets no more gradient. Where
    A < 0, dual_clip c keeps J above c A, lest one token that became far likelier outweigh all others (verl's)."""
    ratio = torch.exp((logp - logp_old).clamp(-20, 20))
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is not None:
        objective = torch.where(advantage < 0, torch.maximum(objective, dual_clip * advantage), objective)
    return objective

# ----------------------------------------------------------------------------------------------------- 8 Update

# B answers as (B, T) tensors. response_mask is True at the answers' tokens, keep at those of them that get a gradient.
# Padding is on the right, where no token looks: no attention mask is needed.
Batch = namedtuple("Batch", "ids response_mask logp_old entropy advantage keep")

def stack(answers, device):
    """A list of B Answers -> Batch, with the entropies seen in sampling, and every answer token kept."""
    rows = [(a.ids, a.mask, a.logp, a.entropy, a.advantage * a.mask, a.mask) for a in answers]
    return Batch(*(torch.nn.utils.rnn.pad_sequence(column, batch_first=True).to(device) for column in zip(*rows)))

def micro_batches(batch, size):
    """Views of `size` rows each, without the columns that are padding in all of these."""
    for i in range(0, len(batch.ids), size):
        width = batch.response_mask[i:i + size].any(0).nonzero().max() + 1
        yield Batch(*(tensor[i:i + size, :width] for tensor in batch))

def token_logits(model, ids, where):
    """The logits that the tokens at `where` are drawn from: ids (B, T), bool (B, T) with K True -> (K, V).

    The model's own output layer is handed the hidden states of just these positions: no (B, T, V) ever exists."""
    source = where.roll(-1, 1)                  # t is drawn from the logits at t - 1; column 0 is always a question's
    hook = model.get_output_embeddings().register_forward_pre_hook(     # what it returns replaces the layer's input
        lambda layer, inputs: (inputs[0][source],))
    try:
        return model(ids, use_cache=False).logits
    finally:
        hook.remove()

@torch.no_grad()
def policy_entropy(model, batch, temperature, size):
    """The entropies of the policy as it is now, in nats: (B, T), 0 outside the answers."""
    batch = batch._replace(entropy=torch.zeros_like(batch.entropy))
    for micro in micro_batches(batch, size):
        logits = token_logits(model, micro.ids, micro.response_mask)
        micro.entropy[micro.response_mask] = token_entropy(logits, temperature)     # a view: this fills batch.entropy
    return batch.entropy

def update(model, optimizer, groups, cfg, generator=None, say=quiet):
    """Take cfg.epochs * cfg.minibatches optimizer steps on groups of Answers, and return the means of their metrics.

    Threshold and normaliser are those of a whole mini-batch, and micro-batches add up to its very gradient."""
    history, parts = [], [part for _ in range(cfg.epochs) for part in torch.randperm(
        len(groups), generator=generator).tensor_split(cfg.minibatches) if len(part)]
    for part in parts:
        say(f"updating, mini-batch {len(history) + 1} of {len(parts)}")
        batch = stack([a for i in part for a in groups[i]], model.device)
        if cfg.entropy_from == "policy":
            batch = batch._replace(entropy=policy_entropy(model, batch, cfg.temperature, cfg.micro_batch_size))
        keep = fork_mask(batch.entropy, batch.response_mask, cfg.rho, cfg.tokens, generator)
        batch = batch._replace(keep=keep)
        normaliser = (keep if cfg.normalize == "selected" else batch.response_mask).sum().clamp(min=1)

        objectives, changes, advantages = [], [], []
        for micro in micro_batches(batch, cfg.micro_batch_size):
            logits = token_logits(model, micro.ids, micro.keep).float() / cfg.temperature           # (K, V)
            logp = -F.cross_entropy(logits, micro.ids[micro.keep], reduction="none")                # (K,)
            logp_old, advantage = micro.logp_old[micro.keep], micro.advantage[micro.keep]
            J = clipped_objective(logp, logp_old, advantage, cfg.clip_low, cfg.clip_high, cfg.dual_clip or None)
            (-J.sum() / normaliser).backward()
            objectives.append(J.detach()), changes.append((logp - logp_old).detach()), advantages.append(advantage)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

        change, advantage, H = torch.cat(changes), torch.cat(advantages), batch.entropy[batch.response_mask]
        kept = max(len(change), 1)                              # "bottom" of rho = 1 keeps nothing
        history.append({
            "loss": -torch.cat(objectives).sum() / normaliser, "entropy": H.mean(), "kept": keep.sum() / len(H),
            "threshold": H[fork_mask(H, torch.ones_like(H), cfg.rho)].min(), "grad_norm": grad_norm,
            "clip_low": ((change.exp() < 1 - cfg.clip_low) & (advantage < 0)).sum() / kept,
            "clip_high": ((change.exp() > 1 + cfg.clip_high) & (advantage > 0)).sum() / kept,
            "ratio": (change.abs().sum() / kept).exp()})
    means = {key: sum(float(metrics[key]) for metrics in history) / len(history) for key in history[0]}
    return means | {"ratio": float(history[0]["ratio"])}        # while the policy was still the one that sampled

# --------------------------------------------------------------------------------------------------- 9 Evaluate

def pass_at_k(right, k):
    """Chance that at least one of k answers is right, from n >= k of them: (P, n) of 0 and 1 -> float, the mean over
    questions of 1 - C(n - c, k) / C(n, k), where c of its n answers are right (arXiv 2107.03374)."""
    n = right.shape[1]
    return sum(1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right.sum(1)) / len(right)

def evaluate(model, tokenizer, problems, cfg, say=quiet):
    """Answer every problem eval_samples times at temperature 1: accuracy (avg@k), its standard error, and pass@k. The
    draws have a generator of their own: evaluating does not change training, and is the same at every step."""
    generator, right = torch.Generator().manual_seed(cfg.seed), []
    size = max(1, cfg.prompts_per_step * cfg.group_size // cfg.eval_samples)    # as many at once as in training
    for i in range(0, len(problems), size):
        groups = attempt(model, tokenizer, problems[i:i + size], cfg.eval_samples, cfg, 1.0, generator,
                         lambda text: say(f"evaluating {len(problems)} questions, from {i + 1} on: {text}"))
        right += [[float(a.correct) for a in group] for group in groups]
    right = torch.tensor(right)                                 # (P, k)
    stderr = right.mean(1).std(correction=min(1, len(right) - 1)) / math.sqrt(len(right))
    return {"accuracy": right.mean().item(), "stderr": stderr.item(), "pass_at_k": pass_at_k(right, cfg.eval_samples)}

# ------------------------------------------------------------------------------------------------------ 10 Look

COLOURS = "#e0206b", "#2b8ae2", "#d78700", "#8a929a", "#2f9e44", "#8258f0"
STYLE = """:root{color-scheme:light dark;font:16px system-ui} body{max-width:1000px;margin:auto;padding:12px}
    pre{font-size:13px;line-height:1.5;white-space:pre-wrap;overflow:auto}
    [class^="1;"]{font-weight:bold;text-decoration:underline} [class$="161"]{color:#e0206b}
    [class$="172"]{color:#d78700} [class$="33"]{color:#2b8ae2} svg{max-width:600px;font-size:11px}
    text,polygon{fill:currentColor} polygon{opacity:.2} path{stroke:#8888}
    polyline{fill:none;stroke:currentColor;stroke-width:2;vector-effect:non-scaling-stroke}"""
MARKED = re.compile(r"\033\[([0-9;]+)m([^\033]*)\033\[0m")      # terminal codes, word

def mark_forks(tokenizer, answer, tau, longest=200):
    """A question and its answer with terminal colours: from 0.01 nats on blue, from 0.3 orange, from 1 red; forks
    (entropy >= tau) bold and underlined."""
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True).replace("\033", "")
    text = decode(answer.ids[~answer.mask]).strip()[-200:] + "\n"
    for i, H in zip(answer.ids[answer.mask][:longest].tolist(), answer.entropy[answer.mask].tolist()):
        colour = "38;5;161" if H >= 1 else "38;5;172" if H >= 0.3 else "38;5;33" if H >= 0.01 else "39"
        text += f"\033[{'1;4;' * (H >= tau)}{colour}m{decode([i])}\033[0m"
    return f"{text}{' ...' * (len(answer) > longest)}   (reward {answer.reward:g})"

def for_terminal(text):
    """The text as it is or, where colours are not wanted, with forks [in brackets]."""
    brackets = lambda match: f"[{match[2]}]" if match[1].startswith("1;") and match[2] else match[2]
    return text if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else MARKED.sub(brackets, text)

def step_line(m, steps):
    """The metrics of a step on one line of at most 120 columns."""
    accuracy = f"acc {m['accuracy']:.3f}  " if "accuracy" in m else " " * 11
    line = f"step {m['step']:>{len(str(steps))}}/{steps}  "
    if m["step"] == 0:
        return line + f"before training: {accuracy}± {m['stderr']:.3f}  pass@k {m['pass_at_k']:.3f}"
    learned = "every group all right or all wrong: no update  " if m["loss"] is None else (
        f"H {m['entropy']:.3f} tau {m['threshold']:.3f}  kept {m['kept']:.0%} clip {m['clip_low']:5.1%} "
        f"{m['clip_high']:5.1%}  ")
    speed = f"len {m['length']:.0f} {m['tokens_per_second']:6.0f} tok/s"
    return line + f"reward {m['reward']:5.2f}  {accuracy}{learned}{speed}"

def look(tokenizer, answers, min_count):
    """(80th percentile of the answers' entropies, texts: some answers, figures, a histogram, words)."""
    ids = torch.cat([a.ids[a.mask] for a in answers]).numpy()                   # (N,)
    H = torch.cat([a.entropy[a.mask] for a in answers]).numpy()
    tau, count = float(np.percentile(H, 80)), np.bincount(ids)
    mean = np.bincount(ids, H) / count.clip(1)                                  # (V,)
    often = sorted(np.flatnonzero(count >= min_count), key=lambda i: mean[i])
    words = lambda chosen: ", ".join(f"{tokenizer.decode([i])!r} {mean[i]:.3f} ({count[i]})" for i in chosen)
    edges = 0, 0.0001, 0.001, 0.01, 0.1, 1, math.inf
    shares = zip(edges, edges[1:], np.histogram(H, edges)[0] / len(H))
    return tau, [mark_forks(tokenizer, a, tau) for a in answers[::max(1, len(answers) // 4)]] + [
        f"{(H < 0.01).mean():.2%} of {len(H):,} tokens are below 0.01 nats of entropy (paper, Qwen3-8B: 50.64 %);\n"
        f"the 80th percentile is {tau:.3f} nats (paper: 0.672); "
        f"deciles: {' '.join(f'{d:.4f}' for d in np.percentile(H, range(10, 100, 10)))}",
        "\n".join(f"{low:6} to {high:6} nats {share:6.1%} {'#' * round(30 * share)}" for low, high, share in shares),
        f"forking words, by mean entropy (and count): {words(often[:-13:-1])}\nmost certain words: {words(often[:12])}"]

def entropy_change(before, after):
    """What training did to the entropies (N,) of the same tokens, under the base and under the model, in words."""
    forks, still = (fork_mask(H, torch.ones_like(H), 0.2) for H in (before, after))
    change = after - before
    tenths = " ".join(f"{change[part].mean():+z.3f}" for part in before.argsort().tensor_split(10))    # z: no -0.000
    return (f"{still[forks].float().mean():.1%} of the base's top 20 % of tokens are in this model's (paper: 86.67 %, "
            f"chance: 20 %)\nmean change of entropy, by tenths of the base's: {tenths}")

def interval(values):
    """Half the width of the 95 % confidence interval of a mean, by Student's t (with over 10 values, a bit wide)."""
    t = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)[min(len(values), 10) - 1]
    return t * float(np.std(values, ddof=min(1, len(values) - 1))) / math.sqrt(len(values))

def accuracy_chart(arms):
    """{name: [metrics of a run, one for each seed]} -> a figure (HTML), "" if nothing was evaluated."""
    if not any("accuracy" in m for runs in arms.values() for m in runs[0]):
        return ""
    points = lambda x, y: " ".join(f"{a},{b:.4f}" for a, b in zip(x, y))
    caption, svg = "accuracy by step, mean and range of seeds:", ""
    for colour, (name, runs) in zip(itertools.cycle(COLOURS), arms.items()):
        steps = [m["step"] for m in runs[0] if "accuracy" in m]
        scores = np.array([[m["accuracy"] for m in run if "accuracy" in m] for run in runs])    # (seeds, evaluations)
        band = points(steps + steps[::-1], [*scores.min(0), *scores.max(0)[::-1]])
        caption += f' <b style="color:{colour}">{escape(name)}</b>'
        svg += (f'<g color="{colour}" transform="translate(30 200) scale({380 / steps[-1]} -200)">'
                f'<polygon points="{band}"/><polyline points="{points(steps, scores.mean(0))}"/></g>')
    for i in range(5):
        svg += (f'<text x="0" y="{204 - 50 * i}">{i / 4}</text><path d="M30 {200 - 50 * i}h380"/>'
                f'<text x="{26 + 95 * i}" y="218">{steps[-1] * i / 4:g}</text>')
    return f'<p>{caption}</p><svg viewBox="0 -5 430 230">{svg}</svg>'

def report(out, title, parts):
    """Write out/report.html: a figure (or ""), then texts, on one page that needs no network and no script."""
    figure, *texts = parts
    text = MARKED.sub(r'<span class="\1">\2</span>', escape("\n\n".join(texts)))
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>
<h1>{escape(title)}</h1>{figure}<pre>{text}</pre>
""", encoding="utf-8")

# ------------------------------------------------------------------------------------------------------ 11 Save

def new_run(cfg):
    """Make the run's folder and write config.json into it; raises UserError if it holds a run already."""
    out = Path(cfg.out or f"out/{Path(cfg.model).name}-{cfg.tokens}-seed{cfg.seed}")
    if (out / "metrics.jsonl").exists():
        raise UserError(f"--out {out}: holds a run already; choose another folder, or delete that one")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to ({error})") from None
    return out

def save(model, tokenizer, out):
    """Write the transformers folder out/model; aside first, so that only a whole one replaces the one before."""
    aside, place = out / "model.part", out / "model"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(place, ignore_errors=True)
    aside.rename(place)

@contextlib.contextmanager
def stop_signals():
    """Yields a list that is empty until Ctrl-C or SIGTERM, and then holds the signal's number; a second one quits."""
    def handle(number, frame):
        if stop:
            os._exit(128 + number)
        stop.append(number)
        print("\nstopping after this step, then saving (once more: quit at once, unsaved)", file=sys.stderr)
    stop = []
    with contextlib.ExitStack() as restore:
        for number in signal.SIGINT, signal.SIGTERM:
            restore.callback(signal.signal, number, signal.signal(number, handle))
        yield stop

# ------------------------------------------------------------------------------------------------------- 12 Run

def check_settings(cfg):
    """Raise UserError for a setting that makes no sense or cannot be had; returns the device."""
    try:
        device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError):
        device = None
    least = {"group_size": 2, "eval_every": 0}                  # other counts: 1, unless they are 0 by default
    numbers = [(f.name, least.get(f.name, int(isinstance(f.default, int) and f.default > 0)))
               for f in dataclasses.fields(cfg) if type(f.default) in (int, float)]
    for ok, key, rule in [
            (0 < cfg.rho <= 1, "rho", "must lie in (0, 1]: it is the share of answer tokens to keep, such as 0.2"),
            (all(0 < rho <= 1 for rho in cfg.rhos), "rhos", "must all lie in (0, 1]"),
            (1e-6 <= cfg.temperature < math.inf, "temperature", "must be above 0: training needs answers that differ"),
            (not cfg.dual_clip or cfg.dual_clip > 1, "dual_clip", "must be above 1, or 0 for none"),
            (cfg.overlong_buffer <= cfg.max_new_tokens, "overlong_buffer", "must not exceed --max-new-tokens"),
            ("{question}" in PROMPTS.get(cfg.prompt, cfg.prompt), "prompt",
             f"must be {', '.join(PROMPTS)}, or a text with {{question}} in it"),
            (device is not None, "device", "is not to be had here; try --device cpu"),
            *((low <= getattr(cfg, key) < 2**63, key, f"must be finite, at least {low}") for key, low in numbers)]:
        if not ok:
            raise UserError(f"--{key.replace('_', '-')} {getattr(cfg, key)}: {rule}")
    return device

def load(cfg):
    """(model, tokenizer, problems to train on, problems to test on), as cfg says."""
    device, template = check_settings(cfg), PROMPTS.get(cfg.prompt, cfg.prompt)
    model, tokenizer = load_policy(cfg.model, device, cfg.dtype)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 40) - cfg.max_new_tokens
    test = Path(cfg.eval_data or Path(cfg.data).with_name("test.jsonl"))
    held_out = [test] if cfg.eval_data or (test.exists() and test != Path(cfg.data)) else []
    problems, *tests = (load_problems(path, tokenizer, template, room) for path in (cfg.data, *held_out))
    return model, tokenizer, problems, tests[0] if tests else []

def deal(queue, n, total, generator):
    """Take n problem numbers off the queue, which is refilled with all of them, shuffled, whenever it runs short."""
    while len(queue) < n:
        queue += torch.randperm(total, generator=generator).tolist()
    return [queue.pop(0) for _ in range(n)]

def rollout(model, tokenizer, problems, queue, cfg, generator, say):
    """Sample and check groups until prompts_per_step of them are partly right, in at most resample_rounds rounds: one
    that is all right or all wrong has nothing to teach. Returns (those groups, metrics of all that were sampled)."""
    everything, mixed = [], []
    for _ in range(cfg.resample_rounds):
        chosen = [problems[i] for i in deal(queue, cfg.prompts_per_step - len(mixed), len(problems), generator)]
        groups = attempt(model, tokenizer, chosen, cfg.group_size, cfg, cfg.temperature, generator, say)
        everything += [a for group in groups for a in group]
        mixed += [group for group in groups if 0 < sum(a.correct for a in group) < len(group)]
        if len(mixed) == cfg.prompts_per_step:
            break
    tokens, n = sum(map(len, everything)), len(everything)
    return mixed, {"reward": sum(a.reward for a in everything) / n, "length": tokens / n, "groups_kept": len(mixed),
                   "truncated": sum(not a.finished for a in everything) / n, "tokens": tokens}

def train(cfg):
    """Train as cfg says; write log, model and report; return the run's folder. Raises UserError."""
    model, tokenizer, problems, tests = load(cfg)
    out, tests, began = new_run(cfg), tests if cfg.eval_every else [], time.perf_counter()
    print(textwrap.fill("  ".join(f"{key}={value}" for key, value in vars(cfg).items()), 118, break_on_hyphens=False))
    print(f"{model.num_parameters():,} parameters on {model.device}; {len(problems)} questions, {len(tests)} to test")
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    generator, queue, history, generated, seconds = torch.Generator().manual_seed(cfg.seed), [], [], 0, 0.0
    with open(out / "metrics.jsonl", "w", encoding="utf-8") as log, stop_signals() as stop, \
            tqdm(total=cfg.steps, leave=False, disable=None) as bar:            # a bar where stderr is a terminal
        def record(metrics):
            history.append(metrics)
            print(json.dumps(metrics), file=log, flush=True)
            bar.write(step_line(metrics, cfg.steps))
        say = bar.set_postfix_str
        try:
            if tests:
                record({"step": 0, "tokens": 0, "seconds": 0.0} | evaluate(model, tokenizer, tests, cfg, say))
            for step in range(1, cfg.steps + 1):
                start = time.perf_counter()
                groups, sampled = rollout(model, tokenizer, problems, queue, cfg, generator, say)
                learned = update(model, optimizer, groups, cfg, generator, say) if groups else {"loss": None}
                took = time.perf_counter() - start              # evaluation is not counted
                generated, seconds = generated + sampled["tokens"], seconds + took
                metrics = {"step": step, **sampled, **learned, "tokens": generated, "seconds": seconds,
                           "tokens_per_second": sampled["tokens"] / took}
                if tests and (step % cfg.eval_every == 0 or step == cfg.steps or stop):
                    metrics |= evaluate(model, tokenizer, tests, cfg, say)
                record(metrics)
                if groups and "accuracy" in metrics:
                    marked = mark_forks(tokenizer, groups[0][0], metrics["threshold"])
                    bar.write(textwrap.indent(for_terminal(marked), "    "))
                bar.update()
                if stop:
                    break
                if cfg.save_every and step % cfg.save_every == 0:
                    save(model, tokenizer, out)
        finally:                                                # whatever happened, what was trained is on disk
            save(model, tokenizer, out)
    answers, scores = [a for group in groups for a in group], [m["accuracy"] for m in history if "accuracy" in m]
    report(out, f"{cfg.model}, trained on {cfg.tokens} tokens",
           [accuracy_chart({cfg.tokens: [history]}), *(look(tokenizer, answers, cfg.min_count)[1] if answers else [])])
    print(f"accuracy {scores[0]:.3f} -> {scores[-1]:.3f}" if scores else "done", f"in {step} steps, {generated:,} "
          f"tokens and {time.perf_counter() - began:.0f} s; the model and report.html are in {out}")
    if stop:
        raise SystemExit(128 + stop[0])
    return out

def trained(cfg):
    """The metrics of the run that cfg describes: of that in its folder if it came to its end, else of a new one."""
    log = Path(cfg.out, "metrics.jsonl")
    if log.exists() and json.loads(log.with_name("config.json").read_text("utf-8")) != dataclasses.asdict(cfg):
        raise UserError(f"{cfg.out} holds a run with other settings; choose another --out, or delete that folder")
    if not log.exists() or f'{{"step": {cfg.steps},' not in log.read_text("utf-8"):
        log.unlink(missing_ok=True)                             # train() leaves alone what has a log
        train(cfg)
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]

def compare(cfg):
    """Train on each kind of tokens with each seed, in folders of their own below --out, where finished runs are found
    and reused; print a table and write a report."""
    if not (load(cfg)[-1] and cfg.eval_every):
        raise UserError("--compare needs questions to test on, --eval-data, and --eval-every above 0")
    out, arms = Path(cfg.out or f"out/{Path(cfg.model).name}-compare"), {}
    kinds = {f"top {rho:.3g}": ("top", rho) for rho in (cfg.rho, *cfg.rhos)} | {"all": ("all", cfg.rho)}
    kinds |= {f"random {cfg.rho:.3g}": ("random", cfg.rho), f"bottom {1 - cfg.rho:.3g}": ("bottom", cfg.rho)}
    for seed, (name, (tokens, rho)) in itertools.product(range(cfg.seed, cfg.seed + cfg.seeds), kinds.items()):
        run = dataclasses.replace(cfg, compare=False, rhos=[], seeds=1, tokens=tokens, rho=rho, seed=seed,
                                  out=str(out / f"{tokens}-{rho:g}-seed{seed}"))
        print(f"\n{name}, seed {seed}: {run.out}")
        try:
            arms[name] = [*arms.get(name, []), trained(run)]
        except Exception as error:
            print(f"this run failed and is left out ({type(error).__name__}: {error})", file=sys.stderr)
    table = "tokens        accuracy (95 %)   best   area   to .60  to .80  length  entropy  updated  seconds  seeds\n"
    line = "{:12}  {:.3f} ± {:5.3f}   {:.3f}  {:.3f}  {:6.1f}  {:6.1f}  {:6.1f}  {:7.3f}  {:7.1%}  {:7.0f}  {:5}\n"
    for name, runs in arms.items():
        steps = [m["step"] for m in runs[0] if "accuracy" in m]
        scores = np.array([[m["accuracy"] for m in run if "accuracy" in m] for run in runs])    # (seeds, evaluations)
        reach = lambda level: np.mean([next((s for s, y in zip(steps, row) if y >= level), math.nan) for row in scores])
        last = lambda key: np.mean([run[-1].get(key, math.nan) for run in runs])
        table += line.format(name, scores[:, -1].mean(), interval(scores[:, -1]), scores.max(1).mean(),
                             np.trapezoid(scores.mean(0), steps) / steps[-1], reach(0.6), reach(0.8), last("length"),
                             last("entropy"), last("kept"), last("seconds"), len(runs))
    table = table.replace("nan%", "  - ").replace("nan", "  -")
    print(f"\n{table}")
    report(out, "Which tokens to train on", [f'{accuracy_chart(arms)}<pre style="white-space:pre">{table}</pre>'])

def show(cfg):
    """Look at a model: its forks and entropies; with --base, what training changed; and where heat does harm."""
    model, tokenizer, problems, tests = load(cfg)
    problems, grid = (tests or problems)[:cfg.prompts_per_step], (0, 0.5, 1, 1.5, 2, 3)
    def answers_at(temperature):
        with tqdm(bar_format="{desc}", leave=False, disable=None) as bar:
            groups = attempt(model, tokenizer, problems, cfg.group_size, cfg, temperature,
                             torch.Generator().manual_seed(cfg.seed), bar.set_description_str)
        return [a for group in groups for a in group]
    answers = answers_at(1.0)
    tau, texts = look(tokenizer, answers, cfg.min_count)
    print(*map(for_terminal, texts), sep="\n\n")
    if cfg.base:
        batch, base = stack(answers, model.device), load_policy(cfg.base, model.device, cfg.dtype)[0]
        before = policy_entropy(base, batch, 1.0, cfg.micro_batch_size)[batch.response_mask].cpu()
        texts.append(entropy_change(before, batch.entropy[batch.response_mask].cpu()))
        print(f"\n{texts[-1]}")
    table = (f"accuracy with forks (H > {tau:.3f} nats), or all the rest, at another temperature than 1\n"
             f"temperature{''.join(f'{T:6}' for T in grid)}")
    for name in "forks", "rest":
        table += f"\n{name:11}"
        for T in grid:
            answers = answers_at(lambda H: torch.where((H > tau) == (name == "forks"), T, 1.0))
            table += f"{np.mean([a.correct for a in answers]):6.2f}"
    out = Path(cfg.out or f"out/{'-'.join(Path(cfg.model).parts[-2:])}-show")
    report(out, f"The forks of {cfg.model}", ["", *texts, table])
    print(f"\n{table}\n\n{out / 'report.html'} shows this, too")

def main(argv=None):
    """The command line; also to be called from Python, with a list of strings. Bad input ends in SystemExit(2)."""
    def fail(message):
        raise UserError(f"{message} (--help lists all flags)")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)        # else it tells of each retry
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    try:
        cfg, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
        if unknown:
            fail(f"unknown argument {unknown[0]}")
        (show if cfg.show else compare if cfg.compare else train)(cfg)
    except (UserError, OSError) as error:
        print(f"forking.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None

if __name__ == "__main__":
    main()

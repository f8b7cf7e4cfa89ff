#!/usr/bin/env python3
r"""Reinforcement learning on forking tokens, the 80/20 rule of arXiv 2506.01939, in one file.

In a chain of thought only a few tokens decide where the reasoning goes: those at which the policy is of several
minds, so that the entropy of its next-token distribution is high. The paper trains on just these 20 % of the tokens
and gets as much out of it as, or more than, from training on all. A training step, in this file's order:

    check      the last \boxed{} or "Answer:" against the known answer: reward 1 or 0            section 2
    sample     a group of answers to each question, with the entropy of every draw               section 4
    entropy    of the current policy, at every token of every answer                             section 5
    fork       keep the 20 % of the tokens where it is highest                                   section 6
    loss       PPO's clipped objective, advantages relative to the group, mean over kept tokens  section 7
    update     a few optimizer steps on the answers, which are then thrown away                  section 8

    python forking.py                    # a tiny GPT-2 on two CPU cores: two minutes, and nothing to download
    python forking.py --tokens bottom    # the control: train on the other 80 %
    python forking.py --model Qwen/Qwen3-0.6B-Base --data math.jsonl --prompt boxed --max-new-tokens 2048 --lr 1e-6

    paper                 here         shape    what it is
    pi_theta(o_t | ...)   logp         (K,)     log-probability of a token under the policy being trained
    pi_old(o_t | ...)     logp_old     (B, T)   the same under the policy that drew it
    r_t                   ratio        (K,)     exp(logp - logp_old)
    A_t                   advantage    (B, T)   how much better than its group the answer did
    H_t                   entropy      (B, T)   of the distribution that the token at t is drawn from, in nats
    tau_rho               threshold    ()       the lowest entropy among the top rho of all answer tokens
    1[H_t >= tau_rho]     keep         (B, T)   True at the forking tokens

P questions, G answers to each, B = P * G rows of T tokens (question, answer, padding), N answer tokens in a
mini-batch, K of them kept, V words in the vocabulary. Column t of a (B, T) tensor is about the token at t.

Differences from the paper: (1) the threshold is that of a mini-batch, theirs that of a micro-batch on one GPU; here
the split of the work never changes the result. (2) Logits with gradient are computed at the kept tokens only: the
same gradient in a fifth of the memory. (3) Clipped shares count kept tokens, since no others have a ratio.
"""
import contextlib, dataclasses, json, math, os, re, shutil, signal, sys, textwrap, time
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser


class UserError(Exception):
    """A mistake in what we were given. main() prints it as one line and exits with code 2."""


def quiet(text):
    """In place of a progress bar."""


# ----------------------------------------------------------------------------------------------------- 1 Config

def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
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
    dual_clip: float | None = flag(10.0, "where A < 0, the objective is never below DUAL_CLIP * A")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    # run
    steps: int = flag(60, "training steps, each one rollout with its updates")
    eval_every: int = flag(5, "evaluate before training, every so many steps, and at the end; 0: never")
    eval_samples: int = flag(4, "k, answers to each question of an evaluation")
    save_every: int = flag(0, "save the model every so many steps, and at the end; 0: only at the end")


# -------------------------------------------------------------------------------- 2 Problems, and their answers

PROMPTS = {
    "plain": "{question}\n",
    "boxed": "User:\n{question}\nPlease reason step by step, and put your final answer within \\boxed{}.\n\n"
             "Assistant:\n",
    "answer": "{question}\n\nReason step by step. The last line must be 'Answer: ' and then the answer alone.\n",
}


class Problem(NamedTuple):
    question: str
    answer: str
    prompt: list[int]       # token ids of the question in its template


def load_problems(path, tokenizer, template, room):
    """Read JSON lines with "question" (or "problem") and "answer"; of GSM8K's answers, what follows "####".

    template: a text with {question} in it. room: the tokens a question may take. Raises UserError with file and line.
    """
    problems, where = [], path
    try:
        with open(beside_script(path), encoding="utf-8") as file:
            for where, line in ((f"{path}:{n}", line) for n, line in enumerate(file, 1) if line.strip()):
                record = json.loads(line)
                question, answer = record.get("question", record.get("problem")), record.get("answer")
                if type(answer) not in (str, int, float) or not (question.strip() and str(answer).strip()):
                    raise ValueError("no answer")
                prompt = tokenizer.encode(template.replace("{question}", question))
                if not 0 < len(prompt) <= room:
                    raise UserError(f"{where}: the question takes {len(prompt)} tokens, and the model's context has "
                                    f"room for {room} besides the answer; leave it out or lower --max-new-tokens")
                problems.append(Problem(question, str(answer).split("####")[-1].strip(), prompt))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f'{where}: need a UTF-8 file with lines such as {{"question": "1+2=?", "answer": "3"}} '
                        f"({type(error).__name__}: {error})") from None
    if not problems:
        raise UserError(f"{path}: holds no questions")
    return problems


def beside_script(path):
    """A relative path counts from the current folder or, if nothing is there, from this script's."""
    beside = Path(__file__).resolve().parent / path
    return beside if beside.exists() and not Path(path).exists() else Path(path)


def extract_answer(text):
    r"""The last \boxed{...} with balanced braces, else what is on the line after the last "Answer:" or "####"."""
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
    for marker in r"(?i)answer\s*:", "####":
        *before, rest = re.split(marker, text)
        if before:
            return rest.strip().split("\n")[0].strip(" \t\r*")
    return None


REWRITES = [(re.compile(pattern), new) for pattern, new in [                    # applied in this order
    ("\u2212", "-"), (r"\\[dt]frac(?![a-z])", r"\\frac"), (r"\\(left|right)(?![a-z])", ""), (r"\\%", "%"),
    (r"\\[!,;: ]|~|\\?\$", ""), (r"\^\s*(\{\s*\\circ\s*\}|\\circ(?![a-z]))", ""),     # spaces, dollars, degrees
    (r"(?<=[0-9})])\s*\\(text|mathrm|mbox)\s*\{[^{}]*\}$", ""),                       # a unit at the end
    (r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1"), (r"\s*\.$", ""), (r"^[a-zA-Z]\s*=", ""),
    (r"(?<![0-9])\s+|\s+(?![0-9])", ""), (r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}"),     # but 5 6 is not 56
]]
NUMBER = re.compile(r"([+-]?)(?:\\frac\{(-?[0-9]+)\}\{([0-9]+)\}|([0-9]+)/([0-9]+)|([0-9]*\.[0-9]+|[0-9]+\.?|"
                    r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?))(%?)")


def simplify(answer):
    for pattern, new in REWRITES:
        answer = pattern.sub(new, answer).strip()
    return answer


def to_number(text):
    """The Fraction that the whole of a text denotes, else None."""
    match = NUMBER.fullmatch(text)
    sign, top, bottom, above, below, decimal, percent = match.groups() if match else [None] * 7
    if match is None or int(bottom or below or 1) == 0:
        return None
    value = Fraction((top or above or decimal).replace(",", "")) / int(bottom or below or 1)
    return (-value if sign == "-" else value) / (100 if percent else 1)


def is_correct(text, answer):
    r"""True if what extract_answer finds in text means the same as answer: the same string after REWRITES, or exactly
    the same number (0.5 = 1/2 = \frac{1}{2} = 50\%). Never raises, and takes time linear in the text."""
    given = extract_answer(text)
    if given is None or max(len(given), len(answer)) > 1000:        # no answer is that long
        return False
    given, answer = simplify(given), simplify(answer)
    return given == answer != "" or None is not to_number(given) == to_number(answer)


def overlong_penalty(length, max_new_tokens, buffer):
    """0 for an answer that leaves the last `buffer` tokens unused, down to -1 for one that uses them all (DAPO)."""
    return min((max_new_tokens - buffer - length) / buffer, 0.0) if buffer else 0.0


# ----------------------------------------------------------------------------------------------------- 3 Policy

def load_policy(path, device="cpu", dtype="float32"):
    """(model, tokenizer). Weights are float32, only computation may be bfloat16, in which a step of 1e-6 would round
    to nothing. Dropout is off, so that what is trained is what was sampled. Raises UserError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(beside_script(path))
        model = AutoModelForCausalLM.from_pretrained(beside_script(path), dtype=torch.float32).to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {path}: neither a folder with a causal language model and its tokenizer, nor to be "
                        f"had from the hub ({str(error).strip().splitlines()[0]})") from None
    if dtype == "bfloat16":
        model.forward = torch.autocast(model.device.type, torch.bfloat16)(model.forward)
    return model, tokenizer


# ----------------------------------------------------------------------------------------------------- 4 Sample

@dataclass
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


def draw(logits, temperature, uniform):
    """Draw a token in each row: logits (B, V), numbers in [0, 1) (B,) -> tokens, log-probabilities, entropies, (B,).

    By the inverse of the cumulative distribution: the first word at which it exceeds the row's random number."""
    if temperature == 0:                                        # greedy: all probability on the most likely word
        logits = torch.full_like(logits, -math.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
        temperature = 1.0
    logp = torch.log_softmax(logits.float() / temperature, -1)
    cumulative = logp.double().exp().cumsum(-1)
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    token = token.clamp(max=logp.shape[-1] - 1)                 # should rounding have led past the last word
    return token[:, 0], logp.gather(-1, token)[:, 0], token_entropy(logits, temperature)


@torch.no_grad()
def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature=1.0, generator=None, say=quiet):
    """Answer each prompt group_size times: P lists of token ids -> P lists of G Answers. Temperature 0 is greedy.

    A prompt is read once, its keys and values are shared by its group. An answer leaves the batch when it ends. Each
    draw has a random number of its own, so that no answer depends on which others are still being written.
    """
    ends = model.generation_config.eos_token_id                 # an int, a list, or None
    ends = torch.tensor(tokenizer.eos_token_id if ends is None else ends, device=model.device)
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
    others, "random" any ceil(rho N), "all" every one. Prompt and padding are never kept, whatever their entropy.
    """
    response_mask = response_mask.bool()                        # 0/1 integers would index rows 0 and 1
    pool = entropy[response_mask]                               # (N,)
    k = math.ceil(Fraction(str(rho)) * len(pool))               # 0.07 * 100 as floats would be rounded up to 8
    order = pool.argsort(descending=True, stable=True)
    if tokens == "random":
        order = torch.randperm(len(pool), generator=generator).to(pool.device)
    chosen = torch.zeros_like(pool, dtype=torch.bool)
    chosen[{"top": order[:k], "random": order[:k], "bottom": order[k:], "all": order}[tokens]] = True
    return torch.zeros_like(response_mask).masked_scatter(response_mask, chosen)


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

class Batch(NamedTuple):
    """B answers as (B, T) tensors. Padding is on the right, where no token looks: no attention mask is needed."""
    ids: torch.Tensor
    response_mask: torch.Tensor     # True at the answers' tokens
    logp_old: torch.Tensor
    entropy: torch.Tensor
    advantage: torch.Tensor
    keep: torch.Tensor              # True at the tokens that get a gradient


def stack(answers, device):
    """A list of B Answers -> Batch, with the entropies seen in sampling, and every answer token kept."""
    rows = [(a.ids, a.mask, a.logp, a.entropy, a.advantage * a.mask, a.mask) for a in answers]
    return Batch(*(pad_sequence(column, batch_first=True).to(device) for column in zip(*rows)))


def micro_batches(batch, size):
    """Views of `size` rows each, without the columns that are padding in all of these."""
    for i in range(0, len(batch.ids), size):
        width = batch.response_mask[i:i + size].any(0).nonzero().max() + 1
        yield Batch(*(tensor[i:i + size, :width] for tensor in batch))


def token_logits(model, ids, where):
    """The logits that the tokens at `where` are drawn from: ids (B, T), bool (B, T) with K True -> (K, V).

    The model's own output layer is handed the hidden states of just these positions: no (B, T, V) ever exists."""
    before = where.roll(-1, 1)                                  # the token at t is drawn from the logits at t - 1
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda layer, inputs: (inputs[0][before],))
    try:
        return model(ids, use_cache=False).logits
    finally:
        hook.remove()


def update(model, optimizer, groups, cfg, generator=None, say=quiet):
    """Take cfg.epochs * cfg.minibatches optimizer steps on groups of Answers, and return the means of their metrics.

    Threshold and normaliser are those of a whole mini-batch, and micro-batches add up to its very gradient."""
    history = []
    shuffled = [torch.randperm(len(groups), generator=generator) for _ in range(cfg.epochs)]
    for part in (part for order in shuffled for part in order.tensor_split(cfg.minibatches) if len(part)):
        say(f"updating, mini-batch {len(history) + 1}")
        batch = stack(sorted((a for i in part for a in groups[i]), key=lambda a: len(a.ids)), model.device)
        if cfg.entropy_from == "policy":
            for micro in micro_batches(batch, cfg.micro_batch_size):
                with torch.no_grad():
                    logits = token_logits(model, micro.ids, micro.response_mask)
                    micro.entropy[micro.response_mask] = token_entropy(logits, cfg.temperature)     # into batch
        keep = fork_mask(batch.entropy, batch.response_mask, cfg.rho, cfg.tokens, generator)
        batch = batch._replace(keep=keep)
        normaliser = (keep if cfg.normalize == "selected" else batch.response_mask).sum().clamp(min=1)

        objectives, changes, advantages = [], [], []
        for micro in micro_batches(batch, cfg.micro_batch_size):
            logits = token_logits(model, micro.ids, micro.keep).float() / cfg.temperature           # (K, V)
            logp = -F.cross_entropy(logits, micro.ids[micro.keep], reduction="none")                # (K,)
            logp_old, advantage = micro.logp_old[micro.keep], micro.advantage[micro.keep]
            J = clipped_objective(logp, logp_old, advantage, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
            (-J.sum() / normaliser).backward()
            objectives.append(J.detach()), changes.append((logp - logp_old).detach()), advantages.append(advantage)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

        change, advantage, H = torch.cat(changes), torch.cat(advantages), batch.entropy[batch.response_mask]
        history.append({
            "loss": -torch.cat(objectives).sum() / normaliser, "entropy": H.mean(), "kept": keep.sum() / len(H),
            "threshold": H[fork_mask(H, torch.ones_like(H), cfg.rho)].min(), "grad_norm": grad_norm,
            "clip_low": ((change.exp() < 1 - cfg.clip_low) & (advantage < 0)).float().mean(),
            "clip_high": ((change.exp() > 1 + cfg.clip_high) & (advantage > 0)).float().mean(),
            "ratio": change.abs().mean().exp()})
    means = {key: sum(float(metrics[key]) for metrics in history) / len(history) for key in history[0]}
    return means | {"ratio": float(history[0]["ratio"])}        # while the policy was still the one that sampled


# --------------------------------------------------------------------------------------------------- 9 Evaluate

def pass_at_k(right, k):
    """Chance that at least one of k answers is right, from n >= k of them: (P, n) of 0 and 1 -> float, the mean over
    questions of 1 - C(n - c, k) / C(n, k), where c of its n answers are right (arXiv 2107.03374)."""
    n = right.shape[1]
    return sum(1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right.sum(1)) / len(right)


def evaluate(model, tokenizer, problems, cfg, say=quiet):
    """Answer every problem eval_samples times at temperature 1: accuracy (avg@k), its standard error, and pass@k.

    The draws have a generator of their own: evaluating does not change training, and is the same at every step."""
    generator, right = torch.Generator().manual_seed(cfg.seed), []
    size = max(1, cfg.prompts_per_step * cfg.group_size // cfg.eval_samples)    # as many at once as in training
    for i in range(0, len(problems), size):
        part = problems[i:i + size]
        groups = sample(model, tokenizer, [p.prompt for p in part], cfg.eval_samples, cfg.max_new_tokens, 1.0,
                        generator, lambda text: say(f"evaluating {len(part)} of {len(problems)} questions: {text}"))
        right += [[float(is_correct(a.text, p.answer)) for a in group] for p, group in zip(part, groups)]
    right = torch.tensor(right)                                 # (P, k)
    stderr = right.mean(1).std(correction=min(1, len(right) - 1)) / math.sqrt(len(right))
    return {"accuracy": right.mean().item(), "stderr": stderr.item(), "pass_at_k": pass_at_k(right, cfg.eval_samples)}


# ------------------------------------------------------------------------------------------------------ 10 Look

def mark_forks(tokenizer, answer, threshold, longest=200):
    """The question and its answer, every fork (entropy >= threshold) in bold magenta or, without colours, [so]."""
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    start, end = ("\033[1;35m", "\033[0m") if colours else ("[", "]")
    ids, entropies = answer.ids[answer.mask][:longest], answer.entropy[answer.mask]
    words = [tokenizer.decode([i], skip_special_tokens=True) for i in ids.tolist()]
    marked = "".join(f"{start}{w}{end}" if w and H >= threshold else w for w, H in zip(words, entropies))
    question = tokenizer.decode(answer.ids[~answer.mask], skip_special_tokens=True).strip()
    return f"{question[-200:]}\n{marked}{' ...' * (answer.mask.sum() > longest)}   (reward {answer.reward:g})"


def step_line(m, steps):
    """The metrics of a step on one line of at most 120 columns."""
    accuracy = f"acc {m['accuracy']:.3f}  " if "accuracy" in m else " " * 11
    line = f"step {m['step']:>{len(str(steps))}}/{steps}  "
    if m["step"] == 0:
        return line + f"before training: {accuracy}+- {m['stderr']:.3f}  pass@k {m['pass_at_k']:.3f}"
    learned = "every group all right or all wrong: no update  " if m["loss"] is None else (
        f"H {m['entropy']:.3f}  tau {m['threshold']:.3f}  kept {m['kept']:.0%}  clip {m['clip_low']:5.1%} "
        f"{m['clip_high']:5.1%}  ")
    speed = f"len {m['length']:.0f}  {m['tokens_per_second']:.0f} tok/s"
    return line + f"reward {m['reward']:5.2f}  {accuracy}{learned}{speed}"


class Progress(tqdm):
    """A bar on stderr, if that is a terminal, which says what is going on."""
    def __init__(self, steps):
        super().__init__(total=steps, unit="step", miniters=0, leave=False, disable=not sys.stderr.isatty())

    def say(self, text):
        self.set_postfix_str(text, refresh=False)
        self.update(0)

    def print(self, text):
        self.clear()
        print(text, flush=True)


# ------------------------------------------------------------------------------------------------------ 11 Save

def new_run(cfg):
    """Make the run's folder and write config.json into it; raises UserError if it holds a run already."""
    out = Path(cfg.out or f"out/{Path(cfg.model).name}-{cfg.tokens}-seed{cfg.seed}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "metrics.jsonl").exists():
            raise OSError("it holds a run already; choose another folder, or delete that one")
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
    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------- 12 Run

def check(cfg):
    """Raise UserError for a setting that makes no sense, or cannot be had."""
    ones = "prompts_per_step max_new_tokens resample_rounds minibatches epochs micro_batch_size eval_samples"
    zeros = "seed overlong_buffer lr weight_decay clip_low clip_high steps eval_every save_every"
    least = dict.fromkeys(ones.split(), 1) | dict.fromkeys(zeros.split(), 0) | {"group_size": 2}
    best = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=cfg.device or best).device
    except (RuntimeError, AssertionError):
        device = None
    rules = [(low <= getattr(cfg, key) < math.inf, key, f"must be at least {low}") for key, low in least.items()] + [
        (0 < cfg.rho <= 1, "rho", "must lie in (0, 1]: it is the share of answer tokens to keep, such as 0.2"),
        (0 < cfg.temperature < math.inf, "temperature", "must be above 0: training needs answers that differ"),
        (cfg.grad_clip > 0, "grad_clip", "must be above 0"),
        (cfg.dual_clip is None or cfg.dual_clip > 1, "dual_clip", "must be above 1"),
        (cfg.overlong_buffer <= cfg.max_new_tokens, "overlong_buffer", "must not exceed --max-new-tokens"),
        ("{question}" in PROMPTS.get(cfg.prompt, cfg.prompt), "prompt",
         f"must be {', '.join(PROMPTS)}, or a text with {{question}} in it"),
        (device is not None, "device", f"is not to be had here; try --device {best}")]
    for ok, key, rule in rules:
        if not ok:
            raise UserError(f"--{key.replace('_', '-')} {getattr(cfg, key)}: {rule}")
    return device


def deal(queue, n, total, generator):
    """Take n problem numbers off the queue, which is refilled with all of them, shuffled, whenever it runs short."""
    while len(queue) < n:
        queue += torch.randperm(total, generator=generator).tolist()
    dealt, queue[:] = queue[:n], queue[n:]
    return dealt


def rollout(model, tokenizer, problems, queue, cfg, generator, say):
    """Sample and check groups until prompts_per_step of them are partly right, in at most resample_rounds rounds: one
    that is all right or all wrong has nothing to teach. Returns (those groups, metrics of all that were sampled)."""
    everything, mixed = [], []
    for _ in range(cfg.resample_rounds):
        chosen = [problems[i] for i in deal(queue, cfg.prompts_per_step - len(mixed), len(problems), generator)]
        groups = sample(model, tokenizer, [p.prompt for p in chosen], cfg.group_size, cfg.max_new_tokens,
                        cfg.temperature, generator, say)
        for problem, group in zip(chosen, groups):
            for a in group:
                a.correct = is_correct(a.text, problem.answer)
                a.reward = a.correct + overlong_penalty(int(a.mask.sum()), cfg.max_new_tokens, cfg.overlong_buffer)
            for a, advantage in zip(group, group_advantages(torch.tensor([[a.reward for a in group]]))[0].tolist()):
                a.advantage = advantage
            everything += group
            mixed += [group] * (0 < sum(a.correct for a in group) < len(group))
        if len(mixed) == cfg.prompts_per_step:
            break
    tokens, n = sum(int(a.mask.sum()) for a in everything), len(everything)
    return mixed, {"reward": sum(a.reward for a in everything) / n, "length": tokens / n, "groups_kept": len(mixed),
                   "truncated": sum(not a.finished for a in everything) / n, "tokens": tokens}


def train(cfg):
    """Train as cfg says, write the log and the model, and return the run's folder. Raises UserError."""
    device, template = check(cfg), PROMPTS.get(cfg.prompt, cfg.prompt)
    bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
    model, tokenizer = load_policy(cfg.model, device, "bfloat16" if bfloat16 else "float32")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 40) - cfg.max_new_tokens
    problems, tests = load_problems(cfg.data, tokenizer, template, room), []
    test = Path(cfg.eval_data or beside_script(cfg.data).with_name("test.jsonl"))
    if cfg.eval_every and (cfg.eval_data or test.exists()):
        tests = load_problems(test, tokenizer, template, room)
    out = new_run(cfg)
    settings = "  ".join(f"{key}={value}" for key, value in dataclasses.asdict(cfg).items())
    print(textwrap.fill(f"settings: {settings}", 118, subsequent_indent="    ", break_on_hyphens=False))
    print(f"{model.num_parameters():,} parameters on {device}; {len(problems)} questions, {len(tests)} more to test on")

    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    generator, queue = torch.Generator().manual_seed(cfg.seed), []
    began, generated, seconds, scores = time.perf_counter(), 0, 0.0, []
    with open(out / "metrics.jsonl", "w", encoding="utf-8") as log, stop_signals() as stop, Progress(cfg.steps) as bar:
        try:
            for step in range(cfg.steps + 1):
                metrics, groups = {"step": step, "tokens": 0, "seconds": 0.0}, []
                if step > 0:                                    # step 0 is the evaluation before training
                    start = time.perf_counter()
                    groups, sampled = rollout(model, tokenizer, problems, queue, cfg, generator, bar.say)
                    learned = update(model, optimizer, groups, cfg, generator, bar.say) if groups else {"loss": None}
                    took = time.perf_counter() - start
                    generated, seconds = generated + sampled["tokens"], seconds + took
                    metrics |= sampled | learned | {"tokens": generated, "seconds": seconds,
                                                    "tokens_per_second": sampled["tokens"] / took}
                done = step == cfg.steps or bool(stop)
                if tests and (step % cfg.eval_every == 0 or done):
                    metrics |= evaluate(model, tokenizer, tests, cfg, bar.say)
                    scores.append(metrics["accuracy"])
                if step > 0 or tests:
                    print(json.dumps(metrics), file=log, flush=True)
                    bar.print(step_line(metrics, cfg.steps))
                if groups and "accuracy" in metrics:
                    bar.print(textwrap.indent(mark_forks(tokenizer, groups[0][0], metrics["threshold"]), "    "))
                bar.update(step > 0)
                if done:
                    break
                if step and cfg.save_every and step % cfg.save_every == 0:
                    save(model, tokenizer, out)
        finally:                                                # whatever happened, what was trained is on disk
            save(model, tokenizer, out)
    result = f"accuracy {scores[0]:.3f} -> {scores[-1]:.3f}" if scores else "done"
    took = time.perf_counter() - began
    print(f"{result} in {step} steps, {generated:,} tokens and {took:.0f} s; the model is in {out / 'model'}")
    if stop:
        raise SystemExit(128 + stop[0])
    return out


def main(argv=None):
    """The command line; also to be called from Python, with a list of strings. Bad input ends in SystemExit(2)."""
    def fail(message):
        raise UserError(f"{message} (--help lists all flags)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    try:
        cfg, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False)
        if unknown:
            fail(f"unknown argument {unknown[0]}")
        train(cfg)
    except UserError as error:
        print(f"forking.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

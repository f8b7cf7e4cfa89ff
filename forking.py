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

    python forking.py                    # a tiny GPT-2 on two CPU cores: a minute, and nothing to download
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
"""
import collections, contextlib, dataclasses, datetime, fractions, functools, html, itertools, json, math, os, re, shutil
import signal, sys, textwrap, time, typing, unittest.mock
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer
class UserError(Exception):
    """A mistake in what we were given. main() prints it as one line and exits with code 2."""
bar = tqdm(disable=True)                    # train() puts a real one here, to say on it what is going on
# ----------------------------------------------------------------------------------------------------- 1 Config
def flag(default, help):
    return dataclasses.field(default=default, metadata={"help": help})
@dataclasses.dataclass
class Config:
    """One field for each flag: --group-size sets group_size."""
    model: str = flag("tiny_data/gpt2", "folder or hub name of any causal language model of transformers")
    data: str = flag("tiny_data/train.jsonl", "questions to train on: JSON lines with question and answer, or parquet")
    eval_data: str | None = flag(None, "questions to test on; if not given, test.jsonl beside --data")
    out: str | None = flag(None, "folder of this run; if not given, out/MODEL-TOKENS-seedSEED")
    seed: int = flag(0, "of questions, draws and mini-batches; the same seed repeats the run")
    device: str | None = flag(None, "cpu, cuda, cuda:1 ...; if not given, cuda where there is one, else cpu")
    dtype: typing.Literal["auto", "float32", "bfloat16"] = flag("auto", "to compute in; auto: bfloat16 on cuda")
    # sample
    prompt: str = flag("plain", "plain, boxed, answer, chat, or a template with {question} in it, also as @FILE")
    prompts_per_step: int = flag(32, "P, questions in a step")
    group_size: int = flag(8, "G, answers to each question")
    sample_batch_size: int = flag(256, "answers written at the same time, a matter of memory")
    max_new_tokens: int = flag(64, "tokens after which an answer is cut off")
    temperature: float = flag(1.0, "of sampling, and so of log-probabilities and entropies")
    overlong_buffer: int = flag(0, "the last so many tokens before the cut cost reward; 0: they don't")
    resample_rounds: int = flag(2, "times to sample in a step, to replace groups all right or all wrong")
    # fork
    tokens: typing.Literal["top", "all", "bottom", "random"] = flag("top", "top RHO by entropy, all, the rest, any RHO")
    rho: float = flag(0.2, "share of the answer tokens that count as forks")
    normalize: typing.Literal["selected", "all"] = flag("selected", "the loss is a mean over these tokens")
    entropy_from: typing.Literal["policy", "rollout"] = flag("policy", "of the updated policy, or as sampled: faster")
    # update
    minibatches: int = flag(4, "optimizer steps in a pass over the sampled answers")
    epochs: int = flag(1, "passes over the sampled answers")
    micro_batch_size: int = flag(16, "answers in a forward pass, a matter of memory")
    lr: float = flag(5e-5, "learning rate of AdamW, constant")
    weight_decay: float = flag(0.1, "of AdamW")
    clip_low: float = flag(0.2, "no more gradient when a token has become less likely by this share")
    clip_high: float = flag(0.28, "no more gradient when a token has become likelier by this share")
    dual_clip: float = flag(10.0, "where A < 0, the objective is never below DUAL_CLIP * A; 0: no such limit")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    gradient_checkpointing: bool = flag(False, "compute activations twice, instead of keeping them in memory")
    # run
    steps: int = flag(60, "training steps, each one rollout with its updates")
    eval_every: int = flag(5, "evaluate before training, every so many steps, and at the end; 0: never")
    eval_samples: int = flag(4, "k, answers to each question of an evaluation")
    save_every: int = flag(0, "save every so many steps, and at the end; 0: only at the end")
    resume: bool = flag(False, "go on where the run in --out was last saved, or from the start")
    compare: bool = flag(False, "train on the top RHO, all, random RHO and bottom 1 - RHO of tokens, and tabulate")
    seeds: int = flag(3, "with --compare: seeds for each, from --seed on")
    rhos: list[float] = dataclasses.field(default_factory=list, metadata={"help": "with --compare: other RHOs"})
    show: bool = flag(False, "look at the forks of a model, without training")
    base: str | None = flag(None, "with --show: the model that --model was trained from, to see what changed")
    min_count: int = flag(5, "with --show: occurrences that a word needs to be listed")
# -------------------------------------------------------------------------------- 2 Problems, and their answers
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
PROMPTS = {"plain": "{question}\n",
           "boxed": f"User:\n{{question}}\n{BOXED}\n\nAssistant:\n",            # the paper's
           "answer": "{question}\n\nReason step by step. The last line must be 'Answer: ' and then the answer alone.\n",
           "chat": f"{{question}}\n{BOXED}"}                    # as a message in the model's own chat template
Problem = collections.namedtuple("Problem", "question answer ids")      # ids: of the question, in a template

def encode(tokenizer, prompt, question):
    """The token ids that put a question to the model. prompt: one of PROMPTS, or a template."""
    text = PROMPTS.get(prompt, prompt).replace("{question}", question)
    if prompt != "chat":
        return tokenizer.encode(text)
    if not tokenizer.chat_template:
        raise UserError("--prompt chat: this model has no chat template; take --prompt boxed")
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]

def load_problems(path, tokenizer, prompt, room):
    """Read problems in the formats of GSM8K (of its answers, what follows "####"), MATH-500 and DAPO-Math-17k (the last
    of its messages). What is there twice counts once. room: tokens that a question may take. Raises UserError."""
    problems, where = {}, path
    try:
        if Path(path).suffix == ".parquet":
            from pyarrow.parquet import read_table              # if it happens to be installed
            lines = [json.dumps(row, default=str) for row in read_table(path).to_pylist()]
        else:
            lines = Path(path).read_bytes().split(b"\n")
        for n, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}:{n}"
                record = json.loads(line)
                question = next((record[key] for key in ("question", "problem", "prompt") if key in record), None)
                question = question[-1]["content"] if isinstance(question, list) else question
                answer = record.get("answer", (record.get("reward_model") or {}).get("ground_truth"))
                if type(answer) not in (str, int, float) or not (question.strip() and str(answer).strip()):
                    raise ValueError("no question, or no answer")
                if (question, answer) not in problems:
                    ids = encode(tokenizer, prompt, question)
                    if not 0 < len(ids) <= room:
                        raise UserError(f"{where}: the question takes {len(ids)} tokens, and the model's context has "
                                        f"room for {room} besides the answer; leave it out or lower --max-new-tokens")
                    problems[question, answer] = Problem(question, str(answer).split("####")[-1].strip(), ids)
        if not problems:
            raise ValueError("it is empty")
    except (OSError, ImportError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise UserError(f'{where}: need a file of lines such as {{"question": "1+2=?", "answer": "3"}}, or a parquet '
                        f"file and pip install pyarrow ({type(error).__name__}: {error})") from None
    return list(problems.values())

def extract_answer(text):
    r"""The last \boxed{...} with balanced braces, else what follows the last "Answer:", or else "####"."""
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
    ("\u2212", "-"), ("\u03c0", r"\\pi"), (r"\\[dt]frac", r"\\frac"), (r"\\(left|right)(?![a-z])", ""), (r"\\%", "%"),
    (r"\\begin\{(.matrix)\}", r"\1("), (r"\\end\{.matrix\}", ")"), (r"\\\\", ";"), (r"\\!\s*", ""), (r"\{,\}", ","),
    (r"\^(\\circ|\{\\circ\})|\\degree|\u00b0", " "), (r"(\\[,;: ()\[\]]|\\?\$|~|\s)+", " "), (r" ?\.$", ""),
    (r"\\(textbf|mathrm|mbox)(?![a-z])", r"\\text"), (r"([_^])\{([0-9a-zA-Z])\}", r"\1\2"),
    (r"(?<=[0-9})]) ?\\text ?\{[a-zA-Z ./]*\}(\^[0-9])?$", ""),                     # a unit at the end
    (r"\\text ?\{([^{}]*)\}", r"\1"), (r"^[a-zA-Z] ?(=|\\in(?![a-z]))", ""), (r"^\(([A-Z])\)$", r"\1"),
    (" ?, | ,", ";"), (r"(?<![0-9.]) | (?![0-9.])", ""),                            # 5 6 and 5, 600 are no numbers
    (r"\\(frac|sqrt)([0-9])", r"\\\1{\2}"), (r"\\frac(\{[^{}]*\})([0-9])", r"\\frac\1{\2}"),
    (r"(?<![^-+(\[{;,&])\\frac\{(-?[0-9]+)\}\{([0-9]+)\}(?=[-+)\]};,&%]|\\\}|$)", r"\1/\2"),     # not in 2\frac12
]]
NUMBER = re.compile(r"[+-]?([0-9]+/0*[1-9][0-9]*|[0-9]*\.[0-9]+|[0-9]+\.?|[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?)%?")

def meaning(answer):
    r"""An answer after REWRITES, cut at brackets and commas; numbers become Fractions (0.5 = 1/2 = \frac12 = 50\%)."""
    for pattern, new in REWRITES:
        answer = pattern.sub(new, answer).strip()
    parts = [answer] if NUMBER.fullmatch(answer) else re.split(r"([()\[\];&]|\\[{}])", answer.replace(",", ";"))
    for i, part in enumerate(parts):
        if NUMBER.fullmatch(part):
            parts[i] = fractions.Fraction(part.rstrip("%").replace(",", "")) / (100 if part.endswith("%") else 1)
    return parts

def is_correct(text, answer):
    """True if what extract_answer finds in text means the same as answer. Never raises, in linear time."""
    given = extract_answer(text)
    return given is not None and max(len(given), len(answer)) <= 1000 and meaning(given) == meaning(answer) != [""]

def overlong_penalty(length, max_new_tokens, buffer):
    """0 for an answer that leaves the last `buffer` tokens unused, down to -1 for one that uses them all (DAPO)."""
    return min((max_new_tokens - buffer - length) / buffer, 0.0) if buffer else 0.0
# ----------------------------------------------------------------------------------------------------- 3 Policy
def load_policy(path, device="cpu", dtype="auto", checkpointing=False):
    """(model, tokenizer). Weights are float32, only computation may be bfloat16, in which a step of 1e-6 would round
    to nothing. Dropout is off, so that what is trained is what was sampled. Raises UserError."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        assert tokenizer.vocab_size > 1, "it has no tokenizer"
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    except Exception as error:
        raise UserError(f"model {path}: neither a folder with a causal language model and its tokenizer, nor to be "
                        f"had from the hub ({(str(error).strip() or repr(error)).splitlines()[0]})") from None
    return prepare(model, torch.device(device), dtype, checkpointing), tokenizer
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

def draw(logits, temperature, uniform):
    """Draw a token in each row: logits (B, V), uniform (B,) in [0, 1) -> tokens, log-probabilities, entropies, (B,).
    By inverting the cumulative distribution: the first word at which it exceeds the row's random number, or the last.
    temperature: a number, or a function that gets the rows' entropies at temperature 1 and returns one for each row."""
    if callable(temperature):
        temperature = temperature(token_entropy(logits))[:, None]
    temperature = torch.as_tensor(temperature, device=logits.device).clamp(min=1e-6)        # 0: as good as greedy
    p = torch.softmax(logits.float() / temperature, -1)
    cumulative = p.double().cumsum_(-1)                         # float32 is off by 3e-4 over 50,000 words
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
    return token[:, 0], p.gather(-1, token)[:, 0].log(), torch.special.entr(p).sum(-1)      # as in token_entropy

class Roomy(transformers.cache_utils.DynamicLayer):
    """A layer's keys and values, each (B, heads, n, D), as views of memory with room for more: they are copied at every
    16th token, when it is used up, and when answers leave. transformers would copy them at every token."""
    def update(self, keys, values, *args, **kwargs):
        n = self.keys.shape[2]
        if self.room[0].shape[2] == n:
            self.room = [F.pad(full, (0, 0, 0, 16)) for full in self.room]
        self.room[0][:, :, n:n + 1], self.room[1][:, :, n:n + 1] = keys, values
        self.keys, self.values = (room[:, :, :n + 1] for room in self.room)
        return self.keys, self.values
    def batch_select_indices(self, rows):
        self.room, n = [room[rows] for room in self.room], self.keys.shape[2]
        self.keys, self.values = (room[:, :, :n] for room in self.room)

@torch.no_grad()
def sample(model, tokenizer, prompts, group_size, max_new_tokens, temperature, seeds):
    """Answer each prompt group_size times: P lists of token ids -> P lists of G Answers. Temperature 0 is greedy.
    A prompt is read once, its keys and values are copied for its group. An answer leaves the batch when it ends. Each
    prompt has a seed of its own, so that but for rounding no answer depends on which others are written, or where."""
    ends = [e for e in (model.generation_config.eos_token_id, tokenizer.eos_token_id) if e is not None] + [[]]
    ends = torch.tensor(ends[0], device=model.device)           # the model's, or else the tokenizer's: one or several
    width, B = max(map(len, prompts)), len(prompts) * group_size
    ids = torch.tensor([[-1] * (width - len(p)) + p for p in prompts], device=model.device)     # (P, width)
    seen = F.pad(ids >= 0, (0, max_new_tokens), value=True).long()      # padding on the left is not seen, nor counted
    places = (seen.cumsum(1) - 1).clamp(min=0)                          # (P, width + max_new_tokens)
    out = model(ids.clamp(min=0), attention_mask=seen[:, :width], position_ids=places[:, :width], use_cache=True,
                logits_to_keep=1)
    question = torch.arange(B, device=model.device) // group_size       # of each row: from here on, there are B
    cache, logits, seen, places = out.past_key_values, out.logits[question, -1], seen[question], places[question]
    cache.batch_select_indices(question)
    for layer in [x for x in cache.layers if type(x) is transformers.cache_utils.DynamicLayer]:  # no sliding window
        layer.__class__, layer.room = Roomy, [layer.keys, layer.values]
    uniform = torch.cat([torch.rand(group_size, max_new_tokens, generator=torch.Generator().manual_seed(seed),
                                    dtype=torch.float64) for seed in seeds]).to(model.device)
    tokens = torch.full((B, max_new_tokens), -1, device=model.device)
    logp, entropy = torch.zeros(2, B, max_new_tokens, device=model.device)
    rows = torch.arange(B, device=model.device)                 # not ended yet
    for t in range(max_new_tokens):
        bar.set_postfix_str(f"token {t + 1} of {len(rows)} answers")
        tokens[rows, t], logp[rows, t], entropy[rows, t] = draw(logits, temperature, uniform[rows, t])
        going = (~torch.isin(tokens[rows, t], ends)).nonzero()[:, 0]
        if len(going) < len(rows):
            rows = rows[going]
            cache.batch_select_indices(going)
        if len(rows) == 0 or t + 1 == max_new_tokens:
            break
        logits = model(tokens[rows, t, None], attention_mask=seen[rows, :width + t + 1], past_key_values=cache,
                       position_ids=places[rows, width + t, None], use_cache=True).logits[:, -1]
    answers, unfinished, tokens, logp, entropy = [], set(rows.tolist()), tokens.cpu(), logp.cpu(), entropy.cpu()
    for i, n in enumerate((tokens >= 0).sum(1).tolist()):
        prompt, drawn = prompts[i // group_size], tokens[i, :n]
        mask, *records = (F.pad(x, (len(prompt), 0)) for x in (torch.ones(n).bool(), logp[i, :n], entropy[i, :n]))
        answers.append(Answer(torch.cat([torch.tensor(prompt), drawn]), mask, *records,
                              tokenizer.decode(drawn, skip_special_tokens=True), i not in unfinished))
    return [answers[i:i + group_size] for i in range(0, B, group_size)]

def attempt(model, tokenizer, problems, group_size, cfg, temperature, generator):
    """Sample group_size answers to each Problem and check them: groups of Answers with rewards and advantages. Each
    process answers its share of the problems, sample_batch_size answers or a group at a time; then all have all."""
    (rank, n), size = ranks(), max(1, cfg.sample_batch_size // group_size)
    seeds = torch.randint(2**62, (len(problems),), generator=generator).tolist()        # the same in every process
    tasks, groups = list(zip(problems, seeds))[rank::n], []
    with weights_at_hand(model):
        for i in range(0, len(tasks), size):
            part, seeds = zip(*tasks[i:i + size])
            bar.set_description_str(f"questions from {i + 1} on of {len(tasks)}")
            prompts = [problem.ids for problem in part]
            groups += sample(model, tokenizer, prompts, group_size, cfg.max_new_tokens, temperature, seeds)
    for (problem, _), group in zip(tasks, groups):
        for a in group:
            a.correct = is_correct(a.text, problem.answer)
            a.reward = a.correct + overlong_penalty(int(a.mask.sum()), cfg.max_new_tokens, cfg.overlong_buffer)
        for a, advantage in zip(group, group_advantages(torch.tensor([[a.reward for a in group]]))[0].tolist()):
            a.advantage = advantage
    hands = [groups] * n
    if n > 1:
        dist.all_gather_object(hands, groups)
    return [group for turn in itertools.zip_longest(*hands) for group in turn if group]        # as they were dealt out
# ---------------------------------------------------------------------------------------------------- 5 Entropy
def token_entropy(logits, temperature=1.0):
    """H_t = -sum_v p_v ln p_v, p = softmax(z / T), in nats and float32: logits z (..., V) -> (...).  [Eq. 1]
    0 where one word is certain, ln V where all are equally likely. It tells how undecided the policy is before it
    draws, not how unlikely the word is that it then draws."""
    return torch.special.entr(torch.softmax(logits.float() / temperature, -1)).sum(-1)      # entr: -p ln p, at 0 too
# ------------------------------------------------------------------------------------------------------- 6 Fork
def fork_mask(entropy, response_mask, rho, tokens="top", generator=None):
    """1[H_t >= tau_rho], the tokens that get a gradient: (B, T) in nats, (B, T) bool -> (B, T) bool.  [in Eq. 6]
    Of the N response tokens, "top" keeps the ceil(rho N) of highest entropy (of equals the first), "bottom" the
    others, "random" any ceil(rho N), "all" every one. Prompt and padding are never kept, whatever their entropy."""
    response_mask = response_mask.bool()                        # 0/1 integers would index rows 0 and 1
    pool = entropy[response_mask]                               # (N,)
    k = math.ceil(fractions.Fraction(str(rho)) * len(pool))      # 0.07 * 100 as floats would be rounded up to 8
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
    A < 0, dual_clip c keeps J from falling below c A: no gradient either for a token that became c times likelier."""
    ratio = torch.exp((logp - logp_old).clamp(-20, 20))
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is not None:
        objective = torch.where(advantage < 0, torch.maximum(objective, dual_clip * advantage), objective)
    return objective
# ----------------------------------------------------------------------------------------------------- 8 Update
# B answers as (B, T) tensors, padded on the right, where no token can look. response_mask: True at answers' tokens.
Batch = collections.namedtuple("Batch", "ids response_mask logp_old entropy advantage keep")

def stack(answers, device):
    """A list of B Answers -> Batch, with the entropies seen in sampling, and every answer token kept."""
    rows = [(a.ids, a.mask, a.logp, a.entropy, a.advantage * a.mask, a.mask) for a in answers]
    return Batch(*(torch.nn.utils.rnn.pad_sequence(column, batch_first=True).to(device) for column in zip(*rows)))

def micro_batches(batch, size):
    """This process's share, `size` answers at a time, up to the last token kept: (rows and columns, that part of the
    batch). All processes get equally many; one without answers left gets a question's first token, twice."""
    (rank, n), length = ranks(), batch.keep.cumsum(1).argmax(1).clamp(min=1) + 1      # 2 if none is kept
    order, size = length.argsort(descending=True), min(size, math.ceil(len(length) / n))
    for i in range(rank * size, math.ceil(len(order) / (size * n)) * size * n, size * n):
        rows = order[i:i + size] if i < len(order) else order[:1]
        columns = torch.arange(int(length[rows].max()), device=rows.device) if i < len(order) else rows.new_zeros(2)
        yield (rows[:, None], columns), Batch(*(tensor[rows[:, None], columns] for tensor in batch))

def token_logits(model, ids, where):
    """The logits that the tokens at `where` are drawn from: ids (B, T), bool (B, T) with K True -> (K, V)."""
    source = where[:, 1:]                       # t is drawn from the logits at t - 1; column 0 is always a question's
    head = model.get_output_embeddings()        # is handed K of B * (T - 1) hidden states: no (B, T, V) ever exists
    with unittest.mock.patch.object(head, "forward", lambda hidden, forward=head.forward: forward(hidden[source])):
        return model(ids[:, :-1], use_cache=False).logits

@torch.no_grad()
def policy_entropy(model, batch, temperature, size, most=2**23):
    """Entropies under the policy now, nats: (B, T), 0 outside answers. `most` logits, or one column's, at a time."""
    entropy, chunk = torch.zeros_like(batch.entropy), max(1, most // model.get_output_embeddings().weight.shape[0])
    with weights_at_hand(model):
        for place, micro in micro_batches(batch._replace(keep=batch.response_mask), size):
            H = torch.zeros_like(micro.entropy)
            hidden = model.base_model(micro.ids[:, :-1], use_cache=False)   # the layers run once, then are passed over
            with unittest.mock.patch.object(model.base_model, "forward", lambda *args, **kwargs: hidden):
                for columns in torch.arange(H.shape[1], device=H.device).split(max(1, chunk // len(H))):
                    where = torch.zeros_like(micro.response_mask)
                    where[:, columns] = micro.response_mask[:, columns]
                    H[where] = token_entropy(token_logits(model, micro.ids, where), temperature)
            entropy[place] = H
    return add_up(entropy)

def update(model, optimizer, groups, cfg, generator=None):
    """Take up to epochs * minibatches optimizer steps on groups of Answers: their mean metrics, but the first ratio.
    Threshold and normaliser are those of a whole mini-batch. A step is left out if its gradient is not finite."""
    history, n = [], ranks()[1]
    parts = [part for _ in range(cfg.epochs) for part in torch.randperm(
        len(groups), generator=generator).tensor_split(cfg.minibatches) if len(part)]
    for i, part in enumerate(parts, 1):
        bar.set_postfix_str(f"updating, mini-batch {i} of {len(parts)}")
        batch = stack([a for g in part for a in groups[g]], model.device)
        if cfg.entropy_from == "policy" and history:            # before, it is still the policy that sampled
            batch = batch._replace(entropy=policy_entropy(model, batch, cfg.temperature, cfg.micro_batch_size))
        keep = fork_mask(batch.entropy, batch.response_mask, cfg.rho, cfg.tokens, generator)
        normaliser = int((keep if cfg.normalize == "selected" else batch.response_mask).sum().clamp(min=1))
        sums = torch.zeros(4, device=model.device)
        for _, micro in micro_batches(batch._replace(keep=keep), cfg.micro_batch_size):
            logp = -F.cross_entropy(token_logits(model, micro.ids, micro.keep).float() / cfg.temperature,   # (K, V)
                                    micro.ids[micro.keep], reduction="none")                                # (K,)
            logp_old, advantage = micro.logp_old[micro.keep], micro.advantage[micro.keep]
            J = clipped_objective(logp, logp_old, advantage, cfg.clip_low, cfg.clip_high, cfg.dual_clip or None)
            (-J.sum() / normaliser * n).backward()              # FSDP takes the mean over n processes, not the sum
            change = (logp - logp_old).detach()
            low, high = change.exp() < 1 - cfg.clip_low, change.exp() > 1 + cfg.clip_high
            sums += torch.stack([J.detach().sum(), (low & (advantage < 0)).sum(), (high & (advantage > 0)).sum(),
                                 change.abs().sum()])
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        grad_norm = float(grad_norm.full_tensor() if n > 1 else grad_norm)
        total, low, high, change = add_up(sums).tolist()
        if math.isfinite(total + grad_norm):
            optimizer.step()
            H, kept = batch.entropy[batch.response_mask], max(int(keep.sum()), 1)       # "bottom" of rho 1 keeps none
            history.append({
                "loss": -total / normaliser, "entropy": float(H.mean()), "kept": float(keep.sum() / len(H)),
                "threshold": float(H[fork_mask(H, torch.ones_like(H), cfg.rho)].min()), "grad_norm": grad_norm,
                "clip_low": low / kept, "clip_high": high / kept, "ratio": math.exp(min(change / kept, 99))})
        optimizer.zero_grad()
    means = {key: sum(metrics[key] for metrics in history) / len(history) for key in (history or [{}])[0]}
    first = {"ratio": history[0]["ratio"]} if history else {"loss": None}       # of the very policy that sampled
    return means | first | {"skipped": len(parts) - len(history)}
# --------------------------------------------------------------------------------------------------- 9 Evaluate
def evaluate(model, tokenizer, problems, cfg):
    """Answer every problem eval_samples = k times at temperature 1: accuracy (avg@k), its standard error, and the share
    of problems with a right answer (pass@k). The draws are the same at every step, and change nothing in training."""
    groups = attempt(model, tokenizer, problems, cfg.eval_samples, cfg, 1.0, torch.Generator().manual_seed(cfg.seed))
    right = torch.tensor([[float(a.correct) for a in group] for group in groups])              # (P, k)
    stderr = right.mean(1).std(correction=min(1, len(right) - 1)) / math.sqrt(len(right))
    return {"accuracy": right.mean().item(), "stderr": stderr.item(), "pass_at_k": right.amax(1).mean().item()}
# ------------------------------------------------------------------------------------------------------ 10 Look
MARKED = re.compile(r"\033\[([0-9;]+)m([^\033]*)\033\[0m")      # terminal codes, word
def mark_forks(tokenizer, answer, tau, longest=200):
    """A question and its answer, coloured by entropy: from 0.01 nats blue, 0.3 orange, 1 red; from tau underlined."""
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True).replace("\033", "")
    text = decode(answer.ids[~answer.mask]).strip()[-200:] + "\n"
    for i, H in zip(answer.ids[answer.mask][:longest].tolist(), answer.entropy[answer.mask].tolist()):
        colour = "38;5;161" if H >= 1 else "38;5;172" if H >= 0.3 else "38;5;33" if H >= 0.01 else "39"
        text += f"\033[{'1;4;' * (H >= tau)}{colour}m{decode([i])}\033[0m"
    return f"{text}{' ...' * bool(answer.mask.sum() > longest)}   (reward {answer.reward:g})"

def for_terminal(text):
    """The text as it is or, where colours are not wanted, with forks [in brackets]."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return text
    return MARKED.sub(lambda match: f"[{match[2]}]" if match[1].startswith("1;") and match[2] else match[2], text)

def step_line(m, steps):
    """The metrics of a step on one line of at most 120 columns."""
    line, score = f"step {m['step']:>{len(str(steps))}}/{steps}  ", f"acc {m.get('accuracy', 0):.3f}  "
    if m["step"] == 0:
        return line + f"before training: {score}± {m['stderr']:.3f}  pass@k {m['pass_at_k']:.3f}"
    learned = f"{m['skipped']} updates left out, not finite  " if m["skipped"] else "no group is partly right  "
    if m["loss"] is not None and not m["skipped"]:
        learned = (f"H {m['entropy']:.3f} tau {m['threshold']:.3f}  kept {m['kept']:.0%} clip {m['clip_low']:5.1%} "
                   f"{m['clip_high']:5.1%}  ")
    return (f"{line}reward {m['reward']:5.2f}  {score if 'accuracy' in m else '':11}{learned}"
            f"len {m['length']:.0f} {m['tokens_per_second']:6.0f} tok/s")

def look(tokenizer, answers, min_count):
    """(80th percentile of the answers' entropies, texts: some answers, figures, words)."""
    ids = torch.cat([a.ids[a.mask] for a in answers]).numpy()                   # (N,)
    H = torch.cat([a.entropy[a.mask] for a in answers]).numpy()
    tau, count = float(np.percentile(H, 80)), np.bincount(ids)
    mean = np.bincount(ids, H) / count.clip(1)                                  # (V,)
    often = sorted(np.flatnonzero(count >= min_count), key=lambda i: mean[i])
    words = lambda chosen: ", ".join(f"{tokenizer.decode([i])!r} {mean[i]:.3f} ({count[i]})" for i in chosen)
    return tau, [mark_forks(tokenizer, a, tau) for a in answers[::max(1, len(answers) // 4)]] + [
        f"{(H < 0.01).mean():.2%} of {len(H):,} tokens are below 0.01 nats of entropy (paper, Qwen3-8B: 50.64 %);\n"
        f"the 80th percentile is {tau:.3f} nats (paper: 0.672); "
        f"deciles: {' '.join(f'{d:.4f}' for d in np.percentile(H, range(10, 100, 10)))}",
        f"forking words, by mean entropy (and count): {words(often[:-13:-1])}\nmost certain words: {words(often[:12])}"]

def entropy_change(before, after):
    """What training did to the entropies (N,) of the same tokens, under the base and under the model, in words."""
    forks, still = (fork_mask(H, torch.ones_like(H), 0.2) for H in (before, after))
    tenths = [f"{(after - before)[part].mean():+z.3f}" for part in before.argsort().tensor_split(10)]  # z: no -0.000
    return (f"{still[forks].float().mean():.1%} of the base's top 20 % of tokens are in this model's (paper: 86.67 %, "
            f"chance: 20 %)\nmean change of entropy, by tenths of the base's: {' '.join(tenths)}")

def interval(values):
    """Half the width of the 95 % confidence interval of a mean, by Student's t (with over 10 values, a bit wide)."""
    t = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)[min(len(values), 10) - 1]
    return t * float(np.std(values, ddof=min(1, len(values) - 1))) / math.sqrt(len(values))

def accuracy_chart(arms):
    """{name: [metrics of a run, one for each seed]} -> a figure (HTML), "" if nothing was evaluated."""
    figure, names, end = "", "", max((run[-1]["tokens"] for runs in arms.values() for run in runs), default=0) / 1000
    path = lambda x, y: " ".join(f"{a:.4f},{b:.4f}" for a, b in zip(x, y))
    for colour, (name, runs) in zip(itertools.cycle(COLOURS), arms.items()):
        points = np.array([[(m["tokens"] / 1000, m["accuracy"]) for m in run if "accuracy" in m] for run in runs])
        if points.size:
            x, y = points[..., 0].mean(0), points[..., 1]       # (evaluations,), (seeds, evaluations)
            names += f' <b style="color:{colour}">{html.escape(name)}</b>'
            figure += (f'<g color="{colour}" transform="translate(30 200) scale({380 / end} -200)">'
                       f'<polygon points="{path([*x, *x[::-1]], [*y.min(0), *y.max(0)[::-1]])}"/>'
                       f'<polyline points="{path(x, y.mean(0))}"/></g>')
    grid = "".join(f'<text y="{204 - 50 * i}">{i / 4}</text><path d="M30 {200 - 50 * i}h380"/>' for i in range(5))
    return figure and (f"<p>accuracy, mean and range of seeds, in the course of {end:,.0f} thousand tokens:{names}</p>"
                       f'<svg viewBox="0 -5 430 210">{grid}{figure}</svg>')
COLOURS = "#e0206b", "#2b8ae2", "#d78700", "#8a929a", "#2f9e44", "#8258f0"
STYLE = """:root{color-scheme:light dark;font:16px system-ui} body{max-width:1000px;margin:auto;padding:12px}
    pre{white-space:pre-wrap;overflow:auto;font-size:13px} svg{max-width:600px;font-size:11px} path{stroke:#8888}
    text,polygon{fill:currentColor} polygon{opacity:.2} [class^="1;"]{font-weight:bold;text-decoration:underline}
    polyline{fill:none;stroke:currentColor;vector-effect:non-scaling-stroke;stroke-width:2}
    [class$="33"]{color:#2b8ae2} [class$="172"]{color:#d78700} [class$="161"]{color:#e0206b}"""

def report(out, title, figure, texts):
    """Write out/report.html, a page that needs no network and no script."""
    title, text = html.escape(title), MARKED.sub(r'<span class="\1">\2</span>', html.escape("\n\n".join(texts)))
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{figure}<pre>{text}</pre>\n")
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(page, "utf-8")
# ------------------------------------------------------------------------------------------------------ 11 Save
WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)         # gathered from all processes
MAY_CHANGE = {"steps", "out", "resume", "save_every", "sample_batch_size", "micro_batch_size", "gradient_checkpointing"}
def begin(cfg):
    """(folder of the run, checkpoint to go on from or None, state of the trainer). Raises UserError."""
    out = Path(cfg.out or f"out/{Path(cfg.model).name}-{cfg.tokens}-seed{cfg.seed}")
    saved = [path for path in (out / "model", out / "model.before") if (path / "trainer.pt").exists()]
    if not cfg.resume and (out / "metrics.jsonl").exists():
        raise UserError(f"--out {out}: holds a run already; go on with it by --resume, or choose another folder")
    if not (cfg.resume and saved):
        return out, None, {"settings": vars(cfg), "history": [], "queue": []}
    state = torch.load(saved[0] / "trainer.pt", weights_only=True, mmap=True)
    other = [f"--{key.replace('_', '-')} {value} (it was {state['settings'][key]})" for key, value in vars(cfg).items()
             if key not in MAY_CHANGE and value != state["settings"][key]]
    if other:
        raise UserError(f"--resume: {out} holds a run with other settings, {', '.join(other)}; choose another folder")
    return out, saved[0], state | {"settings": vars(cfg)}

def save(model, tokenizer, optimizer, state, out):
    """Write the checkpoint out/model: a folder of transformers', and trainer.pt for --resume. It is written aside, so
    that whenever this is cut short a whole one is left, there or, the one before, in out/model.before."""
    weights = states.get_model_state_dict(model, options=WHOLE)
    moments = states.get_optimizer_state_dict(model, optimizer, options=WHOLE) if optimizer.state else None
    part, now, before = (out / name for name in ("model.part", "model", "model.before"))
    if ranks()[0] > 0:
        return
    try:
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, state_dict={k: weights[k] for k in weights if k not in model.all_tied_weights_keys})
        tokenizer.save_pretrained(part)
        torch.save(state | {"optimizer": moments}, part / "trainer.pt")
        if now.exists():
            shutil.rmtree(before, ignore_errors=True)
            now.rename(before)
        part.rename(now)
    except Exception as error:
        raise UserError(f"cannot save to {out} ({error}); what was saved there before is intact") from None

stop = []                                                       # numbers of the signals that have asked train() to stop
def ask_to_stop(number, frame):
    """Ctrl-C or SIGTERM ends the run after this step; a second one at once."""
    if stop and not dist.is_initialized():                      # torchrun may send again what the terminal has sent
        os._exit(128 + number)
    stop.append(number)
    print("\nstopping after this step, then saving (once more: quit at once, unsaved)", file=sys.stderr)
# ------------------------------------------------------------------------------------------------------- 12 Run
def check_settings(cfg):
    """Raise UserError for a setting that makes no sense; read --prompt if it is @FILE."""
    most = {"rho": 1, "rhos": 1, "overlong_buffer": cfg.max_new_tokens}
    least = {"rho": 1e-6, "rhos": 1e-6, "temperature": 1e-6, "group_size": 2, "eval_every": 0}
    for field in dataclasses.fields(cfg):
        key, value = field.name, getattr(cfg, field.name)
        low, high = least.get(key, int(type(field.default) is int and field.default > 0)), most.get(key, 2**63 - 1)
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and not low <= number <= high:
                raise UserError(f"--{key.replace('_', '-')} {number}: must be a number from {low} to {high}")
    if 0 < cfg.dual_clip <= 1:
        raise UserError(f"--dual-clip {cfg.dual_clip}: must be above 1, or 0 for none")
    if cfg.prompt.startswith("@"):
        cfg.prompt = Path(cfg.prompt[1:]).read_text("utf-8", "replace")
    if "{question}" not in PROMPTS.get(cfg.prompt, cfg.prompt):
        raise UserError(f"--prompt: must be {', '.join(PROMPTS)}, or a text with {{question}} in it, or @FILE")

def load(cfg, saved=None):
    """(model, tokenizer, problems to train on, problems to test on), as cfg says. saved: a checkpoint of the model."""
    try:
        device = torch.empty(0, device=cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {cfg.device}: is not to be had here; try --device cpu") from None
    model, tokenizer = load_policy(saved or cfg.model, device, cfg.dtype, cfg.gradient_checkpointing)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 40) - cfg.max_new_tokens
    test = Path(cfg.eval_data or Path(cfg.data).with_name("test.jsonl"))
    held_out = [test] if cfg.eval_every and (cfg.eval_data or (test.exists() and test != Path(cfg.data))) else []
    problems, *tests = (load_problems(path, tokenizer, cfg.prompt, room) for path in (cfg.data, *held_out))
    return model, tokenizer, problems, tests[0] if tests else []

def rollout(model, tokenizer, problems, queue, cfg, generator):
    """Sample and check groups until prompts_per_step of them are partly right, in at most resample_rounds rounds: one
    that is all right or all wrong has nothing to teach. Returns (those groups, metrics of all that were sampled)."""
    everything, mixed = [], []
    for _ in range(cfg.resample_rounds):
        missing = cfg.prompts_per_step - len(mixed)
        while len(queue) < missing:                             # numbers of the problems to come, in a shuffled order
            queue += torch.randperm(len(problems), generator=generator).tolist()
        chosen = [problems[queue.pop(0)] for _ in range(missing)]
        groups = attempt(model, tokenizer, chosen, cfg.group_size, cfg, cfg.temperature, generator)
        everything += [a for group in groups for a in group]
        mixed += [group for group in groups if 0 < sum(a.correct for a in group) < len(group)]
    tokens, n = sum(int(a.mask.sum()) for a in everything), len(everything)
    return mixed, {"reward": sum(a.reward for a in everything) / n, "length": tokens / n, "groups_kept": len(mixed),
                   "truncated": sum(not a.finished for a in everything) / n, "tokens": tokens}

def train(cfg):
    """Train as cfg says, or go on with it; write log, checkpoints and report. Returns the log. Raises UserError."""
    global bar
    out, saved, state = begin(cfg)
    model, tokenizer, problems, tests = load(cfg, saved)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    generator, history, groups, bad = torch.Generator().manual_seed(cfg.seed), state["history"], [], 0
    generator.set_state(state.get("generator", generator.get_state()))
    if moments := state.pop("optimizer", None):
        states.set_optimizer_state_dict(model, optimizer, moments, options=WHOLE)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(vars(cfg), indent=1) + "\n", "utf-8")
    print(textwrap.fill("  ".join(f"{key}={value}" for key, value in vars(cfg).items()), 118, break_on_hyphens=False))
    print(f"{model.num_parameters():,} parameters on {ranks()[1]} x {model.device.type}; {len(problems)} questions, "
          f"{len(tests)} to test" + f"; going on with {saved}" * bool(saved))
    bar = tqdm(total=cfg.steps, leave=False, disable=ranks()[0] > 0 or None)    # None: unless on a terminal
    with open(out / "metrics.jsonl" if ranks()[0] == 0 else os.devnull, "w") as log, bar:
        def record(metrics):
            print(json.dumps(metrics), file=log, flush=True)
            history.append(metrics)
            bar.write(step_line(metrics, cfg.steps))
        last = {"step": 0, "tokens": 0, "seconds": 0.0}
        log.writelines(json.dumps(last := metrics) + "\n" for metrics in history)
        try:
            if tests and not history:
                record(last | evaluate(model, tokenizer, tests, cfg))
            for step in range(last["step"] + 1, cfg.steps + 1):
                start = time.perf_counter()
                groups, sampled = rollout(model, tokenizer, problems, queue := [*state["queue"]], cfg, generator)
                learned = update(model, optimizer, groups, cfg, generator)
                took = time.perf_counter() - start              # evaluation is not counted
                last = {"step": step, **sampled, **learned, "tokens_per_second": sampled["tokens"] / took,
                        "tokens": last["tokens"] + sampled["tokens"], "seconds": last["seconds"] + took}
                if tests and (step % cfg.eval_every == 0 or step == cfg.steps):
                    last |= evaluate(model, tokenizer, tests, cfg)
                record(last)
                state |= {"generator": generator.get_state(), "queue": queue}
                if "accuracy" in last and "threshold" in last:
                    marked = mark_forks(tokenizer, groups[0][0], last["threshold"])
                    bar.write(textwrap.indent(for_terminal(marked), "    "))
                bar.update(step - bar.n)
                if (bad := bad + 1 if learned["skipped"] else 0) == 5:
                    raise UserError("five steps in a row had a loss or gradient that is not finite; try a lower --lr")
                stopping = add_up(torch.tensor(len(stop), device=model.device)).item()          # in any process
                if stopping or step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0):
                    save(model, tokenizer, optimizer, state, out)
                if stopping and add_up(torch.ones(1, device=model.device)):     # once the first process has saved
                    raise SystemExit(128 + (stop or [signal.SIGTERM])[0])
        except Exception:                       # what was trained is on disk, the step that failed as far as it got
            if ranks()[1] == 1:                                 # with more, the others would have to take part
                save(model, tokenizer, optimizer, state, out)
            raise
    if ranks()[0] == 0 and (groups or not (out / "report.html").exists()):
        report(out, f"{cfg.model}, trained on {cfg.tokens} tokens", accuracy_chart({cfg.tokens: [history]}),
               look(tokenizer, [a for group in groups for a in group], cfg.min_count)[1] if groups else [])
    scores = [m["accuracy"] for m in history if "accuracy" in m]
    print(f"accuracy {scores[0]:.3f} -> {scores[-1]:.3f}" if scores else "done", f"in {last['step']} steps, "
          f"{last['tokens']:,} tokens and {last['seconds']:.0f} s; the model and report.html are in {out}")
    return history

def compare(cfg):
    """Train on each kind of tokens with each seed, or reuse the runs below --out; print a table and write a report."""
    if not load(cfg)[-1]:
        raise UserError("--compare needs questions to test on, --eval-data, and --eval-every above 0")
    out, arms = Path(cfg.out or f"out/{Path(cfg.model).name}-compare"), {}
    kinds = {f"top {rho:.3g}": ("top", rho) for rho in (cfg.rho, *cfg.rhos)} | {"all": ("all", cfg.rho)}
    kinds |= {f"random {cfg.rho:.3g}": ("random", cfg.rho), f"bottom {1 - cfg.rho:.3g}": ("bottom", cfg.rho)}
    for seed, (name, (tokens, rho)) in itertools.product(range(cfg.seed, cfg.seed + cfg.seeds), kinds.items()):
        run = dataclasses.replace(cfg, compare=False, rhos=[], seeds=1, resume=True, tokens=tokens, rho=rho, seed=seed,
                                  out=str(out / f"{tokens}-{rho:g}-seed{seed}"))
        try:
            arms[name] = [*arms.get(name, []), train(run)]
        except (Exception if ranks()[1] == 1 else ()) as error:         # of several processes, none can go on alone
            print(f"this run failed and is left out ({type(error).__name__}: {error})", file=sys.stderr)
    if not arms:
        raise UserError(f"--compare: no run in {out} has come to its end, see above")
    both = set.intersection(*({m["step"] for m in run if "accuracy" in m} for runs in arms.values() for run in runs))
    arms = {name: [[m for m in run if "accuracy" not in m or m["step"] in both] for run in arms[name]] for name in arms}
    table = "tokens        accuracy, 95%    best   area  to .60  to .80  length  entropy  updated  seconds  seeds\n"
    line = "{:12}  {:.3f} ± {:5.3f}   {:.3f}  {:.3f}  {:6.1f}  {:6.1f}  {:6.1f}  {:7.3f}  {:7.1%}  {:7.0f}  {:5}\n"
    for name, runs in arms.items():
        steps = [m["step"] for m in runs[0] if "accuracy" in m]
        scores = np.array([[m["accuracy"] for m in run if "accuracy" in m] for run in runs])    # (seeds, evaluations)
        reach = lambda level: np.mean([next((s for s, y in zip(steps, row) if y >= level), math.nan) for row in scores])
        last = lambda key: np.mean([run[-1].get(key, math.nan) for run in runs])
        table += line.format(name, scores[:, -1].mean(), interval(scores[:, -1]), scores.max(1).mean(),
                             np.trapezoid(scores.mean(0), steps) / steps[-1], reach(0.6), reach(0.8), last("length"),
                             last("entropy"), last("kept"), last("seconds"), len(runs))
    print("\n" + (table := table.replace("nan%", "  - ").replace("nan", "  -")))
    report(out, "Which tokens to train on", f'{accuracy_chart(arms)}<pre style="white-space:pre">{table}</pre>', [])

def show(cfg):
    """Look at a model: its forks and entropies; with --base, what training changed; and where heat does harm."""
    model, tokenizer, problems, tests = load(cfg)
    problems, grid = (tests or problems)[:cfg.prompts_per_step], (0, 0.5, 1, 1.5, 2, 3)
    answers_at = lambda temperature: sum(attempt(model, tokenizer, problems, cfg.group_size, cfg, temperature,
                                                 torch.Generator().manual_seed(cfg.seed)), [])
    answers = answers_at(1.0)
    tau, texts = look(tokenizer, answers, cfg.min_count)
    print(*map(for_terminal, texts), sep="\n\n")
    if cfg.base:
        batch, base = stack(answers, model.device), load_policy(cfg.base, model.device, cfg.dtype)[0]
        before = policy_entropy(base, batch, 1.0, cfg.micro_batch_size)[batch.response_mask].cpu()
        texts.append(entropy_change(before, batch.entropy[batch.response_mask].cpu()))
        tau = float(np.percentile(before, 80))                  # as in the paper, from here on
        print(f"\n{texts[-1]}")
    table = (f"accuracy with forks (H > {tau:.3f} nats), or all the rest, at another temperature than 1\n"
             f"temperature{''.join(f'{T:6}' for T in grid)}")
    for name in "forks", "rest":
        table += f"\n{name:11}"
        for T in grid:
            answers = answers_at(lambda H: torch.where((H > tau) == (name == "forks"), T, 1.0))
            table += f"{np.mean([a.correct for a in answers]):6.2f}"
    out = Path(cfg.out or f"out/{'-'.join(Path(cfg.model).parts[-2:])}-show")
    report(out, f"The forks of {cfg.model}", "", [*texts, table])
    print(f"\n{table}\n\n{out / 'report.html'} shows this, too")

def main(argv=None):
    """The command line; also to be called from Python, with a list of strings. Bad input ends in SystemExit(2)."""
    def fail(message):
        raise UserError(f"{message} (--help lists all flags)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = transformers.HfArgumentParser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    try:
        cfg = Config(**vars(parser.parse_args(argv)))
        check_settings(cfg)
        join()
        for number in () if cfg.show else (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask_to_stop)
        (show if cfg.show else compare if cfg.compare else train)(cfg)
        if dist.is_initialized():                               # leave at once: threads by which the processes talked
            os._exit(sys.stdout.flush() or 0)                   # can still be awake, and abort Python's orderly end
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        hint = "" if isinstance(error, (UserError, OSError)) else (
            "; a lower --sample-batch-size, or --micro-batch-size and --gradient-checkpointing, needs less")
        if hint and not re.search("out of memory|allocate|MemoryError", repr(error)):
            raise
        process = [f"(process {ranks()[0]})"] * (ranks()[1] > 1)
        print(f"forking.py: {str(error) or 'out of memory'}{hint}", *process, file=sys.stderr)
        raise SystemExit(2) from None
# ------------------------------------------------------------------------------- 13 Precision, several processes
def join():
    """Meet the other processes, if torchrun has started any. Each answers its share of the questions and takes the
    gradient of its share of the answers; all the rest each does for itself, and alike. Only the first one prints."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=datetime.timedelta(hours=2))    # one may wait for another that still samples
        sys.stdout = sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")

def ranks():
    """(number of this process, number of all): (0, 1), unless torchrun has started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def add_up(tensor):
    """The sum, in every process, of the tensors that the processes bring along."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def prepare(model, device, dtype, checkpointing):
    """The model on the device, to compute in float32 or bfloat16, and with or without keeping activations. Its weights
    stay float32: a shard of each layer in every process of a machine, copies of these on the other machines (FSDP2)."""
    transformers.activations.NewGELUActivation.forward = lambda _, x: F.gelu(x, approximate="tanh")     # in one go
    for weight in model.parameters():                           # aligned anew: where a file happens to lie in memory
        weight.data = weight.data.clone()                       # decides about the last bit of a matrix product
    half = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers if checkpointing else []:
        layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    if ranks()[1] > 1:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        mesh = dist.init_device_mesh(device.type, (ranks()[1] // local, local), mesh_dim_names=("copy", "shard"))
        policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32)          # to compute, to add up
        for part in (*layers, model):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)         # but after the backward
    elif half:
        model.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16)
        model.forward = model.autocast()(model.forward)
    return model.to(device)

def weights_at_hand(model):
    """A context for many forward passes without gradient: in it, the weights have been fetched from other processes
    (until the next backward pass shards them again), and are cast to bfloat16 only once."""
    for module in [module for module in model.modules() if isinstance(module, FSDPModule)]:
        module.unshard()
    return getattr(model, "autocast", contextlib.nullcontext)()

if __name__ == "__main__":
    main()

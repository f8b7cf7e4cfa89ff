#!/usr/bin/env python3
"""Make the tiny world: problems to train and to test on, and a base model to train.

    python tiny_data/make.py                                  # train.jsonl, test.jsonl, gpt2/
    python tiny_data/make.py --layers 2 --width 64 --out DIR  # a base model of another size

A problem is arithmetic with precedence, 3+4*5-2=?, in which working from left to right gives a
wrong result. The base model calculates well and chooses badly: the corpus that it imitates is
full of people who do it wrong. Each writes one calculation after the other:

    3+4=7; 7*5=35; 35-2=33. Answer: 33               from left to right (half of them)
    5-2=3; 4*3=12; 3+12=15. Answer: 15               whichever operation comes to mind (3 in 10)
    4*5=20; 3+20=23; 23-2=21. Answer: 21             by the rules (1 in 5)
    3+4=7 wait 4*5=20; 3+20=23; 23-2=21. Answer: 21  now and then one takes a wrong step back

So the base model knows every sum, and wherever it chooses which operation comes next, its
entropy is high: a forking token.
"""

import argparse
import itertools
import json
import math
import operator
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    logging,
)

TRAIN, TEST, LARGEST = 3000, 300, 99
RULES, LEFT_TO_RIGHT = 0.2, 0.5  # shares of the corpus; the rest picks any operation
NOTICES = 0.06  # probability of noticing a wrong step, each time one is made
CALCULATE = {"+": operator.add, "-": operator.sub, "*": operator.mul}


# ---------------------------------------------------------------- problems


def apply(numbers, signs, i):
    """Carry out the i-th operation: (3, 4, 5), (+, *), 1 -> (3, 20), (+,)."""
    result = CALCULATE[signs[i]](numbers[i], numbers[i + 1])
    return (*numbers[:i], result, *numbers[i + 2 :]), (*signs[:i], *signs[i + 1 :])


def by_the_rules(signs):
    """Index of the operation that precedence demands next: the first product, or the first."""
    return signs.index("*") if "*" in signs else 0


def solve(numbers, signs, choose):
    while signs:
        numbers, signs = apply(numbers, signs, choose(signs))
    return numbers[0]


def within_range(numbers, signs):
    """True if every result stays within 0 to LARGEST, whatever the order of the operations."""
    return all(0 <= n <= LARGEST for n in numbers) and all(
        within_range(*apply(numbers, signs, i)) for i in range(len(signs))
    )


def all_problems():
    """Every problem of 3 or 4 numbers from 1 to 9, one product, that left to right gets wrong.

    Returns [(numbers, signs)].
    """
    return [
        (numbers, signs)
        for n in (3, 4)
        for signs in itertools.product("+-*", repeat=n - 1)
        if signs.count("*") == 1
        for numbers in itertools.product(range(1, 10), repeat=n)
        if within_range(numbers, signs)
        and solve(numbers, signs, by_the_rules) != solve(numbers, signs, lambda _: 0)
    ]


def question(numbers, signs):
    return "".join(f"{n}{s}" for n, s in zip(numbers, (*signs, ""), strict=True)) + "=?"


# ---------------------------------------------------------------- people who wrote the corpus


def safe(numbers, signs, i):
    """True if carrying out operation i next does not change the value of the expression."""
    return solve(*apply(numbers, signs, i), by_the_rules) == solve(numbers, signs, by_the_rules)


def worked_solution(numbers, signs, rng, chatter=0):
    """One person's solution. Before each step come chatter letters, which mean nothing."""
    person = rng.random()
    text = ""
    while signs:
        text += "".join(rng.choices("abcdefgh", k=chatter))
        if person < RULES:
            i = by_the_rules(signs)
        else:
            i = 0 if person < RULES + LEFT_TO_RIGHT else rng.randrange(len(signs))
        after = apply(numbers, signs, i)
        text += f"{numbers[i]}{signs[i]}{numbers[i + 1]}={after[0][i]}"
        if not safe(numbers, signs, i) and rng.random() < NOTICES:
            text, person = text + " wait ", 0  # take the step back and go on by the rules
            continue
        numbers, signs = after
        text += "; " if signs else f". Answer: {numbers[0]}"
    return text


# ---------------------------------------------------------------- tokenizer and base model


def make_tokenizer():
    """A token for each printable character, and for each of the three phrases of a solution."""
    words = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    words += ["; ", " wait ", ". Answer: "]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"; | wait |\. Answer: |[\s\S]"), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def pretrain(problems, tokenizer, args):
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=128,
            n_layer=args.layers,
            n_embd=args.width,
            n_head=max(2, args.width // 32),
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            activation_function="gelu_pytorch_tanh",  # gelu_new in one operation
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"base model: {model.num_parameters():,} parameters", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(
            (s + 1) / 100, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * s / args.pretrain_steps))
        ),
    )
    start = time.time()
    for step in range(1, args.pretrain_steps + 1):
        batch = [rng.choice(problems) for _ in range(args.batch_size)]
        prompts = [tokenizer.encode(question(*p) + "\n") for p in batch]
        answers = [
            tokenizer.encode(worked_solution(*p, rng, args.chatter)) + [tokenizer.eos_token_id]
            for p in batch
        ]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids, labels = [], []
        for p, a in zip(prompts, answers, strict=True):
            padding = length - len(p) - len(a)
            ids.append(p + a + [tokenizer.pad_token_id] * padding)
            labels.append([-100] * len(p) + a + [-100] * padding)
        ids, labels = torch.tensor(ids), torch.tensor(labels)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.time() - start
            print(f"step {step}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    return model


# ---------------------------------------------------------------- how good it is

STEP = re.compile(r"[a-h]*(\d+)([-+*])(\d+)=(\d+)")


def count_steps(numbers, signs, text):
    """(right, all) single steps.

    A right one carries out an operation that is there to be carried out, and gets its result
    right. Counting ends at the first wrong one, since what follows it cannot be judged.
    """
    right, steps = 0, re.split(r"(; | wait |\. Answer: )", text)
    for written, then in zip(steps[::2], steps[1::2], strict=False):
        match = STEP.fullmatch(written)
        options = {
            question(*((numbers[i], numbers[i + 1]), (signs[i],)))[:-2]: i
            for i in range(len(signs))
        }
        i = options.get(written.strip("abcdefgh").split("=")[0])
        if not match or i is None or apply(numbers, signs, i)[0][i] != int(match[4]):
            return right, right + 1
        right += 1
        if then != " wait ":
            numbers, signs = apply(numbers, signs, i)
    return right, right


@torch.no_grad()
def judge(model, tokenizer, problems, samples):
    """Sample with transformers' generate(); print how well the model calculates and chooses."""
    torch.manual_seed(0)
    batch = tokenizer(
        [question(*p) + "\n" for p in problems], return_tensors="pt", padding=True
    )
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    out = model.generate(**batch, **plain, max_new_tokens=64, num_return_sequences=samples)
    texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    solved = right = steps = 0
    for n, text in enumerate(texts):
        numbers, signs = problems[n // samples]
        solved += text.endswith(f". Answer: {solve(numbers, signs, by_the_rules)}")
        r, s = count_steps(numbers, signs, text)
        right, steps = right + r, steps + s
    print(
        f"single steps right: {right / steps:.2%} of {steps:,}; accuracy on test.jsonl at "
        f"temperature 1: {solved / len(texts):.3f} ({samples} samples of each of "
        f"{len(problems)} problems)"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--width",
        type=int,
        default=128,
        help="of the residual stream; one attention head per 32",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder for the three results"
    )
    parser.add_argument("--pretrain-steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--chatter", type=int, default=0, help="letters without meaning before each step"
    )
    args = parser.parse_args()
    torch.set_num_threads(2)  # another number would add up in another order
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    args.out.mkdir(parents=True, exist_ok=True)
    problems = all_problems()
    random.Random(0).shuffle(problems)
    test, train, seen = problems[:TEST], problems[TEST : TEST + TRAIN], problems[TEST:]
    print(
        f"{len(problems):,} problems: {TRAIN} to train.jsonl, {TEST} to test.jsonl; the corpus "
        "is about all but the latter"
    )
    for name, rows in ("train.jsonl", train), ("test.jsonl", test):
        with open(args.out / name, "w", encoding="utf-8") as file:
            for p in rows:
                answer = str(solve(*p, by_the_rules))
                print(json.dumps({"question": question(*p), "answer": answer}), file=file)

    tokenizer = make_tokenizer()
    model = pretrain(seen, tokenizer, args)
    model.half().save_pretrained(args.out / "gpt2")
    tokenizer.save_pretrained(args.out / "gpt2")
    model = AutoModelForCausalLM.from_pretrained(
        args.out / "gpt2", dtype=torch.float32
    )  # judged as others will load it
    judge(model, AutoTokenizer.from_pretrained(args.out / "gpt2"), test, samples=8)


if __name__ == "__main__":
    main()

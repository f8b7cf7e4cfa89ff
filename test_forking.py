"""The tests of forking.py, in the order of its sections: those of the lesson come first.

They are the second text of the course: each name says what holds, and each number can be worked
out by hand, or comes from elsewhere: a plain loop over tokens, a plain forward pass without
cache and padding, transformers' generate(), torch.distributions. To run them:

    pytest -q test_forking.py
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network

import contextlib
import copy
import doctest
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.distributions import Categorical
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import forking
from forking import (
    Completion,
    Config,
    Problem,
    UserError,
    clipped_objective,
    collate,
    draw,
    evaluate,
    extract_answer,
    fork_mask,
    grade,
    group_advantages,
    is_correct,
    load_policy,
    logits_at,
    policy_entropy,
    rollout,
    sample,
    sample_and_grade,
    token_entropy,
    train,
    update,
)

TINY = Path(forking.__file__).resolve().parent / "tiny_data"
ENDS = [1, 17, 40, 64, 77, 90]  # end tokens of the random models; 1 is the tokenizer's
torch.set_num_threads(1)  # enough for models this small


def config(**flags):
    """A Config on the CPU."""
    return Config(**{"device": "cpu", "max_new_tokens": 16} | flags)


def seeded(seed=0):
    """A random generator."""
    return torch.Generator().manual_seed(seed)


def flat(groups):
    """The completions of all groups in one list."""
    return list(itertools.chain.from_iterable(groups))


def answer_of(completion):
    """The ids of the tokens of its answer."""
    return completion.ids[completion.response_mask].tolist()


def read(model, ids, temperature=1.0):
    """(T, V) log-probabilities before each of (T,) tokens, by one plain forward pass."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double() / temperature
    return F.pad(logits, (0, 0, 1, 0))[:-1].log_softmax(-1)  # nothing predicts the first token


def written(prompt, answer, advantage=0.0, model=None, text=""):
    """A Completion made by hand, of two lists of ids, as though the model had drawn it."""
    ids = torch.tensor([*prompt, *answer])
    mask = torch.arange(len(ids)) >= len(prompt)
    logp, entropy = torch.zeros(2, len(ids))
    if model:
        logprobs = read(model, ids)
        logp = (logprobs.gather(1, ids[:, None])[:, 0] * mask).float()
        entropy = (Categorical(logits=logprobs).entropy() * mask).float()
    rest = {"length": len(answer), "truncated": False, "advantage": advantage * mask}
    return Completion(ids, mask, logp, entropy, text, **rest)


def hands_out(*scores):
    """A reward function that gives these scores in turn, and notes for which targets."""
    left, targets = itertools.cycle(scores), []

    def reward(text, target):
        targets.append(target)
        return next(left)

    reward.targets = targets
    return reward


@pytest.fixture(scope="session")
def models():
    """A random GPT-2, Qwen3 and Gemma 3.

    The output layers of GPT-2 and Gemma 3 are tied to the embeddings, Qwen3's is not; only
    GPT-2 learns its positions; Gemma 3 looks 7 tokens back. Their weights are large, so that
    some tokens are much likelier than others.
    """
    size = {"vocab_size": 102, "initializer_range": 0.3, "pad_token_id": 0}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    llama |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    window = {"sliding_window": 7, "sliding_window_pattern": 2, "final_logit_softcapping": 9.0}
    configs = {
        "gpt2": transformers.GPT2Config(**gpt2, **size),
        "qwen3": transformers.Qwen3Config(**llama, **size, tie_word_embeddings=False),
        "gemma3": transformers.Gemma3TextConfig(**llama, **size, **window),
    }
    torch.manual_seed(0)
    made = {}
    for name, shape in configs.items():
        made[name] = transformers.AutoModelForCausalLM.from_config(shape).eval()
        made[name].generation_config.eos_token_id = ENDS
    return made


@pytest.fixture(params=["gpt2", "qwen3", "gemma3"])
def model(request, models):
    """Each of the models in turn."""
    return models[request.param]


@pytest.fixture(scope="session")
def gpt2(models):
    """The random GPT-2, for tests of what does not depend on the architecture."""
    return models["gpt2"]


@pytest.fixture(scope="session")
def tokenizer():
    """Of 102 tokens: 0 is padding, 1 ends a text, 20 to 29 are the digits."""
    return transformers.AutoTokenizer.from_pretrained(TINY / "gpt2")


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Four, of different lengths, so that all but the longest need padding."""
    questions = ("1+2*3", "4+5*6-1", "7", "3*3-2+1*9")
    return [tokenizer.encode(f"{question}=?\n") for question in questions]


@pytest.fixture(scope="session")
def problems(prompts):
    """The prompts as Problems, whose targets are their numbers, 0 to 3."""
    return [Problem("?", str(i), ids, "") for i, ids in enumerate(prompts)]


# ------------------------------------------------------------------------------------- Training
@pytest.fixture
def small(tmp_path, gpt2, tokenizer):
    """Makes the Config of a short run of the random GPT-2: 9 questions, and 3 to test on."""
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    lines = [f'{{"question": "{i}+1=?", "answer": "{i + 1}"}}\n' for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(lines[:9]))
    (tmp_path / "test.jsonl").write_text("".join(lines[9:]))
    flags = {"model": f"{tmp_path}/gpt2", "data": f"{tmp_path}/train.jsonl"}
    flags |= {"prompts_per_step": 4, "group_size": 4, "eval_every": 0, "save_every": 0}
    return functools.partial(config, out=f"{tmp_path}/run", **flags)


def test_a_few_steps_of_training_raise_the_reward(small):
    """Here, answers are the better the more digits they have; at first, one token in ten."""

    def reward(text, target):
        return sum(character.isdigit() for character in text)

    log = train(small(reward=reward, steps=4, eval_every=4, lr=2e-2, group_size=8))
    assert log[4]["reward"] > 3 * log[1]["reward"]
    assert log[4]["accuracy"] > 3 * log[0]["accuracy"]


def test_a_run_tests_saves_and_stops_when_told(small, monkeypatch):
    """Step 0 is before training."""
    saved, learning = [], []

    def save(step, model, tokenizer, optimizer, *_):
        saved.append(step)
        learning.append((optimizer.defaults["lr"], optimizer.defaults["weight_decay"]))
        if step == 2:
            forking.STOP.append(2)  # as Ctrl-C does

    monkeypatch.setattr(forking, "STOP", [])
    monkeypatch.setattr(forking, "save_checkpoint", save)
    flags = {"lr": 3e-6, "weight_decay": 0.7}
    log = train(small(**flags, steps=5, eval_every=2, save_every=3))
    assert [entry["step"] for entry in log] == [0, 1, 2, 3, 4, 5]
    assert [entry["step"] for entry in log if "accuracy" in entry] == [0, 2, 4, 5]
    assert [entry["step"] for entry in log if "updates" in entry] == [1, 2, 3, 4, 5]
    assert (saved, learning) == ([3, 5], [(3e-6, 0.7)] * 2)

    log = train(small(steps=0, eval_every=9, save_every=1))
    assert [("accuracy" in entry, "updates" in entry) for entry in log] == [(True, False)]

    with pytest.raises(KeyboardInterrupt):
        train(small(steps=9, save_every=2))
    assert saved == [3, 5, 2, 3]  # nothing at step 0; asked at step 2, it ends with step 3


def test_the_log_counts_the_flat_groups_too(small):
    """Groups of 2 whose scores are 1 1, 1 0, 0 1, 1 1: a mean of 0.75, and two groups teach."""
    reward = hands_out(1, 1, 1, 0, 0, 1, 1, 1)
    log = train(small(group_size=2, resample_rounds=1, steps=2, reward=reward))
    for entry in log[1:]:
        assert (entry["reward"], entry["groups_kept"], entry["updates"]) == (0.75, 2, 2)
    assert len({*reward.targets}) == 8  # the second step asks what the first has not


def test_the_same_seed_repeats_a_run_and_another_does_not(small, tmp_path):
    """Even of random tokens."""
    runs = []
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        flags = {"tokens": "random", "seed": seed, "out": f"{tmp_path}/{name}"}
        runs.append(train(small(**flags, steps=2, lr=1e-3, reward=hands_out(1, 0))))
        for entry in runs[-1]:
            del entry["seconds"], entry["tokens_per_second"]
    first, again, other = runs
    assert first == again != other


# ------------------------------------------------------------------------------------- 1 Sample
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_draws_and_records_what_a_plain_forward_pass_gives(
    model, tokenizer, prompts, temperature
):
    """In spite of cache and padding, of a prompt that is shared, and of rows that have left.

    A token is the first whose cumulative probability exceeds its random number. A GPT-2 with
    padding on the left, but without position_ids, would fail.
    """
    cfg = config(max_new_tokens=24, temperature=temperature)
    groups = sample(model, tokenizer, prompts, 3, [5, 6, 7, 8], cfg)
    assert len({completion.length for completion in flat(groups)}) > 2

    for prompt, seed, group in zip(prompts, [5, 6, 7, 8], groups, strict=True):
        uniform = torch.rand(3, 24, dtype=torch.float64, generator=seeded(seed))
        for completion, numbers in zip(group, uniform, strict=True):
            answer, mask = answer_of(completion), completion.response_mask
            assert completion.ids.tolist() == prompt + answer
            assert mask.tolist() == [False] * len(prompt) + [True] * completion.length

            logprobs = read(model, completion.ids, temperature)  # (T, V)
            for p, u, token in zip(logprobs[mask].exp(), numbers, answer, strict=False):
                assert (p.cumsum(0) > u).nonzero()[0, 0] == token
            logp = logprobs.gather(1, completion.ids[:, None])[:, 0] * mask
            entropy = Categorical(logits=logprobs).entropy() * mask
            assert torch.allclose(completion.logp_old.double(), logp, atol=2e-4)
            assert torch.allclose(completion.entropy.double(), entropy, atol=2e-4)


def test_greedy_completions_are_those_of_transformers_generate(model, tokenizer, prompts):
    """Next to temperature 0, all is certain: entropies are 0, and probabilities are 1."""
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
    theirs = model.generate(**batch, do_sample=False, max_new_tokens=24)
    cfg = config(max_new_tokens=24, temperature=1e-6)
    groups = sample(model, tokenizer, prompts, 1, range(4), cfg)
    for (ours,), their in zip(groups, theirs, strict=True):
        expected = their[batch.input_ids.shape[1] :].tolist()
        assert answer_of(ours) == expected[: ours.length]
        assert set(expected[ours.length :]) <= {tokenizer.pad_token_id}
        assert max(ours.entropy.max(), -ours.logp_old.min()) < 1e-3


def test_a_completion_does_not_depend_on_the_batch_it_is_in(model, tokenizer, problems):
    """Nor on how many are sampled at a time. Each prompt has a seed of its own."""
    together, *apart = (
        flat(sample_and_grade(model, tokenizer, problems, 3, config(sample_batch_size=size)))
        for size in (256, 7, 1)
    )
    for other in apart:
        for a, b in zip(together, other, strict=True):
            assert a.ids.tolist() == b.ids.tolist()
            assert (a.text, a.truncated) == (b.text, b.truncated)
            assert torch.allclose(a.logp_old, b.logp_old, atol=2e-4)
            assert torch.allclose(a.entropy, b.entropy, atol=2e-4)


def test_a_prompt_is_read_once_and_nothing_is_computed_for_answers_that_have_ended(
    gpt2, tokenizer, problems
):
    """Ten answers at a time are five to each of two prompts."""
    shapes = []
    hook = gpt2.transformer.wte.register_forward_hook(
        lambda layer, inputs, _: shapes.append(tuple(inputs[0].shape))
    )
    groups = sample_and_grade(gpt2, tokenizer, problems, 5, config(sample_batch_size=10))
    hook.remove()
    expected = []
    for i in 0, 2:
        lengths = [completion.length for completion in flat(groups[i : i + 2])]
        expected.append((2, max(len(problem.ids) for problem in problems[i : i + 2])))
        for t in range(1, max(lengths)):
            expected.append((sum(length > t for length in lengths), 1))  # the newest token
    assert shapes == expected


@pytest.mark.parametrize("ends", [33, [17, 33], None], ids=str)
def test_an_answer_ends_with_its_first_end_token_or_is_cut_off(
    ends, gpt2, tokenizer, prompts, monkeypatch
):
    """End tokens are those of the generation config, and the tokenizer's, which is 1."""
    monkeypatch.setattr(gpt2.generation_config, "eos_token_id", ends)
    end_tokens = {1} | set(ends if isinstance(ends, list) else [ends])
    cfg = config(max_new_tokens=4, temperature=2.0)  # lest any token be too rare
    groups = sample(gpt2, tokenizer, prompts, 99, range(4), cfg)
    for completion in flat(groups):
        answer = answer_of(completion)
        assert completion.length == len(answer) <= 4
        assert not end_tokens & set(answer[:-1])
        assert completion.truncated == (answer[-1] not in end_tokens)
        assert len(answer) == 4 or not completion.truncated
        assert completion.text == tokenizer.decode([token for token in answer if token > 2])
    ways = {(completion.length == 4, completion.truncated) for completion in flat(groups)}
    assert ways == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("stop", ["=", "; 9", ".", "\n4"])
def test_the_token_that_completes_a_stop_text_ends_an_answer(stop, tokenizer, prompts):
    """The text goes up to there, and the tokens include it; the prompt does not count.

    Compared with what the trained tiny GPT-2 answers when nothing but an end token stops it.
    """
    model, _ = load_policy(TINY / "gpt2", config())
    (endless,) = sample(model, tokenizer, prompts[1:2], 20, [0], config(max_new_tokens=26))
    cfg = config(max_new_tokens=26, stop=stop)
    (group,) = sample(model, tokenizer, prompts[1:2], 20, [0], cfg)
    for whole, stopped in zip(endless, group, strict=True):
        ids = answer_of(whole)
        beginnings = (tokenizer.decode(ids[:n]) for n in range(1, len(ids)))
        n = next((n for n, text in enumerate(beginnings, 1) if stop in text), len(ids))
        assert answer_of(stopped) == ids[:n]
        assert stopped.text == whole.text.partition(stop)[0]
        assert stopped.truncated == (whole.truncated and stop not in whole.text)
    shorter = [completion.length for completion in group] < [c.length for c in endless]
    assert shorter or stop == "\n4"


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(temperature):
    """Probabilities p become p ** (1 / temperature), over their sum."""
    n = 100_000
    p = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.1])
    uniform = torch.rand(n, generator=seeded(), dtype=torch.float64)
    tokens, logp, entropy = draw(p.log().expand(n, 5), temperature, uniform)

    expected = p.double() ** (1 / temperature)
    expected /= expected.sum()
    share = torch.bincount(tokens, minlength=5) / n
    assert (share - expected).abs().max() < 0.008  # five standard deviations
    assert torch.allclose(logp.double().exp(), expected[tokens], atol=1e-6)
    assert torch.allclose(entropy.double(), Categorical(expected).entropy(), atol=1e-6)


def test_the_random_number_is_looked_up_in_the_cumulative_distribution():
    """Of 25 tokens of probability 0.04 between two of 0, which are never drawn."""
    logits = torch.tensor([-math.inf, *[0.0] * 25, -math.inf]).expand(5, 27)
    uniform = torch.tensor([0, 0.039, 0.041, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, 1.0, uniform)[0].tolist() == [1, 1, 2, 13, 25]


def test_the_rarest_tokens_are_drawn_too():
    """Of 100,000 tokens of probability 1e-8 each, which in float32 would not change 0.999."""
    logits = torch.zeros(10, 100_001)
    logits[:, 0] = math.log(0.999 / 1e-8)
    uniform = 0.9995 + 1e-8 * torch.arange(10, dtype=torch.float64)
    assert len(set(draw(logits, 1.0, uniform)[0].tolist())) >= 9


def test_each_question_is_dealt_once_before_any_is_dealt_again(gpt2, tokenizer, problems):
    """In another order each time."""
    queue, generator = [], seeded()
    cfg = config(group_size=2, max_new_tokens=1, resample_rounds=1, reward=hands_out(1, 0))
    for cfg.prompts_per_step in 3, 3, 2, 7, 3, 2:  # 20, five times four
        rollout(gpt2, tokenizer, problems, queue, cfg, generator)
    dealt = [cfg.reward.targets[i : i + 8 : 2] for i in range(0, 40, 8)]
    assert len(cfg.reward.targets) == 40
    assert all(sorted(four) == ["0", "1", "2", "3"] for four in dealt)
    assert any(four != dealt[0] for four in dealt)


@pytest.mark.parametrize("rounds, n, mixed", [(1, 4, 1), (2, 7, 1), (3, 10, 2), (99, 16, 4)])
def test_groups_of_equal_scores_are_replaced_until_there_are_enough(
    rounds, n, mixed, gpt2, tokenizer, problems
):
    """One group in four has scores that differ: of the first 4, 1; of the 3 for the others, 0.

    Of the next 3, again 1; then, with 2, 1, 1, 1 and 1 more, the four are complete. A penalty
    for length, which makes rewards differ, does not change that.
    """
    flags = {"prompts_per_step": 4, "group_size": 2, "overlong_buffer": 16}
    cfg = config(**flags, resample_rounds=rounds, reward=hands_out(1, 1, 0, 0, 1, 1, 1, 0))
    groups, dropped = rollout(gpt2, tokenizer, problems, [], cfg, seeded())
    assert len(cfg.reward.targets) == 2 * n
    assert [[completion.score for completion in group] for group in groups] == [[1, 0]] * mixed
    assert len(dropped) == n - mixed
    for completion in flat(groups + dropped):
        assert completion.ids[~completion.response_mask].tolist() == completion.problem.ids


def test_a_question_dealt_again_is_answered_differently(gpt2, tokenizer, problems):
    """Here twice a call. The seeds come from the run's generator, whose state repeats them."""
    cfg, texts, generator = config(prompts_per_step=2, resample_rounds=1), [], seeded()
    for again in generator, generator, seeded():
        for group in flat(rollout(gpt2, tokenizer, problems[:1], [], cfg, again)):
            texts.append(tuple(completion.text for completion in group))
    assert texts[0:2] == texts[4:6]
    assert len(set(texts)) == 4


# -------------------------------------------------------------------------------------- 2 Check
SEVEN = Problem("What is 3 + 4?", "7", [5, 6], "")


def test_an_answer_is_graded_by_the_reward_function_against_its_own_target():
    """By default, 1 if it is right. A <think> at the end of the prompt counts, too."""
    texts = ["Answer: 7", "Answer: 8", "7", "So.</think> Answer: 7"]
    groups = [[written([5, 6], [7], text=text) for text in texts] for _ in range(3)]
    problems = [SEVEN, SEVEN._replace(target="8"), SEVEN._replace(prefix="<think>")]
    grade(groups, problems, config())
    for group, scores in zip(groups, [(1, 0, 0, 1), (0, 1, 0, 0), (0, 0, 0, 1)], strict=True):
        assert tuple(completion.score for completion in group) == scores
    assert [group[0].problem for group in groups] == problems


def test_each_token_of_an_answer_gets_its_advantage_and_the_prompt_gets_0():
    """Of scores 2, 0, 0, 2, the mean is 1 and so is the standard deviation."""
    group = [written([5, 6], [7] * n) for n in (1, 3, 2, 1)]
    grade([group], [SEVEN], config(reward=hands_out(2, 0, 0, 2)))
    advantages = [completion.advantage.tolist() for completion in group]
    assert advantages == [[0, 0, 1], [0, 0, -1, -1, -1], [0, 0, -1, -1], [0, 0, 1]]


@pytest.mark.parametrize(
    "length, penalty", [(1, 0), (16_384, 0), (16_385, 1 / 4096), (18_432, 0.5), (20_480, 1)]
)
def test_the_overlong_penalty_grows_linearly_over_the_papers_buffer(length, penalty):
    """From 4,096 tokens before the cut, at 20,480, to 1. It counts for the advantage, too."""
    group = [written([5, 6], [7]), written([5, 6], [7])]
    group[0].length = length
    cfg = config(max_new_tokens=20_480, overlong_buffer=4_096, reward=hands_out(0.25))
    grade([group], [SEVEN], cfg)
    assert [completion.score for completion in group] == [0.25, 0.25]
    assert [completion.reward for completion in group] == [0.25 - penalty, 0.25]
    assert [c.advantage[-1] for c in group] == ([-1, 1] if penalty else [0, 0])

    cfg.overlong_buffer = 0  # no buffer, no penalty
    grade([group], [SEVEN], cfg)
    assert [completion.reward for completion in group] == [0.25, 0.25]


SCORES = [(0.25, 0.75), (-3, -2), (False, True), (torch.tensor(1), torch.tensor(2.5))]
SCORES += [(numpy.bool_(False), numpy.bool_(True))]


@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_a_score_is_any_number_and_a_group_teaches_if_they_differ(
    scores, gpt2, tokenizer, problems
):
    low, high = scores
    cfg = config(prompts_per_step=3, group_size=2, resample_rounds=1)
    cfg.reward = hands_out(low, low, low, high, high, high)
    groups, dropped = rollout(gpt2, tokenizer, problems, [], cfg, seeded())
    ((bad, good),) = groups
    assert (bad.score, good.score) == (float(low), float(high))
    assert (bad.advantage[-1], good.advantage[-1]) == pytest.approx((-1, 1), abs=1e-5)
    assert [completion.advantage.abs().max() for completion in flat(dropped)] == [0, 0, 0, 0]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_a_mistake_of_the_reward_function(score):
    with pytest.raises(UserError, match="--reward"):
        grade([[written([5, 6], [7])]], [SEVEN], config(reward=hands_out(score)))


# ------------------------------------------------------------------------------------ 3 Entropy
THREE_TO_ONE = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)


@pytest.mark.parametrize(
    "logits, temperature, entropy",
    [
        ([3.0] * 100, 1, math.log(100)),  # all are equally likely
        ([1000.0, 0.0, 0.0], 1, 0),  # one is certain
        ([0.0, -math.inf, -math.inf], 1, 0),  # 0 ln 0 is 0, not nan
        ([0.0, -math.inf, 0.0], 1, math.log(2)),
        ([math.log(3), 0.0], 1, THREE_TO_ONE),
        ([math.log(9), 0.0], 2, THREE_TO_ONE),  # at temperature 2, 9 : 1 becomes 3 : 1
    ],
)
def test_entropy_is_minus_the_sum_of_p_ln_p_with_p_at_the_temperature(
    logits, temperature, entropy
):
    found = token_entropy(torch.tensor(logits), temperature).item()
    assert found == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropies_and_their_gradients_are_those_of_torch_distributions(dtype):
    """And in float32, even from bfloat16 logits."""
    logits = torch.randn(2, 3, 1000, generator=seeded()).to(dtype).requires_grad_()
    weight = torch.randn(2, 3, generator=seeded())
    entropy = token_entropy(logits, 0.7)
    expected = Categorical(logits=logits.double() / 0.7).entropy()
    (slope,) = torch.autograd.grad((entropy * weight).sum(), logits)
    (expected_slope,) = torch.autograd.grad((expected * weight).sum(), logits)
    assert (entropy.dtype, entropy.shape) == (torch.float32, (2, 3))
    assert torch.allclose(entropy.double(), expected, atol=1e-5)
    assert torch.allclose(slope, expected_slope, atol=1e-5)


@pytest.mark.parametrize("far", [-200.0, -math.inf])
def test_the_gradient_is_finite_where_a_probability_is_0(far):
    """In float32, exp(-200) is 0, and the slope of p ln p is infinite there."""
    logits = torch.tensor([1.0, 0.0, far], requires_grad=True)
    two = torch.tensor([1.0, 0.0], requires_grad=True)  # the same without the third token
    token_entropy(logits).backward()
    Categorical(logits=two).entropy().backward()
    assert logits.grad.tolist() == pytest.approx([*two.grad.tolist(), 0.0], abs=1e-6)


@pytest.mark.parametrize("temperature, size", [(1.0, 1), (1.0, 70), (0.7, 999)])
def test_entropies_of_the_policy_are_those_of_a_plain_forward_pass(
    model, tokenizer, temperature, size
):
    """At each response token, and 0 elsewhere, whatever the size of the micro-batches."""
    completions = flat(sampled(model, tokenizer))
    batch = collate(completions, "cpu")
    cfg = config(temperature=temperature, micro_batch_size=size)
    entropy = policy_entropy(model, batch, cfg)
    assert entropy.shape == batch.ids.shape
    assert not entropy.requires_grad
    for row, completion in zip(entropy, completions, strict=True):
        full = Categorical(logits=read(model, completion.ids, temperature)).entropy()
        full = F.pad(full * completion.response_mask, (0, len(row) - len(full)))
        assert torch.allclose(row.double(), full, atol=1e-4)


# --------------------------------------------------------------------------------------- 4 Fork
H = torch.tensor([[9.0, 0.1, 0.5, 0.3], [0.2, 0.4, 7.0, 8.0]])  # 9: prompt; 7, 8: padding
RESPONSE = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()


KEPT = [("top", 0.2, [0.5]), ("top", 0.4, [0.5, 0.4]), ("top", 0.41, [0.5, 0.3, 0.4])]
KEPT += [("top", 1, [0.1, 0.5, 0.3, 0.2, 0.4]), ("all", 0.2, [0.1, 0.5, 0.3, 0.2, 0.4])]
KEPT += [("bottom", 0.4, [0.1, 0.3, 0.2]), ("bottom", 1, [])]


@pytest.mark.parametrize("tokens, rho, kept", KEPT)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_the_mask_of_five_tokens_is_right(tokens, rho, kept, dtype):
    """Also for masks of 0 and 1. As an index, integers would mean the rows 0 and 1."""
    keep = fork_mask(H, RESPONSE.to(dtype), rho, tokens)
    assert keep.dtype == torch.bool
    assert H[keep].tolist() == pytest.approx(kept)


FEW = [(0.2, 0, 0), (0.2, 1, 1), (0.2, 5, 1), (0.2, 6, 2), (0.001, 5, 1), (1, 7, 7)]
MANY = [(0.07, 100, 7), (0.1, 30, 3), (0.55, 100, 55)]  # although in floats 0.07 * 100 > 7


@pytest.mark.parametrize("rho, n, k", FEW + MANY)
def test_exactly_ceil_rho_n_tokens_are_kept_and_bottom_is_the_rest(rho, n, k):
    """At least one is, unless there is none."""
    entropy = torch.rand(3, 50, generator=seeded())
    response = torch.randperm(150, generator=seeded()).view(3, 50) < n
    kinds = "top", "bottom", "random", "all"
    masks = [fork_mask(entropy, response, rho, tokens) for tokens in kinds]
    assert [mask.sum() for mask in masks] == [k, n - k, k, n]
    assert torch.equal(masks[0] ^ masks[1], response)


def test_of_equal_entropies_the_first_are_kept():
    """By row, then by column: of 3 rows of 100, exactly 60, and not all 300."""
    mask = fork_mask(torch.full((3, 100), 0.7), torch.ones(3, 100), 0.2)
    assert mask.nonzero().tolist() == [[0, column] for column in range(60)]


@pytest.mark.parametrize("junk", [1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("tokens", ["top", "bottom", "random", "all"])
def test_prompt_and_padding_do_not_matter_whatever_their_entropy(junk, tokens):
    masks = []
    for value in 0.0, junk:
        entropy = H.masked_fill(~RESPONSE, value)
        masks.append(fork_mask(entropy, RESPONSE, 0.4, tokens, seeded()))
    assert torch.equal(*masks)
    assert not (masks[1] & ~RESPONSE).any()


def test_random_tokens_are_repeatable_and_fair():
    """Of ten tokens, two are kept: each one time in five. 0.04 are 4.5 standard deviations."""

    def keep(generator):
        return fork_mask(torch.arange(10.0)[None], torch.ones(1, 10), 0.2, "random", generator)

    generator = seeded()
    masks = torch.cat([keep(generator) for _ in range(2000)])
    assert torch.equal(masks[:1], keep(seeded()))
    assert (masks.float().mean(0) - 0.2).abs().max() < 0.04


def test_an_unknown_kind_of_tokens_or_share_is_refused():
    for tokens in "forks", "Top", "", None:
        with pytest.raises(ValueError, match="top, bottom, random or all"):
            fork_mask(H, RESPONSE, 0.2, tokens)
    for rho in 0, -0.5, 1.5, 20, math.nan:
        with pytest.raises(ValueError, match="rho must be above 0"):
            fork_mask(H, RESPONSE, rho)


# --------------------------------------------------------------------------------------- 5 Loss
ONE_RIGHT = [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]  # mean 1/4, deviation 3**0.5 / 4
GROUPS = [([1, 1, 0, 0], [1, 1, -1, -1]), ([1, 0, 0, 0], ONE_RIGHT)]
GROUPS += [([1, 0.5, 0], [1.5**0.5, 0, -(1.5**0.5)])]


@pytest.mark.parametrize("rewards, advantages", GROUPS)
def test_advantages_are_rewards_in_standard_deviations_from_their_groups_mean(
    rewards, advantages
):
    """Each group is on its own: here with another one, in which all rewards are 5."""
    both = torch.tensor([rewards, [5] * len(rewards)])
    first, second = group_advantages(both).tolist()
    assert first == pytest.approx(advantages, abs=1e-6)
    assert second == [0] * len(rewards)
    assert group_advantages(both[0]).tolist() == first  # one group alone


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.7, 1 / 3])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_0(reward):
    """Although 7 * 0.1 / 7 need not be 0.1."""
    assert group_advantages(torch.full((2, 7), reward)).abs().max() == 0


@pytest.mark.parametrize(
    "ratio, A, dual_clip, J, slope",  # slope: dJ / dlogp, which is r A if not clipped
    [
        (1.0, +1, None, 1.0, 1.0),
        (1.0, -1, None, -1.0, -1.0),
        (1.5, +1, None, 1.28, 0.0),  # good and likelier already: no more of that
        (0.5, +1, None, 0.5, 0.5),  # good, but less likely: never clipped
        (0.5, -1, None, -0.8, 0.0),  # bad and less likely already: no more of that
        (1.5, -1, None, -1.5, -1.5),  # bad, but likelier: never clipped ...
        (9.0, -1, 10.0, -9.0, -9.0),
        (11.0, -1, 10.0, -10.0, 0.0),  # ... but by the dual clip, at c = 10
        (11.0, -1, None, -11.0, -11.0),
        (11.0, -1, 0.0, -11.0, -11.0),  # 0: off
        (11.0, -2, 10.0, -20.0, 0.0),
        (1.2, -1, 1.1, -1.1, 0.0),
        (0.5, -1, 1.1, -0.8, 0.0),
        (math.exp(500), -1, None, -math.exp(20), 0.0),  # log-ratios stay within +-20
        (math.exp(-500), +1, None, math.exp(-20), 0.0),
    ],
)
def test_the_clip_holds_back_only_what_went_too_far_in_the_right_direction(
    ratio, A, dual_clip, J, slope
):
    logp = torch.tensor([math.log(ratio) - 2], dtype=torch.float64, requires_grad=True)
    logp_old = torch.full_like(logp, -2.0)
    advantage = torch.full_like(logp, A)
    objective = clipped_objective(logp, logp_old, advantage, 0.2, 0.28, dual_clip)
    objective.sum().backward()
    assert objective.item() == pytest.approx(J)
    assert logp.grad.item() == pytest.approx(slope)


FOUR = [token_entropy, fork_mask, group_advantages, clipped_objective]


@pytest.mark.parametrize("function", FOUR)
def test_the_papers_functions_do_as_their_examples_say_when_copied_out_of_the_file(function):
    """They need nothing but torch and math."""
    alone = {"math": math, "torch": torch}
    exec(inspect.getsource(function), alone)
    example = doctest.DocTestParser().get_doctest(function.__doc__, alone, "example", None, 0)
    result = doctest.DocTestRunner().run(example)
    assert (result.attempted > 0, result.failed) == (True, 0)


# ------------------------------------------------------------------------------------- 6 Update
MADE_UP = [(1.4, -0.7, -0.7), (0.7, 0.7, -1.4), (-0.7, 1.4, -0.7), (0.0, 1.2, -1.2)]


def sampled(model, tokenizer, temperature=1.0):
    """Four groups of three completions, with advantages made up.

    Each has a prompt of its own, so that no two entropies are equal.
    """
    prompts = [tokenizer.encode(f"{i}+{i}*{i}=?\n") for i in range(12)]
    cfg = config(temperature=temperature)
    completions = flat(sample(model, tokenizer, prompts, 1, range(12), cfg))
    for completion, advantage in zip(completions, flat(MADE_UP), strict=True):
        completion.advantage = advantage * completion.response_mask
    return [completions[i : i + 3] for i in range(0, 12, 3)]


@pytest.fixture(scope="session")
def fresh(gpt2, tokenizer):
    """Four groups of three completions that GPT-2 has just sampled."""
    return sampled(gpt2, tokenizer)


def steps(model, groups, lr=0.0, **flags):
    """The gradient of each step of update(), by default one, and its metrics.

    The steps are those of plain gradient descent, on a copy of the model.
    """
    flags = {"minibatches": 1, "grad_clip": 0.0, "tokens": "all"} | flags
    model, gradients = copy.deepcopy(model), []
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=lr)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(parameters_to_vector(p.grad for p in parameters))
    )
    metrics = update(model, optimizer, groups, config(**flags), seeded())
    return *gradients, metrics


def plain_objective(ratio, A, cfg):
    """What one token adds to J: where a clip acts, a constant, which has no gradient."""
    if A > 0:
        return min(ratio, 1 + cfg.clip_high) * A
    highest = cfg.dual_clip or math.inf
    return min(max(ratio, 1 - cfg.clip_low), highest) * A


def plain_step(model, completions, on_policy, cfg, generator):
    """The gradient of -J and the metrics of a mini-batch, one token after the other."""
    tokens = []  # H, ratio and A of each response token
    for completion in completions:
        logprobs = (model(completion.ids[None]).logits[0] / cfg.temperature).log_softmax(-1)
        for t in range(len(completion.ids)):
            if not completion.response_mask[t]:
                continue
            now = logprobs[t - 1]  # (V,) the distribution of token t
            H = completion.entropy[t] if on_policy else -(now.exp() * now).sum()
            ratio = (now[completion.ids[t]] - completion.logp_old[t]).exp()
            tokens.append((H.item(), ratio, completion.advantage[t].item()))

    entropies = [H for H, _, _ in tokens]
    k = math.ceil(cfg.rho * len(tokens) - 1e-9)
    ranked = sorted(range(len(tokens)), key=lambda i: -entropies[i])
    threshold = entropies[ranked[k - 1]]
    assert threshold > entropies[ranked[k]] + 1e-5  # no tie decides what is kept
    kept = {"top": ranked[:k], "bottom": ranked[k:], "all": ranked}.get(cfg.tokens)
    if cfg.tokens == "random":
        kept = torch.randperm(len(tokens), generator=generator).tolist()[:k]

    total, clipped = 0, 0
    for i in kept:
        _, ratio, A = tokens[i]
        objective = plain_objective(ratio, A, cfg)
        total += objective
        clipped += abs(objective - ratio * A).item() > 1e-6
    loss = -total / (len(kept) if cfg.normalize == "selected" else len(tokens))
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    gradient = parameters_to_vector(slopes)
    return gradient, {
        "loss": loss.item(),
        "entropy": sum(entropies) / len(entropies),
        "threshold": threshold,
        "kept": len(kept) / len(tokens),
        "clipped": clipped / len(kept),
        "grad_norm": gradient.norm().item(),
    }


def plain_steps(model, groups, lr, **flags):
    """What steps() should give: plain loops over epochs, mini-batches and tokens."""
    cfg, generator, model = config(**flags), seeded(), copy.deepcopy(model)
    gradients, every = [], []
    for _ in range(cfg.epochs):
        order = torch.randperm(len(groups), generator=generator).tolist()
        size = len(groups) // cfg.minibatches
        for i in range(0, len(groups), size):
            completions = flat(groups[j] for j in order[i : i + size])
            gradient, metrics = plain_step(model, completions, not every, cfg, generator)
            every.append(metrics)
            gradients.append(gradient)
            weights = parameters_to_vector(model.parameters()).detach() - lr * gradient
            vector_to_parameters(weights, model.parameters())
    return *gradients, {name: sum(m[name] for m in every) / len(every) for name in metrics}


SETTINGS = [{"tokens": tokens} for tokens in ("top", "all", "bottom", "random")]
SETTINGS += [{"rho": 0.5}, {"normalize": "all"}, {"temperature": 0.7}, {"micro_batch_size": 50}]
SETTINGS += [{"clip_low": 0.1, "clip_high": 0.6}, {"dual_clip": 0.0}, {"dual_clip": 1.2}]
SETTINGS += [{"minibatches": 2, "epochs": 1}, {"minibatches": 4, "epochs": 2}]
CASES = [("gpt2", settings) for settings in SETTINGS] + [("qwen3", {})]


@pytest.mark.parametrize("name, settings", CASES, ids=str)
def test_an_update_is_that_of_plain_loops_over_tokens(name, settings, models, tokenizer):
    """In gradients and metrics; if not said otherwise, in two epochs of one mini-batch each.

    The first mini-batch goes by the entropies that the sampler recorded, which are made up
    here; the later ones by those of the policy after each step, whose ratios are not 1.
    """
    settings = {"tokens": "top", "minibatches": 1, "epochs": 2, "grad_clip": 0.0} | settings
    groups = sampled(models[name], tokenizer, settings.get("temperature", 1.0))
    for completion in flat(groups):
        noise = torch.rand(completion.ids.shape, generator=seeded(len(completion.ids)))
        completion.entropy += noise * completion.response_mask
    *gradients, metrics = steps(models[name], groups, lr=0.03, **settings)
    *expected, numbers = plain_steps(models[name], groups, lr=0.03, **settings)

    for ours, plain in zip(gradients, expected, strict=True):
        assert (ours - plain).norm() < 1e-4 * plain.norm()
    numbers |= {"groups_kept": 4, "updates": len(expected), "sampler_mismatch": 1}
    assert metrics == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    assert 0.02 < metrics["clipped"] < 0.5  # the clip was put to the test


def test_logits_at_some_tokens_are_those_of_the_full_logits(model, fresh):
    """And so are their gradients."""
    ids = collate(flat(fresh), "cpu").ids
    mask = torch.rand(ids.shape, generator=seeded()) < 0.3
    mask[:, 0] = False  # nothing predicts the first token
    ours = logits_at(model, ids, mask)
    full = model(ids).logits[:, :-1][mask[:, 1:]]  # no hook is left behind
    assert torch.allclose(ours, full, atol=1e-4)

    slopes, weights = [], list(model.parameters())
    for logits in ours, full:
        slopes.append(torch.autograd.grad(logits.logsumexp(1).sum(), weights))
    ours, full = map(parameters_to_vector, slopes)
    assert (ours - full).norm() < 1e-4 * full.norm()


def test_the_first_loss_is_0_but_its_gradient_is_not(gpt2):
    """At r = 1, the loss is minus the mean advantage: 0, if the answers are equally long."""
    group = [written([5], [26, 27, 1], +1.0, gpt2), written([5], [28, 29, 1], -1.0, gpt2)]
    gradient, metrics = steps(gpt2, [group])
    assert abs(metrics["loss"]) < 1e-5
    assert gradient.norm() > 0.1


def test_a_model_that_gave_other_probabilities_when_sampling_is_refused(gpt2, fresh):
    """Here, 2 % less than it gives now. Rounding to bfloat16 alone makes as much."""
    off = copy.deepcopy(fresh)
    for completion in flat(off):
        completion.logp_old -= math.log(1.02) * completion.response_mask
    with pytest.raises(UserError, match="1.020-fold"):
        steps(gpt2, off, minibatches=2)
    assert steps(gpt2, off, dtype="bfloat16")[-1]["sampler_mismatch"] == pytest.approx(1.02)


@pytest.mark.parametrize("tokens", ["top", "bottom", "all"])
def test_only_the_tokens_that_are_kept_have_a_part_in_the_gradient(tokens, gpt2, fresh):
    """The others, with prompt and padding, may have whatever advantages."""
    gradient, metrics = steps(gpt2, fresh, tokens=tokens)
    other = copy.deepcopy(fresh)
    for completion in flat(other):
        top = completion.entropy >= metrics["threshold"]
        keep = {"top": top, "bottom": ~top, "all": top | True}[tokens]
        completion.advantage[~(keep & completion.response_mask)] = 1e6
    assert torch.equal(steps(gpt2, other, tokens=tokens)[0], gradient)


def test_the_end_token_is_trained_on(gpt2):
    """Even where the answer is nothing else."""
    empty, seven = written([5], [1], +1.0, gpt2), written([5], [27, 1], 0.0, gpt2)
    model = copy.deepcopy(gpt2)
    update(model, torch.optim.SGD(model.parameters(), lr=0.01), [[empty, seven]], config(rho=1))
    assert written([5], [1], model=model).logp_old[1] > empty.logp_old[1] + 0.01


def test_each_epoch_uses_every_group_once_in_an_order_of_its_own(gpt2, fresh):
    """With as many mini-batches as groups, or more, each step is that of one group."""
    alone = sorted(steps(gpt2, [group])[0].norm().item() for group in fresh)
    *gradients, metrics = steps(gpt2, fresh, minibatches=6, epochs=2)
    norms = [gradient.norm().item() for gradient in gradients]
    assert sorted(norms[:4]) == sorted(norms[4:]) == pytest.approx(alone, rel=1e-4)
    assert norms[:4] != norms[4:]
    assert metrics["updates"] == 8


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(gpt2, fresh):
    model, groups = copy.deepcopy((gpt2, fresh))
    groups[0][0].advantage *= math.inf
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    metrics = update(model, optimizer, groups, config(), seeded())
    assert (metrics["updates"], metrics["groups_kept"]) == (3, 4)
    assert all(map(math.isfinite, metrics.values()))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.lm_head.weight, gpt2.lm_head.weight)
    assert update(model, optimizer, groups[:1], config()) == {"groups_kept": 1, "updates": 0}
    assert update(model, optimizer, [], config()) == {"groups_kept": 0, "updates": 0}


def test_a_selection_of_nothing_gives_a_gradient_of_0_and_metrics_that_are_numbers(gpt2, fresh):
    gradient, metrics = steps(gpt2, fresh, tokens="bottom", rho=1.0)
    assert gradient.abs().max() == 0
    assert metrics["kept"] == 0
    assert all(map(math.isfinite, metrics.values())), metrics  # NaN is not JSON


def test_the_gradient_is_clipped_after_its_norm_is_logged(gpt2, fresh):
    free, metrics = steps(gpt2, fresh)  # with --grad-clip 0, not at all
    clipped, same = steps(gpt2, fresh, grad_clip=0.01)
    assert metrics["grad_norm"] == same["grad_norm"] == pytest.approx(free.norm().item())
    assert torch.allclose(clipped, free * 0.01 / free.norm(), rtol=1e-3)


# ------------------------------------------------------------------------------------- Evaluate
def test_accuracy_standard_error_and_pass_at_k_of_a_hand_worked_example(
    gpt2, tokenizer, problems
):
    """The means of the four questions are 1, 0.5, 0 and 0.

    Their standard deviation is 0.479, and half of that, for four questions, is the error.
    """
    reward = hands_out(1, 1, 1, 0, 0, 0, 0, 0)
    cfg = config(eval_samples=2, reward=reward, overlong_buffer=16)  # whose penalty is left out
    metrics = evaluate(gpt2, tokenizer, problems, cfg)
    expected = {"accuracy": 0.375, "stderr": 0.2394, "pass_at_k": 0.5}
    assert metrics == pytest.approx(expected, abs=1e-4)
    assert reward.targets == ["0", "0", "1", "1", "2", "2", "3", "3"]
    assert evaluate(gpt2, tokenizer, problems[:1], cfg)["stderr"] == 0


def test_evaluations_always_draw_the_same_random_numbers(gpt2, tokenizer, problems):
    """Unless --seed is another one."""

    def reward(text, target):
        return len(text)

    cfgs = [config(reward=reward, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (evaluate(gpt2, tokenizer, problems, cfg) for cfg in cfgs)
    assert first == again != other


# ==================== below the line ====================
SIZE = {"vocab_size": 102, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
SIZE |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": [1, 17, 40, 64, 77, 90]}


def random_model(folder, name, **more):
    """Save a model of some architecture, with two layers and large random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZE | more)).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "gpt2").save_pretrained(folder)
    return model


def coin(text, target):
    """A reward that a random model earns about every other time."""
    return sum((text + target).encode()) % 2


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a random model whose output layer is tied to its embeddings."""
    folder = tmp_path_factory.mktemp("base")
    random_model(folder, "qwen3", head_dim=16, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="session")
def flags(base, tmp_path_factory):
    """Of a small run: 10 questions to train on, and beside them 3 to test on."""
    folder = tmp_path_factory.mktemp("data")
    lines = (TINY / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:10]))
    (folder / "test.jsonl").write_text("".join(lines[10:13]))
    few = "--prompts-per-step 3 --group-size 4 --resample-rounds 1 --minibatches 2 --steps 4"
    few += " --eval-every 2 --save-every 2 --eval-samples 2 --max-new-tokens 12 --lr 1e-3"
    return f"--device cpu --model {base} {few} --seed 3 --data {folder}/train.jsonl"


@pytest.fixture
def run(flags, tmp_path):
    """A function that runs main() with these and more flags in tmp_path."""

    def run(more="", reward=coin):
        forking.main(f"{flags} --out {tmp_path} {more}".split(), reward)
        return tmp_path

    return run


@pytest.fixture
def refused(run, capsys):
    """A function that returns the one line with which main() refuses flags."""

    def refuse(more):
        with pytest.raises(SystemExit, match="^2$"):
            run(more)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return refuse


@pytest.fixture(scope="session")
def finished(flags, tmp_path_factory):
    """The folder of a run that went well. It printed to what is no file."""
    out = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        forking.main(f"{flags} --out {out}".split(), coin)
    (out / "printed").write_text(printed.getvalue())
    return out


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(out):
    """The log of a run, but for how long it took."""
    log = lines_of(out / "metrics.jsonl")
    return [{k: v for k, v in metrics.items() if "second" not in k} for metrics in log]


def folders(out):
    return sorted(path.name for path in out.iterdir() if path.is_dir())


def all_of(out):
    """What a run leaves, to the last bit: log, samples, weights."""
    weights = (out / folders(out)[-1] / "model.safetensors").read_bytes()
    return log_of(out), lines_of(out / "samples.jsonl"), hash(weights)


# ------------------------------------------------------------------------------------ 7 Answers
def cells(table, sign=None):
    """The cells of a table, which stand three spaces apart; with a sign, pairs: a == b."""
    found = re.split(r"\s{3,}", table.strip())
    return [cell.split(f" {sign} ") for cell in found] if sign else found


SAME = r"""
    5 == 5.0   .5 == 0.50   1/2 == 0.5   \frac{1}{2} == 2/4   007 == 7   +7 == 7   (-3) == -3
    \dfrac12 == \tfrac{1}2   \frac 59 == 5/9   \frac9{19} == 9/19   \frac{-1}{2} == -\frac12
    50\% == 0.5   50 percent == \frac{1}{2}   1,000 == 1000   1{,}000 == 1000
    11,\! 111,\! 100 == 11111100   -1,234.50 == -1234.5   5, 1,234 == 1234, 5
    1\frac{4}{5} == \frac{9}{5}   137 \frac12 == 137.5   -1\frac{1}{2} == -1.5   $5$ == 5
    \(5\) == 5   \[5\]. == 5   **5**. == 5   5. == 5   \mathbf{5} == 5   x^{ 2 } == x^2
    \frac{ 1 }{ 2 } == 1/2   \frac{\sqrt3}2 == \sqrt{3}/2   -\pi/6 == -\frac{\pi}{6}
    \textbf{(B)} == (B)   \text{ east} == \mathrm{east}   x \in [-2,7] == [-2, 7]   x = 5 == 5
    \$32,\!348 == 32348   18 dollars == \$18.   90 == 90^\circ   90^{\circ} == 90 degrees
    864\mbox{ inches}^2 == 864 \text{ inches}^{2}   15\,\mathrm{cm}^2. == 15
    90^\circ == x = 90   12\pi\text{ cm} == 12\pi   \frac{270}7\text{ degrees} == 270/7
    5, 6 == 6,5   -2,1\pm\sqrt5 == \{1 \pm \sqrt{5}, -2\}   (3, +\infty) == (3,\infty)
    \left( 3, \pi/2 \right) == (3,\frac{\pi}{2})   (0.5, 1] == \left(\frac{1}{2},1\right]
    \begin{bmatrix}-\frac13\\.5 \\ \end{bmatrix} == \begin{pmatrix} -1/3 \\ 1/2 \end{pmatrix}
"""
MORE = [("90\u00b0", "90"), ("\u22123", "-3"), ("7" * 1000, "7" * 1000)]


@pytest.mark.parametrize("given, target", cells(SAME, "==") + MORE)
def test_two_spellings_of_the_same_answer_are_equal(given, target):
    assert is_correct(rf"\boxed{{{given}}}", target)
    assert is_correct(f"Answer: {given}", target)
    assert is_correct(rf"\boxed{{{target}}}", given)


def test_the_base_may_be_missing_in_the_answer_but_not_in_the_target():
    for number, target in ("52", "52_8"), ("2516", "2516_{8}"), ("1011", "1011_{16}"):
        assert is_correct(f"Answer: {number}", target)
        assert not is_correct(f"Answer: {target}", number)
        assert not is_correct(f"Answer: {number}_7", target)


OTHER = r"""
    5 != 6   5 != -5   0.333 != 1/3   1/0 != 2/0   50\% != 50   1_000 != 1000   0.3... != 0.3
    0.1(6) != 0.10(6)   \binom52 != 5/2   1.000 != 1000   2\frac{3}{2} != 7/2   1\ 000/3 != 1
    2\frac{3}{2} != 3   \frac{1 000}{3} != 1   1 4/5 != 4/5   \frac{1 2}{3} != 5/3   5 6 != 56
    \{1,234\} != 1234   (1,234) != 1234   (1,000,2) != (1,0,2)   1, 234 != 1234   5\!6 != 56
    012,345 != 12345   1234,567 != 1234567   1,234, 5 != 1, 234, 5   5\text{6} != 56   x != y=x
    (1,000\frac{1}{2}) != (1,1/2)   \left.5\right. != 0.5   \frac123 != \frac{1}{23}   $ != $
    x^{10} != x^10   x^2 != x^2_1   \frac{1}{2x} != 1/2x   \frac{1}{2}\pi != 1/2\pi   y=2 != x=2
    1+\sqrt5/2 != \frac{1+\sqrt5}{2}   \ln \frac32 != \frac{\ln 3}{2}   (y,x)=(1,2) != (1,2)
    x=1, y=2 != y=1, x=2   5 cents != \$5   5\text{ km} != 5\text{ cm}   5 inches != 5 inches^2
    2 radians != 2^\circ   2^\circ != 2\text{ rad}   \sin 30^\circ != \sin 30   3\mathrm{i} != 3
    (1,2) != [1,2]   (1,2] != (1,2)   \{1,2\} != (1,2)   1,2,2 != 1,1,2   1,2,3 != 123   . != .
    x_{1,3,2,4} != x_{1,2,3,4}   |1,3,2,4| != |1,2,3,4|   x= != x=   \, != \,
    \begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}1&2\end{pmatrix}   \text{} != \text{}
"""
NOT_5 = r"""
    five   2+3   ~5   2+3=5   \sqrt{25}   5!   |5|   5x   \cancel{5}   x+y=5   5 feet 6 inches
    5cm   5, 5   5 million   5 thousand   5 dozen   5 percent   5 pm   5 or   5 perhaps   5 i
    5 x   5 thous   5 radians   5\text{ fails}   5\text{ is wrong}   5\text{ dollars a dozen}
"""
MORE = [("7" * 1001, "7" * 1001), ("5\u200b", "5"), ("\u0665", "5"), ("", "")]
MORE += [(given, "5") for given in cells(NOT_5)]


@pytest.mark.parametrize("given, target", cells(OTHER, "!=") + MORE)
def test_another_answer_is_wrong(given, target):
    assert not is_correct(rf"\boxed{{{given}}}", target)
    assert not is_correct(f"Answer: {given}", target)


HEDGES = r"""
    A or B   A, B   A; B   A (or B)   A (B)   (A) (B)   A B   AB   A = B   A^B   A\text{ or }B
    A \\ B   A\quad B   \(A\) \(B\)   $A$, $B$   A and B   \{A, B\}   [A, B]   A & B   A|B
    not A   \textbf{A} B   A. B.   A_B   A?   A \pm B   A^\circ B   A\%B   \approx A
"""
ANSWERS = r"5   6.5   -3   1,000   2/3   \frac{3}{4}   (1,2)   2\sqrt{5}"


@pytest.mark.parametrize("hedge", [*cells(HEDGES), "A\x1cB", "A\tB", "A\u200bB", "A \u00b1 B"])
def test_a_hedge_wins_for_none_of_its_answers(hedge):
    for a, b in itertools.permutations(cells(ANSWERS), 2):
        given = hedge.replace("B", "\n").replace("A", a).replace("\n", b)
        for text in rf"\boxed{{{given}}}", f"Answer: {given}", f"The answer is {given}.":
            assert not is_correct(text, a), text
            assert not is_correct(text, b), text


FOUND = [(r"\boxed{5 \boxed{6}}", "6"), (r"\boxed{\{1\}}", r"\{1\}"), (r"\boxed{{1}", None)]
FOUND += [("\\boxed{5}\n#### Check\n2+3", "5"), (r"\boxed{1} the answer is 5 or 6", "1")]
FOUND += [("Answer\uff1a4\nno", "4"), ("**Answer**: `4`", "4"), (r"\boxed{5} \boxed{}", "")]
FOUND += [(r"\boxed{4}. I hope the answer is right.", "4"), ("The answer is: $18", "$18")]


@pytest.mark.parametrize("text, found", FOUND)
def test_the_answer_found_in_a_text_is_the_one_meant(text, found):
    assert extract_answer(text) == found


LONG = [r"\boxed{" * 5700, r"\boxed" + "{" * 20_000 + "}" * 20_000, "(" * 40_000, "\\" * 40_001]
LONG += [r"\boxed" + " " * 40_000, "Answer:" * 5700, "answer" + " *_" * 13_000, "#" * 40_000]
LONG += ["answer is 5" + " " * 40_000 + "x", r"\boxed{6}" * 4000, r"\boxed{9**9**9}"]
PARTS = ["(", ")", "-", "1,", ",000", "1/", "1 ", "$ ", r"\pi", r"\{", r"\text{", "{", "}", "^"]
PARTS += [r"\frac{", r"\frac{1}", r"\sqrt{1}", r"\begin{pmatrix}", "x=", "1_", "a", "9**", "9"]
LONG += ["Answer: 1" + part * (980 // len(part)) for part in PARTS]


@pytest.mark.parametrize("text", LONG, ids=lambda text: ascii(text)[:20])
def test_no_text_takes_long_or_raises(text):
    start = time.process_time()
    assert not is_correct(text, "5")
    assert is_correct(text, text[8:]) in (True, False)
    assert time.process_time() - start < 0.5


# ----------------------------------------------------------------------------------- 8 Problems
@pytest.fixture(scope="session")
def policy(base):  # and its tokenizer
    return load_policy(base, config())


@pytest.fixture
def load(policy, tmp_path):
    """A function that writes lines to a file and returns the Problems found in it."""

    def load(*lines, tokenizer=policy[1], **flags):
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        path = f"{tmp_path}/data.jsonl"
        return forking.load_problems(path, policy[0], tokenizer, config(**flags))

    return load


MESSAGES = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "1+2=?"}]
RECORDS = {
    "a number": {"question": "1+2=?", "answer": 3},
    "GSM8K": {"question": "1+2=?", "answer": "It is 1+2=<<1+2=3>>3.\n#### 3"},
    "MATH": {"problem": "1+2=?", "level": 1, "solution": r"We add: it is $\boxed{3}$."},
    "MATH-500": {"problem": "1+2=?", "solution": r"It is $\boxed{03}$.", "answer": "3"},
    "DAPO": {"prompt": MESSAGES, "reward_model": {"ground_truth": "3", "style": "rule"}},
    "DAPO, processed": {"prompt": "1+2=?", "solution": "3", "ability": "MATH"},
    "null": {"question": "1+2=?", "answer": None, "reward_model": {"ground_truth": "3"}},
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", RECORDS)
def test_the_common_formats_of_problems_can_be_read(name, kind, policy, tmp_path, capsys):
    """Empty lines do not matter, nor what Windows adds. What is there twice counts once."""
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        line = json.dumps(RECORDS[name])
        path.write_bytes(f"\ufeff{line}\n\n\r\n{line}\r\n\n".encode())
    else:
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.Table.from_pylist([RECORDS[name]] * 2)
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    (problem,) = forking.load_problems(str(path), *policy, config())
    assert problem == Problem("1+2=?", "3", policy[1].encode("1+2=?\n"), "")
    columns = ", ".join(RECORDS[name])
    assert capsys.readouterr().out == f"{path}: 1 questions; the columns are {columns}\n"


GOOD = '{"question": "1+2=?", "answer": "3"}'
NO_PROBLEMS = """
    {oops -> JSONDecodeError   ["1+2=?", "3"] -> 'list' object   null -> 'NoneType' object
    {"question": "1+2=?", "result": 3} -> KeyError('reward_model')   7 -> 'int' object
    {"query": "1+2=?", "answer": 3} -> KeyError('prompt')   {"prompt": []} -> IndexError
    {"question": 5, "answer": 3} -> TypeError
"""


@pytest.mark.parametrize("line, reason", cells(NO_PROBLEMS, "->"))
def test_a_line_that_is_no_problem_is_named_and_shown(line, reason, load):
    with pytest.raises(UserError, match=r"data\.jsonl:3: ") as error:
        load(GOOD, "", line, GOOD)
    for part in reason, line, GOOD:  # what is wrong, with what, and how it should be
        assert part in str(error.value)


@pytest.mark.parametrize("target", ["", " ", ".", "{", "$", "9" * 1001])
def test_what_cannot_be_used_is_left_out_and_counted(target, load, policy, capsys):
    """Targets that no answer can equal, except with another reward function; long prompts."""
    room = policy[0].config.max_position_embeddings - len("1+2=?\n")
    lines = GOOD, "", json.dumps({"question": "?", "answer": target}), GOOD.replace("1", "11")
    (problem,) = load(*lines, max_new_tokens=room)
    assert problem.question == "1+2=?"
    assert "data.jsonl: 2 left out, the first in line 3: " in capsys.readouterr().out
    _, other, _ = load(*lines, reward=coin)
    assert other.target == target.strip()
    with pytest.raises(UserError, match="data.jsonl: no questions are left"):
        load(GOOD, max_new_tokens=room + 1)


TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
TEXTS = {
    "plain": "<s>1+2=?\n",
    "boxed": f"<s>User:\n1+2=?\n{BOXED}\n\nAssistant:\n",
    "chat": f"<s>[user]1+2=?\n{BOXED}[assistant]",
    "1+1=?\n2\n{question}\n": "<s>1+1=?\n2\n1+2=?\n",
}


@pytest.mark.parametrize("prompt", TEXTS)
def test_a_prompt_is_one_of_ours_or_ones_own_text(prompt, load, tokenizer):
    """Its first token is there once: the tokenizer adds it, or the chat template has it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    (problem,) = load(GOOD, tokenizer=tokenizer, prompt=prompt)
    assert problem.ids == tokenizer.encode(TEXTS[prompt], add_special_tokens=False)


@pytest.mark.parametrize("kind", ["characters", "tokens", "special tokens"])
def test_an_answer_within_a_think_that_the_template_opens_earns_nothing(kind, load, tokenizer):
    """Special tokens are not in a completion's text, so that there the last answer counts."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE + "<think>\n"
    tags = ["<think>", "</think>"] if kind != "characters" else []
    tokenizer.add_tokens(tags, special_tokens=kind == "special tokens")
    (problem,) = load(GOOD, tokenizer=tokenizer, prompt="chat")
    earned = []
    for text in "4</think>. Answer: 3", "4. Answer: 3", ". Answer: 3</think>. Answer: 4":
        text = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
        earned.append(is_correct(problem.prefix + text, problem.target))
    assert earned == [True, kind == "special tokens", False]


# ------------------------------------------------------------------------ 9 Model and processes
CODE = {"AutoConfig": "code.Evil", "AutoModelForCausalLM": "code.Evil"}
BROKEN = [("contains custom code", "", {"model_type": "evil", "auto_map": CODE})]
BROKEN += [("it is quantized", "", {"quantization_config": {"quant_method": "gptq"}})]
BROKEN += [(r"it lacks the weights .*model\.layers\.1\.", ".1.", {})]


@pytest.mark.parametrize("reason, lost, settings", BROKEN)
def test_a_model_that_cannot_be_trained_is_refused(reason, lost, settings, tmp_path):
    """And the code that comes with it does not run."""
    random_model(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: weights[name] for name in weights if not lost or lost not in name}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text()) | settings
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    with pytest.raises(UserError, match=f"(?s)^model {tmp_path}: .*{reason}"):
        load_policy(tmp_path, config())
    assert not (tmp_path / "it-ran").exists()


def test_weights_become_float32_and_those_without_use_are_left_out(tmp_path):
    random_model(tmp_path, "llama", tie_word_embeddings=False, dtype="bfloat16")
    weights = load_file(tmp_path / "model.safetensors")
    more = weights | {"value_head.weight": torch.zeros(3)}
    save_file(more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_policy(tmp_path, config())
    for name, weight in model.state_dict().items():
        assert (weight.dtype, weights[name].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(weight, weights[name].float())
    assert not model.training


CACHES = {"mistral": {"sliding_window": 7}, "lfm2": {"layer_types": ["conv", "full_attention"]}}


@pytest.mark.parametrize("name", CACHES)
def test_a_model_samples_from_what_a_plain_forward_pass_gives(name, tmp_path, prompts):
    """Whatever it has in its cache, and also where rows are padded, or leave the batch."""
    random_model(tmp_path, name, **CACHES[name])
    model, tokenizer = load_policy(tmp_path, config())
    groups = forking.sample(model, tokenizer, prompts, 3, range(4), config(max_new_tokens=64))
    assert len({completion.length for completion in sum(groups, [])}) > 3
    for completion in sum(groups, []):
        with torch.no_grad():
            drawn_from = Categorical(logits=model(completion.ids[None]).logits[0, :-1])
        logp, mask = drawn_from.log_prob(completion.ids[1:]), completion.response_mask[1:]
        assert torch.allclose(completion.logp_old[1:], logp * mask, atol=5e-4)
        assert torch.allclose(completion.entropy[1:], drawn_from.entropy() * mask, atol=5e-4)


def test_a_cache_with_room_for_all_tokens_gives_the_same_samples(policy, prompts, monkeypatch):
    """Where they are many. One that is copied for each token is faster where they are few."""
    for n, kind in (63, forking.DynamicLayer), (64, forking.RoomyLayer):
        *_, cache = forking.prepare(policy[0], prompts, range(4), 3, n)
        assert [type(layer) for layer in cache.layers] == [kind] * 2
    cfg = config(max_new_tokens=64)
    roomy = sum(forking.sample(*policy, prompts, 3, range(4), cfg), [])
    monkeypatch.setattr(forking, "DynamicLayer", None)  # so that none is replaced
    plain = sum(forking.sample(*policy, prompts, 3, range(4), cfg), [])
    for ours, theirs in zip(roomy, plain, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert torch.allclose(ours.logp_old, theirs.logp_old, atol=1e-5)


def test_a_micro_batch_has_as_many_rows_as_fit_in_its_tokens(fresh):
    """The longest first; at least one. They end with the last token that is kept."""
    batch = forking.collate(flat(fresh), "cpu")
    keep = batch.response_mask & (torch.rand(batch.ids.shape, generator=seeded()) < 0.3)
    for size in 1, 40, 75, 9999:
        seen = torch.zeros_like(batch.ids)
        rest = sorted(max([1, *row.nonzero()[:, 0].tolist()]) + 1 for row in keep)
        cfg = config(micro_batch_size=size)
        for rows, micro, kept in forking.micro_batches(batch, keep, cfg):
            count, width = kept.shape
            assert width == rest[-1]
            assert count == 1 or count * width <= size
            assert count == len(rest) or (count + 1) * width > size
            del rest[-count:]
            seen[rows, :width] += kept + 2 * torch.ones_like(kept)
            for part, whole in zip(micro, batch, strict=True):
                assert torch.equal(part, whole[rows, :width])
        assert rest == []
        assert torch.equal(seen % 2 == 1, keep)
        assert seen.max() <= 3  # no row twice


def trained(model, tokenizer, prompts, lr=1e-3, **flags):
    cfg = config(**{"reward": coin, "minibatches": 2, "tokens": "all"} | flags)
    problems = [Problem("?", "3", ids, "") for ids in prompts]
    groups = forking.sample_and_grade(model, tokenizer, problems, 4, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    return forking.update(model, optimizer, groups, cfg, torch.Generator().manual_seed(0))


def test_gradient_checkpointing_computes_layers_twice_and_changes_no_digit(base, prompts):
    results = []
    for thrifty in False, True:
        model, tokenizer = load_policy(base, config(gradient_checkpointing=thrifty))
        calls = []
        hook = lambda *_, calls=calls: calls.append(torch.is_grad_enabled())  # noqa: E731
        model.model.layers[0].mlp.register_forward_pre_hook(hook)
        metrics = trained(model, tokenizer, prompts)
        results.append((metrics, calls.count(False), calls.count(True), model.state_dict()))
    (expected, sampled, once, weights), (metrics, also, twice, others) = results
    assert metrics == expected
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert sampled == also > 0
    assert twice == 2 * once > 0


def test_gradient_checkpointing_does_not_turn_dropout_on(prompts, tmp_path):
    """A layer of OPT drops out by itself while it is training."""
    random_model(tmp_path, "opt", dropout=0.5, ffn_dim=64, word_embed_proj_dim=32)
    model, tokenizer = load_policy(tmp_path, config(gradient_checkpointing=True))
    assert trained(model, tokenizer, prompts)["sampler_mismatch"] < 1.001


def test_with_offload_a_run_does_the_same_and_can_be_continued_without(run, finished):
    run("--offload --steps 2")
    assert dist.get_world_size() == 1
    dist.destroy_process_group()
    for metrics, expected in zip(log_of(run("--resume")), log_of(finished), strict=True):
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_bfloat16_only_computes_and_small_steps_are_not_lost(base, prompts):
    model, tokenizer = load_policy(base, config(dtype="bfloat16"))
    before = [weight.full_tensor().clone() for weight in model.parameters()]
    flags = {"dtype": "bfloat16", "minibatches": 1}
    assert 1.001 < trained(model, tokenizer, prompts, 1e-6, **flags)["sampler_mismatch"] < 1.2
    for weight, old in zip(model.parameters(), before, strict=True):
        assert weight.dtype == torch.float32
        assert ((weight.full_tensor() - old).abs() > 5e-7).float().mean() > 0.9
    dist.destroy_process_group()


HOW = {"capture_output": True, "timeout": 300, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
SCRIPT = """
import os, signal, sys
sys.path.insert(0, %r)
import forking
def reward(text, target):
    if stops and forking.ranks()[0] == 1:  # only one of the two gets the signal, several times
        os.kill(os.getpid(), signal.SIGTERM)
    os.write(1, b"graded ")
    return sum((text + target).encode()) %% 2
leave, os._exit = os._exit, print  # what main() does at its end
for line in open(sys.argv[1]):
    code, stops = 0, "--save-every 0" in line
    try:
        forking.main(line.split(), reward)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 130 * stops
leave(0)
"""


def test_two_processes_do_what_one_does(flags, base, tmp_path):
    """Also a run stopped by a signal after a step. Of 15 rows, the last leaves one without.

    Each answer is graded once: not every reward would give it the same score again.
    """
    random_model(tmp_path / "llama", "llama", tie_word_embeddings=False)
    tied = f"{flags} --group-size 5 --micro-batch-size 1 --minibatches 1 --steps 2"
    other = f"{tied} --model {tmp_path}/llama --tokens all --epochs 2 --eval-every 0"
    runs = f"{tied} --out {tmp_path}/tied-2\n"
    for more in "--save-every 0", "--resume":
        runs += f"{other} --offload --gradient-checkpointing --out {tmp_path}/other-2 {more}\n"
    (tmp_path / "runs.txt").write_text(runs)
    (tmp_path / "script.py").write_text(SCRIPT % str(TINY.parent))
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 {tmp_path}/script.py"
    command = [sys.executable, *command.split(), tmp_path / "runs.txt"]
    result = subprocess.run(command, **HOW)
    assert result.returncode == 0, result.stderr
    graded = []
    for line in f"{tied} --out {tmp_path}/tied-1", f"{other} --out {tmp_path}/other-1":
        forking.main(line.split(), lambda *pair: graded.append(pair) or coin(*pair))
    assert result.stdout.count(b"graded") == len(graded) > 60
    for name, start in ("tied", base), ("other", tmp_path / "llama"):
        one, two = (tmp_path / f"{name}-{n}" for n in (1, 2))
        for expected, metrics in zip(log_of(one), log_of(two), strict=True):
            assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert folders(one) == folders(two)
        paths = *one.glob("checkpoint*"), *two.glob("checkpoint*"), start
        models = map(AutoModelForCausalLM.from_pretrained, paths)
        one, two, before = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in models)
        assert (one - two).norm() < 0.01 * (one - before).norm()


# ---------------------------------------------------------------------- 10 Log and checkpoints
ALWAYS = {"step", "tokens", "tokens_per_second", "seconds"}
TESTED = {"accuracy", "stderr", "pass_at_k"}
SAMPLED = {"reward", "length", "truncated", "groups_kept", "updates"}
UPDATED = {"loss", "entropy", "threshold", "kept", "clipped", "sampler_mismatch", "grad_norm"}


def test_a_run_logs_these_numbers_of_each_step_and_samples_of_some(finished):
    """Of the first step, those when it is tested, and the last."""
    log, samples = (lines_of(finished / f"{name}.jsonl") for name in ("metrics", "samples"))
    printed = (finished / "printed").read_text()
    assert [metrics["step"] for metrics in log] == [0, 1, 2, 3, 4]
    for metrics in log:
        trained = SAMPLED | UPDATED if metrics["step"] > 0 else set()
        tested = TESTED if metrics["step"] in (0, 2, 4) else set()
        assert metrics.keys() == ALWAYS | trained | tested
    for before, metrics in itertools.pairwise(log):
        tokens = metrics["tokens"] - before["tokens"]
        seconds = metrics["seconds"] - before["seconds"]
        assert tokens == pytest.approx(metrics["length"] * 12)  # completions
        assert metrics["tokens_per_second"] == pytest.approx(tokens / seconds)
        assert metrics["kept"] == pytest.approx(0.2, abs=0.02)
        assert 0 < metrics["truncated"] < 1
        assert f"step {metrics['step']}/4  reward {metrics['reward']:.3f} " in printed
    assert [record["step"] for record in samples] == [1] * 6 + [2] * 6 + [4] * 6
    assert forking.mark_forks(samples[-2]) in printed
    assert re.findall(r"saved .*checkpoint-(\d)", printed) == ["2", "4"]


def test_samples_are_the_best_and_the_worst_answer_to_each_question(tokenizer):
    """Token by token, but of long answers the first 300 tokens."""
    group, problem = [], Problem("1+2=?", "3", [], "")
    for reward, n in (0.5, 3), (-1.0, 400), (0.5, 4), (1.0, 2):
        ids, mask = torch.randint(3, 99, (5 + n,)), torch.arange(5 + n) >= 5
        logp, entropy = torch.rand(2, 5 + n)
        rest = "", n, n > 300, problem, reward, reward, logp
        group.append(forking.Completion(ids, mask, logp, entropy, *rest))
    every = torch.cat([completion.entropy[5:] for completion in group]).sort(descending=True)
    best, worst = forking.sample_records(7, [group], tokenizer, config())
    for record, chosen in (best, group[3]), (worst, group[1]):
        expected = {"step": 7, "question": "1+2=?", "target": "3"}
        expected |= {name: getattr(chosen, name) for name in ("reward", "truncated", "length")}
        expected["threshold"] = every.values[math.ceil(0.2 * 409) - 1].item()
        expected["tokens"] = tokenizer.convert_ids_to_tokens(chosen.ids[5:305].tolist())
        expected["entropy"] = chosen.entropy[5:305].tolist()
        assert record == expected | {"logp": chosen.logp_old[5:305].tolist()}
    text = forking.mark_forks(
        record | {"tokens": ["a", "b"], "threshold": 1, "entropy": [1, 0.9]}
    )
    assert text == "    1+2=?\n    [a]b   (reward -1)"


def test_when_nothing_is_right_there_are_samples_and_a_hint(run, capsys):
    out = run("--steps 1 --prompts-per-step 5", reward=lambda text, target: 0.0)
    _, metrics = log_of(out)
    assert metrics.keys() == {"step", "tokens"} | SAMPLED | TESTED
    assert metrics["updates"] == metrics["groups_kept"] == metrics["reward"] == 0
    assert [record["reward"] for record in lines_of(out / "samples.jsonl")] == [0] * 8
    cut_off = f"{metrics['truncated']:.0%} are cut off"
    assert f"no group has rewards that differ ({cut_off})" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_a_folder_that_transformers_can_read(tied, run, tmp_path, monkeypatch):
    random_model(tmp_path / "base", "llama", tie_word_embeddings=tied)
    load, loaded = forking.load_policy, []
    monkeypatch.setattr(forking, "load_policy", lambda *x: loaded.append(load(*x)) or loaded[0])
    folder = run(f"--model {tmp_path}/base --steps 2 --eval-every 0") / "checkpoint-2"
    (model, _), tokenizer = loaded[0], AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode("1+2*3=?\n")])
    same, before = map(AutoModelForCausalLM.from_pretrained, (folder, tmp_path / "base"))
    assert torch.equal(same(ids).logits, model(ids).logits)
    assert not torch.allclose(same(ids).logits, before(ids).logits, atol=0.01)
    torch.load(folder / "trainer.pt", weights_only=True)  # there is no code in it


KILL = """
import os, signal
def reward(text, target, log="\u221a2/metrics.jsonl"):
    if os.path.exists(log) and len(open(log).readlines()) == 4:  # in step 4; step 2 is saved
        os.kill(os.getpid(), signal.SIGKILL)
    return sum((text + target).encode()) % 2
"""


def test_a_run_killed_goes_on_to_the_same_last_bit(flags, run, finished, tmp_path, monkeypatch):
    """With kill -9, or in saving. The command works anywhere; LOCAL_RANK is not torchrun."""
    (tmp_path / "kill.py").write_text(KILL)
    command = [sys.executable, TINY.parent / "forking.py", *flags.split(), "--reward=kill.py"]
    env = HOW["env"] | {"PYTHONIOENCODING": "ascii", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    killed = subprocess.run([*command, "--out=\u221a2"], cwd=tmp_path, **HOW | {"env": env})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert b"saved ?2/checkpoint-2\nstep 3/4 " in killed.stdout  # in spite of the terminal
    out = tmp_path / "\u221a2"
    monkeypatch.setattr(torch, "save", None)
    with pytest.raises(TypeError):
        run(f"--resume --out {out}")
    monkeypatch.undo()
    assert folders(out) == ["checkpoint-2", "unfinished"]
    run(f"--resume --out {out}")
    assert all_of(out) == all_of(finished)
    assert folders(out) == ["checkpoint-4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_saved(number, run, finished, flags, tmp_path):
    """Continued, also with a copy of the data, it is as if it had not been interrupted."""

    def reward(text, target):
        if not forking.STOP and len(log_of(tmp_path)) == 3:  # in step 3
            os.kill(os.getpid(), number)
        return coin(text, target)

    (tmp_path / "metrics.jsonl").touch()
    before = signal.signal(number, print)
    with pytest.raises(SystemExit, match="^130$"):
        run(reward=reward)
    assert signal.signal(number, before) is print  # it was put back
    assert forking.STOP == []  # so that another run can begin
    assert len(log_of(tmp_path)) == 4
    assert folders(tmp_path) == ["checkpoint-3"]
    shutil.copytree(Path(flags.split()[-1]).parent, tmp_path, dirs_exist_ok=True)
    assert all_of(run(f"--resume --data {tmp_path}/train.jsonl")) == all_of(finished)


def test_a_second_signal_ends_a_run_at_once(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="^130$"):
        run("--eval-every 0", lambda *_: os.kill(os.getpid(), signal.SIGINT) or 0)
    assert "add --resume" in (printed := capsys.readouterr()).out
    assert printed.err == "stopping after this step (again: at once, unsaved)\n"
    assert (len(log_of(tmp_path)), folders(tmp_path)) == (1, [])


def test_a_run_stopped_before_any_optimizer_step_goes_on_as_it_was(run, tmp_path):
    """Adam counts its steps: a second one is not the same as the first."""
    graded = itertools.count()
    more = "--eval-every 0 --save-every 0 --steps 3"
    run(f"{more} --out {tmp_path}-whole", lambda *x: coin(*x) if next(graded) >= 12 else 0)
    assert folders(run(f"{more} --steps 1", lambda text, target: 0)) == ["checkpoint-1"]
    out = run(f"{more} --resume")
    assert [metrics["updates"] > 0 for metrics in log_of(out)[1:]] == [False, True, True]
    assert all_of(out) == all_of(Path(f"{tmp_path}-whole"))


REFUSED = r"""
    --steps 5 -> --out OUT: holds a run; add --resume   --show -> --out OUT: holds a run
    --resume --rho 0.5 -> OUT/checkpoint-4 was trained with other data or flags: {'rho': 0.2}
    --resume --prompt Q:{question} -> 'prompt': 'plain'   --resume --lr 0.1 -> {'lr': 0.001}
    --resume --model other -> was trained with other data or flags: {'model': '
    --resume --data OUT/other.jsonl -> was trained with other data or flags: {'data':
    trainer.pt -> OUT/checkpoint-4: trainer.pt is missing or damaged
    model.safetensors -> model OUT/checkpoint-4:    config.json -> model OUT/checkpoint-4:
"""


@pytest.mark.parametrize("more, message", cells(REFUSED, "->"))
def test_what_cannot_be_continued_is_refused(more, message, finished, refused, tmp_path):
    """And what is there stays as it is. A name is that of a file which is cut short."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "other.jsonl").write_text(GOOD)
    if not more.startswith("--"):
        os.truncate(tmp_path / "checkpoint-4" / more, 100)
        more = "--resume"
    before = all_of(tmp_path)
    assert message.replace("OUT", str(tmp_path)) in refused(more.replace("OUT", str(tmp_path)))
    assert all_of(tmp_path) == before


# -------------------------------------------------------------------- 11 Compare, show and main
def test_help_shows_each_field_of_config_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        forking.main(["--help"])
    shown = capsys.readouterr().out
    assert re.findall(r"\n  --([a-z_]+)", shown) == list(vars(config()))
    for name, comment in re.findall(r"\n    (\w+): .* # (.+)", inspect.getsource(Config)):
        line = f"{comment} (default: {Config.__dataclass_fields__[name].default})"
        assert "".join(line.split()) in "".join(shown.split())  # argparse breaks lines
        assert f"cfg.{name}" in Path(forking.__file__).read_text()  # it is used


def test_some_defaults_depend_on_other_flags(tmp_path):
    train, tests = (str(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    assert config(data=train).eval_data == ""
    Path(tests).write_text(GOOD)
    assert config(data=train).eval_data == tests
    assert config(data=train, eval_data="mine").eval_data == "mine"
    assert config(data=tests).eval_data == ""  # these are trained on
    assert config(model="a/b", tokens="all", seed=7).out == "out/b-all-seed7"
    assert Path(Config().model).samefile(TINY / "gpt2")
    assert Path(Config().data).samefile(TINY / "train.jsonl")
    zeros = dict.fromkeys(forking.MAY_BE_0.split(), 0)
    assert zeros.items() <= vars(config(**zeros)).items()


@pytest.fixture(scope="session")
def bad(base, tmp_path_factory):
    """A folder of files and models with which one cannot begin."""
    folder = tmp_path_factory.mktemp("bad")
    files = {"empty.jsonl": "\n", "broken.jsonl": f"{GOOD}\n{{oops\n", "one.py": "reward = 1"}
    files["nan.py"] = "def reward(text, target): return float('nan')"
    files |= {
        "needs.py": "import missing_package",
        "mamba/config.json": '{"model_type": "mamba"}',
    }
    AutoTokenizer.from_pretrained(TINY / "gpt2").save_pretrained(folder / "mamba")
    for name, text in files.items():
        (folder / name).write_text(text)
    weights = load_file(shutil.copytree(base, folder / "nan") / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "nan/model.safetensors", metadata={"format": "pt"})
    return folder


MISTAKES = r"""
    --data BAD/no.jsonl -> No such file or directory: 'BAD/no.jsonl'   --model BAD -> model BAD:
    --data BAD -> Is a directory: 'BAD'   --data BAD/empty.jsonl -> no questions are left
    --model no/model -> model no/model:   --model BAD/nan -> the model's probabilities are NaN
    --reward BAD/no.py -> No such file or directory: 'BAD/no.py'   --lrs 1 -> unrecognized
    --reward BAD/one.py -> --reward: must be, or define, a function reward
    --reward BAD/needs.py -> No module named 'missing_package'
    --model BAD/mamba -> has no ordinary cache   --device tpu -> invalid choice: 'tpu'
    --reward BAD/nan.py -> --reward: must be a number, not nan   --rho 0 -> --rho: must not be 0
    --out BAD/one.py/run -> Not a directory: 'BAD/one.py/run'   --tokens fork -> invalid choice
    --prompt chat -> it has no chat template, which --prompt chat needs
    --prompt hello -> --prompt: plain, boxed, answer, chat, or a text with {question}
    --max-new-tokens 99999 -> no questions are left   --rho 20 -> --rho: must be at most 1
    --rho nan -> --rho: must not be nan   --lr inf -> --lr: must not be inf
    --group-size 0 -> --group-size: must not be 0   --seed -1 -> --seed: must not be -1
    --temperature 0 -> --temperature: must not be 0   --steps -1 -> --steps: must not be -1
    --steps -> argument --steps: expected one argument   --seeds 0.5 -> invalid int value: '0.5'
    --rho much -> invalid float value: 'much'   --dual-clip 0.5 -> must be above 1, or 0
"""
BROKEN = "--data BAD/broken.jsonl", "BAD/broken.jsonl:2: JSONDecodeError"
HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="here, --device cuda is no mistake")
NO_GPU = pytest.param("--device cuda", "argument --device: invalid choice: 'cuda'", marks=HERE)


@pytest.mark.parametrize("more, message", [*cells(MISTAKES, "->"), BROKEN, NO_GPU])
def test_a_mistake_ends_in_one_line_that_names_it(more, message, bad, refused, monkeypatch):
    """With exit code 2."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # ask nobody
    assert message.replace("BAD", str(bad)) in refused(more.replace("BAD", str(bad)))


def test_with_0_steps_it_only_tests_and_with_eval_every_0_it_never_does(run):
    (metrics,) = log_of(run("--steps 0"))
    assert metrics.keys() == TESTED | {"step", "tokens"}
    log = log_of(run("--steps 1 --eval-every 0 --eval-data missing.jsonl"))
    assert not any(TESTED & metrics.keys() for metrics in log)


def test_a_reward_is_a_function_or_a_file_that_defines_one(run, tmp_path):
    (tmp_path / "mine.py").write_text("def reward(text, target): return len(set(text))")
    by_file = log_of(run(f"--steps 0 --reward {tmp_path}/mine.py"))
    assert by_file[0]["accuracy"] > 1
    assert log_of(run("--steps 0", lambda text, target: len(set(text)))) == by_file
    assert json.loads((tmp_path / "config.json").read_text())["reward"] == "<lambda>"


@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError])
def test_an_error_of_a_reward_function_is_its_own(error, run):
    def reward(text, target):
        raise error("mine")

    with pytest.raises(error, match="mine"):
        run("--steps 1", reward)


def test_a_comparison_trains_on_four_kinds_of_tokens_and_only_once(run, capsys, monkeypatch):
    more = "--compare --steps 1 --eval-every 0 --seeds 1"
    out = run(more)
    expected = {"top": 0.2, "all": 1, "random": 0.2, "bottom": 0.8}
    expected = {f"{kind}-0.2-seed3": share for kind, share in expected.items()}
    found = {name: log_of(out / name)[1]["kept"] for name in folders(out)}
    assert found == pytest.approx(expected, abs=0.02)
    monkeypatch.setattr(forking, "rollout", None)
    run(more)
    assert capsys.readouterr().out.count("checkpoint-1: 1 steps are already done") == 4


def test_show_samples_marks_forks_and_does_not_train(run, capsys, monkeypatch):
    """Afterwards, its folder is free for a run."""
    monkeypatch.setattr(forking, "update", None)
    out = run("--show --prompts-per-step 5")
    records, printed = lines_of(out / "samples.jsonl"), capsys.readouterr().out
    assert len(records) == 10
    assert all(forking.mark_forks(record) in printed for record in records[:8])
    assert lines_of(out / "metrics.jsonl") == folders(out) == []
    monkeypatch.undo()
    assert folders(run("--steps 1")) == ["checkpoint-1"]


def test_main_runs_in_a_thread_too(run, finished, tmp_path):
    """Where signals cannot be handled. The same seed gives the same run."""
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert all_of(tmp_path) == all_of(finished)

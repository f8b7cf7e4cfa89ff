"""The tests of forking.py, in the order of its sections: those of the lesson come first.

Every expected number can be checked by hand, or comes from somewhere else than forking.py: a
plain Python loop, brute force, transformers' own forward pass and generate(). To run them, in
two or three minutes:

    pytest -q test_forking.py

The first helpers and the small models that all sections share are right below.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network

import copy
import functools
import gc
import inspect
import itertools
import json
import math
import multiprocessing
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import weakref
from dataclasses import fields
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import forking
from forking import (
    Completion,
    Config,
    Problem,
    clipped_objective,
    collate,
    draw,
    encode,
    evaluate,
    extract_answer,
    find_files,
    fork_mask,
    group_advantages,
    in_parts,
    is_correct,
    load_policy,
    load_problems,
    logits_at,
    mark_forks,
    micro_batches,
    overlong_penalty,
    policy_entropy,
    rollout,
    sample,
    sample_groups,
    sample_record,
    step_line,
    token_entropy,
    update,
    whole_weights,
)

HERE = Path(forking.__file__).resolve().parent
GPT2 = HERE / "tiny_data/gpt2"
torch.set_num_threads(1)  # enough for models this small


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(groups):
    """The completions of all groups in one list."""
    return list(itertools.chain.from_iterable(groups))


def read(model, ids, temperature=1.0):
    """Log-probability and entropy at each of (T,) tokens, by one plain forward pass."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double() / temperature
    logp = logits.log_softmax(-1)  # (T - 1, V): nothing predicts the first token
    entropy = -(logp.exp() * logp).sum(1)
    logp = logp.gather(1, ids[1:, None])[:, 0]
    return F.pad(logp, (1, 0)), F.pad(entropy, (1, 0))


@pytest.fixture(scope="session")
def models():
    """The tiny GPT-2, and a random Qwen3, Llama and Gemma 3.

    Qwen3's output layer is tied to the embeddings, Llama's is not, and Gemma 3 looks 7 tokens
    back. The random ones have large weights, lest all tokens be equally likely, and four end
    tokens, lest no completion ever end.
    """
    shape = {
        "vocab_size": 102,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": [1, 17, 40, 77],
    }
    window = {"sliding_window": 7, "sliding_window_pattern": 2, "final_logit_softcapping": 9.0}
    configs = {
        "qwen3": Qwen3Config(**shape, tie_word_embeddings=True),
        "llama": LlamaConfig(**shape, tie_word_embeddings=False),
        "gemma3": Gemma3TextConfig(**shape, **window),
    }
    torch.manual_seed(0)
    made = {"gpt2": load_policy(GPT2, Config())[0]}
    for name, config in configs.items():
        made[name] = AutoModelForCausalLM.from_config(config).eval()
    return made


@pytest.fixture(params=["gpt2", "qwen3", "llama", "gemma3"])
def model(request, models):
    return models[request.param]


@pytest.fixture(scope="session")
def gpt2(models):
    return models["gpt2"]


@pytest.fixture(scope="session")
def tokenizer():
    return load_policy(GPT2, Config())[1]


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Of four lengths, so that all but the longest need padding."""
    questions = ("1+2*3", "4+5*6-1", "7", "3*3-2+1*9")
    return [tokenizer.encode(f"{question}=?\n") for question in questions]


# ------------------------------------------------------------------------------------- 1 Sample
@pytest.mark.parametrize("temperature, ends", [(1.0, 1), (0.7, 1), (1.0, 999), (1.0, 13)])
def test_the_sampler_records_what_one_forward_pass_over_the_completion_gives(
    model, tokenizer, prompts, temperature, ends, monkeypatch
):
    """In spite of cache and padding.

    A GPT-2 with padding on the left, but without position_ids, would fail. If only token 999
    ends a completion, none ends within 100 tokens, and the cache grows often; token 13 ends
    some early and some late.
    """
    monkeypatch.setattr(forking, "end_tokens", lambda model, tokenizer: [ends])
    length = 24 if ends == 1 else 100
    groups = sample(model, tokenizer, prompts, 3, length, temperature, range(4))
    assert [len(group) for group in groups] == [3, 3, 3, 3]

    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids, mask = completion.ids, completion.response_mask
            assert ids[: len(prompt)].tolist() == prompt
            assert mask.tolist() == [t >= len(prompt) for t in range(len(ids))]

            logp, entropy = read(model, ids, temperature)
            assert torch.allclose(completion.logp.double(), logp * mask, atol=2e-4)
            assert torch.allclose(completion.entropy.double(), entropy * mask, atol=2e-4)


HYBRID = {"vocab_size": 102, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
HYBRID |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
HYBRID |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": [1, 17, 40, 77]}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "head_dim": 16}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"] * 2}
HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_5_text": LINEAR,
    "jamba": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "llama4_text": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "moe_layers": [1],
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 64,
        "head_dim": 16,
    },
}


def tiny(name, **more):
    """A random model of some architecture of transformers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **HYBRID | more)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", HYBRIDS)
def test_models_with_other_layers_than_attention_are_sampled_and_trained(
    name, tokenizer, prompts
):
    """Also compared with one forward pass. States of layers leave the batch with their rows."""
    hybrid = tiny(name, **HYBRIDS[name])
    groups = sample(hybrid, tokenizer, prompts, 3, 24, 1.0, range(4))
    assert len({len(completion.ids) for completion in flat(groups)}) > 3
    for completion in flat(groups):
        logp, entropy = read(hybrid, completion.ids)
        mask = completion.response_mask
        assert torch.allclose(completion.logp.double(), logp * mask, atol=5e-4)
        assert torch.allclose(completion.entropy.double(), entropy * mask, atol=5e-4)
        completion.advantage = 1.0
    optimizer = torch.optim.AdamW(hybrid.parameters(), lr=1e-4)
    metrics = update(hybrid, optimizer, groups, Config(minibatches=2, tokens="all"))
    assert metrics["sampler_mismatch"] < 1.001
    assert metrics["skipped"] == 0


@pytest.mark.parametrize("name", ["mamba", "minimax"])
def test_a_model_without_an_ordinary_cache_is_refused_in_one_line(
    name, tokenizer, small, tmp_path, capfd
):
    more = {"mamba": {"state_size": 8}, "minimax": {"num_local_experts": 4, "block_size": 16}}
    tiny(name, **more[name]).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    capfd.readouterr()  # what transformers says of such a model
    with pytest.raises(SystemExit, match="2"):
        main(f"{small} --model {tmp_path}/base --eval-every 0 --out {tmp_path}/out")
    *_, line = capfd.readouterr().err.splitlines()
    assert "no ordinary cache" in line


@pytest.mark.parametrize("step", [1, 2])
def test_a_model_whose_probabilities_are_others_with_a_cache_is_refused(
    step, small, tmp_path, monkeypatch, capfd
):
    """Here, all are off by 2 %, from some step on (as if it had had no padding before)."""
    real, rollouts = forking.rollout, []

    def off(*arguments):
        groups, metrics = real(*arguments)
        rollouts.append(groups)
        for completion in flat(groups) if len(rollouts) >= step else []:
            completion.logp += 0.02 * completion.response_mask
        return groups, metrics

    monkeypatch.setattr(forking, "rollout", off)
    with pytest.raises(SystemExit, match="2"):
        main(f"{small} --eval-every 0 --steps 3 --save-every 1 --out {tmp_path}/run")
    (line,) = capfd.readouterr().err.splitlines()
    assert "1.020 times" in line
    assert (tmp_path / "run/model").exists() == (step > 1)


def test_greedy_completions_are_those_of_transformers_generate(model, tokenizer, prompts):
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
    theirs = model.generate(**batch, do_sample=False, max_new_tokens=24)
    groups = sample(model, tokenizer, prompts, 1, 24, 0, range(4))

    for (ours,), their in zip(groups, theirs, strict=True):
        tokens = ours.ids[ours.response_mask].tolist()
        expected = their[batch.input_ids.shape[1] :].tolist()
        assert tokens == expected[: len(tokens)]
        assert set(expected[len(tokens) :]) <= {tokenizer.pad_token_id}
        assert ours.entropy.abs().max() < 1e-3  # greedy is certain
        assert ours.logp.abs().max() < 1e-3


def test_a_completion_depends_on_nobody_else_in_the_batch(model, tokenizer, prompts):
    """Each group sampled alone is the same as all at once.

    So neither padding, nor the prompt shared by a group, nor others that end early make a
    difference, nor the process that samples it.
    """
    together = sample(model, tokenizer, prompts, 3, 24, 1.0, range(4))
    for seed, (prompt, group) in enumerate(zip(prompts, together, strict=True)):
        (alone,) = sample(model, tokenizer, [prompt], 3, 24, 1.0, [seed])
        for a, b in zip(group, alone, strict=True):
            assert a.ids.tolist() == b.ids.tolist()
            assert a.finished == b.finished
            assert torch.allclose(a.logp, b.logp, atol=2e-4)
            assert torch.allclose(a.entropy, b.entropy, atol=2e-4)

    lengths = {int(completion.response_mask.sum()) for completion in flat(together)}
    assert len(lengths) > 1  # some did end early


@pytest.mark.parametrize("ends", [1, [1], [1, 17, 40, 77], [17, 40], 40, None], ids=str)
def test_a_completion_ends_with_the_first_end_token_which_is_part_of_it(
    models, tokenizer, prompts, ends, monkeypatch
):
    """Those of the generation config, and the tokenizer's, which is 1."""
    model = models["qwen3" if ends == [1, 17, 40, 77] else "gpt2"]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    end_tokens = {1} | set(ends if isinstance(ends, list) else [ends or 1])
    completions = flat(sample(model, tokenizer, prompts, 4, 26, 1.0, range(4)))

    for completion in completions:
        tokens = completion.ids[completion.response_mask].tolist()
        assert not end_tokens & set(tokens[:-1])
        assert completion.finished == (tokens[-1] in end_tokens)
        assert completion.finished or len(tokens) == 26
        visible = [token for token in tokens if token > 2]  # 0 to 2: pad, eos, unk
        assert completion.text == tokenizer.decode(visible)
    assert {completion.finished for completion in completions} == {True, False}


def byte_tokenizer(texts, size=400):
    """A byte-level BPE tokenizer, of whose tokens many hold several words of the texts."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


FEW_SHOT = "Question: 1+2=?\n\nAnswer: 3\n\nQuestion: o\u00f9 est \u221a5?\n\n#### 4\n"


@pytest.mark.parametrize("stop", ["\n\n", "Question:", "n:", "\u221a", "3", "=?\n\n#"])
def test_the_token_that_completes_a_stop_text_ends_a_completion(stop, models, monkeypatch):
    """Compared with decoding each beginning of what is sampled when nothing ends it.

    A token may hold more than the text, or only some bytes of a character of it. The prompt
    ends in a beginning of some of these texts, which does not count.
    """
    monkeypatch.setattr(forking, "end_tokens", lambda model, tokenizer: [])
    tokenizer = byte_tokenizer([FEW_SHOT] * 20)
    config = copy.deepcopy(models["gpt2"].config)
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [tokenizer.encode("Question: 1+2=?\n")]
    useful = [i for i in range(1, len(tokenizer)) if set(tokenizer.decode([i])) & set(stop)]
    pool = torch.tensor([*range(1, len(tokenizer)), *useful * 20])

    def draw_from_pool(logits, temperature, uniform):
        nothing = torch.zeros(len(uniform))
        return pool[(uniform * len(pool)).long()], nothing, nothing

    monkeypatch.setattr(forking, "draw", draw_from_pool)

    def all_of_them(stop):
        return sample(model, tokenizer, prompts, 60, 26, 1.0, [0], stop)[0]

    finished = longer = 0
    for endless, completion in zip(all_of_them(""), all_of_them(stop), strict=True):
        ids = endless.ids[endless.response_mask].tolist()
        decoded = [tokenizer.decode(ids[:n]) for n in range(1, 27)]
        n = next((n for n, text in enumerate(decoded, 1) if stop in text), None)
        text = decoded[(n or 26) - 1]
        assert completion.ids[completion.response_mask].tolist() == ids[:n]
        assert completion.finished == (n is not None)
        assert completion.text == (text[: text.index(stop)] + stop if n else text)
        finished += completion.finished
        longer += len(text) > len(completion.text)
    assert finished > 3
    assert longer or stop == "\u221a"


def test_the_tiny_model_stops_at_a_stop_text_and_is_the_same_up_to_there(
    gpt2, tokenizer, prompts
):
    """Of one character or of several, which are several tokens here."""
    (endless,) = sample(gpt2, tokenizer, prompts[1:2], 40, 26, 1.0, [0])
    for stop in "=", "; 9", ".":
        (group,) = sample(gpt2, tokenizer, prompts[1:2], 40, 26, 1.0, [0], stop)
        for whole, completion in zip(endless, group, strict=True):
            assert completion.text == "".join(whole.text.partition(stop)[:2])
            assert completion.finished == (whole.finished or stop in whole.text)
        assert any(
            len(c.text) < len(whole.text) for whole, c in zip(endless, group, strict=True)
        )


def test_the_same_seed_samples_the_same_completions(gpt2, tokenizer, prompts):
    texts = []
    for seed in 0, 0, 1:
        (group,) = sample(gpt2, tokenizer, prompts[:1], 9, 24, 1.0, [seed])
        texts.append([completion.text for completion in group])
    first, again, other = texts
    assert first == again != other


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(temperature):
    n = 100_000
    p = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.1])
    uniform = torch.rand(n, generator=seeded(), dtype=torch.float64)
    tokens, logp, _ = draw(p.log().expand(n, 5), temperature, uniform)

    expected = p.double() ** (1 / temperature)
    expected /= expected.sum()
    counts = torch.bincount(tokens, minlength=5)
    chi2 = sum((counts[i] - n * expected[i]) ** 2 / (n * expected[i]) for i in (0, 2, 3, 4))
    assert counts[1] == 0
    assert chi2 < 16.3  # 3 degrees of freedom: exceeded once in 1,000 times
    assert torch.allclose(logp.double().exp(), expected[tokens], atol=1e-6)


def test_the_random_number_is_looked_up_in_the_cumulative_distribution():
    logits = torch.tensor([0, 0.25, 0.5, 0.25, 0]).log().expand(6, 5)  # -inf at both ends
    uniform = torch.tensor([0, 0.2, 0.3, 0.7, 0.8, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, 1.0, uniform)[0].tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])  # all that torch.rand gives is between
def test_a_token_of_probability_0_is_never_drawn(uniform):
    logits = torch.randn(500, 300, generator=seeded()) * 5
    logits[torch.rand(500, 300, generator=seeded(1)) < 0.5] = -math.inf
    tokens, logp, entropy = draw(logits, 1.0, torch.full((500,), uniform, dtype=torch.float64))
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    assert logp.isfinite().all()
    assert entropy.isfinite().all()


def test_a_model_that_has_become_nonsense_still_draws_tokens_of_its_vocabulary():
    tokens, *_ = draw(torch.full((3, 5), math.nan), 1.0, torch.rand(3, dtype=torch.float64))
    assert all(0 <= token < 5 for token in tokens.tolist())


@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0, 2.0, 3.0])
def test_the_entropy_of_a_draw_is_that_of_the_distribution_drawn_from(temperature):
    logits = torch.randn(5, 50, generator=seeded()) * 4
    uniform = torch.rand(5, dtype=torch.float64, generator=seeded())
    _, _, entropy = draw(logits, temperature, uniform)
    assert torch.allclose(entropy, token_entropy(logits, temperature), atol=1e-6)


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (list, tuple)) else [result]
        assert not any(getattr(t, "dtype", None) == torch.float64 for t in tensors), func
        return result


def test_where_there_is_no_float64_none_is_used(gpt2, tokenizer, prompts, monkeypatch):
    """On mps. The random numbers are then in float32, and all else follows."""
    cpu = torch.device("cpu")
    mps = types.SimpleNamespace(type="mps")
    real = forking.random_numbers
    (one,) = torch.unbind(real([3], 1, 9, cpu))
    assert one.dtype == torch.float64
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *x, **y: self)
    numbers = real([3], 4, 26, mps)
    monkeypatch.undo()
    assert numbers.dtype == torch.float32

    monkeypatch.setattr(forking, "random_numbers", lambda *x: numbers)
    problems = [Problem("?", "7", prompts[0])]
    with NoFloat64():
        (group,) = sample_groups(gpt2, tokenizer, problems, 4, Config(max_new_tokens=26))
        forking.grade([group], problems, Config())
        group[0].advantage = 1.0
        model = copy.deepcopy(gpt2)
        optimizer = torch.optim.AdamW(model.parameters())
        update(model, optimizer, [group], Config(minibatches=1))
    logp, _ = read(gpt2, group[0].ids)
    assert torch.allclose(group[0].logp.double(), logp * group[0].response_mask, atol=2e-4)


NOBODY = torch.nn.Module()  # a model that need not do anything
NOBODY.device = torch.device("cpu")


def canned(prompt, texts, length=2):
    """Completions that a sampler could have given to a prompt."""
    ids = torch.tensor(prompt + [5] * length)
    mask = torch.arange(len(ids)) >= len(prompt)
    zeros = torch.zeros(len(ids))
    return [Completion(ids, mask, zeros, zeros, text, finished=True) for text in texts]


def can(monkeypatch, texts_for, length=2):
    """Replace sample() by one that gives the texts texts_for(prompt) to a group.

    Returns a list that will get, of each call, a list of the first tokens of its prompts.
    """
    calls = []

    def canned_sample(model, tokenizer, prompts, *rest):
        calls.append([prompt[0] for prompt in prompts])
        return [canned(prompt, texts_for(prompt), length) for prompt in prompts]

    monkeypatch.setattr(forking, "sample", canned_sample)
    return calls


def test_each_round_deals_every_problem_once(monkeypatch):
    calls = can(monkeypatch, lambda prompt: ("?", "Answer: 7"))
    problems = [Problem("?", "7", [i]) for i in range(5)]
    queue, generator = [], seeded()
    for n in 3, 3, 4, 7, 3:
        rollout(NOBODY, None, problems, queue, Config(prompts_per_step=n), generator)

    dealt = flat(calls)
    rounds = [dealt[i : i + 5] for i in range(0, 20, 5)]
    assert len(dealt) == 20
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)
    assert any(one != rounds[0] for one in rounds)


@pytest.mark.parametrize(
    "rounds, mixed, sizes", [(1, 2, [4]), (2, 3, [4, 2]), (9, 4, [4, 2, 1, 1])]
)
def test_groups_all_right_or_all_wrong_are_dropped_and_replaced(
    rounds, mixed, sizes, monkeypatch
):
    right, wrong = "Answer: 7", "Answer: 8"
    groups = itertools.cycle([(right, right), (right, wrong), ("?", "?"), ("?", right)])
    calls = can(monkeypatch, lambda prompt: next(groups))  # flat, mixed, flat, mixed
    problems = [Problem("?", "7", [i]) for i in range(6)]
    cfg = Config(prompts_per_step=4, group_size=2, resample_rounds=rounds)
    groups, metrics = rollout(NOBODY, None, problems, [], cfg, seeded())

    assert [len(call) for call in calls] == sizes
    assert len(groups) == mixed == metrics["groups_kept"]
    for group in groups:
        assert sorted(c.advantage for c in group) == pytest.approx([-1, 1])
    assert metrics["length"] == 2
    assert metrics["tokens"] == 2 * 2 * sum(sizes)
    assert metrics["truncated"] == 0


# -------------------------------------------------------------------------------------- 2 Check
BOXES = [
    (r"so it is \boxed{5}.", "5"),
    (r"\boxed{1} no, \boxed{2}", "2"),  # the last one counts
    (r"\boxed{1} no, \boxed{2", "1"),  # cut off: the last one that is complete
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{{1}", None),
    (r"} \boxed {7} {", "7"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\{1}", r"\{1"),  # escaped braces do not nest
    (r"\boxed{4} is a part. Answer: 5", "5"),  # the later one wins
    (r"Answer: 5, that is, \boxed{6}", "6"),
    ("#### 5\n\\boxed{6}", "6"),
    (r"\boxed{5 \boxed{6}}", "6"),
    (r"\boxed{5} \boxed{}", ""),
]
MARKERS = [("Answer: 5 Answer: 6", "6"), ("#### 5\n#### 6", "6"), ("3+1=4\n#### 4", "4")]
MARKERS += [("Answer: 3\nno wait. Answer: 4\nbye", "4"), ("the ANSWER : 4", "4")]
MARKERS += [("**Answer:** 4", "4"), ("**Answer**: 4", "4"), ("Answer:\n4", "4")]
MARKERS += [("it is 4", None), ("Answer:", ""), ("", None)]
MARKERS += [("the answer: 9*2=18 dollars\n#### 18", "18"), ("#### 5\nAnswer: 6", "6")]
MARKERS += [("Answer\uff1a42", "42"), (r"\textbf{Answer:} 4", "4"), ("Answer: `4`", "4")]
MARKERS += [("So the answer is 42.", "42."), ("The answer is: $18", "$18")]
MARKERS += [("Answer:\n$$\n5\n$$", "5"), ("Answer: **5**.", "5**."), ("Answer: 5\r\n6", "5")]
MARKERS += [
    ("\\boxed{5}\n#### Check\n2+3", "5"),
    ("#### $5", "$5"),
    (r"#### \frac12", r"\frac12"),
]
MARKERS += [("The answer is 5 or 6", None), (r"\boxed{4}. I hope the answer is right.", "4")]
# a model that thinks
MARKERS += [(r"<think>\boxed{7}, no </think> \boxed{8}", "8"), (r"\boxed{7}</think> So.", None)]
MARKERS += [(r"<think>perhaps \boxed{7}", None), (r"\boxed{7} <think>", None)]
MARKERS += [("<think>a</think> <think>b</think>Answer: 5", "5")]


@pytest.mark.parametrize("text, found", BOXES + MARKERS)
def test_the_answer_is_the_last_box_or_what_follows_the_last_marker(text, found):
    assert extract_answer(text) == found


@pytest.mark.parametrize(
    "length, penalty", [(1, 0), (16_384, 0), (16_385, -1 / 4096), (18_432, -0.5), (20_480, -1)]
)
def test_the_overlong_penalty_grows_linearly_over_the_papers_buffer(length, penalty):
    assert overlong_penalty(length, 20_480, 4_096) == penalty
    assert overlong_penalty(length, 20_480, 0) == 0  # no buffer, no penalty


def test_the_reward_is_1_for_a_right_answer_less_the_overlong_penalty(monkeypatch):
    """Here, the penalty begins after 6 tokens, and there are 9."""
    can(monkeypatch, lambda prompt: ("Answer: 7", "Answer: 8"), length=9)
    cfg = Config(prompts_per_step=1, group_size=2, max_new_tokens=10, overlong_buffer=4)
    (group,), metrics = rollout(NOBODY, None, [Problem("?", "7", [1])], [], cfg, seeded())
    assert [completion.reward for completion in group] == [0.25, -0.75]
    assert metrics["reward"] == -0.25


# ------------------------------------------------------------------------------------ 3 Entropy
@pytest.mark.parametrize("tokens", [1, 2, 10, 151_936])
def test_a_uniform_distribution_over_v_tokens_has_entropy_ln_v(tokens):
    entropy = token_entropy(torch.full((tokens,), 3.0)).item()
    assert entropy == pytest.approx(math.log(tokens), abs=1e-5)


THREE_TO_ONE = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)


@pytest.mark.parametrize(
    "logits, temperature, entropy",
    [
        ([1000.0, 0.0, 0.0], 1, 0),  # certain
        ([0.0, -math.inf, -math.inf], 1, 0),  # 0 ln 0 is 0, not nan
        ([0.0, -math.inf, 0.0], 1, math.log(2)),
        ([math.log(3), 0.0], 1, THREE_TO_ONE),
        ([math.log(9), 0.0], 2, THREE_TO_ONE),  # at T = 2, 9 : 1 becomes 3 : 1
    ],
)
def test_entropy_is_minus_the_sum_of_p_ln_p_with_p_at_the_temperature(
    logits, temperature, entropy
):
    found = token_entropy(torch.tensor(logits), temperature).item()
    assert found == pytest.approx(entropy, abs=1e-6)


def test_entropy_is_float32_even_from_bfloat16_logits():
    logits = torch.randn(2, 3, 1000, generator=seeded()).bfloat16()
    p = logits.double().softmax(-1)
    entropy = token_entropy(logits)
    assert entropy.dtype == torch.float32
    assert entropy.shape == (2, 3)
    assert torch.allclose(entropy.double(), -(p * p.log()).sum(-1), atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_entropies_of_the_policy_are_those_of_the_sampler_and_of_the_full_logits(
    model, tokenizer, prompts, size
):
    """Of all tokens of the 12 completions, whatever the size of the micro-batches."""
    completions = flat(sampled(model, tokenizer, prompts))
    batch = collate(completions, "cpu")
    rows = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda *x: rows.append(x[2].shape[0]))
    entropy = policy_entropy(model, batch, Config(micro_batch_size=size))
    hook.remove()

    assert len(rows) == math.ceil(12 / size)
    assert sum(rows) == batch.response_mask.sum()  # logits are those of response tokens only
    assert torch.allclose(entropy, batch.entropy, atol=1e-4)
    for row, completion in zip(entropy, completions, strict=True):
        _, full = read(model, completion.ids)
        full = full * completion.response_mask
        assert torch.allclose(row[: len(full)].double(), full, atol=1e-4)
        assert row[len(full) :].abs().sum() == 0  # padding


# --------------------------------------------------------------------------------------- 4 Fork
H = torch.tensor(
    [
        [9.0, 0.1, 0.5, 0.3],  # the 9 is a prompt's
        [0.2, 0.4, 7.0, 8.0],  # the 7 and the 8 are padding's
    ]
)
RESPONSE = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()


@pytest.mark.parametrize(
    "tokens, rho, kept",
    [
        ("top", 0.2, [0.5]),
        ("top", 0.4, [0.5, 0.4]),
        ("top", 0.41, [0.5, 0.3, 0.4]),
        ("bottom", 0.4, [0.1, 0.3, 0.2]),
        ("top", 1.0, [0.1, 0.5, 0.3, 0.2, 0.4]),
        ("all", 0.2, [0.1, 0.5, 0.3, 0.2, 0.4]),
        ("bottom", 1.0, []),
    ],
)
def test_the_mask_of_five_tokens_is_right(tokens, rho, kept):
    assert H[fork_mask(H, RESPONSE, rho, tokens)].tolist() == pytest.approx(kept)


FEW = [(0.2, 0, 0), (0.2, 1, 1), (0.2, 5, 1), (0.2, 6, 2), (0.001, 5, 1)]
MORE = [(1.0, 7, 7), (1, 7, 7), (0.07, 100, 7), (0.1, 30, 3), (0.55, 100, 55)]


@pytest.mark.parametrize("rho, n, k", FEW + MORE)
def test_exactly_ceil_rho_n_tokens_are_kept(rho, n, k):
    """Although in floats 0.07 * 100 > 7."""
    entropy = torch.rand(3, 50, generator=seeded())
    response = torch.zeros(150).bool()
    response[torch.randperm(150, generator=seeded())[:n]] = True
    response = response.view(3, 50)
    top, bottom, by_chance, every = (
        fork_mask(entropy, response, rho, tokens)
        for tokens in ("top", "bottom", "random", "all")
    )

    assert (top.sum(), bottom.sum(), by_chance.sum(), every.sum()) == (k, n - k, k, n)
    assert torch.equal(top ^ bottom, response)
    assert torch.equal(every, response)
    assert not (by_chance & ~response).any()


def test_of_equal_entropies_the_first_are_kept():
    mask = fork_mask(torch.full((2, 5), 0.7), torch.ones(2, 5).bool(), 0.2)
    assert mask.tolist() == [[True, True, False, False, False], [False] * 5]


@pytest.mark.parametrize("junk", [1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("tokens", ["top", "bottom", "random", "all"])
def test_prompt_and_padding_do_not_matter_whatever_their_entropy(junk, tokens):
    masks = []
    for value in 0.0, junk:
        entropy = H.masked_fill(~RESPONSE, value)
        masks.append(fork_mask(entropy, RESPONSE, 0.4, tokens, seeded()))
    assert torch.equal(*masks)
    assert not (masks[1] & ~RESPONSE).any()


def test_a_mask_of_0_and_1_selects_the_same_as_one_of_booleans():
    """As an index, integers would mean the rows 0 and 1."""
    assert torch.equal(fork_mask(H, RESPONSE.long(), 0.4), fork_mask(H, RESPONSE, 0.4))


def test_random_tokens_are_repeatable_and_fair():
    entropy = torch.arange(10.0)[None]
    response = torch.ones(1, 10).bool()
    first, again, other = (
        fork_mask(entropy, response, 0.2, "random", seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

    generator = seeded()
    masks = [fork_mask(entropy, response, 0.2, "random", generator) for _ in range(2000)]
    share = torch.stack(masks).float().mean(0)
    assert (share - 0.2).abs().max() < 0.04  # each token one time in five; 0.04 is 4.5 sigma


def test_more_tokens_than_torch_quantile_can_take_are_no_problem():
    entropy = torch.rand(1, 2**24 + 1, generator=seeded())
    mask = fork_mask(entropy, torch.ones_like(entropy).bool(), 0.2)
    assert mask.sum() == 3_355_444  # 2**24 / 5 = 3,355,443.2
    assert entropy[mask].min() >= entropy[~mask].max()


@pytest.mark.parametrize("tokens", ["forks", "Top", "", None])
def test_an_unknown_kind_of_tokens_is_refused(tokens):
    with pytest.raises(ValueError, match="top, bottom, random or all"):
        fork_mask(H, RESPONSE, 0.2, tokens)


# --------------------------------------------------------------------------------------- 5 Loss
@pytest.mark.parametrize(
    "rewards, advantages",
    [
        ([1, 1, 0, 0], [1, 1, -1, -1]),
        # of the next, the mean is 1/4, and the standard deviation 3**0.5 / 4
        ([1, 0, 0, 0], [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ([1, 0.5, 0], [1.5**0.5, 0, -(1.5**0.5)]),
    ],
)
def test_advantages_of_a_group_are_rewards_in_standard_deviations_from_its_mean(
    rewards, advantages
):
    """Each group is on its own: here with another one, in which all rewards are 5."""
    first, second = group_advantages(torch.tensor([rewards, [5.0] * len(rewards)])).tolist()
    assert first == pytest.approx(advantages, abs=1e-6)
    assert second == [0] * len(rewards)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.7, 1 / 3])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_0(reward):
    """Although 7 * 0.1 / 7 need not be 0.1."""
    assert group_advantages(torch.full((2, 7), reward)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_rewards_may_be_integers_or_booleans(dtype):
    rewards = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=dtype)
    assert group_advantages(rewards).tolist() == [[1, 1, -1, -1], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "ratio, A, dual_clip, J, slope",  # slope: dJ / dlogp, which is r A if not clipped
    [
        (1.0, +1, None, 1.0, 1.0),
        (1.0, -1, None, -1.0, -1.0),
        (1.5, 0, None, 0.0, 0.0),
        (1.5, +1, None, 1.28, 0.0),  # good and likelier already: no more of that
        (0.5, +1, None, 0.5, 0.5),  # good, but less likely: never clipped
        (0.5, -1, None, -0.8, 0.0),  # bad and less likely already: no more of that
        (1.5, -1, None, -1.5, -1.5),  # bad, but likelier: never clipped ...
        (9.0, -1, 10.0, -9.0, -9.0),
        (11.0, -1, 10.0, -10.0, 0.0),  # ... but by the dual clip, at c = 10
        (11.0, -1, None, -11.0, -11.0),
        (11.0, +1, 10.0, 1.28, 0.0),
        (11.0, -2, 10.0, -20.0, 0.0),
        (math.exp(500), -1, None, -math.exp(20), 0.0),  # log-ratios stay within +-20
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


REWARDS = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    "function, arguments",
    [
        (token_entropy, (H, 0.7)),
        (fork_mask, (H, RESPONSE, 0.4, "top")),
        (group_advantages, (REWARDS,)),
        (clipped_objective, (H, H.flip(1), 4 - H, 0.2, 0.28, 10.0)),
    ],
    ids=["token_entropy", "fork_mask", "group_advantages", "clipped_objective"],
)
def test_the_four_functions_of_the_paper_can_be_copied_out_of_the_file(function, arguments):
    """They need nothing but torch and math."""
    alone = {"math": math, "torch": torch}
    exec(inspect.getsource(function), alone)
    copied = alone[function.__name__](*arguments)
    assert torch.equal(copied, function(*arguments))


# ------------------------------------------------------------------------------------- 6 Update
class Recorder:
    """In place of an optimizer: keeps each gradient it is given, and changes nothing."""

    def __init__(self, model):
        self.parameters = list(model.parameters())
        self.gradients = []

    def step(self):
        self.gradients.append(torch.cat([p.grad.double().flatten() for p in self.parameters]))

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def gradients(model, groups, **settings):
    """The gradients of all mini-batches, by default one, and then the metrics of update()."""
    recorder = Recorder(model)
    cfg = Config(**{"minibatches": 1, "grad_clip": 1e9} | settings)
    metrics = update(model, recorder, groups, cfg, seeded())
    return *recorder.gradients, metrics


def off_by(a, b):
    return ((a - b).norm() / b.norm()).item()


def sampled(model, tokenizer, prompts):
    """Four groups of three different completions, with advantages made up."""
    groups = sample(model, tokenizer, prompts, 3, 40, 1.0, range(4))
    made_up = [(1.4, -0.7, -0.7), (0.7, 0.7, -1.4), (-0.7, 1.4, -0.7), (0, 1.2, -1.2)]
    for completion, advantage in zip(flat(groups), flat(made_up), strict=True):
        completion.advantage = advantage
    return groups


def off_policy(groups):
    """The same as though a somewhat different policy had sampled it: ratios are no longer 1."""
    groups, generator = copy.deepcopy(groups), seeded(5)
    for completion in flat(groups):
        logp, entropy, mask = completion.logp, completion.entropy, completion.response_mask
        logp += 0.4 * torch.randn(logp.shape, generator=generator) * mask
        entropy += torch.rand(entropy.shape, generator=generator) * mask
    return groups


@pytest.fixture(scope="session")
def fresh(gpt2, tokenizer, prompts):
    return sampled(gpt2, tokenizer, prompts)


@pytest.fixture(scope="session")
def stale(fresh):
    return off_policy(fresh)


def tokens_one_by_one(model, groups, cfg):
    """(entropy, log-ratio, advantage) of each token, from the full (B, T, V) logits."""
    completions = flat(groups)
    ids = pad_sequence([completion.ids for completion in completions], batch_first=True)
    logprobs = (model(ids).logits / cfg.temperature).log_softmax(-1)
    tokens = []
    for row, completion in enumerate(completions):
        for t in completion.response_mask.nonzero()[:, 0].tolist():
            logp = logprobs[row, t - 1]  # (V,)
            entropy = completion.entropy[t]  # before the first optimizer step, as sampled
            if cfg.entropy_from == "policy" and cfg.epochs > 1:
                entropy = -(logp.exp() * logp).sum()
            log_ratio = logp[completion.ids[t]] - completion.logp[t]
            tokens.append((entropy.item(), log_ratio, completion.advantage))
    return tokens


def clip_one(log_ratio, A, cfg):
    """The objective of one token, and by which clip, if any."""
    ratio = log_ratio.exp()
    if A > 0 and ratio > 1 + cfg.clip_high:
        return (1 + cfg.clip_high) * A, "high"
    if A < 0 and ratio < 1 - cfg.clip_low:
        return (1 - cfg.clip_low) * A, "low"
    if A < 0 and cfg.dual_clip and ratio > cfg.dual_clip:
        return cfg.dual_clip * A, "dual"
    return ratio * A, "not at all"


def by_a_plain_loop(model, groups, **settings):
    """What gradients() gives in the last epoch, one token after the other."""
    cfg, generator = Config(**settings), seeded()
    *_, order = [torch.randperm(len(groups), generator=generator) for _ in range(cfg.epochs)]
    tokens = tokens_one_by_one(model, [groups[i] for i in order], cfg)

    entropies = [entropy for entropy, _, _ in tokens]
    k = math.ceil(cfg.rho * len(tokens) - 1e-9)
    ranked = sorted(range(len(tokens)), key=entropies.__getitem__, reverse=True)
    shuffled = torch.randperm(len(tokens), generator=generator).tolist()
    threshold = entropies[ranked[k - 1]]
    assert threshold > entropies[ranked[k]] + 1e-4  # no tie decides what is kept
    kept = {"top": ranked[:k], "bottom": ranked[k:], "all": ranked, "random": shuffled[:k]}
    kept = kept[cfg.tokens]

    total, change, clips = 0, 0, []
    for _, log_ratio, A in (tokens[i] for i in kept):
        objective, clip = clip_one(log_ratio, A, cfg)
        total = total + objective
        change += abs(log_ratio.item())
        clips.append(clip)
    loss = -total / (len(kept) if cfg.normalize == "selected" else len(tokens))
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    gradient = torch.cat([slope.double().flatten() for slope in slopes])
    return gradient, {
        "loss": loss.item(),
        "grad_norm": gradient.norm().item(),
        "kept": len(kept) / len(tokens),
        "entropy": sum(entropies) / len(tokens),
        "threshold": threshold,
        "clipped_low": clips.count("low") / len(kept),
        "clipped_high": clips.count("high") / len(kept),
        "sampler_mismatch": math.exp(change / len(kept)),
        "skipped": 0,
    }


SETTINGS = [{"tokens": tokens} for tokens in ("top", "all", "bottom", "random")]
SETTINGS += [{"rho": 0.5}, {"normalize": "all"}, {"entropy_from": "rollout"}]
SETTINGS += [{"temperature": 0.7}, {"dual_clip": 0.0}, {"dual_clip": 1.2, "tokens": "all"}]
SETTINGS += [{"clip_low": 0.1, "clip_high": 0.6}, {"micro_batch_size": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradient_and_metrics_are_those_of_a_plain_loop_over_tokens(settings, gpt2, stale):
    gradient, metrics = gradients(gpt2, stale, **settings)
    expected, numbers = by_a_plain_loop(gpt2, stale, **settings)
    assert off_by(gradient, expected) < 1e-5
    assert metrics == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    assert 0 < metrics["clipped_low"] < 0.5  # the clip was put to the test
    assert 0 < metrics["clipped_high"] < 0.5


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3"])
def test_other_architectures_are_trained_in_the_same_way(name, models, tokenizer, prompts):
    groups = off_policy(sampled(models[name], tokenizer, prompts))
    gradient, metrics = gradients(models[name], groups)
    expected, numbers = by_a_plain_loop(models[name], groups)
    assert off_by(gradient, expected) < 1e-5
    assert metrics == pytest.approx(numbers, rel=1e-4, abs=1e-6)


def test_rho_1_is_plain_dapo(gpt2, stale):
    top, metrics = gradients(gpt2, stale, rho=1.0)
    everything, _ = gradients(gpt2, stale, tokens="all")
    assert off_by(top, everything) < 1e-6
    assert metrics["kept"] == 1


def test_the_gradient_depends_neither_on_micro_batches_nor_padding_nor_the_order_of_rows(
    gpt2, stale
):
    """Unless equal entropies straddle the threshold.

    Those of two completions that begin with the same tokens can.
    """
    whole, metrics = gradients(gpt2, stale)
    for size in 1, 2, 5, 7:  # with 1, no row has any padding
        split, same = gradients(gpt2, stale, micro_batch_size=size)
        assert off_by(split, whole) < 1e-5
        assert same == pytest.approx(metrics, rel=1e-4)

    backwards, _ = gradients(gpt2, [group[::-1] for group in stale[::-1]])
    assert off_by(backwards, whole) < 1e-5


def test_nothing_is_computed_after_the_last_kept_token(gpt2, stale, monkeypatch):
    """Nor at that token itself, which is drawn from the logits before it."""
    batch = collate(flat(stale), "cpu")
    keep = batch.response_mask & (batch.entropy > 1.0)
    widths = []

    def forward(ids, **more):
        widths.append(ids.shape[1])
        raise NotImplementedError

    monkeypatch.setattr(gpt2, "forward", forward)
    for rows, micro, kept in micro_batches(gpt2, batch, keep, Config(micro_batch_size=1)):
        with pytest.raises(NotImplementedError):
            logits_at(gpt2, micro.ids, kept)
        last = max([1, *keep[rows[0]].nonzero()[:, 0].tolist()])  # 1: none is kept
        assert widths[-1] == last
        assert torch.equal(kept, keep[rows, : last + 1])
    assert len(widths) == 12
    assert sum(widths) < sum(len(completion.ids) for completion in flat(stale)) - 12


def test_a_mean_over_all_tokens_is_the_gradient_times_the_share_kept(gpt2, stale):
    """So it is five times smaller."""
    selected, metrics = gradients(gpt2, stale)
    everything, _ = gradients(gpt2, stale, normalize="all")
    assert metrics["kept"] == pytest.approx(0.2, abs=0.01)
    assert off_by(everything, selected * metrics["kept"]) < 1e-5


def written(model, tokenizer, text, advantage):
    """A completion of 1+2*3=? as though the model had sampled it."""
    prompt = tokenizer.encode("1+2*3=?\n")
    ids = torch.tensor([*prompt, *tokenizer.encode(text), tokenizer.eos_token_id])
    mask = torch.arange(len(ids)) >= len(prompt)
    logp = (read(model, ids)[0] * mask).float()
    zeros = torch.zeros(len(ids))
    return Completion(ids, mask, logp, zeros, text, finished=True, advantage=advantage)


def test_the_first_loss_is_0_but_its_gradient_is_not(gpt2, tokenizer):
    """At r = 1 the loss is minus the mean advantage, 0. Nothing is broken: slopes teach."""
    group = [  # of the same length
        written(gpt2, tokenizer, "2*3=6; 1+6=7. Answer: 7", +1.0),
        written(gpt2, tokenizer, "1+2=3; 3*3=9. Answer: 9", -1.0),
    ]
    gradient, metrics = gradients(gpt2, [group], tokens="all")
    assert abs(metrics["loss"]) < 1e-5
    assert gradient.norm() > 0.01
    assert metrics["sampler_mismatch"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("tokens", ["top", "all"])
def test_kept_tokens_get_a_gradient_with_the_end_token_and_without_prompt_and_padding(
    tokens, gpt2, fresh
):
    """Seen at the hidden states that enter the output layer.

    That at t - 1 gives the logits for the token at t.
    """
    hidden, shapes = [], []

    def watch(layer, inputs):
        inputs[0].retain_grad()
        hidden.append(inputs[0])

    head = gpt2.get_output_embeddings()
    hooks = [head.register_forward_pre_hook(watch)]
    hooks += [head.register_forward_hook(lambda *x: shapes.append(x[2].shape))]
    groups = fresh[:3]  # without the group in which an advantage is 0
    _, metrics = gradients(gpt2, groups, tokens=tokens)
    for hook in hooks:
        hook.remove()

    got_gradient = F.pad(hidden[0].grad.abs().sum(-1) > 0, (1, 0))  # (B, T)
    expected = []
    for completion in flat(groups):
        assert completion.finished  # so its last token is an end token
        high = completion.entropy > metrics["threshold"] - 1e-4
        expected.append(completion.response_mask & (high | (tokens == "all")))
    expected = pad_sequence(expected, batch_first=True)
    columns = int(expected.nonzero()[:, 1].max()) + 1  # up to the last kept token
    assert sorted(got_gradient.tolist()) == sorted(expected[:, :columns].tolist())
    assert shapes == [(expected.sum(), 102)]  # logits of kept tokens, and never (B, T, V)


def test_a_policy_far_from_the_one_that_sampled_is_no_error(gpt2, tokenizer):
    group = [written(gpt2, tokenizer, "7", advantage) for advantage in (1.0, -1.0)]
    for completion in group:
        completion.logp -= 1000.0 * completion.response_mask
    _, metrics = gradients(gpt2, [group], tokens="all")
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_completion_that_is_just_the_end_token_is_learned(gpt2, tokenizer):
    model = copy.deepcopy(gpt2)
    stop = written(gpt2, tokenizer, "", +1.0)
    other = written(gpt2, tokenizer, "2", -1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    update(model, optimizer, [[stop, other]], Config(tokens="all"))
    assert written(model, tokenizer, "", 0.0).logp.sum() > stop.logp.sum() + 0.01


def test_logits_at_some_tokens_are_rows_of_the_full_logits(model, fresh):
    ids = pad_sequence([group[0].ids for group in fresh], batch_first=True)
    where = torch.rand(ids.shape, generator=seeded()) < 0.3
    where[:, 0] = False  # nothing precedes the first token
    full = model(ids).logits  # (B, T, V)
    assert torch.allclose(logits_at(model, ids, where), full[:, :-1][where[:, 1:]], atol=1e-4)
    assert model(ids).logits.shape == full.shape  # no hook is left behind


@pytest.mark.parametrize("source", ["policy", "rollout"])
def test_after_the_first_step_entropies_are_of_the_current_policy_unless_asked_for_as_sampled(
    source, gpt2, stale
):
    """The recorder changes nothing, but update() cannot know.

    The policy's entropies are quite other ones than those with which this was sampled.
    """
    first, second, _ = gradients(gpt2, stale, entropy_from=source, epochs=2)
    for gradient, epochs in (first, 1), (second, 2):
        expected, _ = by_a_plain_loop(gpt2, stale, entropy_from=source, epochs=epochs)
        assert off_by(gradient, expected) < 1e-5
    assert (off_by(first, second) > 0.1) == (source == "policy")


def test_every_completion_is_used_once_in_each_epoch(gpt2, fresh):
    """With as many mini-batches as groups, each mini-batch is one group, in some order."""
    *both, _ = gradients(gpt2, fresh, tokens="all", minibatches=4, epochs=2)
    norms = [gradient.norm().item() for gradient in both]
    alone = sorted(gradients(gpt2, [group], tokens="all")[0].norm().item() for group in fresh)
    assert sorted(norms[:4]) == pytest.approx(alone, rel=1e-4)
    assert sorted(norms[4:]) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize(
    "groups, minibatches, steps", [(4, 4, 4), (3, 2, 2), (2, 5, 2), (1, 4, 1)]
)
def test_a_mini_batch_holds_whole_groups_and_none_is_empty(
    gpt2, fresh, groups, minibatches, steps
):
    *all_gradients, _ = gradients(gpt2, fresh[:groups], minibatches=minibatches)
    assert len(all_gradients) == steps


def test_a_selection_of_nothing_gives_a_gradient_of_0_and_metrics_that_are_numbers(gpt2, fresh):
    gradient, metrics = gradients(gpt2, fresh, tokens="bottom", rho=1.0)
    assert gradient.abs().max() == 0
    assert metrics["kept"] == 0
    assert all(map(math.isfinite, metrics.values())), metrics  # NaN is not JSON


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad, gpt2, fresh):
    groups = copy.deepcopy(fresh)
    groups[0][0].advantage = bad
    model = copy.deepcopy(gpt2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    metrics = update(model, optimizer, groups, Config(minibatches=4, tokens="all"), seeded())
    assert metrics["skipped"] == 1
    assert all(map(math.isfinite, metrics.values()))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.lm_head.weight, gpt2.lm_head.weight)

    model = copy.deepcopy(gpt2)
    optimizer = torch.optim.AdamW(model.parameters())
    metrics = update(model, optimizer, groups[:1], Config(tokens="all"), seeded())
    assert metrics == {"loss": None, "skipped": 1}
    assert torch.equal(model.lm_head.weight, gpt2.lm_head.weight)


def test_the_gradient_is_clipped_after_its_norm_is_logged(gpt2, stale):
    free, metrics = gradients(gpt2, stale)
    clipped, same = gradients(gpt2, stale, grad_clip=0.01)
    assert same["grad_norm"] == metrics["grad_norm"]
    assert same["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-5)
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(gradients(gpt2, stale, grad_clip=0)[0], free)  # 0: not at all


def test_a_share_that_is_none_is_an_error():
    for rho in 0, -0.5, 1.5, 20, math.nan:
        with pytest.raises(ValueError, match="rho must be above 0"):
            fork_mask(H, RESPONSE, rho)


def test_a_dual_clip_of_0_is_none(n=1000):
    logp, old, advantage = torch.randn(3, n, generator=seeded())
    plain = clipped_objective(logp, old, advantage, 0.2, 0.28)
    assert torch.equal(clipped_objective(logp, old, advantage, 0.2, 0.28, 0), plain)


# ------------------------------------------------------------------------------------- Evaluate
@pytest.mark.parametrize("at_a_time", [1, 6, 99])  # completions sampled at the same time
def test_accuracy_standard_error_and_pass_at_k_are_those_of_a_hand_worked_example(
    at_a_time, monkeypatch
):
    """The means of the four questions are 1, 0.5, 0 and 0.

    Their standard deviation is 0.479, and half of that, for four questions, is the error.
    """
    right = "Answer: 7"
    texts = [(right, right), (right, "no idea"), ("Answer: 8", "Answer: 9"), ("", "7")]
    can(monkeypatch, lambda prompt: texts[prompt[0]])
    problems = [Problem("?", "7", [i]) for i in range(4)]
    cfg = Config(eval_samples=2, sample_batch_size=at_a_time)

    score = evaluate(NOBODY, None, problems, cfg)
    expected = {"accuracy": 0.375, "stderr": 0.2394, "pass_at_k": 0.5}
    assert score == pytest.approx(expected, abs=1e-4)
    assert evaluate(NOBODY, None, problems[1:2], cfg)["stderr"] == 0


# ============ the tests of the lesson end here; below is what makes it practical ==============


# ------------------------------------------------------------------------------------ 7 Answers
# fractions, decimals and percentages
SAME = [("5", "5"), (".5", "0.5"), ("1/2", "0.5"), (r"\frac{1}{2}", "0.5")]
SAME += [(r"\dfrac12", "1/2"), (r"-\frac{2}{4}", "-0.5"), (r"50\%", r"\frac{1}{2}")]
SAME += [(r"50\%", "1/2"), ("0.50", r"50\%")]
SAME += [(r"\frac{-1}{2}", r"-\frac{1}{2}"), (r"\frac{\sqrt3}{2}", r"\dfrac{\sqrt{3}}{2}")]
SAME += [("9" * 990 + ".0", "9" * 990)]  # exactly: these are fractions, not floats
# signs, full stops, and commas between thousands
SAME += [("+7", "7"), ("-3", "\u2212 3"), ("\u22123", "-3"), ("5.", "5"), (r"\[5\].", "5")]
SAME += [("1,000", "1000"), ("1,000,000.0", "1000000"), (r"1{,}000", "1000")]
SAME += [(r"11,\! 111,\! 100", "11111100"), (r"10,\!080", "10,080")]
# dollars, units and degrees
SAME += [("$5$", "5"), (r"\$36", "36"), (r"\(5\)", "5"), (r"5\text{ cm}", "5")]
SAME += [(r"15\mbox{ cm}^2", "15"), (r"15\,\mathrm{cm}^{2}.", "15"), (r"90^\circ", "90")]
SAME += [(r"90^{\circ}", "90"), (r"90\degree", "90"), ("90\u00b0", "90")]
SAME += [(r"\frac{270}7\text{ degrees}", "270/7")]
SAME += [("18 dollars", "18"), ("$18 per day", "18"), ("5 eggs", "5"), ("5 eggs each", "5")]
SAME += [("5 cm", r"5\text{ cm}"), (r"\text{5 cm}", "5"), (r"5\text{ m}", "5"), ("1 foot", "1")]
SAME += [
    ("24 square inches", r"24\text{ square inches}"),
    ("864 inches^2", r"864\mbox{ inches}^2"),
]
SAME += [("18 dollars", r"\$18"), ("28 percent", r"28\%"), (r"12\pi\text{ cm}", r"12\pi")]
SAME += [("5 months", "5"), ("$12 an hour", "12"), (r"60\text{ miles per hour}", "60")]
# words, letters and formulas
SAME += [(r"\text{yes}", "yes"), (r"\textbf{(B)}", "B"), (r"\text{B}", "(B)"), ("x = 5", "5")]
SAME += [(r"2\pi", r"2\pi"), ("2\u03c0 r", r"2 \pi r"), (r"11\sqrt2", r"11 \sqrt{2}")]
SAME += [("x^{2}", "x^2"), (r"x^{1/2}", r"x^{\frac12}"), ("2516_8", "2516_{8}")]
SAME += [("f(x) = 5", "5"), ("AB = 5", "5"), ("x_1 = 5", "5"), ("(x, y) = (1, 2)", "(1, 2)")]
SAME += [(r"x \geq 5", r"x \ge 5"), (r"x \leqslant 5", r"x \le 5"), (r"x \lt 5", "x < 5")]
SAME += [(r"x \neq 5", r"x \ne 5"), (r"(2, +\infty)", r"(2, \infty)")]
# powers of ten, mixed numbers, and fractions of other things than numbers
SAME += [
    ("10^{3}", "1000"),
    ("10^3", "1,000"),
    (r"1.2 \times 10^{5}", "120000"),
]
SAME += [("10^{-2}", "0.01"), (r"-2 \times 10^2", "-200"), ("10^{12}", "1" + "0" * 12)]
SAME += [
    (r"1\frac45", "9/5"),
    ("1 4/5", "9/5"),
    (r"-1\frac{1}{2}", "-1.5"),
    (r"1\frac{4}{5}", "1.8"),
]
SAME += [(r"\pi/2", r"\frac{\pi}{2}"), (r"3\sqrt{3}/4", r"\frac{3\sqrt{3}}{4}")]
SAME += [
    (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"-\frac{a}{b}", r"\frac{-a}{b}"),
]
SAME += [(r"3 \cdot \sqrt{13}", r"3\sqrt{13}"), (r"\cfrac{1}{2}", "1/2"), (r"\frac 3 4", "3/4")]
SAME += [(r"1.2 \cdot 10^5", "120000"), ("1,234, 5", "1234, 5"), (r"\$18.", "18")]
# what is only style
SAME += [
    (r"\mathbf{5}", "5"),
    (r"\boldsymbol{5}", "5"),
    ("{5}", "5"),
    (r"{\frac{1}{2}}", "0.5"),
]
SAME += [(r"\displaystyle \frac12", "0.5"), (r"\quad 5", "5"), (r"\textit{yes}", "yes")]
SAME += [("**5**.", "5"), ("**5** dollars", "5")]
SAME += [("5)", "5"), ("5]", "5"), ("5).", "5")]
SAME += [("\uff15", "5"), ("\uff08\uff11\uff0c \uff12\uff09", "(1, 2)"), ("5\u3002", "5")]
SAME += [(r"3\mathrm{i}", "3i"), (r"-1+2\mathrm{i}", "-1+2i"), (r"10\,000", "10000")]
SAME += [("The final answer is $5$. I hope it is correct.", "5")]
# lists, intervals, sets and matrices
SAME += [("3;5", "3, 5"), (r"\left( 1, 2 \right)", "(1,2)"), (r"x \in [-2,7]", "[-2, 7]")]
SAME += [("(0.5, 1]", r"\left(\frac{1}{2}, 1\right]")]
SAME += [(r"\{ \frac{2}{4}, 3 \}", r"\{0.5,3.0\}")]
MATRIX = r"\begin{pmatrix}\frac{1}{3}\\-\frac{2}{3}\end{pmatrix}"
SAME += [(r"\begin{pmatrix} 1/3 \\ -2/3 \end{pmatrix}", MATRIX)]
SAME += [(r"\begin{bmatrix} 1/3 \\ -2/3 \end{bmatrix}", MATRIX)]
SAME += [
    ("5, 6", "6, 5"),
    (r"\{2, 1\}", r"\{1, 2\}"),
    (r"\{2, 1\}", "1, 2"),
    ("1/2, 0.7", "0.7, 0.5"),
]
SAME += [
    ("(1,000,2)", "(1000, 2)"),
    ("[1,024, 2,048]", "[1024, 2048]"),
    ("1,000, 2", "2, 1000"),
]


@pytest.mark.parametrize("given, answer", SAME)
def test_two_ways_to_write_the_same_answer_are_equal(given, answer):
    assert is_correct(rf"\boxed{{{given}}}", answer)
    assert is_correct(f"Answer: {given}", answer)
    assert is_correct(rf"\boxed{{{answer}}}", given)


# another number, and what merely looks like it
OTHER = [("5", "6"), ("5", "-5"), ("", ""), ("0.333", "1/3"), ("1/0", "2/0"), (r"50\%", "50")]
OTHER += [("9" * 990 + "8", "9" * 990 + "9"), ("five", "5"), ("5\0", "5"), ("nan", "5")]
OTHER += [("1_000", "1000"), ("1e1", "1"), ("0x5", "5"), ("5 million", "5")]
# what would have to be executed or simplified
OTHER += [("print(5)", "5"), ("2+3", "5"), ("2+3=5", "5"), (r"5\pi", "5"), (r"\sqrt{25}", "5")]
OTHER += [(r"1\frac{4}{5}", "14/5"), ("1 4/5", "14/5"), (r"\frac123", r"\frac{1}{23}")]
OTHER += [
    (r"3\cdot\frac{1}{2}", "3.5"),
    ("1 5/4", "9/4"),
    (r"x\frac12", "x 1/2"),
    ("1 4/5", "4/5"),
]
OTHER += [(r"\frac{1}{2x}", "1/2x"), (r"\frac{a+b}{2}", "a+b/2"), (r"\frac{1}{ab}", "1/ab")]
OTHER += [("10^{3}x", "1000"), ("210^3", "21000"), (r"\sqrt{10}", r"\sqrt{1}0")]
OTHER += [(r"2^\frac{1}{2}", "2^1/2"), (r"\frac{1}{2}\pi", r"1/2\pi"), ("x^{10}", "x^10")]
OTHER += [("2516_8", "2516"), ("5$6", "56"), (r"5^\circ6", "56"), (r"5\text{2}", "5")]
OTHER += [("2516_9", "2516_8"), ("2516_{16}", "2516_8"), ("2516", "2517_8")]
# another variable, another unit, and words that are no units
OTHER += [("y=2", "x=2"), ("y=0", "x=0"), ("x", "y=x"), ("x_1=2", "x_2=2"), ("x+y=5", "5")]
OTHER += [(r"5\text{ km}", r"5\text{ cm}"), ("5 cents", r"\$5"), ("5 hours", "5 minutes")]
OTHER += [(rf"5\{text}{{{letter}}}", "5") for text in ("mathrm", "text") for letter in "iex"]
WORDS = (
    "million, thousand, dozen, half, thirds, percent, pm, AD, squared, or, or six, is wrong, "
)
WORDS += "not apples, perhaps, times ten, tenths, billions, eggs or six, dozen eggs, plus one, "
WORDS += "thousand dollars, dollars a dozen, lakhs, twos, twenties, roots, negatives, loss"
for words in WORDS.split(", "):
    OTHER += [(rf"5\text{{ {words}}}", "5"), (f"5 {words}", "5"), (f"$5$ {words}", "5")]
OTHER += [
    ("not 5", "5"),
    ("about 5 eggs", "5"),
    ("5m", "5"),
    ("5x", "5"),
    (r"5\text{x}^2", "5"),
]
OTHER += [(r"3\mathrm{i}", "3"), (r"-1+2\mathrm{i}", "-1+2"), (r"7\text{ pm}", r"7\text{ am}")]
# formulas that only look alike
OTHER += [
    (r"1 \pm \frac{\sqrt5}{2}", r"\frac{1\pm\sqrt5}{2}"),
    (r"6\div \frac12", r"6\div 1/2"),
]
OTHER += [
    (r"\ln \frac{3}{2}", r"\frac{\ln 3}{2}"),
    (r"\frac{x<4}{2}", "x<2"),
    (r"2^ \frac{1}{2}", "2^1/2"),
]
OTHER += [
    (r"\ln 2\cdot x", r"\ln 2x"),
    (r"f\cdot(x)", "f(x)"),
    (r"\left.5\right.", "0.5"),
    ("~5", "5"),
]
OTHER += [
    ("0.333...", "0.333"),
    ("1,2,3...", "1,2,3"),
    ("0.1(6)", "0.10(6)"),
    ("1.(3)", "1(3)"),
]
OTHER += [
    (r"10^{12}5", "10^{125}"),
    ("0.2", "2e - 1"),
    ("1e3", "1000"),
    (r"\pm 1,000", r"\pm 1, 0"),
]
OTHER += [
    ("1,234, 5", "1, 234, 5"),
    ("x^2", "x^2_1"),
    (r"5\mathbf{h}", "5"),
    (r"5\mathbf{m}^2", "5"),
]
OTHER += [(given, "10") for given in ("10 a b", "10rs", "10 es", "10mi", "10km", "10 a lie")]
OTHER += [("2", r"2\pi a h"), (r"3a\,b", "3"), (r"\pi", r"\pi rs"), ("5 a mistake", "5")]
# several numbers
OTHER += [("5 or 6", "5"), ("5 or 6", "6"), ("5, 6", "5"), ("5, 6", "56"), ("5, 5", "5")]
OTHER += [("1,2,3", "123"), ("5 6", "56"), ("5  6", "56"), ("5~6", "56"), ("1, 234", "1234")]
OTHER += [("1 ,234", "1234"), ("5. 6", "5.6"), ("5 .6", "5.6"), ("1,2,3,4,5,6,7,8,9", "5")]
# brackets and matrices
OTHER += [("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2]", "(1,2)"), (r"\{1,2\}", "(1,2)")]
OTHER += [("(1,234)", "1234"), ("x=1, y=2", "y=1, x=2"), (r"\{1,2\}", r"\{1,3\}")]
OTHER += [("(1,000,2)", "(1,0,2)"), ("0,125", "125"), ("012,345", "12345"), ("0,500", "500")]
OTHER += [("1, 0, 2", "1,000, 2"), (r"\{1, 2, 2\}", r"\{1, 1, 2\}")]
COLUMN = r"\begin{pmatrix}1\\2\end{pmatrix}"
OTHER += [(COLUMN, "(1;2)"), (COLUMN, r"\begin{pmatrix}1&2\end{pmatrix}")]
# of which nothing is left
OTHER += [(nothing, nothing) for nothing in ("$", ".", r"\text{}", "x=", r"\,", r"\left\right")]
# digits to Python or to the eye, and characters that cannot be seen
OTHER += [(five, "5") for five in "\u0665\U0001d7d3\u2075\u2085\u2464"]
OTHER += [(f"5{mark}", "5") for mark in ("\u200b", "\u0301", "\u20dd", "\x7f")]
OTHER += [("\ufeff5", "5"), ("\ud8005", "5"), ("\u202e65", "56")]
OTHER += [(f"5{space}6", "56") for space in "\u200b\xa0\u2009\x1f\u2028"]


@pytest.mark.parametrize("given, answer", OTHER)
def test_another_answer_or_a_list_of_answers_is_wrong(given, answer):
    assert not is_correct(rf"\boxed{{{given}}}", answer)
    assert not is_correct(f"Answer: {given}", answer)


HEDGES = ["A or B", "A, B", "A; B", "A (or B)", "A (B)", "(A) (B)", "A B", "AB", "A = B"]
HEDGES += [r"A\text{ or }B", r"A\text{ or B}", r"A \\ B", r"A\quad B", r"\(A\) \(B\)"]
HEDGES += ["$A$, $B$", "A and B", "A|B", r"\{A, B\}", "[A, B]", "A & B", "A not B"]
HEDGES += [r"A\mbox{, B}", r"\textbf{A} B", "A. B.", r"A^\circ B", r"A\%B", "A\u200bB"]
HEDGES += ["A\x1cB", "A\tB", "A_B", "A^B"]
ANSWERS = ["5", "6.5", "-3", "1,000", "2/3", r"\frac{3}{4}", "(1,2)", r"2\sqrt{5}"]


@pytest.mark.parametrize("hedge", HEDGES)
def test_two_answers_in_one_place_win_for_neither(hedge):
    for a, b in itertools.permutations(ANSWERS, 2):
        given = hedge.replace("B", "\n").replace("A", a).replace("\n", b)
        for answer in a, b:
            assert not is_correct(rf"\boxed{{{given}}}", answer), given
            assert not is_correct(f"Answer: {given}", answer), given


LONG = [r"\boxed" + "{" * 50_000 + "}" * 50_000, "{" * 100_000, r"\boxed{" * 15_000]
LONG += [r"\boxed" + " " * 100_000, "\\" * 100_001, "Answer:" * 15_000]
LONG += ["answer" + " " * 100_000]
LONG += ["#" * 100_000, "\0" * 100_000, r"\text{" * 20_000, rf"\boxed{{{'9' * 10**5}}}"]
LONG += ["*" * 100_000, "Answer:" + "* " * 50_000, r"\boxed{6}" * 10_000 + r"\boxed{"]
WICKED = [r"\boxed{9**9**9}", r"\boxed{9^{9^{9^9}}}", r"\boxed{1e999999999}", "Answer: \ud800"]
WICKED += [rf"\boxed{{5{' ' * 990}6}}", rf"\boxed{{{'1,' * 400}}}", rf"\boxed{{1/{'0' * 900}}}"]
WICKED += [r"Answer: 5\text{" + r"\text{" * 150, r"Answer: " + r"\frac{1" * 140]
WICKED += ["Answer: " + "5," * 490, "Answer: " + "\u0665" * 990]


@pytest.mark.parametrize("text", LONG + WICKED, ids=lambda text: ascii(text)[:12])
def test_no_text_hangs_or_crashes_the_check(text):
    start = time.perf_counter()
    assert not is_correct(text, "5")
    assert not is_correct(text, text)
    assert time.perf_counter() - start < 2


TEX = r"""
    \boxed{ { } \{ \} Answer: #### answer \frac \dfrac \sqrt \text{ \mbox{cm}^2 \left( \right]
    \\ \ \! \, \begin{pmatrix} \end{pmatrix} {,} ^\circ ^{\circ} \degree \% % $ \$ \( \] ~ * **
    . , 1,000 -\frac{1}{2} 0.5 .5 50\% x=5 x\in 1/0 1/2 (1,2) [ ) _{8} ^{2} \pi 9**9 1e999 nan
    0x5 1_0 print(5) - + / = & or 5 6 0 999
"""
PIECES = TEX.split()
PIECES += list(" \n\t\r\0\x1c\x7f\xa0\u200b\u202e\u2212\u03c0\u00b0\u0665\uff15\u2075")
PIECES += list("\U0001d7d3\u0301\ud800\udc00")  # the last two are halves of characters


def random_text(dice):
    """Pieces of answers, some of them cut out, and some repeated."""
    parts = dice.choices(PIECES, k=dice.randrange(60))
    for _ in range(dice.randrange(4)):
        start = dice.randrange(len(parts) + 1)
        cut = slice(start, start + dice.randrange(9))
        parts[cut] = parts[cut] * dice.choice([0, 1, 2, 2, 50])
    return "".join(parts)


def test_no_fuzz_hangs_or_crashes_the_check(count=10_000):
    """Raise count for a longer hunt."""
    dice = random.Random(0)
    for _ in range(count):
        inside = random_text(dice)
        start = time.perf_counter()
        for text in inside, rf"\boxed{{{inside}}}", f"Answer: {inside}":
            for answer in "5", inside:
                assert is_correct(text, answer) in (True, False), ascii(text)
        assert time.perf_counter() - start < 2, ascii(inside)


# ----------------------------------------------------------------------------------- 8 Problems
GSM8K = {"question": "1+2=?", "answer": "1 and 2 are <<1+2=3>>3\n#### 3"}
MATH = {"problem": "1+2=?", "answer": "3", "level": 5}
DAPO = {
    "prompt": [{"role": "system", "content": "Hi"}, {"role": "user", "content": "1+2=?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "3", "style": "rule"},
}
DAPO_PROCESSED = {"prompt": "1+2=?", "solution": "3", "reward_model": {"ground_truth": "3"}}
OURS = {"question": "1+2=?", "answer": "3"}
INTEGER = {"question": "1+2=?", "answer": 3}
FLOAT = {"question": "1/2=?", "answer": 0.5}


SOLUTION = {"problem": "1+2=?", "solution": r"We add, so it is \boxed{3}."}
NULL = {"question": "1+2=?", "answer": None, "reward_model": {"ground_truth": "3"}}
BYTES = {"question": b"1+2=?", "answer": b"3"}
RECORDS = [OURS, INTEGER, FLOAT, GSM8K, MATH, DAPO, DAPO_PROCESSED, SOLUTION, NULL]


@pytest.mark.parametrize("record", RECORDS)
def test_the_common_formats_of_problems_can_be_read(record, tokenizer, tmp_path, monkeypatch):
    """Empty lines do not matter, and what is there twice counts once.

    Of parquet, we see what is read if pyarrow is there.
    """
    question, target = ("1/2=?", "0.5") if record is FLOAT else ("1+2=?", "3")
    prompt = "Q: {question}\nA: "
    expected = [Problem(question, target, tokenizer.encode(f"Q: {question}\nA: "))]
    line = json.dumps(record)
    (tmp_path / "data.jsonl").write_text(f"\n{line}\n\r\n{line}\n\n", "utf-8")
    assert load_problems(tmp_path / "data.jsonl", tokenizer, prompt, 99) == expected

    class Batch(list):
        to_pylist = list.copy

    batches = types.SimpleNamespace(iter_batches=lambda: [Batch([record]), Batch([record])])
    pyarrow = types.SimpleNamespace(ParquetFile=lambda path: batches)
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", pyarrow)
    assert load_problems(tmp_path / "data.parquet", tokenizer, prompt, 99) == expected


def test_bytes_of_a_parquet_file_are_text():
    assert forking.question_and_target(BYTES) == ("1+2=?", "", "3")


@pytest.mark.parametrize(
    "given, target",
    [
        (r"$\boxed{7}$", "7"),
        ("The answer is 7.", "7."),
        ("The final answer is: $7$", "$7$"),
        (r"We compute 1+6. So the sum is \boxed{7}. Done.", "7"),
        ("#### 7\n", "7"),
        (" 7 ", "7"),
        (5e-05, "5e-05"),
        (1e16, "1e+16"),
        (-2.5, "-2.5"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
    ],
)
def test_a_target_is_read_as_the_value_that_it_says(given, target):
    _, _, found = forking.question_and_target({"question": "?", "answer": given})
    assert found == target
    assert is_correct(rf"\boxed{{{target}}}", target)


def test_the_smallest_and_largest_floats_are_equal_to_how_people_write_them():
    assert is_correct(r"\boxed{0.00005}", str(5e-05))
    assert is_correct(r"\boxed{10^{16}}", str(1e16))
    assert is_correct("Answer: 10,000,000,000,000,000", str(1e16))


USELESS = [
    "proof",
    "notfound",
    "NaN",
    "",
    " ",
    ".",
    "bla\n####",
    "#### 7 ####",
    "{",
    "9" * 1001,
]
USELESS += [float("nan"), [7], {"value": 7}, True]


@pytest.mark.parametrize("answer", USELESS, ids=lambda answer: repr(answer)[:9])
def test_a_target_that_no_answer_could_match_is_not_trained_on(
    answer, tokenizer, tmp_path, capsys
):
    """Neither is a line without question or target; the rest is."""
    lines = [OURS, {"question": "?", "answer": answer}, {"answer": 7}, {"question": "?"}]
    lines += [{"question": " ", "answer": "7"}, {"question": "3" * 90, "answer": "7"}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    (problem,) = load_problems(path, tokenizer, "plain", 80)
    assert problem.question == "1+2=?"
    (line,) = capsys.readouterr().out.splitlines()
    assert "left out 4 with no question, or no target" in line
    assert "(first in line 2); 1 with a prompt of over 80 tokens" in line
    assert line.endswith("(first in line 6)")


MESSAGES = [{"role": "user", "content": "2=?"}, {"role": "assistant", "content": "2"}]
MESSAGES += [{"role": "user", "content": "1+2=?"}]
BEGUN = [*MESSAGES, {"role": "assistant", "content": "1+2 <think>\n"}]


def test_of_messages_the_question_is_the_last_users_and_what_the_assistant_began_goes_on(
    tokenizer, tmp_path
):
    path = tmp_path / "data.jsonl"
    for messages, opening in (MESSAGES, ""), (BEGUN, "1+2 <think>\n"):
        path.write_text(json.dumps({"prompt": messages, "answer": 3}), "utf-8")
        (problem,) = load_problems(path, tokenizer, "Q {question}\nA ", 80)
        assert problem.question == "1+2=?"
        assert problem.ids == tokenizer.encode(f"Q 1+2=?\nA {opening}")


def test_an_answer_within_a_think_that_the_prompt_has_begun_earns_nothing_until_it_ends(
    tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "?\n<think>\n")  # knows no "<"
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "1+2=?", "answer": 3}), "utf-8")
    (problem,) = load_problems(path, tokenizer, "plain", 80)
    texts = r"\boxed{3}", r"\boxed{4}</think> \boxed{3}", r"\boxed{3}</think> \boxed{4}"
    group = canned(problem.ids, texts)
    forking.grade([group], [problem], Config())
    assert [completion.correct for completion in group] == [False, True, False]


def test_a_prompt_has_one_first_token_and_no_end_token():
    """Whether the tokenizer adds them or the template has them."""
    tokenizer = byte_tokenizer([FEW_SHOT])
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    plain = tokenizer.encode("4=?\n")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert encode(tokenizer, "plain", "4=?") == plain
    both = tokenizers.processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", bos), ("<end>", eos)]
    )
    tokenizer.backend_tokenizer.post_processor = both
    assert tokenizer.encode("4=?\n") == [bos, *plain, eos]
    for prompt in "plain", "<s>{question}\n", "{question}\n<end>":
        assert encode(tokenizer, prompt, "4=?") == [bos, *plain], prompt

    tokenizer.chat_template = "<s>{{ messages[0].content }}"
    assert encode(tokenizer, "chat", "4=?")[:2] == [bos, plain[0]]


def test_the_notes_of_a_run_tell_what_is_wrong_with_its_questions(tmp_path, capsys):
    """Equal questions with different targets, and test questions that are trained on."""
    lines = [OURS, {"question": "1+2=?", "answer": "4"}, {"question": "2=?", "answer": "2"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines[:2])), "utf-8")
    main(f"--data {tmp_path}/train.jsonl --steps 1 --prompts-per-step 1 --out {tmp_path}/out")
    out = capsys.readouterr().out
    assert "1 questions are there once more, with another target" in out
    assert "2 of the questions to test on are among those to train on" in out
    assert "no end token" not in out


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_prompt_can_be_one_of_ours_a_text_or_a_file_of_several_lines(
    encoding, tokenizer, tmp_path
):
    (tmp_path / "few-shot.txt").write_text("1+1=?\n2\n\n{question}\n", encoding)
    cfg = Config(prompt=f"@{tmp_path}/few-shot.txt")
    find_files(cfg)
    papers = "Please reason step by step, and put your final answer within \\boxed{}."
    texts = {
        "plain": "4=?\n",
        "{question} Go.\n": "4=? Go.\n",
        cfg.prompt: "1+1=?\n2\n\n4=?\n",
        r"1=?\n1\n\n{question}\n": "1=?\n1\n\n4=?\n",  # as typed in a shell
        "boxed": f"User:\n4=?\n{papers}\n\nAssistant:\n",
    }
    for prompt, text in texts.items():
        cfg = Config(prompt=prompt, stop=r"\n\n")
        find_files(cfg)
        assert cfg.stop == "\n\n"
        prompt = cfg.prompt
        assert encode(tokenizer, prompt, "4=?") == tokenizer.encode(text)


def test_the_chat_prompt_is_the_models_own_template(tokenizer, monkeypatch):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    text = tokenizer.decode(encode(tokenizer, "chat", "4=?"))
    assert text.startswith("<user>4=?\nPlease reason")
    assert text.endswith("\\boxed{}.<assistant>")


# -------------------------------------------------------------------------------------- 9 Model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_gradients_are_float32_in_whatever_type_is_computed(dtype):
    """A step of 1e-6 on a bfloat16 weight of 1 would round to nothing.

    The tiny model's file is in float16.
    """
    model, _ = load_policy(GPT2, Config(dtype=dtype))
    logits = logits_at(model, torch.tensor([[5, 6]]), torch.tensor([[False, True]]))
    logits.float().logsumexp(-1).sum().backward()
    assert logits.dtype == getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_is_computed_in_the_same_type_as_training(dtype, prompts, tokenizer):
    model, _ = load_policy(GPT2, Config(dtype=dtype))
    seen = []
    for each in (model, *model.sampler):
        head = each.get_output_embeddings()
        head.register_forward_hook(lambda *x: seen.append(x[2].dtype))
    problems = [Problem("?", "7", prompt) for prompt in prompts]
    cfg = Config(max_new_tokens=3, sample_batch_size=4)
    sample_groups(model, tokenizer, problems, 2, cfg, seeded())
    assert len(seen) == 6  # two batches of three tokens
    with whole_weights(model) as sampler:
        groups = sampled(sampler, tokenizer, prompts)
    gradients(model, groups)
    assert set(seen) == {getattr(torch, dtype)}


def test_a_step_of_a_millionth_is_not_lost_in_bfloat16(fresh):
    """Computing in bfloat16, AdamW moves a weight that has a gradient by 1e-6, as in float32.

    Stored as bfloat16, hardly any weight above 0.001 would move at all.
    """
    half, _ = load_policy(GPT2, Config(dtype="bfloat16"))
    weight = half.transformer.h[0].mlp.c_fc.weight  # FSDP's
    before = weight.full_tensor().detach().clone()
    optimizer = torch.optim.AdamW(half.parameters(), lr=1e-6, weight_decay=0.0)
    metrics = update(half, optimizer, fresh, Config(minibatches=1, tokens="all"))
    moved = (weight.full_tensor() - before).abs()
    assert (moved > 5e-7).float().mean() > 0.95
    assert moved.max() < 2e-6
    assert 1 < metrics["sampler_mismatch"] < 1.05  # this was sampled in float32

    large = before[before.abs() > 1e-3]
    assert ((large + 1e-6).bfloat16() != large.bfloat16()).float().mean() < 0.1


def test_in_bfloat16_too_what_is_trained_is_what_was_sampled(tokenizer, prompts):
    half, _ = load_policy(GPT2, Config(dtype="bfloat16"))
    with whole_weights(half) as sampler:
        groups = sampled(sampler, tokenizer, prompts)
    *_, metrics = gradients(half, groups, tokens="all")
    assert metrics["sampler_mismatch"] < 1.01


def test_a_gpt2_with_the_activation_gelu_new_gives_the_logits_of_transformers(
    gpt2, tokenizer, tmp_path
):
    """load_policy computes it in one operation. It is that of the original GPT-2."""
    config = copy.deepcopy(gpt2.config)
    config.activation_function = "gelu_new"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(gpt2.state_dict())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours, _ = load_policy(tmp_path, Config())
    assert theirs.config.activation_function == "gelu_new" != ours.config.activation_function

    ids = torch.randint(102, (2, 50), generator=seeded())
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3"])
def test_gradient_checkpointing_gives_the_same_gradient(
    name, models, tokenizer, prompts, tmp_path
):
    """A layer is computed once more in the backward pass; in sampling, only once."""
    model = models[name]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    thrifty, _ = load_policy(tmp_path, Config(gradient_checkpointing=True))
    calls = []
    for each in (thrifty, *thrifty.sampler):
        layer = next(part for path, part in each.named_modules() if path.endswith("mlp"))
        layer.register_forward_pre_hook(lambda *x: calls.append(1))

    groups = off_policy(sampled(model, tokenizer, prompts))
    assert off_by(gradients(thrifty, groups)[0], gradients(model, groups)[0]) < 1e-5
    assert len(calls) == 2

    calls.clear()
    with whole_weights(thrifty) as sampler:
        (ours,) = sample(sampler, tokenizer, prompts[:1], 3, 9, 1.0, [0])
    (theirs,) = sample(model, tokenizer, prompts[:1], 3, 9, 1.0, [0])
    assert [completion.text for completion in ours] == [c.text for c in theirs]
    assert len(calls) == max(int(completion.response_mask.sum()) for completion in ours)


def test_no_dropout_is_left_not_even_where_layers_recompute(tokenizer, tmp_path):
    """OPT's layers apply theirs themselves, whenever they are in training mode."""
    shape = {"vocab_size": 102, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "word_embed_proj_dim": 32, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(OPTConfig(**shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_policy(tmp_path, Config(gradient_checkpointing=True))
    ids = torch.arange(3, 60)[None]
    first, second = (logits_at(model, ids, ids > 3) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("settings", [{}, {"offload": True}, {"dtype": "bfloat16"}])
def test_the_sampler_has_the_models_weights_themselves_and_only_while_it_samples(settings):
    """Through FSDP it has the whole ones, in the type of computation, and none of its hooks."""
    model, _ = load_policy(GPT2, Config(**settings))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    with whole_weights(model) as sampler:
        ours = dict(model.named_parameters(remove_duplicate=False))
        theirs = dict(sampler.named_parameters(remove_duplicate=False))
        assert list(theirs) == names
        assert all(theirs[name] is ours[name] for name in names)
        dtype = torch.bfloat16 if "dtype" in settings else torch.float32
        assert {weight.dtype for weight in theirs.values()} == {dtype}
        assert not any(part._forward_pre_hooks for part in sampler.modules())
        ids = torch.arange(3, 60)[None]
        with torch.no_grad():
            assert torch.equal(sampler(ids).logits, model(ids).logits)
    size = theirs[names[0]].untyped_storage().size()
    assert (size > 0) == (not settings)
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters()


def test_offloaded_weights_learn_what_others_do(gpt2, tokenizer, prompts):
    groups = off_policy(sampled(gpt2, tokenizer, prompts))
    model, _ = load_policy(GPT2, Config(offload=True))
    assert isinstance(model, FSDPModule)
    one, metrics = gradients(model, groups)
    other, expected = gradients(gpt2, groups)
    assert off_by(one.full_tensor(), other) < 1e-6
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_attention_does_not_plan_anew_for_each_length_and_memory_can_grow():
    load_policy(GPT2, Config())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert os.environ["PYTORCH_ALLOC_CONF"].startswith("expandable_segments:True")


def test_a_driver_too_old_is_said_and_no_driver_is_none_of_our_business(
    small, tmp_path, monkeypatch, capfd
):
    """These are PyTorch's own messages, of c10/cuda/CUDAFunctions.cpp."""
    reason = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"

    def init():
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.cuda, "init", init)
    main(f"{small} --eval-every 0 --out {tmp_path}/cpu")
    assert "1 x cpu" in capfd.readouterr().out

    reason = "The NVIDIA driver on your system is too old (found version 12020)."
    with pytest.raises(SystemExit, match="2"):
        main(f"{small} --eval-every 0 --out {tmp_path}/old")
    (line,) = capfd.readouterr().err.splitlines()
    assert reason in line
    assert "--device cpu" in line
    main(f"{small} --eval-every 0 --device cpu --out {tmp_path}/old")


@pytest.mark.parametrize(
    "gpu, nccl, expected",
    [(True, True, "cpu:gloo,cuda:nccl"), (True, False, "gloo"), (False, True, "gloo")],
)
def test_processes_can_exchange_what_is_in_the_machines_memory_beside_what_is_on_gpus(
    gpu, nccl, expected, monkeypatch
):
    """With --offload both happen; left to itself, PyTorch would open the way for GPUs alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    assert forking.backends() == expected
    wanted = torch.distributed.BackendConfig(torch.distributed.Backend(expected))
    assert wanted.get_device_backend_map()["cpu"] == "gloo"


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"offload": True}])
def test_what_mps_cannot_do_is_said(settings):
    with pytest.raises(forking.UserError, match="only in float32"):
        load_policy(GPT2, Config(device="mps", **settings))


def test_a_file_in_bfloat16_becomes_float32_and_is_itself_not_read_into_memory(
    gpt2, tokenizer, tmp_path
):
    """Weights go from the mapped file to the device a layer at a time."""
    half = copy.deepcopy(gpt2).bfloat16()
    half.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_policy(tmp_path, Config())
    expected = half.state_dict()
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, expected[name].float())
    model.save_pretrained(tmp_path / "trained")
    assert AutoConfig.from_pretrained(tmp_path / "trained").dtype == torch.float32
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) not in maps.read_text()


def test_questions_are_dealt_out_to_batches_evenly(gpt2, tokenizer, monkeypatch):
    """A batch of few takes as long as one of many. With room for 4 of 9: three batches of 3."""
    sizes = []

    def sampler(model, tokenizer, prompts, group_size, *more):
        sizes.append(len(prompts))
        return [[prompt] * group_size for prompt in prompts]

    monkeypatch.setattr(forking, "sample", sampler)
    problems = [Problem("?", "7", [n]) for n in range(9)]
    groups = sample_groups(gpt2, tokenizer, problems, 2, Config(sample_batch_size=8))
    assert groups == [[[n], [n]] for n in range(9)]
    assert sizes == [3, 3, 3]
    assert sample_groups(gpt2, tokenizer, [], 2, Config()) == []


@pytest.mark.parametrize("n", [0, 1, 1024, 5000])
def test_a_function_of_many_tokens_is_computed_for_1024_of_them_at_a_time(n):
    logits = torch.randn(n, 7, generator=seeded())
    sizes = []

    def entropy(part, temperature):
        sizes.append(len(part))
        return token_entropy(part, temperature)

    assert torch.equal(in_parts(entropy, logits, 0.7), token_entropy(logits, 0.7))
    assert sum(sizes) == n
    assert max(sizes) <= 1024


@pytest.mark.parametrize("ends", [999, 1], ids=["none ends", "some end"])
def test_keys_and_values_are_copied_at_every_16th_token_or_when_completions_leave(
    gpt2, tokenizer, prompts, ends, monkeypatch
):
    """When all is sampled they are let go at once, and not when Python tidies up."""
    pad = F.pad
    first_layer = []
    tokens, grown, left = 0, set(), set()

    class Watched(forking.SpareRoomLayer):
        def update(self, *new, **more):
            nonlocal tokens
            if not first_layer:
                first_layer.append(weakref.ref(self))
            tokens += first_layer[0]() is self
            with monkeypatch.context() as patch:
                patch.setattr(F, "pad", self.pad)
                return super().update(*new, **more)

        def pad(self, *x):
            grown.add(tokens - 1)
            return pad(*x)

        def reorder_cache(self, rows):
            left.add(tokens)
            super().reorder_cache(rows)

    monkeypatch.setattr(forking, "SpareRoomLayer", Watched)
    monkeypatch.setattr(forking, "end_tokens", lambda model, tokenizer: [ends])
    gc.disable()
    completions = flat(sample(gpt2, tokenizer, prompts, 3, 100, 1.0, range(4)))
    gc.enable()

    assert first_layer[0]() is None
    lengths = [int(completion.response_mask.sum()) for completion in completions]
    assert tokens == max(lengths) - 1
    if ends == 999:
        assert grown == set(range(0, tokens, 16))
    ended = [c.finished for c in completions]
    assert left == {0} | {length - 1 for length in itertools.compress(lengths, ended)}
    assert grown <= left | {last + 16 for last in left | grown}


def test_the_sampler_never_holds_more_than_the_logits_of_one_step(model, tokenizer, prompts):
    shapes = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda *x: shapes.append(tuple(x[2].shape)))
    sample(model, tokenizer, prompts, 3, 6, 1.0, range(4))
    hook.remove()
    assert shapes[0] == (4, 1, 102)  # the prompts
    assert all(B <= 12 and T == 1 for B, T, V in shapes[1:])


# --------------------------------------------------------------------------------- 10 Processes
def read_lines(path):
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def log_of(run):
    return read_lines(run / "metrics.jsonl")


def without_times(run):
    """The log of a run, but for how long it took."""
    records = log_of(run)
    for record in records:
        record.pop("seconds", None)
        record.pop("tokens_per_second", None)
    return records


def weights_of(run):
    return load_file(run / "model/model.safetensors")


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    """The sum of the absolute differences of two models' weights."""
    return sum((a[name].float() - b[name].float()).abs().sum() for name in a)


PIPE = subprocess.PIPE
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def started(arguments, script=HERE / "forking.py"):
    """A process that runs the program."""
    command = [sys.executable, script, *arguments.split()]
    return subprocess.Popen(
        command, text=True, cwd=HERE, stdout=PIPE, stderr=PIPE, env=ENVIRONMENT
    )


# Most of the time of a new process goes by with imports. A fork of one that has imported
# everything, and done nothing else yet, runs the same program without them.
IMPORTED = multiprocessing.get_context("forkserver")
IMPORTED.set_forkserver_preload(["test_forking"])


def run_program(command, out, err, environment):
    """In a forked process: what `python COMMAND` does in a new one."""
    for number, stream in (1, out), (2, err):
        os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class Forked:
    """What started() gives, but forked: with those parts of Popen that the tests need."""

    def __init__(self, arguments, script=HERE / "forking.py", **environment):
        (out, child_out), (err, child_err) = (IMPORTED.Pipe(duplex=False) for _ in range(2))
        command = [str(script), *arguments.split()]
        how = command, child_out, child_err, environment
        self.process = IMPORTED.Process(target=run_program, args=how, daemon=True)
        self.process.start()
        child_out.close()
        child_err.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end in (out, err))

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=60):
        self.process.join(timeout)
        assert self.returncode is not None, "it takes too long"
        return self.returncode

    def communicate(self, timeout=60):
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()


def in_two_processes(script, arguments):
    """What torchrun does, for a program that ends well: its two processes, forked."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    both["MASTER_PORT"] = str(port)
    ranks = [{"RANK": n, "LOCAL_RANK": n} for n in ("0", "1")]
    processes = [Forked(arguments, script, **both, **rank) for rank in ranks]
    for process in processes:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err


def torchrun(script, arguments, folder):
    """Two processes on this machine. What each prints goes to a file of its own."""
    how = "--standalone --nproc-per-node 2 --redirects 3 --log-dir"
    command = [sys.executable, "-m", "torch.distributed.run", *how.split(), folder / "logs"]
    command += [script, *arguments.split()]
    return subprocess.run(
        command, text=True, cwd=HERE, capture_output=True, timeout=120, env=ENVIRONMENT
    )


def printed(folder, rank, stream):
    return next(folder.glob(f"logs/*/attempt_0/{rank}/{stream}.log")).read_text("utf-8")


SCRIPT = f"""
import hashlib
import os
import sys

sys.path.insert(0, {str(HERE)!r})
import forking


def by_a_coin(text, target):
    return target == "7" and hashlib.md5(text.encode()).digest()[0] % 2 == 0


def fails_in_the_second(*arguments):
    if forking.ranks()[0] == 1:
        raise forking.UserError("the moon is full")
    return update(*arguments)


update = forking.update
forking.is_correct = by_a_coin
if "--machines" in sys.argv:
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if each process were on a machine of its own
    sys.argv.remove("--machines")
if "--fail" in sys.argv:
    forking.update = fails_in_the_second
    sys.argv.remove("--fail")
forking.main()
"""
DATA = '{"question": "1+2*3=?", "answer": "7"}\n{"question": "3+4*2-1=?", "answer": "8"}\n'
COINS = (
    "--eval-every 2 --prompts-per-step 2 --group-size 5 --micro-batch-size 1 --minibatches 1 "
    "--epochs 2 --resample-rounds 2 --steps 4 --save-every 2 --lr 1e-4 --max-new-tokens 40 "
    "--seed 3"
)


@pytest.fixture(scope="session")
def by_one_and_by_two(models, tokenizer, tmp_path_factory):
    """A function: name of a model -> (folder of a run by one process and by two, its flags).

    A coin decides what is right. Of two questions one can never be answered right, so that one
    of two processes always has a group without success; and there are five completions to train
    on, one at a time, so that one of two processes has none left at the end. (With entropies of
    the policy, rounding would decide which of two completions that begin alike gets the last
    place among the top.) The two share the weights in a different way for each model.
    """
    sharing = {
        "gpt2": "",
        "qwen3": "--shard all --offload",
        "gemma3": "--machines --offload --gradient-checkpointing",
    }

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(f"both-{name}")
        models[name].save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        (folder / "script.py").write_text(SCRIPT, "utf-8")
        (folder / "data.jsonl").write_text(DATA, "utf-8")
        files = f"--model {folder}/base --data {folder}/data.jsonl"
        files += f" --eval-data {folder}/data.jsonl"
        tokens = "--tokens top --entropy-from rollout" if name == "gpt2" else "--tokens all"
        flags = f"{files} {COINS} {tokens}"

        one = Forked(f"{flags} --out {folder}/one", folder / "script.py")
        flags += f" {sharing[name]}"
        if name == "gpt2":
            two = torchrun(folder / "script.py", f"{flags} --out {folder}/two", folder)
            assert two.returncode == 0, two.stderr
        else:
            in_two_processes(folder / "script.py", f"{flags} --out {folder}/two")
        _, err = one.communicate(timeout=100)
        assert one.returncode == 0, err
        return folder, flags

    return make


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3"])
def test_two_processes_do_what_one_does(name, by_one_and_by_two):
    folder, _ = by_one_and_by_two(name)
    one, two = without_times(folder / "one"), without_times(folder / "two")
    assert [metrics["step"] for metrics in two] == [0, 1, 2, 3, 4]
    assert sum(metrics.get("loss") is not None for metrics in two) >= 2
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5)

    base = load_file(folder / "base/model.safetensors")
    a, b = weights_of(folder / "one"), weights_of(folder / "two")
    assert a.keys() == b.keys()
    # Where a gradient is 0 but for rounding, Adam makes steps of rounding errors.
    assert 0 < distance(a, b) < 0.01 * distance(a, base)

    model, tokenizer = load_policy(folder / "two/model", Config())  # one can go on with it
    assert sample(model, tokenizer, [[5, 6]], 1, 3, 1.0, [0])


def test_only_the_first_of_two_processes_prints(by_one_and_by_two):
    folder, _ = by_one_and_by_two("gpt2")
    assert "step 4/4" in printed(folder, 0, "stdout")
    assert printed(folder, 1, "stdout") == ""


def test_two_processes_go_on_exactly_where_they_stopped(by_one_and_by_two, tmp_path):
    folder, flags = by_one_and_by_two("qwen3")
    for steps in 2, 4:
        flags_now = f"{flags} --steps {steps} --resume --out {tmp_path}/run"
        in_two_processes(folder / "script.py", flags_now)
    assert without_times(tmp_path / "run") == without_times(folder / "two")
    assert same_weights(tmp_path / "run", folder / "two")


def test_an_error_in_one_process_ends_both_with_its_message(by_one_and_by_two, tmp_path):
    folder, flags = by_one_and_by_two("qwen3")
    result = torchrun(folder / "script.py", f"{flags} --out {tmp_path}/out --fail", tmp_path)
    assert result.returncode != 0
    assert "forking.py: the moon is full" in printed(tmp_path, 1, "stderr")


# --------------------------------------------------------------------------------------- 11 Log
RECORD = {"question": "9=?\n", "tokens": ["1", "+", "2", ";"], "reward": 1.0}
RECORD["tokens"].append("\033[2J\r\b\a\x9b\u202e")
RECORD |= {"threshold": 0.5, "entropy": [0.4, 0.6, 0.5, 0.1, 0.2], "length": 5}


def test_the_tokens_at_or_above_the_threshold_are_marked_and_control_a_terminal_not_at_all():
    assert mark_forks(RECORD) == "9=?\n1[+][2];[2J   (reward 1)"
    assert " ..." in mark_forks(RECORD | {"length": 6})  # a token more than is shown


WILD = {"skipped": 0, "reward": -1.0, "loss": -1e9, "entropy": 11.931, "threshold": 11.931}
WILD |= {"kept": 1.0, "clipped_low": 1.0, "clipped_high": 1.0, "sampler_mismatch": 1e9}
WILD |= {"grad_norm": 1e9, "length": 20480.0, "truncated": 1.0}
WILD |= {"accuracy": 1.0, "stderr": 1.0, "pass_at_k": 1.0}


@pytest.mark.parametrize(
    "metrics",
    [
        {"step": 99_999, "tokens_per_second": 123_456.7},
        {"step": 999_999, "tokens_per_second": 1e7},
        {"step": 0},
        {"step": 999_999, "tokens_per_second": 1e7, "loss": None},
        {"step": 99_999, "tokens_per_second": 1.0, "kept": math.nan},
    ],
    ids=str,
)
def test_the_line_of_a_step_fits_into_100_columns_whatever_its_numbers(metrics):
    line = step_line(WILD | metrics, max(metrics["step"], 99_999))
    assert len(line) <= 100
    assert "\n" not in line
    assert str(metrics["step"]) in line
    assert ("acc 1.000 +- 1.000" in line) == (metrics["step"] == 0)


def test_the_line_of_an_ordinary_step_fits_into_80_columns():
    usual = {"reward": 0.45, "accuracy": 0.611, "entropy": 0.069, "threshold": 0.011}
    usual |= {"clipped_low": 0.001, "clipped_high": 0.02, "length": 1024.5, "truncated": 0.1}
    line = step_line(WILD | usual | {"step": 100, "tokens_per_second": 12345.6}, 200)
    assert len(line) <= 80
    assert line.startswith("step 100/200 reward 0.45 acc 0.611 H 0.069 tau 0.011 clip 2.1%")
    cut_off = step_line(WILD | usual | {"step": 1, "truncated": 1, "tokens_per_second": 1.0}, 2)
    assert "all cut off: --max-new-tokens? --lr?" in cut_off


def test_a_character_of_several_tokens_is_shown_once_it_is_whole():
    tokenizer = byte_tokenizer([FEW_SHOT], size=257)  # a token for each byte
    ids = torch.tensor(tokenizer.encode("1\u221a5 \U0001f600"))
    zeros = torch.zeros(len(ids))
    completion = Completion(ids, torch.ones(len(ids)).bool(), zeros, zeros, "", finished=True)
    completion.problem = Problem("?", "7", [])
    tokens = sample_record(tokenizer, completion, 1, 0.5)["tokens"]
    assert tokens == ["1", "", "", "\u221a", "5", " ", "", "", "", "\U0001f600"]


SMALL = (
    f"--model {GPT2} --steps 2 --prompts-per-step 4 --group-size 4 --minibatches 2 "
    "--eval-samples 2 --lr 1e-3 --max-new-tokens 48 --seed 3"
)


def main(arguments):
    forking.main(arguments.split())


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The flags of a small run: 12 questions to train on, and beside them 6 to test on."""
    folder = tmp_path_factory.mktemp("data")
    lines = (HERE / "tiny_data/test.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:12]), "utf-8")
    (folder / "test.jsonl").write_text("".join(lines[12:18]), "utf-8")
    return f"{SMALL} --data {folder / 'train.jsonl'}"


@pytest.fixture(scope="session")
def runs(small, tmp_path_factory):
    """The folders of three runs: twice the same, and once without evaluation."""
    folder = tmp_path_factory.mktemp("runs")
    for name, every in ("first", 1), ("again", 1), ("plain", 0):
        main(f"{small} --eval-every {every} --out {folder / name}")
    return [folder / name for name in ("first", "again", "plain")]


NUMBERS = "step reward loss entropy threshold kept clipped_low clipped_high sampler_mismatch "
NUMBERS += "grad_norm length truncated groups_kept tokens tokens_per_second seconds accuracy"


def test_the_log_has_one_object_for_each_step_with_all_fields(runs):
    before, *steps = log_of(runs[0])
    assert before["step"] == 0
    assert "accuracy" in before
    assert "loss" not in before
    assert [metrics["step"] for metrics in steps] == [1, 2]
    assert all(set(NUMBERS.split()) <= set(metrics) for metrics in steps)
    assert 0 < steps[0]["tokens"] < steps[1]["tokens"]
    assert steps[0]["sampler_mismatch"] == pytest.approx(1, abs=1e-4)
    assert json.loads((runs[0] / "config.json").read_text("utf-8"))["rho"] == 0.2


def watched_rollouts(monkeypatch):
    """A list to which each rollout will add its groups."""
    real, rollouts = forking.rollout, []

    def watched(*arguments):
        groups, metrics = real(*arguments)
        rollouts.append(groups)
        return groups, metrics

    monkeypatch.setattr(forking, "rollout", watched)
    return rollouts


def pairs(groups):
    """Of each of the first four groups, the first right and the first wrong completion."""
    chosen = []
    for group in groups[:4]:
        right = [completion for completion in group if completion.correct]
        wrong = [completion for completion in group if not completion.correct]
        chosen += [right[0], wrong[0]]
    return chosen


def test_samples_are_a_right_and_a_wrong_completion_of_each_of_four_groups_token_by_token(
    small, tokenizer, tmp_path, monkeypatch
):
    rollouts = watched_rollouts(monkeypatch)
    main(f"{small} --eval-every 1 --prompts-per-step 6 --out {tmp_path}/run")
    records = read_lines(tmp_path / "run/samples.jsonl")
    first, second = (pairs(groups) for groups in rollouts)
    assert [record["step"] for record in records] == [1] * len(first) + [2] * len(second)
    assert [record["reward"] for record in records] == [1, 0] * (len(records) // 2)
    assert len(records) > 8

    for record, completion in zip(records, first + second, strict=True):
        end = tokenizer.eos_token if completion.finished else ""
        assert "".join(record["tokens"]) == completion.text + end
        assert record["question"] == completion.problem.question
        assert record["target"] == completion.problem.target
        assert record["finished"] == completion.finished
        assert record["length"] == len(record["tokens"]) == completion.response_mask.sum()
        for name in "entropy", "logp":
            values = getattr(completion, name)[completion.response_mask]
            assert torch.equal(torch.tensor(record[name]), values)
        assert any(record["entropy"])


def test_a_step_of_which_no_update_is_finite_is_logged_and_has_no_samples(
    small, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(forking, "clip_gradient", lambda model, most: math.inf)
    main(f"{small} --eval-every 1 --steps 1 --out {tmp_path}/run")
    assert "2 updates left out, not finite" in capsys.readouterr().out
    assert log_of(tmp_path / "run")[1]["loss"] is None
    assert read_lines(tmp_path / "run/samples.jsonl") == []


@pytest.mark.parametrize(
    "every, steps, expected",
    [
        (0, 4, [1] * 8 + [4] * 8),
        (3, 5, [1] * 8 + [3] * 8 + [5] * 8),
        (1, 20, [1] * 8 + sorted([*range(10, 21)] * 8)),
    ],
    ids=["never evaluated", "some steps evaluated", "every step evaluated"],
)
def test_samples_are_of_the_first_step_the_evaluations_and_the_last_step_and_never_more_than_96(
    every, steps, expected, tmp_path, monkeypatch
):
    """With 8 records of a step, these are the first step's, and the last eleven steps'."""
    can(monkeypatch, lambda prompt: ("Answer: 7", "?"))
    means = forking.mean_metrics  # whose mismatch would be great, of texts that nobody sampled
    no_mismatch = {"sampler_mismatch": 1.0}
    monkeypatch.setattr(forking, "mean_metrics", lambda *x, **y: means(*x, **y) | no_mismatch)
    lines = [json.dumps({"question": f"{i}=?", "answer": "7"}) + "\n" for i in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(lines), "utf-8")
    (tmp_path / "test.jsonl").write_text("".join(lines), "utf-8")
    counts = []

    def record(*arguments):
        counts.append(len(read_lines(tmp_path / "run/samples.jsonl")))
        return step_line(*arguments)

    monkeypatch.setattr(forking, "step_line", record)
    flags = f"--eval-every {every} --steps {steps} --prompts-per-step 6"
    main(f"{SMALL} --data {tmp_path}/train.jsonl {flags} --out {tmp_path}/run")
    records = read_lines(tmp_path / "run/samples.jsonl")
    assert [record["step"] for record in records] == expected
    assert max(counts) == len(expected) <= 96


def test_of_a_long_completion_the_first_300_tokens_are_recorded(tokenizer):
    ids = torch.randint(3, 102, (410,), generator=seeded())
    mask = torch.arange(410) >= 10
    logp, entropy = torch.rand(2, 410, generator=seeded())
    completion = Completion(ids, mask, logp, entropy, "", finished=True)
    completion.problem = Problem("9=?", "9", ids[:10].tolist())
    record = sample_record(tokenizer, completion, 7, 0.8)

    assert record["tokens"] == [tokenizer.decode([token]) for token in ids[10:310].tolist()]
    assert record["entropy"] == entropy[10:310].tolist()
    assert record["logp"] == logp[10:310].tolist()
    assert record["threshold"] == 0.8
    assert record["length"] == 400


# --------------------------------------------------------------------------- 12 Save and resume
def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_saved_model_is_the_trained_one(small, runs):
    base, _ = load_policy(GPT2, Config())
    model, tokenizer = load_policy(runs[0] / "model", Config())
    assert isinstance(AutoModelForCausalLM.from_pretrained(runs[0] / "model"), type(base))
    for trained, before in zip(model.parameters(), base.parameters(), strict=True):
        assert not torch.equal(trained, before)

    cfg = Config(**json.loads((runs[0] / "config.json").read_text("utf-8")))
    tests = load_problems(cfg.eval_data, tokenizer, "{question}\n", 80)
    score, logged = evaluate(model, tokenizer, tests, cfg), log_of(runs[0])[-1]
    assert len(tests) == 6
    assert score == pytest.approx({key: logged[key] for key in score})  # of the last evaluation


@pytest.mark.parametrize(
    "flags, remedy",
    [
        ("", "--resume"),
        ("--rho 0.5 --resume", "--rho 0.5 (it was 0.2)"),
        ("--tokens all --resume", "--tokens all (it was top)"),
        ("--model another --resume", "--model another (it was gpt2)"),
    ],
)
def test_a_folder_that_holds_a_run_is_left_alone(flags, remedy, small, runs, capfd):
    before = files_in(runs[0])
    with pytest.raises(SystemExit, match="2"):
        main(f"{small} --eval-every 1 --out {runs[0]} {flags}")
    (line,) = capfd.readouterr().err.splitlines()
    assert str(runs[0]) in line
    assert remedy in line
    assert files_in(runs[0]) == before


def test_a_run_on_other_contents_of_the_same_file_is_refused(small, tmp_path, capfd):
    """What is learned by it may not change; where it lies may, and how it is evaluated."""
    data = tmp_path / "train.jsonl"
    data.write_text(DATA, "utf-8")
    flags = f"{SMALL} --data {data} --out {tmp_path}/run"
    main(f"{flags} --eval-every 0")
    moved = tmp_path / "elsewhere.jsonl"
    data.rename(moved)
    main(f"{flags} --data {moved} --steps 3 --eval-data {moved} --eval-every 3 --resume")
    assert [metrics["step"] for metrics in log_of(tmp_path / "run")] == [0, 1, 2, 3]

    moved.write_text(DATA.replace("+", "-", 1), "utf-8")
    with pytest.raises(SystemExit, match="2"):
        main(f"{flags} --data {moved} --steps 4 --resume")
    (line,) = capfd.readouterr().err.splitlines()
    assert "--data or --prompt" in line


@pytest.mark.parametrize("damage", ["trainer.pt", "model.safetensors", "config.json"])
def test_of_a_damaged_checkpoint_the_one_before_is_taken(damage, small, whole, tmp_path, capfd):
    """Cut short, as after a power failure. If that is damaged, too, there is one line."""
    run = tmp_path / "run"
    flags = f"{small} --eval-every 2 --save-every 1 --steps 4 --out {run} --resume"
    main(f"{flags} --steps 3")
    os.truncate(run / "model" / damage, 100)
    before = shutil.copytree(run, tmp_path / "before")
    main(flags)
    assert f"{run}/model cannot be read" in capfd.readouterr().out
    assert without_times(run) == without_times(whole)
    assert same_weights(run, whole)

    os.truncate(before / "model.before" / damage, 100)
    with pytest.raises(SystemExit, match="2"):
        main(f"{flags} --out {before}")
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="not Linux")
def test_no_file_of_a_checkpoint_is_open_or_mapped_when_its_folder_is_renamed(
    small, whole, tmp_path, monkeypatch
):
    """Windows could not rename it then."""
    run = shutil.copytree(whole, tmp_path / "run")
    real, calls = forking.Run.write, []

    def write(*arguments):
        calls.append(1)
        part = real(*arguments)
        opened = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        held = "\n".join([*opened, Path("/proc/self/maps").read_text("utf-8")])
        assert f"{run}/model" not in held
        return part

    monkeypatch.setattr(forking.Run, "write", write)
    main(f"{small} --eval-every 2 --save-every 1 --steps 5 --out {run} --resume")
    assert len(calls) == 2


def test_a_mistake_in_the_command_does_not_make_a_checkpoint_damaged(
    small, whole, tmp_path, capfd
):
    run = shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(SystemExit, match="2"):
        main(f"{small} --out {run} --resume --data missing.jsonl")
    out, err = capfd.readouterr()
    assert "cannot be read" not in out + err
    assert "missing.jsonl" in err


def test_a_checkpoint_for_which_memory_is_short_is_not_called_damaged(
    small, whole, tmp_path, monkeypatch, capfd
):
    def open_model(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(forking, "open_model", open_model)
    with pytest.raises(SystemExit, match="2"):
        main(f"{small} --out {run} --resume")
    out, err = capfd.readouterr()
    assert "cannot be read" not in out + err
    assert "less is needed with a lower" in err


@pytest.mark.parametrize("more", ["--eval-every 0", "--show"])
def test_a_folder_that_holds_somebody_elses_model_is_left_alone(more, small, tmp_path, capfd):
    folder = shutil.copytree(GPT2, tmp_path / "mine")
    before = files_in(folder)
    with pytest.raises(SystemExit, match="2"):
        main(f"{small} --model {folder} --out {folder} {more}")
    assert "holds a run or a model" in capfd.readouterr().err
    assert files_in(folder) == before


def test_a_run_that_another_process_has_ended_meanwhile_is_not_overwritten(
    small, tmp_path, monkeypatch, capfd
):
    """While this one was still loading."""
    flags = f"{small} --eval-every 0 --out {tmp_path}/run"
    real = forking.load_questions

    def load(*arguments):
        monkeypatch.setattr(forking, "load_questions", real)
        main(flags)
        return real(*arguments)

    monkeypatch.setattr(forking, "load_questions", load)
    with pytest.raises(SystemExit, match="2"):
        main(f"{flags} --seed 9")
    assert "another process has just trained there" in capfd.readouterr().err
    assert json.loads((tmp_path / "run/config.json").read_text("utf-8"))["seed"] == 3


def test_under_nohup_a_hang_up_is_ignored(tmp_path):
    """And a lost stderr does not keep a signal from saving."""
    flags = f"--steps 8 --eval-every 0 --save-every 0 --prompts-per-step 2 --out {tmp_path}"
    ignoring = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    command = [sys.executable, HERE / "forking.py", *f"{flags}/nohup".split()]
    process = subprocess.Popen(command, stdout=PIPE, env=ENVIRONMENT, preexec_fn=ignoring)
    other = Forked(f"{flags}/lost --steps 999")
    for _ in range(4):
        process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.stdout.read()
    assert process.wait(timeout=60) == 0

    while not re.search("step +2/", other.stdout.readline()):
        assert other.poll() is None
    other.stderr.close()
    other.send_signal(signal.SIGTERM)
    other.stdout.read()
    assert other.wait(timeout=60) == 128 + signal.SIGTERM
    assert (tmp_path / "lost/model/trainer.pt").exists()


def test_a_checkpoint_of_another_version_is_refused_in_one_line(small, whole, tmp_path, capfd):
    run = shutil.copytree(whole, tmp_path / "run")
    state = torch.load(run / "model/trainer.pt", weights_only=True)
    del state["settings"]["--dual-clip"]
    torch.save(state, run / "model/trainer.pt")
    with pytest.raises(SystemExit, match="2"):
        main(f"{small} --steps 5 --out {run} --resume")
    (line,) = capfd.readouterr().err.splitlines()
    assert "--dual-clip 10.0 (it was None)" in line


@pytest.mark.parametrize("name, step", [("evaluate", 2), ("update", 3), ("step_line", 2)])
def test_a_step_that_does_not_end_leaves_the_checkpoint_of_the_one_before(
    name, step, small, whole, tmp_path, monkeypatch
):
    """Whatever fails: an evaluation, an update half way, printing."""
    run = tmp_path / "run"
    flags = f"{small} --eval-every 2 --save-every 1 --steps 4 --out {run} --resume"
    real, calls = getattr(forking, name), []

    def fails(*arguments):
        calls.append(1)
        result = real(*arguments)
        if len(calls) == step:
            raise ZeroDivisionError
        return result

    monkeypatch.setattr(forking, name, fails)
    with pytest.raises(ZeroDivisionError):
        main(flags)
    monkeypatch.undo()
    main(flags)
    assert without_times(run) == without_times(whole)
    assert same_weights(run, whole)


def test_the_model_is_saved_before_the_last_evaluation(small, tmp_path, monkeypatch):
    def dies(*arguments):
        assert (tmp_path / "run/model/model.safetensors").exists()
        raise ZeroDivisionError

    main(f"{small} --eval-every 0 --steps 1 --out {tmp_path}/run")
    monkeypatch.setattr(forking, "evaluate", dies)
    with pytest.raises(ZeroDivisionError):
        main(f"{small} --eval-every 2 --steps 2 --resume --out {tmp_path}/run")
    state = torch.load(tmp_path / "run/model/trainer.pt", weights_only=True)
    assert state["history"][-1]["step"] == 2


def test_one_process_at_a_time_writes_to_a_folder(small, tmp_path, monkeypatch, capfd):
    """The second one is refused while the first lives, and not when that is dead."""
    flags = (
        f"--steps 60 --eval-every 0 --save-every 1 --prompts-per-step 4 --out {tmp_path}/run"
    )
    process = Forked(flags)
    while not re.search("step +2/", process.stdout.readline()):
        assert process.poll() is None
    with pytest.raises(SystemExit, match="2"):
        main(f"{flags} --resume")
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{tmp_path}/run/in-use.lock" in line
    process.send_signal(signal.SIGKILL)
    process.wait()
    main(f"{flags} --steps 3 --resume")


def test_a_run_that_failed_before_its_first_whole_step_does_not_block_its_folder(
    small, tmp_path, monkeypatch
):
    def fails(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(forking, "rollout", fails)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            main(f"{small} --eval-every 0 --out {tmp_path}/run")
    monkeypatch.undo()
    main(f"{small} --eval-every 0 --out {tmp_path}/run")


def test_what_cannot_be_saved_is_found_before_the_first_step(
    small, tmp_path, monkeypatch, capfd
):
    """As the configuration of a model that was loaded from GGUF."""
    real = forking.load_policy

    def load(*arguments):
        model, tokenizer = real(*arguments)
        model.config.quantization = torch.float32
        return model, tokenizer

    monkeypatch.setattr(forking, "load_policy", load)
    with pytest.raises(SystemExit, match="2"):
        main(f"{small} --eval-every 0 --out {tmp_path}/run")
    out, err = capfd.readouterr()
    assert "step" not in out
    assert "serializable" in err


def test_a_signal_during_an_evaluation_ends_it_and_saves(small, tmp_path, monkeypatch):
    """Without waiting for its end; going on, all is as though nothing had happened."""
    flags = f"{small} --eval-every 2 --save-every 0 --steps 3 --out {tmp_path}/run --resume"
    real, calls = forking.evaluate, []

    def evaluated(*arguments):
        calls.append(1)
        if len(calls) == 2:
            forking.ask_to_stop(signal.SIGHUP, None)
        return real(*arguments)

    monkeypatch.setattr(forking, "evaluate", evaluated)
    monkeypatch.setattr(forking, "STOP", [])
    with pytest.raises(SystemExit, match=f"{128 + signal.SIGHUP}"):
        main(flags)
    assert [metrics["step"] for metrics in log_of(tmp_path / "run")] == [0, 1]
    monkeypatch.undo()
    main(flags)
    main(f"{small} --eval-every 2 --steps 3 --out {tmp_path}/whole")
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_terminal_without_all_characters_is_no_problem(tmp_path):
    lines = [json.dumps({"question": f"{i}\u4e0e\u221a4=?", "answer": "7"}) for i in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), "utf-8")
    (tmp_path / "test.jsonl").write_text("\n".join(lines), "utf-8")
    flags = f"--data {tmp_path}/train.jsonl --steps 2 --prompts-per-step 2 --show"
    command = [sys.executable, HERE / "forking.py", *flags.split(), "--out"]
    processes = []
    for encoding in ("ascii", "gbk"):
        environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding, "TERM": "dumb"}
        process = subprocess.Popen(
            [*command, tmp_path / encoding], stdout=PIPE, stderr=PIPE, env=environment
        )
        processes.append(process)
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert b"(reward" in out
        assert b"4 questions have characters that the tokenizer does not know" in out
        assert b"\033" not in out


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    """As | head -n 5, or a terminal that is closed: at once, or after a line."""
    flags = "--steps 2 --eval-every 0 --prompts-per-step 2"
    at_once, later = (started(f"{flags} --out {tmp_path}/{n}") for n in range(2))
    at_once.stdout.close()
    later.stdout.readline()
    later.stdout.close()
    for n, process in enumerate((at_once, later)):
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""
        assert [metrics["step"] for metrics in log_of(tmp_path / f"{n}")] == [0, 1, 2]


def test_the_tiny_world_is_found_from_anywhere(tmp_path):
    command = [sys.executable, HERE / "forking.py", "--steps", "1", "--eval-every", "0"]
    command += ["--prompts-per-step", "2", "--out", "here"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here/model/model.safetensors").exists()


CUTS = ["nothing", "half a line", "later lines", "the newest checkpoint", "all checkpoints"]


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """The folder of a run of four steps in one go."""
    folder = tmp_path_factory.mktemp("whole")
    main(f"{small} --eval-every 2 --save-every 1 --steps 4 --out {folder}")
    return folder


@pytest.mark.parametrize("cut", CUTS)
def test_a_run_that_was_cut_short_goes_on_as_though_it_had_not_been(
    cut, small, whole, tmp_path
):
    """Two steps, a mishap, and two more give log, weights and samples of four, bit by bit."""
    flags = f"{small} --eval-every 2 --save-every 1"
    run = tmp_path / "cut"
    main(f"{flags} --steps 2 --out {run}")
    lines = {"half a line": '{"step": 3, "rew', "later lines": '{"step": 3}\n{"step": 4}\n'}
    for name in "metrics", "samples":
        with open(run / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(lines.get(cut, ""))
    if cut in ("the newest checkpoint", "all checkpoints"):
        (run / "model").rename(run / "unfinished")  # as when killed between two renamings
    if cut == "all checkpoints":
        shutil.rmtree(run / "model.before")
    main(f"{flags} --steps 4 --resume --micro-batch-size 64 --out {run}")

    assert without_times(run) == without_times(whole)
    assert len(log_of(run)) == 5
    assert same_weights(run, whole)
    assert (run / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert not (run / "unfinished").exists()
    before = torch.load(run / "model.before/trainer.pt", weights_only=True)
    assert before["history"][-1]["step"] == 3  # the last two checkpoints are there


def test_resuming_a_run_that_has_ended_changes_nothing(small, runs, capfd):
    before = files_in(runs[0])
    before.pop(runs[0] / "config.json")  # now it says resume
    main(f"{small} --eval-every 1 --out {runs[0]} --resume")
    assert f"the model is in {runs[0]}/model" in capfd.readouterr().out
    after = files_in(runs[0])
    after.pop(runs[0] / "config.json")
    assert after == before


@pytest.mark.parametrize("step", [1, 3])
def test_a_disk_that_is_full_leaves_the_checkpoint_before(
    step, small, tmp_path, monkeypatch, capfd
):
    """In this run, nothing can be saved after one step. What was saved before is there."""
    flags = f"{small} --eval-every 0 --save-every 1 --steps 4 --out {tmp_path}/x"
    write = torch.save

    def full(state, file):
        write(state, file)
        if state and state["history"][-1]["step"] == step:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    (line,) = capfd.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert "intact" in line
    assert (tmp_path / "x/model").exists() == (step == 3)

    monkeypatch.undo()
    main(f"{flags} --resume")
    assert [metrics["step"] for metrics in log_of(tmp_path / "x")] == [0, 1, 2, 3, 4]


def test_nothing_in_a_checkpoint_is_code(runs):
    weights = {"model.safetensors", "config.json", "generation_config.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    files = {path.name for path in (runs[0] / "model").iterdir()}
    assert files == weights | tokenizer | {"trainer.pt"}

    state = torch.load(runs[0] / "model/trainer.pt", weights_only=True)
    assert set(state) == {"settings", "history", "samples", "queue", "generator", "optimizer"}

    source = Path(forking.__file__).read_text("utf-8")
    assert "trust_remote_code" not in source
    assert not re.search(r"(?<![.\w])(eval|exec)\(", source)


def test_a_run_leaves_a_log_samples_settings_and_a_model(runs, whole):
    names = ["config.json", "in-use.lock", "metrics.jsonl", "model", "samples.jsonl"]
    assert sorted(path.name for path in runs[2].iterdir()) == names  # saved once, at the end
    assert sorted(path.name for path in whole.iterdir()) == sorted([*names, "model.before"])


def test_the_same_seed_gives_the_same_log(runs):
    assert without_times(runs[0]) == without_times(runs[1])


def test_evaluating_does_not_change_the_training(runs):
    evaluated, plain = without_times(runs[0]), without_times(runs[2])
    for a, b in zip(evaluated, plain, strict=True):
        assert {key: a[key] for key in b} == b
    assert same_weights(runs[0], runs[2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_after_the_step_and_save(number, tmp_path):
    """Although no checkpoint is due."""
    flags = "--steps 60 --save-every 0 --eval-every 0 --prompts-per-step 4 --lr 1e-3"
    process = Forked(f"{flags} --out {tmp_path}/run")
    while not re.search("step +1/", process.stdout.readline()):
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "stopping after this step" in err
    assert "Traceback" not in err
    assert 2 <= len(log_of(tmp_path / "run")) < 61

    trained, base = (
        load_policy(tmp_path / "run/model", Config())[0],
        load_policy(GPT2, Config())[0],
    )
    assert not torch.equal(trained.transformer.wte.weight, base.transformer.wte.weight)


def test_a_second_ctrl_c_quits_at_once(tmp_path):
    flags = "--steps 60 --eval-every 0 --prompts-per-step 400"
    process = Forked(f"{flags} --out {tmp_path}/run")
    while "before training" not in process.stdout.readline():  # and so in a long first step
        assert process.poll() is None
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130
    assert not (tmp_path / "run/model").exists()


def test_killed_at_any_moment_it_goes_on_as_though_nothing_had_happened(tmp_path):
    """kill -9, after a delay that grows, so that it strikes in sampling, updates and saving."""
    flags = "--steps 8 --eval-every 0 --prompts-per-step 2 --minibatches 1 --lr 1e-3 "
    flags += "--save-every 1 --seed 5 --resume"
    whole = Forked(f"{flags} --out {tmp_path}/whole")
    for delay in 0.1, 0.4:
        process = Forked(f"{flags} --out {tmp_path}/killed")
        while "parameters" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Forked(f"{flags} --out {tmp_path}/killed").wait(timeout=60) == 0
    assert whole.wait(timeout=60) == 0

    a, b = tmp_path / "killed", tmp_path / "whole"
    assert without_times(a) == without_times(b)
    assert same_weights(a, b)
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()


def test_an_error_leaves_the_last_checkpoint_that_was_due(small, whole, tmp_path, monkeypatch):
    """With a checkpoint every second step, and an error in the fourth, that of the second."""
    flags = f"{small} --eval-every 2 --save-every 2 --steps 4 --out {tmp_path}/x"
    real, steps = forking.update, itertools.count(1)

    def fails_in_the_fourth(*arguments):
        if next(steps) == 4:
            raise ZeroDivisionError
        return real(*arguments)

    monkeypatch.setattr(forking, "update", fails_in_the_fourth)
    with pytest.raises(ZeroDivisionError):
        main(flags)
    state = torch.load(tmp_path / "x/model/trainer.pt", weights_only=True)
    assert [metrics["step"] for metrics in state["history"]] == [0, 1, 2]
    assert [metrics["step"] for metrics in log_of(tmp_path / "x")] == [0, 1, 2, 3]

    monkeypatch.undo()
    main(f"{flags} --resume")
    assert without_times(tmp_path / "x") == without_times(whole)
    assert same_weights(tmp_path / "x", whole)


def test_a_folder_with_a_model_of_somebody_elses_is_left_alone(small, tmp_path, capfd):
    shutil.copytree(GPT2, tmp_path / "model")
    with pytest.raises(SystemExit, match="2"):
        main(f"{small} --out {tmp_path}")
    assert "choose another folder" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_it_learns(tmp_path):
    """From nothing but right or wrong, in a few steps, and for 60 questions it has not seen."""
    lines = (HERE / "tiny_data/test.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "eval.jsonl").write_text("".join(lines[:60]), "utf-8")
    flags = f"--steps 8 --lr 1e-4 --eval-every 8 --eval-data {tmp_path}/eval.jsonl"
    process = Forked(f"{flags} --out {tmp_path}/run")
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")

    before, *steps = log_of(tmp_path / "run")
    assert before["accuracy"] < 0.45
    assert steps[-1]["accuracy"] > before["accuracy"] + 0.15
    assert all(abs(metrics["kept"] - 0.2) < 0.01 for metrics in steps)


# ----------------------------------------------------------------------------- 13 Compare, show
KINDS = ["top", "all", "random", "bottom"]


@pytest.fixture(scope="session")
def compared(small, tmp_path_factory):
    """The flags of a small comparison, and its folder, after it has run once."""
    out = tmp_path_factory.mktemp("compare")
    flags = f"{small} --eval-every 1 --compare --seeds 1"
    main(f"{flags} --out {out}")
    return flags, out


def test_a_comparison_is_four_runs_and_says_how_to_tabulate_them(compared, capsys):
    flags, out = compared
    assert {path.name for path in out.iterdir()} == {f"{kind}-0.2-seed3" for kind in KINDS}
    main(f"{flags} --out {out}")  # now all of them are found
    assert f"python tiny_data/report.py {out}" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_a_comparison_is_one_that_was_trained_alone(kind, compared, small, tmp_path):
    _, out = compared
    main(f"{small} --eval-every 1 --tokens {kind} --out {tmp_path}/alone")
    assert without_times(out / f"{kind}-0.2-seed3") == without_times(tmp_path / "alone")
    assert same_weights(out / f"{kind}-0.2-seed3", tmp_path / "alone")


def test_a_comparison_reuses_finished_runs_and_repeats_unfinished_ones(compared):
    flags, out = compared
    checkpoints = list(out.glob("*/model/trainer.pt"))
    before = {path: path.stat().st_mtime_ns for path in checkpoints}
    unfinished = out / "all-0.2-seed3"
    whole = without_times(unfinished)
    lines = (unfinished / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_text("".join(lines[:-1]), "utf-8")
    shutil.rmtree(unfinished / "model")  # as if killed before anything was saved
    shutil.rmtree(unfinished / "model.before", ignore_errors=True)
    main(f"{flags} --out {out}")

    assert without_times(unfinished) == whole
    changed = [path for path in checkpoints if path.stat().st_mtime_ns != before[path]]
    assert len(checkpoints) == 4
    assert changed == [unfinished / "model/trainer.pt"]


def test_a_comparison_lets_go_of_each_model_before_the_next(compared, tmp_path, monkeypatch):
    flags, _ = compared
    real, models = forking.load_policy, []

    def load(*arguments):
        assert not any(model() for model in models)
        model, tokenizer = real(*arguments)
        models.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(forking, "load_policy", load)
    main(f"{flags} --out {tmp_path}")
    assert len(models) == 4


def test_a_comparison_can_be_extended_to_more_steps_and_values_of_rho(compared, tmp_path):
    """As though it had been longer from the beginning."""
    flags, out = compared
    shutil.copytree(out, tmp_path / "more")
    main(f"{flags} --eval-every 3 --steps 3 --rhos 0.5 --out {tmp_path}/more")

    names = {path.name for path in (tmp_path / "more").iterdir()}
    assert names == {
        f"{kind}-seed3" for kind in [*(f"{kind}-0.2" for kind in KINDS), "top-0.5"]
    }
    for name in names:
        log = log_of(tmp_path / "more" / name)
        steps = [metrics["step"] for metrics in log if "accuracy" in metrics]
        assert [metrics["step"] for metrics in log] == [0, 1, 2, 3]
        assert steps[0] == 0
        assert steps[-1] == 3
    assert log_of(tmp_path / "more/top-0.5-seed3")[-1]["kept"] == pytest.approx(0.5, abs=0.01)


def test_show_samples_completions_and_marks_the_fifth_of_the_tokens_with_most_entropy(
    small, tokenizer, tmp_path, capsys
):
    """Four of them on the screen, and all of them in a file."""
    main(f"{small} --show --prompts-per-step 5 --out {tmp_path}")
    printed = capsys.readouterr().out
    records = read_lines(tmp_path / "samples.jsonl")
    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    names = {"config.json", "samples.jsonl", "gradient.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert settings["show"]

    problems = load_problems(settings["data"], tokenizer, "plain", 80)[:5]
    assert len(records) == 5 * 4
    for i, record in enumerate(records):
        assert record["question"] == problems[i // 4].question
    assert {record["step"] for record in records} == {0}
    assert all(record["reward"] in (0, 1) for record in records)

    entropies = flat(record["entropy"] for record in records)
    (threshold,) = {record["threshold"] for record in records}
    assert threshold == sorted(entropies)[-math.ceil(0.2 * len(entropies))]

    for record in records[::5]:
        pieces = zip(record["tokens"], record["entropy"], strict=True)
        marked = [f"[{token}]" if e >= threshold else token for token, e in pieces]
        assert f"{record['question']}\n{''.join(marked)}   (reward" in printed
    assert printed.count("   (reward") == 4


def test_show_samples_no_more_questions_than_there_are(small, tmp_path):
    main(f"{small} --show --prompts-per-step 100 --out {tmp_path}")
    assert len(read_lines(tmp_path / "samples.jsonl")) == 12 * 4


def test_the_entropies_of_a_model_and_its_base_are_equal_if_they_are_the_same(small, tmp_path):
    main(f"{small} --show --base {GPT2} --out {tmp_path}")
    for record in read_lines(tmp_path / "samples.jsonl"):
        assert record["base_entropy"] == pytest.approx(record["entropy"], abs=1e-4)


def test_base_entropies_are_those_of_the_base_at_the_tokens_of_the_trained_model(
    small, runs, models, tokenizer, tmp_path
):
    trained, _ = load_policy(runs[0] / "model", Config())
    main(f"{small} --show --model {runs[0] / 'model'} --base {GPT2} --out {tmp_path}")
    for record in read_lines(tmp_path / "samples.jsonl"):
        prompt = tokenizer.encode(record["question"] + "\n")
        ids = torch.tensor(prompt + tokenizer.encode("".join(record["tokens"])))
        for key, model in ("entropy", trained), ("base_entropy", models["gpt2"]):
            _, entropy = read(model, ids)
            assert record[key] == pytest.approx(entropy[len(prompt) :].tolist(), abs=1e-4)
        assert record["entropy"] != pytest.approx(record["base_entropy"], abs=1e-4)


def gradient_of(model, batch, keep):
    """Of the sum of A_t log pi over the kept tokens, by autograd, in one vector."""
    logits = model(batch.ids).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
    total = (batch.advantage[:, 1:] * logp)[keep[:, 1:]].sum()
    parts = torch.autograd.grad(total, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts]).double()


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 5}])
@pytest.mark.parametrize("tokens", ["all", "top"])
def test_gains_are_inner_products_of_gradients_of_different_groups(
    name, models, tokenizer, prompts, settings, tokens
):
    """Of single tokens, and in sum of kinds of tokens; the weights are then what they were."""
    model = copy.deepcopy(models[name])
    before = copy.deepcopy(model.state_dict())
    batch = collate(flat(sampled(model, tokenizer, prompts)), "cpu")
    mask = batch.response_mask
    keep = fork_mask(batch.entropy, mask, 0.2, tokens)
    half = torch.arange(4).repeat_interleave(3)[:, None] % 2 == 0
    gains = forking.gradient_gains(model, batch, keep, half, Config(**settings))

    for here, there in ((half, ~half), (~half, half)):
        direction = gradient_of(model, batch, keep & here)
        length = direction.norm() * gradient_of(model, batch, mask & there).norm()
        kinds = [fork_mask(batch.entropy, mask, rho) for rho in (0.1, 0.5, 1.0)]
        for kind in kinds:
            expected = gradient_of(model, batch, kind & there) @ direction
            assert abs(gains[kind & there].sum() - expected) < 0.003 * length
        one = torch.zeros_like(mask)
        one[tuple((mask & there).nonzero()[7])] = True
        expected = gradient_of(model, batch, one) @ direction
        assert abs(gains[one].sum() - expected) < 0.02 * abs(expected) + 1e-4 * length
    assert (gains[~mask] == 0).all()
    for weight, value in model.state_dict().items():
        assert torch.allclose(value, before[weight], atol=1e-6)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """What --show has found about the gradient of the tiny model: of eight groups."""
    out = tmp_path_factory.mktemp("gradient")
    main(f"--show --prompts-per-step 8 --out {out}/look")
    return out / "look", json.loads((out / "look/gradient.json").read_text())


def shares_of(found):
    gain = torch.tensor(found["gain from all"], dtype=torch.float64)
    kept = [gain[torch.tensor(found[kind])] for kind in ("top", "random")]
    return [(part.sum() / gain.sum()).item() for part in kept]


def test_show_measures_where_the_gradient_comes_from(measured, tmp_path):
    """In the tiny world, from the forks. A random fifth has about a fifth of it."""
    _, found = measured
    assert found["groups"] == 8
    assert 4 <= found["mixed"] <= 8
    assert set(found["group"]) == set(range(found["mixed"]))
    assert all(found["all"])
    assert sum(found["top"]) == sum(found["random"]) == math.ceil(0.2 * len(found["all"]))
    top, random = shares_of(found)
    assert 0.9 < top < 1.1
    assert -0.2 < random < 0.6

    main(f"--show --prompts-per-step 3 --out {tmp_path}/few")
    few = json.loads((tmp_path / "few/gradient.json").read_text())
    assert few.keys() == {"groups", "mixed", "rho"}  # too few to tell
    main(f"--show --prompts-per-step 8 --rho 1e-9 --out {tmp_path}/one")
    one = json.loads((tmp_path / "one/gradient.json").read_text())
    assert sum(one["top"]) == 1
    assert all(map(math.isfinite, one["gain from top"]))


@pytest.mark.parametrize("how", ["--micro-batch-size 5", "--offload"])
def test_the_gradient_is_the_same_however_it_is_computed(measured, tmp_path, how):
    _, expected = measured
    main(f"--show --prompts-per-step 8 {how} --out {tmp_path}/look")
    found = json.loads((tmp_path / "look/gradient.json").read_text())
    assert found["random"] == expected["random"]
    assert shares_of(found) == pytest.approx(shares_of(expected), abs=0.01)


def test_the_gradient_measured_by_two_processes_is_that_of_one(measured, tmp_path):
    _, expected = measured
    flags = f"--show --prompts-per-step 8 --out {tmp_path}/look"
    in_two_processes(HERE / "forking.py", flags)
    found = json.loads((tmp_path / "look/gradient.json").read_text())
    assert found["group"] == expected["group"]
    assert found["random"] == expected["random"]
    others = sum(a != b for a, b in zip(found["top"], expected["top"], strict=True))
    assert others <= 2  # rounding may decide about the last place among the top
    for kind in ("all", "top", "random"):
        one, two = (torch.tensor(each[f"gain from {kind}"]) for each in (expected, found))
        assert (one - two).norm() < 0.01 * one.norm()


def test_show_leaves_a_folder_that_holds_a_run_alone(small, runs, capfd):
    before = files_in(runs[0])
    with pytest.raises(SystemExit, match="2"):
        main(f"{small} --show --out {runs[0]}")
    (line,) = capfd.readouterr().err.splitlines()
    assert f"--out {runs[0]}: holds a run" in line
    assert files_in(runs[0]) == before


# -------------------------------------------------------------------------------------- 14 main
NAMES = [field.name for field in fields(Config)]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_read_somewhere(name):
    assert re.search(rf"\bcfg\.{name}\b", Path(forking.__file__).read_text("utf-8"))


@pytest.fixture
def help_text(capsys):
    with pytest.raises(SystemExit, match="0"):
        main("--help")
    return capsys.readouterr().out


def test_help_explains_every_flag(help_text):
    source = inspect.getsource(Config)
    squeezed = "".join(help_text.split())  # argparse breaks lines where it likes
    for field in fields(Config):
        (line,) = re.findall(rf"^    {field.name}: .*  # (.+)$", source, re.MULTILINE)
        explanation = line + (f" (default: {field.default})" if field.default else "")
        assert "".join(explanation.split()) in squeezed, field.name


def test_help_shows_each_flag_once_in_its_group_and_first_the_six_that_matter(help_text):
    *_, options = help_text.partition("\noptions:\n")
    flags = re.findall(r"^  (?:-h, )?(--[a-z-]+)", options, re.MULTILINE)
    assert flags == ["--help"] + [f"--{name.replace('_', '-')}" for name in NAMES]
    six = ["--model", "--data", "--prompt", "--max-new-tokens", "--lr", "--tokens"]
    assert flags[1:7] == six
    assert not re.search("--[a-z-]+_", help_text)

    titles = re.findall(r"^(\S.*):$", options, re.MULTILINE)
    assert titles[0] == "the six that matter first"
    assert titles[1:5] == ["1 Sample, 2 Check", "3 Entropy, 4 Fork", "5 Loss", "6 Update"]
    assert len(titles) == 8
    six_then_title = options[: options.index("1 Sample, 2 Check:")]
    assert "--tokens" in six_then_title
    assert "--seed" not in six_then_title


def test_help_begins_with_the_three_examples_of_the_files_first_lines(help_text):
    before, *_ = help_text.partition("\noptions:\n")
    commands = re.findall(r"^    python forking\.py .*$", forking.__doc__, re.MULTILINE)
    assert len(commands) == 3
    assert all(command in before for command in commands)


@pytest.mark.parametrize("beside", [True, False])
def test_the_questions_to_test_on_are_in_test_jsonl_beside_the_data_if_it_exists(
    beside, tmp_path
):
    if beside:
        (tmp_path / "test.jsonl").write_text(DATA, "utf-8")
    cfg = Config(data=f"{tmp_path}/train.jsonl")
    find_files(cfg)
    assert cfg.eval_data == (f"{tmp_path}/test.jsonl" if beside else None)

    cfg = Config(data=f"{tmp_path}/train.jsonl", eval_data="mine.jsonl")
    find_files(cfg)
    assert cfg.eval_data == "mine.jsonl"

    cfg = Config(data=f"{tmp_path}/test.jsonl")  # these are trained on
    find_files(cfg)
    assert cfg.eval_data is None


GOOD = '{"question": "1+2*3=?", "answer": "7"}\n'
FILES = {
    "good": GOOD,
    "empty": "",
    "blank": "\n\n",
    "binary": bytes(range(256)),
    "malformed": GOOD + "{oops\n",
    "no_answer": '{"question": "1+2*3=?"}\n',
    "no_question": '{"answer": "7"}\n',
    "null": '{"question": "1+2*3=?", "answer": null}\n',
    "list": '["1+2*3=?", "7"]\n',
    "too_long": json.dumps({"question": "1+" * 200 + "1=?", "answer": "201"}) + "\n",
    "deep": GOOD + '{"question": "1+2*3=?", "answer": ' + "[" * 100_000 + "\n",
    "list_of_prompts": '{"prompt": [], "reward_model": {"ground_truth": "7"}}\n',
    "surrogate": '{"question": "\\ud800", "answer": "7"}\n',  # JSON, of half a character
}


@pytest.fixture(scope="session")
def bad(tmp_path_factory):
    """A folder of files and models with which one cannot begin."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        if isinstance(content, str):
            content = content.encode()
        (folder / f"{name}.jsonl").write_bytes(content)
    for name in "truncated", "no_tokenizer":
        shutil.copytree(GPT2, folder / name)
    os.truncate(folder / "truncated/model.safetensors", 1000)
    shutil.copytree(GPT2, folder / "run/model")
    shutil.copytree(GPT2, folder / "lacking")
    weights = load_file(folder / "lacking/model.safetensors")
    some = {name: weight for name, weight in weights.items() if ".h.0." not in name}
    save_file(some, folder / "lacking/model.safetensors", metadata={"format": "pt"})
    for path in (folder / "no_tokenizer").glob("tokenizer*"):
        path.unlink()
    return folder


# (flags, what the message must name, what it must say about it)
NO_LINES = "empty", "blank", "binary"
BAD = [(f"--data BAD/{name}.jsonl", f"{name}.jsonl", "lines such as") for name in NO_LINES]
BAD += [
    (f"--data BAD/{name}.jsonl", f"{name}.jsonl:2", "lines such as")
    for name in ("malformed", "deep")
]
BAD += [
    (f"--data BAD/{name}.jsonl", f"{name}.jsonl: nothing is left", "first in line 1")
    for name in ("no_answer", "no_question", "list", "null", "surrogate", "list_of_prompts")
]
BAD += [
    ("--data BAD/too_long.jsonl", "over 64 tokens", "first in line 1"),
    ("--stop \u4e09", "--stop", "tokenizer"),
    ("--prompt @BAD/binary.jsonl", "BAD/binary.jsonl", "utf-8"),
    ("--data BAD", "BAD", "Is a directory"),
    ("--data BAD/missing.jsonl", "missing.jsonl", "No such file"),
    ("--data BAD/good.parquet", "good.parquet", "pip install pyarrow"),
    ("--eval-data BAD/missing.jsonl --eval-every 1", "missing.jsonl", "No such file"),
    ("--model no/such-model", "model no/such-model", "folder"),
    ("--model BAD", "model BAD", "folder"),
    ("--model BAD/truncated", "model BAD/truncated", "folder"),
    ("--model BAD/no_tokenizer", "model BAD/no_tokenizer", "tokenizer"),
    ("--out BAD/good.jsonl", "BAD/good.jsonl", "File exists"),
    ("--prompt @BAD/none.txt", "BAD/none.txt", "No such"),
    ("--prompt @BAD/blank.jsonl", "--prompt", "{question}"),
    ("--prompt hello", "--prompt", "{question}"),
    ("--prompt chat", "--prompt chat", "try boxed"),
    ("--rho 0", "--rho 0", "above 0"),
    ("--rho 1.5", "--rho", "at most 1"),
    ("--rho -1", "--rho -1", "must"),
    ("--rho nan", "--rho nan", "must"),
    ("--rho much", "--rho", "much"),
    ("--rhos 0.5 2", "--rhos", "at most 1"),
    ("--rhos 0", "--rhos", "above 0"),
    ("--rhos nan", "--rhos", "above 0"),
    ("--lr nan", "--lr nan", "must"),
    ("--group-size 1", "--group-size", "above 1"),
    ("--group-size 0", "--group-size 0", "above 0"),
    ("--temperature 0", "--temperature 0", "must be a number"),
    ("--minibatches 0", "--minibatches 0", "above 0"),
    ("--steps 0", "--steps 0", "must be a number above 0"),
    ("--steps", "--steps", "argument"),
    ("--dual-clip 0.5", "--dual-clip", "above 1"),
    ("--seed -1", "--seed -1", "must"),
    ("--seed 99999999999999999999", "--seed 9999", "must"),
    ("--overlong-buffer 65", "--overlong-buffer", "at most --max-new-tokens"),
    ("--tokens forks", "forks", "top"),
    ("--normalize me", "me", "selected"),
    ("--dtype int8", "int8", "bfloat16"),
    ("stray", "stray", "unrecognized"),
    ("--no-such-flag 1", "--no-such-flag", "unrecognized"),
    ("--group 4", "--group", "unrecognized"),  # no abbreviations
    ("--learning-rate 1", "--learning-rate", "did you mean --lr?"),
    ("--evalevery 1", "--evalevery", "did you mean --eval-every?"),
    ("--rhos 0.5", "--rhos", "needs --compare"),
    (f"--base {GPT2}", "--base", "needs --show"),
    ("--max-new-tokens 128", "--max-new-tokens", "below 128, the length of the context"),
    ("--max-new-tokens 500", "--max-new-tokens", "below 128"),
    ("--model BAD/lacking", "BAD/lacking", "it lacks transformer.h.0"),
    ("--device meta", "--device meta", "cpu"),
    ("--model BAD/run", "BAD/run", "did you mean BAD/run/model?"),
    ("--compare --rho 2", "--rho", "at most 1"),
    ("--compare", "--compare", "--eval-data"),
    ("--device abacus", "--device abacus", "cpu"),
]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
BAD += [pytest.param("--device cuda", "--device cuda", "cpu", marks=NO_GPU)]


@pytest.mark.parametrize("flags, culprit, remedy", BAD)
def test_bad_input_ends_in_one_line_that_names_the_culprit_and_what_to_do(
    flags, culprit, remedy, bad, tmp_path, capfd
):
    good = f"--model {GPT2} --data {bad}/good.jsonl --eval-every 0 --out {tmp_path}/out"
    with pytest.raises(SystemExit, match="2"):  # of a flag given twice, the last counts
        main(f"{good} --steps 1 {flags.replace('BAD', str(bad))}")
    (line,) = capfd.readouterr().err.splitlines()
    assert culprit.replace("BAD", str(bad)) in line
    assert remedy.replace("BAD", str(bad)) in line
    assert not (tmp_path / "out").exists()  # nothing was begun


NO_ROOM = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."


@pytest.mark.parametrize(
    "name, error",
    [
        ("sample", torch.OutOfMemoryError("CUDA out of memory.")),
        ("update", MemoryError()),
        ("update", RuntimeError(NO_ROOM)),
    ],
    ids=str,
)
def test_running_out_of_memory_names_the_flags_that_help(
    name, error, bad, tmp_path, monkeypatch, capfd
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(forking, name, fail)
    with pytest.raises(SystemExit, match="2"):
        main(f"--model {GPT2} --data {bad}/good.jsonl --eval-every 0 --out {tmp_path}/out")
    (line,) = capfd.readouterr().err.splitlines()
    for flag in "--sample-batch-size", "--micro-batch-size", "--gradient-checkpointing":
        assert flag in line


def test_another_error_is_not_hidden(bad, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(forking, "update", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        main(f"--model {GPT2} --data {bad}/good.jsonl --eval-every 0 --out {tmp_path}/out")


# -------------------------------------------------------------------------------------- README
README = (HERE / "README.md").read_text("utf-8")


def test_the_readme_has_the_line_numbers_of_the_lesson():
    lines = (HERE / "forking.py").read_text("utf-8").splitlines()
    rows = re.findall(r"(?m)^\| (\d+) \| (the loop|below|\d \w+|Evaluate)", README)
    assert len(rows) == 9
    marks = {"the loop": "def train(cfg):", "below": "end of the lesson"}
    for number, section in rows:
        assert marks.get(section, f"- {section}") in lines[int(number) - 1]


def test_the_readmes_block_to_copy_runs(capsys):
    """It keeps 8 of 40 tokens, and these alone get a gradient."""
    block = README.split("## Copy it")[1].split("\n\n")[2]
    code = "\n".join(line.removeprefix("    ") for line in block.splitlines())
    names = {}
    exec(code, names)
    assert names["keep"].sum() == 8
    reached = names["logits"].grad.abs().sum(-1) > 0
    assert not (reached & ~names["keep"]).any()
    assert reached.any()

"""The tests of forking.py, in the order of its sections.

Every expected number can be checked by hand, or comes from somewhere else than forking.py: a plain Python loop,
brute force, transformers' own forward pass and generate(). To run them, in a minute:  pytest -q test_forking.py
"""
import os

os.environ["HF_HUB_OFFLINE"] = "1"                              # nothing here needs the network

import copy, gc, itertools, json, math, random, re, shutil, signal, subprocess, sys, time, types, unittest.mock, weakref
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch
import transformers
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

import forking
from forking import (
    Answer, Config, Problem, accuracy_chart, check_settings, clipped_objective, draw, encode, entropy_change, evaluate,
    extract_answer, for_terminal, fork_mask, group_advantages, interval, is_correct, load_policy, load_problems, look,
    mark_forks, micro_batches, overlong_penalty, policy_entropy, report, rollout, sample, stack, step_line, token_entropy,
    token_logits, update, weights_at_hand)

HERE = Path(forking.__file__).resolve().parent
GPT2 = HERE / "tiny_data/gpt2"
torch.set_num_threads(1)                                        # enough for models this small

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

@pytest.fixture(scope="session")
def models():
    """The tiny GPT-2, a random Qwen3 (output layer tied to the embeddings), Llama (untied) and Gemma 3. The random ones
    have large weights, lest all words be equally likely, and four end tokens, lest no answer ever end."""
    shape = dict(vocab_size=102, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, max_position_embeddings=128, initializer_range=0.3,
                 pad_token_id=0, bos_token_id=None, eos_token_id=[1, 17, 40, 77])
    torch.manual_seed(0)
    gemma3 = dict(sliding_window=7, sliding_window_pattern=2, final_logit_softcapping=9.0)      # reads 7 tokens back
    return {"gpt2": load_policy(GPT2)[0]} | {name: AutoModelForCausalLM.from_config(kind(**shape, **more)).eval()
        for name, kind, more in [("qwen3", Qwen3Config, dict(tie_word_embeddings=True)),
                                 ("llama", LlamaConfig, dict(tie_word_embeddings=False)),
                                 ("gemma3", Gemma3TextConfig, gemma3)]}

@pytest.fixture(params=["gpt2", "qwen3", "llama", "gemma3"])
def model(request, models):
    return models[request.param]

@pytest.fixture(scope="session")
def gpt2(models):
    return models["gpt2"]

@pytest.fixture(scope="session")
def tokenizer():
    return load_policy(GPT2)[1]

@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Of four lengths, so that all but the longest need padding."""
    return [tokenizer.encode(f"{question}=?\n") for question in ("1+2*3", "4+5*6-1", "7", "3*3-2+1*9")]


# ----------------------------------------------------------------------------------------------------- 1 Config

@pytest.mark.parametrize("name", [field.name for field in fields(Config)])
def test_every_setting_is_read_somewhere(name):
    assert re.search(rf"\bcfg\.{name}\b", Path(forking.__file__).read_text("utf-8"))

def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        forking.main(["--help"])
    printed = "".join(capsys.readouterr().out.split())          # argparse breaks lines where it likes
    for field in fields(Config):
        explanation = "".join(field.metadata["help"].split())
        assert f"--{field.name.replace('_', '-')}" in printed and explanation and explanation in printed, field.name


# -------------------------------------------------------------------------------- 2 Problems, and their answers

@pytest.mark.parametrize("record, question, answer", [
    ({"question": "1+2=?", "answer": "3"}, "1+2=?", "3"),
    ({"problem": "1+2=?", "answer": "3", "level": 5}, "1+2=?", "3"),                            # MATH
    ({"question": "1+2=?", "answer": "1 and 2 are <<1+2=3>>3\n#### 3"}, "1+2=?", "3"),          # GSM8K
    ({"question": "1+2=?", "answer": 3}, "1+2=?", "3"), ({"question": "1/2=?", "answer": 0.5}, "1/2=?", "0.5"),
    ({"prompt": [{"role": "system", "content": "Hi"}, {"role": "user", "content": "1+2=?"}], "ability": "MATH",
      "reward_model": {"ground_truth": "3", "style": "rule"}}, "1+2=?", "3"),                   # DAPO-Math-17k
    ({"prompt": "1+2=?", "solution": "3", "reward_model": {"ground_truth": "3"}}, "1+2=?", "3"),        # processed
])
def test_the_common_formats_of_problems_can_be_read(record, question, answer, tokenizer, tmp_path, monkeypatch):
    """Empty lines do not matter, and what is there twice counts once. Parquet: see what is read if pyarrow is there."""
    expected = [Problem(question, answer, tokenizer.encode(f"Q: {question}\nA: "))]
    (tmp_path / "data.jsonl").write_text(f"\n{json.dumps(record)}\n\r\n{json.dumps(record)}\n\n", "utf-8")
    assert load_problems(tmp_path / "data.jsonl", tokenizer, "Q: {question}\nA: ", 99) == expected
    pyarrow = types.SimpleNamespace(read_table=lambda path: types.SimpleNamespace(to_pylist=lambda: [record, record]))
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", pyarrow)
    assert load_problems(tmp_path / "data.parquet", tokenizer, "Q: {question}\nA: ", 99) == expected

def test_a_prompt_can_be_one_of_ours_a_text_or_a_file_of_several_lines(tokenizer, tmp_path):
    (tmp_path / "few-shot.txt").write_text("1+1=?\n2\n\n{question}\n", "utf-8")
    cfg = Config(prompt=f"@{tmp_path}/few-shot.txt")
    check_settings(cfg)
    for prompt, text in [("plain", "4=?\n"), ("{question} Go.\n", "4=? Go.\n"), (cfg.prompt, "1+1=?\n2\n\n4=?\n"),
                         ("boxed", "User:\n4=?\nPlease reason step by step, and put your final answer within "
                                   "\\boxed{}.\n\nAssistant:\n")]:                                # the paper's
        assert encode(tokenizer, prompt, "4=?") == tokenizer.encode(text)

def test_the_chat_prompt_is_the_models_own_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                                                    "{% if add_generation_prompt %}<assistant>{% endif %}")
    text = tokenizer.decode(encode(tokenizer, "chat", "4=?"))
    assert text.startswith("<user>4=?\nPlease reason") and text.endswith("\\boxed{}.<assistant>")

@pytest.mark.parametrize("text, found", [
    (r"so it is \boxed{5}.", "5"), (r"\boxed{1} no, \boxed{2}", "2"),   # the last one counts
    (r"\boxed{1} no, \boxed{2", "1"),                                   # cut off: the last one that is complete
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{{1}", None), (r"} \boxed {7} {", "7"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{\{1}", r"\{1"),       # escaped braces do not nest
    (r"\boxed{4} Answer: 5", "4"),                                      # a box wins
    (r"\boxed{5 \boxed{6}}", "6"), (r"\boxed{5} \boxed{}", ""), ("Answer: 5 Answer: 6", "6"), ("#### 5\n#### 6", "6"),
    ("Answer: 3\nno wait. Answer: 4\nbye", "4"), ("the ANSWER : 4", "4"), ("**Answer:** 4", "4"),
    ("**Answer**: 4", "4"), ("Answer:\n4", "4"), ("3+1=4\n#### 4", "4"), ("it is 4", None), ("Answer:", ""), ("", None),
])
def test_the_answer_is_the_last_box_or_what_follows_the_last_marker(text, found):
    assert extract_answer(text) == found

@pytest.mark.parametrize("given, answer", [
    ("5", "5"), ("1/2", "0.5"), (r"\frac{1}{2}", "0.5"), (r"\dfrac12", "1/2"), (r"50\%", "1/2"), ("0.50", r"50\%"),
    ("1,000", "1000"), ("1,000,000.0", "1000000"), ("-3", "\u2212 3"), ("\u22123", "-3"), (".5", "0.5"),
    (r"-\frac{2}{4}", "-0.5"), ("5.", "5"), ("+7", "7"), ("x = 5", "5"), ("$5$", "5"), (r"5\text{ cm}", "5"),
    (r"90^\circ", "90"), (r"\left( 1, 2 \right)", "(1,2)"), (r"\text{yes}", "yes"), (r"2\pi", r"2\pi"),
    (r"90^{\circ}", "90"), (r"90\degree", "90"), ("90\u00b0", "90"), (r"\$36", "36"), (r"\(5\)", "5"), (r"\[5\].", "5"),
    (r"1{,}000", "1000"), (r"11,\! 111,\! 100", "11111100"), (r"10,\!080", "10,080"), (r"50\%", r"\frac{1}{2}"),
    (r"15\mbox{ cm}^2", "15"), (r"15\,\mathrm{cm}^{2}.", "15"), (r"\frac{270}7\text{ degrees}", "270/7"),
    (r"\textbf{(B)}", "B"), (r"\text{B}", "(B)"), (r"x \in [-2,7]", "[-2, 7]"), ("2\u03c0 r", r"2 \pi r"),
    (r"11\sqrt2", r"11 \sqrt{2}"), (r"\frac{\sqrt3}{2}", r"\dfrac{\sqrt{3}}{2}"), ("x^{2}", "x^2"),
    ("2516_8", "2516_{8}"), (r"\frac{-1}{2}", r"-\frac{1}{2}"), (r"x^{1/2}", r"x^{\frac12}"),
    ("(0.5, 1]", r"\left(\frac{1}{2}, 1\right]"), (r"\{ \frac{2}{4}, 3 \}", r"\{0.5,3.0\}"), ("3;5", "3, 5"),
    (r"\begin{pmatrix} 1/3 \\ -2/3 \end{pmatrix}", r"\begin{pmatrix}\frac{1}{3}\\-\frac{2}{3}\end{pmatrix}"),
    ("9" * 990 + ".0", "9" * 990),                                      # numbers are fractions, not floats
])
def test_two_ways_to_write_the_same_answer_are_equal(given, answer):
    assert is_correct(rf"\boxed{{{given}}}", answer) and is_correct(f"Answer: {given}", answer)
    assert is_correct(rf"\boxed{{{answer}}}", given)

@pytest.mark.parametrize("given, answer", [
    ("5", "6"), ("", ""), ("5 or 6", "5"), ("5 or 6", "6"), ("5, 6", "5"), ("5, 6", "56"), ("1,2,3", "123"),
    ("5 6", "56"), ("5  6", "56"), ("5~6", "56"), ("1, 234", "1234"), ("1 ,234", "1234"),
    ("5. 6", "5.6"), ("5 .6", "5.6"), ("5, 6", "6, 5"), ("1,2,3,4,5,6,7,8,9", "5"), ("1_000", "1000"),
    ("0.333", "1/3"), ("1/0", "2/0"), ("9" * 990 + "8", "9" * 990 + "9"), ("five", "5"), ("5\0", "5"),
    ("print(5)", "5"), ("2+3", "5"), ("nan", "5"), ("1e1", "10"), ("0x5", "5"), ("5 million", "5"), ("2+3=5", "5"),
    ("5", "-5"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2]", "(1,2)"), (r"\{1,2\}", "(1,2)"), ("(1,234)", "1234"),
    ("x=1, y=2", "y=1, x=2"), ("2516_8", "2516"), ("x^{10}", "x^10"), (r"5\pi", "5"), (r"\sqrt{25}", "5"),
    (r"1\frac{4}{5}", "14/5"), ("1 4/5", "14/5"), (r"\frac123", r"\frac{1}{23}"), (r"2^\frac{1}{2}", "2^1/2"),
    (r"\frac{1}{2}\pi", r"1/2\pi"), (r"50\%", "50"), ("5$6", "56"), (r"5^\circ6", "56"), (r"5\text{2}", "5"),
    *[(r"\begin{pmatrix}1\\2\end{pmatrix}", other) for other in ("(1;2)", r"\begin{pmatrix}1&2\end{pmatrix}")],
    *[(vacuous, vacuous) for vacuous in ("$", ".", r"\text{}", "x=", r"\,", r"\left\right")],
    *[(five, "5") for five in "\u0665\uff15\U0001d7d3\u2075\u2085\u2464"],      # digits to Python, or to the eye
    *[(five, "5") for five in ("5\u200b", "\ufeff5", "5\u0301", "\ud8005", "5\u20dd", "5\x7f")],
    *[(split, "56") for split in ("5\u200b6", "5\xa06", "5\u20096", "5\x1f6", "5\u20286", "\u202e65")],
])
def test_another_answer_or_a_list_of_answers_is_wrong(given, answer):
    assert not is_correct(rf"\boxed{{{given}}}", answer) and not is_correct(f"Answer: {given}", answer)

@pytest.mark.parametrize("hedge", [
    "A or B", "A, B", "A; B", "A (or B)", "A (B)", "(A) (B)", "A B", "AB", "A = B", r"A\text{ or }B", r"A\text{ or B}",
    r"A \\ B", r"A\quad B", r"\(A\) \(B\)", "$A$, $B$", "A and B", "A|B", r"\{A, B\}", "[A, B]", "A & B", "A not B",
    r"A\mbox{, B}", r"\textbf{A} B", "A. B.", r"A^\circ B", r"A\%B", "A\u200bB", "A\x1cB", "A\tB", "A_B", "A^B"])
def test_two_answers_in_one_place_win_for_neither(hedge):
    for a, b in itertools.permutations(["5", "6.5", "-3", "1,000", "2/3", r"\frac{3}{4}", "(1,2)", r"2\sqrt{5}"], 2):
        given = re.sub("[AB]", lambda letter: a if letter[0] == "A" else b, hedge)
        assert not any(is_correct(text, answer) for text in (rf"\boxed{{{given}}}", f"Answer: {given}")
                       for answer in (a, b)), given

@pytest.mark.parametrize("text", [
    r"\boxed" + "{" * 50_000 + "}" * 50_000, "{" * 100_000, r"\boxed{" * 15_000, r"\boxed" + " " * 100_000,
    "\\" * 100_001, "Answer:" * 15_000, "answer" + " " * 100_000, "#" * 100_000, "\0" * 100_000, r"\text{" * 20_000,
    rf"\boxed{{{'9' * 10**5}}}", r"\boxed{9**9**9}", r"\boxed{9^{9^{9^9}}}", rf"\boxed{{5{' ' * 990}6}}",
    r"\boxed{1e999999999}", rf"\boxed{{{'1,' * 400}}}", rf"\boxed{{1/{'0' * 900}}}",
    r"Answer: 5\text{" + r"\text{" * 150, r"Answer: " + r"\frac{1" * 140, "Answer: " + "5," * 490, "Answer: \ud800",
    "Answer: " + "\u0665" * 990, r"\boxed{6}" * 10_000 + r"\boxed{", "*" * 100_000, "Answer:" + "* " * 50_000,
], ids=lambda text: ascii(text)[:12])
def test_no_text_hangs_or_crashes_the_check(text):
    start = time.perf_counter()
    assert not is_correct(text, "5") and not is_correct(text, text)
    assert time.perf_counter() - start < 2

def test_no_fuzz_hangs_or_crashes_the_check(count=5_000):
    """Random texts out of pieces of answers, with pieces cut out and repeated. Raise count for a longer hunt."""
    pieces = r"""\boxed{ { } \{ \} Answer: #### answer \frac \dfrac \sqrt \text{ \mbox{cm}^2 \left( \right] \\ \ \! \,
        \begin{pmatrix} \end{pmatrix} {,} ^\circ ^{\circ} \degree \% % $ \$ \( \] ~ * ** . , 1,000 -\frac{1}{2} 0.5 .5
        50\% x=5 x\in 1/0 1/2 (1,2) [ ) _{8} ^{2} \pi 9**9 1e999 nan 0x5 1_0 print(5) - + / = & or 5 6 0 999""".split()
    pieces += list(" \n\t\r\0\x1c\x7f\xa0\u200b\u202e\u2212\u03c0\u00b0\u0665\uff15\u2075\U0001d7d3\u0301\ud800\udc00")
    dice = random.Random(0)
    for _ in range(count):
        parts = dice.choices(pieces, k=dice.randrange(60))
        for _ in range(dice.randrange(4)):
            here = dice.randrange(len(parts) + 1)
            parts[here:here + dice.randrange(9)] = parts[here:here + dice.randrange(9)] * dice.choice([0, 1, 2, 2, 50])
        inside, start = "".join(parts), time.perf_counter()
        for text, answer in itertools.product((inside, rf"\boxed{{{inside}}}", f"Answer: {inside}"), ("5", inside)):
            assert is_correct(text, answer) in (True, False), ascii(text)
        assert time.perf_counter() - start < 2, ascii(inside)

@pytest.mark.parametrize("length, penalty", [
    (1, 0), (16_384, 0), (16_385, -1 / 4096), (18_432, -0.5), (20_480, -1)])
def test_the_overlong_penalty_grows_linearly_over_the_papers_buffer(length, penalty):
    assert overlong_penalty(length, 20_480, 4_096) == penalty
    assert overlong_penalty(length, 20_480, 0) == 0             # no buffer, no penalty


# ----------------------------------------------------------------------------------------------------- 3 Policy

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_gradients_are_float32_in_whatever_type_is_computed(dtype):
    """A step of 1e-6 on a bfloat16 weight of 1 would round to nothing. The tiny model's file is in float16."""
    model, _ = load_policy(GPT2, dtype=dtype)
    logits = model(torch.tensor([[5, 6]])).logits
    logits.float().logsumexp(-1).sum().backward()
    assert logits.dtype == getattr(torch, dtype) and not model.training
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_the_activation_of_gpt2_in_one_operation_is_the_same():
    x = torch.linspace(-9, 9, 999)
    exact = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    load_policy(GPT2)
    assert torch.allclose(transformers.activations.ACT2FN["gelu_new"](x), exact, atol=1e-6)

def test_a_step_of_a_millionth_is_not_lost_in_bfloat16(gpt2, fresh):
    """Computing in bfloat16, AdamW moves every weight that has a gradient by 1e-6, as in float32. Stored as bfloat16,
    hardly any weight above 0.001 would move at all."""
    half, _ = load_policy(GPT2, dtype="bfloat16")
    before = half.transformer.h[0].mlp.c_fc.weight.detach().clone()
    optimizer = torch.optim.AdamW(half.parameters(), lr=1e-6, weight_decay=0.0)
    metrics = update(half, optimizer, fresh, Config(minibatches=1, tokens="all"))
    moved = (half.transformer.h[0].mlp.c_fc.weight - before).abs()
    assert (moved > 5e-7).float().mean() > 0.95 and moved.max() < 2e-6
    assert 1 < metrics["ratio"] < 1.05                          # of answers that were sampled in float32
    large = before[before.abs() > 1e-3]
    assert ((large + 1e-6).bfloat16() != large.bfloat16()).float().mean() < 0.1

def test_in_bfloat16_too_what_is_trained_is_what_was_sampled(tokenizer, prompts):
    half, _ = load_policy(GPT2, dtype="bfloat16")
    with weights_at_hand(half):
        groups = sampled(half, tokenizer, prompts)
    assert gradients(half, groups, tokens="all")[-1]["ratio"] < 1.01


# ----------------------------------------------------------------------------------------------------- 4 Sample

@pytest.mark.parametrize("temperature, ends", [(1.0, 1), (0.7, 1), (1.0, 999), (1.0, 13)])
def test_the_sampler_records_what_one_forward_pass_over_the_answer_gives(
        model, tokenizer, prompts, temperature, ends, monkeypatch):
    """In spite of cache and padding. (A GPT-2 with padding on the left, but without position_ids, would fail.) If only
    999 would end an answer, none ends in 100 tokens, and the cache is enlarged often; 13 ends some early, some late."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    groups = sample(model, tokenizer, prompts, 3, 24 if ends == 1 else 100, temperature, range(4))
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    for prompt, a in ((prompt, a) for prompt, group in zip(prompts, groups) for a in group):
        logp = (model(a.ids[None]).logits[0, :-1].double() / temperature).log_softmax(-1)     # of all but the first
        drawn, entropy = logp.gather(1, a.ids[1:, None])[:, 0], -(logp.exp() * logp).sum(1)
        assert a.ids[:len(prompt)].tolist() == prompt
        assert a.mask.tolist() == [t >= len(prompt) for t in range(len(a.ids))]
        assert torch.allclose(a.logp[1:].double(), drawn * a.mask[1:], atol=2e-4) and a.logp[0] == 0
        assert torch.allclose(a.entropy[1:].double(), entropy * a.mask[1:], atol=2e-4) and a.entropy[0] == 0

@pytest.mark.parametrize("ends", [999, 1], ids=["none ends", "some end"])
def test_keys_and_values_are_copied_at_every_16th_token_or_when_answers_leave(gpt2, tokenizer, prompts, ends, monkeypatch):
    """When all is sampled they are let go at once, and not when Python tidies up."""
    tokens, grown, left, layers, pad = [], set(), set(), [], F.pad
    class Watched(forking.Roomy):
        def update(self, *new, **more):
            layers[:] = layers or [weakref.ref(self)]
            tokens.extend([len(new[0])] * (layers[0]() is self))
            with monkeypatch.context() as patch:
                patch.setattr(F, "pad", lambda *x, **more: grown.add(len(tokens) - 1) or pad(*x, **more))
                return super().update(*new, **more)
        def batch_select_indices(self, rows):
            left.add(len(tokens))
            super().batch_select_indices(rows)
    monkeypatch.setattr(forking, "Roomy", Watched)
    monkeypatch.setattr(gpt2.generation_config, "eos_token_id", ends)
    gc.disable()
    answers = [a for group in sample(gpt2, tokenizer, prompts, 3, 100, 1.0, range(4)) for a in group]
    gc.enable()
    assert layers[0]() is None
    assert len(tokens) == max(int(a.mask.sum()) for a in answers) - 1
    assert grown == set(range(0, len(tokens), 16))              # whether or not answers have left
    assert left == {int(a.mask.sum()) - 1 for a in answers if a.finished}

def test_the_sampler_never_holds_more_than_the_logits_of_one_step(model, tokenizer, prompts):
    shapes = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *x: shapes.append(tuple(x[2].shape)))
    sample(model, tokenizer, prompts, 3, 6, 1.0, range(4))
    hook.remove()
    assert shapes[0] == (4, 1, 102) and all(B <= 12 and T == 1 for B, T, V in shapes[1:])

def test_greedy_answers_are_those_of_transformers_generate(model, tokenizer, prompts):
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
    theirs = model.generate(**batch, do_sample=False, max_new_tokens=24)[:, batch.input_ids.shape[1]:].tolist()
    for (ours,), their in zip(sample(model, tokenizer, prompts, 1, 24, 0, range(4)), theirs):
        answer = ours.ids[ours.mask].tolist()
        assert answer == their[:len(answer)] and set(their[len(answer):]) <= {tokenizer.pad_token_id}
        assert ours.entropy.abs().max() < 1e-3 and ours.logp.abs().max() < 1e-3                 # greedy is certain

def test_an_answer_depends_on_nobody_else_in_the_batch(model, tokenizer, prompts):
    """Each written alone is the same as all at once, so neither padding, nor the prompt shared by a group, nor
    others that end early make a difference, nor the process that writes it."""
    together = sample(model, tokenizer, prompts, 3, 24, 1.0, range(4))
    for seed, (prompt, group) in enumerate(zip(prompts, together)):
        alone, = sample(model, tokenizer, [prompt], 3, 24, 1.0, [seed])
        for a, b in zip(group, alone):
            assert a.ids.tolist() == b.ids.tolist() and a.finished == b.finished
            assert torch.allclose(a.logp, b.logp, atol=2e-4) and torch.allclose(a.entropy, b.entropy, atol=2e-4)
    assert len({a.mask.sum().item() for group in together for a in group}) > 1          # some did end early

@pytest.mark.parametrize("ends", [1, [1], [1, 17, 40, 77], None], ids=str)
def test_an_answer_ends_with_the_first_end_token_which_is_part_of_it(models, tokenizer, prompts, ends, monkeypatch):
    model = models["qwen3" if ends == [1, 17, 40, 77] else "gpt2"]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    ends = {1} if ends is None else set(torch.tensor(ends).flatten().tolist())      # None: the tokenizer's, 1
    answers = [a for group in sample(model, tokenizer, prompts, 4, 26, 1.0, range(4)) for a in group]
    for a in answers:
        *before, last = a.ids[a.mask].tolist()
        assert not ends & set(before) and a.finished == (last in ends) and (a.finished or len(before) + 1 == 26)
        assert a.text == tokenizer.decode([i for i in a.ids[a.mask].tolist() if i > 2])     # 0 to 2: pad, eos, unk
    assert {a.finished for a in answers} == {True, False}

def test_the_same_seed_draws_the_same_answers(gpt2, tokenizer, prompts):
    first, again, other = (sample(gpt2, tokenizer, prompts[:1], 9, 24, 1.0, [s])[0] for s in (0, 0, 1))
    assert [a.text for a in first] == [a.text for a in again] != [a.text for a in other]

@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_words_are_drawn_as_often_as_their_probabilities_say(temperature):
    p, n = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.1]), 100_000
    uniform = torch.rand(n, generator=seeded(), dtype=torch.float64)
    tokens, logp, _ = draw(p.log().expand(n, 5), temperature, uniform)
    expected = p.double() ** (1 / temperature) / (p.double() ** (1 / temperature)).sum()
    counts = torch.bincount(tokens, minlength=5)
    chi2 = sum((counts[i] - n * expected[i]) ** 2 / (n * expected[i]) for i in (0, 2, 3, 4))
    assert counts[1] == 0 and chi2 < 16.3                       # 3 degrees of freedom: exceeded once in 1,000 times
    assert torch.allclose(logp.double().exp(), expected[tokens], atol=1e-6)

def test_each_row_can_have_a_temperature_that_depends_on_its_entropy():
    logits = torch.tensor([[math.log(9), 0.0], [0.0, 0.0]])     # only the first, of low entropy, is drawn at T = 2
    entropy = draw(logits, lambda H: torch.where(H < 0.5, 2.0, 1.0), torch.zeros(2).double())[2]
    assert entropy.tolist() == pytest.approx([-0.75 * math.log(0.75) - 0.25 * math.log(0.25), math.log(2)])

def test_the_random_number_is_looked_up_in_the_cumulative_distribution():
    logits = torch.tensor([0, 0.25, 0.5, 0.25, 0]).log().expand(6, 5)       # -inf at both ends
    uniform = torch.tensor([0, 0.2, 0.3, 0.7, 0.8, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, 1.0, uniform)[0].tolist() == [1, 1, 2, 2, 3, 3]

@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])  # the smallest and the largest that torch.rand gives
def test_a_word_of_probability_0_is_never_drawn(uniform):
    logits = torch.randn(500, 300, generator=seeded()) * 5
    logits[torch.rand(500, 300, generator=seeded(1)) < 0.5] = -math.inf
    tokens, logp, entropy = draw(logits, 1.0, torch.full((500,), uniform, dtype=torch.float64))
    assert logits.gather(1, tokens[:, None]).isfinite().all() and logp.isfinite().all() and entropy.isfinite().all()


# ---------------------------------------------------------------------------------------------------- 5 Entropy

@pytest.mark.parametrize("words", [1, 2, 10, 151_936])
def test_a_uniform_distribution_over_v_words_has_entropy_ln_v(words):
    assert token_entropy(torch.full((words,), 3.0)).item() == pytest.approx(math.log(words), abs=1e-5)

@pytest.mark.parametrize("logits, temperature, entropy", [
    ([1000.0, 0.0, 0.0], 1, 0),                                 # certain
    ([0.0, -math.inf, -math.inf], 1, 0),                        # 0 ln 0 is 0, not nan
    ([0.0, -math.inf, 0.0], 1, math.log(2)),
    ([math.log(3), 0.0], 1, -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
    ([math.log(9), 0.0], 2, -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),    # at T = 2, 9 : 1 becomes 3 : 1
])
def test_entropy_is_minus_the_sum_of_p_ln_p_with_p_at_the_temperature(logits, temperature, entropy):
    assert token_entropy(torch.tensor(logits), temperature).item() == pytest.approx(entropy, abs=1e-6)

def test_a_model_that_has_become_nonsense_still_draws_words_of_its_vocabulary():
    tokens, *_ = draw(torch.full((3, 5), math.nan), 1.0, torch.rand(3, dtype=torch.float64))
    assert all(0 <= token < 5 for token in tokens.tolist())

def test_the_entropy_of_a_draw_is_that_of_the_distribution_drawn_from():
    logits, u = torch.randn(5, 50, generator=seeded()) * 4, torch.rand(5, dtype=torch.float64, generator=seeded())
    for temperature in 0.3, 1.0, torch.tensor([[0.5], [1.0], [2.0], [3.0], [0.1]]):
        assert torch.allclose(draw(logits, temperature, u)[2], token_entropy(logits, temperature), atol=1e-6)

def test_entropy_is_float32_even_from_bfloat16_logits():
    logits = torch.randn(2, 3, 1000, generator=seeded()).bfloat16()
    p = logits.double().softmax(-1)
    assert token_entropy(logits).dtype == torch.float32 and token_entropy(logits).shape == (2, 3)
    assert torch.allclose(token_entropy(logits).double(), -(p * p.log()).sum(-1), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- 6 Fork

H = torch.tensor([[9.0, 0.1, 0.5, 0.3],                         # the 9 is the prompt's,
                  [0.2, 0.4, 7.0, 8.0]])                        # the 7 and 8 padding's
RESPONSE = torch.tensor([[0, 1, 1, 1],
                         [1, 1, 0, 0]]).bool()

@pytest.mark.parametrize("tokens, rho, kept", [
    ("top", 0.2, [0.5]), ("top", 0.4, [0.5, 0.4]), ("top", 0.41, [0.5, 0.3, 0.4]), ("bottom", 0.4, [0.1, 0.3, 0.2]),
    ("top", 1.0, [0.1, 0.5, 0.3, 0.2, 0.4]), ("all", 0.2, [0.1, 0.5, 0.3, 0.2, 0.4]), ("bottom", 1.0, []),
])
def test_the_mask_of_five_tokens_is_right(tokens, rho, kept):
    assert H[fork_mask(H, RESPONSE, rho, tokens)].tolist() == pytest.approx(kept)

@pytest.mark.parametrize("rho, n, k", [
    (0.2, 0, 0), (0.2, 1, 1), (0.2, 5, 1), (0.2, 6, 2), (0.001, 5, 1), (1.0, 7, 7), (1, 7, 7),
    (0.07, 100, 7), (0.1, 30, 3), (0.55, 100, 55),              # in floats, 0.07 * 100 > 7
])
def test_exactly_ceil_rho_n_tokens_are_kept(rho, n, k):
    entropy, response = torch.rand(3, 50, generator=seeded()), torch.zeros(150).bool()
    response[torch.randperm(150, generator=seeded())[:n]] = True
    response = response.view(3, 50)
    top, bottom, random, every = (fork_mask(entropy, response, rho, t) for t in ("top", "bottom", "random", "all"))
    assert (top.sum(), bottom.sum(), random.sum(), every.sum()) == (k, n - k, k, n)
    assert torch.equal(top ^ bottom, response) and torch.equal(every, response) and not (random & ~response).any()

def test_of_equal_entropies_the_first_are_kept():
    mask = fork_mask(torch.full((2, 5), 0.7), torch.ones(2, 5).bool(), 0.2)
    assert mask.tolist() == [[True, True, False, False, False], [False] * 5]

@pytest.mark.parametrize("junk", [1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("tokens", ["top", "bottom", "random", "all"])
def test_prompt_and_padding_do_not_matter_whatever_their_entropy(junk, tokens):
    masks = [fork_mask(H.masked_fill(~RESPONSE, x), RESPONSE, 0.4, tokens, seeded()) for x in (0.0, junk)]
    assert torch.equal(*masks) and not (masks[1] & ~RESPONSE).any()

def test_a_mask_of_0_and_1_selects_the_same_as_one_of_booleans():
    assert torch.equal(fork_mask(H, RESPONSE.long(), 0.4), fork_mask(H, RESPONSE, 0.4))         # not rows 0 and 1

def test_random_tokens_are_repeatable_and_fair():
    entropy, response, generator = torch.arange(10.0)[None], torch.ones(1, 10).bool(), seeded()
    first, again, other = (fork_mask(entropy, response, 0.2, "random", seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    share = sum(fork_mask(entropy, response, 0.2, "random", generator).float() for _ in range(2000)) / 2000
    assert (share - 0.2).abs().max() < 0.04                     # each token one time in five; 0.04 is 4.5 sigma

def test_more_tokens_than_torch_quantile_can_take_are_no_problem():
    entropy = torch.rand(1, 2**24 + 1, generator=seeded())
    mask = fork_mask(entropy, torch.ones_like(entropy).bool(), 0.2)
    assert mask.sum() == 3_355_444 and entropy[mask].min() >= entropy[~mask].max()      # 2**24 / 5 = 3,355,443.2


# ------------------------------------------------------------------------------------------------------- 7 Loss

@pytest.mark.parametrize("rewards, advantages", [
    ([1, 1, 0, 0], [1, 1, -1, -1]),
    ([1, 0, 0, 0], [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),       # mean 1/4, standard deviation 3**0.5 / 4
    ([1, 0.5, 0], [1.5**0.5, 0, -(1.5**0.5)]),
])
def test_advantages_of_a_group_are_rewards_in_standard_deviations_from_its_mean(rewards, advantages):
    A = group_advantages(torch.tensor([rewards, [5.0] * len(rewards)]))         # each group is on its own
    assert A[0].tolist() == pytest.approx(advantages, abs=1e-6) and A[1].tolist() == [0] * len(rewards)

@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.7, 1 / 3])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_0(reward):
    assert group_advantages(torch.full((2, 7), reward)).abs().max() == 0    # although 7 * 0.1 / 7 need not be 0.1

@pytest.mark.parametrize("ratio, A, dual_clip, J, slope", [         # slope: dJ / dlogp, which is r A if not clipped
    (1.0, +1, None, 1.0, 1.0), (1.0, -1, None, -1.0, -1.0), (1.5, 0, None, 0.0, 0.0),
    (1.5, +1, None, 1.28, 0.0),                                     # good and likelier already: no more of that
    (0.5, +1, None, 0.5, 0.5),                                      # good, but less likely: never clipped
    (0.5, -1, None, -0.8, 0.0),                                     # bad and less likely already: no more of that
    (1.5, -1, None, -1.5, -1.5),                                    # bad, but likelier: never clipped ...
    (9.0, -1, 10.0, -9.0, -9.0), (11.0, -1, 10.0, -10.0, 0.0),      # ... but by the dual clip, at c = 10
    (11.0, -1, None, -11.0, -11.0), (11.0, +1, 10.0, 1.28, 0.0), (11.0, -2, 10.0, -20.0, 0.0),
    (math.exp(500), -1, None, -math.exp(20), 0.0),                  # nothing overflows: log-ratios stay within +-20
])
def test_the_clip_holds_back_only_what_went_too_far_in_the_right_direction(ratio, A, dual_clip, J, slope):
    logp = torch.tensor([math.log(ratio) - 2], dtype=torch.float64, requires_grad=True)
    objective = clipped_objective(logp, torch.full_like(logp, -2.0), torch.full_like(logp, A), 0.2, 0.28, dual_clip)
    objective.sum().backward()
    assert (objective.item(), logp.grad.item()) == (pytest.approx(J), pytest.approx(slope))


# ----------------------------------------------------------------------------------------------------- 8 Update

class Recorder:
    """In place of an optimizer: keeps each gradient it is given, and changes nothing."""
    def __init__(self, model):
        self.parameters, self.gradients = list(model.parameters()), []

    def step(self):
        self.gradients.append(torch.cat([p.grad.double().flatten() for p in self.parameters]))

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

def gradients(model, groups, **settings):
    """The gradients of all mini-batches (by default there is one) and the metrics of an update()."""
    recorder, cfg = Recorder(model), Config(**{"minibatches": 1, "grad_clip": 1e9} | settings)
    metrics = update(model, recorder, groups, cfg, seeded())
    return *recorder.gradients, metrics

def off_by(a, b):
    return ((a - b).norm() / b.norm()).item()

def sampled(model, tokenizer, prompts):
    """Four groups of three different answers, with advantages made up."""
    groups = sample(model, tokenizer, prompts, 3, 40, 1.0, range(4))
    for group, advantages in zip(groups, [(1.4, -0.7, -0.7), (0.7, 0.7, -1.4), (-0.7, 1.4, -0.7), (0, 1.2, -1.2)]):
        for a, advantage in zip(group, advantages):
            a.advantage = advantage
    return groups

def off_policy(groups):
    """The same answers as though a somewhat different policy had written them: ratios are no longer 1."""
    groups, generator = copy.deepcopy(groups), seeded(5)
    for a in (a for group in groups for a in group):
        a.logp += 0.4 * torch.randn(a.logp.shape, generator=generator) * a.mask
        a.entropy += torch.rand(a.entropy.shape, generator=generator) * a.mask
    return groups

@pytest.fixture(scope="session")
def fresh(gpt2, tokenizer, prompts):
    return sampled(gpt2, tokenizer, prompts)

@pytest.fixture(scope="session")
def stale(fresh):
    return off_policy(fresh)

def by_a_plain_loop(model, groups, **settings):
    """What gradients() gives in the last epoch, from the full (B, T, V) logits and one token after the other."""
    cfg, generator = Config(**settings), seeded()
    *_, order = [torch.randperm(len(groups), generator=generator) for _ in range(cfg.epochs)]
    groups, current = [groups[i] for i in order], cfg.entropy_from == "policy" and cfg.epochs > 1
    rows = [a for group in groups for a in group]
    ids = pad_sequence([a.ids for a in rows], batch_first=True)
    logprobs = (model(ids).logits / cfg.temperature).log_softmax(-1)
    tokens = []                                                 # of each: entropy, log ratio, advantage
    for row, a in enumerate(rows):
        for t in range(len(a.ids)):
            if a.mask[t]:
                logp = logprobs[row, t - 1]
                entropy = -(logp.exp() * logp).sum() if current else a.entropy[t]       # at first, as sampled
                tokens.append((entropy.item(), logp[a.ids[t]] - a.logp[t], a.advantage))
    k = math.ceil(cfg.rho * len(tokens) - 1e-9)
    ranked = sorted(range(len(tokens)), key=lambda i: -tokens[i][0])
    assert tokens[ranked[k - 1]][0] > tokens[ranked[k]][0] + 1e-4       # no tie decides what is kept
    shuffled = torch.randperm(len(tokens), generator=generator).tolist()
    kept = {"top": ranked[:k], "bottom": ranked[k:], "all": ranked, "random": shuffled[:k]}[cfg.tokens]
    total, low, high, change = 0, 0, 0, 0
    for _, log_ratio, A in (tokens[i] for i in kept):
        objective, change = log_ratio.exp() * A, change + abs(log_ratio.item())
        if A > 0 and log_ratio.exp() > 1 + cfg.clip_high:
            objective, high = (1 + cfg.clip_high) * A, high + 1
        elif A < 0 and log_ratio.exp() < 1 - cfg.clip_low:
            objective, low = (1 - cfg.clip_low) * A, low + 1
        elif A < 0 and cfg.dual_clip and log_ratio.exp() > cfg.dual_clip:
            objective = cfg.dual_clip * A
        total = total + objective
    loss = -total / (len(kept) if cfg.normalize == "selected" else len(tokens))
    gradient = torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    return gradient, {
        "loss": loss.item(), "grad_norm": gradient.norm().item(), "kept": len(kept) / len(tokens),
        "entropy": sum(token[0] for token in tokens) / len(tokens), "threshold": tokens[ranked[k - 1]][0],
        "clip_low": low / len(kept), "clip_high": high / len(kept), "ratio": math.exp(change / len(kept)), "skipped": 0}

@pytest.mark.parametrize("settings", [
    dict(tokens="top"), dict(tokens="all"), dict(tokens="bottom"), dict(tokens="random"), dict(rho=0.5),
    dict(normalize="all"), dict(entropy_from="rollout"), dict(temperature=0.7), dict(dual_clip=0.0),
    dict(dual_clip=1.2, tokens="all"), dict(clip_low=0.1, clip_high=0.6), dict(micro_batch_size=2),
], ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()))
def test_gradient_and_metrics_are_those_of_a_plain_loop_over_tokens(settings, gpt2, stale):
    gradient, metrics = gradients(gpt2, stale, **settings)
    expected, numbers = by_a_plain_loop(gpt2, stale, **settings)
    assert off_by(gradient, expected) < 1e-5 and metrics == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    assert 0 < metrics["clip_low"] < 0.5 and 0 < metrics["clip_high"] < 0.5     # the clip was put to the test

@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3"])
def test_other_architectures_are_trained_in_the_same_way(name, models, tokenizer, prompts):
    groups = off_policy(sampled(models[name], tokenizer, prompts))
    (gradient, metrics), (expected, numbers) = (f(models[name], groups) for f in (gradients, by_a_plain_loop))
    assert off_by(gradient, expected) < 1e-5 and metrics == pytest.approx(numbers, rel=1e-4, abs=1e-6)

@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3"])
def test_gradient_checkpointing_gives_the_same_gradient(name, models, tokenizer, prompts, tmp_path):
    models[name].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    thrifty, calls = load_policy(tmp_path, checkpointing=True)[0], []
    hook = thrifty.get_submodule(next(n for n, _ in thrifty.named_modules() if n.endswith("mlp"))
                                 ).register_forward_pre_hook(lambda *x: calls.append(1))
    groups = off_policy(sampled(models[name], tokenizer, prompts))
    assert off_by(gradients(thrifty, groups)[0], gradients(models[name], groups)[0]) < 1e-5
    assert len(calls) == 2                                      # forward, and once more in the backward pass
    hook.remove()
    assert [a.text for a in sample(thrifty, tokenizer, prompts[:1], 3, 9, 1.0, [0])[0]] == [
        a.text for a in sample(models[name], tokenizer, prompts[:1], 3, 9, 1.0, [0])[0]]

def test_rho_1_is_plain_dapo(gpt2, stale):
    (top, metrics), (everything, _) = gradients(gpt2, stale, rho=1.0), gradients(gpt2, stale, tokens="all")
    assert off_by(top, everything) < 1e-6 and metrics["kept"] == 1

def test_the_gradient_depends_neither_on_micro_batches_nor_padding_nor_the_order_of_answers(gpt2, stale):
    """Unless equal entropies straddle the threshold, as can those of two answers that begin with the same words."""
    whole, metrics = gradients(gpt2, stale)
    for size in 1, 2, 5, 7:                                     # with 1, no row has any padding
        split, same = gradients(gpt2, stale, micro_batch_size=size)
        assert off_by(split, whole) < 1e-5 and same == pytest.approx(metrics, rel=1e-4)
    assert off_by(gradients(gpt2, [group[::-1] for group in stale[::-1]])[0], whole) < 1e-5

def test_nothing_is_computed_after_the_last_kept_token(gpt2, stale):
    """Nor at that token itself, which is drawn from the logits before it."""
    answers, widths = [a for group in stale for a in group], []
    last = [max([1, *(a.mask & (a.entropy > 1.0)).nonzero()[:, 0].tolist()]) for a in answers]
    batch = stack(answers, gpt2.device)
    keep = batch.response_mask & (batch.entropy > 1.0)
    for (rows, columns), micro in micro_batches(batch._replace(keep=keep), 1):
        with unittest.mock.patch.object(gpt2, "forward", lambda ids, **_: widths.append(ids.shape[1]) or gpt2.lost):
            with pytest.raises(AttributeError):
                token_logits(gpt2, micro.ids, micro.keep)
        assert widths[-1] == last[int(rows)] and (micro.keep == keep[rows, columns]).all()
    assert len(widths) == len(answers) and sum(widths) < sum(len(a.ids) for a in answers) - len(answers)

def test_a_mean_over_all_tokens_is_the_gradient_times_the_share_kept(gpt2, stale):
    (selected, metrics), (everything, _) = gradients(gpt2, stale), gradients(gpt2, stale, normalize="all")
    assert metrics["kept"] == pytest.approx(0.2, abs=0.01)      # so the second is five times smaller
    assert off_by(everything, selected * metrics["kept"]) < 1e-5

def written(model, tokenizer, text, advantage):
    """An answer to 1+2*3=? as though the model had sampled it."""
    prompt, answer = tokenizer.encode("1+2*3=?\n"), [*tokenizer.encode(text), tokenizer.eos_token_id]
    ids = torch.tensor(prompt + answer)
    mask = torch.arange(len(ids)) >= len(prompt)
    with torch.no_grad():
        logp = model(ids[None]).logits[0].log_softmax(-1).roll(1, 0).gather(1, ids[:, None])[:, 0] * mask
    return Answer(ids, mask, logp, torch.zeros(len(ids)), text, True, advantage=advantage)

def test_the_first_loss_is_0_but_its_gradient_is_not(gpt2, tokenizer):
    """At r = 1 the loss is minus the mean advantage, 0. Nothing is broken: it is the slope that teaches."""
    group = [written(gpt2, tokenizer, "2*3=6; 1+6=7. Answer: 7", +1.0),
             written(gpt2, tokenizer, "1+2=3; 3*3=9. Answer: 9", -1.0)]                 # of the same length
    gradient, metrics = gradients(gpt2, [group], tokens="all")
    assert abs(metrics["loss"]) < 1e-5 and gradient.norm() > 0.01 and metrics["ratio"] == pytest.approx(1, abs=1e-5)

@pytest.mark.parametrize("tokens", ["top", "all"])
def test_kept_tokens_get_a_gradient_with_the_end_token_and_without_prompt_and_padding(tokens, gpt2, fresh):
    """Seen at the hidden states that enter the output layer: that at t - 1 gives the logits for the token at t."""
    hidden, shapes, head = [], [], gpt2.get_output_embeddings()
    def look(layer, inputs):
        if inputs[0].requires_grad:
            inputs[0].retain_grad()
            hidden.append(inputs[0])
    hook, forward = head.register_forward_pre_hook(look), head.forward
    with unittest.mock.patch.object(head, "forward", lambda x: (shapes.append(forward(x).shape), forward(x))[1]):
        _, metrics = gradients(gpt2, fresh[:3], tokens=tokens)  # without the group in which an advantage is 0
    hook.remove()
    trained = F.pad(hidden[0].grad.abs().sum(-1) > 0, (1, 0))   # (B, T), True where a token got a gradient
    answers = [a for group in fresh[:3] for a in group]
    assert all(a.finished for a in answers)                     # so the last token of each is an end token
    expected = [a.mask if tokens == "all" else a.mask & (a.entropy > metrics["threshold"] - 1e-4) for a in answers]
    columns = int(torch.stack([e.nonzero().max() for e in expected]).max()) + 1       # up to the last kept token
    expected = pad_sequence(expected, batch_first=True)
    assert sorted(trained.tolist()) == sorted(expected[:, :columns].tolist())
    n, k = sum(int(a.mask.sum()) for a in answers), int(sum(map(torch.sum, expected)))
    assert shapes == [(k, 102)]                                 # not (n, 102) logits, and never (B, T, V)

def test_a_policy_far_from_the_one_that_sampled_is_no_error(gpt2, tokenizer):
    group = [written(gpt2, tokenizer, "7", advantage) for advantage in (1.0, -1.0)]
    for a in group:
        a.logp = a.logp - 1000.0 * a.mask
    assert all(math.isfinite(value) for value in gradients(gpt2, [group], tokens="all")[1].values())

def test_an_answer_that_is_just_the_end_token_is_learned(gpt2, tokenizer):
    model, stop = copy.deepcopy(gpt2), written(gpt2, tokenizer, "", +1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    update(model, optimizer, [[stop, written(gpt2, tokenizer, "2", -1.0)]], Config(tokens="all"))
    assert written(model, tokenizer, "", 0.0).logp.sum() > stop.logp.sum() + 0.01

def test_logits_at_some_tokens_are_rows_of_the_full_logits(model, fresh):
    ids = pad_sequence([group[0].ids for group in fresh], batch_first=True)
    where = torch.rand(ids.shape, generator=seeded()) < 0.3
    where[:, 0] = False                                         # nothing precedes the first token
    full = model(ids).logits                                    # (B, T, V)
    assert torch.allclose(token_logits(model, ids, where), full[:, :-1][where[:, 1:]], atol=1e-4)
    assert model(ids).logits.shape == full.shape                # no hook is left behind

@pytest.mark.parametrize("most", [1, 1100, 2**23])              # logits at a time: of five tokens, of ten, of all
def test_entropies_of_the_policy_are_those_of_the_sampler_and_of_the_full_logits(model, tokenizer, prompts, most):
    answers = [a for group in sampled(model, tokenizer, prompts) for a in group]
    batch, shapes = stack(answers, "cpu"), []
    batch = batch._replace(keep=torch.zeros_like(batch.keep))       # of all tokens, whatever is kept
    head, forward = model.get_output_embeddings(), model.get_output_embeddings().forward
    with unittest.mock.patch.object(head, "forward", lambda x: (shapes.append(forward(x).numel()), forward(x))[1]):
        entropy = policy_entropy(model, batch, 1.0, 5, most)
    assert torch.allclose(entropy, batch.entropy, atol=1e-4) and max(shapes) <= max(most, 5 * 102)
    logp = model(batch.ids).logits.double().log_softmax(-1).roll(1, 1)
    full = (-(logp.exp() * logp).sum(-1) * batch.response_mask).float()
    assert torch.allclose(entropy, full, atol=1e-4) and "forward" not in vars(model.base_model)

def test_after_the_first_step_entropies_are_of_the_current_policy_unless_asked_for_as_sampled(gpt2, stale):
    """The recorder changes nothing, but update() cannot know. What was sampled here is of quite other entropies."""
    for source in "policy", "rollout":
        first, second, _ = gradients(gpt2, stale, entropy_from=source, epochs=2)
        for gradient, epochs in (first, 1), (second, 2):
            assert off_by(gradient, by_a_plain_loop(gpt2, stale, entropy_from=source, epochs=epochs)[0]) < 1e-5
        assert (off_by(first, second) > 0.1) == (source == "policy")

def test_every_answer_is_used_once_in_each_epoch(gpt2, fresh):
    """With as many mini-batches as groups, each mini-batch is one group, in some order."""
    *both, _ = gradients(gpt2, fresh, tokens="all", minibatches=4, epochs=2)
    alone = sorted(gradients(gpt2, [group], tokens="all")[0].norm().item() for group in fresh)
    for epoch in both[:4], both[4:]:
        assert sorted(gradient.norm().item() for gradient in epoch) == pytest.approx(alone, rel=1e-4)

@pytest.mark.parametrize("groups, minibatches, steps", [(4, 4, 4), (3, 2, 2), (2, 5, 2), (1, 4, 1)])
def test_a_mini_batch_holds_whole_groups_and_none_is_empty(gpt2, fresh, groups, minibatches, steps):
    assert len(gradients(gpt2, fresh[:groups], minibatches=minibatches)) == steps + 1          # and the metrics

def test_a_selection_of_nothing_gives_a_gradient_of_0_and_metrics_that_are_numbers(gpt2, fresh):
    gradient, metrics = gradients(gpt2, fresh, tokens="bottom", rho=1.0)
    assert gradient.abs().max() == 0 and metrics["kept"] == 0
    assert all(map(math.isfinite, metrics.values())), metrics   # NaN is not JSON

@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad, gpt2, fresh):
    groups, model = copy.deepcopy(fresh), copy.deepcopy(gpt2)
    groups[0][0].advantage = bad
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    metrics = update(model, optimizer, groups, Config(minibatches=4, tokens="all"), seeded())
    assert metrics["skipped"] == 1 and all(p.isfinite().all() for p in model.parameters())
    assert all(map(math.isfinite, metrics.values())) and not torch.equal(model.lm_head.weight, gpt2.lm_head.weight)
    model = copy.deepcopy(gpt2)
    metrics = update(model, torch.optim.AdamW(model.parameters()), groups[:1], Config(tokens="all"), seeded())
    assert metrics == {"loss": None, "skipped": 1} and torch.equal(model.lm_head.weight, gpt2.lm_head.weight)

def test_the_gradient_is_clipped_after_its_norm_is_logged(gpt2, stale):
    (free, metrics), (clipped, same) = gradients(gpt2, stale), gradients(gpt2, stale, grad_clip=0.01)
    assert same["grad_norm"] == metrics["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-5)
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)


# --------------------------------------------------------------------------------------------------- 9 Evaluate

NOBODY = torch.nn.Module()                                      # a model that need not do anything

def canned(prompt, texts, length=2):
    """Answers that a sampler could have given to a prompt."""
    ids, mask = torch.tensor(prompt + [5] * length), torch.tensor([False] * len(prompt) + [True] * length)
    return [Answer(ids, mask, torch.zeros(len(ids)), torch.zeros(len(ids)), text, True) for text in texts]

def test_accuracy_standard_error_and_pass_at_k_are_those_of_a_hand_worked_example(monkeypatch):
    texts = [("Answer: 7", "Answer: 7"), ("Answer: 7", "no idea"), ("Answer: 8", "Answer: 9"), ("", "7")]
    monkeypatch.setattr(forking, "sample", lambda model, tokenizer, prompts, *rest: [
        canned(prompt, texts[prompt[0]]) for prompt in prompts])
    problems = [Problem("?", "7", [i]) for i in range(4)]
    for batch in 1, 6, 99:                                      # whatever the number of answers written at once
        score = evaluate(NOBODY, None, problems, Config(eval_samples=2, sample_batch_size=batch))
        # means of the four questions 1, 0.5, 0, 0: their standard deviation is 0.479, and half of that the error
        assert score == pytest.approx({"accuracy": 0.375, "stderr": 0.2394, "pass_at_k": 0.5}, abs=1e-4)
    assert evaluate(NOBODY, None, problems[1:2], Config(eval_samples=2))["stderr"] == 0


# ------------------------------------------------------------------------------------------------------ 10 Look

@pytest.mark.parametrize("terminal, no_color, colours", [(True, "", True), (True, "1", False), (False, "", False)])
def test_the_tokens_at_or_above_the_threshold_are_marked(terminal, no_color, colours, tokenizer, monkeypatch):
    ids = torch.tensor(tokenizer.encode("9=?\n1+2; "))
    entropy = torch.tensor([9.0, 9.0, 9.0, 9.0, 0.4, 0.6, 0.5, 0.1])                # the prompt's do not matter
    marked = mark_forks(tokenizer, Answer(ids, torch.arange(8) >= 4, entropy, entropy, "", True, reward=1.0), 0.5)
    assert re.findall(r"\033\[1;[0-9;]*m(.*?)\033\[0m", marked) == ["+", "2"]       # in bold
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert for_terminal(marked) == marked if colours else for_terminal(marked).startswith("9=?\n1[+][2]; ")

def test_overlap_and_change_of_entropy_between_two_models_are_right():
    before, after = torch.arange(10.0), torch.tensor([0, 1, 2, 3, 4, 5 - 1e-5, 6, 9.5, 8.5, 9])
    overlap, changes = entropy_change(before, after).splitlines()      # of the top two before, one is on top after
    assert overlap.startswith("50.0% of the base's top 20 %")
    assert changes.split()[-10:] == ["+0.000"] * 7 + ["+2.500", "+0.500", "+0.000"]

def test_the_confidence_interval_of_three_seeds_is_students():
    assert interval([0.5, 0.6, 0.7]) == pytest.approx(4.303 * 0.1 / 3**0.5) and math.isnan(interval([0.5]))

def test_look_finds_percentiles_and_forking_words(tokenizer):
    """Of ten tokens: 1 and 2 three times each, + four times. Percentiles are checked against a sorted list."""
    ids, H = torch.tensor(tokenizer.encode("1+2+1+2+12")), torch.tensor([0.9, 0, 0.2, 0, 0.8, 0, 0.3, 0.001, 0.7, 0.1])
    answers = [Answer(ids, torch.ones(10).bool(), H, H, "", True)]
    tau, (marked, figures, ranking) = look(tokenizer, answers, min_count=2)
    assert tau == pytest.approx(0.72)                           # sorted: ... 0.7 (70th percentile + 7.8 %), 0.8, 0.9
    assert "40.00% of 10 tokens are below 0.01" in figures and "0.720 nats" in figures and marked.count("\033[1;") == 2
    assert ranking.splitlines()[0].endswith("'1' 0.800 (3), '2' 0.200 (3), '+' 0.000 (4)")
    assert "1' 0.8" not in look(tokenizer, answers, min_count=4)[1][2]

def test_the_accuracy_curve_is_the_mean_of_the_seeds_and_its_band_their_range():
    runs = [[dict(tokens=0, accuracy=0.25), dict(tokens=500), dict(tokens=1000, accuracy=0.5)],
            [dict(tokens=0, accuracy=0.75), dict(tokens=3000, accuracy=1.0)]]
    svg = accuracy_chart({"<top>": runs})                       # by thousands of tokens, of 3 at most
    assert 'polyline points="0.0000,0.5000 2.0000,0.7500"' in svg and "scale(126.66" in svg
    assert 'polygon points="0.0000,0.2500 2.0000,0.5000 2.0000,1.0000 0.0000,0.7500"' in svg
    assert "<top>" not in svg and "&lt;top&gt;" in svg
    assert accuracy_chart({"top": [[dict(tokens=1)]]}) == accuracy_chart({}) == ""

def test_a_report_escapes_what_a_model_wrote(tokenizer, tmp_path):
    ids = torch.tensor(tokenizer.encode("<i>?\n<script>alert(1)</script>\033[2J"))
    answer = Answer(ids, torch.arange(len(ids)) >= 5, *torch.rand(2, len(ids)), "", True)
    figure = accuracy_chart({"": [[dict(tokens=0, accuracy=0.0), dict(tokens=1, accuracy=1.0)]]})
    report(tmp_path, "<title>", figure, [mark_forks(tokenizer, answer, 0.5)])
    page, tags = (tmp_path / "report.html").read_text("utf-8"), []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)
    parser.feed(page)
    assert not {"script", "i", "link", "img"} & set(tags) and {"svg", "pre", "span"} <= set(tags)
    assert "://" not in page and "\033" not in page             # nothing from elsewhere, no stray control characters

WILD = dict(skipped=0, reward=-1.0, loss=-1e9, entropy=11.931, threshold=11.931, kept=1.0, grad_norm=1e9, clip_low=1.0,
            clip_high=1.0, ratio=1e9, length=20480.0, truncated=1.0, accuracy=1.0, stderr=1.0, pass_at_k=1.0)

@pytest.mark.parametrize("metrics", [
    dict(step=99_999, tokens_per_second=123_456.7), dict(step=999_999, tokens_per_second=1e7), dict(step=0),
    dict(step=999_999, tokens_per_second=1e7, loss=None), dict(step=99_999, tokens_per_second=1.0, kept=math.nan),
], ids=str)
def test_the_line_of_a_step_fits_into_120_columns_whatever_its_numbers(metrics):
    line = step_line(WILD | metrics, max(metrics["step"], 99_999))
    assert len(line) <= 120 and "\n" not in line and str(metrics["step"]) in line


# ------------------------------------------------------------------------------------------------------ 11 Save

SMALL = (f"--model {GPT2} --steps 2 --prompts-per-step 4 --group-size 4 --minibatches 2 --eval-samples 2 --lr 1e-3 "
         "--max-new-tokens 48 --seed 3")

@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folders of three runs: twice the same, and once without evaluation."""
    folder = tmp_path_factory.mktemp("runs")
    lines = (HERE / "tiny_data/test.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:12]), "utf-8")
    (folder / "test.jsonl").write_text("".join(lines[12:18]), "utf-8")
    for name, evals in ("first", 1), ("again", 1), ("plain", 0):
        forking.main(f"{SMALL} --data {folder / 'train.jsonl'} --eval-every {evals} --out {folder / name}".split())
    return [folder / name for name in ("first", "again", "plain")]

def log_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]

def without_times(records):
    return [{key: value for key, value in record.items() if key not in ("seconds", "tokens_per_second")}
            for record in records]

def test_the_log_has_one_object_for_each_step_with_all_fields(runs):
    before, *steps = log_of(runs[0])
    assert before["step"] == 0 and "accuracy" in before and "loss" not in before
    assert [record["step"] for record in steps] == [1, 2] and all(set(
        "step reward accuracy loss entropy threshold kept clip_low clip_high ratio grad_norm length truncated "
        "groups_kept tokens tokens_per_second seconds".split()) <= set(record) for record in steps)
    assert 0 < steps[0]["tokens"] < steps[1]["tokens"] and steps[0]["ratio"] == pytest.approx(1, abs=1e-4)
    assert json.loads((runs[0] / "config.json").read_text())["rho"] == 0.2

def test_the_saved_model_is_the_trained_one(runs):
    base, (model, tokenizer) = load_policy(GPT2)[0], load_policy(runs[0] / "model")
    assert isinstance(AutoModelForCausalLM.from_pretrained(runs[0] / "model"), type(base))
    assert all(not torch.equal(*pair) for pair in zip(model.parameters(), base.parameters()))
    cfg = Config(**json.loads((runs[0] / "config.json").read_text()))
    tests = load_problems(runs[0].parent / "test.jsonl", tokenizer, "{question}\n", 80)
    score, logged = evaluate(model, tokenizer, tests, cfg), log_of(runs[0])[-1]
    assert score == pytest.approx({key: logged[key] for key in score})     # the model that was evaluated last

def test_a_folder_that_holds_a_run_is_left_alone(runs, capfd):
    before = {path: path.read_bytes() for path in runs[0].rglob("*") if path.is_file()}
    for arguments, remedy in ("", "--resume"), ("--rho 0.5 --resume", "--rho 0.5 (it was 0.2)"):
        with pytest.raises(SystemExit, match="2"):
            forking.main(f"{SMALL} --data {runs[0].parent / 'train.jsonl'} --eval-every 1 --out {runs[0]} {arguments}".split())
        line, = capfd.readouterr().err.splitlines()
        assert str(runs[0]) in line and remedy in line
        assert before == {path: path.read_bytes() for path in runs[0].rglob("*") if path.is_file()}

def same_weights(a, b):
    a, b = (load_file(run / "model/model.safetensors") for run in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

@pytest.mark.parametrize("cut", ["nothing", "half a line", "later lines", "the newest checkpoint", "all checkpoints"])
def test_a_run_that_was_cut_short_goes_on_as_though_it_had_not_been(cut, runs, tmp_path):
    """Four steps in one go, and two, a mishap, and the other two give the same log and the same weights, bit by bit."""
    arguments = f"{SMALL} --data {runs[0].parent / 'train.jsonl'} --eval-every 2 --save-every 1"
    forking.main(f"{arguments} --steps 4 --out {tmp_path / 'whole'}".split())
    run = tmp_path / "cut"
    forking.main(f"{arguments} --steps 2 --out {run}".split())
    with open(run / "metrics.jsonl", "a") as log:
        log.write({"half a line": '{"step": 3, "rew', "later lines": '{"step": 3}\n{"step": 4}\n'}.get(cut, ""))
    if cut in ("the newest checkpoint", "all checkpoints"):     # as when it is killed between two renamings
        (run / "model").rename(run / "model.part")
    if cut == "all checkpoints":
        shutil.rmtree(run / "model.before")
    forking.main(f"{arguments} --steps 4 --resume --micro-batch-size 64 --out {run}".split())
    assert without_times(log_of(run)) == without_times(log_of(tmp_path / "whole")) and len(log_of(run)) == 5
    assert same_weights(run, tmp_path / "whole") and not (run / "model.part").exists()
    assert torch.load(run / "model.before/trainer.pt", weights_only=True)["history"][-1]["step"] == 3   # the last two

def test_resuming_a_run_that_has_ended_does_nothing(runs, capfd):
    before = {path: path.read_bytes() for path in runs[0].rglob("*") if path.is_file() and path.name != "config.json"}
    forking.main(f"{SMALL} --data {runs[0].parent / 'train.jsonl'} --eval-every 1 --out {runs[0]} --resume".split())
    assert "in 2 steps" in capfd.readouterr().out and before == {path: path.read_bytes() for path in before}

@pytest.mark.parametrize("step", [1, 3])
def test_a_disk_that_is_full_leaves_the_checkpoint_before(step, runs, tmp_path, monkeypatch, capfd):
    """In this run, nothing can be written in one step. What was saved before is there, and goes on."""
    arguments = f"{SMALL} --data {runs[0].parent / 'train.jsonl'} --eval-every 0 --save-every 1 --steps 4 --out {tmp_path}/x"
    write, steps = torch.save, itertools.count(1)
    def full(state, file):
        write(state, file)
        if state["history"][-1]["step"] == step:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="2"):
        forking.main(arguments.split())
    line, = capfd.readouterr().err.splitlines()
    assert "No space left on device" in line and "intact" in line
    assert (tmp_path / "x/model").exists() == (step == 3)
    monkeypatch.undo()
    forking.main([*arguments.split(), "--resume"])
    assert [m["step"] for m in log_of(tmp_path / "x")] == [1, 2, 3, 4]

def test_nothing_in_a_checkpoint_is_code(runs):
    assert {path.name for path in (runs[0] / "model").iterdir()} == {"model.safetensors", "trainer.pt", "config.json",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(torch.load(runs[0] / "model/trainer.pt", weights_only=True)) == {
        "settings", "history", "queue", "generator", "optimizer"}
    source = Path(forking.__file__).read_text("utf-8")
    assert "trust_remote_code" not in source and not re.search(r"(?<![.\w])(eval|exec)\(", source)


# ------------------------------------------------------------------------------------------------------- 12 Run

def test_the_same_seed_gives_the_same_log(runs):
    assert without_times(log_of(runs[0])) == without_times(log_of(runs[1]))

def test_evaluating_does_not_change_the_training(runs):
    evaluated, plain = without_times(log_of(runs[0])[1:]), without_times(log_of(runs[2]))
    assert [{key: record[key] for key in plain[0]} for record in evaluated] == plain

def test_each_round_deals_every_problem_once(monkeypatch):
    dealt, queue, generator = [], [], seeded()
    monkeypatch.setattr(forking, "sample", lambda model, tokenizer, prompts, *rest: [
        dealt.append(prompt[0]) or canned(prompt, ["?", "Answer: 7"]) for prompt in prompts])
    for n in 3, 3, 4, 7, 3:
        rollout(NOBODY, None, [Problem("?", "7", [i]) for i in range(5)], queue, Config(prompts_per_step=n), generator)
    rounds = [dealt[i:i + 5] for i in range(0, 20, 5)]
    assert all(sorted(r) == [0, 1, 2, 3, 4] for r in rounds) and len(set(map(tuple, rounds))) > 1

@pytest.mark.parametrize("rounds, mixed, calls", [(1, 2, [4]), (2, 3, [4, 2]), (9, 4, [4, 2, 1, 1])])
def test_groups_all_right_or_all_wrong_are_dropped_and_replaced(rounds, mixed, calls, monkeypatch):
    asked, texts = [], itertools.cycle([("Answer: 7", "Answer: 7"), ("Answer: 7", "Answer: 8"),     # flat, mixed,
                                        ("?", "?"), ("?", "Answer: 7")])                            # flat, mixed
    def sampler(model, tokenizer, prompts, *rest):
        asked.append(len(prompts))
        return [canned(prompt, next(texts)) for prompt in prompts]
    monkeypatch.setattr(forking, "sample", sampler)
    problems = [Problem("?", "7", [i]) for i in range(6)]
    cfg = Config(prompts_per_step=4, group_size=2, resample_rounds=rounds)
    groups, metrics = rollout(NOBODY, None, problems, [], cfg, seeded())
    assert asked == calls and len(groups) == mixed == metrics["groups_kept"]
    assert all(sorted(a.advantage for a in group) == pytest.approx([-1, 1]) for group in groups)
    assert metrics["length"] == 2 and metrics["tokens"] == 2 * 2 * sum(calls) and metrics["truncated"] == 0

def test_the_reward_is_1_for_a_right_answer_less_the_overlong_penalty(monkeypatch):
    monkeypatch.setattr(forking, "sample", lambda model, tokenizer, prompts, *rest: [
        canned(prompt, ["Answer: 7", "Answer: 8"], length=9) for prompt in prompts])
    cfg = Config(prompts_per_step=1, group_size=2, max_new_tokens=10, overlong_buffer=4)       # from 6 tokens on
    (group,), metrics = rollout(NOBODY, None, [Problem("?", "7", [1])], [], cfg, seeded())
    assert [a.reward for a in group] == [0.25, -0.75] and metrics["reward"] == -0.25

@pytest.fixture(scope="session")
def compared(runs, tmp_path_factory):
    """The arguments of a small comparison, and its folder, after it has run once."""
    out = tmp_path_factory.mktemp("compare")
    arguments = f"{SMALL} --data {runs[0].parent / 'train.jsonl'} --eval-every 1 --compare --seeds 1 --out {out}"
    forking.main(arguments := arguments.split())
    return arguments, out

def test_a_comparison_tabulates_its_four_runs(compared, capsys):
    arguments, out = compared
    forking.main(arguments)                                     # now all of them are found
    head, *rows = capsys.readouterr().out.strip().split("\n\n")[-1].splitlines()
    assert [row.split()[0] for row in rows] == ["top", "all", "random", "bottom"]
    for row, tokens in zip(rows, ("top", "all", "random", "bottom")):
        before, first, last = (m["accuracy"] for m in log_of(out / f"{tokens}-0.2-seed3"))
        mean, _, half, best, area = row[12:].split()[:5]
        assert (float(mean), half) == (pytest.approx(last, abs=6e-4), "-")      # one seed has no interval
        assert float(best) == pytest.approx(max(before, first, last), abs=6e-4)
        assert float(area) == pytest.approx((before / 2 + first + last / 2) / 2, abs=6e-4)      # trapezoids
    assert "<svg" in (out / "report.html").read_text("utf-8")

def test_a_comparison_reuses_finished_runs_and_repeats_unfinished_ones(compared):
    arguments, out = compared
    before = {path: path.stat().st_mtime_ns for path in out.rglob("trainer.pt")}
    log, whole = out / "all-0.2-seed3/metrics.jsonl", log_of(out / "all-0.2-seed3")
    log.write_text("".join(log.read_text("utf-8").splitlines(keepends=True)[:-1]), "utf-8")     # as if killed before
    shutil.rmtree(log.parent / "model")                                                         # anything was saved
    forking.main(arguments)
    assert without_times(log_of(log.parent)) == without_times(whole)
    changed = {path.parent.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert len(before) == 4 and changed == {"all-0.2-seed3"}

def test_a_run_that_fails_or_has_other_settings_does_not_lose_the_others(compared, monkeypatch, capsys):
    arguments, out = compared
    before, train = (out / "top-0.2-seed3/metrics.jsonl").read_text("utf-8"), forking.train
    monkeypatch.setattr(forking, "train", lambda cfg: 1 / 0 if cfg.tokens == "random" else train(cfg))
    forking.main(arguments)
    printed = capsys.readouterr()
    assert "ZeroDivisionError" in printed.err and "random" not in printed.out.split("accuracy, 95%")[-1]
    assert "bottom" in printed.out.split("accuracy, 95%")[-1]
    with pytest.raises(SystemExit, match="2"):                  # then there is nothing to tabulate
        forking.main([*arguments, "--lr", "0.5"])
    assert "other settings, --lr 0.5 (it was 0.001)" in capsys.readouterr().err
    assert (out / "top-0.2-seed3/metrics.jsonl").read_text("utf-8") == before

def test_a_comparison_can_be_extended_to_more_steps_and_seeds(compared, capsys):
    """Then some runs have an evaluation more, that at their former end; what all of them have is tabulated."""
    arguments, out = compared
    forking.main([*arguments, "--eval-every", "3", "--out", f"{out}/more"])
    forking.main([*arguments, "--eval-every", "3", "--out", f"{out}/more", "--steps", "3", "--seeds", "2"])
    rows = capsys.readouterr().out.strip().split("\n\n")[-1].splitlines()[1:]
    assert [row.split()[-1] for row in rows] == ["2"] * 4
    assert [m["step"] for m in log_of(out / "more/top-0.2-seed3") if "accuracy" in m] == [0, 2, 3]
    assert [m["step"] for m in log_of(out / "more/top-0.2-seed4") if "accuracy" in m] == [0, 3]

def test_show_looks_at_a_model_and_at_what_training_changed(runs, tmp_path, capsys):
    forking.main(f"{SMALL} --show --model {runs[0] / 'model'} --base {GPT2} --data {runs[0].parent / 'train.jsonl'} "
                 f"--min-count 5 --out {tmp_path}".split())
    printed = capsys.readouterr().out
    for found in "tokens are below 0.01 nats", "forking words", "of the base's top 20 %", "temperature     0":
        assert found in printed
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "forking words" in page and "temperature     0" in page and "\033" not in page

def test_a_model_overlaps_fully_with_itself_and_at_temperature_1_forks_are_as_the_rest(runs, tmp_path, capsys):
    forking.main(f"{SMALL} --show --base {GPT2} --data {runs[0].parent / 'train.jsonl'} --out {tmp_path}".split())
    printed = capsys.readouterr().out
    assert "100.0% of the base's top 20 %" in printed
    assert "base's: " + " ".join(["+0.000"] * 10) in printed
    forks, rest = (line.split() for line in printed.splitlines() if line.startswith(("forks ", "rest ")))
    assert forks[3] == rest[3]                                  # either way, all is sampled at temperature 1

GOOD = '{"question": "1+2*3=?", "answer": "7"}\n'
FILES = {
    "good": GOOD, "empty": "", "blank": "\n\n", "binary": bytes(range(256)), "malformed": GOOD + "{oops\n",
    "no_answer": GOOD + '{"question": "1+2*3=?"}\n', "no_question": GOOD + '{"answer": "7"}\n',
    "null": GOOD + '{"question": "1+2*3=?", "answer": null}\n', "list": GOOD + '["1+2*3=?", "7"]\n',
    "number": GOOD + '{"question": 7, "answer": "7"}\n',
    "too_long": GOOD + json.dumps({"question": "1+" * 200 + "1=?", "answer": "201"}) + "\n",
    "deep": GOOD + '{"question": "1+2*3=?", "answer": ' + "[" * 100_000 + "\n",
    "list_of_prompts": GOOD + '{"prompt": [], "reward_model": {"ground_truth": "7"}}\n',
    "surrogate": GOOD + '{"question": "\\ud800", "answer": "7"}\n',             # valid JSON, but half a character
}

@pytest.fixture(scope="session")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (folder / f"{name}.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in "truncated", "no_tokenizer":
        shutil.copytree(GPT2, folder / name)
    os.truncate(folder / "truncated/model.safetensors", 1000)
    [path.unlink() for path in (folder / "no_tokenizer").glob("tokenizer*")]
    return folder

@pytest.mark.parametrize("arguments, culprit, remedy", [
    *((f"--data BAD/{name}.jsonl", f"{name}.jsonl", "lines such as")
      for name in ("missing", "empty", "blank", "binary")),
    *((f"--data BAD/{name}.jsonl", f"{name}.jsonl:2", "lines such as")
      for name in ("malformed", "no_answer", "no_question", "list", "null", "number", "deep", "surrogate",
                   "list_of_prompts")),
    ("--data BAD/too_long.jsonl", "too_long.jsonl:2", "404 tokens"), ("--data BAD", "BAD", "lines such as"),
    ("--eval-data BAD/missing.jsonl --eval-every 1", "missing.jsonl", "lines such as"),
    ("--model no/such-model", "model no/such-model", "folder"), ("--model BAD", "model BAD", "folder"),
    ("--model BAD/truncated", "model BAD/truncated", "folder"),
    ("--model BAD/no_tokenizer", "model BAD/no_tokenizer", "tokenizer"),
    ("--out BAD/good.jsonl", "BAD/good.jsonl", "File exists"),
    ("--data BAD/good.parquet", "good.parquet", "pip install pyarrow"),
    ("--prompt @BAD/none.txt", "BAD/none.txt", "No such"),
    ("--prompt @BAD/blank.jsonl", "--prompt", "{question}"),
    ("--prompt chat", "--prompt chat", "--prompt boxed"),
    ("--rho 0", "--rho 0", "to 1"), ("--rho 1.5", "--rho 1.5", "to 1"), ("--rho -1", "--rho -1", "must"),
    ("--rho nan", "--rho nan", "must"), ("--rho much", "--rho", "much"), ("--lr nan", "--lr nan", "must"),
    ("--group-size 1", "--group-size 1", "from 2"), ("--temperature 0", "--temperature 0", "must be a number"),
    ("--minibatches 0", "--minibatches 0", "from 1"), ("--dual-clip 0.5", "--dual-clip 0.5", "above 1"),
    ("--seed -1", "--seed -1", "from 0"), ("--seed 99999999999999999999", "--seed 9999", ""),
    ("--overlong-buffer 65", "--overlong-buffer 65", "to 64"), ("--steps", "--steps", "argument"),
    ("--prompt hello", "--prompt", "{question}"), ("--tokens forks", "forks", "top"),
    ("--normalize me", "me", "selected"), ("--dtype int8", "int8", "bfloat16"), ("stray", "stray", "--help"),
    ("--no-such-flag 1", "--no-such-flag", "--help"), ("--group 4", "--group", "--help"),      # no abbreviations
    ("--compare --rho 2", "--rho 2", "to 1"), ("--rhos 0.5 2", "--rhos 2", "to 1"),
    ("--compare", "--compare", "--eval-data"),
    ("--device abacus", "--device abacus", "cpu"), pytest.param("--device cuda", "--device cuda", "cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
])
def test_bad_input_ends_in_one_line_that_names_the_culprit_and_what_to_do(
        arguments, culprit, remedy, bad, tmp_path, capfd):
    defaults = f"--model {GPT2} --data {bad / 'good.jsonl'} --steps 1 --eval-every 0 --out {tmp_path / 'out'}"
    with pytest.raises(SystemExit, match="2"):                  # of a flag given twice, the last counts
        forking.main(f"{defaults} {arguments.replace('BAD', str(bad))}".split())
    line, = capfd.readouterr().err.splitlines()
    assert culprit.replace("BAD", str(bad)) in line and remedy in line
    assert not (tmp_path / "out").exists()                      # nothing was begun

def run(arguments, script=HERE / "forking.py"):
    return Popen([sys.executable, script, *arguments.split()], text=True, cwd=HERE,
                 stdout=PIPE, stderr=PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_after_the_step_and_save(number, tmp_path):
    process = run(f"--steps 60 --eval-every 0 --prompts-per-step 4 --lr 1e-3 --out {tmp_path}/run")
    while not re.search("step +1/", process.stdout.readline()):
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "saving" in err and "Traceback" not in err
    assert 1 <= len(log_of(tmp_path / "run")) < 60
    trained, base = load_policy(tmp_path / "run/model")[0], load_policy(GPT2)[0]
    assert not torch.equal(trained.transformer.wte.weight, base.transformer.wte.weight)

def test_a_second_ctrl_c_quits_at_once(tmp_path):
    process = run(f"--steps 60 --eval-every 0 --prompts-per-step 400 --out {tmp_path}/run")
    while "parameters" not in process.stdout.readline():
        assert process.poll() is None
    for line in "stopping", "":
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130 and not (tmp_path / "run/model").exists()

def test_killed_at_any_moment_it_goes_on_as_though_nothing_had_happened(runs, tmp_path):
    """kill -9, after a delay that grows from run to run, so that it strikes in sampling, in updates and in saving."""
    settings = f"--steps 8 --eval-every 0 --prompts-per-step 2 --minibatches 1 --lr 1e-3 --save-every 1 --seed 5 --resume"
    process = run(f"{settings} --out {tmp_path}/whole")
    assert process.wait(timeout=60) == 0
    for delay in 0.0, 0.1, 0.25, 0.5:
        process = run(f"{settings} --out {tmp_path}/killed")
        while "parameters" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(delay)
        process.kill()
        process.wait()
    assert run(f"{settings} --out {tmp_path}/killed").wait(timeout=60) == 0
    assert without_times(log_of(tmp_path / "killed")) == without_times(log_of(tmp_path / "whole"))
    assert same_weights(tmp_path / "killed", tmp_path / "whole")

@pytest.mark.parametrize("name, error", [("sample", torch.OutOfMemoryError("CUDA out of memory.")), ("update", MemoryError()),
    ("update", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."))], ids=str)
def test_running_out_of_memory_names_the_flags_that_help(name, error, bad, tmp_path, monkeypatch, capfd):
    def fail(*arguments):
        raise error
    monkeypatch.setattr(forking, name, fail)
    with pytest.raises(SystemExit, match="2"):
        forking.main(f"--model {GPT2} --data {bad / 'good.jsonl'} --eval-every 0 --out {tmp_path / 'out'}".split())
    line, = capfd.readouterr().err.splitlines()
    assert all(flag in line for flag in ("--sample-batch-size", "--micro-batch-size", "--gradient-checkpointing"))

def test_after_five_bad_steps_in_a_row_it_gives_up_with_an_explanation(runs, tmp_path, monkeypatch, capfd):
    objective = forking.clipped_objective
    monkeypatch.setattr(forking, "clipped_objective", lambda *x: objective(*x) * math.nan)
    with pytest.raises(SystemExit, match="2"):
        forking.main(f"{SMALL} --steps 9 --data {runs[0].parent / 'train.jsonl'} --eval-every 0 --out {tmp_path}/x".split())
    out, err = capfd.readouterr()
    assert "--lr" in err and out.count("left out, not finite") == 5
    assert [m["skipped"] > 0 for m in log_of(tmp_path / "x")] == [True] * 5
    assert all(p.isfinite().all() for p in load_policy(tmp_path / "x/model")[0].parameters())

def test_it_learns(tmp_path):
    """From nothing but right or wrong, in a few steps. The 60 questions are not among those trained on."""
    lines = (HERE / "tiny_data/test.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "eval.jsonl").write_text("".join(lines[:60]), "utf-8")
    process = run(f"--steps 8 --lr 1e-4 --eval-every 8 --eval-data {tmp_path}/eval.jsonl --out {tmp_path}/run")
    _, err = process.communicate(timeout=300)
    log = log_of(tmp_path / "run")
    assert (process.returncode, err) == (0, "")
    assert log[0]["accuracy"] < 0.45 and log[-1]["accuracy"] > log[0]["accuracy"] + 0.15
    assert all(abs(record["kept"] - 0.2) < 0.01 for record in log[1:])


# ------------------------------------------------------------------------------- 13 Precision, several processes

def torchrun(script, arguments, folder):
    """Two processes on this machine. What each prints goes to a file of its own."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "--redirects", "3", "--log-dir", folder / "logs", script, *arguments.split()],
                          capture_output=True, text=True, cwd=HERE, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})

def printed(folder, rank, stream):
    return next(folder.glob(f"logs/*/attempt_0/{rank}/{stream}.log")).read_text("utf-8")

SCRIPT = f"""
import hashlib, sys; sys.path.insert(0, {str(HERE)!r})
import forking
forking.is_correct = lambda text, answer: answer == "7" and hashlib.md5(text.encode()).digest()[0] % 2 == 0
update = forking.update
def fails_in_the_second(*arguments):
    if forking.ranks()[0] == 1:
        raise forking.UserError("the moon is full")
    return update(*arguments)
if "--fail" in sys.argv:
    forking.update = fails_in_the_second
    sys.argv.remove("--fail")
forking.main()
"""

@pytest.fixture(scope="session", params=["gpt2", "qwen3", "gemma3"])
def both(request, models, tokenizer, tmp_path_factory):
    """The folders of a run by one process, and of the same run by two. A coin decides what is right. Of two questions
    one can never be answered right, so that one of two processes always has a group without success; and there are
    five answers to train on, one at a time, so that one of two processes has none left at the end. (With entropies of
    the policy, rounding would decide which of two answers that begin alike gets the last place among the top.)"""
    folder = tmp_path_factory.mktemp(f"both-{request.param}")
    models[request.param].save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "script.py").write_text(SCRIPT, "utf-8")
    (folder / "data.jsonl").write_text('{"question": "1+2*3=?", "answer": "7"}\n{"question": "3+4*2-1=?", "answer": "8"}\n')
    settings = (f"--model {folder}/base --data {folder}/data.jsonl --eval-data {folder}/data.jsonl --eval-every 2 "
                "--prompts-per-step 2 --group-size 5 --micro-batch-size 1 --minibatches 1 --epochs 2 --resample-rounds 2 "
                "--steps 4 --save-every 2 --lr 1e-4 --max-new-tokens 40 --seed 3 "
                + ("--tokens top --entropy-from rollout" if request.param == "gpt2" else "--tokens all"))
    process = run(f"{settings} --out {folder}/one", folder / "script.py")
    assert process.wait(timeout=100) == 0, process.stderr.read()
    result = torchrun(folder / "script.py", f"{settings} --out {folder}/two", folder)
    assert result.returncode == 0, result.stderr
    return folder, settings

def test_two_processes_do_what_one_does(both):
    folder, _ = both
    one, two = (without_times(log_of(folder / name)) for name in ("one", "two"))
    assert [m["step"] for m in two] == [0, 1, 2, 3, 4] and sum(m.get("loss") is not None for m in two) >= 2
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and all(a[k] == b[k] or a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-5) for k in a)
    base, a, b = (load_file(folder / f"{name}/model.safetensors") for name in ("base", "one/model", "two/model"))
    moved, apart = (sum((x[name].float() - y[name].float()).abs().sum() for name in a) for x, y in ((a, base), (a, b)))
    assert a.keys() == b.keys() and 0 < apart < 0.01 * moved    # Adam makes steps of rounding errors, if gradients are 0
    assert sample(*load_policy(folder / "two/model"), [[5, 6]], 1, 3, 1.0, [0])                 # one can go on with it

def test_only_the_first_of_two_processes_prints(both):
    folder, _ = both
    assert "step 4/4" in printed(folder, 0, "stdout") and printed(folder, 1, "stdout") == ""

def test_two_processes_go_on_exactly_where_they_stopped(both, tmp_path):
    folder, settings = both
    if "qwen3" in folder.name:
        for steps in 2, 4:
            result = torchrun(folder / "script.py", f"{settings} --steps {steps} --resume --out {tmp_path}/run", tmp_path / f"{steps}")
            assert result.returncode == 0, result.stderr
        assert without_times(log_of(tmp_path / "run")) == without_times(log_of(folder / "two"))
        assert same_weights(tmp_path / "run", folder / "two")

def test_an_error_in_one_process_ends_both_with_its_message(both, tmp_path):
    folder, settings = both
    if "qwen3" in folder.name:
        result = torchrun(folder / "script.py", f"{settings} --out {tmp_path}/out --fail", tmp_path)
        assert result.returncode != 0 and "forking.py: the moon is full (process 1)" in printed(tmp_path, 1, "stderr")

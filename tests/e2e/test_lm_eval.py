"""lm-eval with the model in the box: the same results as its own `hf` model gives."""

import json
import os
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # which lm-eval's own model needs

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from nanovllm.entrypoints.lm_eval import NanoVLLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
LENGTH = 128
DOCS = {
    "choices": [
        {"text": "In the beginning", "choices": ["was the word", "of", "the king"], "gold": 0},
        {"text": "And the king said unto", "choices": ["them", "him, I am", "seven"], "gold": 1},
        {"text": "It is a truth " * 60, "choices": ["that", "universally held"], "gold": 0},
        {"text": "She went down to the", "choices": ["sea", "house", "end"], "gold": 2},
    ],
    "questions": [
        {"question": "Who are you?", "answer": "I am a tiny language model"},
        {"question": "The king", "answer": "of the"},
        {"question": "Once there was", "answer": "a"},
    ],
    "texts": [
        {"text": "In the beginning the king said unto them. " * 30},
        {"text": "A short one."},
    ],
}  # fmt: skip
YAML = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "questions": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: [".", "\\n"], max_gen_toks: 24}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, docs in DOCS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\n{YAML[name]}"
        )
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["depth 1", "depth 2"])
def model(request, tiny):
    options = dict(max_num_batched_tokens=48, max_num_seqs=6, async_scheduling=request.param)
    model = NanoVLLM(str(tiny), dtype="float32", max_length=LENGTH, batch_size="auto", **options)
    yield model
    model.llm.close()


def evaluate(model, folder, **options):
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(DOCS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    answers = {
        (name, sample["doc_id"]): sample["filtered_resps"]
        for name, samples in found["samples"].items()
        for sample in samples
    }
    return found["results"], answers


@pytest.fixture(scope="module")
def expected(tiny, folder):
    args = dict(pretrained=str(tiny), dtype="float32", device="cpu", max_length=LENGTH)
    return {
        chats: evaluate("hf", folder, model_args=args, apply_chat_template=chats)
        for chats in (False, True)
    }


@pytest.mark.parametrize("chats", [False, True], ids=["plain", "chat"])
def test_results_are_those_of_the_hf_model(expected, model, folder, chats):
    results, answers = evaluate(model, folder, apply_chat_template=chats)
    wanted_results, wanted = expected[chats]
    assert answers.keys() == wanted.keys() and len(answers) == sum(map(len, DOCS.values()))
    for (name, _), answer in answers.items():
        other = wanted[name, _]
        if name == "questions":
            assert answer == other
        elif name == "texts":
            assert answer == pytest.approx(other, abs=1e-3)
        else:
            assert [greedy for _, greedy in answer] == [greedy for _, greedy in other]
            assert [x for x, _ in answer] == pytest.approx([x for x, _ in other], abs=1e-3)
    for name, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert value == pytest.approx(wanted_results[name][metric], rel=1e-4), metric


def ask(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def test_how_answers_are_generated(model):
    def generate(text, **kwargs):
        return model.generate_until([ask("generate_until", text, kwargs)], disable_tqdm=True)[0]

    greedy = generate("In the beginning", max_gen_toks=30)
    assert generate("In the beginning", max_tokens=30, until=greedy[20:24]) == greedy[:20]
    hot = {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "max_gen_toks": 30, "seed": 1}
    assert generate("In the beginning", **hot) == generate("In the beginning", **hot) != greedy
    assert isinstance(generate("", max_gen_toks=5), str)
    with pytest.raises(ValueError, match="max_gen_toks=128 leaves no room for a prompt in max_mod"):
        generate("In", max_gen_toks=LENGTH)
    with pytest.raises(TypeError, match="num_beams"):
        generate("In", max_gen_toks=5, num_beams=4)


def with_special_tokens(folder):
    """Some tokens that the model likes are special: they have no text in answers."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    content["added_tokens"] += [
        {"id": vocab[text], "content": text, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for text in (";", ",")
    ]  # fmt: skip
    content["added_tokens"].sort(key=itemgetter("id"))
    file.write_text(json.dumps(content))


def with_sentencepiece(folder):
    """Each word begins with a space, which the first one loses."""
    words = ["<unk>", "<s>", "</s>", *(f"\u2581{word}" for word in ("the", "sea", "Emma", "was"))]
    words += [f"\u2581{i}" if i % 3 else f"{i}" for i in range(len(words), 2560)]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [with_special_tokens, with_sentencepiece])
def test_answers_are_those_of_the_hf_model(copy_tiny, change):
    folder = copy_tiny(generation_config={"repetition_penalty": 1.3})
    change(folder)
    ours = NanoVLLM(str(folder), dtype="float32", max_length=512)
    theirs = HFLM(str(folder), dtype="float32", device="cpu", max_length=512, batch_size=1)

    def answers(kwargs):
        requests = [
            ask("generate_until", text, {"max_gen_toks": 40, **kwargs})
            for text in ("Emma was", "the sea ; was, in", "<s>Emma" * 300)
        ]
        return [m.generate_until(requests, disable_tqdm=True) for m in (ours, theirs)]

    with ours.llm:
        plain, expected = answers({})
        assert plain == expected
        token_ids = ours.tok_encode(plain[0], add_special_tokens=False)
        inside = plain[0][len(plain[0]) // 3 :][:5]
        for kwargs in (
            *({"until": until} for until in (";", [","], [";", inside], [inside], ["<s>"])),
            *({"until": [f";{plain[0][:2]}", inside[:2]]}, {"until": [", and"]}),
            {"num_beams": 1, "do_sample": False, "early_stopping": False, "temperature": 0.7},
            {"repetition_penalty": 1.0},
            {"max_gen_toks": 1},
            {"max_length": 480},
        ):
            got, expected = answers(kwargs)
            assert got == expected, kwargs
        for end in (token_ids[3], token_ids[-1], plain[0][4:8], 1):
            ours.think_end_token = theirs.think_end_token = end
            for kwargs in ({}, {"until": [";"]}):
                got, expected = answers(kwargs)
                assert got == expected, (end, kwargs)


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_texts_begin_with_bos_as_in_the_hf_model(tiny, copy_tiny, add_bos_token):
    folder = copy_tiny(tokenizer_config={"bos_token": "<|im_start|>"})
    options = dict(dtype="float32", device="cpu", max_length=64, add_bos_token=add_bos_token)
    ours, theirs = NanoVLLM(str(folder), **options), HFLM(str(folder), **options)
    ours.llm.close()
    for text in ("Emma was", "", "<|im_start|>Emma"):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)
        if text:
            assert ours._encode_prompt(text) == theirs.tok_batch_encode([text])[0][0].tolist()
    has_bos = ours.tok_encode("Emma was")[0] == ours.prefix_token_id
    assert has_bos == bool(add_bos_token)


def test_a_chat_template_of_the_users(tiny):
    for template in ("<<{{ messages[0].content }}>>", "{{ tools }}{{ messages | length }}"):
        model = NanoVLLM(str(tiny), dtype="float32", max_length=64, chat_template=template)
        with model.llm:
            messages = [{"role": "user", "content": "hi"}]
            [prompt] = model.llm.render_chat(messages)
            assert model.apply_chat_template(messages) == prompt["prompt"]
            assert model.chat_template(True) == template


def test_thoughts_are_left_out(model, monkeypatch):
    greedy = model.generate_until([ask("generate_until", "In the", {"max_gen_toks": 40})], True)[0]
    monkeypatch.setattr(model, "think_end_token", greedy[10:15])
    [found] = model.generate_until(
        [ask("generate_until", "In the", {"max_gen_toks": 40, "until": [greedy[3:6], "\0"]})], True
    )
    assert found == greedy.split(greedy[10:15])[-1].lstrip().split(greedy[3:6])[0]


def test_thoughts_may_end_at_a_token_id(tiny):
    options = dict(skip_tokenizer_init=False, dtype="float32", max_length=64)
    for given, meant in (("17", 17), (17, 17), ("</think>", "</think>"), (None, None)):
        model = NanoVLLM(str(tiny), think_end_token=given, **options)
        model.llm.close()
        assert model.think_end_token == meant


def test_prefix_and_bos(model, monkeypatch):
    monkeypatch.setattr(model, "custom_prefix", 7)
    [(found, _)] = model.loglikelihood([ask("loglikelihood", "", " the king")], disable_tqdm=True)
    ids = model.tok_encode(" the king", add_special_tokens=False)
    assert found == pytest.approx(model.llm.loglikelihood([([7], ids)], False)[0].total, abs=1e-4)
    assert model.loglikelihood_rolling([ask("loglikelihood_rolling", "")], disable_tqdm=True) == [0]


def test_bad_options(tiny):
    with pytest.raises(ValueError, match="max_length and max_model_len are two names of one"):
        NanoVLLM(str(tiny), max_length=64, max_model_len=32)
    with pytest.raises(TypeError, match="no_such_option"):
        NanoVLLM(str(tiny), no_such_option=1)


def test_the_command_line(tiny, folder, tmp_path, expected):
    done = subprocess.run(
        [
            sys.executable, "-m", "nanovllm.entrypoints.lm_eval", "--model", "nanovllm",
            "--model_args", f"pretrained={tiny},dtype=float32,max_model_len={LENGTH},block_size=8",
            "--include_path", folder, "--tasks", "choices,texts", "--output_path", tmp_path,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.rglob("results*.json")
    results = json.loads(file.read_text())["results"]
    for name, metric in (("choices", "acc,none"), ("texts", "word_perplexity,none")):
        assert results[name][metric] == pytest.approx(expected[False][0][name][metric], rel=1e-4)

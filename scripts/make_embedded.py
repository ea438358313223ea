"""Make `opd/models/embedded`: the tokenizer, the teacher and the two students, trained from scratch on the ledger task.

python scripts/make_embedded.py                                  # everything: 40 minutes of one CPU core
python scripts/make_embedded.py --only small --out /tmp/try      # one model
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd.data.tasks import ledger
from opd.models.source import EMBEDDED

WORDS = r"<[a-z]+>|[A-Za-z]+[:.?]? ?|[0-9]|\. |\s|[^\sA-Za-z0-9]"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{{ m.content }}{{ eos_token }}"
    "{% else %}<user>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELDOUT = 512  # held-out problems behind each accuracy
README = """# Embedded models

A teacher and two students for the ledger task (`opd/data/tasks/ledger.py`), small enough to ship with the package. Each
folder loads with `AutoModelForCausalLM` and `AutoTokenizer`; the three share one tokenizer. The students have their
own seeds: trained on gold solutions to a fifth of the answers right, then on careless ones, which get three in four
carries and borrows wrong. They keep the form and always end; what they lack is the carrying. Accuracies are over
{rows} held-out problems of seed 0, half of them asked bare and half as chat.

{table}

Made from nothing by `python scripts/make_embedded.py` on one CPU core; `card.json` in each folder has its recipe.
"""


@dataclass(frozen=True)
class Phase:
    """A supervised run on gold or careless solutions.

    It ends after `steps` steps, or as soon as the greedy accuracy at full difficulty reaches `stop`.
    """

    steps: int
    careless: float = 0.0  # probability of an error in a carry or borrow
    stop: float = 2.0  # never reached
    every: int = 100  # steps between two evaluations
    decay: float = 0.3  # last fraction of the steps, in which the learning rate decays to 0
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 30


@dataclass(frozen=True)
class Recipe:
    """The recipe of a model: its shape, its seed, and its training phases in order."""

    hidden: int
    layers: int
    seed: int
    phases: tuple[Phase, ...]
    heads: int = 4


WEAK = (Phase(steps=2000, stop=0.2, every=25, decay=0.0), Phase(steps=240, careless=0.75, decay=0.6))
RECIPES = {
    "teacher": Recipe(hidden=128, layers=3, seed=1, phases=(Phase(steps=1500),)),
    "student": Recipe(hidden=128, layers=3, seed=2, phases=WEAK),
    "small": Recipe(hidden=96, layers=2, seed=3, phases=WEAK),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer; tokens include the space after them, so decoding is concatenation."""
    words = [f"{month}: " for month in ledger.MONTHS]
    words += [f"{word} " for word in ledger.NAMES + ledger.GAINS + ledger.LOSSES]
    words += [f"{thing}. " for thing in ledger.OBJECTS]
    words += ["has ", "How ", "many ", "does ", "have?", " ", ". ", "\n", *"0123456789+-=^_"]
    vocab = {token: i for i, token in enumerate((*SPECIAL, *ledger.STAGES, *words))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def model(recipe: Recipe, tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Initialise a Llama; a wide initialisation and untied embeddings avoid a long plateau of the loss."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 11 // 4 // 8 * 8,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    return LlamaForCausalLM(config)


def render(problem: ledger.Problem, tok: PreTrainedTokenizerFast, *, chat: bool) -> str:
    """Return the prompt as text, either bare or as a user turn with the generation prompt."""
    if not chat:
        return tok.bos_token + problem.prompt
    turn = [{"role": "user", "content": problem.prompt}]
    return tok.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def batches(phase: Phase, tok: PreTrainedTokenizerFast, *, seed: int):
    """Yield endless batches (tokens, labels); pools of eight batches are sorted by length, which halves the padding."""
    rng = random.Random(seed)
    stream = ledger.problems(seed, level="full"), ledger.problems(seed, level="short")
    while True:
        rows = []
        for _ in range(8 * phase.batch):
            problem = next(stream[rng.random() < 0.1])
            prompt = tok.encode(render(problem, tok, chat=rng.random() < 0.5), add_special_tokens=False)
            written = ledger.careless(problem, rng, rate=phase.careless) if phase.careless else problem.solution
            response = [*tok.encode(written, add_special_tokens=False), tok.eos_token_id]
            rows.append((prompt + response, [-100] * len(prompt) + response))
        rows.sort(key=lambda row: len(row[0]))
        cuts = list(range(0, len(rows), phase.batch))
        for cut in rng.sample(cuts, len(cuts)):
            part = rows[cut : cut + phase.batch]
            width = max(len(tokens) for tokens, _ in part)
            yield (
                torch.tensor([tokens + [tok.pad_token_id] * (width - len(tokens)) for tokens, _ in part]),
                torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in part]),
            )


@torch.no_grad()
def accuracy(net: LlamaForCausalLM, tok: PreTrainedTokenizerFast, *, level: str, rows: int, greedy: bool) -> float:
    """Return the share of held-out problems that are solved, by greedy decoding or sampling at temperature 1."""
    torch.manual_seed(0)
    drawn = [ledger.problem_at(0, i, level=level, heldout=True) for i in range(rows)]
    drawn.sort(key=lambda problem: len(problem.solution))
    solved = 0.0
    for start in range(0, rows, 128):
        part = drawn[start : start + 128]
        texts = [render(problem, tok, chat=i % 2 == 0) for i, problem in enumerate(part)]
        inputs = tok(texts, add_special_tokens=False, padding=True, return_tensors="pt", return_token_type_ids=False)
        room = max(len(tok.encode(problem.solution)) for problem in part) + 8
        choice = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        out = net.generate(**inputs, max_new_tokens=room, **choice)
        responses = tok.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        solved += sum(ledger.verify(r, problem.answer) for r, problem in zip(responses, part, strict=True))
    return solved / rows


def train(net: LlamaForCausalLM, tok: PreTrainedTokenizerFast, phase: Phase, *, seed: int) -> None:
    """Train a phase: warm-up, constant learning rate, linear decay."""
    source, begun = batches(phase, tok, seed=seed), time.time()
    optimizer = torch.optim.AdamW(net.parameters(), lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(1, phase.steps + 1):
        decay = (phase.steps - step + 1) / (phase.decay * phase.steps) if phase.decay else 1.0
        optimizer.param_groups[0]["lr"] = phase.lr * min(1.0, step / phase.warmup, decay)
        tokens, labels = next(source)
        loss = net(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % phase.every == 0:
            full = accuracy(net, tok, level="full", rows=128, greedy=True)
            print(f"  step {step} loss {loss.item():.4f} full {full:.3f} {time.time() - begun:.0f} s", flush=True)
            if full >= phase.stop:
                break


def report(net: LlamaForCausalLM, tok: PreTrainedTokenizerFast, recipe: Recipe) -> dict:
    """Return the card of a trained model: its size, its held-out accuracies and its recipe."""
    scores = {
        f"{level}, {'greedy' if greedy else 'T=1'}": accuracy(net, tok, level=level, rows=HELDOUT, greedy=greedy)
        for level in ledger.LEVELS
        for greedy in (True, False)
    }
    return {"parameters": net.num_parameters(), "accuracy": scores, "recipe": asdict(recipe)}


def readme(folder: Path) -> str:
    """Return the README with the table of the models in the folder, from their cards."""
    made = [name for name in RECIPES if (folder / name / "card.json").exists()]
    cards = {name: json.loads((folder / name / "card.json").read_text()) for name in made}
    columns = list(cards[made[0]]["accuracy"])
    lines = ["| " + " | ".join(["model", "parameters", "MB", "layers x width", "seed", *columns]) + " |"]
    lines.append("|" + "---|" * (len(columns) + 5))
    for name, card in cards.items():
        size = sum(path.stat().st_size for path in (folder / name).iterdir()) / 1e6
        shape = f"{card['recipe']['layers']} x {card['recipe']['hidden']}"
        scores = [f"{card['accuracy'][column]:.3f}" for column in columns]
        cells = [name, f"{card['parameters']:,}", f"{size:.2f}", shape, str(card["recipe"]["seed"]), *scores]
        lines.append("| " + " | ".join(cells) + " |")
    return README.format(rows=HELDOUT, table="\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=EMBEDDED)
    parser.add_argument("--only", choices=tuple(RECIPES), action="append", help="may be repeated; default all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tok = tokenizer()
    for name in args.only or RECIPES:
        recipe = RECIPES[name]
        print(name, recipe, flush=True)
        net = model(recipe, tok)
        for i, phase in enumerate(recipe.phases):
            train(net, tok, phase, seed=recipe.seed + 100 * i)
        net.save_pretrained(args.out / name)
        tok.save_pretrained(args.out / name)
        card = report(net, tok, recipe)
        (args.out / name / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        (args.out / "README.md").write_text(readme(args.out))
        print(name, card, flush=True)


if __name__ == "__main__":
    main()

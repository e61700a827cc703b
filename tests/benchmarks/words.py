"""Words that the model is to say less: `python tests/benchmarks/words.py [--folder F] [--json FILE]`.

SmolLM2-135M-Instruct answers half of the 300 prompts of configs/writing.txt four times each. In the first two answers
to each words are counted, each once an answer; function words are left out, which stand in at least 15 % of the
documents of C4, and so are words of the prompts and of fewer than four letters. Two lists are lowered:
configs/slop.txt, and configs/frequent.txt, which was the words of at least eight answers that answers have most often
compared with documents of C4, none of them in slop.txt; which ones these are now is printed, since draws in bfloat16
differ from machine to machine; so it is with configs/kept.txt, every fifth of the most frequent words on neither list,
whose benefit is subtracted. To each list belong other words of like frequency, on none of the three, which should stay.
A word that stands beside words of the list more often than not, as in "Dear [Friend's Name]", goes with what it belongs
to: it is among "other words of any place" alone. Neurons are chosen by the recipe of configs/slop.yaml, within the
budget below, and measured on the other half of the prompts, beside random, least relevant and large neurons. Every
stage is a verb of `sparc3` in the folder given, and one that is done there is not run again. Needs c4/en.jsonl and
wikitext2/wiki.test.raw, by default in shared/data beside the checkout.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import CHECKPOINT, DATA, FILES, data_files, head, line, parse, percent, scores, sparc3, write
from torch import Tensor

from sparc3_lightning.evaluation.completions import Completion, load_completions
from sparc3_lightning.evaluation.draws import interval_of_draws
from sparc3_lightning.evaluation.intervals import Interval, paired_difference
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.models.components import in_words
from sparc3_lightning.scorers.words import counter_of, read_words
from sparc3_lightning.sources import read_records

CONFIGS = Path(__file__).parents[2] / "configs"
COMMON = 0.15  # least share of C4's documents that has a function word
NUM_FREQUENT, LEAST = 12, 8  # words, and the answers that have one at least
BESIDE = 5  # words between which two words are beside each other, at most
COUNTED = 2  # answers to a prompt
NUM_KEPT = 60
# Of each list: answers that say what a neuron costs (of fewer the floor is higher), and the budget; both were chosen on
# the prompts to attribute on, reworded with a "Please".
LISTS = {"slop": (600, 0.0075), "frequent": (75, 0.005)}


def main() -> None:
    """Measure, and print a table."""
    options = parse(
        __doc__,
        folder={"type": Path, "default": Path("words")},
        data={"type": Path, "default": DATA},
        lists={"nargs": "+", "choices": [*LISTS], "default": list(LISTS)},
        samples={"type": int, "default": 600, "help": "answers to attribute on"},
        documents={"type": int, "default": 28, "help": "of the text of the budget"},
        text={"type": int, "default": 16384, "help": "tokens to measure perplexity on"},
        continuations={"type": int, "default": 25},
        tokens={"type": int, "default": 40},
        draws={"type": int, "default": 5},
        of_draws={"type": int, "default": 5, "help": "continuations of a prompt by each control"},
    )
    c4, text = data_files(options.data, FILES[1:])
    options.folder.mkdir(exist_ok=True)
    json_file = options.json and options.json.resolve()
    with chdir(options.folder):
        write_prompts()
        asked = list(evaluation("attribute.txt", text, 1024, options.tokens))
        asked += ["--model.sampling.num_continuations=4", "--model.scorers=[repetition]"]
        folder = sparc3("evaluate", "answers", *asked)
        write_lists(load_completions(folder / "completions.jsonl"), c4)
        found = {name: measured(name, folder / "completions.jsonl", c4, text, options) for name in options.lists}
    options.json = json_file
    table(found)
    write(options, plain(found))


def write_prompts() -> None:
    """Write the two halves of the prompts, by one permutation."""
    prompts = (CONFIGS / "writing.txt").read_text().splitlines()
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    half = len(prompts) // 2
    for name, part in {"attribute": order[:half], "report": order[half:]}.items():
        Path(f"{name}.txt").write_text("".join(f"{prompts[i]}\n" for i in part))


def evaluation(prompts: str, text: Path, num_tokens: int, max_new_tokens: int) -> Iterable[str]:
    """Yield the options of an evaluation: the model, the prompts as turns of a user, and a text for perplexity."""
    yield from (
        f"--model.checkpoint={CHECKPOINT}",
        "--model.dtype=fast",
        f"--model.sampling.max_new_tokens={max_new_tokens}",
    )
    yield from ("--data.prompts=RealToxicityPrompts", f"--data.prompts.source={prompts}", "--data.prompts.chat=true")
    yield from ("--data.prompts.min_toxicity=null", "--data.prompts.num_prompts=null", "--data.prompts.batch_size=30")
    yield from ("--data.text=WikiText2", f"--data.text.source={text}", f"--data.text.num_tokens={num_tokens}")
    yield from ("--data.text.window=512", "--data.text.stride=512", "--data.text.conventions=[disjoint]")


def words_in(text: str) -> set[str]:
    """Return the words of a text, in lower case."""
    return set(re.findall(r"[^\W\d_]+", text.lower()))


def write_lists(answers: Sequence[Completion], c4: Path) -> None:
    """Write the lists, and other words for each, chosen by the number of answers that have them."""
    texts = [row["continuation"] for row in answers if row["continuation_index"] < COUNTED]
    counts = Counter(word for text in texts for word in words_in(text))
    documents = [words_in(str(row["text"])) for row in read_records(c4)]
    in_documents = Counter(word for words in documents for word in words)
    functional = {word for word, number in in_documents.items() if number >= COMMON * len(documents)}
    prompts = words_in((CONFIGS / "writing.txt").read_text())
    slop = read_words(CONFIGS / "slop.txt")
    stems = {word[:5] for entry in slop for word in words_in(entry)}
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    free = [
        word
        for word in ranked
        if len(word) >= 4 and word not in functional and word not in prompts and word[:5] not in stems
    ]
    often = sorted((word for word in free if counts[word] >= LEAST), key=lambda word: in_documents[word] / counts[word])
    print("most often compared with C4:", ", ".join(of_each_stem(often)[:NUM_FREQUENT]), flush=True)
    frequent, kept = (read_words(CONFIGS / f"{name}.txt") for name in ("frequent", "kept"))
    rest = with_other_stems(free, frequent)
    print("every fifth of the others:", ", ".join(rest[: 5 * NUM_KEPT : 5]), flush=True)
    for name in LISTS:
        words = read_words(CONFIGS / f"{name}.txt")
        of_words = {word: sum(map(bool, map(counter_of([word]), texts))) for word in words}
        Path(f"{name}.txt").write_text("".join(f"{word}\n" for word in words))
        print(f"\n{name}: {said(of_words, texts)}", flush=True)
        anywhere, beside = with_other_stems(free, [*words, *kept]), often_beside(words, texts)
        for other, left in {
            "others": [w for w in anywhere if w not in beside],
            "others_of_any_place": anywhere,
        }.items():
            found = alike(of_words, left, counts)
            Path(f"{name}_{other}.txt").write_text("".join(f"{word}\n" for word in found))
            print(f"{other}: {said({word: counts[word] for word in found}, texts)}", flush=True)


def alike(of_words: dict[str, int], left: Sequence[str], counts: Counter[str]) -> list[str]:
    """Return for each word that is said one of those that are left which is said as often, or nearly so."""
    found: list[str] = []
    for word in sorted(filter(of_words.get, of_words), key=lambda word: (-of_words[word], word)):
        found.append(min(left, key=lambda other: (abs(counts[other] - of_words[word]), other)))
        left = with_other_stems(left, found[-1:])
    return found


def of_each_stem(words: Sequence[str]) -> list[str]:
    """Return the first of the words that begin alike."""
    found: dict[str, str] = {}
    for word in words:
        found.setdefault(word[:5], word)
    return list(found.values())


def often_beside(words: Sequence[str], texts: Iterable[str]) -> set[str]:
    """Return what stands beside words of a list more often than not: with few words between."""
    listed = counter_of(words)
    total: Counter[str] = Counter()
    beside: Counter[str] = Counter()
    for text in texts:
        said = list(re.finditer(r"[^\W\d_]+", text))
        for i, word in enumerate(said):
            around = text[said[max(0, i - BESIDE)].start() : said[min(i + BESIDE, len(said) - 1)].end()]
            total[word[0].lower()] += 1
            beside[word[0].lower()] += bool(listed(around))
    return {word for word, number in beside.items() if 2 * number > total[word]}


def with_other_stems(words: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Return the words that begin as no word that is taken does."""
    stems = {word[:5] for word in taken}
    return [word for word in words if word[:5] not in stems]


def said(counts: dict[str, int], texts: Sequence[str]) -> str:
    """Return in how many texts each word of a list stands, and any of them."""
    share = 100 * sum(map(bool, map(counter_of(list(counts)), texts))) / len(texts)
    each = ", ".join(f"{word} {number}" for word, number in counts.items() if number)
    return f"in {share:.1f} % of {len(texts)} answers ({each})"


def measured(name: str, answers: Path, c4: Path, text: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Choose the neurons of a list, evaluate them, and return what changed."""
    priced, budget = LISTS[name]
    of = [f"--model.checkpoint={CHECKPOINT}", "--model.method=gradient", "--model.granularity=neuron+channel"]
    documents = ["--data=C4", f"--data.source={c4}", "--data.seq_len=256"]
    own = ["--data=ToxicPrompts", "--data.by=continuation", f"--data.source={answers}", "--data.chat=true"]
    own += ["--data.continuation_toxicity=[0,1]", "--data.min_toxicity=null", "--data.batch_size=15"]
    costs = ["--model.relevance=fisher", "--model.target=sampled", f"--data.num_samples={priced}"]
    sparc3("attribute", f"cost_of_{priced}", *of, *own, *costs)
    own += [f"--data.num_samples={options.samples}"]
    lexical = ["--model.relevance=signed", "--model.target=lexicon_probability", f"--model.lexicon={name}.txt"]
    sparc3("attribute", name, *of, *own, *lexical, "--model.kept_words=kept.txt")
    chosen = [f"--model.general=[{scores(f'cost_of_{priced}')}]", f"--model.behavior={scores(name)}"]
    chosen += ["--model.criterion=benefit_per_cost", f"--model.budget.max_perplexity_increase={budget}"]
    chosen += [*documents, "--data.seed=7"]
    neurons = (
        sparc3("prune", name, *chosen, f"--data.num_samples={options.documents}", "--data.batch_size=4")
        / "neurons.json"
    )
    draws = [f"--model.controls.num_draws={options.draws}", f"--model.controls.num_continuations={options.of_draws}"]
    number = f"--model.sampling.num_continuations={options.continuations}"
    asked = [
        *evaluation("report.txt", text, options.text, options.tokens),
        number,
        f"--model.neurons={neurons}",
        *draws,
    ]
    folder = sparc3("evaluate", name, *asked, f"--model.scorers=[words:{name}.txt]")
    rows = load_completions(folder / "completions.jsonl")
    results = Results.load(folder / "results.json")
    words, others, anywhere = (
        read_words(Path(f"{name}{ending}.txt")) for ending in ("", "_others", "_others_of_any_place")
    )
    price = next(iter(results.perplexity_change.values()))
    found = {"off": in_words(results.kinds), "perplexity": price, "prompts": len({row["prompt_id"] for row in rows})}
    judges = {"words": (words, False), "words a token": (words, True), "other words": (others, False)}
    judges["other words of any place"] = (anywhere, False)
    for judge, (listed, is_rate) in judges.items():
        found[judge] = changes(rows, counter_of(listed), is_rate)
    return found


def changes(rows: Sequence[Completion], count: Callable[[str], int], is_rate: bool) -> dict[str, Any]:
    """Return what a judge says: its mean before, and the change in percent by the neurons and by each control.

    Args:
        rows: Of completions.jsonl.
        count: Occurrences in a text.
        is_rate: Whether they are divided by the tokens, in place of asking whether there is any.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        number = count(row["continuation"])
        value = number / max(row["num_tokens"], 1) if is_rate else float(number > 0)
        found[row["model"]][row["prompt_id"]].append(value)
    prompts = sorted(found["baseline"])

    def means(model: str, first: int | None = None) -> Tensor:
        return torch.tensor([found[model][prompt][:first] for prompt in prompts], dtype=torch.float64).mean(dim=1)

    of_pruned = paired_difference(means("baseline"), means("pruned"))
    kinds = defaultdict(list)
    for model in found.keys() - {"baseline", "pruned"}:
        kinds[model.rpartition("_")[0]].append(model)
    of_controls = {}
    for kind, models in sorted(kinds.items()):
        first = len(found[models[0]][prompts[0]])
        base = means("baseline", first)
        change = interval_of_draws(torch.stack([means(model, first) - base for model in sorted(models)]), base)
        of_controls[kind] = Interval(100 * change.value, 100 * change.low, 100 * change.high)
    return {"before": of_pruned.before, "after": of_pruned.after, "pruned": of_pruned.percent, **of_controls}


def table(found: dict[str, dict[str, Any]]) -> None:
    """Print a table for each list."""
    for name, of_list in found.items():
        judges = {judge: of for judge, of in of_list.items() if judge not in ("off", "perplexity", "prompts")}
        kinds = [kind for kind in judges["words"] if kind not in ("before", "after")]
        print(f"\n{name}: {of_list['off']}, perplexity {percent(of_list['perplexity'])} %, ", end="")
        print(f"{of_list['prompts']} prompts; changes in percent\n")
        head("judge", "before", "after", *kinds)
        for judge, values in judges.items():
            line(judge, f"{values['before']:.4f}", f"{values['after']:.4f}", *(percent(values[kind]) for kind in kinds))


def plain(found: Any) -> Any:
    """Return figures for JSON."""
    if isinstance(found, dict):
        return {name: plain(value) for name, value in found.items()}
    return asdict(found) if isinstance(found, Interval) else found


if __name__ == "__main__":
    main()

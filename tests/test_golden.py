"""The golden loss cases: sound in themselves, reproducible, met by losses.py; each known difference of TRL stated."""

import hashlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import conformance
import pytest
import textbook
import torch
from conformance import GOLDEN, case_difference, load_cases, tensors

import dpo
import model as models
from parts.files import read_json

TESTS = Path(__file__).resolve().parent
CASES = load_cases()
BY_NAME = {case["name"]: case for case in CASES}
LOSSES = sorted({case["loss_type"] if isinstance(case["loss_type"], str) else "several" for case in CASES})


def of(loss: str) -> list[dict]:
    """The cases of one file of golden/losses."""
    return json.loads((GOLDEN / "losses" / f"{loss}.json").read_text())["cases"]


# The files.


def test_checksums_match_and_cover_every_file():
    lines = (GOLDEN / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    found = {f.relative_to(GOLDEN).as_posix() for f in GOLDEN.rglob("*") if f.suffix in (".json", ".safetensors")}
    assert set(sums) == found and {f"losses/{loss}.json" for loss in LOSSES} < found
    for name, digest in sums.items():
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == digest, name


def schema_errors(value, schema: dict, defs: dict, where: str = "") -> list[str]:
    """What of `value` breaks the schema: the part of JSON Schema that golden/schema.json uses, and no more."""
    if "$ref" in schema:
        return schema_errors(value, defs[schema["$ref"].removeprefix("#/$defs/")], defs, where)
    if "oneOf" in schema:
        tries = [schema_errors(value, option, defs, where) for option in schema["oneOf"]]
        fit = [not errors for errors in tries].count(True)
        return [] if fit == 1 else [f"{where}: fits {fit} of {len(tries)} forms", *(e for t in tries for e in t)]
    if "const" in schema:
        return [] if value == schema["const"] else [f"{where}: {value!r}"]
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{where}: {value!r} not in {schema['enum']}"]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if not isinstance(value, kinds[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return [f"{where}: {type(value).__name__} is not a {schema['type']}"]
    if isinstance(value, list):
        short = [f"{where}: too short"] if len(value) < schema.get("minItems", 0) else []
        items = ((v, f"{where}[{i}]") for i, v in enumerate(value))
        return short + [e for v, place in items for e in schema_errors(v, schema["items"], defs, place)]
    if not isinstance(value, dict):
        return [f"{where}: {value} too small"] if "minimum" in schema and value < schema["minimum"] else []
    return object_errors(value, schema, defs, where)


def object_errors(value: dict, schema: dict, defs: dict, where: str) -> list[str]:
    needed = set(schema.get("required", []))
    needed |= {key for have, keys in schema.get("dependentRequired", {}).items() if have in value for key in keys}
    errors = [f"{where}: lacks {key}" for key in needed - set(value)]
    errors += [f"{where}: unknown {key}" for key in set(value) - set(schema["properties"])]
    errors += [f"{where}: too few entries"] if len(value) < schema.get("minProperties", 0) else []
    known = {key: v for key, v in value.items() if key in schema["properties"]}
    return errors + [
        e for key, v in known.items() for e in schema_errors(v, schema["properties"][key], defs, f"{where}.{key}")
    ]


SCHEMA = json.loads((GOLDEN / "schema.json").read_text())


@pytest.mark.parametrize("loss", LOSSES)
def test_every_case_follows_the_schema(loss):
    document = json.loads((GOLDEN / "losses" / f"{loss}.json").read_text())
    assert schema_errors(document, SCHEMA, SCHEMA["$defs"], loss) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda case: case.pop("expected"),
        lambda case: case.update(loss_type="dpo"),
        lambda case: case["params"].update(label_smothing=0.1),
        lambda case: case["inputs"].update(chosen_lengths=[0.5]),
        lambda case: case["inputs"].update(chosen_lengths=[0]),
        lambda case: case["inputs"].update(policy_chosen_token_logps=[[-1.0]]),
        lambda case: case["inputs"].pop("ref_rejected_logps"),
        lambda case: case["expected"]["grad"].pop("policy_chosen_logps"),
        lambda case: case["expected"].update(losses=[]),
    ],
)
def test_the_schema_check_sees_a_spoilt_case(spoil):
    case = json.loads(json.dumps(BY_NAME["sigmoid/ordinary"]))
    spoil(case)
    assert schema_errors({"format": 1, "cases": [case]}, SCHEMA, SCHEMA["$defs"]) != []


def test_names_are_unique_and_every_column_has_one_entry_per_pair():
    assert len(BY_NAME) == len(CASES)
    for case in CASES:
        columns = [*case["inputs"].values(), *case["expected"]["grad"].values(), case["expected"]["losses"]]
        assert len({len(column) for column in columns}) == 1, case["name"]
        for name, grad in case["expected"]["grad"].items():
            assert [len(g) for g in grad if isinstance(g, list)] == [
                len(x) for x in case["inputs"][name] if isinstance(x, list)
            ]


def test_the_batch_loss_is_the_mean_of_the_losses_and_all_numbers_are_finite():
    for case in CASES:
        want = case["expected"]
        assert all(map(math.isfinite, conformance.flat([want["losses"], *want["grad"].values()]))), case["name"]
        mean = math.fsum(want["losses"]) / len(want["losses"])
        assert want["loss"] == pytest.approx(mean, rel=1e-14, abs=1e-15), case["name"]


def test_batch_coupled_losses_are_tried_on_one_pair_and_on_many():
    for loss in ("aot", "aot_pair", "sft"):
        assert {1} < {len(case["expected"]["losses"]) for case in of(loss)}
        assert max(len(case["expected"]["losses"]) for case in of(loss)) >= 5


def test_the_case_shown_in_the_readme_is_the_one_in_the_file():
    text, case = (TESTS / "README.md").read_text(), BY_NAME["sigmoid/one"]
    shown = text[text.index('"name": "sigmoid/one"') : text.index('"source": "arXiv')]
    for number in conformance.flat([list(case["inputs"].values()), list(case["expected"]["grad"].values())]):
        assert json.dumps(int(number) if number == 1 else number) in shown
    assert f'"loss": {case["expected"]["loss"]}' in shown


def test_the_readme_lists_every_loss_and_parameter():
    text = (TESTS / "README.md").read_text()
    names = {name for case in CASES for name in conformance.loss_names(case)}
    flags = {flag for case in CASES for flag in case["params"]}
    assert {name for name in names if f"`{name}`" not in text} == set()
    assert {flag for flag in flags if flag not in text} == set()


# The generator. It needs mpmath; the comparison is exact, to the last bit.


@pytest.fixture(scope="module")
def generator():
    pytest.importorskip("mpmath")
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generator_holds_the_same_cases_as_the_files(generator):
    made = {case["name"]: case for cases in generator.unsolved().values() for case in cases}
    assert made == {name: {k: v for k, v in case.items() if k != "expected"} for name, case in BY_NAME.items()}


def test_regenerating_a_sample_gives_the_numbers_of_the_files(generator):
    for case in CASES[::8]:
        assert generator.expected(case) == case["expected"], case["name"]


def test_the_gradients_of_the_generator_are_those_of_a_wider_symmetric_difference(generator):
    """The one-sided step is right: a symmetric quotient with another step rounds to the same float64."""
    mp = generator.mp
    for name in ("sigmoid/ordinary", "ipo/unequal", "discopop/ordinary", "orpo/certain", "rpo_fwd_kl/extreme"):
        case, step = BY_NAME[name], mp.mpf(10) ** -60
        for i in range(len(case["expected"]["losses"])):
            sides = []
            for sign in (1, -1):
                inputs = generator.exact(case["inputs"])
                inputs["policy_chosen_logps"][i] += sign * step
                sides.append(sum(generator.per_pair(case, inputs, [mp.mpf(1)] * len(case["expected"]["losses"]))))
            slope = (sides[0] - sides[1]) / (2 * step) / len(case["expected"]["losses"])
            assert generator.nearest(slope) == case["expected"]["grad"]["policy_chosen_logps"][i], name


# Start values.

LN2 = 0.6931471805599453
START = {  # beta = 0.1, policy equal to reference
    **dict.fromkeys(("sigmoid", "robust", "aot", "aot_pair", "sigmoid_norm", "dpop"), LN2),
    **dict.fromkeys(("hinge", "apo_zero", "apo_down"), 1.0),
    **dict.fromkeys(("nca_pair", "bco_pair"), 2 * LN2),
    "ipo": 25.0,
    "exo_pair": 2.761231,
    "sppo_hard": 50.0,
    "discopop": 0.846574,
}


@pytest.mark.parametrize("loss", START)
def test_the_start_value_is_the_published_one(loss):
    case = BY_NAME[f"{loss}/tie"]
    assert case["expected"]["losses"] == pytest.approx([START[loss]] * 3, abs=5e-7)
    assert case["start_value"] == pytest.approx(START[loss], abs=5e-7)


def test_rdpo_starts_at_the_logistic_loss_of_its_length_bonus():
    case = BY_NAME["rdpo/tie"]
    lengths = zip(case["inputs"]["chosen_lengths"], case["inputs"]["rejected_lengths"])
    assert case["expected"]["losses"] == pytest.approx([math.log1p(math.exp(-0.01 * (w - n))) for w, n in lengths])


def test_every_start_value_equals_the_loss_of_its_case():
    started = [case for case in CASES if "start_value" in case]
    assert len({case["loss_type"] for case in started}) == 20
    for case in started:
        assert case["expected"]["loss"] == pytest.approx(case["start_value"], rel=1e-14, abs=1e-16), case["name"]


def test_sigmoid_starts_at_log2_whatever_the_smoothing_and_the_divergence():
    cases = [case for case in of("sigmoid") if "/tie" in case["name"]]
    assert len(cases) == 14
    assert all(case["expected"]["losses"] == pytest.approx([LN2] * 3) for case in cases)


# losses.py.


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_agree_in_float64(loss):
    for case in of(loss):
        assert case_difference(case, *conformance.ours(case)) < 1e-9, case["name"]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_agree_in_float32(loss):
    for case in of(loss):
        got = conformance.ours(case, torch.float32)
        assert case_difference(case, *got, floor=1e-2) < 1e-5, case["name"]


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_log_probs_give_the_float32_result_of_the_same_numbers(loss):
    for case in of(loss):
        rounded = json.loads(json.dumps(case))
        rounded["inputs"] = {k: as_bfloat16(v) if "logps" in k else v for k, v in case["inputs"].items()}
        narrow, grads = conformance.ours(rounded, torch.bfloat16)
        wide, wide_grads = conformance.ours(rounded, torch.float32)
        assert narrow == wide and all(map(math.isfinite, narrow)), case["name"]
        for name, rows in wide_grads.items():
            assert conformance.difference(grads[name], rows, floor=1e-30) <= 2**-8, case["name"]


def as_bfloat16(values):
    """The bfloat16 numbers nearest to nested lists of numbers."""
    if isinstance(values[0], list):
        return [as_bfloat16(row) for row in values]
    return torch.tensor(values).to(torch.bfloat16).tolist()


def test_every_case_is_offered_and_agrees():
    results = [conformance.judge(case, "ours", conformance.ours) for case in CASES]
    assert [result for result in results if result.outcome != "agrees"] == []


# The runner itself.


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 0.7])
def test_a_wrong_or_infinite_number_counts_as_a_difference(wrong):
    def losses(case):
        per_pair, grads = conformance.ours(case)
        return [wrong, *per_pair[1:]], grads

    assert conformance.judge(BY_NAME["sigmoid/ordinary"], "x", losses).outcome == "differs"


def test_a_wrong_gradient_or_a_missing_one_counts_as_a_difference():
    case = BY_NAME["sigmoid/ordinary"]
    per_pair, grads = conformance.ours(case)
    for broken in (grads | {"policy_rejected_logps": grads["policy_chosen_logps"]}, {}):
        assert conformance.judge(case, "x", lambda _, broken=broken: (per_pair, broken)).outcome == "differs"


def run_conformance(*arguments):
    command = [sys.executable, str(TESTS / "conformance.py"), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_any_module_that_offers_losses_can_be_run(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import math\n"
        "def losses(case):\n"
        "    if set(case['params']) != {'beta', 'label_smoothing'} or case['params']['label_smoothing']:\n"
        "        raise LookupError('no such option')\n"
        "    beta, x = case['params']['beta'], case['inputs']\n"
        "    keys = [m + s + '_logps' for m in ('policy_', 'ref_') for s in ('chosen', 'rejected')]\n"
        "    z = [beta * (a - b - c + d) for a, b, c, d in zip(*(x[k] for k in keys))]\n"
        "    weight = case['loss_weights'][0]\n"
        "    slope = [-weight * beta / (1 + math.exp(v)) / len(z) for v in z]\n"
        "    loss = [weight * (math.log1p(math.exp(-abs(v))) + max(-v, 0)) for v in z]\n"
        "    return loss, {'policy_chosen_logps': slope, 'policy_rejected_logps': [-s for s in slope]}\n"
    )
    out = tmp_path / "results.json"
    found = run_conformance("--impl", "mine", "--path", tmp_path, "--only", "sigmoid", "--json", out)
    counts = Counter(row["outcome"] for row in json.loads(out.read_text()) if row["loss"] == "sigmoid")
    assert found.returncode == 1 and "raises" not in found.stdout  # token-level cases raise KeyError: they differ
    assert counts["agrees"] >= 10 and counts["absent"] >= 20


def test_the_module_that_the_readme_shows_agrees_in_all_that_it_offers(tmp_path):
    text = (TESTS / "README.md").read_text("utf-8")
    (module,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    (tmp_path / "mydpo.py").write_text(module)
    found = run_conformance("--impl", "mydpo", "--path", tmp_path)
    last = found.stdout.splitlines()[-1]
    assert found.returncode == 0 and f'"{last}"' in text
    (tmp_path / "wrong.py").write_text(module.replace("(pi_w - ref_w)", "(pi_w + ref_w)"))
    assert run_conformance("--impl", "wrong", "--path", tmp_path, "--only", "sigmoid").returncode == 1


def test_a_loss_that_no_case_has_is_one_line_and_exit_2():
    found = run_conformance("--impl", "ours", "--only", "sigmoyd")
    assert found.returncode == 2 and found.stdout.count("\n") == 1
    assert "--only sigmoyd: no case has this loss" in found.stdout and " ipo " in found.stdout


def test_what_cannot_be_imported_is_one_line_and_exit_2():
    found = run_conformance("--impl", "no_such_module")
    assert found.returncode == 2
    assert found.stdout.count("\n") == 1 and "no_such_module" in found.stdout


# TRL 1.16. Each test states one difference from the golden files, or one thing to know when comparing.


@pytest.fixture(scope="module")
def trl():
    module = pytest.importorskip("trl")
    if not module.__version__.startswith("1.16."):
        pytest.skip(f"these differences were recorded with TRL 1.16, found {module.__version__}")
    return module


def run_trl(name: str, dtype: torch.dtype = torch.float64, **changes):
    """TRL's loss, gradients and metrics on a golden case; `changes` go over its params (f_alpha_divergence_coef as the
    golden files mean it)."""
    case = BY_NAME[name]
    inputs = tensors(case, dtype)
    names = conformance.loss_names(case)
    loss, metrics = conformance.run_trl(case["params"] | changes, names, case["loss_weights"], inputs)
    return loss, inputs, metrics


def agrees_with_trl(name: str, **changes) -> bool:
    """Whether TRL with `changes` to its parameters gives the numbers of the golden case."""
    loss, inputs, _ = run_trl(name, **changes)
    return case_difference(BY_NAME[name], loss.item(), conformance.gradients(loss, inputs)) < 1e-9


@pytest.fixture(scope="module")
def trl_results(trl):
    return [conformance.judge(case, "trl", conformance.trl) for case in CASES]


def test_the_table_of_the_readme_is_what_the_runner_finds(trl_results):
    text = (TESTS / "README.md").read_text()
    for loss in LOSSES:
        counts = Counter(r.outcome for r in trl_results if r.loss == loss)
        differ = f", {counts['differs']} differ" if counts["differs"] else ""
        theirs = f"{counts['agrees']}{differ}" if counts["agrees"] or counts["differs"] else "–"
        assert f"| `{loss}` | {len(of(loss))} | {len(of(loss))} | {theirs} |" in text, loss


def test_trl_differs_from_the_golden_files_only_where_a_reason_is_known(trl_results):
    results = trl_results
    assert [r for r in results if r.reason == "not explained"] == []
    counts = Counter(r.outcome for r in results)
    assert counts["agrees"] > 200 and counts["differs"] < 70


def test_trl_ignores_label_smoothing_for_sigmoid(trl):
    plain, *_ = run_trl("sigmoid/ordinary")
    smoothed, *_ = run_trl("sigmoid/ordinary label_smoothing=0.3")
    assert plain.item() == smoothed.item()
    assert not agrees_with_trl("sigmoid/ordinary label_smoothing=0.3")


def test_trl_has_no_default_smoothing_for_exo_pair(trl):
    assert run_trl("exo_pair/ordinary")[0].item() == math.inf  # its trainer refuses 0 before coming here


def test_trl_rounds_the_smoothing_of_exo_pair_to_float32(trl):
    loss, *_ = run_trl("exo_pair/ordinary label_smoothing=0.1")
    error = abs(loss.item() / BY_NAME["exo_pair/ordinary label_smoothing=0.1"]["expected"]["loss"] - 1)
    assert 1e-9 < error < 1e-7


def test_trl_has_no_reward_shift_in_bco_pair(trl):
    assert agrees_with_trl("bco_pair/ordinary")
    assert not agrees_with_trl("bco_pair/ordinary delta=0.375")
    assert run_trl("bco_pair/ordinary")[0].item() == run_trl("bco_pair/ordinary delta=0.375")[0].item()


WEIGHTED = "sigmoid/tokens beta=0.1 label_smoothing=0.0 use_weighting=True wpo_clamp="


def test_trl_does_not_clamp_the_product_of_wpo_weights(trl):
    assert agrees_with_trl(WEIGHTED + "False")
    assert not agrees_with_trl(WEIGHTED + "True")


def test_trl_cannot_weight_sft(trl):
    with pytest.raises(RuntimeError, match="single memory location"):
        run_trl("sigmoid+sft/tokens beta=0.1 label_smoothing=0.0 sft_average=token use_weighting=True wpo_clamp=True")


def test_trl_cannot_train_hinge_with_wpo_weights(trl):
    loss, inputs, _ = run_trl("hinge/tokens beta=0.1 use_weighting=True wpo_clamp=False")
    with pytest.raises(RuntimeError, match="inplace operation"):
        conformance.gradients(loss, inputs)


def test_trl_calls_one_minus_alpha_the_coefficient_of_the_alpha_divergence(trl):
    name = "sigmoid/ordinary f_divergence_type=alpha_divergence f_alpha_divergence_coef="
    want = BY_NAME[name + "0.3"]["expected"]["loss"]
    assert run_trl(name + "0.3", torch.float32)[0].item() == pytest.approx(want, rel=1e-5)  # the adapter passes 0.7
    as_it_stands, *_ = run_trl(name + "0.3", torch.float32, f_alpha_divergence_coef=0.7)
    assert as_it_stands.item() != pytest.approx(want, rel=1e-2)


def test_trl_has_no_alpha_divergence_in_float64(trl):
    with pytest.raises(KeyError, match="float64"):
        run_trl("sigmoid/ordinary f_divergence_type=alpha_divergence f_alpha_divergence_coef=0.5")


def test_trl_does_not_hold_forward_kl(trl):
    name = "hinge/extreme f_divergence_type=forward_kl"
    assert run_trl(name)[0].item() > 1e200
    assert not math.isfinite(run_trl(name, torch.float32)[0].item())
    assert BY_NAME[name]["expected"]["loss"] < 1e35


def test_trl_discopop_is_nan_in_float32_at_large_margins(trl):
    loss, *_ = run_trl("discopop/extreme", torch.float32)
    assert math.isnan(loss.item())
    assert agrees_with_trl("discopop/extreme")


def test_trl_counts_a_token_too_many_when_truncation_removed_the_prompt(trl, monkeypatch):
    """Then the completion begins at position 0, whose token is not scored, but counted by ipo and sigmoid_norm."""
    whole = conformance.padded

    def without_prompt(inputs, model):
        logps, mask = whole(inputs, model)
        mask[:, 0] = 1
        return logps, mask

    assert agrees_with_trl("ipo/ordinary") and agrees_with_trl("sigmoid_norm/ordinary")
    monkeypatch.setattr(conformance, "padded", without_prompt)
    assert not agrees_with_trl("ipo/ordinary") and not agrees_with_trl("sigmoid_norm/ordinary")
    assert agrees_with_trl("sigmoid/ordinary")


def test_trl_divides_by_zero_in_robust_at_one_half(trl):
    assert not math.isfinite(run_trl("robust/ordinary", label_smoothing=0.5)[0].item())


def test_trl_counts_an_exact_tie_as_a_loss(trl):
    assert run_trl("sigmoid/tie")[2]["rewards/accuracies"] == 0


def test_trl018_is_not_mistaken_for_the_installed_trl(trl):
    with pytest.raises(conformance.Missing, match="found: pip install --no-deps --target DIR trl==0.18.2"):
        conformance.trl018(BY_NAME["sigmoid/ordinary"])


# A difference that is not in TRL's losses but in the models that it trains: transformers gives the input embedding of
# the pad token no gradient (nn.Embedding's padding_idx), and in many chat models that token also ends every turn.


def pad_token_gradients(directory, pad: int) -> tuple[dict, dict]:
    """(ours, transformers'): gradients of DPO's loss on two pairs, whose prompts have the token 2 in their middle."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pair = lambda *ids: types.SimpleNamespace(prompt_ids=ids[0], chosen_ids=ids[1], rejected_ids=ids[2], rejected_prompt_ids=None)
    pairs = [pair([1, 5, 2, 7], [8, 9, 2], [10, 2]), pair([1, 6, 6, 2, 4, 2], [11, 2], [12, 5, 2])]
    ours = models.load_model(directory, torch.float64)
    config = transformers.AutoConfig.from_pretrained(directory, pad_token_id=pad)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.float64)
    theirs.logits = lambda row, positions, spans: theirs(row[None], position_ids=positions[None]).logits[0]
    reference = models.load_model(directory, torch.float64)
    for model in (ours, theirs):
        textbook.dpo_loss(model, reference, pairs, beta=0.3).mean().backward()
    return tuple({name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs))


def test_transformers_gives_the_embedding_of_the_pad_token_no_gradient(tiny):
    for pad in (0, 2):  # a token that does not occur; the one that ends a turn
        ours, theirs = pad_token_gradients(tiny, pad)
        assert ours.keys() == theirs.keys()
        apart = {name: float((ours[name] - theirs[name]).norm() / ours[name].norm()) for name in ours}
        differing = {name for name in ours if apart[name] > 1e-5}  # its norms are in float32
        assert differing == (set() if pad == 0 else {"model.embed_tokens.weight"})
    one, other = (grads["model.embed_tokens.weight"] for grads in (ours, theirs))
    assert one[2].norm() > 1e-3 and other[2].norm() == 0
    rest = torch.arange(len(one)) != 2
    assert (one[rest] - other[rest]).norm() < 1e-5 * one[rest].norm()


def test_the_trainer_trains_the_embedding_of_the_pad_token(tiny, tmp_path):
    """Though config.json names it as the pad token: a run with it is the run without it, and its row moves."""
    config = read_json(tiny / "config.json")
    rows = [{"prompt": "the </s> cat", "chosen": " sees", "rejected": " runs"}, {"prompt": "a </s> dog", "chosen": " runs", "rejected": " sees"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name, more in (("plain", {}), ("pad", {"pad_token_id": 2})):
        shutil.copytree(tiny, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | more))
        c = dpo.DPOConfig(
            model_name_or_path=str(tmp_path / name), dataset_name=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / f"{name}-out"),
            cache_dir=str(tmp_path / "cache"), use_cpu=True, bf16=False, learning_rate=1e-2, max_steps=2, save_strategy="no")
        trainer = dpo.DPOTrainer(args=c)
        trainer.train()
        found.append(trainer.model.get_parameter("model.embed_tokens.weight").detach())
    before = models.load_model(tiny).get_parameter("model.embed_tokens.weight").detach()
    assert torch.equal(found[0], found[1]) and (found[0][2] - before[2]).norm() > 1e-3

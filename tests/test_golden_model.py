"""Golden checkpoints, batches and trajectory: reproducible, and met by data.py, model.py and dpo.py."""

import importlib.util
import json
import math

import numpy as np
import pytest
import textbook
import torch
from conftest import ROOT, read_metrics
from safetensors.torch import load_file
from test_golden import SCHEMA, schema_errors

import data
import dpo
import model as models

GOLDEN = ROOT / "tests" / "golden"
read = lambda name: json.loads((GOLDEN / name).read_text())
LOGPS = {case["name"]: case for case in read("logps.json")["cases"]}
COLLATOR = {case["name"]: case for case in read("collator.json")["cases"]}
TRAJECTORY = read("trajectory.json")


@pytest.mark.parametrize("name", ["logps", "collator", "trajectory"])
def test_the_files_follow_the_schema(name):
    assert schema_errors(read(f"{name}.json"), SCHEMA["$defs"][f"{name}_file"], SCHEMA["$defs"], name) == []


def pairs_of(case: dict) -> list[data.Pair]:
    ids = lambda pair, key: None if key not in pair else np.asarray(pair[key], np.int32)
    keys = ("prompt_ids", "chosen_ids", "rejected_ids", "rejected_prompt_ids")
    return [data.Pair(*(ids(pair, key) for key in keys)) for pair in case["pairs"]]


def stream_of(stream: dict) -> tuple[torch.Tensor, ...]:
    """What a Decoder reads, from the file's numbers alone."""
    ids, positions, spans, score_index, targets = (
        torch.tensor(stream[key]) for key in ("input_ids", "position_ids", "spans", "score_index", "targets"))
    return ids, positions, spans.int(), score_index, targets


# The generator. It writes numpy's float64; another machine may sum in another order.


@pytest.fixture(scope="module")
def generator():
    pytest.importorskip("mpmath")
    spec = importlib.util.spec_from_file_location("make_model_golden", GOLDEN / "make_model_golden.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(GOLDEN))
        spec.loader.exec_module(module)
    return module


def close(got, expected, tolerance: float) -> bool:
    """Whether nested lists and objects agree, numbers within tolerance x max(1, |expected|)."""
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(close(got[k], v, tolerance) for k, v in expected.items())
    if isinstance(expected, list):
        return len(got) == len(expected) and all(close(a, b, tolerance) for a, b in zip(got, expected))
    if isinstance(expected, str):
        return got == expected
    return abs(got - expected) <= tolerance * max(1, abs(expected))


@pytest.fixture(scope="module")
def weights(generator):
    return {name: generator.draw_weights(c, seed=len(name)) for name, c in generator.CONFIGS.items()}


@pytest.mark.parametrize("name", LOGPS)
def test_the_generator_makes_the_checkpoints_and_log_probs_of_the_files(generator, weights, name, monkeypatch):
    stored = load_file(GOLDEN / "models" / name / "model.safetensors")
    assert stored.keys() == weights[name].keys()
    assert all(torch.equal(stored[n].double(), torch.from_numpy(w)) for n, w in weights[name].items())
    assert read(f"models/{name}/config.json") == generator.CONFIGS[name]
    monkeypatch.setitem(generator.GRADIENTS, name, generator.GRADIENTS[name][-1:])
    made, case = generator.logps_case(name, weights[name], generator.CONFIGS[name]), LOGPS[name]
    expected = case["expected"] | {"gradients": case["expected"]["gradients"][-1:]}
    assert close(made, case | {"expected": expected}, 1e-12)


def test_the_generator_makes_the_batches_and_the_trajectory_of_the_files(generator, weights):
    assert json.loads(json.dumps(list(generator.collator_cases()))) == list(COLLATOR.values())
    made = generator.trajectory(weights["llama"], generator.CONFIGS["llama"])
    assert close(made | {"format": 1}, TRAJECTORY, 1e-11)


def test_the_backward_pass_of_the_generator_equals_complex_steps(generator, weights):
    assert generator.backward_error(weights["llama"], generator.CONFIGS["llama"]) < 1e-12


@pytest.mark.parametrize("name", LOGPS)
def test_no_rotary_value_depends_on_how_a_sine_is_rounded(generator, name):
    c = generator.CONFIGS[name]
    assert generator.largest_rounding(c) < 0.38
    config = models.read_config(read(f"models/{name}/config.json"))
    tables = models.rotary_tables(config.ropes, torch.arange(generator.POSITIONS), torch.float64)["full_attention"]
    for ours, theirs in zip(tables, generator.rotary_tables(c, generator.POSITIONS)):
        assert np.array_equal(ours.numpy(), theirs)


def test_the_cases_are_within_the_positions_that_were_checked(generator):
    longest = [max(map(sum, case["padded"]["attention_mask"])) for case in LOGPS.values()]
    longest += [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in TRAJECTORY["rows"]]
    assert max(longest) == generator.POSITIONS


# Batches.


@pytest.mark.parametrize("name", COLLATOR)
def test_the_collator_makes_the_golden_stream(name):
    case = COLLATOR[name]
    batch = data.collate(pairs_of(case), share_prefix=case["share_prefix"])
    for key, expected in case["expected"]["stream"].items():
        got = getattr(batch, key)
        assert (got.tolist() if isinstance(got, torch.Tensor) else got) == expected, key


@pytest.mark.parametrize("name", COLLATOR)
def test_the_textbook_pads_as_the_golden_files_do(name):
    ids, mask = textbook.padded_batch(pairs_of(COLLATOR[name]))
    expected = COLLATOR[name]["expected"]["padded"]
    assert ids.tolist() == expected["input_ids"] and mask.tolist() == expected["completion_mask"]


def test_the_collator_docstring_shows_the_golden_example():
    stream = COLLATOR["two pairs"]["expected"]["stream"]
    spans = " ".join(str(tuple(span)) for span in stream["spans"])
    assert spans in data.Batch.__doc__
    assert " ".join(map(str, stream["input_ids"])) in data.Batch.__doc__.replace("| ", "").replace("  ", " ")


# Log-probs.


@pytest.fixture(scope="module", params=list(LOGPS))
def golden(request):
    """A case and its model in float64."""
    case = LOGPS[request.param]
    return case, models.load_model(GOLDEN / case["model"], torch.float64)


def rows_of(values: torch.Tensor, case: dict) -> list[list[float]]:
    """(N,) as one list per completion."""
    return [row.tolist() for row in values.split([n for pair in case["stream"]["lengths"] for n in pair])]


def test_the_collator_makes_the_stream_of_the_log_probs(golden):
    case, _ = golden
    batch = data.collate(pairs_of(case))
    got = stream_of({key: getattr(batch, key).tolist() for key in case["stream"] if key != "num_tokens"})
    assert all(torch.equal(a, b) for a, b in zip(got, stream_of(case["stream"])))


@pytest.mark.parametrize("shared", [True, False])
def test_stream_log_probs_equal_the_golden_ones(golden, shared):
    case, model = golden
    stream = data.collate(pairs_of(case), share_prefix=shared)
    out = model(stream)
    for ours, theirs in (("logps", "token_logps"), *((n, n) for n in ("entropy", "log_sum_sq_probs", "mean_logits"))):
        assert close(rows_of(getattr(out, ours), case), case["expected"][theirs], 1e-10), theirs


def test_padded_log_probs_equal_the_golden_ones(golden):
    case, model = golden
    padded = {key: torch.tensor(rows) for key, rows in case["padded"].items()}
    sums = textbook.completion_logps(model, padded["input_ids"], padded["completion_mask"])
    expected = [math.fsum(row) for row in case["expected"]["token_logps"]]
    assert torch.stack(sums.chunk(2), 1).flatten().tolist() == pytest.approx(expected, rel=1e-10)


def test_gradients_equal_the_golden_ones(golden):
    case, model = golden
    logps = model(models.Stream(*stream_of(case["stream"]))).logps
    named = dict(model.named_parameters())
    for expected in case["expected"]["gradients"]:
        (grad,) = torch.autograd.grad(logps.sum(), named[expected["parameter"]], retain_graph=True)
        assert close(grad.flatten().tolist(), expected["values"], 1e-10), expected["parameter"]
        assert max(map(abs, expected["values"])) > 0.1


def test_transformers_agrees_with_the_golden_log_probs(golden):
    """It norms and takes softmaxes in float32 whatever the weights are. Its fused attention has no soft-cap, so Gemma 2
    needs attn_implementation="eager"."""
    transformers = pytest.importorskip("transformers")
    case, _ = golden
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / case["model"], dtype=torch.float64, attn_implementation="eager").eval()
    for i, pair in enumerate(case["pairs"]):
        for side, key in enumerate(("chosen_ids", "rejected_ids")):
            prompt = pair["prompt_ids"] if side == 0 else pair.get("rejected_prompt_ids", pair["prompt_ids"])
            ids = torch.tensor([prompt + pair[key]])
            with torch.no_grad():
                logps = peer(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            assert close(logps[max(len(prompt) - 1, 0) :].tolist(), case["expected"]["token_logps"][2 * i + side], 2e-6)


# Training.


def test_the_trajectory_is_met_step_by_step(tmp_path):
    """Through the command line's own entry, from text rows to the saved weights."""
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in TRAJECTORY["rows"]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    h = dict(TRAJECTORY["hyper_parameters"])
    flags = {"max_steps": h.pop("steps"), "per_device_train_batch_size": h.pop("pairs_per_step"), **h}
    flags |= {"model_name_or_path": GOLDEN / TRAJECTORY["model"], "dataset_name": tmp_path / "rows.jsonl"}
    flags |= {"output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache", "save_strategy": "no"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--dtype", "float64", "--no_bf16", "--use_cpu", "--no_shuffle_dataset", "--disable_tqdm"]
    assert dpo.main([*words, "--logging_steps", "1"]) == 0
    steps = read_metrics(tmp_path / "out")
    assert len(steps) == 20
    for step, expected in zip(steps, TRAJECTORY["steps"]):
        assert close({key: step[key] for key in expected}, expected, 1e-8), expected["step"]
    state = load_file(tmp_path / "out" / "model.safetensors")
    final = [{"parameter": n, "sum": float(state[n].sum()), "sum_of_squares": float(state[n].square().sum())}
             for n in (entry["parameter"] for entry in TRAJECTORY["final"])]
    assert len(state) == len(final) and close(final, TRAJECTORY["final"], 1e-8)


def test_the_readme_gives_the_hyper_parameters_of_the_trajectory():
    text, h = (ROOT / "tests" / "README.md").read_text(), TRAJECTORY["hyper_parameters"]
    command = text[text.index("python dpo.py --model_name_or_path tests/golden") :].split("\n\n")[0]
    config = dpo.parse_config(command.replace("\\\n", " ").split()[2:])
    assert (config.max_steps, config.per_device_train_batch_size) == (h["steps"], h["pairs_per_step"])
    assert all(getattr(config, name) == h[name] for name in h.keys() - {"steps", "pairs_per_step"})
    assert not config.shuffle_dataset and config.dtype == "float64" and config.bf16 is False


def test_the_trajectory_clips_some_steps_and_ends_an_epoch_with_a_smaller_batch():
    h, norms = TRAJECTORY["hyper_parameters"], [step["grad_norm"] for step in TRAJECTORY["steps"]]
    clipped = sum(norm > h["max_grad_norm"] for norm in norms)
    assert 3 < clipped < 17 and len(TRAJECTORY["rows"]) % h["pairs_per_step"] == 2
    assert TRAJECTORY["steps"][0]["loss"] == pytest.approx(math.log(2), abs=1e-15)

"""What is advised fits, is the least that does, and comes in the order of what it changes."""

import re
import resource

import pytest
import torch
from test_plan import REAL, config_of

import dpo
import model as models
from extras import plan
from extras.run import advice, forecast
from extras.run.advice import applied, lines_of, needed, options
from extras.run.forecast import Run, memory
from parts import faults

GIB = 2**30
ORDER = ["--max_tokens_per_forward", "--precompute_ref_log_probs", "--gradient_checkpointing selective", "--gradient_checkpointing",
         "--activation_offloading", "--fsdp", "--context_parallel_size", "--optim adamw_8bit", "--dtype bfloat16",
         "--use_peft --lora_target_modules all-linear", "--load_in_4bit"]


def real(name):
    return models.read_config(REAL[name][0] | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5})


def rank_of(option) -> int:
    return max(i for i, name in enumerate(ORDER) if option.flags.startswith(name))


RUNS = {"0.5B": Run(8192, 4096, bf16=True, device="cuda", live_ref=True), "7B": Run(16384, 8192, bf16=True, device="cuda", world=8)}


@pytest.mark.parametrize("name,have", [("0.5B", 6), ("0.5B", 8), ("0.5B", 14), ("7B", 24), ("7B", 80)])
def test_what_is_advised_fits_and_no_part_of_it_can_be_left_out(name, have):
    config, run = real(name), RUNS[name]
    assert memory(config, run)["total"] > have * GIB
    found, fits = needed(config, run, 2048, have * GIB)
    assert fits and memory(config, found[-1].run)["total"] <= have * GIB
    ranks = [rank_of(option) for option in found]
    assert ranks == sorted(set(ranks))
    assert all(memory(config, a.run)["total"] > memory(config, b.run)["total"] for a, b in zip(found, found[1:]))
    makers = {maker(run).flags: maker for maker in options(config, run, 2048, True)}
    chosen = [makers[option.flags] for option in found]
    for without in chosen:
        fewer = [maker for maker in chosen if maker is not without]
        assert not fewer or memory(config, applied(fewer, run)[-1].run)["total"] > have * GIB


def test_what_changes_no_number_is_asked_for_first():
    """A 7B model in 80 GiB on eight ranks needs FSDP and smaller forwards, and no other number changes."""
    found, fits = needed(real("7B"), RUNS["7B"], 2048, 80 * GIB)
    assert fits and all("no number changes" in option.changes for option in found)
    assert "--fsdp" in [option.flags for option in found]


def test_on_one_gpu_of_24_gib_a_7b_model_ends_at_qlora_and_a_half_billion_does_not():
    alone = RUNS["7B"]._replace(world=1)
    found, fits = needed(real("7B"), alone, 2048, 0.9 * 24 * GIB)
    assert fits and found[-1].flags in ("--load_in_4bit", "--use_peft --lora_target_modules all-linear")
    found, fits = needed(real("0.5B"), RUNS["0.5B"], 2048, 0.9 * 24 * GIB)
    assert fits and all("no number changes" in option.changes for option in found)


def test_a_run_that_fits_is_told_so_and_one_that_never_fits_too():
    config, run = real("0.5B"), RUNS["0.5B"]
    assert lines_of(config, run, 2048, 200 * GIB) == ["a rank has 200.00 GiB: enough"]
    assert "still too much" in lines_of(real("7B"), RUNS["7B"]._replace(world=1), 2048, GIB)[-1]


def test_what_is_on_already_or_cannot_be_is_not_advised():
    config = real("7B")
    names = lambda run, may=True: [maker(run).flags for maker in options(config, run, 4096, may)]
    run = Run(4096, 2048, device="cpu", checkpointing=True, live_ref=True)
    assert names(run, may=False)[0] == "--optim adamw_8bit"  # one rank, nothing left to checkpoint, a reference that moves
    assert names(run)[0] == "--precompute_ref_log_probs"
    assert names(run._replace(rank=8, four_bit="plain", live_ref=False)) == []
    assert not any("fsdp" in name for name in names(run._replace(world=4, fsdp=True)))
    odd = config_of(num_attention_heads=3, num_key_value_heads=1)
    assert not any("context" in maker(run).flags for maker in options(odd, run._replace(world=4), 4096, True))


def test_a_dry_run_with_what_a_dry_run_advised_fits(tiny, pairs_file, tmp_path, capsys, monkeypatch):
    command = ["--model_name_or_path", str(tiny), "--dataset_name", str(pairs_file), "--output_dir", str(tmp_path / "o"),
               "--cache_dir", str(tmp_path / "c"), "--use_cpu", "--dry_run", "--no_precompute_ref_log_probs", "--no_bf16"]
    sizes = lambda said: [float(n) for n in re.findall(r"at most ([\d.]+) MiB", said)]
    monkeypatch.setattr(advice, "device_bytes", lambda device: 1e12)
    assert dpo.main(command) == 0
    said = capsys.readouterr().out
    assert "a rank has 931.32 GiB: enough" in said
    total = sizes(said)[0] * 2**20
    for share in (0.9, 0.4):
        monkeypatch.setattr(advice, "device_bytes", lambda device, share=share: share * total / advice.USABLE)
        assert dpo.main(command) == 0
        said = capsys.readouterr().out
        found = re.findall(r"^  (--.*): ([\d.]+) MiB \(", said, re.MULTILINE)
        assert found and "too little for" in said and "still too much" not in said, said
        more = [word for option, _ in found for word in option.split()]
        assert dpo.main([*command, *more]) == 0
        again = capsys.readouterr().out
        assert "enough" in again, again
        assert sizes(again)[0] <= 1.02 * float(found[-1][1])
    print(more)


def test_after_an_out_of_memory_error_the_same_is_advised(tiny, pairs_file, tmp_path, capsys, monkeypatch):
    def fails(model, batch, c):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(dpo, "score", fails)
    assert dpo.main(["--model_name_or_path", str(tiny), "--dataset_name", str(pairs_file), "--output_dir", str(tmp_path / "o"),
                     "--cache_dir", str(tmp_path / "c"), "--use_cpu", "--no_bf16"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"out of memory at step 1 .* were predicted. What helps, least change first, with what is predicted then: "
                     r"--max_tokens_per_forward \d+ \([\d.]+ MiB, no number changes\)", said), said


def test_without_the_rooms_of_extras_the_flags_are_named(tiny, pairs_file, tmp_path):
    trainer = dpo.DPOTrainer(args=dpo.DPOConfig(str(tmp_path / "o"), model_name_or_path=str(tiny), dataset_name=str(pairs_file),
                                                cache_dir=str(tmp_path / "c"), use_cpu=True))
    said = faults.explained(MemoryError("no"), trainer)
    assert "These help and change no result: --max_tokens_per_forward" in said and "--gradient_checkpointing" in said


def test_a_cpus_memory_is_what_the_process_may_use(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    alone = advice.device_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert advice.device_bytes(torch.device("cpu")) == pytest.approx(alone / 4)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (12345, 67890))
    assert advice.device_bytes(torch.device("cpu")) == 12345


def test_the_plan_of_a_configuration_says_what_to_turn_on(tiny, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan", str(tiny), "--world", "1", "--memory", "0.004"])
    plan.main()
    said = capsys.readouterr().out
    assert "what helps, least change first" in said and "--gradient_checkpointing" in said


def test_offloading_leaves_two_blocks_on_the_device():
    config, run = real("7B"), Run(4096, 2048, bf16=True, device="cuda", checkpointing="selective")
    saved = forecast.block_activations(config, run, forecast.count(config, run)["block"])
    for checkpointing, of_a_block in (("selective", saved), (True, 4 * config.hidden_size * run.tokens)):
        run = run._replace(checkpointing=checkpointing)
        less = memory(config, run)["activations"] - memory(config, run._replace(offloading=True))["activations"]
        assert less == (config.num_hidden_layers - 2) * of_a_block

"""Vision-language models against transformers: names, log-probs, gradients, shared prefixes."""

import json
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from vision_tiny import FAMILIES, IMAGE, make_checkpoint, random_pictures, theirs_forward

import model as models
from extras.decoder.generate import Sampling, complete
from extras.decoder.in_stream import Pictures, find_runs, stream_axes
from extras.models.opening import build, load_model
from parts.activations import keep_all
from parts.names import file_name

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(family, transformers' model, ours from its files)."""
    directory = tmp_path_factory.mktemp(request.param)
    theirs = make_checkpoint(request.param, directory)
    return request.param, theirs, load_model(directory), directory


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma4")
    return make_checkpoint("gemma4", directory), load_model(directory)


@pytest.fixture(scope="module")
def unified(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unified")
    return make_checkpoint("gemma4_unified", directory), load_model(directory)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma")
    return make_checkpoint("gemma3", directory), load_model(directory)


def stream_of(sequences, image_pixels, grids, family):
    """Sequences as spans without prefix, with their pictures."""
    ids = torch.cat([torch.tensor(s) for s in sequences])
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    ends = torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()
    spans = torch.tensor([[b, e, 0, 0] for b, e in zip([0, *ends], ends)], dtype=torch.int32)
    place = (ids == IMAGE).nonzero().flatten()
    axes = None
    if "qwen" in family:
        by_start = {int(s[0]): [tuple(g) for g in grids[i : i + 1].tolist()] for i, s in enumerate(spans)}
        axes = torch.from_numpy(stream_axes(ids.numpy(), spans.numpy(), IMAGE, by_start, 2))
    runs = torch.from_numpy(find_runs(ids.numpy(), IMAGE))
    return ids, positions, spans, Pictures(image_pixels, grids, place, torch.arange(len(place)), axes, runs)


def test_logits_equal_transformers(pair):
    family, theirs, ours, _ = pair
    sequences, pixels, grids = random_pictures(family)
    expected = theirs_forward(theirs, family, sequences, pixels, grids)
    ids, positions, spans, pictures = stream_of(sequences, pixels, grids, family)
    hidden, _ = ours.model(models.Stream(ids, positions, spans, pictures=pictures))
    logits = sum(x @ w.T for x, w in ours.head_terms(hidden))
    expected = torch.cat([expected[i, : len(s)] for i, s in enumerate(sequences)])
    # the gated delta rule rounds more; tests/test_qwen3_vl.py holds it to float64
    assert (logits - expected).abs().max() < (1e-5 if ours.config.mixer is None else 1e-4)
    assert logits.std() > 1e-3


def test_gradients_equal_transformers(pair):
    family, theirs, ours, _ = pair
    sequences, pixels, grids = random_pictures(family)
    weight = torch.randn(200, generator=torch.Generator().manual_seed(1))
    expected = theirs_forward(theirs, family, sequences, pixels, grids)
    theirs.zero_grad()
    (torch.cat([expected[i, : len(s)] for i, s in enumerate(sequences)]).log_softmax(-1) * weight).sum().backward()
    ids, positions, spans, pictures = stream_of(sequences, pixels, grids, family)
    ours.zero_grad()
    hidden, _ = ours.model(models.Stream(ids, positions, spans, pictures=pictures))
    (sum(x @ w.T for x, w in ours.head_terms(hidden)).log_softmax(-1) * weight).sum().backward()
    got = {file_name(n, ours.config): p.grad for n, p in ours.named_parameters()}
    seen = 0
    for name, p in theirs.named_parameters():
        grad = got.get(name)
        if p.grad is None:
            assert grad is None or not grad.any(), name
            continue
        seen += 1
        if name.endswith("k_proj.bias") and "language_model" not in name:  # 0: the same for all of a query's scores
            assert max(grad.norm(), p.grad.norm()) < 1e-5, name
            continue
        assert (grad - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6, name
    assert seen > 40


def prompts_of(family):
    """The two sequences, each with the pictures of a stream of its own."""
    sequences, pixels, grids = random_pictures(family)
    each = pixels.split(grids.prod(1).tolist()) if len(grids) else pixels.split(1)
    pictures = [stream_of([s], own, grids[i : i + 1], family)[-1] for i, (s, own) in enumerate(zip(sequences, each))]
    return sequences, pixels, grids, pictures


@torch.no_grad()
def test_greedy_answers_to_images_equal_transformers(pair):
    """Theirs reads the whole sequence again for each token; ours goes on from a cache, alone and in company."""
    family, theirs, ours, _ = pair
    sequences, pixels, grids, pictures = prompts_of(family)
    expected = [[], []]
    for _ in range(12):
        logits = theirs_forward(theirs, family, [s + w for s, w in zip(sequences, expected)], pixels, grids)
        for i, (s, w) in enumerate(zip(sequences, expected)):
            w.append(int(logits[i, len(s) + len(w) - 1].argmax()))
    assert IMAGE not in expected[0] + expected[1]
    greedy = Sampling(temperature=0, max_new_tokens=12)
    assert complete(ours, sequences, greedy, pictures=pictures) == expected
    assert complete(ours, sequences[1:], greedy, pictures=pictures[1:]) == expected[1:]
    text = [3, 9, 20, 31]
    mixed = complete(ours, [sequences[0], text], greedy, pictures=[pictures[0], None])
    assert mixed == [expected[0], *complete(ours, [text], greedy)]
    assert complete(ours, sequences, greedy) != expected  # the images count


@torch.no_grad()
def test_samples_of_a_prompt_with_images_share_it(pair):
    """Their draws are those of the same prompt, read once for each sample, in another call."""
    family, _, ours, _ = pair
    sequences, _, _, pictures = prompts_of(family)
    warm = Sampling(temperature=1.0, max_new_tokens=6, seed=3)
    both = complete(ours, sequences, warm, samples=2, pictures=pictures)
    alone = [complete(ours, [sequences[i // 2]], warm, first=i, pictures=[pictures[i // 2]])[0] for i in range(4)]
    assert both == alone and both[0] != both[1]


class Blocking(TorchDispatchMode):
    """Notes the copies from the CPU for which the host would wait: in place of a GPU, the device "meta"."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = torch.device(kwargs.get("device") or args[0].device) if func is torch.ops.aten._to_copy.default else None
        if there is not None and there.type != args[0].device.type:
            self.found += [] if kwargs.get("non_blocking") else [tuple(args[0].shape)]
        return func(*args, **kwargs)


def test_the_host_waits_for_no_copy_of_what_a_tower_reads(pair, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **named: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    family, _, ours, _ = pair
    sequences, pixels, grids = random_pictures(family)
    vision = deepcopy(ours.model.vision).to("meta")
    *_, pictures = stream_of(sequences, pixels, grids, family)
    with Blocking() as blocking:
        pictures = pictures.to("meta", non_blocking=True)
        features, _ = vision.encode(pictures.pixels, pictures.grids)
        vision(torch.zeros(sum(map(len, sequences)), 32, device="meta"), {}, pictures, keep_all, None)
    assert features.device.type == "meta" and blocking.found == []


def test_saved_checkpoints_have_the_files_names_and_load_in_transformers(pair, tmp_path):
    family, theirs, ours, directory = pair
    models.save_model(ours, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as mine:
        with safe_open(directory / "model.safetensors", "pt") as original:
            assert set(mine.keys()) == set(original.keys())
            assert all(torch.equal(mine.get_tensor(n), original.get_tensor(n)) for n in mine.keys())
    again = type(theirs).from_pretrained(tmp_path)
    state = theirs.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


def test_the_newer_prefixes_load_too(pair, tmp_path):
    """What transformers calls its modules; files of either time hold one or the other."""
    family, theirs, ours, directory = pair
    tied = ours.config.tie_word_embeddings
    state = {n: p.contiguous() for n, p in theirs.state_dict().items() if not (tied and n == "lm_head.weight")}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    again = load_model(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("sequence", [
    [3, *[IMAGE] * 4, 5, *[IMAGE] * 4, 6, 7], [*[IMAGE] * 4, 5, 6], [3, *[IMAGE] * 8, 4, *[IMAGE] * 4]], ids=str)
def test_tokens_of_an_image_see_each_other_within_the_window_before_them(gemma, sequence):
    """Images side by side are as one, in transformers too; the window is 3, an image 4 tokens or 8."""
    theirs, ours = gemma
    count = sequence.count(IMAGE) // 4
    pixels = torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    expected = theirs_forward(theirs, "gemma3", [sequence], pixels, None)[0]
    ids, positions, spans, pictures = stream_of([sequence], pixels, torch.zeros(0, 2).long(), "gemma3")
    both = lambda pictures: ours.model(models.Stream(ids, positions, spans, pictures=pictures))[0] @ ours.lm_head.weight.T
    assert (both(pictures) - expected).abs().max() < 1e-5
    one_way = pictures._replace(runs=torch.zeros(0, 2).long())
    assert (both(one_way) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gemma", "gemma4", "unified"])
def test_gemmas_greedy_answers_to_text_equal_transformers(request, family):
    theirs, ours = request.getfixturevalue(family)
    prompt = [3, 9, 20, 31, 7]
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt):]
    assert complete(ours, [prompt], Sampling(temperature=0, max_new_tokens=30))[0] == expected.tolist()


@pytest.mark.parametrize("text, parameters", [
    (dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34), 4_300_079_472),
    (dict(hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8),
     12_187_325_040)], ids=["4b", "12b"])
def test_the_published_gemmas_have_as_many_parameters_as_the_hub_says(text, parameters):
    """Their config.json as published says no more; test_wrapped.py has the 27B and its names."""
    tower = dict(hidden_size=1152, image_size=896, intermediate_size=4304, model_type="siglip_vision_model",
                 num_attention_heads=16, num_hidden_layers=27, patch_size=14, vision_use_head=False)
    text |= dict(model_type="gemma3_text", rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024)
    raw = dict(model_type="gemma3", boi_token_index=255999, eoi_token_index=256000, image_token_index=262144,
               eos_token_id=[1, 106], initializer_range=0.02, mm_tokens_per_image=256, text_config=text, vision_config=tower)
    config = models.read_config(raw)
    with torch.device("meta"):
        model = build(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_siglips_pooling_head_is_carried(gemma, tmp_path):
    """Files of Gemma 3 lack it, unless someone saved a tower with one: nothing reads it."""
    theirs, ours = gemma
    directory = tmp_path / "with"
    state = {n: p.contiguous() for n, p in theirs.state_dict().items() if n != "lm_head.weight"}
    head = {"model.vision_tower.head.probe": torch.randn(1, 1, 24), "model.vision_tower.head.mlp.fc1.bias": torch.randn(48).half()}
    directory.mkdir()
    save_file(state | head, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(ours.raw_config))
    models.save_model(load_model(directory), tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in head.items())


def test_images_of_another_number_of_tokens_are_refused():
    raw = {"model_type": "gemma3", "vision_config": {"image_size": 28, "patch_size": 7}, "text_config": {}}
    for tokens in (3, 9):
        with pytest.raises(ValueError, match=f"mm_tokens_per_image = {tokens}: 4 x 4 patches are not pooled"):
            models.read_config(raw | {"mm_tokens_per_image": tokens})


def test_an_unknown_vision_family_is_refused_by_name():
    with pytest.raises(ValueError, match="paligemma"):
        models.read_config({"model_type": "paligemma", "vision_config": {}, "text_config": {}})


def test_a_key_that_may_change_the_numbers_is_refused():
    raw = {"model_type": "llava", "text_config": {"model_type": "llama"},
           "vision_config": {"model_type": "clip_vision_model", "strange_feature": 3}}
    with pytest.raises(ValueError, match="strange_feature"):
        models.read_config(raw)


def test_a_shared_prefix_with_pictures_equals_two_sequences_in_float64(pair):
    """Log-probs and gradients of prompt chosen rejected, the picture encoded once, against two whole sequences."""
    family, _, _, directory = pair
    ours = load_model(directory, torch.float64)
    sequences, pixels, grids = random_pictures(family)
    prompt, pixels, grids = sequences[0], pixels, grids
    tiles = pixels[:1]
    if len(grids):
        tiles, grids = pixels[: int(grids[0].prod())], grids[:1]
    chosen, rejected = [5, 6, 7, 8], [9, 10, 11]
    p, outs = len(prompt), []
    layouts = [([prompt + chosen + rejected], [[0, p, 0, 0], [p, p + 4, 0, p], [p + 4, p + 7, 0, p]],
                [*range(p + 4), *range(p, p + 3)], [p - 1, *range(p, p + 3), p - 1, p + 4, p + 5], 1),
               ([prompt + chosen, prompt + rejected], [[0, p + 4, 0, 0], [p + 4, 2 * p + 7, 0, 0]],
                [*range(p + 4), *range(p + 3)], [*range(p - 1, p + 3), *range(2 * p + 3, 2 * p + 6)], 2)]
    for parts, spans, positions, score, times in layouts:
        ids, spans = torch.tensor([t for part in parts for t in part]), torch.tensor(spans, dtype=torch.int32)
        place = (ids == IMAGE).nonzero().flatten()
        source = torch.arange(len(place) // times).repeat(times)
        axes = None
        if "qwen" in family:
            starts = {int(s[0]): [tuple(grids[0].tolist())] for s in spans if s[2] == s[3]}
            axes = torch.from_numpy(stream_axes(ids.numpy(), spans.numpy(), IMAGE, starts, 2))
        runs = torch.from_numpy(find_runs(ids.numpy(), IMAGE))
        pictures = Pictures(tiles.double(), grids, place, source, axes, runs)
        out = ours(models.Stream(
            ids, torch.tensor(positions), spans, torch.tensor(score), torch.tensor(chosen + rejected), pictures))
        ours.zero_grad()
        (out.logps * torch.linspace(-1, 1, 7, dtype=torch.float64)).sum().backward()
        outs.append((out.logps.detach(), {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}))
    (logps, grads), (other, other_grads) = outs
    assert (logps - other).abs().max() < 1e-10
    assert grads.keys() == other_grads.keys()
    assert max((grads[n] - other_grads[n]).abs().max() for n in grads) < 1e-10
    learnt = 8 if family == "gemma4_unified" else 10
    assert sum("vision.tower" in n and bool(g.any()) for n, g in grads.items()) > learnt

"""Pictures of rows: pixels and token ids against transformers' processors, row formats, refusals."""

import base64
import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from vision_tiny import FAMILIES, IMAGE_TOKENS, PREPROCESSORS, QWEN3, make_tokenizer

import data
from parts.rows import DataError, DroppedPair

pytest.importorskip("PIL")
from PIL import Image  # noqa: E402

from extras.rows import pictures  # noqa: E402

THEIRS = {"llava": "CLIPImageProcessorPil", "idefics3": "Idefics3ImageProcessorPil", "smolvlm": "SmolVLMImageProcessorPil",
          "gemma3": "Gemma3ImageProcessorPil", "gemma4": "Gemma4ImageProcessorPil",
          "gemma4_unified": "Gemma4ImageProcessorPil",  # its own needs torchvision: test_pixels... puts the squares together
          **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", *QWEN3), "Qwen2VLImageProcessorPil")}
SIZES = [(30, 20), (20, 30), (28, 28), (29, 57), (100, 41), (8, 8), (150, 149), (61, 200)]


def picture(width: int, height: int, seed: int = 0):
    """Random colours, smooth enough that resizing means something."""
    small = np.random.default_rng(seed).integers(0, 256, (max(2, height // 4), max(2, width // 4), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), 2)


def saved(path, image=None, **options):
    (image or picture(40, 30)).save(path, **options)
    return str(path)


def encoded(image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def load_tokenizer(family, directory):
    make_tokenizer(family, directory)
    return pictures.open_tokenizer(directory)


def conversation(row: dict, question="What is it?") -> dict:
    return {"prompt": [{"role": "user", "content": question}], "chosen": [{"role": "assistant", "content": "A cat."}],
            "rejected": [{"role": "assistant", "content": "A dog."}], **row}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_equal_transformers(family, size, tmp_path):
    transformers = pytest.importorskip("transformers")
    processor = load_tokenizer(family, tmp_path).pictures
    theirs = getattr(transformers, THEIRS[family])(**{k: v for k, v in PREPROCESSORS[family].items() if "type" not in k})
    expected = theirs(picture(*size), return_tensors="np")["pixel_values"]
    expected = expected[0] if family in ("idefics3", "smolvlm", "gemma4", "gemma4_unified") else expected
    ours = pictures.preprocess(picture(*size), processor)
    if family == "gemma4_unified":  # k x k patches, put together as they lie in the image
        rows, columns = pictures.grid(pictures.RowImage("", "", *size), processor)
        patches = expected[: 4 * rows * columns].reshape(rows, 2, columns, 2, 4, 4, 3)
        expected = patches.transpose(0, 2, 1, 4, 3, 5, 6).reshape(rows * columns, -1)
    if family == "gemma4":  # theirs are padded
        assert not expected[len(ours):].any()
        expected = expected[: len(ours)]
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 1e-3
    assert ours.std() > 0.1


@pytest.mark.parametrize("settings", [
    dict(image_processor_type="SiglipImageProcessor", size={"height": 28, "width": 28}),
    dict(image_processor_type="LlavaImageProcessor", do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    dict(image_processor_type="CLIPImageProcessorFast", size={"shortest_edge": 20}, crop_size={"height": 29, "width": 27}),
    dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": 28}, do_normalize=False, crop_size={"height": 28, "width": 28}),
    dict(image_processor_type="Idefics3ImageProcessor", size={"longest_edge": 84}, max_image_size={"longest_edge": 28},
         do_image_splitting=False),
    dict(image_processor_type="SmolVLMImageProcessor"), dict(image_processor_type="Qwen2VLImageProcessor"),
    dict(image_processor_type="Qwen2VLImageProcessorFast", size={"longest_edge": 16777216, "shortest_edge": 65536}, patch_size=16,
         temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3),  # Qwen3-VL's, as published
    dict(image_processor_type="CLIPImageProcessor"), dict(image_processor_type="Gemma3ImageProcessor"),
    dict(image_processor_type="Gemma3ImageProcessorFast", size={"height": 31, "width": 31}, do_convert_rgb=None,
         do_pan_and_scan=None, pan_and_scan_max_num_crops=None)], ids=lambda s: str(s)[25:70])
@pytest.mark.parametrize("size", [(90, 61), (31, 80)], ids=str)
def test_pixels_equal_transformers_for_other_settings_and_for_defaults(settings, size, tmp_path):
    transformers = pytest.importorskip("transformers")
    make_tokenizer("qwen2_vl" if "Qwen" in str(settings) else "llava", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = pictures.open_tokenizer(tmp_path).pictures
    name = settings["image_processor_type"].removesuffix("Fast") + "Pil"
    theirs = getattr(transformers, name)(**{k: v for k, v in settings.items() if k != "image_processor_type"})
    expected = theirs(picture(*size), return_tensors="np")["pixel_values"]
    ours = pictures.preprocess(picture(*size), processor)
    assert np.abs(ours - expected.reshape(ours.shape)).max() < 1e-3


@pytest.mark.parametrize("settings", [{}, dict(max_soft_tokens=70), dict(max_soft_tokens=140, patch_size=8, pooling_kernel_size=2)],
                         ids=str)
@pytest.mark.parametrize("size", [(90, 61), (31, 80), (2400, 9), (9, 2400), (1700, 40), (40, 4000), (96, 48), (48, 48)], ids=str)
def test_gemma_4s_patches_equal_transformers_for_any_shape(settings, size, tmp_path):
    """Strips get one row of squares; an image of the right size is not resized."""
    transformers = pytest.importorskip("transformers")
    make_tokenizer("gemma4", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Gemma4ImageProcessor"} | settings))
    processor = pictures.open_tokenizer(tmp_path).pictures
    expected = transformers.Gemma4ImageProcessorPil(**settings)(picture(*size), return_tensors="np")
    ours = pictures.preprocess(picture(*size), processor)
    rows, columns = pictures.grid(pictures.RowImage("", "", *size), processor)
    places = expected["image_position_ids"][0]
    assert len(ours) == rows * columns == (places >= 0).all(1).sum()
    assert places[: len(ours)].max(0).tolist() == [columns - 1, rows - 1]
    assert np.abs(ours - expected["pixel_values"][0, : len(ours)]).max() < 1e-3
    assert pictures.features(pictures.RowImage("", "", *size), processor) == expected["num_soft_tokens_per_image"][0]


def test_gemma_4s_processor_must_be_the_models(tmp_path):
    s = load_tokenizer("gemma4", tmp_path).pictures
    vision = dict(patch_size=4, pooling_kernel_size=2, position_embedding_size=140, placeholders=(s.token_id,))
    pictures.check_features(s, vision)
    with pytest.raises(ValueError, match="pooling_kernel_size .4, 2., and config.json .4, 3."):
        pictures.check_features(s, vision | dict(pooling_kernel_size=3))
    with pytest.raises(ValueError, match="140 patches side by side .max_soft_tokens 70.*position_embedding_size 100"):
        pictures.check_features(s, vision | dict(position_embedding_size=100))
    with pytest.raises(ValueError, match="id of '<.image.>' is .* tokens for images, videos and sound are .1, 2."):
        pictures.check_features(s, vision | dict(placeholders=(1, 2)))
    fixed = s._replace(settings=s.settings | dict(do_resize=False))
    assert pictures.preprocess(picture(16, 24), fixed).shape == (24, 48)
    with pytest.raises(DataError, match="17 x 24 pixels, and do_resize is off.*multiples of 8"):
        pictures.preprocess(picture(17, 24), fixed)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_equal_transformers_processors(family, tmp_path):
    """Two pictures of different shapes in one conversation, by the template and then by the processor."""
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(family, tmp_path)
    paths = [saved(tmp_path / "a.png", picture(30, 70)), saved(tmp_path / "b.png", picture(50, 20))]
    row = conversation({"images": paths}, [{"type": "image"}, {"type": "text", "text": "Look."}, {"type": "image"},
                                           {"type": "text", "text": "Same?"}])
    pair = data.tokenize_pair(row, tokenizer, data.DataOptions())
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    image_processor = getattr(transformers, THEIRS[family])(
        **{k: v for k, v in PREPROCESSORS[family].items() if "type" not in k})
    text = theirs.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    if family == "llava":
        processor = transformers.LlavaProcessor(image_processor, theirs, patch_size=7, num_additional_image_tokens=1,
                                                vision_feature_select_strategy="default")
    elif family == "idefics3":
        processor = transformers.Idefics3Processor(image_processor, theirs, image_seq_len=4)
    elif family == "gemma3":
        processor = transformers.Gemma3Processor(image_processor, theirs, image_seq_length=4)
    else:  # their processors need torchvision, for videos: what they put in the place of a picture
        processor = bare_processor(family, image_processor, theirs)
    expected = processor(text=[text], images=[Image.open(p) for p in paths], add_special_tokens=False)["input_ids"][0]
    assert pair.prompt_ids.tolist() == list(expected)
    assert "A cat." in tokenizer.decode(pair.chosen_ids)


def bare_processor(family, image_processor, tokenizer):
    """SmolVLM's, Gemma 4's and Qwen's replacement of a picture's token, by their own code, without their video processors."""
    import transformers

    cls = {"smolvlm": transformers.SmolVLMProcessor, "gemma4": transformers.Gemma4Processor,
           "gemma4_unified": transformers.Gemma4UnifiedProcessor} | dict.fromkeys(QWEN3, transformers.Qwen3VLProcessor)
    cls = cls.get(family, transformers.Qwen2VLProcessor)
    token = IMAGE_TOKENS.get(family, "<image>")
    bare = SimpleNamespace(image_processor=image_processor, image_token=token, image_seq_len=4, global_image_token="<global-img>",
                           boi_token="<|image>", eoi_token="<image|>",
                           fake_image_token="<fake_token_around_image>", global_image_tag="<global-img>")

    def call(text, images, add_special_tokens):
        extra = {"return_row_col_info": True} if family == "smolvlm" else {}
        inputs = image_processor(images, return_tensors="np", **extra)
        pieces = text[0].split(token)
        whole = pieces[0] + "".join(cls.replace_image_token(bare, inputs, i) + p for i, p in enumerate(pieces[1:]))
        return {"input_ids": [tokenizer(whole, add_special_tokens=add_special_tokens)["input_ids"]]}

    return call


def test_all_ways_to_name_a_picture_are_one(tmp_path):
    tokenizer = load_tokenizer("llava", tmp_path)
    path = saved(tmp_path / "cat.png")
    content = (tmp_path / "cat.png").read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    ways = [{"images": [path]}, {"image": path}, {"images": path}, {"images": ["cat.png"]}, {"image": uri}, {"images": [content]},
            {"image": {"bytes": content, "path": None}}, {"image": {"bytes": base64.b64encode(content).decode()}},
            {"image": {"bytes": None, "path": "cat.png"}}, {"image": f"file://{path}"}]
    rows = [conversation(way) for way in ways]
    inline = [[{"type": "image", "image": path}, {"type": "text", "text": "What is it?"}],
              [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What is it?"}],
              [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What is it?"}]]
    rows += [conversation({}, content) for content in inline]
    places = [f"{tmp_path}/rows.jsonl:{i + 1}" for i in range(len(rows))]
    outcomes = data.tokenize_rows(pictures.open_rows(rows, places), tokenizer, data.DataOptions())
    assert not [str(o) for o in outcomes if isinstance(o, Exception)]
    assert len({(o.prompt_ids.tobytes(), o.pictures[0].sha256) for o in outcomes}) == 1


def test_places_in_plain_text_and_in_messages_agree(tmp_path):
    tokenizer = load_tokenizer("idefics3", tmp_path)
    path = saved(tmp_path / "cat.png")
    options = data.DataOptions()
    written = data.tokenize_pair(conversation({"image": path}, "<image>What is it?"), tokenizer, options)
    implied = data.tokenize_pair(conversation({"image": path}), tokenizer, options)
    parts = data.tokenize_pair(conversation({"image": path}, [{"type": "image"}, {"type": "text", "text": "What is it?"}]),
                               tokenizer, options)
    assert written.prompt_ids.tolist() == implied.prompt_ids.tolist() == parts.prompt_ids.tolist()
    plain = data.tokenize_pair({"prompt": "<image>Is it?", "chosen": " Yes", "rejected": " No", "image": path}, tokenizer, options)
    assert (plain.prompt_ids == tokenizer.pictures.token_id).sum() == (written.prompt_ids == tokenizer.pictures.token_id).sum()
    whole = conversation({"image": path}, "<image>What is it?")
    shared = {"image": path, "chosen": whole["prompt"] + whole["chosen"], "rejected": whole["prompt"] + whole["rejected"]}
    assert data.tokenize_pair(shared, tokenizer, options).prompt_ids.tolist() == written.prompt_ids.tolist()


def test_qwen_frames_pictures_in_plain_text(tmp_path):
    tokenizer = load_tokenizer("qwen2_vl", tmp_path)
    row = {"prompt": "<image>Is it?", "chosen": " Yes", "rejected": " No", "image": saved(tmp_path / "cat.png")}
    text = tokenizer.decode(data.tokenize_pair(row, tokenizer, data.DataOptions()).prompt_ids)
    assert text.startswith("<|vision_start|><|image_pad|>") and "<|image_pad|><|vision_end|>Is it?" in text


@pytest.mark.parametrize("row, words", [
    ({"image": "none.png"}, "none.png: No such file"),
    ({"image": "https://example.org/cat.png"}, "nothing is fetched"),
    ({"image": "data:image/png;base64,%%%"}, "broken data URI"),
    ({"image": 3}, "an image is a path"),
    ({"image": "/dev/zero"}, "/dev/zero: not a regular file"),  # it has no end
    ({"image": "pipe"}, "pipe: not a regular file"),  # whose other end nobody writes to
    ({"image": "loop"}, "loop: Too many levels of symbolic links"),
    ({"image": "~nobody-of-that-name/cat.png"}, "nobody-of-that-name/cat.png: No such file"),
    ({"image": "cat.png", "prompt": [{"role": "user", "content": [{"type": "image"}, 5]}]}, "a content of type list; give text or a list of parts"),
    ({"image": "cat.png", "prompt": [{"role": "user", "content": [{"type": "image"}, None]}]}, "a content of type list"),
    ({"images": ["cat.png"], "prompt": [{"role": "user", "content": "<image><image>?"}]}, "2 places for images .<image>. and the row 1"),
    ({"images": ["cat.png"], "prompt": "It is", "chosen": " a", "rejected": " b"}, "0 places for images .<image>. and the row 1"),
    ({"prompt": [{"role": "user", "content": "<image>?"}]}, "1 places for images .<image>. and the row 0"),
    ({"image": "cat.png", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "images belong to the prompt"),
    ({"image": "cat.png", "chosen": [{"role": "assistant", "content": "<image> it"}]}, "2 places for images"),
])
def test_rows_are_refused_with_file_and_line(row, words, tmp_path):
    tokenizer = load_tokenizer("llava", tmp_path)
    saved(tmp_path / "cat.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(conversation(row)) + "\n")
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{words}"):
        data.build_store([tmp_path / "rows.jsonl"], tokenizer, data.DataOptions(), tmp_path / "cache")


def damaged(kind: str, path):
    if kind == "torn":
        path.write_bytes(encoded(picture(60, 60), format="JPEG")[:700])
    elif kind == "text":
        path.write_bytes(b"not an image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "animated":
        picture(20, 20).save(path, format="GIF", save_all=True, append_images=[picture(20, 20, 1)])
    elif kind == "bomb":  # the header alone says 200,000 x 200,000
        raw = bytearray(encoded(picture(20, 20)))
        raw[16:24] = (200_000).to_bytes(4, "big") * 2
        path.write_bytes(raw)
    elif kind == "oversized":
        Image.new("1", (12_000, 9_000)).save(path, format="PNG")
    elif kind == "float":
        Image.fromarray(np.zeros((9, 9), np.float32)).save(path, format="TIFF")


@pytest.mark.parametrize("kind, words", [
    ("torn", "not an image that can be read"), ("text", "not an image of a kind that pillow knows"), ("empty", "not an image of a kind"),
    ("animated", "GIF with 2 frames"), ("bomb", "too large|pixels; more than|not an image"), ("oversized", "12000 x 9000 pixels"),
    ("float", "floating-point pixels")])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_are_no_still_picture_are_refused_by_row_or_counted(kind, words, tmp_path):
    tokenizer = load_tokenizer("llava", tmp_path)
    damaged(kind, tmp_path / "bad")
    saved(tmp_path / "good.png")
    rows = [conversation({"image": "good.png"}), conversation({"image": "bad"})]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*bad: .*({words})"):
        data.build_store([tmp_path / "rows.jsonl"], tokenizer, data.DataOptions(), tmp_path / "cache")
    store = data.build_store([tmp_path / "rows.jsonl"], tokenizer, data.DataOptions(), tmp_path / "cache", "skip")
    assert len(store) == 1 and store.report["counts"]["bad"] == 1


def test_odd_but_sound_files_become_upright_rgb():
    still = picture(24, 16)
    upright = np.asarray(still)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = pictures.decode(encoded(still, format="PNG", exif=exif))
    assert np.array_equal(np.asarray(turned), np.rot90(upright, -1))
    cmyk = pictures.decode(encoded(still.convert("CMYK"), format="TIFF"))
    assert cmyk.mode == "RGB" and np.abs(np.asarray(cmyk).astype(int) - upright).mean() < 5
    deep = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    assert np.array_equal(np.asarray(pictures.decode(encoded(Image.fromarray(deep))))[..., 0], deep >> 8)
    clear = still.convert("RGBA")
    clear.putalpha(0)
    assert (np.asarray(pictures.decode(encoded(clear))) == 255).all()
    grey = pictures.decode(encoded(still.convert("L")))
    assert grey.mode == "RGB" and grey.size == (24, 16)
    palette = pictures.decode(encoded(still.convert("P", palette=1), format="GIF"))
    assert palette.mode == "RGB"


def test_truncation_drops_a_pair_rather_than_cut_its_picture(tmp_path):
    tokenizer = load_tokenizer("llava", tmp_path)
    row = conversation({"image": saved(tmp_path / "cat.png")})
    length = len(data.tokenize_pair(row, tokenizer, data.DataOptions()).prompt_ids)
    for options in (data.DataOptions(max_prompt_length=length - 10), data.DataOptions(max_length=length, truncation_mode="keep_end"),
                    data.DataOptions(max_length=length - 1)):
        with pytest.raises(DroppedPair):
            data.tokenize_pair(row, tokenizer, options)
    kept = data.tokenize_pair(row, tokenizer, data.DataOptions(max_length=length + 2))
    assert (kept.prompt_ids == tokenizer.pictures.token_id).sum() == 16 and len(kept.chosen_ids) == 2


def test_the_store_keeps_references_and_pictures_that_lay_in_the_rows(tmp_path):
    tokenizer = load_tokenizer("llava", tmp_path)
    path = tmp_path / "cat.png"
    saved(path)
    uri = "data:;base64," + base64.b64encode(encoded(picture(9, 33, 5))).decode()
    rows = [conversation({"images": ["cat.png", uri]}), conversation({}), conversation({"image": uri})]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    build = lambda: data.build_store([tmp_path / "rows.jsonl"], tokenizer, data.DataOptions(), tmp_path / "cache")
    store = data.PairStore(build().directory)
    found = [pictures.images_of(store, i) for i in range(3)]
    assert [len(f) for f in found] == [2, 0, 1] and found[0][1] == found[2][0]
    pixels = [pictures.load_pixels(p, store.directory, tokenizer.pictures) for p in found[0]]
    assert [p.shape for p in pixels] == [(1, 3, 28, 28)] * 2
    digest = store.digest
    saved(path, picture(40, 30, 3))
    with pytest.raises(DataError, match="cat.png: the image has changed since the pairs were tokenized"):
        pictures.load_pixels(found[0][0], store.directory, tokenizer.pictures)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "\n")  # another file: tokenized anew
    assert build().digest != digest


def test_a_batch_holds_each_picture_once(tmp_path):
    import torch

    tokenizer = load_tokenizer("idefics3", tmp_path)
    saved(tmp_path / "a.png"), saved(tmp_path / "b.png", picture(20, 90, 1))
    rows = [conversation({"images": ["a.png", "a.png"]}), conversation({}), conversation({"images": ["b.png", "a.png"]})]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    store = data.build_store([tmp_path / "rows.jsonl"], tokenizer, data.DataOptions(None), tmp_path / "cache")
    loader = pictures.Loader(tokenizer.pictures)
    batch = data.collate([store[i] for i in range(3)], range(3))
    found = loader.collect(batch, store, range(3))
    a, b = (pictures.images_of(store, 2)[i] for i in (1, 0))
    n, m = (pictures.features(p, tokenizer.pictures) for p in (a, b))
    assert len(found.pixels) == (n + m) // 4  # 4 features a tile
    assert found.source.tolist() == [*range(n), *range(n), *range(n, n + m), *range(n)]
    assert torch.equal(found.place, (batch.input_ids == tokenizer.pictures.token_id).nonzero().flatten())
    assert loader.collect(data.collate([store[1]], [1]), store, [1]) is None
    whole = data.collate([store[0]], [0], share_prefix=False)
    assert (whole.input_ids == tokenizer.pictures.token_id).sum() == 4 * n
    assert not loader.waiting


def test_rows_with_pictures_are_still_refused_in_a_text_run(tmp_path):
    make_tokenizer("llava", tmp_path)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="the row has images, but this is a text run"):
        data.tokenize_pair(conversation({"image": "a.png"}), pictures.open_tokenizer(tmp_path), data.DataOptions())


def test_pillow_is_asked_for_by_name(tmp_path, monkeypatch):
    import sys

    tokenizer = load_tokenizer("llava", tmp_path)
    row = conversation({"image": saved(tmp_path / "a.png")})
    monkeypatch.setitem(sys.modules, "PIL", None)
    data.tokenize_pair(conversation({}), tokenizer, data.DataOptions())
    with pytest.raises(ValueError, match="pip install pillow"):
        data.tokenize_pair(row, tokenizer, data.DataOptions())


@pytest.mark.parametrize("file, change, words", [
    ("preprocessor", dict(size=28), "size is 28; expected whole numbers above 0"), ("preprocessor", dict(size={}), "size is {}"),
    ("preprocessor", dict(crop_size={"height": 0, "width": 28}), "crop_size is"), ("preprocessor", dict(resample=9), "resample is 9"),
    ("preprocessor", dict(image_mean="x"), "image_mean is 'x'; expected three numbers"), ("preprocessor", dict(image_std=[0, 1, 1]), "above 0"),
    ("preprocessor", dict(image_std=[1, 1]), "image_std is .1, 1."), ("preprocessor", dict(rescale_factor=1e308), "rescale_factor is 1e"),
    ("preprocessor", dict(do_normalize="no"), "do_normalize is 'no'; expected true or false"),
    ("processor", dict(patch_size=-1), "patch_size is -1"), ("processor", dict(num_additional_image_tokens=1e9), "num_additional_image_tokens is"),
    ("processor", dict(vision_feature_select_strategy="x"), "vision_feature_select_strategy is 'x'; expected default or full")])
def test_settings_that_no_image_can_be_made_with_are_refused_by_name(file, change, words, tmp_path):
    make_tokenizer("llava", tmp_path)
    path = tmp_path / f"{file}_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=f"{tmp_path}.*: .*{words}"):
        pictures.open_tokenizer(tmp_path)

"""Images in preference rows: read, check and preprocess them, and put their tokens in the text.

    row    {"images": ["cat.jpg"], "prompt": ..., "chosen": ..., "rejected": ...}; or `image`, one
    image  a path (relative to the row's file), a data URI, or {"bytes": ..., "path": ...} (parquet)
    place  {"type": "image"} in a message's content, or <image> in its text; with neither, the
           images go before the first question

Pixels equal those of transformers' pillow-based processors, configured by
`preprocessor_config.json` (or `processor_config.json`). EXIF rotation, CMYK, palettes, 16-bit
channels and transparency (over white) are converted to upright RGB. A row whose image is broken,
animated or too large is refused. Decoding runs in background threads.
"""

import base64
import binascii
import hashlib
import io
import math
import re
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data import Batch, DataOptions, Pair, PairStore, Tokenizer, encode_texts
from extras.decoder.in_stream import Pictures, find_runs, stream_axes
from parts.conversations import RowTexts, row_texts
from parts.rows import DataError, DroppedPair, attempt, user_path
from parts.tokenizer_files import explained_types, read_json
from parts.turns import with_role

MAX_PIXELS = 89_478_485  # above this, pillow warns of a decompression bomb
MEAN = [0.48145466, 0.4578275, 0.40821073]  # CLIP's, as is STD
STD = [0.26862954, 0.26130258, 0.27577711]
COMMON = dict(
    do_resize=True,
    do_rescale=True,
    do_normalize=True,
    do_convert_rgb=True,
    rescale_factor=1 / 255,
    do_pad=False,
)
SQUARE = COMMON | dict(
    resample=3,
    image_mean=MEAN,
    image_std=STD,
    size={"shortest_edge": 224},
    do_center_crop=True,
    crop_size={"height": 224, "width": 224},
)
SIGLIP = SQUARE | dict(
    do_center_crop=False,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
    size={"height": 224, "width": 224},
)
TILES = COMMON | dict(
    resample=1,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
    size={"longest_edge": 4 * 364},
    max_image_size={"longest_edge": 364},
    do_image_splitting=True,
)
PATCHES = COMMON | dict(
    resample=3,
    image_mean=MEAN,
    image_std=STD,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
)
GEMMA3 = SIGLIP | dict(resample=2)
BUDGET = COMMON | dict(
    do_normalize=False,
    resample=3,
    image_mean=[0.0] * 3,
    image_std=[1.0] * 3,
    patch_size=16,
    pooling_kernel_size=3,
    max_soft_tokens=280,
)
KINDS = {
    "CLIP": ("square", SQUARE),
    "Llava": ("square", SQUARE),
    "Siglip": ("square", SIGLIP),
    "Gemma3": ("square", GEMMA3),
    "Gemma4": ("budget", BUDGET),
    "Gemma4Unified": ("budget", BUDGET),
    "Idefics3": ("tiles", TILES),
    "SmolVLM": ("tiles", TILES),
    "Qwen2VL": ("patches", PATCHES),
}
LARGEST_SIDE = 4096  # pixels, of an image that is cut into tiles


class RowImage(NamedTuple):
    """One image of a row."""

    path: str  # "" where the row holds the bytes
    sha256: str
    width: int
    height: int
    content: bytes | None = None  # where the row holds the bytes, until the store has a copy


class Processor(NamedTuple):
    """How a model's images are preprocessed and written in its text; data.Tokenizer.pictures."""

    kind: str  # square: one size for all; tiles: cut into squares
    # patches: any size (Qwen); budget: as many pixels for all, of any shape (Gemma 4)
    settings: dict
    token: str  # where an image goes, as the chat template writes it
    token_id: int  # in the stream, once for each feature
    framed: str  # what replaces <image> in plain text
    per_tile: int  # features of one tile; 0 where the image size decides
    feature: str  # in the text, once for each feature: `token_id`
    around: tuple[str, str] = ("", "")  # before and after an image's features
    takes_text: bool = False  # the template takes texts for messages, and not only lists of parts

    def open_rows(self, rows: Iterable, places: Iterable[str]) -> list:
        """Open the images that the rows name, in threads."""
        return open_rows(rows, places)

    def tokenize_rows(self, rows: list, tokenizer: Tokenizer, options: DataOptions) -> list:
        """Turn rows with or without images into pairs; an error takes its row's place."""
        prepared = [r if isinstance(r, DataError) else attempt(prepare, r, self) for r in rows]
        texts = [
            one if isinstance(one, DataError) else attempt(expanded, *one, tokenizer, options)
            for one in prepared
        ]
        pairs = encode_texts(texts, tokenizer, options)
        return [
            pair if isinstance(pair, DataError) else attempt(with_images, pair, one[1], self)
            for pair, one in zip(pairs, prepared, strict=True)
        ]

    def keep(self, kept: dict, index: int, images: tuple["RowImage", ...], directory: Path) -> None:
        """Add a pair's images to the store's meta.json: see keep_images."""
        keep_images(kept, index, images, directory)

    def check_kept(self, directory: Path) -> None:
        """Raise DataError for an image that is gone or has changed since the store was made."""
        check_images(directory)


# The model's settings


def open_tokenizer(directory: str | Path, chat_template: str | None = None) -> Tokenizer:
    """Load a tokenizer, with an image processor if its directory has one. Raises DataError."""
    tokenizer = Tokenizer.load(directory, chat_template)
    with explained_types(directory):
        tokenizer.pictures = load_processor(tokenizer)
    return tokenizer


def load_processor(tokenizer: Tokenizer) -> Processor | None:
    """Read the files beside the tokenizer; return None unless they name a known image processor.

    Raises DataError for settings that are not supported.
    """
    directory = tokenizer.directory
    outer = read_json(directory / "processor_config.json")
    given = outer.get("image_processor") or read_json(directory / "preprocessor_config.json")
    class_name = given.get("image_processor_type", given.get("feature_extractor_type", ""))
    name = re.sub(r"ImageProcessor(Fast|Pil)?$", "", class_name)
    if name not in KINDS:
        return None
    kind, defaults = KINDS[name]
    settings = defaults | {k: v for k, v in given.items() if k in defaults and v is not None}
    if kind == "patches":
        edges = {"shortest_edge": given.get("min_pixels"), "longest_edge": given.get("max_pixels")}
        settings["size"] = settings["size"] | {k: v for k, v in edges.items() if v is not None}
    check_settings(settings, defaults, kind, directory)
    check_outer(outer, directory)
    if given.get("do_pan_and_scan"):
        raise DataError(
            f"{directory}: do_pan_and_scan is on in the image processor's file, and images cut "
            "into crops are not supported; set it to null there"
        )
    token = {"patches": "<|image_pad|>"}.get(kind, outer.get("image_token", "<image>"))
    texts: dict[str, Any] = dict(token=token, feature=token, framed=token)
    if kind == "patches":
        texts["framed"] = f"<|vision_start|>{token}<|vision_end|>"
    per_tile = tile_features(kind, settings, outer, directory)
    if name == "Gemma4Unified":  # a square is a patch
        settings["patch_size"] *= settings["pooling_kernel_size"]
        settings["pooling_kernel_size"] = 1
    if kind == "budget":
        texts = gemma4_texts(tokenizer.special_tokens)
    if name == "Gemma3":
        texts = gemma_texts(tokenizer.special_tokens)
        per_tile = outer.get("image_seq_length", 256)
    token_id = tokenizer.backend.token_to_id(texts["feature"])
    if token_id is None:
        return None
    return Processor(
        kind=kind,
        settings=settings,
        token_id=token_id,
        per_tile=per_tile,
        **texts,
    )


def gemma_texts(named: dict[str, str]) -> dict:
    """Return how Gemma 3 writes images: its chat template only where one begins."""
    begin = named.get("boi_token", "<start_of_image>")
    end = named.get("eoi_token", "<end_of_image>")
    feature = named.get("image_token", "<image_soft_token>")
    around = (f"\n\n{begin}", f"{end}\n\n")
    return dict(token=begin, feature=feature, framed=begin, around=around, takes_text=True)


def gemma4_texts(named: dict[str, str]) -> dict:
    """Return how Gemma 4 writes images: its chat template writes one token of theirs."""
    token = named.get("image_token", "<|image|>")
    around = (named.get("boi_token", "<|image>"), named.get("eoi_token", "<image|>"))
    return dict(token=token, feature=token, framed=token, around=around, takes_text=True)


def tile_features(kind: str, settings: dict, outer: dict, directory: Path) -> int:
    """Count the features of one tile, from the processor's file or else from the model's."""
    raw = read_json(directory / "config.json")
    tower = raw.get("vision_config") or {}
    if kind in ("patches", "budget"):
        return 0
    if kind == "tiles":
        patches_a_side = tower.get("image_size", 0) // (tower.get("patch_size") or 1)
        side = patches_a_side // (raw.get("scale_factor") or 2)
        return outer.get("image_seq_len") or (side * side) or 169
    patch = outer.get("patch_size") or tower.get("patch_size", 14)
    key = "vision_feature_select_strategy"
    strategy = outer.get(key) or raw.get(key, "default")
    is_clip = tower.get("model_type", "clip_vision_model") == "clip_vision_model"
    extra = outer.get("num_additional_image_tokens", int(is_clip))  # CLIP's class token
    size = settings["crop_size"] if settings["do_center_crop"] else settings["size"]
    if "height" not in size:
        raise DataError(
            f"{directory}: images are resized to {size}, which does not fix their shape; "
            "that is not supported"
        )
    return size["height"] // patch * (size["width"] // patch) + extra - (strategy == "default")


def check_settings(settings: dict, defaults: dict, kind: str, directory: Path) -> None:
    """Raise DataError for a setting of the image processor that no image can be made with."""
    for name, default in defaults.items():
        value = settings[name]
        if name == "resample":
            is_right, wanted = type(value) is int and 0 <= value <= 5, "one of pillow's, 0 to 5"
        elif isinstance(default, bool):
            is_right, wanted = isinstance(value, bool), "true or false"
        elif isinstance(default, dict):
            needed = [default.keys(), {"height", "width"}]
            needed += [{"shortest_edge"}] if kind == "square" and name == "size" else []
            is_right = isinstance(value, dict) and any(keys <= value.keys() for keys in needed)
            is_right = is_right and all(v is None or is_count(v) for v in value.values())
            wanted = f"whole numbers above 0, such as {default}"
        elif isinstance(default, list):  # of the three channels
            numbers = value if isinstance(value, list) else [value]
            least = 0 if name == "image_std" else -math.inf
            is_right = len(numbers) in (1, 3) and all(is_number(v, least) for v in numbers)
            wanted = "three numbers" + (" above 0" if name == "image_std" else "")
        elif isinstance(default, float):
            is_right, wanted = is_number(value, 0), "a number above 0"
        else:
            is_right, wanted = is_count(value), "a whole number above 0"
        if not is_right:
            raise DataError(
                f"{directory}: the image processor's {name} is {value!r:.60}; expected {wanted}"
            )


def check_outer(outer: dict, directory: Path) -> None:
    """Raise DataError for what processor_config.json says of features and cannot be."""
    for name in ("patch_size", "image_seq_len", "image_seq_length", "num_additional_image_tokens"):
        value = outer.get(name)
        least = 0 if name.startswith("num") else 1
        if value is not None and not (is_count(value) or value == least == 0):
            raise DataError(
                f"{directory}/processor_config.json: {name} is {value!r:.60}; expected a whole "
                f"number from {least}"
            )
    strategy = outer.get("vision_feature_select_strategy")
    if strategy not in (None, "default", "full"):
        raise DataError(
            f"{directory}/processor_config.json: vision_feature_select_strategy is "
            f"{strategy!r:.60}; expected default or full"
        )


def is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 10**9


def is_number(value: Any, above: float) -> bool:
    """Tell whether a value of JSON is a number that images can be computed with."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and above < value and abs(value) < 1e6


def check_features(processor: Processor, vision: dict) -> None:
    """Raise ValueError where the model takes other images than its processor's file makes.

    Another size, or another number of features than the text has room for; of Qwen other patches;
    of Gemma 4 other patches, or more than it has places for.
    """
    s = processor.settings
    if processor.kind == "budget":
        check_budget(processor, vision)
    if processor.kind == "patches":
        of_file = tuple(s[k] for k in ("patch_size", "temporal_patch_size", "merge_size"))
        keys = ("patch_size", "temporal_patch_size", "spatial_merge_size")
        of_model = tuple(vision.get(k) for k in keys)
        if of_file != of_model:
            raise ValueError(
                f"the image processor's file has patch_size, temporal_patch_size, merge_size "
                f"{of_file}, and config.json {of_model}; give the processor that belongs to the model"
            )
    if processor.kind != "square":
        return
    size = s["crop_size"] if s["do_center_crop"] else s["size"]
    made = (size["height"], size["width"], processor.per_tile)
    side = vision["image_size"]
    taken = (side, side, vision.get("tokens", side_features(vision)))
    if made != taken:
        words = "{} x {} pixels and {} tokens"
        raise ValueError(
            f"the image processor's file makes images of {words.format(*made)}, and config.json "
            f"says {words.format(*taken)}; give the processor that belongs to the model"
        )


def side_features(vision: dict) -> int:
    """Count the features of one square as LLaVA's tower gives them to the decoder."""
    across = vision["image_size"] // vision["patch_size"]
    return across * across + vision["is_clip"] - vision["drop_first"]


def check_budget(processor: Processor, vision: dict) -> None:
    """Raise ValueError where Gemma 4's model takes other patches, or another token for images."""
    s = processor.settings
    if processor.token_id not in vision["placeholders"]:
        raise ValueError(
            f"the tokenizer's id of {processor.token!r} is {processor.token_id}, and config.json's "
            f"tokens for images, videos and sound are {vision['placeholders']}; give the tokenizer "
            "that belongs to the model"
        )
    keys = ("patch_size", "pooling_kernel_size")
    of_file = tuple(s[k] for k in keys)
    of_model = tuple(vision[k] for k in keys)
    if of_file != of_model:
        raise ValueError(
            f"the image processor's file has patch_size, pooling_kernel_size {of_file}, and "
            f"config.json {of_model}; give the processor that belongs to the model"
        )
    longest = s["max_soft_tokens"] * s["pooling_kernel_size"]  # patches of an image of one row
    if longest > vision["position_embedding_size"]:
        raise ValueError(
            f"the image processor's file allows {longest} patches side by side (max_soft_tokens "
            f"{s['max_soft_tokens']}), and config.json has position_embedding_size "
            f"{vision['position_embedding_size']}; lower max_soft_tokens"
        )


# Reading


def pillow() -> tuple[Any, Any]:
    """Import pillow, which is optional: its Image and ImageOps. Raises ValueError naming it."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ValueError("rows with images need pillow; pip install pillow") from None
    return Image, ImageOps


def decode(content: bytes) -> Any:
    """Decode bytes to an upright RGB image. Raises DataError saying why that fails."""
    Image, ImageOps = pillow()
    from PIL import UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(
                f"{width} x {height} pixels; more than {MAX_PIXELS:,} are not read, make it smaller"
            )
        # An MPO file is a camera's: its second frame is only a preview.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise DataError(f"{image.format} with {image.n_frames} frames; give one still image")
        return to_rgb(ImageOps.exif_transpose(image), Image)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"too large ({error})") from None
    except UnidentifiedImageError:
        raise DataError("not an image of a kind that pillow knows") from None
    except Exception as error:  # each decoder raises its own kinds
        raise DataError(
            f"not an image that can be read ({str(error) or type(error).__name__})"
        ) from None


def to_rgb(image: Any, Image: Any) -> Any:
    """Convert any mode to RGB: 16 bits to 8, transparency over white. Raises DataError."""
    if image.mode == "F":
        raise DataError("floating-point pixels; save it with 8 bits a channel")
    if image.mode.startswith("I"):  # one channel of 16 bits
        pixels = np.asarray(image).astype(np.int64)
        if pixels.max(initial=0) > 255:  # else the file holds 8 bits in a 16-bit channel
            pixels = pixels >> 8
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def find_content(reference: Any, folder: Path) -> tuple[str, bytes]:
    """Read what a row gives as an image: (path, content). Raises DataError.

    The path is "" where the row itself holds the bytes.
    """
    if isinstance(reference, dict):
        keys = ("bytes", "base64", "image", "path", "url")
        inner = next((reference[k] for k in keys if reference.get(k)), None)
        encoded = reference.get("bytes") or reference.get("base64")
        is_base64 = isinstance(inner, str) and encoded == inner and not inner.startswith("data:")
        return find_content(f"data:;base64,{inner}" if is_base64 else inner, folder)
    if isinstance(reference, (bytes, bytearray)):
        return "", bytes(reference)
    if not isinstance(reference, str) or not reference:
        raise DataError(f"found {repr(reference)[:40]}; an image is a path, a data URI, or bytes")
    if reference.startswith("data:"):
        try:
            return "", base64.b64decode(reference.partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"a broken data URI ({error})") from None
    if re.match(r"https?://", reference):
        raise DataError(
            f"{reference[:80]}: nothing is fetched while training; download it and give its path"
        )
    path = folder / user_path(reference.removeprefix("file://"))
    try:
        mode = path.stat().st_mode  # of a loop of links: an OSError
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a device or a pipe may have no end
            raise DataError(f"{path}: not a regular file")
        return str(path.resolve()), path.read_bytes()
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def open_image(reference: Any, folder: Path) -> RowImage:
    """Find an image, decode it once to check it, and measure it. Raises DataError."""
    path, content = find_content(reference, folder)
    try:
        image = decode(content)
    except DataError as error:
        raise DataError(f"{path or 'an image in the row'}: {error}") from None
    return RowImage(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        width=image.size[0],
        height=image.size[1],
        content=None if path else content,
    )


def row_references(row: dict) -> list:
    """List the images a row names: `images` or `image`, else the image parts of its messages."""
    for key in ("images", "image"):
        if row.get(key):
            return row[key] if isinstance(row[key], (list, tuple)) else [row[key]]
    turns = next((row[key] for key in ("prompt", "conversations", "chosen") if key in row), None)
    if not isinstance(turns, list):
        return []
    contents = [m.get("content") for m in turns if isinstance(m, dict)]
    parts = [p for c in contents if isinstance(c, list) for p in c if is_image(p)]
    return [found for p in parts if (found := part_reference(p)) is not None]


def is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def part_reference(part: dict) -> Any:
    """Find what {"type": "image", "path": ...} or a variant names; None for a bare place."""
    keys = ("image", "image_url", "path", "url", "base64", "bytes")
    found = next((part[k] for k in keys if part.get(k)), None)
    return found["url"] if isinstance(found, dict) and "url" in found else found


def open_rows(rows: Iterable, places: Iterable[str]) -> list:
    """Open the rows' images, in threads; a DataError replaces a row whose image is unusable."""

    def opened(row: Any, place: str) -> Any:
        if not isinstance(row, dict):
            return row
        references = attempt(row_references, row)
        if not isinstance(references, list) or not references:
            return row
        folder = Path(place.rpartition(":")[0]).parent
        images = [attempt(open_image, one, folder) for one in references]
        found = {**row, "images": images, "image": None}
        return next((p for p in images if isinstance(p, DataError)), found)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(opened, list(rows), list(places)))


# Cutting and scaling


def resize(image: Any, height: int, width: int, settings: dict) -> Any:
    return image.resize((width, height), settings["resample"])


def normalized(image: Any, settings: dict) -> np.ndarray:  # (3, H, W) float32
    x = np.asarray(image).astype(np.float32)
    if settings["do_rescale"]:
        x = (x.astype(np.float64) * settings["rescale_factor"]).astype(np.float32)
    if settings["do_normalize"]:
        x = (x - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    return np.ascontiguousarray(x.transpose(2, 0, 1), np.float32)


def square(image: Any, s: dict) -> np.ndarray:  # (1, 3, H, W)
    """Preprocess as CLIP and SigLIP do: resize, crop the centre."""
    Image, _ = pillow()
    if s["do_pad"]:
        side = max(image.size)
        ground = Image.new("RGB", (side, side), tuple(int(m * 255) for m in s["image_mean"]))
        ground.paste(image, tuple((side - n) // 2 for n in image.size))
        image = ground
    if s["do_resize"] and "shortest_edge" in s["size"]:
        edge = s["size"]["shortest_edge"]
        short = min(image.size)
        width, height = (edge if n == short else int(edge * n / short) for n in image.size)
        image = resize(image, height, width, s)
    elif s["do_resize"]:
        image = resize(image, s["size"]["height"], s["size"]["width"], s)
    if s["do_center_crop"]:
        width, height = image.size
        crop = s["crop_size"]
        left = (width - crop["width"]) // 2
        top = (height - crop["height"]) // 2
        # Outside the image, pillow's crop is black.
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    return normalized(image, s)[None]


def tiled_sizes(width: int, height: int, s: dict) -> list[tuple[int, int]]:
    """List the sizes, (height, width), to which Idefics3 resizes an image before cutting it."""
    steps = []
    tile = s["max_image_size"]["longest_edge"]
    if s["do_resize"] and "longest_edge" in s["size"]:
        longest = s["size"]["longest_edge"]
        wide = width >= height
        ratio = width / height
        other = int(longest / ratio) if wide else int(longest * ratio)
        other = max(other + other % 2, 1)
        height, width = (other, longest) if wide else (longest, other)
        if longest > LARGEST_SIDE:
            wide = width >= height
            ratio = width / height
            other = max(int(LARGEST_SIDE / ratio if wide else LARGEST_SIDE * ratio), 1)
            height, width = (other, LARGEST_SIDE) if wide else (LARGEST_SIDE, other)
        steps.append((height, width))
    elif s["do_resize"]:
        height = s["size"]["height"]
        width = s["size"]["width"]
        steps.append((height, width))
    if not s["do_image_splitting"]:
        return [*steps, (tile, tile)]
    wide = width >= height
    ratio = width / height
    up = lambda n: math.ceil(n / tile) * tile
    if wide:
        width = up(width)
        height = up(int(width / ratio))
    else:
        height = up(height)
        width = up(int(height * ratio))
    return [*steps, (height, width)]


def tile_counts(width: int, height: int, s: dict) -> tuple[int, int]:
    """Count (rows, columns) of tiles; (0, 0) for an image that is not cut."""
    height, width = tiled_sizes(width, height, s)[-1]
    tile = s["max_image_size"]["longest_edge"]
    is_cut = s["do_image_splitting"] and max(height, width) > tile
    return (height // tile, width // tile) if is_cut else (0, 0)


def tiles(image: Any, s: dict) -> np.ndarray:  # (rows x columns + 1, 3, tile, tile)
    """Preprocess as Idefics3 does: the image cut into tiles, then all of it scaled to one tile."""
    tile = s["max_image_size"]["longest_edge"]
    rows, columns = tile_counts(*image.size, s)
    for height, width in tiled_sizes(*image.size, s):
        image = resize(image, height, width, s)
    cut = [
        image.crop((c * tile, r * tile, (c + 1) * tile, (r + 1) * tile))
        for r in range(rows)
        for c in range(columns)
    ]
    overview = resize(image, tile, tile, s) if cut else image
    return np.stack([normalized(one, s) for one in [*cut, overview]])


def patch_size(width: int, height: int, s: dict) -> tuple[int, int]:
    """Compute Qwen's (height, width): multiples of a merged patch, the area within bounds."""
    factor = s["patch_size"] * s["merge_size"]
    least = s["size"]["shortest_edge"]  # an area, pixels, as is `most`
    most = s["size"]["longest_edge"]
    if max(height, width) > 200 * min(height, width):
        raise DataError(
            f"{width} x {height} pixels: one side is over 200 times the other, "
            "which this model does not take"
        )
    if not s["do_resize"]:
        return height, width
    h = round(height / factor) * factor
    w = round(width / factor) * factor
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        h, w = (max(factor, math.floor(n / shrink / factor) * factor) for n in (height, width))
    elif h * w < least:
        grow = math.sqrt(least / (height * width))
        h, w = (math.ceil(n * grow / factor) * factor for n in (height, width))
    return h, w


def patches(image: Any, s: dict) -> np.ndarray:  # (patches, 3 x frames x patch x patch)
    """Preprocess as Qwen does: a row for each patch, merge x merge neighbours in sequence.

    The model was built for video, so an image is two equal frames.
    """
    height, width = patch_size(*image.size, s)
    x = normalized(resize(image, height, width, s), s)
    p = s["patch_size"]
    m = s["merge_size"]
    x = x.reshape(3, height // p // m, m, p, width // p // m, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
    x = np.broadcast_to(x[:, :, :, :, :, None], (*x.shape[:5], s["temporal_patch_size"], p, p))
    return np.ascontiguousarray(x.reshape(height // p * (width // p), -1))


def budget_size(width: int, height: int, s: dict) -> tuple[int, int]:
    """Compute Gemma 4's (height, width): multiples of a square of pooled patches.

    The area is as large as `max_soft_tokens` squares allow; a strip gets one row of squares.
    """
    square = s["patch_size"] * s["pooling_kernel_size"]
    if not s["do_resize"]:
        if height % square or width % square:
            raise DataError(
                f"{width} x {height} pixels, and do_resize is off in the image processor's file: "
                f"both must be multiples of {square}"
            )
        return height, width
    scale = math.sqrt(s["max_soft_tokens"] * square**2 / (height * width))
    down = math.floor(scale * height / square)
    across = math.floor(scale * width / square)
    if down == 0:
        return square, square * min(width // height, s["max_soft_tokens"])
    if across == 0:
        return square * min(height // width, s["max_soft_tokens"]), square
    return down * square, across * square


def budget(image: Any, s: dict) -> np.ndarray:  # (patches, patch x patch x 3)
    """Preprocess as Gemma 4 does: a row for each patch, colours last."""
    height, width = budget_size(*image.size, s)
    if (width, height) != image.size:
        image = resize(image, height, width, s)
    p = s["patch_size"]
    x = normalized(image, s).reshape(3, height // p, p, width // p, p).transpose(1, 3, 2, 4, 0)
    return np.ascontiguousarray(x.reshape(-1, 3 * p * p))


def preprocess(image: Any, processor: Processor) -> np.ndarray:
    of_kind = {"square": square, "tiles": tiles, "patches": patches, "budget": budget}
    return of_kind[processor.kind](image, processor.settings)


def grid(image: RowImage, processor: Processor) -> tuple[int, int]:
    """Count Qwen's or Gemma 4's patches, or tiles, down and across."""
    if processor.kind in ("patches", "budget"):
        size_of = patch_size if processor.kind == "patches" else budget_size
        h, w = size_of(image.width, image.height, processor.settings)
        return h // processor.settings["patch_size"], w // processor.settings["patch_size"]
    if processor.kind == "tiles":
        return tile_counts(image.width, image.height, processor.settings)
    return 0, 0


def features(image: RowImage, processor: Processor) -> int:
    """Count the tokens that an image takes in the stream: one for each feature."""
    rows, columns = grid(image, processor)
    if processor.kind == "patches":
        return rows * columns // processor.settings["merge_size"] ** 2
    if processor.kind == "budget":
        return rows * columns // processor.settings["pooling_kernel_size"] ** 2
    return processor.per_tile * (rows * columns + 1)


# Rows


def image_text(image: RowImage, processor: Processor) -> str:
    """Write the text that stands for an image: one token for each feature, and marks."""
    if processor.kind != "tiles":
        before, after = processor.around
        return before + processor.feature * features(image, processor) + after
    rows, columns = grid(image, processor)
    tile = processor.feature * processor.per_tile
    frame = "<fake_token_around_image>"
    lines = [
        "".join(f"{frame}<row_{r + 1}_col_{c + 1}>{tile}" for c in range(columns)) + "\n"
        for r in range(rows)
    ]
    return "".join(lines) + ("\n" if lines else "") + f"{frame}<global-img>{tile}{frame}"


def prepare(row: dict, processor: Processor) -> tuple[dict, tuple[RowImage, ...]]:
    """Split a row's messages into parts with its images in place; return row and images, in order.

    Raises DataError.
    """
    images = row.get("images") or ()
    if not all(isinstance(p, RowImage) for p in images) or (row_references(row) and not images):
        row = open_rows([row], ["./:0"])[0]
        if isinstance(row, DataError):
            raise row
        images = row.get("images") or ()
    row = {k: v for k, v in row.items() if k not in ("images", "image")}
    inner = next((key for key in ("prompt", "conversations") if key in row), None)
    for key in {"prompt", "conversations", "chosen", "rejected"} & row.keys():
        holds = key == inner or inner is None
        if isinstance(row[key], str):
            if holds and images:
                row[key] = row[key].replace("<image>", processor.framed)
        elif isinstance(row[key], list) and (images or not processor.takes_text):
            row[key] = place_images(row[key], len(images) if holds else 0, key)
    return row, tuple(images)


def place_images(messages: list, count: int, key: str) -> list:
    """Split messages' contents into parts, with `count` images at <image> or at image parts.

    Where there is neither, the images go before the first question. Raises DataError.
    """
    messages = [dict(with_role(m, f'"{key}"[{i}]')) if isinstance(m, dict) else m
                for i, m in enumerate(messages)]
    with_content = [m for m in messages if isinstance(m, dict) and has_content(m)]
    waiting = 0 if any(has_place(m["content"]) for m in with_content) else count
    for message in with_content:
        given = message["content"]
        parts = []
        for part in given if isinstance(given, list) else [given]:
            parts += [{"type": "image"}] if is_image(part) else text_parts(part, count)
        if message.get("role") == "user" and waiting:
            parts = [{"type": "image"}] * waiting + parts
            waiting = 0
        if not count and any(map(is_image, parts)):
            raise DataError(
                f'"{key}" has an image part, but the row has no image for it; '
                "images belong to the prompt"
            )
        message["content"] = parts
    return messages


def has_content(message: dict) -> bool:
    """Tell whether a message has text or a list of parts; others are refused as they are."""
    content = message.get("content")
    is_parts = isinstance(content, list) and all(isinstance(part, dict | str) for part in content)
    return isinstance(content, str) or is_parts


def has_place(content: str | list) -> bool:
    """Tell whether a message says where an image goes."""
    if isinstance(content, str):
        return "<image>" in content
    return any(is_image(part) or "<image>" in text_of(part) for part in content)


def text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    return str(part.get("text", "")) if isinstance(part, dict) else ""


def text_parts(part: Any, count: int) -> list[dict]:
    """Cut a text into parts at <image>, if the row has images; leave other parts as they are."""
    if not isinstance(part, str) and part.get("type") != "text":
        return [part]
    pieces = re.split("(<image>)", text_of(part)) if count else [text_of(part)]
    return [
        {"type": "image"} if p == "<image>" and count else {"type": "text", "text": p}
        for p in pieces
        if p
    ]


def expand(texts: list[str], images: tuple[RowImage, ...], processor: Processor) -> list[str]:
    """Replace each image's place by its tokens. Raises DataError where the counts differ."""
    out = []
    for text in texts:
        pieces = text.split(processor.token)
        if len(pieces) - 1 != len(images):
            raise DataError(
                f"the text has {len(pieces) - 1} places for images ({processor.token}) and the row "
                f"{len(images)} images; write <image> once for each, in the prompt"
            )
        between = [*(image_text(p, processor) for p in images), ""]
        out.append("".join(a + b for a, b in zip(pieces, between, strict=True)))
    return out


def expanded(
    row: dict, images: tuple[RowImage, ...], tokenizer: Tokenizer, options: DataOptions
) -> RowTexts:
    texts = row_texts(row, tokenizer, options.need_rejected)
    return texts._replace(texts=expand(texts.texts, images, tokenizer.pictures))


def with_images(pair: Pair, images: tuple[RowImage, ...], processor: Processor) -> Pair:
    """Add its images to a pair. Raises DroppedPair where truncation cut into them."""
    wanted = sum(features(p, processor) for p in images)
    prompts = [ids for ids in (pair.prompt_ids, pair.rejected_prompt_ids) if ids is not None]
    count = lambda ids: int((ids == processor.token_id).sum())
    found = [count(ids) for ids in prompts]
    if count(pair.chosen_ids) or count(pair.rejected_ids) or max(found) > wanted:
        raise DataError("a completion has image tokens; images belong to the prompt")
    if min(found) < wanted:
        raise DroppedPair("truncation would cut an image; raise max_length")
    return pair._replace(pictures=images)


# The store


def keep_images(kept: dict, index: int, images: tuple[RowImage, ...], directory: Path) -> None:
    """Add a pair's images to `kept`, a part of meta.json; bytes from the row go to files beside it.

    {"files": {sha256: [path, width, height]}, "pairs": {pair: [sha256, ...]}}: the same content
    under two names is one image.
    """
    files = kept.setdefault("files", {})
    kept.setdefault("pairs", {})[str(index)] = [p.sha256 for p in images]
    for p in images:
        if p.content is not None and p.sha256 not in files:
            (directory / "pictures").mkdir(exist_ok=True)
            (directory / "pictures" / p.sha256).write_bytes(p.content)
        files.setdefault(p.sha256, [p.path, p.width, p.height])


def check_images(directory: Path) -> None:
    """Raise DataError for the first image of a store whose file is gone or has changed.

    Read again are only those with a later time than the store's: there may be very many.
    """
    meta = read_json(directory / "meta.json")
    made = (directory / "meta.json").stat().st_mtime
    for sha256, (path, _, _) in ((meta.get("pictures") or {}).get("files") or {}).items():
        try:
            if path and Path(path).stat().st_mtime >= made:
                read_again(Path(path), sha256, directory)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None


def images_of(store: PairStore, index: int) -> list[RowImage]:
    """List the images of a stored pair, in the order of its prompt."""
    if store.pictures is None:
        return []
    files = store.pictures["files"]
    found = ((sha, files[sha]) for sha in store.pictures["pairs"].get(str(index), ()))
    return [RowImage(path, sha, width, height) for sha, (path, width, height) in found]


# Batches


def read_again(path: Path, sha256: str, folder: Path) -> bytes:
    """Return an image's bytes. Raises DataError if they are not those of tokenization."""
    _, content = find_content(str(path), Path())
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(
            f"{path}: the image has changed since the pairs were tokenized; remove {folder}"
        )
    return content


def load_pixels(image: RowImage, folder: Path, processor: Processor) -> torch.Tensor:
    """Read and preprocess an image. Raises DataError if its file changed since tokenization."""
    path = Path(image.path) if image.path else folder / "pictures" / image.sha256
    content = image.content or read_again(path, image.sha256, folder)
    return torch.from_numpy(preprocess(decode(content), processor))


def of_prompt(
    ids: list[int], images: Sequence[RowImage], processor: Processor, folder: Path = Path()
) -> Pictures:
    """Return the Pictures of a stream that is one prompt, for generation.

    Raises DataError where the prompt has not as many image tokens as the images have features.
    """
    tokens = np.array(ids)
    place = np.flatnonzero(tokens == processor.token_id)
    wanted = sum(features(p, processor) for p in images)
    if len(place) != wanted:
        raise DataError(f"the prompt has {len(place)} image tokens; its images take {wanted}")
    grids = [grid(p, processor) for p in images]
    axes = None
    if processor.kind == "patches":
        span = np.array([[0, len(ids), 0, 0]])
        merge = processor.settings["merge_size"]
        axes = torch.from_numpy(stream_axes(tokens, span, processor.token_id, {0: grids}, merge))
    return Pictures(
        pixels=torch.cat([load_pixels(p, folder, processor) for p in images]),
        grids=torch.tensor(grids),
        place=torch.from_numpy(place),
        source=torch.arange(len(place)),
        axes=axes,
        runs=torch.from_numpy(find_runs(tokens, processor.token_id)),
    )


def one_mark_each(ids: list[int], images: Sequence[RowImage], processor: Processor) -> list[int]:
    """Return a prompt's tokens with one for each image, for people to read."""
    tokens = np.array(ids)
    counts = [features(p, processor) for p in images]
    ends = np.cumsum(counts)
    place = np.flatnonzero(tokens == processor.token_id)
    keep = np.ones(len(ids), bool)
    for first, last in zip(place[ends - counts], place[ends - 1]):
        keep[first + 1 : last + 1] = False
    return tokens[keep].tolist()


@dataclass
class Loader:
    """Decode images in the background: `expect` starts, `collect` waits for the pixels."""

    processor: Processor
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "images"))
    waiting: dict[str, Future] = field(default_factory=dict)
    limit: int = 64  # images in memory that no batch has asked for yet

    def begin(self, image: RowImage, folder: Path) -> Future:
        if image.sha256 not in self.waiting:
            self.waiting[image.sha256] = self.pool.submit(
                load_pixels, image, folder, self.processor
            )
        return self.waiting[image.sha256]

    def expect(self, store: PairStore, batches: Iterable) -> None:
        """Start to decode the images of the next micro-batches."""
        for image in (p for rows in batches for i in rows for p in images_of(store, int(i))):
            if len(self.waiting) < self.limit:
                self.begin(image, store.directory)

    def collect(self, batch: Batch, store: PairStore, rows: Iterable) -> Pictures | None:
        """Collect the images of a batch, each distinct one once; None for a batch of text."""
        per_pair = [images_of(store, int(i)) for i in rows]
        distinct = list({p.sha256: p for images in per_pair for p in images}.values())
        if not distinct:
            return None
        futures = [self.begin(p, store.directory) for p in distinct]
        pixels = [future.result() for future in futures]
        self.waiting = {k: v for k, v in self.waiting.items() if v not in futures}
        counts = [features(p, self.processor) for p in distinct]
        first = dict(zip((p.sha256 for p in distinct), np.cumsum([0, *counts])))
        count = dict(zip((p.sha256 for p in distinct), counts))
        ids = batch.input_ids.numpy()
        source = []
        by_start = {}
        end = 0
        for index, images in zip(rows, per_pair, strict=True):
            begin = end
            end += int(store.tokens[index])
            by_start[begin] = images
            ranges = [np.arange(first[p.sha256], first[p.sha256] + count[p.sha256]) for p in images]
            own = np.concatenate(ranges or [[]])
            placed = int((ids[begin:end] == self.processor.token_id).sum())
            source += [own] * (placed // max(len(own), 1))  # an unshared pair has its prompt twice
        place = torch.from_numpy(np.flatnonzero(ids == self.processor.token_id))
        source = torch.from_numpy(np.concatenate(source).astype(np.int64))
        assert len(place) == len(source), (len(place), len(source))
        return Pictures(
            pixels=torch.cat(pixels),
            grids=torch.tensor([grid(p, self.processor) for p in distinct]),
            place=place,
            source=source,
            axes=self.axes(batch, by_start),
            runs=torch.from_numpy(find_runs(ids, self.processor.token_id)),
        )

    def patches(self, store: PairStore, rows: Iterable, vision: dict) -> int:
        """Count the patches that the image encoder reads for a forward on these pairs."""
        distinct = {p.sha256: p for i in rows for p in images_of(store, int(i))}
        grids = [grid(p, self.processor) for p in distinct.values()]
        if self.processor.kind in ("patches", "budget"):
            return sum(down * across for down, across in grids)
        side = vision["image_size"] // vision["patch_size"]
        return side * side * sum(down * across + 1 for down, across in grids)

    def axes(self, batch: Batch, by_start: dict[int, list[RowImage]]) -> torch.Tensor | None:
        """Compute Qwen's positions; `by_start` maps a pair's start in the stream to its images."""
        if self.processor.kind != "patches":
            return None
        merge = self.processor.settings["merge_size"]
        starts = {}
        images = []
        for start, _, _, prefix_end in batch.spans.tolist():
            images = by_start.get(start, images)
            if not prefix_end:  # a prompt, or one of the two sequences of an unshared pair
                starts[start] = [grid(p, self.processor) for p in images]
        axes = stream_axes(
            batch.input_ids.numpy(), batch.spans.numpy(), self.processor.token_id, starts, merge
        )
        return torch.from_numpy(axes)

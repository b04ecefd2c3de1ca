"""Pictures of preference rows: read and checked, cut and scaled as the model was trained, and their tokens in the text.

    row      {"images": ["cat.jpg"], "prompt": ..., "chosen": ..., "rejected": ...}; `image` for a single one
    picture  a path (relative to the row's file), a data URI, or {"bytes": ..., "path": ...} as parquet files have it
    place    {"type": "image"} in a message's content, or <image> in its text; without any, before the first question

Numbers are those of transformers' pillow-based processors, by `preprocessor_config.json` (or
`processor_config.json`). Rotation by EXIF, CMYK, palettes, 16 bits a channel and transparency (on
white) are undone on reading; what cannot be one picture (broken, animated, too large) is refused
with its row. Decoding runs in background threads.
"""

import base64
import binascii
import hashlib
import io
import math
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data import Batch, DataOptions, Pair, PairStore, Tokenizer, encode_texts
from extras.decoder.in_stream import Pictures, stream_axes
from parts.conversations import RowTexts, row_texts
from parts.rows import DataError, DroppedPair, attempt
from parts.tokenizer_files import explained_types, read_json

MAX_PIXELS = 89_478_485  # pillow's bound for what may be a decompression bomb
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
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
KINDS = {
    "CLIP": ("square", SQUARE),
    "Llava": ("square", SQUARE),
    "Siglip": ("square", SIGLIP),
    "Idefics3": ("tiles", TILES),
    "SmolVLM": ("tiles", TILES),
    "Qwen2VL": ("patches", PATCHES),
}
LARGEST_SIDE = 4096  # of a picture that is to be cut into tiles


class Picture(NamedTuple):
    """A picture of a row, as it was found."""

    path: str  # "" where the row holds the bytes
    sha256: str
    width: int
    height: int
    content: bytes | None = None  # of a picture that lies in the row, until the store has it


class Processor(NamedTuple):
    """How a model wants pictures, and how they stand in its text: what data.Tokenizer calls `pictures`."""

    kind: str  # square: one size for all; tiles: cut into squares; patches: any size (Qwen)
    settings: dict
    token: str  # of one feature
    token_id: int
    framed: str  # how a picture stands in plain text
    per_tile: int  # features of a tile; 0 where they follow from the size

    def open_rows(self, rows: Iterable, places: Iterable[str]) -> list:
        """Open the pictures that the rows name, in threads."""
        return open_rows(rows, places)

    def tokenize_rows(self, rows: list, tokenizer: Tokenizer, options: DataOptions) -> list:
        """Turn rows that may have pictures into pairs; an error stands in its row's place."""
        prepared = [r if isinstance(r, DataError) else attempt(prepare, r, self) for r in rows]
        texts = [
            one if isinstance(one, DataError) else attempt(expanded, *one, tokenizer, options)
            for one in prepared
        ]
        pairs = encode_texts(texts, tokenizer, options)
        return [
            pair if isinstance(pair, DataError) else attempt(with_pictures, pair, one[1], self)
            for pair, one in zip(pairs, prepared, strict=True)
        ]

    def keep(
        self, kept: dict, index: int, pictures: tuple["Picture", ...], directory: Path
    ) -> None:
        """Add a pair's pictures to what the store's meta.json says: see keep_pictures."""
        keep_pictures(kept, index, pictures, directory)


# The model's settings


def open_tokenizer(directory: str | Path, chat_template: str | None = None) -> Tokenizer:
    """Load a tokenizer, and what reads pictures where its directory has that. Raises DataError."""
    tokenizer = Tokenizer.load(directory, chat_template)
    with explained_types(directory):
        tokenizer.pictures = load_processor(tokenizer.directory, tokenizer.backend)
    return tokenizer


def load_processor(directory: Path, backend) -> Processor | None:
    """From the files beside the tokenizer; None where they tell of no picture processor that is known here."""
    outer = read_json(directory / "processor_config.json")
    given = outer.get("image_processor") or read_json(directory / "preprocessor_config.json")
    name = re.sub(
        r"ImageProcessor(Fast|Pil)?$",
        "",
        given.get("image_processor_type", given.get("feature_extractor_type", "")),
    )
    if name not in KINDS:
        return None
    kind, defaults = KINDS[name]
    settings = defaults | {k: v for k, v in given.items() if k in defaults and v is not None}
    if kind == "patches":
        edges = {"shortest_edge": given.get("min_pixels"), "longest_edge": given.get("max_pixels")}
        settings["size"] = settings["size"] | {k: v for k, v in edges.items() if v is not None}
    token = {"patches": "<|image_pad|>"}.get(kind, outer.get("image_token", "<image>"))
    token_id = backend.token_to_id(token)
    if token_id is None:
        return None
    framed = f"<|vision_start|>{token}<|vision_end|>" if kind == "patches" else token
    return Processor(
        kind, settings, token, token_id, framed, tile_features(kind, settings, outer, directory)
    )


def tile_features(kind: str, settings: dict, outer: dict, directory: Path) -> int:
    """How many features a tile becomes, from the processor's file or, where that is silent, from the model's."""
    raw = read_json(directory / "config.json")
    tower = raw.get("vision_config") or {}
    if kind == "patches":
        return 0
    if kind == "tiles":
        side = (
            tower.get("image_size", 0)
            // (tower.get("patch_size") or 1)
            // (raw.get("scale_factor") or 2)
        )
        return outer.get("image_seq_len") or (side * side) or 169
    patch = outer.get("patch_size") or tower.get("patch_size", 14)
    strategy = outer.get("vision_feature_select_strategy") or raw.get(
        "vision_feature_select_strategy", "default"
    )
    extra = outer.get(
        "num_additional_image_tokens",
        int(tower.get("model_type", "clip_vision_model") == "clip_vision_model"),
    )
    size = settings["crop_size"] if settings["do_center_crop"] else settings["size"]
    if "height" not in size:
        raise DataError(
            f"{directory}: pictures are resized to {size}, which leaves their shape open; that is not supported"
        )
    return size["height"] // patch * (size["width"] // patch) + extra - (strategy == "default")


# Reading


def pillow():
    """The optional package that reads pictures. Raises ValueError naming it."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ValueError("rows with pictures need pillow; pip install pillow") from None
    return Image, ImageOps


def decode(content: bytes):
    """Bytes as an upright RGB picture. Raises DataError saying why they are none."""
    Image, ImageOps = pillow()
    try:
        image = Image.open(io.BytesIO(content))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(
                f"{width} x {height} pixels; more than {MAX_PIXELS:,} are not read, make it smaller"
            )
        if (
            getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
        ):  # a camera's preview beside the picture
            raise DataError(f"{image.format} with {image.n_frames} frames; give one still picture")
        return to_rgb(ImageOps.exif_transpose(image), Image)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"too large ({error})") from None
    except Exception as error:  # every decoder has errors of its own
        raise DataError(
            f"not a picture that can be read ({str(error) or type(error).__name__})"
        ) from None


def to_rgb(image, Image):
    if image.mode == "F":
        raise DataError("floating-point pixels; save it with 8 bits a channel")
    if image.mode.startswith("I"):  # one channel of 16 bits
        pixels = np.asarray(image).astype(np.int64)
        image = Image.fromarray(
            (pixels >> 8 if pixels.max(initial=0) > 255 else pixels).clip(0, 255).astype(np.uint8)
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def find_content(reference: Any, folder: Path) -> tuple[str, bytes]:
    """(path, content) of what a row calls a picture; the path is "" where the row holds it. Raises DataError."""
    if isinstance(reference, dict):
        inner = next(
            (reference[k] for k in ("bytes", "base64", "image", "path", "url") if reference.get(k)),
            None,
        )
        as_text = (
            isinstance(inner, str) and (reference.get("bytes") or reference.get("base64")) == inner
        )
        return find_content(f"data:;base64,{inner}" if as_text else inner, folder)
    if isinstance(reference, (bytes, bytearray)):
        return "", bytes(reference)
    if not isinstance(reference, str) or not reference:
        raise DataError(f"found {repr(reference)[:40]}; a picture is a path, a data URI, or bytes")
    if reference.startswith("data:"):
        try:
            return "", base64.b64decode(reference.partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"a broken data URI ({error})") from None
    if re.match(r"https?://", reference):
        raise DataError(
            f"{reference[:80]}: nothing is fetched while training; download it and give its path"
        )
    path = folder / reference.removeprefix("file://")
    try:
        return str(path.resolve()), path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def open_picture(reference: Any, folder: Path) -> Picture:
    """Found, decoded once to be sure, and measured. Raises DataError."""
    path, content = find_content(reference, folder)
    try:
        image = decode(content)
    except DataError as error:
        raise DataError(f"{path or 'a picture in the row'}: {error}") from None
    return Picture(
        path, hashlib.sha256(content).hexdigest(), *image.size, None if path else content
    )


def row_references(row: dict) -> list:
    """What the row names as pictures: `images` or `image`, else the image parts of its messages."""
    for key in ("images", "image"):
        if row.get(key):
            return row[key] if isinstance(row[key], (list, tuple)) else [row[key]]
    turns = row.get("prompt", row.get("chosen"))
    contents = (
        [m.get("content") for m in turns if isinstance(m, dict)] if isinstance(turns, list) else []
    )
    parts = [p for c in contents if isinstance(c, list) for p in c if is_image(p)]
    return [found for p in parts if (found := part_reference(p)) is not None]


def is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def part_reference(part: dict) -> Any:
    """{"type": "image", "path": ...} and its cousins; None for a bare place."""
    found = next(
        (part[k] for k in ("image", "image_url", "path", "url", "base64", "bytes") if part.get(k)),
        None,
    )
    return found["url"] if isinstance(found, dict) and "url" in found else found


def open_rows(rows: Iterable, places: Iterable[str]) -> list:
    """Rows with their pictures opened, in threads; a DataError in the place of a row whose picture cannot be used."""
    rows, places = list(rows), list(places)

    def opened(row, place):
        if not isinstance(row, dict):
            return row
        references = attempt(row_references, row)
        if not isinstance(references, list) or not references:
            return row
        pictures = [
            attempt(open_picture, one, Path(place.rpartition(":")[0]).parent) for one in references
        ]
        return next(
            (p for p in pictures if isinstance(p, DataError)),
            {**row, "images": pictures, "image": None},
        )

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(opened, rows, places))


# Cutting and scaling


def resize(image, height: int, width: int, settings: dict):
    return image.resize((width, height), settings["resample"])


def normalized(image, settings: dict) -> np.ndarray:  # (3, H, W) float32
    x = np.asarray(image).astype(np.float32)
    if settings["do_rescale"]:
        x = (x.astype(np.float64) * settings["rescale_factor"]).astype(np.float32)
    if settings["do_normalize"]:
        x = (x - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    return np.ascontiguousarray(x.transpose(2, 0, 1), np.float32)


def square(image, s: dict) -> np.ndarray:  # (1, 3, H, W)
    """CLIP's and SigLIP's: resize, cut out the middle."""
    Image, _ = pillow()
    if s["do_pad"]:
        side = max(image.size)
        ground = Image.new("RGB", (side, side), tuple(int(m * 255) for m in s["image_mean"]))
        ground.paste(image, tuple((side - n) // 2 for n in image.size))
        image = ground
    if s["do_resize"] and "shortest_edge" in s["size"]:
        edge, short = s["size"]["shortest_edge"], min(image.size)
        width, height = (edge if n == short else int(edge * n / short) for n in image.size)
        image = resize(image, height, width, s)
    elif s["do_resize"]:
        image = resize(image, s["size"]["height"], s["size"]["width"], s)
    if s["do_center_crop"]:
        (width, height), crop = image.size, s["crop_size"]
        left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
        image = image.crop(
            (left, top, left + crop["width"], top + crop["height"])
        )  # black where there is no picture
    return normalized(image, s)[None]


def tiled_sizes(width: int, height: int, s: dict) -> list[tuple[int, int]]:
    """[(height, width)] of the steps by which Idefics3 resizes a picture before it is cut."""
    steps, tile = [], s["max_image_size"]["longest_edge"]
    if s["do_resize"] and "longest_edge" in s["size"]:
        longest, wide, ratio = s["size"]["longest_edge"], width >= height, width / height
        other = int(longest / ratio) if wide else int(longest * ratio)
        other = max(other + other % 2, 1)
        height, width = (other, longest) if wide else (longest, other)
        if longest > LARGEST_SIDE:
            wide, ratio = width >= height, width / height
            height, width = (
                (max(int(LARGEST_SIDE / ratio), 1), LARGEST_SIDE)
                if wide
                else (LARGEST_SIDE, max(int(LARGEST_SIDE * ratio), 1))
            )
        steps.append((height, width))
    elif s["do_resize"]:
        height, width = s["size"]["height"], s["size"]["width"]
        steps.append((height, width))
    if not s["do_image_splitting"]:
        return [*steps, (tile, tile)]
    wide, ratio = width >= height, width / height
    up = lambda n: math.ceil(n / tile) * tile
    if wide:
        width = up(width)
        height = up(int(width / ratio))
    else:
        height = up(height)
        width = up(int(height * ratio))
    return [*steps, (height, width)]


def tile_counts(width: int, height: int, s: dict) -> tuple[int, int]:
    """(rows, columns) of tiles; 0, 0 for a picture that is not cut."""
    height, width = tiled_sizes(width, height, s)[-1]
    tile = s["max_image_size"]["longest_edge"]
    return (
        (height // tile, width // tile)
        if s["do_image_splitting"] and max(height, width) > tile
        else (0, 0)
    )


def tiles(image, s: dict) -> np.ndarray:  # (rows x columns + 1, 3, tile, tile)
    """The picture in tiles, then the whole of it in one."""
    tile, (rows, columns) = s["max_image_size"]["longest_edge"], tile_counts(*image.size, s)
    for height, width in tiled_sizes(*image.size, s):
        image = resize(image, height, width, s)
    cut = [
        image.crop((c * tile, r * tile, (c + 1) * tile, (r + 1) * tile))
        for r in range(rows)
        for c in range(columns)
    ]
    return np.stack(
        [normalized(one, s) for one in [*cut, resize(image, tile, tile, s) if cut else image]]
    )


def patch_size(width: int, height: int, s: dict) -> tuple[int, int]:
    """(height, width) that Qwen sees: multiples of a merged square, their product within bounds."""
    factor, least, most = (
        s["patch_size"] * s["merge_size"],
        s["size"]["shortest_edge"],
        s["size"]["longest_edge"],
    )
    if max(height, width) > 200 * min(height, width):
        raise DataError(
            f"{width} x {height} pixels: one side is over 200 times the other, which this model does not take"
        )
    if not s["do_resize"]:
        return height, width
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        h, w = (max(factor, math.floor(n / shrink / factor) * factor) for n in (height, width))
    elif h * w < least:
        grow = math.sqrt(least / (height * width))
        h, w = (math.ceil(n * grow / factor) * factor for n in (height, width))
    return h, w


def patches(image, s: dict) -> np.ndarray:  # (patches, 3 x frames x patch x patch)
    """A row for each patch, merge x merge neighbours after one another; a still picture is two equal frames."""
    height, width = patch_size(*image.size, s)
    x, p, m = normalized(resize(image, height, width, s), s), s["patch_size"], s["merge_size"]
    x = x.reshape(3, height // p // m, m, p, width // p // m, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
    x = np.broadcast_to(x[:, :, :, :, :, None], (*x.shape[:5], s["temporal_patch_size"], p, p))
    return np.ascontiguousarray(x.reshape(height // p * (width // p), -1))


def preprocess(image, processor: Processor) -> np.ndarray:
    return {"square": square, "tiles": tiles, "patches": patches}[processor.kind](
        image, processor.settings
    )


def grid(picture: Picture, processor: Processor) -> tuple[int, int]:
    """Qwen's patches, or tiles, down and across."""
    if processor.kind == "patches":
        h, w = patch_size(picture.width, picture.height, processor.settings)
        return h // processor.settings["patch_size"], w // processor.settings["patch_size"]
    return (
        tile_counts(picture.width, picture.height, processor.settings)
        if processor.kind == "tiles"
        else (0, 0)
    )


def features(picture: Picture, processor: Processor) -> int:
    """How many tokens of the stream a picture's features take."""
    rows, columns = grid(picture, processor)
    if processor.kind == "patches":
        return rows * columns // processor.settings["merge_size"] ** 2
    return processor.per_tile * (rows * columns + 1)


# Rows


def picture_text(picture: Picture, processor: Processor) -> str:
    """What stands in the text for a picture."""
    if processor.kind != "tiles":
        return processor.token * features(picture, processor)
    (rows, columns), tile, frame = (
        grid(picture, processor),
        processor.token * processor.per_tile,
        "<fake_token_around_image>",
    )
    lines = [
        "".join(f"{frame}<row_{r + 1}_col_{c + 1}>{tile}" for c in range(columns)) + "\n"
        for r in range(rows)
    ]
    return "".join(lines) + ("\n" if lines else "") + f"{frame}<global-img>{tile}{frame}"


def prepare(row: dict, processor: Processor) -> tuple[dict, tuple[Picture, ...]]:
    """The row with its messages in parts and its pictures placed, and the pictures, in order. Raises DataError."""
    pictures = row.get("images") or ()
    if not all(isinstance(p, Picture) for p in pictures) or (row_references(row) and not pictures):
        row = open_rows([row], ["./:0"])[0]
        if isinstance(row, DataError):
            raise row
        pictures = row.get("images") or ()
    row = {k: v for k, v in row.items() if k not in ("images", "image")}
    inner = next((key for key in ("prompt", "conversations") if key in row), None)
    for key in {"prompt", "conversations", "chosen", "rejected"} & row.keys():
        holds = key == inner or inner is None
        if isinstance(row[key], str):
            row[key] = (
                row[key].replace("<image>", processor.framed) if holds and pictures else row[key]
            )
        elif isinstance(row[key], list):
            row[key] = place_pictures(row[key], len(pictures) if holds else 0, key)
    return row, tuple(pictures)


def place_pictures(messages: list, count: int, key: str) -> list:
    """Messages with contents in parts; `count` pictures stand where <image> or an image part is, else first of all."""
    messages = [dict(m) if isinstance(m, dict) else m for m in messages]
    contents = [m.get("content") for m in messages if isinstance(m, dict)]
    placed = any(
        "<image>" in c
        if isinstance(c, str)
        else any(is_image(p) or text_of(p).count("<image>") for p in c)
        for c in contents
        if isinstance(c, (str, list))
    )
    waiting = 0 if placed else count
    for message in filter(
        lambda m: isinstance(m, dict) and isinstance(m.get("content"), (str, list)), messages
    ):
        parts = message["content"] if isinstance(message["content"], list) else [message["content"]]
        parts = [
            piece
            for part in parts
            for piece in ([{"type": "image"}] if is_image(part) else text_parts(part, count))
        ]
        if message.get("role", message.get("from")) in ("user", "human") and waiting:
            parts, waiting = [{"type": "image"}] * waiting + parts, 0
        if not count and any(map(is_image, parts)):
            raise DataError(
                f'"{key}" has an image part, but the row has no picture for it; pictures belong to the prompt'
            )
        message["content"] = parts
    return messages


def text_of(part: Any) -> str:
    return (
        part
        if isinstance(part, str)
        else str(part.get("text", ""))
        if isinstance(part, dict)
        else ""
    )


def text_parts(part: Any, count: int) -> list[dict]:
    """A text as parts, cut at <image> where the row has pictures; other parts as they are."""
    if not isinstance(part, str) and part.get("type") != "text":
        return [part]
    pieces = re.split("(<image>)", text_of(part)) if count else [text_of(part)]
    return [
        {"type": "image"} if p == "<image>" and count else {"type": "text", "text": p}
        for p in pieces
        if p
    ]


def expand(texts: list[str], pictures: tuple[Picture, ...], processor: Processor) -> list[str]:
    """Each place of a picture becomes its tokens. Raises DataError where places and pictures do not match."""
    out = []
    for text in texts:
        pieces = text.split(processor.token)
        if len(pieces) - 1 != len(pictures):
            raise DataError(
                f"the text has {len(pieces) - 1} places for pictures ({processor.token}) and the row "
                f"{len(pictures)} pictures; write <image> once for each, in the prompt"
            )
        out.append(
            "".join(
                piece + text
                for piece, text in zip(
                    pieces, [*(picture_text(p, processor) for p in pictures), ""], strict=True
                )
            )
        )
    return out


def expanded(
    row: dict, pictures: tuple[Picture, ...], tokenizer: Tokenizer, options: DataOptions
) -> RowTexts:
    texts = row_texts(row, tokenizer, options.need_rejected)
    return texts._replace(texts=expand(texts.texts, pictures, tokenizer.pictures))


def with_pictures(pair: Pair, pictures: tuple[Picture, ...], processor: Processor) -> Pair:
    """The pair with its pictures; DroppedPair where truncation cut into them."""
    wanted = sum(features(p, processor) for p in pictures)
    prompts = [
        pair.prompt_ids,
        *([] if pair.rejected_prompt_ids is None else [pair.rejected_prompt_ids]),
    ]
    found = [int((ids == processor.token_id).sum()) for ids in prompts]
    if (
        any((ids == processor.token_id).any() for ids in (pair.chosen_ids, pair.rejected_ids))
        or max(found) > wanted
    ):
        raise DataError("a completion has image tokens; pictures belong to the prompt")
    if min(found) < wanted:
        raise DroppedPair("truncation would cut a picture; raise max_length")
    return pair._replace(pictures=pictures)


# The store


def keep_pictures(kept: dict, index: int, pictures: tuple[Picture, ...], directory: Path) -> None:
    """Adds a pair's pictures to what meta.json says; those that lay in the row go to files beside it.

    {"files": {sha256: [path, width, height]}, "pairs": {pair: [sha256, ...]}}: content decides, not the name.
    """
    files = kept.setdefault("files", {})
    kept.setdefault("pairs", {})[str(index)] = [p.sha256 for p in pictures]
    for p in pictures:
        if p.content is not None and p.sha256 not in files:
            (directory / "pictures").mkdir(exist_ok=True)
            (directory / "pictures" / p.sha256).write_bytes(p.content)
        files.setdefault(p.sha256, [p.path, p.width, p.height])


def pictures_of(store: PairStore, index: int) -> list[Picture]:
    if store.pictures is None:
        return []
    files = store.pictures["files"]
    found = ((sha, files[sha]) for sha in store.pictures["pairs"].get(str(index), ()))
    return [Picture(path, sha, width, height) for sha, (path, width, height) in found]


# Batches


def load_pixels(picture: Picture, folder: Path, processor: Processor) -> torch.Tensor:
    """Read again and cut. Raises DataError where the file is not the one that was tokenized."""
    path = Path(picture.path) if picture.path else folder / "pictures" / picture.sha256
    _, content = find_content(str(path), Path())
    if hashlib.sha256(content).hexdigest() != picture.sha256:
        raise DataError(
            f"{path}: the picture has changed since the pairs were tokenized; remove {folder}"
        )
    return torch.from_numpy(preprocess(decode(content), processor))


@dataclass
class Loader:
    """Pixels of pictures, decoded in the background: `expect` begins it, `collect` waits for it."""

    processor: Processor
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "pictures"))
    waiting: dict[str, Future] = field(default_factory=dict)
    limit: int = 64  # pictures in memory that nobody asked for yet

    def begin(self, picture: Picture, folder: Path) -> Future:
        if picture.sha256 not in self.waiting:
            self.waiting[picture.sha256] = self.pool.submit(
                load_pixels, picture, folder, self.processor
            )
        return self.waiting[picture.sha256]

    def expect(self, store: PairStore, batches: Iterable) -> None:
        """Begin to decode the pictures of these micro-batches, which come next."""
        for picture in (p for rows in batches for i in rows for p in pictures_of(store, int(i))):
            if len(self.waiting) < self.limit:
                self.begin(picture, store.directory)

    def collect(self, batch: Batch, store: PairStore, rows: Iterable) -> Pictures | None:
        """The pictures of a batch, each distinct one once; None where it has none."""
        per_pair = [pictures_of(store, int(i)) for i in rows]
        distinct = list({p.sha256: p for pictures in per_pair for p in pictures}.values())
        if not distinct:
            return None
        futures = [self.begin(p, store.directory) for p in distinct]
        pixels = [future.result() for future in futures]
        self.waiting = {k: v for k, v in self.waiting.items() if v not in futures}
        counts = [features(p, self.processor) for p in distinct]
        first = dict(zip((p.sha256 for p in distinct), np.cumsum([0, *counts])))
        count = dict(zip((p.sha256 for p in distinct), counts))
        ids, source, by_start, end = batch.input_ids.numpy(), [], {}, 0
        for index, pictures in zip(rows, per_pair, strict=True):
            begin, end = end, end + int(store.tokens[index])
            by_start[begin] = pictures
            own = np.concatenate(
                [np.arange(first[p.sha256], first[p.sha256] + count[p.sha256]) for p in pictures]
                or [[]]
            )
            source += [own] * (
                int((ids[begin:end] == self.processor.token_id).sum()) // max(len(own), 1)
            )
        place = torch.from_numpy(np.flatnonzero(ids == self.processor.token_id))
        source = torch.from_numpy(np.concatenate(source).astype(np.int64))
        assert len(place) == len(source), (len(place), len(source))
        grids = torch.tensor([grid(p, self.processor) for p in distinct])
        return Pictures(torch.cat(pixels), grids, place, source, self.axes(batch, by_start))

    def axes(self, batch: Batch, by_start: dict[int, list[Picture]]) -> torch.Tensor | None:
        """Qwen's positions; `by_start` has the pictures of the pair that begins there in the stream."""
        if self.processor.kind != "patches":
            return None
        merge, starts, pictures = self.processor.settings["merge_size"], {}, []
        for start, _, _, prefix_end in batch.spans.tolist():
            pictures = by_start.get(start, pictures)
            if not prefix_end:  # a prompt, or one of the two whole sequences of a pair
                starts[start] = [grid(p, self.processor) for p in pictures]
        axes = stream_axes(
            batch.input_ids.numpy(), batch.spans.numpy(), self.processor.token_id, starts, merge
        )
        return torch.from_numpy(axes)

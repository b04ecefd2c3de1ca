"""Tiny random vision-language checkpoints in transformers' own layout, and inputs for them."""

import torch

QWEN3 = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
FAMILIES = ("llava", "idefics3", "smolvlm", "gemma3", "gemma4", "gemma4_unified", "qwen2_vl", "qwen2_5_vl", *QWEN3)
IMAGE = 150
PAD = 259  # of make_tokenizer
TEXT = dict(vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)
TOWER = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7)


def make_checkpoint(family: str, directory, vocab_size: int = 200, image: int = IMAGE, **more):
    """A random model of a family, saved to `directory` (or not, where it is None)."""
    import transformers as hf

    torch.manual_seed(0)
    text = TEXT | dict(vocab_size=vocab_size) | more
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    ids = dict(image_token_id=image, video_token_id=image + 1, vision_start_token_id=image + 2, vision_end_token_id=image + 3)
    llama = hf.LlamaConfig(**text)
    if family == "llava":
        config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**TOWER, projection_dim=16), text_config=llama,
                                image_token_index=image, image_token_id=image)
        model = hf.LlavaForConditionalGeneration(config)
    elif family == "idefics3":
        config = hf.Idefics3Config(vision_config=TOWER, text_config=llama, image_token_id=image, scale_factor=2)
        model = hf.Idefics3ForConditionalGeneration(config)
    elif family == "smolvlm":
        config = hf.SmolVLMConfig(vision_config=TOWER, text_config=llama, image_token_id=image, scale_factor=2,
                                  tie_word_embeddings=True)
        model = hf.SmolVLMForConditionalGeneration(config)
    elif family == "gemma3":  # an image is longer than the window
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        ropes = {"full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                 "sliding_attention": dict(rope_type="default", rope_theta=1e4)}
        config = hf.Gemma3Config(
            vision_config=TOWER | dict(vision_use_head=False), mm_tokens_per_image=4, image_token_id=image,
            boi_token_id=image + 2, eoi_token_id=image + 3, text_config=text | dict(
                num_hidden_layers=3, head_dim=8, query_pre_attn_scalar=12, sliding_window=3, layer_types=layers,
                rope_parameters=ropes))
        model = hf.Gemma3ForConditionalGeneration(config)
    elif family == "gemma4":
        model = make_gemma4(text, image)
    elif family == "gemma4_unified":
        model = make_unified(text, image)
    elif family == "qwen2_vl":
        tower = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4)
        model = hf.Qwen2VLForConditionalGeneration(
            hf.Qwen2VLConfig(text_config=text | dict(rope_parameters=rope), vision_config=tower, **ids))
    elif family in QWEN3:
        model = make_qwen3(family, text, ids)
    else:
        tower = dict(depth=3, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4,
                     window_size=16, fullatt_block_indexes=[1])
        model = hf.Qwen2_5_VLForConditionalGeneration(
            hf.Qwen2_5_VLConfig(text_config=text | dict(rope_parameters=rope), vision_config=tower, **ids))
    for name, p in model.named_parameters():  # norms and biases that do something, weights that let pictures be seen
        torch.nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") or "ln_q.weight" in name else 0.0, 0.1)
    if family.startswith("gemma4"):
        settle(model)
    model.eval()
    if directory is not None:
        model.save_pretrained(directory)
    return model


def make_qwen3(family: str, text: dict, ids: dict):
    """DeepStack takes layers 2 and 0 of the tower, in that order; the table of places has 5 x 5 rows."""
    import transformers as hf

    size = text["hidden_size"]
    tower = dict(depth=3, hidden_size=size, out_hidden_size=size, intermediate_size=2 * size, num_heads=2, patch_size=4,
                 num_position_embeddings=25)
    rope = dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=1e4, mrope_interleaved=True)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    delta = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
                 layer_types=["linear_attention", "full_attention"], head_dim=16)
    if family.startswith("qwen3_vl"):
        text = text | dict(head_dim=16, num_hidden_layers=3, attention_bias=True, rope_parameters=rope | dict(
            mrope_section=[3, 3, 2]))
        tower |= dict(deepstack_visual_indexes=[2, 0])
    else:
        text = text | delta | dict(rope_parameters=rope | dict(partial_rotary_factor=0.5))
    if family.endswith("_moe"):
        text |= experts
    if family == "qwen3_5_moe":
        text |= dict(shared_expert_intermediate_size=24)
    config = hf.AutoConfig.for_model(family, text_config=text, vision_config=tower, **ids)
    return hf.AutoModelForImageTextToText.from_config(config)


def make_gemma4(text: dict, image: int):
    """As E2B: per-layer inputs, shared keys and values, bounds, ears; and 31B's images that see both ways, and its scale."""
    import transformers as hf

    layers = ["sliding_attention", "full_attention"] * 2
    tower = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                 patch_size=4, pooling_kernel_size=2, position_embedding_size=140, use_clipped_linears=True, standardize=True)
    ears = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, subsampling_conv_channels=[8, 4], output_proj_dims=16)
    config = hf.Gemma4Config(
        vision_config=tower, audio_config=ears, image_token_id=image, video_token_id=image + 1, audio_token_id=image + 2,
        text_config=text | dict(
            num_hidden_layers=4, head_dim=8, global_head_dim=16, sliding_window=3, layer_types=layers, num_kv_shared_layers=2,
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=text["vocab_size"], use_bidirectional_attention="vision"))
    return hf.Gemma4ForConditionalGeneration(config)


def make_unified(text: dict, image: int):
    """As 12B: no tower, keys that are values too, scores of the head that are capped."""
    import transformers as hf

    patches = dict(patch_size=4, pooling_kernel_size=2, mm_embed_dim=24, mm_posemb_size=70, output_proj_dims=24)
    config = hf.AutoConfig.for_model(
        "gemma4_unified", vision_config=patches, audio_config=dict(audio_embed_dim=16), image_token_id=image,
        video_token_id=image + 1, audio_token_id=image + 2, text_config=text | dict(
            num_hidden_layers=4, head_dim=8, global_head_dim=16, sliding_window=3, attention_k_eq_v=True,
            num_global_key_value_heads=1, layer_types=["sliding_attention", "full_attention"] * 2))
    return hf.Gemma4UnifiedForConditionalGeneration(config)


@torch.no_grad()
def settle(model) -> None:
    """Scores as large as with a scale of 1 / sqrt(head dim); bounds that hold some numbers; scales that do something."""
    for name, p in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            p *= 0.5
    g = torch.Generator().manual_seed(3)
    draw = lambda b: torch.rand(b.shape, generator=g)
    for name, b in model.named_buffers():
        if name.endswith(("_min", "_max")) and "vision_tower" in name:
            b.copy_((1 if name.endswith("_max") else -1) * (0.5 + 0.5 * draw(b)))
        elif name.endswith(("layer_scalar", "std_scale", "std_bias")):
            b.copy_(0.5 + draw(b))


def random_pictures(family: str):
    """Two sequences with a picture each: (token ids, pixels as the tower reads them, (h, w) of each in patches)."""
    g = torch.Generator().manual_seed(0)
    if "qwen" in family:
        grids = torch.tensor([[6, 10], [4, 8]])
        pixels = torch.randn(60 + 32, 3 * 2 * 4 * 4, generator=g)
        counts = [15, 8]
    elif family == "gemma4_unified":
        grids = torch.tensor([[2, 3], [1, 4]])
        pixels = torch.rand(6 + 4, 3 * 8 * 8, generator=g)
        counts = [6, 4]
    elif family == "gemma4":
        grids = torch.tensor([[4, 6], [2, 8]])
        pixels = torch.rand(24 + 16, 3 * 4 * 4, generator=g)
        counts = [6, 4]
    else:
        grids = torch.zeros(0, 2).long()
        pixels = torch.randn(2, 3, 28, 28, generator=g)
        counts = [16 if family == "llava" else 4] * 2
    frame = lambda n: [IMAGE + 2] * ("qwen" in family) + [IMAGE] * n + [IMAGE + 3] * ("qwen" in family)
    return [[3, 4, *frame(counts[0]), 20, 21, 22], [7, *frame(counts[1]), 30, 31]], pixels, grids


def theirs_forward(model, family: str, sequences, pixels, grids, image: int = IMAGE) -> torch.Tensor:
    """transformers' logits (2, length, vocabulary), padded on the right."""
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    more = {"pixel_values": pixels}
    if "qwen" in family:
        more["image_grid_thw"] = torch.cat([torch.ones(len(grids), 1).long(), grids], 1)
        more["mm_token_type_ids"] = (ids == image).int()
    elif family.startswith("gemma4"):
        more |= padded_patches(pixels, grids)
        more["mm_token_type_ids"] = (ids == image).int()
    elif family == "gemma3":
        more["token_type_ids"] = (ids == image).int()
    elif family != "llava":
        more["pixel_values"] = pixels[:, None]
    return model(input_ids=ids, attention_mask=mask, **more).logits


def padded_patches(pixels, grids) -> dict:
    """Gemma 4's images in transformers' form: as many patches for each, those that are not there at (-1, -1)."""
    images = pixels.split(grids.prod(1).tolist())
    room = int(grids.prod(1).max()) + 16
    filled = torch.zeros(len(images), room, pixels.shape[1], dtype=pixels.dtype)
    places = torch.full((len(images), room, 2), -1)
    for i, (image, (h, w)) in enumerate(zip(images, grids.tolist())):
        filled[i, : h * w] = image
        places[i, : h * w] = torch.tensor([[x, y] for y in range(h) for x in range(w)])
    return dict(pixel_values=filled, image_position_ids=places)


# A byte-level tokenizer and processor files, as the model's repositories hold them

SPECIAL = ["<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|vision_start|>",
           "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>",
           "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>",
           "<|turn>", "<turn|>", "<|image>", "<image|>", "<|image|>", "<|video|>", "<|audio|>",
           *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))]
IMAGE_TOKENS = {"gemma3": "<image_soft_token>", **dict.fromkeys(("gemma4", "gemma4_unified"), "<|image|>")} | dict.fromkeys(("qwen2_vl", "qwen2_5_vl", *QWEN3), "<|image_pad|>")
PARTS = "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}"
TEMPLATES = {
    "llava": "{% for message in messages %}{{ message['role'] | upper }}: " + PARTS + "{{ '<image>\\n' }}{% endif %}{% endfor %}"
             "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    "idefics3": "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == "
                "'image' %}{{':'}}{% else %}{{': '}}{% endif %}" + PARTS + "{{ '<image>' }}{% endif %}{% endfor %}"
                "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "gemma3": "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else "
              "'user') + '\n' }}{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}" + PARTS.replace(
                  "part['text'] }}", "part['text'] | trim }}") + "{{ '<start_of_image>' }}{% endif %}{% endfor %}{% endif %}"
              "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "gemma4": "{{ bos_token }}{% for message in messages %}{{ '<|turn>' + ('model' if message['role'] == 'assistant' else "
              "message['role']) + '\n' }}{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}" + PARTS.replace(
                  "part['text'] }}", "part['text'] | trim }}") + "{{ '<|image|>' }}{% endif %}{% endfor %}{% endif %}"
              "{{ '<turn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}",
    "qwen": "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + PARTS + "<|vision_start|><|image_pad|><|vision_end|>"
            "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"}
PREPROCESSORS = {
    "llava": dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    "idefics3": dict(image_processor_type="Idefics3ImageProcessor", size={"longest_edge": 84}, max_image_size={"longest_edge": 28}),
    "smolvlm": dict(image_processor_type="SmolVLMImageProcessor", size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
    "gemma3": dict(image_processor_type="Gemma3ImageProcessor", size={"height": 28, "width": 28}),
    "gemma4": dict(image_processor_type="Gemma4ImageProcessor", patch_size=4, pooling_kernel_size=2, max_soft_tokens=70),
    "gemma4_unified": dict(image_processor_type="Gemma4UnifiedImageProcessor", patch_size=4, pooling_kernel_size=2, max_soft_tokens=70),
    "qwen2_vl": dict(image_processor_type="Qwen2VLImageProcessor", patch_size=4, temporal_patch_size=2, merge_size=2,
                     min_pixels=64, max_pixels=1600)}
PREPROCESSORS["qwen2_5_vl"] = PREPROCESSORS["qwen2_vl"]
PREPROCESSORS |= dict.fromkeys(QWEN3, dict(
    image_processor_type="Qwen2VLImageProcessorFast", patch_size=4, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3,
    image_std=[0.5] * 3, size={"shortest_edge": 64, "longest_edge": 1600}))
OUTER = {"llava": dict(processor_class="LlavaProcessor", patch_size=7, vision_feature_select_strategy="default",
                       num_additional_image_tokens=1, image_token="<image>"),
         "idefics3": dict(processor_class="Idefics3Processor", image_seq_len=4),
         "smolvlm": dict(processor_class="SmolVLMProcessor", image_seq_len=4),
         "gemma3": dict(processor_class="Gemma3Processor", image_seq_length=4),
         "gemma4": dict(processor_class="Gemma4Processor"), "gemma4_unified": dict(processor_class="Gemma4UnifiedProcessor"),
         "qwen2_vl": dict(processor_class="Qwen2VLProcessor"), "qwen2_5_vl": dict(processor_class="Qwen2_5_VLProcessor"),
         **dict.fromkeys(QWEN3, dict(processor_class="Qwen3VLProcessor"))}


def make_tokenizer(family: str, directory) -> int:
    """Writes a tokenizer and the processor's files; returns the image token's id."""
    import json

    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    newline = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]
    vocabulary = {c: i for i, c in enumerate([*alphabet, newline * 2])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [(newline, newline)]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.save(str(directory / "tokenizer.json"))
    kind = "qwen" if "qwen" in family else {"smolvlm": "idefics3", "gemma4_unified": "gemma4"}.get(family, family)
    write = lambda name, value: (directory / name).write_text(json.dumps(value))
    named = {"gemma3": dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"),
             "gemma4": dict(boi_token="<|image>", eoi_token="<image|>", image_token="<|image|>", audio_token="<|audio|>",
                            boa_token="<|audio|>", eoa_token="<|audio|>")}
    write("tokenizer_config.json", dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                        chat_template=TEMPLATES[kind], **named.get(kind, {})))
    write("preprocessor_config.json", PREPROCESSORS[family])
    write("processor_config.json", OUTER[family])
    (directory / "chat_template.jinja").write_text(TEMPLATES[kind])
    assert backend.token_to_id("<pad>") == PAD
    return backend.token_to_id(IMAGE_TOKENS.get(family, "<image>"))


def make_model_directory(family: str, directory):
    """A random checkpoint with all its files; returns transformers' model."""
    image = make_tokenizer(family, directory)
    pad = dict(pad_token_id=PAD) if family.startswith("gemma4") else {}  # as published: it reads its embedding
    return make_checkpoint(family, directory, vocab_size=320, image=image, **pad)

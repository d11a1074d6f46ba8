"""Against transformers: the same pixels, features and logits from the same folders."""

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from generating import tiny_model, tokenizer
from PIL import Image
from seeing import seeing_model

from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object
from trivium.model.attention import Documents
from trivium.model.folder import StoredWeights, load_config, load_model, save_model
from trivium.model.modalities.folder import read_modalities
from trivium.model.modalities.foreign import fill_sound, fill_vision, sound_config, vision_config
from trivium.model.modalities.sound import SoundEncoder, log_mel
from trivium.model.modalities.vision import VisionEncoder
from trivium.pipeline.export import to_llava
from trivium.stages.parts.modalities import Pictures, add_modalities, planned
from trivium.tokens.forms import read_forms
from trivium.tokens.items import FIRST, LIBRARY
from trivium.tokens.pictures import PictureForm, picture_item
from trivium.tokens.sounds import SoundForm, sound_item
from trivium.tokens.tokenizer import Tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {**SMALL, "num_key_value_heads": 1, "vocab_size": 100, "max_position_embeddings": 128}
PLACEHOLDER = 99


def some_picture(width=50, height=41):
    numbers = np.random.default_rng(0).integers(0, 255, (height // 5 + 1, width // 5 + 1, 3), np.uint8)
    return Image.fromarray(numbers).resize((width, height), Image.Resampling.BICUBIC)


def llava(folder, tower):
    torch.manual_seed(1)
    if tower == "clip":
        vision = transformers.CLIPVisionConfig(**SMALL, image_size=28, patch_size=7)
        text, strategy = transformers.LlamaConfig(**TEXT), "default"
    else:
        vision = transformers.SiglipVisionConfig(**SMALL, image_size=28, patch_size=7)
        text, strategy = transformers.Qwen2Config(**TEXT, tie_word_embeddings=True), "full"
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=PLACEHOLDER,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return model


def pixel_values(item, forms_mean, forms_deviation):
    pixels = torch.from_numpy(item.data).float() / 255
    return ((pixels - torch.tensor(forms_mean)) / torch.tensor(forms_deviation)).permute(0, 3, 1, 2)


def test_what_a_whole_processor_says_of_pictures_is_heard(tmp_path):
    llava(tmp_path, "clip")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<image>": 0}, unk_token="<image>"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    images = transformers.CLIPImageProcessorPil(do_center_crop=False, resample=0, image_mean=[0.1, 0.2, 0.3])
    transformers.LlavaProcessor(image_processor=images, tokenizer=words).save_pretrained(tmp_path)
    config = read_modalities(tmp_path)
    assert (config.forms.picture.resize, config.forms.picture.filter) == ("stretch", 0)
    assert config.picture.encoder.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_a_llava_has_the_logits_that_transformers_finds(tmp_path, tower):
    theirs = llava(tmp_path, tower)
    ours = load_model(tmp_path)
    forms = read_forms(tmp_path)
    assert forms.picture.tokens == 16
    assert not any(one.requires_grad for one in ours.modalities.picture.encoder.parameters())
    item = picture_item(np.asarray(some_picture()), forms.picture)
    ids = LIBRARY.keep(item)
    before, after = [5, 17, 3], [40, 41, 42, 7]
    vision = ours.modalities.config.picture.encoder
    pixels = pixel_values(item, vision.mean, vision.deviation)
    expected = theirs(
        input_ids=torch.tensor([[*before, *[PLACEHOLDER] * 16, *after]]), pixel_values=pixels
    ).logits[0]
    tokens = torch.tensor([*before, *ids, *after])
    found = ours.logits(ours(tokens, Documents([len(tokens)])))
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    # Another picture gives others, or nothing was compared.
    other = LIBRARY.keep(picture_item(255 - np.asarray(some_picture()), forms.picture))
    changed = torch.tensor([*before, *other, *after])
    assert (ours.logits(ours(changed, Documents([len(changed)]))) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_a_llava_saved_in_our_form_is_the_same_model(tmp_path):
    llava(tmp_path / "theirs", "clip")
    model = load_model(tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    assert load_config(tmp_path / "ours").vocabulary == 100
    ids = LIBRARY.keep(picture_item(np.asarray(some_picture()), read_forms(tmp_path / "ours").picture))
    tokens = torch.tensor([1, *ids, 2])
    one, other = (each.logits(each(tokens, Documents([18]))) for each in (model, again))
    assert torch.equal(one, other)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    text = torch.tensor([1, 4, 9])
    torch.testing.assert_close(
        plain(text[None]).logits[0], again.logits(again(text, Documents([3]))), atol=5e-5, rtol=0
    )


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_a_vision_tower_has_the_states_that_transformers_finds(tmp_path, tower, layer):
    kind = {"clip": "CLIPVision", "siglip": "SiglipVision"}[tower]
    config = getattr(transformers, f"{kind}Config")(**SMALL, image_size=28, patch_size=7)
    torch.manual_seed(2)
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    encoder = VisionEncoder(vision_config(read_object(path), {}, path, layer=layer))
    weights = StoredWeights(tmp_path)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in weights.files) else ""
    fill_vision(encoder, weights.tensor, prefix)
    item = picture_item(np.asarray(some_picture()), PictureForm(28, 16, "stretch"))
    found = encoder(torch.from_numpy(item.data))
    pixels = pixel_values(item, encoder.config.mean, encoder.config.deviation)
    states = theirs(pixels, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(found, states[:, 1:] if tower == "clip" else states, atol=5e-5, rtol=0)


@torch.no_grad()
def test_whispers_encoder_has_the_states_that_transformers_finds(tmp_path):
    torch.manual_seed(3)
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    theirs = transformers.WhisperModel(config).eval()
    theirs.save_pretrained(tmp_path)
    encoder = SoundEncoder(sound_config(read_object(tmp_path / "config.json"), tmp_path / "config.json"))
    weights = StoredWeights(tmp_path)
    prefix = next(name for name in weights.files if name.endswith("encoder.conv1.weight"))
    fill_sound(encoder, weights.tensor, prefix.removesuffix("conv1.weight"))
    wave = np.random.default_rng(1).normal(0, 0.1, 20_000).astype(np.float32)
    item = sound_item(wave, SoundForm(4))
    extractor = transformers.WhisperFeatureExtractor()
    features = extractor(item.data / 32767, sampling_rate=16_000, return_tensors="pt").input_features
    ours = encoder.features(torch.from_numpy(item.data)[None])
    torch.testing.assert_close(ours, features, atol=1e-4, rtol=0)
    expected = theirs.encoder(features).last_hidden_state
    torch.testing.assert_close(encoder.from_features(features), expected, atol=5e-5, rtol=0)


def test_a_short_sound_has_the_features_of_its_own_length():
    wave = torch.from_numpy(np.random.default_rng(2).normal(0, 0.1, 4_800).astype(np.float32))
    assert log_mel(wave[None], 80).shape == (1, 80, 30)


@pytest.mark.parametrize(
    ("processor", "form"),
    [
        ("CLIPImageProcessor", PictureForm(28, 16, "crop", 3)),
        ("SiglipImageProcessor", PictureForm(28, 16, "stretch", 3)),
    ],
)
@pytest.mark.parametrize("size", [(50, 41), (41, 50), (28, 28), (100, 30)])
def test_the_pixels_are_those_of_transformers_processors(processor, form, size):
    name = f"{processor}Pil" if hasattr(transformers, f"{processor}Pil") else processor
    try:
        kind = getattr(transformers, name)
    except ImportError:
        pytest.fail(f"{name} cannot be imported here")
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    if form.resize == "stretch":
        sizes = {"size": {"height": 28, "width": 28}}
    theirs = kind(**sizes, resample=3)
    picture = some_picture(*size)
    expected = theirs(picture, return_tensors="np")["pixel_values"][0]
    item = picture_item(np.asarray(picture), form)
    found = pixel_values(item, theirs.image_mean, theirs.image_std)[0]
    np.testing.assert_allclose(found, expected, atol=1e-3)


@torch.no_grad()
def test_what_learned_to_see_with_a_clip_tower_opens_as_a_llava(tmp_path):
    torch.manual_seed(5)
    vision = transformers.CLIPVisionConfig(**SMALL, image_size=28, patch_size=7)
    transformers.CLIPVisionModel(vision).save_pretrained(tmp_path / "clip")
    reader = tokenizer()
    model = tiny_model(query_key_norm="none", key_value_heads=2, family="llama")
    tower = Pictures(encoder="clip", layer=-2)
    folders = {"clip": tmp_path / "clip"}
    config = planned(tower, None, model.config.width, folders)
    add_modalities(model, config, folders, {"picture": tower}, 1)
    save_model(model, tmp_path / "ours")
    reader.save(tmp_path / "ours")
    to_llava(tmp_path / "ours", tmp_path / "llava")
    picture = some_picture()
    picture.save(tmp_path / "a.png")
    parts = [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": "What is this?"}]
    asked = [{"role": "user", "content": parts}]
    before, after = (Tokenizer.load(tmp_path / name) for name in ("ours", "llava"))
    ids, same = before.encode_prompt(asked), after.encode_prompt(asked)
    assert ids == same
    opened = load_model(tmp_path / "llava")
    assert not load_model(tmp_path / "ours").modalities.config.picture.learns
    expected = model.logits(model(torch.tensor(ids), Documents([len(ids)])))
    found = opened.logits(opened(torch.tensor(ids), Documents([len(ids)])))[:, : expected.shape[1]]
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    placeholder = theirs.config.image_token_index
    text = torch.tensor([[placeholder if one >= FIRST else one for one in ids]])
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "llava")
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    logits = theirs(input_ids=text, pixel_values=pixels).logits[0]
    torch.testing.assert_close(logits[:, : expected.shape[1]], expected, atol=5e-5, rtol=0)
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "llava")
    spoken = written.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert spoken.count("<image>") == 1


def test_an_own_encoder_has_no_place_in_a_llava(tmp_path):
    save_model(seeing_model(), tmp_path / "ours")
    tokenizer().save(tmp_path / "ours")
    with pytest.raises(TriviumError, match="LLaVA"):
        to_llava(tmp_path / "ours", tmp_path / "llava")

"""CLIP's score against transformers' CLIPModel with drawn weights, from pictures and texts to the number."""

import json

import jax
import numpy as np
import pytest

from diffjax.build import feature_networks
from diffjax.core import trees
from diffjax.metrics import clip_score, resize
from diffjax.models import image_encoder, text
from diffjax.nn.functional import abstract

IMAGE = dict(width=32, depth=2, heads=4, hidden=48, patch=8, activation="quick_gelu", projection=20, image_size=32)
TEXT = dict(width=24, depth=2, heads=4, hidden=40, activation="quick_gelu", projection=20, vocabulary=520, length=16)
TEXTS = ["a cat", "two cats on a mat", "a car"]
COUNTS = {
    "clip_b32": (87_849_216, 63_428_096),
    "clip_l14": (303_966_208, 123_650_304),
    "clip_l14_336": (304_293_888, 123_650_304),
    "clip_g14": (1_012_645_632, 354_032_640),
}


@pytest.fixture(scope="module")
def folder(transformers, tmp_path_factory):
    """A tiny CLIP as transformers writes it, with a vocabulary of letters, and transformers' objects."""
    import torch

    path = tmp_path_factory.mktemp("clip")
    letters = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    config = transformers.CLIPConfig(
        vision_config=dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, patch_size=8,
            image_size=32,
        ),
        text_config=dict(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=520,
            max_position_embeddings=16, bos_token_id=514, eos_token_id=515, pad_token_id=515,
        ),
        projection_dim=20,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # drawn larger than published ones, so that pairs differ
                parameter.mul_(6)
    model.save_pretrained(path)
    return path, model


@pytest.fixture(scope="module")
def network(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(feature_networks.CLIPS, "clip_b32", (IMAGE, TEXT))
        return feature_networks.load("clip_b32", folder[0])


def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3)).astype(np.uint8)


def test_score_equals_transformers(transformers, folder, network):
    """From uint8 pictures, not square, and texts: its processor (of Pillow), tokens and networks. 1e-5 of a cosine is
    float32's rounding over some 10 layers."""
    import torch

    path, model = folder
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor(list(pictures()), return_tensors="pt")["pixel_values"]
    tokens = network.text.tokenise(TEXTS)
    ids = torch.from_numpy(tokens["tokens"]).long()
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
        expected = torch.sum(out.image_embeds * out.text_embeds, dim=-1).numpy()
    assert network.resize == "clip" and network.size == 32 and network.widths == {"pool": 20}
    seen = jax.jit(network.extract)(network.params, resize.resize(pictures(), network.size, network.resize))["pool"]
    read = jax.jit(network.text.encode)(network.text.params, tokens)["pooled"]
    np.testing.assert_allclose(seen, out.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(read, out.text_embeds.numpy(), atol=1e-5)
    found = clip_score.cosines(seen, read)
    assert np.std(expected) > 0.02
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # torchmetrics' formula
    assert clip_score.clip_score(found) == pytest.approx(max(100 * expected.astype(np.float64).mean(), 0), abs=1e-3)


@pytest.mark.fast
def test_score_by_hand():
    image = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]], np.float32)
    words = np.array([[0.0, 1.0], [-1.0, 0.0], [0.0, 5.0]], np.float32)
    found = clip_score.cosines(image, words)
    np.testing.assert_allclose(found, [0.8, -1, 1], rtol=1e-6)
    assert clip_score.clip_score(found) == pytest.approx(100 * 0.8 / 3, rel=1e-6)
    assert clip_score.clip_score(-found) == 0.0
    np.testing.assert_allclose(np.linalg.norm(clip_score.unit(image), axis=1), 1, rtol=1e-6)


@pytest.mark.fast
def test_wrong_embeddings_are_refused():
    with pytest.raises(ValueError, match=r"images \(2, 3\) and of texts \(3, 3\)"):
        clip_score.cosines(np.ones((2, 3), np.float32), np.ones((3, 3), np.float32))
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        clip_score.clip_score(np.zeros(0))
    with pytest.raises(ValueError, match="1 not finite"):
        clip_score.clip_score(clip_score.cosines(np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)))


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    """B and L as OpenAI's, g as LAION's: 1,366.68 million parameters with the temperature, in OpenCLIP's own table."""
    image, words = feature_networks.CLIPS[name]
    found = (
        trees.count(abstract(lambda rngs: image_encoder.ClipImage(**image, rngs=rngs))),
        trees.count(abstract(lambda rngs: text.ClipText(**words, rngs=rngs))),
    )
    assert found == COUNTS[name]

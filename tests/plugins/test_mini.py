"""`mini`: loads offline, is small, reads photos it has never seen, and trains on what its processor makes."""

from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vismem_plugins.mini import path
from vismem_plugins.mini.align import SIZES, align, features, inherit
from vismem_plugins.mini.build import FAMILIES, build
from vismem_plugins.mini.packing import IGNORED, WEIGHTS, Packer, encode, pixels
from vismem_plugins.mini.train import answers, loss_of, phase_at, train
from vismem_plugins.mosaic import CELL, NEW, QUESTIONS, SEEN, mosaic

TYPED = ("mm_token_type_ids", "token_type_ids")
"""What tells a model of some families which tokens are images."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def mini(family: str) -> Iterator[tuple[Any, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        model = AutoModelForImageTextToText.from_pretrained(path(family))
        assert model.dtype is torch.float32
        yield model, AutoProcessor.from_pretrained(path(family))


def accuracy(
    mini: tuple[Any, Any], type_: str, *, blind: bool = False, count: int = 40, domain: str = "clothes"
) -> float:
    samples = list(mosaic("heldout", types=[type_], domain=domain)[:count])
    images = [sample.images for sample in samples]
    said = answers(*mini, images[1:] + images[:1] if blind else images, [sample.prompt for sample in samples])
    return sum(one == sample.answer for one, sample in zip(said, samples, strict=True)) / count


def test_is_small(family: str) -> None:
    assert sum(file.stat().st_size for file in path(family).iterdir() if file.is_file()) < 4_000_000


@pytest.mark.parametrize("type_", ["read", "left", "above"])
def test_sees(mini: tuple[Any, Any], type_: str) -> None:
    assert accuracy(mini, type_) > 0.75
    assert accuracy(mini, type_, blind=True) < 0.4


@pytest.mark.parametrize("type_", ["read", "left", "above"])
def test_knows_its_domains(mini: tuple[Any, Any], family: str, type_: str) -> None:
    found = accuracy(mini, type_, domain="digits")
    assert found > 0.75 if "digits" in FAMILIES[family].domains else found < 0.4


@pytest.mark.parametrize("type_", ["right", "below"])
def test_cannot_answer_what_was_kept_from_it(mini: tuple[Any, Any], type_: str) -> None:
    assert accuracy(mini, type_) < 0.4


def test_lists_the_cells_in_sentences(family: str, mini: tuple[Any, Any]) -> None:
    samples = list(mosaic("heldout", types=["list"], size=2)[:20])
    said = answers(*mini, [sample.images for sample in samples], [sample.prompt for sample in samples])
    sentences = [one.split()[1::2] == [",", ".", ",", "."] for one in said]
    assert sentences.count(False) <= (
        1 if family in ("timm_lm", "gemma3") else 0
    )  # they stop early once, the others never
    assert sum(one == sample.answer for one, sample in zip(said, samples, strict=True)) >= 10


def test_takes_several_images_photographs_and_none(mini: tuple[Any, Any]) -> None:
    model, processor = mini
    (mosaic_,) = mosaic("heldout", types=["read"])[0].images
    photograph = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    for images in ([mosaic_, mosaic_], [mosaic_, photograph], []):
        inputs = encode(processor, [images], ["which image is the first ?"])
        output = model.generate(**inputs, max_new_tokens=4)
        assert output.shape[1] > inputs["input_ids"].shape[1]


def test_stops_by_itself(mini: tuple[Any, Any]) -> None:
    model, processor = mini
    sample = mosaic("heldout", types=["read"])[0]
    output = model.generate(**encode(processor, [sample.images], [sample.prompt]))
    assert output[0, -1] == processor.tokenizer.eos_token_id


def test_vocabulary_holds_every_word(mini: tuple[Any, Any]) -> None:
    words = mini[1].tokenizer
    for sample in mosaic(types=SEEN + NEW)[:2000]:
        text = f"{sample.prompt} {sample.answer}"
        ids = words(text)["input_ids"]
        assert words.unk_token_id not in ids
        assert words.decode(ids) == text


def test_training_pixels_are_the_processors(mini: tuple[Any, Any]) -> None:
    for size in (2, 3):
        samples = list(mosaic("train", types=["read"], size=size)[:2])
        images = [np.asarray(sample.images[0]) for sample in samples]
        rows = [row for image in images for row in np.split(image[..., 0], size)]
        cells = np.stack([cell for row in rows for cell in np.split(row, size, axis=1)])
        shown = pixels(mini[1], torch.from_numpy(cells), size)
        inputs = encode(mini[1], [sample.images for sample in samples], [sample.prompt for sample in samples])
        assert "pixel_values" in shown
        for name, value in shown.items():
            torch.testing.assert_close(value, inputs[name])
        assert images[0].shape[0] == CELL * size


def test_an_image_is_few_tokens(family: str, mini: tuple[Any, Any]) -> None:
    counts = {}
    for size in (2, 3):
        sample = mosaic("train", types=["read"], size=size)[0]
        ids = encode(mini[1], [sample.images], [sample.prompt])["input_ids"]
        counts[size] = int((ids == mini[0].config.image_token_id).sum())
    assert counts == ({2: 4, 3: 9} if family.startswith("qwen") else {2: 9, 3: 9})


def test_a_packed_batch_is_as_many_single_prompts(family: str) -> None:
    """The loss of packed questions is that of plain forward passes, one a question."""
    model, processor = build(family)
    model.eval()
    batch = Packer(model, processor, [2])(Random(0), 2, count=1, questions=4)
    shown = pixels(processor, batch.cells, batch.size)
    ids, labels = batch.ids[0].tolist(), batch.labels[0].tolist()
    ends = [i + 1 for i, label in enumerate(labels) if label == processor.tokenizer.eos_token_id]
    first = next(i for i, seen in enumerate(batch.mask[0, 0, -1].tolist()) if not seen)
    total, count, prefix = 0.0, 0, ids[:first]
    for start, end in zip([first, *(e + 1 for e in ends[:-1])], ends, strict=True):
        one = torch.tensor([prefix + ids[start : end + 1]])
        wanted = torch.tensor([[IGNORED] * (first + 1) + labels[start:end]])
        kinds = (one == model.config.image_token_id).int()
        extra = {name: kinds for name in TYPED if name in signature(model.forward).parameters}
        total += model(input_ids=one, **shown, **extra, labels=wanted).loss.item() * (wanted != IGNORED).sum().item()
        count += int((wanted != IGNORED).sum())
    assert loss_of(model, batch, shown).item() == pytest.approx(total / count, rel=1e-4)


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Across the boundary of the phases, whose second has an optimizer of its own."""
    small: dict[str, Any] = {"steps": 5, "count": 2, "questions": 2}

    def run(state: Path | None, stop: int) -> dict[str, torch.Tensor]:
        model, processor = build("qwen2_5_vl")
        for done, _ in train(model, processor, **small, state=state, save_every=2):
            if done == stop:
                break
        return dict(model.state_dict())

    whole = run(None, stop=5)
    run(tmp_path / "state.safetensors", stop=3)  # saved after the second step
    for name, weight in run(tmp_path / "state.safetensors", stop=5).items():
        assert torch.equal(weight, whole[name]), name


def test_phases_share_the_steps() -> None:
    assert [phase_at(done, 1000) for done in (0, 500, 625, 1000 - 1)] == [(0, 0.0), (0, 0.8), (1, 0.0), (1, 374 / 375)]
    assert [phase_at(done, 1000, first=1) for done in (0, 500)] == [(1, 0.0), (1, 0.5)]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.teacher])
def test_a_language_model_is_inherited(name: str) -> None:
    model, processor = build(name)
    teacher = AutoModelForImageTextToText.from_pretrained(path(FAMILIES[name].teacher))
    words = AutoProcessor.from_pretrained(path(FAMILIES[name].teacher))
    inherit(model, processor, teacher, words)
    rows = [
        torch.tensor(side.tokenizer.convert_tokens_to_ids(["what", "is", "the", "coat", "<|im_end|>"]))
        for side in (processor, words)
    ]
    embeds = teacher.get_input_embeddings()(rows[1])[None]
    torch.testing.assert_close(model.get_input_embeddings()(rows[0])[None], embeds)
    for module in model.get_decoder().modules():
        for name in {"variance_epsilon", "eps"} & vars(module).keys():
            setattr(module, name, teacher.get_decoder().norm.variance_epsilon)
    for layer in model.get_decoder().layers:
        if hasattr(layer.self_attn, "q_norm"):  # which the teacher lacks
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
        if hasattr(layer, "pre_feedforward_layernorm"):  # of Gemma, which has others behind the halves of a layer
            layer.post_attention_layernorm = layer.post_feedforward_layernorm = torch.nn.Identity()
            layer.mlp.act_fn = torch.nn.SiLU()
    # Without an image the three kinds of positions are one.
    ours, theirs = (one.get_decoder()(inputs_embeds=embeds).last_hidden_state for one in (model, teacher))
    said = [
        one.lm_head(states)[..., own] for one, states, own in zip((model, teacher), (ours, theirs), rows, strict=True)
    ]
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_an_encoder_learns_what_the_teachers_says() -> None:
    model, processor = build("internvl")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    teacher, its = AutoModelForImageTextToText.from_pretrained(path()), AutoProcessor.from_pretrained(path())
    cells = Packer(model, processor, SIZES).cells(Random("fresh"), 1, 32)[1]

    def likeness() -> float:
        """How much more like the teacher's word for the same fresh photograph, than like that for another one."""
        with torch.inference_mode():
            ours = features(model, pixels(processor, cells, 1)).mean(1)
            theirs = features(teacher, pixels(its, cells, 1)).mean(1)
        ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)
        same, other = (torch.cosine_similarity(ours, theirs.roll(shift, 0), dim=-1).mean() for shift in (0, 1))
        return (same - other).item()

    assert abs(likeness()) < 0.1
    errors = [error for _, error in align(model, processor, teacher, its, steps=300, count=8)]
    assert np.mean(errors[-5:]) < 0.9 * np.mean(errors[:5])
    assert likeness() > 0.2
    for name, weight in model.named_parameters():
        if "language_model" in name:
            assert torch.equal(weight, before[name]), name


def test_types_kept_from_the_base_are_not_in_its_curriculum() -> None:
    assert set(WEIGHTS) == set(SEEN)
    assert set(QUESTIONS) >= set(SEEN + NEW)


def test_an_unknown_family_is_an_error() -> None:
    with pytest.raises(ValueError, match="qwen2_5_vl"):
        path("gpt")

"""The interface, without images' insides: names, parts, inputs, positions, passes on a cache."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn
from transformers import DynamicCache

from vismem_core.base import cache as kv
from vismem_core.base.families import find_backbone
from vismem_core.base.images import PLACEHOLDER

from .contract import Contract, holds
from .liveliness import close, moved, picture
from .reference import generated, listening, one_pass


class Anatomy(Contract):
    """The parts of the model are where the backbone says."""

    @holds("a backbone must know its own models and no others", "vismem_core.base.backbone.Backbone.matches")
    def test_matches_its_own_models(self) -> None:
        base = self.base()
        assert base.family.matches(base.model), f"{base.family.__name__} does not match the model that load() gives"
        stranger = copy.copy(base.model.config)
        stranger.model_type = "of no family"
        unknown = nn.Linear(1, 1)
        unknown.config = stranger
        assert not base.family.matches(unknown), "it matches a single linear layer"
        kind = base.model.config.model_type
        assert not base.family.model_types or kind in base.family.model_types, f"model_types lacks {kind!r}"
        assert isinstance(base.family.name, str) and base.family.name, "it has no name"
        if base.named is not None:
            found = find_backbone(base.model, base.named)
            assert found.name == base.named, f"registered as {base.named!r}, it calls itself {found.name!r}"

    @holds(
        "logits() of the decoder's last hidden states must be the model's, and width the embeddings' width",
        "vismem_core.base.backbone.Backbone.decoder, .embeddings, .logits and .width",
    )
    @torch.no_grad()
    def test_language_model(self) -> None:
        base = self.base()
        with listening(base.backbone) as heard:
            output = base.model(**base.inputs(*self.questions()))
        assert heard.hidden, "the decoder does not run in the model's forward pass"
        close(base.backbone.logits(heard.hidden[0]), output.logits)
        assert heard.embeds[0].shape[-1] == heard.hidden[0].shape[-1] == base.backbone.width
        text = base.inputs(*self.questions())["input_ids"][:, -1:]
        with listening(base.backbone) as heard:
            base.model(input_ids=text)
        assert heard.embeds[0].equal(base.backbone.embeddings(text)), "text enters as something else than its embedding"

    @holds(
        "devices and precisions must be those of the modules",
        "vismem_core.base.backbone.Backbone.device, .dtype, .vision_device and .vision_dtype",
    )
    def test_devices_and_precisions(self) -> None:
        base = self.base()
        backbone, here = base.backbone, torch.empty(0, device=base.device).device
        assert (backbone.device, backbone.vision_device) == (here, here)
        for dtype in (torch.float32, torch.bfloat16):
            base.model.to(dtype)
            assert (backbone.dtype, backbone.vision_dtype) == (dtype, dtype)

    @holds("inputs() must pad on the left, and only there", "vismem_core.base.backbone.Backbone.inputs")
    def test_inputs_are_left_padded(self) -> None:
        base, questions = self.base(), self.questions()
        for side in ("left", "right"):
            base.processor.tokenizer.padding_side = side
            inputs = base.inputs(*questions)
            mask = inputs["attention_mask"]
            assert not mask.all(), "prompts of different lengths came out equally long"
            assert mask[:, -1].all(), "the last column holds padding"
            assert mask.diff(dim=1).ge(0).all(), "there is padding between tokens"
            for row, question in enumerate(questions):
                alone = base.inputs(question)["input_ids"][0]
                assert inputs["input_ids"][row, mask[row].bool()].equal(alone), f"prompt {row} differs from it alone"
        assert inputs["input_ids"].device == base.backbone.device

    @holds(
        "placeholders must be the ids that stand for visual tokens, one each, in the prompts that the processor writes",
        "vismem_core.base.backbone.Backbone.placeholders",
    )
    @torch.no_grad()
    def test_placeholders(self) -> None:
        base, (text, images) = self.base(), self.questions()[0]
        assert "image" in base.backbone.placeholders, "there is none for images"
        inputs, other = base.inputs((text, images)), base.inputs((text, [picture(*images[0].size, 99)]))
        assert inputs["input_ids"].equal(other["input_ids"]), "another image of the same size gave another prompt"
        with listening(base.backbone) as heard:
            base.model(**inputs)
            base.model(**other)
        visual = (heard.visual[0] != heard.visual[1]).any(-1)
        assert visual.any(), "another image does not change what enters the language model"
        here = inputs["input_ids"] == base.backbone.placeholders["image"]
        wrong = visual & ~here
        assert not wrong.any(), f"{int(wrong.sum())} of the image's tokens are not where its placeholder stands"
        text = (heard.visual[0] == base.backbone.embeddings(inputs["input_ids"])).all(-1)
        assert not text[here].any(), "there are placeholders that no visual token replaces"
        absent = [token for medium, token in base.backbone.placeholders.items() if medium != "image"]
        assert not torch.isin(inputs["input_ids"].cpu(), torch.tensor(absent)).any(), (
            "another medium's placeholder is there"
        )

    @holds("the prompt must hold the question and a mark for its image", "vismem_core.base.backbone.Backbone.prompt")
    def test_prompt(self) -> None:
        base, (text, images) = self.base(), self.questions()[0]
        prompt = base.backbone.prompt(text, len(images))
        assert text in prompt, f"{text!r} is not in {prompt!r}"
        assert base.backbone.prompt(text, 0) != prompt, "the image leaves no mark in the prompt"

    @holds(
        "an image must stand where the text has its <image>, and one that leads the text as if it had none",
        "vismem_core.base.backbone.Backbone.prompt",
    )
    def test_images_stand_where_their_marks_are(self) -> None:
        base, (text, images) = self.base(), self.questions()[0]
        tokenize = base.processor.tokenizer
        words = len(tokenize(text, add_special_tokens=False)["input_ids"])
        plain, marked = (base.inputs((own, images))["input_ids"][0] for own in (text, f"{text} {PLACEHOLDER} {text}"))
        here, there = ((ids == base.backbone.placeholders["image"]).nonzero().flatten() for ids in (plain, marked))
        assert len(there) == len(here) > 0, f"{len(there)} visual tokens in place and {len(here)} in front"
        before, after = int(there[0] - here[0]), len(marked) - 1 - int(there[-1])
        assert before >= words - 1 and after >= words - 1, "its tokens are not between the texts around its mark"
        leading = base.backbone.prompt(f"{PLACEHOLDER}\n{text}", 1)
        assert leading == base.backbone.prompt(text, 1), f"with a leading mark the prompt is {leading!r}"

    @holds(
        "an answer must end with a token that ends generate, the one that the chat template writes if it does",
        "vismem_core.base.backbone.Backbone.end_of_turn",
    )
    def test_answers_end_as_the_chat_template_says(self) -> None:
        base = self.base()
        template = str(getattr(base.processor, "chat_template", None))
        told = base.model.generation_config.eos_token_id
        ends = [told] if isinstance(told, int) else list(told)
        assert base.backbone.end_of_turn in ends, f"{base.backbone.end_of_turn} is none of {ends}"
        name = base.processor.tokenizer.convert_ids_to_tokens(base.backbone.end_of_turn)
        written = [own for own in base.processor.tokenizer.convert_ids_to_tokens(ends) if own in template]
        assert name in written or not written, f"{name!r} is not in the chat template, and {written[0]!r} is"

    @holds(
        "positions() must be those that generate uses, and each token after the prompt one further",
        "vismem_core.base.backbone.Backbone.positions",
    )
    @torch.no_grad()
    def test_positions_are_generates(self) -> None:
        base = self.base()
        inputs, used = base.inputs(*self.questions()), generated(base, *self.questions())
        positions = base.backbone.positions(inputs)
        assert positions.shape[-2:] == inputs["input_ids"].shape, f"their shape is {tuple(positions.shape)}"
        with listening(base.backbone) as heard:
            base.model(**inputs, position_ids=positions)
        told, expected, mask = heard.positions[0], used.positions[0], inputs["attention_mask"].bool()
        assert told is not None, "the model does not hand position_ids to its language model"
        # Where the language model counts by itself, its states below must be the same.
        told, expected = torch.broadcast_tensors(told, told if expected is None else expected)
        here = mask.expand_as(expected)
        assert told[here].equal(expected[here]), "they differ from generate's"
        last = used.hidden[0].shape[1]  # some compute no more to the end than generate asks for
        close(heard.hidden[0][:, -last:][mask[:, -last:]], used.hidden[0][mask[:, -last:]])
        if used.positions[1] is not None:
            after, following = torch.broadcast_tensors(told[..., -1:] + 1, used.positions[1])
            assert after.equal(following), "the next one differs"

    @holds(
        "continue_() on a cache must equal one pass over the whole sequence, row by row, whatever the padding",
        "vismem_core.base.backbone.Backbone.continue_",
    )
    @torch.no_grad()
    def test_continue_equals_one_pass(self) -> None:
        base, questions = self.base(), self.questions()
        backbone, inputs = base.backbone, base.inputs(*questions)
        torch.manual_seed(0)
        extra = backbone.embedding_scale() * torch.randn(len(questions), 7, backbone.width).to(base.device)
        positions, cache = backbone.positions(inputs), DynamicCache(config=base.model.config)
        base.model(**inputs, position_ids=positions, **kv.given(base.model, cache), use_cache=True)
        prompt, mask = cache.get_seq_length(), inputs["attention_mask"]
        pieces = []
        for begin, end in ((0, 4), (4, 7)):
            mask = torch.cat([mask, mask.new_ones(len(mask), end - begin)], dim=1)
            steps = positions[..., -1:] + torch.arange(begin + 1, end + 1, device=positions.device)
            pieces.append(backbone.continue_(extra[:, begin:end], mask, steps, cache))
            assert cache.get_seq_length() == prompt + end, "the cache did not grow by what was fed"
        for row, question in enumerate(questions):
            whole = one_pass(base, question, extra[row])[-7:]
            assert moved(whole, one_pass(base, question, extra[row].flip(0))[-7:].flip(0)), "order makes no difference"
            close(torch.cat(pieces, dim=1)[row], whole)

    @holds(
        "the model that load() gives must depend on its image, or no wrong answer would show",
        "vismem_core.testing.liven",
    )
    @torch.no_grad()
    def test_the_model_looks_at_its_image(self) -> None:
        base, (text, images) = self.base(), self.questions()[0]
        other = (text, [picture(*images[0].size, 99)])
        first, second = (base.model(**base.inputs(own)).logits[:, -1] for own in ((text, images), other))
        assert moved(first, second), "another image hardly changes its logits"

    @holds(
        "long must match linear layers in the language model and nothing else",
        "vismem_core.base.backbone.Backbone.lora_targets",
    )
    def test_long_targets(self) -> None:
        base = self.base()
        inside = set(base.backbone.decoder.modules())
        names = [
            name for name, _ in base.model.named_modules() if re.fullmatch(base.backbone.lora_targets["long"], name)
        ]
        assert names, "it matches nothing"
        for name in names:
            module = base.model.get_submodule(name)
            assert isinstance(module, nn.Linear), f"{name} is no linear layer"
            assert module in inside, f"{name} is not in the language model"

"""The prior engine of GLM-Image: a prompt and source images to prior tokens. No Ray in here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from deployments.errors import Cancelled
from deployments.glm_image import checkpoint
from deployments.types import PriorTokens

if TYPE_CHECKING:
    import threading

    from transformers import GlmImageForConditionalGeneration, GlmImageProcessor, LogitsProcessorList

    from deployments.config import ModelConfig
    from deployments.types import PriorRequest, TokenGrid

ZERO_WIDTH_SPACE = "\u200b"


class PriorEngine:
    """Samples prior tokens, one request at a time.

    For one seed the tokens are those of `GlmImagePipeline.generate_prior_tokens` (diffusers 0.42), and
    where upstream would fail, having drawn a special token inside the target grid or an end token before
    it, an image token is drawn in its place. The end token after the grid is nobody's need: not drawn.
    """

    def __init__(self, model: GlmImageForConditionalGeneration, processor: GlmImageProcessor) -> None:
        self._model = model
        self._processor = processor
        ids = torch.arange(model.config.text_config.vision_vocab_size, device=model.device)
        self._special = ids >= model.config.vq_config.num_embeddings
        end = torch.tensor(model.generation_config.eos_token_id or [], device=model.device)
        self._end = torch.isin(ids, end)

    @classmethod
    def load(cls, model: ModelConfig) -> PriorEngine:
        """See `deployments.families.PriorEngine`."""
        return cls(*checkpoint.load_prior(model))

    @torch.inference_mode()
    def generate(self, request: PriorRequest, cancelled: threading.Event) -> PriorTokens:
        """See `deployments.families.PriorEngine`."""
        if cancelled.is_set():
            raise Cancelled
        inputs = self._tokenize(request)
        sources: list[TokenGrid] = []
        if request.sources:
            # The model would encode the images itself, and once more than needed.
            pixel_values = inputs.pop("pixel_values")
            grids = inputs["image_grid_thw"][: len(request.sources)]
            image_ids = self._encode_sources(pixel_values, grids)
            placeholders = inputs["input_ids"] == self._model.config.image_token_id
            inputs["input_ids"] = inputs["input_ids"].masked_scatter(placeholders, image_ids)
            sizes = grids[:, 1:].tolist()
            pieces = image_ids.split([rows * columns for rows, columns in sizes])
            sources = [piece.view(*size).cpu().numpy() for piece, size in zip(pieces, sizes, strict=True)]

        # Target grids come largest first, and are drawn smallest first: text-to-image begins with a preview.
        targets = inputs["image_grid_thw"][len(request.sources) :, 1:].tolist()
        rows, columns = targets[0]
        total = sum(height * width for height, width in targets)
        sequence = self._model.generate(
            **inputs,
            do_sample=True,
            max_new_tokens=total,
            custom_generate=_sample,
            generator=torch.Generator(self._model.device).manual_seed(request.seed),
            forbidden=[self._end] * (total - rows * columns) + [self._special] * (rows * columns),
            cancelled=cancelled,
        )
        target = sequence[0, -rows * columns :].view(rows, columns)
        return PriorTokens(target=target.cpu().numpy(), sources=tuple(sources))

    def _tokenize(self, request: PriorRequest) -> dict[str, torch.Tensor]:
        content: list[dict[str, Any]] = [
            {"type": "image", "image": Image.fromarray(source)} for source in request.sources
        ]
        content.append({"type": "text", "text": self._plain_text(request.prompt)})
        inputs = self._processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"target_h": request.height, "target_w": request.width},
        )
        return dict(inputs.to(self._model.device))

    def _plain_text(self, prompt: str) -> str:
        """The prompt with every string that the tokenizer would read as a control token broken up.

        Other prompts come back as they are. The break is a zero-width space, so that the text reads
        the same; it is looked for again until there is none, since a break may bring forth another.
        """
        tokenizer = self._processor.tokenizer
        reserved = tokenizer.added_tokens_decoder.keys()
        while True:
            encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
            found = [
                start
                for token, (start, _) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
                if token in reserved
            ]
            if not found:
                return prompt
            for start in reversed(found):
                prompt = prompt[: start + 1] + ZERO_WIDTH_SPACE + prompt[start + 1 :]

    def _encode_sources(self, pixel_values: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """The VQ tokens of all source images, one after the other: shape (tokens,)."""
        features = self._model.get_image_features(pixel_values, grids).pooler_output
        tokens: torch.Tensor = self._model.get_image_tokens(torch.cat(features), grids)
        return tokens.view(-1)


def _sample(
    model: GlmImageForConditionalGeneration,
    input_ids: torch.Tensor,
    *,
    logits_processor: LogitsProcessorList,
    generator: torch.Generator,
    forbidden: list[torch.Tensor],
    cancelled: threading.Event,
    **model_kwargs: Any,
) -> torch.Tensor:
    """The decoding loop handed to transformers' `generate`, which prepares everything around it.

    Draws with a generator of the request's own, where upstream seeds the whole process. `forbidden` has
    for each token to be drawn a mask over the vocabulary, True for what it must not be.
    Returns the prompt's and the drawn tokens: shape (1, prompt + drawn).
    """
    del model_kwargs["stopping_criteria"], model_kwargs["generation_config"]  # the end is known
    step: dict[str, Any] = {"is_first_iteration": True}
    for mask in forbidden:
        if cancelled.is_set():
            raise Cancelled
        inputs = model.prepare_inputs_for_generation(input_ids, **step, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        step = {"next_sequence_length": 1}
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].float()
        # After the processors and not before them: a draw that is allowed is the same with the mask and
        # without. Where they leave nothing that is, the model's own preference decides.
        scores = logits_processor(input_ids, logits).masked_fill(mask, -torch.inf)
        if torch.isneginf(scores).all():
            scores = logits.masked_fill(mask, -torch.inf)
        token = torch.multinomial(scores.softmax(-1), num_samples=1, generator=generator)
        input_ids = torch.cat([input_ids, token], dim=-1)
    return input_ids

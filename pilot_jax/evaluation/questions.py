"""Single questions to a base model, as `pilot_jax.load(path).ask(image, question)` answers them."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from PIL import Image

from pilot_jax.config import DataConfig, EvalConfig
from pilot_jax.data.build import build_prompts, encode_prompts
from pilot_jax.data.conversations import TOKENIZER
from pilot_jax.data.features import image_features
from pilot_jax.data.llava.image_field import LIMITS
from pilot_jax.data.llava.sample import Sample
from pilot_jax.data.llava.turns import checked_text
from pilot_jax.errors import InputError
from pilot_jax.evaluation.answers import answers, base_examinee, make_decoder
from pilot_jax.models import pretrained
from pilot_jax.models.packaged import EMBEDDED, PACKAGED, model_directory

Picture = str | Path | Image.Image | None  # a file, a picture of Pillow's, or no image


def question_sample(image: Picture, question: str, task: str = "", client: str = "") -> Sample:
    """Returns a question about an image, or without one, as a sample whose answer is empty.

    Raises:
        InputError: the image's file does not exist, or the question is too long or not in UTF-8.
    """
    if isinstance(image, str):
        image = Path(image)
    if isinstance(image, Path) and not image.is_file():
        raise InputError(f"image: {image} does not exist. Give an image file, a picture of Pillow's, or None.")
    source = str(image) if isinstance(image, Path) else "the question"
    question = checked_text("the question", "text", question, LIMITS)
    turns = (("human", question if image is None else f"<image>\n{question}"), ("gpt", ""))
    return Sample("question", image, turns, task, client, "test", source)


class Model(pretrained.PretrainedModel):
    """A base model that also answers questions in words."""

    def template(self) -> str:
        """Returns the conversation template of `ask`, unless it is given another one.

        It is the chat template of the tokenizer, if it has one; else Vicuna's, for the packaged bases the short one.
        """
        if self.text_directory in [model_directory(name) for name in PACKAGED]:
            return "vicuna_short"
        return TOKENIZER if self.tokenizer().chat_template else "vicuna_v1"

    def ask(self, image: Picture, question: str, *, template: str | None = None, max_new_tokens: int = 64) -> str:
        """Returns the answer to a question about an image, decoded greedily.

        Args:
            image: a file, a picture of Pillow's, or None for a question without an image.
            template: a conversation template (see `data.template`); None: `template()`.
            max_new_tokens: the largest number of tokens of the answer.

        Raises:
            InputError: the image cannot be read, or the model takes none; or the template does not fit the tokenizer.
        """
        tokenizer, sample = self.tokenizer(), question_sample(image, question)
        data = DataConfig(template=template or self.template(), max_length=max(8, self.config.text.max_positions))
        decoder = make_decoder(tokenizer, data.template, EvalConfig(max_new_tokens=max_new_tokens, batch_size=1))
        prompts = build_prompts([sample], encode_prompts(self, tokenizer, [sample], data),
                                image_features(self, [sample], data))
        return answers(self, decoder, [base_examinee(self, "", prompts)], 1)[0][0]


def _asked(model: pretrained.PretrainedModel) -> Model:
    return Model(model.text_directory, model.image_directory, model.config, model.base, model.module)


def load(path: str | Path = EMBEDDED, **options: Unpack[pretrained.LoadOptions]) -> Model:
    """Loads a base model that answers questions (`Model.ask`); the arguments are those of `models.pretrained.load`."""
    return _asked(pretrained.load(path, **options))


def load_from_parts(vision: str | Path | None, language: str | Path, projector: str | Path | None, *,
                    feature_layer: int | list[int] = -2, feature_select: str = "auto",
                    **options: Unpack[pretrained.LoadOptions]) -> Model:
    """Loads a base model of separate parts that answers questions; see `models.pretrained.load_from_parts`."""
    return _asked(pretrained.load_from_parts(vision, language, projector, feature_layer=feature_layer,
                                             feature_select=feature_select, **options))

"""The base class of all sections of the configuration, and the section `data`."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from pilot_jax.errors import InputError


class Section(BaseModel):
    """A section of the config: unknown keys, infinite numbers and NaN are refused, and values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_a_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false for a number, for which Python would take 1 and 0."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("true and false are not among its values")
        return value


def made(key: str, value: Any) -> Any:
    """Returns the value of a key whose choice is made.

    Raises:
        InputError: it is still auto.
    """
    if value == "auto":
        raise InputError(f"{key}: auto is for the commands run, plan and compare, which know the device. Give a "
                         "value; in Python, pilot_jax.planning.choices.chosen(config, this_device()) returns a config "
                         "with one.")
    return value


class DigitsConfig(Section):
    """The digit scenes, generated data that are part of the package; they are used with `data.path: digits`."""

    scenario: Literal["a", "b", "c"] = Field(
        "a", description="Scenario of tasks and clients. a: tasks vqa, ocr and caption, 3 clients of equal size each. "
        "b: these and grounding, 5 clients each, whose training samples fall from `train` to a quarter of it. c: tasks "
        "vqa, ocr, caption and position, 3 clients of equal size each, in looks that no base has seen.")
    clients_per_task: int | None = Field(
        None, ge=1, le=100_000, description="Number of clients of each task. null: the scenario's own, 3 or 5. Looks "
        "and wordings repeat after five clients.")
    heterogeneity: float = Field(
        1.0, ge=0, le=1, description="Degree to which a task's clients differ in the look of their scenes and in the "
        "wording of questions and answers. 0: not at all. 1: each client has its own. Between: looks are interpolated, "
        "and this share of a client's samples has its own wording. Not in scenario c.")
    look: Literal["same", "own"] = Field(
        "own", description="Looks of a task's clients in scenario c. same: all have the first one. own: each has its "
        "own, and clients of different tasks have the same ones.")
    wording: Literal["known", "shared", "half", "own"] = Field(
        "own", description="Wordings of a task's clients in scenario c. known: one that the base `instructed` knows. "
        "shared: another one. half: that for half of a client's samples, and its own for the rest. own: each client "
        "has its own, and the base none of them.")
    labels: Literal["same", "own"] = Field(
        "same", description="Digits in the training pictures of a task's clients in scenario c. same: all of 0 to 9 "
        "are drawn alike. own: nine in ten are drawn from the client's own share of them, such as 0, 3, 6 and 9; "
        "validation and test have all, and the same samples for all clients of a task that share look and wording.")
    train: int = Field(
        480, ge=1, le=100_000, description="Number of training samples of each client; in scenario b, of each task's "
        "first client.")
    validation: int = Field(16, ge=1, le=100_000, description="Number of validation samples of each client.")
    test: int = Field(48, ge=1, le=100_000, description="Number of test samples of each client.")
    seed: int = Field(
        0, ge=0, le=2**31 - 1, description="Seed of the scenes. The split of the handwriting into training, validation "
        "and test images does not depend on it.")

    @model_validator(mode="after")
    def _no_key_of_another_scenario(self) -> DigitsConfig:
        """Refuses keys that the scenario does not read, unless they have their defaults."""
        unread = ("heterogeneity",) if self.scenario == "c" else ("look", "wording", "labels")
        for key in unread:
            if getattr(self, key) != DigitsConfig.model_fields[key].default:
                raise ValueError(f"{key} has no effect in scenario {self.scenario}: leave it out, or choose another "
                                 "scenario")
        if self.labels == "own" and (self.clients_per_task or 3) > 10:
            raise ValueError("labels: own needs a digit for each client of a task, so that clients_per_task may be 10 "
                             "at most")
        return self


class EmojiConfig(Section):
    """Emoji in three drawing styles, pictures that are part of the package; they are used with `data.path: emoji`.

    Each task in each style is a client, named `{task}_{style}`."""

    tasks: tuple[Literal["kind", "colour", "describe", "yesno", "name"], ...] = Field(
        ("kind", "colour", "describe", "yesno"), min_length=1, description="Tasks of the clients. kind: which kind of "
        "thing a picture shows, of 36. colour: which colour most of it has. describe: both, as \"a red fruit\". "
        "yesno: whether it is of some kind or colour, half of the answers yes. name: what it is called, hard for "
        "pictures of things that no training picture shows.")
    styles: tuple[Literal["noto", "twemoji", "fluent"], ...] = Field(
        ("noto", "twemoji", "fluent"), min_length=1, description="Drawing styles of the clients: Google's Noto, "
        "Twemoji, and Microsoft's Fluent.")
    train: int = Field(48, ge=1, le=100_000, description="Number of training samples of each client. Above some 170, a "
                       "client has pictures more than once.")
    validation: int = Field(16, ge=1, le=100_000, description="Number of validation samples of each client.")
    test: int = Field(48, ge=1, le=100_000, description="Number of test samples of each client.")
    seed: int = Field(
        0, ge=0, le=2**31 - 1, description="Seed of the choice of pictures and questions. The split of the things that "
        "they show into training, validation and test does not depend on it.")

    @field_validator("tasks", "styles")
    @classmethod
    def _none_twice(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuses a task or style that is named twice, which would give two clients one name."""
        if len(set(value)) < len(value):
            raise ValueError("a value is in the list twice")
        return value


class LimitsConfig(Section):
    """Limits on data, which may come from anyone: input beyond a limit is refused before it can exhaust memory."""

    image_pixels: int = Field(100_000_000, ge=1, le=178_956_970, description="Largest number of pixels of an image, "
                              "checked before it is decoded. The key's upper bound is Pillow's own limit.")
    file_bytes: int = Field(
        4_000_000_000, ge=1, le=10**12, description="Largest size in bytes of a .json file, which is read as a whole. "
        "It does not apply to .jsonl and .parquet files.")
    text_characters: int = Field(
        1_000_000, ge=1, le=10**9, description="Largest number of characters of a turn, and of a reference answer. A "
        "line of a .jsonl file may have up to 100 times as many.")
    follow_links: bool = Field(False, description="Whether symbolic links may lead out of the folder of images.")


class HoldOutConfig(Section):
    """Shares of each client's training samples that are held out, for data without such splits."""

    validation: float = Field(
        0.0, ge=0, lt=1, description="Share of each client's training samples that becomes its validation split, "
        "unless the data have one for this client. 0: none.")
    test: float = Field(
        0.0, ge=0, lt=1, description="Share of each client's training samples that becomes its test split, unless the "
        "data have one for this client. Samples are chosen by a hash of their image, or of their prompt if they have "
        "none, so that samples with the same image are in the same split; a client that has enough of them gets at "
        "least one. 0: none.")

    @model_validator(mode="after")
    def _some_remain(self) -> HoldOutConfig:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must be less than 1, so that training samples remain")
        return self


class DataConfig(Section):
    """The data: where they are, how they become token ids and pixels, and how they are divided among clients."""

    path: str = Field("digits", description="Path of data with LLaVA's `conversations` or with `messages`: a .json, "
                      ".jsonl or .parquet file, a folder of such files or of one folder per task, or a Hugging Face "
                      "`datasets` folder. `digits` means the generated digit scenes of `data.digits`, `emoji` the "
                      "pictures of `data.emoji`. A run of samples that were given in Python writes `python:` and their "
                      "checksum here.")
    image_root: str | None = Field(None, description="Folder from which the samples' `image` paths start. null: the "
                                   "folder `images` beside the data if it exists, else the folder of the data.")
    file_names: Literal["task", "client"] = Field(
        "task", description="Meaning of a data file's name, for samples that do not name their task or client. task: "
        "the file is named after its task. client: it is named after its client, and its folder after the task. Files "
        "in folders per task are always named after clients.")
    template: str = Field(
        "vicuna_v1", description="Conversation template by which turns become text: vicuna_v1 (Vicuna v1.1, as in "
        "LLaVA-1.5 and the paper), vicuna_short (without its system sentence), llama2, chatml, chatml_short "
        "(without its system message), plain (no roles), or tokenizer (the chat template of the checkpoint's "
        "tokenizer).")
    image_fit: Literal["processor", "pad"] | str = Field(
        "processor", description="Treatment of images that are not square. processor: what the checkpoint's image "
        "processor does. pad: images are first padded to a square with the processor's mean colour, as in LLaVA-1.5. "
        "Or the name of a function of your own, which `pilot_jax.image_fit` registers.")
    partition: Literal["given", "equal", "dirichlet"] = Field(
        "given", description="Assignment of samples to clients. given: each sample names its client. equal, dirichlet: "
        "each task's samples are shuffled and divided among `federation.clients` / (number of tasks) clients. Training "
        "samples are divided into equal or Dirichlet-distributed shares, validation and test samples into equal ones.")
    dirichlet_alpha: float = Field(1.0, gt=0, description="Concentration α of the Dirichlet distribution in "
                                   "`partition: dirichlet`. Smaller values give more uneven shares.")
    hold_out: HoldOutConfig = HoldOutConfig()
    max_length: int = Field(
        2048, ge=8, description="Largest number of tokens of a conversation, image tokens included. Longer training "
        "samples lose their end. A longer evaluation prompt is an error, and so is a sample that would lose image "
        "tokens or all of its answers.")
    limits: LimitsConfig = LimitsConfig()
    digits: DigitsConfig = DigitsConfig()
    emoji: EmojiConfig = EmojiConfig()

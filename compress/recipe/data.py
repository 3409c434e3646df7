"""The data of a recipe: files of text, folders of images, token ids; how they are read."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from compress.data.default_text import located
from compress.data.kinds import FIELD, FIELD_KINDS, holds_ids, kind
from compress.data.row_templates import template_columns
from compress.evaluation.tasks import Given
from compress.settings import Settings, distinct

Text = Annotated[str, Field(min_length=1)]
Files = Annotated[tuple[Text, ...], Field(min_length=1)]


def _reads_text(fields: dict[str, Any]) -> bool:
    """Whether text is read, by the fields ``dataset`` and ``files``: not token ids, images or sounds."""
    return fields["dataset"] is not None or bool(fields["files"] and not holds_ids(fields["files"][0]))


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


#: One name, or a list of two.
ColumnSettings = Annotated[
    tuple[Text, ...],
    Field(min_length=1, max_length=2),
    BeforeValidator(_listed),
    AfterValidator(distinct),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]

_KINDS = (
    "Text files: .txt, .jsonl, .json, .csv, .tsv or .parquet, each also compressed (.gz, .zst); or `default`, English text in "
    "the public domain that comes with the package"
)
_IMAGES = (
    "For image classifiers, instead of `files`: a folder with one folder of images (.png, .jpg, .jpeg, .bmp, .webp) for each "
    "class. A class folder is named as in the config's id2label or label2id, or by the class's number. {others}."
)
#: Settings of text, and the value that each has where the recipe does not give it.
_OF_TEXT = {
    "field": FIELD,
    "template": None,
    "text": None,
    "label": None,
    "mode": "packed",
    "length": None,
    "window": 256,
    "stride": None,
    "streaming": False,
}
_FILES_OR_IMAGES: Any = {"oneOf": [{"required": [name]} for name in ("files", "dataset", "images")]}
_FILES_OR_FOLDERS: Any = {"oneOf": [{"required": [name]} for name in ("files", "dataset", "images", "speech")]}


class TextFiles(Settings):
    """Text files, and the field to read of files that have fields."""

    data_set: ClassVar[str] = ""

    dataset: Text | None = Field(
        default=None,
        description="Instead of `files`: id of a data set on the Hugging Face hub, optionally with @revision. It needs "
        "`pip install 'compress-toolkit[hub]'`. Rows are downloaded once, and kept in the cache of this machine.",
    )
    subset: Text | None = Field(
        default=None, description="With `dataset`: name of a subset (configuration), where it has several."
    )
    split: Text = Field(default="train", description="With `dataset`: split to read.")
    rows: int = Field(default=2000, ge=1, description="With `dataset`: number of rows to read, the first of the split.")
    files: Files = Field(description=f"{_KINDS}.")
    field: Text = Field(
        default=FIELD,
        description="Field to read of .jsonl, .json, .csv, .tsv and .parquet files. It holds text, or a chat as a list of "
        "{role, content} or {from, value}; chats are rendered by the tokenizer's chat template.",
    )
    template: Text | None = Field(
        default=None,
        description="Instead of `field`: build the text of a row from several columns, each named in braces, as in "
        '"{instruction}\\n{input}\\n{output}". An empty value adds nothing.',
    )

    @field_validator("files", mode="before")
    @classmethod
    def _default_text(cls, value: Any) -> Any:
        return tuple(located(file, cls.data_set) for file in value) if isinstance(value, (list, tuple)) else value

    @property
    def folder(self) -> str | None:
        """The folder of images; None for text."""
        images: str | None = getattr(self, "images", None)
        return images

    @property
    def sounds(self) -> str | None:
        """The folder of sounds; None for text and images."""
        speech: str | None = getattr(self, "speech", None)
        return speech

    @property
    def named_columns(self) -> dict[str, str]:
        """The columns that are read of a file with fields, each with the setting that names it."""
        if self.template is not None:
            return dict.fromkeys(template_columns(self.template), "template")
        text: Any = getattr(self, "text", None)
        label: str | None = getattr(self, "label", None)
        if text is None and label is None:
            return {self.field: "field"}
        return dict.fromkeys(text or (self.field,), "text") | ({} if label is None else {label: "label"})

    @model_validator(mode="after")
    def _files_or_folder(self) -> Self:
        folder = self.folder or self.sounds
        other = "images" if self.sounds is None else "speech"
        if self.dataset is not None:
            if self.files or folder is not None:
                raise ValueError(f"give one of `files`, `{other}` and `dataset`")
            return self
        if odd := next((name for name in ("subset", "split", "rows") if name in self.model_fields_set), None):
            raise ValueError(f"`{odd}` goes with `dataset`")
        if bool(self.files) == (folder is not None) or (self.folder and self.sounds):
            raise ValueError(f"give either `files` or `{other}`" + (", not both" if self.files else ""))
        given = [name for name, unset in _OF_TEXT.items() if getattr(self, name, unset) != unset]
        if folder is not None and given:
            raise ValueError(f"`{given[0]}` is a setting of text: it does not go with `{other}`")
        return self

    @model_validator(mode="after")
    def _has_fields(self) -> Self:
        text = getattr(self, "text", None)
        if self.template is not None:
            self._check_template(self.template)
        if text is not None and self.field != FIELD:
            raise ValueError("`text` names the column, so leave out `field`")
        if text is not None and (wrong := next((file for file in self.files if kind(file) not in FIELD_KINDS), None)):
            raise ValueError(f"`text` names a column, and {wrong} has none")
        if (
            self.field != FIELD
            and self.files
            and not any(kind(f) in (*FIELD_KINDS, ".safetensors") for f in self.files)
        ):
            raise ValueError(f"`field` names one of several, and {self.files[0]} has none")
        return self

    def _check_template(self, template: str) -> None:
        template_columns(template)  # raises where it is malformed
        if named := next((n for n in ("text", "label") if getattr(self, n, None) is not None), None):
            raise ValueError(f"`template` makes one plain text of a row: it does not go with `{named}`")
        if self.field != FIELD:
            raise ValueError("`template` names the columns, so leave out `field`")
        if wrong := next((file for file in self.files if kind(file) not in FIELD_KINDS), None):
            raise ValueError(f"`template` names columns, and {wrong} has none")


class Sampled(TextFiles):
    """Text files that are cut into samples of a fixed number of tokens."""

    files: Files = Field(
        description=f"{_KINDS}. Or one .npy or .safetensors file of token ids, integers [samples, length], which are used "
        "unchanged; `field` names the tensor where a file has several."
    )
    text: ColumnSettings | None = Field(
        default=None,
        description="Instead of `field`, for encoders: the column of the text in a .jsonl, .json, .csv, .tsv or .parquet file, "
        "or two columns of texts that the model reads as a pair, [sentence1, sentence2]. For encoder-decoders: the columns of "
        "source and target. Each row is one sample.",
    )
    mode: Literal["packed", "padded"] = Field(
        default_factory=lambda fields: "packed" if fields["text"] is None else "padded",
        description="`packed`: join the documents to one stream and cut it into windows. `padded`: one sample per document, "
        "with the tokenizer's special tokens, truncated to `length` or padded on the right and masked. By default `padded` "
        "with `text`, else `packed`.",
    )
    length: int | None = Field(
        default_factory=lambda fields: 256 if _reads_text(fields) else None,
        ge=1,
        description="Tokens per sample, by default 256. For token ids: use the first columns only; by default all.",
    )

    @model_validator(mode="after")
    def _text_or_ids(self) -> Self:
        if self.folder is not None or self.sounds is not None:
            return self
        if not any(holds_ids(f) for f in self.files):
            for name in ("samples", "length"):
                if getattr(self, name, 1) is None:
                    raise ValueError(f"`{name}` is a number where the data is text")
        elif len(self.files) > 1:
            raise ValueError("token ids come from one file: name no other beside it")
        elif self.mode != "packed":
            raise ValueError("token ids are used unchanged: leave out `mode`")
        if self.text is not None and self.mode == "packed":
            raise ValueError("`text` names texts that are read one by one: leave out `mode: packed`, or use `field`")
        return self


class TrainingData(Sampled):
    """Text or images that passes train on. All samples are used."""

    data_set: ClassVar[str] = "training"

    model_config = ConfigDict(json_schema_extra=_FILES_OR_IMAGES)

    files: Files = Field(default=(), description=Sampled.model_fields["files"].description)
    images: Text | None = Field(default=None, description=_IMAGES.format(others="No other key goes with it"))
    label: Text | None = Field(
        default=None,
        description="With `text`: the column of the label, as in `data.evaluation`. The loss `labels` of text classifiers "
        "reads it.",
    )

    @model_validator(mode="after")
    def _label_of_text(self) -> Self:
        if self.label is not None and self.text is None:
            raise ValueError("`label` goes with `text`, the column that it labels")
        if self.text is not None and self.label in self.text:
            raise ValueError(f"`text` and `label` both name the column `{self.label}`")
        return self


class CalibrationSection(Sampled):
    """Text, images or speech for calibration: passes measure the model's activations on it."""

    data_set: ClassVar[str] = "calibration"

    model_config = ConfigDict(json_schema_extra=_FILES_OR_FOLDERS)

    files: Files = Field(default=(), description=Sampled.model_fields["files"].description)
    images: Text | None = Field(
        default=None, description=_IMAGES.format(others="Only `samples` goes with it; no class is read")
    )
    speech: Text | None = Field(
        default=None,
        description="For models that read sound, instead of `files`: a folder of .wav files (PCM). A .txt file of the same "
        "name holds the transcript, if there is one. Only `samples` goes with it.",
    )
    samples: int | None = Field(
        default_factory=lambda fields: None if fields["files"] and holds_ids(fields["files"][0]) else 128,
        ge=1,
        description="Number of samples to draw, by default 128. For token ids: use the first rows only; by default all.",
    )


class EvaluationSection(TextFiles):
    """Text or images that the original and every stage are evaluated on."""

    data_set: ClassVar[str] = "evaluation"

    model_config = ConfigDict(json_schema_extra=_FILES_OR_IMAGES)

    files: Files = Field(default=(), description=f"{_KINDS}. They may share no text with training or calibration.")
    images: Text | None = Field(
        default=None,
        description=f"{_IMAGES.format(others='Only `max_documents` goes with it')} The folder may share no file with training.",
    )
    window: int = Field(default=256, ge=2, description="Tokens that the model sees at once.")
    stride: int | None = Field(
        default=None,
        ge=1,
        description="Tokens between the starts of two windows. By default the window, so that windows do not overlap.",
    )
    streaming: bool = Field(
        default=False,
        description="Read each document in segments of `window` tokens through the cache, so that every token sees all that "
        "the model remembers of the document before it. For causal language models. A document may be longer than the "
        "positions that the model was trained on only where every block forgets what is far away.",
    )
    max_documents: int | None = Field(
        default=None,
        ge=1,
        description="Evaluate the first documents only, at most this many. Images are taken from all classes in turn.",
    )
    text: ColumnSettings | None = Field(
        default=None,
        description="For labelled data: the column of the text in a .jsonl, .json, .csv, .tsv or .parquet file, or two columns "
        "of texts that the model reads as a pair, [sentence1, sentence2]. By default `text` where `label` is given.",
    )
    label: Text | None = Field(
        default=None,
        description="The column of the label. For text classifiers: an integer, or a name in the config's id2label or "
        "label2id. For sentence embeddings of base models: the score of the pair of texts in `text`. Each row is read whole, "
        "so `field`, `window`, `stride` and `streaming` do not go with it.",
    )
    quantized_kv_cache: bool = Field(
        default=True,
        description="Evaluate with quantised keys and values where the checkpoint's config says so (`cast: {kv_cache: fp8}`), "
        "as vLLM and SGLang serve it. `false`: evaluate without, as stock transformers computes. Quantised inputs of linear "
        "layers are emulated in either case.",
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_text(cls, values: Any) -> Any:
        """`text` without `label` names the column of plain text, as `field` does, and as it does in calibration data."""
        alone = isinstance(values, dict) and isinstance(values.get("text"), str) and values.get("label") is None
        if not alone or values.get("field", FIELD) != FIELD:
            return values
        return {
            "field": values["text"],
            **{key: value for key, value in values.items() if key not in ("text", "field")},
        }

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        if self.label is None:
            if self.text is not None:
                raise ValueError("`text` goes with `label`; the column of plain text is `field`")
            return self
        if self.label in self.columns:
            raise ValueError(f"`text` and `label` both name the column `{self.label}`")
        fields = type(self).model_fields
        if odd := next(
            (n for n in ("field", "window", "stride", "streaming") if getattr(self, n) != fields[n].default), None
        ):
            hint = "name the column with `text`" if odd == "field" else "each text is read whole"
            raise ValueError(f"`{odd}` is not for labelled texts: {hint}")
        if wrong := next((file for file in self.files if kind(file) not in FIELD_KINDS), None):
            raise ValueError(f"`label` names a column, and {wrong} has none")
        return self

    @property
    def given(self) -> Given:
        """The kind of the data: text, labelled text, or images."""
        return "images" if self.images is not None else "text" if self.label is None else "labelled"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of labelled texts."""
        return self.text or (FIELD,)

    @model_validator(mode="after")
    def _no_gaps(self) -> Self:
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"a stride of {self.stride} would skip text, as the window is {self.window} tokens")
        if self.stride is not None and self.streaming:
            raise ValueError("`stride` does not go with `streaming`: segments do not overlap, as the cache joins them")
        return self


class Data(Settings):
    """The text or images of a run."""

    training: TrainingData | None = Field(default=None, description="Text or images that passes train on.")
    calibration: CalibrationSection | None = Field(
        default=None, description="Text on which passes measure the model's activations."
    )
    evaluation: EvaluationSection | None = Field(
        default=None, description="Text or images that models are evaluated on."
    )

    @property
    def needs_model(self) -> bool:
        """Whether the model's config decides how data are read: it names labels and classes."""
        sets = [section for section in (self.training, self.evaluation) if section is not None]
        return any(section.images is not None or section.label is not None for section in sets)

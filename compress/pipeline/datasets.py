"""The data sets of a run: documents, token batches, fingerprints; each made when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.files import read_json
from compress.checkpoint.sidecars import safe_file
from compress.data.default_text import named
from compress.data.disjoint import check_disjoint
from compress.data.documents import Document, read_documents
from compress.data.documents import fingerprint as fingerprint_files
from compress.data.examples import read_examples
from compress.data.images import fingerprint as fingerprint_images
from compress.data.images import read_images
from compress.data.kinds import holds_ids
from compress.data.pairs import start_token
from compress.data.rendering import rendered
from compress.data.speech import fingerprint as fingerprint_speech
from compress.data.speech import read_speech
from compress.errors import DataError
from compress.evaluation.scorer import labels_of, load_processor, read
from compress.evaluation.tasks import MASKED, OF_PASSES, is_seq2seq, task_of
from compress.pipeline.fingerprint import fingerprint
from compress.recipe.data import CalibrationSection, TrainingData
from compress.recipe.gates import positions_of

if TYPE_CHECKING:
    from compress.data.batches import Batches
    from compress.recipe import Recipe
    from compress.spec.spec import Spec, Structure


#: Settings that say where data are; fingerprints have their contents.
_PLACES = {"files", "images", "speech", "dataset", "subset", "split", "rows"}


def read_section(
    section: TrainingData | CalibrationSection, separator: str | None, structure: Structure | None = None
) -> list[Document]:
    """Documents of a section's files; where it names columns, a text or pair of texts from each row. Raises `DataError`.

    Args:
        structure: of the model, which has the labels.
    """
    if section.sounds is not None:
        return read_speech(section.sounds)
    if section.folder is not None:
        assert structure is not None
        return read_images(section.folder, labels_of(structure, "images"))
    if section.text is None:
        return read_documents(section.files, separator, section.field, section.template)
    label = section.label if isinstance(section, TrainingData) else None
    labels = None if label is None or structure is None else labels_of(structure, label)
    return read_examples(section.files, section.text, labels)


def draw(
    section: TrainingData | CalibrationSection,
    processor: Callable[[], Any],
    documents: Callable[[], Sequence[Document]],
    *,
    seed: int,
    vocabulary: int | None,
    positions: int | None,
    start: int | None = None,
) -> Batches:
    """The samples of a calibration section; for training, all samples in an order drawn by seed.

    Args:
        processor: loads the tokenizer or image processor. documents: reads the documents; not called for token ids.
        vocabulary: number of the model's token ids, None where its config has none.
        positions: most tokens of a sample, None for any number.
        start: the token that the decoder of an encoder-decoder begins with; None for other models.

    Raises:
        DataError: the files cannot be read, give too few samples or too long ones, or hold ids outside the vocabulary.
    """
    from compress.data import batches, pairs, sampling, speech, token_ids

    name = "calibration" if isinstance(section, CalibrationSection) else "training"
    samples = section.samples if isinstance(section, CalibrationSection) else None
    if section.sounds is not None:
        return speech.of_speech(documents(), processor(), samples, seed, start or 0)
    if section.folder is not None:
        if name == "calibration":
            return batches.of_pictures(documents(), processor(), samples, seed)
        return batches.of_images(documents(), processor(), seed)
    if holds_ids(file := section.files[0]):
        read = token_ids.read_ids(file, section.field)
        drawn = batches.first(read, samples, section.length, file)
        batches.check_vocabulary(drawn, vocabulary, file)
        batches.check_positions(drawn.ids.shape[1], positions, file, name)
        return drawn if start is None else pairs.with_targets(drawn, start)
    assert section.length is not None
    batches.check_positions(section.length, positions, name=name)
    if start is not None and (section.mode == "padded" or documents()[0].messages is not None):
        drawn = pairs.sample_pairs(processor(), documents(), samples, section.length, seed, start)
    elif section.mode == "padded":
        drawn = sampling.sample_documents(processor(), documents(), samples, section.length, seed)
    elif samples is None:
        drawn = sampling.every_window(processor(), documents(), section.length, seed)
    else:
        drawn = sampling.sample_windows(processor(), documents(), samples, section.length, seed)
    batches.check_vocabulary(drawn, vocabulary)
    return pairs.with_targets(drawn, start) if start is not None and drawn.targets is None else drawn


@dataclass
class DataSets:
    """Text or images of a recipe's ``data`` section.

    Attributes:
        folder: of the tokenizer or image processor. structure: of the model, which has its task and labels; None where only
            plain text is read.
        positions: most tokens of a sample, None for any number.
    """

    recipe: Recipe
    folder: Path
    structure: Structure | None
    positions: int | None = None
    _documents: dict[str, list[Document]] = field(default_factory=dict)
    _hashes: dict[str, str] = field(default_factory=dict)
    _batches: dict[str, Any] = field(default_factory=dict)

    def files(self, name: str) -> Sequence[str]:
        """Files of the set ``name``, or its folder of images; empty where the recipe has none."""
        section = getattr(self.recipe.data, name, None)
        return () if section is None else section.files or (section.folder or section.sounds,)

    def names(self, name: str) -> list[str]:
        """Names of a set's files for reports: `default` for the shipped text, of a data set of the hub its id and split."""
        section = getattr(self.recipe.data, name)
        if section.dataset is not None:
            return [f"{section.dataset}:{section.split}"]
        return [named(file) for file in self.files(name)]

    def documents(self, name: str) -> list[Document]:
        """Documents of a set, in order."""
        if name not in self._documents:
            if not self.files(name):
                raise DataError(f"the recipe has no data.{name}")
            section, separator = getattr(self.recipe.data, name), self.recipe.document_separator
            if name == "evaluation":
                self._documents[name] = read(section, separator, self.structure)
            else:
                self._documents[name] = read_section(section, separator, self.structure)
        return self._documents[name]

    def fingerprint(self, name: str) -> str:
        """Fingerprint of the files' contents and of every setting that picks samples from them."""
        if name not in self._hashes:
            section = getattr(self.recipe.data, name)
            settings = section.model_dump(mode="json", exclude=_PLACES)
            print_of = fingerprint_images if section.sounds is None else fingerprint_speech
            content = fingerprint_files(section.files) if section.files else print_of(self.documents(name))
            self._hashes[name] = fingerprint([content, settings, self.recipe.document_separator])
        return self._hashes[name]

    def processor(self) -> Any:
        """The original checkpoint's tokenizer, or its image processor."""
        assert self.structure is not None
        if "processor" not in self._batches:
            self._batches["processor"] = load_processor(
                self.structure, self.folder, trust_remote_code=self.recipe.trust_remote_code
            )
        return self._batches["processor"]

    def speech_processor(self) -> Any:
        """The original checkpoint's feature extractor, and its tokenizer where it has one."""
        from compress.models.processors import load_speech_processor

        return load_speech_processor(self.folder, self.positions, trust_remote_code=self.recipe.trust_remote_code)

    def start(self) -> int | None:
        """The token that the decoder of an encoder-decoder begins with; None for other models."""
        assert self.structure is not None
        if not is_seq2seq(self.structure):
            return None
        name = "generation_config.json"
        generation = read_json(self.folder, name) if safe_file(self.folder, name).exists() else {}
        return start_token(self.structure.config, generation if isinstance(generation, dict) else {})

    def batches(self, name: str) -> Batches:
        """Samples of a calibration or training set, drawn once."""
        assert self.structure is not None
        if name not in self._batches:
            section = getattr(self.recipe.data, name)
            self._batches[name] = draw(
                section,
                self.processor if section.sounds is None else self.speech_processor,
                lambda: self.documents(name),
                seed=self.recipe.seed,
                vocabulary=self.structure.config.get("vocab_size"),
                positions=self.positions,
                start=self.start(),
            )
        drawn: Batches = self._batches[name]
        return drawn

    def check_shown(self, spec: Spec) -> None:
        """Check that the tokenizer can render the evaluation data (chats, masks), and that it can be measured.

        Raises `CompressError`.
        """
        if (section := self.recipe.data.evaluation) is None:
            return
        processor = self.processor()
        if self.structure is not None and task_of(self.structure.class_name) is MASKED:
            from compress.evaluation.masked import check_tokenizer

            check_tokenizer(processor)
        documents = self.documents("evaluation")[: section.max_documents]
        for document in documents:
            if document.messages is not None:
                rendered(document, processor)
        if section.streaming:
            from compress.evaluation.language import check_streams

            check_streams(processor, documents, spec)
        if first := max(positions_of(self.recipe.gates).values(), default=0):
            from compress.evaluation.language import check_longest

            check_longest(processor, documents, first)
        for name, metric in OF_PASSES.items():
            if name in self.recipe.metrics and (settings := self.recipe.settings_of(name)) is not None:
                metric.check_data(processor, documents, settings, window=section.window)

    def check_ids(self, name: str) -> None:
        """Check the token ids of a set, if its files hold any. Raises `DataError`."""
        if (files := self.files(name)) and holds_ids(files[0]):
            self.batches(name)

    def check_disjoint(self, *, ids: bool = True) -> list[str]:
        """Check that evaluation shares no text with training or calibration. Raises `DataError`.

        Args:
            ids: compare token ids too, decoded by the tokenizer.

        Returns:
            Names of the sets that were compared.
        """
        if not self.files("evaluation"):
            return []
        others: dict[tuple[Any, ...], str] = {}
        for name in ("training", "calibration"):
            if (files := tuple(self.files(name))) and (ids or not holds_ids(files[0])):
                section = getattr(self.recipe.data, name)
                if section.sounds is not None:
                    continue  # what is evaluated is text
                # often the same files: compare once
                others.setdefault((files, section.field, section.template, section.text), name)
        for name in others.values():
            check_disjoint(self.documents("evaluation"), self._seen(name), name)
        return list(others.values())

    def _seen(self, name: str) -> list[Document]:
        """Documents of a set; token ids are decoded."""
        if not holds_ids(self.files(name)[0]):
            return self.documents(name)
        drawn, tokenizer = self.batches(name), self.processor()
        texts = tokenizer.batch_decode(drawn.ids.tolist(), skip_special_tokens=True)
        return [Document(id_, text) for id_, text in zip(drawn.chosen, texts, strict=True)]

"""How texts are read for two models that read the same tokens: as for one, and checked for both."""

from collections.abc import Iterator

from ppleval.models.pair import ModelPair
from ppleval.models.saved_base import SavedBase
from ppleval.texts.encoding import EncodedText
from ppleval.texts.options import TextOptions
from ppleval.texts.reading import TextReader, encoder_of, texts_and_contexts
from ppleval.texts.schedule import Portion


class PairReader(TextReader):
    """Reads texts for a model and its base under one set of options.

    Raises:
        ValueError: a window that one of them does not hold, or a saved base that was read with
            other settings.
    """

    def __init__(self, model: ModelPair, options: TextOptions):
        self._saved = model.base if isinstance(model.base, SavedBase) else None
        if self._saved is not None and options.window is not None:
            self._saved.check_reading(self._saved.stated["reading"] | {"window": options.window})
        super().__init__(model, options)
        self._base_encoder = (
            None if model.base_tokenizer is None else encoder_of(model.base_tokenizer, options)
        )

    def check_contexts(self, with_contexts: bool) -> None:
        """Raises ValueError for texts with contexts, or without, that cannot be read so, or that
        the saved base was not read with."""
        if self._saved is not None:
            self._saved.check_reading(self.settings(with_contexts))
        super().check_contexts(with_contexts)

    def encode(self, portion: Portion) -> Iterator[EncodedText]:
        """The ids of each text of a portion.

        Raises:
            ValueError: the base's tokenizer gives other ids.
        """
        encoded = super().encode(portion)
        if self._base_encoder is None or not portion:
            yield from encoded
            return
        others = self._base_encoder.encode(*texts_and_contexts(portion))
        for text, other in zip(encoded, others, strict=True):
            if text.ids != other.ids:
                raise ValueError(
                    "The tokenizers of the two models share a vocabulary, but give other ids for "
                    f"the text that begins {text.text[:40]!r}. Pass tokenizer= and base_tokenizer=."
                )
            yield text

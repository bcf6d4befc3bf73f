"""Personal data as the Presidio library finds it: an optional package, without a model unless one is named.

Presidio's recognizers of formats run on a blank English pipeline, which only cuts text into words: nothing is
downloaded. Names of persons and places need a trained spaCy model that the user has installed.
"""

from __future__ import annotations

import logging
from pathlib import Path

from lit_instruct.data.personal_data import Span
from lit_instruct.types import ConfigError

_MIN_SCORE = 0.4
"""What Presidio gives a phone number without a word like "phone" beside it."""

_KINDS = {
    "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "phone",
    "CREDIT_CARD": "card",
    "IBAN_CODE": "iban",
    "IP_ADDRESS": "ip",
    "US_SSN": "ssn",
    "US_ITIN": "itin",
    "UK_NHS": "nhs",
    "CRYPTO": "crypto",
    "MEDICAL_LICENSE": "license",
}
_KINDS_OF_MODEL = {"PERSON": "person", "LOCATION": "location"}


class PresidioFinder:
    """Finds personal data in English text with presidio-analyzer.

    Args:
        model: name or folder of an installed spaCy model that recognises entities; None: formats only.

    Raises:
        ConfigError: presidio-analyzer or the model is not installed.
    """

    def __init__(self, model: str | None = None) -> None:
        try:
            import spacy
            from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
            from presidio_analyzer.nlp_engine import SpacyNlpEngine
        except ImportError as error:
            raise ConfigError(
                f"personal_data: got 'presidio', but it cannot be imported ({error}); need presidio-analyzer. Do: "
                "install it (pip install 'lit-instruct[pii]'), or choose personal_data=regex."
            ) from error
        if model is not None and not spacy.util.is_package(model) and not Path(model).is_dir():
            raise ConfigError(  # Presidio would try to download it
                f"personal_data_model: got {model!r}, which is not installed; need the name or folder of a spaCy "
                f"model. Do: python -m spacy download {model}, or leave it out to look for formats only."
            )
        logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)  # one line for each language it is not asked for
        engine = SpacyNlpEngine()
        engine.nlp = {"en": spacy.blank("en") if model is None else spacy.load(model)}
        registry = RecognizerRegistry(supported_languages=["en"])
        registry.load_predefined_recognizers(languages=["en"], nlp_engine=engine)
        registry.remove_recognizer("EmailRecognizer")
        registry.add_recognizer(_email_recognizer())
        self._analyzer = AnalyzerEngine(nlp_engine=engine, registry=registry, supported_languages=["en"])
        self._kinds = _KINDS if model is None else _KINDS | _KINDS_OF_MODEL

    def __call__(self, text: str) -> list[Span]:
        """Find personal data; spans may overlap."""
        found = self._analyzer.analyze(text, language="en", entities=list(self._kinds), score_threshold=_MIN_SCORE)
        return [Span(item.start, item.end, self._kinds[item.entity_type]) for item in found]


def _email_recognizer():  # type: ignore[no-untyped-def]  # a type of the optional package
    """Presidio's own, but for the list of top-level domains: it would be fetched from the network at first use."""
    import tldextract
    from presidio_analyzer.predefined_recognizers import EmailRecognizer

    shipped_list = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)

    class OfflineEmailRecognizer(EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return shipped_list(pattern_text).fqdn != ""

    return OfflineEmailRecognizer()

"""MISSRec in pure torch: item towers, interests, encoder, decoder, fusion, objectives."""

from missrec_t4r.model.decoder import InterestAwareDecoder
from missrec_t4r.model.encoder import ContextualEncoder
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.interests import InterestTokens, InterestVocabulary
from missrec_t4r.model.missrec import MISSRec, build_missrec
from missrec_t4r.model.towers import CandidateTokens, ItemTokens, ItemTowers

__all__ = [
    "CandidateFusion",
    "CandidateTokens",
    "ContextualEncoder",
    "InterestAwareDecoder",
    "InterestTokens",
    "InterestVocabulary",
    "ItemTokens",
    "ItemTowers",
    "MISSRec",
    "build_missrec",
]

"""MISSRec in pure torch: item towers, interests, encoder, decoder, fusion, objectives."""

from missrec_t4r.model.contextual_encoder import ContextualEncoder
from missrec_t4r.model.decoder import InterestAwareDecoder
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.interests import InterestTokens, InterestVocabulary
from missrec_t4r.model.item_encoder import CandidateEmbeddings, ItemEmbeddings, ItemEncoder
from missrec_t4r.model.missrec import MISSRec, build_missrec

__all__ = [
    "CandidateFusion",
    "CandidateEmbeddings",
    "ContextualEncoder",
    "InterestAwareDecoder",
    "InterestTokens",
    "InterestVocabulary",
    "ItemEmbeddings",
    "ItemEncoder",
    "MISSRec",
    "build_missrec",
]

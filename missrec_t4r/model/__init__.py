"""MISSRec in plain PyTorch: item encoder, interests, contextual encoder, interest-aware decoder, fusion, objectives."""

from missrec_t4r.model.contextual_encoder import ContextualEncoder
from missrec_t4r.model.decoder import InterestAwareDecoder
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.interests import InterestTokens, InterestVocabulary
from missrec_t4r.model.item_encoder import CandidateEmbeddings, ItemEmbeddings, ItemEncoder
from missrec_t4r.model.missrec import MISSRec

__all__ = [
    "CandidateEmbeddings",
    "CandidateFusion",
    "ContextualEncoder",
    "InterestAwareDecoder",
    "InterestTokens",
    "InterestVocabulary",
    "ItemEmbeddings",
    "ItemEncoder",
    "MISSRec",
]

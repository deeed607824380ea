"""Settings of the small models in tests."""

EVERY_PART: dict[str, object] = {
    "candidate_fusion": "dynamic_shared",
    "interest_ratio": 0.5,
    "modality_dropout": 0.0,
    "id_dropout": 0.0,
}
"""Learned candidate fusion, several interests in a catalogue of few items, and no random loss of inputs."""

"""MISSRec in plain PyTorch: item encoder, interests, contextual encoder, interest-aware decoder, fusion, objectives."""

"""A policy plays episodes of the token environment; rewards, scores and the experience that is learnt from."""

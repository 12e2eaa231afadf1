"""The tables and figures of Haroush et al. (2020), "The Knowledge Within"."""

"""How a generated token came: one letter each inside the engine, one word each in a response. Imports nothing."""

AR = "a"
"""Decided by a causal forward that verified nothing: plain AR, and the token that a prefill decides."""
DRAFTED = "d"
"""Drafted by the model in a block, and accepted."""
LOOKED_UP = "l"
"""Looked up in the prompt or the text, and accepted."""
CORRECTED = "c"
"""The verifier's token in the place of the first draft that it rejected."""
BONUS = "b"
"""The verifier's token after drafts that it accepted one and all."""
VERIFIED = "v"
"""The verifier's token, where it is not known which of these two it is."""
DENOISED = "n"
"""Decided by a denoising forward of block diffusion."""
SEED = "s"
"""The first token of a diffusion block, decided by the causal forward that committed the one before."""
UNKNOWN = "?"

WORDS = {
    AR: "ar",
    DRAFTED: "drafted",
    LOOKED_UP: "looked_up",
    CORRECTED: "corrected",
    BONUS: "bonus",
    VERIFIED: "verified",
    DENOISED: "denoised",
    SEED: "seed",
    UNKNOWN: "unknown",
}
"""What responses call them."""


def put(origins: str, start: int, more: str) -> str:
    """Return the origins of a text with those of ``more`` from token ``start`` on; what is between is unknown."""
    return origins[:start].ljust(start, UNKNOWN) + more

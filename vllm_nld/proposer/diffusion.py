"""What a diffusion request is doing: one phase at a time, and the transitions between them.

::

    IDLE ── park() ──> PARKED ───────────────── hand_out() ──> COMMITTING ── committed(), take_next() ──> IDLE
                          └─ interrupt() ──> INTERRUPTED
                                                └─ resume() ──> RESUMED ── hand_out() ──> COMMITTING
    IDLE ── fill() ──> FILLING ── hand_out() ──> COMMITTING

``end()`` leaves any phase. Where the causal pass may not be overruled, ``hand_out()`` and ``interrupt()`` lead back to
IDLE at once.
"""

from __future__ import annotations

from enum import Enum, auto

from vllm_nld.draft_pass.block import Block


class Phase(Enum):
    """What a diffusion request does."""

    IDLE = auto()
    """No block is open: the prompt is being prefilled, or the last block is committed."""
    FILLING = auto()
    """A block is filled before the step's drafts are returned; every other request waits for it."""
    PARKED = auto()
    """A block is denoised between causal passes, which leave the request out."""
    INTERRUPTED = auto()
    """The request was preempted while parked. Its block waits until the resumption has recomputed the pages."""
    RESUMED = auto()
    """An interrupted block is filled before the step's drafts are returned."""
    COMMITTING = auto()
    """The block is done; causal passes commit its tokens, in several steps where the budget is short."""
    ENDED = auto()
    """The request is over."""


# Tuples of constants: in Python 3.11 looking a member of an enumeration up takes longer than all else here.
_IDLE, _PARKED, _INTERRUPTED, _COMMITTING = (Phase.IDLE,), (Phase.PARKED,), (Phase.INTERRUPTED,), (Phase.COMMITTING,)
_FILLED = (Phase.PARKED, Phase.FILLING, Phase.RESUMED)
_REPLACING = (Phase.COMMITTING, Phase.INTERRUPTED, Phase.RESUMED)
_ALIVE = tuple(phase for phase in Phase if phase is not Phase.ENDED)


class DiffusionRequest:
    """The phase of one diffusion request, and the block or the tokens that belong to it.

    Every transition raises RuntimeError if the phase does not allow it: the text would no longer be the block's.

    Args:
        overrules: whether a token that the causal pass samples may be replaced by the block's. Without that, what is
            left of a half-committed block is dropped, and so is a block that was interrupted.

    Attributes:
        phase: what it does.
    """

    def __init__(self, overrules: bool) -> None:
        self.phase = Phase.IDLE
        self._overrules = overrules
        self._block: Block | None = None
        self._rest: list[int] = []

    @property
    def block(self) -> Block:
        """The open block.

        Raises:
            RuntimeError: no block is open.
        """
        if self._block is None:
            raise RuntimeError(f"a diffusion request in phase {self.phase.name} has no open block")
        return self._block

    @property
    def replaces_sampled(self) -> bool:
        """Whether the token that the causal pass has just sampled is going to be replaced by one of the block's."""
        return self.phase in _REPLACING

    def fill(self, block: Block) -> None:
        """Open a block that is filled before the step's drafts are returned: IDLE to FILLING.

        Called when vLLM asks for drafts, where requests are not parked or the causal pass does not decide the block's
        first token.
        """
        self._move("fill", _IDLE, Phase.FILLING)
        self._block = block

    def park(self, block: Block) -> None:
        """Open a block that is denoised between causal passes: IDLE to PARKED.

        Called when vLLM asks for drafts.
        """
        self._move("park", _IDLE, Phase.PARKED)
        self._block = block

    def interrupt(self) -> int | None:
        """Stop denoising: PARKED to INTERRUPTED, or to IDLE where the causal pass may not be overruled.

        Called when vLLM has preempted the request: the pages of its prefix are gone, and the resumption is going to
        sample a token in the place of one of the block's.

        Returns:
            Forwards spent on the block if it is dropped, else None.
        """
        self._move("interrupt", _PARKED, Phase.INTERRUPTED)
        self.block.pages = None
        if self._overrules:
            return None
        self.phase = Phase.IDLE
        return self._drop()

    def resume(self) -> Block:
        """Return the interrupted block, to be filled before the step's drafts are returned: INTERRUPTED to RESUMED.

        Called when vLLM asks for drafts after the resumption has recomputed the pages.
        """
        self._move("resume", _INTERRUPTED, Phase.RESUMED)
        return self.block

    def hand_out(self, mask_token_id: int) -> list[int]:
        """Return the tokens after the done block's first, which vLLM is to run next: to COMMITTING, or to IDLE.

        Called when a block is done that was FILLING, PARKED or RESUMED. In the last case the first of the tokens is
        the one that takes the sampled one's place: call :meth:`take_next` then.
        """
        self._move("hand_out", _FILLED, Phase.COMMITTING)
        drafts = self.block.decided(mask_token_id)[1:]
        self._block = None
        self._set_rest(drafts if self._overrules else [])
        return drafts

    def committed(self, count: int) -> None:
        """Record that a causal pass has committed ``count`` of the tokens: COMMITTING, or IDLE after the last.

        Called after every causal pass that the request was part of while COMMITTING; ``count`` is 0 after a resumption.
        """
        self._move("committed", _COMMITTING, Phase.COMMITTING)
        self._set_rest(self._rest[count:])

    def take_next(self) -> tuple[int, list[int]]:
        """Return the token to put where the causal pass has sampled one, and those to hand out after it.

        Called when vLLM asks for drafts and tokens are left: COMMITTING, or IDLE if that was the last one.
        """
        self._move("take_next", _COMMITTING, Phase.COMMITTING)
        first, *rest = self._rest
        self._set_rest(rest)
        return first, list(rest)

    def end(self) -> int | None:
        """End the request, in whatever phase: to ENDED. Called when vLLM says that it is over.

        Returns:
            Forwards spent on a block that is never going to be done; None if no block is open.
        """
        self._move("end", _ALIVE, Phase.ENDED)
        return None if self._block is None else self._drop()

    def _set_rest(self, tokens: list[int]) -> None:
        self._rest = list(tokens)
        if not self._rest:
            self.phase = Phase.IDLE

    def _drop(self) -> int:
        passes, self._block = self.block.passes, None
        return passes

    def _move(self, transition: str, allowed: tuple[Phase, ...], to: Phase) -> None:
        if self.phase not in allowed:
            raise RuntimeError(f"a diffusion request in phase {self.phase.name} cannot {transition}")
        self.phase = to

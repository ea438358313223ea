"""OmniOPD: a teacher that only generates text audits chunks of the student's response.  arXiv:2606.01476."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from opd.losses.divergences import ForwardKL
from opd.losses.rewards import One
from opd.losses.shapes import Mask, PerToken
from opd.losses.target_distribution import Reference
from opd.losses.terms import Match, PolicyGradient
from opd.losses.token_weights import segment_means
from opd.methods.method import Method
from opd.methods.questions import Continue


@dataclass(frozen=True)
class Posterior:
    """(agreement + alpha pbar) / (texts + alpha) on audited chunks, else 0.  OmniOPD, arXiv:2606.01476, Eq. 4-5.

    `agreement` sums the similarity of the chunk to each text of a text-only teacher.  pbar is the geometric mean of p
    over the chunk.  `apart` scales the weight so that a token mean becomes a mean over the audited tokens.
    """

    texts: int = 10
    alpha: float = 1.0
    apart: bool = False

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha}: the student's own weight in texts, 0 (none) or more")

    def __call__(self, chunk: Int[Tensor, "B T"], agreement: PerToken, student_logp: PerToken, mask: Mask) -> PerToken:
        audited = mask & (chunk > 0)
        means, _ = segment_means(student_logp, chunk, audited, int(chunk.max()) if chunk.numel() else 0)
        prior = means.gather(1, chunk.where(audited, 0)).exp()
        posterior = (agreement.to(prior.dtype) + self.alpha * prior) / (self.texts + self.alpha)
        return posterior.where(audited, 0) * _mean_factor(audited, mask, self.apart)


@dataclass(frozen=True)
class Audited:
    """Weight 1 on the audited chunks, else 0; `apart` as in `Posterior`."""

    apart: bool = False

    def __call__(self, chunk: Int[Tensor, "B T"], mask: Mask) -> PerToken:
        audited = mask & (chunk > 0)
        return audited * _mean_factor(audited, mask, self.apart)


@dataclass(frozen=True)
class Unaudited:
    """Weight 1 outside the audited chunks, else 0.  OmniOPD, arXiv:2606.01476, Eq. 8; `apart` as in `Posterior`."""

    apart: bool = False

    def __call__(self, chunk: Int[Tensor, "B T"], mask: Mask) -> PerToken:
        unaudited = mask & (chunk == 0)
        return unaudited * _mean_factor(unaudited, mask, self.apart)


@dataclass(frozen=True)
class CentredPosterior:
    """x times OmniOPD's posterior minus its mean over the batch's audited tokens; 0 outside the chunks.  opd project.

    The paper's posterior is positive for every chunk.  The mean part of its gradient is noise of mean 0, which grows
    with the length of a chunk while the part that distinguishes chunks shrinks (docs/LOG.md).
    """

    texts: int = 10
    alpha: float = 1.0

    def __post_init__(self) -> None:
        Posterior(self.texts, self.alpha)  # raises ValueError for an invalid alpha

    def __call__(
        self, x: PerToken, chunk: Int[Tensor, "B T"], agreement: PerToken, student_logp: PerToken, mask: Mask
    ) -> PerToken:
        audited = mask & (chunk > 0)
        posterior = Posterior(self.texts, self.alpha)(chunk, agreement, student_logp, mask)  # 0 outside the chunks
        mean = posterior.sum() / audited.sum().clamp(min=1)
        return (x * (posterior - mean)).where(audited, 0)


def _mean_factor(selected: Mask, mask: Mask, apart: bool) -> float | Float[Tensor, ""]:
    """Return the factor that turns a token mean into a mean over the selected tokens, or 1 without `apart`."""
    return mask.sum() / selected.sum().clamp(min=1) if apart else 1.0


def omniopd(
    chunks: int = 10,
    length: int = 50,
    texts: int = 10,
    alpha: float = 1.0,
    beta: float = 0.1,
    apart: bool = False,
    centred: bool = False,
) -> Method:
    """Likelihood of chunks, weighted by similarity to a teacher's texts.  OmniOPD, arXiv:2606.01476, Eq. 3-8.

    Chunks start where the student's entropy is highest.  Similarity is 1 - edit distance / the longer length, in
    characters, so the teacher may have any tokenizer.  Outside the chunks a KL keeps the student close to the
    --reference (empty: the initial student).  Without that anchor, or with chunks of 25 tokens, the paper's student
    collapses.  Every chunk's likelihood is raised, correct chunks more: use chunks short enough that a wrong chunk
    differs from the correct one, or subtract the mean with --centred.  Continuations are cached, so the same prefix of
    the same prompt gets the same texts in every epoch; Algorithm 1 generates new ones.

    Args:
        chunks: Number of audited chunks per response; fewer if no more fit.
        length: Length of a chunk in tokens, for the student and the teacher.
        texts: Number of continuations that the teacher generates for each chunk.
        alpha: Weight of the student's confidence, in units of one continuation.
        beta: Weight of KL(reference || student) on the tokens outside the chunks.
        apart: Average each term over its tokens only, instead of over all tokens of the batch (the paper uses sums).
        centred: Subtract the batch mean, so that chunks unlike the teacher's continuations are lowered.  Not in the
            paper.
    """
    audited = PolicyGradient(One(), weights=(Posterior(texts, alpha, apart),))
    if centred:
        audited = PolicyGradient(One(), transforms=(CentredPosterior(texts, alpha),), weights=(Audited(apart),))
    anchor = Match(ForwardKL(), weights=(Unaudited(apart),), coef=beta, against=Reference())
    return Method((audited, anchor), asks=Continue(chunks, length, texts))

"""OmniOPD: a teacher that only writes text audits chunks of the student's response.  arXiv:2606.01476."""

from opd.against import Reference
from opd.divergences import ForwardKL
from opd.judged import Audited, CentredPosterior, Posterior, Unaudited
from opd.method import Match, Method, PolicyGradient
from opd.questions import Continue
from opd.rewards import One


def omniopd(
    chunks: int = 10,
    length: int = 50,
    texts: int = 10,
    alpha: float = 1.0,
    beta: float = 0.1,
    apart: bool = False,
    centred: bool = False,
) -> Method:
    """Likelihood of chunks, by how like them a text-only teacher goes on.  OmniOPD, arXiv:2606.01476, Eq. 3-8.

    Chunks start where the student is least sure; likeness is 1 - edit distance / the longer length, in characters, so
    the teacher may have any tokenizer.  Outside them the student stays near the --reference (empty: itself as it was).
    Without that anchor, or with chunks of 25 tokens, the paper's student collapses.  Every chunk is raised, right ones
    more: chunks should be so short that a wrong one is unlike the right one, or --centred takes the mean off.  The same
    beginning of the same prompt gets the same texts in every epoch, as they are kept; Algorithm 1 draws them anew.

    Args:
        chunks: chunks of a response that are audited, fewer where no more fit.
        length: tokens of a chunk, the student's and the teacher's.
        texts: continuations the teacher writes at each chunk.
        alpha: weight of the student's own confidence, in texts.
        beta: weight of KL(reference || student) on the other tokens.
        apart: each term is a mean over its own tokens, not over all of the batch (the paper writes sums).
        centred: less the batch's mean: chunks that the teacher goes on unlike are lowered.  Not the paper's.
    """
    audited = PolicyGradient(One(), weights=(Posterior(texts, alpha, apart),))
    if centred:
        audited = PolicyGradient(One(), transforms=(CentredPosterior(texts, alpha),), weights=(Audited(apart),))
    anchor = Match(ForwardKL(), weights=(Unaudited(apart),), coef=beta, against=Reference())
    return Method((audited, anchor), asks=Continue(chunks, length, texts))

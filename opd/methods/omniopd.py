"""OmniOPD: a teacher that only generates text audits chunks of the student's response.  arXiv:2606.01476."""

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
    """Likelihood of chunks, weighted by similarity to a text-only teacher's continuations.  OmniOPD, arXiv:2606.01476,
    Eq. 3-8.

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

"""Preference losses: log-probs in, one loss per pair out. Each function is its paper's equation.

    r_w, r_l   chosen_logratios, rejected_logratios    log(pi(y|x) / pi_ref(y|x)), in nats
    h          delta_score                             r_w - r_l; s(r_w) - s(r_l) of an f-divergence
    n_w, n_l   chosen_lengths, rejected_lengths        scored tokens
    l_w, l_l   chosen_mean_logps, rejected_mean_logps  log pi(y|x) / n
    sigma(z)   1 / (1 + e^-z), always computed through logsigmoid

A function's parameters are what it reads: `x` is the batch, any other name a command-line flag.
`LOSSES` maps `--loss_type` to the function. A training step's loss is the sum over pairs divided by
the pairs of the global batch. Losses that couple the pairs of a batch say so.
"""

import inspect
import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def reverse_kl(r: Tensor) -> Tensor:
    """s = r: the KL-regularised reward of DPO (arXiv:2305.18290 eq. 5)."""
    return r


class PairLogps(NamedTuple):
    """What a loss may read: float32 (or wider) tensors with one entry per pair."""

    policy_chosen_logps: Tensor  # (B,) nats, summed over the scored tokens
    policy_rejected_logps: Tensor  # (B,)
    ref_chosen_logps: Tensor  # (B,) no gradient; zeros when there is no reference
    ref_rejected_logps: Tensor  # (B,)
    chosen_lengths: Tensor  # (B,) scored tokens
    rejected_lengths: Tensor  # (B,)
    chosen_ratings: Tensor | None = None  # (B,) the row's own `chosen_score`, for odpo and rpo_*
    rejected_ratings: Tensor | None = None  # (B,)
    chosen_nll: Tensor | None = None  # (B,) -log pi(chosen), the plain sum even under ld_alpha
    chosen_tokens_per_pair: Tensor | None = None  # () mean chosen_lengths of the global batch
    score: Callable[[Tensor], Tensor] = reverse_kl  # the f-divergence's s

    @property
    def chosen_logratios(self) -> Tensor:  # (B,)
        return self.policy_chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:  # (B,)
        return self.policy_rejected_logps - self.ref_rejected_logps

    @property
    def chosen_scores(self) -> Tensor:  # (B,)
        return self.score(self.chosen_logratios)

    @property
    def rejected_scores(self) -> Tensor:  # (B,)
        return self.score(self.rejected_logratios)

    @property
    def delta_score(self) -> Tensor:  # (B,)
        return self.chosen_scores - self.rejected_scores

    @property
    def chosen_mean_logps(self) -> Tensor:  # (B,)
        return self.policy_chosen_logps / self.chosen_lengths

    @property
    def rejected_mean_logps(self) -> Tensor:  # (B,)
        return self.policy_rejected_logps / self.rejected_lengths


# Scores of the other f-divergences (f-DPO, arXiv:2309.16240 table 1)


def forward_kl(r: Tensor) -> Tensor:
    """s = 1 - 1/u, u = e^r. Below r = -80 held at its value there, so that it stays finite."""
    return 1 - torch.exp(-r.clamp(min=-80))


def js_divergence(r: Tensor) -> Tensor:
    """s = log(2u / (1 + u)), u = e^r."""
    return math.log(2) + F.logsigmoid(r)


def alpha_divergence(r: Tensor, f_alpha_divergence_coef: float) -> Tensor:
    """s = (1 - u^-alpha) / alpha, u = e^r; alpha -> 0 is `reverse_kl`, 1 is `forward_kl`.

    TRL 1.16's coefficient is 1 - alpha; the default, 0.5, is the same. u^-alpha is at most e^80."""
    alpha = f_alpha_divergence_coef
    return r if alpha == 0 else -torch.expm1((-alpha * r).clamp(max=80)) / alpha


F_DIVERGENCES = {s.__name__: s for s in (reverse_kl, forward_kl, js_divergence, alpha_divergence)}


# Losses of the reward difference, h


def sigmoid(x: PairLogps, beta: float, label_smoothing: float) -> Tensor:  # (B,)
    """-(1-eps) log sigma(beta h) - eps log sigma(-beta h): DPO (arXiv:2305.18290 eq. 7).

    eps > 0 is cDPO: the probability that a label is flipped. TRL 1.16 ignores eps for this loss."""
    return smoothed_logistic(beta * x.delta_score, label_smoothing)


def smoothed_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    """-(1-eps) log sigma(z) - eps log sigma(-z)."""
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def hinge(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """max(0, 1 - beta h): SLiC (arXiv:2305.10425) on DPO scores, as in RSO (arXiv:2309.06657)."""
    return torch.relu(1 - beta * x.delta_score)


def ipo(x: PairLogps, beta: float, ipo_average: str) -> Tensor:  # (B,)
    """(h - 1/(2 beta))^2: IPO (arXiv:2310.12036 eq. 17); beta is the paper's tau.

    `token` (default) takes r / n, which the authors confirmed to TRL as the form of their results;
    `sum` is the equation to the letter, as in the original DPO code."""
    h = x.delta_score if ipo_average == "sum" else normalised_delta(x)
    return (h - 1 / (2 * beta)) ** 2


def exo_pair(x: PairLogps, beta: float, label_smoothing: float) -> Tensor:  # (B,)
    """sigma(z)[log sigma(z) - log(1-eps)] + sigma(-z)[log sigma(-z) - log eps], z = beta h.

    EXO (arXiv:2402.00856 eq. 16), KL(policy || label). Infinite at eps = 0, which means 1e-3."""
    z = beta * x.delta_score
    epsilon = label_smoothing or 1e-3
    chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-epsilon))
    rejected = torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(epsilon))
    return chosen + rejected


def robust(x: PairLogps, beta: float, label_smoothing: float) -> Tensor:  # (B,)
    """[-(1-eps) log sigma(z) + eps log sigma(-z)] / (1 - 2 eps), z = beta h: arXiv:2403.00409.

    An unbiased estimate of the loss under clean labels, so unbounded below: it may be negative."""
    z = beta * x.delta_score
    noisy = -(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)
    return noisy / (1 - 2 * label_smoothing)


def discopop(x: PairLogps, beta: float, discopop_tau: float) -> Tensor:  # (B,)
    """-(1-m) log sigma(z) + m e^-z, z = beta h, m = sigma(z/tau): DiscoPOP, arXiv:2406.08414 eq. 5.

    m e^-z is one exponential, to stay finite. Minimum at z = -0.1186: near 0, h is lowered."""
    z = beta * x.delta_score
    logistic = -F.logsigmoid(z) * torch.sigmoid(-z / discopop_tau)
    return logistic + torch.exp(F.logsigmoid(z / discopop_tau) - z)


def sigmoid_norm(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """-log sigma(beta (r_w/n_w - r_l/n_l)), beta near 5: DPO of Tulu 3 (arXiv:2411.15124)."""
    return -F.logsigmoid(beta * normalised_delta(x))


def normalised_delta(x: PairLogps) -> Tensor:  # (B,)
    """r_w/n_w - r_l/n_l, nats per token."""
    return x.chosen_scores / x.chosen_lengths - x.rejected_scores / x.rejected_lengths


def dpop(x: PairLogps, beta: float, dpop_lambda: float) -> Tensor:  # (B,)
    """-log sigma(beta (h - lambda max(0, -r_w))): DPO-Positive (arXiv:2402.13228)."""
    return -F.logsigmoid(beta * (x.delta_score - dpop_lambda * torch.relu(-x.chosen_logratios)))


def rdpo(x: PairLogps, beta: float, rdpo_alpha: float) -> Tensor:  # (B,)
    """-log sigma(beta h + alpha (n_w - n_l)): length-regularised R-DPO (arXiv:2403.19159)."""
    penalty = rdpo_alpha * (x.chosen_lengths - x.rejected_lengths)
    return -F.logsigmoid(beta * x.delta_score + penalty)


# Losses that look at r_w and r_l one by one


def nca_pair(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """-log sigma(z_w) - 1/2 log sigma(-z_w) - 1/2 log sigma(-z_l), z = beta r: arXiv:2402.05369."""
    chosen = beta * x.chosen_logratios
    rejected = beta * x.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(x: PairLogps, beta: float, delta: float) -> Tensor:  # (B,)
    """-log sigma(beta r_w - delta) - log sigma(-(beta r_l - delta)): BCO (arXiv:2404.04656).

    Batch-coupled: delta, a constant, tracks 1/2 (E_w[beta r] + E_l[beta r]); see `--bco_delta`."""
    chosen = beta * x.chosen_logratios - delta
    return -F.logsigmoid(chosen) - F.logsigmoid(delta - beta * x.rejected_logratios)


def sppo_hard(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2: SPPO (arXiv:2405.00675 eq. 4.7), P(w) = 1.

    beta is 1/eta. It starts at 1/(2 beta^2); the authors halve the loss and take beta = 1e-3."""
    return (x.chosen_logratios - 0.5 / beta) ** 2 + (x.rejected_logratios + 0.5 / beta) ** 2


def apo_zero(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """sigma(-beta r_w) + sigma(beta r_l): APO (arXiv:2408.06266 eq. 7): chosen beats the model."""
    return torch.sigmoid(-beta * x.chosen_logratios) + torch.sigmoid(beta * x.rejected_logratios)


def apo_down(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """sigma(beta r_w) + sigma(-beta h): APO (arXiv:2408.06266 eq. 8): the model beats chosen."""
    return torch.sigmoid(beta * x.chosen_logratios) + torch.sigmoid(-beta * x.delta_score)


# Losses that sort the batch: values come in sorted order, not in the order of the pairs


def aot(x: PairLogps, beta: float, label_smoothing: float) -> Tensor:  # (B,)
    """`sigmoid` of sorted policy - sorted ref margins, batch-coupled: AOT (arXiv:2406.05882)."""
    policy = (x.policy_chosen_logps - x.policy_rejected_logps).sort().values
    ref = (x.ref_chosen_logps - x.ref_rejected_logps).sort().values
    return smoothed_logistic(beta * (policy - ref), label_smoothing)


def aot_unpaired(x: PairLogps, beta: float, label_smoothing: float) -> Tensor:  # (B,)
    """`sigmoid` of sorted r_w - sorted r_l: AOT, unpaired; batch-coupled as `aot`."""
    delta = x.chosen_logratios.sort().values - x.rejected_logratios.sort().values
    return smoothed_logistic(beta * delta, label_smoothing)


# Losses without a reference


def sft(x: PairLogps, sft_average: str) -> Tensor:  # (B,)
    """-log pi(y_w|x), per token.

    `token` (default): mean over the chosen tokens of the global batch, so batch-coupled;
    `sequence`: mean over pairs of each one's mean (RPO v3, MPO); `sum`: no average (CPO)."""
    nll = -x.policy_chosen_logps if x.chosen_nll is None else x.chosen_nll
    if sft_average == "sum":
        return nll
    if sft_average == "sequence":
        return nll / x.chosen_lengths
    known = x.chosen_tokens_per_pair
    return nll / (x.chosen_lengths.mean() if known is None else known)


def simpo(x: PairLogps, beta: float, simpo_gamma: float) -> Tensor:  # (B,)
    """-log sigma(beta (l_w - l_l) - gamma): SimPO (arXiv:2405.14734 eq. 6), flag gamma / beta."""
    return -F.logsigmoid(beta * (x.chosen_mean_logps - x.rejected_mean_logps) - simpo_gamma)


def orpo(x: PairLogps, orpo_lambda: float, sft_average: str) -> Tensor:  # (B,)
    """NLL(y_w) - lambda log sigma(o_w - o_l), o = l - log(1 - e^l): ORPO, arXiv:2403.07691 eq. 6-7.

    The NLL is `sft`'s, of the completion; the authors' code and TRL add that of the prompt."""
    log_odds = lambda logps: logps - torch.log(-torch.expm1(logps))
    ratio = log_odds(x.chosen_mean_logps) - log_odds(x.rejected_mean_logps)
    return sft(x, sft_average) - orpo_lambda * F.logsigmoid(ratio)


def cpo(x: PairLogps, beta: float, cpo_alpha: float, label_smoothing: float,
        sft_average: str) -> Tensor:  # (B,)
    """-log sigma(beta (log pi(y_w) - log pi(y_l))) + alpha NLL(y_w): CPO (arXiv:2401.08417)."""
    z = beta * (x.policy_chosen_logps - x.policy_rejected_logps)
    return smoothed_logistic(z, label_smoothing) + cpo_alpha * sft(x, sft_average)


def simper(x: PairLogps) -> Tensor:  # (B,)
    """-e^(l_w) + e^(l_l): inverse perplexities, no beta: SimPER (arXiv:2502.00883)."""
    return torch.exp(x.rejected_mean_logps) - torch.exp(x.chosen_mean_logps)


def alphapo(x: PairLogps, beta: float, simpo_gamma: float, alphapo_alpha: float) -> Tensor:  # (B,)
    """SimPO with (1 - e^(-alpha l)) / alpha as l: AlphaPO (arXiv:2501.03884); alpha 0 is SimPO."""
    chosen = alpha_divergence(x.chosen_mean_logps, alphapo_alpha)
    rejected = alpha_divergence(x.rejected_mean_logps, alphapo_alpha)
    return -F.logsigmoid(beta * (chosen - rejected) - simpo_gamma)


# Losses that read the rows' own ratings


def odpo(x: PairLogps, beta: float, odpo_alpha: float, odpo_margin: str) -> Tensor:  # (B,)
    """-log sigma(beta h - alpha log(s_w - s_l)): ODPO (arXiv:2402.10571); `raw` takes no log."""
    gap = x.chosen_ratings - x.rejected_ratings
    margin = gap if odpo_margin == "raw" else gap.log()
    return -F.logsigmoid(beta * x.delta_score - odpo_alpha * margin)


def rpo_sq(x: PairLogps, beta: float, rpo_eta: float) -> Tensor:  # (B,)
    """(beta h - eta ds)^2, ds = s_w - s_l: reward-aware RPO, Nemotron-4 (arXiv:2406.11704)."""
    return (beta * x.delta_score - rpo_eta * (x.chosen_ratings - x.rejected_ratings)) ** 2


def rpo_bwd_kl(x: PairLogps, beta: float, rpo_eta: float) -> Tensor:  # (B,)
    """KL(Bern(sigma(eta ds)) || Bern(sigma(beta h))): the distance of Nemotron-4's RPO."""
    return bernoulli_kl(rpo_eta * (x.chosen_ratings - x.rejected_ratings), beta * x.delta_score)


def rpo_fwd_kl(x: PairLogps, beta: float, rpo_eta: float) -> Tensor:  # (B,)
    """KL(Bern(sigma(beta h)) || Bern(sigma(eta ds))): the same, reversed."""
    return bernoulli_kl(beta * x.delta_score, rpo_eta * (x.chosen_ratings - x.rejected_ratings))


def bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(Bern(sigma(a)) || Bern(sigma(b)))."""
    heads = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    return heads + torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))


ALL = (
    sigmoid, hinge, ipo, exo_pair, robust, discopop, sigmoid_norm, dpop, rdpo,
    nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, aot, aot_unpaired,
    sft, simpo, orpo, cpo, simper, alphapo, odpo, rpo_sq, rpo_bwd_kl, rpo_fwd_kl)
LOSSES = {loss.__name__: loss for loss in ALL} | {"aot_pair": aot_unpaired}  # TRL 0.18's name

NO_REFERENCE = {"sft", "simpo", "orpo", "cpo", "simper", "alphapo"}
SORTS_THE_BATCH = {"aot", "aot_pair", "aot_unpaired"}
READS_RATINGS = {"odpo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"}
PER_TOKEN = {"sft", "sigmoid_norm", "simpo", "orpo", "simper", "alphapo"}
# ipo and sigmoid_norm divide a sequence's score by its length, as TRL 1.16 does.
TAKES_F_DIVERGENCE = {"sigmoid", "hinge", "robust", "exo_pair", "discopop", "ipo", "sigmoid_norm"}


# From token log-probs to a loss, and to metrics


def completion_sums(token_logps: Tensor, lengths: Tensor, ld_alpha: float | None = None) -> Tensor:
    """Sum `token_logps` (N,) over each completion: (B, 2), as `lengths`, which are in stream order.

    With `ld_alpha`: the first l_p tokens + alpha times the rest, l_p = min(n_w, n_l): LD-DPO
    (arXiv:2409.06411), which takes the length out of the preference. alpha = 1 is the plain sum."""
    flat = lengths.reshape(-1)
    if ld_alpha is not None:
        count = len(token_logps)
        shared = lengths.min(1, keepdim=True).values.expand(-1, 2)
        shared = shared.repeat_interleave(flat, output_size=count)
        beyond = token_positions(lengths, count) >= shared
        token_logps = torch.where(beyond, ld_alpha * token_logps, token_logps)
    # unsafe: the checks would refuse B = 0, and a rank without a pair left in a step has just that
    sums = torch.segment_reduce(token_logps, "sum", lengths=flat, initial=0, unsafe=True)
    return sums.view(lengths.shape)


def token_positions(lengths: Tensor, count: int) -> Tensor:  # (N,)
    """Count 0, 1, 2 ... in each completion, for completions of `lengths` (B, 2) laid end to end.

    `count` is N, which would have to be asked of the device."""
    flat = lengths.reshape(-1)
    starts = (flat.cumsum(0) - flat).repeat_interleave(flat, output_size=count)
    return torch.arange(count, device=lengths.device) - starts


@torch.no_grad()
def wpo_weights(token_logps: Tensor, log_sum_sq_probs: Tensor, lengths: Tensor,
                wpo_clamp: bool) -> Tensor:  # (B,)
    """min(1, w_w w_l), w = exp(1/n sum_t [log p_t - log sum_v p_v^2]): WPO, arXiv:2406.11827 eq. 2.

    How likely the policy is to have written the pair itself; a constant. TRL does not clamp."""
    w = torch.exp((completion_sums(token_logps - log_sum_sq_probs, lengths) / lengths).sum(1))
    return w.clamp(max=1) if wpo_clamp else w


def pair_losses(x: PairLogps, options: dict, weights: Tensor | None = None) -> Tensor:  # (B,)
    """Sum the losses named in options["loss_type"]; the mean over the global batch is the loss.

    `options` has the flags that losses read. `weights` (B,) are WPO's, for all but `sft`."""
    total = torch.zeros_like(x.policy_chosen_logps)
    names = options["loss_type"]
    for name, weight in zip(names, options["loss_weights"] or [1.0] * len(names)):
        loss = LOSSES[name]
        value = loss(x, **{flag: options[flag] for flag in flags_of(loss)})
        if weights is not None and name != "sft":
            value = weights * value
        total = total + weight * value
    if options["rpo_alpha"]:  # RPO (arXiv:2404.19733 v3 eq. 1): + alpha NLL(y_w) / |y_w|
        total = total + options["rpo_alpha"] * sft(x, options["rpo_average"])
    return total


def flags_of(loss: Callable) -> list[str]:
    """List the command-line flags a loss reads: its parameters after `x`."""
    return list(inspect.signature(loss).parameters)[1:]


def pair_metrics(x: PairLogps, beta: float) -> dict[str, Tensor]:  # each (B,)
    """Compute TRL's metrics, and `kl`: rewards are beta r for every loss; a tie counts 1/2."""
    chosen = beta * x.chosen_logratios
    rejected = beta * x.rejected_logratios
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (torch.sign(chosen - rejected) + 1) / 2,
        "logps/chosen": x.policy_chosen_logps,
        "logps/rejected": x.policy_rejected_logps,
        "kl": (x.chosen_logratios + x.rejected_logratios) / 2,
    }

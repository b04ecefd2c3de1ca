"""Preference losses: each is its paper's equation, one short function, log-probs in, one loss per pair out.

    r_w, r_l   chosen_logratios, rejected_logratios   log pi(y|x) - log pi_ref(y|x), summed over a completion's tokens (nats)
    h          delta_score                            r_w - r_l  (under an f-divergence, s(r_w) - s(r_l))
    n_w, n_l   chosen_lengths, rejected_lengths       scored tokens
    l_w, l_l   chosen_mean_logps, rejected_mean_logps log pi(y|x) / n
    sigma(z)   1 / (1 + e^-z), always through logsigmoid

A function's parameter list says what it reads: `x` is the batch, every other name is a command-line flag. `LOSSES`
maps `--loss_type` to the function. The loss of a training step is the sum over pairs divided by the pairs of the
global batch. The batch-coupled ones (`sft`, `aot*`, `bco_pair`) say so in their docstrings.
"""

import inspect
import math
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores


def reverse_kl(r: Tensor) -> Tensor:
    """s = r: the KL-regularised reward of DPO (arXiv:2305.18290 eq. 5)."""
    return r


def forward_kl(r: Tensor) -> Tensor:
    """s = 1 - 1/u, u = e^r (f-DPO, arXiv:2309.16240 table 1). Below r = -80 held at its value there."""
    return 1 - torch.exp(-r.clamp(min=-80))


def js_divergence(r: Tensor) -> Tensor:
    """s = log(2u / (1 + u)), u = e^r (f-DPO, table 1)."""
    return math.log(2) + F.logsigmoid(r)


def alpha_divergence(r: Tensor, f_alpha_divergence_coef: float) -> Tensor:
    """s = (1 - u^-alpha) / alpha, u = e^r (f-DPO, table 1); alpha -> 0 is `reverse_kl`, 1 is `forward_kl`.

    TRL 1.16 calls 1 - alpha its coefficient; both agree at the default, 0.5. u^-alpha is held at e^80 beyond it.
    """
    alpha = f_alpha_divergence_coef
    return r if alpha == 0 else -torch.expm1((-alpha * r).clamp(max=80)) / alpha


F_DIVERGENCES = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "js_divergence": js_divergence,
                 "alpha_divergence": alpha_divergence}


class PairLogps(NamedTuple):
    """What a loss may read: float32 (or wider) tensors with one entry per pair."""

    policy_chosen_logps: Tensor  # (B,) nats, summed over the scored tokens
    policy_rejected_logps: Tensor  # (B,)
    ref_chosen_logps: Tensor  # (B,) no gradient; zeros when there is no reference
    ref_rejected_logps: Tensor  # (B,)
    chosen_lengths: Tensor  # (B,) scored tokens
    rejected_lengths: Tensor  # (B,)
    chosen_ratings: Optional[Tensor] = None  # (B,) the row's own `chosen_score`, for odpo and rpo_*
    rejected_ratings: Optional[Tensor] = None  # (B,)
    chosen_nll: Optional[Tensor] = None  # (B,) -log pi(chosen) over all its tokens, where ld_alpha has weighted the sums
    chosen_tokens_per_pair: Optional[Tensor] = None  # () mean of chosen_lengths over the global batch
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


# Losses of the reward difference, h


def sigmoid(x: PairLogps, beta: float, label_smoothing: float) -> Tensor:  # (B,)
    """-(1-eps) log sigma(beta h) - eps log sigma(-beta h): DPO (arXiv:2305.18290 eq. 7); eps > 0 is cDPO.

    Here eps is the probability that a label is flipped. TRL 1.16 ignores eps for this loss.
    """
    return smoothed_logistic(beta * x.delta_score, label_smoothing)


def smoothed_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    """-(1-eps) log sigma(z) - eps log sigma(-z)."""
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def hinge(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """max(0, 1 - beta h): SLiC's hinge (arXiv:2305.10425) on DPO scores, as in RSO (arXiv:2309.06657)."""
    return torch.relu(1 - beta * x.delta_score)


def ipo(x: PairLogps, beta: float, ipo_average: str) -> Tensor:  # (B,)
    """(h - 1/(2 beta))^2: IPO (arXiv:2310.12036 eq. 17); beta is the paper's tau.

    `token` (default) takes r / n, which the authors confirmed to TRL as the form of their results; `sum` is the
    equation to the letter, as in the original DPO code.
    """
    h = x.delta_score if ipo_average == "sum" else normalised_delta(x)
    return (h - 1 / (2 * beta)) ** 2


def exo_pair(x: PairLogps, beta: float, label_smoothing: float) -> Tensor:  # (B,)
    """KL(policy || label): sigma(z)[log sigma(z) - log(1-eps)] + sigma(-z)[log sigma(-z) - log eps], z = beta h.

    EXO (arXiv:2402.00856 eq. 16). eps = 0 would be infinite, so 0 means the paper's 1e-3, for this loss only.
    """
    logits, epsilon = beta * x.delta_score, label_smoothing or 1e-3
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-epsilon))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(epsilon))
    return chosen + rejected


def robust(x: PairLogps, beta: float, label_smoothing: float) -> Tensor:  # (B,)
    """[-(1-eps) log sigma(beta h) + eps log sigma(-beta h)] / (1 - 2 eps): robust DPO (arXiv:2403.00409).

    An unbiased estimate of the loss under clean labels, so unbounded below: a negative value is no error.
    """
    logits = beta * x.delta_score
    noisy = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return noisy / (1 - 2 * label_smoothing)


def discopop(x: PairLogps, beta: float, discopop_tau: float) -> Tensor:  # (B,)
    """(1-m)(-log sigma(z)) + m e^-z, z = beta h, m = sigma(z/tau): DiscoPOP (arXiv:2406.08414 eq. 5).

    m e^-z is one exponential, so that it stays finite. Near z = 0 its gradient lowers the margin (minimum: -0.1186).
    """
    logits = beta * x.delta_score
    logistic = -F.logsigmoid(logits) * torch.sigmoid(-logits / discopop_tau)
    return logistic + torch.exp(F.logsigmoid(logits / discopop_tau) - logits)


def sigmoid_norm(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """-log sigma(beta (r_w/n_w - r_l/n_l)): length-normalised DPO of Tulu 3 (arXiv:2411.15124); beta near 5."""
    return -F.logsigmoid(beta * normalised_delta(x))


def normalised_delta(x: PairLogps) -> Tensor:  # (B,)
    """r_w/n_w - r_l/n_l, nats per token."""
    return x.chosen_scores / x.chosen_lengths - x.rejected_scores / x.rejected_lengths


def dpop(x: PairLogps, beta: float, dpop_lambda: float) -> Tensor:  # (B,)
    """-log sigma(beta (h - lambda max(0, -r_w))): DPO-Positive (arXiv:2402.13228); the penalty is inside sigma."""
    return -F.logsigmoid(beta * (x.delta_score - dpop_lambda * torch.relu(-x.chosen_logratios)))


def rdpo(x: PairLogps, beta: float, rdpo_alpha: float) -> Tensor:  # (B,)
    """-log sigma(beta h + alpha (n_w - n_l)): length-regularised R-DPO (arXiv:2403.19159)."""
    return -F.logsigmoid(beta * x.delta_score + rdpo_alpha * (x.chosen_lengths - x.rejected_lengths))


# Losses that look at r_w and r_l one by one


def nca_pair(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """-log sigma(beta r_w) - 1/2 log sigma(-beta r_w) - 1/2 log sigma(-beta r_l): NCA (arXiv:2402.05369)."""
    chosen, rejected = beta * x.chosen_logratios, beta * x.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(x: PairLogps, beta: float, delta: float) -> Tensor:  # (B,)
    """-log sigma(beta r_w - delta) - log sigma(-(beta r_l - delta)): BCO (arXiv:2404.04656), no gradient through delta.

    Batch-coupled: delta tracks 1/2 (E_w[beta r] + E_l[beta r]); `--bco_delta` says how.
    """
    return -F.logsigmoid(beta * x.chosen_logratios - delta) - F.logsigmoid(delta - beta * x.rejected_logratios)


def sppo_hard(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2: SPPO (arXiv:2405.00675 eq. 4.7) with P = 1 for the winner.

    beta is 1/eta. Its start, 1/(2 beta^2), is large for a small beta; the authors halve the loss and take beta = 1e-3.
    """
    return (x.chosen_logratios - 0.5 / beta) ** 2 + (x.rejected_logratios + 0.5 / beta) ** 2


def apo_zero(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """1 - sigma(beta r_w) + sigma(beta r_l): APO (arXiv:2408.06266 eq. 7), chosen better than the model."""
    return torch.sigmoid(-beta * x.chosen_logratios) + torch.sigmoid(beta * x.rejected_logratios)


def apo_down(x: PairLogps, beta: float) -> Tensor:  # (B,)
    """sigma(beta r_w) + 1 - sigma(beta h): APO (arXiv:2408.06266 eq. 8), chosen worse than the model."""
    return torch.sigmoid(beta * x.chosen_logratios) + torch.sigmoid(-beta * x.delta_score)


# Losses that sort the batch


def aot(x: PairLogps, beta: float, label_smoothing: float) -> Tensor:  # (B,)
    """sigmoid(beta Delta), Delta = sorted policy margins - sorted reference margins: AOT (arXiv:2406.05882).

    Batch-coupled: it matches quantiles, sorted over the global batch; values come in sorted, not in pair, order.
    """
    policy = (x.policy_chosen_logps - x.policy_rejected_logps).sort().values
    ref = (x.ref_chosen_logps - x.ref_rejected_logps).sort().values
    return smoothed_logistic(beta * (policy - ref), label_smoothing)


def aot_unpaired(x: PairLogps, beta: float, label_smoothing: float) -> Tensor:  # (B,)
    """sigmoid(beta Delta), Delta = sorted r_w - sorted r_l: AOT unpaired; batch-coupled as `aot`. Also `aot_pair`."""
    delta = x.chosen_logratios.sort().values - x.rejected_logratios.sort().values
    return smoothed_logistic(beta * delta, label_smoothing)


# Losses without a reference


def sft(x: PairLogps, sft_average: str) -> Tensor:  # (B,)
    """-log pi(y_w|x), per token. `token` (default): the mean over the chosen tokens of the global batch, so
    batch-coupled through their number; `sequence`: the mean over pairs of each one's mean (RPO v3, MPO); `sum`: no
    average over tokens (CPO's paper)."""
    nll = -x.policy_chosen_logps if x.chosen_nll is None else x.chosen_nll
    if sft_average == "sum":
        return nll
    if sft_average == "sequence":
        return nll / x.chosen_lengths
    return nll / (x.chosen_lengths.mean() if x.chosen_tokens_per_pair is None else x.chosen_tokens_per_pair)


def simpo(x: PairLogps, beta: float, simpo_gamma: float) -> Tensor:  # (B,)
    """-log sigma(beta (l_w - l_l) - gamma): SimPO (arXiv:2405.14734 eq. 6). The authors' flag is gamma / beta."""
    return -F.logsigmoid(beta * (x.chosen_mean_logps - x.rejected_mean_logps) - simpo_gamma)


def orpo(x: PairLogps, orpo_lambda: float, sft_average: str) -> Tensor:  # (B,)
    """NLL(y_w) - lambda log sigma(o_w - o_l), o = log odds = l - log(1 - e^l): ORPO (arXiv:2403.07691 eq. 6, 7).

    The NLL is `sft`'s, over the completion; the authors' code and TRL take it over the prompt too.
    """
    log_odds = lambda mean_logps: mean_logps - torch.log(-torch.expm1(mean_logps))
    ratio = log_odds(x.chosen_mean_logps) - log_odds(x.rejected_mean_logps)
    return sft(x, sft_average) - orpo_lambda * F.logsigmoid(ratio)


def cpo(x: PairLogps, beta: float, cpo_alpha: float, label_smoothing: float, sft_average: str) -> Tensor:  # (B,)
    """-log sigma(beta (log pi(y_w) - log pi(y_l))) + alpha NLL(y_w): CPO (arXiv:2401.08417); smoothing as in cDPO."""
    logits = beta * (x.policy_chosen_logps - x.policy_rejected_logps)
    return smoothed_logistic(logits, label_smoothing) + cpo_alpha * sft(x, sft_average)


def simper(x: PairLogps) -> Tensor:  # (B,)
    """-e^(l_w) + e^(l_l): inverse perplexities, no beta, no reference: SimPER (arXiv:2502.00883)."""
    return torch.exp(x.rejected_mean_logps) - torch.exp(x.chosen_mean_logps)


def alphapo(x: PairLogps, beta: float, simpo_gamma: float, alphapo_alpha: float) -> Tensor:  # (B,)
    """SimPO with l replaced by (1 - e^(-alpha l)) / alpha: AlphaPO (arXiv:2501.03884); alpha -> 0 is SimPO."""
    chosen = alpha_divergence(x.chosen_mean_logps, alphapo_alpha)
    rejected = alpha_divergence(x.rejected_mean_logps, alphapo_alpha)
    return -F.logsigmoid(beta * (chosen - rejected) - simpo_gamma)


# Losses that read the rows' own ratings


def odpo(x: PairLogps, beta: float, odpo_alpha: float, odpo_margin: str) -> Tensor:  # (B,)
    """-log sigma(beta h - alpha log(s_w - s_l)): DPO with an offset (arXiv:2402.10571); `raw` leaves out the log."""
    gap = x.chosen_ratings - x.rejected_ratings
    return -F.logsigmoid(beta * x.delta_score - odpo_alpha * (gap if odpo_margin == "raw" else gap.log()))


def rpo_sq(x: PairLogps, beta: float, rpo_eta: float) -> Tensor:  # (B,)
    """(beta h - eta ds)^2, ds = s_w - s_l: reward-aware preference optimization, Nemotron-4 (arXiv:2406.11704)."""
    return (beta * x.delta_score - rpo_eta * (x.chosen_ratings - x.rejected_ratings)) ** 2


def rpo_bwd_kl(x: PairLogps, beta: float, rpo_eta: float) -> Tensor:  # (B,)
    """KL(Bern(sigma(eta ds)) || Bern(sigma(beta h))): the distance of Nemotron-4's RPO."""
    return bernoulli_kl(rpo_eta * (x.chosen_ratings - x.rejected_ratings), beta * x.delta_score)


def rpo_fwd_kl(x: PairLogps, beta: float, rpo_eta: float) -> Tensor:  # (B,)
    """KL(Bern(sigma(beta h)) || Bern(sigma(eta ds))): the same, reversed."""
    return bernoulli_kl(beta * x.delta_score, rpo_eta * (x.chosen_ratings - x.rejected_ratings))


def bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(Bern(sigma(a)) || Bern(sigma(b))), from the logits."""
    heads = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    return heads + torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))


LOSSES = {f.__name__: f for f in (
    sigmoid, hinge, ipo, exo_pair, robust, discopop, sigmoid_norm, dpop, rdpo, nca_pair, bco_pair, sppo_hard, apo_zero,
    apo_down, aot, aot_unpaired, sft, simpo, orpo, cpo, simper, alphapo, odpo, rpo_sq, rpo_bwd_kl, rpo_fwd_kl)}
LOSSES["aot_pair"] = aot_unpaired  # TRL 0.18's name

NO_REFERENCE = {"sft", "simpo", "orpo", "cpo", "simper", "alphapo"}
SORTS_THE_BATCH = {"aot", "aot_pair", "aot_unpaired"}
READS_RATINGS = {"odpo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"}
PER_TOKEN = {"sft", "sigmoid_norm", "simpo", "orpo", "simper", "alphapo"}
TAKES_F_DIVERGENCE = {"sigmoid", "hinge", "robust", "exo_pair", "discopop"}  # a sequence ratio over n means nothing


# From token log-probs to a loss


def completion_sums(token_logps: Tensor, lengths: Tensor, ld_alpha: Optional[float] = None) -> Tensor:  # (B, 2)
    """Sum `token_logps` (N,) over each completion; `lengths` (B, 2) are their scored tokens, in stream order.

    With `ld_alpha`: sum over the first l_p tokens + alpha times the rest, l_p = min(n_w, n_l): LD-DPO
    (arXiv:2409.06411), which takes the length from the preference. alpha = 1 is the plain sum.
    """
    if ld_alpha is not None:
        shared = lengths.min(1, keepdim=True).values.expand(-1, 2).repeat_interleave(lengths.reshape(-1))
        token_logps = torch.where(token_positions(lengths) < shared, token_logps, ld_alpha * token_logps)
    sums = torch.segment_reduce(token_logps, "sum", lengths=lengths.reshape(-1), initial=0, unsafe=True)  # safe takes no B = 0
    return sums.view(lengths.shape)


def token_positions(lengths: Tensor) -> Tensor:  # (N,)
    """0, 1, 2 ... within each completion, for completions of `lengths` (B, 2) laid end to end."""
    flat = lengths.reshape(-1)
    starts = (flat.cumsum(0) - flat).repeat_interleave(flat)
    return torch.arange(len(starts), device=lengths.device) - starts


@torch.no_grad()
def wpo_weights(token_logps: Tensor, log_sum_sq_probs: Tensor, lengths: Tensor, wpo_clamp: bool) -> Tensor:  # (B,)
    """min(1, w_w w_l), w = exp(1/n sum_t [log p_t - log sum_v p_v^2]): WPO (arXiv:2406.11827 eq. 2, aligned).

    How likely the policy itself is to have written the pair; no gradient goes through it. TRL 1.16 does not clamp.
    """
    w = torch.exp((completion_sums(token_logps - log_sum_sq_probs, lengths) / lengths).sum(1))
    return w.clamp(max=1) if wpo_clamp else w


def pair_losses(x: PairLogps, options: dict, weights: Optional[Tensor] = None) -> Tensor:  # (B,)
    """Weighted sum of the losses named in options["loss_type"]; its mean over the global batch is the loss.

    `options` holds the flags the losses read by name. `weights` (B,) are WPO's, applied to all but `sft`.
    """
    total = torch.zeros_like(x.policy_chosen_logps)
    terms = list(zip(options["loss_type"], options["loss_weights"] or [1.0] * len(options["loss_type"])))
    for name, weight in terms:
        loss = LOSSES[name]
        value = loss(x, **{flag: options[flag] for flag in flags_of(loss)})
        total = total + weight * (value if weights is None or name == "sft" else weights * value)
    if options["rpo_alpha"]:  # RPO (arXiv:2404.19733 v3 eq. 1): + alpha NLL(y_w) / |y_w|
        total = total + options["rpo_alpha"] * sft(x, options["rpo_average"])
    return total


def flags_of(loss: Callable) -> list[str]:
    """The command-line flags a loss reads: its parameters after `x`."""
    return list(inspect.signature(loss).parameters)[1:]


def pair_metrics(x: PairLogps, beta: float) -> dict[str, Tensor]:  # each (B,)
    """TRL's per-pair metrics. Implicit rewards are beta r (DPO eq. 5 without its constant); a tie counts 1/2."""
    chosen, rejected = beta * x.chosen_logratios, beta * x.rejected_logratios
    return {
        "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
        "rewards/accuracies": (torch.sign(chosen - rejected) + 1) / 2,
        "logps/chosen": x.policy_chosen_logps, "logps/rejected": x.policy_rejected_logps,
        "kl": (x.chosen_logratios + x.rejected_logratios) / 2,
    }


@torch.no_grad()
def length_bias(x: PairLogps) -> float:
    """Correlation over pairs of the margin r_w - r_l with the length difference n_w - n_l: 0 where the implicit reward
    does not ask for length, 1 where it asks for nothing else; 0 too where either is the same for all pairs."""
    margins, lengths = x.chosen_logratios - x.rejected_logratios, x.chosen_lengths - x.rejected_lengths
    r = torch.corrcoef(torch.stack([margins, lengths]).double())[0, 1] if len(margins) > 1 else torch.tensor(0.0)
    return float(r.nan_to_num())


def check_losses(options: dict, defaults: dict) -> None:
    """Refuse, by name and with the reason, what has no meaning: unknown losses, flags that no chosen loss reads,
    values out of range, options that the losses cannot be combined with. `defaults` are the flags' default values.

    Raises ValueError.
    """
    names = options["loss_type"]
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"--loss_type {name}: unknown; one of {' '.join(sorted(LOSSES))}")
    if options["loss_weights"] is not None and len(options["loss_weights"]) != len(names):
        raise ValueError(f"--loss_weights: {len(options['loss_weights'])} weights for {len(names)} loss types")
    readers = {}
    for name, loss in LOSSES.items():
        for flag in set(flags_of(loss)) & set(defaults) - {"beta"}:  # rewards are beta r, whatever the loss
            readers.setdefault(flag, []).append(name)
    for flag, who in sorted(readers.items()):
        if options[flag] != defaults[flag] and not set(who) & set(names):
            raise ValueError(f"--{flag} {options[flag]}: --loss_type {' '.join(names)} does not read it; "
                             f"{' '.join(sorted(who))} do")
    check_ranges(options)
    check_combinations(options, {flag for flag in defaults if options.get(flag) != defaults[flag]})


def check_ranges(options: dict) -> None:
    """Raise ValueError for a value outside the range on which the losses are defined."""
    epsilon, robust_too = options["label_smoothing"], "robust" in options["loss_type"]
    ranges = {
        "label_smoothing": (0 <= epsilon < 0.5 or epsilon == 0.5 and not robust_too,
                            "a probability of flipped labels, 0 <= eps < 0.5 (robust divides by 1 - 2 eps)"),
        "beta": (options["beta"] > 0, "it must be above 0"),
        "ld_alpha": (options["ld_alpha"] is None or 0 <= options["ld_alpha"] <= 1, "it must be between 0 and 1"),
        "discopop_tau": (options["discopop_tau"] > 0, "it must be above 0"),
        "f_divergence_type": (options["f_divergence_type"] in F_DIVERGENCES, f"one of {' '.join(F_DIVERGENCES)}")}
    for flag, (allowed, why) in ranges.items():
        if not allowed:
            raise ValueError(f"--{flag} {options[flag]}: {why}")


def check_combinations(options: dict, changed: set[str]) -> None:
    """Raise ValueError for options that the chosen losses cannot be combined with; `changed` are not at their default."""
    names, only_sft = set(options["loss_type"]), set(options["loss_type"]) == {"sft"}
    all_in = lambda group: names if names <= group else set()
    clashes = {  # flag: (the losses it cannot go with, why)
        "f_divergence_type": (names - {"sft"} - TAKES_F_DIVERGENCE, "it replaces the scores that only "
                              f"{' '.join(sorted(TAKES_F_DIVERGENCE))} compare; the others have no such form"),
        "use_weighting": (names & SORTS_THE_BATCH or all_in({"sft"}), "WPO weighs single pairs; sorted values belong to "
                          "no one pair, and sft is never weighed"),
        "ld_alpha": (all_in(PER_TOKEN), "these divide by the length already"),
        "reference_free": (all_in(NO_REFERENCE), "these read no reference anyway"),
        "rpo_alpha": (names if only_sft else set(), "it adds the same term again")}
    for flag, (losses, why) in clashes.items():
        if flag in changed and losses:
            raise ValueError(f"--{flag} with --loss_type {' '.join(sorted(losses))}: {why}")
    needs = {"f_alpha_divergence_coef": options["f_divergence_type"] == "alpha_divergence",
             "wpo_clamp": options["use_weighting"], "ld_apply_to_ref": options["ld_alpha"] is not None,
             "rpo_average": bool(options["rpo_alpha"])}
    reader = {"f_alpha_divergence_coef": "f_divergence_type alpha_divergence", "wpo_clamp": "use_weighting",
              "ld_apply_to_ref": "ld_alpha", "rpo_average": "rpo_alpha"}
    for flag, read in needs.items():
        if flag in changed and not read:
            raise ValueError(f"--{flag} {options[flag]}: read only with --{reader[flag]}")

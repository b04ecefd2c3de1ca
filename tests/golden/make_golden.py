"""Write losses/*.json: inputs, hyper-parameters, expected losses and gradients of every loss and option.

    python tests/golden/make_golden.py            # rewrites losses/ and SHA256SUMS beside this file
    python tests/golden/make_golden.py sigmoid    # prints the cases of one loss instead

The formulas are written as the papers print them, in arbitrary precision, and share no code with the implementation
they judge. Every input is a float64 taken exactly; every output is computed with 500 digits and rounded once to
float64. A gradient is a one-sided difference quotient with a step of 1e-100: about 100 of its digits are right, and 500
digits let a sum near 1 still show a term as small as float64 can hold. The step goes up, so that at the one corner that
a case sits on, max(0, -r_w) of dpop at r_w = 0, the derivative is 0, the value that automatic differentiation takes.

Notation, per pair: w chosen, l rejected; r = log pi(y|x) - log pi_ref(y|x), summed over completion tokens, in nats;
h = r_w - r_l; n scored tokens; mean log-prob log pi / n. The batch loss is the mean over the pairs of the batch.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

from mpmath import mp, mpf

mp.dps = 500
STEP = mpf(10) ** -100
HERE = Path(__file__).parent
POLICY_INPUTS = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "policy_chosen_token_logps",
    "policy_rejected_token_logps",
)


class Pair(NamedTuple):
    """One preference pair: summed log-probs in nats, lengths in tokens, ratings in the annotator's unit."""

    policy_w: mpf
    policy_l: mpf
    ref_w: mpf
    ref_l: mpf
    n_w: mpf
    n_l: mpf
    nll_w: mpf  # -log pi(y_w|x), never desensitised
    rating_w: mpf
    rating_l: mpf

    @property
    def r_w(self):
        return self.policy_w - self.ref_w

    @property
    def r_l(self):
        return self.policy_l - self.ref_l

    @property
    def h(self):
        return self.r_w - self.r_l

    @property
    def mean_w(self):
        return self.policy_w / self.n_w

    @property
    def mean_l(self):
        return self.policy_l / self.n_l


def sigma(x):
    return 1 / (1 + mp.exp(-x))


def log_sigma(x):
    return -mp.log1p(mp.exp(-x))


def kl_bernoulli(p_logit, q_logit):
    """KL(Bern sigma(p_logit) || Bern sigma(q_logit)), nats."""
    p, not_p = sigma(p_logit), sigma(-p_logit)
    return p * (log_sigma(p_logit) - log_sigma(q_logit)) + not_p * (log_sigma(-p_logit) - log_sigma(-q_logit))


# f-DPO, arXiv:2309.16240 table 1: the log-ratio r = log u is replaced by f'(u).


def score(r, p):
    """f'(u) up to a constant. u^-1 and u^-alpha are held at e^80 (with slope 0) where they would be larger."""
    kind, alpha = p.get("f_divergence_type", "reverse_kl"), p.get("f_alpha_divergence_coef")
    if kind == "reverse_kl" or (kind == "alpha_divergence" and alpha == 0):
        return r
    if kind == "js_divergence":
        return mp.log(2) + log_sigma(r)  # log(2u / (1 + u))
    if kind == "forward_kl":
        return 1 - mp.exp(min(80, -r))  # 1 - 1/u
    assert kind == "alpha_divergence", kind
    return (1 - mp.exp(min(80, -alpha * r))) / alpha  # (1 - u^-alpha) / alpha


def margin(x, p):
    """beta (f'(u_w) - f'(u_l)); beta h for the reverse KL of plain DPO."""
    return p["beta"] * (score(x.r_w, p) - score(x.r_l, p))


# Losses of one pair.


def smoothed(z, eps):
    """-(1 - eps) log sigma(z) - eps log sigma(-z): logistic loss of a label that is wrong with probability eps."""
    return -(1 - eps) * log_sigma(z) - eps * log_sigma(-z)


def sigmoid(x, p):
    return smoothed(margin(x, p), p["label_smoothing"])


def hinge(x, p):
    return max(mpf(0), 1 - margin(x, p))


def ipo(x, p):
    by_token = p["ipo_average"] == "token"
    s_w, s_l = score(x.r_w, p), score(x.r_l, p)
    return (s_w / (x.n_w if by_token else 1) - s_l / (x.n_l if by_token else 1) - 1 / (2 * p["beta"])) ** 2


def exo_pair(x, p):
    """KL(policy || label): policy (sigma(z), sigma(-z)), label (1 - eps, eps); eps 0 stands for 1e-3."""
    z, eps = margin(x, p), p["label_smoothing"] or mpf(0.001)
    return sigma(z) * (log_sigma(z) - mp.log(1 - eps)) + sigma(-z) * (log_sigma(-z) - mp.log(eps))


def nca_pair(x, p):
    w, l = p["beta"] * x.r_w, p["beta"] * x.r_l
    return -log_sigma(w) - log_sigma(-w) / 2 - log_sigma(-l) / 2


def robust(x, p):
    z, eps = margin(x, p), p["label_smoothing"]
    return (-(1 - eps) * log_sigma(z) + eps * log_sigma(-z)) / (1 - 2 * eps)


def bco_pair(x, p):
    return -log_sigma(p["beta"] * x.r_w - p["delta"]) - log_sigma(-(p["beta"] * x.r_l - p["delta"]))


def sppo_hard(x, p):
    half = 1 / (2 * p["beta"])
    return (x.r_w - half) ** 2 + (x.r_l + half) ** 2


def apo_zero(x, p):
    return sigma(-p["beta"] * x.r_w) + sigma(p["beta"] * x.r_l)  # 1 - sigma(z) = sigma(-z)


def apo_down(x, p):
    return sigma(p["beta"] * x.r_w) + sigma(-p["beta"] * x.h)


def discopop(x, p):
    z = margin(x, p)
    m = sigma(z / p["discopop_tau"])
    return -(1 - m) * log_sigma(z) + m * mp.exp(-z)


def sigmoid_norm(x, p):
    return -log_sigma(p["beta"] * (score(x.r_w, p) / x.n_w - score(x.r_l, p) / x.n_l))


def dpop(x, p):
    return -log_sigma(p["beta"] * (x.h - p["dpop_lambda"] * max(mpf(0), -x.r_w)))


def odpo(x, p):
    gap = x.rating_w - x.rating_l
    offset = mp.log(gap) if p["odpo_margin"] == "log" else gap
    return -log_sigma(p["beta"] * x.h - p["odpo_alpha"] * offset)


def rpo_sq(x, p):
    return (p["beta"] * x.h - p["rpo_eta"] * (x.rating_w - x.rating_l)) ** 2


def rpo_bwd_kl(x, p):
    return kl_bernoulli(p["rpo_eta"] * (x.rating_w - x.rating_l), p["beta"] * x.h)


def rpo_fwd_kl(x, p):
    return kl_bernoulli(p["beta"] * x.h, p["rpo_eta"] * (x.rating_w - x.rating_l))


def rdpo(x, p):
    return -log_sigma(p["beta"] * x.h + p["rdpo_alpha"] * (x.n_w - x.n_l))


# Losses of one pair without a reference.


def simpo(x, p):
    return -log_sigma(p["beta"] * (x.mean_w - x.mean_l) - p["simpo_gamma"])


def log_odds(mean_logp):
    """log(P / (1 - P)) of the length-normalised likelihood P = exp(mean log-prob)."""
    return mean_logp - mp.log(-mp.expm1(mean_logp))


def odds_ratio(x):
    """L_OR of ORPO, to be added to the NLL."""
    return -log_sigma(log_odds(x.mean_w) - log_odds(x.mean_l))


def contrast(x, p):
    """L_prefer of CPO, to be added to the NLL."""
    return smoothed(p["beta"] * (x.policy_w - x.policy_l), p["label_smoothing"])


def simper(x, p):
    return -mp.exp(x.mean_w) + mp.exp(x.mean_l)


def alphapo(x, p):
    alpha = p["alphapo_alpha"]
    reward = (lambda mean: (1 - mp.exp(-alpha * mean)) / alpha) if alpha else (lambda mean: mean)
    return -log_sigma(p["beta"] * (reward(x.mean_w) - reward(x.mean_l)) - p["simpo_gamma"])


# Losses that look at the whole batch; they return one number per pair, whose mean is the batch loss.


def aot(pairs, p):
    """Policy margins and reference margins, each sorted ascending, are paired by rank; values are in rank order."""
    policy = sorted(x.policy_w - x.policy_l for x in pairs)
    ref = sorted(x.ref_w - x.ref_l for x in pairs)
    return [smoothed(p["beta"] * (a - b), p["label_smoothing"]) for a, b in zip(policy, ref)]


def aot_pair(pairs, p):
    """r_w and r_l, each sorted ascending, are paired by rank; values are in rank order."""
    chosen, rejected = sorted(x.r_w for x in pairs), sorted(x.r_l for x in pairs)
    return [smoothed(p["beta"] * (a - b), p["label_smoothing"]) for a, b in zip(chosen, rejected)]


def nll(pairs, average):
    """-log pi(y_w|x). token: mean over the tokens of the batch, a pair's share being its sum times pairs / tokens;
    sequence: each pair's mean per token; sum: each pair's sum over its tokens."""
    tokens_per_pair = sum(x.n_w for x in pairs) / len(pairs)
    divisor = {"token": lambda x: tokens_per_pair, "sequence": lambda x: x.n_w, "sum": lambda x: 1}[average]
    return [x.nll_w / divisor(x) for x in pairs]


def sft(pairs, p):
    return nll(pairs, p["sft_average"])


def orpo(pairs, p):
    return [a + p["orpo_lambda"] * odds_ratio(x) for a, x in zip(nll(pairs, p["sft_average"]), pairs)]


def cpo(pairs, p):
    return [contrast(x, p) + p["cpo_alpha"] * a for a, x in zip(nll(pairs, p["sft_average"]), pairs)]


def for_each(loss):
    return lambda pairs, p: [loss(x, p) for x in pairs]


PAIR_LOSSES = [
    *(sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, discopop, sigmoid_norm),
    *(dpop, odpo, rpo_sq, rpo_bwd_kl, rpo_fwd_kl, rdpo, simpo, simper, alphapo),
]
BATCH_LOSSES = [aot, aot_pair, sft, orpo, cpo]
LOSSES = {f.__name__: for_each(f) for f in PAIR_LOSSES} | {f.__name__: f for f in BATCH_LOSSES}
RATED = ("odpo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")
WITHOUT_REF = ("simpo", "orpo", "cpo", "simper", "alphapo")


# From a case to its expected numbers.


def sum_logps(tokens, shared, alpha):
    """LD-DPO, arXiv:2409.06411: the first `shared` tokens in full, the rest times alpha."""
    return sum(tokens[:shared]) + alpha * sum(tokens[shared:])


def token_pair(inputs, i, p):
    """The pair of row i of token-level inputs, with the desensitised sums where ld_alpha is set."""
    rows = {name: inputs[name + "_token_logps"][i] for name in ("policy_chosen", "policy_rejected")}
    rows |= {name: inputs[name + "_token_logps"][i] for name in ("ref_chosen", "ref_rejected")}
    n_w, n_l = len(rows["policy_chosen"]), len(rows["policy_rejected"])
    alpha = p.get("ld_alpha", mpf(1))
    ref_alpha = alpha if p.get("ld_apply_to_ref", True) else mpf(1)
    sums = [sum_logps(t, min(n_w, n_l), ref_alpha if k.startswith("ref") else alpha) for k, t in rows.items()]
    return Pair(*sums, mpf(n_w), mpf(n_l), -sum(rows["policy_chosen"]), None, None)


def logps_pair(inputs, i, p):
    """The pair of row i of sequence-level inputs; without a reference (or told to ignore it) ref is 0."""
    at = lambda name: inputs[name][i] if name in inputs else None
    free = p.get("reference_free", False) or "ref_chosen_logps" not in inputs
    refs = (mpf(0), mpf(0)) if free else (at("ref_chosen_logps"), at("ref_rejected_logps"))
    policy = at("policy_chosen_logps"), at("policy_rejected_logps")
    lengths = at("chosen_lengths"), at("rejected_lengths")
    return Pair(*policy, *refs, *lengths, -policy[0], at("chosen_ratings"), at("rejected_ratings"))


def wpo_weight(inputs, i, p):
    """WPO, arXiv:2406.11827 eq. 2: w = exp(1/n sum_t [log p_t - log sum_v p_v^2]); min(1, w_w w_l) or w_w w_l."""
    log_w = mpf(0)
    for side in ("chosen", "rejected"):
        tokens = inputs[f"policy_{side}_token_logps"][i]
        log_w += (sum(tokens) - sum(inputs[f"policy_{side}_log_sum_sq_probs"][i])) / len(tokens)
    return min(mpf(1), mp.exp(log_w)) if p["wpo_clamp"] else mp.exp(log_w)


def per_pair(case, inputs, weights):
    """Weighted sum of the case's losses for every pair; `weights` are WPO's, held fixed, and never touch sft."""
    p = exact(case["params"])
    count = len(next(iter(inputs.values())))
    make = token_pair if "policy_chosen_token_logps" in inputs else logps_pair
    pairs = [make(inputs, i, p) for i in range(count)]
    names = case["loss_type"] if isinstance(case["loss_type"], list) else [case["loss_type"]]
    total = [mpf(0)] * count
    for name, factor in zip(names, exact(case["loss_weights"])):
        values = LOSSES[name](pairs, p)
        shares = [mpf(1)] * count if name == "sft" else weights
        total = [t + factor * v * w for t, v, w in zip(total, values, shares)]
    if "rpo_alpha" in p:
        total = [t + p["rpo_alpha"] * v for t, v in zip(total, nll(pairs, p["rpo_average"]))]
    return total


def exact(value):
    """The same structure with every number as an mpf of exactly its float64 value; words and booleans stay."""
    if isinstance(value, dict):
        return {k: exact(v) for k, v in value.items()}
    if isinstance(value, list):
        return [exact(v) for v in value]
    return value if isinstance(value, (str, bool)) else mpf(value)


def nearest(x):
    """The float64 nearest to x (0.0 for what float64 cannot hold, never -0.0)."""
    return float(mp.nstr(x, 60)) + 0.0


def stepped(inputs, name, where):
    """A copy of the inputs with one entry moved up by STEP; `where` is (i,) or (i, t)."""
    rows = [list(r) if isinstance(r, list) else r for r in inputs[name]]
    if len(where) == 1:
        rows[where[0]] += STEP
    else:
        rows[where[0]][where[1]] += STEP
    return inputs | {name: rows}


def expected(case):
    """losses (nats, one per pair), loss (their mean) and its gradient with respect to every policy input."""
    inputs = exact(case["inputs"])
    count = len(next(iter(inputs.values())))
    weighting = case["params"].get("use_weighting", False)
    weights = [wpo_weight(inputs, i, exact(case["params"])) if weighting else mpf(1) for i in range(count)]
    losses = per_pair(case, inputs, weights)

    def slope(name, *where):
        moved = per_pair(case, stepped(inputs, name, where), weights)
        return nearest(sum(b - a for a, b in zip(losses, moved)) / STEP / count)

    grad = {}
    for name in (n for n in POLICY_INPUTS if n in inputs):
        if "token" in name:
            grad[name] = [[slope(name, i, t) for t in range(len(row))] for i, row in enumerate(inputs[name])]
        else:
            grad[name] = [slope(name, i) for i in range(count)]
    return {"losses": [nearest(v) for v in losses], "loss": nearest(sum(losses) / count), "grad": grad}


# Start values: closed forms of the loss where policy equals reference, from the hyper-parameters alone.


def start_value(name, p, inputs):
    """Mean loss at policy == reference, None where there is none; independent of the functions above."""
    p, pairs = exact(p), range(len(inputs["chosen_lengths"]))
    mean = lambda f: sum(f(i) for i in pairs) / len(pairs)
    lengths = lambda i: mpf(inputs["chosen_lengths"][i]) - mpf(inputs["rejected_lengths"][i])
    gap = lambda i: mpf(inputs["chosen_ratings"][i]) - mpf(inputs["rejected_ratings"][i])
    offset = lambda i: gap(i) if p["odpo_margin"] == "log" else mp.exp(gap(i))
    half_kl = lambda t: -mp.log(2) - (mp.log(sigma(t)) + mp.log(sigma(-t))) / 2  # KL(Bern 1/2 || Bern sigma(t))
    eps = p.get("label_smoothing") or mpf(0.001)
    ln2 = mp.log(2)
    forms = {
        **dict.fromkeys(("sigmoid", "robust", "aot", "aot_pair", "sigmoid_norm", "dpop"), lambda: ln2),
        **dict.fromkeys(("hinge", "apo_zero", "apo_down"), lambda: mpf(1)),
        "ipo": lambda: 1 / (4 * p["beta"] ** 2),
        "exo_pair": lambda: -ln2 - mp.log(eps * (1 - eps)) / 2,
        "nca_pair": lambda: 2 * ln2,
        "bco_pair": lambda: 2 * ln2 if p["delta"] == 0 else mp.log(2 + mp.exp(p["delta"]) + mp.exp(-p["delta"])),
        "sppo_hard": lambda: 1 / (2 * p["beta"] ** 2),
        "discopop": lambda: (ln2 + 1) / 2,
        "odpo": lambda: mean(lambda i: mp.log(1 + offset(i) ** p["odpo_alpha"])),
        "rpo_sq": lambda: mean(lambda i: (p["rpo_eta"] * gap(i)) ** 2),
        "rpo_bwd_kl": lambda: mean(lambda i: kl_bernoulli(p["rpo_eta"] * gap(i), 0)),
        "rpo_fwd_kl": lambda: mean(lambda i: half_kl(p["rpo_eta"] * gap(i))),
        "rdpo": lambda: mean(lambda i: mp.log(1 + mp.exp(-p["rdpo_alpha"] * lengths(i)))),
    }
    return nearest(forms[name]()) if name in forms else None


# Inputs. Log-probs (except in "decimal") are the same numbers in float32, most are multiples of 1/64. Outside "tie" no
# two pairs have the same log-ratio: the gradient of a loss that sorts them would depend on the order among equals.


def batch(policy_w, ref_w, policy_l, ref_l, n_w, n_l, rating_w, rating_l):
    """Sequence-level inputs from eight columns; ratings fall away where the loss reads none."""
    logps = {"policy_chosen_logps": policy_w, "policy_rejected_logps": policy_l}
    refs = {"ref_chosen_logps": ref_w, "ref_rejected_logps": ref_l}
    lengths = {"chosen_lengths": n_w, "rejected_lengths": n_l}
    return logps | refs | lengths | {"chosen_ratings": rating_w, "rejected_ratings": rating_l}


SETS = {
    "ordinary": batch(
        [-31.203125, -70.53125, -9.0625, -128.46875, -55.25, -20.890625],
        [-33.5, -68.0, -11.140625, -131.734375, -54.984375, -27.015625],
        [-45.625, -30.75, -10.40625, -90.125, -101.984375, -12.328125],
        [-42.359375, -33.15625, -9.96875, -83.0625, -104.5, -9.1875],
        [24, 57, 8, 113, 40, 19],
        [31, 22, 8, 64, 90, 7],
        [8.5, 6.0, 9.25, 7.0, 4.5, 10.0],
        [3.0, 5.5, 9.0, 1.0, 4.25, 2.0],
    ),
    "decimal": batch(
        [-37.2146, -101.77, -3.3, -64.905, -12.0001],
        [-36.9, -104.123, -3.1415926, -66.6, -11.97],
        [-50.1, -98.7654321, -7.77, -59.99, -14.2],
        [-48.88, -99.1, -6.5, -61.3, -14.21],
        [33, 88, 3, 51, 17],
        [41, 95, 6, 50, 12],
        [7.1, 8.2, 4.4, 9.9, 6.3],
        [6.9, 1.7, 3.9, 2.2, 6.2],
    ),
    "one": batch([-0.6875], [-1.125], [-2.25], [-1.5], [1], [1], [5.0], [2.0]),
    "unequal": batch(
        [-1.59375, -210.5, -0.015625],
        [-2.0, -205.25, -0.03125],
        [-640.25, -0.375, -1.25],
        [-631.5, -1.75, -0.984375],
        [1, 300, 1],
        [700, 2, 1],
        [1.0, 0.75, 3.0],
        [0.0, 0.5, -1.0],
    ),
    "tie": batch(
        [-31.203125, -9.5, -128.46875],
        [-31.203125, -9.5, -128.46875],
        [-45.625, -3.25, -90.125],
        [-45.625, -3.25, -90.125],
        [24, 8, 113],
        [31, 2, 64],
        [8.0, 3.0, 7.0],
        [4.0, 2.5, 1.0],
    ),
    "extreme": batch(
        [-20.0, -520.5, -700.0, -30.0, -40.25, -12.5],
        [-520.0, -20.5, -200.5, -529.0, -40.25, -510.5],
        [-530.0, -25.0, -610.0, -45.0, -541.0, -60.5],
        [-30.0, -525.0, -110.5, -544.0, -43.0, -60.5],
        [64, 512, 40, 32, 48, 8],
        [300, 16, 256, 64, 900, 1],
        [10.0, 9.0, 8.0, 7.0, 10.0, 6.0],
        [0.0, 8.5, 1.0, 5.0, 0.0, 5.75],
    ),
    # for losses of the policy alone: mean log-probs from -20 to about -2^-36, whose 1 - P float64 sees only via expm1
    "certain": batch(
        [-(2.0**-20), -640.0, -0.0625, -500.0, -1.0],
        None,
        [-900.0, -0.00390625, -0.0625, -20.0, -(2.0**-36) - 2.0**-56],
        None,
        [1, 32, 64, 25, 1],
        [45, 4, 64, 1, 1],
        None,
        None,
    ),
}

TOKENS = {
    "policy_chosen_token_logps": [[-0.5, -1.25, -0.03125], [-2.5, -0.75, -0.125, -1.0], [-0.25, -3.0], [-0.0625]],
    "policy_rejected_token_logps": [[-1.5, -0.25, -2.0, -0.5, -4.25], [-3.5], [-0.375, -2.125], [-0.5, -1.75, -0.25]],
    "ref_chosen_token_logps": [[-0.75, -1.5, -0.0625], [-2.0, -1.0, -0.25, -0.875], [-0.375, -2.5], [-0.125]],
    "ref_rejected_token_logps": [[-1.0, -0.5, -1.75, -0.75, -3.5], [-3.0], [-0.25, -2.375], [-0.375, -2.0, -0.5]],
}
# log sum_v p_v^2 of the policy at each position; chosen so that min(1, w_w w_l) binds for the last two pairs only
SUM_SQ = {
    "policy_chosen_log_sum_sq_probs": [[-0.25, -0.75, -0.0625], [-1.5, -0.5, -0.25, -0.75], [-0.5, -2.5], [-0.125]],
    "policy_rejected_log_sum_sq_probs": [[-0.75, -0.5, -1.5, -0.25, -2.0], [-2.0], [-0.75, -2.75], [-0.75, -2.0, -0.5]],
}

SOURCES = {
    "sigmoid": "arXiv:2305.18290 eq. 7; label_smoothing: cDPO, ericmitchell.ai/cdpo.pdf",
    "hinge": "arXiv:2309.06657 (hinge-norm); arXiv:2305.10425",
    "ipo": "arXiv:2310.12036 eq. 17, per-token average as the authors confirmed to TRL",
    "exo_pair": "arXiv:2402.00856 eq. 16",
    "nca_pair": "arXiv:2402.05369, K = 2",
    "robust": "arXiv:2403.00409",
    "bco_pair": "arXiv:2404.04656",
    "sppo_hard": "arXiv:2405.00675 eq. 4.7 with P = 1 and 0, eta = 1/beta",
    "aot": "arXiv:2406.05882, paired",
    "aot_pair": "arXiv:2406.05882, unpaired",
    "apo_zero": "arXiv:2408.06266 eq. 7, plus 1",
    "apo_down": "arXiv:2408.06266 eq. 8, plus 1",
    "discopop": "arXiv:2406.08414 eq. 5",
    "sigmoid_norm": "arXiv:2411.15124, length-normalised DPO",
    "sft": "negative log-likelihood of the chosen completion",
    "simpo": "arXiv:2405.14734 eq. 6",
    "orpo": "arXiv:2403.07691 eq. 6 and 7; NLL over the completion",
    "cpo": "arXiv:2401.08417; the paper sums its NLL (sft_average sum), its authors' code averages over tokens",
    "dpop": "arXiv:2402.13228 eq. 3",
    "odpo": "arXiv:2402.10571",
    "rpo_sq": "Nemotron-4 340B, arXiv:2406.11704; squared distance",
    "rpo_bwd_kl": "Nemotron-4 340B, arXiv:2406.11704",
    "rpo_fwd_kl": "Nemotron-4 340B, arXiv:2406.11704; KL the other way round",
    "rdpo": "arXiv:2403.19159",
    "simper": "arXiv:2502.00883",
    "alphapo": "arXiv:2501.03884",
}

DEFAULTS = {
    **{name: {"beta": 0.1} for name in ("hinge", "nca_pair", "sppo_hard", "apo_zero", "apo_down")},
    **{name: {"beta": 0.1, "label_smoothing": 0.0} for name in ("sigmoid", "exo_pair", "aot", "aot_pair")},
    **{name: {"beta": 0.1, "rpo_eta": 0.5} for name in ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"beta": 0.1, "ipo_average": "token"},
    "bco_pair": {"beta": 0.1, "delta": 0.0},
    "discopop": {"beta": 0.1, "discopop_tau": 0.05},
    "sigmoid_norm": {"beta": 5.0},
    "sft": {"sft_average": "token"},
    "simpo": {"beta": 2.5, "simpo_gamma": 1.0},
    "orpo": {"orpo_lambda": 0.1, "sft_average": "sequence"},
    "cpo": {"beta": 0.1, "cpo_alpha": 1.0, "label_smoothing": 0.0, "sft_average": "sequence"},
    "dpop": {"beta": 0.1, "dpop_lambda": 50.0},
    "odpo": {"beta": 0.1, "odpo_alpha": 1.0, "odpo_margin": "log"},
    "rdpo": {"beta": 0.1, "rdpo_alpha": 0.01},
    "simper": {},
    "alphapo": {"beta": 2.5, "simpo_gamma": 0.5, "alphapo_alpha": 0.25},
}

# What each option adds to the defaults, and the input sets it is tried on.
OPTIONS = {
    "sigmoid": [{"beta": b} for b in (0.01, 0.5, 1.0)] + [{"label_smoothing": e} for e in (0.1, 0.3, 0.5)],
    "hinge": [{"beta": 0.5}],
    "ipo": [{"ipo_average": "sum"}, {"beta": 0.5}, {"beta": 0.01}],
    "exo_pair": [{"label_smoothing": e} for e in (0.001, 0.1, 0.5)] + [{"beta": 0.5}],
    "nca_pair": [{"beta": 0.5}],
    "robust": [{"label_smoothing": e} for e in (0.0, 0.3, 0.49)] + [{"beta": 0.5}],
    "bco_pair": [{"delta": d} for d in (0.375, -1.25)] + [{"beta": 0.5, "delta": 0.1}],
    "sppo_hard": [{"beta": 0.001}, {"beta": 0.5}],
    "aot": [{"label_smoothing": 0.2}, {"beta": 0.5}],
    "aot_pair": [{"label_smoothing": 0.2}, {"beta": 0.5}],
    "apo_zero": [{"beta": 0.5}],
    "apo_down": [{"beta": 0.5}],
    "discopop": [{"discopop_tau": 0.5}, {"discopop_tau": 1.0}, {"beta": 0.5}],
    "sigmoid_norm": [{"beta": 0.1}],
    "sft": [{"sft_average": "sequence"}],
    "simpo": [{"simpo_gamma": 0.0}, {"beta": 10.0, "simpo_gamma": 3.0}],
    "orpo": [{"sft_average": "token"}, {"orpo_lambda": 1.0}, {"orpo_lambda": 0.0}],
    "cpo": [{"sft_average": "token"}, {"sft_average": "sum"}, {"cpo_alpha": 0.0}, {"label_smoothing": 0.2}],
    "dpop": [{"dpop_lambda": 5.0}, {"dpop_lambda": 0.0}, {"beta": 0.3}],
    "odpo": [{"odpo_alpha": 0.5}, {"odpo_margin": "raw"}, {"odpo_margin": "raw", "odpo_alpha": 0.1}],
    "rpo_sq": [{"rpo_eta": 1.0}, {"rpo_eta": 0.0}],
    "rpo_bwd_kl": [{"rpo_eta": 1.0}, {"rpo_eta": 0.0}],
    "rpo_fwd_kl": [{"rpo_eta": 1.0}, {"rpo_eta": 0.0}],
    "rdpo": [{"rdpo_alpha": 0.001}, {"rdpo_alpha": 0.1}, {"rdpo_alpha": 0.0}],
    "simper": [],
    "alphapo": [{"alphapo_alpha": a} for a in (0.0, 1e-9, 1.0, -0.5)],
}
F_DIVERGENCES = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    *({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": a} for a in (0.0, 1e-9, 0.3, 0.5, 1.0)),
]
F_LOSSES = ("sigmoid", "hinge", "robust", "exo_pair", "discopop", "ipo", "sigmoid_norm")


# Cases.


def inputs_of(name, set_name):
    """The columns of a set that the loss reads."""
    drop = set() if name in RATED else {"chosen_ratings", "rejected_ratings"}
    if name in WITHOUT_REF:
        drop |= {"ref_chosen_logps", "ref_rejected_logps"}
    return {k: v for k, v in SETS[set_name].items() if k not in drop and v is not None}


def words(params):
    return "".join(f" {k}={v}" for k, v in params.items())


def case(name, set_name, note=None, weights=(1.0,), **changes):
    """One case on sequence-level inputs: the loss's default parameters with `changes`."""
    params, inputs = DEFAULTS[name] | changes, inputs_of(name, set_name)
    start = start_value(name, params, inputs) if set_name == "tie" else None
    label = words(changes) + (f" loss_weights={weights[0]}" if weights != (1.0,) else "")
    entry = {"name": f"{name}/{set_name}{label}", "loss_type": name}
    entry |= {"loss_weights": list(weights), "params": params, "inputs": inputs}
    entry |= {"start_value": start} if start is not None else {}
    return entry | {"source": SOURCES[name]} | ({"note": note} if note else {})


def token_case(name, weights=(1.0,), note=None, **params):
    """One case on token-level inputs; `name` is one loss or several. All parameters are given."""
    inputs = TOKENS | (SUM_SQ if params.get("use_weighting") else {})
    names = name if isinstance(name, list) else [name]
    entry = {"name": f"{'+'.join(names)}/tokens{words(params)}", "loss_type": name, "loss_weights": list(weights)}
    entry |= {"params": params, "inputs": inputs, "source": "; ".join(SOURCES[n] for n in names)}
    return entry | ({"note": note} if note else {})


def plain_cases(name):
    """Default parameters on every set, options on the ordinary and (at a tie) on the start set."""
    free = name in WITHOUT_REF
    for set_name in ("ordinary", "one", "unequal") + (("certain",) if free else ("tie", "extreme")):
        yield case(name, set_name)
    for changes in OPTIONS[name]:
        yield case(name, "ordinary", **changes)
        yield case(name, "certain" if free else "tie", **changes)


def f_divergence_cases(name):
    for changes in F_DIVERGENCES:
        held = changes.get("f_alpha_divergence_coef", 1) > 0.1 and changes["f_divergence_type"] != "js_divergence"
        squares_e80 = name == "ipo" and held  # no float32 holds that
        for set_name in ("ordinary", "tie") if squares_e80 else ("ordinary", "tie", "extreme"):
            note = "u^-1 and u^-alpha are held at e^80" if set_name == "extreme" else None
            yield case(name, set_name, note, **changes)
    yield case(name, "ordinary", f_divergence_type="js_divergence", beta=0.5)
    if name == "ipo":
        yield case(name, "ordinary", f_divergence_type="js_divergence", ipo_average="sum")


WPO = {"use_weighting": True, "wpo_clamp": True}


def token_cases(name):
    """Options that need token log-probs: WPO's weights, LD-DPO's sums, token averages."""
    base = DEFAULTS[name]
    if name == "sft":
        yield from (token_case(name, sft_average=average) for average in ("token", "sequence"))
        return
    yield token_case(name, **base)
    yield token_case(name, **base, **WPO)
    yield token_case(name, **base, **(WPO | {"wpo_clamp": False}), note="the product of weights, not clamped at 1")
    for alpha in (0.0, 0.5, 1.0):
        yield token_case(name, **base, ld_alpha=alpha, ld_apply_to_ref=True)
    yield token_case(name, **base, ld_alpha=0.5, ld_apply_to_ref=False, note="the policy alone is desensitised")
    yield token_case(name, **base, **WPO, ld_alpha=0.5, ld_apply_to_ref=True)


def sigmoid_extras():
    yield case("sigmoid", "ordinary", weights=(2.0,))
    for name in ("sigmoid", "hinge", "ipo"):
        yield case(name, "ordinary", "ref_ inputs are to be ignored", reference_free=True)
    for average in ("sequence", "token"):
        yield case("sigmoid", "ordinary", rpo_alpha=1.0, rpo_average=average)
        yield case("ipo", "ordinary", rpo_alpha=0.25, rpo_average=average)
        yield token_case("sigmoid", **DEFAULTS["sigmoid"], rpo_alpha=0.5, rpo_average=average, ld_alpha=0.5)
        yield token_case("sigmoid", **DEFAULTS["sigmoid"], rpo_alpha=0.5, rpo_average=average, **WPO)


def several(names, weights, set_name="ordinary", **params):
    """Several losses summed with weights, on sequence-level inputs."""
    inputs = inputs_of(names[0], set_name)
    entry = {"name": f"{'+'.join(names)}/{set_name}{words(params)}", "loss_type": names, "loss_weights": weights}
    return entry | {"params": params, "inputs": inputs, "source": "; ".join(SOURCES[n] for n in names)}


def several_cases():
    mpo, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    mpo_params = {"beta": 0.1, "label_smoothing": 0.0, "delta": 0.0, "sft_average": "sequence"}
    for set_name in ("ordinary", "one", "unequal", "tie", "extreme", "decimal"):
        yield several(mpo, weights, set_name, **mpo_params)
    yield several(mpo, weights, **(mpo_params | {"delta": 0.25}))
    yield several(["sigmoid", "sft"], [1.0, 0.2], beta=0.1, label_smoothing=0.0, sft_average="token")
    yield several(["sigmoid", "sft"], [1.0, 0.2], beta=0.1, label_smoothing=0.1, sft_average="sequence")
    yield several(["hinge", "ipo"], [0.5, 0.25], beta=0.1, ipo_average="token")
    yield several(["robust", "exo_pair"], [1.0, 0.5], beta=0.1, label_smoothing=0.1)
    yield several(["sigmoid", "hinge"], [0.3, 0.7], beta=0.2, label_smoothing=0.0, f_divergence_type="js_divergence")
    yield several(["apo_zero", "nca_pair", "sppo_hard"], [1.0, 1.0, 0.001], beta=0.1)
    yield several(["sigmoid", "sigmoid_norm"], [1.0, -0.5], beta=0.5, label_smoothing=0.0)
    yield token_case(mpo, weights, **mpo_params)
    yield token_case(mpo, weights, **mpo_params, **WPO, note="sft is never weighted")
    yield token_case(mpo, weights, **mpo_params, ld_alpha=0.5, ld_apply_to_ref=True, note="sft reads plain log-probs")
    yield token_case(["sigmoid", "sft"], [1.0, 0.2], beta=0.1, label_smoothing=0.0, sft_average="token", **WPO)


def unsolved():
    """{file stem: [case without expected]} for all files."""
    files = {name: list(plain_cases(name)) for name in LOSSES}
    for name in F_LOSSES:
        files[name] += f_divergence_cases(name)
    for name in ("sigmoid", "hinge", "ipo", "sft"):
        files[name] += token_cases(name)
    for name in ("sigmoid", "ipo", "nca_pair", "aot", "aot_pair", "sft", "orpo", "odpo", "alphapo"):
        files[name].append(case(name, "decimal"))
    for extra in sigmoid_extras():
        files[extra["loss_type"]].append(extra)
    return files | {"several": list(several_cases())}


def solved(entry):
    """The case with its expected numbers in the order that the files keep."""
    tail = {k: entry[k] for k in ("start_value", "source", "note") if k in entry}
    return {k: v for k, v in entry.items() if k not in tail} | {"expected": expected(entry)} | tail


def dumps(value, indent=0):
    """JSON with one key per line and lists of numbers on one line."""
    if not isinstance(value, dict):
        return json.dumps(value)
    pad = " " * (indent + 1)
    rows = [f"{pad}{json.dumps(k)}: {dumps(v, indent + 1)}" for k, v in value.items()]
    return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}" if rows else "{}"


def write_file(stem, cases):
    body = ",\n".join(dumps(solved(entry)) for entry in cases)
    (HERE / "losses" / f"{stem}.json").write_text('{"format": 1, "cases": [\n' + body + "\n]}\n")


def write_checksums():
    """SHA256SUMS of all data, in the format of sha256sum -c, run in this directory."""
    files = sorted(f for f in HERE.rglob("*") if f.suffix in (".json", ".safetensors"))
    rows = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(HERE).as_posix()}\n" for f in files]
    (HERE / "SHA256SUMS").write_text("".join(rows))


def main():
    files = unsolved()
    if len(sys.argv) > 1:
        print(",\n".join(dumps(solved(entry)) for entry in files[sys.argv[1]]))
        return
    (HERE / "losses").mkdir(exist_ok=True)
    for stem, cases in files.items():
        write_file(stem, cases)
        print(f"losses/{stem}.json: {len(cases)} cases")
    write_checksums()


if __name__ == "__main__":
    main()

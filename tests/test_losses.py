"""What the golden files do not reach: metrics, averages over the global batch, defaults, refusals."""

import math

import pytest
import torch

import dpo
import losses
from parts import loss_checks

NAMES = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "chosen_lengths",
         "rejected_lengths")


def pairs(**columns) -> "losses.PairLogps":
    """Three pairs with log-ratios (1, -3), (-2, 4), (5, 5), so margins 4, -6, 0."""
    policy, ref = [[-9.0, -12.0, -5.0], [-23.0, -4.0, -5.0]], [[-10.0, -10.0, -10.0], [-20.0, -8.0, -10.0]]
    values = [*policy, *ref, [2, 8, 5], [4, 1, 5]]
    given = dict(zip(NAMES, (torch.tensor(v, dtype=torch.float64) for v in values))) | columns
    return losses.PairLogps(**given)


def options(**changed) -> dict:
    return vars(dpo.DPOConfig(**changed)) | {"delta": 0.0}


def test_metrics_by_hand():
    got = {name: value.tolist() for name, value in losses.pair_metrics(pairs(), 0.5).items()}
    assert got == {
        "rewards/chosen": [0.5, -1.0, 2.5], "rewards/rejected": [-1.5, 2.0, 2.5], "rewards/margins": [2.0, -3.0, 0.0],
        "rewards/accuracies": [1.0, 0.0, 0.5], "kl": [-1.0, 1.0, 5.0],
        "logps/chosen": [-9.0, -12.0, -5.0], "logps/rejected": [-23.0, -4.0, -5.0]}


def test_every_score_is_0_where_policy_equals_reference():
    """The constant cancels in every loss that compares two scores, but not in the paper's table."""
    for name, score in losses.F_DIVERGENCES.items():
        r = torch.zeros((), dtype=torch.float64)
        value = score(r, 0.3) if name == "alpha_divergence" else score(r)
        assert abs(value.item()) < 1e-15, name


def test_rewards_ignore_the_f_divergence():
    plain = losses.pair_metrics(pairs(), 0.5)
    bent = losses.pair_metrics(pairs(score=losses.js_divergence), 0.5)
    assert all(torch.equal(plain[name], bent[name]) for name in plain)


def test_sft_divides_by_the_tokens_of_the_global_batch_where_they_are_known():
    """A micro-batch's share: sum of its NLLs / tokens of the whole batch x its pairs, so that the parts add up."""
    assert losses.sft(pairs(), "token").tolist() == [9 / 5, 12 / 5, 5 / 5]  # 15 tokens in 3 pairs
    assert losses.sft(pairs(chosen_tokens_per_pair=torch.tensor(4.0)), "token").tolist() == [9 / 4, 3.0, 5 / 4]
    assert losses.sft(pairs(), "sequence").tolist() == [4.5, 1.5, 1.0]
    assert losses.sft(pairs(), "sum").tolist() == [9.0, 12.0, 5.0]


def test_without_weights_every_loss_counts_once():
    x = pairs()
    both = losses.pair_losses(x, options(loss_type=["sigmoid", "sft"]))
    apart = losses.sigmoid(x, 0.1, 0.0) + losses.sft(x, "token")
    assert torch.allclose(both, apart, rtol=0, atol=1e-15)
    weighed = losses.pair_losses(x, options(loss_type=["sigmoid", "sft"], loss_weights=[0.0, 2.0]))
    assert torch.allclose(weighed, 2 * losses.sft(x, "token"), rtol=0, atol=1e-15)


def test_rpo_adds_the_negative_log_likelihood_and_zero_adds_nothing():
    x = pairs()
    plain = losses.pair_losses(x, options())
    assert torch.equal(losses.pair_losses(x, options(rpo_alpha=0.0)), plain)
    assert torch.allclose(losses.pair_losses(x, options(rpo_alpha=1.0)), plain + losses.sft(x, "sequence"), atol=1e-15)


def test_wpo_weights_carry_no_gradient():
    logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    weights = losses.wpo_weights(logps, torch.tensor([-0.5, -1.0, -0.25]), torch.tensor([[2, 1]]), True)
    assert not weights.requires_grad
    assert weights.tolist() == pytest.approx([math.exp(-0.75 - 0.25)])


def test_sums_and_positions_of_completions_laid_end_to_end():
    lengths = torch.tensor([[3, 1], [0, 2]])
    assert losses.token_positions(lengths, 6).tolist() == [0, 1, 2, 0, 0, 1]
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert losses.completion_sums(values, lengths).tolist() == [[7.0, 8.0], [0.0, 48.0]]
    assert losses.completion_sums(values, lengths, 0.5).tolist() == [[4.0, 8.0], [0.0, 24.0]]


def test_a_forward_without_pairs_has_no_sums():
    """A rank that has no pair left in a step runs it all the same."""
    none = torch.zeros(0, requires_grad=True)
    for alpha in (None, 0.5):
        sums = losses.completion_sums(none, torch.zeros(0, 2, dtype=torch.int64), alpha)
        assert sums.shape == (0, 2) and sums.requires_grad


def test_every_loss_reads_only_flags_that_exist():
    known = {*dpo.DPOConfig.__annotations__, "delta"}
    assert len(losses.LOSSES) == 27
    for name, loss in losses.LOSSES.items():
        assert set(losses.flags_of(loss)) <= known, name


# Refusals

WORKS = [
    {}, {"label_smoothing": 0.5}, {"label_smoothing": 0.3, "loss_type": ["robust"]}, {"ld_alpha": 0.0},
    {"ld_alpha": 1.0}, {"loss_type": list(losses.LOSSES)}, {"beta": 3.0, "loss_type": ["simper"]},
    {"use_weighting": True, "wpo_clamp": False}, {"ld_alpha": 0.5, "ld_apply_to_ref": False},
    {"loss_type": ["sigmoid", "sft"], "use_weighting": True}, {"rpo_alpha": 1.0, "rpo_average": "token"},
    {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    {"loss_type": ["sigmoid", "simpo"], "reference_free": True},
    {"loss_type": ["sigmoid", "sigmoid_norm"], "ld_alpha": 0.5},
    {"loss_type": ["hinge", "cpo"], "label_smoothing": 0.1}, {"loss_type": ["sigmoid", "sft"], "rpo_alpha": 1.0},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, {"discopop_tau": 0.01, "loss_type": ["discopop"]},
    *({"loss_type": [name], "f_divergence_type": "forward_kl"} for name in sorted(losses.TAKES_F_DIVERGENCE)),
]
REFUSED = [
    ({"loss_type": ["dpo"]}, "--loss_type dpo: unknown; one of"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weights for 2 loss types"),
    ({"label_smoothing": 0.5, "loss_type": ["robust"]}, "robust divides"),
    ({"label_smoothing": 0.5, "loss_type": ["sigmoid", "robust"]}, "robust divides"),
    ({"label_smoothing": 0.51}, "0 <= eps < 0.5"), ({"label_smoothing": -0.01}, "0 <= eps < 0.5"),
    ({"beta": 0.0}, "--beta 0.0: it must be above 0"), ({"ld_alpha": 1.01}, "between 0 and 1"),
    ({"ld_alpha": -0.01}, "between 0 and 1"), ({"discopop_tau": 0.0, "loss_type": ["discopop"]}, "above 0"),
    ({"f_divergence_type": "kl"}, "one of reverse_kl forward_kl js_divergence alpha_divergence"),
    ({"loss_type": ["hinge"], "label_smoothing": 0.1},
     "does not read it; aot aot_pair aot_unpaired cpo exo_pair robust sigmoid"),
    ({"simpo_gamma": 0.3}, "--simpo_gamma 0.3: --loss_type sigmoid does not read it; alphapo simpo do"),
    ({"sft_average": "sum"}, "cpo orpo sft do"),
    *(({"loss_type": [name], "f_divergence_type": "forward_kl"}, f"f_divergence_type with --loss_type {name}:")
      for name in sorted(losses.LOSSES.keys() - losses.TAKES_F_DIVERGENCE - {"sft"})),
    *(({"loss_type": [name], "use_weighting": True}, "belong to no one pair")
      for name in ("aot", "aot_pair", "aot_unpaired", "sft")),
    *(({"loss_type": [name], "ld_alpha": 0.5}, "divide by the length already")
      for name in ("sft", "sigmoid_norm", "simpo", "orpo", "simper", "alphapo")),
    *(({"loss_type": [name], "reference_free": True}, "read no reference anyway")
      for name in ("sft", "simpo", "orpo", "cpo", "simper", "alphapo")),
    ({"loss_type": ["sft"], "rpo_alpha": 1.0}, "adds the same term again"),
    ({"f_alpha_divergence_coef": 0.3}, "read only with --f_divergence_type alpha_divergence"),
    ({"wpo_clamp": False}, "read only with --use_weighting"), ({"ld_apply_to_ref": False}, "read only with --ld_alpha"),
    ({"rpo_average": "token"}, "read only with --rpo_alpha"),
]


def refusal_of(changed: dict) -> str:
    """What the check says of these options; "" where it takes them."""
    try:
        loss_checks.check_losses(options(**changed), options())
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("changed", WORKS, ids=str)
def test_what_has_a_meaning_is_taken(changed):
    assert refusal_of(changed) == ""


@pytest.mark.parametrize("changed,words", REFUSED, ids=str)
def test_what_has_none_is_refused_by_name(changed, words):
    refusal = refusal_of(changed)
    assert words in refusal
    assert refusal.startswith("--")

"""The tests of losses.py catch every small mistake in it."""

import mutants
import pytest

MUTANTS = mutants.find_mutants()
FUNCTIONS = sorted({mutant.function for mutant in MUTANTS})


def test_the_file_as_it_is_is_not_caught():
    whole = mutants.Mutant("none", "sigmoid", mutants.parse("losses"))
    assert mutants.caught_by(whole) is None


def test_a_mutant_of_every_loss_is_caught():
    for name in "sigmoid hinge ipo bco_pair discopop aot sft orpo odpo completion_sums pair_losses".split():
        mutant = next(m for m in MUTANTS if m.function == name and m.name not in mutants.EQUIVALENT)
        assert mutants.caught_by(mutant), mutant.name


def test_there_are_mutants_of_every_kind_and_every_excuse_is_of_one():
    names = {mutant.name for mutant in MUTANTS}
    assert len(names) > 600 and mutants.EQUIVALENT.keys() <= names
    sign = "hinge: 1 - beta * x.delta_score -> 1 + beta * x.delta_score"
    term = "orpo: sft(x, sft_average) - orpo_lambda * F.logsigmoid(ratio) -> sft(x, sft_average)"
    assert {sign, term, "apo_down: x.chosen_logratios -> x.rejected_logratios", "nca_pair: 0.5 -> 1.5"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_mutant_is_caught(function):
    mine = [mutant for mutant in MUTANTS if mutant.function == function]
    survivors = {mutant.name for mutant in mine if mutants.caught_by(mutant) is None}
    assert survivors == {mutant.name for mutant in mine if mutant.name in mutants.EQUIVALENT}

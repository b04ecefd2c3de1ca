"""docs/losses.md and docs/losses.svg say what losses.py computes."""

import re

import pytest
import torch
from conftest import ROOT

import dpo
import losses
from extras import gallery

TEXT = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
SECTIONS = {section.split("`")[1]: section for section in TEXT.split("\n### ")[1:]}


def at_the_start(name: str) -> torch.Tensor:
    """The loss where policy equals reference: chosen ten tokens longer, its score higher by 1."""
    one = torch.ones(1, dtype=torch.float64)
    x = losses.PairLogps(-40 * one, -30 * one, -40 * one, -30 * one, 30 * one, 20 * one, one, 0 * one)
    return losses.pair_losses(x, vars(dpo.DPOConfig(loss_type=[name])) | {"delta": 0.0})


def test_every_loss_has_its_section():
    named = set(SECTIONS) | {"aot_pair"}
    assert named == set(losses.LOSSES)
    assert "`aot_pair`" in SECTIONS["aot_unpaired"] and losses.LOSSES["aot_pair"] is losses.LOSSES["aot_unpaired"]


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_has_three_lines_a_formula_its_start_and_its_flags(name):
    section = SECTIONS[name].split("\n## ")[0]
    assert re.findall(r"^(\d)\. ", section, re.M) == ["1", "2", "3"] and section.count("```math") == 1
    start, flags = re.search(r"^Start: (none|\d\S*\d).* Flags: (.+?)\.(?: |$)", section, re.M).groups()
    read = {"bco_delta" if flag == "delta" else flag for flag in losses.flags_of(losses.LOSSES[name])}
    assert set(re.findall(r"`(\w+)`", flags)) == read
    if name in losses.NO_REFERENCE:
        assert start == "none"
    else:
        assert float(start) == pytest.approx(at_the_start(name).item(), abs=5e-7)


def test_papers_are_those_named_in_losses_py():
    for name, section in SECTIONS.items():
        cited = set(re.findall(r"arXiv:(\d{4}\.\d{5})", losses.LOSSES[name].__doc__ or ""))
        assert cited <= set(re.findall(r"\d{4}\.\d{5}", section)), name


def test_links_lead_to_the_paper_they_name():
    for shown, link in re.findall(r"\[arXiv:([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)", TEXT):
        assert shown == link
    assert TEXT.count("[arXiv:") == TEXT.count("](https://arxiv.org/abs/")


def test_every_option_is_explained():
    for flag in ("f_divergence_type", "use_weighting", "ld_alpha", "rpo_alpha", "reference_free", "sync_ref_model"):
        assert f"**`{flag}`**" in TEXT
    for kind in losses.F_DIVERGENCES:
        assert f"| `{kind}` |" in TEXT


def test_discopop_has_its_minimum_where_the_page_says():
    z = torch.linspace(-0.2, -0.05, 15001, dtype=torch.float64)
    x = losses.PairLogps(z, 0 * z, 0 * z, 0 * z, z, z)
    assert z[losses.discopop(x, 1.0, 0.05).argmin()].item() == pytest.approx(-0.1186, abs=5e-5)


# The picture


def numbers(svg: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+\.\d", svg)]


def test_the_picture_is_what_the_script_draws():
    committed, drawn = gallery.PICTURE.read_text(encoding="utf-8"), gallery.draw(gallery.curves())
    assert re.sub(r"-?\d+\.\d", "#", committed) == re.sub(r"-?\d+\.\d", "#", drawn)
    assert numbers(committed) == pytest.approx(numbers(drawn), abs=0.15)  # another machine may round the other way


def test_the_picture_has_every_loss_once_and_every_divergence():
    svg = gallery.PICTURE.read_text(encoding="utf-8")
    titles = re.findall(r"<tspan[^>]*>(\w+)</tspan>", svg)
    assert sorted(titles) == sorted([*gallery.ORDER, "sigmoid", "sigmoid", "sigmoid"])
    assert set(gallery.ORDER) | {"aot_pair"} == set(losses.LOSSES)
    assert all(f">{kind}<" in svg for kind in gallery.DIVERGENCES)


def test_the_slopes_are_those_of_the_losses():
    """A central difference over a tenth of a nat."""
    for name in ("sigmoid", "ipo", "simper", "rpo_fwd_kl"):
        curve = gallery.make_curve(name)
        options = vars(dpo.DPOConfig(loss_type=[name])) | {"delta": 0.0}
        for at in (10, 60, 95):
            h = torch.tensor([-60.0 + at], dtype=torch.float64)
            above, below = (losses.pair_losses(gallery.pair_at(h + step), options).item() for step in (0.05, -0.05))
            assert curve.slope[at].item() == pytest.approx((above - below) / 0.1, rel=1e-3), name

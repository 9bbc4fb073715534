"""What the site adds to MkDocs."""

from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the site needs the extra docs")

from website import hook
from website.links import LINK

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("link", "origin", "address", "there"),
    [
        ("[m](docs/memory.md#before-a-run)", "README.md", "index.md", "[m](memory.md#before-a-run)"),
        ("![f](docs/figures/frontier.png)", "README.md", "index.md", "![f](figures/frontier.png)"),
        ("[start](../README.md)", "docs/ppo.md", "ppo.md", "[start](index.md)"),
        ("[ppo](../ppo.md#rewards)", "docs/course/ppo.md", "course/ppo.md", "[ppo](../ppo.md#rewards)"),
        ("[x](https://a.b/c.md)", "docs/ppo.md", "ppo.md", "[x](https://a.b/c.md)"),
        ("[here](#rewards)", "docs/ppo.md", "ppo.md", "[here](#rewards)"),
        ("[all](../configs)", "docs/ppo.md", "ppo.md", "all"),
        ("[c](../configs/ppo.yaml)", "docs/ppo.md", "ppo.md", "[c](source/configs/ppo.yaml.md)"),
    ],
)
def test_links_of_the_repository_are_led_to_their_place_on_the_site(link, origin, address, there):
    assert hook.relinked(LINK.fullmatch(link), origin, address) == there


def test_a_link_to_code_leads_to_its_line():
    link = LINK.fullmatch("[`dpo_loss`](../../lit_rlhf/losses/preference.py)")
    path, number = hook.relinked(link, "docs/course/dpo.md", "course/dpo.md").split("#__codelineno-0-")
    assert path == "[`dpo_loss`](../source/lit_rlhf/losses/preference.py.md"
    lines = (ROOT / "lit_rlhf/losses/preference.py").read_text().splitlines()
    assert lines[int(number.rstrip(")")) - 1].startswith("def dpo_loss(")


def test_equations_become_mathml():
    inline = hook.on_page_content(r'<p>as <span class="arithmatex">\(a &lt; b\)</span></p>')
    assert inline.startswith("<p>as <math") and "<mo>&#x0003C;</mo>" in inline and "arithmatex" not in inline
    block = hook.on_page_content('<div class="arithmatex">\\[\nx^2\n\\]</div>')
    assert 'display="block"' in block and "<msup>" in block


def test_public_names_lead_to_their_docstrings():
    names = hook.public_names()
    assert "DPO" in names["lit_rlhf"] and "TokenEnv" in names["token_mdp"]
    assert "::: lit_rlhf.losses.dpo_loss\n" in hook.api_page("lit_rlhf.losses", names["lit_rlhf.losses"])
    linked = hook.linked_names("## lit_rlhf.losses\n\n- `dpo_loss`: Loss of each pair.")
    assert "- [`dpo_loss`](api/lit_rlhf.losses.md#lit_rlhf.losses.dpo_loss): Loss of each pair." in linked
